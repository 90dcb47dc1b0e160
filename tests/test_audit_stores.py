"""Stores that somebody damaged, and servers that were trimmed: each fault is a finding, and nothing else is."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from gratis import Enrollment, Meter, Reason, Request
from gratis.stores.memory import MemoryStore
from gratis.stores.urls import open_store

from .servers import Cluster, Server
from .test_audit import LARGE, NOON, OFFER, Clock, audit_of, file_of, places
from .test_audit_chain import fresh, requests
from .test_audit_enrollments import audit as audit_with
from .test_cli import gratis

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DAY = timedelta(days=1)
DAYS = 30
ENROLLED = Enrollment(tier=1, sharing="enabled")


# --- Lines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", list(Reason))
@pytest.mark.parametrize("entry", [2, 5, 10])
def test_a_reason_that_was_changed_alone_is_a_finding(entry: int, reason: Reason) -> None:
    """Whatever a chained entry gives as its reason, the audit says that it is not that one."""
    found = fresh()
    if found[entry - 1]["reason"] != reason:
        found[entry - 1]["reason"] = reason
        answer = audit_of(found)
        assert (answer.code, {each["entry"] for each in answer.lines}) == (1, {entry})


@pytest.mark.parametrize("field", ["used", "total", "free_tokens", "seq", "entry"])
def test_a_number_that_no_store_can_hold_is_unreadable(field: str) -> None:
    """Numbers have a bound, so that none breaks what reads them."""
    found = fresh()
    found[3][field] = 10**30
    assert places(audit_of(found))[0] == ("unreadable", None)


def test_several_owners_within_one_instant_are_no_finding(tmp_path: Path) -> None:
    """Who owned the account between two changes may correct, however close they are."""
    from gratis.lines import change_line, encode, entry_line  # noqa: PLC0415 - only here

    meter = Meter(MemoryStore(clock=lambda: NOON), OFFER)
    meter.enroll("default", Enrollment(tier=3, sharing="enabled", owners={"ann"}), actor="ann")
    meter.decide(Request(id="r", model=LARGE, at=NOON, input_tokens=1, output_tokens=0))
    meter.enroll("default", Enrollment(tier=3, sharing="enabled", owners={"ann", "bob"}), actor="ann")
    meter.void("r", actor="bob", why="sent twice")
    meter.enroll("default", Enrollment(tier=3, sharing="enabled", owners={"ann"}), actor="ann")
    history = [json.loads(encode(change_line(OFFER.name, "default", made))) for made in meter.enrollments("default")]
    lines = [json.loads(encode(entry_line(entry))) for entry in meter.ledger()]
    assert audit_with(tmp_path, lines, history).code == 0


# --- A server that was trimmed --------------------------------------------------------------------


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server of a month, of which all but the last days were forgotten, and the file that has it all."""
    file = tmp_path_factory.mktemp("trimmed") / "ledger.jsonl"
    clock = Clock(datetime.now(UTC).replace(microsecond=0) - DAYS * DAY)
    with Server() as server:
        meter = Meter(open_store(server.url, clock=clock), OFFER)
        meter.enroll("default", ENROLLED, actor="ann")
        for day in range(DAYS):
            for model in (LARGE, "unknown"):
                meter.decide(Request(id=f"{model} {day}", model=model, at=clock.now, input_tokens=5, output_tokens=0))
            clock.now += DAY
        meter.close()
        assert gratis("ledger", "--store", server.url, "--out", str(file), "--trim").code == 0
        yield server, file


def _state(server: Server) -> bytes:
    return next(key for key in _Raw(server).ask("KEYS", "*") if key.endswith(b":state"))


def test_a_trimmed_server_is_audited_alone_and_with_its_file(trimmed: tuple[Server, Path]) -> None:
    """What was forgotten is no finding; the file with what the server has beyond it is the whole ledger."""
    server, file = trimmed
    alone, both = gratis("audit", "--store", server.url), gratis("audit", str(file), "--store", server.url)
    assert (both.code, both.out, both.err) == (0, "", f"gratis: {2 * DAYS} entries, 0 findings\n")
    assert (alone.code, alone.out) == (0, "")
    assert 0 < int(alone.err.split()[1]) < 2 * DAYS


def test_a_counter_that_was_deleted_on_a_trimmed_server_is_missed(trimmed: tuple[Server, Path]) -> None:
    """Only what ended long enough ago may be gone."""
    server, file = trimmed
    state, raw = _state(server), _Raw(server)
    name = max(field for field in raw.ask("HKEYS", state) if field[:1] == b"t")
    value = raw.ask("HGET", state, name)
    raw.ask("HDEL", state, name)
    for arguments in (("--store", server.url), (str(file), "--store", server.url)):
        assert ("counter_differs", None) in places(gratis("audit", *arguments))
    raw.ask("HSET", state, name, value)


# --- A file beside its store ----------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A SQLite store with the 16 decisions, and its ledger beside it."""
    with Meter.open(f"sqlite:///{tmp_path}/gratis.db", offer=OFFER, clock=lambda: NOON) as meter:
        for account in ("default", "acme"):
            meter.enroll(account, Enrollment(tier=3, sharing="enabled"), actor="ann")
        meter.decide_many(requests())
    assert gratis("ledger", "--store", f"sqlite:///{tmp_path}/gratis.db", "--out", tmp_path / "ledger.jsonl").code == 0
    return tmp_path / "gratis.db"


def change(path: Path, *statements: str) -> str:
    """Change a file behind the back of Gratis; its URL."""
    with closing(sqlite3.connect(path)) as connection:
        for table in ("ledger", "enrollments"):
            for what in ("keeps_what_it_says", "keeps_what_it_holds", "keep_what_they_say", "keep_what_they_hold"):
                connection.execute(f"DROP TRIGGER IF EXISTS {table}_{what}")
        connection.execute("PRAGMA ignore_check_constraints = ON")
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    return f"sqlite:///{path}"


def test_an_edit_of_the_store_within_the_range_of_its_file_is_found(path: Path) -> None:
    """Where both have an entry, both say the same; where one of them has none, it is missed."""
    file = str(path.with_name("ledger.jsonl"))
    url = change(path, "UPDATE ledger SET project = 'p' WHERE entry = 3", "DELETE FROM ledger WHERE entry = 9")
    assert places(gratis("audit", file, "--store", url)) == [("broken_chain", 3), ("entry_gap", 9)]


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("UPDATE ledger SET used = 'x' WHERE entry = 3", "unreadable"),
        ("UPDATE ledger SET seq = x'00' WHERE entry = 3", "unreadable"),
        ("UPDATE ledger SET free_tokens = 1.5 WHERE entry = 3", "unreadable"),
        ("UPDATE ledger SET link = x'00' WHERE entry = 3", "unreadable"),
        ("UPDATE windows SET start = 'x' WHERE window = 1", "unreadable"),
        ("UPDATE enrollments SET enrollment = 'x' WHERE account = 1", "wrong_enrollment"),
        ("UPDATE enrollments SET at = 'x' WHERE account = 1", "wrong_enrollment"),
        ("DELETE FROM enrollments WHERE account = 1", "not_in_force"),
    ],
)
def test_what_cannot_be_read_or_is_gone_is_a_finding_and_no_end(path: Path, statement: str, kind: str) -> None:
    """A damaged file is audited to its end."""
    answer = gratis("audit", "--store", change(path, statement))
    assert answer.code == 1
    assert kind in {each["kind"] for each in answer.lines}
    assert answer.err.startswith("gratis: 16 entries, ")


# --- A server that somebody damaged ---------------------------------------------------------------


def _xdel(server: _Raw, state: bytes, ledger: bytes) -> None:
    server.ask("XDEL", ledger, "3-0")


def _double(server: _Raw, state: bytes, ledger: bytes) -> None:
    entries = server.ask("XRANGE", ledger, "-", "+")
    server.ask("DEL", ledger)
    for place, fields in entries:
        server.ask("XADD", ledger, place, *fields, *(fields[-2:] if place == b"3-0" else []))


def _spoil(server: _Raw, state: bytes, ledger: bytes) -> None:
    entries = server.ask("XRANGE", ledger, "-", "+")
    server.ask("DEL", ledger)
    for place, fields in entries:
        server.ask("XADD", ledger, place, *(fields if place != b"3-0" else [*fields[:-1], b"1 2 w \n\xff"]))


def _field(letter: bytes, value: bytes | None) -> Callable[[_Raw, bytes, bytes], None]:
    def changed(server: _Raw, state: bytes, ledger: bytes) -> None:
        for name in server.ask("HKEYS", state):
            if name[:1] == letter:
                server.ask(*(("HDEL", state, name) if value is None else ("HSET", state, name, value)))

    return changed


def _unlisted(server: _Raw, state: bytes, ledger: bytes) -> None:
    for letter in (b"a", b"v", b"t", b"l", b"o", b"x"):
        _field(letter, None)(server, state, ledger)


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (_xdel, "unreadable"),
        (_double, "unreadable"),
        (_spoil, "unreadable"),
        (_field(b"t", b"no tally"), "counter_differs"),
        (_field(b"t", None), "counter_differs"),
        (_field(b"o", b"\xff" * 24), "broken_chain"),
        (_field(b"o", None), "broken_chain"),
        (_field(b"w", b"no word"), "unreadable"),
        (_field(b"w", None), "unreadable"),
        (_field(b"e", b"no change"), "wrong_enrollment"),
        (_field(b"e", None), "wrong_enrollment"),
        (_field(b"v", b"many"), "wrong_enrollment"),
        (_unlisted, "counter_differs"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_a_damaged_server_is_audited_to_its_end(damage: Callable[[_Raw, bytes, bytes], None], kind: str) -> None:
    """Each damage is a finding with a word on what is wrong, and none a traceback."""
    with Server() as server:
        with Meter.open(server.url, offer=OFFER, bounds=None, clock=lambda: NOON) as meter:
            meter.enroll("default", ENROLLED, actor="ann")
            for number in range(6):
                model = ("unknown", LARGE)[number % 2]
                meter.decide(Request(id=f"r{number}", model=model, at=NOON, input_tokens=9, output_tokens=0))
        state = _state(server)
        stream = next(key for key in _Raw(server).ask("KEYS", "*") if key.endswith(b":ledger"))
        assert gratis("audit", "--store", server.url).code == 0
        damage(_Raw(server), state, stream)
        answer = gratis("audit", "--store", server.url)
        assert answer.code == 1
        assert kind in {each["kind"] for each in answer.lines}, answer.out


class _Raw:
    """A server asked in plain words: what comes back is as it was sent."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def ask(self, *words: Any) -> Any:
        """The plain answer."""
        with self._server.client() as client:
            client.response_callbacks.clear()
            return client.execute_command(*words)


def test_a_file_of_another_store_is_told_so(path: Path, tmp_path: Path) -> None:
    """A ledger of another store differs at its first entry."""
    other = tmp_path / "other.jsonl"
    other.write_bytes(file_of([{**line, "entry": number} for number, line in enumerate(fresh()[4:], 1)]))
    found = places(gratis("audit", str(other), "--store", f"sqlite:///{path}"))
    assert found[0][1] == 1


def test_a_server_whose_ledger_is_lost_is_compared_with_the_file_that_has_it(tmp_path: Path) -> None:
    """What a store no longer has is told, entry by entry where it begins; nothing is refused to an audit."""
    file = tmp_path / "ledger.jsonl"
    with Server() as server:
        with Meter.open(server.url, offer=OFFER, assume=ENROLLED, bounds=None, clock=lambda: NOON) as meter:
            for number in range(3):
                meter.decide(Request(id=f"r{number}", model=LARGE, at=NOON, input_tokens=9, output_tokens=0))
        assert gratis("ledger", "--store", server.url, "--out", file).code == 0
        raw = _Raw(server)
        raw.ask("DEL", next(key for key in raw.ask("KEYS", "*") if key.endswith(b":ledger")))
        both, alone = gratis("audit", file, "--store", server.url), gratis("audit", "--store", server.url)
        assert (both.code, alone.code) == (1, 1)
        assert {each["kind"] for each in both.lines} & {"broken_chain", "entry_gap", "unreadable"}
        assert "unreadable" in {each["kind"] for each in alone.lines}


def test_a_store_given_as_a_file_is_told_how_to_be_given(path: Path) -> None:
    """A SQLite file is no ledger of lines."""
    answer = gratis("audit", path)
    assert answer.code == 2
    assert answer.err == (
        f"gratis: {path}: found a SQLite file; expected a ledger's lines, or --store sqlite:///{path}\n"
    )


def test_entries_beyond_the_file_are_counted(path: Path) -> None:
    """A file that ends too early is no finding, since a store goes on; how much of it is the store's alone is said."""
    file = path.with_name("ledger.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-2]))
    answer = gratis("audit", file, "--store", f"sqlite:///{path}")
    assert (answer.code, answer.err.splitlines()[-1]) == (0, "gratis: 2 entries are the store's alone, beyond the file")


def test_the_table_of_findings_is_told_as_json_is(path: Path) -> None:
    """Values are shown whole, in the words of the lines."""
    url = change(path, "UPDATE windows SET used = used - 1 WHERE window = 1")
    out = gratis("audit", "--store", url, "--format", "table").out
    assert 'found {"window":{"start":"2025-04-20T00:00:00Z"' in out
    assert "Window(" not in out


def test_a_server_that_was_set_back_is_found_by_the_file_that_goes_further(tmp_path: Path) -> None:
    """A failover that lost the last decision: the file has it, the server and its counters do not."""
    file = tmp_path / "ledger.jsonl"
    for asked in (3, 2):
        with Server() as server:
            with Meter.open(server.url, offer=OFFER, assume=ENROLLED, bounds=None, clock=lambda: NOON) as meter:
                for number in range(asked):
                    meter.decide(Request(id=f"r{number}", model=LARGE, at=NOON, input_tokens=9, output_tokens=0))
            if asked == 3:
                assert gratis("ledger", "--store", server.url, "--out", file).code == 0
            found = places(gratis("audit", file, "--store", server.url))
            assert found == (
                [] if asked == 3 else [("entry_gap", 3), ("counter_differs", None), ("broken_chain", None)]
            )


def test_a_cluster_is_audited_shard_by_shard(tmp_path: Path) -> None:
    """Alone, by its file, and by both; an edit is found in whichever shard it is."""
    file = tmp_path / "ledger.jsonl"
    with Cluster() as cluster:
        with Meter.open(cluster.url, offer=OFFER, assume=ENROLLED, bounds=None, clock=lambda: NOON) as meter:
            for number in range(48):
                request = Request(
                    id=f"r{number}",
                    account=f"a{number % 12}",
                    model=(LARGE, "unknown")[number % 2],
                    at=NOON,
                    input_tokens=number,
                    output_tokens=0,
                )
                meter.decide(request)
        assert gratis("ledger", "--store", cluster.url, "--out", file).code == 0
        for arguments in (("--store", cluster.url), (file,), (file, "--store", cluster.url)):
            answer = gratis("audit", *arguments)
            assert (answer.code, answer.out, answer.err) == (0, "", "gratis: 48 entries, 0 findings\n")
        lines = [json.loads(line) for line in file.read_bytes().splitlines()]
        assert len({line.get("shard", 0) for line in lines}) > 2
        lines[40]["project"] = "p"
        file.write_bytes(file_of(lines))
        assert places(gratis("audit", file, "--store", cluster.url)) == [("broken_chain", lines[40]["entry"])]
