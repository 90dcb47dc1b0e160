"""What grows: many accounts, a window of many ids, the memory that decisions keep, and the end of such a day."""

from __future__ import annotations

import random
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from time import perf_counter, perf_counter_ns, sleep
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.scene import (
    ENROLLED,
    NO_OP,
    NO_OP_CALL,
    PERCENT_99,
    Latency,
    Scene,
    Supply,
    Work,
    always,
    checked,
    deciding,
    is_free,
    is_replay,
    latencies,
    note,
)
from benchmarks.sheet import Goal, Ratio, Row, over
from redis import Redis

from gratis import Meter
from gratis.stores import BATCH_MAX, Bounds, Trimmed
from gratis.stores.urls import open_store

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from gratis import Request

FEW_ACCOUNTS, FEW_IDS = 1_000, 100
THREADS = 2
DAY = datetime(2026, 10, 1, 12, tzinfo=UTC)
LATER = DAY + timedelta(days=10)
SIZES = (7, 3)  # a million of them are an allowance
SLOW_MICROS = 250
SLOW_KEPT = 100_000
BUSY_MOST_S = 3.0
TRIM_MOST_S = 30.0
TRIM_STEPS = 20
PROBES = 50
OUR_OWN = (b"CONFIG", b"SLOWLOG")
BETWEEN_S = 0.0005
PAUSE_MOST_MS = 5.0
REPLAYED = 500

DECIDE = "`decide`, another day"

G5_MEMORY = Goal("G5", "≤", 120, "B")
G5_PAUSE = Goal("G5", "≤", PAUSE_MOST_MS, "ms")
G6 = Goal("G6", "≤", 1.1)


class Clock:
    """A store's clock that stands where it is put."""

    def __init__(self, at: datetime) -> None:
        self.at = at

    def __call__(self) -> datetime:
        """The time."""
        return self.at


class Seen(NamedTuple):
    """What was seen while another process was at work: milliseconds a probe, and what that process answers."""

    pings: list[float]
    decisions: list[float]
    slowest: float
    verb: str
    slow: int
    answer: Any

    @staticmethod
    def tail(times: list[float]) -> list[float]:
        """The slow end."""
        return [sorted(times)[int(len(times) * PERCENT_99)]]


def grown(scene: Scene) -> list[Row]:
    """All of it, on stores of their own."""
    few, large = FEW_ACCOUNTS, scene.plan.large
    note(f"{large:,} accounts")
    few_accounts = _filled_accounts(scene, "few accounts", few)
    before = scene.used_memory()
    many_accounts = _filled_accounts(scene, "many accounts", large)
    of_accounts = (scene.used_memory() - before) / large
    note(f"a window of {large:,} ids")
    clock = Clock(DAY)
    before = scene.used_memory()
    start = perf_counter()
    day, kept = _filled_day(scene, clock)
    rate = large / (perf_counter() - start)
    of_ids = (scene.used_memory() - before) / large
    few_name, many_name = f"`decide`, {few:,} accounts", f"`decide`, {large:,} accounts"
    short_name, long_name = f"`decide`, {FEW_IDS} ids in the window", f"`decide`, {large:,} ids in the window"
    again_name = f"`decide`, asked before, {large:,} ids in the window"
    taken = latencies(
        [
            _no_op(scene),
            deciding(few_name, few_accounts, _shuffled(few)),
            deciding(many_name, many_accounts, _shuffled(large)),
            _short_days(short_name, scene),
            deciding(long_name, day, Supply(("acme",), sizes=(0, 0), at=DAY)),
            Work(again_name, always(_again(day, kept)), is_replay),
        ],
        scene.plan,
    )
    rows = [Row("**Growth**", remarks="every account is assumed to be enrolled")]
    for small, grown_name in ((few_name, many_name), (short_name, long_name)):
        rows.append(_row(small, taken[small], taken[NO_OP_CALL]))
        ratio = Ratio(over(taken[grown_name].p50, taken[small].p50), "the line above")
        rows.append(Row(grown_name, taken[grown_name].p50, "µs", taken[grown_name].p99, ratio, G6))
    rows.append(_row(again_name, taken[again_name], taken[NO_OP_CALL]))
    rows.append(Row(f"filling it, {BATCH_MAX:,} a call, {THREADS} threads", [rate], "/s"))
    rows += _memory(scene)
    rows.append(Row(f"in batches, one account, hex ids, {large:,} decisions", [of_ids], "B", goal=G5_MEMORY))
    rows.append(Row(f"in batches, {large:,} accounts, hex ids", [of_accounts], "B", remarks="its account with each"))
    note(f"the end of a day of {large:,} ids")
    (request,) = Supply(("acme",), sizes=(0, 0), at=DAY).take(1)
    upto = day.decide(request).seq
    assert upto is not None, "it is counted"
    clock.at = LATER
    return [*rows, *_end_of_day(scene, day, upto)]


def _row(name: str, taken: Latency, base: Latency) -> Row:
    return Row(name, taken.p50, "µs", taken.p99, Ratio(over(taken.p50, base.p50), "no-op"))


def _names(count: int) -> list[str]:
    return [f"org-{number}" for number in range(count)]


def _shuffled(count: int) -> Supply:
    names = _names(count)
    random.Random(count).shuffle(names)  # noqa: S311 - the same each time
    return Supply(names, sizes=(0, 0))


def _no_op(scene: Scene) -> Work:
    client = scene.server.client()
    scene.stack.callback(client.close)
    digest, ask = client.script_load(NO_OP), client.evalsha
    return Work(NO_OP_CALL, always(lambda: ask(digest, 1, "floor", "1", "2", "3")))


def _filled_accounts(scene: Scene, namespace: str, count: int) -> Meter:
    """One decision an account, its enrollment assumed."""
    meter = scene.stack.enter_context(Meter.open(scene.url(namespace), assume=ENROLLED))
    names = _names(count)
    _fill(meter, [Supply(names[first::THREADS], sizes=SIZES) for first in range(THREADS)], count)
    return meter


def _filled_day(scene: Scene, clock: Clock) -> tuple[Meter, list[Request]]:
    """A window of many ids, and some of its requests."""
    meter = scene.stack.enter_context(Meter.open(scene.url("day"), clock=clock, assume=ENROLLED))
    supplies = [Supply(("acme",), sizes=SIZES, at=DAY) for _ in range(THREADS)]
    return meter, _fill(meter, supplies, scene.plan.large)


def _fill(meter: Meter, supplies: list[Supply], count: int) -> list[Request]:
    """Decide so many in batches, from threads, so that client and server work at once; a few of the requests."""

    def part(supply: Supply) -> list[Request]:
        kept: list[Request] = []
        for first in range(0, count // THREADS, BATCH_MAX):
            asked = supply.take(min(BATCH_MAX, count // THREADS - first))
            answers = meter.decide_many(asked)
            if not (is_free(answers[0]) and is_free(answers[-1])):
                sys.exit(f"a request of a new day: {answers[-1]!r}")
            kept += asked[:: count // REPLAYED]
        return kept

    with ThreadPoolExecutor(THREADS) as threads:
        return [request for kept in threads.map(part, supplies) for request in kept]


def _again(meter: Meter, kept: list[Request]) -> Callable[[], object]:
    chance = random.Random(0)  # noqa: S311 - the same each time
    return lambda: meter.decide(chance.choice(kept))


def _short_days(name: str, scene: Scene) -> Work:
    """Windows of few ids: a new store for each slice."""
    numbers = iter(range(1_000_000))

    def prepare(count: int) -> Callable[[], object]:
        url = scene.url(f"short {next(numbers)}")
        meter = scene.stack.enter_context(Meter.open(url, clock=Clock(DAY), assume=ENROLLED))
        supply = Supply(("acme",), sizes=(0, 0), at=DAY)
        meter.decide_many(supply.take(FEW_IDS))
        following = iter(supply.take(count)).__next__
        decide = meter.decide
        return lambda: decide(following())

    return Work(name, prepare, is_free)


def _memory(scene: Scene) -> list[Row]:
    """What the server keeps for a decision, id and ledger together."""
    count = scene.plan.sample
    rows = [Row("**Memory that the server keeps for a decision**, its id and its ledger's entry together")]
    for accounts in (1, FEW_ACCOUNTS):
        for is_hex in (True, False):
            kind = "hex" if is_hex else "other"
            note(f"memory: {accounts:,} accounts, {kind} ids")
            names = _names(accounts)
            meter = scene.meter(f"memory {accounts} {kind}", names)
            supply = Supply(names, is_hex=is_hex, sizes=SIZES)
            before = scene.used_memory()
            for _ in range(count // FEW_ACCOUNTS):
                for request in supply.take(FEW_ACCOUNTS):
                    meter.decide(request)
            used = (scene.used_memory() - before) / count
            whose = "one account" if accounts == 1 else f"{accounts:,} accounts"
            name = f"one by one, {whose}, {kind} ids, {count:,} decisions"
            rows.append(Row(name, [used], "B", goal=G5_MEMORY))
    return rows


def _end_of_day(scene: Scene, day: Meter, upto: int) -> list[Row]:
    """The longest pause of others while a day's ids are forgotten; and while another process is merely busy."""
    before = scene.used_memory()
    trim = _watched(scene, deciding(DECIDE, day, _later()), _trimming, (scene.url("day"), upto))
    went, seconds = trim.answer
    freed = (before - scene.used_memory()) / max(went, 1)
    busy = _watched(scene, deciding(DECIDE, day, _later()), _busy, (scene.server.url, min(seconds, BUSY_MOST_S)))
    stopped = "" if went == upto else f"; stopped after {TRIM_MOST_S:g} s at {went:,}"
    return [
        Row(f"**The end of a day of {upto:,} ids**: the longest pause while another process calls `trim`"),
        Row("PING", [max(trim.pings)], "ms", trim.tail(trim.pings), goal=G5_PAUSE),
        Row(DECIDE, [max(trim.decisions)], "ms", trim.tail(trim.decisions), goal=G5_PAUSE),
        Row("the server's slowest command, by its own log", [trim.slowest], "ms", goal=G5_PAUSE,
            remarks=f"{trim.verb}; {trim.slow:,} commands took more than {SLOW_MICROS} µs"),
        Row("PING while another process calls a no-op script", [max(busy.pings)], "ms", busy.tail(busy.pings),
            remarks="what this machine does without us"),
        Row("`decide` meanwhile", [max(busy.decisions)], "ms", busy.tail(busy.decisions)),
        Row("the server's slowest command meanwhile", [busy.slowest], "ms", remarks=busy.verb),
        Row("`trim`", [went / seconds], "/s", remarks=f"{seconds:.1f} s; gave back {freed:,.0f} B a decision{stopped}"),
    ]  # fmt: skip


def _later() -> Supply:
    return Supply(("acme",), sizes=(0, 0), at=LATER)


def _watched(scene: Scene, work: Work, target: Callable[..., None], args: tuple[Any, ...]) -> Seen:
    """What probes see while another process is at work."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=target, args=(*args, theirs), daemon=True)
    pings: list[float] = []
    decisions: list[float] = []
    with scene.server.client(single_connection_client=True) as client:
        child.start()
        theirs.close()
        ours.recv()
        client.config_set("slowlog-max-len", SLOW_KEPT)
        client.config_set("slowlog-log-slower-than", SLOW_MICROS)
        client.slowlog_reset()
        ours.send("go")
        while not ours.poll():
            decide, answer = work.prepare(PROBES), None
            for _ in range(PROBES):
                start = perf_counter_ns()
                client.ping()
                middle = perf_counter_ns()
                answer = decide()
                end = perf_counter_ns()
                pings.append((middle - start) / 1e6)
                decisions.append((end - middle) / 1e6)
                sleep(BETWEEN_S)
            checked(work, answer)
        told = ours.recv()
        child.join()
        logged = [(entry["duration"] / 1e3, entry["command"].split()[0]) for entry in client.slowlog_get(SLOW_KEPT)]
    slow = [(millis, verb) for millis, verb in logged if verb not in OUR_OWN]
    slowest, verb = max(slow, default=(SLOW_MICROS / 1e3, b"none"))
    return Seen(pings, decisions, slowest, verb.decode(), len(slow), told)


def _trimming(url: str, upto: int, told: Connection) -> None:
    """In a process of its own: forget a day, and tell how far that went and how long it took."""
    store = open_store(url, clock=Clock(LATER), bounds=Bounds())
    assert isinstance(store, Trimmed), "a store of servers"
    told.send("ready")
    told.recv()
    start, went = perf_counter(), 0
    for step in range(1, TRIM_STEPS + 1):
        (went,) = store.trim((upto * step // TRIM_STEPS,))
        if perf_counter() - start > TRIM_MOST_S:
            break
    told.send((went, perf_counter() - start))
    store.close()


def _busy(url: str, seconds: float, told: Connection) -> None:
    """In a process of its own: keep server and processor busy with what takes no time."""
    with Redis.from_url(url) as client:
        digest = client.script_load(NO_OP)
        told.send("ready")
        told.recv()
        end = perf_counter() + seconds
        while perf_counter() < end:
            client.evalsha(digest, 1, "floor", "1", "2", "3")
    told.send(seconds)
