"""How flows ask: a shard's fields, a swap, any command; bounded retries are below, in `servers.answers`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, TypeVar

from gratis.errors import NotExecuted, OutcomeUnknown, StoreError
from gratis.stores.redis.calls import Script
from gratis.stores.redis.layout import shard_number
from gratis.stores.redis.servers import UNKNOWN, Call, answers
from gratis.stores.redis.wire import packed

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from gratis.stores.redis.layout import Shard
    from gratis.stores.redis.servers import Result, Servers, Wave

    T = TypeVar("T")
    Flow = Generator[Wave, list[Result], T]

READ_MAX = 50_000


class Asking:
    """The servers of a store, its shards, and the salt of its index."""

    def __init__(self, servers: Servers, *, patience: float) -> None:
        self.servers = servers
        self.shards: list[Shard] = []
        self.salt = b""
        self.patience = patience
        self._swap = Script("swap.lua")

    def shard_of(self, account: bytes) -> Shard:
        """The shard in which an account lives."""
        return self.shards[shard_number(account, count=len(self.shards))]

    def answers(self, calls: Sequence[Call]) -> Flow[list[Any]]:
        """What each call is answered, or the error that says what became of it."""
        return (yield from answers(self.servers, calls, timer=time.monotonic, patience=self.patience))

    def replies(self, call: Call) -> Flow[list[Any]]:
        """Each reply to a call of several commands."""
        (result,) = yield from self.answers([call])
        if isinstance(result, StoreError):
            raise result
        for reply in result:
            if isinstance(reply, Exception):
                raise NotExecuted(f"the server says {reply}; nothing was written")
        return list(result)

    def reply(self, call: Call) -> Flow[Any]:
        """The reply to a call of one command."""
        return (yield from self.replies(call))[0]

    def read(self, call: Call) -> Flow[Any]:
        """The reply to a call that only reads: nothing can have been written."""
        try:
            return (yield from self.reply(call))
        except OutcomeUnknown as error:
            raise NotExecuted(f"{error.args[0].removesuffix(UNKNOWN)}nothing was written") from None

    def fields(self, shard: Shard, names: Sequence[bytes]) -> Flow[list[bytes | None]]:
        """Fields of a shard's state."""
        found: list[bytes | None] = []
        for first in range(0, len(names), READ_MAX):
            part = names[first : first + READ_MAX]
            found += yield from self.read(Call(shard.slot, packed("HMGET", shard.state, *part)))
        return found

    def field(self, shard: Shard, name: bytes) -> Flow[bytes | None]:
        """One field of a shard's state."""
        return (yield from self.fields(shard, [name]))[0]

    def swap(
        self,
        shard: Shard,
        expected: Mapping[bytes, bytes],
        written: Mapping[bytes, bytes],
        dropped: Sequence[bytes] = (),
    ) -> Flow[bool]:
        """Change fields if others still are what they were; False if not."""
        parts = [b"%d" % len(expected), b"%d" % len(written)]
        for pair in (*expected.items(), *written.items()):
            parts += pair
        parts += dropped
        arguments = b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
        return bool((yield from self.reply(self._swap.call(shard, arguments, len(parts)))))
