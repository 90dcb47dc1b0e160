"""Eight processes at one server, through a line that loses answers: one order explains all that they were told."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sysconfig
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gratis import Meter
from gratis.lines import encode, request_line
from gratis.stores.urls import open_store

from .oracle import Call, Change, History, faults
from .proxy import Proxy
from .servers import Server
from .test_histories import DAILY, OFFER, ROLLING, ask, change_tiers, enroll, ledger_of, request_of

if TYPE_CHECKING:
    from collections.abc import Iterator

PROCESSES = 8
ASKED_EACH = 2_000
RUNS = 24
ASKED_A_RUN = 300
FAULTS = ("cut_after", "cut_before", "half", "cut_after")
NAMESPACES = (f"history {number}" for number in count())
# Where the first answer is lost on the way, the meter asks again itself, and hears that it was decided before.
LOST = {"an id was never answered first"}
GRATIS = Path(sysconfig.get_path("scripts"), "gratis")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A private server."""
    with Server() as started:
        yield started


def open_meter(url: str, at: datetime) -> Meter:
    """A meter whose clock stands still."""
    return Meter(open_store(url, clock=lambda: at), OFFER)


def ask_from_a_process(url: str, at: datetime, folder: Path, caller: int, start: Any) -> None:
    """A process asks, opens the store anew now and then, and leaves what it was answered in a file of its own."""
    calls = []
    start.wait()
    for part in range(4):
        with open_meter(url, at) as meter:
            calls += ask(meter, at, caller=10 * caller + part, most=ASKED_EACH // 4)
    (folder / f"{caller}.calls").write_bytes(pickle.dumps(calls))


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("at", [DAILY, ROLLING], ids=["daily", "rolling"])
def test_processes_whose_answers_are_lost_are_answered_in_one_order(
    server: Server, at: datetime, shards: int, tmp_path: Path
) -> None:
    """Eight processes ask each other's ids while a ninth changes tiers; answers are cut off all the while."""
    options = f"?namespace={next(NAMESPACES)}&shards={shards}"
    context = multiprocessing.get_context("fork")
    start = context.Barrier(PROCESSES + 1)
    with open_meter(server.url + options, at) as meter:
        changes = [enroll(meter, account, 1) for account in ("acme", "default")]
    chance = random.Random(shards)  # noqa: S311 - a schedule, no secret
    with ExitStack() as stack:
        lines = [stack.enter_context(Proxy(server.address)) for _ in range(PROCESSES)]
        processes = [
            context.Process(target=ask_from_a_process, args=(line.url + options, at, tmp_path, caller, start))
            for caller, line in enumerate(lines)
        ]
        for process in processes:
            process.start()
        with open_meter(server.url + options, at) as meter:
            start.wait()
            changes += change_tiers(meter)
            struck = 0
            while any(process.is_alive() for process in processes):
                line = chance.choice(lines)
                if line.left == 0:
                    line.arm(chance.choice(FAULTS))
                    struck += 1
                chance.choice(processes).join(0.04)
            assert [process.exitcode for process in processes] == [0] * PROCESSES
            calls = [
                call
                for caller in range(PROCESSES)
                for call in pickle.loads((tmp_path / f"{caller}.calls").read_bytes())  # noqa: S301 - written above
            ]
            history = History(calls=calls, changes=changes, ledger=ledger_of(meter))
    assert struck > 2 * PROCESSES
    assert len(history.calls) >= PROCESSES * ASKED_EACH
    assert len(history.ledger) == len({(call.account, call.id) for call in calls})
    assert faults(history) <= LOST


def test_commands_that_are_killed_and_repeated_leave_what_one_order_explains(server: Server, tmp_path: Path) -> None:
    """`gratis decide` runs four at once, killed at any moment: what it printed stands, each id has one decision."""
    url = f"{server.url}?namespace={next(NAMESPACES)}"
    with open_meter(url, DAILY) as meter:
        changes = [Change(account, 3, 0, 0) for account in ("acme", "default") if enroll(meter, account, 3)]
    chance = random.Random(7)  # noqa: S311 - a schedule, no secret
    command = [GRATIS, "decide", "--store", url, "--no-bounds", "--offer", OFFER.name, "--format", "json"]
    calls: list[Call] = []
    printed: list[dict[str, Any]] = []
    running: list[tuple[subprocess.Popen[bytes], Path]] = []
    for number in range(RUNS):
        asked, told = tmp_path / f"{number}.asked", tmp_path / f"{number}.told"
        requests = [request_of(chance.randrange(1_000), DAILY) for _ in range(ASKED_A_RUN)]
        calls += [Call(request.account, request.id, 0, math.inf, None) for request in requests]
        asked.write_bytes(b"".join(encode(request_line(request)) + b"\n" for request in requests))
        with told.open("wb") as out:
            running.append((subprocess.Popen([*command, asked], stdout=out), told))
        if len(running) == 4:
            process, told = running.pop(chance.randrange(4))
            if chance.random() < 3 / 4:
                _kill_once_it_prints(process, told, chance)
            process.wait()
            printed += _whole_lines(told)
    for process, told in running:
        assert process.wait() == 0
        printed += _whole_lines(told)
    with open_meter(url, DAILY) as meter:
        calls += [Call(line["account"], line["id"], 0, math.inf, line) for line in printed]
        history = History(calls=calls, changes=changes, ledger=ledger_of(meter))
    assert faults(history) == set()
    decided = {(row["account"], row["id"]): row for row in history.ledger}
    assert len(decided) == len(history.ledger)
    for line in printed:
        row = decided[line["account"], line["id"]]
        assert {**line, "replayed": False} == {name: row[name] for name in line}


def _kill_once_it_prints(process: subprocess.Popen[bytes], told: Path, chance: random.Random) -> None:
    """Kill a command some lines after its first, if it is not over by then."""
    lines = chance.randrange(2)
    while process.poll() is None and told.stat().st_size <= lines:
        os.sched_yield()
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)


def _whole_lines(told: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in told.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def test_a_follower_that_is_killed_has_every_entry_once_and_trims_what_it_has(server: Server, tmp_path: Path) -> None:
    """`gratis ledger --follow --out FILE`, killed and started again, skips and repeats nothing, and then trims."""
    url = f"{server.url}?namespace={next(NAMESPACES)}"
    kept = tmp_path / "ledger.jsonl"
    command = [GRATIS, "ledger", "--store", url, "--follow", "--every", "0.01", "--out", kept]
    now = long_ago = datetime.now(UTC) - timedelta(days=10)
    with Meter(open_store(url, clock=lambda: now), OFFER) as meter:
        for account in ("acme", "default"):
            enroll(meter, account, 3)
        for turn in range(6):
            meter.decide_many([request_of(300 * turn + number, long_ago) for number in range(300)])
            follower = subprocess.Popen(command)
            while not kept.exists() or kept.read_bytes().count(b"\n") < 320 * turn:
                os.sched_yield()
            follower.send_signal(signal.SIGKILL)
            follower.wait()
        follower = subprocess.Popen([*command, "--trim"])
        while next(meter.ledger(), None) is not None:
            os.sched_yield()
        now = long_ago + timedelta(days=10)
        meter.decide_many([request_of(1_800 + number, now) for number in range(100)])
        while kept.read_bytes().count(b"\n") < 1_900:
            os.sched_yield()
        follower.send_signal(signal.SIGTERM)
        assert follower.wait() == 0
        assert [entry.entry for entry in meter.ledger()] == list(range(1_801, 1_901))
    entries = [json.loads(line) for line in kept.read_bytes().splitlines()]
    assert [entry["entry"] for entry in entries] == list(range(1, 1_901))
    for audited, count_of in ((["--store", url], 100), ([kept], 1_900)):
        done = subprocess.run([GRATIS, "audit", *audited], check=False, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, f"gratis: {count_of:,} entries, 0 findings\n")
