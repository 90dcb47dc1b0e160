"""Which store a URL names. A new kind of store is one more row of `OPENERS`."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, urlsplit

from gratis import clock as system
from gratis.errors import StoreError
from gratis.stores import Bounds
from gratis.stores.memory import MemoryStore
from gratis.stores.sqlite import WAIT_S, SQLiteStore, Synchronous

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from gratis.stores import Store

DEFAULT_URL = "sqlite:///gratis.db"
EXPECTED = "memory: or sqlite:///FILE (relative) or sqlite:////FOLDER/FILE (absolute)"


def open_store(
    url: str,
    *,
    clock: Callable[[], datetime] = system.now,
    bounds: Bounds | None = Bounds(),
    is_checked: bool = True,
) -> Store:
    """Open the store that a URL names. An audit opens it unchecked: it looks at what a check would refuse."""
    parts = urlsplit(url)
    opener = OPENERS.get(parts.scheme)
    if opener is None:
        raise StoreError(f"store {url!r}: unknown kind {parts.scheme!r}; expected {EXPECTED}")
    return opener(url, clock, bounds, is_checked=is_checked)


def _memory(url: str, clock: Callable[[], datetime], bounds: Bounds | None, *, is_checked: bool) -> Store:  # noqa: ARG001 - nothing to check
    if url != "memory:":
        raise StoreError(f"store {url!r}: expected just memory:")
    return MemoryStore(clock=clock, bounds=bounds)


def _sqlite(url: str, clock: Callable[[], datetime], bounds: Bounds | None, *, is_checked: bool) -> Store:
    parts = urlsplit(url)
    path = unquote(parts.path.removeprefix("/"))
    if not url.startswith("sqlite:///") or not path or parts.fragment:
        raise StoreError(f"store {url!r}: expected sqlite:///FILE (relative) or sqlite:////FOLDER/FILE (absolute)")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    synchronous, wait = options.pop("synchronous", "full"), options.pop("wait", str(WAIT_S))
    if options:
        raise StoreError(f"store {url!r}: unknown option {min(options)!r}; expected synchronous or wait")
    if synchronous not in set(Synchronous):
        raise StoreError(f"store {url!r}: synchronous={synchronous}; expected one of {', '.join(Synchronous)}")
    try:
        wait_s = float(wait)
    except ValueError:
        wait_s = -1.0
    if not 0 <= wait_s <= WAIT_S * 60:
        raise StoreError(f"store {url!r}: wait={wait}; expected seconds from 0 to {WAIT_S * 60:g}")
    return SQLiteStore(
        path,
        clock=clock,
        bounds=bounds,
        synchronous=Synchronous(synchronous),
        wait_s=wait_s,
        is_checked=is_checked,
    )


OPENERS = {"memory": _memory, "sqlite": _sqlite}
