"""A report beside decisions: every difference with its causes, five identities, the readings, the money.

Explained and unexplained together are the difference, exactly, in tokens; a difference is shown whatever explains it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from gratis.errors import GratisError
from gratis.reconcile.cells import beside, group_of
from gratis.reconcile.findings import Cause, Difference, Measure, Over, Part, Result
from gratis.reconcile.fit import fit
from gratis.reconcile.free import explain_free
from gratis.reconcile.identities import given, identities
from gratis.reconcile.money import money
from gratis.reconcile.rest import allowance
from gratis.reconcile.totals import explain

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from gratis.offer import Offer
    from gratis.prices import Prices
    from gratis.reconcile.cells import Cell, Key, Table
    from gratis.reconcile.chain import Chain
    from gratis.reconcile.own import Item, Own
    from gratis.reconcile.rows import Report, UsageRow
    from gratis.reconcile.totals import Totals


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
    check_days(since, until)
    offer = own.offer_as_decided(offer)
    table = beside(report, own, since=since, until=until)
    totals = explain(table, own)
    chain = explain_free(table, own, offer, totals) if table.by_tier else None
    differences = list(_differences(table, own, offer, totals, chain))
    costs = [row for row in report.costs if table.covers(row.day)]
    usage = list(_single(table, totals))
    items = [own.items[place] for cell in table.cells.values() for place in cell.places]
    spent = None if prices is None else money(usage, costs, items, prices)
    over = () if chain is None else tuple(_over(chain, offer, own))
    checks = identities(table, own, offer, chain=chain, over=over, differences=differences, spent=spent)
    free = sum(cell.free for cell in table.cells.values())
    found = None if chain is None else fit(chain.keys, chain.places, chain.observed(), chain.free, chain.used)
    return Result(
        offer=offer.name,
        reading=str(chain.used) if chain is not None else "",
        since=table.since,
        until=table.until,
        differences=tuple(differences),
        identities=tuple(checks),
        over=over,
        fit=found,
        money=spent,
        reported=sum(cell.tokens for cell in table.cells.values()),
        decided=sum(item.tokens for item in items),
        reported_free=free if table.by_tier else None,
        decided_free=sum(item.free for item in items),
        notes=tuple(_notes(report, own, table)),
        apart=table.apart,
    )


def check_days(since: datetime | None, until: datetime | None) -> None:
    """Refuse what are no whole days, or none at all."""
    for name, edge in (("since", since), ("until", until)):
        if edge is not None and edge.time().isoformat() != "00:00:00":
            raise GratisError(f"--{name}: found {edge.isoformat()}; expected a midnight in UTC: reports are by day")
    if since is not None and until is not None and until <= since:
        raise GratisError(f"--until: found {until.date()}; expected a day after --since {since.date()}")


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
        if cell.tokens == tokens and not parts:
            for measure, reported, decided in _parts(table, cell, items):
                if reported != decided:
                    yield _difference(measure, offer, key, reported=reported, decided=decided, parts=[])


def _parts(table: Table, cell: Cell, items: Sequence[Item]) -> Iterable[tuple[Measure, int, int]]:
    """What may differ where the tokens do not: which of them were input, or cached."""
    yield Measure.INPUT, cell.given, sum(item.request.input_tokens or 0 for item in items)
    if table.has_cached:
        cached = sum(row.cached_tokens for row in cell.rows)
        yield Measure.CACHED, cached, sum(item.request.cached_tokens for item in items)
    without = sum(1 for item in items if not item.tokens)
    if not len(items) - without <= cell.requests <= len(items):
        yield Measure.REQUESTS, cell.requests, len(items)


def _single(table: Table, totals: Totals) -> Iterable[UsageRow]:
    """The rows of the report, without those that are there again."""
    copies = totals.copies.copy()
    for cell in table.cells.values():
        for row in cell.rows:
            if copies[row.source]:
                copies[row.source] -= 1
            else:
                yield row


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
    for slot, tokens in sorted(given(chain).items(), key=lambda pair: (pair[0][0], pair[0][1] or "")):
        most = allowance(offer, own, slot)
        if slot[1] is not None and most and tokens > most:
            yield Over(slot[0].date(), slot[1], tokens, most)


def _notes(report: Report, own: Own, table: Table) -> Iterable[str]:
    """What is to be known beside the numbers; first that no day is in common, if so."""
    if table.apart:
        yield table.apart
    yield from (*report.notes, *own.notes, *table.notes, *_charge_notes(report, table))


def _charge_notes(report: Report, table: Table) -> Iterable[str]:
    outside = sum(1 for row in report.costs if not table.covers(row.day))
    if outside:
        yield f"{outside:,} lines of costs lie outside the days that the report of usage covers"


def _order(key: Key) -> tuple[str, str, str]:
    return key[0].isoformat(), key[1] or "", key[2] or ""
