"""What was decided here, as far as a report can be compared with it: one item a request, by its last word.

Items can be judged anew: under another reading of the offer, or as if some of them had been otherwise. That is the
same pure rule that decided them, in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msgspec import Struct

from gratis.audit.replay import tally_key
from gratis.book import Cases
from gratis.errors import GratisError
from gratis.model import Counts, Kind, Overage, Reason, Remedy, shown
from gratis.reconcile.rows import DAY
from gratis.rule import Tally, decide

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime

    from gratis.audit.replay import TallyKey
    from gratis.model import Decision, Enrollment, Request
    from gratis.offer import Offer

ACCOUNTS_SHOWN_MAX: Final = 5
VOIDS: Final = frozenset({Remedy.VOIDED, Remedy.RELEASED})
# Which kinds of request each report of tokens is about; the others have no report of tokens.
REPORTED_AS: Final = {
    Kind.COMPLETION: "completions",
    Kind.EVAL: "completions",
    Kind.ASSISTANTS: "completions",
    Kind.REALTIME: "completions",
    Kind.EMBEDDING: "embeddings",
    Kind.MODERATION: "moderations",
}


class Item(Struct, frozen=True, gc=False):
    """One request as it was decided; `enrollment` is the number of its account's."""

    request: Request
    enrollment: int
    free: int
    reason: Reason

    @property
    def tokens(self) -> int:
        """What it used; 0 where nobody measured it."""
        return self.request.tokens or 0


class Others(Struct, frozen=True):
    """What traffic that was not decided here used of a day and group: all of it, and what of it was free."""

    tokens: int = 0
    free: int = 0


class Own(Struct, frozen=True):
    """What was decided here under one offer, for one account, in the order in which it was.

    `span` is from the first to the last request that was decided, whether it is compared or not.
    """

    offer: str | None
    account: str | None
    items: tuple[Item, ...]
    enrollments: tuple[Enrollment | None, ...]
    notes: tuple[str, ...] = ()
    read_as: frozenset[tuple[Counts, Overage]] = frozenset()
    span: tuple[datetime, datetime] | None = None

    def offer_as_decided(self, offer: Offer) -> Offer:
        """The offer as it was read when these decisions were made."""
        if len(self.read_as) != 1:
            return offer
        counts, overage = next(iter(self.read_as))
        return offer.reading(counts=counts, overage=overage)


Amended = dict[int, tuple["Request", "Enrollment | None"] | None]
"""Items by their place, as if they had been so; None: as if no allowance covered them."""


def gather(
    decisions: Iterable[Decision],
    *,
    offer: str | None = None,
    account: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> Own:
    """The items of a ledger or of a replay; of a day more at both ends, for what came in late."""
    first, last = since and since - DAY, until and until + DAY
    items: list[Item] = []
    numbers: dict[Enrollment | None, int] = {}
    corrections: dict[tuple[str, str], Decision] = {}
    offers: dict[str, int] = {}
    accounts: set[str] = set()
    read_as: set[tuple[Counts, Overage]] = set()
    span: tuple[datetime, datetime] | None = None
    for decision in _of(decisions, account, offer):
        offers[decision.offer] = offers.get(decision.offer, 0) + 1
        if offer is not None and decision.offer != offer:
            continue
        accounts.add(decision.account)
        at = decision.at
        span = (at, at) if span is None else (min(span[0], at), max(span[1], at))
        if decision.is_judged:
            read_as.add((decision.terms.counts, decision.terms.overage))
        if (first is not None and at < first) or (last is not None and at >= last):
            continue
        if decision.correction is not None:
            corrections[decision.account, decision.id] = decision
        else:
            items.append(_item(decision, numbers))
    _check_one(sorted(accounts), "account", "an organization's report is about one of them: --account NAME")
    if offer is None:
        _check_one(sorted(offers), "offer", "one of them: --offer NAME")
    if corrections:
        said = (_corrected(item, corrections, numbers) for item in items)
        items = [item for item in said if item is not None]
    notes = [f"{sum(offers.values()) - offers.get(offer or '', 0):,} decisions under other offers are left out"] * (
        offer is not None and len(offers) > (offer in offers)
    )
    return Own(
        offer or next(iter(offers), None),
        next(iter(accounts), account),
        tuple(items),
        tuple(numbers),
        tuple(notes),
        frozenset(read_as),
        span,
    )


def judged(
    own: Own,
    offer: Offer,
    amended: Mapping[int, tuple[Request, Enrollment | None] | None],
    others: Mapping[tuple[datetime, str | None], Others],
    *,
    before: Sequence[int] | None = None,
    places: Iterable[int] | None = None,
) -> list[int]:
    """The free tokens of each item, judged anew in its order; `others` took their part of a day's allowance first.

    With `places` only these items are, all of the windows that they are in; the others keep what they had `before`.
    """
    cases = Cases(offer)
    tallies: dict[TallyKey, Tally] = {}
    versions: dict[Enrollment | None, int] = {one: number for number, one in enumerate(own.enrollments)}
    free = [0] * len(own.items) if before is None else list(before)
    for place in range(len(own.items)) if places is None else places:
        item = own.items[place]
        request, enrollment, version = item.request, own.enrollments[item.enrollment], item.enrollment
        if place in amended:
            other = amended[place]
            if other is None:
                free[place] = 0
                continue
            request, enrollment = other
            version = versions.setdefault(enrollment, len(versions))
        charge = cases.charge(request, enrollment, version)
        if charge.window is None:
            free[place] = 0
            continue
        key = tally_key(charge)
        tally = tallies.get(key)
        if tally is None and (charge.window.start, charge.terms.group) in others:
            first = others[charge.window.start, charge.terms.group]
            used = first.free if charge.terms.counts is Counts.FREE else first.tokens
            tally = Tally(charge.window, used, 0)
        decision, after = decide(charge, tally)
        if after is not None:
            tallies[key] = after
        free[place] = decision.free_tokens or 0
    return free


def _of(decisions: Iterable[Decision], account: str | None, offer: str | None) -> Iterable[Decision]:
    """The decisions of one account, each once; who is not among those that were decided for may be mistyped."""
    is_known, others = False, set[str]()
    for decision in decisions:
        if decision.replayed:
            continue
        if account in {None, decision.account}:
            is_known = True
            yield decision
        elif offer in {None, decision.offer}:
            others.add(decision.account)
    if others and not is_known:
        found = f"found no decision, but those of {_some(sorted(others))}"
        raise GratisError(f"reconcile: --account {shown(account)}: {found}; expected one of these accounts")


def _item(decision: Decision, numbers: dict[Enrollment | None, int]) -> Item:
    number = numbers.setdefault(decision.terms.enrollment, len(numbers))
    return Item(decision.request, number, decision.free_tokens or 0, decision.reason)


def _corrected(
    item: Item, corrections: Mapping[tuple[str, str], Decision], numbers: dict[Enrollment | None, int]
) -> Item | None:
    """The last word on a request; None if that is that it counts for nothing."""
    last = corrections.get((item.request.account, item.request.id))
    if last is None:
        return item
    assert last.correction is not None, "what corrects says so"
    return None if last.correction.remedy in VOIDS else _item(last, numbers)


def _check_one(names: list[str], what: str, expected: str) -> None:
    if len(names) > 1:
        raise GratisError(f"reconcile: found decisions of {len(names)} {what}s ({_some(names)}); expected {expected}")


def _some(names: list[str]) -> str:
    """Names, as many as there is room for."""
    return ", ".join(names[:ACCOUNTS_SHOWN_MAX]) + (" …" if len(names) > ACCOUNTS_SHOWN_MAX else "")
