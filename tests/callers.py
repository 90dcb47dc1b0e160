"""Callers of stores on servers: blocking or in a loop, patient or not, and what the ledger has of their requests."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Self

from msgspec.structs import replace

from gratis import AsyncMeter, Decision, Enrollment, Meter, Request, StoreError
from gratis.lines import decision_line
from gratis.offers import load
from gratis.stores.redis.layout import account_word

from .oracle import Call, Change, History, faults
from .proxy import Proxy
from .servers import until

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gratis.stores.redis.store import RedisStore

    from .proxy import Address, Fault
    from .servers import Server

NOW = datetime(2025, 4, 20, 12, tzinfo=UTC)
LARGE, SMALL = "gpt-4o-2024-08-06", "gpt-4o-mini-2024-07-18"
OFFER = load("openai-data-sharing")
ENROLLED = Enrollment(tier=3, sharing="enabled")
# Of one attempt no other is made; a caller with time has as many as a slow machine needs.
ONE_ATTEMPT, PATIENT = 1e-6, 60.0
# An answer that was lost is given again, marked as such: then nobody was answered first.
LOST_ANSWERS = {"an id was never answered first"}


def at_noon() -> datetime:
    """What the clock shows of every store here."""
    return NOW


def request(name: object, tokens: int | None = 10, **fields: Any) -> Request:
    """A request of noon."""
    return Request(
        **{"id": f"r{name}", "model": LARGE, "at": NOW, "input_tokens": tokens, "output_tokens": 0, **fields}
    )


class Caller:
    """One meter and, if it is asynchronous, the loop in which it is asked."""

    def __init__(self, kind: type[Meter | AsyncMeter], store: RedisStore) -> None:
        self.store = store
        self.meter = kind(store, OFFER, assume=ENROLLED)
        self.is_shared = kind is AsyncMeter
        """Whether it has one connection a server, on which all calls are."""

    def __enter__(self) -> Self:
        self._runner = asyncio.Runner()
        return self

    def __exit__(self, *_: object) -> None:
        with self._runner:
            self.run(self.meter.close)

    def run(self, verb: Callable[..., Any], *args: Any) -> Any:
        """What a verb of the meter answers."""

        async def asked() -> Any:
            given = verb(*args)
            return await given if isawaitable(given) else given

        return self._runner.run(asked())

    def decide(self, requests: Sequence[Request]) -> list[Any]:
        """The decisions on requests: one is asked singly, several in a batch."""
        if len(requests) == 1:
            return [self.run(self.meter.decide, requests[0])]
        answers: list[Any] = self.run(self.meter.decide_many, requests)
        return answers

    def ask(self, requests: Sequence[Request], *, patience: float) -> list[Any] | StoreError:
        """The decisions on requests, or what was told instead."""
        self.patience(patience)
        try:
            return self.decide(requests)
        except StoreError as error:
            return error

    def patience(self, seconds: float) -> None:
        """For so long the store asks again."""
        core = self.store._core
        core.asking.patience, core.settings = seconds, replace(core.settings, wait=seconds)

    def hang_up(self) -> None:
        """The next call needs a new connection."""
        self.store._link.close()
        self.run(self.store.close_async)


def ledger_of(store: RedisStore) -> dict[tuple[str, str], dict[str, Any]]:
    """The ledger's lines by account and id, each of which is there once."""
    lines = [decision_line(entry.decision) for entry in store.entries()]
    found = {key_of(line): line for line in lines}
    assert len(found) == len(lines), f"decided twice: {Counter(map(key_of, lines)).most_common(3)}"
    return found


def key_of(line: dict[str, Any]) -> tuple[str, str]:
    """By what a decision's line is found."""
    return line["account"], line["id"]


def keys_of(requests: Sequence[Request]) -> set[tuple[str, str]]:
    """By what the lines of requests are found."""
    return {(request.account, request.id) for request in requests}


def check_decided(answers: list[Any] | StoreError, requests: Sequence[Request], store: RedisStore) -> list[bool]:
    """Each request has its decision, which the ledger has once, with the same fields; whether each was replayed."""
    assert isinstance(answers, list), repr(answers)
    assert [(type(answer), answer.id, answer.account) for answer in answers] == [
        (Decision, request.id, request.account) for request in requests
    ]
    ledger = ledger_of(store)
    for answer in answers:
        line = decision_line(answer)
        assert {**line, "replayed": False} == ledger[key_of(line)]
    return [answer.replayed for answer in answers]


def faults_of(store: RedisStore, calls: Sequence[Call], changes: Sequence[Change] | None = None) -> set[str]:
    """What is wrong with what callers were answered, shard by shard; without changes, all accounts are in tier 3."""
    asking = store._core.asking
    where = {call.account: asking.shard_of(account_word(OFFER.name, call.account)).number for call in calls}
    found = set()
    entries = list(store.entries())
    for shard in range(store.shards):
        accounts = [account for account, number in where.items() if number == shard]
        found |= faults(
            History(
                calls=[call for call in calls if call.account in accounts],
                changes=[Change(account, 3, 0, 0) for account in accounts] if changes is None else list(changes),
                ledger=[
                    {"entry": entry.entry, **decision_line(entry.decision)} for entry in entries if entry.shard == shard
                ],
            )
        )
    return found


def replicated(server: Server) -> int:
    """How far a server has written, or copied."""
    offset: int = server.ask("INFO", "replication")["master_repl_offset"]
    return offset


class Rough(Proxy):
    """A proxy at which each call may meet a fault, as a seed tells."""

    def __init__(
        self, upstream: Address, *, seed: int, share: float, faults: Sequence[Fault], tcp: bool = False
    ) -> None:
        super().__init__(upstream, tcp=tcp)
        self.struck = 0
        self._share, self._faults = share, faults
        self._chance = random.Random(seed)  # noqa: S311 - a schedule, no secret

    def strike(self, command: bytes) -> tuple[Fault, float]:
        """What this command meets."""
        with self._mutex:
            if not self._is_marked(command) or self._chance.random() > self._share:
                return "pass", 0.0
            self.struck += 1
            return self._chance.choice(self._faults), 0.0


class Load:
    """Threads over one meter, and tasks over another, that decide without a pause between `with` and `end`."""

    def __init__(
        self, open_store: Callable[[], RedisStore], *, threads: int = 3, tasks: int = 8, accounts: int = 40
    ) -> None:
        self._open_store, self._threads, self._tasks, self._accounts = open_store, threads, tasks, accounts
        self._is_over = threading.Event()
        self._calls: list[Call] = []
        self._failed: list[BaseException] = []
        self._names = itertools.count()

    def __enter__(self) -> Self:
        self._store = self._open_store()
        self._meter = Meter(self._store, OFFER, assume=ENROLLED)
        jobs = [*[self._decide_in_a_thread] * self._threads, self._decide_in_tasks]
        self._running = [threading.Thread(target=self._run, args=(job,)) for job in jobs]
        for thread in self._running:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._running:
            thread.join()
        self._store.close()

    def go_on(self, *, for_calls: int) -> None:
        """So many more are decided."""
        enough = len(self._calls) + for_calls
        until(lambda: len(self._calls) >= enough or bool(self._failed), f"{for_calls} more are decided")
        assert self._failed == []

    def end(self) -> list[Call]:
        """What was asked and answered until now; nobody asks any more."""
        self._is_over.set()
        for thread in self._running:
            thread.join()
        assert self._failed == []
        return self._calls

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001 - told to whoever waits
            self._failed.append(error)

    def _next(self) -> Request:
        """A new request, or one that was asked before, perhaps of a caller who waits for it yet."""
        number = next(self._names)
        chance = random.Random(number)  # noqa: S311 - a schedule, no secret
        number -= chance.choice((0, 0, 0, 0, 1, 2, 5, 50))
        return request(
            number,
            tokens=random.Random(-number).choice((1, 900, 20_000)),  # noqa: S311 - a schedule, no secret
            account=f"account {number % self._accounts}",
        )

    def _answered(self, one: Request, start: int, decision: Decision) -> None:
        self._calls.append(Call(one.account, one.id, start, time.monotonic_ns(), decision_line(decision)))

    def _decide_in_a_thread(self) -> None:
        while not self._is_over.is_set():
            one, start = self._next(), time.monotonic_ns()
            self._answered(one, start, self._meter.decide(one))

    def _decide_in_tasks(self) -> None:
        async def decide(meter: AsyncMeter) -> None:
            while not self._is_over.is_set():
                one, start = self._next(), time.monotonic_ns()
                self._answered(one, start, await meter.decide(one))

        async def run() -> None:
            meter = AsyncMeter(self._open_store(), OFFER, assume=ENROLLED)
            await asyncio.gather(*(decide(meter) for _ in range(self._tasks)))
            await meter.close()

        asyncio.run(run())
