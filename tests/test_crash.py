"""A process is killed while it decides, two hundred times: what it was answered stands, and nothing is half."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from gratis import Enrollment, Meter, Request
from gratis.lines import decision_line
from gratis.model import stamp
from gratis.offers import load
from gratis.stores.sqlite import SQLiteStore, Synchronous

from .oracle import OFFER, Call, Change, History, faults

if TYPE_CHECKING:
    from pathlib import Path

FILES = 20
KILLS_A_FILE = 10
ANSWERS_MOST = 30
MOMENT_MOST_S = 0.005
CHILD_MOST_S = 30
NEVER = float("inf")
NOW = datetime(2025, 4, 18, 12, tzinfo=UTC)
MODELS = ("gpt-4o-2024-08-06", "gpt-4o-mini-2024-07-18")
SHIPPED = load(OFFER)


def open_meter(path: Path) -> Meter:
    """A meter whose answers rest on the disk."""
    return Meter(SQLiteStore(path, clock=lambda: NOW, synchronous=Synchronous.FULL), SHIPPED)


def request_of(name: str) -> Request:
    """The same id is the same request, whoever asks."""
    chance = random.Random(name)  # noqa: S311 - a schedule, no secret
    size = chance.choice((0, 1, 5_000, 20_000, 120_000))
    return Request(id=name, model=chance.choice(MODELS), at=NOW, input_tokens=size, output_tokens=chance.randrange(9))


def keep_deciding(path: Path, *, run: int, tell: int) -> None:
    """Decide for ever, singly and in batches, new and again; tell what is asked before, what is answered after."""

    def say(**facts: Any) -> None:
        os.write(tell, json.dumps({**facts, "at": time.monotonic_ns()}).encode() + b"\n")

    chance = random.Random(run)  # noqa: S311 - a schedule, no secret
    known: list[str] = []
    meter = open_meter(path)
    is_enrolled = meter.enrollments() != []
    while True:
        if not is_enrolled or chance.random() < 1 / 20:
            is_enrolled = True
            tier = chance.choice((1, 3))
            say(tier=tier)
            meter.enroll("default", Enrollment(tier=tier, sharing="enabled"), actor="ann")
            say(is_enrolled=True)
        fresh = [f"{run}-{len(known) + place}" for place in range(chance.choice((1, 1, 1, 2, 10)))]
        names = fresh + chance.sample(known, min(len(known), chance.choice((0, 0, 1, 3))))
        known += fresh
        say(asks=names)
        if len(names) == 1:
            answers: list[Any] = [meter.decide(request_of(names[0]))]
        else:
            answers = list(meter.decide_many([request_of(name) for name in names]))
        say(answers=[decision_line(answer) for answer in answers])


def killed(path: Path, *, run: int) -> list[dict[str, Any]]:
    """What a process told until it was killed, at a moment that chance gave."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(told)
            keep_deciding(path, run=run, tell=tell)
        finally:
            os._exit(1)
    os.close(tell)
    chance = random.Random(-run)  # noqa: S311 - a schedule, no secret
    heard = b""
    wanted = chance.randrange(ANSWERS_MOST)
    while heard.count(b'"answers"') < wanted:
        ready, _, _ = select.select([told], [], [], CHILD_MOST_S)
        assert ready == [told], "the process hangs"
        piece = os.read(told, 1 << 16)
        assert piece != b"", "the process failed"
        heard += piece
    moment = time.monotonic() + chance.uniform(0, MOMENT_MOST_S)
    while (left := moment - time.monotonic()) > 0:
        if select.select([told], [], [], left)[0]:
            heard += os.read(told, 1 << 16)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while piece := os.read(told, 1 << 16):
        heard += piece
    os.close(told)
    return [json.loads(line) for line in heard.split(b"\n")[:-1]]


def add_to(history: History, said: list[dict[str, Any]]) -> None:
    """Add the calls and changes that a process told of; of the last one, the answer may be unknown."""
    asked: list[str] = []
    start = 0
    for facts in said:
        if "asks" in facts:
            asked, start = facts["asks"], facts["at"]
        elif "answers" in facts:
            history.calls += [Call("default", line["id"], start, facts["at"], line) for line in facts["answers"]]
            asked = []
        elif "tier" in facts:
            history.changes.append(Change("default", facts["tier"], facts["at"], NEVER))
        else:
            history.changes[-1].end = facts["at"]
    history.calls += [Call("default", name, start, NEVER, None) for name in asked]


def windows_of(ledger: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[int, int]]:
    """What the counters of each window must say after these rows: used and seq."""
    return {
        (row["group"], row["window_start"]): (row["used"], row["seq"])
        for row in sorted(ledger, key=lambda row: row["seq"])
    }


def check(path: Path, history: History) -> None:
    """A file reopened after a kill holds all that was answered, nothing half, and answers it again."""
    with open_meter(path) as meter:
        kept = [change.enrollment.tier for change in meter.enrollments("default")]
        if history.changes and history.changes[-1].end == NEVER:  # only the file can tell whether it was made
            history.changes[-1].end = time.monotonic_ns()
            history.changes[len(kept) :] = []
        assert [change.tier for change in history.changes] == kept

        history.ledger = [{"entry": entry.entry, **decision_line(entry.decision)} for entry in meter.ledger()]
        assert faults(history) == set()

        counters = {
            (group, stamp(tally.window.start)): (tally.used, tally.seq)
            for group, _, tally in meter._store.tallies(OFFER, "default")
        }
        assert counters == windows_of(history.ledger)

        again = meter.decide_many([request_of(row["id"]) for row in history.ledger])
        repeated = [{"entry": place + 1, **decision_line(decision)} for place, decision in enumerate(again)]
        assert repeated == [{**row, "replayed": True} for row in history.ledger]


def test_a_kill_loses_nothing_that_was_answered_and_leaves_nothing_half(tmp_path: Path) -> None:
    """Killed at any moment, the file reopens, follows from its ledger, and repeats every decision that it made."""
    answered = 0
    for number in range(FILES):
        path = tmp_path / f"{number}.db"
        history = History()
        for kill in range(KILLS_A_FILE):
            add_to(history, killed(path, run=1 + number * KILLS_A_FILE + kill))
            check(path, history)
        answered += sum(call.line is not None for call in history.calls)
    assert answered >= FILES * KILLS_A_FILE * ANSWERS_MOST // 3
