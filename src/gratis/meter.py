"""One request in, one decision out; one store call.

`Meter` and `AsyncMeter` have the same verbs and differ by an `await`; what they share is in `book.py`.
"""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import TYPE_CHECKING, Self

from gratis import clock as system
from gratis.book import ROUNDS_MAX, Book, Explanation, Standing, partly, read
from gratis.errors import NotExecuted, RequestError
from gratis.ledger import Filter, select
from gratis.model import check_name, utc
from gratis.offer import Offer
from gratis.offers import DEFAULT_OFFER, load
from gratis.stores import BATCH_MAX, Bounds, Status
from gratis.stores.gather import Gathered
from gratis.stores.urls import DEFAULT_URL, open_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from datetime import datetime
    from pathlib import Path
    from types import TracebackType

    from gratis.model import Change, Decision, Durability, Enrollment, Entry, Request
    from gratis.stores import Cursor, Store

PAGE = 1_000
_OUTDATED = Status.OUTDATED


class Meter:
    """Decides requests of one offer over one store; safe for several threads."""

    def __init__(self, store: Store, offer: Offer, *, assume: Enrollment | None = None) -> None:
        self._store = store
        self._book = Book(offer, assume)

    @classmethod
    def open(
        cls,
        url: str = DEFAULT_URL,
        *,
        offer: str | Path | Offer = DEFAULT_OFFER,
        assume: Enrollment | None = None,
        bounds: Bounds | None = Bounds(),
        clock: Callable[[], datetime] = system.now,
    ) -> Self:
        """Open the store of a URL under an offer.

        `assume` is taken to be the enrollment of every account that is not enrolled. `bounds` say how far a
        request's time may lie from the store's `clock`; None judges old data as it was.
        """
        known = _offer(offer)
        return cls(open_store(url, clock=clock, bounds=bounds), known, assume=assume)

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
        (receipt,) = self._store.apply((self._book.charge(request),))
        if receipt.status is _OUTDATED:
            self._book.learn(request.account, receipt.change)
            (answer,) = self.decide_many((request,))
        else:
            answer = read(request, receipt)
        if isinstance(answer, RequestError):
            raise answer
        return answer

    def decide_many(self, requests: Sequence[Request]) -> list[Decision | RequestError]:
        """Decide requests, an account's as if one by one; one that cannot be decided has its error in its place."""
        answers: list[Decision | RequestError] = []
        has_written = False
        for first in range(0, len(requests), BATCH_MAX):
            flow = self._book.decisions(requests[first : first + BATCH_MAX])
            charges = next(flow)
            try:
                while True:
                    charges = flow.send(self._store.apply(charges))
                    has_written = True
            except StopIteration as end:
                answers += end.value
                has_written = True
            except NotExecuted as error:
                raise error if not has_written else partly(error) from error
        return answers

    def explain(self, request: Request) -> Explanation:
        """Say whether a request would be free now, and the largest size that still fits; writes nothing."""
        for _ in range(ROUNDS_MAX):
            charge = self._book.charge(request)
            (receipt,) = self._store.apply([charge], dry=True)
            if receipt.status is not _OUTDATED:
                return self._book.explanation(charge, receipt)
            self._book.learn(request.account, receipt.change)
        raise NotExecuted(f"the enrollment changed {ROUNDS_MAX} times meanwhile")

    def standing(self, account: str = "default", *, at: datetime | None = None) -> list[Standing]:
        """Say what an account has of each group's allowance, now or at an instant."""
        when = self._store.now() if at is None else utc(at)
        tallies = self._store.tallies(self.offer.name, account, at=when)
        return self._book.standing(account, when, _latest(self.enrollments(account)), tallies)

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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncMeter:
    """`Meter` for asyncio: the same verbs, and the loop never waits for a disk."""

    def __init__(self, store: Store, offer: Offer, *, assume: Enrollment | None = None) -> None:
        self._gathered = Gathered(store)
        self._store = store
        self._book = Book(offer, assume)

    @classmethod
    def open(
        cls,
        url: str = DEFAULT_URL,
        *,
        offer: str | Path | Offer = DEFAULT_OFFER,
        assume: Enrollment | None = None,
        bounds: Bounds | None = Bounds(),
        clock: Callable[[], datetime] = system.now,
    ) -> _Opening:
        """Open the store of a URL under an offer, by `async with`; what it takes is as in `Meter.open`."""

        def opened() -> AsyncMeter:
            known = _offer(offer)
            return cls(open_store(url, clock=clock, bounds=bounds), known, assume=assume)

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
        (receipt,) = await self._gathered.apply((self._book.charge(request),))
        if receipt.status is _OUTDATED:
            self._book.learn(request.account, receipt.change)
            (answer,) = await self.decide_many((request,))
        else:
            answer = read(request, receipt)
        if isinstance(answer, RequestError):
            raise answer
        return answer

    async def decide_many(self, requests: Sequence[Request]) -> list[Decision | RequestError]:
        """Decide requests, an account's as if one by one; one that cannot be decided has its error in its place."""
        answers: list[Decision | RequestError] = []
        has_written = False
        for first in range(0, len(requests), BATCH_MAX):
            flow = self._book.decisions(requests[first : first + BATCH_MAX])
            charges = next(flow)
            try:
                while True:
                    charges = flow.send(await self._gathered.apply(charges))
                    has_written = True
            except StopIteration as end:
                answers += end.value
                has_written = True
            except NotExecuted as error:
                raise error if not has_written else partly(error) from error
        return answers

    async def explain(self, request: Request) -> Explanation:
        """Say whether a request would be free now, and the largest size that still fits; writes nothing."""
        for _ in range(ROUNDS_MAX):
            charge = self._book.charge(request)
            (receipt,) = await self._gathered.run(self._store.apply, [charge], dry=True)
            if receipt.status is not _OUTDATED:
                return self._book.explanation(charge, receipt)
            self._book.learn(request.account, receipt.change)
        raise NotExecuted(f"the enrollment changed {ROUNDS_MAX} times meanwhile")

    async def standing(self, account: str = "default", *, at: datetime | None = None) -> list[Standing]:
        """Say what an account has of each group's allowance, now or at an instant."""
        when = self._store.now() if at is None else utc(at)
        tallies = await self._gathered.run(self._store.tallies, self.offer.name, account, at=when)
        return self._book.standing(account, when, _latest(await self.enrollments(account)), tallies)

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


def _latest(changes: Sequence[Change]) -> Change | None:
    return changes[-1] if changes else None
