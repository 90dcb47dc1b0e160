"""A store asked from asyncio: the loop never waits for it, and what waits together is asked together.

A charge that finds the store idle is asked at once. Those that arrive while it is busy are gathered, and go in
one call when it answers: so many tasks in flight have the speed of batches, and a lone one waits for nobody. A
task that is cancelled gives up its answer, never another's; its charge may have been applied.
"""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from gratis.errors import NotExecuted, OutcomeUnknown, StoreError
from gratis.stores import BATCH_MAX, Awaited

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gratis.rule import Charge
    from gratis.stores import Receipt, Store

WAITING_MAX = 100_000

P = ParamSpec("P")
T = TypeVar("T")


class Gathered:
    """One store and the one thread in which it is asked."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gratis-store")
        self._waiting: deque[tuple[Sequence[Charge], asyncio.Future[list[Receipt]]]] = deque()
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_busy = False
        self._is_crowded = False  # whether the last call was for many
        self._resting: asyncio.Future[None] | None = None
        self._is_closed = False

    async def apply(self, charges: Sequence[Charge]) -> list[Receipt]:
        """Apply each charge once, in order, with whatever else waits."""
        if self.store.is_instant:
            return self.store.apply(charges)
        self._know_loop()
        if not self._is_busy and not self._is_crowded and isinstance(self.store, Awaited):
            return await self._apply_lone(self.store, charges)
        if len(self._waiting) >= WAITING_MAX:
            raise NotExecuted(f"{WAITING_MAX} calls wait for the store already")
        answer: asyncio.Future[list[Receipt]] = asyncio.get_running_loop().create_future()
        self._waiting.append((charges, answer))
        if not self._is_busy:
            self._go_on()
        return await answer

    async def _apply_lone(self, store: Awaited, charges: Sequence[Charge]) -> list[Receipt]:
        """Ask at once, in the caller's own task; whoever comes meanwhile is asked for together, afterwards."""
        self._is_busy = True
        try:
            return await store.apply_async(charges)
        finally:
            self._rest()
            if self._waiting:
                self._go_on()

    def _know_loop(self) -> None:
        """A loop that ended took what was under way with it."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop = loop
            self._waiting.clear()
            self._draining, self._is_busy, self._resting = None, False, None

    def _rest(self) -> None:
        """Nobody asks the store any more."""
        self._draining, self._is_busy = None, False
        if self._resting is not None and not self._resting.done():
            self._resting.set_result(None)

    def _go_on(self) -> None:
        self._is_busy = True
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        try:
            while self._waiting:
                calls = [self._waiting.popleft()]
                size = len(calls[0][0])
                while self._waiting and size + len(self._waiting[0][0]) <= BATCH_MAX:
                    calls.append(self._waiting.popleft())
                    size += len(calls[-1][0])
                self._is_crowded = len(calls) > 1
                await self._ask(calls)
        finally:
            self._rest()
            for _, answer in self._waiting:  # only where the loop ends meanwhile
                if not answer.done():
                    answer.set_exception(NotExecuted("the loop ended before the store was asked"))
            self._waiting.clear()

    async def _ask(self, calls: Sequence[tuple[Sequence[Charge], asyncio.Future[list[Receipt]]]]) -> None:
        try:
            receipts = await self._apply([charge for charges, _ in calls for charge in charges])
        except BaseException as error:
            for _, answer in calls:
                if not answer.done():
                    unknown = OutcomeUnknown("the loop ended while the store was asked; ask again with the same ids")
                    answer.set_exception(error if isinstance(error, Exception) else unknown)
            if not isinstance(error, Exception):
                raise
            return
        place = 0
        for charges, answer in calls:
            if not answer.done():
                answer.set_result(receipts[place : place + len(charges)])
            place += len(charges)

    async def _apply(self, charges: Sequence[Charge]) -> list[Receipt]:
        if isinstance(self.store, Awaited):
            return await self.store.apply_async(charges)
        return await self.run(self.store.apply, charges)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Any other call, in the store's thread."""
        if self.store.is_instant:
            return function(*args, **kwargs)
        if self._is_closed:
            raise StoreError("this store is closed")
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: function(*args, **kwargs))

    async def close(self) -> None:
        """Let what is under way end, then close the store."""
        self._know_loop()
        while self._is_busy:
            if self._resting is None or self._resting.done():
                self._resting = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._resting)
        if not self._is_closed:
            if isinstance(self.store, Awaited):
                await self.store.close_async()
            await self.run(self.store.close)
            self._is_closed = True
            self._thread.shutdown()
