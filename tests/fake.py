"""The server that fakeredis plays, on a socket: one more opinion on the scripts, with a Lua of its own.

fakeredis knows neither INFO nor the append-only setting, so these are answered here; and its scripts have no
`redis.sha1hex`, so they are given one.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack, contextmanager
from hashlib import sha1
from socketserver import BaseRequestHandler, ThreadingUnixStreamServer
from typing import TYPE_CHECKING

import hiredis
import redis
from fakeredis import FakeRedis, FakeServer
from fakeredis._clients._tcp_server import encode_reply

from .servers import private_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

INFO = b"redis_version:7.0.0\r\nredis_mode:standalone\r\nrole:master\r\nloading:0\r\naof_enabled:0\r\n"
READ_BYTES = 65_536
RESP2 = 2
NOTHING = object()


class Handler(BaseRequestHandler):
    """One client."""

    def handle(self) -> None:
        """Answer commands until the client goes."""
        reader = hiredis.Reader(notEnoughData=NOTHING)
        with FakeRedis(server=self.server.fake, protocol=RESP2) as client:
            while data := self.request.recv(READ_BYTES):
                reader.feed(data)
                while (command := reader.gets()) is not NOTHING:
                    with self.server.one_at_a_time:
                        answer = answered(client, command)
                    self.request.sendall(answer)


def answered(client: FakeRedis, command: list[bytes]) -> bytes:
    """What a server would answer."""
    name = command[0].upper()
    if name == b"INFO":
        return b"$%d\r\n%b\r\n" % (len(INFO), INFO)
    if name == b"CONFIG":
        return b"*0\r\n"
    connection = client.connection_pool.get_connection()
    try:
        connection.send_command(*command)
        reply = connection.read_response()
    except redis.RedisError as error:
        reply = error
    finally:
        client.connection_pool.release(connection)
    return encode_reply(reply, RESP2, nested=not isinstance(reply, Exception))


class FakeSocketServer(ThreadingUnixStreamServer):
    """Serves one fake server's data; a command at a time, as a real one does."""

    daemon_threads = True

    def __init__(self, path: str) -> None:
        self.fake = FakeServer(version=(7,))
        with FakeRedis(server=self.fake) as client:
            client.eval("return 1", 0)  # with its first script a server gets its Lua
        give = self.fake._lua_runtime.eval(b"function(f) redis.sha1hex = f end")
        give(lambda text: sha1(text, usedforsecurity=False).hexdigest().encode())
        self.one_at_a_time = threading.Lock()
        super().__init__(path, Handler)


@contextmanager
def fake_server() -> Iterator[str]:
    """Where it listens, as a URL."""
    with ExitStack() as stack:
        folder = private_folder()
        path = folder / "fake.sock"
        server = stack.enter_context(FakeSocketServer(str(path)))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        stack.callback(folder.rmdir)
        stack.callback(path.unlink)
        stack.callback(thread.join)
        stack.callback(server.shutdown)
        yield f"unix://{path}"
