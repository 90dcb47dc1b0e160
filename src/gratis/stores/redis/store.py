"""One server or a cluster, many processes and machines: the store on Redis or Valkey, blocking and for asyncio.

Both run the flows of `core.py`; they differ by an `await`.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from gratis.errors import StoreError
from gratis.model import from_micros
from gratis.stores import places
from gratis.stores.redis.calls import Shifted
from gratis.stores.redis.core import Core, Settings
from gratis.stores.redis.layout import account_word, shard_number
from gratis.stores.redis.link import AsyncLink, Guests, Link

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from contextlib import AbstractContextManager
    from datetime import datetime
    from typing import Any, TypeVar

    from gratis.model import Change, Durability, Enrollment, Entry, Hold
    from gratis.offer import Revision
    from gratis.rule import Charge, Tally
    from gratis.stores import Cursor, Links, Receipt
    from gratis.stores.redis.servers import Servers
    from gratis.stores.redis.wire import Access

    T = TypeVar("T")

CLOSED = "this store is closed"
SHIFTS_MAX = 3


class RedisStore:
    """A store on Redis or Valkey; safe for several threads, processes and machines."""

    is_instant = False

    def __init__(
        self, servers: Servers, access: Access, settings: Settings, *, sentinels: Access | None = None
    ) -> None:
        self._core = Core(servers, settings)
        guests = Guests(access, sentinels or access, self._core.meet)
        self._link = Link(guests)
        self._async_link = AsyncLink(guests)
        self._is_closed = False
        try:
            self._link.run(self._core.open())
        except BaseException:
            self._link.close()
            raise

    @property
    def shards(self) -> int:
        """How many ledgers it has, side by side."""
        return len(self._core.asking.shards)

    @property
    def durability(self) -> Durability:
        """What its answers rest on."""
        return self._core.durability

    def now(self) -> datetime:
        """The store's clock: the server's, unless another was given."""
        return from_micros(self._core.now())

    def apply(self, charges: Sequence[Charge], *, dry: bool = False) -> list[Receipt]:
        """Apply each charge once, an account's in order; with `dry`, say what would happen and write nothing."""
        for _ in range(SHIFTS_MAX):
            try:
                return self._run(self._core.apply(charges, dry=dry))
            except Shifted:
                self._link.close()  # and once more, with the same ids, over another connection
        return self._run(self._core.apply(charges, dry=dry))

    async def apply_async(self, charges: Sequence[Charge]) -> list[Receipt]:
        """Apply each charge once, without a thread."""
        if self._is_closed:
            raise StoreError(CLOSED)
        for _ in range(SHIFTS_MAX):
            try:
                return await self._async_link.run(self._core.apply(charges, dry=False))
            except Shifted:
                await self._async_link.close()
        return await self._async_link.run(self._core.apply(charges, dry=False))

    def extend(self, offer: str, account: str, request_id: str, *, until: datetime) -> Hold | None:
        """Have a hold run out at another time."""
        return self._run(self._core.holding.extend(account_word(offer, account), request_id, until))

    def release(self, offer: str, account: str, request_id: str) -> Hold | None:
        """Give back what a hold set aside."""
        return self._run(self._core.holding.release(account_word(offer, account), request_id))

    def holds(self, offer: str, account: str) -> list[Hold]:
        """Every hold of an account that was not ended, by the time at which it runs out."""
        return self._run(self._core.holding.all(account_word(offer, account)))

    def corrections(self, offer: str, account: str, request_id: str) -> int:
        """How often the decision on a request was corrected."""
        return self._run(self._core.holding.corrections(account_word(offer, account), request_id))

    def claim(self, offer: str, account: str, name: str, *, until: datetime, token: str) -> bool:
        """Be the first to claim a name, and the only one."""
        return self._run(self._core.claim(offer, account, name, until=until, token=token))

    def enroll(
        self, offer: str, account: str, enrollment: Enrollment, *, actor: str, revision: Revision | None
    ) -> Change:
        """Change an account's enrollment."""
        return self._run(self._core.enroll(offer, account, enrollment, actor=actor, revision=revision))

    def enrollments(self, offer: str, account: str) -> list[Change]:
        """Every change of an account's enrollment, oldest first."""
        return self._run(self._core.reading.enrollments(offer, account))

    def tallies(self, offer: str, account: str, *, at: datetime | None = None) -> list[tuple[str, str, Tally]]:
        """Group, kind of window and tally of an account's windows, or of those that take a request of an instant."""
        _, found = self._run(self._core.reading.tallies(offer, account))
        return [
            (group, kind, tally)
            for group, kind, tally in found
            if at is None or (at < tally.window.end and (tally.window.start <= at or kind.startswith("rolling ")))
        ]

    def counters(self, offer: str, account: str) -> tuple[int, int, list[tuple[str, str, Tally]]]:
        """All of an account's tallies at one moment, with its shard and the last entry there at that moment."""
        shard = shard_number(account_word(offer, account), count=self.shards)
        last, found = self._run(self._core.reading.tallies(offer, account))
        return shard, last, found

    def links(self, offer: str, account: str) -> tuple[int, int, Links]:
        """The last link of each of an account's windows, with its shard and the last entry there at that moment."""
        shard = shard_number(account_word(offer, account), count=self.shards)
        last, found = self._run(self._core.reading.links(offer, account))
        return shard, last, found

    def entries(self, *, after: Cursor = 0, upto: Cursor | None = None) -> Iterator[Entry]:
        """The ledger from behind an entry on, in order; of several shards, one shard's after another's."""
        ends = (None,) * self.shards if upto is None else places(upto, shards=self.shards)
        for shard, start, end in zip(self._core.asking.shards, places(after, shards=self.shards), ends, strict=True):
            place = start
            while page := self._run(self._core.reading.entries(shard, place, end)):
                yield from page
                place = page[-1].entry

    def frozen(self) -> AbstractContextManager[None]:
        """Nobody can hold a server still for others: whoever compares uses `counters`."""
        return nullcontext()

    def accounts(self) -> list[tuple[str, str]]:
        """Offer and name of each account that the store knows."""
        return self._run(self._core.reading.accounts())

    def trim(self, cursor: Cursor) -> tuple[int, ...]:
        """Forget what was stored elsewhere up to a cursor and can be asked for no more; how far that went."""
        upto = places(cursor, shards=self.shards)
        return tuple(self._run(self._core.trim(shard, upto[shard.number])) for shard in self._core.asking.shards)

    def trimmed(self) -> tuple[int, ...]:
        """How far each shard's ledger was forgotten."""
        return tuple(self._run(self._core.reading.base(shard)) for shard in self._core.asking.shards)

    def kept(self) -> datetime | None:
        """By when ended what some shard keeps no longer: its counters may be gone; None if all are there."""
        kept = max(self._run(self._core.reading.kept(shard)) for shard in self._core.asking.shards)
        return from_micros(int(kept)) if kept else None

    def close(self) -> None:
        """Close every connection; what was acknowledged is on the server."""
        self._is_closed = True
        self._link.close()

    async def close_async(self) -> None:
        """Close the loop's connections."""
        await self._async_link.close()

    def _run(self, flow: Generator[Any, Any, T]) -> T:
        if self._is_closed:
            raise StoreError(CLOSED)
        try:
            return self._link.run(flow)
        except Shifted:
            self._link.close()  # whose connection is not to be used again
            raise
