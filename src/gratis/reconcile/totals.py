"""Why the sums differ: more tokens in the report than were decided here, or fewer.

Each cause takes of a difference what its evidence covers, and no more: rows that are there twice, requests near
midnight whose tokens make up exactly what one day has too many and the next too few, counts of requests that differ the
same way. What is left over is left over.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from gratis.reconcile.findings import Cause, Part
from gratis.reconcile.rows import DAY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gratis.reconcile.cells import Key, Table
    from gratis.reconcile.own import Amended, Own
    from gratis.reconcile.rows import UsageRow

NEAR_MIDNIGHT: Final = timedelta(hours=1)
SUBSET_ITEMS_MAX: Final = 16  # of many requests some add up to anything
SOON: Final = timedelta(minutes=10)
INSTANT: Final = timedelta(microseconds=1)


@dataclass(slots=True)
class Totals:
    """What is left of each cell's difference, in tokens and in requests, and how the rest is explained.

    `free` are parts of the free tokens that follow from rows alone; `amended` is what requests of ours turned out to be
    otherwise, by cause; `renamed` are those of which the report calls the model by another name. `copies` are the rows
    that are there again, by their sources.
    """

    left: dict[Key, int]
    requests: dict[Key, int]
    parts: defaultdict[Key, list[Part]] = field(default_factory=lambda: defaultdict(list))
    free: defaultdict[Key, list[Part]] = field(default_factory=lambda: defaultdict(list))
    amended: dict[Cause, Amended] = field(default_factory=dict)
    renamed: dict[int, str] = field(default_factory=dict)
    copies: Counter[str] = field(default_factory=Counter)

    def take(self, key: Key, cause: Cause, tokens: int, why: str, *, requests: int = 0) -> None:
        """Account for a part of a cell's difference."""
        self.parts[key].append(Part(cause, tokens, why))
        self.left[key] -= tokens
        self.requests[key] -= requests


def explain(table: Table, own: Own) -> Totals:
    """Account for the differences of all cells, as far as the evidence goes."""
    totals = Totals(
        {key: cell.tokens - sum(own.items[place].tokens for place in cell.places) for key, cell in table.cells.items()},
        {key: cell.requests - len(cell.places) for key, cell in table.cells.items()},
    )
    _rows_twice(table, totals)
    _requests_twice(table, own, totals)
    _other_names(table, own, totals)
    _late(table, own, totals)
    for key in table.cells:
        if totals.left[key]:
            _missing(table, own, totals, key)
    return totals


def _rows_twice(table: Table, totals: Totals) -> None:
    """Rows of the report that are alike in everything: one may be the other again."""
    for key, cell in table.cells.items():
        if totals.left[key] <= 0:
            continue
        alike: defaultdict[UsageRow, list[str]] = defaultdict(list)
        for row in cell.rows:
            alike[replace(row, source="")].append(row.source)
        for row, sources in alike.items():
            copies = min(len(sources) - 1, totals.left[key] // row.tokens) if row.tokens else 0
            if copies > 0:
                where = "; ".join(dict.fromkeys(sources[:2])) + (", read twice" if sources[0] == sources[1] else "")
                what = f"{many(row.requests, 'request')}, {row.tokens:,} tokens ({where})"
                why = f"{copies + 1} rows of the report are alike: {what}"
                totals.copies.update(sources[-copies:])
                totals.take(key, Cause.DUPLICATE, copies * row.tokens, why, requests=copies * row.requests)
                if row.is_free:
                    totals.free[key].append(Part(Cause.DUPLICATE, copies * row.tokens, why))


def _requests_twice(table: Table, own: Own, totals: Totals) -> None:
    """Requests of ours that differ in nothing but their id."""
    amended: Amended = {}
    for key, cell in table.cells.items():
        if totals.left[key] >= 0 or totals.requests[key] >= 0:
            continue
        alike: defaultdict[object, list[int]] = defaultdict(list)
        for place in cell.places:
            alike[replace(own.items[place].request, id="-")].append(place)
        for places in alike.values():
            size = own.items[places[0]].tokens
            copies = min(len(places) - 1, -totals.left[key] // size, -totals.requests[key]) if size else 0
            if copies > 0:
                first, second = (own.items[place].request.id for place in places[:2])
                why = f"requests alike but for their ids, such as {first!r} and {second!r}: one may be the other again"
                totals.take(key, Cause.DUPLICATE, -copies * size, why, requests=-copies)
                amended.update(dict.fromkeys(places[-copies:]))
        amended.update(dict.fromkeys(_again_soon(table, own, totals, key)))
    if amended:
        totals.amended[Cause.DUPLICATE] = amended


def _again_soon(table: Table, own: Own, totals: Totals, key: Key) -> list[int]:
    """Requests of ours that come again within minutes, with the same tokens: if they, and no others, are too many."""
    count, size = -totals.requests[key], -totals.left[key]
    if count <= 0 or size <= 0 or size % count:
        return []
    last: dict[object, int] = {}
    again: list[int] = []
    for place in sorted(table.cells[key].places, key=lambda place: own.items[place].request.at):
        item = own.items[place]
        if item.tokens * count != size:
            continue
        before = last.get(what := replace(item.request, id="-", at=key[0]))
        if before is not None and item.request.at - own.items[before].request.at <= SOON:
            again.append(place)
        last[what] = place
    if len(again) != count:
        return []
    why = (
        f"requests again within minutes and alike, such as {own.items[again[0]].request.id!r}: the same under a new id"
    )
    totals.take(key, Cause.DUPLICATE, -size, why, requests=-count)
    return again


def _other_names(table: Table, own: Own, totals: Totals) -> None:
    """Requests logged under an alias that the report has under a dated id, or the other way round, all of a day."""
    amended: Amended = {}
    for key, cell in table.cells.items():
        size = -totals.left[key]
        if key[2] is None or cell.rows or not cell.places or size <= 0:
            continue
        for other in table.cells:
            is_like = other[:2] == key[:2] and other[2] is not None and _is_alias(key[2], other[2])
            if is_like and totals.left[other] >= size and totals.requests[other] >= len(cell.places):
                why = f"logged as {key[2]}, and in the report as {other[2]}"
                for one, sign in ((key, -1), (other, 1)):
                    totals.take(one, Cause.OTHER_NAME, sign * size, why, requests=sign * len(cell.places))
                for place in cell.places:
                    item = own.items[place]
                    totals.renamed[place] = other[2] or ""
                    # The more exact of the two names is the one that the provider's list would have.
                    named = max(key[2], other[2] or "", key=len)
                    amended[place] = (replace(item.request, model=named), own.enrollments[item.enrollment])
                break
    if amended:
        totals.amended[Cause.OTHER_NAME] = amended


def _is_alias(one: str, other: str) -> bool:
    """Whether one id is the other with a date behind it: a hint for people, on which no decision rests."""
    short, dated = sorted((one, other), key=len)
    return re.fullmatch(r"-\d{4}-\d\d-\d\d", dated.removeprefix(short)) is not None


def _late(table: Table, own: Own, totals: Totals) -> None:
    """Requests near midnight that the provider counted on the neighbouring day."""
    amended: Amended = {}
    for (key, step), places in sorted(_near_midnight(table, own, totals).items(), key=_by_key):
        other = (key[0] + step * DAY, key[1], key[2])
        moved = _moved(totals, key, other, table, [own.items[place].tokens for place in places], step=step)
        if not moved:
            continue
        chosen = [places[number] for number in moved]
        size = sum(own.items[place].tokens for place in chosen)
        when = "before" if step > 0 else "after"
        why = f"{many(len(chosen), 'request')} shortly {when} midnight, counted by the provider on {other[0].date()}"
        for place, sign in ((key, -1), (other, 1)):
            if place in totals.left:
                totals.take(place, Cause.LATE_ARRIVAL, sign * size, why, requests=sign * len(chosen))
        at = other[0] if step > 0 else key[0] - INSTANT
        for number in chosen:
            item = own.items[number]
            amended[number] = (replace(item.request, at=at), own.enrollments[item.enrollment])
    if amended:
        totals.amended[Cause.LATE_ARRIVAL] = amended


def _near_midnight(table: Table, own: Own, totals: Totals) -> dict[tuple[Key, int], list[int]]:
    """The requests at the end (1) and at the beginning (-1) of each cell's day, in their order in time."""
    twice = totals.amended.get(Cause.DUPLICATE, {})
    near: defaultdict[tuple[Key, int], list[int]] = defaultdict(list)
    for place, (item, key) in enumerate(zip(own.items, table.keys, strict=True)):
        if key is None or not item.tokens or place in twice:
            continue
        if item.request.at >= key[0] + DAY - NEAR_MIDNIGHT:
            near[key, 1].append(place)
        if item.request.at < key[0] + NEAR_MIDNIGHT:
            near[key, -1].append(place)
    return {where: sorted(places, key=lambda place: own.items[place].request.at) for where, places in near.items()}


def _by_key(entry: tuple[tuple[Key, int], list[int]]) -> tuple[str, str, str, int]:
    (day, project, model), step = entry[0]
    return day.isoformat(), project or "", model or "", -step


def _moved(totals: Totals, key: Key, other: Key, table: Table, sizes: Sequence[int], *, step: int) -> list[int] | None:
    """Which of these requests make up exactly what their day lacks in the report and the other has too much."""
    lacks, has = -totals.left.get(key, 0), totals.left.get(other, 0)
    inside, beyond = table.covers(key[0]), table.covers(other[0])
    if inside and beyond:
        return _adding_up(sizes, min(lacks, has), step=step) if lacks > 0 and has > 0 else None
    # Of requests from outside the report's days only the other day can be seen: there those next to midnight must do.
    return _run(sizes, has, step=step) if beyond else None


def _run(sizes: Sequence[int], amount: int, *, step: int) -> list[int] | None:
    """The requests next to midnight that add up to an amount, if some do."""
    places = range(len(sizes))
    total, chosen = 0, []
    for place in reversed(places) if step > 0 else places:
        total += sizes[place]
        chosen.append(place)
        if total >= amount:
            return sorted(chosen) if total == amount and amount > 0 else None
    return None


def _adding_up(sizes: Sequence[int], amount: int, *, step: int) -> list[int] | None:
    """Requests that add up to exactly an amount: those next to midnight, or else any of them."""
    run = _run(sizes, amount, step=step)
    if run is not None or len(sizes) > SUBSET_ITEMS_MAX:
        return run
    reached: dict[int, list[int]] = {0: []}
    for place, size in enumerate(sizes):
        for total, chosen in list(reached.items()):
            if total + size <= amount:
                reached.setdefault(total + size, [*chosen, place])
    return reached.get(amount)


def _missing(table: Table, own: Own, totals: Totals, key: Key) -> None:
    """Traffic that only one side knows: more requests, and more tokens, on the same side."""
    left, requests, cell = totals.left[key], totals.requests[key], table.cells[key]
    unmeasured = sum(1 for place in cell.places if own.items[place].request.tokens is None)
    if left > 0 and requests > 0 and not table.apart:
        why = f"{many(requests, 'request')} in the report and not decided here: traffic of somebody else"
        totals.take(key, Cause.MISSING_IN_LEDGER, left, why, requests=requests)
    elif left > 0 and unmeasured and requests == 0:
        why = f"{many(unmeasured, 'request')} of which only the provider knows the tokens"
        totals.take(key, Cause.UNMEASURED, left, why)
    elif left < 0 and requests < 0 and could_be([own.items[place].tokens for place in cell.places], -requests, -left):
        nothing = "nothing of this day is in the report" if not _has_day(table, key) else "not in the report"
        lag = ", which may lag, or have it on the next day" if key[0] + DAY >= table.until else ""
        why = f"{many(-requests, 'request')} decided here, and {nothing}{lag}"
        totals.take(key, Cause.MISSING_IN_REPORT, left, why, requests=requests)


def many(count: int, what: str) -> str:
    """How many of something."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def could_be(sizes: Sequence[int], count: int, amount: int) -> bool:
    """Whether so many of these requests could have so many tokens."""
    if count == 1:
        return amount in sizes
    ordered = sorted(sizes)
    return sum(ordered[:count]) <= amount <= sum(ordered[-count:])


def _has_day(table: Table, key: Key) -> bool:
    return any(cell.rows for other, cell in table.cells.items() if other[0] == key[0])
