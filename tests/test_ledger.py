"""The ledger: every decision in order, read back, filtered, printed as lines, and followed without skip or repeat."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings, strategies as st

from gratis import Enrollment, Meter, Request
from gratis.ledger import Filter, select as selected
from gratis.lines import decision_line, decode, encode, entry_line, entry_of
from gratis.offers import load
from gratis.stores import Bounds
from gratis.stores.memory import MemoryStore

from .test_audit import STARTS, Clock, histories, live, readings
from .test_cli import FIELDS, PATIENCE_S, gratis

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NOON = datetime(2025, 4, 20, 12, tzinfo=UTC)
DAY = timedelta(days=1)
LARGE = "gpt-4o-2024-08-06"
SMALL = "gpt-4o-mini-2024-07-18"
OFFER = load("openai-data-sharing")
ENROLLED = Enrollment(tier=3, sharing="enabled")


def request(name: object, tokens: int | None = 10, **fields: Any) -> Request:
    """A request of noon."""
    return Request(
        **{"id": f"r{name}", "model": LARGE, "at": NOON, "input_tokens": tokens, "output_tokens": 0, **fields}
    )


def url_of(path: Path) -> str:
    """The URL of a store that does not wait for the disk."""
    return f"sqlite:///{path}?synchronous=off"


def deciding(path: Path) -> Meter:
    """A meter over a SQLite store."""
    return Meter.open(url_of(path), offer=OFFER, assume=ENROLLED, bounds=None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a store is to be."""
    return tmp_path / "gratis.db"


def lines_of(text: str | bytes) -> list[dict[str, Any]]:
    """JSON lines."""
    return [json.loads(line) for line in text.splitlines()]


# --- What is in it --------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "sqlite"])
def meter(request: pytest.FixtureRequest, path: Path) -> Meter:
    """A meter on either store, without decisions."""
    url = "memory:" if request.param == "memory" else url_of(path)
    return Meter.open(url, offer=OFFER, assume=ENROLLED, clock=lambda: NOON, bounds=Bounds())


def test_every_decision_is_in_the_ledger_in_order_eligible_or_not(meter: Meter) -> None:
    """Free or billed, with an allowance or without, late or not: one entry each, from 1 on, as it was answered."""
    requests = [
        request(1),
        request(2, 2_000_000),
        request(3, model="unknown"),
        request(4, None),
        request(5, at=NOON - 9 * DAY),
        request(6, at=NOON - 900 * DAY),
        request(7, kind="assistants", model="o1-2024-12-17"),
        request(8, tools=("web_search", "function"), project="p", account="acme"),
    ]
    decisions = meter.decide_many(requests)
    entries = list(meter.ledger())
    assert [entry.decision for entry in entries] == decisions
    assert [entry.entry for entry in entries] == list(range(1, 9))
    assert {entry.decided_at for entry in entries} == {NOON}
    assert [entry.decision.reason for entry in entries] == [
        "within_allowance",
        "over_allowance",
        "model_not_listed",
        "unmeasured",
        "too_late",
        "offer_not_in_force",
        "assistants_o_series",
        "tool_use",
    ]


def test_what_is_no_decision_is_not_in_the_ledger(meter: Meter) -> None:
    """Repeats, conflicts, refusals, explanations and changes of an enrollment add nothing."""
    meter.decide(request(1))
    meter.decide_many([request(1), request(1, 11), request(2, at=NOON + DAY)])
    meter.explain(request(3))
    meter.enroll("acme", ENROLLED, actor="ann")
    assert [entry.decision.id for entry in meter.ledger()] == ["r1"]
    assert not any(entry.decision.replayed for entry in meter.ledger())


def test_the_ledger_goes_on_behind_an_entry_and_comes_in_pages(meter: Meter) -> None:
    """`after` is a cursor: what comes behind it comes once, in order, over more entries than a page holds."""
    meter.decide_many([request(number) for number in range(2_500)])
    assert [entry.entry for entry in meter.ledger()] == list(range(1, 2_501))
    assert [entry.entry for entry in meter.ledger(after=999)] == list(range(1_000, 2_501))
    assert [entry.entry for entry in meter.ledger(after=2_500)] == []
    assert [entry.entry for entry in meter.ledger(after=10**9)] == []


def test_entries_that_come_while_it_is_read_are_read(meter: Meter) -> None:
    """Reading does not hold deciding up, and what is decided meanwhile comes at its place."""
    meter.decide(request(0))
    seen = []
    for entry in meter.ledger():
        seen.append(entry.entry)
        if entry.entry < 5:
            meter.decide(request(entry.entry))
    assert seen == [1, 2, 3, 4, 5]


accounts = st.sampled_from(["default", "acme", "nobody"])
instants = st.integers(-3, 3).map(lambda days: NOON + days * DAY / 2)


@settings(max_examples=60)
@given(
    made=st.lists(st.tuples(accounts, st.sampled_from([LARGE, SMALL, "?"]), instants), max_size=12),
    account=st.none() | accounts,
    group=st.none() | st.sampled_from(["1M", "10M", "5M"]),
    window=st.none() | instants,
    since=st.none() | instants,
    until=st.none() | instants,
)
def test_filters_choose_by_account_group_window_and_time(  # noqa: PLR0917 - one argument a drawn value
    made: list[tuple[str, str, datetime]],
    account: str | None,
    group: str | None,
    window: datetime | None,
    since: datetime | None,
    until: datetime | None,
) -> None:
    """Filters hold together: an entry is chosen if each of them admits it; ends belong to what comes next."""
    groups = {LARGE: "1M", SMALL: "10M"}
    meter = Meter(MemoryStore(bounds=None), OFFER, assume=ENROLLED)
    meter.decide_many(
        [request(number, account=name, model=model, at=at) for number, (name, model, at) in enumerate(made)]
    )
    expected = [
        f"r{number}"
        for number, (name, model, at) in enumerate(made)
        if (account is None or name == account)
        and (group is None or groups.get(model) == group)
        and (window is None or (model in groups and at.date() == window.date()))
        and (since is None or at >= since)
        and (until is None or at < until)
    ]
    chosen = meter.ledger(account=account, group=group, window=window, since=since, until=until)
    assert [entry.decision.id for entry in chosen] == expected
    by_hand = Filter(account=account, group=group, window=window, since=since, until=until)
    assert [entry.decision.id for entry in selected(meter.ledger(), by_hand)] == expected


# --- As lines -------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(start=st.sampled_from(STARTS), history=histories, reading=readings)
def test_a_line_is_read_back_as_the_entry_that_it_was(
    start: datetime, history: list[tuple[Any, ...]], reading: tuple[str, str]
) -> None:
    """Whatever was decided, its JSON line holds all of it: request, decision, enrollment, terms, place and time."""
    clock = Clock(start)
    store = MemoryStore(clock=clock)
    live(Meter(store, OFFER.reading(counts=reading[0], overage=reading[1]), assume=ENROLLED), clock, history)
    for entry in store.entries():
        assert entry_of(entry_line(entry)) == entry
        assert entry_of(decode(encode(entry_line(entry)))) == entry
        assert encode(entry_line(entry_of(json.loads(encode(entry_line(entry)))))) == encode(entry_line(entry))


def test_a_line_begins_as_the_decision_was_printed(path: Path) -> None:
    """A line of the ledger is its number, the fields of the decision line, and then what it rests on."""
    with deciding(path) as meter:
        decision = meter.decide(request(1))
    (line,) = lines_of(gratis("ledger", "--store", url_of(path)).out)
    assert list(line)[: len(FIELDS) + 1] == ["entry", *FIELDS]
    assert {name: line[name] for name in FIELDS} == decision_line(decision)
    assert list(line)[len(FIELDS) + 1 :] == [
        "project",
        "model",
        "input_tokens",
        "output_tokens",
        "cached_tokens",
        "kind",
        "tools",
        "enrollment",
        "durability",
        "decided_at",
        "terms",
        "link",
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), ["r0", "r1", "r2", "r3", "r4", "r5"]),
        (("--after", "4"), ["r4", "r5"]),
        (("--after", "6"), []),
        (("--account", "acme"), ["r1", "r3", "r5"]),
        (("--group", "10M"), ["r2", "r5"]),
        (("--window", "2025-04-20T00:00:00Z"), ["r0", "r1", "r2"]),
        (("--window", "2025-04-21T00:00:00Z"), ["r3", "r5"]),
        (("--since", "2025-04-21T12:00:00Z"), ["r3", "r4", "r5"]),
        (("--until", "2025-04-21T14:00:00+02:00"), ["r0", "r1", "r2"]),
        (("--account", "acme", "--group", "10M", "--after", "3"), ["r5"]),
        (("--account", "nobody"), []),
    ],
)
def test_the_command_filters_as_the_meter_does(path: Path, arguments: tuple[str, ...], expected: list[str]) -> None:
    """Each filter of the library is an option."""
    models = (LARGE, LARGE, SMALL, LARGE, "?", SMALL)
    with deciding(path) as meter:
        meter.decide_many(
            [
                request(
                    number, account=("default", "acme")[number % 2], model=models[number], at=NOON + number // 3 * DAY
                )
                for number in range(6)
            ]
        )
    answer = gratis("ledger", "--store", url_of(path), *arguments)
    assert [line["id"] for line in lines_of(answer.out)] == expected
    assert (answer.code, answer.err) == (0, "")


# --- A file that is its own cursor ----------------------------------------------------------------


def test_a_file_goes_on_where_it_ends(path: Path, tmp_path: Path) -> None:
    """Each run appends what is new, once; in the end the file is what `gratis ledger` prints."""
    out = tmp_path / "out.jsonl"
    with deciding(path) as meter:
        for turn in range(4):
            meter.decide_many([request(f"{turn}-{number}") for number in range(turn * 600)])
            assert gratis("ledger", "--store", url_of(path), "--out", out).out == ""
    assert out.read_text(encoding="utf-8") == gratis("ledger", "--store", url_of(path)).out


def test_a_torn_last_line_is_cut_wherever_it_was_torn(path: Path, tmp_path: Path) -> None:
    """Whatever part of the last line a crash left, the file ends up whole, each entry once."""
    out = tmp_path / "out.jsonl"
    with deciding(path) as meter:
        meter.decide_many([request(number) for number in range(3)])
    gratis("ledger", "--store", url_of(path), "--out", out)
    whole = out.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    torn = {0, *range(1, len(whole), 101), *(end + beside for end in ends for beside in (-1, 0, 1, 9))}
    for size in sorted(torn):
        out.write_bytes(whole[:size])
        assert gratis("ledger", "--store", url_of(path), "--out", out).code == 0
        assert out.read_bytes() == whole


@pytest.mark.parametrize(
    "content",
    [
        b"my notes\n",
        b"my notes",
        b"my notes\nand more of them",
        b'{"entry": "x"}\n',
        b'{"event": 1}\n',
        b"[1]\n",
        b"7\n",
        b"\n",
        b"\xff\xfe\n",
        b"\0" * 100,
        b"x" * (3 << 20),
        b"x" * (3 << 20) + b"\n",
    ],
    ids=lambda content: repr(content[:12]),
)
def test_a_file_of_another_program_is_refused_and_left_as_it_was(path: Path, tmp_path: Path, content: bytes) -> None:
    """What `--out` did not write is neither cut nor appended to."""
    out = tmp_path / "notes.txt"
    out.write_bytes(content)
    with deciding(path) as meter:
        meter.decide(request(1))
    answer = gratis("ledger", "--store", url_of(path), "--out", out)
    assert out.read_bytes() == content
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert answer.err.startswith(f"gratis: {out}: ")


def test_a_file_of_another_store_is_refused(path: Path, tmp_path: Path) -> None:
    """A file that is ahead of the ledger is not its: going on there would skip what comes next."""
    out, other = tmp_path / "out.jsonl", tmp_path / "other.db"
    with deciding(path) as meter, deciding(other) as ahead:
        meter.decide(request(1))
        ahead.decide_many([request(number) for number in range(5)])
    assert gratis("ledger", "--store", url_of(other), "--out", out).code == 0
    before = out.read_bytes()
    answer = gratis("ledger", "--store", url_of(path), "--out", out)
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("option", "place"), [("--out", ""), ("--out", "nowhere/out"), ("--cursor", ""), ("--cursor", "nowhere/cursor")]
)
def test_a_place_that_cannot_be_written_is_bad_use(path: Path, tmp_path: Path, option: str, place: str) -> None:
    """A folder, or a file in a folder that is not there, is told in one line before anything is printed."""
    with deciding(path) as meter:
        meter.decide(request(1))
    answer = gratis("ledger", "--store", url_of(path), option, tmp_path / place)
    assert answer.err.startswith("gratis: ")
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)


# --- A cursor beside standard output --------------------------------------------------------------


def test_a_cursor_goes_on_where_the_last_run_ended(path: Path, tmp_path: Path) -> None:
    """With `--cursor` each run prints what is new, once; filters do not hold the cursor back."""
    command, printed = ("ledger", "--store", url_of(path), "--cursor", tmp_path / "cursor"), ""
    with deciding(path) as meter:
        for turn in range(4):
            meter.decide_many([request(f"{turn}-{number}") for number in range(turn * 600)])
            printed += gratis(*command).out
        assert printed == gratis("ledger", "--store", url_of(path)).out
        assert (tmp_path / "cursor").read_text(encoding="ascii") == "3600\n"
        meter.decide(request("other", account="acme"))
        assert gratis(*command, "--account", "default").out == ""
        assert gratis(*command).out == ""


def test_after_and_a_cursor_hold_together(path: Path, tmp_path: Path) -> None:
    """Whichever is further on counts."""
    cursor = tmp_path / "cursor"
    with deciding(path) as meter:
        meter.decide_many([request(number) for number in range(6)])
    for known, after, expected in ((2, 4, [5, 6]), (4, 2, [5, 6])):
        cursor.write_text(f"{known}\n", encoding="ascii")
        answer = gratis("ledger", "--store", url_of(path), "--cursor", cursor, "--after", str(after))
        assert [line["entry"] for line in lines_of(answer.out)] == expected


@pytest.mark.parametrize("content", ["", "x\n", "-1\n", "1.5\n", "\u0664\n", "1 2\n"])
def test_a_file_that_is_no_cursor_is_refused(path: Path, tmp_path: Path, content: str) -> None:
    """A file without the number of an entry is not overwritten."""
    cursor = tmp_path / "cursor"
    cursor.write_text(content, encoding="utf-8")
    with deciding(path) as meter:
        meter.decide(request(1))
    answer = gratis("ledger", "--store", url_of(path), "--cursor", cursor)
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert cursor.read_text(encoding="utf-8") == content


# --- Followed -------------------------------------------------------------------------------------


def follow(path: Path, *arguments: str | Path) -> subprocess.Popen[bytes]:
    """`gratis ledger --follow` as a process of its own."""
    command = [sys.executable, "-m", "gratis", "ledger", "--store", url_of(path), "--follow", "--every", "0.001"]
    return subprocess.Popen([*command, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)


def read_until(program: subprocess.Popen[bytes], holds: Callable[[bytes], bool]) -> bytes:
    """What a program prints until it holds what is waited for."""
    text = b""
    while not holds(text):
        ready, _, _ = select.select([program.stdout], [], [], PATIENCE_S)
        assert ready == [program.stdout], f"nothing came within {PATIENCE_S} s"
        piece = os.read(program.stdout.fileno(), 1 << 16)
        assert piece, "the program ended"
        text += piece
    return text


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_follower_with_a_cursor_is_stopped_without_skip_or_repeat(path: Path, tmp_path: Path, stop: int) -> None:
    """Stopped the moment an entry comes out, and started again, it has printed each entry once, in order."""
    printed, rounds = b"", 5
    with deciding(path) as meter:
        for turn in range(rounds):
            meter.decide_many([request(f"{turn}-{number}") for number in range(3)])
            with follow(path, "--cursor", tmp_path / "cursor") as program:
                printed += read_until(program, lambda text, newest=f'"r{turn}-0"': newest.encode() in text)
                program.send_signal(stop)
                rest, err = program.communicate()
                printed += rest
            assert (program.returncode, err) == (0, b"")
    printed += gratis("ledger", "--store", url_of(path), "--cursor", tmp_path / "cursor").out.encode()
    assert [line["entry"] for line in lines_of(printed)] == list(range(1, 3 * rounds + 1))


def test_a_follower_prints_what_comes(path: Path) -> None:
    """An entry is printed soon after it was decided, without being asked for again."""
    with deciding(path) as meter:
        meter.decide(request(0))
        with follow(path) as program:
            for number in range(1, 6):
                line = read_until(program, lambda text: text.endswith(b"\n"))
                assert [each["id"] for each in lines_of(line)] == [f"r{number - 1}"]
                meter.decide(request(number))
            program.send_signal(signal.SIGTERM)
            assert [each["id"] for each in lines_of(program.communicate()[0])] in ([], ["r5"])
    assert program.returncode == 0


# One process decides; another follows into a file and is killed again and again: as soon as it starts, as soon as it
# writes, or some way into what it writes. All are forks of one, so that a start costs nothing.
KILL_FOLLOWERS = """
import os, random, signal, sys
from gratis import Enrollment, Meter, Request
from gratis.cli import main
from gratis.lines import instant

url, out, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
chance = random.Random(20250420)
asked, ask = os.pipe()

def fork(run):
    process = os.fork()
    if process == 0:
        try:
            run()
        finally:
            os._exit(1)
    return process

def decide():
    os.close(ask)
    at, number = instant("at", "2025-04-20T12:00:00Z"), 0
    with Meter.open(url, assume=Enrollment(tier=3, sharing="enabled"), bounds=None) as meter:
        while os.read(asked, 1):
            for _ in range(100):
                number += 1
                model = ("gpt-4o-2024-08-06", "unknown")[number % 2]
                meter.decide(Request(id=f"r{number}", model=model, at=at, input_tokens=1, output_tokens=0))

def size():
    return os.path.getsize(out) if os.path.exists(out) else 0

decider = fork(decide)
for _ in range(kills):
    goal = size() + chance.choice([0, 1, 400, 5_000, 40_000])
    os.write(ask, b".")
    follower = fork(lambda: main(["ledger", "--store", url, "--follow", "--every", "0.001", "--out", out]))
    while size() < goal:
        os.sched_yield()
    os.kill(follower, signal.SIGKILL)
    os.waitpid(follower, 0)
os.kill(decider, signal.SIGKILL)
os.waitpid(decider, 0)
"""


def test_a_follower_killed_at_any_moment_skips_and_repeats_nothing(path: Path, tmp_path: Path) -> None:
    """Killed fifty times while another process decides, the file holds each entry once, in order, and all of them."""
    out = tmp_path / "out.jsonl"
    deciding(path).close()
    subprocess.run([sys.executable, "-c", KILL_FOLLOWERS, url_of(path), str(out), "50"], check=True)
    assert gratis("ledger", "--store", url_of(path), "--out", out).code == 0
    assert out.read_text(encoding="utf-8") == gratis("ledger", "--store", url_of(path)).out
    entries = [line["entry"] for line in lines_of(out.read_bytes())]
    assert entries == list(range(1, len(entries) + 1))
    assert gratis("audit", "--store", url_of(path)).code == 0
    assert gratis("audit", out).code == 0
