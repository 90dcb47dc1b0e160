"""What a store is: it applies charges, each once and whole, and answers with receipts.

`apply` is the one verb that moves tokens. There is no set or increment, so nothing can come between a check and an
act. Each charge is one atomic step: the id, the tally of the window and the ledger's entry change together or not at
all. The other methods enroll, or only read. A new store is one class with these methods.
"""

from __future__ import annotations

from datetime import timedelta
from enum import Enum, auto, unique
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct
from msgspec.structs import replace

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from datetime import datetime

    from gratis.model import Change, Decision, Durability, Enrollment, Entry, Request
    from gratis.offer import Revision
    from gratis.rule import Charge, Tally

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


class Receipt(Struct, frozen=True, gc=False):
    """What a store did with one charge.

    DECIDED and REPLAYED carry the decision, CONFLICT the first one and the field that differs, AHEAD the store's
    time. OUTDATED says that the charge rests on an enrollment that is no longer the latest, and carries that one.
    Only DECIDED wrote anything.
    """

    status: Status
    decision: Decision | None = None
    field: str | None = None
    now: datetime | None = None
    change: Change | None = None


class Store(Protocol):
    """Applies charges atomically. Safe for use by several threads."""

    durability: Durability
    is_instant: bool
    """Whether it answers without waiting for a disk or a network."""

    def apply(self, charges: Sequence[Charge], *, dry: bool = False) -> list[Receipt]:
        """Apply each charge once, in order; with `dry`, say what would happen and write nothing."""
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

    def entries(self, *, after: int = 0, upto: int | None = None) -> Iterator[Entry]:
        """The ledger from behind an entry on, in order."""
        ...

    def frozen(self) -> AbstractContextManager[None]:
        """All that is read meanwhile is read as of one moment."""
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


def repeat(request: Request, first: Decision) -> Receipt:
    """The receipt of a charge whose id was decided before: the same decision, or a conflict."""
    for field in CONFLICT_FIELDS:
        if getattr(request, field) != getattr(first.request, field):
            return Receipt(Status.CONFLICT, first, field)
    return Receipt(Status.REPLAYED, replace(first, replayed=True))
