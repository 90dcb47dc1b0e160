"""The SQLite store: what it refuses to open, what it refuses to write, and what it says when SQLite fails it."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest

from gratis import (
    Conflict,
    Decision,
    Enrollment,
    EnrollmentError,
    Meter,
    NotExecuted,
    OutcomeUnknown,
    Request,
    RequestError,
    StoreError,
    Usage,
)
from gratis.model import Durability, Held
from gratis.offers import load
from gratis.stores.sqlite import SQLiteStore, Synchronous
from gratis.stores.sqlite.file import APPLICATION_ID
from gratis.stores.sqlite.store import _Turn
from gratis.stores.urls import open_store

from .test_cli import gratis

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NOW = datetime(2025, 4, 20, 12, tzinfo=UTC)
LARGE = "gpt-4o-2024-08-06"
OFFER = load("openai-data-sharing")
ENROLLED = Enrollment(tier=3, sharing="enabled")
PAGE_BYTES = 4096
TRIGGERS = (
    "ledger_keeps_what_it_says",
    "ledger_keeps_what_it_holds",
    "enrollments_keep_what_they_say",
    "enrollments_keep_what_they_hold",
)


def meter_of(store: SQLiteStore) -> Meter:
    """A meter over a store."""
    return Meter(store, OFFER, assume=ENROLLED)


def opened(path: Path, **options: Any) -> SQLiteStore:
    """A store whose clock stands still; it waits for nothing unless it is told to."""
    return SQLiteStore(path, **{"clock": lambda: NOW, "wait_s": 0, "synchronous": Synchronous.OFF, **options})


def request(name: object, tokens: int | None = 10, **fields: Any) -> Request:
    """A request of noon."""
    return Request(
        **{"id": f"r{name}", "model": LARGE, "at": NOW, "input_tokens": tokens, "output_tokens": 0, **fields}
    )


def dump(path: Path) -> list[str]:
    """All that a file holds, as SQL."""
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


def change(path: Path, *statements: str) -> None:
    """Write behind the back of Gratis, without its triggers."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for trigger in TRIGGERS:
            connection.execute(f"DROP TRIGGER IF EXISTS {trigger}")
        for statement in statements:
            connection.execute(statement)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a store is to be."""
    return tmp_path / "gratis.db"


@pytest.fixture
def store(path: Path) -> Iterator[SQLiteStore]:
    """An open store."""
    with closing(opened(path)) as store:
        yield store


@pytest.fixture
def meter(store: SQLiteStore) -> Meter:
    """A meter over the open store."""
    return meter_of(store)


# --- What is refused when a file is opened --------------------------------------------------------


def _used(path: Path) -> None:
    """A store with eight decisions of two accounts, two windows each, and an enrollment."""
    with closing(opened(path)) as store:
        meter = meter_of(store)
        meter.enroll("acme", ENROLLED, actor="ann")
        for number in range(8):
            at = NOW - timedelta(days=number // 4)
            meter.decide(request(number, at=at, account=("default", "acme")[number % 2]))


def _newer(path: Path) -> None:
    _used(path)
    change(path, "PRAGMA user_version = 4")


def test_a_file_of_schema_1_gains_what_later_ones_have(path: Path) -> None:
    """A store that was made before there were holds keeps all it holds, and holds, corrects and claims from then on."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.executescript((files("gratis.stores.sqlite") / "schema.sql").read_text(encoding="utf-8"))
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute("PRAGMA user_version = 1")
        connection.execute("INSERT INTO accounts (offer, name) VALUES ('openai-data-sharing', 'old')")
    with closing(opened(path)) as store, closing(opened(path)) as other:
        meter = meter_of(store)
        assert meter.accounts() == ["old"]
        hold = meter.hold(request(1, None), 500)
        assert [one.held for one in meter_of(other).standing()][:1] == [500]
        meter.settle(hold, Usage(input_tokens=40, output_tokens=2))
        assert [(entry.decision.used, entry.decision.hold) for entry in meter_of(other).ledger()] == [
            (42, Held(500, hold.window))
        ]
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (3,)


def test_many_may_upgrade_one_file(path: Path) -> None:
    """Whoever opens an older file first adds what is new; the others find it, and all of them decide."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.executescript((files("gratis.stores.sqlite") / "schema.sql").read_text(encoding="utf-8"))
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute("PRAGMA user_version = 1")

    def hold_and_settle(number: int) -> int | None:
        with closing(opened(path, wait_s=60)) as store:
            meter = meter_of(store)
            return meter.settle(meter.hold(request(number, None), 100), Usage(input_tokens=10, output_tokens=0)).used

    with ThreadPoolExecutor(8) as threads:
        assert sorted(threads.map(hold_and_settle, range(8))) == [10, 20, 30, 40, 50, 60, 70, 80]


def test_what_holds_set_aside_is_summed_up_by_the_file(path: Path) -> None:
    """Whatever is held, settled, released: the sums are of what is left; and of a hold only its end may change."""
    with closing(opened(path)) as store:
        meter = meter_of(store)
        holds = [meter.hold(request(number, None), 10 * number) for number in range(1, 6)]
        meter.settle(holds[0], Usage(input_tokens=1, output_tokens=0))
        meter.release(holds[1])
        meter.extend(holds[2], for_=timedelta(hours=1))
        assert [row.held for row in meter.standing()][:1] == [30 + 40 + 50]
        for each in holds[2:]:
            meter.release(each)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT (SELECT count(*) FROM holds), (SELECT count(*) FROM held)").fetchone() == (
            0,
            0,
        )
    with closing(opened(path)) as store:
        meter_of(store).hold(request(9, None), 10)
    with closing(sqlite3.connect(path)) as connection, pytest.raises(sqlite3.IntegrityError, match="only its end"):
        connection.execute("UPDATE holds SET aside = 0")


def _foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE notes (text)")
        connection.execute("INSERT INTO notes VALUES ('not ours')")
        connection.commit()


def _foreign_but_empty(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA application_id = 7")
        connection.execute("VACUUM")


def _text(path: Path) -> None:
    path.write_text("not a database\n", encoding="utf-8")


def _long_text(path: Path) -> None:
    path.write_text("not a database\n" * 1000, encoding="utf-8")


def _zeros(path: Path) -> None:
    path.write_bytes(bytes(PAGE_BYTES * 4))


def _halved(path: Path) -> None:
    _used(path)
    os.truncate(path, path.stat().st_size // 2)


def _short_of_a_page(path: Path) -> None:
    _used(path)
    os.truncate(path, path.stat().st_size - PAGE_BYTES)


def _folder(path: Path) -> None:
    path.mkdir()


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes; but for the two that SQLite keeps beside a file while it is open."""
    files = [each for each in folder.rglob("*") if not each.name.endswith(("-wal", "-shm"))]
    return {str(each): each.read_bytes() if each.is_file() else None for each in files}


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (_newer, "written by a newer Gratis (schema 4, this one knows 3): upgrade Gratis"),
        (_foreign, "a SQLite file of another program; expected a Gratis store or a new file"),
        (_foreign_but_empty, "a SQLite file of another program; expected a Gratis store or a new file"),
        (_text, "file is not a database"),
        (_long_text, "file is not a database"),
        (_zeros, "file is not a database"),
        (_halved, "malformed"),
        (_short_of_a_page, "malformed"),
        (_folder, "unable to open database file"),
    ],
)
def test_what_is_no_store_of_ours_is_refused_and_left_as_it_was(
    path: Path, prepare: Callable[[Path], None], message: str
) -> None:
    """Opening says what is wrong with the file, and changes no byte of it nor of its folder."""
    prepare(path)
    before = listing(path.parent)
    with pytest.raises(StoreError) as refused:
        opened(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert message in str(refused.value)
    assert listing(path.parent) == before


def test_a_missing_folder_is_told_and_not_made(tmp_path: Path) -> None:
    """A store is not put where there is no folder; the message says how a URL names one."""
    with pytest.raises(StoreError) as refused:
        opened(tmp_path / "nowhere" / "gratis.db")
    assert str(refused.value) == (
        f"{tmp_path}/nowhere/gratis.db: there is no folder '{tmp_path}/nowhere';"
        " sqlite:///NAME is relative to the working folder, sqlite:////FOLDER/NAME is absolute"
    )
    assert list(tmp_path.iterdir()) == []


def test_damage_to_any_page_is_noticed_when_the_file_is_opened(path: Path) -> None:
    """Whichever page of the file is overwritten, it is refused; restored, it opens."""
    with closing(opened(path)) as store:
        meter_of(store).decide_many([request(number, project=f"p{number}") for number in range(200)])
    good = path.read_bytes()
    assert len(good) > 10 * PAGE_BYTES
    for start in range(0, len(good), PAGE_BYTES):
        path.write_bytes(good[:start] + b"\xff" * PAGE_BYTES + good[start + PAGE_BYTES :])
        with pytest.raises(StoreError):
            opened(path)
    path.write_bytes(good)
    opened(path).close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE windows SET used = 0",
        "UPDATE windows SET used = used - 1 WHERE window = 1",
        "UPDATE windows SET used = used + 1 WHERE window = 1",
        "UPDATE windows SET seq = seq + 1 WHERE window = 2",
        "UPDATE windows SET seq = seq - 1 WHERE window = 2",
        "DELETE FROM windows WHERE window = 1",
        "DELETE FROM windows",
        "DELETE FROM ledger WHERE entry = 8",
        "DELETE FROM ledger WHERE entry > 4",
        "DELETE FROM ledger",
    ],
)
def test_counters_that_do_not_follow_from_the_ledger_seal_the_file(path: Path, statement: str) -> None:
    """State that shrank or vanished is not decided upon; the audit still opens the file and names what differs."""
    _used(path)
    change(path, statement)
    with pytest.raises(StoreError, match="in doubt"):
        opened(path)
    audit = gratis("audit", "--store", f"sqlite:///{path}")
    assert {each["kind"] for each in audit.lines} >= {"counter_differs"}
    assert audit.code == 1


def test_a_repaired_file_opens_again(path: Path) -> None:
    """A seal lasts until the counters follow from the ledger again."""
    _used(path)
    change(path, "UPDATE windows SET used = used - 1 WHERE window = 1")
    with pytest.raises(StoreError, match="window 1 is in doubt: its counter says used 19 at seq 2, its ledger used 20"):
        opened(path)
    change(path, "UPDATE windows SET used = used + 1 WHERE window = 1")
    with closing(opened(path)) as store:
        assert meter_of(store).decide(request("next")).total == 30


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE ledger SET kind = 'nonsense'",
        "UPDATE ledger SET reason = 'nonsense'",
        "UPDATE ledger SET tools = '['",
        "UPDATE ledger SET at = 1 << 62",
        "UPDATE terms SET facts = json_object('terms', terms)",
        "UPDATE terms SET facts = 'nonsense ' || terms",
        "DELETE FROM terms",
        "DELETE FROM windows",
    ],
)
def test_a_row_that_cannot_be_read_is_a_store_error_and_changes_nothing(path: Path, statement: str) -> None:
    """A repeat whose first decision cannot be read is neither free nor decided anew: the store says so."""
    _used(path)
    store = opened(path, is_checked=False)
    change(path, statement)
    before = dump(path)
    with closing(store), pytest.raises(StoreError):
        meter_of(store).decide(request(0))
    assert dump(path) == before


def test_an_enrollment_that_cannot_be_read_is_a_store_error(path: Path) -> None:
    """Nothing is decided on an enrollment that cannot be read."""
    _used(path)
    change(path, "UPDATE enrollments SET enrollment = '[]'")
    with closing(opened(path)) as store:
        for ask in (
            lambda: meter_of(store).decide(request("next", account="acme")),
            lambda: meter_of(store).enrollments("acme"),
        ):
            with pytest.raises(StoreError):
                ask()


# --- What the file itself refuses -----------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE ledger SET free_tokens = 0",
        "UPDATE ledger SET id = 'other' WHERE entry = 1",
        "DELETE FROM ledger",
        "DELETE FROM ledger WHERE entry = 8",
        "REPLACE INTO ledger SELECT * FROM ledger WHERE entry = 1",
        "UPDATE enrollments SET actor = 'eve'",
        "DELETE FROM enrollments",
        "REPLACE INTO enrollments SELECT * FROM enrollments",
    ],
)
def test_the_ledger_and_the_history_are_append_only(path: Path, statement: str) -> None:
    """What was decided, and who enrolled whom, can be added to and not changed."""
    _used(path)
    before = dump(path)
    with closing(sqlite3.connect(path)) as connection, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(statement)
    assert dump(path) == before


GOOD_WINDOW: dict[str, Any] = {
    "account": 1,
    "group": "1M",
    "kind": "day UTC",
    "start": 0,
    "end": 86_400_000_000,
    "used": 0,
    "seq": 1,
}
GOOD_ENTRY: dict[str, Any] = {
    "account": 1,
    "id": "new",
    "terms": 1,
    "model": LARGE,
    "input_tokens": 10,
    "output_tokens": 5,
    "cached_tokens": 0,
    "kind": "completion",
    "at": 0,
    "reason": "within_allowance",
    "free_tokens": 15,
    "used": 15,
    "total": 15,
    "window": 1,
    "seq": 9,
    "decided_at": 0,
}


def insert(path: Path, table: str, row: dict[str, Any]) -> None:
    """Add a row by hand."""
    names, marks = ", ".join(f'"{name}"' for name in row), ", ".join("?" * len(row))
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", list(row.values()))  # noqa: S608 - ours


def test_rows_that_follow_the_rule_are_taken(path: Path) -> None:
    """The rows that the next tests spoil are good."""
    _used(path)
    insert(path, "windows", GOOD_WINDOW)
    insert(path, "ledger", GOOD_ENTRY)


@pytest.mark.parametrize(
    ("table", "spoiled"),
    [
        ("windows", {"used": -1}),
        ("windows", {"used": None}),
        ("windows", {"used": "many"}),
        ("windows", {"used": 1.5}),
        ("windows", {"seq": 0}),
        ("windows", {"seq": 1.5}),
        ("windows", {"end": 0}),
        ("ledger", {"account": None}),
        ("ledger", {"id": "r1"}),
        ("ledger", {"id": None}),
        ("ledger", {"input_tokens": -1}),
        ("ledger", {"input_tokens": 10**12 + 1}),
        ("ledger", {"input_tokens": 10.5}),
        ("ledger", {"input_tokens": "many"}),
        ("ledger", {"output_tokens": -1}),
        ("ledger", {"output_tokens": 10**12 + 1}),
        ("ledger", {"output_tokens": 5.5}),
        ("ledger", {"cached_tokens": -1}),
        ("ledger", {"cached_tokens": None}),
        ("ledger", {"free_tokens": -1}),
        ("ledger", {"free_tokens": 16}),
        ("ledger", {"free_tokens": 0.5}),
        ("ledger", {"used": -1}),
        ("ledger", {"used": 15.5}),
        ("ledger", {"used": None}),
        ("ledger", {"total": -1}),
        ("ledger", {"total": 15.5}),
        ("ledger", {"seq": 0}),
        ("ledger", {"seq": 9.5}),
        ("ledger", {"seq": None}),
        ("ledger", {"window": None}),
        ("ledger", {"used": None, "reason": "model_not_listed"}),
    ],
)
def test_rows_that_break_the_rule_are_refused_by_the_file_itself(
    path: Path, table: str, spoiled: dict[str, Any]
) -> None:
    """No number that cannot be, no second decision of an id, and nothing free outside an allowance."""
    _used(path)
    good = GOOD_WINDOW if table == "windows" else GOOD_ENTRY
    with pytest.raises(sqlite3.IntegrityError):
        insert(path, table, {**good, **spoiled})


# --- When the write lock is held ------------------------------------------------------------------


def held(path: Path) -> sqlite3.Connection:
    """Another program's connection, which holds the write lock until it is closed."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN IMMEDIATE")
    return connection


def test_a_held_lock_is_not_executed_after_the_wait_and_nothing_is_written(path: Path, meter: Meter) -> None:
    """Who cannot write within `wait` is told that nothing was; questions are answered, and later it works."""
    before = dump(path)
    with closing(held(path)):
        for ask in (
            lambda: meter.decide(request(1)),
            lambda: meter.decide_many([request(1), request(2)]),
            lambda: meter.enroll("acme", ENROLLED, actor="ann"),
        ):
            with pytest.raises(NotExecuted, match=r"no write lock within 0 s: database is locked"):
                ask()
        assert meter.explain(request(1)).is_free
        assert [each.used for each in meter.standing()] == [0, 0]
        assert list(meter.ledger()) == []
    assert dump(path) == before
    assert (meter.decide(request(1)).seq, meter.enroll("acme", ENROLLED, actor="ann").version) == (1, 1)


def test_a_file_is_opened_and_read_while_another_program_writes(path: Path) -> None:
    """Who only asks needs no write lock, not even to open the file: an audit waits for no writer, and stops none."""
    _used(path)
    with closing(held(path)), closing(opened(path)) as store:
        meter = meter_of(store)
        assert len(list(meter.ledger())) == 8
        assert [each.used for each in meter.standing("acme")] == [20, 0]
        with pytest.raises(NotExecuted):
            meter.decide(request("next"))


def test_a_lock_that_is_let_go_within_the_wait_is_no_error(path: Path) -> None:
    """Whoever may wait waits: a "locked" never reaches the caller while there is time."""
    with closing(opened(path, wait_s=60)) as store:
        answers: list[Decision] = []
        with closing(held(path)):
            waiting = Thread(target=lambda: answers.append(meter_of(store).decide(request(1))))
            waiting.start()
        waiting.join()
    assert [answer.seq for answer in answers] == [1]


def test_the_wait_is_an_option_of_the_url(path: Path) -> None:
    """`?wait=0` gives up at once, and the message names the wait."""
    with (
        Meter.open(f"sqlite:///{path}?wait=0.001", offer=OFFER, clock=lambda: NOW) as meter,
        closing(held(path)),
        pytest.raises(NotExecuted, match=r"no write lock within 0\.001 s"),
    ):
        meter.decide(request(1))


# --- When SQLite fails ----------------------------------------------------------------------------


NOTHING, ITSELF = "nothing", "the statement itself"


class Failing:
    """A connection that fails once, at one of its statements, after SQLite ran that one, another, or nothing."""

    def __init__(self, connection: sqlite3.Connection, *, at: int | str, error: BaseException, first: str) -> None:
        self._connection = connection
        self._at = at
        self._error = error
        self._first = first
        self.statements: list[str] = []

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        """Run one statement, unless it is the one that fails."""
        return self._run(self._connection.execute, statement, *values)

    def executemany(self, statement: str, *values: Any) -> sqlite3.Cursor:
        """Run one statement with many rows, unless it is the one that fails."""
        return self._run(self._connection.executemany, statement, *values)

    def _run(self, run: Callable[..., sqlite3.Cursor], statement: str, *values: Any) -> sqlite3.Cursor:
        place = len(self.statements)
        self.statements.append(statement)
        if self._at in {place, statement}:
            self._at = -1
            if self._first == ITSELF:
                run(statement, *values)
            elif self._first != NOTHING:
                self._connection.execute(self._first)
            raise self._error
        return run(statement, *values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


def failing(
    store: SQLiteStore, *, at: int | str = -1, error: BaseException | None = None, first: str = NOTHING
) -> Failing:
    """Make the store's connection fail once, at a statement by number or by its text, after it did this first."""
    known = sqlite3.OperationalError("disk I/O error") if error is None else error
    faulty = Failing(store._file.connection(), at=at, error=known, first=first)
    store._file._connection = faulty
    return faulty


def enroll(meter: Meter) -> object:
    """Enroll a new account."""
    return meter.enroll("acme", ENROLLED, actor="ann")


def decide(meter: Meter) -> object:
    """Decide the first request of a new account."""
    return meter.decide(request(1, account="acme"))


def decide_many(meter: Meter) -> object:
    """Decide a batch of two accounts and two windows."""
    requests = [
        request(number, account=f"a{number % 2}", at=NOW - timedelta(days=number // 2 % 2)) for number in range(8)
    ]
    return meter.decide_many(requests)


@pytest.mark.parametrize("ask", [enroll, decide, decide_many])
def test_a_statement_that_fails_leaves_nothing_half_written(tmp_path: Path, ask: Callable[[Meter], object]) -> None:
    """Whichever statement fails, the answer is NotExecuted, the file is as it was, and asking again succeeds."""
    with closing(opened(tmp_path / "good.db")) as store:
        whole = failing(store)
        expected = ask(meter_of(store))
        statements = whole.statements
    assert (statements[0], statements[-1]) == ("BEGIN IMMEDIATE", "COMMIT")
    for place in range(len(statements)):
        path = tmp_path / f"{place}.db"
        with closing(opened(path)) as store:
            before = dump(path)
            failing(store, at=place)
            with pytest.raises(NotExecuted):
                ask(meter_of(store))
            assert dump(path) == before
            assert ask(meter_of(store)) == expected
        assert dump(path) == dump(tmp_path / "good.db")


@pytest.mark.parametrize(("first", "was_done"), [("COMMIT", True), ("ROLLBACK", False)])
def test_a_commit_that_broke_off_is_unknown_and_a_repeat_tells(
    *, store: SQLiteStore, meter: Meter, first: str, was_done: bool
) -> None:
    """SQLite may have done or undone it: nobody can know, so the caller is told to ask again, and gets one decision."""
    failing(store, at="COMMIT", first=first)
    with pytest.raises(OutcomeUnknown, match="ask again with the same ids"):
        meter.decide(request(1))
    again = meter.decide(request(1))
    assert (again.replayed, again.seq, again.used) == (was_done, 1, 10)
    assert len(list(meter.ledger())) == 1


@pytest.mark.parametrize("place", range(8))
@pytest.mark.parametrize("first", [NOTHING, ITSELF])
def test_an_interrupt_leaves_no_transaction_open(path: Path, store: SQLiteStore, place: int, first: str) -> None:
    """A signal at any statement blocks nobody: this process and others go on, and each id has one decision."""
    faulty = failing(store, at=place, error=KeyboardInterrupt(), first=first)
    with pytest.raises((KeyboardInterrupt, NotExecuted, OutcomeUnknown)):
        meter_of(store).decide(request(1))
    assert len(faulty.statements) > place
    with closing(opened(path)) as other:
        meter_of(other).decide(request(2))
    meter_of(store).decide(request(1))
    assert sorted(entry.decision.id for entry in meter_of(store).ledger()) == ["r1", "r2"]


def test_a_full_disk_is_not_executed_and_leaves_nothing_half_written(path: Path, store: SQLiteStore) -> None:
    """A batch that does not fit on the disk is not executed at all; with room again, it is."""
    meter = meter_of(store)
    meter.decide(request("first"))
    connection = store._file.connection()
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages + 3}")
    before, requests = dump(path), [request(number) for number in range(1000)]
    with pytest.raises(NotExecuted, match="database or disk is full"):
        meter.decide_many(requests)
    assert dump(path) == before
    connection.execute("PRAGMA max_page_count = 1000000")
    decisions = meter.decide_many(requests)
    assert [each.seq for each in decisions if isinstance(each, Decision)] == list(range(2, 1002))
    assert gratis("audit", "--store", f"sqlite:///{path}").code == 0


def test_keys_of_rows_that_never_came_to_be_are_forgotten(path: Path, store: SQLiteStore) -> None:
    """A new account whose first decision failed is not taken for the account that got its row meanwhile."""
    meter = meter_of(store)
    failing(store, at="COMMIT")
    with pytest.raises(NotExecuted):
        meter.decide(request(1, 999_999, account="acme"))
    with closing(opened(path)) as other:
        meter_of(other).decide(request(2, 5, account="other", project="p"))
        decision = meter.decide(request(1, 999_999, account="acme"))
        assert (decision.used, decision.seq) == (999_999, 1)
        kept = [(each.decision.account, each.decision.tokens) for each in meter_of(other).ledger()]
    assert kept == [("other", 5), ("acme", 999_999)]


def test_terms_of_rows_that_never_came_to_be_are_forgotten(path: Path, store: SQLiteStore) -> None:
    """Terms that were rolled back are written again, and each entry keeps its own."""
    meter = meter_of(store)
    failing(store, at="COMMIT")
    with pytest.raises(NotExecuted):
        meter.decide(request(1))
    with closing(opened(path)) as other:
        Meter(other, OFFER, assume=Enrollment(tier=1, sharing="enabled")).decide(request(2))
        meter.decide(request(1))
        allowances = [each.decision.allowance for each in meter_of(other).ledger()]
    assert allowances == [250_000, 1_000_000]


def test_a_refusal_writes_nothing(path: Path, meter: Meter) -> None:
    """A request ahead of the clock, a conflict and a change by a stranger leave the file as it was."""
    meter.decide(request(1))
    meter.enroll("acme", ENROLLED, actor="ann")
    before = dump(path)
    with pytest.raises(RequestError, match="ahead of the store's clock"):
        meter.decide(request(2, at=NOW + timedelta(minutes=5, microseconds=1), account="new"))
    with pytest.raises(Conflict):
        meter.decide(request(1, 11))
    with pytest.raises(EnrollmentError):
        meter.enroll("acme", ENROLLED, actor="eve")
    with pytest.raises(EnrollmentError):
        meter.enroll("new", Enrollment(tier=3, sharing="enabled", plan="enterprise"), actor="eve")
    assert meter.decide(request(1)).replayed
    meter.explain(request(3, account="new"))
    meter.standing("new")
    assert dump(path) == before
    assert meter.accounts() == ["default", "acme"]


# --- Many at once ---------------------------------------------------------------------------------


def test_threads_that_wait_together_are_served_in_one_transaction(path: Path) -> None:
    """While one call waits for the disk the others gather, and then go in one commit; each has its own answer."""
    threads_many = 20
    with closing(opened(path, wait_s=60)) as store:
        meter, statements = meter_of(store), []
        store._file.connection().set_trace_callback(statements.append)
        answers: dict[int, Decision] = {}

        def ask(number: int) -> None:
            answers[number] = meter.decide(request(number))

        threads = [Thread(target=ask, args=(number,)) for number in range(threads_many)]
        with closing(held(path)):
            threads[0].start()
            while "BEGIN IMMEDIATE" not in statements:
                os.sched_yield()
            for thread in threads[1:]:
                thread.start()
            while len(store._waiting) < threads_many - 1:
                os.sched_yield()
        for thread in threads:
            thread.join()
    assert statements.count("COMMIT") == 2
    assert {number: answer.id for number, answer in answers.items()} == {n: f"r{n}" for n in range(threads_many)}
    assert sorted(answer.seq or 0 for answer in answers.values()) == list(range(1, threads_many + 1))


def test_a_failure_reaches_every_thread_that_was_served_together(path: Path) -> None:
    """Where the one transaction of many threads fails, each of them is told, and each id can be asked again."""
    with closing(opened(path, wait_s=60)) as store:
        meter, statements = meter_of(store), []
        store._file.connection().set_trace_callback(statements.append)
        errors: list[BaseException] = []

        def ask(number: int) -> None:
            try:
                meter.decide(request(number))
            except StoreError as error:
                errors.append(error)

        threads = [Thread(target=ask, args=(number,)) for number in range(8)]
        with closing(held(path)):
            threads[0].start()
            while "BEGIN IMMEDIATE" not in statements:
                os.sched_yield()
            for thread in threads[1:]:
                thread.start()
            while len(store._waiting) < 7:
                os.sched_yield()
            failing(store, at="COMMIT")
        for thread in threads:
            thread.join()
        assert [type(error) for error in errors] == [NotExecuted] * 7
        assert len({id(error) for error in errors}) == 7
        meter.decide_many([request(number) for number in range(8)])
        assert sorted(each.decision.id for each in meter.ledger()) == [f"r{number}" for number in range(8)]


OPEN_TOGETHER = """
import sys
from datetime import UTC, datetime
from gratis import Enrollment, Meter, Request
name = sys.argv[1]
assume = Enrollment(tier=3, sharing="enabled")
at = datetime(2025, 4, 20, tzinfo=UTC)
print("ready", flush=True)
for line in sys.stdin:
    with Meter.open(f"sqlite:///{line.strip()}?synchronous=off", assume=assume, bounds=None) as meter:
        made = meter.decide(Request(id=name, model="gpt-4o-2024-08-06", at=at, input_tokens=1, output_tokens=0))
    print(made.seq, flush=True)
"""


def test_processes_that_open_a_new_file_at_once_create_one_schema(tmp_path: Path) -> None:
    """Eight processes meet at a file that is not there yet, again and again: one schema, and nobody is turned away."""
    rounds, processes_many = 10, 8
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN_TOGETHER, f"p{number}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(processes_many)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for turn in range(rounds):
        path = tmp_path / f"{turn}.db"
        for process in processes:
            process.stdin.write(f"{path}\n")
            process.stdin.flush()
        answers = sorted(int(process.stdout.readline()) for process in processes)
        assert answers == list(range(1, processes_many + 1))
    for process in processes:
        with process:
            process.stdin.close()
        assert process.returncode == 0
    with closing(opened(tmp_path / "alone.db")):
        pass
    schema = [each for each in dump(tmp_path / "alone.db") if each.startswith("CREATE")]
    for turn in range(rounds):
        assert [each for each in dump(tmp_path / f"{turn}.db") if each.startswith("CREATE")] == schema


# --- Durability, URLs, closing --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "pragma", "durability"),
    [
        ("", 2, Durability.SYNCED),
        ("?synchronous=full", 2, Durability.SYNCED),
        ("?synchronous=normal", 1, Durability.JOURNALED),
        ("?synchronous=off", 0, Durability.VOLATILE),
    ],
)
def test_the_level_of_synchronous_names_the_durability(
    path: Path, option: str, pragma: int, durability: Durability
) -> None:
    """What SQLite does at a commit is what the answer says it rests on; the careful level is the default."""
    with Meter.open(f"sqlite:///{path}{option}", offer=OFFER, assume=ENROLLED, clock=lambda: NOW) as meter:
        decision = meter.decide(request(1))
        connection = meter._store._file.connection()
        assert connection.execute("PRAGMA synchronous").fetchone() == (pragma,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        entries = [each.decision.durability for each in meter.ledger()]
    assert (meter.durability, decision.durability, entries) == (durability, durability, [durability])


def test_urls_name_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slashes are relative to the working folder, four are absolute, and what a URL escapes is taken back."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    names = {
        "sqlite:///a.db": "a.db",
        "sqlite:///folder/b.db": "folder/b.db",
        f"sqlite:///{tmp_path}/c.db": "c.db",
        "sqlite:///d%20e%3F%23.db?wait=1&synchronous=off": "d e?#.db",
        "sqlite:///caf%C3%A9.db": "caf\u00e9.db",
        "sqlite:///h\u00e9.db": "h\u00e9.db",
    }
    for url, name in names.items():
        assert not (tmp_path / name).exists()
        open_store(url).close()
        assert (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "unknown kind ''; expected memory:, sqlite:///FILE"),
        ("gratis.db", "unknown kind ''; expected memory:, sqlite:///FILE"),
        ("mysql://localhost", "unknown kind 'mysql'; expected memory:"),
        ("memory:x", "expected just memory:"),
        ("sqlite:", "expected sqlite:///FILE (relative) or sqlite:////FOLDER/FILE (absolute)"),
        ("sqlite:///", "expected sqlite:///FILE"),
        ("sqlite:/x.db", "expected sqlite:///FILE"),
        ("sqlite://host/x.db", "expected sqlite:///FILE"),
        ("sqlite://[x", "expected memory:, sqlite:///FILE"),
        ("sqlite:///x.db#y", "expected sqlite:///FILE"),
        ("sqlite:///a%00b.db", "expected"),
        ("sqlite:///:memory:", "no write-ahead log"),
        ("sqlite:///x.db?sync=off", "unknown option 'sync'; expected synchronous or wait"),
        ("sqlite:///x.db?synchronous=extra", "synchronous=extra; expected one of full, normal, off"),
        ("sqlite:///x.db?wait=", "wait=; expected seconds from 0 to 3600"),
        ("sqlite:///x.db?wait=-1", "wait=-1; expected seconds from 0 to 3600"),
        ("sqlite:///x.db?wait=nan", "wait=nan; expected seconds from 0 to 3600"),
        ("sqlite:///x.db?wait=inf", "wait=inf; expected seconds from 0 to 3600"),
    ],
)
def test_a_url_that_names_no_store_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, message: str
) -> None:
    """Each fault of a URL has its message, and no file comes to be."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError) as refused:
        open_store(url)
    assert message in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_store_stays_where_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative URL means the working folder of the moment; changing it later moves nothing."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with Meter.open("sqlite:///gratis.db", offer=OFFER, assume=ENROLLED, clock=lambda: NOW) as meter:
        monkeypatch.chdir(tmp_path / "elsewhere")
        meter.decide(request(1))
        assert [entry.decision.id for entry in meter.ledger()] == ["r1"]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_file_that_vanished_under_an_open_store_is_noticed(path: Path, store: SQLiteStore, meter: Meter) -> None:
    """A decision written to a file that nobody can open any more is not acknowledged."""
    meter.decide(request(1))
    for each in path.parent.glob("gratis.db*"):
        each.unlink()
    with pytest.raises(StoreError):
        meter.decide(request(2))
    with closing(opened(path)):
        pass
    with pytest.raises(StoreError):
        meter.decide(request(3))


def test_a_closed_store_refuses(store: SQLiteStore, meter: Meter) -> None:
    """Every verb of a closed store says that it is closed; closing it again changes nothing."""
    meter.decide(request(1))
    meter.close()
    meter.close()
    for ask in (
        lambda: meter.decide(request(2)),
        lambda: meter.decide_many([request(2)]),
        lambda: meter.enroll("acme", ENROLLED, actor="ann"),
        lambda: meter.explain(request(2)),
        meter.standing,
        meter.enrollments,
        meter.accounts,
        lambda: list(meter.ledger()),
    ):
        with pytest.raises(StoreError, match="this store is closed"):
            ask()


def test_what_was_acknowledged_is_there_when_the_file_is_opened_again(path: Path) -> None:
    """A store closed and opened goes on where it was: totals, ids, enrollments, ledger."""
    _used(path)
    before = dump(path)
    with closing(opened(path)) as store:
        meter = meter_of(store)
        assert meter.decide(request(0)).replayed
        assert [each.decision.seq for each in meter.ledger(account="acme")] == [1, 2, 1, 2]
        assert [each.used for each in meter.standing("acme")] == [20, 0]
        assert [each.actor for each in meter.enrollments("acme")] == ["ann"]
    assert dump(path) == before


def test_two_offers_share_a_file_and_nothing_else(path: Path, store: SQLiteStore) -> None:
    """The same account and id under another offer is another account and another request."""
    other = Meter(store, load("openai-evals"), assume=ENROLLED)
    meter_of(store).decide(request(1))
    run = other.decide(request(1, kind="eval"))
    assert (run.replayed, run.offer, run.used) == (False, "openai-evals", 1)
    assert (meter_of(store).accounts(), other.accounts()) == (["default"], ["default"])
    ledger = gratis("ledger", "--store", f"sqlite:///{path}").out.splitlines()
    assert [json.loads(each)["offer"] for each in ledger] == ["openai-data-sharing", "openai-evals"]


def test_a_call_behind_more_than_one_commit_takes_is_answered(
    store: SQLiteStore, meter: Meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that finds more waiting before it than one commit takes is served in a later one, not sent away empty."""
    monkeypatch.setattr("gratis.stores.sqlite.store.BATCH_MAX", 2)
    before = [_Turn([meter._book.charge(request(f"{turn}-{place}")) for place in range(2)]) for turn in range(3)]
    store._waiting.extend(before)
    assert [each.seq for each in meter.decide_many([request("last"), request("very last")])] == [7, 8]
    assert [receipt.decision.seq for turn in before for receipt in turn.result()] == [1, 2, 3, 4, 5, 6]
