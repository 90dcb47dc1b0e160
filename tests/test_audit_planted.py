"""An honest history has no findings; any planted fault is found, at its entry: over memory, SQLite and Redis."""

from __future__ import annotations

import json
import random
import sqlite3
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from gratis import Enrollment, GratisError, Meter, Request, Usage
from gratis.lines import encode, entry_line
from gratis.offers import load
from gratis.stores.memory import MemoryStore
from gratis.stores.sqlite import SQLiteStore, Synchronous
from gratis.stores.urls import open_store

from .servers import Server
from .test_audit import Clock, audit_of, consistent, places
from .test_cli import gratis

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from gratis.stores import Store

    Lines = list[dict[str, Any]]

LARGE, SMALL = "gpt-4o-2024-08-06", "gpt-4o-mini-2024-07-18"
ACCOUNTS = ("default", "acme")
OFFERS = ("openai-data-sharing", "openai-evals")
STARTS = (
    datetime(2025, 4, 20, 12, tzinfo=UTC),
    datetime(2025, 3, 3, 12, tzinfo=UTC),  # windows roll
    datetime(2025, 3, 5, 12, tzinfo=UTC),  # and soon do so no longer
)
STEPS = 70
SEEDS = 8
BLAMED_MAX = 6  # entries: the wrong one, the next of each window that it left or came to, and what corrects it


# --- Honest histories -----------------------------------------------------------------------------


def live(store: Store, clock: Clock, seed: int) -> None:
    """A history of two accounts under two offers: decisions, holds, corrections, changes of tier, and days."""
    chance = random.Random(seed)  # noqa: S311 - a test's
    meters = [Meter(store, load(name), assume=Enrollment(tier=1, sharing="enabled")) for name in OFFERS]
    holds: list[tuple[Meter, Any]] = []
    for number in range(STEPS):
        meter = chance.choice([meters[0], meters[0], meters[0], meters[1]])
        with suppress(GratisError):  # what is refused leaves no trace
            step(meter, clock, chance, number, holds)


def step(meter: Meter, clock: Clock, chance: random.Random, number: int, holds: list[tuple[Meter, Any]]) -> None:
    """One thing that happens."""
    account, earlier = chance.choice(ACCOUNTS), f"r{chance.randrange(number + 1)}"
    tokens = chance.choice([0, 7, 1_000, 90_000, 240_000])
    match chance.choice(
        ["decide"] * 9 + ["hold", "hold", "settle", "settle", "void", "adjust", "enroll", "wait", "wait"]
    ):
        case "decide":
            at = clock.now - timedelta(minutes=chance.choice([0, 0, 0, 0, 90, 1_500]))
            kind = "eval" if meter.offer.name == "openai-evals" else chance.choice(["completion"] * 7 + ["assistants"])
            model = chance.choice([LARGE, LARGE, LARGE, SMALL, "unknown"])
            name = chance.choice([f"r{number}"] * 9 + [earlier])
            meter.decide(
                Request(id=name, account=account, model=model, at=at, input_tokens=tokens, output_tokens=1, kind=kind)
            )
        case "hold":
            request = Request(id=f"r{number}", account=account, model=LARGE, at=clock.now)
            holds.append((meter, meter.hold(request, max(1, tokens), on_expiry=chance.choice(["decided", "released"]))))
        case "settle" if holds:
            holder, hold = holds.pop(chance.randrange(len(holds)))
            holder.settle(hold, Usage(input_tokens=tokens, output_tokens=2, model=chance.choice([None, None, SMALL])))
        case "void":
            meter.void(earlier, account=account, actor="ann", why="sent twice")
        case "adjust":
            meter.adjust(
                earlier, Usage(input_tokens=tokens, output_tokens=3), account=account, actor="ann", why="a bill"
            )
        case "enroll":
            meter.enroll(account, Enrollment(tier=chance.choice([1, 3]), sharing="enabled"), actor="ann")
        case _:
            clock.now += timedelta(minutes=chance.choice([1, 5, 20, 300, 1_440]))


def lines_of(store: Store) -> Lines:
    """The lines of a store's ledger."""
    return [json.loads(encode(entry_line(entry))) for entry in store.entries()]


def dump(seed: int) -> Lines:
    """The ledger of a history in memory."""
    clock = Clock(STARTS[seed % len(STARTS)])
    store = MemoryStore(clock=clock)
    live(store, clock, seed)
    return lines_of(store)


DUMPS = [dump(seed) for seed in range(SEEDS)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server for all tests of this file."""
    with Server() as started:
        yield started


@pytest.mark.parametrize("seed", range(SEEDS))
def test_an_honest_history_has_no_findings_in_any_store(seed: int, tmp_path: Path, server: Server) -> None:
    """Every store says the same of it, and an audit of any of them, or of its lines, says nothing."""
    server.ask("FLUSHALL")
    clock = Clock(STARTS[0])
    for store in (
        MemoryStore(clock=clock),
        SQLiteStore(tmp_path / "gratis.db", clock=clock, synchronous=Synchronous.OFF),
        open_store(server.url, clock=clock),
    ):
        clock.now = STARTS[seed % len(STARTS)]
        live(store, clock, seed)
        told = lines_of(store)
        assert [without_place(line) for line in told] == [without_place(line) for line in DUMPS[seed]]
        store.close()
    for place in (("--store", f"sqlite:///{tmp_path}/gratis.db"), ("--store", server.url)):
        assert gratis("audit", *place) == (0, "", f"gratis: {len(DUMPS[seed])} entries, 0 findings\n")
    answer = audit_of(DUMPS[seed])
    assert (answer.code, answer.out) == (0, "")


def without_place(line: dict[str, Any]) -> dict[str, Any]:
    """A line without what its store alone says of it."""
    return {**line, "durability": None, "link": None}


# --- Faults in lines ------------------------------------------------------------------------------


def chain_of(line: dict[str, Any]) -> tuple[Any, ...]:
    """The window to which a line belongs, or its account's place outside any."""
    account = line["offer"], line["account"]
    if line["window_start"] is None:
        return account
    return *account, line["terms"]["group"], line["terms"]["window"], line["window_start"]


def later(lines: Lines, place: int) -> Lines:
    """What follows a line in its window."""
    return [line for line in lines[place + 1 :] if chain_of(line) == chain_of(lines[place])]


def renumbered(lines: Lines) -> None:
    """Number entries anew, as whoever takes some out or moves them would."""
    for number, line in enumerate(lines, 1):
        line["entry"] = number


def moved(line: dict[str, Any], days: int, *fields: str) -> None:
    """Move times of a line by days."""
    for field in fields:
        line[field] = (datetime.fromisoformat(line[field]) + timedelta(days=days)).isoformat()[:-6] + "Z"


def needless(lines: Lines, place: int) -> None:
    """Bill what is free, and take it out of all the totals that follow."""
    line = lines[place]
    took = line["tokens"] if line["terms"]["counts"] == "free" else 0
    line.update(reason="over_allowance", free_tokens=0, used=line["used"] - took)
    consistent(line)


def free(lines: Lines, place: int) -> None:
    """Call free what is billed."""
    lines[place].update(reason="within_allowance", free_tokens=lines[place]["tokens"], used=lines[place]["total"])
    consistent(lines[place])


def tier(lines: Lines, place: int) -> None:
    """Another enrollment, and the allowance that it gives."""
    line = lines[place]
    factor = 4 if line["enrollment"]["tier"] == 1 else 0.25
    line["enrollment"]["tier"] = 3 if line["enrollment"]["tier"] == 1 else 1
    line["terms"]["allowance"] = int(line["allowance"] * factor)
    consistent(line)


def shifted(lines: Lines, place: int) -> None:
    """Another total, and all totals that follow from it."""
    for line in [lines[place], *later(lines, place)]:
        line.update(used=line["used"] + 1, total=line["total"] + 1)
        consistent(line)


def group(lines: Lines, place: int) -> None:
    """The other group."""
    lines[place]["terms"]["group"] = "10M" if lines[place]["group"] == "1M" else "1M"
    consistent(lines[place])


def twice(lines: Lines, place: int) -> None:
    """The same id decided again at the end of its window, on top of all that was decided."""
    line = json.loads(json.dumps(lines[place]))
    last = [lines[place], *later(lines, place)][-1]
    line.update(seq=last["seq"] + 1, used=last["used"] + line["tokens"], total=last["used"] + line["tokens"])
    consistent(line)
    lines.insert(lines.index(last) + 1, line)
    renumbered(lines)


def cut(lines: Lines, place: int) -> None:
    """Take an entry out and close up behind it, in numbers and in seq."""
    for line in later(lines, place):
        line["seq"] = line["seq"] and line["seq"] - 1
    del lines[place]
    renumbered(lines)


def swapped(lines: Lines, place: int) -> None:
    """An entry and the next of its window change places, seqs and times."""
    other = lines.index(later(lines, place)[0])
    one, two = lines[place], lines[other]
    for field in ("seq", "decided_at"):
        one[field], two[field] = two[field], one[field]
    lines[place], lines[other] = two, one
    renumbered(lines)


def put_in(lines: Lines, place: int) -> None:
    """A forged entry behind an honest one, with its link."""
    lines.insert(place + 1, {**lines[place], "id": "forged"})
    renumbered(lines)


def fields(**changed: Any) -> Callable[[Lines, int], None]:
    """Set fields, and write anew what a line says twice."""

    def edited(lines: Lines, place: int) -> None:
        lines[place].update(changed)
        consistent(lines[place])

    return edited


def more(field: str, by: int) -> Callable[[Lines, int], None]:
    """Add to a number, and write anew what a line says twice."""

    def edited(lines: Lines, place: int) -> None:
        lines[place][field] += by
        consistent(lines[place])

    return edited


def window(lines: Lines, place: int) -> None:
    """Another day."""
    moved(lines[place], 1, "window_start", "window_end")


def request_time(lines: Lines, place: int) -> None:
    """Another time of the request."""
    moved(lines[place], -2, "at")


def decision_time(lines: Lines, place: int) -> None:
    """Another time of the decision."""
    moved(lines[place], 3, "decided_at")


def returned(lines: Lines, place: int) -> None:
    """More given back than was taken."""
    lines[place]["correction"]["returned"] += 5


def corrector(lines: Lines, place: int) -> None:
    """Somebody else who corrected."""
    lines[place]["correction"]["actor"] = "mallory"


def judged(line: dict[str, Any]) -> bool:
    """Whether a line belongs to a window, and is the first word on its request."""
    return line["window_start"] is not None and "correction" not in line and line["offer"] == OFFERS[0]


def is_free(line: dict[str, Any]) -> bool:
    """Whether it is free, and of some tokens."""
    return judged(line) and line["verdict"] == "free" and line["tokens"] > 0


def billed(line: dict[str, Any]) -> bool:
    """Whether it does not fit."""
    return judged(line) and line["verdict"] == "billed"


def anything(line: dict[str, Any]) -> bool:
    """Any line at all."""
    return bool(line)


def corrects(line: dict[str, Any]) -> bool:
    """Whether an owner corrected something."""
    return "correction" in line and line["correction"]["actor"] is not None


FAULTS: list[tuple[str, Callable[[dict[str, Any]], bool], Callable[[Lines, int], None], str]] = [
    ("needless", is_free, needless, "needless_billing"),
    ("only the reason", is_free, fields(reason="over_allowance"), "needless_billing"),
    ("wrongly free", billed, free, "wrongly_free"),
    ("seq gap", judged, more("seq", 1), "seq_gap"),
    ("seq repeated", lambda line: judged(line) and line["seq"] > 1, more("seq", -1), "seq_repeated"),
    ("total", judged, more("total", 1), "wrong_totals"),
    ("used", judged, more("used", 1), "wrong_totals"),
    ("a decision twice", is_free, twice, "decided_twice"),
    ("group", judged, group, "wrong_group"),
    ("window", judged, window, "wrong_window"),
    ("revision", lambda line: line["revision"] == "2025-04-16", lambda lines, place: lines[place]["terms"].update(
        revision="2024-12-01"), "wrong_terms"),
    ("tier", judged, tier, "broken_chain"),
    ("time of the request", judged, request_time, "broken_chain"),
    ("time of the decision", anything, decision_time, "broken_chain"),
    ("project", anything, fields(project="elsewhere"), "broken_chain"),
    ("account", anything, fields(account="nobody"), "broken_chain"),
    ("put in", anything, put_in, "broken_chain"),
    ("no link", lambda line: line["entry"] > 1, fields(link=None), "broken_chain"),
    ("returned", corrects, returned, "wrong_correction"),
    ("who corrected", corrects, corrector, "broken_chain"),
]  # fmt: skip


@pytest.mark.parametrize(("fits", "plant", "kind"), [row[1:] for row in FAULTS], ids=[row[0] for row in FAULTS])
def test_a_planted_fault_is_found_where_it_is(
    fits: Callable[[dict[str, Any]], bool], plant: Callable[[Lines, int], None], kind: str
) -> None:
    """In each history, at a place of chance: with its kind, at its entry, and with few entries blamed beside it."""
    planted = 0
    for seed, honest in enumerate(DUMPS):
        found = [place for place, line in enumerate(honest) if fits(line)]
        if not found:
            continue
        place = random.Random(seed).choice(found)  # noqa: S311 - a test's
        lines = json.loads(json.dumps(honest))
        plant(lines, place)
        at = next(number for number, line in enumerate(lines) if number >= len(honest) or line != honest[number])
        answer, planted = audit_of(lines), planted + 1
        assert answer.code == 1
        assert (kind, lines[at]["entry"]) in places(answer)
        assert len({entry for _, entry in places(answer)}) <= BLAMED_MAX
    assert planted > 1


def test_a_shifted_window_is_found_where_it_begins() -> None:
    """Totals that all follow from a wrong one are no findings of the rule: it is said once, and each edit of a link."""
    for honest in DUMPS:
        place = next(number for number, line in enumerate(honest) if is_free(line) and later(honest, number))
        lines = json.loads(json.dumps(honest))
        shifted(lines, place)
        found = places(audit_of(lines))
        assert ("broken_chain", honest[place]["entry"]) in found
        assert {entry for kind, entry in found if kind == "wrong_totals"} == {honest[place]["entry"]}


@pytest.mark.parametrize("plant", [cut, swapped])
def test_what_is_taken_out_or_moved_is_found_at_the_next_of_its_window(plant: Callable[[Lines, int], None]) -> None:
    """Wherever it stood, however all is numbered anew."""
    for honest in DUMPS:
        for place in [place for place in range(0, len(honest), 5) if later(honest, place)]:
            lines = json.loads(json.dumps(honest))
            following = lines.index(later(lines, place)[0])
            plant(lines, place)
            at = following if plant is cut else place + 1
            answer = audit_of(lines)
            assert answer.code == 1
            assert ("broken_chain", at) in places(answer)


# --- Faults in stores -----------------------------------------------------------------------------

STATEMENTS = [
    ("UPDATE ledger SET reason = 'over_allowance' WHERE entry = {free}", "needless_billing"),
    ("UPDATE ledger SET total = total + 1 WHERE entry = {free}", "wrong_totals"),
    ("UPDATE ledger SET seq = seq + 1 WHERE entry = {free}", "seq_gap"),
    ("UPDATE ledger SET project = 'elsewhere' WHERE entry = {any}", "broken_chain"),
    ("UPDATE ledger SET decided_at = decided_at + 1 WHERE entry = {any}", "broken_chain"),
    ("UPDATE ledger SET link = NULL WHERE entry = {last}", "broken_chain"),
    ("DELETE FROM ledger WHERE entry = {any}", "broken_chain"),
    ("DELETE FROM ledger WHERE entry = {last}", "broken_chain"),
    ("UPDATE windows SET used = used + 1 WHERE window = (SELECT window FROM ledger WHERE entry = {free})",
     "counter_differs"),
    ("UPDATE windows SET seq = seq + 1 WHERE window = (SELECT window FROM ledger WHERE entry = {free})",
     "counter_differs"),
    ("UPDATE windows SET link = NULL WHERE window = (SELECT window FROM ledger WHERE entry = {free})", "broken_chain"),
    ("UPDATE enrollments SET enrollment = replace(enrollment, '\"tier\":3', '\"tier\":4')", "not_in_force"),
]  # fmt: skip


def test_whatever_is_edited_in_a_file_is_found(tmp_path: Path) -> None:
    """Each statement, on the same history: with its kind."""
    clock, path, seed = Clock(STARTS[0]), tmp_path / "gratis.db", 0
    store = SQLiteStore(path, clock=clock, synchronous=Synchronous.OFF)
    live(store, clock, seed)
    meter = Meter(store, load(OFFERS[0]))
    meter.enroll("new", Enrollment(tier=3, sharing="enabled"), actor="ann")
    for number in range(3):
        meter.decide(
            Request(id=f"n{number}", account="new", model=LARGE, at=clock.now, input_tokens=5, output_tokens=5)
        )
    lines = lines_of(store)
    store.close()
    chosen = {
        "free": next(line["entry"] for line in lines if is_free(line)),
        "any": next(line["entry"] for place, line in enumerate(lines) if later(lines, place)),
        "last": lines[-1]["entry"],
    }
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        for (trigger,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {trigger}")
        connection.commit()
        connection.execute("PRAGMA journal_mode = DELETE")
    whole, copied = path.read_bytes(), tmp_path / "copy.db"
    for statement, kind in STATEMENTS:
        copied.write_bytes(whole)
        with closing(sqlite3.connect(copied)) as connection:
            assert connection.execute(statement.format(**chosen)).rowcount > 0
            connection.commit()
        answer = gratis("audit", "--store", f"sqlite:///{copied}")
        copied.unlink()
        assert (statement, answer.code, kind in {line["kind"] for line in answer.lines}) == (statement, 1, True)


Streamed = list[tuple[bytes, list[bytes]]]


def _without(entries: Streamed, place: int) -> Streamed:
    return entries[:place] + entries[place + 1 :]


def _again(entries: Streamed, place: int) -> Streamed:
    number = int(entries[-1][0].split(b"-")[0]) + 1
    return [*entries, (b"%d-0" % number, entries[place][1][-2:])]


def _edited(entries: Streamed, place: int) -> Streamed:
    name, said = entries[place]
    number, _, rest = said[-1].partition(b" w ")
    used, _, rest = rest.partition(b" ")
    return [
        *entries[:place],
        (name, [*said[:-1], b"%b w %d %b" % (number, int(used) + 1, rest)]),
        *entries[place + 1 :],
    ]


def test_whatever_is_rewritten_on_a_server_is_found(server: Server) -> None:
    """A stream with an entry less, one twice or one that says more; a counter or a last link that says another."""
    server.ask("FLUSHALL")
    clock = Clock(STARTS[0])
    store = open_store(server.url, clock=clock)
    live(store, clock, 0)
    store.close()
    client: Any = server.client()
    client.set_response_callback("XRANGE", lambda said: said)  # as it is: an entry may name a field more than once
    ask = client.execute_command
    keys = {key.rsplit(b":", 1)[1]: key for key in client.keys("*")}
    stream, state = keys[b"ledger"], keys[b"state"]
    honest: Streamed = [(name, list(said)) for name, said in ask("XRANGE", stream, "-", "+")]
    place = next(number for number, (_, said) in enumerate(honest) if b" w " in said[-1].split(b"\n")[0])
    for rewritten, kind in ((_without, "unreadable"), (_again, "decided_twice"), (_edited, "broken_chain")):
        ask("DEL", stream)
        for name, said in rewritten(honest, place):
            ask("XADD", stream, name, *said)
        answer = gratis("audit", "--store", server.url)
        assert (answer.code, kind in {line["kind"] for line in answer.lines}) == (1, True)
    ask("DEL", stream)
    for name, said in honest:
        ask("XADD", stream, name, *said)
    for prefix, kind in ((b"t", "counter_differs"), (b"o", "broken_chain")):
        field = next(name for name in client.hkeys(state) if name.startswith(prefix))
        before = client.hget(state, field)
        for value in (b"1" + before if prefix == b"t" else before[::-1], None):
            ask("HDEL", state, field) if value is None else ask("HSET", state, field, value)
            answer = gratis("audit", "--store", server.url)
            assert (answer.code, kind in {line["kind"] for line in answer.lines}) == (1, True)
        ask("HSET", state, field, before)
    assert gratis("audit", "--store", server.url).code == 0
