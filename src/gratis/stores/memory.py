"""One process, nothing kept after it: the reference store, and the fastest."""

from __future__ import annotations

import os
import weakref
from contextlib import nullcontext
from threading import Lock
from typing import TYPE_CHECKING

from gratis import clock as system
from gratis.enrollment import change
from gratis.errors import StoreError
from gratis.model import Durability, Entry
from gratis.rule import decide
from gratis.stores import Bounds, Receipt, Status, places, repeat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from datetime import datetime

    from gratis.model import Change, Decision, Enrollment
    from gratis.offer import Revision
    from gratis.rule import Charge, Tally
    from gratis.stores import Cursor

PAGE = 1_000
_DECIDED = Status.DECIDED  # looked up once: in Python 3.11 naming a member of an enum is slow


class _Account:
    """All of one account: its changes, its decisions by id, its tallies by window."""

    __slots__ = ("changes", "decisions", "tallies", "version")

    def __init__(self) -> None:
        self.version = 0
        self.changes: list[Change] = []
        self.decisions: dict[str, Decision] = {}
        self.tallies: dict[tuple[str | None, str], dict[datetime, Tally]] = {}


class MemoryStore:
    """Keeps everything in memory until it is closed; safe for several threads."""

    durability = Durability.VOLATILE
    is_instant = True
    shards = 1

    def __init__(self, *, clock: Callable[[], datetime] = system.now, bounds: Bounds | None = Bounds()) -> None:
        self._clock = clock
        self._bounds = bounds
        self._lock = Lock()
        self._accounts: dict[tuple[str, str], _Account] = {}
        self._ledger: list[tuple[datetime, Decision]] = []
        self._refusal = ""
        _STORES.add(self)

    def now(self) -> datetime:
        """The store's clock."""
        return self._clock()

    def apply(self, charges: Sequence[Charge], *, dry: bool = False) -> list[Receipt]:
        """Apply each charge once, in order; with `dry`, say what would happen and write nothing."""
        with self._lock:
            self._check_open()
            now, bounds = self._clock(), self._bounds
            latest, kept_since = (None, None) if bounds is None else (now + bounds.ahead, now - bounds.keep)
            return [self._apply(charge, now, latest, kept_since, dry=dry) for charge in charges]

    def _apply(
        self, charge: Charge, now: datetime, latest: datetime | None, kept_since: datetime | None, *, dry: bool
    ) -> Receipt:
        request, terms = charge.request, charge.terms
        key = (terms.offer, request.account)
        account = self._accounts.get(key)
        if account is None:
            account = _Account()
        first = account.decisions.get(request.id)
        if first is not None:
            return repeat(request, first)
        if latest is not None and request.at > latest:
            return Receipt(Status.AHEAD, now=now)
        if charge.version != account.version:
            return Receipt(Status.OUTDATED, change=account.changes[-1] if account.changes else None)

        tallies, tally = None, None
        if charge.window is not None:
            tallies = account.tallies.get((terms.group, terms.window))
            if tallies is not None:
                start = next(reversed(tallies)) if charge.rolls else charge.window.start
                tally = tallies.get(start)
        decision, after = decide(charge, tally, kept_since=kept_since)
        if not dry:
            self._accounts[key] = account
            if after is not None:
                if tallies is None:
                    tallies = account.tallies[terms.group, terms.window] = {}
                tallies[after.window.start] = after
            account.decisions[request.id] = decision
            self._ledger.append((now, decision))
        return Receipt(_DECIDED, decision)

    def enroll(
        self, offer: str, account: str, enrollment: Enrollment, *, actor: str, revision: Revision | None
    ) -> Change:
        """Change an account's enrollment."""
        with self._lock:
            self._check_open()
            known = self._accounts.get((offer, account), _Account())
            made = change(known.changes, enrollment, actor=actor, at=self._clock(), revision=revision)
            known.changes.append(made)
            known.version = made.version
            self._accounts[offer, account] = known
            return made

    def enrollments(self, offer: str, account: str) -> list[Change]:
        """Every change of an account's enrollment, oldest first."""
        with self._lock:
            known = self._accounts.get((offer, account))
            return [] if known is None else list(known.changes)

    def tallies(self, offer: str, account: str, *, at: datetime | None = None) -> list[tuple[str, str, Tally]]:
        """Group, kind of window and tally of an account's windows, or of those that take a request of an instant."""
        with self._lock:
            return self._tallies(offer, account, at)

    def _tallies(self, offer: str, account: str, at: datetime | None) -> list[tuple[str, str, Tally]]:
        known = self._accounts.get((offer, account))
        return [
            (group or "", window, tally)
            for (group, window), tallies in (known.tallies if known else {}).items()
            for tally in tallies.values()
            if at is None or (at < tally.window.end and (tally.window.start <= at or window.startswith("rolling ")))
        ]

    def counters(self, offer: str, account: str) -> tuple[int, int, list[tuple[str, str, Tally]]]:
        """All of an account's tallies at one moment, with its shard and the last entry there at that moment."""
        with self._lock:
            return 0, len(self._ledger), self._tallies(offer, account, None)

    def entries(self, *, after: Cursor = 0, upto: Cursor | None = None) -> Iterator[Entry]:
        """The ledger from behind an entry on, in order."""
        (place,) = places(after, shards=1)
        end = None if upto is None else places(upto, shards=1)[0]
        while True:
            with self._lock:
                last = len(self._ledger) if end is None else min(end, len(self._ledger))
                page = self._ledger[place : min(place + PAGE, last)]
            if not page:
                return
            for now, decision in page:
                place += 1
                yield Entry(place, now, decision)

    def frozen(self) -> AbstractContextManager[None]:
        """All that is read meanwhile is read as of one moment: nobody else has this store."""
        return nullcontext()

    def accounts(self) -> list[tuple[str, str]]:
        """Offer and name of each account that the store knows."""
        with self._lock:
            return list(self._accounts)

    def close(self) -> None:
        """A closed store refuses."""
        self._refusal = "this memory store is closed"

    def after_fork(self) -> None:
        """In a forked child: two copies of one allowance would be spent twice, so this one refuses."""
        self._lock = Lock()
        self._refusal = "a memory store is of one process; after a fork this is another"

    def _check_open(self) -> None:
        if self._refusal:
            raise StoreError(self._refusal)


_STORES: weakref.WeakSet[MemoryStore] = weakref.WeakSet()


def _after_fork() -> None:
    for store in list(_STORES):
        store.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
