"""One table: what was measured, over what, against which goal, and whether it was met."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

BIG = 100
HEAD = (
    "| work | measured | p99 | ratio (lowest – highest round) | goal | met | remarks; of others, what they do not do |"
)
RULE = "|---|---:|---:|---:|---|---|---|"


class Goal(NamedTuple):
    """What a figure has to be, at most or at least: its ratio where it has one, or else itself."""

    number: str
    sign: str
    limit: float
    unit: str = "×"
    beyond: str = ""

    def text(self) -> str:
        """As the table has it."""
        return f"{self.number}: {self.sign} {self.limit:g} {self.unit}{self.beyond}"

    def is_met(self, found: float) -> bool:
        """Whether a figure is what it has to be."""
        return found <= self.limit if self.sign == "≤" else found >= self.limit


class Ratio(NamedTuple):
    """A figure over another of the same round, round by round."""

    values: Sequence[float]
    over: str


class Row(NamedTuple):
    """A line of the table; one without values is a heading, or says why there are none."""

    work: str
    values: Sequence[float] = ()
    unit: str = ""
    p99: Sequence[float] = ()
    ratio: Ratio | None = None
    goal: Goal | None = None
    remarks: str = ""

    def text(self) -> str:
        """As Markdown."""
        measured = f"{_spread(self.values)} {self.unit}" if self.values else ""
        p99 = f"{_number(statistics.median(self.p99))} {self.unit}" if self.p99 else ""
        ratio = f"{_spread(self.ratio.values)} × {self.ratio.over}" if self.ratio else ""
        goal = self.goal.text() if self.goal else ""
        return f"| {self.work} | {measured} | {p99} | {ratio} | {goal} | {self._met()} | {self.remarks} |"

    def _met(self) -> str:
        judged = self.ratio.values if self.ratio else self.values
        if self.goal is None:
            return ""
        if not judged or (self.goal.unit == "×" and self.ratio is None):
            return "not known"
        return "yes" if self.goal.is_met(statistics.median(judged)) else "**no**"


def sheet(title: str, header: Sequence[str], rows: Sequence[Row]) -> str:
    """The table as Markdown, below what it was measured on."""
    return "\n".join([f"### {title}", "", *header, "", HEAD, RULE, *[row.text() for row in rows]])


def over(ours: Sequence[float], base: Sequence[float]) -> list[float]:
    """Ours over the base's, round by round."""
    return [one / other for one, other in zip(ours, base, strict=True)]


def _spread(values: Sequence[float]) -> str:
    median = _number(statistics.median(values))
    return median if len(values) == 1 else f"{median} ({_number(min(values))} – {_number(max(values))})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= BIG else f"{value:.2f}"
