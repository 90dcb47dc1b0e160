"""One machine, durable: a file that several processes and threads may use at once.

Every write is one `BEGIN IMMEDIATE` transaction: it holds the file's write lock before it reads, so no other
writer comes between (an ordinary transaction that reads first loses updates, or fails at once as "locked").
Threads that wait for the lock are served together: whoever gets it applies the charges of all, in one commit.
The rule itself is Python's, called inside the transaction. The schema stands in `sqlite.sql`.
"""

from __future__ import annotations

import os
import sqlite3
import time
import weakref
from collections import deque
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from enum import StrEnum, unique
from importlib.resources import files
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from gratis import clock as system
from gratis.enrollment import change
from gratis.errors import GratisError, NotExecuted, OutcomeUnknown, StoreError
from gratis.lines import (
    decode,
    encode,
    enrollment_line,
    enrollment_of,
    terms_line,
    terms_of,
)
from gratis.model import EPOCH, Change, Decision, Durability, Entry, Kind, Reason, Request, Window
from gratis.rule import Tally, decide
from gratis.stores import BATCH_MAX, Bounds, Receipt, Status, repeat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gratis.model import Enrollment, Terms
    from gratis.offer import Revision
    from gratis.rule import Charge

APPLICATION_ID = 0x67726174  # "grat"
SCHEMA = 1
WAIT_S = 60.0
PAGE = 1_000
TERMS_CACHED_MAX = 10_000
CHECK_WHOLE_BYTES_MAX = 64 << 20
CHECK_ENTRIES = 1_000


@unique
class Synchronous(StrEnum):
    """When a commit waits for the disk, in SQLite's words."""

    FULL = "full"
    NORMAL = "normal"
    OFF = "off"


DURABILITY = {
    Synchronous.FULL: Durability.SYNCED,
    Synchronous.NORMAL: Durability.JOURNALED,
    Synchronous.OFF: Durability.VOLATILE,
}

_FIND_ACCOUNT = "SELECT account FROM accounts WHERE offer = ? AND name = ?"
_FIND_ID = (
    "SELECT a.version, l.entry FROM accounts a LEFT JOIN ledger l ON l.account = a.account AND l.id = ?"
    " WHERE a.account = ?"
)
_FIND_CALENDAR = (
    'SELECT window, start, end, used, seq FROM windows WHERE account = ? AND "group" = ? AND kind = ? AND start = ?'
)
_FIND_ROLLING = (
    'SELECT window, start, end, used, seq FROM windows WHERE account = ? AND "group" = ? AND kind = ?'
    " ORDER BY start DESC LIMIT 1"
)
_ADD_WINDOW = (
    'INSERT INTO windows (account, "group", kind, start, end, used, seq) VALUES (?, ?, ?, ?, ?, ?, ?)'
)
_SET_WINDOW = "UPDATE windows SET used = ?, seq = ? WHERE window = ?"
_ADD_ENTRY = (
    "INSERT INTO ledger (account, id, terms, model, project, input_tokens, output_tokens, cached_tokens, kind, tools,"
    " at, reason, free_tokens, used, total, window, seq, decided_at)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_GET_ENTRIES = (
    "SELECT l.entry, a.name, l.id, l.terms, l.model, l.project, l.input_tokens, l.output_tokens, l.cached_tokens,"
    " l.kind, l.tools, l.at, l.reason, l.free_tokens, l.used, l.total, w.start, w.end, l.seq, l.decided_at"
    " FROM ledger l JOIN accounts a ON a.account = l.account LEFT JOIN windows w ON w.window = l.window WHERE "
)
_CHECK_COUNTERS = (
    "SELECT w.window, w.used, w.seq, l.used, l.seq FROM windows w JOIN"
    " (SELECT window, used, max(seq) AS seq FROM"
    "   (SELECT window, used, seq FROM ledger ORDER BY entry DESC LIMIT ?)"
    "  WHERE window IS NOT NULL GROUP BY window) l ON l.window = w.window"
    " WHERE w.used <> l.used OR w.seq <> l.seq LIMIT 1"
)


class SQLiteStore:
    """A store in one SQLite file."""

    is_instant = False

    def __init__(
        self,
        path: str | Path,
        *,
        clock: Callable[[], datetime] = system.now,
        bounds: Bounds | None = Bounds(),  # noqa: B008 - frozen
        synchronous: Synchronous = Synchronous.FULL,
        wait_s: float = WAIT_S,
    ) -> None:
        self.durability = DURABILITY[synchronous]
        self._path = Path(path)
        self._clock = clock
        self._bounds = bounds
        self._synchronous = synchronous
        self._wait_s = wait_s
        self._lock = Lock()
        self._waiting: deque[_Turn] = deque()
        self._accounts: dict[tuple[str, str], int] = {}
        self._terms: dict[Terms, int] = {}
        self._terms_by_key: dict[int, Terms] = {}
        self._connection: sqlite3.Connection | None = self._open()
        _STORES.add(self)

    def now(self) -> datetime:
        """The store's clock."""
        return self._clock()

    # -- the one verb

    def apply(self, charges: Sequence[Charge], *, dry: bool = False) -> list[Receipt]:
        """Apply each charge once, in order; with `dry`, say what would happen and write nothing."""
        if dry:
            with self._lock, self._reading(self._live()) as connection:
                return _Work(self, connection).run(charges, self._clock(), dry=True)
        turn = _Turn(charges)
        self._waiting.append(turn)
        with self._lock:
            if not turn.is_over:
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
            with self._writing() as connection:
                work = _Work(self, connection)
                receipts = work.run([charge for turn in turns for charge in turn.charges], self._clock(), dry=False)
        except BaseException as error:
            for turn in turns:
                turn.fail(error)
            if not isinstance(error, GratisError):
                raise
            return
        place = 0
        for turn in turns:
            turn.end(receipts[place : place + len(turn.charges)])
            place += len(turn.charges)

    # -- enrollment

    def enroll(
        self, offer: str, account: str, enrollment: Enrollment, *, actor: str, revision: Revision | None
    ) -> Change:
        """Change an account's enrollment."""
        with self._lock, self._writing() as connection:
            key = _Work(self, connection).account(offer, account, create=True)
            history = self._history(connection, key)
            made = change(history, enrollment, actor=actor, at=self._clock(), revision=revision)
            connection.execute(
                "INSERT INTO enrollments VALUES (?, ?, ?, ?, ?)",
                (key, made.version, _micros(made.at), actor, encode(enrollment_line(made.enrollment)).decode()),
            )
            connection.execute("UPDATE accounts SET version = ? WHERE account = ?", (made.version, key))
            return made

    def enrollments(self, offer: str, account: str) -> list[Change]:
        """Every change of an account's enrollment, oldest first."""
        with self._lock, self._reading(self._live()) as connection:
            key = _Work(self, connection).account(offer, account, create=False)
            return [] if key is None else self._history(connection, key)

    @staticmethod
    def _history(connection: sqlite3.Connection, key: int | None) -> list[Change]:
        rows = connection.execute(
            "SELECT version, at, actor, enrollment FROM enrollments WHERE account = ? ORDER BY version", (key,)
        )
        return [Change(version, _instant(at), actor, enrollment_of(decode(body))) for version, at, actor, body in rows]

    # -- reading

    def tallies(self, offer: str, account: str, *, at: datetime | None = None) -> list[tuple[str, str, Tally]]:
        """Group, kind of window and tally of each window of an account, or of those open at an instant."""
        with self._lock, self._reading(self._live()) as connection:
            rows = connection.execute(
                'SELECT "group", w.kind, start, end, used, seq FROM windows w JOIN accounts a ON a.account = w.account'
                " WHERE a.offer = ? AND a.name = ? AND (? IS NULL OR (start <= ? AND ? < end))"
                ' ORDER BY "group", w.kind, start',
                (offer, account, *[None if at is None else _micros(at)] * 3),
            )
            return [
                (group, kind, Tally(Window(_instant(start), _instant(end)), used, seq))
                for group, kind, start, end, used, seq in rows
            ]

    def accounts(self) -> list[tuple[str, str]]:
        """Offer and name of each account that the store knows."""
        with self._lock, self._reading(self._live()) as connection:
            return list(connection.execute("SELECT offer, name FROM accounts ORDER BY account"))

    def entries(self, *, after: int = 0, upto: int | None = None) -> Iterator[Entry]:
        """The ledger from behind an entry on, in order; each page is one short read, so that nobody waits."""
        connection = self._connect()
        try:
            while True:
                with self._reading(connection):
                    rows = connection.execute(
                        _GET_ENTRIES + "l.entry > ? AND l.entry <= ? ORDER BY l.entry LIMIT ?",
                        (after, (1 << 62) if upto is None else upto, PAGE),
                    ).fetchall()
                    page = [self._entry(connection, row) for row in rows]
                if not page:
                    return
                yield from page
                after = page[-1].entry
        finally:
            connection.close()

    def close(self) -> None:
        """Close the file; what was acknowledged is in it."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    # -- the file

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=self._wait_s, isolation_level=None, check_same_thread=False, cached_statements=64
        )
        connection.execute(f"PRAGMA synchronous = {self._synchronous.value}")
        return connection

    def _open(self) -> sqlite3.Connection:
        folder = self._path.parent
        if not folder.is_dir():
            raise StoreError(
                f"{self._path}: there is no folder {str(folder)!r}; sqlite:///NAME is relative to the working folder,"
                " sqlite:////FOLDER/NAME is absolute"
            )
        try:
            connection = self._connect()
        except sqlite3.Error as error:
            raise StoreError(f"{self._path}: cannot be opened: {error}") from error
        try:
            self._prepare(connection)
        except sqlite3.Error as error:
            connection.close()
            raise StoreError(f"{self._path}: cannot be used: {error}") from error
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Create the schema in an empty file; refuse what is foreign, newer, or damaged."""
        deadline = time.monotonic() + self._wait_s
        while True:  # switching to WAL does not wait for other processes that open the file at this moment
            try:
                (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.005)
        if mode != "wal":
            raise StoreError(f"{self._path}: no write-ahead log on this file system (journal mode is {mode!r})")
        connection.execute("BEGIN IMMEDIATE")
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (schema,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables == 0 and application == 0:
            for statement in _statements((files("gratis.stores") / "sqlite.sql").read_text(encoding="utf-8")):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA}")
        elif application != APPLICATION_ID:
            connection.execute("ROLLBACK")
            raise StoreError(f"{self._path}: a SQLite file of another program; expected a Gratis store or a new file")
        elif schema > SCHEMA:
            connection.execute("ROLLBACK")
            raise StoreError(
                f"{self._path}: written by a newer Gratis (schema {schema}; this one knows up to {SCHEMA}): upgrade Gratis"
            )
        connection.execute("COMMIT")
        self._check(connection)

    def _check(self, connection: sqlite3.Connection) -> None:
        """Refuse a file that is damaged, or whose counters do not follow from its ledger."""
        if self._path.stat().st_size <= CHECK_WHOLE_BYTES_MAX:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise StoreError(f"{self._path}: damaged: {found}; restore it, or rebuild it from a ledger")
        row = connection.execute(_CHECK_COUNTERS, (CHECK_ENTRIES,)).fetchone()
        if row is not None:
            window, used, seq, ledger_used, ledger_seq = row
            raise StoreError(
                f"{self._path}: window {window} is in doubt: its counter says used {used} at seq {seq}, its ledger"
                f" used {ledger_used} at seq {ledger_seq}; nothing is decided until that is repaired (`gratis audit`)"
            )

    # -- transactions

    def _live(self) -> sqlite3.Connection:
        if self._connection is None:
            raise StoreError(f"{self._path}: this store is closed")
        return self._connection

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction that holds the write lock from its first statement to its commit."""
        connection = self._live()
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise NotExecuted(f"{self._path}: no write lock within {self._wait_s:g} s: {error}") from error
        try:
            yield connection
        except BaseException as error:
            self._roll_back(connection)
            if isinstance(error, sqlite3.Error):
                raise NotExecuted(f"{self._path}: {error}; nothing was written") from error
            raise
        try:
            connection.execute("COMMIT")
        except BaseException as error:
            undone = connection.in_transaction
            self._roll_back(connection)
            if undone:
                raise NotExecuted(f"{self._path}: the commit failed: {error}; nothing was written") from error
            raise OutcomeUnknown(f"{self._path}: the commit broke off: {error}; ask again with the same ids") from error

    @contextmanager
    def _reading(self, connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
        """One consistent view of the file."""
        try:
            connection.execute("BEGIN")
        except sqlite3.Error as error:
            raise StoreError(f"{self._path}: {error}") from error
        try:
            yield connection
        except sqlite3.Error as error:
            raise StoreError(f"{self._path}: {error}") from error
        finally:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        self._accounts.clear()
        self._terms.clear()
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")

    # -- rows

    def _entry(self, connection: sqlite3.Connection, row: tuple[Any, ...]) -> Entry:
        (
            entry, name, request_id, terms, model, project, input_tokens, output_tokens, cached_tokens,
            kind, tools, at, reason, free_tokens, used, total, start, end, seq, decided_at,
        ) = row  # fmt: skip
        request = Request(
            id=request_id,
            model=model,
            at=_instant(at),
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            account=name,
            project=project,
            kind=Kind(kind),
            tools=() if tools is None else tuple(decode(tools)),
            cached_tokens=cached_tokens,
        )
        window = None if seq is None else Window(_instant(start), _instant(end))
        decision = Decision(
            request,
            self._terms_of(connection, terms),
            Reason(reason),
            free_tokens,
            used,
            total,
            window,
            seq,
            self.durability,
        )
        return Entry(entry, _instant(decided_at), decision)

    def _terms_of(self, connection: sqlite3.Connection, key: int) -> Terms:
        known = self._terms_by_key.get(key)
        if known is None:
            (facts,) = connection.execute("SELECT facts FROM terms WHERE terms = ?", (key,)).fetchone()
            line = decode(facts)
            known = terms_of(line, enrollment=line["enrollment"])
            if len(self._terms_by_key) >= TERMS_CACHED_MAX:
                self._terms_by_key.clear()
            self._terms_by_key[key] = known
        return known


class _Work:
    """One transaction's work: what it read is read once, what it changed is written at the end."""

    def __init__(self, store: SQLiteStore, connection: sqlite3.Connection) -> None:
        self._store = store
        self._connection = connection
        self._tallies: dict[tuple[Any, ...], tuple[int | None, Tally | None]] = {}
        self._changed: dict[int, Tally] = {}
        self._decided: dict[tuple[int | None, str], Decision] = {}
        self._rows: list[tuple[Any, ...]] = []

    def run(self, charges: Sequence[Charge], now: datetime, *, dry: bool) -> list[Receipt]:
        """Apply each charge, in order."""
        receipts = [self._apply(charge, now, dry=dry) for charge in charges]
        if self._rows:
            self._connection.executemany(_ADD_ENTRY, self._rows)
            self._connection.executemany(
                _SET_WINDOW, [(tally.used, tally.seq, window) for window, tally in self._changed.items()]
            )
        return receipts

    def _apply(self, charge: Charge, now: datetime, *, dry: bool) -> Receipt:
        request, terms = charge.request, charge.terms
        account = self.account(terms.offer, request.account, create=not dry)
        first = self._decided.get((account, request.id))
        if first is not None:
            return repeat(request, first)
        version = 0
        if account is not None:
            version, entry = self._connection.execute(_FIND_ID, (request.id, account)).fetchone()
            if entry is not None:
                row = self._connection.execute(_GET_ENTRIES + "l.entry = ?", (entry,)).fetchone()
                return repeat(request, self._store._entry(self._connection, row).decision)  # noqa: SLF001 - one module
        bounds = self._store._bounds  # noqa: SLF001
        if bounds is not None and request.at > now + bounds.ahead:
            return Receipt(Status.AHEAD, now=now)
        if version != charge.version:
            history = self._store._history(self._connection, account)  # noqa: SLF001
            return Receipt(Status.OUTDATED, change=history[-1] if history else None)

        key = (account, terms.group, terms.window, None if charge.rolls or charge.window is None else charge.window.start)
        window, tally = (None, None) if charge.window is None else self._tally(key)
        kept_since = None if bounds is None else now - bounds.keep
        decision, after = decide(charge, tally, kept_since=kept_since, durability=self._store.durability)
        if dry:
            return Receipt(Status.DECIDED, decision)

        if after is None:
            window = None
        else:
            if window is None or (tally is not None and tally.window != after.window):
                window = self._add_window(account, terms, after)
            else:
                self._changed[window] = after
            self._tallies[key] = (window, after)
        self._decided[account, request.id] = decision
        self._rows.append(
            (
                account, request.id, self._terms_key(terms), request.model, request.project, request.input_tokens,
                request.output_tokens, request.cached_tokens, request.kind.value,
                encode(request.tools).decode() if request.tools else None, _micros(request.at), decision.reason.value,
                decision.free_tokens, decision.used, decision.total, window, decision.seq, _micros(now),
            )  # fmt: skip
        )
        return Receipt(Status.DECIDED, decision)

    def account(self, offer: str, name: str, *, create: bool) -> int | None:
        """The account's key in the file."""
        key = self._store._accounts.get((offer, name))  # noqa: SLF001
        if key is None:
            row = self._connection.execute(_FIND_ACCOUNT, (offer, name)).fetchone()
            if row is not None:
                (key,) = row
            elif create:
                key = self._connection.execute("INSERT INTO accounts (offer, name) VALUES (?, ?)", (offer, name)).lastrowid
            else:
                return None
            assert key is not None, "an insert has a row id"
            self._store._accounts[offer, name] = key  # noqa: SLF001
        return key

    def _tally(self, key: tuple[Any, ...]) -> tuple[int | None, Tally | None]:
        if key not in self._tallies:
            find = _FIND_ROLLING if key[3] is None else _FIND_CALENDAR
            row = self._connection.execute(find, key[:3] if key[3] is None else (*key[:3], _micros(key[3]))).fetchone()
            if row is None:
                return None, None
            window, start, end, used, seq = row
            self._tallies[key] = (window, Tally(Window(_instant(start), _instant(end)), used, seq))
        return self._tallies[key]

    def _add_window(self, account: int | None, terms: Terms, tally: Tally) -> int:
        start, end = _micros(tally.window.start), _micros(tally.window.end)
        row = (account, terms.group, terms.window, start, end, tally.used, tally.seq)
        key = self._connection.execute(_ADD_WINDOW, row).lastrowid
        assert key is not None, "an insert has a row id"
        return key

    def _terms_key(self, terms: Terms) -> int:
        known = self._store._terms  # noqa: SLF001
        key = known.get(terms)
        if key is None:
            enrollment = None if terms.enrollment is None else enrollment_line(terms.enrollment)
            facts = encode({**terms_line(terms), "enrollment": enrollment}).decode()
            self._connection.execute("INSERT INTO terms (facts) VALUES (?) ON CONFLICT DO NOTHING", (facts,))
            (key,) = self._connection.execute("SELECT terms FROM terms WHERE facts = ?", (facts,)).fetchone()
            if len(known) >= TERMS_CACHED_MAX:
                known.clear()
            known[terms] = key
        return key


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


def _statements(script: str) -> Iterator[str]:
    """The statements of a script, one by one, so that all run in the caller's transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _micros(instant: datetime) -> int:
    since = instant - EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def _instant(micros: int) -> datetime:
    return EPOCH + timedelta(microseconds=micros)


_STORES: weakref.WeakSet[SQLiteStore] = weakref.WeakSet()
_LEFT_BEHIND: list[sqlite3.Connection] = []


def _after_fork() -> None:
    """A connection must not cross a fork: the child opens its own, and never closes its parent's."""
    for store in list(_STORES):
        store._lock = Lock()  # noqa: SLF001
        store._waiting.clear()  # noqa: SLF001
        if store._connection is not None:  # noqa: SLF001
            _LEFT_BEHIND.append(store._connection)  # noqa: SLF001
            store._connection = store._connect()  # noqa: SLF001


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
