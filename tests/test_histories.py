"""Many callers at once: whatever they were answered, one order explains it, and `seq` tells which."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

from gratis import Conflict, Enrollment, Meter, Request
from gratis.lines import decision_line
from gratis.offers import load
from gratis.stores.memory import MemoryStore
from gratis.stores.sqlite import SQLiteStore, Synchronous

from .oracle import ALLOWANCES, Call, Change, History, faults

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection
    from pathlib import Path

THREADS = 8
PROCESSES = 4
REQUESTS = 1_000
ASKED_EACH = 1_500
BATCH_MOST = 8
LARGE = "gpt-4o-2024-08-06"
SMALL = "gpt-4o-mini-2024-07-18"
DAILY = datetime(2025, 4, 18, 12, tzinfo=UTC)
ROLLING = datetime(2025, 3, 3, 12, tzinfo=UTC)
CHILD_MOST_S = 30
OFFER = load("openai-data-sharing")


# Histories of real stores


def request_of(number: int, at: datetime) -> Request:
    """The same number is the same request, whoever asks."""
    chance = random.Random(number)  # noqa: S311 - a schedule, no secret
    model, account = chance.choice((LARGE, LARGE, SMALL)), chance.choice(("acme", "default"))
    size = chance.choice((0, 1, 700, 5_000, 20_000, 120_000))
    return Request(
        id=f"r{number}",
        model=model,
        at=at - timedelta(minutes=chance.randrange(300)),
        input_tokens=size + 1,
        output_tokens=1 + chance.randrange(size + 1),
        account=account,
    )


def ask(meter: Meter, at: datetime, *, caller: int, most: int = ASKED_EACH) -> list[Call]:
    """Ask what others ask too: singly and in batches, some again and changed, some with an answer that is lost."""
    chance = random.Random(caller)  # noqa: S311 - a schedule, no secret
    calls: list[Call] = []
    while len(calls) < most:
        size = chance.choice((1, 1, 1, 2, BATCH_MOST))
        requests = [request_of(chance.randrange(REQUESTS), at) for _ in range(size)]
        if calls and size == 1 and chance.random() < 1 / 10:
            calls.append(ask_changed(meter, at, calls[-1].id))
            continue
        start = time.monotonic_ns()
        if size == 1:
            answers: list[Any] = [meter.decide(requests[0])]
        else:
            answers = list(meter.decide_many(requests))
        end = time.monotonic_ns()
        for request, answer in zip(requests, answers, strict=True):
            line = decision_line(answer) if chance.random() > 1 / 20 else None
            calls.append(Call(request.account, request.id, start, end if line else float("inf"), line))
    return calls


def ask_changed(meter: Meter, at: datetime, name: str) -> Call:
    """Ask again under the same id with other tokens: the conflict carries the decision that stands."""
    request = request_of(int(name.removeprefix("r")), at)
    start = time.monotonic_ns()
    with pytest.raises(Conflict) as caught:
        meter.decide(replace(request, output_tokens=request.tokens))
    assert caught.value.field == "output_tokens"
    line = {**decision_line(caught.value.first), "replayed": True}
    return Call(request.account, request.id, start, time.monotonic_ns(), line)


def enroll(meter: Meter, account: str, tier: int) -> Change:
    """Change an account's tier."""
    start = time.monotonic_ns()
    meter.enroll(account, Enrollment(tier=tier, sharing="enabled"), actor="ann")
    return Change(account, tier, start, time.monotonic_ns())


def change_tiers(meter: Meter) -> list[Change]:
    """Change an account's tier while others decide, about as often as they ask."""
    return [enroll(meter, account, tier) for _ in range(20) for account in ("acme", "default") for tier in (3, 1)]


def ledger_of(meter: Meter) -> list[dict[str, Any]]:
    """The ledger as lines, each with its entry."""
    return [{"entry": entry.entry, **decision_line(entry.decision)} for entry in meter.ledger()]


def in_threads(jobs: list[Callable[[], list[Any]]]) -> list[Any]:
    """What the jobs gave, each run in a thread of its own, all from one start."""
    start = threading.Barrier(len(jobs))
    given: list[Any] = []
    failed: list[BaseException] = []

    def run(job: Callable[[], list[Any]]) -> None:
        try:
            start.wait()
            given.extend(job())
        except BaseException as error:  # noqa: BLE001 - told to the test below
            failed.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    return given


@contextmanager
def eager_switches() -> Iterator[None]:
    """Threads take turns a thousand times as often as usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(usual / 1_000)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def open_meter(kind: str, folder: Path, at: datetime) -> Meter:
    """A meter over a store of this kind; its clock stands still."""
    if kind == "memory":
        return Meter(MemoryStore(clock=lambda: at), OFFER)
    synchronous = {"sqlite": Synchronous.FULL, "sqlite unsynced": Synchronous.OFF}[kind]
    return Meter(SQLiteStore(folder / "store.db", clock=lambda: at, synchronous=synchronous), OFFER)


@pytest.mark.parametrize("at", [DAILY, ROLLING], ids=["daily", "rolling"])
@pytest.mark.parametrize("kind", ["memory", "sqlite", "sqlite unsynced"])
def test_eight_threads_leave_a_history_that_one_order_explains(kind: str, at: datetime, tmp_path: Path) -> None:
    """Eight threads that ask each other's ids at one store, while tiers change, are answered in one order."""
    with open_meter(kind, tmp_path, at) as meter, eager_switches():
        changes = [enroll(meter, account, 1) for account in ("acme", "default")]
        jobs: list[Callable[[], list[Any]]] = [
            lambda caller=caller: ask(meter, at, caller=caller) for caller in range(THREADS)
        ]
        given = in_threads([*jobs, lambda: change_tiers(meter)])
        history = History(
            calls=[item for item in given if isinstance(item, Call)],
            changes=changes + [item for item in given if isinstance(item, Change)],
            ledger=ledger_of(meter),
        )
    assert len(history.calls) >= THREADS * ASKED_EACH
    assert len(history.ledger) == REQUESTS
    assert faults(history) == set()


def ask_from_a_process(folder: Path, at: datetime, caller: int, start: Any) -> None:
    """A process asks, opens the file anew now and then, and leaves what it was answered in a file of its own."""
    calls = []
    start.wait()
    for part in range(5):
        with open_meter("sqlite", folder, at) as meter:
            calls += ask(meter, at, caller=10 * caller + part, most=ASKED_EACH // 5)
    (folder / f"{caller}.calls").write_bytes(pickle.dumps(calls))


@pytest.mark.parametrize("at", [DAILY, ROLLING], ids=["daily", "rolling"])
def test_four_processes_leave_a_history_that_one_order_explains(at: datetime, tmp_path: Path) -> None:
    """Four processes that ask each other's ids on one file, while a fifth changes tiers, are answered in one order."""
    context = multiprocessing.get_context("fork")
    start = context.Barrier(PROCESSES + 1)
    with open_meter("sqlite", tmp_path, at) as meter:
        changes = [enroll(meter, account, 1) for account in ("acme", "default")]
    processes = [
        context.Process(target=ask_from_a_process, args=(tmp_path, at, caller, start)) for caller in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    with open_meter("sqlite", tmp_path, at) as meter:
        start.wait()
        changes += change_tiers(meter)
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * PROCESSES
        calls = [
            call
            for caller in range(PROCESSES)
            for call in pickle.loads((tmp_path / f"{caller}.calls").read_bytes())  # noqa: S301 - written above
        ]
        history = History(calls=calls, changes=changes, ledger=ledger_of(meter))
    assert len(history.calls) >= PROCESSES * ASKED_EACH
    assert len(history.ledger) == len({(call.account, call.id) for call in calls})
    assert faults(history) == set()


# Forks, and processes that come and go


@contextmanager
def in_child(job: Callable[[Connection], None]) -> Iterator[Connection]:
    """Run a job in a forked child, and talk with it; a child that fails tells its error."""
    here, there = multiprocessing.Pipe()
    child = os.fork()
    if child == 0:
        here.close()
        try:
            job(there)
        except BaseException as error:  # noqa: BLE001 - told to the parent
            there.send(repr(error))
        finally:
            os._exit(0)
    there.close()
    try:
        yield here
    finally:
        here.close()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def told(child: Connection) -> list[Any]:
    """What a child tells next; one that hangs or failed is a failed test."""
    assert child.poll(CHILD_MOST_S), "the child hangs"
    given = child.recv()
    assert isinstance(given, list), given
    return given


def hundreds(meter: Meter, *names: str) -> list[Call]:
    """Requests of a hundred tokens, one after the other."""
    calls = []
    for name in names:
        start = time.monotonic_ns()
        line = decision_line(meter.decide(Request(id=name, model=LARGE, at=DAILY, input_tokens=60, output_tokens=40)))
        calls.append(Call("default", name, start, time.monotonic_ns(), line))
    return calls


def test_processes_that_create_open_and_close_one_file_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Eight processes that meet at a file that is not there yet, and open and close it, all decide in one order."""

    def job(parent: Connection, caller: int) -> None:
        parent.recv()
        calls = []
        for turn in range(3):
            with open_meter("sqlite", tmp_path, DAILY) as meter:
                enroll(meter, "default", 1)
                calls += hundreds(meter, f"{caller}-{turn}")
        parent.send(calls)

    with ExitStack() as stack:
        children = [
            stack.enter_context(in_child(lambda parent, caller=caller: job(parent, caller))) for caller in range(8)
        ]
        for child in children:
            child.send("go on")
        calls = [call for child in children for call in told(child)]
    with open_meter("sqlite", tmp_path, DAILY) as meter:
        history = History(calls=calls, changes=[Change("default", 1, 0, 0)], ledger=ledger_of(meter))
    assert [row["used"] for row in history.ledger] == [100 * (place + 1) for place in range(24)]
    assert faults(history) == set()


def test_a_store_opened_before_a_fork_serves_parent_and_child(tmp_path: Path) -> None:
    """Both sides of a fork decide through the store that was open before it, at once, in one order."""
    with open_meter("sqlite", tmp_path, DAILY) as meter:
        changes = [enroll(meter, account, 1) for account in ("acme", "default")]
        calls = ask(meter, DAILY, caller=0, most=100)
        with in_child(lambda parent: parent.send(ask(meter, DAILY, caller=1, most=300))) as child:
            calls += ask(meter, DAILY, caller=2, most=300)
            calls += told(child)
        calls += ask(meter, DAILY, caller=3, most=100)
        history = History(calls=calls, changes=changes, ledger=ledger_of(meter))
    assert faults(history) == set()


@pytest.mark.parametrize("read_at_the_fork", [0, 1], ids=["idle", "while its ledger is read"])
def test_what_a_child_is_answered_outlives_its_parents_store(read_at_the_fork: int, tmp_path: Path) -> None:
    """A child's decisions stand though its parent closes the store that was open at the fork."""
    meter = open_meter("sqlite", tmp_path, DAILY)
    changes = [enroll(meter, "default", 1)]
    calls = hundreds(meter, "parent 1")
    entries = meter.ledger()
    read = [next(entries).decision.id for _ in range(read_at_the_fork)]

    def job(parent: Connection) -> None:
        parent.send(hundreds(meter, "child 1"))
        parent.recv()
        parent.send(hundreds(meter, "child 2", "child 3"))

    with in_child(job) as child:
        calls += told(child)
        calls += hundreds(meter, "parent 2")
        read += [entry.decision.id for entry in entries]
        meter.close()
        child.send("go on")
        calls += told(child)
    with open_meter("sqlite", tmp_path, DAILY) as reopened:
        history = History(calls=calls, changes=changes, ledger=ledger_of(reopened))
    assert read == ["parent 1", "child 1", "parent 2"]
    assert [row["id"] for row in history.ledger] == ["parent 1", "child 1", "parent 2", "child 2", "child 3"]
    assert faults(history) == set()


def test_what_a_child_is_answered_outlives_its_parent(tmp_path: Path) -> None:
    """A child's decisions stand though its parent is gone, and others open and close the file meanwhile."""
    with open_meter("sqlite", tmp_path, DAILY) as meter:
        changes = [enroll(meter, "default", 1)]

    def job(parent: Connection) -> None:
        meter = open_meter("sqlite", tmp_path, DAILY)
        parent.send(hundreds(meter, "parent 1"))
        if os.fork() == 0:
            parent.send(hundreds(meter, "child 1"))
            parent.recv()
            parent.send(hundreds(meter, "child 2"))

    with in_child(job) as child:
        calls = told(child) + told(child)
        with open_meter("sqlite", tmp_path, DAILY) as other:
            calls += hundreds(other, "other 1")
        child.send("go on")
        calls += told(child)
    with open_meter("sqlite", tmp_path, DAILY) as reopened:
        history = History(calls=calls, changes=changes, ledger=ledger_of(reopened))
    assert [row["id"] for row in history.ledger] == ["parent 1", "child 1", "other 1", "child 2"]
    assert faults(history) == set()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_in_the_middle_of_others_decisions_leaves_a_child_that_decides(tmp_path: Path) -> None:
    """Wherever other threads are when a process forks, its child can decide."""
    store = SQLiteStore(tmp_path / "store.db", clock=lambda: DAILY, synchronous=Synchronous.OFF, wait_s=2)
    is_over = threading.Event()
    calls: list[Call] = []
    with Meter(store, OFFER) as meter:
        changes = [enroll(meter, account, 1) for account in ("acme", "default")]

        def keep_asking(caller: int) -> None:
            while not is_over.is_set():
                calls.extend(ask(meter, DAILY, caller=caller, most=20))

        threads = [threading.Thread(target=keep_asking, args=(caller,)) for caller in range(3)]
        for thread in threads:
            thread.start()
        try:
            for number in range(20):
                with in_child(
                    lambda parent, n=number: parent.send(ask(meter, DAILY, caller=100 + n, most=20))
                ) as child:
                    calls.extend(told(child))
        finally:
            is_over.set()
            for thread in threads:
                thread.join()
        history = History(calls=calls, changes=changes, ledger=ledger_of(meter))
    assert faults(history) == set()


# The checker, on histories that were made up

MADE_UP = {
    "none": set(),
    "too lax": {"a row is not what the rule gives"},
    "too strict": {"a row is not what the rule gives"},
    "check, then act": {"a row is not what the rule gives", "seq is not 1..n"},
    "check, then act, but number": {"a row is not what the rule gives"},
    "forget ids": {"an id stands twice in the ledger", "an id was decided twice"},
    "forget ids and lose rows": {"an id was decided twice", "an answer differs from its row"},
    "lose the end": {"an answered call is not in the ledger"},
    "lose a row": {"an answered call is not in the ledger", "entries are not 1..n", "seq is not 1..n"},
    "garble an answer": {"an answer differs from its row"},
    "delay some": {"the order runs against real time"},
    "keep the old tier": {"a decision rests on a tier that was not in force"},
    "invent a row": {"a row was never asked for"},
    "answer nobody first": {"an id was never answered first"},
}


class FlawedStore:
    """Decides one by one, as a store with this flaw would."""

    def __init__(self, flaw: str, changes: list[Change]) -> None:
        self.flaw = flaw
        self.changes = changes
        self.rows: dict[int, dict[str, Any]] = {}
        self.ledger: list[dict[str, Any]] = []
        self.states = [(0, 0, 0)]

    def decide(self, number: int, *, start: int, now: int, forgets: bool) -> dict[str, Any]:
        """The line of a request, asked at one moment and decided at another."""
        known = self.rows.get(number)
        if known is not None and not (forgets and self.flaw.startswith("forget ids")):
            return {**known, "replayed": True}
        _, used, seq = self.states[-1]
        if self.flaw.startswith("check, then act"):
            _, used, stale = next(state for state in reversed(self.states) if state[0] <= start)
            seq = seq if self.flaw.endswith("but number") else stale
        tiers = [change.tier for change in self.changes if change.start < now]
        allowance = ALLOWANCES["1M"][tiers[0] if self.flaw == "keep the old tier" else tiers[-1]]
        tokens = number % 4 * 10_000
        limit = allowance + {"too lax": 10_000, "too strict": -10_000}.get(self.flaw, 0)
        is_free = tokens <= limit - used
        row = {
            "entry": len(self.ledger) + 1,
            "account": "default",
            "id": f"r{number}",
            "group": "1M",
            "window_start": "2025-04-18T00:00:00Z",
            "tokens": tokens,
            "allowance": allowance,
            "verdict": "free" if is_free else "billed",
            "reason": "within_allowance" if is_free else "over_allowance",
            "free_tokens": tokens if is_free else 0,
            "total": used + tokens,
            "used": used + tokens if is_free else used,
            "seq": seq + 1,
            "replayed": False,
        }
        self.states.append((now, row["used"], row["seq"]))
        if known is None or not self.flaw.endswith("lose rows"):
            self.ledger.append(row)
        self.rows[number] = row
        return row


def made_up(flaw: str, *, seed: int) -> History:
    """A thousand overlapping calls on 400 ids, and two changes of the tier, at a store with this flaw."""
    chance = random.Random(seed)  # noqa: S311 - a schedule, no secret
    changes = [Change("default", 1, 0, 0), Change("default", 3, 20_000, 20_010), Change("default", 1, 40_000, 40_010)]
    moments = sorted(chance.randrange(1_000, 60_000) for _ in range(1_000))
    acts = [(now - chance.randrange(200), now, now + chance.randrange(200), chance.randrange(400)) for now in moments]
    if flaw == "delay some":
        for place in range(0, 500, 50):
            acts.insert(place + 40, acts.pop(place))
    store = FlawedStore(flaw, changes)
    calls = []
    for start, now, end, number in acts:
        line = store.decide(number, start=start, now=now, forgets=chance.random() < 1 / 20)
        is_lost = chance.random() < 1 / 20
        calls.append(Call("default", line["id"], start, float("inf") if is_lost else end, None if is_lost else line))
    return spoiled(History(calls=calls, changes=changes, ledger=store.ledger), flaw)


def spoiled(history: History, flaw: str) -> History:
    """What becomes of a history afterwards."""
    unknown = {call.id for call in history.calls if call.line is None}
    victim = next(call for call in history.calls[200:] if call.id not in unknown and not call.line["replayed"])
    if flaw == "lose the end":
        del history.ledger[-30:]
    elif flaw == "lose a row":
        history.ledger[:] = [row for row in history.ledger if row["id"] != victim.id]
    elif flaw == "garble an answer":
        victim.line = {**victim.line, "used": 7}
    elif flaw == "invent a row":
        history.calls[:] = [call for call in history.calls if call.id != victim.id]
    elif flaw == "answer nobody first":
        victim.line = {**victim.line, "replayed": True}
    return history


@pytest.mark.parametrize("flaw", MADE_UP)
def test_the_checker_says_what_is_wrong_with_a_history(flaw: str) -> None:
    """It finds the flaw of each made-up history, and none in those of a sound store."""
    found = [faults(made_up(flaw, seed=seed)) for seed in range(20)]
    assert [MADE_UP[flaw] - faults for faults in found] == [set()] * 20
    assert flaw != "none" or found == [set()] * 20
