"""One decision on Redis or Valkey, over what server and client take alone, and beside what others do there.

All of it is one run on one private server behind a Unix socket. A ratio is taken within a round.
"""

from __future__ import annotations

import asyncio
import platform
import statistics
from contextlib import AsyncExitStack, ExitStack
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from itertools import cycle
from typing import TYPE_CHECKING, Any

from benchmarks.growth import grown
from benchmarks.peers import EXAMPLE_ALLOWANCE, NONE_HAS, PEERS, Peer, Place
from benchmarks.scene import (
    ALLOWANCE,
    BATCH,
    ENROLLED,
    FULL,
    NO_OP,
    NO_OP_CALL,
    QUICK,
    TOKENS,
    Latency,
    Scene,
    Supply,
    Work,
    all_free,
    all_replays,
    always,
    arguments_of,
    awaited,
    crowd,
    deciding,
    is_replay,
    latencies,
    lone,
    note,
    rates,
)
from benchmarks.sheet import Goal, Ratio, Row, over, sheet
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from tests.servers import Server, binary

from gratis import AsyncMeter, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from gratis import Decision, Meter, RequestError

ACCOUNTS = 1_000
CROWD, CROWD_LARGE = 64, 512
SMALL_BATCH = 100
WARM = 50
MICROS, A_SECOND = "µs", "/s"
ONE, MANY = ("acme",), tuple(f"org-{n}" for n in range(ACCOUNTS))

G1 = Goal("G1", "≤", 0.95)
G2_CROWD = Goal("G2", "≥", 5, beyond=" (8 is the aim)")
G2_LONE = Goal("G2", "≤", 1.2)
G3 = Goal("G3", "≥", 18)
G4_SINGLE, G4_BATCH = Goal("G4", "≤", 4.5), Goal("G4", "≤", 1.3)

NO_OP_SAME = "no-op script, a decision's arguments"
NO_OP_FIXED = "no-op script, 3 arguments, one fixed connection"
DECIDE = "`decide`, one account"
DECIDE_MANY = f"`decide`, {ACCOUNTS:,} accounts in turn"
REPLAY = "`decide`, asked before, then alone"
REPLAY_OF_BATCH = f"`decide`, asked before, then in a batch of {BATCH:,}"


def run(*, program: Path | None = None, is_quick: bool = False) -> Iterator[str]:
    """The table."""
    with Server(binary() if program is None else program) as server, ExitStack() as stack:
        scene = Scene(server, stack.enter_context(server.client()), QUICK if is_quick else FULL, stack)
        found = [peer for peer in PEERS if peer.version is not None]
        note("one by one")
        floors = _floors(scene)
        base, rows = _one_by_one(scene, floors, found)
        note("in batches, and the server's time")
        rows += _in_batches(scene)
        rows += _server_time(scene, floors[-1])
        for loop in ("asyncio", *(["uvloop"] if find_spec("uvloop") else [])):
            note(f"tasks of {loop}")
            factory = import_module("uvloop").new_event_loop if loop == "uvloop" else None
            try:
                with asyncio.Runner(loop_factory=factory) as runner:
                    rows += runner.run(_tasks(scene, found, loop))
            except StoreError as error:
                rows.append(Row(f"**Tasks of {loop}**", remarks=f"`AsyncMeter` does not run there: {error}"))
        rows += grown(scene)
        yield sheet(f"On {_named(scene)}", _header(scene, base), rows)


def _named(scene: Scene) -> str:
    info = scene.admin.info("server")
    if "valkey_version" in info:
        return f"Valkey {info['valkey_version']}"
    return f"Redis {info['redis_version']}"


def _header(scene: Scene, base: list[float]) -> list[str]:
    """What it was measured with, and how noisy the machine was."""
    noise = (max(base) - min(base)) / statistics.median(base)
    peers = {peer.distribution: peer.version or "not installed" for peer in PEERS}
    used = {"redis": version("redis"), "hiredis": version("hiredis"), **peers}
    if find_spec("uvloop"):
        used["uvloop"] = version("uvloop")
    setting = (
        f"{_named(scene)} without persistence, a Unix socket, one private server for all;"
        f" {platform.machine()}, Python {platform.python_version()};"
        f" {', '.join(f'{name} {number}' for name, number in used.items())}."
    )
    work = (
        f"Medians of {scene.plan.rounds} interleaved rounds, ratios taken within a round, lowest and highest round"
        f" beside them. Requests are new, with ids of 32 characters and {TOKENS} tokens, of enrolled accounts."
    )
    return [setting, work, f"Noise of the machine: the p50 of a no-op script spread by {noise:.0%} over the rounds."]


def _floors(scene: Scene) -> list[Work]:
    """What redis-py takes: one client, as its documents advise, retries off."""
    client, fixed = scene.server.client(), scene.server.client(single_connection_client=True)
    for each in (client, fixed):
        scene.stack.callback(each.close)
    digest = client.script_load(NO_OP)
    meter, supply = scene.meter("shape", ONE), Supply(ONE)
    for request in supply.take(WARM):
        meter.decide(request)
    (request,) = supply.take(1)
    _, _, keys, *words = arguments_of(scene.server, lambda: meter.decide(request))
    ask: Any = client.evalsha
    ask_fixed: Any = fixed.evalsha
    return [
        Work("PING", always(client.ping)),
        Work("INCRBY", always(lambda: client.incrby("floor", TOKENS))),
        Work(NO_OP_CALL, always(lambda: ask(digest, 1, "floor", "1", "2", "3"))),
        Work(NO_OP_FIXED, always(lambda: ask_fixed(digest, 1, "floor", "1", "2", "3"))),
        Work(NO_OP_SAME, always(lambda: ask(digest, int(keys), *words))),
    ]


def _one_by_one(scene: Scene, floors: list[Work], found: list[Peer]) -> tuple[list[float], list[Row]]:
    """Single calls: floors, ours, the others'."""
    ours = [
        deciding(DECIDE, scene.meter("one", ONE), Supply(ONE)),
        deciding(DECIDE_MANY, scene.meter("many", MANY), Supply(MANY)),
        _replaying(REPLAY, scene.meter("again", ONE), size=1),
        _replaying(REPLAY_OF_BATCH, scene.meter("again from a batch", ONE), size=BATCH),
    ]
    theirs = [_hitting(peer, scene, "day") for peer in found]
    taken = latencies([*floors, *ours, *theirs], scene.plan)
    base = taken[NO_OP_CALL].p50
    remarks = {peer.name: peer.remarks(_place(peer, scene, "example", EXAMPLE_ALLOWANCE)) for peer in found}
    rows = [Row("**What client and server take alone** (redis-py, one client, retries off)")]
    rows += [_single(work.name, taken[work.name], base) for work in floors]
    rows.append(Row("**One decision**"))
    rows.append(_single(DECIDE, taken[DECIDE], base, goal=G1, remarks="id, enrollment, tally and ledger in one step"))
    for floor in (NO_OP_SAME, NO_OP_FIXED):
        ratio = Ratio(over(taken[DECIDE].p50, taken[floor].p50), floor)
        rows.append(Row("the same", taken[DECIDE].p50, MICROS, ratio=ratio))
    ratio = Ratio(over(taken[DECIDE_MANY].p50, taken[DECIDE].p50), "one account")
    rows.append(Row(DECIDE_MANY, taken[DECIDE_MANY].p50, MICROS, taken[DECIDE_MANY].p99, ratio))
    rows += [_single(name, taken[name], base) for name in (REPLAY, REPLAY_OF_BATCH)]
    rows.append(Row("**Others, one call**, for the same tokens", remarks=f"none of them has {NONE_HAS}; and each:"))
    for peer in PEERS:
        if peer in found:
            rows.append(_single(peer.name, taken[peer.name], base, remarks=remarks[peer.name]))
        else:
            rows.append(Row(peer.name, remarks=f"`{peer.distribution}` is not installed"))
    return base, rows


def _single(name: str, taken: Latency, base: list[float], *, goal: Goal | None = None, remarks: str = "") -> Row:
    return Row(name, taken.p50, MICROS, taken.p99, Ratio(over(taken.p50, base), "no-op"), goal, remarks)


def _replaying(name: str, meter: Meter, *, size: int) -> Work:
    """Requests that were decided before, in another order than then."""
    asked = Supply(ONE).take(BATCH)
    for first in range(0, BATCH, size):
        meter.decide_many(asked[first : first + size])
    again = cycle(asked[::7])
    return Work(name, always(lambda: meter.decide(next(again))), is_replay)


def _place(peer: Peer, scene: Scene, use: str, allowance: int) -> Place:
    key = f"{use} {peer.name}".replace("`", "").replace(" ", "-")
    return Place(scene.server.address, key, allowance, scene.stack)


def _hitting(peer: Peer, scene: Scene, use: str) -> Work:
    hit = peer.blocking(_place(peer, scene, use, ALLOWANCE))
    return Work(peer.name, always(lambda: hit(TOKENS)), lambda answer: answer is True)


def _batching(name: str, meter: Meter, supply: Supply, size: int) -> Work:
    """New requests, so many a call."""

    def prepare(count: int) -> Callable[[], list[Decision | RequestError]]:
        asked = iter([supply.take(size) for _ in range(count)])
        return lambda: meter.decide_many(next(asked))

    return Work(name, prepare, all_free)


def _in_batches(scene: Scene) -> list[Row]:
    """Decisions a second, one by one and in batches."""
    single, wide = "`decide`, one after another", f"`decide_many`, {BATCH:,} of {ACCOUNTS:,} accounts"
    small, large = f"`decide_many`, {SMALL_BATCH} of one account", f"`decide_many`, {BATCH:,} of one account"
    again = f"`decide_many`, {BATCH:,} asked before, then in one batch, too"
    meter = scene.meter("replayed", ONE)
    asked = Supply(ONE).take(BATCH)
    meter.decide_many(asked)
    works = [
        (deciding(single, scene.meter("singles", ONE), Supply(ONE)), 2 * scene.plan.calls, 1),
        (_batching(small, scene.meter("hundreds", ONE), Supply(ONE), SMALL_BATCH), 20, SMALL_BATCH),
        (_batching(large, scene.meter("thousands", ONE), Supply(ONE), BATCH), 4, BATCH),
        (_batching(wide, scene.meter("wide", MANY), Supply(MANY), BATCH), 4, BATCH),
        (Work(again, always(lambda: meter.decide_many(asked)), all_replays), 1, BATCH),
    ]
    found = rates(works, scene.plan)
    rows = [Row("**Batches**")]
    for work, _, _ in works:
        ratio = None if work.name == single else Ratio(over(found[work.name], found[single]), "one by one")
        rows.append(Row(work.name, found[work.name], A_SECOND, ratio=ratio, goal=G3 if work.name == large else None))
    return rows


def _server_time(scene: Scene, no_op: Work) -> list[Row]:
    """What the server says that a script takes, a decision."""
    works = {
        NO_OP_SAME: (no_op, 5 * scene.plan.calls, 1),
        DECIDE: (deciding(DECIDE, scene.meter("timed", ONE), Supply(ONE)), 5 * scene.plan.calls, 1),
        REPLAY: (_replaying(REPLAY, scene.meter("timed again", ONE), size=1), scene.plan.calls, 1),
        REPLAY_OF_BATCH: (
            _replaying(REPLAY_OF_BATCH, scene.meter("timed again from a batch", ONE), size=BATCH),
            scene.plan.calls,
            1,
        ),
    }
    for size in (SMALL_BATCH, BATCH):
        name = f"`decide_many`, {size:,} of one account"
        works[name] = (_batching(name, scene.meter(f"timed {size}", ONE), Supply(ONE), size), 5, size)
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(scene.plan.rounds + 1):
        for name, (work, calls, items) in works.items():
            call = work.prepare(calls)
            micros = scene.script_micros(call, calls)
            if turn:
                found[name].append(micros / calls / items)
    base = found[NO_OP_SAME]
    goals = {DECIDE: G4_SINGLE, f"`decide_many`, {BATCH:,} of one account": G4_BATCH}
    rows = [Row("**The server's time for a decision** (what INFO says of its scripts)")]
    for name, values in found.items():
        ratio = None if name == NO_OP_SAME else Ratio(over(values, base), "no-op")
        rows.append(Row(name, values, MICROS, ratio=ratio, goal=goals.get(name)))
    return rows


async def _tasks(scene: Scene, found: list[Peer], loop: str) -> list[Row]:
    """Calls of asyncio: a lone one, and of many tasks at once."""
    async with AsyncExitStack() as stack:
        floors = await _async_floors(scene, stack)
        one = await _async_work(scene, stack, f"{loop} one", ONE)
        many = await _async_work(scene, stack, f"{loop} many", MANY)
        theirs = [awaited(peer.name, await peer.awaited(_place(peer, scene, loop, ALLOWANCE))) for peer in found]
        singles = [*floors, one, *theirs]
        crowds = [
            *[(work.name, work, CROWD, scene.plan.async_items) for work in (floors[0], *theirs)],
            ("ours", one, CROWD, 2 * scene.plan.async_items),
            ("large", one, CROWD_LARGE, 2 * scene.plan.async_items),
            ("many", many, CROWD, 2 * scene.plan.async_items),
        ]
        alone = {work.name: Latency([], []) for work in singles}
        fast: dict[str, list[float]] = {name: [] for name, *_ in crowds}
        for turn in range(scene.plan.rounds + 1):
            for work in singles:
                taken = await lone(work, scene.plan.async_calls)
                if turn:
                    alone[work.name].add(taken)
            for name, work, tasks, items in crowds:
                rate = await crowd(work, tasks, items)
                if turn:
                    fast[name].append(rate)
    return _task_rows(loop, found, alone, fast)


async def _async_floors(scene: Scene, stack: AsyncExitStack) -> list[Work]:
    works = []
    for name, options in ((NO_OP_CALL, {}), (NO_OP_FIXED, {"single_connection_client": True})):
        client: Any = AsyncRedis.from_url(scene.server.url, retry=AsyncRetry(NoBackoff(), 0), **options)
        stack.push_async_callback(client.aclose)
        digest = await client.script_load(NO_OP)
        works.append(Work(name, always(_no_op(client, digest))))
    return works


def _no_op(client: Any, digest: str) -> Callable[[], object]:
    return lambda: client.evalsha(digest, 1, "floor", "1", "2", "3")


async def _async_work(scene: Scene, stack: AsyncExitStack, namespace: str, accounts: tuple[str, ...]) -> Work:
    meter = await stack.enter_async_context(AsyncMeter.open(scene.url(namespace)))
    for account in accounts:
        await meter.enroll(account, ENROLLED, actor="owner")
    await meter.decide_many(Supply(accounts).take(len(accounts)))
    return deciding("`AsyncMeter.decide`", meter, Supply(accounts))


def _task_rows(loop: str, found: list[Peer], alone: dict[str, Latency], fast: dict[str, list[float]]) -> list[Row]:
    base, ours = alone[NO_OP_CALL].p50, alone["`AsyncMeter.decide`"]
    rows = [Row(f"**Tasks of {loop}**: a lone call")]
    rows.append(_single(NO_OP_CALL, alone[NO_OP_CALL], base, remarks="redis.asyncio, one client, retries off"))
    rows.append(_single(NO_OP_FIXED, alone[NO_OP_FIXED], base))
    rows.append(_single("`AsyncMeter.decide`", ours, base, goal=G2_LONE))
    rows += [_single(peer.name, alone[peer.name], base) for peer in found]
    rows.append(Row(f"**Tasks of {loop}**: {CROWD} in flight, decisions a second"))
    rows.append(Row(NO_OP_CALL, fast[NO_OP_CALL], A_SECOND))
    theirs = [peer.name for peer in found if peer.distribution == "limits"]
    best = max(theirs, key=lambda name: statistics.median(fast[name]), default=None)
    ratio = None if best is None else Ratio(over(fast["ours"], fast[best]), f"{best}")
    missing = "" if best is not None else "`limits` is not installed"
    rows.append(Row("`AsyncMeter.decide`", fast["ours"], A_SECOND, ratio=ratio, goal=G2_CROWD, remarks=missing))
    for name, key in ((f"the same, {ACCOUNTS:,} accounts", "many"), (f"the same, {CROWD_LARGE} in flight", "large")):
        ratio = Ratio(over(fast[key], fast["ours"]), f"one account, {CROWD} in flight")
        rows.append(Row(name, fast[key], A_SECOND, ratio=ratio))
    rows += [Row(peer.name, fast[peer.name], A_SECOND) for peer in found]
    return rows
