"""Report and decisions side by side: what each says of one UTC day, project and model.

A dimension that either side cannot tell apart is left out of both: what is not grouped is compared as a whole. Rows are
summed, never dropped; which of them are alike is remembered, for a difference that they may explain.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gratis.errors import GratisError
from gratis.model import Kind
from gratis.reconcile.own import REPORTED_AS
from gratis.reconcile.rows import (
    BILLED_TIERS,
    COMPLETIONS,
    DAY,
    FREE_TIER,
    HOSTED_TOOLS,
    TOKEN_KINDS,
    UsageRow,
    day_of,
    day_text,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

    from gratis.offer import Offer
    from gratis.reconcile.own import Item, Own
    from gratis.reconcile.rows import Report

Key = tuple["datetime", str | None, str | None]
"""A UTC day, by its midnight, a project and a model."""

Span = tuple["datetime", "datetime"]


@dataclass(slots=True)
class Cell:
    """What the report says of one day, project and model, and which decisions are about it."""

    tokens: int = 0
    given: int = 0
    free: int = 0
    unknown: int = 0
    requests: int = 0
    free_requests: int = 0
    rows: list[UsageRow] = field(default_factory=list)
    places: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Table:
    """Both sides, over the days that the report covers; `apart` says that they have no day in common, if so."""

    since: datetime
    until: datetime
    by_project: bool
    by_model: bool
    by_tier: bool
    cells: dict[Key, Cell]
    keys: tuple[Key | None, ...]
    tools: Counter[tuple[datetime, str | None]]
    has_cached: bool
    notes: tuple[str, ...]
    apart: str = ""

    def key(self, day: datetime, project: str | None, model: str | None) -> Key:
        """The cell to which such traffic belongs."""
        return day, project if self.by_project else None, model if self.by_model else None

    def covers(self, day: datetime) -> bool:
        """Whether the report is about this day."""
        return self.since <= day < self.until


def beside(report: Report, own: Own, *, since: datetime | None, until: datetime | None) -> Table:
    """Report and decisions in cells."""
    rows = [row for row in report.usage if _within(row.start, since, until)]
    spans = [span for span in report.usage_spans if _within(span[0], since, until)]
    if not spans:
        found = f"found {_given(report)}; expected pages of the Usage API (usage/completions) or its export"
        raise GratisError(f"reconcile: no report of usage for these days: {found}")
    first, last = day_of(min(start for start, _ in spans)), day_of(max(start for start, _ in spans)) + DAY
    counted = [row for row in rows if row.kind in TOKEN_KINDS]
    kinds = {row.kind for row in counted} | {COMPLETIONS}
    asked = [row for row in counted if row.kind == COMPLETIONS]
    here = [item for item in own.items if first <= item.request.at < last]
    by_project = _is_by_project(asked, here)
    by_model, by_tier = any(row.model for row in asked), any(row.service_tier for row in asked)
    cells: defaultdict[Key, Cell] = defaultdict(Cell)
    notes = list(_notes(asked, here, kinds, by_project=by_project, by_model=by_model, by_tier=by_tier))
    for row in counted:
        key = (row.day, row.project if by_project else None, row.model if by_model else None)
        _add(cells[key], row)
    named = _named(own, kinds, by_project=by_project, by_model=by_model)
    keys, told = _placed(own, named, cells, _hours(spans), (first, last))
    notes.extend(told)
    tools = Counter[tuple["datetime", str | None]]()
    for row in rows:
        if row.kind in HOSTED_TOOLS:
            tools[row.day, row.project if by_project else None] += row.count
    has_cached = any(item.request.cached_tokens for item in here)
    if not has_cached and any(row.cached_tokens for row in asked) and here:
        notes.append("no request here says how many of its tokens were cached: that is not compared")
    return Table(
        first,
        last,
        by_project,
        by_model,
        by_tier,
        dict(cells),
        tuple(keys),
        tools,
        has_cached,
        tuple(notes),
        _apart(own, first, last),
    )


def _apart(own: Own, first: datetime, last: datetime) -> str:
    """That report and decisions have no day in common, if so: then neither tells anything of the other."""
    if own.span is not None and own.span[0] < last and first <= own.span[1]:
        return ""
    ours = "none" if own.span is None else _days(*own.span)
    return f"no day in common: the report has {_days(first, last - DAY)}, the decisions {ours}"


def _days(first: datetime, last: datetime) -> str:
    one, other = day_text(first), day_text(last)
    return one if one == other else f"{one} to {other}"


def _given(report: Report) -> str:
    """What a report has, for people who miss something in it."""
    kinds = sorted({row.kind for row in report.usage})
    if report.usage_spans:
        kinds = ["usage"]
    if report.cost_spans:
        kinds.append("costs")
    spans = report.usage_spans or report.cost_spans
    if not kinds or not spans:
        return " and ".join(kinds) or "nothing"
    first, last = min(start for start, _ in spans), max(start for start, _ in spans)
    return f"{' and '.join(kinds)} from {first.date()} to {last.date()}"


def group_of(offer: Offer, key: Key) -> str | None:
    """The group that lists the model of a cell on its day."""
    day, _, model = key
    revision = offer.at(day)
    group = None if revision is None or model is None else revision.group_of(model, Kind.COMPLETION)
    return None if group is None else group.name


def _named(own: Own, kinds: set[str], *, by_project: bool, by_model: bool) -> list[Key | None]:
    """The cell of each request, whether the report is about its day or not; None where no report is about its kind."""
    return [
        (
            day_of(item.request.at),
            item.request.project if by_project else None,
            item.request.model if by_model else None,
        )
        if REPORTED_AS.get(item.request.kind) in kinds
        else None
        for item in own.items
    ]


def _placed(
    own: Own,
    keys: list[Key | None],
    cells: defaultdict[Key, Cell],
    hours: Mapping[datetime, Span],
    days: Span,
) -> tuple[list[Key | None], list[str]]:
    """Put the requests into their cells, but for those of hours of a day that the report is not about."""
    kept, outside, aside = list(keys), 0, 0
    for place, key in enumerate(keys):
        if key is None:
            continue
        start, end = hours.get(key[0], (key[0], key[0] + DAY))
        if not days[0] <= key[0] < days[1]:
            outside += 1
        elif start <= own.items[place].request.at < end:
            cells[key].places.append(place)
        else:
            kept[place] = None
            aside += 1
    notes = [
        f"of {day_text(day)} the report has only {start:%H:%M:%S} to {end:%H:%M:%S}"
        for day, (start, end) in sorted(hours.items())
        if end - start < DAY
    ]
    if aside:
        notes.append(f"{aside:,} requests lie outside these hours: they take allowance, and are not compared")
    if outside:
        notes.append(f"{outside:,} requests lie outside the days that the report covers")
    return kept, notes


def _is_by_project(rows: list[UsageRow], items: list[Item]) -> bool:
    """Whether both sides tell projects apart, and by the same names."""
    named = {row.project for row in rows}
    ours = {item.request.project for item in items}
    if None in ours and None not in named:
        return False  # a request of the provider's default project, say, which the report names
    return bool((named & ours) - {None})


def _hours(spans: list[Span]) -> dict[datetime, Span]:
    """From when until when of each of its days the report is."""
    found: dict[datetime, Span] = {}
    for start, end in spans:
        first, last = found.get(day_of(start), (start, end))
        found[day_of(start)] = min(first, start), max(last, end)
    return found


def _within(instant: datetime, since: datetime | None, until: datetime | None) -> bool:
    return (since is None or since <= instant) and (until is None or instant < until)


def _add(cell: Cell, row: UsageRow) -> None:
    cell.tokens += row.tokens
    cell.given += row.input_tokens
    cell.requests += row.requests
    cell.rows.append(row)
    if row.is_free:
        cell.free += row.tokens
        cell.free_requests += row.requests
    elif row.kind == COMPLETIONS and row.service_tier not in BILLED_TIERS:
        cell.unknown += row.tokens


def _without_projects(rows: list[UsageRow], items: list[Item]) -> str:
    """Why projects cannot be told apart."""
    if not any(row.project for row in rows):
        return "the report names no projects"
    lacking = sum(1 for item in items if item.request.project is None)
    if lacking:
        return f"{lacking:,} of {len(items):,} requests here name no project"
    return "no project has the same name in the report and here"


def _notes(
    rows: list[UsageRow], items: list[Item], kinds: set[str], *, by_project: bool, by_model: bool, by_tier: bool
) -> Iterable[str]:
    """What the report, or the decisions, cannot tell apart."""
    if rows and not by_tier:
        yield "the report is not grouped by service tier: what was free in it cannot be told"
    if rows and not by_model:
        yield "the report is not grouped by model: groups cannot be told apart"
    if rows and not by_project:
        yield f"{_without_projects(rows, items)}: all projects are compared together"
    odd = sorted({row.service_tier for row in rows if row.service_tier} - BILLED_TIERS - {FREE_TIER})
    if odd:
        yield f"service tiers that are not known, taken for neither free nor billed: {', '.join(odd)}"
    aside = Counter(item.request.kind for item in items if REPORTED_AS.get(item.request.kind) not in kinds)
    for kind, count in sorted(aside.items()):
        yield f"{count:,} requests of kind {kind} are not compared: no report here is about their tokens"
    unmeasured = sum(1 for item in items if item.request.tokens is None)
    if unmeasured:
        yield f"{unmeasured:,} requests are unmeasured: nobody here knows their tokens"
    if rows:
        last = max(row.day for row in rows)
        yield f"reports come 5 to 15 minutes late: the last day, {day_text(last)}, may be incomplete"
