"""Many processes at one server, cut off and killed: one order explains what they were told."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from contextlib import ExitStack, closing
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from gratis import Meter
from gratis.lines import decision_line
from gratis.stores.urls import open_store

from .callers import ENROLLED, LOST_ANSWERS, OFFER, PATIENT, Rough, at_noon, faults_of, request
from .oracle import DAY, END, HOUR, START, SWITCH, Call, Oracle, text_of
from .servers import Server
from .test_histories import DAILY, ROLLING, ask, change_tiers, enroll, in_child, in_threads, told

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime
    from multiprocessing.connection import Connection

    from .proxy import Fault

PROCESSES, ASKED_EACH = 8, 600
CUTS: tuple[Fault, ...] = ("cut_before", "cut_after", "half")
CALLERS, KILLS, REQUESTS, PART = 3, 3, 240, 12
MODELS = ("gpt-4o-2024-08-06", "gpt-4o-mini-2024-07-18", "o1-2024-12-17", "gpt-4.1-2025-04-14", "unknown", "ft:gpt-4o")


@pytest.fixture
def server() -> Iterator[Server]:
    """A server of a test's own."""
    with Server() as server:
        yield server


# --- Eight processes, answers cut off -------------------------------------------------------------


def open_meter(url: str, at: datetime) -> Meter:
    """A meter over a store that others use, too; its clock stands still."""
    return Meter(open_store(f"{url}?wait={PATIENT}", clock=lambda: at), OFFER)


def ask_from_a_process(parent: Connection, at: datetime, caller: int) -> None:
    """Ask where the parent says, open the store anew in between, and tell what was answered."""
    url, calls = parent.recv(), []
    for turn in range(2):
        with open_meter(url, at) as meter:
            calls += ask(meter, at, caller=10 * caller + turn, most=ASKED_EACH // 2)
    parent.send(calls)


@pytest.mark.parametrize("at", [DAILY, ROLLING], ids=["daily", "rolling"])
def test_eight_processes_leave_a_history_that_one_order_explains(at: datetime, server: Server) -> None:
    """Processes that ask each other's ids, and whose answers are cut off while tiers change, agree on one order."""
    with ExitStack() as stack, open_meter(server.url, at) as meter:
        changes = [enroll(meter, account, 1) for account in ("acme", "default")]
        children = [
            stack.enter_context(in_child(partial(ask_from_a_process, at=at, caller=caller)))
            for caller in range(PROCESSES)
        ]
        doors = [  # after the forks, since they have threads
            stack.enter_context(Rough(server.address, seed=seed, share=1 / 20, faults=CUTS))
            for seed in range(PROCESSES)
        ]
        for child, door in zip(children, doors, strict=True):
            child.send(door.url)
        changes += change_tiers(meter)
        calls: list[Call] = [call for child in children for call in told(child)]
        struck = sum(door.struck for door in doors)
        assert struck > PROCESSES
        assert len(calls) >= PROCESSES * ASKED_EACH
        assert faults_of(meter._store, calls, changes) <= LOST_ANSWERS
        answered_first = {(call.account, call.id) for call in calls if call.line is None or not call.line["replayed"]}
        assert len({(call.account, call.id) for call in calls} - answered_first) <= struck * 8


# --- `gratis decide`, killed and repeated ---------------------------------------------------------


def requests_of(chance: random.Random) -> list[dict[str, Any]]:
    """Requests of some accounts, in every window that the offer has known, as the oracle has them."""
    return [
        {
            "id": f"r{number}",
            "account": chance.choice(("acme", "default", "a}{b")),
            "project": None,
            "model": chance.choice(MODELS),
            "at": chance.choice((START - DAY, SWITCH - DAY, SWITCH, END - 2 * DAY)) + chance.randrange(4) * 12 * HOUR,
            "input_tokens": chance.choice((0, 1, 5_000, 200_000, None)),
            "output_tokens": chance.choice((0, 77, 150_000)),
            "cached_tokens": 0,
            "kind": "completion",
            "tools": [],
        }
        for number in range(REQUESTS)
    ]


def decided(
    url: str, requests: list[dict[str, Any]], chance: random.Random, *, is_killed: bool
) -> list[dict[str, Any]]:
    """What `gratis decide` printed of requests that came a few at a time, until all were decided or it was killed."""
    command = [sys.executable, "-m", "gratis", "decide", "--store", url, "--tier", "3", "--no-bounds"]
    last = chance.randrange(0, REQUESTS, PART) if is_killed else REQUESTS
    printed: list[bytes] = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        for first in range(0, REQUESTS, PART):
            part = requests[first : first + PART]
            lines = [json.dumps({**one, "at": text_of(one["at"])}).encode() + b"\n" for one in part]
            program.stdin.write(b"".join(lines))
            program.stdin.flush()
            if first >= last:
                printed += [program.stdout.readline() for _ in range(chance.choice((0, 0, 0, 1, PART)))]
                program.kill()
                break
            printed += [program.stdout.readline() for _ in part]
        program.stdin.close()
        rest = program.stdout.read()
    assert program.returncode == (-signal.SIGKILL if is_killed else 0)
    return [json.loads(line) for line in b"".join([*printed, rest]).split(b"\n")[:-1]]


def decide_again_and_again(url: str, requests: list[dict[str, Any]], caller: int) -> list[dict[str, Any]]:
    """What processes printed that were asked the same in another order, of which only the last one is not killed."""
    chance = random.Random(caller)  # noqa: S311 - a schedule, no secret
    own = chance.sample(requests, len(requests))
    printed = [decided(url, own, chance, is_killed=kill < KILLS) for kill in range(KILLS + 1)]
    assert [line["id"] for line in printed[-1]] == [one["id"] for one in own]
    return [line for lines in printed for line in lines]


def test_processes_that_are_killed_and_repeated_decide_as_the_rule_has_it(server: Server) -> None:
    """Whatever processes were killed, the ledger has each request once, and in its order each row is the rule's."""
    url = f"{server.url}?wait={PATIENT}"
    requests = requests_of(random.Random(7))  # noqa: S311 - a schedule, no secret
    printed = in_threads([partial(decide_again_and_again, url, requests, caller) for caller in range(CALLERS)])
    with Meter.open(url, bounds=None) as meter:
        rows = [decision_line(entry.decision) for entry in meter.ledger()]
    by_id = {one["id"]: one for one in requests}
    assert sorted(row["id"] for row in rows) == sorted(by_id)

    enrolled = {"tier": 3, "sharing": "enabled", "projects": [], "plan": "standard", "zero_data_retention": False}
    oracle = Oracle(counts="free", overage="whole", assume={**enrolled, "starts": None, "ends": None}, has_bounds=False)
    assert rows == [oracle.decide(by_id[row["id"]], now=0) for row in rows]
    told = {row["id"]: row for row in rows}
    assert all({**line, "replayed": False} == told[line["id"]] for line in printed)
    first_answers = [line["id"] for line in printed if not line["replayed"]]
    assert len(first_answers) == len(set(first_answers))


# --- Reading while another trims ------------------------------------------------------------------


def test_who_reads_while_another_trims_finds_no_gap(server: Server) -> None:
    """Who begins to read while the front is trimmed begins behind that, and takes nothing for a loss."""
    url = f"{server.url}?wait={PATIENT}"
    with (
        Meter(open_store(url, clock=at_noon), OFFER, assume=ENROLLED) as meter,
        closing(open_store(url)) as other,  # by whose clock all is over
    ):
        for number in range(30):
            meter.decide(request(number))
        store = meter._store
        flow = store._core.reading.entries(store._core.asking.shards[0], 0, None)
        waves = 0
        wave, found = next(flow), None
        while found is None:
            results = store._link._done(wave.sends, wave.within)
            waves += 1
            if waves < 3:
                assert other.trim(10 * waves) == (10 * waves,)
            try:
                wave = flow.send(results)
            except StopIteration as end:
                found = [entry.entry for entry in end.value]
        assert found == list(range(found[0], 31))
        assert [entry.entry for entry in store.entries()] == list(range(10 * min(waves, 2) + 1, 31))
