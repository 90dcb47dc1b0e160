"""One process, nothing kept after it: the reference store, and the fastest."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

from gratis import clock as system
from gratis.enrollment import change
from gratis.errors import StoreError
from gratis.model import Durability, Entry
from gratis.rule import decide
from gratis.stores import Bounds, Receipt, Status, repeat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from datetime import datetime

    from gratis.model import Change, Decision, Enrollment
    from gratis.offer import Revision
    from gratis.rule import Charge, Tally

PAGE = 1_000


class _Account:
    """All of one account: its changes, its decisions by id, its tallies by window."""

    __slots__ = ("changes", "decisions", "tallies")

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.decisions: dict[str, Decision] = {}
        self.tallies: dict[tuple[str, str], dict[datetime, Tally]] = {}


class MemoryStore:
    """Keeps everything in memory until it is closed; safe for several threads."""

    durability = Durability.VOLATILE
    is_instant = True

    def __init__(self, *, clock: Callable[[], datetime] = system.now, bounds: Bounds | None = Bounds()) -> None:
        self._clock = clock
        self._bounds = bounds
        self._lock = Lock()
        self._accounts: dict[tuple[str, str], _Account] = {}
        self._ledger: list[tuple[datetime, Decision]] = []
        self._open = True

    def now(self) -> datetime:
        """The store's clock."""
        return self._clock()

    def apply(self, charges: Sequence[Charge], *, dry: bool = False) -> list[Receipt]:
        """Apply each charge once, in order; with `dry`, say what would happen and write nothing."""
        with self._lock:
            self._check_open()
            now = self._clock()
            return [self._apply(charge, now, dry=dry) for charge in charges]

    def _apply(self, charge: Charge, now: datetime, *, dry: bool) -> Receipt:
        request, terms = charge.request, charge.terms
        key = (terms.offer, request.account)
        account = self._accounts.get(key)
        if account is None:
            account = _Account()
        first = account.decisions.get(request.id)
        if first is not None:
            return repeat(request, first)
        bounds = self._bounds
        if bounds is not None and request.at > now + bounds.ahead:
            return Receipt(Status.AHEAD, now=now)
        if account.changes and account.changes[-1].version != charge.version:
            return Receipt(Status.OUTDATED, change=account.changes[-1])

        tallies: dict[datetime, Tally] = {}
        tally = None
        if charge.window is not None:
            tallies = account.tallies.get((terms.group or "", terms.window), tallies)
            if charge.rolls:
                tally = tallies[next(reversed(tallies))] if tallies else None
            else:
                tally = tallies.get(charge.window.start)
        kept_since = None if bounds is None else now - bounds.keep
        decision, after = decide(charge, tally, kept_since=kept_since, durability=self.durability)
        if dry:
            return Receipt(Status.DECIDED, decision)

        self._accounts[key] = account
        if after is not None:
            tallies[after.window.start] = after
            account.tallies[terms.group or "", terms.window] = tallies
        account.decisions[request.id] = decision
        self._ledger.append((now, decision))
        return Receipt(Status.DECIDED, decision)

    def enroll(
        self, offer: str, account: str, enrollment: Enrollment, *, actor: str, revision: Revision | None
    ) -> Change:
        """Change an account's enrollment."""
        with self._lock:
            self._check_open()
            changes = self._accounts.setdefault((offer, account), _Account()).changes
            made = change(changes, enrollment, actor=actor, at=self._clock(), revision=revision)
            changes.append(made)
            return made

    def enrollments(self, offer: str, account: str) -> list[Change]:
        """Every change of an account's enrollment, oldest first."""
        with self._lock:
            known = self._accounts.get((offer, account))
            return [] if known is None else list(known.changes)

    def tallies(self, offer: str, account: str, *, at: datetime | None = None) -> list[tuple[str, str, Tally]]:
        """Group, kind of window and tally of each window of an account, or of those open at an instant."""
        with self._lock:
            known = self._accounts.get((offer, account))
            return [
                (group, window, tally)
                for (group, window), tallies in (known.tallies if known else {}).items()
                for tally in tallies.values()
                if at is None or tally.window.start <= at < tally.window.end
            ]

    def entries(self, *, after: int = 0, upto: int | None = None) -> Iterator[Entry]:
        """The ledger from behind an entry on, in order."""
        while True:
            with self._lock:
                last = len(self._ledger) if upto is None else min(upto, len(self._ledger))
                page = self._ledger[after : min(after + PAGE, last)]
            if not page:
                return
            for now, decision in page:
                after += 1
                yield Entry(after, now, decision)

    def accounts(self) -> list[tuple[str, str]]:
        """Offer and name of each account that the store knows."""
        with self._lock:
            return list(self._accounts)

    def close(self) -> None:
        """A closed store refuses."""
        self._open = False

    def _check_open(self) -> None:
        if not self._open:
            raise StoreError("this memory store is closed")
