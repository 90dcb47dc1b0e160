"""Which store a URL names. A new kind of store is one more row of `OPENERS`."""

from __future__ import annotations

import re
from collections.abc import Callable  # noqa: TC003 - a field of a struct
from datetime import datetime  # noqa: TC003 - a field of a struct
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from msgspec import Struct

from gratis import clock as system
from gratis.errors import StoreError
from gratis.stores import Bounds
from gratis.stores.memory import MemoryStore
from gratis.stores.redis.url import open_redis
from gratis.stores.sqlite import WAIT_S, SQLiteStore, Synchronous

if TYPE_CHECKING:
    from gratis.stores import Store

DEFAULT_URL = "sqlite:///gratis.db"
WAIT_MAX_S = 3_600.0
_SECRET = re.compile(r"(?<=//).*(?=@)|(?<=password=)[^&#]*")
SQLITE_FORM = "sqlite:///FILE (relative) or sqlite:////FOLDER/FILE (absolute)"
EXPECTED = f"memory:, {SQLITE_FORM}, redis://HOST:PORT, rediss://…, unix:///SOCKET or redis+sentinel://HOST,…/MASTER"


class Opening(Struct, frozen=True, kw_only=True):
    """How to open a store, whatever its kind."""

    clock: Callable[[], datetime]
    bounds: Bounds | None
    is_checked: bool
    must_exist: bool


def open_store(
    url: str,
    *,
    clock: Callable[[], datetime] = system.now,
    bounds: Bounds | None = Bounds(),
    is_checked: bool = True,
    must_exist: bool = False,
) -> Store:
    """Open the store that a URL names.

    Who only reads says that it `must_exist`: a mistyped name is no empty store. An audit opens it unchecked, since
    it looks at what a check would refuse.
    """
    if must_exist and not exists(url):
        raise StoreError(f"store {_safe(url)!r}: there is none; `gratis enroll` and `gratis decide` make one")
    return _kind(url)(url, Opening(clock=clock, bounds=bounds, is_checked=is_checked, must_exist=must_exist))


def exists(url: str) -> bool:
    """Whether opening it may find a store; of a server only opening it tells."""
    return _kind(url) is not _sqlite or Path(_sqlite_path(url)).exists()


def _kind(url: str) -> Callable[[str, Opening], Store]:
    kind = _split(url).scheme
    if kind not in OPENERS:
        raise StoreError(f"store {_safe(url)!r}: unknown kind {kind!r}; expected {EXPECTED}")
    return OPENERS[kind]


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:
        why = "it cannot be read" if "@" in url else error  # which may repeat a secret
        raise StoreError(f"store {_safe(url)!r}: {why}; expected {EXPECTED}") from None


def _safe(url: str) -> str:
    """The URL without what is secret in it."""
    return _SECRET.sub("…", url)


def _memory(url: str, opening: Opening) -> Store:
    if url != "memory:":
        raise StoreError(f"store {url!r}: expected just memory:")
    return MemoryStore(clock=opening.clock, bounds=opening.bounds)


def _sqlite_path(url: str) -> str:
    parts = _split(url)
    path = unquote(parts.path.removeprefix("/"))
    if path == ":memory:":
        raise StoreError(f"store {url!r}: no write-ahead log in memory; expected memory:")
    if not url.startswith("sqlite:///") or not path or parts.fragment or "\0" in path:
        raise StoreError(f"store {url!r}: expected {SQLITE_FORM}")
    return path


def _sqlite(url: str, opening: Opening) -> Store:
    options = dict(parse_qsl(_split(url).query, keep_blank_values=True))
    synchronous, wait = options.pop("synchronous", "full"), options.pop("wait", str(WAIT_S))
    if options:
        raise StoreError(f"store {url!r}: unknown option {min(options)!r}; expected synchronous or wait")
    if synchronous not in set(Synchronous):
        raise StoreError(f"store {url!r}: synchronous={synchronous}; expected one of {', '.join(Synchronous)}")
    try:
        wait_s = float(wait)
    except ValueError:
        wait_s = -1.0
    if not 0 <= wait_s <= WAIT_MAX_S:
        raise StoreError(f"store {url!r}: wait={wait}; expected seconds from 0 to {WAIT_MAX_S:g}")
    return SQLiteStore(
        _sqlite_path(url),
        clock=opening.clock,
        bounds=opening.bounds,
        synchronous=Synchronous(synchronous),
        wait_s=wait_s,
        is_checked=opening.is_checked,
    )


def _redis(url: str, opening: Opening) -> Store:
    # A server's own clock is the one that all of its callers share.
    clock = None if opening.clock is system.now else opening.clock
    return open_redis(
        url, clock=clock, bounds=opening.bounds, must_exist=opening.must_exist, is_checked=opening.is_checked
    )


_SERVERS = ("redis", "rediss", "unix", "valkey", "valkeys", "redis+sentinel", "rediss+sentinel", "redis+cluster",
            "rediss+cluster")  # fmt: skip
OPENERS: Final = {"memory": _memory, "sqlite": _sqlite, **dict.fromkeys(_SERVERS, _redis)}
