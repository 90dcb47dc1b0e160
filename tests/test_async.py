"""`AsyncMeter`: the same verbs and answers as `Meter`, and a loop that never waits for a disk."""

from __future__ import annotations

import asyncio
import inspect
import sqlite3
import tempfile
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings, strategies as st

from gratis import (
    AsyncMeter,
    Conflict,
    Decision,
    Enrollment,
    EnrollmentError,
    Meter,
    NotExecuted,
    Request,
    RequestError,
    StoreError,
)
from gratis.offers import load
from gratis.stores.memory import MemoryStore
from gratis.stores.sqlite import SQLiteStore, Synchronous

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from gratis.rule import Charge
    from gratis.stores import Receipt

NOW = datetime(2025, 4, 20, 12, tzinfo=UTC)
LARGE = "gpt-4o-2024-08-06"
OFFER = load("openai-data-sharing")
ENROLLED = Enrollment(tier=3, sharing="enabled")
STEPS = 200  # turns of the loop that another task makes while a verb waits


def request(name: object, tokens: int | None = 10, **fields: Any) -> Request:
    """A request of noon."""
    return Request(
        **{"id": f"r{name}", "model": LARGE, "at": NOW, "input_tokens": tokens, "output_tokens": 0, **fields}
    )


def opened(path: Path, *, wait_s: float = 60) -> AsyncMeter:
    """A meter over a SQLite file whose clock stands still."""
    store = SQLiteStore(path, clock=lambda: NOW, wait_s=wait_s, synchronous=Synchronous.OFF)
    return AsyncMeter(store, OFFER, assume=ENROLLED)


def held(path: Path) -> closing[sqlite3.Connection]:
    """Another program's connection, which holds the write lock until it is closed."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    return closing(connection)


async def progress() -> None:
    """Another task's work: so many turns of the loop."""
    for _ in range(STEPS):
        await asyncio.sleep(0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a store is to be."""
    return tmp_path / "gratis.db"


# --- The same verbs -------------------------------------------------------------------------------


def verbs(meter: type) -> dict[str, Any]:
    """The public attributes of a class."""
    return {name: inspect.getattr_static(meter, name) for name in dir(meter) if not name.startswith("_")}


def test_both_meters_have_the_same_verbs_with_the_same_arguments() -> None:
    """Whoever knows one knows the other: names, parameters, defaults and annotations are the same."""
    plain, waiting = verbs(Meter), verbs(AsyncMeter)
    assert plain.keys() == waiting.keys()
    for name in plain:
        ours, theirs = (each[name] for each in (plain, waiting))
        assert type(ours) is type(theirs)
        if isinstance(ours, property):
            assert inspect.signature(ours.fget) == inspect.signature(theirs.fget)
        else:
            ours, theirs = (inspect.signature(getattr(meter, name)) for meter in (Meter, AsyncMeter))
            assert ours.parameters == theirs.parameters


def test_what_is_answered_is_the_same_but_for_the_await() -> None:
    """Each verb is a coroutine that returns what the other meter's verb returns; the ledger is read by `async for`."""
    for name, verb in verbs(AsyncMeter).items():
        if name in {"open", "offer", "durability", "shards"}:
            continue
        theirs = inspect.signature(getattr(Meter, name)).return_annotation
        ours = inspect.signature(verb).return_annotation
        if name == "ledger":
            assert inspect.isasyncgenfunction(verb)
            assert (ours, theirs) == ("AsyncIterator[Entry]", "Iterator[Entry]")
        else:
            assert inspect.iscoroutinefunction(verb)
            assert ours == theirs


async def _answers(meter: Any, ask: Callable[[Any], Awaitable[Any]]) -> list[Any]:
    """What a meter says to each verb."""
    return [
        await ask(meter.decide(request(1))),
        await ask(meter.enroll("acme", ENROLLED, actor="ann")),
        await ask(meter.decide(request(2, account="acme"))),
        await ask(meter.decide_many([request(3, 999_990), request(1), request(1, 11)])),
        await ask(meter.explain(request(4, 1))),
        await ask(meter.standing()),
        await ask(meter.standing("acme", at=NOW + timedelta(days=1))),
        await ask(meter.enrollments("acme")),
        await ask(meter.accounts()),
        meter.offer,
        meter.durability,
    ]


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_both_meters_give_the_same_answers(tmp_path: Path, kind: str) -> None:
    """Verb by verb, on either store."""

    def store(name: str) -> MemoryStore | SQLiteStore:
        return MemoryStore(clock=lambda: NOW) if kind == "memory" else SQLiteStore(tmp_path / name, clock=lambda: NOW)

    async def at_once(answer: Any) -> Any:
        return answer

    async def awaited(answer: Awaitable[Any]) -> Any:
        return await answer

    async def run() -> None:
        meter, waiting = (made(store(made.__name__), OFFER, assume=ENROLLED) for made in (Meter, AsyncMeter))
        ours, theirs = await _answers(waiting, awaited), await _answers(meter, at_once)
        assert repr(ours) == repr(theirs)
        assert [entry async for entry in waiting.ledger(after=1)] == list(meter.ledger(after=1))
        meter.close()
        await waiting.close()

    asyncio.run(run())


def test_it_is_opened_by_async_with(path: Path) -> None:
    """`async with AsyncMeter.open(url)` opens it, and closes it at the end, after an error too."""

    async def failing(opening: Any) -> None:
        async with opening as meter:
            assert (await meter.decide(request(2))).seq == 2
            raise ZeroDivisionError

    async def run() -> None:
        opening = {"offer": OFFER, "assume": ENROLLED, "clock": lambda: NOW}
        async with AsyncMeter.open(f"sqlite:///{path}", **opening) as meter:
            assert (await meter.decide(request(1))).seq == 1
        with pytest.raises(StoreError, match="closed"):
            await meter.standing()
        with pytest.raises(ZeroDivisionError):
            await failing(AsyncMeter.open(f"sqlite:///{path}", **opening))
        async with AsyncMeter.open("memory:") as meter:
            assert [entry async for entry in meter.ledger()] == []

    asyncio.run(run())


def test_what_cannot_be_opened_says_so(tmp_path: Path) -> None:
    """Opening fails as with `Meter`, and nothing is left to be closed."""

    async def run() -> None:
        with pytest.raises(StoreError, match="there is no folder"):
            async with AsyncMeter.open(f"sqlite:///{tmp_path}/nowhere/gratis.db"):
                pass

    asyncio.run(run())


# --- The loop never waits -------------------------------------------------------------------------


async def _ledger(meter: AsyncMeter) -> object:
    return [entry async for entry in meter.ledger()]


@pytest.mark.parametrize(
    "ask",
    [
        lambda meter: meter.decide(request(1)),
        lambda meter: meter.decide_many([request(1), request(2)]),
        lambda meter: meter.enroll("acme", ENROLLED, actor="ann"),
        lambda meter: meter.explain(request(1)),
        lambda meter: meter.standing(),
        lambda meter: meter.enrollments(),
        lambda meter: meter.accounts(),
        _ledger,
        lambda meter: meter.close(),
    ],
)
def test_while_a_verb_waits_for_the_disk_other_tasks_go_on(
    path: Path, ask: Callable[[AsyncMeter], Coroutine[Any, Any, object]]
) -> None:
    """With the file's write lock held elsewhere a decision cannot end; all the same the loop turns."""

    async def run() -> None:
        meter = opened(path)
        with held(path):
            deciding = asyncio.create_task(meter.decide(request("first")))
            await progress()
            asking = asyncio.create_task(ask(meter))
            await progress()
            assert (deciding.done(), asking.done()) == (False, False)
        assert (await deciding).seq == 1
        await asking
        await _close(meter)

    asyncio.run(run())


async def _close(meter: AsyncMeter) -> None:
    """Close a meter that may be closed."""
    if meter._store._file._connection is not None:
        await meter.close()


def test_opening_a_file_does_not_hold_the_loop_up(path: Path) -> None:
    """A file that another program is writing opens when it may, and other tasks go on until then."""
    opened(path)._store.close()

    async def run() -> None:
        async def deciding() -> int | None:
            async with AsyncMeter.open(f"sqlite:///{path}", offer=OFFER, assume=ENROLLED, clock=lambda: NOW) as meter:
                return (await meter.decide(request(1))).seq

        with held(path):
            task = asyncio.create_task(deciding())
            await progress()
            assert not task.done()
        assert await task == 1

    asyncio.run(run())


class Watched:
    """A store that notes in which thread it was asked, and how much at once."""

    def __init__(self, store: SQLiteStore) -> None:
        self._store = store
        self.threads: set[int] = set()
        self.batches: list[int] = []

    def apply(self, charges: Sequence[Charge], *, dry: bool = False) -> list[Receipt]:
        """Note who asks."""
        self.threads.add(get_ident())
        self.batches.append(len(charges))
        return self._store.apply(charges, dry=dry)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_the_disk_is_never_touched_in_the_thread_of_the_loop(path: Path) -> None:
    """Whatever is asked, the store is asked in a thread of its own."""

    async def run() -> None:
        store = Watched(SQLiteStore(path, clock=lambda: NOW, synchronous=Synchronous.OFF))
        meter = AsyncMeter(store, OFFER, assume=ENROLLED)
        await meter.decide(request(1))
        await meter.decide_many([request(2)])
        await meter.explain(request(3))
        await meter.close()
        assert len(store.threads) == 1
        assert get_ident() not in store.threads

    asyncio.run(run())


def test_tasks_that_wait_together_are_asked_together(path: Path) -> None:
    """The first of many goes alone; those that arrive meanwhile go in one call when it has answered."""

    async def run() -> list[int]:
        store = Watched(SQLiteStore(path, clock=lambda: NOW, synchronous=Synchronous.OFF))
        meter = AsyncMeter(store, OFFER, assume=ENROLLED)
        with held(path):
            tasks = [asyncio.create_task(meter.decide(request(0)))]
            await progress()
            tasks += [asyncio.create_task(meter.decide(request(number))) for number in range(1, 500)]
            await progress()
        await asyncio.gather(*tasks)
        await meter.close()
        return store.batches

    assert asyncio.run(run()) == [1, 499]


# --- Many tasks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_five_hundred_tasks_decide_as_one_after_the_other(path: Path, kind: str) -> None:
    """Tasks gathered in an order have the decisions of that order: totals, seq, windows, and the ledger."""
    requests = [
        request(number % 450, (number * 7919) % 9_000, account=f"a{number % 3}", at=NOW - timedelta(hours=number % 30))
        if number < 450
        else request(number % 450, 7)
        for number in range(500)
    ]

    async def run() -> list[object]:
        store = MemoryStore(clock=lambda: NOW) if kind == "memory" else SQLiteStore(path, clock=lambda: NOW)
        meter = AsyncMeter(store, OFFER, assume=ENROLLED)
        answers = await asyncio.gather(*(meter.decide(each) for each in requests), return_exceptions=True)
        entries = [entry.decision async for entry in meter.ledger()]
        await meter.close()
        return [*answers, *entries]

    plain = MemoryStore(clock=lambda: NOW) if kind == "memory" else SQLiteStore(f"{path}.2", clock=lambda: NOW)
    with Meter(plain, OFFER, assume=ENROLLED) as meter:
        expected: list[object] = []
        for each in requests:
            try:
                expected.append(meter.decide(each))
            except RequestError as error:
                expected.append(error)
        expected += [entry.decision for entry in meter.ledger()]
    assert list(map(repr, asyncio.run(run()))) == list(map(repr, expected))


def test_a_batch_keeps_its_order_and_has_errors_in_their_places(path: Path) -> None:
    """Each place of `decide_many` answers the request of that place."""

    async def run() -> None:
        meter = opened(path)
        answers = await meter.decide_many(
            [request(1), request(2, at=NOW + timedelta(hours=1)), request(1, 11), request(3), request(1)]
        )
        await meter.close()
        shown = [(each.id, each.seq, each.replayed) if isinstance(each, Decision) else type(each) for each in answers]
        assert shown == [("r1", 1, False), RequestError, Conflict, ("r3", 2, False), ("r1", 1, True)]

    asyncio.run(run())


def test_one_id_asked_by_many_tasks_has_one_decision(path: Path) -> None:
    """Of fifty tasks with the same request one decides, and the others are told what it decided."""

    async def run() -> None:
        meter = opened(path)
        answers = await asyncio.gather(*(meter.decide(request(1)) for _ in range(50)))
        assert [each.replayed for each in answers] == [False] + [True] * 49
        assert {(each.seq, each.used) for each in answers} == {(1, 10)}
        await meter.close()

    asyncio.run(run())


def test_each_error_reaches_the_task_that_made_it(path: Path) -> None:
    """Of tasks gathered into one call only those fail whose request is wrong."""

    async def run() -> None:
        meter = opened(path)
        await meter.enroll("acme", ENROLLED, actor="ann")
        with held(path):
            tasks = [asyncio.create_task(meter.decide(request("first")))]
            await progress()
            asked = [
                meter.decide(request(1)),
                meter.decide(request(2, at=NOW + timedelta(hours=1))),
                meter.decide(request("first", 11)),
                meter.decide_many([request(3, at=NOW + timedelta(hours=1)), request(4)]),
                meter.enroll("acme", ENROLLED, actor="eve"),
                meter.decide(request(5, account="acme")),
            ]
            tasks += [asyncio.create_task(each) for each in asked]
            await progress()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        await meter.close()
        kinds = [Decision, Decision, RequestError, Conflict, list, EnrollmentError, Decision]
        assert [type(each) for each in answers] == kinds
        assert [type(each) for each in answers[4]] == [RequestError, Decision]
        assert [answers[place].id for place in (0, 1, 6)] == ["rfirst", "r1", "r5"]

    asyncio.run(run())


def test_a_store_that_fails_fails_for_all_who_asked_it_and_for_nobody_later(path: Path) -> None:
    """NotExecuted reaches every task of the call, and afterwards each can ask again."""

    async def run() -> None:
        meter = opened(path, wait_s=0)
        requests = [request(number) for number in range(20)]
        with held(path):
            failed = await asyncio.gather(*map(meter.decide, requests), return_exceptions=True)
        assert [type(each) for each in failed] == [NotExecuted] * 20
        again = await asyncio.gather(*map(meter.decide, requests))
        assert [each.seq for each in again] == list(range(1, 21))
        assert not any(each.replayed for each in again)
        await meter.close()

    asyncio.run(run())


def test_an_enrollment_changed_elsewhere_counts_for_what_starts_afterwards(path: Path) -> None:
    """A change that another meter was told is acknowledged is not missed."""

    async def run() -> None:
        one, two = opened(path), opened(path)
        assert (await one.decide(request(1))).allowance == 1_000_000
        await two.enroll("default", Enrollment(tier=1, sharing="enabled"), actor="ann")
        answers = await asyncio.gather(one.decide(request(2)), one.decide_many([request(3)]), one.explain(request(4)))
        assert [answers[0].allowance, answers[1][0].allowance, answers[2].decision.allowance] == [250_000] * 3
        await one.close()
        await two.close()

    asyncio.run(run())


# --- Cancelling -----------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    cancelled=st.sets(st.integers(0, 11)),
    is_batch=st.lists(st.booleans(), min_size=12, max_size=12),
    early=st.booleans(),
    turns=st.integers(0, 12),
)
def test_cancelling_one_task_never_harms_another(
    *,
    cancelled: set[int],
    is_batch: list[bool],
    early: bool,
    turns: int,
) -> None:
    """Whichever tasks give up, and when, the others have their own answers, and each id has one decision at most."""

    async def run(path: Path) -> None:
        meter = opened(path)

        async def ask(number: int) -> list[Decision]:
            if is_batch[number]:
                return list(await meter.decide_many([request(f"{number}a"), request(f"{number}b")]))
            return [await meter.decide(request(f"{number}a"))]

        with held(path):
            tasks = [asyncio.create_task(ask(number)) for number in range(12)]
            for _ in range(turns):
                await asyncio.sleep(0)
            for number in cancelled if early else ():
                tasks[number].cancel()
            await progress()
        for number in () if early else cancelled:
            tasks[number].cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        for number, answer in enumerate(answers):
            if isinstance(answer, BaseException):
                assert type(answer) is asyncio.CancelledError
                assert number in cancelled
            else:
                names = ["a", "b"][: len(answer)]
                assert [each.id for each in answer] == [f"r{number}{name}" for name in names]
        again = [each for number in range(12) for each in await ask(number)]
        kept = [entry.decision async for entry in meter.ledger()]
        assert sorted(each.id for each in kept) == sorted(each.id for each in again)
        assert [each.seq for each in kept] == list(range(1, len(kept) + 1))
        await meter.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder) / "gratis.db"))


def test_a_cancelled_request_asked_again_has_one_decision(path: Path) -> None:
    """A task cancelled while the store is at its request gives up the answer, not the decision."""

    async def run() -> None:
        meter = opened(path)
        with held(path):
            task = asyncio.create_task(meter.decide(request(1)))
            await progress()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        again = await meter.decide(request(1))
        assert (again.replayed, again.seq) == (True, 1)
        await meter.close()

    asyncio.run(run())


def test_a_deadline_passes_while_the_disk_does_not_answer(path: Path) -> None:
    """A caller's deadline works: the loop is free to notice it."""

    async def run() -> None:
        meter = opened(path)
        with held(path):
            deciding = asyncio.wait_for(meter.decide(request(1)), timeout=0.001)
            with pytest.raises(TimeoutError):
                await deciding
        assert (await meter.decide(request(2))).id == "r2"
        await meter.close()

    asyncio.run(run())


# --- Closing --------------------------------------------------------------------------------------


def test_closing_waits_for_what_is_under_way(path: Path) -> None:
    """What was asked before the meter was closed is answered; the close ends after it."""

    async def run() -> None:
        meter = opened(path)
        with held(path):
            tasks = [asyncio.create_task(meter.decide(request(number))) for number in range(10)]
            await progress()
            closing_it = asyncio.create_task(meter.close())
            await progress()
            assert not closing_it.done()
        await closing_it
        assert [task.done() for task in tasks] == [True] * 10
        assert [(await task).seq for task in tasks] == list(range(1, 11))

    asyncio.run(run())
    with Meter.open(f"sqlite:///{path}", offer=OFFER) as meter:
        assert len(list(meter.ledger())) == 10


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_a_closed_meter_refuses(path: Path, kind: str) -> None:
    """Every verb says that the store is closed, as `Meter` says it."""

    async def run() -> None:
        meter = opened(path) if kind == "sqlite" else AsyncMeter(MemoryStore(clock=lambda: NOW), OFFER, assume=ENROLLED)
        await meter.decide(request(1))
        await meter.close()
        asked: list[Coroutine[Any, Any, object]] = [
            meter.decide(request(2)),
            meter.decide_many([request(2)]),
            meter.enroll("acme", ENROLLED, actor="ann"),
            meter.explain(request(2)),
        ]
        if kind == "sqlite":
            asked += [meter.standing(), meter.enrollments(), meter.accounts(), _ledger(meter)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(each) for each in answers] == [StoreError] * len(asked)
        assert {str(each).rpartition("is ")[2] for each in answers} == {"closed"}

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_closing_again_changes_nothing(path: Path, kind: str) -> None:
    """A meter closed by hand inside its `async with` is closed, and that is no error."""

    async def run() -> None:
        url = "memory:" if kind == "memory" else f"sqlite:///{path}"
        async with AsyncMeter.open(url, offer=OFFER) as meter:
            await meter.close()

    asyncio.run(run())


# --- The ledger -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_the_ledger_is_an_async_iterator(path: Path, kind: str) -> None:
    """Every entry comes in order, over more than a page, with the same filters as in `Meter`."""

    async def run() -> None:
        meter = opened(path) if kind == "sqlite" else AsyncMeter(MemoryStore(clock=lambda: NOW), OFFER, assume=ENROLLED)
        await meter.decide_many([request(number, account=f"a{number % 2}") for number in range(2_500)])
        assert [entry.entry async for entry in meter.ledger()] == list(range(1, 2_501))
        assert [entry.entry async for entry in meter.ledger(after=2_498)] == [2_499, 2_500]
        odd = [entry.decision.id async for entry in meter.ledger(account="a1", since=NOW)]
        assert odd == [f"r{number}" for number in range(1, 2_500, 2)]
        assert [entry async for entry in meter.ledger(until=NOW)] == []
        await meter.close()

    asyncio.run(run())


def test_the_ledger_can_be_left_early_and_written_while_it_is_read(path: Path) -> None:
    """Reading holds nobody up: decisions go on between two entries, and a reader that leaves leaves nothing behind."""

    async def run() -> None:
        meter = opened(path)
        await meter.decide_many([request(number) for number in range(1_500)])
        seen = []
        entries = meter.ledger()
        async for entry in entries:
            seen.append(entry.entry)
            if entry.entry <= 3:
                await meter.decide(request(f"later{entry.entry}"))
            if entry.entry == 1_501:
                break
        await entries.aclose()
        assert seen == list(range(1, 1_502))
        assert len([entry async for entry in meter.ledger()]) == 1_503
        await meter.close()

    asyncio.run(run())


def test_the_ledger_is_read_while_the_loop_turns(path: Path) -> None:
    """Pages are read in the store's thread: while a decision holds it, the reader waits and the loop does not."""

    async def run() -> None:
        meter = opened(path)
        await meter.decide(request(1))
        with held(path):
            deciding = asyncio.create_task(meter.decide(request(2)))
            await progress()
            reading = asyncio.create_task(_ledger(meter))
            await progress()
            assert not reading.done()
        await deciding
        assert len(await reading) == 2
        await meter.close()

    asyncio.run(run())
