"""A bench for the store on Redis: a private server, views on it, what its keys hold, and scripts that were altered."""

from __future__ import annotations

import socket
from contextlib import contextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

import hiredis
import pytest

from gratis import Meter
from gratis.audit.fold import Audit
from gratis.stores import Bounds
from gratis.stores.redis import calls, layout, trim
from gratis.stores.redis.core import PROBE
from gratis.stores.redis.url import open_redis
from gratis.testing.compare import follows, same, tallies
from gratis.testing.scene import ENROLLED, NOON, Clock, small_offer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from gratis import Enrollment
    from gratis.stores.redis import RedisStore

    from .servers import Server

NAMES = ("apply.lua", "hold.lua", "swap.lua", "trim.lua")
STORE = b"{gratis:store}"
SALT = "0123456789abcdef" * 2  # one for all tests, so that keys and fields of the index have the same names each time
SHARD = layout.shards("gratis", 1, SALT.encode())[0]
ANSWER_MOST_S = 20.0
READ = {
    b"hash": ("HGETALL",), b"stream": ("XRANGE", "-", "+"), b"string": ("GET",), b"zset": ("ZRANGE", "0", "-1"),
    b"list": ("LRANGE", "0", "-1"), b"set": ("SMEMBERS",),
}  # fmt: skip


def text_of(name: str) -> str:
    """The text of a script as it ships."""
    return files("gratis.stores.redis").joinpath(name).read_text(encoding="utf-8")


class _Folder:
    """The folder of the scripts, with some of them altered."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts
        self._name = ""

    def joinpath(self, name: str) -> _Folder:
        """The file of this name."""
        self._name = name
        return self

    def read_bytes(self) -> bytes:
        """What the file says."""
        return (self._texts.get(self._name) or text_of(self._name)).encode()


@contextmanager
def altered(texts: Mapping[str, str]) -> Iterator[None]:
    """Every store that is opened meanwhile has these scripts in the place of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "files", lambda _: _Folder(texts))
        patch.setattr(trim, "TRIM", calls.Script("trim.lua"))
        yield


@contextmanager
def planted(store: RedisStore, raw: Raw, texts: Mapping[str, str]) -> Iterator[None]:
    """An open store has these scripts for a while, which the server knows already."""
    raw.load(texts)
    with altered(texts), pytest.MonkeyPatch.context() as patch:
        patch.setattr(store._core._calls, "_script", calls.Script("apply.lua"))
        patch.setattr(store._core.asking, "_swap", calls.Script("swap.lua"))
        patch.setattr(store._core.holding, "_script", calls.Script("hold.lua"))
        yield


class Kept(NamedTuple):
    """A record as it stands in the ledger: the number of its decision, its account by number, the request's id."""

    number: int
    account: bytes
    id: str


class Aside(NamedTuple):
    """A hold as it stands in the state: its account, its id as records have it, its end, what it set aside, where."""

    account: bytes
    id: bytes
    till: bytes
    tokens: int
    place: bytes

    @property
    def member(self) -> bytes:
        """Its member of the sorted set."""
        return b"%b\0%b%b" % (self.account, self.till, self.id)


def holds_of(state: Mapping[bytes, bytes]) -> list[Aside]:
    """Every hold of a state."""
    found: list[Aside] = []
    for name, text in state.items():
        if name.startswith(b"h") and text:
            offer, account, id_bytes = name[1:].split(b"\0", 2)
            line, place, _ = text.split(b"\n", 2)
            till, tokens, *_ = line.split()
            found.append(Aside(offer + b"\0" + account, id_bytes, till, int(tokens), place))
    return found


class Raw:
    """A connection to a server on which replies are read as they come."""

    def __init__(self, path: str) -> None:
        self._reader = hiredis.Reader()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(ANSWER_MOST_S)
        self._socket.connect(path)

    def ask(self, *words: bytes | str | int) -> Any:
        """The reply to a command; an error is raised."""
        return self.ask_all([words])[0]

    def ask_all(self, commands: list[tuple[bytes | str | int, ...]]) -> list[Any]:
        """The reply to each of several commands, sent at once; the first error is raised."""
        self._socket.sendall(b"".join(hiredis.pack_command(words) for words in commands))
        replies: list[Any] = []
        while len(replies) < len(commands):
            reply = self._reader.gets()
            if reply is False:
                self._reader.feed(self._socket.recv(1 << 16))
            else:
                replies.append(reply)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    def close(self) -> None:
        """Close it."""
        self._socket.close()

    def load(self, texts: Mapping[str, str]) -> None:
        """The server knows the scripts, those that were altered among them."""
        self.ask_all([("SCRIPT", "LOAD", texts.get(name) or text_of(name)) for name in NAMES])

    def contents(self) -> dict[bytes, Any]:
        """Each key of the server, and what it holds."""
        keys = self.ask("KEYS", "*")
        kinds = self.ask_all([("TYPE", key) for key in keys])
        read = [READ[kind] for kind in kinds]
        found = self.ask_all([(words[0], key, *words[1:]) for words, key in zip(read, keys, strict=True)])
        return {
            key: dict(zip(value[::2], value[1::2], strict=True)) if kind == b"hash" else value
            for key, kind, value in zip(keys, kinds, found, strict=True)
        }

    def state(self) -> dict[bytes, bytes]:
        """Every field of the state."""
        words = self.ask("HGETALL", SHARD.state)
        return dict(zip(words[::2], words[1::2], strict=True))

    def holds(self) -> list[Aside]:
        """Every hold of the state."""
        return holds_of(self.state())

    def members(self) -> list[bytes]:
        """Every member of the sorted set, but for the one that keeps it."""
        return [member for member in self.ask("ZRANGE", SHARD.holds, 0, -1) if member != PROBE]

    def ledger(self) -> list[Kept]:
        """Every record of the ledger, whose entries follow each other without a gap."""
        found: list[Kept] = []
        for entry, fields in self.ask("XRANGE", SHARD.ledger, "-", "+"):
            last, zero = entry.split(b"-")
            assert zero == b"0", entry
            pairs = zip(fields[::2], fields[1::2], strict=True)
            records = [layout.read_record(value) for name, value in pairs if name == b"r"]
            first = int(last) - len(records) + 1
            assert records, "an entry of nothing"
            assert not found or first == found[-1].number + 1, "a gap between entries"
            found += [Kept(first + place, one.account, one.request_id) for place, one in enumerate(records)]
        return found


ERRORS = (
    "OOM command not allowed when used memory > 'maxmemory'.",
    "NOPERM this user has no permissions to run the command",
    "READONLY You can't write against a read only replica.",
    "WRONGTYPE Operation against a key holding the wrong kind of value",
)
# In front of a script: of all calls of the server that the script makes, those from the first to the last one fail, and
# do nothing. What a script raises is a table from Redis 7 on, and was a text before, with a dash in it.
WRAPPER = """
local redis = (function(raw)
  local text = "{text}"
  local function fails()
    local count = raw.call('INCR', 'calls')
    return {first} <= count and count <= {last}
  end
  return setmetatable({{
    call = function(...)
      if fails() then error(raw.acl_check_cmd and {{ err = text }} or '-' .. text) end
      return raw.call(...)
    end,
    pcall = function(...)
      if fails() then return {{ err = text }} end
      return raw.pcall(...)
    end,
  }}, {{ __index = raw }})
end)(redis)
"""
EVER = 1_000_000


class Fault(NamedTuple):
    """Which of a script's calls fail, and with what error."""

    first: int
    last: int
    text: str = ""

    def planted_in(self, text: str) -> str:
        """A script with it."""
        return WRAPPER.format(**self._asdict()).replace("\n", " ") + text


class Bench:
    """A server, stores opened on it under one clock, and what fails in their scripts."""

    def __init__(self, server: Server, *, options: str = "") -> None:
        self.server = server
        self.clock = Clock()
        self.texts: Mapping[str, str] = {}
        self._options = options
        self._opened: list[RedisStore] = []
        self.connect()

    def connect(self) -> None:
        """The server is connected, and knows the scripts."""
        self.raw = Raw(self.server.address)
        self.raw.load({})

    def reset(self) -> None:
        """Nobody has used the server, and it is noon."""
        self.close_stores()
        self.raw.ask("FLUSHALL")
        self.raw.ask("HSET", STORE, "salt", SALT)
        self.clock.now = NOON

    def store(self, *, bounds: Bounds | None = Bounds(), options: str = "") -> RedisStore:
        """One more view on the store, which asks once, not again: the server knows the scripts already."""
        url = f"unix://{self.server.address}?wait=0.001{self._options}{options}"
        opened = open_redis(url, clock=self.clock, bounds=bounds)
        self._opened.append(opened)
        return opened

    def meter(self, window: str = "day", *, assume: Enrollment | None = ENROLLED, options: str = "") -> Meter:
        """A meter before one more view."""
        return Meter(self.store(options=options), small_offer(window), assume=assume)

    def failing(self, meter: Meter, script: str, fault: Fault) -> AbstractContextManager[None]:
        """A script of a meter's store fails like this."""
        text = self.texts.get(script) or text_of(script)
        return planted(meter._store, self.raw, {**self.texts, script: fault.planted_in(text)})

    def close_stores(self) -> None:
        """Close what was opened."""
        while self._opened:
            self._opened.pop().close()

    def close(self) -> None:
        """Close everything."""
        self.close_stores()
        self.raw.close()


def faults_of(count: int) -> Iterator[Fault]:
    """Each call fails, with each error: alone, or with all that follow."""
    for first in range(1, count + 1):
        for text in ERRORS:
            yield Fault(first, first, text)
            if first < count:
                yield Fault(first, EVER, text)


def check(meter: Meter) -> None:
    """The ledger follows from the rule, the tallies from the ledger, and the accounts are those of both."""
    store = meter._store
    audit = Audit(lambda _: meter.offer)
    entries = list(store.entries())
    same(list(audit.findings(entries)), [], "findings in the ledger")
    for account in {entry.decision.account for entry in entries}:
        counters = tallies(store, meter.offer.name, account)
        same(list(audit.counters(meter.offer.name, account, counters)), [], "findings in the tallies")
    audit.close()
    follows(store, [meter.offer.name])


def check_holds(raw: Raw) -> list[Aside]:
    """What is set aside is the sum over the holds that are there, each of which is found when it runs out: these."""
    return check_held(raw.state(), raw.members())


def check_held(state: Mapping[bytes, bytes], members: Sequence[bytes]) -> list[Aside]:
    """The same, of a state and the members of its sorted set."""
    holds = holds_of(state)
    sums: dict[bytes, int] = {}
    for hold in holds:
        assert hold.member in members, f"{hold} is not found by its end"
        first = state.get(b"x" + hold.account, b"")
        assert b"" < first <= hold.till, f"{hold} is not looked for in time, but at {first!r}"
        if hold.tokens:
            name = b"g%b\0%b" % (hold.account, hold.place)
            sums[name] = sums.get(name, 0) + hold.tokens
    found = {name: int(value) for name, value in state.items() if name.startswith(b"g") and value}
    same(found, sums, "what is set aside")
    return holds
