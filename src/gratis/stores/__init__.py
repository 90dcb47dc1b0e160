"""What a store is: it applies charges, each once and whole, and answers with receipts.

`apply` is the one verb that moves tokens. There is no set or increment, so nothing can come between a check and an
act. Each charge is one atomic step: the id, the tally of the window and the ledger's entry change together or not at
all. The other methods enroll, or only read. A new store is one class with these methods.
"""

from __future__ import annotations

from datetime import timedelta
from enum import Enum, auto, unique
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from msgspec import Struct
from msgspec.structs import replace

from gratis.errors import LedgerError
from gratis.model import Correction
from gratis.rule import Holding

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from datetime import datetime

    from gratis.model import Change, Decision, Durability, Enrollment, Entry, Hold, Request
    from gratis.offer import Revision
    from gratis.rule import Charge, Tally

Cursor = int | tuple[int, ...]
"""A place in a ledger: the number of an entry, or one a shard."""

Links = dict[tuple[str, str, "datetime"] | None, str]
"""The last link of each window, by group, kind and start; under None that of what is outside any."""

BATCH_MAX = 10_000
CONFLICT_FIELDS = (
    "model",
    "at",
    "project",
    "input_tokens",
    "output_tokens",
    "cached_tokens",
    "kind",
    "tools",
)


class Bounds(Struct, frozen=True, gc=False):
    """How far a request's time may lie from the store's clock. Replays of old data run with no bounds.

    `keep` is how long a window is kept after its end; later its requests are too late. `ahead` is how far beyond
    the store's clock a request's time may lie.
    """

    keep: timedelta = timedelta(days=7)
    ahead: timedelta = timedelta(minutes=5)


@unique
class Status(Enum):
    """What a store did with a charge."""

    DECIDED = auto()
    REPLAYED = auto()
    CONFLICT = auto()
    AHEAD = auto()
    OUTDATED = auto()
    HELD = auto()
    EXPIRED = auto()
    WAITING = auto()
    GONE = auto()
    STALE = auto()
    CLOSED = auto()


class Receipt(Struct, frozen=True, gc=False):
    """What a store did with one charge.

    DECIDED and REPLAYED carry the decision, CONFLICT the first one and the field that differs, AHEAD the store's
    time. OUTDATED says that the charge rests on an enrollment that is no longer the latest, and carries that one.
    HELD carries the hold that was asked for. EXPIRED says that holds of the account ran out of time, and carries some:
    they are to be ended first. WAITING says that an earlier charge of the account in the same call is to be dealt with
    first, so that a batch is what its charges are one by one. GONE says that the hold that a charge was to end for want
    of time is no more. STALE says that a correction is not the next one, CLOSED that its window is no longer kept. Only
    DECIDED, HELD and GONE wrote anything; a conflict with a hold carries that.
    """

    status: Status
    decision: Decision | None = None
    field: str | None = None
    now: datetime | None = None
    change: Change | None = None
    hold: Hold | None = None
    due: tuple[Hold, ...] = ()


class Store(Protocol):
    """Applies charges atomically. Safe for use by several threads."""

    is_instant: bool
    """Whether it answers without waiting for a disk or a network."""

    @property
    def shards(self) -> int:
        """How many ledgers it has, side by side; an account's decisions are all in one."""
        ...

    @property
    def durability(self) -> Durability:
        """What its answers rest on."""
        ...

    def apply(self, charges: Sequence[Charge], *, dry: bool = False) -> list[Receipt]:
        """Apply each charge once, in order; with `dry`, say what would happen and write nothing."""
        ...

    def extend(self, offer: str, account: str, request_id: str, *, until: datetime) -> Hold | None:
        """Have a hold run out at another time; None if there is no such hold."""
        ...

    def release(self, offer: str, account: str, request_id: str) -> Hold | None:
        """Give back what a hold set aside; None if there is no such hold."""
        ...

    def holds(self, offer: str, account: str) -> list[Hold]:
        """Every hold of an account that was not ended, by the time at which it runs out."""
        ...

    def corrections(self, offer: str, account: str, request_id: str) -> int:
        """How often the decision on a request was corrected."""
        ...

    def claim(self, offer: str, account: str, name: str, *, until: datetime, token: str) -> bool:
        """Be the first to claim a name, and the only one; it may be forgotten some time after `until`.

        Whoever claimed it is told so again by the same token, since the first answer may have been lost.
        """
        ...

    def enroll(
        self, offer: str, account: str, enrollment: Enrollment, *, actor: str, revision: Revision | None
    ) -> Change:
        """Change an account's enrollment: acknowledged, it counts for every decision that starts afterwards."""
        ...

    def enrollments(self, offer: str, account: str) -> list[Change]:
        """Every change of an account's enrollment, oldest first."""
        ...

    def tallies(self, offer: str, account: str, *, at: datetime | None = None) -> list[tuple[str, str, Tally]]:
        """Group, kind of window and tally of an account's windows, or of those that take a request of an instant."""
        ...

    def entries(self, *, after: Cursor = 0, upto: Cursor | None = None) -> Iterator[Entry]:
        """The ledger from behind an entry on, in order; of several shards, one shard's after another's."""
        ...

    def frozen(self) -> AbstractContextManager[None]:
        """What is read meanwhile is read as of one moment, where one machine can promise that."""
        ...

    def counters(self, offer: str, account: str) -> tuple[int, int, list[tuple[str, str, Tally]]]:
        """All of an account's tallies at one moment, with its shard and the last entry there at that moment."""
        ...

    def accounts(self) -> Iterable[tuple[str, str]]:
        """Offer and name of each account that the store knows."""
        ...

    def now(self) -> datetime:
        """The store's clock."""
        ...

    def close(self) -> None:
        """Give back what the store holds; a closed store refuses."""
        ...


@runtime_checkable
class Awaited(Protocol):
    """A store that asyncio can wait for, without a thread."""

    async def apply_async(self, charges: Sequence[Charge]) -> list[Receipt]:
        """Apply each charge once, in order."""
        ...

    async def close_async(self) -> None:
        """Give back what the loop's calls hold."""
        ...


@runtime_checkable
class Linked(Protocol):
    """A store whose ledger is chained by hash: it also says where each chain ends."""

    def links(self, offer: str, account: str) -> tuple[int, int, Links]:
        """The last link of each of an account's windows, with its shard and the last entry there at that moment."""
        ...


@runtime_checkable
class Trimmed(Protocol):
    """A store that can forget the front of its ledger."""

    def trim(self, cursor: Cursor) -> tuple[int, ...]:
        """Forget what was stored elsewhere up to a cursor and can be asked for no more; how far that went."""
        ...

    def trimmed(self) -> tuple[int, ...]:
        """How far each shard's ledger was forgotten."""
        ...

    def kept(self) -> datetime | None:
        """By when ended what some shard keeps no longer: its counters may be gone; None if all are there."""
        ...


def places(cursor: Cursor, *, shards: int) -> tuple[int, ...]:
    """A cursor as the place in each shard behind which it stands."""
    if isinstance(cursor, int):
        if shards > 1 and cursor:
            raise LedgerError(f"cursor {cursor}: this ledger has {shards} shards; expected a place in each of them")
        return (cursor,) * shards
    if len(cursor) != shards:
        raise LedgerError(f"cursor {cursor}: it has {len(cursor)} places; expected {shards}, one a shard")
    return tuple(cursor)


def behind(cursor: Cursor, entry: Entry, *, shards: int) -> tuple[int, ...]:
    """The cursor that stands behind an entry."""
    found = list(places(cursor, shards=shards))
    found[entry.shard] = entry.entry
    return tuple(found)


def repeat(request: Request, first: Decision) -> Receipt:
    """The receipt of a charge whose id was decided before: the same decision, or a conflict."""
    for field in CONFLICT_FIELDS:
        if getattr(request, field) != getattr(first.request, field):
            return Receipt(Status.CONFLICT, first, field)
    return Receipt(Status.REPLAYED, replace(first, replayed=True))


def again(charge: Charge, first: Decision) -> Receipt:  # noqa: PLR0911 - a row a case
    """The receipt of any charge whose id was decided before.

    Of one that asks for a hold only the time is compared: what it was then settled with, even the model that answered,
    was not known yet. A correction also has to say the same as the first time.
    """
    step, request = charge.step, charge.request
    if first.correction is not None and type(step) is not Correction:
        return Receipt(Status.CONFLICT, first, "id")  # a correction's id is no request's
    if step is None:
        return repeat(request, first)
    if type(step) is Holding:
        if request.at != first.request.at:
            return Receipt(Status.CONFLICT, first, "at")
        return Receipt(Status.REPLAYED, replace(first, replayed=True))
    known = first.correction
    if type(step) is Correction:
        if known is None or known.of != step.of:
            return Receipt(Status.CONFLICT, first, "id")
        if (known.remedy, known.actor, known.why) != (step.remedy, step.actor, step.why):
            return Receipt(Status.STALE)
    return repeat(request, first)


def held_again(charge: Charge, hold: Hold) -> Receipt:
    """The receipt of a charge whose id is held: the same hold, or a conflict; to be decided it needs but its time."""
    if type(charge.step) is Correction:
        return Receipt(Status.CONFLICT, field="id", hold=hold)
    fields = CONFLICT_FIELDS if type(charge.step) is Holding else ("at",)
    for field in fields:
        if getattr(charge.request, field) != getattr(hold.request, field):
            return Receipt(Status.CONFLICT, field=field, hold=hold)
    return Receipt(Status.HELD, hold=replace(hold, replayed=True))


def stops(charge: Charge, receipt: Receipt) -> bool:
    """Whether what follows of its account waits: holds ran out of time, or a settle comes after its hold did."""
    if receipt.status is Status.EXPIRED:
        return True
    first = None if receipt.status is Status.DECIDED or charge.step is not None else receipt.decision
    return first is not None and first.is_unmeasured and charge.request.tokens is not None


def held_in(hold: Hold) -> tuple[str | None, str, datetime | None]:
    """Of what a hold sets tokens aside: group, kind of window, and its start; None where none was open."""
    return hold.terms.group, hold.terms.window, None if hold.window is None else hold.window.start
