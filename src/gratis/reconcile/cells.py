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
    from collections.abc import Iterable
    from datetime import datetime

    from gratis.offer import Offer
    from gratis.reconcile.own import Item, Own
    from gratis.reconcile.rows import Report

Key = tuple["datetime", str | None, str | None]
"""A UTC day, by its midnight, a project and a model."""


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
    """Both sides, over the days that the report covers."""

    since: datetime
    until: datetime
    by_project: bool
    by_model: bool
    by_tier: bool
    cells: dict[Key, Cell]
    keys: tuple[Key | None, ...]
    tools: Counter[tuple[datetime, str | None]]
    notes: tuple[str, ...]

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
        raise GratisError("reconcile: no report of usage for these days; expected pages of the Usage API or its export")
    first, last = day_of(min(start for start, _ in spans)), day_of(max(start for start, _ in spans)) + DAY
    counted = [row for row in rows if row.kind in TOKEN_KINDS]
    kinds = {row.kind for row in counted} | {COMPLETIONS}
    asked = [row for row in counted if row.kind == COMPLETIONS]
    here = [item for item in own.items if first <= item.request.at < last]
    by_project = any(row.project for row in asked) and any(item.request.project for item in here)
    by_model, by_tier = any(row.model for row in asked), any(row.service_tier for row in asked)
    cells: defaultdict[Key, Cell] = defaultdict(Cell)
    notes = list(_notes(asked, here, kinds, by_project=by_project, by_model=by_model, by_tier=by_tier))
    for row in counted:
        key = (row.day, row.project if by_project else None, row.model if by_model else None)
        _add(cells[key], row)
    keys: list[Key | None] = []
    outside = 0
    for place, item in enumerate(own.items):
        request = item.request
        if REPORTED_AS.get(request.kind) not in kinds:
            keys.append(None)
            continue
        day = day_of(request.at)
        found = (day, request.project if by_project else None, request.model if by_model else None)
        keys.append(found)
        if first <= day < last:
            cells[found].places.append(place)
        else:
            outside += 1
    if outside:
        notes.append(f"{outside:,} requests lie outside the days that the report covers")
    tools = Counter[tuple["datetime", str | None]]()
    for row in rows:
        if row.kind in HOSTED_TOOLS:
            tools[row.day, row.project if by_project else None] += row.count
    return Table(first, last, by_project, by_model, by_tier, dict(cells), tuple(keys), tools, tuple(notes))


def group_of(offer: Offer, key: Key) -> str | None:
    """The group that lists the model of a cell on its day."""
    day, _, model = key
    revision = offer.at(day)
    group = None if revision is None or model is None else revision.group_of(model, Kind.COMPLETION)
    return None if group is None else group.name


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


def _notes(
    rows: list[UsageRow], items: list[Item], kinds: set[str], *, by_project: bool, by_model: bool, by_tier: bool
) -> Iterable[str]:
    """What the report, or the decisions, cannot tell apart."""
    if rows and not by_tier:
        yield "the report is not grouped by service tier: what was free in it cannot be told"
    if rows and not by_model:
        yield "the report is not grouped by model: groups cannot be told apart"
    if rows and not by_project:
        side = "the report names" if not any(row.project for row in rows) else "the decisions name"
        yield f"{side} no projects: they are compared together"
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
