"""The servers that other tests rely on: each that this machine offers starts, comes back, moves and is gone."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from redis import Redis, Sentinel
from redis.cluster import RedisCluster
from redis.exceptions import ResponseError

from . import servers
from .servers import HOST, MISSING, NAMED, SLOTS, Cluster, Sentinels, Server, binaries, binary, until

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
CHILD_MOST_S = 20
BINARIES = binaries()
# Of no server at all, each test fails with the line that says how to get one.
PROGRAMS = list(BINARIES.values()) or [None]
NAMES = list(BINARIES) or ["none"]
each_binary = pytest.mark.parametrize("program", PROGRAMS, ids=NAMES)


@pytest.fixture(scope="module", params=PROGRAMS, ids=NAMES)
def cluster(request) -> Iterator[Cluster]:
    """Three masters and their replicas, of each server."""
    with Cluster(request.param, replicas=True) as cluster:
        yield cluster


def listens(port: int) -> bool:
    """Whether somebody answers at a loopback port."""
    with socket.socket() as sock:
        return sock.connect_ex((HOST, port)) == 0


@each_binary
def test_a_server_answers_at_its_socket_and_its_port(program):
    """The socket is its owner's alone, the port is of this machine alone, and both are gone at the end."""
    with Server(program, tcp=True) as server:
        with Redis.from_url(server.url) as at_socket, Redis.from_url(server.tcp_url) as at_port:
            assert at_socket.set("key", "value")
            assert at_port.get("key") == b"value"
        assert stat.S_IMODE(Path(server.address).stat().st_mode) == 0o700
        assert stat.S_IMODE(server.folder.stat().st_mode) == 0o700
        assert len(os.fsencode(server.address)) < 100
        assert server.ask("CONFIG", "GET", "bind") == ["bind", HOST]
        assert server.ask("CONFIG", "GET", "save") == ["save", ""]
        process, folder, port = server.process, server.folder, server.port
    assert process.returncode == -signal.SIGKILL
    assert (folder.exists(), listens(port)) == (False, False)


@each_binary
def test_what_was_appended_is_there_after_a_kill_and_after_a_stop(program):
    """A server that appends to a file with each write comes back with all it answered, at the same addresses."""
    with Server(program, {"appendonly": "yes", "appendfsync": "always"}, tcp=True) as server:
        with server.client() as client:
            addresses = server.url, server.tcp_url
            for value in (b"1", b"2"):
                client.set("key", value)
                if value == b"1":
                    server.kill()
                server.restart()
                assert client.get("key") == value
            assert (server.url, server.tcp_url) == addresses
            server.stop()
        assert server.process.returncode == 0
        assert not listens(server.port)


@each_binary
def test_a_server_without_a_file_comes_back_empty(program):
    """What was not appended is gone with the process."""
    with Server(program) as server, server.client() as client:
        client.set("key", "value")
        server.restart()
        assert client.get("key") is None


def test_a_cluster_shares_all_slots_evenly(cluster):
    """Every slot has a master, and no master has more than one slot more than another."""
    ranges = cluster._slots(cluster.nodes[0])
    assert [(start, end) for start, end, _ in ranges] == [(0, 5460), (5461, 10921), (10922, SLOTS - 1)]
    assert {port for _, _, port in ranges} == {master.port for master in cluster.masters}


def test_a_cluster_moves_a_slot_with_its_keys(cluster):
    """Clients find keys before, in the middle of and after the slot's move, and when it is back."""
    keys = [f"{{acme}}{number}" for number in range(250)]
    values = [key.encode() for key in keys]
    with RedisCluster.from_url(cluster.url) as client:
        for key in keys:
            client.set(key, key)
        slot = client.keyslot("{acme}")
        source = cluster.owner(slot)
        target = next(node for node in cluster.masters if node is not source)

        cluster.begin_move(slot, target)
        cluster.move_keys(slot, target, source.ask("CLUSTER", "GETKEYSINSLOT", slot, 100))
        assert [node.ask("CLUSTER", "COUNTKEYSINSLOT", slot) for node in (source, target)] == [150, 100]
        assert [client.get(key) for key in keys] == values

        cluster.move_slot(slot, target)
        assert cluster.owner(slot) is target
        assert [node.ask("CLUSTER", "COUNTKEYSINSLOT", slot) for node in (source, target)] == [0, 250]
        assert [client.get(key) for key in keys] == values
        with source.client() as asked, pytest.raises(ResponseError, match=rf"{slot} {HOST}:{target.port}"):
            asked.get("{acme}0")

        cluster.move_slot(slot, source)
        assert cluster.owner(slot) is source
        assert [client.get(key) for key in keys] == values


def test_a_replica_takes_over_without_a_loss(cluster):
    """After the failover the replica is master, its master copies it, and the cluster serves on."""
    with RedisCluster.from_url(cluster.url) as client:
        client.set("{other}", "value")
        before = cluster.owner(client.keyslot("{other}"))
        replica = cluster.replica(before)
        cluster.failover(replica)
        assert cluster.owner(client.keyslot("{other}")) is replica
        until(lambda: before.ask("ROLE")[0] == "slave", "the old master copies")
        assert cluster.replica(replica) is before
        assert client.get("{other}") == b"value"


@each_binary
def test_a_failover_changes_the_address(program):
    """A sentinel names the other server, which is master, with what was written before."""
    with Sentinels(program, sentinels=1) as sentinels:
        master, replica = sentinels.master, sentinels.replica
        sentinel = Sentinel(sentinels.url_hosts)
        with sentinel.master_for(sentinels.service) as client:
            client.set("key", "value")
            until(lambda: replica.ask("GET", "key") == "value", "the replica has the key")
            assert sentinels.address == master.tcp_address
            sentinels.failover()
            assert sentinels.address == replica.tcp_address
            assert sentinel.discover_master(sentinels.service) == replica.tcp_address
        with sentinel.master_for(sentinels.service) as client:
            assert client.get("key") == b"value"
        for each in sentinel.sentinels:
            each.close()


def test_three_sentinels_agree_on_the_new_address():
    """Each of three sentinels names the same new master."""
    with Sentinels() as sentinels:
        assert len(sentinels.url_hosts) == 3
        sentinels.failover()
        told = [sentinels._address(each) for each in sentinels.sentinels]
        assert told == [sentinels.replica.tcp_address] * 3


def test_a_taken_port_is_passed_over(monkeypatch):
    """If another listens on a port by the time that the server does, the server is started on the next."""
    free = servers._free_port
    with Server(tcp=True) as first:
        ports = [first.port, first.port]
        monkeypatch.setattr(servers, "_free_port", lambda: ports.pop() if ports else free())
        with Server(tcp=True) as second:
            assert second.port != first.port
            assert second.ask("ECHO", "second") == "second"
        assert first.ask("ECHO", "first") == "first"


def test_a_server_that_does_not_start_says_why(monkeypatch, tmp_path):
    """The error ends with what the server logged, and nothing is left of it."""
    folder = tmp_path / "private"
    monkeypatch.setattr(servers, "private_folder", lambda: folder.mkdir() or folder)
    with (
        pytest.raises(RuntimeError, match=r"does not answer; it logged:\n(.|\n)*no-such-option"),
        Server(options={"no-such-option": "yes"}),
    ):
        pass
    assert not folder.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_server_ends_with_the_process_that_started_it(number):
    """However the test's process ends, its server does not answer any more and the folder is gone."""
    program = (
        "import signal\n"
        "from tests.servers import Server\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born deaf to it\n"
        "with Server(tcp=True) as server:\n"
        "    print(server.port, server.folder, flush=True)\n"
        "    input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as child:
        port, folder = child.stdout.readline().split()
        assert listens(int(port))
        child.send_signal(number)
        child.wait(CHILD_MOST_S)
    until(lambda: not Path(folder).exists(), "the folder is gone")
    until(lambda: not listens(int(port)), "nobody answers")


def test_one_server_may_be_named(monkeypatch):
    """The environment says which server it is to be, and no other is offered."""
    monkeypatch.setenv(NAMED, str(binary()))
    assert list(binaries().values()) == [binary()]
    monkeypatch.setenv(NAMED, sys.executable)
    with pytest.raises(RuntimeError, match=f"^{NAMED} names no Redis or Valkey server: "):
        Server()


def test_without_a_server_one_line_says_how_to_get_one(monkeypatch):
    """No server is no reason to skip: it is an error, and its message is one line."""
    monkeypatch.delenv(NAMED, raising=False)
    monkeypatch.setattr(servers, "_candidates", lambda: iter(()))
    for kind in (Server, Cluster, Sentinels):
        with pytest.raises(RuntimeError) as raised:
            kind(None)
        assert str(raised.value) == MISSING
    assert "\n" not in MISSING
