"""What a shard holds, and how it is written: names of keys and fields, and the record of a decision.

A store is one shard, or in a cluster so many that its masters share the work. A shard is three keys in one slot:

    state    a hash   n   counters: the last decision, how many were trimmed from the ledger's front, words so far,
                          the highest level of the index, and by when ended what is no longer kept
                      a<account>   the account's number           f<key>   the number of facts, by their digest
                      w<number>    the word that a number stands for: a<account>, or JSON facts
                      v<account>   the version of its enrollment  e<version> <account>   that change, as JSON
                      t<account> <group> <kind> <start>   a window's tally: used, seq, start, end, and its last link
                          ('open' if it rolls)
                      o<account>   the link of its last decision outside any window
                      l<account>   the names of all its windows
                      i<prefix>    the index: for each id whose digest starts so, 5 bytes of it and its decision
                      h<account> <id>   a hold: `holds.py`    g<account> <group> <kind> <start>   what they set aside
                      x<account>   when the first of its holds runs out, or before
                      c<account> <id>   how often a decision was corrected   m<account>   what was claimed
    ledger   a stream  an entry has up to 50 decisions; its id is the number of the last: r a record, w a word's meaning
    holds    a sorted set   account, end and id of each hold, all of one score: so an account's are in their order

An account is its offer and its name with a zero byte between, which neither may contain; so no name can reach another
field. A record is a line of Lua's (account, facts, verdict), its calendar window with its link (see `chain.py`; records
of before there were links have neither here), the request's id, and what only Python reads.
"""

from __future__ import annotations

from binascii import crc_hqx
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from gratis.chain import LINK_HEX, id_bytes
from gratis.errors import StoreError
from gratis.lines import change_line, change_of, correction_of, decode, encode, terms_of
from gratis.model import (
    Correction,
    Counts,
    Decision,
    Durability,
    Held,
    Kind,
    Reason,
    Request,
    Terms,
    Window,
    from_micros,
    micros,
    shown,
)
from gratis.rule import Charge, free_tokens

if TYPE_CHECKING:
    from datetime import datetime

    from gratis.model import Change

SCHEMA = 1
SHARDS_MAX = 1_024
SLOTS = 16_384
LEVEL_MAX = (8_192, 131_072, 2_097_152)
PLACE_HEX = 5
SHORT_BYTES = 5
OPEN = b"open"
NO_SPAN = b"\0"
HAS_SPAN = 1
SPAN_BYTES = (5, 4)  # seconds until the start, and how many
LINK_BYTES = LINK_HEX // 2
TOKEN_BYTES = 16
IDENTITY_BYTES = 8
SECOND = 1_000_000

pack = msgspec.msgpack.Encoder().encode
unpack = msgspec.msgpack.Decoder().decode


class Shard(Struct, frozen=True):
    """One shard: its number, its slot in a cluster, its three keys, and these as a script's call has them."""

    number: int
    slot: int
    state: bytes
    ledger: bytes
    holds: bytes
    keys: bytes


class Facts(Struct, frozen=True):
    """What many records have in common: said once, and from then on by its number."""

    model: str
    project: str | None
    kind: Kind
    tools: tuple[str, ...]
    durability: Durability
    terms: Terms


def shards(namespace: str, count: int, identity: bytes = b"") -> list[Shard]:
    """The shards of a store; their slots are spread evenly over all that a cluster has.

    Their keys carry the store's identity: who opened it before it was flushed and made anew finds nothing there.
    """
    return [_shard(namespace, number, count, identity[:IDENTITY_BYTES]) for number in range(count)]


def slot_of(tag: bytes) -> int:
    """The slot of all keys with this hash tag."""
    return crc_hqx(tag, 0) % SLOTS


def _shard(namespace: str, number: int, count: int, identity: bytes) -> Shard:
    tries = 0
    while True:
        tag = f"{namespace}:{number}" + (f".{tries}" if tries else "")
        slot = slot_of(tag.encode())
        if count == 1 or slot * count // SLOTS == number:
            key = b"{%b}:%b:" % (tag.encode(), identity)
            state, ledger, holds = key + b"state", key + b"ledger", key + b"holds"
            named = b"".join(b"$%d\r\n%b\r\n" % (len(name), name) for name in (state, ledger, holds))
            return Shard(number, slot, state, ledger, holds, b"$1\r\n3\r\n" + named)
        tries += 1


def account_word(offer: str, account: str) -> bytes:
    """An account, as fields name it."""
    return f"{offer}\0{account}".encode()


def change_field(version: bytes, account: bytes) -> bytes:
    """The field of a change of an account's enrollment."""
    return b"e%b\0%b" % (version, account)


def write_change(offer: str, account: str, change: Change, *, token: str) -> bytes:
    """A change of an enrollment as it is kept; by the token whoever made it knows it again."""
    return token.encode() + encode(change_line(offer, account, change))


def read_change(text: bytes) -> Change:
    """A change of an enrollment from what is kept."""
    return change_of(decode(text[TOKEN_BYTES:]))[2]


def correction_field(account: bytes, request_id: str) -> bytes:
    """The field that counts the corrections of a decision."""
    return b"c%b\0%b" % (account, id_bytes(request_id))


def write_claim(name: str, until: datetime, *, token: str) -> bytes:
    """A claim as it is kept: until when it counts, by what whoever made it knows it again, and what is claimed."""
    return b"%b %b %b" % (digits(micros(until)), token.encode(), encode(name))


def is_claim_of(claim: bytes, name: str) -> bool:
    """Whether this is what was claimed."""
    return claim.split(b" ", 2)[2] == encode(name)


def claimed_until(claim: bytes) -> int:
    """Until when a claim counts."""
    return int(claim.split(b" ", 1)[0])


def shard_number(account: bytes, *, count: int) -> int:
    """In which shard an account lives."""
    if count == 1:
        return 0
    return int.from_bytes(blake2b(account, digest_size=8, person=b"shard").digest()) % count


def place_of(account: bytes, request_id: str, salt: bytes) -> bytes:
    """Where the index has an id: hexadecimal digits that choose the field, then the bytes that are found in it."""
    digest = blake2b(b"%b\0%b" % (account, request_id.encode()), digest_size=8, key=salt).digest()
    return digest[:3].hex()[:PLACE_HEX].encode() + digest[3:]


def read_facts(text: bytes) -> Facts:
    """Facts from their JSON."""
    line = decode(text)
    return Facts(
        line["model"],
        line["project"],
        Kind(line["kind"]),
        tuple(line["tools"]),
        Durability(line["durability"]),
        terms_of(line["terms"], enrollment=line["enrollment"]),
    )


def key_of(facts: bytes, salt: bytes) -> bytes:
    """By what facts are found."""
    return blake2b(facts, digest_size=12, key=salt).digest()


def span_of(charge: Charge) -> bytes:
    """Start and length of a charge's calendar window, which are whole seconds; a zero byte if it has none."""
    window = charge.window
    if window is None or charge.rolls:
        return NO_SPAN
    start, end = micros(window.start), micros(window.end)
    assert start % SECOND == end % SECOND == 0, "windows of a calendar begin and end at whole seconds"
    start_bytes, length_bytes = SPAN_BYTES
    length = (end - start) // SECOND
    return b"%c%b%b" % (HAS_SPAN, (start // SECOND).to_bytes(start_bytes, signed=True), length.to_bytes(length_bytes))


class Counters(Struct, frozen=True):
    """What a shard counts: field `n` of its state."""

    last: int = 0
    base: int = 0
    words: int = 0
    top: int = 1
    kept: bytes = b""

    def text(self) -> bytes:
        """As the field has it."""
        return b"%d %d %d %d %b" % (self.last, self.base, self.words, self.top, self.kept)


def read_counters(text: bytes | None) -> Counters:
    """Counters from their field; a shard that has none has decided nothing."""
    if text is None:
        return Counters()
    try:
        *counts, kept = text.split(b" ")
        last, base, words, top = map(int, counts)
    except ValueError:
        raise StoreError(f"a shard's counters are {shown(text)}; expected four numbers") from None
    return Counters(last, base, words, top, kept)


class Record(Struct, frozen=True):
    """A record, taken apart: account and facts by their numbers, the rest of Lua's line, what the request said."""

    account: bytes
    facts: bytes
    line: list[bytes]
    request_id: str
    id_bytes: bytes
    rest: list[Any]
    window: Window | None
    hold: Held | None = None
    correction: Correction | None = None
    link: str | None = None

    @property
    def at(self) -> datetime:
        """The request's own time."""
        return from_micros(self.rest[0])

    @property
    def decided_at(self) -> datetime:
        """When it was decided."""
        return from_micros(self.rest[0] + self.rest[4])


def read_record(record: bytes) -> Record:
    """A record from its bytes."""
    line, _, packed = record.partition(b"\n")
    line, _, ended = line.partition(b"\t")
    account, facts, *words = line.split()
    window, link, packed = _read_window(packed)
    size = 1 + (packed[0] & 0x1F) if packed[0] <= _FIXSTR_END else 2 + packed[1]
    request_id = unpack(packed[:size])
    known = request_id.hex() if type(request_id) is bytes else request_id
    rest, correction = unpack(packed[size:]), None
    if type(rest[-1]) is dict:
        said = rest.pop()
        correction = correction_of(said, of=said["of"])
    if len(rest) > _TOLD:  # of before there were links
        *rest, start, length = rest
        window = _window(start, length)
    return Record(account, facts, words, known, packed[:size], rest, window, read_ended(ended), correction, link)


def _read_window(packed: bytes) -> tuple[Window | None, str | None, bytes]:
    """Calendar window and link of a record, and what comes behind them; an id never begins as they do."""
    if packed[0] > HAS_SPAN:
        return None, None, packed
    window, at = None, 1
    if packed[0] == HAS_SPAN:
        middle, at = at + SPAN_BYTES[0], at + sum(SPAN_BYTES)
        start, length = int.from_bytes(packed[1:middle], signed=True), int.from_bytes(packed[middle:at])
        window = _window(start, length)
    return window, packed[at : at + LINK_BYTES].hex(), packed[at + LINK_BYTES :]


def _window(start: int, length: int) -> Window:
    return Window(from_micros(start * SECOND), from_micros((start + length) * SECOND))


def read_ended(text: bytes) -> Held | None:
    """The hold that a decision ended, from Lua's words: s settled or u unmeasured, its bound, and its window."""
    if not text:
        return None
    bound, *span = text[1:].split()
    window = None if span == [b"-"] else Window(from_micros(int(span[0])), from_micros(int(span[1])))
    return Held(int(bound), window, text[:1] == b"u")


def decision_of(record: Record, account: str, facts: Facts) -> Decision:
    """The decision that a record tells."""
    request = Request(
        id=record.request_id,
        model=facts.model,
        at=record.at,
        input_tokens=record.rest[1],
        output_tokens=record.rest[2],
        account=account,
        project=facts.project,
        kind=facts.kind,
        tools=facts.tools,
        cached_tokens=record.rest[3],
    )
    decision = told(record.line, request, facts.terms, record.window, facts.durability)
    if record.hold is None and record.correction is None:
        return decision
    return replace(decision, hold=record.hold, correction=record.correction)


def told(words: list[bytes], request: Request, terms: Terms, window: Window | None, durability: Durability) -> Decision:
    """The decision that Lua's words tell: a letter, then numbers, then a rolling window's start and end."""
    letter = words[0]
    if letter == b"w":
        used = int(words[1])
        if len(words) > _WITHIN:
            window = Window(from_micros(int(words[3])), from_micros(int(words[4])))
        return Decision(request, terms, _FITS, request.tokens, used, used, window, int(words[2]), durability)
    if letter == b"o":
        used, seq, amount, free = int(words[1]), int(words[2]), int(words[3]), int(words[4])
        if len(words) > _OVER:
            window = Window(from_micros(int(words[5])), from_micros(int(words[6])))
        before = used - (amount if terms.counts is Counts.ALL else free)
        tokens = free_tokens(Charge(request, terms, 0, amount, None, rolls=False), free=free, fits=False)
        return Decision(request, terms, Reason.OVER_ALLOWANCE, tokens, used, before + amount, window, seq, durability)
    if letter == b"n":
        return Decision(request, terms, Reason.OVER_ALLOWANCE, 0, 0, int(words[1]), None, None, durability)
    reason = Reason.TOO_LATE if letter == b"l" else terms.reason
    assert reason is not None, "who is excluded has a reason"
    return Decision(request, terms, reason, 0, None, None, None, None, durability)


def digits(since: int) -> bytes:
    """An instant as Lua compares it: microseconds in 18 digits; the time before 1970 is all one."""
    return b"%018d" % max(0, since)


_FITS: Final = Reason.WITHIN_ALLOWANCE
_TOLD: Final = 5
_WITHIN: Final = 3
_OVER: Final = 5
_FIXSTR_END: Final = 0xBF
