"""The client of Redis and Valkey against faults of every kind: a request is decided once, and nothing false is told."""

from __future__ import annotations

import asyncio
import gc
import random
import signal
import socketserver
import ssl
import time
import traceback
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from itertools import count
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from urllib.parse import quote, urlencode

import hiredis
import pytest
from redis.exceptions import RedisError

from gratis import AsyncMeter, Meter, NotExecuted, OutcomeUnknown, StoreError
from gratis.lines import decision_line
from gratis.stores.redis.core import Settings
from gratis.stores.redis.layout import account_word
from gratis.stores.redis.servers import Cluster as ClusterServers
from gratis.stores.redis.store import RedisStore
from gratis.stores.redis.wire import Access, Address
from gratis.stores.urls import open_store

from .callers import (
    ENROLLED,
    LARGE,
    LOST_ANSWERS,
    NOW,
    OFFER,
    ONE_ATTEMPT,
    PATIENT,
    SMALL,
    Caller,
    Load,
    Rough,
    at_noon,
    check_decided,
    faults_of,
    keys_of,
    ledger_of,
    replicated,
    request,
)
from .certificates import Authority, Pair
from .oracle import Call, Change
from .proxy import Fault, Proxy, connect, take_frames
from .servers import HOST, Cluster, Sentinels, Server, _free_port, binaries, until
from .test_histories import ask, change_tiers, eager_switches, enroll, in_child, in_threads, told

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from gratis import Decision, Request
    from gratis.stores.redis.layout import Shard

LONG_S, SHORT_S, MOMENT_S, HANGING_S = 20.0, 0.03, 0.005, 0.4
FEW_S = 0.1  # for a few attempts
FOR_EVER = 1 << 30
CUTS: tuple[Fault, ...] = ("cut_before", "cut_after", "half")
NAMES = (f"row {number}" for number in count())
SERVICE = "gratis"


class Stub:
    """A server that answers each command with what a function says of it, and whatever else with an error."""

    def __init__(self, answer: Callable[[list[bytes]], bytes | None]) -> None:
        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                reader = hiredis.Reader()
                while data := self.request.recv(1 << 16):
                    reader.feed(data)
                    while command := reader.gets():
                        self.request.sendall(answer(command) or b"-ERR unknown command\r\n")

        self._server = socketserver.ThreadingTCPServer((HOST, 0), Handler)
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": MOMENT_S})

    @property
    def address(self) -> tuple[str, int]:
        """Its loopback host and port."""
        return HOST, self._server.server_address[1]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def bulk(*words: object) -> bytes:
    """Words as an answer has them."""
    parts = [str(word).encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)


def sentinel_of(address: tuple[str, int]) -> Stub:
    """A sentinel that names this address as the master."""

    def answer(command: list[bytes]) -> bytes | None:
        if command == [b"SENTINEL", b"get-master-addr-by-name", SERVICE.encode()]:
            return bulk(*address)
        return None

    return Stub(answer)


# --- A proxy before each server -------------------------------------------------------------------


class Site:
    """A store behind doors: a proxy before each of its servers, which counts what it forwards and faults on demand."""

    shards: int | None = None

    def __init__(self, stack: ExitStack, servers: Sequence[Server], *, tcp: bool = True) -> None:
        self.servers = servers
        self._open_doors = stack.enter_context(ExitStack())
        self.doors = [
            self._open_doors.enter_context(Proxy(server.tcp_address if tcp else server.address, tcp=tcp))
            for server in servers
        ]
        self.namespace = next(NAMES)
        shards = "" if self.shards is None else f"&shards={self.shards}"
        self.options = f"namespace={self.namespace}{shards}"
        self.direct = stack.enter_context(closing(open_store(f"{servers[0].tcp_url}/?{self.options}", clock=at_noon)))
        """The same store, past the doors."""

    def open(self, timeout: float) -> RedisStore:
        """The store through its doors; each attempt has so many seconds."""
        raise NotImplementedError

    def arm(self, fault: Fault, *, times: int = FOR_EVER, seconds: float = 0.0) -> None:
        """The next calls, so many at each door, meet a fault."""
        for door in self.doors:
            door.arm(fault, times=times, seconds=seconds)

    def leave(self) -> None:
        """Nobody listens at the doors any more."""
        self._open_doors.close()

    def counts(self) -> tuple[int, int]:
        """How many calls the doors have forwarded, and how many the servers have executed."""
        stats = [server.ask("INFO", "commandstats") for server in self.servers]
        names = ("cmdstat_eval", "cmdstat_evalsha")
        executed = sum(stat[name]["calls"] for stat in stats for name in names if name in stat)
        return sum(door.forwarded for door in self.doors), executed


class AtPort(Site):
    """One server at a port."""

    def open(self, timeout: float) -> RedisStore:
        """By its URL."""
        return open_store(f"{self.doors[0].url}/?{self.options}&timeout={timeout}&wait={PATIENT}", clock=at_noon)


class FourShards(AtPort):
    """Four shards on one server."""

    shards = 4


class AtSocket(Site):
    """One server at a Unix socket."""

    def __init__(self, stack: ExitStack, servers: Sequence[Server]) -> None:
        super().__init__(stack, servers, tcp=False)

    def open(self, timeout: float) -> RedisStore:
        """By its URL."""
        return open_store(f"{self.doors[0].url}?{self.options}&timeout={timeout}&wait={PATIENT}", clock=at_noon)


class BehindASentinel(Site):
    """A server that a sentinel names."""

    def __init__(self, stack: ExitStack, servers: Sequence[Server]) -> None:
        super().__init__(stack, servers)
        self._sentinel = stack.enter_context(sentinel_of(self.doors[0].address))

    def open(self, timeout: float) -> RedisStore:
        """By the sentinel's URL."""
        host, port = self._sentinel.address
        options = f"{self.options}&timeout={timeout}&wait={PATIENT}"
        return open_store(f"redis+sentinel://{host}:{port}/{SERVICE}?{options}", clock=at_noon)


class Doors(ClusterServers):
    """A cluster whose servers are asked through doors, wherever they say that they are."""

    def __init__(self, seeds: Sequence[Address], doors: dict[Address, Address]) -> None:
        super().__init__(seeds)
        self._doors = doors

    def at(self, slot: int) -> Address | None:
        """The door before the master of a slot."""
        address = super().at(slot)
        return None if address is None else self._doors[address]


class AtMasters(Site):
    """A cluster of three masters."""

    def open(self, timeout: float) -> RedisStore:
        """By hand, since masters tell their own addresses."""
        seeds = [Address(*server.tcp_address) for server in self.servers]
        doors = {seed: Address(*door.address) for seed, door in zip(seeds, self.doors, strict=True)}
        settings = Settings(namespace=self.namespace, wait=PATIENT, clock=at_noon)
        return RedisStore(Doors(seeds, doors), Access(timeout=timeout), settings)


SITES = {
    "at a port": AtPort,
    "at a socket": AtSocket,
    "behind a sentinel": BehindASentinel,
    "in a cluster": AtMasters,
    "in four shards": FourShards,
}


class Weather(NamedTuple):
    """A fault, how much time an attempt has, and what must follow from them."""

    fault: Fault
    timeout: float
    is_executed: bool
    is_answered: bool = False
    seconds: float = 0.0


FAULTS = {
    "cut before": Weather("cut_before", LONG_S, is_executed=False),
    "cut after": Weather("cut_after", LONG_S, is_executed=True),
    "swallowed": Weather("swallow", SHORT_S, is_executed=True),
    "halved": Weather("half", LONG_S, is_executed=True),
    "reset": Weather("reset", LONG_S, is_executed=True),
    "delayed": Weather("delay", LONG_S, is_executed=True, is_answered=True, seconds=MOMENT_S),
    "black hole": Weather("black_hole", SHORT_S, is_executed=False),
}
ROWS = [
    pytest.param(site, weather, id=f"{weather} {site}")
    for site in SITES
    for weather in FAULTS
    if (site, weather) != ("at a socket", "reset")  # a UNIX socket knows no reset
]
each_fault = pytest.mark.parametrize(("site", "weather"), ROWS, indirect=True)
each_kind = pytest.mark.parametrize("kind", [Meter, AsyncMeter], ids=["blocking", "asyncio"])


def shape(name: str, size: int, accounts: int = 1) -> list[Request]:
    """So many requests of so many accounts."""
    return [request(f"{name} {number}", account=f"account {number % accounts}") for number in range(size)]


SHAPES = {"one": (1, 1), "a batch": (50, 1), "a batch over accounts": (50, 3)}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One server, at a socket and at a port."""
    with Server(tcp=True) as server:
        yield told_the_scripts(server)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three masters."""
    with Cluster() as cluster:
        told_the_scripts(cluster.nodes[0])
        yield cluster


def told_the_scripts(server: Server) -> Server:
    """A server that knows the scripts, and so do the others of its cluster."""
    with Caller(Meter, open_store(f"{server.tcp_url}/?namespace={next(NAMES)}", clock=at_noon)) as caller:
        caller.decide(shape("warm", 100, accounts=100))
    return server


@pytest.fixture
def site(request) -> Iterator[Site]:
    """A new store behind doors; each of its servers knows the scripts."""
    kind = SITES[request.param]
    servers = request.getfixturevalue("cluster").nodes if kind is AtMasters else [request.getfixturevalue("server")]
    with ExitStack() as stack:
        yield kind(stack, servers)


@pytest.fixture
def weather(request) -> Weather:
    """A fault and what must follow."""
    return FAULTS[request.param]


def shard_of(store: RedisStore, request: Request) -> Shard:
    """The shard in which a request is decided."""
    return store._core.asking.shard_of(account_word(OFFER.name, request.account))


def shards_of(store: RedisStore, requests: Sequence[Request]) -> int:
    """How many shards are asked for requests: each has a call of its own."""
    return len({shard_of(store, request) for request in requests})


@each_kind
@each_fault
def test_a_fault_that_comes_once_is_not_noticed(site, weather, kind):
    """A call meets a fault once, is answered, and is executed again only if its answer was lost."""
    with Caller(kind, site.open(weather.timeout)) as caller:
        for name, (size, accounts) in SHAPES.items():
            requests = shape(name, size, accounts)
            forwarded, _ = site.counts()
            site.arm(weather.fault, times=1, seconds=weather.seconds)
            answers = caller.ask(requests, patience=PATIENT)
            calls = shards_of(caller.store, requests)
            replayed = check_decided(answers, requests, site.direct)
            forwarded = site.counts()[0] - forwarded
            assert any(replayed) == (forwarded > calls)
            assert any(replayed) or weather.is_answered or not weather.is_executed


@each_kind
@each_fault
def test_a_fault_that_stays_is_told_as_what_it_is(site, weather, kind):
    """A call that meets a fault each time is executed once an attempt, told unknown, and decided once in the end."""
    with Caller(kind, site.open(weather.timeout)) as caller:
        for name, (size, accounts) in SHAPES.items():
            requests, direct = shape(name, size, accounts), site.direct
            calls = shards_of(caller.store, requests)
            is_alone = calls == 1 or not caller.is_shared  # or else a fault meets its neighbours on the connection, too
            site.arm(weather.fault, seconds=weather.seconds)

            before = site.counts()
            answers = caller.ask(requests, patience=ONE_ATTEMPT)
            if weather.is_answered:
                assert check_decided(answers, requests, direct) == [False] * size
            else:
                assert type(answers) is OutcomeUnknown
            if is_alone:
                added = calls * weather.is_executed
                until(lambda: site.counts() == (before[0] + added, before[1] + added), "each call is executed once")  # noqa: B023 - called at once
                assert keys_of(requests) & ledger_of(direct).keys() == (keys_of(requests) if added else set())

            answers = caller.ask(requests, patience=FEW_S)
            assert weather.is_answered or type(answers) is OutcomeUnknown
            forwarded, _ = site.counts()
            until(lambda: site.counts()[1] - before[1] == forwarded - before[0] or not is_alone, "all is executed")  # noqa: B023 - called at once

            site.arm("pass")
            known = ledger_of(direct).keys()
            replayed = check_decided(caller.ask(requests, patience=PATIENT), requests, direct)
            assert not is_alone or replayed == [(one.account, one.id) in known for one in requests]


@each_kind
@each_fault
def test_what_was_never_sent_is_not_executed(site, weather, kind):
    """A fault that meets a new connection's greeting each time is told as not executed, since it is not."""
    requests = shape("one", 1)
    with Caller(kind, site.open(weather.timeout)) as caller:
        caller.hang_up()
        for door in site.doors:
            door.markers = (b"INFO",)
        if not weather.is_answered:
            site.arm(weather.fault)
            _, executed = site.counts()
            for patience in (ONE_ATTEMPT, FEW_S):
                assert type(caller.ask(requests, patience=patience)) is NotExecuted
            assert (site.counts()[1], ledger_of(site.direct)) == (executed, {})
        site.arm(weather.fault, times=1, seconds=weather.seconds)
        assert check_decided(caller.ask(requests, patience=PATIENT), requests, site.direct) == [False]


@each_kind
@pytest.mark.parametrize("site", SITES, indirect=True)
def test_a_server_that_is_gone_executes_nothing(site, kind):
    """Where nobody listens any more, a call is not executed; whoever still reaches the server decides it."""
    requests = shape("one", 1)
    with Caller(kind, site.open(LONG_S)) as caller:
        caller.hang_up()
        site.leave()
        answers = caller.ask(requests, patience=2 * MOMENT_S)
        assert type(answers) is NotExecuted
        assert ledger_of(site.direct) == {}
    with Caller(kind, site.direct) as caller:
        assert check_decided(caller.decide(requests), requests, site.direct) == [False]


@pytest.mark.parametrize("site", ["in four shards"], indirect=True)
def test_an_answer_in_anothers_place_is_not_believed(site):
    """Whatever is told of two calls whose answers were shifted, afterwards both of their shards go on as they were."""
    with Caller(AsyncMeter, site.open(SHORT_S)) as caller:
        few, *_, many = sorted(shape("all", 50, accounts=50), key=lambda one: shard_of(caller.store, one).number)
        caller.ask([request(number, account=many.account) for number in range(100)], patience=PATIENT)
        site.arm("swallow", times=1)
        answers = caller.ask([few, many], patience=PATIENT)
        assert isinstance(answers, list | OutcomeUnknown)
        for one in (few, many):
            assert check_decided(caller.ask([one], patience=PATIENT), [one], site.direct) == [True]
            fresh = request("fresh", account=one.account)
            assert check_decided(caller.ask([fresh], patience=PATIENT), [fresh], site.direct) == [False]


@each_kind
@pytest.mark.parametrize("site", ["in four shards"], indirect=True)
def test_a_server_that_hangs_is_waited_for_once(site, kind):
    """However many shards are asked side by side, an attempt takes no longer than it may."""
    requests = shape("over all shards", 50, accounts=50)
    with Caller(kind, site.open(HANGING_S)) as caller:
        assert shards_of(caller.store, requests) == site.shards
        site.arm("black_hole")
        started = time.monotonic()
        assert type(caller.ask(requests, patience=ONE_ATTEMPT)) is OutcomeUnknown
        assert time.monotonic() - started < (site.shards - 1) * HANGING_S


@pytest.mark.parametrize("site", ["in a cluster"], indirect=True)
def test_a_call_that_is_cancelled_leaves_no_timer(site, monkeypatch):
    """Who gives up while a second server is being reached does not break the first one's connection later."""
    timers: list[tuple[object, asyncio.TimerHandle]] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        later = loop.call_later

        def noted(delay: float, end: Any, *args: Any) -> asyncio.TimerHandle:
            timer = later(delay, end, *args)
            timers.append((end.__self__._transport.get_extra_info("peername"), timer))
            if timers[-1][0] != site.doors[0].address:
                is_hanging.set()
            return timer

        monkeypatch.setattr(loop, "call_later", noted)
        is_hanging = asyncio.Event()
        meter = AsyncMeter(store, OFFER, assume=ENROLLED)
        asking = asyncio.create_task(store.apply_async([meter._book.charge(one) for one in requests]))
        await is_hanging.wait()
        asking.cancel()
        await asyncio.wait([asking])
        await meter.close()

    with closing(site.open(LONG_S)) as store:
        requests = sorted(
            shape("all", 50, accounts=50), key=lambda one: shard_of(store, one).number
        )  # the first door's first
        for door in site.doors[1:]:
            door.markers = (b"INFO",)
            door.arm("black_hole", times=FOR_EVER)
        asyncio.run(run())
    assert [timer for server, timer in timers if server == site.doors[0].address and not timer.cancelled()] == []


@pytest.mark.parametrize("site", ["at a port"], indirect=True)
def test_what_only_reads_never_says_that_it_may_have_written(site):
    """Whatever cuts a read off, nothing was written by it; afterwards it is answered."""
    with Caller(Meter, site.open(LONG_S)) as caller:
        caller.decide(shape("read", 3))
        for door in site.doors:
            door.markers = (b"HGET", b"HMGET", b"XRANGE", b"HSCAN")
        reads: list[Callable[[], Any]] = [
            caller.meter.standing, caller.meter.enrollments, caller.meter.accounts, lambda: list(caller.meter.ledger())
        ]  # fmt: skip
        for fault in CUTS:
            for read in reads:
                site.arm(fault)
                caller.patience(ONE_ATTEMPT)
                with pytest.raises(NotExecuted):
                    read()
                site.arm("pass")
                caller.patience(PATIENT)
                assert read() is not None


@each_kind
@pytest.mark.parametrize("fault", ["late", "delay"])
@pytest.mark.parametrize("site", ["at a port"], indirect=True)
def test_what_comes_late_changes_nothing(site, fault, kind):
    """A call or an answer that comes when nobody waits for it any more is neither decided again nor another's."""
    requests = shape("one", 15)
    with Caller(kind, site.open(SHORT_S)) as caller:
        forwarded, executed = site.counts()
        for one in requests:
            site.arm(fault, times=1, seconds=SHORT_S + 8 * MOMENT_S)
            replayed = check_decided(caller.ask([one], patience=PATIENT), [one], site.direct)
            assert replayed == [True] or fault == "late"

        def is_done() -> bool:
            """Whether both calls of each request were executed, and all that were forwarded."""
            calls, executions = site.counts()
            return calls - forwarded == executions - executed >= 2 * len(requests)

        until(is_done, "all is executed")
        assert check_decided(caller.ask(requests, patience=PATIENT), requests, site.direct) == [True] * len(requests)


# --- What a server refuses ------------------------------------------------------------------------

PASSWORD = "tr0ub4dor&3"  # noqa: S105 - of servers that this test starts
USER = "app"
TOLD = "the server says "
NO_PERMISSION = "NOPERM this user may not run (XADD|HSET|HDEL|XTRIM) on the keys of this store"
DEBUGGED = {"enable-debug-command": "yes"}
LARGE_KEYS = 30
BINARIES = binaries()
# Of no server at all, each test fails with the line that says how to get one.
PROGRAMS, NAMED = list(BINARIES.values()) or [None], list(BINARIES) or ["none"]


class Refusing:
    """A server that can be brought to refuse, and a user of it with a password."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.ask = server.ask
        self.is_debugged = server.options.keys() >= DEBUGGED.keys()
        self.ask("CONFIG", "SET", "rdbcompression", "no")
        self.ask("ACL", "SETUSER", USER, "on", f">{PASSWORD}", "~*", "&*", "+@all")
        self.namespace = ""
        self.keys: tuple[bytes, bytes] = (b"", b"")
        """The state and the ledger of the store's one shard, once it is there."""

    @property
    def url(self) -> str:
        """The store, for that user."""
        return f"unix://{USER}:{quote(PASSWORD)}@{self.server.address}?namespace={self.namespace}&shards=1"

    @contextmanager
    def set(self, name: str, value: object) -> Iterator[None]:
        """An option is set so."""
        before = self.ask("CONFIG", "GET", name)[1]
        self.ask("CONFIG", "SET", name, value)
        try:
            yield
        finally:
            self.ask("CONFIG", "SET", name, before)

    def is_told(self, word: str) -> bool:
        """Whether PING is refused with a word."""
        try:
            self.ask("PING")
        except RedisError as error:
            return word in f"{type(error).__name__} {error}".upper()
        return False

    @contextmanager
    def started(self, command: bytes, word: str) -> Iterator[None]:
        """A command that takes long has begun, so that others are refused with a word until it has ended."""
        with closing(connect(self.server.address)) as sock:
            sock.sendall(command)
            until(lambda: self.is_told(word), f"the server is {word}")
            yield
            sock.recv(1 << 16)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """It loads its data, for as long as the test needs."""
        self.ask("DEBUG", "POPULATE", LARGE_KEYS, "large", 1 << 20)
        with self.set("key-load-delay", 50_000), self.started(b"DEBUG RELOAD\r\n", "LOADING"):
            yield
            if self.is_debugged:  # Redis 6.2 lets nobody hurry it
                self.ask("CONFIG", "SET", "key-load-delay", 0)
        self.ask("DEL", *(f"large:{number}" for number in range(LARGE_KEYS)))

    @contextmanager
    def busy(self) -> Iterator[None]:
        """It runs somebody's endless script."""
        with self.set("lua-time-limit", 1), self.started(b"EVAL 'while true do end' 0\r\n", "BUSY"):
            yield
            self.ask("SCRIPT", "KILL")

    @contextmanager
    def out_of_memory(self) -> Iterator[None]:
        """It may not use more memory."""
        with self.set("maxmemory", 1):
            yield

    @contextmanager
    def without_replicas(self) -> Iterator[None]:
        """It is to write only with a replica."""
        with self.set("min-replicas-to-write", 1):
            yield

    @contextmanager
    def demoted(self) -> Iterator[None]:
        """It is a replica of a master that is not there."""
        self.ask("REPLICAOF", HOST, 1)
        try:
            yield
        finally:
            self.ask("REPLICAOF", "NO", "ONE")

    @contextmanager
    def masterless(self) -> Iterator[None]:
        """It is one, and tells nobody old data."""
        with self.set("replica-serve-stale-data", "no"), self.demoted():
            yield

    @contextmanager
    def unwritable(self) -> Iterator[None]:
        """It could not save its data."""
        dump = self.server.folder / "dump.rdb"
        dump.unlink(missing_ok=True)
        dump.mkdir()
        with self.set("save", "3600 1"):
            self._save("err")
            yield
        dump.rmdir()
        self._save("ok")

    def _save(self, status: str) -> None:
        self.ask("BGSAVE")
        until(lambda: self.ask("INFO", "persistence")["rdb_last_bgsave_status"] == status, f"saving is {status}")

    @contextmanager
    def user_set(self, rules: Sequence[str], back: Sequence[str]) -> Iterator[None]:
        """The user has other rules."""
        self.ask("ACL", "SETUSER", USER, *rules)
        try:
            yield
        finally:
            self.ask("ACL", "SETUSER", USER, *back)

    def not_permitted(self) -> AbstractContextManager[None]:
        """The user may run no scripts."""
        return self.user_set(["-eval", "-evalsha"], ["+@all"])

    @contextmanager
    def of_another_type(self) -> Iterator[None]:
        """The state is none."""
        with self._in_the_way(self.keys[0]):
            yield

    @contextmanager
    def of_another_type_in_its_ledger(self) -> Iterator[None]:
        """The ledger is none."""
        with self._in_the_way(self.keys[1]):
            yield

    @contextmanager
    def _in_the_way(self, key: bytes) -> Iterator[None]:
        self.ask("RENAME", key, key + b" kept")
        self.ask("SET", key, "text")
        yield
        self.ask("RENAME", key + b" kept", key)


STATES = {
    "loading": (Refusing.loading, "LOADING"),
    "busy": (Refusing.busy, "BUSY"),
    "out of memory": (Refusing.out_of_memory, "OOM"),
    "without replicas": (Refusing.without_replicas, "NOREPLICAS"),
    "demoted": (Refusing.demoted, "READONLY"),
    "masterless": (Refusing.masterless, "MASTERDOWN"),
    "unwritable": (Refusing.unwritable, "MISCONF"),
    "not permitted": (Refusing.not_permitted, "NOPERM"),
    "of another type": (Refusing.of_another_type, "WRONGTYPE"),
    "of another type in its ledger": (Refusing.of_another_type_in_its_ledger, "WRONGTYPE"),
}


@pytest.fixture(scope="module", params=PROGRAMS, ids=NAMED)
def refusing_server(request) -> Iterator[Refusing]:
    """Each server that this machine offers."""
    options = {} if "6.2" in next(name for name, path in BINARIES.items() if path == request.param) else DEBUGGED
    with Server(request.param, options) as server:
        yield Refusing(server)


@pytest.fixture
def refusing(refusing_server) -> Refusing:
    """The same, with a namespace that nobody has used."""
    refusing_server.namespace = next(NAMES)
    return refusing_server


def shown(error: BaseException, caller: Caller) -> str:
    """All that can be seen of an error and of whoever was told it."""
    store = caller.store
    seen = [caller.meter, store, store._core, store._link, store._async_link, store._link._guests, store.__dict__]
    return "\n".join([str(error), *traceback.format_exception(error), *map(repr, seen)])


@each_kind
@pytest.mark.parametrize("state", STATES)
def test_what_a_server_refuses_is_not_executed(refusing, state, kind):
    """A call that a server refuses is told so with its word, changes nothing, and is decided when all is well again."""
    bring, word = STATES[state]
    one, other, third = shape("one", 3)
    with Caller(kind, open_store(refusing.url, clock=at_noon)) as caller:
        caller.decide([one])
        (shard,) = caller.store._core.asking.shards
        refusing.keys = shard.state, shard.ledger
        before = ledger_of(caller.store)
        with bring(refusing):
            error = caller.ask([other], patience=2 * MOMENT_S)
            assert type(error) is NotExecuted
            assert TOLD in str(error)
            assert word in str(error)
            assert "nothing was written" in str(error)
            assert PASSWORD not in shown(error, caller)
            caller.hang_up()  # who comes anew is refused, too
            error = caller.ask([other], patience=2 * MOMENT_S)
            assert type(error) is NotExecuted
            assert PASSWORD not in shown(error, caller)
        assert ledger_of(caller.store) == before
        assert check_decided(caller.ask([other, third], patience=PATIENT), [other, third], caller.store) == [False] * 2


@each_kind
def test_a_user_who_is_let_in_no_more_executes_nothing(refusing, kind):
    """With a password that was changed meanwhile a new connection is refused; with the old one again it is not."""
    one, other = shape("one", 2)
    with Caller(kind, open_store(refusing.url, clock=at_noon)) as caller:
        caller.decide([one])
        with refusing.user_set(["resetpass", ">another"], ["resetpass", f">{PASSWORD}"]):
            caller.hang_up()
            error = caller.ask([other], patience=2 * MOMENT_S)
            assert type(error) is NotExecuted
            assert "the server does not let us in: WRONGPASS" in str(error)
            assert PASSWORD not in shown(error, caller)
            with pytest.raises(StoreError, match="WRONGPASS") as caught:
                open_store(refusing.url, clock=at_noon)
            assert PASSWORD not in shown(caught.value, caller)
        assert check_decided(caller.ask([other], patience=PATIENT), [other], caller.store) == [False]
        assert len(ledger_of(caller.store)) == 2


def test_who_has_no_password_is_told_so_at_once(refusing):
    """A server that wants a password says so before anything is waited for."""
    url = f"unix://{refusing.server.address}?namespace={refusing.namespace}&wait={PATIENT}"
    with closing(refusing.server.client(username=USER, password=PASSWORD)) as admin:
        refusing.server.ask("ACL", "SETUSER", "default", "resetpass")
        try:
            started = time.monotonic()
            with pytest.raises(NotExecuted, match=f"{TOLD}NOAUTH"):
                open_store(url, clock=at_noon)
            assert time.monotonic() - started < PATIENT
        finally:
            admin.execute_command("ACL", "SETUSER", "default", "nopass")


@pytest.mark.parametrize("command", ["xadd", "hset", "hdel", "xtrim"])
def test_a_user_who_lacks_a_command_is_refused_or_decides(refusing, command):
    """Who may not run all that scripts need is refused when the store is opened, or (Redis 6.2) when it is used."""
    one = shape("one", 1)
    with ExitStack() as stack, refusing.user_set([f"-{command}"], ["+@all"]):
        told: object = None
        with suppress(NotExecuted) if not refusing.is_debugged else pytest.raises(NotExecuted, match=NO_PERMISSION):
            caller = stack.enter_context(Caller(Meter, open_store(refusing.url, clock=at_noon)))
            told = caller.ask(one, patience=MOMENT_S)
    with Caller(Meter, open_store(refusing.url, clock=at_noon)) as caller:
        was_decided = isinstance(told, list)
        assert was_decided or told is None or type(told) is NotExecuted
        assert (ledger_of(caller.store) != {}) == was_decided
        assert check_decided(caller.decide(one), one, caller.store) == [was_decided]


@each_kind
def test_a_server_that_forgets_its_scripts_is_not_noticed(refusing, kind):
    """Scripts are forgotten between calls and in the middle of them; every request is decided, once."""
    requests = shape("flushed", 240, accounts=3)
    with Caller(kind, open_store(refusing.url, clock=at_noon)) as caller:

        async def some(meter, part) -> list[Decision]:
            refusing.ask("SCRIPT", "FLUSH")
            if kind is Meter:
                return [meter.decide(one) for one in part]
            return list(await asyncio.gather(*map(meter.decide, part)))

        answers: list[Any] = []
        for first in range(0, len(requests), 4):
            answers += caller.run(some, caller.meter, requests[first : first + 4])
        assert check_decided(answers, requests, caller.store) == [False] * len(requests)


@each_kind
def test_a_cluster_that_is_down_executes_nothing(kind):
    """While a slot is served by nobody its shard is refused, and the others go on; afterwards it goes on, too."""
    with (
        Cluster(masters=1, options={"cluster-require-full-coverage": "no"}) as cluster,
        Caller(kind, open_store(f"{cluster.url}/", clock=at_noon)) as caller,
    ):
        requests = shape("one", 40, accounts=20)
        caller.decide(requests[:20])
        slot = shard_of(caller.store, requests[0]).slot
        there = [one for one in requests[20:] if shard_of(caller.store, one).slot == slot]
        others = [one for one in requests[20:] if one not in there]
        cluster.nodes[0].ask("CLUSTER", "DELSLOTS", slot)
        for patience in (ONE_ATTEMPT, FEW_S):
            error = caller.ask(there, patience=patience)
            assert type(error) is NotExecuted
            assert "nothing was written" in str(error)
        assert [answer.replayed for answer in caller.ask(others, patience=PATIENT)] == [False] * len(others)
        cluster.nodes[0].ask("CLUSTER", "ADDSLOTS", slot)
        assert check_decided(caller.ask(there, patience=PATIENT), there, caller.store) == [False] * len(there)
        assert check_decided(caller.ask(others, patience=PATIENT), others, caller.store) == [True] * len(others)


# --- Tasks, loops, threads, forks and interrupts --------------------------------------------------

TASKS, ASKED, CANCELLED_SHARE = 256, 10_000, 1 / 5
MODELS = (LARGE, SMALL)
THREADS, INTERRUPTS = 8, 300


async def decided_by_the_meter(meter: AsyncMeter, one: Request) -> Decision:
    """The decision on a request, as everybody asks for it."""
    return await meter.decide(one)


async def decided_by_the_store(meter: AsyncMeter, one: Request) -> Decision | None:
    """The same, in a call of its own, with others in flight on the same connection."""
    (receipt,) = await meter._store.apply_async([meter._book.charge(one)])
    return receipt.decision


@pytest.mark.parametrize("decided", [decided_by_the_meter, decided_by_the_store], ids=["by the meter", "by the store"])
@pytest.mark.parametrize("site", ["at a port"], indirect=True)
def test_tasks_that_are_cancelled_give_up_their_own_answer_only(site, decided):
    """Of many tasks in flight every fifth is cancelled; the others have their own answers, and those once more."""
    chance = random.Random(1)  # noqa: S311 - a schedule, no secret
    requests = [
        request(number, tokens=number % 977, account=f"account {number % 7}", model=chance.choice(MODELS))
        for number in range(ASKED)
    ]
    pending = iter(requests)
    calls: list[Call] = []

    async def ask_on(meter: AsyncMeter) -> None:
        for one in pending:
            asking, start = asyncio.create_task(decided(meter, one)), time.monotonic_ns()
            if chance.random() < CANCELLED_SHARE:
                for _ in range(chance.randrange(6)):
                    await asyncio.sleep(0)
                asking.cancel()
            try:
                line = decision_line(await asking)
                assert (line["id"], line["tokens"]) == (one.id, one.tokens)
                calls.append(Call(one.account, one.id, start, time.monotonic_ns(), line))
            except asyncio.CancelledError:
                calls.append(Call(one.account, one.id, start, float("inf"), None))

    async def run() -> list[Any]:
        meter = AsyncMeter(site.direct, OFFER, assume=ENROLLED)
        await asyncio.gather(*(ask_on(meter) for _ in range(TASKS)))
        unknown = {call.id for call in calls if call.line is None}
        lost = [one for one in requests if one.id in unknown]
        answers = await meter.decide_many(lost)
        check_decided(answers, lost, site.direct)
        await site.direct.close_async()
        return answers

    answers = asyncio.run(run())
    assert len(answers) > ASKED * CANCELLED_SHARE / 4
    assert any(answer.replayed for answer in answers)
    assert faults_of(site.direct, calls) == set()


def test_loops_one_after_another_share_a_store(server):
    """Each loop has connections of its own, which end with it; the last one closes the store, and nothing is left."""
    store = open_store(f"{server.url}?namespace={next(NAMES)}", clock=at_noon)
    meter = AsyncMeter(store, OFFER, assume=ENROLLED)
    requests = shape("looped", 10)
    answers = []
    for turn in range(5):
        answers += asyncio.run(meter.decide_many(requests[: 2 * turn + 2]))
        gc.collect()  # what is left open is told of, as an error
    assert [answer.replayed for answer in answers[-10:]] == [True] * 8 + [False] * 2
    check_decided(answers[-10:], requests, store)
    asyncio.run(meter.close())
    del meter, store
    gc.collect()


def test_threads_share_a_meter(server):
    """Eight threads over one meter, while tiers change and connections break, are answered in one order."""
    with (
        Rough(server.address, seed=1, share=1 / 30, faults=CUTS) as door,
        Meter(open_store(f"{door.url}?namespace={next(NAMES)}&wait={PATIENT}", clock=at_noon), OFFER) as meter,
        eager_switches(),
    ):
        changes = [enroll(meter, account, 1) for account in ("acme", "default")]
        jobs = [partial(ask, meter, NOW, caller=caller, most=400) for caller in range(THREADS)]
        given = in_threads([*jobs, partial(change_tiers, meter)])
        changes += [item for item in given if isinstance(item, Change)]
        assert door.struck > THREADS
        assert faults_of(meter._store, [item for item in given if isinstance(item, Call)], changes) <= LOST_ANSWERS


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_both_sides_of_a_fork_share_a_meter(server):
    """Parent and child decide at once through the meter that was open at the fork, and none has the other's answers."""
    url = f"{server.url}?namespace={next(NAMES)}&shards=3&wait={PATIENT}"
    with Meter(open_store(url, clock=at_noon), OFFER) as meter:
        changes = [enroll(meter, account, 1) for account in ("acme", "default")]
        calls = ask(meter, NOW, caller=0, most=100)
        for turn in range(3):
            with in_child(lambda parent, turn=turn: parent.send(ask(meter, NOW, caller=10 + turn, most=300))) as child:
                calls += ask(meter, NOW, caller=20 + turn, most=300)
                calls += told(child)
        assert faults_of(meter._store, calls, changes) == set()


class Interruption(BaseException):
    """What a signal raises, wherever the program is."""


# An interrupt in the middle of the library's own connecting leaves that socket to the garbage collector, which tells.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("site", ["in four shards"], indirect=True)
def test_an_interrupt_leaves_no_answer_for_others(site):
    """A call that is broken off, mostly while it waits for answers, is followed by ones that have their own."""
    chance = random.Random(1)  # noqa: S311 - a schedule, no secret
    is_asking, interrupted = False, 0
    asked: list[Request] = []
    told_all: list[Any] = []

    def interrupt(*_: object) -> None:
        if is_asking:
            raise Interruption

    usual = signal.signal(signal.SIGALRM, interrupt)
    try:
        with Caller(Meter, site.open(LONG_S)) as caller:
            site.arm("delay", seconds=MOMENT_S / 5)
            for number in range(INTERRUPTS):
                requests = shape(f"interrupted {number}", chance.choice((1, 12)), accounts=12)
                try:
                    is_asking = True
                    signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, MOMENT_S / 2))
                    answers = caller.meter.decide_many(requests)
                    is_asking = False
                except Interruption:
                    is_asking = False
                    interrupted += 1
                    answers = caller.meter.decide_many(requests)
                assert [answer.id for answer in answers] == [one.id for one in requests]
                asked += requests
                told_all += answers
            check_decided(told_all, asked, site.direct)
            assert ledger_of(site.direct).keys() == keys_of(asked)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)
    assert interrupted > INTERRUPTS / 4
    gc.collect()


# --- What a URL says ------------------------------------------------------------------------------

SECRET = "hunter2"  # noqa: S105 - nobody's
FORM = {"db": 0, "namespace": "gratis", "timeout": 2.0, "wait": 10.0, "tls": False}


class Told(Exception):  # noqa: N818 - what a URL says, raised instead of opening it
    """What a store would have been opened with."""


def told_by(url: str, monkeypatch) -> dict[str, Any]:
    """What a URL says: where, how to get in, and what is expected of the store."""

    def raised(servers: Any, access: Access, settings: Settings, *, sentinels: Access) -> None:
        raise Told(servers, access, settings, sentinels)

    monkeypatch.setattr("gratis.stores.redis.url.RedisStore", raised)
    with pytest.raises(Told) as caught:
        open_store(url)
    servers, access, settings, sentinels = caught.value.args
    assert not {access.password, access.username, sentinels.password} & set(repr((access, sentinels)).split("'"))
    found: dict[str, Any] = {type(servers).__name__: [str(value) for value in flat(vars(servers).values())]}
    for name in ("username", "password", "db", "timeout"):
        found[name] = getattr(access, name)
    for name in ("namespace", "shards", "durability", "wait"):
        found[name] = getattr(settings, name)
    found["tls"] = access.tls is not None
    found["sentinel"] = (sentinels.username, sentinels.password)
    if access.tls is not None:
        found["checks"] = (access.tls.check_hostname, access.tls.verify_mode is ssl.CERT_REQUIRED)
    return {name: value for name, value in found.items() if value not in (None, (None, None), FORM.get(name))}


def flat(values: Iterable[Any]) -> Iterator[Any]:
    """What servers are told of: addresses and names, lists of them taken apart."""
    for value in values:
        if isinstance(value, list):
            yield from value
        elif isinstance(value, Address | str):
            yield value


ONE, MANY, SENTINELS = "One", "Cluster", "Sentinels"
CHECKED: dict[str, Any] = {"tls": True, "checks": (True, True)}
URLS: dict[str, dict[str, Any]] = {
    "redis://h": {ONE: ["h:6379"]},
    "valkey://h/": {ONE: ["h:6379"]},
    "redis://h:1/2": {ONE: ["h:1"], "db": 2},
    "redis://h?db=3": {ONE: ["h:6379"], "db": 3},
    "redis://[::1]:7": {ONE: ["::1:7"]},
    "redis://:p%40s%2F@h": {ONE: ["h:6379"], "password": "p@s/"},
    "redis://u%3A:p@h": {ONE: ["h:6379"], "username": "u:", "password": "p"},
    "redis://h?username=u&password=p%26": {ONE: ["h:6379"], "username": "u", "password": "p&"},
    "redis://h,i:2,[::1]:3/": {MANY: ["h:6379", "i:2", "::1:3"]},
    "redis+cluster://h": {MANY: ["h:6379"]},
    "unix:///a%20b/s": {ONE: ["/a b/s"]},
    "unix:///s?db=4&namespace=n%20m": {ONE: ["/s"], "db": 4, "namespace": "n m"},
    "unix://u:p@/s": {ONE: ["/s"], "username": "u", "password": "p"},
    "redis+sentinel://h,i:2/m": {SENTINELS: ["h:26379", "i:2", "m"]},
    "redis+sentinel://u:p@h/m/5?sentinel_username=s&sentinel_password=q": {
        SENTINELS: ["h:26379", "m"], "username": "u", "password": "p", "db": 5, "sentinel": ("s", "q"),
    },
    "redis+sentinel://h/m?db=6": {SENTINELS: ["h:26379", "m"], "db": 6},
    "redis://h?shards=7&durability=journaled&timeout=.5&wait=3600": {
        ONE: ["h:6379"], "shards": 7, "durability": "journaled", "timeout": 0.5, "wait": 3600.0,
    },
    "rediss://h": {ONE: ["h:6379"], **CHECKED},
    "valkeys://h": {ONE: ["h:6379"], **CHECKED},
    "rediss+sentinel://h/m": {SENTINELS: ["h:26379", "m"], **CHECKED},
    "rediss+cluster://h": {MANY: ["h:6379"], **CHECKED},
    "rediss://h?ssl_cert_reqs=required&ssl_check_hostname=true": {ONE: ["h:6379"], **CHECKED},
    "rediss://h?ssl_check_hostname=False": {ONE: ["h:6379"], "tls": True, "checks": (False, True)},
    "rediss://h?ssl_cert_reqs=none": {ONE: ["h:6379"], "tls": True, "checks": (False, False)},
}  # fmt: skip


@pytest.mark.parametrize("url", URLS)
def test_a_url_says_where_and_how(url, monkeypatch):
    """Each form of a URL is understood, and what it does not say has its default."""
    assert told_by(url, monkeypatch) == URLS[url]


WRONG = {
    "redis://": "host ''; expected redis://HOST:PORT/DB",
    "redis://h,,i": "host ''",
    "redis://h:port": "host 'h:port'",
    "redis://h:65536": "host 'h:65536'",
    "redis://h/one": "db=one; expected a whole number from 0",
    "redis://h/-1": "db=-1",
    "redis://h?db=9999999999": "db=9999999999",
    "redis://h#fragment": "a fragment",
    "redis://h?flavor=mild": "unknown option 'flavor'; expected one of db, durability, namespace",
    "redis://h?timeout=0": "timeout=0; expected seconds, up to 3600",
    "redis://h?timeout=soon": "timeout=soon",
    "redis://h?wait=-1": "wait=-1",
    "redis://h?wait=nan": "wait=nan",
    "redis://h?wait=3601": "wait=3601",
    "redis://h?shards=0": "shards=0; expected a whole number from 1 to 1024",
    "redis://h?shards=1025": "shards=1025",
    "redis://h?durability=eternal": "durability=eternal; expected volatile, journaled or synced",
    "redis://h?durability=replicated": "durability=replicated",
    "redis://h?namespace={n}": "namespace={n}; expected a name without braces",
    "redis+sentinel://h": "it names no master",
    "unix://socket": "expected .*unix:///",
    "unix://": "expected .*unix:///",
    "rediss://h?ssl_ca_certs=/nowhere": "its certificates cannot be read: .*No such file",
    "rediss://h?ssl_certfile=/nowhere": "its certificates cannot be read: .*No such file",
    "redas://h": "unknown kind 'redas'; expected memory:, sqlite://.*, redis://HOST:PORT",
}


@pytest.mark.parametrize("url", WRONG)
def test_a_wrong_url_says_what_was_expected(url):
    """A URL that is none is refused before anybody is asked, with what was expected."""
    with pytest.raises(StoreError, match=WRONG[url]):
        open_store(url)


@pytest.mark.parametrize(
    "url",
    [
        f"redas://:{SECRET}@h",
        f"redis://:{SECRET}@[::1",
        f"redis://:{SECRET}@ho\u2100st",
        f"redis://:{SECRET}/x@h",
        f"redis://:{SECRET}#x@h",
        f"redis://:x/{SECRET}@h",
        f"redis://:x#{SECRET}@h",
        f"redis://:x?{SECRET}@h",
        f"redis://:{SECRET}?x@h",
        f"redis://h?password:{SECRET}",
        f"redis://h?pasword={SECRET}",
        f"redis://:{SECRET}@h?flavor=mild",
        f"redis://:{SECRET}@h:port",
        f"redis://:{SECRET}@h/one",
        f"redis://u:{SECRET}@h?wait=0",
        f"redis://h?password={SECRET}&wait=0",
        f"redis+sentinel://:{SECRET}@h",
        f"redis+sentinel://h/?sentinel_password={SECRET}",
        f"rediss://:{SECRET}@h?ssl_ca_certs=/nowhere",
        f"redis://:{SECRET}@127.0.0.1:1?wait=0.01",
        f"redis://127.0.0.1:1?password={SECRET}&wait=0.01",
        f"redis://127.0.0.1:1,127.0.0.1:2?password={SECRET}&wait=0.01",
        f"redis+sentinel://127.0.0.1:1/m?password={SECRET}&sentinel_password={SECRET}&wait=0.01",
        f"unix://:{SECRET}@/nowhere?wait=0.01",
    ],
)
def test_a_secret_is_never_shown(url):
    """Whatever is wrong with a URL, a password that is in it, or was meant to be, is in no message."""
    with pytest.raises(StoreError) as caught:
        open_store(url)
    assert SECRET not in "".join(traceback.format_exception_only(caught.value))


# --- TLS ------------------------------------------------------------------------------------------


class TLSDoor(socketserver.ThreadingTCPServer):
    """Terminates TLS before a server that knows none: command by command, answer by answer."""

    daemon_threads = True

    def __init__(self, upstream: str, context: ssl.SSLContext) -> None:
        self.upstream, self.context = upstream, context
        super().__init__((HOST, 0), TLSPassage)
        self._thread = Thread(target=self.serve_forever, kwargs={"poll_interval": MOMENT_S})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class TLSPassage(socketserver.BaseRequestHandler):
    """One connection through such a door; who is not let in is told by TLS."""

    server: TLSDoor

    def handle(self) -> None:
        """Pass on what comes."""
        with (
            suppress(OSError),
            self.server.context.wrap_socket(self.request, server_side=True) as client,
            connect(self.server.upstream) as server,
        ):
            asked, answered = bytearray(), bytearray()
            while data := client.recv(1 << 16):
                asked += data
                for command in take_frames(asked):
                    server.sendall(command)
                    while not (answers := take_frames(answered)):
                        answered += server.recv(1 << 16)
                    client.sendall(b"".join(answers))


class Encrypted(NamedTuple):
    """A server behind TLS, and who signed its certificate and those of its clients."""

    port: int
    authority: Authority
    client: Pair

    def url(self, host: str = HOST, **options: object) -> str:
        """A store on it; an option that is None is left out."""
        usual = {
            "ssl_ca_certs": self.authority.certificate,
            "ssl_certfile": self.client.certificate,
            "ssl_keyfile": self.client.key,
            "wait": MOMENT_S,
        }
        told = {name: value for name, value in {**usual, **options}.items() if value is not None}
        return f"rediss://{host}:{self.port}/?{urlencode(told)}"


def starts(stack: ExitStack, server: Server) -> bool:
    """Whether a server starts with its options; one that was built without TLS says so."""
    try:
        stack.enter_context(server)
    except RuntimeError as error:
        if "tls" not in str(error).lower():
            raise
        return False
    return True


@pytest.fixture(scope="module", params=[None, *PROGRAMS], ids=["door", *NAMED])
def encrypted(request, tmp_path_factory) -> Iterator[Encrypted]:
    """Each server that this machine offers: by itself where it knows TLS, or else behind a door that does."""
    authority = Authority(tmp_path_factory.mktemp("tls"))
    own, client = authority.pair(HOST), authority.pair("client")
    with ExitStack() as stack:
        port = _free_port()
        options = {
            "tls-port": port,
            "tls-cert-file": own.certificate,
            "tls-key-file": own.key,
            "tls-ca-cert-file": authority.certificate,
        }
        program, server = request.param or PROGRAMS[0], Server(request.param, options)
        knows_tls = request.param is not None and starts(stack, server)
        if not knows_tls:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(authority.certificate))
            context.load_cert_chain(own.certificate, own.key)
            context.verify_mode = ssl.CERT_REQUIRED
            server = stack.enter_context(Server(program))
            port = stack.enter_context(TLSDoor(server.address, context)).server_address[1]
        yield Encrypted(port, authority, client)


@each_kind
def test_a_store_is_used_over_tls(encrypted, kind):
    """With a certificate of the same authority on both sides requests are decided as elsewhere."""
    requests = shape("encrypted", 20)
    with Caller(kind, open_store(encrypted.url(namespace=next(NAMES), wait=PATIENT), clock=at_noon)) as caller:
        assert check_decided(caller.decide(requests), requests, caller.store) == [False] * len(requests)
        caller.hang_up()
        assert check_decided(caller.decide(requests[:1]), requests[:1], caller.store) == [True]


def test_a_stranger_is_not_talked_to(encrypted, tmp_path):
    """A certificate of another authority, or for another host, or none at all: nobody is told anything."""
    stranger = Authority(tmp_path)
    for url, expected in (
        (encrypted.url(ssl_ca_certs=stranger.certificate), "certificate verify failed"),
        (encrypted.url(ssl_ca_certs=None), "certificate verify failed"),
        (encrypted.url("localhost"), "Hostname mismatch"),
        (encrypted.url(ssl_certfile=None, ssl_keyfile=None), "alert|closed|reset|broke"),
        (encrypted.url().replace("rediss://", "redis://"), "closed|reset|no answer came"),
    ):
        with pytest.raises(StoreError, match=f"(?i){expected}"):
            open_store(url, clock=at_noon)


@pytest.mark.parametrize(
    ("host", "options"),
    [("localhost", {"ssl_check_hostname": "false"}), ("localhost", {"ssl_cert_reqs": "none", "ssl_ca_certs": None})],
    ids=["by another name", "by any name"],
)
def test_who_says_so_may_talk_to_a_stranger(encrypted, host, options):
    """A host's name, and whatever a certificate says, go unchecked where that is asked for by name."""
    url = encrypted.url(host, namespace=next(NAMES), wait=PATIENT, **options)
    with Caller(Meter, open_store(url, clock=at_noon)) as caller:
        assert caller.decide(shape("unchecked", 1))[0].is_free


# --- Whom a store is kept with --------------------------------------------------------------------

FIT = {"redis_version": "7.0.0", "role": "master", "loading": 0, "maxmemory": 0, "maxmemory_policy": "allkeys-lru"}


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"redis_version": "6.0.16"}, "Redis 6.0.16; expected 6.2 or newer"),
        ({"redis_version": "5.0"}, "Redis 5.0; expected 6.2 or newer"),
        ({"role": "slave"}, "it is a slave; expected a master"),
        ({"maxmemory": 1}, "maxmemory-policy is allkeys-lru, which deletes .* expected noeviction"),
        ({"loading": 1}, "the server is loading its data"),
        ({}, "unknown command"),  # it is fit, and knows nothing
    ],
    ids=["old", "older", "a replica", "forgetful", "loading", "fit"],
)
def test_an_unfit_server_is_refused_when_it_is_met(facts, told):
    """A server that is too old, a replica, or one that deletes what it cannot hold is not asked to hold a store."""
    info = "".join(f"{name}:{value}\r\n" for name, value in (FIT | facts).items())
    answers = {b"INFO": b"$%d\r\n%b\r\n" % (len(info), info.encode()), b"CONFIG": b"*0\r\n", b"TIME": bulk(1, 0)}
    with Stub(lambda command: answers.get(command[0])) as stub:
        host, port = stub.address
        with pytest.raises(StoreError, match=told):
            open_store(f"redis://{host}:{port}/?wait={MOMENT_S}")


@pytest.mark.parametrize(("fsync", "durability"), [(None, "volatile"), ("everysec", "journaled"), ("always", "synced")])
def test_what_answers_rest_on_is_the_servers_word(fsync, durability):
    """A meter says what its answers rest on, no more than was asked for; more than a server gives is refused."""
    order = ["volatile", "journaled", "synced"]
    options = {} if fsync is None else {"appendonly": "yes", "appendfsync": fsync}
    with Server(options=options) as server:
        url = f"{server.url}?wait={MOMENT_S}&namespace="
        with Meter.open(f"{url}unasked", offer=OFFER, assume=ENROLLED, clock=at_noon) as meter:
            assert (meter.durability, meter.decide(request(1)).durability) == (durability, durability)
        for asked in order[: order.index(durability) + 1]:
            named = f"{url}{asked}&durability={asked}"
            with Meter.open(named, offer=OFFER, assume=ENROLLED, clock=at_noon) as meter:
                assert (meter.durability, meter.decide(request(1)).durability) == (asked, asked)
        for asked in order[order.index(durability) + 1 :]:
            with pytest.raises(StoreError, match=f"the server's answers are {durability}; expected {asked}"):
                open_store(f"{url}{asked}&durability={asked}")


@each_kind
def test_a_server_that_keeps_less_than_it_did_executes_nothing(kind):
    """One that stopped to journal is refused by whoever meets it anew, until it journals again."""
    one, other = shape("one", 2)
    with (
        Server(options={"appendonly": "yes"}) as server,
        Caller(kind, open_store(f"{server.url}?wait={PATIENT}", clock=at_noon)) as caller,
    ):
        assert caller.decide([one])[0].durability == "journaled"
        server.ask("CONFIG", "SET", "appendonly", "no")
        caller.hang_up()
        error = caller.ask([other], patience=MOMENT_S)
        assert type(error) is NotExecuted
        assert "the server's answers are volatile; expected journaled" in str(error)
        server.ask("CONFIG", "SET", "appendonly", "yes")
        until(lambda: server.ask("INFO", "persistence")["aof_rewrite_in_progress"] == 0, "it journals")
        assert check_decided(caller.ask([other], patience=PATIENT), [other], caller.store) == [False]


# --- A failover by sentinels ----------------------------------------------------------------------


def test_a_failover_by_sentinels_is_not_noticed():
    """While threads and tasks decide, the replica becomes the master: every request is decided, once, and in order."""
    with Sentinels() as sentinels:
        hosts = ",".join(f"{host}:{port}" for host, port in sentinels.url_hosts)
        url = f"redis+sentinel://{hosts}/{sentinels.service}?wait={PATIENT}&timeout=0.5"
        with Load(partial(open_store, url, clock=at_noon)) as load:
            load.go_on(for_calls=500)
            # What is written meanwhile to a master that others have given up is lost: so it is kept from writing.
            sentinels.master.ask("CLIENT", "PAUSE", int(PATIENT * 1_000), "WRITE")
            until(lambda: replicated(sentinels.master) == replicated(sentinels.replica), "the replica has it all")
            sentinels.failover()
            load.go_on(for_calls=500)
            calls = load.end()
        with closing(open_store(url, clock=at_noon)) as store:
            assert sentinels.address == sentinels.replica.tcp_address
            assert faults_of(store, calls) <= LOST_ANSWERS
