"""The file of a SQLite store: opened, checked, and changed in transactions.

Every write is one `BEGIN IMMEDIATE` transaction: it holds the file's write lock before it reads, so no other
writer comes between (an ordinary transaction that reads first loses updates, or fails at once as "locked").
What SQLite says of a failure is put into our words here, and nowhere else.
"""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import contextmanager, suppress
from enum import StrEnum, unique
from importlib.resources import files
from typing import TYPE_CHECKING

from gratis.errors import NotExecuted, OutcomeUnknown, StoreError, UnreadableState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

APPLICATION_ID = 0x67726174  # "grat"
SCHEMA = 3
SCRIPTS = {1: "schema.sql", 2: "schema_2.sql", 3: "schema_3.sql"}  # what makes each schema of the one before
SWITCH_PAUSE_S = 0.005
CHECK_WHOLE_BYTES_MAX = 64 << 20
CHECK_ENTRIES = 1_000
SEALED = "nothing is decided until that is repaired (`gratis audit`)"

_CHECK_COUNTERS = (
    "SELECT l.window, w.used, w.seq, l.used, l.seq FROM"
    " (SELECT window, used, max(seq) AS seq FROM"
    "   (SELECT window, used, seq FROM ledger WHERE window IS NOT NULL ORDER BY entry DESC LIMIT ?)"
    "  GROUP BY window) l"
    " LEFT JOIN windows w ON w.window = l.window WHERE w.used IS NOT l.used OR w.seq IS NOT l.seq LIMIT 1"
)
_CHECK_WINDOWS = (
    "SELECT window, used, seq, NULL, NULL FROM windows"
    " WHERE window NOT IN (SELECT window FROM ledger WHERE window IS NOT NULL) LIMIT 1"
)
_CHECK_ENTRIES = "SELECT count(*), coalesce(max(entry), 0) FROM ledger"

# What decoding a row that nobody of ours wrote may raise.
UNREADABLE = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)


@unique
class Synchronous(StrEnum):
    """When a commit waits for the disk, in SQLite's words."""

    FULL = "full"
    NORMAL = "normal"
    OFF = "off"


class File:
    """One process's hold on the file, by one connection.

    `forget` is called when a transaction is rolled back: what was remembered of it never came to be.
    """

    def __init__(
        self, path: Path, *, synchronous: Synchronous, wait_s: float, is_checked: bool, forget: Callable[[], None]
    ) -> None:
        self.path = path
        self._place = path.absolute()  # where it is, wherever the process goes
        self._synchronous = synchronous
        self._wait_s = wait_s
        self._is_checked = is_checked
        self._forget = forget
        self._is_closed = False
        self._is_frozen = False
        self._file_id: tuple[int, int] | None = None
        self._connection: sqlite3.Connection | None = self._open()

    def connection(self) -> sqlite3.Connection:
        """The one connection of this process; a closed file has none."""
        if self._connection is None:
            if self._is_closed:
                raise StoreError(f"{self.path}: this store is closed")
            if self._identity() is not None:
                self._connection = self._connect()
        if self._identity() != self._file_id:
            raise StoreError(f"{self.path}: moved, replaced or deleted since it was opened; nothing was written")
        assert self._connection is not None, "a file that is there is open"
        return self._connection

    def _identity(self) -> tuple[int, int] | None:
        """Which file is there; what is written to one that nobody can open any more would be lost."""
        try:
            found = os.stat(self._place)  # noqa: PTH116 - in each transaction, and half the time
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def settle(self) -> None:
        """Undo what an interrupt left open: it can strike where no handler of ours is in force."""
        if self._connection is not None and self._connection.in_transaction and not self._is_frozen:
            self._roll_back(self._connection)

    def let_go(self) -> None:
        """Have no connection until one is needed again.

        A fork must find none: SQLite keeps its file locks by process, so a child that opened the file beside an
        inherited connection would hold no lock at all, and whoever closed next would delete the log under it.
        """
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def close(self) -> None:
        """Close the file; what was acknowledged is in it."""
        self._is_closed = True
        self.let_go()

    def __del__(self) -> None:
        """A store that nobody has any more gives its file back."""
        if getattr(self, "_connection", None) is not None:
            self.let_go()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._place, timeout=self._wait_s, isolation_level=None, check_same_thread=False, cached_statements=64
        )
        try:
            connection.execute(f"PRAGMA synchronous = {self._synchronous.value}")
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction that holds the write lock from its first statement to its commit."""
        connection = self.connection()
        self.settle()
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise NotExecuted(f"{self.path}: no write lock within {self._wait_s:g} s: {error}") from error
        except BaseException:
            self._roll_back(connection)
            raise
        try:
            yield connection
        except BaseException as error:
            self._roll_back(connection)
            if isinstance(error, sqlite3.Error):
                raise NotExecuted(f"{self.path}: {error}; nothing was written") from error
            if isinstance(error, UNREADABLE):
                raise StoreError(f"{self.path}: holds what cannot be read: {error!r}; nothing was written") from error
            raise
        try:
            connection.execute("COMMIT")
        except BaseException as error:
            undone = connection.in_transaction
            self._roll_back(connection)
            if undone:
                raise NotExecuted(f"{self.path}: the commit failed: {error}; nothing was written") from error
            raise OutcomeUnknown(f"{self.path}: the commit broke off: {error}; ask again with the same ids") from error

    @contextmanager
    def reading(self, fresh: sqlite3.Connection | None = None) -> Iterator[sqlite3.Connection]:
        """One consistent view of the file; inside a frozen one, that."""
        connection = self.connection() if fresh is None else fresh
        try:
            if self._is_frozen:
                yield connection
                return
            if fresh is None:
                self.settle()
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: {error}") from error
        except UNREADABLE as error:
            raise UnreadableState(f"{self.path}: holds what cannot be read: {error!r}") from error

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """All that is read meanwhile is read as of one moment."""
        with self.reading() as connection:
            connection.execute("SELECT count(*) FROM accounts").fetchone()  # the view begins with the first look
            self._is_frozen = True
            try:
                yield
            finally:
                self._is_frozen = False

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        self._forget()
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")

    def _open(self) -> sqlite3.Connection:
        folder = self.path.parent
        if not folder.is_dir():
            raise StoreError(
                f"{self.path}: there is no folder {str(folder)!r}; sqlite:///NAME is relative to the working folder,"
                " sqlite:////FOLDER/NAME is absolute"
            )
        try:
            connection = self._connect()
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: cannot be opened: {error}") from error
        try:
            self._prepare(connection)
        except sqlite3.Error as error:
            connection.close()
            raise StoreError(f"{self.path}: cannot be used: {error}") from error
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Create the schema in an empty file, add to an older one; refuse what is foreign, newer, or damaged."""
        with self.reading(connection):  # one view: another process may be creating the schema at this moment
            schema = self._recognize(connection)
        mode = self._use_wal(connection)
        if mode != "wal":
            raise StoreError(f"{self.path}: no write-ahead log on this file system (journal mode is {mode!r})")
        if schema < SCHEMA:
            connection.execute("BEGIN IMMEDIATE")
            for number in range(self._recognize(connection) + 1, SCHEMA + 1):  # unless somebody was faster
                script = (files("gratis.stores.sqlite") / SCRIPTS[number]).read_text(encoding="utf-8")
                for statement in _statements(script):
                    connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA}")
            connection.execute("COMMIT")
        self._file_id = self._identity()
        if self._is_checked:
            self._check(connection)

    def _recognize(self, connection: sqlite3.Connection) -> int:
        """The schema of the file: 0 if it is empty; if not, it must be a store of a schema that is known."""
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (schema,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables == 0 and application == 0:
            return 0
        if application != APPLICATION_ID:
            raise StoreError(f"{self.path}: a SQLite file of another program; expected a Gratis store or a new file")
        if schema > SCHEMA:
            raise StoreError(
                f"{self.path}: written by a newer Gratis (schema {schema}, this one knows {SCHEMA}): upgrade Gratis"
            )
        return int(schema)

    def _use_wal(self, connection: sqlite3.Connection) -> object:
        """Switch to the write-ahead log; unlike a transaction, the switch does not wait for others by itself."""
        deadline = time.monotonic() + self._wait_s
        while True:
            try:
                return connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(SWITCH_PAUSE_S)

    def _check(self, connection: sqlite3.Connection) -> None:
        """Refuse a file that is damaged, or whose counters do not follow from its ledger.

        A large file is checked by its latest entries only; an audit reads it whole.
        """
        is_whole = self._place.stat().st_size <= CHECK_WHOLE_BYTES_MAX
        if is_whole:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise StoreError(f"{self.path}: damaged: {found}; restore it, or rebuild it from a ledger")
            count, last = connection.execute(_CHECK_ENTRIES).fetchone()
            if count != last:
                raise StoreError(
                    f"{self.path}: its ledger is in doubt: {count} entries, the last one is number {last}; {SEALED}"
                )
        row = connection.execute(_CHECK_COUNTERS, (-1 if is_whole else CHECK_ENTRIES,)).fetchone()
        if row is None and is_whole:
            row = connection.execute(_CHECK_WINDOWS).fetchone()
        if row is not None:
            window, used, seq, ledger_used, ledger_seq = row
            raise StoreError(
                f"{self.path}: window {window} is in doubt: its counter says used {used} at seq {seq}, its ledger"
                f" used {ledger_used} at seq {ledger_seq}; {SEALED}"
            )


def _statements(script: str) -> Iterator[str]:
    """The statements of a script, one by one, so that all run in the caller's transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
