"""A store over a cluster: accounts spread over masters, while slots move and masters change, or are lost with data."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import hiredis
import pytest

from gratis import AsyncMeter, Enrollment, Meter, NotExecuted, StoreError, Usage
from gratis.errors import LedgerError
from gratis.stores import behind
from gratis.stores.redis.core import PROBE
from gratis.stores.redis.layout import account_word
from gratis.stores.redis.servers import Call, Cluster as ClusterServers, answers
from gratis.stores.redis.wire import Address
from gratis.stores.urls import open_store

from .bench import check_held
from .callers import (
    ENROLLED,
    LOST_ANSWERS,
    OFFER,
    ONE_ATTEMPT,
    PATIENT,
    Caller,
    Load,
    at_noon,
    check_decided,
    faults_of,
    ledger_of,
    replicated,
    request,
)
from .servers import Cluster, Server, until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gratis import Entry, Hold, Request
    from gratis.stores.redis.layout import Shard
    from gratis.stores.redis.store import RedisStore

ACCOUNTS, MOVED_EVERY = 60, 3
MOMENT_S = 0.005
NAMES = (f"cluster {number}" for number in count())
each_kind = pytest.mark.parametrize("kind", [Meter, AsyncMeter], ids=["blocking", "asyncio"])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three masters, each with a replica."""
    with Cluster(replicas=True) as cluster:
        yield cluster


@pytest.fixture
def url(cluster) -> str:
    """A store that is not there yet, as the first node names it."""
    return f"{cluster.url}/?namespace={next(NAMES)}&wait={PATIENT}"


def requests_of(name: str, size: int) -> list[Request]:
    """So many requests, over all accounts."""
    return [request(f"{name} {number}", account=f"account {number % ACCOUNTS}") for number in range(size)]


def shard_of(store: RedisStore, account: str) -> Shard:
    """The shard in which an account lives."""
    return store._core.asking.shard_of(account_word(OFFER.name, account))


def next_master(cluster: Cluster, slot: int) -> Server:
    """The master behind the one that has a slot."""
    masters = cluster.masters
    return masters[(masters.index(cluster.owner(slot)) + 1) % len(masters)]


# --- Spread over masters --------------------------------------------------------------------------


@each_kind
def test_accounts_are_spread_over_masters(cluster, url, kind):
    """A batch over many accounts is decided on every master, each account's in order, as another view sees it, too."""
    requests = requests_of("spread", 5 * ACCOUNTS)
    with Caller(kind, open_store(url, clock=at_noon)) as caller, closing(open_store(url, clock=at_noon)) as other:
        assert caller.meter.shards == 16
        assert check_decided(caller.decide(requests), requests, other) == [False] * len(requests)
        assert check_decided(caller.decide(requests), requests, other) == [True] * len(requests)
        owners = {cluster.owner(shard.slot).port for shard in {shard_of(other, one.account) for one in requests}}
        assert owners == {master.port for master in cluster.masters}
        found: dict[str, list[Entry]] = {}
        for entry in other.entries():
            found.setdefault(entry.decision.account, []).append(entry)
        for account, entries in found.items():
            assert [entry.decision.used for entry in entries] == [10, 20, 30, 40, 50]
            shard, last, tallies = other.counters(OFFER.name, account)
            assert {entry.shard for entry in entries} == {shard} == {shard_of(other, account).number}
            assert (last >= entries[-1].entry, [tally.used for _, _, tally in tallies]) == (True, [50])
        assert sorted(name for _, name in other.accounts()) == sorted(found)


def test_a_ledger_of_shards_is_read_from_a_cursor_on(url):
    """Wherever a reader stopped, it goes on behind that, shard by shard; a lone number is no such place."""
    with Meter(open_store(url, clock=at_noon), OFFER, assume=Enrollment(tier=3, sharing="enabled")) as meter:
        meter.decide_many(requests_of("first", 3 * ACCOUNTS))
        everything = list(meter.ledger())
        assert [entry.shard for entry in everything] == sorted(entry.shard for entry in everything)
        for stop in (0, 1, 50, len(everything)):
            cursor: Any = (0,) * meter.shards
            for entry in everything[:stop]:
                cursor = behind(cursor, entry, shards=meter.shards)
            assert list(meter.ledger(after=cursor)) == everything[stop:]
        meter.decide_many(requests_of("later", ACCOUNTS))
        news = list(meter.ledger(after=cursor))
        assert {entry.decision.id for entry in news} == {one.id for one in requests_of("later", ACCOUNTS)}
        numbers: dict[int, list[int]] = {}
        for entry in meter.ledger():
            numbers.setdefault(entry.shard, []).append(entry.entry)
        assert all(found == list(range(1, len(found) + 1)) for found in numbers.values())
        with pytest.raises(LedgerError, match="16 shards; expected a place in each"):
            list(meter.ledger(after=1))


# --- While slots move -----------------------------------------------------------------------------


def test_slots_that_move_are_followed(cluster, url):
    """While threads and tasks decide, shards move to another master, at once or key by key, and stay whole."""
    with Load(partial(open_store, url, clock=at_noon)) as load, closing(open_store(url, clock=at_noon)) as store:
        load.go_on(for_calls=200)
        for place, shard in enumerate(store._core.asking.shards[::MOVED_EVERY]):
            target = next_master(cluster, shard.slot)
            if place % 2:
                cluster.begin_move(shard.slot, target)
                for key in (shard.ledger, shard.holds, shard.state):
                    cluster.move_keys(shard.slot, target, [key.decode()])
            cluster.move_slot(shard.slot, target)
            assert cluster.owner(shard.slot) is target
            load.go_on(for_calls=50)
        calls = load.end()
        assert faults_of(store, calls) <= LOST_ANSWERS
        assert ledger_of(store).keys() == {(call.account, call.id) for call in calls}


HOLDERS, HELD_EACH, HELD_ACCOUNTS = 3, 150, 20
ENDS = ("settled", "released", "extended", "left", "settled")


def hold_and_end(meter: Meter, place: int, done: threading.Semaphore) -> list[tuple[str, Hold]]:
    """Many holds, one after another, each with what became of it."""
    ends = []
    for number in range(HELD_EACH):
        held = meter.hold(request(f"{place} {number}", None, account=f"account {number % HELD_ACCOUNTS}"), 20)
        assert held.fits
        end = ENDS[number % len(ENDS)]
        if end == "extended":
            held = meter.extend(held)
        elif end == "settled":
            assert meter.settle(held, Usage(input_tokens=15, output_tokens=0)).free_tokens == 15
        elif end == "released":
            assert meter.release(held) is None
        ends.append((end, held))
        done.release()
    return ends


def test_holds_in_flight_follow_slots_that_move(cluster, url):
    """While threads hold, extend, settle and give back, shards move to another master: each hold has one end."""
    done = threading.Semaphore(0)
    with ExitStack() as stack:
        stores = [open_store(url, clock=at_noon) for _ in range(HOLDERS)]
        meters = [stack.enter_context(Meter(store, OFFER, assume=ENROLLED)) for store in stores]
        threads = stack.enter_context(ThreadPoolExecutor(HOLDERS))
        jobs = [threads.submit(hold_and_end, meter, place, done) for place, meter in enumerate(meters)]
        shards = stores[0]._core.asking.shards
        for shard in shards[::2]:
            until(lambda: done.acquire(blocking=False), "one more is done")
            target = next_master(cluster, shard.slot)
            cluster.begin_move(shard.slot, target)
            for key in (shard.holds, shard.state, shard.ledger):
                cluster.move_keys(shard.slot, target, [key.decode()])
            cluster.move_slot(shard.slot, target)
        ends = [end for job in jobs for end in job.result(PATIENT)]
        settled = {(held.account, held.id) for end, held in ends if end == "settled"}
        left = {(held.account, held.id) for end, held in ends if end in {"extended", "left"}}
        assert ledger_of(stores[0]).keys() == settled
        holds = [one for name in {held.account for _, held in ends} for one in meters[0].holds(name)]
        assert sorted((one.account, one.id) for one in holds) == sorted(left)
        assert sum(tokens_held(cluster, shard) for shard in shards) == 20 * len(left)


def tokens_held(cluster: Cluster, shard: Shard) -> int:
    """What the holds of a shard set aside, which is whole."""
    with cluster.owner(shard.slot).client() as client:
        members = [member for member in client.zrange(shard.holds, 0, -1) if member != PROBE]
        return sum(hold.tokens for hold in check_held(client.hgetall(shard.state), members))


@each_kind
def test_a_shard_whose_keys_are_apart_is_not_taken_for_a_broken_one(cluster, url, kind):
    """With a key here and a key there nothing is executed; with both there, and after the move, all is."""
    one, other, third = (request(name) for name in ("one", "other", "third"))
    with Caller(kind, open_store(url, clock=at_noon)) as caller:
        store = caller.store
        caller.decide([one])
        shard = shard_of(store, "default")
        target = next_master(cluster, shard.slot)
        cluster.begin_move(shard.slot, target)
        cluster.move_keys(shard.slot, target, [shard.ledger.decode()])
        error = caller.ask([other], patience=ONE_ATTEMPT)
        assert type(error) is NotExecuted
        assert "TRYAGAIN" in str(error)
        assert ledger_of(store).keys() == {("default", one.id)}  # a key that is read alone is found where it is
        caller.patience(PATIENT)
        assert [change.version for change in store.enrollments(OFFER.name, "default")] == []
        cluster.move_keys(shard.slot, target, [shard.state.decode()])
        assert ledger_of(store).keys() == {("default", one.id)}
        assert "TRYAGAIN" in str(caller.ask([other], patience=ONE_ATTEMPT))
        cluster.move_keys(shard.slot, target, [shard.holds.decode()])
        assert check_decided(caller.ask([other], patience=PATIENT), [other], store) == [False]
        assert store.counters(OFFER.name, "default")[1] == 2
        cluster.end_move(shard.slot, target)
        answers = caller.ask([one, other, third], patience=PATIENT)
        assert check_decided(answers, [one, other, third], store) == [True, True, False]


def told_by(servers: ClusterServers, replies: Sequence[Any]) -> tuple[list[Address], list[Any]]:
    """Whom a call was sent to, and what came of it, with these replies."""
    asked = []
    flow = answers(servers, [Call(5, b"asked")], timer=float, patience=1.0)
    try:
        wave = next(flow)
        for reply in replies:
            while not wave.sends:
                wave = flow.send([])
            asked.append(wave.sends[0].address)
            wave = flow.send([[reply]])
    except StopIteration as end:
        return asked, end.value
    return asked, []


def test_a_server_that_names_no_host_means_its_own():
    """A null or empty host in the map of slots, or in a redirection, is that of the server that was asked."""
    for name in (None, b"", b"h"):
        slots = [[0, 5, [name, 7, b"id"]], [6, 16383, [b"other", 8, b"id"]]]
        replies = [slots, hiredis.ReplyError("MOVED 5 :9"), hiredis.ReplyError("ASK 5 :10"), b"done"]
        asked, (answer,) = told_by(ClusterServers([Address("h", 1)]), replies)
        assert asked == [Address("h", port) for port in (1, 7, 9, 10)]
        assert answer == [b"done"]


# --- While masters change -------------------------------------------------------------------------


def test_a_graceful_failover_is_not_noticed(cluster, url):
    """While threads and tasks decide, each replica becomes the master of its group: all is decided, once, in order."""
    with Load(partial(open_store, url, clock=at_noon)) as load, closing(open_store(url, clock=at_noon)) as store:
        for master in cluster.masters:
            load.go_on(for_calls=100)
            replica = cluster.replica(master)
            cluster.failover(replica)
            assert master not in cluster.masters
        load.go_on(for_calls=200)
        calls = load.end()
        assert faults_of(store, calls) <= LOST_ANSWERS
        assert ledger_of(store).keys() == {(call.account, call.id) for call in calls}


def lose(cluster: Cluster, master: Server, replica: Server) -> None:
    """A master is killed, and its replica takes its place with what it has."""
    master.kill()
    replica.ask("CLUSTER", "FAILOVER", "TAKEOVER")
    until(lambda: replica.ask("ROLE")[0] == "master", "the replica is master")
    cluster.wait()


def part(master: Server, replica: Server) -> None:
    """A replica hears no more of what its master writes."""
    replica.ask("CONFIG", "SET", "masterauth", "a password that nobody asked for")  # with which it is not let in
    master.ask("CLIENT", "KILL", "TYPE", "replica")
    until(lambda: replica.ask("INFO", "replication")["master_link_status"] == "down", "the replica is cut off")


@each_kind
def test_a_master_that_is_lost_with_what_it_acknowledged_is_not_replaced_silently(kind):
    """Who saw what the new master has not refuses its shards, and no others; opened anew, the store goes on."""
    with Cluster(replicas=True) as cluster:
        hosts = ",".join("{}:{}".format(*node.tcp_address) for node in cluster.nodes)
        url = f"redis://{hosts}/?wait={PATIENT}"
        with Caller(kind, open_store(url, clock=at_noon)) as caller:
            store = caller.store
            kept = requests_of("kept", ACCOUNTS)
            caller.decide(kept)
            slot = shard_of(store, "account 0").slot
            master = cluster.owner(slot)
            replica = cluster.replica(master)
            owners = {shard: cluster.owner(shard.slot) for shard in store._core.asking.shards}
            there = [one for one in kept if owners[shard_of(store, one.account)] is master]
            elsewhere = [one for one in kept if one not in there]
            until(lambda: replicated(master) == replicated(replica), "the replica has it all")
            part(master, replica)
            lost = [request(f"lost {one.id}", account=one.account) for one in there]
            acknowledged = caller.decide(lost)
            assert [answer.replayed for answer in acknowledged] == [False] * len(lost)
            lose(cluster, master, replica)

            fresh = [request(f"fresh {one.id}", account=one.account) for one in there]
            for asked in (fresh[:1], lost[:1], fresh, kept[:1]):
                error = caller.ask(asked, patience=PATIENT)
                assert isinstance(error, StoreError)
                assert "has lost what it acknowledged" in str(error)
            assert check_decided(caller.ask(elsewhere, patience=PATIENT), elsewhere, store) == [True] * len(elsewhere)
            mixed = caller.ask([fresh[0], request("new", account=elsewhere[0].account)], patience=PATIENT)
            assert isinstance(mixed, StoreError)
            assert not isinstance(mixed, NotExecuted)
            assert ("account 0", fresh[0].id) not in ledger_of(store)
        with Caller(kind, open_store(url, clock=at_noon)) as caller:
            assert check_decided(caller.decide(kept), kept, caller.store) == [True] * len(kept)
            assert check_decided(caller.decide(lost), lost, caller.store) == [False] * len(lost)
