"""Where histories are asked: a space of its own on the user's server, beside the user's file, or in memory.

A space has a random name. Nothing outside it is written, and all of it is removed after each history.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote, urlsplit

from gratis.errors import StoreError
from gratis.stores.memory import MemoryStore
from gratis.stores.redis.layout import shards, slot_of
from gratis.stores.redis.servers import Call
from gratis.stores.redis.store import RedisStore
from gratis.stores.redis.wire import packed
from gratis.stores.urls import exists, open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from datetime import datetime

    from gratis.stores import Bounds, Store
    from gratis.stores.redis.core import Core
    from gratis.stores.redis.servers import Result, Wave

PREFIX = "gratis-properties-"
BESIDES = ("", "-wal", "-shm", "-journal")


def new_space() -> str:
    """A name that nobody has used."""
    return PREFIX + secrets.token_hex(8)


class Spaces(Protocol):
    """Opens spaces, and removes them."""

    def open(self, space: str, *, clock: Callable[[], datetime], bounds: Bounds | None) -> Store:
        """A view on the store of a space."""
        ...

    def drop(self, space: str) -> None:
        """Remove a space and all that is in it."""
        ...


def spaces_of(url: str) -> Spaces:
    """The spaces of the store that a URL names."""
    exists(url)  # which says what is wrong with a URL
    if url == "memory:":
        return Memory()
    return File(url) if urlsplit(url).scheme == "sqlite" else Server(url)


class _Shared(MemoryStore):
    """A memory store of several views: closing one of them closes no other."""

    def close(self) -> None:
        """It goes with its space."""


class Memory:
    """Spaces in memory."""

    def __init__(self) -> None:
        self._stores: dict[str, _Shared] = {}

    def open(self, space: str, *, clock: Callable[[], datetime], bounds: Bounds | None) -> Store:
        """A view on the store of a space, whose first view says which clock and bounds it has."""
        if space not in self._stores:
            self._stores[space] = _Shared(clock=clock, bounds=bounds)
        return self._stores[space]

    def drop(self, space: str) -> None:
        """Forget it."""
        self._stores.pop(space, None)


class File:
    """Spaces in files of their own beside a SQLite store's, on the same disk; the store's file is not opened."""

    def __init__(self, url: str) -> None:
        path, mark, self._options = url.partition("?")
        self._options = mark + self._options
        self._folder = path.rpartition("/")[0] + "/"

    def open(self, space: str, *, clock: Callable[[], datetime], bounds: Bounds | None) -> Store:
        """A view on the store of a space."""
        return open_store(self._url(space), clock=clock, bounds=bounds)

    def drop(self, space: str) -> None:
        """Delete its file, and what SQLite keeps beside it."""
        name = unquote(urlsplit(self._url(space)).path.removeprefix("/"))
        for end in BESIDES:
            Path(name + end).unlink(missing_ok=True)

    def _url(self, space: str) -> str:
        return f"{self._folder}{space}.db{self._options}"


class Server:
    """Spaces in namespaces of their own on a server, a cluster or behind sentinels."""

    def __init__(self, url: str) -> None:
        self._path, _, query = url.partition("?")
        self._options = [one for one in query.split("&") if one and one.partition("=")[0] != "namespace"]

    def open(self, space: str, *, clock: Callable[[], datetime], bounds: Bounds | None) -> Store:
        """A view on the store of a space."""
        return open_store(self._url(space), clock=clock, bounds=bounds)

    def drop(self, space: str) -> None:
        """Delete its keys: those of its shards, and the one that says how many there are."""
        try:
            store = open_store(self._url(space))
        except StoreError as error:
            raise StoreError(f"namespace {space!r} was not removed: {error}") from error
        assert isinstance(store, RedisStore), "the URL names a server"
        try:
            core = store._core  # noqa: SLF001 - no store deletes anything; only this run may, and only what is its own
            store._run(_dropped(core, space))  # noqa: SLF001 - as above
        except StoreError as error:
            raise StoreError(f"namespace {space!r} was not removed: {error}") from error
        finally:
            store.close()

    def _url(self, space: str) -> str:
        return f"{self._path}?{'&'.join([*self._options, f'namespace={space}'])}"


def _dropped(core: Core, space: str) -> Generator[Wave, list[Result], None]:
    """The keys that opening made and deciding filled: all are named, none is searched for."""
    asking = core.asking
    for shard in shards(space, len(asking.shards), asking.salt):
        yield from asking.reply(Call(shard.slot, packed("DEL", shard.state, shard.ledger, shard.holds)))
    tag = f"{space}:store".encode()
    yield from asking.reply(Call(slot_of(tag), packed("DEL", b"{%b}" % tag)))
