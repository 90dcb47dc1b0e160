"""What both meters do with a store, written once: each verb is a flow that two drivers run.

A flow yields what is to be asked of the store and is sent the answer. So where there is a branch between two calls
(an enrollment that changed meanwhile, holds that ran out of time, a settle that comes too late), the blocking meter
and the one for asyncio cannot differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from gratis.book import read
from gratis.enrollment import check_owner
from gratis.errors import Conflict, NotExecuted, OutcomeUnknown, RequestError, StoreError
from gratis.model import (
    EPOCH,
    TOKENS_MAX,
    Expiry,
    Held,
    Reason,
    Remedy,
    Request,
    check_name,
    correction_id,
    shown,
)
from gratis.rule import Holding, Overdue
from gratis.stores import BATCH_MAX, CONFLICT_FIELDS, Receipt, Status, stops
from gratis.thresholds import reached, tell, unclaimed

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from datetime import datetime

    from gratis.book import Book, Explanation, Standing
    from gratis.model import Change, Decision, Hold, Usage
    from gratis.rule import Step

    T = TypeVar("T")
    Flow = Generator["Ask", Any, T]
    Turn = tuple[Request, Step | None]

ROUNDS_MAX = 16
_WRITTEN = frozenset({Status.DECIDED, Status.HELD, Status.GONE})
ENDS_MAX = 100_000
CLOSED = "its window is no longer kept; what was decided in it stands"
_DECIDED = Status.DECIDED
_OWNERS = frozenset({Remedy.VOIDED, Remedy.ADJUSTED})
_LATER = frozenset({Status.OUTDATED, Status.EXPIRED, Status.WAITING})


class Ask(Struct, frozen=True):
    """One call of a store: the method, and what it is given."""

    verb: str
    args: tuple[Any, ...]
    options: dict[str, Any] = {}


def decided(book: Book, requests: Sequence[Request]) -> Flow[list[Decision | RequestError]]:
    """Each request's decision or error, in order, an account's as if one by one."""
    answers: list[Decision | RequestError] = []
    for place in range(0, len(requests), BATCH_MAX):
        part = requests[place : place + BATCH_MAX]
        found = yield from _applied(book, [(request, None) for request in part])
        for request, answer in zip(part, found, strict=True):
            answers.append(read(request, answer) if isinstance(answer, Receipt) else answer)
    return answers


def held(book: Book, request: Request, tokens_max: int, *, until: datetime, expiry: Expiry) -> Flow[Hold]:
    """A hold of so many tokens for a request, or what is known of one that was decided."""
    if type(tokens_max) is not int or not 0 <= tokens_max <= TOKENS_MAX:
        raise RequestError("tokens_max", f"found {shown(tokens_max)}; expected a whole number from 0 to {TOKENS_MAX}")
    bounded = replace(request, input_tokens=tokens_max, output_tokens=0, cached_tokens=0)
    (receipt,) = yield from _applied(book, [(bounded, Holding(until, expiry))])
    assert isinstance(receipt, Receipt), "who asks for a hold is not late"
    if receipt.status is Status.HELD:
        assert receipt.hold is not None, "a hold that was asked for is there"
        return receipt.hold
    decision = read(bounded, receipt)
    if isinstance(decision, RequestError):
        raise decision
    return book.no_hold(bounded, decision, until=until, expiry=expiry)


def one(book: Book, request: Request) -> Flow[Decision]:
    """The decision on one request."""
    (answer,) = yield from decided(book, (request,))
    if isinstance(answer, RequestError):
        raise answer
    return answer


def settled(book: Book, hold: Hold, usage: Usage) -> Flow[Decision]:
    """The decision on a held request by what it used, or by its bound where nobody could read that."""
    request = using(hold.request, usage)
    if request.tokens is not None:
        return (yield from one(book, request))
    bound = max(hold.tokens_max, (usage.input_tokens or 0) + (usage.output_tokens or 0))
    request = replace(request, input_tokens=bound, output_tokens=0, cached_tokens=0)
    (receipt,) = yield from _applied(book, [(request, Held(bound, hold.window, is_unmeasured=True))])
    assert isinstance(receipt, Receipt), "who knows nothing better is not late"
    first = receipt.decision if receipt.status is Status.CONFLICT else None
    if first is not None and first.is_unmeasured and first.request == hold.request:
        return replace(first, replayed=True)  # its hold ran out: it was decided by its bound already
    answer = read(request, receipt)
    if isinstance(answer, RequestError):
        raise answer
    return answer


def using(request: Request, usage: Usage) -> Request:
    """A request with what it used; what the provider knows better (model, tools, project) is its word."""
    return replace(
        request,
        model=usage.model or request.model,
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cached_tokens=usage.cached_tokens,
        project=usage.project or request.project,
        kind=usage.kind or request.kind,
        tools=tuple({*request.tools, *usage.tools}),
    )


def released(book: Book, hold: Hold) -> Flow[Decision | None]:
    """Give a hold back. Where it ran out of time and was decided by its bound, that is corrected: the decision."""
    place = (book.offer.name, hold.account, hold.id)
    if (yield Ask("release", place)) is not None:
        return None
    words = yield from words_on(book, hold.account, hold.id)
    if not words or not words[0].is_unmeasured or any(_is_end(word) for word in words):
        return None
    return (yield from _corrected(book, _latest(words), Remedy.RELEASED))


def extended(book: Book, hold: Hold, *, until: datetime) -> Flow[Hold]:
    """The hold with another end."""
    found: Hold | None = yield Ask("extend", (book.offer.name, hold.account, hold.id), {"until": until})
    if found is None:
        raise RequestError("id", f"no hold of request {hold.id!r}: it was settled or released, or ran out of time")
    return found


def expired(book: Book, account: str, *, now: datetime) -> Flow[list[Decision]]:
    """End the holds of an account that ran out of time: the decisions on those that are decided by their bound."""
    decisions: list[Decision] = []
    before: list[str] = []
    while True:
        holds: list[Hold] = yield Ask("holds", (book.offer.name, account))
        due = [hold for hold in holds if hold.until <= now][:BATCH_MAX]
        ids = [hold.id for hold in due]
        if not due or ids == before:  # the clock may have gone back meanwhile
            return decisions
        receipts = yield from _applied(book, [(hold.request, _end(hold)) for hold in due])
        ended = [
            receipt.decision for receipt in receipts if isinstance(receipt, Receipt) and receipt.status is _DECIDED
        ]
        decisions += [decision for decision in ended if decision is not None]
        before = ids


def words_on(book: Book, account: str, request_id: str) -> Flow[list[Decision]]:
    """All that was said of a request: its decision, then each correction; nothing if it was not decided."""
    count: int = yield Ask("corrections", (book.offer.name, account, request_id))
    ids = [request_id, *(correction_id(request_id, number) for number in range(1, count + 1))]
    probes = [book.charge(Request(id=one, model="", at=EPOCH, account=account)) for one in ids]
    receipts: list[Receipt] = yield Ask("apply", (probes,), {"dry": True})
    words = [
        replace(receipt.decision, replayed=False)
        for receipt in receipts
        if receipt.decision is not None and receipt.status is not _DECIDED  # dry: it was not decided
    ]
    return words if words and words[0].correction is None else []  # a correction's id is no request's


def corrected(
    book: Book, account: str, request_id: str, usage: Usage | None, *, actor: str, why: str
) -> Flow[Decision]:
    """An owner's correction: what a request really used, or, without a usage, that it is to count for nothing."""
    check_name("why", why)
    history: list[Change] = yield Ask("enrollments", (book.offer.name, account))
    check_owner(history, actor, "corrects its decisions")
    words = yield from words_on(book, account, request_id)
    if not words:
        raise _unknown(Request(id=request_id, model="", at=EPOCH, account=account))
    request = _latest(words)
    if usage is None:
        return (yield from _corrected(book, request, Remedy.VOIDED, actor=actor, why=why))
    counted = using(request, usage)
    if counted.tokens is None:
        field = "input_tokens" if usage.input_tokens is None else "output_tokens"
        raise RequestError(field, "missing; expected what the request really used")
    return (yield from _corrected(book, counted, Remedy.ADJUSTED, actor=actor, why=why))


def explained(book: Book, request: Request) -> Flow[Explanation]:
    """Whether a request would be free now, and if not, what would be; writes nothing."""
    for _ in range(ROUNDS_MAX):
        charges = [book.charge(request)]
        if request.tokens is not None:
            charges.append(book.charge(request, Holding(EPOCH, Expiry.RELEASED)))
        receipts: list[Receipt] = yield Ask("apply", (charges,), {"dry": True})
        if receipts[0].status is not Status.OUTDATED:
            break
        book.learn(request.account, receipts[0].change)
    else:
        raise NotExecuted(f"the enrollment changed {ROUNDS_MAX} times meanwhile")
    found = book.explanation(charges[0], receipts[0], receipts[-1].hold)
    if found.is_free or found.decision.replayed or request.tokens is None:
        return found
    standings = yield from standing(book, request.account, at=request.at)
    return replace(found, elsewhere=book.takers(found, standings))


def standing(book: Book, account: str, *, at: datetime) -> Flow[list[Standing]]:
    """What an account has of each group's allowance at an instant.

    Holds are read first: one that is settled meanwhile counts twice rather than not at all.
    """
    holds: list[Hold] = yield Ask("holds", (book.offer.name, account))
    tallies = yield Ask("tallies", (book.offer.name, account), {"at": at})
    history: list[Change] = yield Ask("enrollments", (book.offer.name, account))
    return book.standing(account, at, history[-1] if history else None, tallies, holds)


def _applied(book: Book, turns: Sequence[Turn]) -> Flow[list[Receipt | Decision | RequestError]]:
    """Have charges applied, whatever comes between: the receipts that remain are answers, or refusals for good.

    A settle that comes after its hold ran out of time is made here, in its place: its answer is no receipt any more.
    """
    found: dict[int, Receipt | Decision | RequestError] = {}
    pending = list(enumerate(turns))
    over: dict[tuple[str, str], Hold] = {}
    changes = rounds = 0
    while changes < ROUNDS_MAX and rounds < ENDS_MAX:
        charges = [book.charge(hold.request, _end(hold)) for hold in over.values()]
        charges += [book.charge(*turn) for _, turn in pending]
        receipts: list[Receipt] = yield Ask("apply", (charges,))
        yield from _told(book, receipts)
        again: list[tuple[int, Turn]] = []
        behind: set[str] = set()  # the accounts of these
        due: dict[tuple[str, str], Hold] = {}
        for key, receipt in zip(over, receipts, strict=False):
            if receipt.status is Status.OUTDATED:
                book.learn(key[0], receipt.change)
                due[key] = over[key]
        ours = zip(pending, charges[len(over) :], receipts[len(over) :], strict=True)
        for (place, turn), charge, receipt in ours:
            if receipt.status is Status.OUTDATED:
                book.learn(turn[0].account, receipt.change)
            is_late = stops(charge, receipt)
            # What one before it may change waits for that: whether its id was decided, and what is used by then.
            waits = (is_late or receipt.status is Status.AHEAD) and turn[0].account in behind
            if receipt.status in _LATER or waits:
                behind.add(turn[0].account)
                due |= {(hold.account, hold.id): hold for hold in receipt.due}
                again.append((place, turn))
            elif is_late:
                found[place] = yield from _settled_late(book, turn[0])
            else:
                found[place] = receipt
        if not again:
            return [found[place] for place in range(len(turns))]
        changes += any(receipt.status is Status.OUTDATED for receipt in receipts)
        pending, over, rounds = again, due, rounds + 1
    raise NotExecuted(f"the enrollment changed {changes} times, and holds ran out of time {rounds} times meanwhile")


def _told(book: Book, receipts: Sequence[Receipt]) -> Flow[None]:
    """Claim the thresholds that decisions have reached, and tell of those that nobody claimed before."""
    if book.on_threshold is None:
        return
    for receipt in receipts:
        if receipt.decision is None or not _is_known(receipt):
            continue
        for threshold in reached(receipt.decision):
            decision = receipt.decision
            if not book.takes(decision.account, threshold.place):
                continue
            place = (decision.offer, decision.account, threshold.place)
            try:
                is_ours = yield Ask("claim", place, {"until": threshold.window.end, "token": book.token})
            except BaseException as error:
                book.gives_up(decision.account, threshold.place)
                if not isinstance(error, StoreError):
                    raise
                unclaimed(threshold, error)  # the decision is made; who comes next tries again
                return
            if is_ours:
                tell(threshold, book.on_threshold)


def partly(error: NotExecuted, written: Sequence[Sequence[Receipt]]) -> NotExecuted | OutcomeUnknown:
    """What to say of a flow that could not go on: that nothing was written, only where that is so."""
    if not any(receipt.status in _WRITTEN for receipts in written for receipt in receipts):
        return NotExecuted(*error.args)
    return OutcomeUnknown(f"a part of the requests was decided before this: {error}; ask again with the same ids")


def _is_known(receipt: Receipt) -> bool:
    """Whether a receipt carries a decision that is written."""
    return receipt.status in {Status.DECIDED, Status.REPLAYED, Status.CONFLICT}


def _unknown(request: Request) -> RequestError:
    return RequestError("id", f"no decision on request {request.id!r} of account {request.account!r}")


def _latest(words: Sequence[Decision]) -> Request:
    """A request as the latest word on it has it."""
    return replace(words[-1].request, id=words[0].request.id)


def _end(hold: Hold) -> Overdue:
    return Overdue(hold.tokens_max, hold.window)


def _is_end(word: Decision) -> bool:
    """Whether a correction says what became of a hold that ran out of time."""
    return word.correction is not None and word.correction.remedy in {Remedy.SETTLED, Remedy.RELEASED}


def _settled_late(book: Book, request: Request) -> Flow[Decision | RequestError]:
    """The decision on a request whose hold ran out of time before it was settled: it corrects what was assumed."""
    words = yield from words_on(book, request.account, request.id)
    if not words:
        return _unknown(request)
    for word in words:
        if word.correction is None or word.correction.remedy is not Remedy.SETTLED:
            continue
        same = replace(word.request, id=request.id)
        for field in CONFLICT_FIELDS:
            if getattr(same, field) != getattr(request, field):
                return Conflict(field, word)
        return replace(word, replayed=True)
    if words[0].request.at != request.at:
        return Conflict("at", words[0])
    try:
        return (yield from _corrected(book, request, Remedy.SETTLED))
    except RequestError as error:
        return error


def _corrected(
    book: Book, request: Request, remedy: Remedy, *, actor: str | None = None, why: str | None = None
) -> Flow[Decision]:
    """Correct what was said of a request; said once already, it is not said again."""
    for _ in range(ROUNDS_MAX):
        words = yield from words_on(book, request.account, request.id)
        if not words:
            raise _unknown(request)
        if actor is None and any(word.correction is not None and word.correction.remedy in _OWNERS for word in words):
            return replace(words[-1], replayed=True)  # what an owner said stands
        charge = book.correction(words, request, remedy, actor=actor, why=why)
        if charge is None:
            return replace(words[-1], replayed=True)
        if charge.terms.reason is Reason.TOO_LATE:
            raise RequestError("at", CLOSED)
        receipts: list[Receipt] = yield Ask("apply", ([charge],))
        yield from _told(book, receipts)
        (receipt,) = receipts
        if receipt.status is Status.CLOSED:
            raise RequestError("at", CLOSED)
        if receipt.status is Status.CONFLICT and (receipt.decision is None or receipt.decision.correction is None):
            raise Conflict("id", receipt.decision, hold=receipt.hold)
        if receipt.status not in {Status.DECIDED, Status.REPLAYED}:
            continue  # somebody else corrected it meanwhile
        decision = receipt.decision
        assert decision is not None, "a decided charge has its decision"
        assert decision.correction is not None, "and this one corrects"
        if decision.correction.remedy is remedy:
            return decision
    raise NotExecuted(f"what was said of request {request.id!r} changed {ROUNDS_MAX} times meanwhile")
