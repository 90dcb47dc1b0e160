"""A report beside decisions: every difference with its causes, five identities, the readings, the money.

Explained and unexplained together are the difference, exactly, in tokens; a difference is shown whatever explains it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Final

from gratis.errors import GratisError
from gratis.reconcile.cells import beside, group_of
from gratis.reconcile.findings import Cause, Difference, Identity, Measure, Over, Part, Result
from gratis.reconcile.fit import fit
from gratis.reconcile.free import allowance, explain_free
from gratis.reconcile.money import is_near, money
from gratis.reconcile.totals import explain

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from gratis.offer import Offer
    from gratis.prices import Prices
    from gratis.reconcile.cells import Key, Table
    from gratis.reconcile.chain import Chain
    from gratis.reconcile.findings import Money
    from gratis.reconcile.fit import Slot
    from gratis.reconcile.own import Own
    from gratis.reconcile.rows import Report
    from gratis.reconcile.totals import Totals

BILLED_THERE: Final = frozenset(
    {Cause.ENROLLMENT_OR_BALANCE, Cause.PROJECT_NOT_SHARING, Cause.HOSTED_TOOLS, Cause.MODEL_NOT_LISTED}
)


def reconcile(
    report: Report,
    own: Own,
    offer: Offer,
    *,
    prices: Prices | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> Result:
    """Compare what the provider reported and charged with what was decided."""
    for name, edge in (("since", since), ("until", until)):
        if edge is not None and edge.time().isoformat() != "00:00:00":
            raise GratisError(f"--{name}: found {edge.isoformat()}; expected a midnight in UTC: reports are by day")
    offer = own.offer_as_decided(offer)
    table = beside(report, own, since=since, until=until)
    totals = explain(table, own)
    chain = explain_free(table, own, offer, totals) if table.by_tier else None
    differences = list(_differences(table, own, offer, totals, chain))
    costs = [row for row in report.costs if table.covers(row.day)]
    usage = [row for cell in table.cells.values() for row in cell.rows]
    items = [own.items[place] for cell in table.cells.values() for place in cell.places]
    spent = None if prices is None else money(usage, costs, items, prices)
    over = () if chain is None else tuple(_over(chain, offer, own))
    free = sum(cell.free for cell in table.cells.values())
    found = None if chain is None else fit(chain.keys, chain.places, chain.observed(), chain.free, chain.used)
    return Result(
        offer=offer.name,
        reading=str(chain.used) if chain is not None else "",
        since=table.since,
        until=table.until,
        differences=tuple(differences),
        identities=tuple(_identities(table, own, offer, chain=chain, over=over, differences=differences, spent=spent)),
        over=over,
        fit=found,
        money=spent,
        reported=sum(cell.tokens for cell in table.cells.values()),
        decided=sum(item.tokens for item in items),
        reported_free=free if table.by_tier else None,
        decided_free=sum(item.free for item in items),
        notes=(*report.notes, *own.notes, *table.notes, *_charge_notes(report, table)),
    )


def _differences(table: Table, own: Own, offer: Offer, totals: Totals, chain: Chain | None) -> Iterable[Difference]:
    """Where they part, cell by cell, in order."""
    for key in sorted(table.cells, key=_order):
        cell = table.cells[key]
        items = [own.items[place] for place in cell.places]
        tokens = sum(item.tokens for item in items)
        parts = totals.parts.get(key, [])
        if cell.tokens != tokens or parts:
            yield _difference(Measure.TOKENS, offer, key, reported=cell.tokens, decided=tokens, parts=parts)
        free = sum(item.free for item in items)
        if chain is not None and (cell.free != free or chain.parts[key]):
            yield _difference(Measure.FREE, offer, key, reported=cell.free, decided=free, parts=chain.parts[key])
        given = sum(item.request.input_tokens or 0 for item in items)
        if cell.tokens == tokens and not parts and cell.given != given:
            yield _difference(Measure.INPUT, offer, key, reported=cell.given, decided=given, parts=[])


def _difference(
    measure: Measure, offer: Offer, key: Key, *, reported: int, decided: int, parts: Iterable[Part]
) -> Difference:
    sums: defaultdict[tuple[Cause, str], int] = defaultdict(int)
    for part in parts:
        sums[part.cause, part.why] += part.tokens
    kept = tuple(Part(cause, tokens, why) for (cause, why), tokens in sums.items() if tokens)
    return Difference(measure, key[0].date(), group_of(offer, key), key[1], key[2], reported, decided, kept)


def _over(chain: Chain, offer: Offer, own: Own) -> Iterable[Over]:
    """Days and groups of which the report gives more free than the allowance."""
    for slot, tokens in sorted(_given(chain).items(), key=lambda pair: (pair[0][0], pair[0][1] or "")):
        most = allowance(offer, own, slot)
        if slot[1] is not None and most and tokens > most:
            yield Over(slot[0].date(), slot[1], tokens, most)


def _given(chain: Chain) -> Counter[Slot]:
    sums: Counter[Slot] = Counter()
    for key, slot in chain.places.items():
        sums[slot] += chain.table.cells[key].free
    return sums


def _identities(
    table: Table,
    own: Own,
    offer: Offer,
    *,
    chain: Chain | None,
    over: tuple[Over, ...],
    differences: list[Difference],
    spent: Money | None,
) -> Iterable[Identity]:
    """The five checks, and how often each held."""
    reported: Counter[tuple[datetime, str | None]] = Counter()
    decided: Counter[tuple[datetime, str | None]] = Counter()
    for key, cell in table.cells.items():
        slot = key[0], group_of(offer, key)
        reported[slot] += cell.tokens
        decided[slot] += sum(own.items[place].tokens for place in cell.places)
    slots = reported.keys() | decided.keys()
    held = sum(reported[slot] == decided[slot] for slot in slots)
    yield Identity(1, "all tokens of a day and group, over all tiers, are those decided here", len(slots), held)
    if chain is None:
        return
    free, ours = _given(chain), Counter[tuple["datetime", str | None]]()
    for key, slot in chain.places.items():
        ours[slot] += sum(own.items[place].free for place in table.cells[key].places)
    days = [slot for slot in set(chain.places.values()) if free[slot] or ours[slot]]
    high = {(one.day, one.group) for one in over}
    held = sum(free[slot] == ours[slot] and (slot[0].date(), slot[1]) not in high for slot in days)
    yield Identity(2, "free tokens are within the allowance, and those that were decided free", len(days), held)
    if spent is not None and spent.spent is not None:
        known = [one for one in spent.models if one.difference is not None]
        yield Identity(3, "billed tokens at list price are what was charged", len(known), sum(map(is_near, known)))
    strange = {key[2] for key in table.cells if table.by_model and key[2] and group_of(offer, key) is None}
    stale = {key[2] for key, cell in table.cells.items() if key[2] in strange and cell.free}
    yield Identity(4, "no model that is on no list here is free", len(strange), len(strange) - len(stale))
    cells = [key for key, cell in table.cells.items() if any(own.items[place].free for place in cell.places)]
    lost = {
        (one.day, one.project, one.model)
        for one in differences
        if any(part.cause in BILLED_THERE and part.tokens < 0 for part in one.parts)
    }
    held = sum((key[0].date(), key[1], key[2]) not in lost for key in cells)
    yield Identity(5, "what is listed, shared and within the allowance is not in a billed tier", len(cells), held)


def _charge_notes(report: Report, table: Table) -> Iterable[str]:
    outside = sum(1 for row in report.costs if not table.covers(row.day))
    if outside:
        yield f"{outside:,} lines of costs lie outside the days that the report of usage covers"


def _order(key: Key) -> tuple[str, str, str]:
    return key[0].isoformat(), key[1] or "", key[2] or ""
