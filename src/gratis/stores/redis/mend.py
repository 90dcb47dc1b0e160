"""What a shard's state becomes by an entry of its ledger: what `apply.lua` derives, derived once more.

The ledger commits, the state follows. Where it did not follow (the server refused a write in between, or the state
is gone), each decision that the ledger has and the state has not is derived here, and written by whoever needs it
first. Doing it twice changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from gratis.errors import StoreError
from gratis.model import micros
from gratis.stores.redis.calls import level, outside_field, tally_field
from gratis.stores.redis.layout import (
    OPEN,
    PLACE_HEX,
    Counters,
    account_word,
    correction_field,
    decision_of,
    digits,
    key_of,
    place_of,
    read_counters,
    read_facts,
    read_record,
)
from gratis.stores.redis.servers import Call
from gratis.stores.redis.wire import packed

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    from gratis.model import Decision
    from gratis.stores.redis.asking import Asking
    from gratis.stores.redis.layout import Record, Shard
    from gratis.stores.redis.servers import Result, Wave

    T = TypeVar("T")
    Flow = Generator[Wave, list[Result], T]

NUMBER_BYTES = 5
WRITE_MAX = 1_500


class Missed:
    """An entry of the ledger that the state does not know: what to read of the state, and what to write."""

    def __init__(self, last: int, fields: Sequence[bytes], counters: Counters, salt: bytes) -> None:
        self._salt = salt
        self._counters = counters
        self._level = level(last - counters.base)
        pairs = list(zip(fields[::2], fields[1::2], strict=True))
        self.records = [read_record(value) for name, value in pairs if name == b"r"]
        self.first = last - len(self.records) + 1
        self.last = last
        self.words = dict(_word(value) for name, value in pairs if name == b"w")
        self._decisions: list[Decision] = []

    def unknown_words(self) -> list[bytes]:
        """The words that its records use and it does not define."""
        used = {number for record in self.records for number in (record.account, record.facts)}
        return sorted(used - self.words.keys())

    def reads(self, words: Mapping[bytes, bytes]) -> list[bytes]:
        """The fields of the state that it changes."""
        self.words.update(words)
        self._decisions = [self._decision(record) for record in self.records]
        names: dict[bytes, None] = {}
        for decision, record in zip(self._decisions, self.records, strict=True):
            word = account_word(decision.offer, decision.account)
            names[b"l" + word] = None
            names[self._slot(word, decision)] = None
            if decision.seq is not None:
                names[_tally_name(word, decision, record)] = None
        return list(names)

    def writes(self, known: Mapping[bytes, bytes | None]) -> dict[bytes, bytes]:
        """What the state has to say after it, given what it says now; the counter of decisions apart."""
        fields: dict[bytes, bytes] = {}

        def value(name: bytes) -> bytes:
            return fields.get(name) or known.get(name) or b""

        for number, text in self.words.items():
            fields[b"w" + number] = text
            fields[text if text[:1] == b"a" else b"f" + key_of(text, self._salt)] = number
        for place, (decision, record) in enumerate(zip(self._decisions, self.records, strict=True)):
            word = account_word(decision.offer, decision.account)
            slot = self._slot(word, decision)
            found = place_of(word, decision.request.id, self._salt)[PLACE_HEX:]
            found += (self.first + place).to_bytes(NUMBER_BYTES)
            if found not in value(slot):
                fields[slot] = value(slot) + found
            if decision.correction is not None:
                fields[correction_field(word, decision.correction.of)] = b"%d" % decision.correction.number
            if decision.window is not None:
                fields |= _window_fields(word, decision, record, value)
            elif record.link is not None:
                fields[outside_field(word)] = record.link.encode()
        return fields

    def counters(self) -> Counters:
        """The counters after it."""
        before = self._counters
        words = max([before.words, *map(int, self.words)])
        return Counters(self.last, before.base, words, max(before.top, self._level), before.kept)

    def _slot(self, word: bytes, decision: Decision) -> bytes:
        return b"i" + place_of(word, decision.request.id, self._salt)[: self._level + 1]

    def _decision(self, record: Record) -> Decision:
        account = self.words[record.account][1:].decode().partition("\0")[2]
        return decision_of(record, account, read_facts(self.words[record.facts]))


def _tally_name(word: bytes, decision: Decision, record: Record) -> bytes:
    assert decision.window is not None, "what has a place in a window has a window"
    start = OPEN if record.window is None else digits(micros(decision.window.start))
    return tally_field(word, decision.terms.group or "", decision.terms.window, start)


def _window_fields(
    word: bytes, decision: Decision, record: Record, value: Callable[[bytes], bytes]
) -> dict[bytes, bytes]:
    """What a decision that belongs to a window changes of the tallies, and of the list that names them."""
    assert decision.window is not None, "what has a place in a window has a window"
    fields: dict[bytes, bytes] = {}
    name, listed = _tally_name(word, decision, record), b"l" + word
    start, end = digits(micros(decision.window.start)), digits(micros(decision.window.end))
    before = value(name)
    own = name[len(word) + 2 :]
    opened = before.split()[2] if name.endswith(OPEN) and before else start
    if start < opened:  # judged in the window of its hold, or of what it corrects, before the one that is open
        own = own.removesuffix(OPEN) + start
        name = name.removesuffix(OPEN) + start
    elif start > opened:
        own = own.removesuffix(OPEN) + opened
        fields[b"t%b\0%b" % (word, own)] = before
    if own not in value(listed).split(b"\n"):
        fields[listed] = value(listed) + own + b"\n"
    tally = b"%d %d %b %b" % (decision.used or 0, decision.seq or 0, start, end)
    fields[name] = tally if record.link is None else b"%b %b" % (tally, record.link.encode())
    return fields


def _word(definition: bytes) -> tuple[bytes, bytes]:
    number, _, text = definition.partition(b" ")
    return number, text


def mended(asking: Asking, shard: Shard, last: int, seen: int) -> Flow[StoreError | None]:
    """Bring a state up to its ledger, one entry of it a time; the error says why it cannot be."""
    try:
        yield from _mend(asking, shard, last, seen)
    except StoreError as error:
        return error
    return None


def _mend(asking: Asking, shard: Shard, last: int, seen: int) -> Flow[None]:
    text = yield from asking.field(shard, b"n")
    ask = packed("XRANGE", shard.ledger, f"{last + 1}-0", "+", "COUNT", 1)
    found = yield from asking.reply(Call(shard.slot, ask))
    counters = read_counters(text)
    if counters.last > last:
        return  # somebody else was first
    if not found:
        raise StoreError(
            f"shard {shard.number} ends at decision {last}, and decision {seen} was seen in"
            " it: the server has lost what it acknowledged (a failover, a restored copy, a flush); nothing was"
            " written. Compare with the ledger that was kept elsewhere, then open the store anew"
        )
    if text is None and last == 0 and int(found[0][0].partition(b"-")[0]) < seen:
        raise StoreError(
            f"shard {shard.number}: its state, with the enrollments, is gone; nothing was written."
            " Compare with the ledger that was kept elsewhere"
        )
    missed = Missed(int(found[0][0].partition(b"-")[0]), found[0][1], counters, asking.salt)
    if missed.first != last + 1:
        raise StoreError(
            f"shard {shard.number}: its state ends at decision {last}, its ledger begins at {missed.first};"
            " expected no gap; nothing was written"
        )
    missing = missed.unknown_words()
    texts = yield from asking.fields(shard, [b"w" + number for number in missing])
    if None in texts:
        raise StoreError(f"shard {shard.number}: words of its ledger are gone; nothing was written")
    names = missed.reads({number: text for number, text in zip(missing, texts, strict=True) if text})
    known = dict(zip(names, (yield from asking.fields(shard, names)), strict=True))
    fields, before = list(missed.writes(known).items()), {b"n": text or b""}
    for first in range(0, len(fields), WRITE_MAX):
        yield from asking.swap(shard, before, dict(fields[first : first + WRITE_MAX]))
    yield from asking.swap(shard, before, {b"n": missed.counters().text()})
