"""The wire to one server: commands out, replies back, each in its place.

A connection sends what it is given once and never again: whether to ask anew is decided above, where the ids are.
What went wrong is told by how far it got: `Unsent` never reached the server, `Lost` may have been done.
"""

from __future__ import annotations

import asyncio
import socket
import ssl  # noqa: TC003 - a field of a struct
from collections import deque
from typing import TYPE_CHECKING, Any, cast

import hiredis
from msgspec import Struct

from gratis.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

NOTHING = object()
READ_BYTES = 65_536
IN_FLIGHT_MAX = 1_024


class Unsent(Exception):  # noqa: N818 - it says how far a command got
    """No server has seen the command."""


class Lost(Exception):  # noqa: N818 - as above
    """The command was sent, and no answer came."""


class Address(Struct, frozen=True):
    """Where a server listens: a Unix socket's path, or a host and a port."""

    host: str
    port: int = 0

    def __str__(self) -> str:
        return f"{self.host}:{self.port}" if self.port else self.host


class Access(Struct, frozen=True, kw_only=True):
    """How to get in: the same for every server of a store. Its secrets are never shown."""

    username: str | None = None
    password: str | None = None
    db: int = 0
    tls: ssl.SSLContext | None = None
    timeout: float = 2.0

    def __repr__(self) -> str:
        return f"Access(db={self.db}, tls={self.tls is not None}, timeout={self.timeout})"


def packed(*parts: bytes | str | int) -> bytes:
    """A command as the protocol has it."""
    out = [b"*%d\r\n" % len(parts)]
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        out.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(out)


def greeting(access: Access, greet: bytes, replies: int) -> tuple[bytes, int]:
    """What is said first on a connection: who this is, which database, and what `greet` asks."""
    said = []
    if access.password is not None:
        said.append(packed("AUTH", *([access.username] if access.username else []), access.password))
    if access.db:
        said.append(packed("SELECT", access.db))
    return b"".join(said) + greet, len(said) + replies


def greeted(address: Address, found: list[Any], replies: int) -> list[Any]:
    """The replies to `greet`, if the server let us in."""
    for reply in found[: len(found) - replies]:
        if isinstance(reply, hiredis.ReplyError):
            # Only how it begins: what follows may repeat what it was told.
            raise StoreError(f"{address}: the server does not let us in: {str(reply).split(', with args')[0]}")
    return found[len(found) - replies :]


class Connection:
    """A blocking connection to one server, for one thread at a time."""

    def __init__(self, address: Address, access: Access, within: float) -> None:
        self._reader = hiredis.Reader(notEnoughData=NOTHING)
        self._usual = access.timeout
        self._timeout = min(access.timeout, within)
        try:
            self._socket = _connected(address, access, self._timeout)
        except (OSError, ValueError) as error:
            raise Unsent(f"{address}: {error}") from error

    def allow(self, within: float) -> None:
        """How long each step may take from now on: the usual time, or what is left of it."""
        timeout = min(self._usual, within)
        if timeout != self._timeout:
            self._timeout = timeout
            self._socket.settimeout(timeout)

    def send(self, payload: bytes) -> None:
        """Send commands; a part that was sent may be enough for some of them."""
        try:
            self._socket.sendall(payload)
        except OSError as error:
            raise Lost(f"the connection broke while it was written: {error!r}") from error

    def read(self, replies: int) -> list[Any]:
        """So many replies, in order."""
        found: list[Any] = []
        try:
            while True:
                reply = self._reader.gets()
                if reply is not NOTHING:
                    found.append(reply)
                    if len(found) == replies:
                        return found
                    continue
                data = self._socket.recv(READ_BYTES)
                if not data:
                    raise Lost("the connection was closed before the answer came")
                self._reader.feed(data)
        except (OSError, hiredis.ProtocolError) as error:
            raise Lost(f"no answer came: {error!r}") from error

    def close(self) -> None:
        """Close it; the server hears of it."""
        self._socket.close()


def _connected(address: Address, access: Access, timeout: float) -> socket.socket:
    if not address.port:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            made.settimeout(timeout)
            made.connect(address.host)
        except BaseException:
            made.close()
            raise
        return made
    made = socket.create_connection((address.host, address.port), timeout=timeout)
    try:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return made if access.tls is None else access.tls.wrap_socket(made, server_hostname=address.host)
    except BaseException:
        made.close()
        raise


class AsyncConnection(asyncio.Protocol):
    """A connection for asyncio. Each call has its place in the row; who stops waiting leaves the place behind."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader(notEnoughData=NOTHING)
        self._row: deque[tuple[int, list[Any], asyncio.Future[list[Any]]]] = deque()
        self._transport: asyncio.Transport | None = None
        self.end_of_loop = self._closed_with_the_loop()
        self.error: Exception | None = None

    @classmethod
    async def open(cls, address: Address, access: Access) -> AsyncConnection:
        """Connect to a server."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(access.timeout):
                if not address.port:
                    _, made = await loop.create_unix_connection(cls, address.host)
                else:
                    _, made = await loop.create_connection(
                        cls,
                        address.host,
                        address.port,
                        ssl=access.tls,
                        server_hostname=None if access.tls is None else address.host,
                    )
        except (OSError, ValueError) as error:
            raise Unsent(f"{address}: {error}") from error
        await anext(made.end_of_loop)
        return made

    async def _closed_with_the_loop(self) -> AsyncGenerator[None, None]:
        """A loop that ends closes what generates asynchronously: so it closes this connection, too."""
        try:
            yield
        finally:
            self.close()
            await asyncio.sleep(0)

    def ask(self, payload: bytes, replies: int) -> asyncio.Future[list[Any]]:
        """Send commands; the future has their replies, or says `Lost`."""
        answer: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        if self.error is not None or self._transport is None:
            answer.set_exception(Unsent(f"the connection is closed: {self.error!r}"))
        elif len(self._row) >= IN_FLIGHT_MAX:
            answer.set_exception(Unsent(f"{IN_FLIGHT_MAX} calls are in flight already"))
        else:
            self._row.append((replies, [], answer))
            self._transport.write(payload)
        return answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As asyncio calls it."""
        self._transport = cast("asyncio.Transport", transport)  # a stream has one, whichever loop this is

    def data_received(self, data: bytes) -> None:
        """As asyncio calls it."""
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not NOTHING:
                replies, found, answer = self._row[0]
                found.append(reply)
                if len(found) == replies:
                    self._row.popleft()
                    if not answer.done():
                        answer.set_result(found)
        except (hiredis.ProtocolError, IndexError) as error:
            self.close(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio calls it."""
        self._end(exc or ConnectionError("the connection was closed"))

    def close(self, error: Exception | None = None) -> None:
        """Break it off: what is in flight is lost."""
        self._end(error or ConnectionError("the connection was closed"))
        if self._transport is not None:
            self._transport.abort()

    def _end(self, error: Exception) -> None:
        self.error = self.error or error
        while self._row:
            answer = self._row.popleft()[2]
            if not answer.done():
                answer.set_exception(Lost(f"no answer came: {error!r}"))
                answer.exception()  # whoever waited may have gone
