"""Which server holds a shard, what it must be, and how often it is asked: pure, as flows of waves.

A flow yields a `Wave`, what to send where, and is sent what came back, a list of replies each or how far it got.
Two drivers in `link.py` run the same flows. `answers` is the flow of every call: it follows a cluster's moves and a
sentinel's new master, sends a script anew where a server does not know it, and asks again, bounded, what failed for a
passing reason. Asking again is safe because all that it carries has an id, or says what it expects to find.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable  # noqa: TC003 - a field of a struct
from typing import TYPE_CHECKING, Any, Protocol

import hiredis
from msgspec import Struct

from gratis.errors import NotExecuted, OutcomeUnknown, StoreError
from gratis.model import Durability
from gratis.stores.redis.wire import Address, Lost, Unsent, packed

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

PAUSE_S = 0.01
PAUSE_MAX_S = 0.32
WITHIN_LEAST_S = 0.05
ASKING = packed("ASKING")
GREET = packed("INFO") + packed("CONFIG", "GET", "appendfsync") + packed("TIME")
GREET_REPLIES = 3
VERSION_MIN = (6, 2)
NOTHING = "; nothing was written"
UNKNOWN = "it may have been written; ask again with the same id"

# What a server says that will pass; each of them means that it did nothing.
PASSING = frozenset({"TRYAGAIN", "LOADING", "CLUSTERDOWN", "BUSY", "READONLY", "MASTERDOWN", "NOREPLICAS"})
_WORDS = "|".join(sorted({*PASSING, "NOSCRIPT", "MOVED", "ASK", "GRATISBEHIND", "GRATISPART"}))
_WORD = re.compile(rf"(?:^|-)({_WORDS})\b ?(.*)")


class Send(Struct, frozen=True):
    """What one server is sent, and how many replies that has."""

    address: Address
    payload: bytes
    replies: int
    is_shard: bool = True
    """Whether it holds a shard: such a server must be a master, and keep what it is given."""
    is_sentinel: bool = False


class Wave(Struct, frozen=True):
    """What goes out together, after a pause."""

    sends: tuple[Send, ...]
    within: float
    """How long this may take, where that is less than a server is usually given."""
    pause: float = 0.0


class Call(Struct, frozen=True):
    """Commands for the server of a slot; a script goes by its digest, or whole where that is not known."""

    slot: int
    command: bytes
    replies: int = 1
    whole: Callable[[], bytes] | None = None
    is_shard: bool = True


Result = list[Any] | Unsent | Lost | StoreError


class Servers(Protocol):
    """Where the servers of a store are."""

    def at(self, slot: int) -> Address | None:
        """The server of a slot, if it is known."""
        ...

    def find(self, within: float) -> Generator[Wave, list[Result], None]:
        """Find out; raises `NotExecuted` if nobody tells."""
        ...

    def forget(self) -> None:
        """What is known may be wrong."""
        ...

    def moved(self, slot: int, address: Address) -> None:
        """A server says that another holds a slot."""
        ...


class One:
    """One server, always the same."""

    def __init__(self, address: Address) -> None:
        self._address = address

    def at(self, slot: int) -> Address | None:  # noqa: ARG002 - one server has every slot
        """The server."""
        return self._address

    def find(self, within: float) -> Generator[Wave, list[Result], None]:  # noqa: ARG002 - nobody is asked
        """It is known."""
        yield from ()

    def forget(self) -> None:
        """It stays the same."""

    def moved(self, slot: int, address: Address) -> None:
        """A single server of a cluster is not the store that was opened."""
        raise StoreError(f"slot {slot} is at {address}: this server is of a cluster; expected the store to know that")


class Sentinels:
    """One master, whose address its sentinels tell."""

    def __init__(self, sentinels: Sequence[Address], service: str) -> None:
        self._sentinels = list(sentinels)
        self._service = service
        self._master: Address | None = None

    def at(self, slot: int) -> Address | None:  # noqa: ARG002 - one server has every slot
        """The master, as the sentinels said last."""
        return self._master

    def find(self, within: float) -> Generator[Wave, list[Result], None]:
        """Ask one sentinel after another."""
        said = "no sentinel was asked"
        ask = packed("SENTINEL", "get-master-addr-by-name", self._service)
        for sentinel in list(self._sentinels):
            (result,) = yield Wave((Send(sentinel, ask, 1, is_shard=False, is_sentinel=True),), within)
            if isinstance(result, list) and isinstance(result[0], list):
                host, port = result[0]
                self._master = Address(host.decode(), int(port))
                self._sentinels = [sentinel, *(other for other in self._sentinels if other != sentinel)]
                return
            said = f"sentinel {sentinel}: {_told(result)}"
        raise NotExecuted(f"no sentinel knows the master of {self._service!r} ({said}); nothing was written")

    def forget(self) -> None:
        """The master may be another by now."""
        self._master = None

    def moved(self, slot: int, address: Address) -> None:
        """Sentinels do not know slots."""
        raise StoreError(f"slot {slot} is at {address}: the master is of a cluster; expected none behind sentinels")


class Cluster:
    """Masters that share the slots."""

    def __init__(self, seeds: Sequence[Address]) -> None:
        self._seeds = list(seeds)
        self._slots: dict[int, Address] = {}
        self._is_stale = True

    def at(self, slot: int) -> Address | None:
        """The master of a slot, as far as is known."""
        return None if self._is_stale else self._slots.get(slot)

    def find(self, within: float) -> Generator[Wave, list[Result], None]:
        """Ask one server after another for the map of the slots."""
        said = "no server was asked"
        known = dict.fromkeys([*self._seeds, *self._slots.values()])
        for server in list(known):
            (result,) = yield Wave((Send(server, packed("CLUSTER", "SLOTS"), 1, is_shard=False),), within)
            if isinstance(result, list) and isinstance(result[0], list) and result[0]:
                self._slots = {
                    slot: Address((master[0] or b"").decode() or server.host, int(master[1]))
                    for first, last, master, *_ in result[0]
                    for slot in range(first, last + 1)
                }
                self._is_stale = False
                return
            said = f"{server}: {_told(result)}"
        raise NotExecuted(f"no server of the cluster tells where its slots are ({said}); nothing was written")

    def forget(self) -> None:
        """A failover or a move of slots may be under way."""
        self._is_stale = True

    def moved(self, slot: int, address: Address) -> None:
        """That slot is there; the map is asked for again when it misleads."""
        self._slots[slot] = address


class _Errand:
    """One call on its way: where to, how, what became of it."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.is_whole = False
        self.asking: Address | None = None
        self.is_over = False
        self.is_slow = False
        self.answer: Any = NotExecuted("the cluster did not settle where a slot is; nothing was written")
        self._was_lost = False
        self._redirects = 0
        self._asked = Address("")

    def send(self, servers: Servers) -> Send | None:
        """What goes out for it this time; nothing if nobody is known to serve its slot."""
        payload = self.call.whole() if self.is_whole and self.call.whole is not None else self.call.command
        if self.asking is not None:
            self._asked = self.asking
            return Send(self.asking, ASKING + payload, 1 + self.call.replies, self.call.is_shard)
        address = servers.at(self.call.slot)
        if address is None:
            return None
        self._asked = address
        return Send(address, payload, self.call.replies, self.call.is_shard)

    def take(self, result: Result, servers: Servers) -> None:
        """Take what came back: an answer, or a reason to go again."""
        self.asking, self.is_slow = None, False
        if not isinstance(result, list):
            self._failed(result, servers)
            return
        own = result[-self.call.replies :]  # before it stands what ASKING is answered
        reply = own[0]
        if not isinstance(reply, hiredis.ReplyError):
            self.answer, self.is_over = own, True
            return
        word, rest = said(reply)
        if word == "NOSCRIPT" and self.call.whole is not None and not self.is_whole:
            self.is_whole = True
        elif word in {"MOVED", "ASK"}:
            self._redirects += 1
            self.is_slow = self._redirects > 1  # servers that disagree need a moment
            target = _target(rest, self._asked)
            if word == "MOVED":
                servers.moved(self.call.slot, target)
            else:
                self.asking = target
        elif word in PASSING:
            self._wait(NotExecuted(f"the server says {reply}; nothing was written"), servers)
        else:
            self._end(refusal(reply))

    def _failed(self, result: Unsent | Lost | StoreError, servers: Servers) -> None:
        if isinstance(result, StoreError) and not isinstance(result, NotExecuted):
            self._end(NotExecuted(f"{result}{NOTHING}"))
            return
        self._was_lost = self._was_lost or isinstance(result, Lost)
        self._wait(
            result if isinstance(result, NotExecuted) else NotExecuted(f"{result}; nothing was written"), servers
        )

    def _end(self, error: StoreError) -> None:
        """No other attempt can help; what an earlier one did is another matter."""
        self.answer, self.is_over = error, True
        if isinstance(error, Behind):
            error.was_lost = error.was_lost or self._was_lost
        elif self._was_lost:
            self.answer = OutcomeUnknown(f"{error.args[0].removesuffix(NOTHING)}; {UNKNOWN}")

    def _wait(self, error: StoreError, servers: Servers) -> None:
        self.answer, self.is_slow = error, True
        if self._was_lost:
            self.answer = OutcomeUnknown(f"{error.args[0].removesuffix(NOTHING)}; {UNKNOWN}")
        servers.forget()


def answers(
    servers: Servers, calls: Sequence[Call], *, timer: Callable[[], float], patience: float
) -> Generator[Wave, list[Result], list[Any]]:
    """Have each call answered: by its replies, or by the error that says what became of it."""
    addresses = [servers.at(call.slot) for call in calls]
    results: list[Result] = []
    if None not in addresses:  # nearly always: every server is known, and answers at once
        pairs = zip(calls, addresses, strict=True)
        sends = tuple([Send(at, call.command, call.replies, call.is_shard) for call, at in pairs if at])
        results = yield Wave(sends, math.inf)
        if all(type(result) is list and not isinstance(result[0], hiredis.ReplyError) for result in results):
            return results
    return (yield from _persist(servers, calls, results, timer=timer, patience=patience))


def _persist(
    servers: Servers, calls: Sequence[Call], first: list[Result], *, timer: Callable[[], float], patience: float
) -> Generator[Wave, list[Result], list[Any]]:
    """Have calls answered of which some were not at first."""
    errands = [_Errand(call) for call in calls]
    ends, pause = timer() + patience, 0.0
    for errand, result in zip(errands, first, strict=False):
        errand.take(result, servers)
        pause = PAUSE_S if errand.is_slow else pause
    pending = [errand for errand in errands if not errand.is_over]
    while pending and not (pause and timer() + pause + WITHIN_LEAST_S >= ends):
        within = max(WITHIN_LEAST_S, ends - pause - timer()) if first else math.inf
        sends: list[Send | None] = [None] * len(pending)
        reason = "no server of the cluster has this slot"
        try:
            if any(servers.at(errand.call.slot) is None for errand in pending):
                yield from servers.find(within)
            sends = [errand.send(servers) for errand in pending]
        except NotExecuted as error:
            reason = error.args[0].removesuffix(NOTHING)
        answered = iter((yield Wave(tuple([send for send in sends if send is not None]), within, pause)))
        results: list[Result] = [Unsent(reason) if send is None else next(answered) for send in sends]
        for errand, result in zip(pending, results, strict=True):
            errand.take(result, servers)
        pending = [errand for errand in pending if not errand.is_over]
        pause = min(PAUSE_MAX_S, pause * 2 or PAUSE_S) if any(errand.is_slow for errand in pending) else 0.0
    return [errand.answer for errand in errands]


def said(error: Exception) -> tuple[str, str]:
    """The word of a server's error, and what follows; older servers wrap it when it comes out of a script."""
    found = _WORD.search(str(error))
    return (found[1], found[2]) if found else ("", "")


def refusal(reply: Exception) -> StoreError:
    """What a server's error means. All but GRATISPART are given before anything was written."""
    text = str(reply)
    word, rest = said(reply)
    if word in {"GRATISBEHIND", "GRATISPART"}:
        return Behind(int(rest.split()[0]), was_lost=word == "GRATISPART")
    return NotExecuted(f"the server says {text}; nothing was written")


class Behind(NotExecuted):
    """The state of a shard does not reach as far as its ledger, or as what this process has seen."""

    def __init__(self, last: int, *, was_lost: bool) -> None:
        self.last = last
        self.was_lost = was_lost  # whether a part, or an earlier attempt, may have been written
        super().__init__(f"the state of a shard ends at decision {last}; nothing was written")


class Greeted(Struct, frozen=True):
    """What a server said of itself when it was met."""

    version: tuple[int, ...]
    mode: str
    durability: Durability
    now: int


def met(address: Address, replies: Sequence[Any]) -> Greeted:
    """Read a server's greeting; one that may not hold a store is refused."""
    info, setting, time = replies
    for reply in (info, time):
        if isinstance(reply, hiredis.ReplyError):
            raise NotExecuted(f"{address}: the server says {reply}; expected a user who may run INFO and TIME")
    found = dict(line.split(":", 1) for line in info.decode(errors="replace").splitlines() if ":" in line)
    version = tuple(int(part) for part in found.get("redis_version", "0").split(".") if part.isdigit())
    if found.get("loading", "0") != "0" or found.get("async_loading", "0") != "0":
        raise NotExecuted(f"{address}: the server is loading its data; nothing was written")
    if found.get("role") != "master":
        raise NotExecuted(f"{address}: it is a {found.get('role')}; expected a master; nothing was written")
    if version < VERSION_MIN:
        raise StoreError(f"{address}: Redis {found.get('redis_version')}; expected 6.2 or newer (XTRIM MINID)")
    policy = found.get("maxmemory_policy", "noeviction")
    if policy != "noeviction" and found.get("maxmemory", "0") != "0":
        raise StoreError(
            f"{address}: maxmemory-policy is {policy}, which deletes what was decided; expected noeviction"
        )
    if found.get("aof_enabled", "0") != "1":
        durability = Durability.VOLATILE
    elif isinstance(setting, list) and setting[1:2] == [b"always"]:
        durability = Durability.SYNCED
    else:
        durability = Durability.JOURNALED
    return Greeted(version, found.get("redis_mode", "standalone"), durability, int(time[0]) * 1_000_000 + int(time[1]))


def _target(text: str, asked: Address) -> Address:
    """The address in `slot host:port`; without a host it is that of who says so."""
    host, _, port = text.split()[1].rpartition(":")
    return Address(host or asked.host, int(port))


def _told(result: Result) -> str:
    return str(result[0]) if isinstance(result, list) else str(result)
