"""The five identities between report and decisions, each at every place at which it can be checked.

By UTC day, group, project and model where the report tells them apart; the allowance by day and group, because it is
one for all projects; money by model, because the provider rounds each line.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from gratis.reconcile.cells import group_of
from gratis.reconcile.findings import MONEY, Cause, Check, Identity, Measure
from gratis.reconcile.money import is_near

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from gratis.offer import Offer
    from gratis.reconcile.cells import Key, Table
    from gratis.reconcile.chain import Chain
    from gratis.reconcile.findings import Difference, Money, Over
    from gratis.reconcile.fit import Slot
    from gratis.reconcile.own import Own

BILLED_THERE: Final = frozenset(
    {Cause.ENROLLMENT_OR_BALANCE, Cause.PROJECT_NOT_SHARING, Cause.HOSTED_TOOLS, Cause.MODEL_NOT_LISTED}
)
ALL_TOKENS: Final = "all tokens of a day, project and model, over all tiers, are those decided here"
WITHIN: Final = "free tokens of a day and group are within the allowance, and those that were decided free"
CHARGED: Final = "billed tokens at list price are what was charged"
LISTED: Final = "no model that is on no list here is free"
NOT_BILLED: Final = "what is listed, shared and within the allowance is not in a billed tier"


def identities(
    table: Table,
    own: Own,
    offer: Offer,
    *,
    chain: Chain | None,
    over: Sequence[Over],
    differences: Sequence[Difference],
    spent: Money | None,
) -> Iterable[Identity]:
    """Those of the five that this report allows to check."""
    keys = sorted(table.cells, key=_order)
    checks = (
        _check(
            offer,
            key,
            found=table.cells[key].tokens,
            expected=sum(own.items[place].tokens for place in table.cells[key].places),
        )
        for key in keys
    )
    yield Identity(1, ALL_TOKENS, tuple(checks))
    if chain is None:
        return
    yield Identity(2, WITHIN, tuple(_within(chain, own, over)))
    if spent is not None and spent.spent is not None:
        known = (one for one in spent.models if one.difference is not None)
        charged = (Check(one.charged, one.expected, is_near(one), model=one.model) for one in known)
        yield Identity(MONEY, CHARGED, tuple(charged))
    known_as = set(chain.totals.renamed.values())
    strange = [key for key in keys if table.by_model and key[2] and group_of(offer, key) is None]
    strange = [key for key in strange if table.cells[key].rows and key[2] not in known_as]
    yield Identity(4, LISTED, tuple(_check(offer, key, found=table.cells[key].free, expected=0) for key in strange))
    yield Identity(5, NOT_BILLED, tuple(_not_billed(table, own, offer, keys, differences)))


def given(chain: Chain) -> Counter[Slot]:
    """What the report gives free by day and group."""
    sums: Counter[Slot] = Counter()
    for key, slot in chain.places.items():
        sums[slot] += chain.table.cells[key].free
    return sums


def _within(chain: Chain, own: Own, over: Sequence[Over]) -> Iterable[Check]:
    free, ours = given(chain), Counter[tuple["datetime", str | None]]()
    for key, slot in chain.places.items():
        ours[slot] += sum(own.items[place].free for place in chain.table.cells[key].places)
    high = {(one.day, one.group) for one in over}
    for slot in sorted(set(chain.places.values()), key=lambda slot: (slot[0], slot[1] or "")):
        if free[slot] or ours[slot]:
            is_held = free[slot] == ours[slot] and (slot[0].date(), slot[1]) not in high
            yield Check(free[slot], ours[slot], is_held, day=slot[0].date(), group=slot[1])


def _not_billed(
    table: Table, own: Own, offer: Offer, keys: Sequence[Key], differences: Sequence[Difference]
) -> Iterable[Check]:
    lost = {
        (one.day, one.project, one.model): sum(part.tokens for part in one.parts if part.cause in BILLED_THERE)
        for one in differences
        if one.measure is Measure.FREE and any(part.cause in BILLED_THERE and part.tokens < 0 for part in one.parts)
    }
    for key in keys:
        ours = sum(own.items[place].free for place in table.cells[key].places)
        short = lost.get((key[0].date(), key[1], key[2]), 0)
        if ours:
            yield _check(offer, key, found=ours + short, expected=ours)


def _check(offer: Offer, key: Key, *, found: int, expected: int) -> Check:
    return Check(found, expected, found == expected, key[0].date(), group_of(offer, key), key[1], key[2])


def _order(key: Key) -> tuple[str, str, str]:
    return key[0].isoformat(), key[1] or "", key[2] or ""
