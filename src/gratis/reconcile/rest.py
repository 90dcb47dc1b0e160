"""What single facts of a cell account for, once no supposition about requests does: each as far as it goes.

Somebody else's traffic took part of the allowance, hosted tools were called, requests were billed though they would fit
under every reading. What none of these covers stays unexplained.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from gratis.reconcile.cells import group_of
from gratis.reconcile.findings import Cause
from gratis.reconcile.fit import by_slot
from gratis.reconcile.totals import could_be

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gratis.offer import Offer
    from gratis.reconcile.cells import Key
    from gratis.reconcile.chain import Chain
    from gratis.reconcile.fit import Slot
    from gratis.reconcile.own import Own


def left_over(chain: Chain) -> None:
    """What single facts of a cell account for, each as far as it goes."""
    least = _least(chain)
    foreign: Counter[Slot] = Counter()
    for key in chain.left:
        foreign[chain.places.get(key, (key[0], None))] += _free_of_others(chain, key)
    for key in sorted(chain.left, key=str):
        if chain.left[key] and is_crowded(chain, key):
            why = "traffic that was not decided here took part of the allowance, at times that no report tells"
            chain.take(key, Cause.MISSING_IN_LEDGER, chain.left[key], why)
        elif chain.left[key] < 0:
            _fewer_there(chain, key, least, foreign)


def _free_of_others(chain: Chain, key: Key) -> int:
    """Free tokens of traffic that only the report knows; and those of a model on no list."""
    if chain.left[key] > 0 and key[2] is not None and group_of(chain.offer, key) is None:
        why = f"{key[2]} is free in the report and on no list here: the offer's file is stale"
        chain.take(key, Cause.MODEL_NOT_LISTED, chain.left[key], why)
    return sum(part.tokens for part in chain.parts[key] if part.cause is Cause.MISSING_IN_LEDGER and part.tokens > 0)


def _fewer_there(chain: Chain, key: Key, least: Mapping[Slot, int], foreign: Counter[Slot]) -> None:
    """Fewer free tokens in the report than were decided."""
    slot = chain.places.get(key, (key[0], None))
    if foreign[slot]:
        by = min(-chain.left[key], foreign[slot])
        foreign[slot] -= by
        chain.take(key, Cause.MISSING_IN_LEDGER, -by, "traffic that was not decided here took part of the allowance")
    if not chain.left[key] or not _are_requests(chain, key):
        return
    calls = chain.calls(key)
    if calls:
        why = f"{calls:,} calls of hosted tools on this day, which exclude their requests"
        chain.take(key, Cause.HOSTED_TOOLS, chain.left[key], why)
    elif chain.observed()[slot] < least.get(slot, 0):
        short = min(-chain.left[key], least[slot] - chain.observed()[slot])
        why = "billed though they would fit under every reading: enrollment, balance, tools or sharing"
        chain.take(key, Cause.ENROLLMENT_OR_BALANCE, -short, why)


def _are_requests(chain: Chain, key: Key) -> bool:
    """Whether what is missing could be whole requests, as many as the report has fewer."""
    cell = chain.table.cells[key]
    free = [place for place in chain.within(key) if chain.current[place]]
    count = len(free) - cell.free_requests
    return count > 0 and could_be([chain.current[place] for place in free], count, -chain.left[key])


def _least(chain: Chain) -> dict[Slot, int]:
    """What is free by day and group under every reading at least."""
    sums = [by_slot(chain.keys, chain.places, free) for reading, free in chain.free.items() if reading.tier is None]
    return {slot: min(each[slot] for each in sums) for slot in chain.places.values()}


def is_crowded(chain: Chain, key: Key) -> bool:
    """Whether somebody else's traffic, of which nobody here knows when it came, crossed the allowance with ours."""
    slot = chain.places.get(key)
    if slot is None or slot not in chain.others:
        return False
    reported = sum(chain.table.cells[other].tokens for other, its in chain.places.items() if its == slot)
    return reported > allowance(chain.offer, chain.own, slot)


def allowance(offer: Offer, own: Own, slot: Slot) -> int:
    """The allowance of a group on a day, or of all of them, at the highest tier that takes part."""
    revision = offer.at(slot[0])
    tiers = [one.tier for one in own.enrollments if one is not None]
    groups = () if revision is None else revision.groups
    return sum(
        max((group.allowances.get(tier, 0) for tier in tiers), default=0)
        for group in groups
        if slot[1] in (None, group.name)
    )
