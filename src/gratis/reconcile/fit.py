"""Which reading of the rule fits the provider's own numbers best, and how sure that is.

The same requests are judged under each reading, and what it gives free by day and group is laid beside what the
provider gave. Most days tell no readings apart: only one on which a request crosses the allowance may. So what counts
is how many such days there are, which reading each of them speaks for, and by how much the best is ahead.
"""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from gratis.audit.readings import Reading, combinations
from gratis.model import Counts, Overage
from gratis.reconcile.cells import group_of
from gratis.reconcile.findings import Fit, Ranked
from gratis.window import Rolling

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from gratis.offer import Offer, Revision
    from gratis.reconcile.cells import Key, Table
    from gratis.reconcile.own import Own

SWITCH_DAYS: Final = timedelta(days=7)
WOULD_TELL: Final = (
    "a day on which a request does not fit whole, and a smaller one that still would comes after it, would tell them"
    " apart"
)

Slot = tuple["datetime", str | None]
"""A UTC day, by its midnight, and a group."""


def used_reading(offer: Offer, at: datetime) -> Reading:
    """How the offer itself reads what its text leaves open."""
    revision = _revision(offer, at)
    return Reading(counts=revision.counts, overage=revision.overage)


def readings_of(offer: Offer, own: Own, since: datetime) -> list[Reading]:
    """The readings worth a comparison: what the text leaves open, other usage tiers, the window where it changed."""
    revision = _revision(offer, since)
    tiers: list[int | None] = [None, *_other_tiers(revision, own)]
    windows: list[str | None] = [None]
    if isinstance(revision.window, Rolling):
        windows.append("daily")
    elif revision.after is not None and since < revision.after + SWITCH_DAYS:
        windows.append("rolling")
    return combinations(counts=list(Counts), overage=list(Overage), windows=windows, tiers=tiers, revisions=[None])


def slots(table: Table, offer: Offer) -> dict[Key, Slot]:
    """The day and group of each cell that a group covers."""
    found = {key: (key[0], group_of(offer, key)) for key in table.cells}
    return {key: slot for key, slot in found.items() if slot[1] is not None or not table.by_model}


def by_slot(keys: Sequence[Key | None], places: Mapping[Key, Slot], free: Sequence[int]) -> Counter[Slot]:
    """What a reading gives free by day and group."""
    sums: Counter[Slot] = Counter()
    for key, tokens in zip(keys, free, strict=True):
        if tokens and key is not None and key in places:
            sums[places[key]] += tokens
    return sums


def fit(
    keys: Sequence[Key | None],
    places: Mapping[Key, Slot],
    seen: Mapping[Slot, int],
    free: Mapping[Reading, list[int]],
    used: Reading,
) -> Fit:
    """The readings in order of how far they are off what the provider gave."""
    given = {reading: by_slot(keys, places, each) for reading, each in free.items()}
    days = sorted(
        {slot for slot in places.values() if seen.get(slot, 0) or any(sums[slot] for sums in given.values())},
        key=_order,
    )
    off = {reading: [abs(seen.get(slot, 0) - sums[slot]) for slot in days] for reading, sums in given.items()}
    deciding = [slot for slot in days if len({sums[slot] for sums in given.values()}) > 1]
    alike: dict[tuple[int, ...], list[Reading]] = {}
    for reading in sorted(off, key=lambda one: (sum(off[one]), one != used)):
        alike.setdefault(tuple(given[reading][slot] for slot in days), []).append(reading)
    ranked = tuple(
        Ranked(
            reading=str(first),
            off=sum(off[first]),
            exact=off[first].count(0),
            closer=sum(own < other for own, other in zip(off[first], off[used], strict=True)),
            farther=sum(own > other for own, other in zip(off[first], off[used], strict=True)),
            same_as=tuple(map(str, others)),
            is_used=used in (first, *others),
        )
        for first, *others in alike.values()
    )
    margin = ranked[1].off - ranked[0].off if len(ranked) > 1 else 0
    told = tuple((slot[0].date(), slot[1]) for slot in deciding)
    best = min(off, key=lambda one: (sum(off[one]), one != used), default=used)
    is_exact = all(far == 0 for slot, far in zip(days, off.get(best, ()), strict=True) if slot in deciding)
    sentence = _sentence(ranked, len(days), len(told), margin)
    if told and not is_exact:
        sentence += "; where they differ none is exact: explain the other differences first"
    return Fit(ranked, len(days), told, margin, sentence, is_exact)


def _sentence(ranked: Sequence[Ranked], days: int, deciding: int, margin: int) -> str:
    """How sure it is, in words."""
    if not deciding:
        here = f"on none of {days} days and groups" if days else "nothing is free here"
        return f"the data cannot tell the readings apart, {here}; {WOULD_TELL}"
    best, second = ranked[0], ranked[1]
    on = f"on {deciding} of {days} days and groups they differ"
    if margin == 0:
        tied = " and ".join(one.reading for one in ranked if one.off == best.off)
        return f"the data does not decide between {tied}, off by {best.off:,} tokens each; {on}; {WOULD_TELL}"
    alike = f" (as would {', '.join(best.same_as)}; no day here tells them apart)" if best.same_as else ""
    how = "fits exactly" if best.off == 0 else f"fits best, and is off by {best.off:,} tokens"
    few = "; one such day is little evidence" if deciding == 1 else ""
    few += f"; {WOULD_TELL}" if best.rivals else ""
    return f"{best.reading} {how}{alike}; the next, {second.reading}, is off by {second.off:,}; {on}{few}"


def _order(slot: Slot) -> tuple[datetime, str]:
    return slot[0], slot[1] or ""


def _revision(offer: Offer, at: datetime) -> Revision:
    found = offer.at(at)
    return offer.revisions[-1 if at >= offer.revisions[-1].starts else 0] if found is None else found


def _other_tiers(revision: Revision, own: Own) -> list[int]:
    """One usage tier for each other set of allowances, where all requests were at the same."""
    tiers = {one.tier for one in own.enrollments if one is not None}
    if len(tiers) != 1:
        return []
    sets = {tuple(group.allowances.get(tier) for group in revision.groups): tier for tier in (*range(5, 0, -1), *tiers)}
    return sorted(tier for allowances, tier in sets.items() if tier not in tiers and None not in allowances)
