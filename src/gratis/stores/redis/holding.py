"""What flows do with holds but to make and to settle them: list, extend, release; and count corrections."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from gratis.chain import id_bytes
from gratis.model import micros
from gratis.stores.redis.calls import Script, Shifted
from gratis.stores.redis.holds import read_hold
from gratis.stores.redis.layout import correction_field, digits

if TYPE_CHECKING:
    from collections.abc import Generator
    from datetime import datetime

    from gratis.model import Hold
    from gratis.stores.redis.asking import Asking
    from gratis.stores.redis.servers import Result, Wave

    T = TypeVar("T")
    Flow = Generator[Wave, list[Result], T]

PAGE = 500
DUE_MAX = 100
READS = {b"list", b"due"}  # what they write, they only mend


class Holding:
    """The holds of a store's accounts."""

    def __init__(self, asking: Asking) -> None:
        self._asking = asking
        self._script = Script("hold.lua")

    def all(self, account: bytes) -> Flow[list[Hold]]:
        """Every hold of an account that was not ended, by the time at which it runs out."""
        found: dict[str, Hold] = {}
        behind = b""
        while True:
            behind, *kept = yield from self._ask(b"list", account, behind)
            found |= {hold.id: hold for hold in map(read_hold, kept)}  # one that is extended meanwhile comes twice
            if not behind:
                return sorted(found.values(), key=lambda hold: (hold.until, hold.id))

    def due(self, account: bytes, now: int) -> Flow[list[Hold]]:
        """Some of the holds of an account that ran out of time, the first ones first."""
        _, *kept = yield from self._ask(b"due", account, b"", digits(now), most=DUE_MAX)
        return sorted((read_hold(text) for text in kept), key=lambda hold: (hold.until, hold.id))

    def extend(self, account: bytes, request_id: str, until: datetime) -> Flow[Hold | None]:
        """Have a hold run out at another time."""
        _, *kept = yield from self._ask(b"extend", account, id_bytes(request_id), digits(micros(until)))
        return read_hold(kept[0]) if kept else None

    def release(self, account: bytes, request_id: str) -> Flow[Hold | None]:
        """Give back what a hold set aside."""
        _, *kept = yield from self._ask(b"release", account, id_bytes(request_id))
        return read_hold(kept[0]) if kept else None

    def corrections(self, account: bytes, request_id: str) -> Flow[int]:
        """How often the decision on a request was corrected."""
        shard = self._asking.shard_of(account)
        return int((yield from self._asking.field(shard, correction_field(account, request_id))) or 0)

    def _ask(
        self, verb: bytes, account: bytes, which: bytes, until: bytes = b"", *, most: int = PAGE
    ) -> Flow[list[bytes]]:
        parts = [verb, account, which, until, b"%d" % most]
        arguments = b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
        call = self._script.call(self._asking.shard_of(account), arguments, len(parts))
        ask = self._asking.read if verb in READS else self._asking.reply
        answer: list[bytes] = yield from ask(call)
        asked, *found = answer
        if asked != b"%b\0%b" % (account, which):
            raise Shifted("the server answered another question; ask again")
        return found
