"""The chain: an edit, a cut or a reorder of a ledger is found, whatever else about it still follows."""

from __future__ import annotations

import json
import sqlite3
from base64 import b64decode
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings, strategies as st

from gratis import Meter, Request
from gratis.audit.windows import Said, Windows
from gratis.chain import Stems, link
from gratis.lines import encode, entry_line, entry_of
from gratis.model import Window
from gratis.rule import Tally
from gratis.stores.memory import MemoryStore
from gratis.stores.sqlite import SQLiteStore
from gratis.testing import drive
from gratis.testing.compare import chained, ledger

from .servers import Server
from .test_audit import ENROLLED, LARGE, NOON, OFFER, PLANTED, TABLE, audit_of, consistent, edit, file_of, places, said
from .test_cli import Answer, gratis

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gratis.stores import Store

HOUR = timedelta(hours=1)


def requests() -> list[Request]:
    """The article's day, and what is outside any window; of two accounts."""
    day = [
        Request(id=f"r{n}", model=LARGE, at=NOON, input_tokens=size, output_tokens=0) for n, size in enumerate(TABLE)
    ]
    outside = [Request(id=f"o{n}", model="unknown", at=NOON, input_tokens=n + 1, output_tokens=0) for n in range(4)]
    other = [
        Request(id=f"a{n}", model=LARGE, at=NOON, input_tokens=n + 1, output_tokens=0, account="acme") for n in range(4)
    ]
    return [*day[:4], *outside[:2], *other[:2], *day[4:], *outside[2:], *other[2:]]


def lines() -> list[Any]:
    """The lines of a chained ledger of 16 entries."""
    meter = Meter(MemoryStore(clock=lambda: NOON), OFFER, assume=ENROLLED)
    meter.decide_many(requests())
    return [json.loads(encode(entry_line(entry))) for entry in meter.ledger()]


LEDGER = lines()


def fresh() -> list[Any]:
    """A copy of these lines."""
    return json.loads(json.dumps(LEDGER))


def broken(found: list[Any]) -> list[int | None]:
    """The entries at which a chain is said to break."""
    return [each["entry"] for each in audit_of(found).lines if each["kind"] == "broken_chain"]


def renumbered(found: list[Any]) -> list[Any]:
    """Entries numbered anew, as whoever takes some out or moves them would."""
    for number, line in enumerate(found, 1):
        line["entry"] = number
    return found


def test_a_chained_ledger_has_no_findings() -> None:
    """Every line has a link, each another, and all of them follow."""
    assert len({line["link"] for line in LEDGER}) == len(LEDGER) == 16
    assert (audit_of(LEDGER).code, audit_of(LEDGER).out) == (0, "")


@pytest.mark.parametrize(
    "change",
    [
        {"id": "another"},
        {"project": "p"},
        {"account": "other"},
        {"cached_tokens": 1},
        {"tools": ["function"]},
        {"at": "2025-04-20T12:00:01Z"},
        {"decided_at": "2025-04-20T12:00:00.000001Z"},
        {"durability": "synced"},
        {"input_tokens": 5},
        {"output_tokens": None},
        {"model": "another-unknown"},
        {"kind": "embedding"},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("place", range(16))
def test_no_fact_can_be_edited_after_the_fact(place: int, change: dict[str, Any]) -> None:
    """Whatever is edited, in a window or outside any, breaks the chain there, also where the rule has no objection."""
    found = fresh()
    (field, value), before = *change.items(), found[place]
    value = "text-embedding-3-small" if field == "model" and place < 0 else value
    if before[field] == value:
        return
    before[field] = value
    consistent(before)
    assert found[place]["entry"] in broken(found)


@pytest.mark.parametrize(("kind", "plant", "expected"), PLANTED)
def test_what_was_planted_against_the_rule_breaks_the_chain_or_is_its_own_finding(
    kind: str, plant: Callable[[list[Any]], None], expected: list[tuple[str, int | None]]
) -> None:
    """With links, every planted fault still is a finding of its own kind."""
    meter = Meter(MemoryStore(clock=lambda: NOON), OFFER, assume=ENROLLED)
    meter.decide_many(_as_planted())
    found = [json.loads(encode(entry_line(entry))) for entry in meter.ledger()]
    plant(found)
    answer = audit_of(found)
    assert kind in {each["kind"] for each in answer.lines}
    assert answer.code == 1


def _as_planted() -> list[Request]:
    from .test_audit import _requests  # noqa: PLC0415 - one name of many, for one test

    return _requests()


def test_a_cut_is_found_whatever_is_cut() -> None:
    """An entry that is taken out is found at the next one of its window, though all are numbered anew."""
    ends = {7, 15, 13}  # the last one of each chain: what follows it is missed by counters, not by the file
    for place in range(16):
        found = fresh()
        del found[place]
        later = [line for line in LEDGER[place + 1 :] if _chain(line) == _chain(LEDGER[place])]
        assert bool(broken(renumbered(found))) is bool(later), (place, ends)


def test_a_reorder_is_found() -> None:
    """Two entries of one chain that change places break it, though they are numbered anew, with seq and totals."""
    for one in range(16):
        for other in range(one + 1, 16):
            if _chain(LEDGER[one]) != _chain(LEDGER[other]):
                continue
            found = fresh()
            found[one], found[other] = found[other], found[one]
            for field in ("seq", "used", "total", "decided_at", "remaining"):
                found[one][field], found[other][field] = found[other][field], found[one][field]
            assert broken(renumbered(found)) != []


def test_an_entry_that_was_put_in_is_found() -> None:
    """A forged entry has no link that fits, and with any link breaks what follows."""
    for forged in (None, "0" * 24, LEDGER[4]["link"]):
        found = fresh()
        put = {**found[4], "id": "forged", "link": forged}
        found.insert(5, put)
        assert broken(renumbered(found)) != []


def test_a_forger_who_chains_one_entry_anew_is_found_at_the_next() -> None:
    """An edited entry with a link that fits it breaks the chain behind it."""
    found = fresh()
    edit(2, project="p")(found)
    entry = entry_of(found[1])
    found[1]["link"] = link(found[0]["link"], Stems().of(entry.decision), entry.decision, entry.decided_at)
    assert broken(found) == [3]


def test_links_that_were_taken_away_are_missed() -> None:
    """Behind an entry with a link, none is without; a ledger of before there were links is judged by the rule alone."""
    found = fresh()
    for line in found[6:]:
        line["link"] = None
    assert broken(found) == list(range(7, 17))
    for line in found:
        line.pop("link", None)
    answer = audit_of(found)
    assert (answer.code, answer.err) == (0, said(16))


@pytest.mark.parametrize("value", [1, "", "x" * 24, "0" * 23, "0" * 25, "A" * 24, [], {}])
def test_what_is_no_link_is_unreadable(value: object) -> None:
    """A link is 24 hexadecimal digits."""
    found = fresh()
    found[3]["link"] = value
    assert places(audit_of(found))[0] == ("unreadable", None)


def _chain(line: dict[str, Any]) -> tuple[Any, ...]:
    return line["account"], line["group"], line["window_start"]


# --- Stores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_every_store_chains_what_it_decides(seed: int, tmp_path: Path) -> None:
    """Random programs leave, in each store, ledgers whose every link follows: holds, corrections and all."""
    with Server() as server:
        kinds: list[Callable[..., Store]] = [
            lambda **named: SQLiteStore(tmp_path / f"{seed}.db", **named),
            lambda **named: _redis(server.url, **named),
        ]
        for opened in kinds:
            drive(opened, seed=seed, steps=500)
            with closing(opened()) as store:
                entries, _ = ledger(store)
                ends = {key: chained(entries.get(key, [])) for key in store.accounts()}
                assert ends == {key: store.links(*key)[2] for key in store.accounts()}
                assert sum(map(len, entries.values())) > 200


def _redis(url: str, **named: Any) -> Store:
    from gratis.stores.urls import open_store  # noqa: PLC0415 - only here

    return open_store(url, **named)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A SQLite store with the 16 decisions."""
    with Meter.open(f"sqlite:///{tmp_path}/gratis.db", offer=OFFER, assume=ENROLLED, clock=lambda: NOON) as meter:
        meter.decide_many(requests())
    yield tmp_path / "gratis.db"  # noqa: PT022 - what uses it goes on with it


def planted(path: Path, *statements: str) -> list[tuple[str, int | None]]:
    """What the audit finds after somebody changed the file behind the back of Gratis."""
    with closing(sqlite3.connect(path)) as connection:
        for trigger in ("ledger_keeps_what_it_says", "ledger_keeps_what_it_holds"):
            connection.execute(f"DROP TRIGGER IF EXISTS {trigger}")
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    return places(gratis("audit", "--store", f"sqlite:///{path}"))


@pytest.mark.parametrize(
    ("statement", "entry"),
    [
        ("UPDATE ledger SET project = 'p' WHERE entry = 1", 1),
        ("UPDATE ledger SET id = 'x' WHERE entry = 5", 5),
        ("UPDATE ledger SET decided_at = decided_at + 1 WHERE entry = 16", 16),
        ("UPDATE ledger SET durability = 'volatile' WHERE entry = 2", 2),
        ("UPDATE ledger SET link = '000000000000000000000000' WHERE entry = 3", 3),
        ("UPDATE ledger SET link = NULL WHERE entry = 3", 3),
        ("DELETE FROM ledger WHERE entry = 16", None),
        ("DELETE FROM ledger WHERE entry = 14", 13),
        ("UPDATE windows SET link = '000000000000000000000000' WHERE window = 1", None),
        ("UPDATE windows SET link = NULL WHERE window = 1", None),
        ("UPDATE accounts SET link = NULL", None),
        ("UPDATE accounts SET link = '000000000000000000000000'", None),
    ],
)
def test_a_file_that_was_edited_is_found_out(path: Path, statement: str, entry: int | None) -> None:
    """Edits and cuts in a SQLite store that the rule alone would pass, also at its very end."""
    found = planted(path, statement)
    assert "broken_chain" in {kind for kind, _ in found}
    if entry in {None, 16} or "DELETE" not in statement:
        assert ("broken_chain", entry) in found


def test_the_last_decision_outside_any_window_cannot_be_cut_off(path: Path) -> None:
    """No counter misses it; its account's last link does."""
    last = "DELETE FROM ledger WHERE entry > 12"
    with closing(sqlite3.connect(path)) as connection:
        kept = connection.execute("SELECT id FROM ledger WHERE entry > 12 ORDER BY entry").fetchall()
    assert kept == [("o2",), ("o3",), ("a2",), ("a3",)]
    assert ("broken_chain", None) in planted(path, "DELETE FROM ledger WHERE id = 'o3'")
    assert ("counter_differs", None) in planted(path, last)


def test_a_store_that_goes_on_from_before_there_were_links_is_chained_from_then_on(path: Path) -> None:
    """Unlinked entries come first, and are no findings; the next decision begins the chain."""
    unlinked = [f"UPDATE {table} SET link = NULL" for table in ("ledger", "windows", "accounts")]  # noqa: S608 - ours
    assert planted(path, *unlinked) == []
    with Meter.open(f"sqlite:///{path}", offer=OFFER, assume=ENROLLED, clock=lambda: NOON) as meter:
        for number in range(3):
            meter.decide(Request(id=f"n{number}", model=LARGE, at=NOON, input_tokens=1, output_tokens=0))
            meter.decide(Request(id=f"u{number}", model="unknown", at=NOON, input_tokens=1, output_tokens=0))
    assert planted(path) == []
    assert planted(path, "UPDATE ledger SET project = 'p' WHERE id = 'n1'") == [("broken_chain", 19)]


def test_a_file_is_audited_with_what_its_store_has_beyond_it(path: Path, tmp_path: Path) -> None:
    """A ledger file and the store that wrote it are one ledger: a file that was cut at its end goes on in the store."""
    url, file = f"sqlite:///{path}", tmp_path / "ledger.jsonl"
    whole = gratis("ledger", "--store", url).out.splitlines()
    for size in (16, 15, 9, 1, 0):
        file.write_text("".join(line + "\n" for line in whole[:size]), encoding="utf-8")
        answer = gratis("audit", str(file), "--store", url)
        assert (answer.code, answer.out) == (0, "")
        beyond = {16: [], 15: ["gratis: 1 entry is the store's alone, beyond the file"]}
        told = beyond.get(size, [f"gratis: {16 - size} entries are the store's alone, beyond the file"])
        assert answer.err.splitlines() == ["gratis: 16 entries, 0 findings", *told]
    edited = [json.loads(line) for line in whole[:9]]
    edited[8]["project"] = "p"
    file.write_bytes(file_of(edited))
    assert places(gratis("audit", str(file), "--store", url)) == [("broken_chain", 9)]
    file.write_text("".join(line + "\n" for line in [*whole[:8], *whole[9:]]), encoding="utf-8")
    assert ("entry_gap", 10) in places(gratis("audit", str(file), "--store", url))


def test_a_trimmed_server_is_audited_whole_with_the_file_of_its_front(tmp_path: Path) -> None:
    """What was forgotten on the server is in the file: both together are one ledger, one of which is not."""
    file = tmp_path / "ledger.jsonl"
    with Server() as server:
        with Meter.open(server.url, offer=OFFER, assume=ENROLLED, bounds=None) as meter:
            for day in range(40):
                at = NOON + timedelta(days=day)
                meter.decide(Request(id=f"r{day}", model=LARGE, at=at, input_tokens=1, output_tokens=0))
                meter.decide(Request(id=f"u{day}", model="unknown", at=at, input_tokens=1, output_tokens=0))
        assert gratis("ledger", "--store", server.url, "--out", str(file), "--trim").code == 0
        with Meter.open(server.url, offer=OFFER, assume=ENROLLED, bounds=None) as meter:
            meter.decide(Request(id="last", model="unknown", at=NOON, input_tokens=1, output_tokens=0))
        alone = gratis("audit", "--store", server.url)
        both = gratis("audit", str(file), "--store", server.url)
        assert (alone.code, both.code) == (0, 0)
        assert both.err.splitlines()[0] == "gratis: 81 entries, 0 findings"
        edited = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        edited[3]["project"] = "p"
        file.write_bytes(file_of(edited))
        assert places(gratis("audit", str(file), "--store", server.url)) == [("broken_chain", 4)]


# --- In constant memory ---------------------------------------------------------------------------

accounts = st.sampled_from([("offer", "a"), ("offer", "b"), ("other", "a")])
kinds = st.sampled_from([("1M", "day UTC"), ("1M", "rolling 24h"), ("10M", "day UTC")])


@settings(max_examples=100)
@given(st.lists(st.tuples(accounts, kinds, st.integers(0, 12), st.integers(0, 99)), max_size=60), st.integers(1, 9))
def test_windows_are_remembered_however_few_are_held(made: list[tuple[Any, Any, int, int]], held_max: int) -> None:
    """Whatever was put aside is found again: by its start, as the last one, among all; and what is outside any."""
    windows, expected = Windows(held_max=held_max), dict[Any, dict[Any, dict[Any, Said]]]()
    outside: dict[Any, str] = {}
    for account, kind, hour, used in made:
        start = NOON + hour * HOUR
        said = Said(Tally(Window(start, start + HOUR), used, hour + 1), f"{used:024}" if used % 2 else None)
        windows.put(account, kind, said)
        expected.setdefault(account, {}).setdefault(kind, {})[start] = said
        if used % 3 == 0:
            outside[account] = f"{used:024}"
            windows.leave(account, outside[account])
        assert windows.get(account, kind, None) == expected[account][kind][max(expected[account][kind])]
    for account in [("offer", "a"), ("offer", "b"), ("other", "a"), ("no", "body")]:
        ours = expected.get(account, {})
        assert windows.outside(account) == outside.get(account)
        found = {(group, kind, said.tally.window.start): said for group, kind, said in windows.of(account)}
        assert found == {(*kind, start): said for kind, starts in ours.items() for start, said in starts.items()}
        for kind, starts in ours.items():
            for start, said in starts.items():
                assert windows.get(account, kind, start) == said
            assert windows.get(account, kind, NOON - HOUR) is None
    windows.close()


def _restored(server: Server) -> None:
    """What a release without links left on a server: daily and rolling windows, and a correction."""
    kept = json.loads((Path(__file__).parent / "stores" / "redis_before_links.json").read_bytes())
    for key, value in kept.items():
        if isinstance(value, dict):
            fields = [b64decode(part) for pair in value.items() for part in pair]
            server.ask("HSET", b64decode(key), *fields)
        else:
            for row in value:
                if isinstance(row, str):
                    server.ask("ZADD", b64decode(key), 0, b64decode(row))
                else:
                    server.ask("XADD", b64decode(key), b64decode(row[0]), *map(b64decode, row[1]))


def test_a_server_that_goes_on_from_before_there_were_links_is_chained_from_then_on() -> None:
    """Its old decisions are read, repeated and corrected as before, and every new one has its link."""
    rolls = datetime(2025, 3, 3, 12, tzinfo=UTC)
    with Server() as server:
        _restored(server)
        assert gratis("audit", "--store", server.url) == Answer(0, "", said(14))
        with Meter.open(server.url, offer=OFFER, bounds=None, clock=lambda: NOON) as meter:
            again = meter.decide(Request(id="d1", model=LARGE, at=NOON, input_tokens=300_000, output_tokens=0))
            assert (again.replayed, again.used) == (True, 600_000)
            for at in (NOON, rolls, rolls + timedelta(days=1)):
                for number, model in enumerate((LARGE, "unknown")):
                    meter.decide(Request(id=f"{at} {number}", model=model, at=at, input_tokens=1, output_tokens=0))
            meter.void("d1", actor="ann", why="sent twice")
            links = [entry.link is not None for entry in meter.ledger()]
        assert links == [False] * 14 + [True] * 7
        assert gratis("audit", "--store", server.url) == Answer(0, "", said(21, unlinked=14))
