"""Several files about the same days: what counts once, and what cannot be added up.

Pages and the dashboard's export of a day are the same day twice: the pages count, and what the export says otherwise
is noted. Spans of different length, or two groupings of one span, would count traffic twice: they are refused.
"""

from __future__ import annotations

from collections import defaultdict
from decimal import Decimal
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from msgspec import Struct
from msgspec.structs import replace

from gratis.prices import total
from gratis.reconcile.rows import COMPLETIONS, Report, ReportError, day_of, day_text, merged

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from gratis.reconcile.rows import CostRow

COSTS: Final = "costs"
CENT: Final = Decimal("0.01")
TOLD_MAX: Final = 3
DIMENSIONS: Final = (("project", "project"), ("model", "model"), ("service_tier", "service tier"))

Span = tuple["datetime", "datetime"]


class Source(Struct, frozen=True):
    """A page or an export: its name, whether it is an export, what it is about, and what it says."""

    name: str
    is_export: bool
    kind: str | None
    report: Report


def once(sources: Sequence[Source]) -> Report:
    """All that these say, each day of it once."""
    for is_export in (False, True):
        those = [source for source in sources if source.is_export is is_export]
        _check_usage([source for source in those if source.kind == COMPLETIONS])
    pages = merged([source.report for source in sources if not source.is_export])
    about = _days(source for source in sources if source.kind == COMPLETIONS)
    charged = _days(source for source in sources if source.kind == COSTS)
    kept = [pages]
    for source in sources:
        if source.is_export:
            days = charged if source.kind == COSTS else about
            kept.append(_without(source, days, pages))
    return merged(kept)


def _days(sources: Iterable[Source]) -> set[datetime]:
    """The days that pages are about."""
    return {
        day_of(start)
        for source in sources
        if not source.is_export
        for start, _ in (*source.report.usage_spans, *source.report.cost_spans)
    }


def _check_usage(sources: Sequence[Source]) -> None:
    """Refuse spans of which one is a part of the other, and two groupings of one span."""
    grouped: dict[Span, tuple[tuple[str, ...], Source]] = {}
    for source in sources:
        names = tuple(name for field, name in DIMENSIONS if any(getattr(row, field) for row in source.report.usage))
        for span in {(row.start, row.end) for row in source.report.usage}:
            before = grouped.setdefault(span, (names, source))
            if before[0] != names:
                found = f"{day_text(span[0])} is grouped by {_listed(names)}, and in {before[1].name}"
                expected = "expected one grouping of a day: together they would count it twice"
                raise ReportError(source.name, "", f"{found} by {_listed(before[0])}; {expected}")
    spans = sorted((span, source.name) for source in sources for span in source.report.usage_spans)
    for ((start, end), first), ((after, until), second) in pairwise(spans):
        if after < end and (after, until) != (start, end):
            found = f"{after:%Y-%m-%d %H:%M} to {until:%Y-%m-%d %H:%M} overlaps a span of {first}"
            raise ReportError(second, "", f"{found}; expected one report of each day: together they would count twice")


def _without(source: Source, days: set[datetime], pages: Report) -> Report:
    """An export without the days that pages are about, and how the two agree on these."""
    report = source.report
    usage = tuple(row for row in report.usage if row.day not in days)
    costs = tuple(row for row in report.costs if row.day not in days)
    shared = sorted({day_of(start) for start, _ in (*report.usage_spans, *report.cost_spans)} & days)
    if not shared:
        return report
    sums = _charged if source.kind == COSTS else _used
    here, there = sums(report), sums(pages)
    apart = [day for day in shared if abs(here[day] - there[day]) >= CENT]  # exports print amounts as floats
    unit = "charged" if source.kind == COSTS else "tokens"
    notes = [
        f"{source.name}: {day_text(day)}: found {here[day]:,f} {unit}; the pages say {there[day]:,f}, and are counted"
        for day in apart[:TOLD_MAX]
    ]
    if len(apart) > TOLD_MAX:
        notes.append(
            f"{source.name}: {len(apart) - TOLD_MAX:,} more days are otherwise in the pages, which are counted"
        )
    if len(apart) < len(shared):
        notes.append(f"{source.name}: the pages say the same of {len(shared) - len(apart):,} days, which count once")
    return replace(
        report,
        usage=usage,
        costs=costs,
        usage_spans=tuple(span for span in report.usage_spans if day_of(span[0]) not in days),
        cost_spans=tuple(span for span in report.cost_spans if day_of(span[0]) not in days),
        notes=(*report.notes, *notes),
    )


def _used(report: Report) -> defaultdict[datetime, Decimal]:
    sums: defaultdict[datetime, Decimal] = defaultdict(Decimal)
    for row in report.usage:
        if row.kind == COMPLETIONS:
            sums[row.day] += row.tokens
    return sums


def _charged(report: Report) -> defaultdict[datetime, Decimal]:
    rows: defaultdict[datetime, list[CostRow]] = defaultdict(list)
    for row in report.costs:
        rows[row.day].append(row)
    return defaultdict(Decimal, {day: total(row.amount for row in those) for day, those in rows.items()})


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "nothing"
