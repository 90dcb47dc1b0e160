"""A cluster whose slots move and whose masters change under load decides as one server does."""

from __future__ import annotations

import asyncio
import threading
import time
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

from gratis import AsyncMeter, Enrollment, Meter, Request
from gratis.lines import decision_line
from gratis.stores.redis.layout import shards
from gratis.stores.urls import open_store

from .oracle import Call, Change, History, faults
from .servers import Cluster
from .test_histories import DAILY, OFFER, ROLLING, ask, enroll, ledger_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

THREADS = 4
ASKED_EACH = 600
SHARDS = 6
MODEL = "gpt-4o-2024-08-06"
NAMESPACES = (f"cluster {number}" for number in count())


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three masters, each with a replica."""
    with Cluster(replicas=True) as started:
        yield started


def under_load(url: str, at: datetime, disturb: Callable[[], None]) -> History:
    """What threads were told by one meter, and tasks by another, while something was done to the servers."""
    is_over = threading.Event()
    calls: list[Call] = []
    failed: list[BaseException] = []

    def in_a_thread(caller: int) -> None:
        try:
            turn = 0
            while turn == 0 or not is_over.is_set():
                calls.extend(ask(meter, at, caller=100 * caller + turn, most=ASKED_EACH))
                turn += 1
        except BaseException as error:  # noqa: BLE001 - told to the test below
            failed.append(error)

    with Meter(open_store(url, clock=lambda: at), OFFER) as meter:
        changes = [enroll(meter, account, 1) for account in ("acme", "default")]
        threads = [threading.Thread(target=in_a_thread, args=(caller,)) for caller in range(THREADS)]
        threads.append(threading.Thread(target=lambda: calls.extend(asyncio.run(in_tasks(url, at, is_over)))))
        for thread in threads:
            thread.start()
        try:
            disturb()
        finally:
            is_over.set()
            for thread in threads:
                thread.join()
        assert failed == []
        return History(calls=calls, changes=[*changes, Change("tasks", 3, 0, 0)], ledger=in_one_row(ledger_of(meter)))


def in_one_row(ledger: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ledgers of all shards behind one another, numbered as one."""
    return [{**row, "entry": place} for place, row in enumerate(ledger, 1)]


async def in_tasks(url: str, at: datetime, is_over: threading.Event) -> list[Call]:
    """Tasks that each ask for ids of their own, until it is over."""
    calls: list[Call] = []
    meter = AsyncMeter(open_store(url, clock=lambda: at), OFFER, assume=Enrollment(tier=3, sharing="enabled"))

    async def task(number: int) -> None:
        for turn in count():
            if is_over.is_set() and turn:
                return
            name = f"task {number} {turn}"
            start = time.monotonic_ns()
            request = Request(id=name, model=MODEL, at=at, input_tokens=9, output_tokens=1, account="tasks")
            line = decision_line(await meter.decide(request))
            calls.append(Call("tasks", name, start, time.monotonic_ns(), line))

    try:
        await asyncio.gather(*[task(number) for number in range(16)])
    finally:
        await meter.close()
    return calls


def check(history: History) -> None:
    """One order explains all that was told; an answer that was lost on the way is told as a repeat."""
    assert faults(history) <= {"an id was never answered first"}
    assert len(history.ledger) == len({(call.account, call.id) for call in history.calls})


@pytest.mark.parametrize("at", [DAILY, ROLLING], ids=["daily", "rolling"])
def test_slots_move_under_load_and_no_decision_is_wrong(cluster: Cluster, at: datetime) -> None:
    """Every slot of the store is moved to another master, and on, while threads and tasks decide."""
    namespace = next(NAMESPACES)
    slots = [shard.slot for shard in shards(namespace, SHARDS)]

    def move() -> None:
        for slot in slots * 2:
            others = [master for master in cluster.masters if master is not cluster.owner(slot)]
            cluster.move_slot(slot, others[slot % len(others)])

    check(under_load(f"{cluster.url}?namespace={namespace}&shards={SHARDS}&wait=20", at, move))


def test_masters_change_under_load_and_no_decision_is_wrong(cluster: Cluster) -> None:
    """Each master hands over to its replica while threads and tasks decide."""

    def hand_over() -> None:
        for master in list(cluster.masters):
            cluster.failover(cluster.replica(master))

    check(under_load(f"{cluster.url}?namespace={next(NAMESPACES)}&wait=20", DAILY, hand_over))


def test_a_batch_over_many_accounts_is_decided_on_all_masters(cluster: Cluster) -> None:
    """Accounts are spread over all shards; each has its decisions in order in one of them."""
    url = f"{cluster.url}?namespace={next(NAMESPACES)}"
    with Meter(open_store(url, clock=lambda: DAILY), OFFER, assume=Enrollment(tier=3, sharing="enabled")) as meter:
        requests = [
            Request(id=f"{number}", model=MODEL, at=DAILY, input_tokens=1, output_tokens=number,
                    account=f"account {number % 100}")
            for number in range(1_000)
        ]  # fmt: skip
        answers: list[Any] = meter.decide_many(requests)
        assert [answer.seq for answer in answers] == [1 + number // 100 for number in range(1_000)]
        entries = list(meter.ledger())
        assert {entry.shard for entry in entries} == set(range(16))
        for shard in range(16):
            assert [entry.entry for entry in entries if entry.shard == shard] == list(
                range(1, 1 + sum(entry.shard == shard for entry in entries))
            )
        assert sorted(meter.accounts()) == sorted({request.account for request in requests})
