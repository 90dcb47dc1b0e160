"""The client of Redis and Valkey against faults of every kind: a request is decided once, and told what became of it."""

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
from urllib.parse import quote

import hiredis
import pytest
from redis.exceptions import RedisError

from gratis import AsyncMeter, Meter, NotExecuted, OutcomeUnknown, StoreError
from gratis.lines import decision_line
from gratis.stores.redis.core import Settings
from gratis.stores.redis.layout import account_word, shards
from gratis.stores.redis.servers import Cluster as ClusterServers
from gratis.stores.redis.store import RedisStore
from gratis.stores.redis.wire import Access, Address
from gratis.stores.urls import open_store

from .callers import (
    ENROLLED,
    LARGE,
    NOW,
    OFFER,
    ONE_ATTEMPT,
    PATIENT,
    SMALL,
    Caller,
    Rough,
    at_noon,
    check_decided,
    faults_of,
    keys_of,
    ledger_of,
    request,
)
from .oracle import Call, Change
from .proxy import Fault, Proxy, connect
from .servers import HOST, Cluster, Server, binaries, until
from .test_histories import ask, change_tiers, eager_switches, enroll, in_child, in_threads, told

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from gratis import Decision, Request
    from gratis.stores.redis.layout import Shard

LONG_S, SHORT_S, MOMENT_S = 20.0, 0.03, 0.005
FOR_EVER = 1 << 30
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
            replayed = check_decided(caller.ask(requests, patience=PATIENT), requests, site.direct)
            forwarded = site.counts()[0] - forwarded
            assert any(replayed) == (forwarded > shards_of(caller.store, requests))
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

            answers = caller.ask(requests, patience=2 * weather.timeout if weather.timeout == SHORT_S else SHORT_S)
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
            for patience in (ONE_ATTEMPT, 2 * MOMENT_S):
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


@each_kind
@pytest.mark.parametrize("fault", ["late", "delay"])
@pytest.mark.parametrize("site", ["at a port"], indirect=True)
def test_what_comes_late_changes_nothing(site, fault, kind):
    """A call or an answer that comes when nobody waits for it any more is neither decided again nor another's."""
    requests = shape("one", 15)
    with Caller(kind, site.open(SHORT_S)) as caller:
        forwarded, executed = site.counts()
        for one in requests:
            site.arm(fault, times=1, seconds=SHORT_S + MOMENT_S)
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
PROGRAMS = list(BINARIES.values()) or [None]


class Refusing:
    """A server that can be brought to refuse, and a user of it with a password."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.ask = server.ask
        self.is_debugged = server.options.keys() >= DEBUGGED.keys()
        self.ask("CONFIG", "SET", "rdbcompression", "no")
        self.ask("ACL", "SETUSER", USER, "on", f">{PASSWORD}", "~*", "&*", "+@all")
        self.namespace = ""

    @property
    def url(self) -> str:
        """The store, for that user."""
        return f"unix://{USER}:{quote(PASSWORD)}@{self.server.address}?namespace={self.namespace}&shards=1"

    @property
    def shard(self) -> Shard:
        """The store's one shard."""
        return shards(self.namespace, 1)[0]

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
        with self._in_the_way(self.shard.state):
            yield

    @contextmanager
    def of_another_type_in_its_ledger(self) -> Iterator[None]:
        """The ledger is none."""
        with self._in_the_way(self.shard.ledger):
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


@pytest.fixture(scope="module", params=PROGRAMS, ids=list(BINARIES) or ["none"])
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
        for patience in (ONE_ATTEMPT, 5 * MOMENT_S):
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
CUTS: tuple[Fault, ...] = ("cut_before", "cut_after", "half")
# An answer that was lost is given again, marked as such: then nobody was answered first.
LOST_ANSWERS = {"an id was never answered first"}


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
    "unix://socket": "expected .*unix:///SOCKET",
    "unix://": "expected .*unix:///SOCKET",
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
