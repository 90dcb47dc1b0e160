"""The proxy that other tests rely on: each of its faults does to a connection what its name says."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from redis import Redis

from .proxy import Proxy, connect, frame_end, take_frames
from .servers import Server, until

if TYPE_CHECKING:
    from collections.abc import Iterator

INCR = b"*2\r\n$4\r\nINCR\r\n$3\r\nkey\r\n"
PING = b"PING\r\n"
ANSWER_MOST_S = 10.0
LITTLE_S = 0.15


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    """A server for all tests of this module."""
    with Server(tcp=True) as running:
        yield running


@pytest.fixture
def server(running):
    """The server, without a key."""
    running.ask("FLUSHALL")
    return running


@pytest.fixture(params=["unix", "tcp"])
def proxy(request, server) -> Iterator[Proxy]:
    """A proxy of one of the two kinds before a server's address of the same kind."""
    is_tcp = request.param == "tcp"
    before = threading.enumerate()
    with Proxy(server.tcp_address if is_tcp else server.address, tcp=is_tcp, markers=(b"INCR",)) as proxy:
        yield proxy
    assert threading.enumerate() == before


def count_of(server) -> int:
    """How often the server did what was marked."""
    return int(server.ask("GET", "key") or 0)


def opened(proxy):
    """A connection through the proxy."""
    sock = connect(proxy.address)
    sock.settimeout(ANSWER_MOST_S)
    return closing(sock)


def received(sock, size: int) -> bytes:
    """So many bytes, or fewer if the connection closed."""
    data = b""
    while len(data) < size and (piece := sock.recv(size - len(data))):
        data += piece
    return data


def is_silent(sock) -> bool:
    """Whether the connection is open and nothing comes for a little while."""
    sock.settimeout(LITTLE_S)
    try:
        sock.recv(1)
    except TimeoutError:
        return True
    return False


def asked(proxy, command: bytes = INCR, size: int = 100) -> bytes:
    """What a command is answered on a connection of its own, until it closes."""
    with opened(proxy) as sock:
        sock.sendall(command)
        return received(sock, size)


def test_all_passes_unless_a_fault_is_armed(proxy, server):
    """Commands and answers pass, whole or in pieces, singly or many at once, and marked ones are counted."""
    with opened(proxy) as sock:
        sock.sendall(PING + INCR + INCR)
        assert received(sock, 15) == b"+PONG\r\n:1\r\n:2\r\n"
        for byte in INCR:
            sock.sendall(bytes([byte]))
        assert received(sock, 4) == b":3\r\n"
    assert (proxy.forwarded, count_of(server)) == (3, 3)


def test_cut_before(proxy, server):
    """The connection closes, and the server never saw the command."""
    proxy.arm("cut_before")
    assert asked(proxy) == b""
    assert (proxy.forwarded, count_of(server)) == (0, 0)


def test_cut_after(proxy, server):
    """The server did it, and the connection closes without a byte of the answer."""
    proxy.arm("cut_after")
    assert asked(proxy) == b""
    assert (proxy.forwarded, count_of(server)) == (1, 1)


def test_swallow(proxy, server):
    """The server did it, its answer is dropped, and the next answer comes in its place."""
    proxy.arm("swallow")
    with opened(proxy) as sock:
        sock.sendall(INCR)
        until(lambda: count_of(server) == 1, "the server did it")
        assert is_silent(sock)
        sock.settimeout(ANSWER_MOST_S)
        sock.sendall(PING)
        assert received(sock, 7) == b"+PONG\r\n"
    assert proxy.forwarded == 1


def test_delay(proxy, server):
    """The server did it at once, and its answer comes later."""
    proxy.arm("delay", seconds=LITTLE_S)
    start = time.monotonic()
    with opened(proxy) as sock:
        sock.sendall(INCR)
        until(lambda: count_of(server) == 1, "the server did it")
        assert received(sock, 4) == b":1\r\n"
    assert time.monotonic() - start >= LITTLE_S


def test_late(proxy, server):
    """The server does it later, though the client that asked has gone."""
    proxy.arm("late", seconds=LITTLE_S)
    start = time.monotonic()
    with opened(proxy) as sock:
        sock.sendall(INCR)
        until(lambda: proxy.left == 0, "the proxy holds it")
    until(lambda: count_of(server) == 1, "the server did it")
    assert time.monotonic() - start >= LITTLE_S
    assert proxy.forwarded == 1


def test_half(proxy, server):
    """The server did it, half of the answer comes, and the connection closes."""
    proxy.arm("half")
    assert asked(proxy) == b":1"
    assert (proxy.forwarded, count_of(server)) == (1, 1)


def test_reset(server):
    """The server did it, and the connection is reset; a UNIX socket knows no reset, and says so."""
    with Proxy(server.address, tcp=True, markers=(b"INCR",)) as proxy:
        proxy.arm("reset")
        with pytest.raises(ConnectionResetError):
            asked(proxy)
        assert (proxy.forwarded, count_of(server)) == (1, 1)
    with Proxy(server.address) as proxy, pytest.raises(ValueError, match="a UNIX socket knows no reset"):
        proxy.arm("reset")


def test_black_hole(proxy, server):
    """The connection takes everything and gives nothing, and the server sees none of it; others pass."""
    proxy.arm("black_hole")
    with opened(proxy) as sock:
        sock.sendall(PING)
        assert received(sock, 7) == b"+PONG\r\n"
        sock.sendall(INCR + PING)
        assert is_silent(sock)
        assert (proxy.left, proxy.forwarded, count_of(server)) == (0, 0, 0)
        assert asked(proxy, size=4) == b":1\r\n"
        assert is_silent(sock)


def test_a_fault_meets_the_next_marked_commands_so_many_times(proxy, server):
    """What is not marked passes and does not count; afterwards all passes again, and `pass` disarms at once."""
    proxy.arm("cut_after", times=2)
    assert asked(proxy, PING, 7) == b"+PONG\r\n"
    assert [asked(proxy, size=4) for _ in range(3)] == [b"", b"", b":3\r\n"]
    proxy.arm("cut_before", times=2)
    proxy.arm("pass")
    assert asked(proxy, size=4) == b":4\r\n"
    assert (proxy.left, proxy.forwarded) == (0, 4)


def test_no_fault_goes_by_another_name(proxy):
    """A fault that there is not is refused, and nothing is armed."""
    with pytest.raises(ValueError, match="no fault: cut"):
        proxy.arm("cut")
    assert asked(proxy, size=4) == b":1\r\n"


def test_a_client_library_works_through_it(server):
    """Scripts are marked by default, and redis-py reads the URL."""
    with Proxy(server.address) as proxy, Redis.from_url(proxy.url) as client:
        assert client.eval("return redis.call('INCR', KEYS[1])", 1, "key") == 1
        assert client.evalsha(client.script_load("return {1, 'two', false}"), 0) == [1, b"two", None]
        assert client.hset("hash", mapping={"field": "value"}) == 1
        assert client.hgetall("hash") == {b"field": b"value"}
        assert proxy.forwarded == 2


def test_a_server_that_is_away_closes_the_connection(proxy, server):
    """Nobody listens upstream: the connection closes; with another upstream, the next one passes."""
    address, proxy.upstream = proxy.upstream, f"{server.folder}/nobody"
    with opened(proxy) as sock:
        assert received(sock, 1) == b""
    proxy.upstream = address
    assert asked(proxy, size=4) == b":1\r\n"


def test_the_end_waits_for_nobody(proxy, server):
    """Open connections, and one that is held back for long, are closed at the end, and it is not forwarded then."""
    with Proxy(server.address, markers=(b"INCR",)) as other, opened(other) as idle, opened(other) as held:
        other.arm("late", seconds=600)
        held.sendall(INCR)
        until(lambda: other.left == 0, "the proxy holds it")
        other.__exit__()
        assert (received(idle, 1), received(held, 1)) == (b"", b"")
        assert (other.forwarded, count_of(server)) == (0, 0)
        other.__enter__()


@pytest.mark.parametrize(
    "frame",
    [
        b"PING\r\n",
        b"+OK\r\n",
        b"-ERR no\r\n",
        b":-1\r\n",
        b"_\r\n",
        b"#t\r\n",
        b",1.5\r\n",
        b"$-1\r\n",
        b"$0\r\n\r\n",
        b"$4\r\n\r\n\r\n\r\n",
        b"=7\r\ntxt:\r\na\r\n",
        b"!3\r\nERR\r\n",
        b"*-1\r\n",
        b"*0\r\n",
        b"*2\r\n*1\r\n:1\r\n$1\r\na\r\n",
        b"~1\r\n:1\r\n",
        b"%1\r\n+a\r\n*1\r\n:1\r\n",
        b">2\r\n+a\r\n+b\r\n",
        b"|1\r\n+a\r\n+b\r\n:1\r\n",
    ],
)
def test_a_frame_ends_where_it_ends(frame):
    """Each kind of answer is whole with its last byte, not before, and what follows is not of it."""
    assert [frame_end(frame[:size]) for size in range(len(frame))] == [None] * len(frame)
    assert frame_end(frame + b"+OK\r\n") == len(frame)
    data = bytearray(frame * 2 + frame[:-1])
    assert (take_frames(data), data) == ([frame] * 2, frame[:-1])
