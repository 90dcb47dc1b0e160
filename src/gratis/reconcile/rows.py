"""What a provider's report says, row by row: who used how many tokens in which tier, and what was charged.

A row is a fact of the report and knows where it stands in it. Nothing is judged here.
"""

from __future__ import annotations

from datetime import UTC, datetime, time, timedelta
from decimal import Decimal  # noqa: TC003 - a field of a struct
from typing import Final

from msgspec import Struct

from gratis.errors import GratisError
from gratis.model import AT_MAX, EPOCH, shown

DAY: Final = timedelta(days=1)
FREE_TIER: Final = "incentivized-tier"
BILLED_TIERS: Final = frozenset({"auto", "default", "fast", "flex", "flex-tier", "priority", "priority-tier", "scale"})
COMPLETIONS: Final = "completions"
TOKEN_KINDS: Final = frozenset({COMPLETIONS, "embeddings", "moderations"})
HOSTED_TOOLS: Final = frozenset({"web_search_calls", "file_search_calls", "code_interpreter_sessions"})


class ReportError(GratisError):
    """A report that cannot be read: which file, where in it, and what was expected."""

    def __init__(self, file: str, where: str, message: str) -> None:
        self.file = file
        self.where = where
        super().__init__(": ".join(part for part in (file, where, message) if part))


class UsageRow(Struct, frozen=True, kw_only=True):
    """Traffic of one span, as far as the report tells it apart: what is not grouped by is None.

    `cached_tokens` and `cache_write_tokens` are parts of `input_tokens`. Rows about hosted tools, images and the like
    have no tokens; `count` is how many there were. `owner` is the user and the key, where the report names them.
    """

    start: datetime
    end: datetime
    kind: str
    source: str
    project: str | None = None
    model: str | None = None
    service_tier: str | None = None
    batch: bool | None = None
    owner: tuple[str | None, str | None] = (None, None)
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    uncached_tokens: int | None = None
    requests: int = 0
    count: int = 0

    @property
    def day(self) -> datetime:
        """The midnight in UTC with which its day begins."""
        return day_of(self.start)

    @property
    def tokens(self) -> int:
        """Input and output together."""
        return self.input_tokens + self.output_tokens

    @property
    def is_free(self) -> bool:
        """Whether the provider took it for complimentary."""
        return self.service_tier == FREE_TIER


class CostRow(Struct, frozen=True, kw_only=True):
    """What was charged for a line item in one span; `model` is what its name begins with."""

    start: datetime
    end: datetime
    source: str
    amount: Decimal
    currency: str
    project: str | None = None
    line_item: str | None = None
    model: str | None = None
    quantity: Decimal | None = None
    quantity_unit: str | None = None

    @property
    def day(self) -> datetime:
        """The midnight in UTC with which its day begins."""
        return day_of(self.start)


class Report(Struct, frozen=True):
    """All that one or several files say: rows, the spans that they are about, and what is odd about them."""

    usage: tuple[UsageRow, ...] = ()
    costs: tuple[CostRow, ...] = ()
    usage_spans: tuple[tuple[datetime, datetime], ...] = ()
    cost_spans: tuple[tuple[datetime, datetime], ...] = ()
    notes: tuple[str, ...] = ()


def day_of(instant: datetime) -> datetime:
    """The midnight in UTC with which an instant's day begins."""
    return datetime.combine(instant.date(), time(0), UTC)


def from_unix(file: str, where: str, field: str, value: object) -> datetime:
    """The instant of a Unix time in whole seconds."""
    latest = int((AT_MAX - EPOCH).total_seconds())
    if type(value) is not int or not 0 < value < latest:
        raise ReportError(file, where, f"{field}: found {shown(value)}; expected a Unix time in whole seconds")
    return EPOCH + timedelta(seconds=value)


def span(file: str, where: str, start: datetime, end: datetime) -> tuple[datetime, datetime]:
    """A span of one UTC day at most: what crosses midnight could not be compared by day."""
    if not start < end <= day_of(start) + DAY:
        found = f"end_time: found {end.isoformat()} after start_time {start.isoformat()}"
        raise ReportError(file, where, f"{found}; expected a span within one UTC day")
    return start, end


def model_of(line_item: str | None) -> str | None:
    """The model that a line item is about: what its name begins with, up to a comma or a space."""
    if line_item is None:
        return None
    name = line_item.split(",", 1)[0].split(" ", 1)[0].strip()
    return name or None


def day_text(instant: datetime) -> str:
    """A day as people write it."""
    return instant.date().isoformat()


def merged(reports: list[Report]) -> Report:
    """Several reports as one; a note that all of them carry is kept once."""
    return Report(
        tuple(row for report in reports for row in report.usage),
        tuple(row for report in reports for row in report.costs),
        tuple(one for report in reports for one in report.usage_spans),
        tuple(one for report in reports for one in report.cost_spans),
        tuple(dict.fromkeys(note for report in reports for note in report.notes)),
    )
