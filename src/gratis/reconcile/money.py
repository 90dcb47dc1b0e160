"""What was saved and what was spent, exactly, and by which table of prices.

Saved is what the free tokens would have cost at list price; spent is what the Costs API says. Between the two stands
what the billed tokens should have cost: where it is not what was charged, one of the three is wrong.
"""

from __future__ import annotations

from collections import defaultdict
from decimal import Decimal
from typing import TYPE_CHECKING, Final

from gratis.errors import GratisError
from gratis.prices import cost, total
from gratis.reconcile.findings import Charged, Money
from gratis.reconcile.rows import COMPLETIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from gratis.prices import Price, Prices
    from gratis.reconcile.own import Item
    from gratis.reconcile.rows import CostRow, UsageRow

LIST_TIERS: Final = frozenset({None, "default", "auto"})
NEAR: Final = Decimal("0.01")
"""Up to a cent a model, what was charged and what is expected are the same: the provider rounds, and says so."""


def money(usage: Sequence[UsageRow], costs: Sequence[CostRow], items: Sequence[Item], prices: Prices) -> Money:
    """What was saved and spent, model by model."""
    tokens = [row for row in usage if row.kind == COMPLETIONS]
    is_told = any(row.service_tier for row in tokens) and any(row.model for row in tokens)
    unpriced: defaultdict[str, int] = defaultdict(int)
    if is_told:
        saved = _saved(tokens, prices, unpriced)
        basis = "the free tokens of the report"
    else:
        saved = _saved_here(items, prices, unpriced)
        basis = "the free tokens as they were decided"
    spent = total(row.amount for row in costs) if costs else None
    for row in costs:
        if row.currency != prices.currency:
            expected = f"{prices.currency}, as the prices of {prices.name}: amounts of two currencies make no sum"
            raise GratisError(f"{row.source}: currency: found {row.currency}; expected {expected}")
    models = tuple(_models(tokens, costs, prices)) if is_told else ()
    named = {row.model for row in tokens if row.model}
    other: defaultdict[str, list[Decimal]] = defaultdict(list)
    for row in costs:
        if row.model not in named and row.amount:
            other[f"{row.line_item or 'not grouped by line item'}"].append(row.amount)
    return Money(
        currency=prices.currency,
        prices=prices.name,
        as_of=prices.as_of,
        source=prices.source,
        saved=saved,
        saved_basis=basis,
        spent=spent,
        models=models,
        unpriced=tuple(sorted(unpriced.items())),
        other_lines=tuple((name, total(amounts)) for name, amounts in sorted(other.items())),
    )


def is_near(charged: Charged) -> bool:
    """Whether what was charged is what is expected, but for the provider's rounding; unknown is not a difference."""
    return charged.difference is None or abs(charged.difference) <= NEAR


def cost_of(price: Price, row: UsageRow) -> Decimal:
    """What a row's tokens cost at list price."""
    return cost(
        price,
        input_tokens=row.input_tokens,
        cached_tokens=row.cached_tokens,
        output_tokens=row.output_tokens,
        cache_write_tokens=row.cache_write_tokens,
    )


def _saved(rows: Iterable[UsageRow], prices: Prices, unpriced: defaultdict[str, int]) -> Decimal:
    amounts = []
    for row in rows:
        if not row.is_free or row.model is None:
            continue
        price = prices.price(row.model, row.start)
        if price is None:
            unpriced[row.model] += row.tokens
        else:
            amounts.append(cost_of(price, row))
    return total(amounts)


def _saved_here(items: Iterable[Item], prices: Prices, unpriced: defaultdict[str, int]) -> Decimal:
    """What was saved by the decisions; of a request that is free in part, that part of its cost."""
    sums: defaultdict[tuple[str, datetime], list[int]] = defaultdict(lambda: [0, 0, 0])
    amounts = []
    for item in items:
        request, day = item.request, item.request.at.replace(hour=0, minute=0, second=0, microsecond=0)
        if not item.free:
            continue
        given, cached, made = request.input_tokens or 0, request.cached_tokens, request.output_tokens or 0
        price = prices.price(request.model, request.at)
        if price is None:
            unpriced[request.model] += item.free
        elif item.free == item.tokens:
            for place, count in enumerate((given, cached, made)):
                sums[request.model, day][place] += count
        else:
            part = cost(price, input_tokens=given, cached_tokens=cached, output_tokens=made) * item.free
            amounts.append((part / item.tokens).quantize(Decimal("1e-12")))
    for (model, day), (given, cached, made) in sums.items():
        price = prices.price(model, day)
        if price is not None:
            amounts.append(cost(price, input_tokens=given, cached_tokens=cached, output_tokens=made))
    return total(amounts)


def _models(rows: Sequence[UsageRow], costs: Sequence[CostRow], prices: Prices) -> Iterable[Charged]:
    """What the billed tokens of each model cost by list, and what was charged for it."""
    days = {row.day for row in costs}
    billed: defaultdict[str, list[UsageRow]] = defaultdict(list)
    for row in rows:
        if row.model is not None and (not days or row.day in days):
            billed[row.model].extend([row] if not row.is_free and row.tokens else [])
    charged: defaultdict[str, list[Decimal]] = defaultdict(list)
    for line in costs:
        if line.model is not None and line.model in billed:
            charged[line.model].append(line.amount)
    for model, those in sorted(billed.items()):
        other = sum(row.tokens for row in those if row.service_tier not in LIST_TIERS or row.batch)
        priced = [(row, prices.price(model, row.start)) for row in those]
        note = ""
        if any(price is None for _, price in priced):
            note = "no price known"
        elif other:
            note = f"{other:,} tokens in batches or other tiers, which have other prices"
        expected = None if note else total(cost_of(price, row) for row, price in priced if price is not None)
        paid = total(charged[model]) if costs else None
        if expected is None or expected or paid:
            yield Charged(model, expected, paid, note)
