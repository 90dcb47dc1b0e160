"""What may be forgotten: decisions that are stored elsewhere, and that nobody can ask for any more.

An id is kept until its window has ended and was kept for as long as the store's bounds say, and at least as long after
it was decided. From then on a request of that window is `too_late`, whether its id is known or not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from gratis.model import micros
from gratis.stores.redis.calls import Script
from gratis.stores.redis.layout import (
    OPEN,
    claimed_until,
    correction_field,
    digits,
    place_of,
    read_counters,
    read_record,
)
from gratis.stores.redis.servers import Call
from gratis.stores.redis.wire import packed

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from gratis.stores.redis.asking import Asking
    from gratis.stores.redis.layout import Record, Shard
    from gratis.stores.redis.servers import Result, Wave

    T = TypeVar("T")
    Flow = Generator[Wave, list[Result], T]

TRIM = Script("trim.lua")
RECORDS_MAX = 200
MONTH = 32 * 86_400 * 1_000_000


def trimmed(asking: Asking, shard: Shard, upto: int, horizon: int) -> Flow[int]:
    """Forget a shard's oldest decisions up to one, as far as all that they are about ended by the horizon."""
    accounts: dict[bytes, bytes] = {}
    entries, kept = 1, 0
    while True:
        counters = read_counters((yield from asking.field(shard, b"n")))
        ask = packed("XRANGE", shard.ledger, "-", "+", "COUNT", entries)
        found = yield from asking.reply(Call(shard.slot, ask))
        end, records = _over(found, upto, horizon)
        kept = max([kept, *map(_ended, records)])
        if not records:
            break
        entries = max(1, min(RECORDS_MAX, RECORDS_MAX * len(found) // len(records)))
        accounts |= yield from _accounts(asking, shard, {record.account for record in records} - accounts.keys())
        fields = {
            b"i" + place[: level + 2]
            for record in records
            for place in [place_of(accounts[record.account], record.request_id, asking.salt)]
            for level in range(counters.top)
        }
        counts = {  # how often a decision was corrected is forgotten with the last correction
            correction_field(accounts[record.account], record.correction.of): b"%d" % record.correction.number
            for record in records
            if record.correction is not None
        }
        parts = [b"%d" % end, digits(kept), *sorted(fields)]
        for pair in counts.items():
            parts += pair
        arguments = b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
        yield from asking.reply(TRIM.call(shard, arguments, len(parts)))
    for account in accounts.values():
        yield from _drop_tallies(asking, shard, account, digits(kept))
        yield from _drop_claims(asking, shard, account, horizon)
    return counters.base


def _over(found: Sequence[tuple[bytes, list[bytes]]], upto: int, horizon: int) -> tuple[int, list[Record]]:
    """The last decision of the entries that may be forgotten, and their records."""
    end = 0
    records: list[Record] = []
    for place, fields in found:
        last = int(place.partition(b"-")[0])
        told = [read_record(value) for name, value in zip(fields[::2], fields[1::2], strict=True) if name == b"r"]
        if last > upto or not all(_ended(record) <= horizon for record in told):
            break
        end = last
        records += told
    return end, records


def _ended(record: Record) -> int:
    """When all that a decision is about had ended: its window, and its own making."""
    made = micros(record.decided_at)
    if len(record.line[-1]) == len(digits(0)):  # a rolling window's end
        return max(made, int(record.line[-1]))
    if record.window is not None:
        return max(made, micros(record.window.end))
    # In no window: what it would have been judged in, had it not been excluded, may be a month that is still open.
    return max(made, micros(record.at)) + MONTH


def _accounts(asking: Asking, shard: Shard, unknown: set[bytes]) -> Flow[dict[bytes, bytes]]:
    numbers = sorted(unknown)
    words = yield from asking.fields(shard, [b"w" + number for number in numbers])
    return {number: word[1:] for number, word in zip(numbers, words, strict=True) if word is not None}


def _drop_tallies(asking: Asking, shard: Shard, account: bytes, horizon: bytes) -> Flow[None]:
    """Tallies of windows that are kept no longer; whoever changes the list meanwhile wins, and the next trim drops."""
    listed = yield from asking.field(shard, b"l" + account)
    names = [] if listed is None else listed.split(b"\n")[:-1]
    values = yield from asking.fields(shard, [b"t%b\0%b" % (account, name) for name in names])
    over = [
        name
        for name, value in zip(names, values, strict=True)
        if not name.endswith(OPEN) and (value is None or value.split()[3] <= horizon)
    ]
    if over:
        rest = b"".join(name + b"\n" for name in names if name not in set(over))
        dropped = [b"t%b\0%b" % (account, name) for name in over]
        yield from asking.swap(shard, {b"l" + account: listed or b""}, {b"l" + account: rest}, dropped)


def _drop_claims(asking: Asking, shard: Shard, account: bytes, horizon: int) -> Flow[None]:
    """Claims that are over; whoever claims meanwhile wins, and the next claim or trim drops."""
    field = b"m" + account
    claims = (yield from asking.field(shard, field)) or b""
    lines = claims.split(b"\n")[:-1]
    rest = b"".join(line + b"\n" for line in lines if claimed_until(line) > horizon)
    if rest != claims:
        yield from asking.swap(shard, {field: claims}, {field: rest} if rest else {}, [] if rest else [field])
