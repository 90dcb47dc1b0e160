"""The decisions as they would be, supposition upon supposition, and what is left between them and a report.

Each supposition says how some requests would have to be taken, and they are judged anew by the rule: all of them, or,
where windows are days, those of the days on which something is otherwise. What that changes is what it explains.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from msgspec.structs import replace

from gratis.audit.readings import offer_as
from gratis.reconcile.findings import Cause, Part
from gratis.reconcile.fit import Slot, by_slot, readings_of, slots, used_reading
from gratis.reconcile.own import Others, judged
from gratis.reconcile.rows import DAY, day_of
from gratis.window import Calendar, Span

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from gratis.audit.readings import Reading
    from gratis.model import Enrollment, Request
    from gratis.offer import Offer
    from gratis.reconcile.cells import Key, Table
    from gratis.reconcile.own import Amended, Own
    from gratis.reconcile.totals import Totals


class Chain:
    """The decisions as they would be, supposition upon supposition, and what is left between them and the report."""

    def __init__(self, table: Table, own: Own, offer: Offer, totals: Totals) -> None:
        self.table, self.own, self.base, self.offer, self.totals = table, own, offer, offer, totals
        self.places = slots(table, offer)
        self.amended: Amended = {}
        self.others: dict[Slot, Others] = {}
        self.parts: defaultdict[Key, list[Part]] = defaultdict(list)
        self.seen: dict[Key, int] = {}
        self.left: dict[Key, int] = {}
        for key, cell in table.cells.items():
            self.parts[key].extend(totals.free.get(key, ()))
            self.seen[key] = cell.free - sum(part.tokens for part in self.parts[key])
            self.left[key] = self.seen[key] - sum(own.items[place].free for place in cell.places)
        self.used = used_reading(offer, table.since)
        self.current = judged(own, offer, {}, {})
        self.keys = self._keys({})
        self.free: dict[Reading, list[int]] = {}
        self._within: tuple[list[Key | None], dict[Key, list[int]]] | None = None
        self._tried: tuple[Amended, dict[Slot, Others]] | None = None
        self._by_day: dict[datetime, list[int]] | None = defaultdict(list) if _is_daily(offer, table) else None
        if self._by_day is not None:
            for place, item in enumerate(own.items):
                self._by_day[day_of(item.request.at)].append(place)

    @property
    def is_even(self) -> bool:
        """Whether nothing is left to explain."""
        return not any(self.left.values())

    def suppose(
        self,
        cause: Cause,
        why: str,
        amended: Amended,
        *,
        always: bool = False,
        others: dict[Slot, Others] | None = None,
    ) -> bool:
        """Judge anew with these requests taken otherwise; keep it if that brings the decisions nearer to the report.

        What `others` used is a fact of the report: it is kept unless it leads away.
        """
        if not amended and not others:
            return False
        merged, others = {**self.amended, **amended}, others or self.others
        after, keys = self._judge(merged, others), self._keys(merged)
        change = self._change(after, keys)
        if not always and self.gain(change) < (1 if amended else 0):
            return False
        self.account(cause, why, change)
        self.current, self.keys, self.amended, self.others = after, keys, merged, others
        return True

    def would_gain(self, amended: Amended) -> int:
        """By how much nearer the report these requests, taken otherwise, would bring the decisions."""
        merged = {**self.amended, **amended}
        return self.gain(self._change(self._judge(merged, self.others), self._keys(merged)))

    def read_as(self, reading: Reading) -> None:
        """Judge under another reading of the rule."""
        tier = replace(self.used, tier=reading.tier)
        if reading.tier is not None and tier in self.free:
            why = f"the report fits the allowances of usage tier {reading.tier}: enrolled there at another tier"
            self.account(Cause.ENROLLMENT_OR_BALANCE, why, self._change(self.free[tier], self.keys))
            self.current = self.free[tier]
        if reading != tier:
            how = "fits" if not any(self.off(reading)) else "is nearer to"
            why = f"the report {how} the reading {reading}, not {self.used}"
            self.account(Cause.RULE_DIFFERS, why, self._change(self.free[reading], self.keys))
        self.current, self.offer = self.free[reading], offer_as(self.offer, reading)

    def gain(self, change: Mapping[Key, int]) -> int:
        """By how much nearer the report would be."""
        return sum(abs(self.left[key]) - abs(self.left[key] - by) for key, by in change.items())

    def take(self, key: Key, cause: Cause, tokens: int, why: str) -> None:
        """Account for a part of what is left."""
        if tokens:
            self.parts[key].append(Part(cause, tokens, why))
            self.left[key] -= tokens

    def know(self, key: Key, cause: Cause, tokens: int, why: str) -> None:
        """Account for a part that has nothing to do with how requests are judged: as if the report were without it."""
        self.take(key, cause, tokens, why)
        self.seen[key] -= tokens

    def taken(self, place: int) -> tuple[Request, Enrollment | None] | None:
        """How a request is taken by now; None where no allowance is supposed to cover it."""
        if place in self.amended:
            return self.amended[place]
        item = self.own.items[place]
        return item.request, self.own.enrollments[item.enrollment]

    def within(self, key: Key) -> Sequence[int]:
        """The requests that count in a cell by now, in their order."""
        if self._within is None or self._within[0] is not self.keys:
            found: defaultdict[Key, list[int]] = defaultdict(list)
            for place, other in enumerate(self.keys):
                if other is not None:
                    found[other].append(place)
            self._within = self.keys, found
        return self._within[1].get(key, ())

    def calls(self, key: Key) -> int:
        """Calls of hosted tools on a cell's day, by its project or by one that is not told."""
        tools = self.table.tools
        return tools[key[0], key[1]] or tools[key[0], None]

    def given(self) -> Counter[Key]:
        """Free tokens by cell, as the chain has them by now."""
        return self._sums(self.current, self.keys)

    def try_readings(self) -> None:
        """Judge under every reading worth a comparison, as the chain has the requests by now."""
        was = self._tried
        if was is not None and was[0] is self.amended and was[1] is self.others:
            return
        readings = list(dict.fromkeys([self.used, *readings_of(self.base, self.own, self.table.since)]))
        places = None if was is None else self._otherwise(was, (self.amended, self.others))
        for reading in readings:
            is_whole = places is None or reading.window is not None
            self.free[reading] = judged(
                self.own,
                offer_as(self.base, reading),
                self.amended,
                self.others,
                before=None if is_whole else self.free[reading],
                places=None if is_whole else places,
            )
        self._tried = self.amended, self.others

    def off(self, reading: Reading) -> list[int]:
        """How far a reading is off, by day and group."""
        sums = by_slot(self.keys, self.places, self.free[reading])
        seen = self.observed()
        return [seen[slot] - sums[slot] for slot in sorted(set(self.places.values()), key=_order)]

    def observed(self) -> Counter[Slot]:
        """What the report gives free by day and group, without the rows that are in it twice."""
        sums: Counter[Slot] = Counter()
        for key, slot in self.places.items():
            sums[slot] += self.seen[key]
        return sums

    def _judge(self, amended: Amended, others: dict[Slot, Others]) -> list[int]:
        """All requests judged anew; where windows are days, only those of days on which something is otherwise."""
        places = self._otherwise((self.amended, self.others), (amended, others))
        return judged(self.own, self.offer, amended, others, before=self.current, places=places)

    def _otherwise(
        self, was: tuple[Amended, dict[Slot, Others]], now: tuple[Amended, dict[Slot, Others]]
    ) -> list[int] | None:
        """The requests of all days on which something is otherwise than it was, in order; None where windows roll."""
        if self._by_day is None:
            return None
        days = {slot[0] for slot in (*was[1], *now[1]) if was[1].get(slot) != now[1].get(slot)}
        for place in was[0].keys() | now[0].keys():
            if (place in was[0], was[0].get(place)) != (place in now[0], now[0].get(place)):
                days.add(day_of(self.own.items[place].request.at))
                days.update(day_of(one[0].at) for one in (was[0].get(place), now[0].get(place)) if one is not None)
        ours = {place for day in days for place in self._by_day.get(day, ())}
        ours.update(place for place, other in now[0].items() if other is not None and day_of(other[0].at) in days)
        return sorted(ours)

    def _keys(self, amended: Amended) -> list[Key | None]:
        """The cell in which each request counts."""
        keys = list(self.table.keys)
        for place, other in amended.items():
            key = keys[place]
            if key is not None and other is not None:
                keys[place] = (day_of(other[0].at), key[1], self.totals.renamed.get(place, key[2]))
        return [key if key in self.table.cells else None for key in keys]

    def _sums(self, free: Sequence[int], keys: Sequence[Key | None]) -> Counter[Key]:
        found: Counter[Key] = Counter()
        for key, tokens in zip(keys, free, strict=True):
            if tokens and key is not None:
                found[key] += tokens
        return found

    def _change(self, after: Sequence[int], keys: Sequence[Key | None]) -> dict[Key, int]:
        now, then = self.given(), self._sums(after, keys)
        return {key: then[key] - now[key] for key in self.left if then[key] != now[key]}

    def account(self, cause: Cause, why: str, change: Mapping[Key, int]) -> None:
        """Account for what a supposition changes, cell by cell."""
        for key, tokens in change.items():
            self.take(key, cause, tokens, why)


def _is_daily(offer: Offer, table: Table) -> bool:
    """Whether each day's windows end with it, and so can be judged by themselves."""
    daily = {Calendar(Span.DAY, "UTC")}
    near = [one for one in offer.revisions if one.ends is None or one.ends > table.since - 2 * DAY]
    return all(one.window in daily for one in near)


def _order(slot: Slot) -> tuple[str, str]:
    return slot[0].isoformat(), slot[1] or ""
