"""One private server, and how work on it is timed: slices of all contestants take turns, round after round."""

from __future__ import annotations

import ast
import asyncio
import gc
import random
import re
import socket
import string
import sys
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from itertools import count
from time import perf_counter, perf_counter_ns
from typing import TYPE_CHECKING, Any, NamedTuple

from gratis import AsyncMeter, Decision, Enrollment, Meter, Request, Sharing

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from tests.servers import Server

MODEL = "gpt-5-mini-2025-08-07"
ALLOWANCE = 10_000_000
INPUT, OUTPUT = 70, 30
TOKENS = INPUT + OUTPUT
ENROLLED = Enrollment(tier=3, sharing=Sharing.ENABLED)
ID_CHARACTERS = 32
NOT_HEX = string.ascii_letters + string.digits
BATCH = 1_000
SCRIPTS = ("EVALSHA", "EVAL", "FCALL")
NO_OP = "return 0"
NO_OP_CALL = "no-op script, 3 arguments"
PERCENT_99 = 0.99
STARTED = perf_counter()
SEEDS = count()


class Plan(NamedTuple):
    """How much of everything."""

    rounds: int
    slices: int
    calls: int
    async_calls: int
    async_items: int
    large: int
    sample: int


FULL = Plan(rounds=7, slices=4, calls=100, async_calls=300, async_items=1_280, large=1_000_000, sample=20_000)
QUICK = Plan(rounds=3, slices=2, calls=100, async_calls=100, async_items=448, large=100_000, sample=5_000)


class Work(NamedTuple):
    """One way to do the work: `prepare` returns what can be called so often, `is_right` tells its answer."""

    name: str
    prepare: Callable[[int], Callable[[], Any]]
    is_right: Callable[[Any], bool] = lambda _: True


class Latency(NamedTuple):
    """The middle and the slow end, a round each, in microseconds."""

    p50: list[float]
    p99: list[float]

    def add(self, taken: list[int]) -> None:
        """One more round, from the nanoseconds of its calls."""
        taken.sort()
        self.p50.append(taken[len(taken) // 2] / 1e3)
        self.p99.append(taken[int(len(taken) * PERCENT_99)] / 1e3)


class Scene(NamedTuple):
    """A server with a client that asks after it, the plan, and what must be closed."""

    server: Server
    admin: Any
    plan: Plan
    stack: ExitStack

    def url(self, namespace: str) -> str:
        """A store of its own on the server."""
        return f"{self.server.url}?namespace={namespace}"

    def meter(self, namespace: str, enrolled: Sequence[str]) -> Meter:
        """A meter on a store of its own, with accounts that are enrolled and have asked once."""
        meter = self.stack.enter_context(Meter.open(self.url(namespace)))
        for account in enrolled:
            meter.enroll(account, ENROLLED, actor="owner")
        meter.decide_many(Supply(enrolled).take(len(enrolled)))
        return meter

    def script_micros(self, call: Callable[[], object], calls: int) -> float:
        """The microseconds that the server spends in scripts during so many calls."""
        self.admin.config_resetstat()
        for _ in range(calls):
            call()
        stats = self.admin.info("commandstats")
        return float(
            sum(stats[f"cmdstat_{name.lower()}"]["usec"] for name in SCRIPTS if f"cmdstat_{name.lower()}" in stats)
        )

    def used_memory(self) -> int:
        """The bytes that the server uses."""
        return int(self.admin.info("memory")["used_memory"])


class Supply:
    """New requests without end, of accounts in turn or at random."""

    def __init__(
        self,
        accounts: Sequence[str],
        *,
        is_hex: bool = True,
        sizes: tuple[int, int] = (INPUT, OUTPUT),
        at: datetime | None = None,
    ) -> None:
        self._chance = random.Random(next(SEEDS))  # noqa: S311 - the same each time
        self._accounts, self._turn = accounts, 0
        self._is_hex, self._sizes = is_hex, sizes
        self.at = at

    def take(self, many: int) -> list[Request]:
        """So many new ones."""
        at = self.at or datetime.now(UTC)
        first, self._turn = self._turn, self._turn + many
        accounts = self._accounts
        inputs, outputs = self._sizes
        return [
            Request(
                id=self._id(),
                account=accounts[turn % len(accounts)],
                model=MODEL,
                at=at,
                input_tokens=inputs,
                output_tokens=outputs,
            )
            for turn in range(first, first + many)
        ]

    def _id(self) -> str:
        if self._is_hex:
            return f"{self._chance.getrandbits(4 * ID_CHARACTERS):0{ID_CHARACTERS}x}"
        return "".join(self._chance.choices(NOT_HEX, k=ID_CHARACTERS))


def always(call: Callable[[], object]) -> Callable[[int], Callable[[], object]]:
    """What needs no preparation."""
    return lambda _: call


def deciding(name: str, meter: Meter | AsyncMeter, supply: Supply) -> Work:
    """New requests, one by one."""

    def prepare(calls: int) -> Callable[[], object]:
        following = iter(supply.take(calls)).__next__
        decide = meter.decide
        return lambda: decide(following())

    return Work(name, prepare, is_free)


def is_free(answer: object) -> bool:
    """Whether it is a new decision, and free."""
    return isinstance(answer, Decision) and answer.is_free and not answer.replayed


def is_replay(answer: object) -> bool:
    """Whether it is a decision that was made before."""
    return isinstance(answer, Decision) and answer.is_free and answer.replayed


def all_free(answers: object) -> bool:
    """Whether all of them are new decisions, and free."""
    return isinstance(answers, list) and all(map(is_free, answers))


def all_replays(answers: object) -> bool:
    """Whether all of them were decided before."""
    return isinstance(answers, list) and all(map(is_replay, answers))


def latencies(works: Sequence[Work], plan: Plan) -> dict[str, Latency]:
    """How long single calls take; the first turn of each does not count."""
    found = {work.name: Latency([], []) for work in works}
    for work in works:
        _slice(work, plan.calls)
    for _ in range(plan.rounds):
        gc.collect()
        taken: dict[str, list[int]] = {work.name: [] for work in works}
        for _ in range(plan.slices):
            for work in works:
                taken[work.name] += _slice(work, plan.calls)
        for name, times in taken.items():
            found[name].add(times)
    return found


def _slice(work: Work, calls: int) -> list[int]:
    call, answer, taken = work.prepare(calls), None, []
    for _ in range(calls):
        start = perf_counter_ns()
        answer = call()
        taken.append(perf_counter_ns() - start)
    checked(work, answer)
    return taken


def rates(works: Sequence[tuple[Work, int, int]], plan: Plan) -> dict[str, list[float]]:
    """Decisions a second, round by round, of works that are called so often and decide so many a call."""
    found: dict[str, list[float]] = {work.name: [] for work, _, _ in works}
    for turn in range(plan.rounds + 1):
        gc.collect()
        for work, calls, items in works:
            call, answer = work.prepare(calls), None
            start = perf_counter()
            for _ in range(calls):
                answer = call()
            taken = perf_counter() - start
            checked(work, answer)
            if turn:
                found[work.name].append(calls * items / taken)
    return found


async def lone(work: Work, calls: int) -> list[int]:
    """The nanoseconds of calls for asyncio, one after another."""
    call, answer, taken = work.prepare(calls), None, []
    for _ in range(calls):
        start = perf_counter_ns()
        answer = await call()
        taken.append(perf_counter_ns() - start)
    checked(work, answer)
    return taken


async def crowd(work: Work, tasks: int, items: int) -> float:
    """Calls a second of so many tasks that each call again and again."""
    call, left = work.prepare(items), items
    answers: list[object] = [None]  # the last one

    async def one() -> None:
        nonlocal left
        while left:
            left -= 1
            answers[0] = await call()

    start = perf_counter()
    await asyncio.gather(*[one() for _ in range(min(tasks, items))])
    taken = perf_counter() - start
    checked(work, answers[0])
    return items / taken


def awaited(name: str, hit: Callable[[int], Awaitable[bool]]) -> Work:
    """A peer for asyncio."""
    return Work(name, always(lambda: hit(TOKENS)), lambda answer: answer is True)


def checked(work: Work, answer: object) -> None:
    """Go on only if the answer is right: what does other work is not compared."""
    if not work.is_right(answer):
        sys.exit(f"{work.name}: its answer is not what was asked for: {answer!r}")


def arguments_of(server: Server, work: Callable[[], object]) -> list[bytes]:
    """The call of a script that the server is sent meanwhile, word by word, as its monitor tells."""
    with closing(socket.socket(socket.AF_UNIX)) as monitor:
        monitor.settimeout(5)
        monitor.connect(server.address)
        monitor.sendall(b"MONITOR\r\n")
        lines = monitor.makefile("rb")
        lines.readline()
        work()
        while True:
            line = lines.readline()
            if not line:
                raise EOFError("the monitor ended")
            source, _, said = line.partition(b"] ")
            words = [
                ast.literal_eval(f'b"{word}"') for word in re.findall(r'"((?:[^"\\]|\\.)*)"', said.decode("ascii"))
            ]
            if not source.endswith(b" lua") and words and words[0].decode().upper() in SCRIPTS:
                return words


def note(text: str) -> None:
    """Say on standard error what is under way."""
    print(f"... {perf_counter() - STARTED:5.1f} s: {text}", file=sys.stderr, flush=True)
