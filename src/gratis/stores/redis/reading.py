"""What flows read: enrollments, tallies, accounts, and the ledger, page by page."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from gratis.errors import GratisError, StoreError, UnreadableEntry, UnreadableState
from gratis.model import Entry, Window, from_micros, shown
from gratis.rule import Tally
from gratis.stores.redis.calls import outside_field
from gratis.stores.redis.layout import (
    Facts,
    account_word,
    change_field,
    decision_of,
    read_change,
    read_counters,
    read_facts,
    read_record,
)
from gratis.stores.redis.servers import Call
from gratis.stores.redis.wire import packed

if TYPE_CHECKING:
    from collections.abc import Generator

    from gratis.model import Change
    from gratis.stores import Links
    from gratis.stores.redis.asking import Asking
    from gratis.stores.redis.layout import Record, Shard
    from gratis.stores.redis.servers import Result, Wave

    T = TypeVar("T")
    Flow = Generator[Wave, list[Result], T]

PAGE = 100
SCAN = 1_000
WORDS_CACHED_MAX = 100_000
UNREADABLE = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, AssertionError, GratisError)
VERSION_DIGITS_MAX = 6
_NUMBERS = 4  # of a tally; behind them comes its link


class Reading:
    """Reads a store; knows the words that it has read before."""

    def __init__(self, asking: Asking) -> None:
        self._asking = asking
        self._words: dict[tuple[int, bytes], bytes] = {}
        self._facts: dict[bytes, Facts] = {}

    def enrollments(self, offer: str, account: str) -> Flow[list[Change]]:
        """Every change of an account's enrollment, oldest first."""
        lines = yield from self.change_lines(offer, account)
        try:
            return [read_change(line) for line in lines]
        except UNREADABLE as error:
            raise UnreadableState(f"a change of the enrollment of {account!r} cannot be read: {error}") from None

    def change_lines(self, offer: str, account: str) -> Flow[list[bytes]]:
        """The same, as they are kept."""
        word = account_word(offer, account)
        shard = self._asking.shard_of(word)
        version = (yield from self._asking.field(shard, b"v" + word)) or b"0"
        if not version.isdigit() or len(version) > VERSION_DIGITS_MAX:
            raise UnreadableState(
                f"the version of the enrollment of {account!r} is {shown(version)}; expected a number"
            )
        last = int(version)
        names = [change_field(b"%d" % version, word) for version in range(1, last + 1)]
        lines = yield from self._asking.fields(shard, names)
        if None in lines:
            raise UnreadableState(f"a change of the enrollment of {account!r} is gone; expected {last} of them")
        return [line for line in lines if line is not None]

    def tallies(self, offer: str, account: str) -> Flow[tuple[int, list[tuple[str, str, Tally]]]]:
        """How far the shard's ledger reaches, and the tallies of an account's windows then."""
        last, windows, _ = yield from self._windows(account_word(offer, account))
        # By their start: of several that take a request, the last one opened counts.
        found = [_tally(name, value) for name, value in windows]
        return last, sorted(found, key=lambda one: (*one[:2], one[2].window.start))

    def links(self, offer: str, account: str) -> Flow[tuple[int, Links]]:
        """How far the shard's ledger reaches, and the last link of each of an account's windows then."""
        last, windows, outside = yield from self._windows(account_word(offer, account))
        found: Links = {} if outside is None else {None: outside.decode(errors="replace")}
        for name, value in windows:
            group, kind, tally = _tally(name, value)
            linked = value.split()[_NUMBERS:]
            if linked:
                found[group, kind, tally.window.start] = linked[0].decode(errors="replace")
        return last, found

    def _windows(self, word: bytes) -> Flow[tuple[int, list[tuple[bytes, bytes]], bytes | None]]:
        """At one moment: how far the ledger reaches, an account's windows, and its last link outside any."""
        shard = self._asking.shard_of(word)
        listed = yield from self._asking.field(shard, b"l" + word)
        while True:
            names = [] if listed is None else listed.split(b"\n")[:-1]
            asked = [b"n", b"l" + word, outside_field(word), *(b"t%b\0%b" % (word, name) for name in names)]
            counters, now, outside, *values = yield from self._asking.fields(shard, asked)
            if now == listed:
                pairs = [(name, value) for name, value in zip(names, values, strict=True) if value is not None]
                return read_counters(counters).last, pairs, outside
            listed = now  # a window was opened meanwhile

    def base(self, shard: Shard) -> Flow[int]:
        """The last entry that was trimmed from a shard's ledger."""
        return read_counters((yield from self._asking.field(shard, b"n"))).base

    def kept(self, shard: Shard) -> Flow[bytes]:
        """By when ended what a shard keeps no longer; empty if it was never trimmed."""
        return read_counters((yield from self._asking.field(shard, b"n"))).kept

    def accounts(self) -> Flow[list[tuple[str, str]]]:
        """Offer and name of each account that the store knows."""
        found: dict[bytes, None] = {}
        for shard in self._asking.shards:
            cursor = b"0"
            while True:
                ask = packed("HSCAN", shard.state, cursor, "MATCH", "[avmx]*", "COUNT", SCAN)
                cursor, pairs = yield from self._asking.read(Call(shard.slot, ask))
                found.update(dict.fromkeys(name[1:] for name in pairs[::2]))
                if cursor == b"0":
                    break
        words = (word.decode().partition("\0") for word in found)
        return sorted((offer, account) for offer, _, account in words)

    def entries(self, shard: Shard, after: int, upto: int | None) -> Flow[list[Entry]]:
        """The next page of a shard's ledger behind an entry; empty at its end."""
        counters = read_counters((yield from self._asking.field(shard, b"n")))
        ask = packed("XRANGE", shard.ledger, f"{after or 1}-0", "+", "COUNT", PAGE)
        found = yield from self._asking.read(Call(shard.slot, ask))
        if not found and counters.last < after:
            yield from self._check_reaches(shard, after)
        rows = _rows(shard, found, after)
        rows = [row for row in rows if row[0] > after]
        if after == 0 and rows and rows[0][0] > counters.base + 1:  # somebody trims meanwhile
            counters = read_counters((yield from self._asking.field(shard, b"n")))
        expected = (after or counters.base) + 1  # whoever begins anew begins behind what was trimmed
        if (rows[0][0] if rows else counters.last + 1) > expected and (upto is None or upto >= expected):
            gone = rows[0][0] - 1 if rows else counters.last
            raise UnreadableEntry(gone, f"entries {expected} to {gone} are gone from the ledger", shard=shard.number)
        rows = [row for place, row in enumerate(rows) if row[0] == rows[0][0] + place]  # up to the next gap
        if upto is not None:
            rows = [row for row in rows if row[0] <= upto]
        records = _records(shard, rows)
        words = yield from self._known(shard, {number for one in records for number in (one.account, one.facts)})
        entries: list[Entry] = []
        for (number, _), record in zip(rows, records, strict=False):
            try:
                account = words[record.account][1:].decode().partition("\0")[2]
                decision = decision_of(record, account, self._read_facts(words[record.facts]))
                entries.append(Entry(number, record.decided_at, decision, shard.number, record.link))
            except UNREADABLE as error:
                if entries:
                    break  # the next page begins with it
                raise UnreadableEntry(number, _why(error, record), shard=shard.number) from error
        return entries

    def _check_reaches(self, shard: Shard, after: int) -> Flow[None]:
        """What was read is still there: a ledger that ends before it has lost what it gave."""
        ask = packed("XRANGE", shard.ledger, f"{after}-0", "+", "COUNT", 1)
        if not (yield from self._asking.read(Call(shard.slot, ask))):
            raise StoreError(
                f"shard {shard.number}: its ledger ends before entry {after}, which was read from it: the server has"
                " lost what it acknowledged"
            )

    def _known(self, shard: Shard, numbers: set[bytes]) -> Flow[dict[bytes, bytes]]:
        """The words that numbers stand for."""
        known = {number: self._words[shard.number, number] for number in numbers
                 if (shard.number, number) in self._words}  # fmt: skip
        missing = sorted(numbers - known.keys())
        texts = yield from self._asking.fields(shard, [b"w" + number for number in missing])
        for number, text in zip(missing, texts, strict=True):
            if text is None:
                continue  # whoever needs it says so
            if len(self._words) >= WORDS_CACHED_MAX:
                self._words.clear()
            known[number] = self._words[shard.number, number] = text
        return known

    def _read_facts(self, text: bytes) -> Facts:
        facts = self._facts.get(text)
        if facts is None:
            if len(self._facts) >= WORDS_CACHED_MAX:
                self._facts.clear()
            facts = self._facts[text] = read_facts(text)
        return facts


def _rows(shard: Shard, found: list[tuple[bytes, list[bytes]]], after: int) -> list[tuple[int, bytes]]:
    """Records of entries of the stream with their numbers; one that holds more than its place has room for is none."""
    rows: list[tuple[int, bytes]] = []
    before = 0
    for place, fields in found:
        upmost = int(place.partition(b"-")[0])
        told = [value for name, value in zip(fields[::2], fields[1::2], strict=True) if name == b"r"]
        if before >= max(after, upmost - len(told) + 1):
            if rows and rows[-1][0] > after:
                break  # the next page begins with it
            many = f"it holds {len(told)} records, of which {upmost - before} belong there"
            raise UnreadableEntry(upmost, many, shard=shard.number)
        rows += enumerate(told, upmost - len(told) + 1)
        before = upmost
    return rows


def _records(shard: Shard, rows: list[tuple[int, bytes]]) -> list[Record]:
    """As many records as can be read, one after the other; the first one that cannot be is told by the next page."""
    records: list[Record] = []
    for number, text in rows:
        try:
            records.append(read_record(text))
        except UNREADABLE as error:
            if records:
                break
            raise UnreadableEntry(number, str(error), shard=shard.number) from error
    return records


def _why(error: Exception, record: Record) -> str:
    if isinstance(error, KeyError) and error.args[0] in {record.account, record.facts}:
        return f"word {shown(error.args[0])}, which it names, is gone"
    return str(error)


def _tally(name: bytes, value: bytes) -> tuple[str, str, Tally]:
    try:
        group, kind, _ = name.decode().split("\0")
        used, seq, start, end = map(int, value.split()[:_NUMBERS])
        return group, kind, Tally(Window(from_micros(start), from_micros(end)), used, seq)
    except (ValueError, OverflowError):
        raise UnreadableState(f"window {shown(name)}: its counter is {shown(value)}, which cannot be read") from None
