"""A proxy before a Redis server that loses, cuts, delays or halves what passes, when it is told to."""

from __future__ import annotations

import shutil
import socket
import struct
from collections import deque
from contextlib import closing, suppress
from select import select
from threading import Event, Lock, Thread
from typing import Literal, Self, get_args

from .servers import HOST, private_folder

CONNECT_MOST_S = 5.0
CLOSE_MOST_S = 10.0
PIECE_BYTES = 1 << 16
MARKERS = (b"EVALSHA", b"EVAL")
# Closed with this, a TCP socket is reset.
RESET = struct.pack("ii", 1, 0)

Address = str | tuple[str, int]
Fault = Literal["pass", "cut_before", "cut_after", "swallow", "delay", "late", "half", "reset", "black_hole"]


def frame_end(data: bytes | bytearray, start: int = 0) -> int | None:
    """Where the command or answer that begins at `start` ends, or None while a part of it is to come."""
    line_end = data.find(b"\r\n", start)
    if line_end < 0:
        return None
    kind, rest, end = data[start : start + 1], bytes(data[start + 1 : line_end]), line_end + 2
    if kind in (b"$", b"=", b"!"):
        size = int(rest)
        end += size + 2 if size >= 0 else 0
        return end if end <= len(data) else None
    if kind in (b"*", b"~", b">", b"%", b"|"):
        # A map is pairs; an attribute is a map with the answer that it speaks of after it.
        parts = int(rest) * (2 if kind in (b"%", b"|") else 1) + (kind == b"|")
        for _ in range(parts):
            next_end = frame_end(data, end)
            if next_end is None:
                return None
            end = next_end
    return end


def take_frames(data: bytearray) -> list[bytes]:
    """The whole commands or answers at the front of what was received, which are then gone from it."""
    frames = []
    while data and (end := frame_end(data)) is not None:
        frames.append(bytes(data[:end]))
        del data[:end]
    return frames


class Proxy:
    """Passes commands and answers, in threads, between `with` and its end; it is no place for subscriptions."""

    def __init__(self, upstream: Address, *, tcp: bool = False, markers: tuple[bytes, ...] = MARKERS) -> None:
        self.upstream = upstream
        self.markers = markers
        self.forwarded = 0
        self.left = 0
        self._fault: Fault = "pass"
        self._seconds = 0.0
        self._has_tcp = tcp
        self._mutex = Lock()
        self._closed = Event()

    def __enter__(self) -> Self:
        self._folder = private_folder()
        self._listener = socket.socket(socket.AF_INET if self._has_tcp else socket.AF_UNIX)
        self._listener.bind((HOST, 0) if self._has_tcp else str(self._folder / "socket"))
        self._listener.listen()
        self.address: Address = self._listener.getsockname()
        self._passages: list[_Passage] = []
        self._door = Thread(target=self._accept, daemon=True)
        self._door.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        connect(self.address).close()  # the door wakes, and finds that it is to close
        end(self._door)
        self._listener.close()
        for passage in self._passages:
            passage.close()
        shutil.rmtree(self._folder)

    @property
    def url(self) -> str:
        """Where it listens, as redis-py reads it."""
        return f"unix://{self.address}" if isinstance(self.address, str) else "redis://{}:{}".format(*self.address)

    def arm(self, fault: Fault, *, times: int = 1, seconds: float = 0.0) -> None:
        """The next marked commands, so many of them, meet a fault; afterwards they pass again.

        cut_before: the connection closes, and the server never saw the command.
        cut_after: the server answered, and the connection closes without a byte of it.
        swallow: the answer is dropped, and the connection stays: the next answer comes in its place.
        delay: the answer is handed over so many seconds after the server gave it.
        late: the command is handed to the server so many seconds after it came, even if nobody waits for it any more.
        half: half of the answer's bytes are handed over, and the connection closes.
        reset: the server answered, and the connection is reset; a UNIX socket knows no reset.
        black_hole: from this command on, the connection takes everything and gives nothing.
        """
        if fault not in get_args(Fault):
            raise ValueError(f"no fault: {fault}")
        if fault == "reset" and not self._has_tcp:
            raise ValueError("a UNIX socket knows no reset: ask for a proxy with tcp=True")
        with self._mutex:
            self._fault, self._seconds, self.left = fault, seconds, 0 if fault == "pass" else times

    def strike(self, command: bytes) -> tuple[Fault, float]:
        """What this command meets, and for how long."""
        with self._mutex:
            if not (self.left and self._is_marked(command)):
                return "pass", 0.0
            self.left -= 1
            return self._fault, self._seconds

    def count(self, command: bytes) -> None:
        """A marked command that is forwarded is counted."""
        with self._mutex:
            self.forwarded += self._is_marked(command)

    def is_open_after(self, seconds: float) -> bool:
        """Whether so many seconds have passed and the proxy is still open."""
        return not self._closed.wait(seconds)

    def _is_marked(self, command: bytes) -> bool:
        """Whether a command is of those that meet faults and are counted."""
        return any(marker in command for marker in self.markers)

    def _accept(self) -> None:
        """Each connection has a passage of its own, until the proxy closes."""
        while True:
            client, _ = self._listener.accept()
            if self._closed.is_set():
                client.close()
                return
            without_delay(client)
            self._passages.append(_Passage(self, client))


class _Passage:
    """One connection, and its thread."""

    def __init__(self, proxy: Proxy, client: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server: socket.socket | None = None
        self._is_black_hole = False
        # What becomes of each answer that is to come.
        self._fates: deque[tuple[Fault, float]] = deque()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Both sockets are closed and the thread has ended."""
        for sock in (self._client, self._server):
            if sock is not None:
                with suppress(OSError):  # it may be closed already
                    sock.shutdown(socket.SHUT_RDWR)
        end(self._thread)

    def _run(self) -> None:
        """All passes until one side, or a fault, closes the connection."""
        with closing(self._client), suppress(OSError), closing(connect(self._proxy.upstream)) as server:
            self._server = server
            asked, answered = bytearray(), bytearray()
            is_open = self._proxy.is_open_after(0)  # or it was closed before there was a server to shut
            while is_open:
                ready, _, _ = select([self._client, server], [], [])
                if self._client in ready:
                    is_open = _receive(self._client, asked) and all(map(self._pass_on, take_frames(asked)))
                if is_open and server in ready:
                    is_open = _receive(server, answered) and all(map(self._hand_over, take_frames(answered)))

    def _pass_on(self, command: bytes) -> bool:
        """Whether the connection stays open after a command."""
        assert self._server is not None
        if self._is_black_hole:
            return True
        fault, seconds = self._proxy.strike(command)
        if fault == "black_hole":
            self._is_black_hole = True
            return True
        if fault == "cut_before" or (fault == "late" and not self._proxy.is_open_after(seconds)):
            return False
        self._fates.append((fault, seconds))
        self._proxy.count(command)
        self._server.sendall(command)
        return True

    def _hand_over(self, answer: bytes) -> bool:
        """Whether the connection stays open after an answer."""
        is_pushed = answer.startswith(b">")  # it answers no command
        fault, seconds = self._fates.popleft() if self._fates and not is_pushed else ("pass", 0.0)
        if fault == "reset":
            self._client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        if fault in ("cut_after", "reset"):
            return False
        if fault == "swallow" or self._is_black_hole:
            return True
        if fault == "delay" and not self._proxy.is_open_after(seconds):
            return False
        self._client.sendall(answer[: len(answer) // 2] if fault == "half" else answer)
        return fault != "half"


def without_delay(sock: socket.socket) -> None:
    """Hand over each answer at once."""
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def connect(address: Address) -> socket.socket:
    """A connection to a socket's path or to a host and port."""
    sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    try:
        sock.settimeout(CONNECT_MOST_S)
        sock.connect(address)
        without_delay(sock)
        sock.settimeout(None)
    except OSError:
        sock.close()
        raise
    return sock


def end(thread: Thread) -> None:
    """A thread that was told to end has ended."""
    thread.join(CLOSE_MOST_S)
    assert not thread.is_alive(), "a thread of the proxy hangs"


def _receive(sock: socket.socket, into: bytearray) -> bool:
    """Whether something came; what came is added."""
    piece = sock.recv(PIECE_BYTES)
    into += piece
    return piece != b""
