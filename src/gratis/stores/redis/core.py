"""What a store on Redis does, written once: each verb is a flow that two drivers run.

A flow knows no socket. It yields what is to be sent and is sent what came back, so the blocking store and the one
for asyncio cannot differ.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import Struct

from gratis.enrollment import change
from gratis.errors import NotExecuted, OutcomeUnknown, StoreError
from gratis.model import Durability, from_micros, micros, shown
from gratis.stores import Bounds, Receipt, Status, stops
from gratis.stores.redis.asking import Asking
from gratis.stores.redis.calls import CHARGES_MAX, Calls, Case, Moment, receipts
from gratis.stores.redis.holding import Holding
from gratis.stores.redis.layout import (
    SCHEMA,
    SHARDS_MAX,
    TOKEN_BYTES,
    account_word,
    change_field,
    claimed_until,
    is_claim_of,
    read_change,
    read_counters,
    shards,
    slot_of,
    write_change,
    write_claim,
)
from gratis.stores.redis.mend import mended
from gratis.stores.redis.reading import Reading
from gratis.stores.redis.servers import Behind, Call, Cluster, Greeted, One, Servers, answers
from gratis.stores.redis.trim import trimmed
from gratis.stores.redis.wire import packed

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from datetime import datetime

    from gratis.model import Change, Enrollment, Hold
    from gratis.offer import Revision
    from gratis.rule import Charge
    from gratis.stores.redis.layout import Shard
    from gratis.stores.redis.servers import Result, Wave

    T = TypeVar("T")
    Flow = Generator[Wave, list[Result], T]

SHARDS_OF_CLUSTERS = 16
PROBE = b"probe"  # a field that is written and deleted on opening: a server before 7.0 tells rights by nothing else
OPENING_S = 3.0  # whoever opens a store that is not there hears of it soon
MICROSECOND = timedelta(microseconds=1)
ROUNDS_MAX = 256
MEASURED_FOR = 60_000_000
_BOOTTIME = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
TIME = packed("TIME")
_DURABILITIES = list(Durability)
_DECIDED, _EXPIRED = Status.DECIDED, Status.EXPIRED


class Settings(Struct, frozen=True, kw_only=True):
    """What a store is opened with, its servers and secrets apart."""

    namespace: str = "gratis"
    shards: int | None = None
    durability: Durability | None = None
    wait: float = 10.0
    clock: Callable[[], datetime] | None = None
    bounds: Bounds | None = None
    must_exist: bool = False
    is_checked: bool = True


def _boottime() -> int:
    """Microseconds that have passed, those asleep included."""
    return time.clock_gettime_ns(_BOOTTIME) // 1_000


class Core:
    """The flows of one store, and what it has learned: where servers are, their clock, what it has seen."""

    def __init__(self, servers: Servers, settings: Settings) -> None:
        self.settings = settings
        self.durability = Durability.VOLATILE
        self.asking = Asking(servers, patience=min(settings.wait, OPENING_S))
        self.reading = Reading(self.asking)
        self.holding = Holding(self.asking)
        self._calls = Calls(shards=1, salt=b"")
        self._seen: list[int] = []
        self._is_met = False
        self._measured = (0, 0)
        bounds = settings.bounds
        self._ahead = None if bounds is None else bounds.ahead // MICROSECOND
        self._keep = None if bounds is None else bounds.keep // MICROSECOND

    # What servers say of themselves.

    def meet(self, greeted: Greeted) -> None:
        """Hear a server's greeting; one that keeps less than was promised is refused."""
        self._measure(greeted.now)
        asked = self.durability if self._is_met else self.settings.durability
        if asked is not None and _DURABILITIES.index(greeted.durability) < _DURABILITIES.index(asked):
            raise StoreError(
                f"the server's answers are {greeted.durability}; expected {asked}"
                " (journaled needs appendonly yes, synced appendfsync always, too)"
            )
        if not self._is_met:
            self.durability, self._is_met = self.settings.durability or greeted.durability, True

    def _measure(self, server: int) -> None:
        self._measured = (server, _boottime())

    def now(self) -> int:
        """The store's clock: the server's, unless another was given."""
        if self.settings.clock is not None:
            return micros(self.settings.clock())
        server, since = self._measured
        return server + _boottime() - since

    # Opening.

    def open(self) -> Flow[None]:
        """Find out how many shards the store has, or make it."""
        if isinstance(self.asking.servers, One):
            yield from self._look()
        tag = f"{self.settings.namespace}:store".encode()
        key, slot = b"{%b}" % tag, slot_of(tag)
        ask = Call(slot, packed("HMGET", key, "schema", "shards", "salt"))
        found = yield from self.asking.reply(ask)
        if None in found:
            yield from self._make(key, slot)
            found = yield from self.asking.reply(ask)
        schema, count, salt = found
        if schema != b"%d" % SCHEMA:
            raise StoreError(f"the store has schema {schema!r}; expected {SCHEMA}: it was made by another release")
        if not count.isdigit() or not 1 <= int(count) <= SHARDS_MAX:
            raise StoreError(f"the store says that it has {shown(count)} shards; expected 1 to {SHARDS_MAX}")
        if self.settings.shards not in (None, int(count)):
            raise StoreError(f"the store has {int(count)} shards; expected {self.settings.shards}: that never changes")
        self.asking.shards = shards(self.settings.namespace, int(count), salt)
        self.asking.salt = salt
        self._calls = Calls(shards=int(count), salt=salt)
        self._seen = [0] * int(count)
        for shard in self.asking.shards:  # may this user do all that is needed, and how far is each?
            yield from self.asking.swap(shard, {}, {PROBE: b""}, [PROBE])
            # A slot that moves to another server refuses calls as long as one of their keys is not there.
            yield from self.asking.reply(Call(shard.slot, packed("ZADD", shard.holds, 0, PROBE)))
            yield from self._check(shard)
        self.asking.patience = self.settings.wait

    def _check(self, shard: Shard) -> Flow[None]:
        """A shard has both its state and its ledger, or nothing was decided in it."""
        counters = read_counters((yield from self.asking.field(shard, b"n")))
        entries = yield from self.asking.read(Call(shard.slot, packed("XLEN", shard.ledger)))
        text = yield from self.asking.field(shard, b"n")  # once more: others decide meanwhile
        self._seen[shard.number] = counters.last
        if not self.settings.is_checked:
            return
        if counters.last > counters.base and entries == 0:
            raise StoreError(
                f"shard {shard.number}: its state says {counters.last} decisions, and its ledger is gone; nothing is"
                " decided on it. Compare with the ledger that was kept elsewhere"
            )
        if text is None and entries > 1:
            raise StoreError(
                f"shard {shard.number}: its ledger has {entries} entries, and its state with the enrollments is gone;"
                " nothing is decided on it. Compare with the ledger that was kept elsewhere"
            )

    def _make(self, key: bytes, slot: int) -> Flow[None]:
        """Make the store; who comes second finds what the first one made."""
        if self.settings.must_exist:
            raise StoreError(
                f"there is no store in namespace {self.settings.namespace!r};"
                " `gratis enroll` and `gratis decide` make one"
            )
        count = self.settings.shards or (SHARDS_OF_CLUSTERS if isinstance(self.asking.servers, Cluster) else 1)
        for field, value in (("salt", secrets.token_hex(16)), ("shards", count), ("schema", SCHEMA)):
            yield from self.asking.reply(Call(slot, packed("HSETNX", key, field, value)))

    def _look(self) -> Flow[None]:
        """A server may turn out to be one of a cluster."""
        info = yield from self.asking.reply(Call(0, packed("INFO", "server"), is_shard=False))
        address = self.asking.servers.at(0)
        assert address is not None, "one server is known"
        if b"redis_mode:cluster" in info:
            self.asking.servers = Cluster([address])

    # The one verb.

    def apply(self, charges: Sequence[Charge], *, dry: bool) -> Flow[list[Receipt]]:
        """Apply each charge once, an account's in order; shards are asked side by side."""
        moment = self._moment()
        lost: set[int] = set()  # shards of which an earlier attempt may have been written
        if len(charges) == 1:
            found_one = yield from self._apply_one(charges[0], moment, lost, dry=dry)
            if found_one is not None:
                return (yield from self._with_due(charges, found_one, moment))
        work = self._by_shard(charges)
        found: dict[int, Receipt] = {}
        errors: list[StoreError] = []
        while work:
            turn = [(number, [(charge, case) for _, charge, case in parts[0]]) for number, parts in work.items()]
            written = [self._written(number, part, moment, dry=dry) for number, part in turn]
            results = yield from self.asking.answers([call for call, _ in written])
            for (number, part), (_, places), result in zip(turn, written, results, strict=True):
                error = yield from self._excuse(number, result, lost)
                if error is not None:
                    errors.append(error)
                    del work[number]
                elif not isinstance(result, Behind) and self._is_known(part, result):
                    got = receipts(result[0][1:], part, places, self.durability, moment, dry=dry)
                    self._see(number, result[0][0])
                    found.update(zip([place for place, _, _ in work[number].popleft()], got, strict=True))
                    stopped = set() if dry else _stopped(part, got)
                    found.update(dict.fromkeys(_withdrawn(work[number], stopped), Receipt(Status.WAITING)))
                    if not work[number]:
                        del work[number]
        if errors:
            is_kept = any(one.status in {Status.DECIDED, Status.REPLAYED} for one in found.values())
            raise _worst(errors, has_written=is_kept and not dry)
        return (yield from self._with_due(charges, [found[place] for place in range(len(charges))], moment))

    def _with_due(self, charges: Sequence[Charge], found: list[Receipt], moment: Moment) -> Flow[list[Receipt]]:
        """Add to receipts that say so which holds of their accounts ran out of time."""
        if all(receipt.status is not _EXPIRED for receipt in found):
            return found
        due: dict[bytes, tuple[Hold, ...]] = {}
        for place, (charge, receipt) in enumerate(zip(charges, found, strict=True)):
            if receipt.status is _EXPIRED:
                word = account_word(charge.terms.offer, charge.request.account)
                if word not in due:
                    due[word] = tuple((yield from self.holding.due(word, moment.now)))
                others = tuple(hold for hold in due[word] if hold.id != charge.request.id)
                found[place] = Receipt(_EXPIRED, due=others)
        return found

    def _by_shard(self, charges: Sequence[Charge]) -> dict[int, deque[list[tuple[int, Charge, Case]]]]:
        """Each shard's charges, in parts of which each is one call; with each charge its place."""
        work: dict[int, deque[list[tuple[int, Charge, Case]]]] = {}
        for place, charge in enumerate(charges):
            case = self._calls.case(charge, self.durability)
            parts = work.setdefault(case.shard, deque())
            if not parts or len(parts[-1]) >= CHARGES_MAX:
                parts.append([])
            parts[-1].append((place, charge, case))
        return work

    def _apply_one(self, charge: Charge, moment: Moment, lost: set[int], *, dry: bool) -> Flow[list[Receipt] | None]:
        """Apply a lone charge; None if that takes more than one question."""
        case = self._calls.case(charge, self.durability)
        part = ((charge, case),)
        call, places = self._written(case.shard, part, moment, dry=dry)
        (result,) = yield from answers(self.asking.servers, (call,), timer=time.monotonic, patience=self.settings.wait)
        if isinstance(result, Behind):
            if result.was_lost:
                lost.add(case.shard)
        elif isinstance(result, StoreError):
            raise result
        elif self._is_known(part, result):
            got = receipts(result[0][1:], part, places, self.durability, moment, dry=dry)
            self._see(case.shard, result[0][0])
            return got
        return None

    def _excuse(self, number: int, result: object, lost: set[int]) -> Flow[StoreError | None]:
        """The error that ends a shard's work; none where it may go on, if need be after its state was mended."""
        error = result if isinstance(result, StoreError) else None
        if isinstance(error, Behind):
            if error.was_lost:
                lost.add(number)
            error = yield from mended(self.asking, self.asking.shards[number], error.last, self._seen[number])
        return unknown(error) if error is not None and number in lost else error

    def _moment(self) -> Moment:
        now = self.now()
        if self._ahead is None or self._keep is None:
            return Moment(now, None, None)
        return Moment(now, now + self._ahead, now - self._keep)

    def _written(
        self, number: int, part: Sequence[tuple[Charge, Case]], moment: Moment, *, dry: bool
    ) -> tuple[Call, list[bytes]]:
        """The call for a shard's charges; now and then it also asks for the time."""
        is_old = _boottime() - self._measured[1] > MEASURED_FOR
        also, replies = (TIME, 2) if is_old else (b"", 1)
        return self._calls.write(
            self.asking.shards[number], part, moment, seen=self._seen[number], dry=dry, also=also, replies=replies
        )

    def _see(self, number: int, last: int) -> None:
        """Remember how far a shard is; of an answer that was read, since it may be another's."""
        self._seen[number] = max(self._seen[number], last)

    def _is_known(self, part: Sequence[tuple[Charge, Case]], result: list[Any]) -> bool:
        """Whether the server knows the facts; if not, it must be asked again. And what time it is there."""
        if len(result) > 1 and isinstance(result[1], list):
            self._measure(int(result[1][0]) * 1_000_000 + int(result[1][1]))
        is_known = result[0] != b"facts"
        for _, case in part:
            case.is_told = is_known
        return bool(is_known)

    # Claims and enrollments.

    def claim(self, offer: str, account: str, name: str, *, until: datetime, token: str) -> Flow[bool]:
        """Be the first to claim a name; who claimed it is told by a token, should an answer be lost."""
        now, line = self.now(), write_claim(name, until, token=token)
        word = account_word(offer, account)
        shard, field = self.asking.shard_of(word), b"m" + word
        for _ in range(ROUNDS_MAX):
            before = (yield from self.asking.field(shard, field)) or b""
            lines = before.split(b"\n")[:-1]
            if line in lines:
                return True
            if any(is_claim_of(known, name) for known in lines):
                return False
            kept = [known for known in lines if self._keep is None or claimed_until(known) > now - self._keep]
            after = b"".join(one + b"\n" for one in (*kept, line))
            if (yield from self.asking.swap(shard, {field: before}, {field: after})):
                return True
        raise NotExecuted(f"others claimed {ROUNDS_MAX} times meanwhile; nothing was written")

    def enroll(
        self, offer: str, account: str, enrollment: Enrollment, *, actor: str, revision: Revision | None
    ) -> Flow[Change]:
        """Change an account's enrollment; who comes second sees what the first one did."""
        word = account_word(offer, account)
        shard = self.asking.shard_of(word)
        line: bytes | None = None
        for _ in range(ROUNDS_MAX):
            try:
                lines = yield from self.reading.change_lines(offer, account)
            except NotExecuted as error:
                raise error if line is None else unknown(error) from None
            history = [read_change(known) for known in lines]
            if line in lines:
                return history[lines.index(line)]  # the answer was lost, the change was not
            now = from_micros(self.now())
            made = change(history, enrollment, actor=actor, at=now, revision=revision)
            before = b"%d" % history[-1].version if history else b""
            version = b"%d" % made.version
            line = write_change(offer, account, made, token=secrets.token_hex(TOKEN_BYTES // 2))
            written = {b"v" + word: version, change_field(version, word): line}
            if (yield from self.asking.swap(shard, {b"v" + word: before}, written)):
                return made
        raise NotExecuted(f"the enrollment changed {ROUNDS_MAX} times meanwhile; nothing was written")

    # Trimming.

    def trim(self, shard: Shard, upto: int) -> Flow[int]:
        """Forget what is stored elsewhere up to an entry and can be asked for no more; how far that went."""
        keep = (self.settings.bounds or Bounds()).keep // MICROSECOND
        return (yield from trimmed(self.asking, shard, upto, self.now() - keep))


def _stopped(part: Sequence[tuple[Charge, Case]], got: Sequence[Receipt]) -> set[bytes]:
    """The accounts of which a charge of this call is to be dealt with before those that follow it."""
    pairs = zip(part, got, strict=True)
    return {case.word for (charge, case), one in pairs if one.status is not _DECIDED and stops(charge, one)}


def _withdrawn(parts: deque[list[tuple[int, Charge, Case]]], stopped: set[bytes]) -> list[int]:
    """The places of charges that are not asked now, because their accounts are stopped."""
    if not stopped:
        return []
    places = [place for part in parts for place, _, case in part if case.word in stopped]
    kept = [[one for one in part if one[2].word not in stopped] for part in parts]
    parts.clear()
    parts.extend(part for part in kept if part)
    return places


def unknown(error: StoreError) -> OutcomeUnknown:
    """What to say of a call whose first attempt may have been done."""
    return OutcomeUnknown(f"{error}; an earlier attempt may have been written: ask again with the same ids")


def _worst(errors: Sequence[StoreError], *, has_written: bool) -> StoreError:
    """One error for a call of several parts: it claims that nothing was written only where that is so."""
    for error in errors:
        if isinstance(error, OutcomeUnknown):
            return error
    return unknown(errors[0]) if has_written else errors[0]
