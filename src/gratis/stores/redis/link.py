"""Flows driven: one driver that blocks, and one for asyncio. Both only wait, send and read."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import Struct

from gratis.errors import StoreError
from gratis.stores.redis.servers import GREET, GREET_REPLIES, Greeted, Result, Send, Wave, met
from gratis.stores.redis.wire import AsyncConnection, Connection, Lost, Unsent, greeted, greeting

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from gratis.stores.redis.wire import Access, Address

IDLE_MAX = 64
LEAST_S = 0.001

T = TypeVar("T")


class Guests(Struct, frozen=True):
    """How to get into servers, and who hears what a server of shards says of itself."""

    access: Access
    sentinels: Access
    meet: Callable[[Greeted], None]

    def access_for(self, send: Send) -> Access:
        """Sentinels have users of their own."""
        return self.sentinels if send.is_sentinel else self.access

    def greeting(self, send: Send) -> tuple[bytes, int]:
        """What a new connection says first, and how many replies that has."""
        return greeting(self.access_for(send), GREET if send.is_shard else b"", GREET_REPLIES if send.is_shard else 0)

    def hear(self, send: Send, replies: list[Any]) -> None:
        """Listen to what the server answered; raises if it must not be used."""
        found = greeted(send.address, replies, GREET_REPLIES if send.is_shard else 0)
        if send.is_shard:
            self.meet(met(send.address, found))


class Link:
    """Runs flows over blocking connections; safe for several threads, and after a fork."""

    def __init__(self, guests: Guests) -> None:
        self._guests = guests
        self._idle: dict[tuple[Address, bool], list[Connection]] = {}
        self._pid = os.getpid()

    def run(self, flow: Generator[Wave, list[Result], T]) -> T:
        """Run a flow to its end."""
        try:
            wave = next(flow)
            while True:
                if wave.pause:
                    time.sleep(wave.pause)
                wave = flow.send(self._done(wave.sends, wave.within))
        except StopIteration as end:
            result: T = end.value
            return result

    def _done(self, sends: tuple[Send, ...], within: float) -> list[Result]:
        """Send all, then read all."""
        under_way: list[Connection | Unsent | Lost | StoreError] = []
        try:
            under_way.extend(self._sent(send, within) for send in sends)
            if len(sends) == 1:
                return [self._read(under_way[0], sends[0])]
            return self._read_all(under_way, sends, time.monotonic() + min(self._guests.access.timeout, within))
        except BaseException:
            # An interrupt: an answer that was not read must never be taken for another's.
            for one in under_way:
                if isinstance(one, Connection):
                    one.close()
            self._forget()
            raise

    def _read_all(
        self, under_way: list[Connection | Unsent | Lost | StoreError], sends: tuple[Send, ...], ends: float
    ) -> list[Result]:
        """Read what several servers answer; the time is for all of them together."""
        results: list[Result] = []
        for one, send in zip(under_way, sends, strict=True):
            if isinstance(one, Connection):
                one.allow(max(LEAST_S, ends - time.monotonic()))
            results.append(self._read(one, send))
        return results

    def _sent(self, send: Send, within: float) -> Connection | Unsent | Lost | StoreError:
        try:
            connection = self._taken(send, within)
            connection.allow(within)
        except (Unsent, StoreError) as error:
            return error
        try:
            connection.send(send.payload)
        except Lost as error:
            self._broken(connection, send)
            return error
        except BaseException:
            connection.close()
            raise
        return connection

    def _read(self, one: Connection | Unsent | Lost | StoreError, send: Send) -> Result:
        if not isinstance(one, Connection):
            return one
        try:
            found = one.read(send.replies)
        except Lost as error:
            self._broken(one, send)
            return error
        idle = self._idle.setdefault((send.address, send.is_shard), [])
        if len(idle) < IDLE_MAX:
            idle.append(one)
        else:
            one.close()
        return found

    def _taken(self, send: Send, within: float) -> Connection:
        """A connection that nobody uses."""
        if self._pid != os.getpid():  # after a fork the parent's connections are the parent's
            self._forget()
            self._pid = os.getpid()
        try:
            return self._idle[send.address, send.is_shard].pop()
        except (KeyError, IndexError):
            pass
        return self._opened(send, within)

    def _opened(self, send: Send, within: float) -> Connection:
        connection = Connection(send.address, self._guests.access_for(send), within)
        try:
            payload, replies = self._guests.greeting(send)
            if replies:
                connection.send(payload)
                self._guests.hear(send, connection.read(replies))
        except Lost as error:
            connection.close()
            raise Unsent(f"{send.address}: {error}") from error
        except BaseException:
            connection.close()
            raise
        return connection

    def _broken(self, connection: Connection, send: Send) -> None:
        """One connection to a server broke: so may have the others."""
        connection.close()
        _drain(self._idle.get((send.address, send.is_shard), []))

    def _forget(self) -> None:
        for connections in list(self._idle.values()):
            _drain(connections)

    def close(self) -> None:
        """Close every connection."""
        self._forget()


def _drain(idle: list[Connection]) -> None:
    """Close all, in place: who gives a connection back meanwhile gives it to the same list."""
    with suppress(IndexError):
        while True:
            idle.pop().close()


class AsyncLink:
    """Runs flows over one connection a server, on which many calls may be in flight; for one loop at a time."""

    def __init__(self, guests: Guests) -> None:
        self._guests = guests
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open: dict[tuple[Address, bool], asyncio.Task[AsyncConnection]] = {}

    async def run(self, flow: Generator[Wave, list[Result], T]) -> T:
        """Run a flow to its end."""
        try:
            wave = next(flow)
            while True:
                if wave.pause:
                    await asyncio.sleep(wave.pause)
                wave = flow.send(await self._done(wave.sends, wave.within))
        except StopIteration as end:
            result: T = end.value
            return result

    async def _done(self, sends: tuple[Send, ...], within: float) -> list[Result]:
        """Send all, then wait for all; what does not come in time is lost, with all else on its connection."""
        loop = asyncio.get_running_loop()
        under_way: list[tuple[asyncio.Future[list[Any]], asyncio.TimerHandle] | Unsent | StoreError] = []
        results: list[Result] = []
        try:
            for send in sends:
                try:
                    connection = await self._taken(send)
                except (Unsent, StoreError) as error:
                    under_way.append(error)
                else:
                    limit = min(self._guests.access.timeout, within)
                    timer = loop.call_later(limit, connection.close, TimeoutError("timed out"))
                    under_way.append((connection.ask(send.payload, send.replies), timer))
            for one in under_way:
                results.append(await _read(one[0]) if isinstance(one, tuple) else one)  # noqa: PERF401 - it awaits
        finally:
            for one in under_way:
                if isinstance(one, tuple):
                    one[1].cancel()
        return results

    async def _taken(self, send: Send) -> AsyncConnection:
        if self._loop is not asyncio.get_running_loop():  # connections end with their loop
            self._loop, self._open = asyncio.get_running_loop(), {}
        key = (send.address, send.is_shard)
        task = self._open.get(key)
        if task is not None and task.done() and (task.cancelled() or task.exception() or task.result().error):
            task = None
        if task is None:
            task = self._open[key] = asyncio.create_task(self._opened(send))
        return task.result() if task.done() else await asyncio.shield(task)

    async def _opened(self, send: Send) -> AsyncConnection:
        connection = await AsyncConnection.open(send.address, self._guests.access_for(send))
        payload, replies = self._guests.greeting(send)
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._guests.access.timeout, connection.close, TimeoutError("timed out"))
        try:
            if replies:
                self._guests.hear(send, await connection.ask(payload, replies))
        except Lost as error:
            raise Unsent(f"{send.address}: {error}") from error
        except BaseException:
            connection.close()
            raise
        finally:
            timer.cancel()
        return connection

    async def close(self) -> None:
        """Close every connection."""
        opened, self._open = self._open, {}
        if self._loop is not asyncio.get_running_loop():
            return  # connections ended with their loop
        for task in opened.values():
            if task.done() and not task.cancelled() and task.exception() is None:
                task.result().close()
            task.cancel()
        await asyncio.sleep(0)


async def _read(answer: asyncio.Future[list[Any]]) -> Result:
    try:
        return await answer
    except (Unsent, Lost) as error:
        return error
