"""One machine, durable: a file that several processes and threads may use at once.

Threads that wait are served together: whoever gets the lock applies the charges of all, in one commit.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from gratis import clock as system
from gratis.errors import GratisError, OutcomeUnknown, UnreadableEntry
from gratis.model import Durability
from gratis.stores import BATCH_MAX, Bounds, places
from gratis.stores.sqlite.file import File, Synchronous
from gratis.stores.sqlite.rows import Keys
from gratis.stores.sqlite.turn import Work

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterator, Sequence
    from datetime import datetime

    from gratis.model import Change, Enrollment, Entry, Hold
    from gratis.offer import Revision
    from gratis.rule import Charge, Tally
    from gratis.stores import Cursor, Links, Receipt

WAIT_S = 60.0
PAGE = 1_000
ENTRY_MAX = (1 << 63) - 1

DURABILITY = {
    Synchronous.FULL: Durability.SYNCED,
    Synchronous.NORMAL: Durability.JOURNALED,
    Synchronous.OFF: Durability.VOLATILE,
}


class SQLiteStore:
    """A store in one SQLite file."""

    is_instant = False
    shards = 1

    def __init__(
        self,
        path: str | Path,
        *,
        clock: Callable[[], datetime] = system.now,
        bounds: Bounds | None = Bounds(),
        synchronous: Synchronous = Synchronous.FULL,
        wait_s: float = WAIT_S,
        is_checked: bool = True,
    ) -> None:
        self._durability = DURABILITY[synchronous]
        self._keys = Keys()
        self._file = File(
            Path(path), synchronous=synchronous, wait_s=wait_s, is_checked=is_checked, forget=self._keys.forget
        )
        self._clock = clock
        self._bounds = bounds
        self._lock = Lock()
        self._waiting: deque[_Turn] = deque()
        _STORES.add(self)

    @property
    def durability(self) -> Durability:
        """What its answers rest on."""
        return self._durability

    def now(self) -> datetime:
        """The store's clock."""
        return self._clock()

    def apply(self, charges: Sequence[Charge], *, dry: bool = False) -> list[Receipt]:
        """Apply each charge once, in order; with `dry`, say what would happen and write nothing."""
        if dry:
            with self._reading() as work:
                return work.run(charges, self._clock(), dry=True)
        turn = _Turn(charges)
        self._waiting.append(turn)
        with self._lock:
            while not turn.is_over:  # it may be behind more than one commit takes
                self._serve()
        return turn.result()

    def _serve(self) -> None:
        """Apply what every waiting thread asked for, in one transaction."""
        turns: list[_Turn] = []
        size = 0
        while self._waiting and (not turns or size + len(self._waiting[0].charges) <= BATCH_MAX):
            turns.append(self._waiting.popleft())
            size += len(turns[-1].charges)
        try:
            with self._file.writing() as connection:
                work = self._work(connection, self._keys)
                receipts = work.run([charge for turn in turns for charge in turn.charges], self._clock(), dry=False)
        except BaseException as error:
            self._file.settle()
            for turn in turns:
                turn.fail(error)
            if not isinstance(error, GratisError):
                raise
            return
        place = 0
        for turn in turns:
            turn.end(receipts[place : place + len(turn.charges)])
            place += len(turn.charges)

    def extend(self, offer: str, account: str, request_id: str, *, until: datetime) -> Hold | None:
        """Have a hold run out at another time."""
        with self._lock, self._file.writing() as connection:
            return self._work(connection, self._keys).extend(offer, account, request_id, until)

    def release(self, offer: str, account: str, request_id: str) -> Hold | None:
        """Give back what a hold set aside."""
        with self._lock, self._file.writing() as connection:
            return self._work(connection, self._keys).release(offer, account, request_id)

    def holds(self, offer: str, account: str) -> list[Hold]:
        """Every hold of an account that was not ended, by the time at which it runs out."""
        with self._reading() as work:
            return work.holds(offer, account)

    def corrections(self, offer: str, account: str, request_id: str) -> int:
        """How often the decision on a request was corrected."""
        with self._reading() as work:
            return work.corrections(offer, account, request_id)

    def claim(self, offer: str, account: str, name: str, *, until: datetime, token: str) -> bool:  # noqa: ARG002 - kept for good
        """Be the first to claim a name, and the only one."""
        with self._lock, self._file.writing() as connection:
            return self._work(connection, self._keys).claim(offer, account, name, token)

    def enroll(
        self, offer: str, account: str, enrollment: Enrollment, *, actor: str, revision: Revision | None
    ) -> Change:
        """Change an account's enrollment."""
        with self._lock, self._file.writing() as connection:
            work = self._work(connection, self._keys)
            return work.enroll(offer, account, enrollment, actor=actor, now=self._clock(), revision=revision)

    def enrollments(self, offer: str, account: str) -> list[Change]:
        """Every change of an account's enrollment, oldest first."""
        with self._reading() as work:
            return work.enrollments(offer, account)

    def tallies(self, offer: str, account: str, *, at: datetime | None = None) -> list[tuple[str, str, Tally]]:
        """Group, kind of window and tally of an account's windows, or of those that take a request of an instant."""
        with self._reading() as work:
            return work.tallies(offer, account, at)

    def accounts(self) -> list[tuple[str, str]]:
        """Offer and name of each account that the store knows."""
        with self._lock, self._file.reading() as connection:
            return list(connection.execute("SELECT offer, name FROM accounts ORDER BY account"))

    def counters(self, offer: str, account: str) -> tuple[int, int, list[tuple[str, str, Tally]]]:
        """All of an account's tallies at one moment, with its shard and the last entry there at that moment."""
        with self._reading() as work:
            return 0, work.last_entry(), work.tallies(offer, account, None)

    def links(self, offer: str, account: str) -> tuple[int, int, Links]:
        """The last link of each of an account's windows, with its shard and the last entry there at that moment."""
        with self._reading() as work:
            return 0, work.last_entry(), work.links(offer, account)

    def entries(self, *, after: Cursor = 0, upto: Cursor | None = None) -> Iterator[Entry]:
        """The ledger from behind an entry on, in order; each page is one short read, so that nobody waits."""
        keys = Keys()
        (place,) = places(after, shards=1)
        last = ENTRY_MAX if upto is None else places(upto, shards=1)[0]
        while True:
            page: list[Entry] = []
            unreadable = None
            with self._lock, self._file.reading() as connection:
                try:
                    page.extend(self._work(connection, keys).entries(after=place, upto=last, most=PAGE))
                except UnreadableEntry as error:
                    unreadable = error
            yield from page
            if unreadable is not None:
                raise unreadable
            if not page:
                return
            place = page[-1].entry

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """All that is read meanwhile is read as of one moment; nothing can be decided here until its end."""
        with self._file.frozen():
            yield

    def close(self) -> None:
        """Close the file; what was acknowledged is in it."""
        with self._lock:
            self._file.close()

    def before_fork(self) -> None:
        """Wait until nobody is at work, and let the file go."""
        self._lock.acquire()
        self._file.let_go()

    def after_fork(self, *, in_child: bool) -> None:
        """Go on; in the child nobody else waits."""
        if in_child:
            self._waiting.clear()
        self._lock.release()

    @contextmanager
    def _reading(self) -> Iterator[Work]:
        with self._lock, self._file.reading() as connection:
            yield self._work(connection, self._keys)

    def _work(self, connection: sqlite3.Connection, keys: Keys) -> Work:
        return Work(connection, keys, durability=self._durability, bounds=self._bounds)


class _Turn:
    """What one thread waits for."""

    def __init__(self, charges: Sequence[Charge]) -> None:
        self.charges = charges
        self.is_over = False
        self._receipts: list[Receipt] = []
        self._error: BaseException | None = None

    def end(self, receipts: list[Receipt]) -> None:
        self._receipts = receipts
        self.is_over = True

    def fail(self, error: BaseException) -> None:
        self._error = error
        self.is_over = True

    def result(self) -> list[Receipt]:
        if self._error is None:
            return self._receipts
        if isinstance(self._error, GratisError):
            raise type(self._error)(*self._error.args) from self._error
        raise OutcomeUnknown(f"another thread's turn broke off: {self._error!r}") from self._error


_STORES: weakref.WeakSet[SQLiteStore] = weakref.WeakSet()
_AT_FORK: list[SQLiteStore] = []
_ONE_FORK = Lock()  # threads that fork at once do so one after another


def _before_fork() -> None:
    _ONE_FORK.acquire()
    _AT_FORK.extend(_STORES)
    for store in _AT_FORK:
        store.before_fork()


def _after_fork(*, in_child: bool) -> None:
    for store in _AT_FORK:
        store.after_fork(in_child=in_child)
    _AT_FORK.clear()
    _ONE_FORK.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=partial(_after_fork, in_child=False),
        after_in_child=partial(_after_fork, in_child=True),
    )
