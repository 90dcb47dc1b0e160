"""The call that applies charges, written and read: pure, as `apply.lua` has it in its signature.

What a call says of a charge's case (account, terms, window, facts) is the same for thousands of charges, so it is
packed once.
"""

from __future__ import annotations

from hashlib import sha1
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from gratis.chain import facts_of, id_bytes, rest_of, stem_of
from gratis.errors import OutcomeUnknown
from gratis.model import Correction, Counts, Expiry, Overage, Unit, from_micros, micros
from gratis.rule import Holding, Overdue
from gratis.stores import Receipt, Status, again, held_again
from gratis.stores.redis.holds import hold_of_line, kept_of_hold, read_hold
from gratis.stores.redis.layout import (
    LEVEL_MAX,
    OPEN,
    Shard,
    account_word,
    decision_of,
    digits,
    key_of,
    place_of,
    read_change,
    read_ended,
    read_facts,
    read_record,
    shard_number,
    span_of,
    told,
)
from gratis.stores.redis.servers import Call

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gratis.model import Decision, Durability, Terms, Window
    from gratis.rule import Charge, Step

CHARGES_MAX = 500  # new ones keep a server busy for about 5 ms
CASES_CACHED_MAX = 20_000
PLACE_BYTES = 10
HEAD_ARGUMENTS, CASE_ARGUMENTS, CHARGE_ARGUMENTS = 6, 10, 6
NO_INSTANT = digits(0)
DECIDE, DRY = b"$6\r\ndecide\r\n", b"$3\r\ndry\r\n"

_DECIDED, _AHEAD, _OUTDATED, _HELD = Status.DECIDED, Status.AHEAD, Status.OUTDATED, Status.HELD
SHORT = {b"X": Status.EXPIRED, b"W": Status.WAITING, b"G": Status.GONE, b"T": Status.STALE, b"C": Status.CLOSED}
_ALL, _EXCESS, _TOKENS = Counts.ALL, Overage.EXCESS, Unit.TOKENS


class Script:
    """A script: its text, and the digest by which a server that has seen it knows it."""

    def __init__(self, name: str) -> None:
        self.text = files("gratis.stores.redis").joinpath(name).read_bytes()
        digest = sha1(self.text, usedforsecurity=False).hexdigest().encode()
        self._by_digest = b"$7\r\nEVALSHA\r\n$40\r\n%b\r\n" % digest
        self._whole = b"$4\r\nEVAL\r\n$%d\r\n%b\r\n" % (len(self.text), self.text)

    def call(self, shard: Shard, arguments: bytes, count: int, *, also: bytes = b"", replies: int = 1) -> Call:
        """The call of it on a shard's keys, with so many packed arguments."""
        head = b"*%d\r\n" % (count + 6)

        def whole() -> bytes:
            return b"".join((head, self._whole, shard.keys, arguments, also))

        return Call(shard.slot, b"".join((head, self._by_digest, shard.keys, arguments, also)), replies, whole)


class Case:
    """What a call says of a case: packed without its facts, and with them."""

    __slots__ = ("brief", "full", "is_told", "kept", "shard", "word")

    def __init__(self, charge: Charge, shard: int, word: bytes, durability: Durability, salt: bytes) -> None:
        terms, window = charge.terms, charge.window
        facts = facts_of(charge.request, terms, durability)
        head = (word, b"%d" % charge.version, key_of(facts, salt))
        if window is None:
            tail: tuple[bytes, ...] = (b"xfw", b"0", outside_field(word), b"")
        else:
            start, end = digits(micros(window.start)), digits(micros(window.end))
            kind, name = (b"r", OPEN) if charge.rolls else (b"c", start)
            field = tally_field(word, terms.group or "", terms.window, name)
            tail = (kind + _reading(terms), b"%d" % terms.allowance, field, b"%b %b" % (start, end))
        tail = (*tail, stem_of(terms.offer, charge.request.account, facts), span_of(charge))
        self.brief = b"".join(map(_bulk, (*head, b"", *tail)))
        self.full = b"".join(map(_bulk, (*head, facts, *tail)))
        self.shard, self.word, self.is_told = shard, word, False
        self.kept = (charge.terms, charge.window)  # whose identity is this case's


def outside_field(account: bytes) -> bytes:
    """The field of the link of an account's last decision outside any window."""
    return b"o" + account


def tally_field(account: bytes, group: str, kind: str, start: bytes) -> bytes:
    """The field of a window's tally."""
    return b"t%b\0%b\0%b\0%b" % (account, group.encode(), kind.encode(), start)


def _reading(terms: Terms) -> bytes:
    counts = b"a" if terms.counts is _ALL else b"f"
    if terms.overage is not _EXCESS:
        return counts + b"w"
    return counts + (b"e" if terms.unit is _TOKENS else b"u")


def _bulk(data: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(data), data)


class Shifted(OutcomeUnknown):
    """An answer is not that of its question; the connection that brought it is not to be used again."""


class Moment(Struct, frozen=True):
    """The store's clock when a call is made, and what it bounds; no bounds where both are None."""

    now: int
    latest: int | None
    kept_since: int | None


class Calls:
    """Writes calls for charges; knows the cases that it has written before."""

    def __init__(self, *, shards: int, salt: bytes) -> None:
        self._script = Script("apply.lua")
        self._shards = shards
        self.salt = salt
        self._cases: dict[tuple[Any, ...], Case] = {}

    def case(self, charge: Charge, durability: Durability) -> Case:
        """The case of a charge."""
        request, window = charge.request, charge.window
        key = (
            request.account,
            charge.version,
            id(charge.terms),
            request.model,
            request.project,
            id(request.kind),
            request.tools,
            None if charge.rolls else id(window),
        )
        case = self._cases.get(key)
        if case is None:
            if len(self._cases) >= CASES_CACHED_MAX:
                self._cases.clear()
            word = account_word(charge.terms.offer, request.account)
            case = self._cases[key] = Case(charge, shard_number(word, count=self._shards), word, durability, self.salt)
        return case

    def write(
        self, shard: Shard, charges: Sequence[tuple[Charge, Case]], moment: Moment, *, seen: int, dry: bool,
        also: bytes = b"", replies: int = 1,
    ) -> tuple[Call, list[bytes]]:  # fmt: skip
        """One call for a shard's charges, and the places that its answers will name."""
        numbers: dict[int, int] = {}
        cases: list[bytes] = []
        places = [place_of(case.word, charge.request.id, self.salt) for charge, case in charges]
        rows: list[bytes] = []
        for (charge, case), place in zip(charges, places, strict=True):
            number = numbers.get(id(case))
            if number is None:
                cases.append(case.brief if case.is_told else case.full)
                number = numbers[id(case)] = len(cases)
            rows.append(_row(charge, place, number, moment))
        last, number_of_cases = b"%d" % seen, b"%d" % len(cases)
        head = b"%b$%d\r\n%b\r\n$1\r\n%d\r\n$18\r\n%b\r\n$18\r\n%b\r\n$%d\r\n%b\r\n" % (
            DRY if dry else DECIDE, len(last), last, level(seen + len(charges)),
            NO_INSTANT if moment.kept_since is None else digits(moment.kept_since), digits(moment.now),
            len(number_of_cases), number_of_cases,
        )  # fmt: skip
        count = HEAD_ARGUMENTS + CASE_ARGUMENTS * len(cases) + CHARGE_ARGUMENTS * len(rows)
        arguments = b"".join((head, *cases, *rows))
        return self._script.call(shard, arguments, count, also=also, replies=replies), places


def _row(charge: Charge, place: bytes, number: int, moment: Moment) -> bytes:
    request = charge.request
    packed_id = id_bytes(request.id)
    at = micros(request.at)
    step, mark = charge.step, b""
    if moment.latest is not None and at > moment.latest and type(step) not in {Overdue, Correction}:
        mark = b"A"
    elif charge.rolls and charge.window is not None:
        mark = _rolling_mark(charge, charge.window)
    if step is None:
        rest = rest_of(request, at, moment.now)
    else:
        rest = _rest_of_step(charge, step, at, moment.now)
        if mark != b"A":
            mark += b";" + _step_mark(step, request.tokens or 0)
    nth, amount = b"%d" % number, b"%d" % charge.amount
    return b"$%d\r\n%b\r\n$10\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (
        len(nth), nth, place, len(packed_id), packed_id, len(rest), rest, len(amount), amount, len(mark), mark,
    )  # fmt: skip


def _rolling_mark(charge: Charge, window: Window) -> bytes:
    terms = charge.terms
    spare = 0
    if terms.overage is _EXCESS and terms.unit is _TOKENS:
        spare = (charge.request.tokens or 0) - charge.amount
    at, start, end = (digits(micros(instant)) for instant in (charge.request.at, window.start, window.end))
    return b"%b %b %b %d" % (at, start, end, spare)


def _rest_of_step(charge: Charge, step: Step, at: int, now: int) -> bytes:
    if isinstance(step, Holding):
        return kept_of_hold(charge, step, at)
    return rest_of(charge.request, at, now, step if isinstance(step, Correction) else None)


def _step_mark(step: Step, bound: int) -> bytes:
    """What there is to do but to decide, as the script has it in its signature."""
    if isinstance(step, Holding):
        return b"H%b %b %d" % (digits(micros(step.until)), b"r" if step.expiry is Expiry.RELEASED else b"d", bound)
    window = step.window
    if isinstance(step, Correction):
        pin = b"-" if window is None else digits(micros(window.start))
        return b"C%b %d %d %b" % (pin, step.returned, step.number, id_bytes(step.of))
    span = b"-" if window is None else b"%b %b" % (digits(micros(window.start)), digits(micros(window.end)))
    return b"%b%d %b" % (b"E" if isinstance(step, Overdue) else b"U", step.tokens_max, span)


def level(ids: int) -> int:
    """How many levels the index has that holds so many ids."""
    return 1 if ids <= LEVEL_MAX[0] else 1 + sum(ids > most for most in LEVEL_MAX)


def _ended(decision: Decision, ended: bytes, step: Step | None) -> Decision:
    """A decision that says what it ended or corrected."""
    return replace(decision, hold=read_ended(ended), correction=step if isinstance(step, Correction) else None)


def receipts(
    answers: Sequence[bytes], charges: Sequence[tuple[Charge, Case]], places: Sequence[bytes],
    durability: Durability, moment: Moment, *, dry: bool,
) -> list[Receipt]:  # fmt: skip
    """What the answers to a call say of its charges."""
    found: list[Receipt] = []
    skipped = 0 if dry else 2  # the numbers of account and facts
    for answer, (charge, _), place in zip(answers, charges, places, strict=True):
        if answer[:PLACE_BYTES] != place:
            raise Shifted("the server answered another request's question; ask again with the same id")
        letter, text = answer[PLACE_BYTES : PLACE_BYTES + 1], answer[PLACE_BYTES + 1 :]
        if letter == b"D":
            line, _, ended = text.partition(b"\t")
            window = None if charge.rolls else charge.window
            decision = told(line.split()[skipped:], charge.request, charge.terms, window, durability)
            if ended or charge.step is not None:
                decision = _ended(decision, ended, charge.step)
            found.append(Receipt(_DECIDED, decision))
        elif letter == b"S":
            same = found[int(text) - 1].decision
            assert same is not None, "what comes first has a decision"
            found.append(again(charge, same))
        elif letter == b"U":
            found.append(found[int(text) - 1])
        else:
            found.append(_undecided(letter, text, charge, moment))
    return found


def _undecided(letter: bytes, text: bytes, charge: Charge, moment: Moment) -> Receipt:
    """What an answer says of a charge that was not decided now."""
    if letter == b"R":
        facts, _, record = text.partition(b" ")[2].partition(b"\n")
        return again(charge, decision_of(read_record(record), charge.request.account, read_facts(facts)))
    if letter == b"K":
        return Receipt(_HELD, hold=hold_of_line(text, charge))
    if letter == b"L":
        return held_again(charge, read_hold(text))
    if letter == b"V":
        return Receipt(_OUTDATED, change=read_change(text) if text else None)
    if letter == b"A":
        return Receipt(_AHEAD, now=from_micros(moment.now))
    return Receipt(SHORT[letter])
