"""How answers are compared, and what is read of a store to compare it."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from msgspec.structs import replace

from gratis.audit.replay import Replay
from gratis.book import Explanation
from gratis.chain import UNCHAINED, Stems, link
from gratis.errors import Conflict, EnrollmentError, RequestError
from gratis.model import Change, Decision, Durability, Enrollment, Entry, Hold, Remedy, Request, Unit
from gratis.rule import Tally, free_part, is_free, used_after
from gratis.stores import Linked, behind
from gratis.testing.scene import ENROLLED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from gratis.meter import Meter
    from gratis.offer import Offer
    from gratis.stores import Cursor, Links, Store

SHOWN_MAX = 4_000
E = TypeVar("E", bound=Exception)
P = ParamSpec("P")
BEGINNING: Cursor = 0
Kept = dict[tuple[str, str], tuple[list[tuple[str, str, Tally]], list[Change], list[Entry]]]
WindowKey = tuple[str, str, str, datetime]


def same(found: object, expected: object, what: str = "") -> None:
    """Nothing, if both are equal; else an AssertionError that tells both."""
    __tracebackhide__ = True
    if found == expected:
        return
    if isinstance(found, list) and isinstance(expected, list):
        pairs = enumerate(zip(found, expected, strict=False))
        place = next((place for place, (one, other) in pairs if one != other), min(len(found), len(expected)))
        what = f"{what}: of {len(found)} and {len(expected)}, first different at {place}"
        found, expected = found[place : place + 1], expected[place : place + 1]
    raise AssertionError(f"{what}\n  found:    {_shown(found)}\n  expected: {_shown(expected)}")


def refused(kind: type[E], ask: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> E:
    """The error of this very kind that asking raises."""
    __tracebackhide__ = True
    try:
        answer = ask(*args, **kwargs)
    except kind as error:
        same(type(error), kind, "the error")
        return error
    raise AssertionError(f"found: {_shown(answer)}\n  expected: {kind.__name__}")


def plain(answer: Any) -> Any:
    """An answer as every store must give it: without what it rests on, and without an error's words."""
    match answer:
        case Decision():
            return replace(answer, durability=Durability.VOLATILE)
        case Conflict():
            return "conflict", answer.field, plain(answer.first), plain(answer.hold)
        case RequestError() | EnrollmentError():
            return "refused", getattr(answer, "field", "enrollment")
        case Hold() | Explanation():
            return replace(answer, decision=plain(answer.decision))
        case list():
            return plainly(answer)
        case _:
            return answer


def plainly(answers: Iterable[Any]) -> list[Any]:
    """Answers as every store must give them."""
    return [plain(answer) for answer in answers]


def nameless(answer: Decision | RequestError | None) -> object:
    """An answer as any account must have it."""
    if isinstance(answer, Conflict):
        return answer.field, nameless(answer.first)
    if isinstance(answer, RequestError):
        return answer.field
    return answer and replace(answer, request=replace(answer.request, account="any"))


def singly(meter: Meter, requests: Iterable[Request]) -> list[Decision | RequestError]:
    """What a meter answers to requests one after another, errors in their places."""
    answers: list[Decision | RequestError] = []
    for request in requests:
        try:
            answers.append(meter.decide(request))
        except RequestError as error:
            answers.append(error)
    return answers


def told(decisions: Iterable[object]) -> list[tuple[str, int | None, int | None, int | None, int | None]]:
    """What decisions say of totals: reason, free tokens, total, used and seq."""
    return [
        (answer.reason.value, answer.free_tokens, answer.total, answer.used, answer.seq)
        for answer in decisions
        if isinstance(answer, Decision)
    ]


def by_the_rule(offer: Offer, requests: Iterable[Request], *, assume: Enrollment | None = ENROLLED) -> list[object]:
    """What the pure rule answers to these requests, in this order."""
    replay = Replay(offer, assume=assume)
    answers = replay.decide_many(list(requests))
    replay.close()
    return plainly(answers)


def ledger(store: Store, after: Cursor = BEGINNING) -> tuple[dict[tuple[str, str], list[Entry]], Cursor]:
    """The ledger of each account from behind a cursor on, and how far it was read.

    Only within an account does the order of entries mean anything.
    """
    found: dict[tuple[str, str], list[Entry]] = {}
    shards = store.shards
    for entry in store.entries(after=after):
        after = behind(after, entry, shards=shards)
        found.setdefault((entry.decision.offer, entry.decision.account), []).append(entry)
    return found, after


def tallies(store: Store, offer: str, account: str, *, at: datetime | None = None) -> list[tuple[str, str, Tally]]:
    """An account's tallies, in one order."""
    return sorted(store.tallies(offer, account, at=at), key=lambda row: (row[0], row[1], row[2].window.start))


def kept(store: Store) -> Kept:
    """All that a store keeps: of each account its tallies, its changes and its part of the ledger."""
    entries, _ = ledger(store)
    return {
        key: (tallies(store, *key), store.enrollments(*key), entries.get(key, []))
        for key in {*store.accounts(), *entries}
    }


def everything(store: Store) -> tuple[Kept, dict[tuple[str, str], list[Hold]]]:
    """All that a store keeps, and the holds of each account."""
    found = kept(store)
    return found, {key: store.holds(*key) for key in found}


def fold(decisions: Iterable[Decision]) -> dict[WindowKey, Tally]:
    """The tallies that follow from decisions; those must be what the rule gives in the order of their `seq`."""
    windows: dict[WindowKey, list[Decision]] = {}
    for decision in decisions:
        if decision.window is not None:
            terms = decision.terms
            key = (decision.account, terms.group or "", terms.window, decision.window.start)
            windows.setdefault(key, []).append(decision)
    found = {}
    for key, judged in windows.items():
        judged.sort(key=lambda decision: decision.seq or 0)
        same([decision.seq for decision in judged], list(range(1, len(judged) + 1)), f"seq of {key}")
        used, taken = 0, dict[str, int]()
        for decision in judged:
            if decision.correction is not None:
                same(decision.correction.returned, taken.get(decision.id, 0), f"what {decision.id!r} took of {key}")
                used -= decision.correction.returned
            after = _judged(decision, used, f"{decision.id!r} in {key}")
            taken[decision.id] = after - used
            used = after
        assert judged[-1].window is not None, "it has one"
        found[key] = Tally(judged[-1].window, used, len(judged))
    return found


def _judged(decision: Decision, used: int, what: str) -> int:
    """What is used after a decision, which must be what the rule gives."""
    terms = decision.terms
    amount = (decision.tokens or 0) if terms.unit is Unit.TOKENS else 1
    if decision.correction is not None and decision.correction.remedy in {Remedy.VOIDED, Remedy.RELEASED}:
        amount = 0
    free = free_part(amount, allowance=terms.allowance, used=used, overage=terms.overage)
    fits, total = is_free(amount, allowance=terms.allowance, used=used), used + amount
    used = used_after(amount, free=free, used=used, counts=terms.counts)
    tokens = decision.tokens if fits else free if terms.unit is Unit.TOKENS else 0
    found = (decision.is_free, decision.free_tokens, decision.total, decision.used)
    same(found, (fits, tokens, total, used), what)
    return used


def rows_of(found: Mapping[WindowKey, Tally]) -> list[tuple[str, str, Tally]]:
    """An account's tallies as a store tells them."""
    return [(group, kind, tally) for (_, group, kind, _), tally in sorted(found.items())]


def follows(store: Store, offers: Sequence[str]) -> None:
    """A store's tallies are what follows from its ledger, its ledger what the rule gives, and each link its entry's."""
    with store.frozen():
        everything = kept(store)
        if isinstance(store, Linked):
            for key, (_, _, entries) in everything.items():
                same(store.links(*key)[2], chained(entries), f"the last links of {key}")
    for (offer, account), (found, _, entries) in everything.items():
        if offer in offers:
            expected = rows_of(fold(entry.decision for entry in entries))
            same(found, expected, f"tallies of {account!r}")


def chained(entries: Iterable[Entry]) -> Links:
    """Where the chains of an account's entries end; each link must be what its entry gives."""
    ends: Links = {}
    stems = Stems()
    for entry in entries:
        decision, window = entry.decision, entry.decision.window
        place = None if window is None else (decision.terms.group or "", decision.terms.window, window.start)
        ends[place] = link(ends.get(place, UNCHAINED), stems.of(decision), decision, entry.decided_at)
        same(entry.link, ends[place], f"the link of entry {entry.entry}")
    return ends


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_MAX else f"{text[:SHOWN_MAX]}… ({len(text)} characters)"
