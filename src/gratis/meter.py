"""One request in, one decision out; one store call.

`Meter` and `AsyncMeter` have the same verbs and differ by an `await`; what they share is in `book.py`.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, Self, TypeVar

from gratis import clock as system, flows
from gratis.book import Book, Explanation, Standing
from gratis.errors import NotExecuted, RequestError, StoreError
from gratis.ledger import Filter, select
from gratis.model import Expiry, check_name, shown, utc
from gratis.offer import Offer
from gratis.offers import DEFAULT_OFFER, load
from gratis.stores import Bounds, Status
from gratis.stores.gather import Gathered
from gratis.stores.urls import DEFAULT_URL, open_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from datetime import datetime
    from pathlib import Path
    from types import TracebackType

    from gratis.flows import Ask, Flow
    from gratis.model import Change, Decision, Durability, Enrollment, Entry, Hold, Request, Usage
    from gratis.stores import Cursor, Receipt, Store
    from gratis.thresholds import Threshold

    T = TypeVar("T")

PAGE = 1_000
HOLD_TIME = timedelta(minutes=10)
HOLD_TIME_MAX = timedelta(days=1)
_DECIDED = Status.DECIDED  # looked up once: in Python 3.11 naming a member of an enum is slow


class Meter:
    """Decides requests of one offer over one store; safe for several threads."""

    def __init__(
        self,
        store: Store,
        offer: Offer,
        *,
        assume: Enrollment | None = None,
        on_threshold: Callable[[Threshold], None] | None = None,
    ) -> None:
        self._store = store
        self._book = Book(offer, assume, on_threshold)

    @classmethod
    def open(
        cls,
        url: str = DEFAULT_URL,
        *,
        offer: str | Path | Offer = DEFAULT_OFFER,
        assume: Enrollment | None = None,
        bounds: Bounds | None = Bounds(),
        clock: Callable[[], datetime] = system.now,
        on_threshold: Callable[[Threshold], None] | None = None,
    ) -> Self:
        """Open the store of a URL under an offer.

        `assume` is taken to be the enrollment of every account that is not enrolled. `bounds` say how far a
        request's time may lie from the store's `clock`; None judges old data as it was. `on_threshold` is called
        once a group and window, by one process of all, at 50, 80, 95 and 100 % and at the first billed request.
        """
        known = _offer(offer)
        return cls(open_store(url, clock=clock, bounds=bounds), known, assume=assume, on_threshold=on_threshold)

    @property
    def offer(self) -> Offer:
        """The offer under which requests are judged."""
        return self._book.offer

    @property
    def durability(self) -> Durability:
        """What this meter's answers rest on."""
        return self._store.durability

    @property
    def shards(self) -> int:
        """How many ledgers the store has side by side: 1, but for a cluster."""
        return self._store.shards

    def decide(self, request: Request) -> Decision:
        """Decide a request, once: the same request asked again has the same decision, marked replayed."""
        if self._book.on_threshold is None:
            (receipt,) = self._store.apply((self._book.charge(request),))
            if receipt.status is _DECIDED:
                assert receipt.decision is not None, "a decided charge has its decision"
                return receipt.decision
            return self._run(flows.one(self._book, request), receipt)
        return self._run(flows.one(self._book, request))

    def decide_many(self, requests: Sequence[Request]) -> list[Decision | RequestError]:
        """Decide requests, an account's as if one by one; one that cannot be decided has its error in its place."""
        return self._run(flows.decided(self._book, requests))

    def hold(
        self, request: Request, tokens_max: int, *, for_: timedelta = HOLD_TIME, on_expiry: str = Expiry.DECIDED
    ) -> Hold:
        """Set aside an upper bound on a request's tokens before it is sent, and say whether it fits.

        A hold that is neither settled nor released in time is `decided` by its bound, or just `released`.
        """
        until = self._store.now() + _lasting(for_)
        return self._run(flows.held(self._book, request, tokens_max, until=until, expiry=_expiry(on_expiry)))

    def settle(self, hold: Hold, usage: Usage) -> Decision:
        """Decide a held request by what it used, in the window that admitted it; without counts, by its bound.

        Where the hold ran out of time before, this corrects what was assumed then.
        """
        return self._run(flows.settled(self._book, hold, usage))

    def release(self, hold: Hold) -> Decision | None:
        """Give a hold back: its request was not sent, or was refused.

        Where the hold ran out of time before and its request was decided, that is corrected: the decision.
        """
        return self._run(flows.released(self._book, hold))

    def extend(self, hold: Hold, *, for_: timedelta = HOLD_TIME) -> Hold:
        """Have a hold run out so much later from now on."""
        return self._run(flows.extended(self._book, hold, until=self._store.now() + _lasting(for_)))

    def holds(self, account: str = "default") -> list[Hold]:
        """Every hold of an account that was not ended, by the time at which it runs out."""
        return self._store.holds(self.offer.name, account)

    def expire(self, account: str = "default") -> list[Decision]:
        """End the holds that ran out of time now, as the account's next request would: decisions by their bounds."""
        return self._run(flows.expired(self._book, account, now=self._store.now()))

    def void(self, request_id: str, *, actor: str, why: str, account: str = "default") -> Decision:
        """Have a request count for nothing: a new entry that is linked to what was decided; only an owner may."""
        return self._run(flows.corrected(self._book, account, request_id, None, actor=actor, why=why))

    def adjust(self, request_id: str, usage: Usage, *, actor: str, why: str, account: str = "default") -> Decision:
        """Have a request count for what it really used: a new entry, linked to the first; only an owner may."""
        return self._run(flows.corrected(self._book, account, request_id, usage, actor=actor, why=why))

    def decisions(self, request_id: str, *, account: str = "default") -> list[Decision]:
        """All that was said of a request: its decision, then each correction; nothing if it was not decided."""
        return self._run(flows.words_on(self._book, account, request_id))

    def explain(self, request: Request) -> Explanation:
        """Say whether a request would be free now; if not, the largest size that is, and the groups that fit it."""
        return self._run(flows.explained(self._book, request))

    def standing(self, account: str = "default", *, at: datetime | None = None) -> list[Standing]:
        """Say what an account has of each group's allowance, now or at an instant."""
        return self._run(flows.standing(self._book, account, at=self._store.now() if at is None else utc(at)))

    def enroll(self, account: str, enrollment: Enrollment, *, actor: str) -> Change:
        """Enroll an account, or change its enrollment; only an owner may."""
        check_name("account", account)
        revision = self.offer.at(self._store.now())
        return self._store.enroll(self.offer.name, account, enrollment, actor=actor, revision=revision)

    def enrollments(self, account: str = "default") -> list[Change]:
        """Every change of an account's enrollment, oldest first."""
        return self._store.enrollments(self.offer.name, account)

    def accounts(self) -> list[str]:
        """Every account that this offer's decisions and enrollments name."""
        return [name for offer, name in self._store.accounts() if offer == self.offer.name]

    def ledger(
        self,
        *,
        after: Cursor = 0,
        account: str | None = None,
        group: str | None = None,
        window: datetime | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> Iterator[Entry]:
        """Every decision in order, from behind an entry's number on; of a store of several shards, a cursor."""
        chosen = Filter(account=account, group=group, window=window, since=since, until=until)
        return select(self._store.entries(after=after), chosen)

    def close(self) -> None:
        """Close the store."""
        self._store.close()

    def _run(self, flow: Flow[T], *answers: Receipt) -> T:
        """Drive a flow; an answer that is there already is that to its first question."""
        written: list[list[Receipt]] = []
        known, answer, error = list(answers), None, None
        while True:
            try:
                ask = flow.send(answer) if error is None else flow.throw(error)
            except StopIteration as end:
                found: T = end.value
                return found
            except NotExecuted as refusal:
                raise flows.partly(refusal, written) from refusal
            try:
                answer, known, error = known or self._answer(ask, written), [], None
            except StoreError as failure:
                error = failure

    def _answer(self, ask: Ask, written: list[list[Receipt]]) -> Any:
        answer = getattr(self._store, ask.verb)(*ask.args, **ask.options)
        if ask.verb == "apply" and not ask.options:  # a dry one writes nothing
            written.append(answer)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncMeter:
    """`Meter` for asyncio: the same verbs, and the loop never waits for a disk."""

    def __init__(
        self,
        store: Store,
        offer: Offer,
        *,
        assume: Enrollment | None = None,
        on_threshold: Callable[[Threshold], None] | None = None,
    ) -> None:
        self._gathered = Gathered(store)
        self._store = store
        self._book = Book(offer, assume, on_threshold)

    @classmethod
    def open(
        cls,
        url: str = DEFAULT_URL,
        *,
        offer: str | Path | Offer = DEFAULT_OFFER,
        assume: Enrollment | None = None,
        bounds: Bounds | None = Bounds(),
        clock: Callable[[], datetime] = system.now,
        on_threshold: Callable[[Threshold], None] | None = None,
    ) -> _Opening:
        """Open the store of a URL under an offer, by `async with`; what it takes is as in `Meter.open`."""

        def opened() -> AsyncMeter:
            known = _offer(offer)
            return cls(open_store(url, clock=clock, bounds=bounds), known, assume=assume, on_threshold=on_threshold)

        return _Opening(opened)

    @property
    def offer(self) -> Offer:
        """The offer under which requests are judged."""
        return self._book.offer

    @property
    def durability(self) -> Durability:
        """What this meter's answers rest on."""
        return self._store.durability

    @property
    def shards(self) -> int:
        """How many ledgers the store has side by side: 1, but for a cluster."""
        return self._store.shards

    async def decide(self, request: Request) -> Decision:
        """Decide a request, once: the same request asked again has the same decision, marked replayed."""
        if self._book.on_threshold is None:
            (receipt,) = await self._gathered.apply((self._book.charge(request),))
            if receipt.status is _DECIDED:
                assert receipt.decision is not None, "a decided charge has its decision"
                return receipt.decision
            return await self._run(flows.one(self._book, request), receipt)
        return await self._run(flows.one(self._book, request))

    async def decide_many(self, requests: Sequence[Request]) -> list[Decision | RequestError]:
        """Decide requests, an account's as if one by one; one that cannot be decided has its error in its place."""
        return await self._run(flows.decided(self._book, requests))

    async def hold(
        self, request: Request, tokens_max: int, *, for_: timedelta = HOLD_TIME, on_expiry: str = Expiry.DECIDED
    ) -> Hold:
        """Set aside an upper bound on a request's tokens before it is sent, and say whether it fits.

        A hold that is neither settled nor released in time is `decided` by its bound, or just `released`.
        """
        until = self._store.now() + _lasting(for_)
        return await self._run(flows.held(self._book, request, tokens_max, until=until, expiry=_expiry(on_expiry)))

    async def settle(self, hold: Hold, usage: Usage) -> Decision:
        """Decide a held request by what it used, in the window that admitted it; without counts, by its bound.

        Where the hold ran out of time before, this corrects what was assumed then.
        """
        return await self._run(flows.settled(self._book, hold, usage))

    async def release(self, hold: Hold) -> Decision | None:
        """Give a hold back: its request was not sent, or was refused.

        Where the hold ran out of time before and its request was decided, that is corrected: the decision.
        """
        return await self._run(flows.released(self._book, hold))

    async def extend(self, hold: Hold, *, for_: timedelta = HOLD_TIME) -> Hold:
        """Have a hold run out so much later from now on."""
        return await self._run(flows.extended(self._book, hold, until=self._store.now() + _lasting(for_)))

    async def holds(self, account: str = "default") -> list[Hold]:
        """Every hold of an account that was not ended, by the time at which it runs out."""
        return await self._gathered.run(self._store.holds, self.offer.name, account)

    async def expire(self, account: str = "default") -> list[Decision]:
        """End the holds that ran out of time now, as the account's next request would: decisions by their bounds."""
        return await self._run(flows.expired(self._book, account, now=self._store.now()))

    async def void(self, request_id: str, *, actor: str, why: str, account: str = "default") -> Decision:
        """Have a request count for nothing: a new entry that is linked to what was decided; only an owner may."""
        return await self._run(flows.corrected(self._book, account, request_id, None, actor=actor, why=why))

    async def adjust(
        self, request_id: str, usage: Usage, *, actor: str, why: str, account: str = "default"
    ) -> Decision:
        """Have a request count for what it really used: a new entry, linked to the first; only an owner may."""
        return await self._run(flows.corrected(self._book, account, request_id, usage, actor=actor, why=why))

    async def decisions(self, request_id: str, *, account: str = "default") -> list[Decision]:
        """All that was said of a request: its decision, then each correction; nothing if it was not decided."""
        return await self._run(flows.words_on(self._book, account, request_id))

    async def explain(self, request: Request) -> Explanation:
        """Say whether a request would be free now; if not, the largest size that is, and the groups that fit it."""
        return await self._run(flows.explained(self._book, request))

    async def standing(self, account: str = "default", *, at: datetime | None = None) -> list[Standing]:
        """Say what an account has of each group's allowance, now or at an instant."""
        return await self._run(flows.standing(self._book, account, at=self._store.now() if at is None else utc(at)))

    async def enroll(self, account: str, enrollment: Enrollment, *, actor: str) -> Change:
        """Enroll an account, or change its enrollment; only an owner may."""
        check_name("account", account)
        revision = self.offer.at(self._store.now())
        return await self._gathered.run(
            self._store.enroll, self.offer.name, account, enrollment, actor=actor, revision=revision
        )

    async def enrollments(self, account: str = "default") -> list[Change]:
        """Every change of an account's enrollment, oldest first."""
        return await self._gathered.run(self._store.enrollments, self.offer.name, account)

    async def accounts(self) -> list[str]:
        """Every account that this offer's decisions and enrollments name."""
        return [name for offer, name in await self._gathered.run(self._store.accounts) if offer == self.offer.name]

    async def ledger(
        self,
        *,
        after: Cursor = 0,
        account: str | None = None,
        group: str | None = None,
        window: datetime | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> AsyncIterator[Entry]:
        """Every decision in order, from behind an entry's number on; of a store of several shards, a cursor."""
        chosen = Filter(account=account, group=group, window=window, since=since, until=until)
        entries = select(self._store.entries(after=after), chosen)
        while page := await self._gathered.run(lambda: list(islice(entries, PAGE))):
            for entry in page:
                yield entry

    async def close(self) -> None:
        """Let what is under way end, then close the store."""
        await self._gathered.close()

    async def _run(self, flow: Flow[T], *answers: Receipt) -> T:
        """Drive a flow; an answer that is there already is that to its first question."""
        written: list[list[Receipt]] = []
        known, answer, error = list(answers), None, None
        while True:
            try:
                ask = flow.send(answer) if error is None else flow.throw(error)
            except StopIteration as end:
                found: T = end.value
                return found
            except NotExecuted as refusal:
                raise flows.partly(refusal, written) from refusal
            try:
                answer, known, error = known or await self._answer(ask, written), [], None
            except StoreError as failure:
                error = failure

    async def _answer(self, ask: Ask, written: list[list[Receipt]]) -> Any:
        if ask.verb != "apply" or ask.options:  # a dry one writes nothing
            return await self._gathered.run(getattr(self._store, ask.verb), *ask.args, **ask.options)
        answer = await self._gathered.apply(*ask.args)
        written.append(answer)
        return answer


class _Opening:
    """An `AsyncMeter` that `async with` opens away from the loop, and closes."""

    def __init__(self, opened: Callable[[], AsyncMeter]) -> None:
        self._opened = opened
        self._meter: AsyncMeter | None = None

    async def __aenter__(self) -> AsyncMeter:
        self._meter = await asyncio.to_thread(self._opened)
        return self._meter

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._meter is not None:
            await self._meter.close()


def _offer(offer: str | Path | Offer) -> Offer:
    return offer if isinstance(offer, Offer) else load(offer)


def _lasting(span: Any) -> timedelta:
    if not isinstance(span, timedelta) or not timedelta() < span <= HOLD_TIME_MAX:
        raise RequestError("for_", f"found {shown(span)}; expected a time of more than 0 and at most {HOLD_TIME_MAX}")
    return span


def _expiry(word: str) -> Expiry:
    try:
        return Expiry(word)
    except ValueError:
        expected = ", ".join(Expiry)
        raise RequestError("on_expiry", f"found {shown(word)}; expected one of {expected}") from None
