"""`gratis ledger`: every decision, printed and followed."""

from __future__ import annotations

import os
import re
import signal
import time
from itertools import islice
from pathlib import Path
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, BinaryIO, Self, TypeVar

from gratis.cli.screen import Listing, is_table
from gratis.cli.streams import Output, parsed
from gratis.errors import GratisError, LedgerError, RequestError, UnreadableEntry
from gratis.ledger import Filter
from gratis.lines import ENTRY_BYTES_MAX, encode, entry_line, entry_of
from gratis.model import shown
from gratis.stores import Trimmed, behind, places
from gratis.stores.urls import open_store

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from types import FrameType

    from gratis.model import Entry
    from gratis.stores import Store

FOUND = 1
PAGE = 1_000
TAIL_BYTES = 2 * ENTRY_BYTES_MAX
LINE_START = b'{"entry":'
SHARD = re.compile(rb'\{"entry":\d+(?:,"shard":(\d+))?,')

T = TypeVar("T")
COLUMNS = (
    ("entry", 9, True),
    ("at", 20, False),
    ("id", 20, False),
    ("account", 12, False),
    ("group", 6, False),
    ("seq", 7, True),
    ("tokens", 13, True),
    ("total", 13, True),
    ("verdict", 7, False),
    ("reason", 32, False),
)


def ledger(arguments: argparse.Namespace) -> int:
    """Print every decision in order; with --follow, go on with what comes."""
    chosen = Filter(
        account=arguments.account,
        group=arguments.group,
        window=arguments.window,
        since=arguments.since,
        until=arguments.until,
    )
    if arguments.trim and (arguments.out is None or arguments.after or chosen != Filter()):
        raise GratisError("ledger: --trim forgets what --out has stored; expected --out, and no choice of entries")
    store = open_store(arguments.store, must_exist=True)
    try:
        with _sink(arguments, store) as sink:
            after = places(arguments.after, shards=store.shards)
            _pour(store, sink, chosen, after=tuple(map(max, after, sink.cursor)), arguments=arguments)
    finally:
        store.close()
    return 0


def _pour(store: Store, sink: _Sink, chosen: Filter, *, after: tuple[int, ...], arguments: argparse.Namespace) -> None:
    """Hand over entries in pages, in order, each once; a signal is heard between two pages, never within one."""
    stop = _Stop(is_wanted=arguments.follow)
    trim = _trim(store) if arguments.trim else None
    while not stop.is_asked():
        entries = store.entries(after=after)
        while page := [] if stop.is_asked() else list(islice(entries, PAGE)):
            for entry in page:
                after = behind(after, entry, shards=store.shards)
            sink.take([entry for entry in page if chosen.admits(entry)], upto=after)
        if trim is not None:
            trim(after)
        if not arguments.follow:
            return
        stop.wait(arguments.every)


def _trim(store: Store) -> Callable[[tuple[int, ...]], object]:
    """What forgets in the store what was stored here."""
    if not isinstance(store, Trimmed):
        raise GratisError("ledger: --trim is for stores on Redis or Valkey; others keep their ledger")
    return store.trim


class _Stop:
    """Whether SIGTERM or SIGINT asked a follower to end; asked twice, it ends at once."""

    def __init__(self, *, is_wanted: bool) -> None:
        self._asked = False
        self._is_waiting = False
        if is_wanted and current_thread() is main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._ask)

    def is_asked(self) -> bool:
        """Whether to end now."""
        return self._asked

    def wait(self, seconds: float) -> None:
        """Wait so long, or until asked."""
        try:
            self._is_waiting = True
            if not self._asked:
                time.sleep(seconds)
        except KeyboardInterrupt:
            self._asked = True
        finally:
            self._is_waiting = False

    def _ask(self, _signal: int, _frame: FrameType | None) -> None:
        if self._asked or self._is_waiting:
            raise KeyboardInterrupt
        self._asked = True


class _Sink:
    """Where entries go: standard output, with or without a cursor in a file."""

    cursor: tuple[int, ...]

    def __init__(self, show: Callable[[list[Entry]], None], cursor: Path | None, store: Store) -> None:
        self.cursor = (0,) * store.shards
        self._show = show
        self._cursor = cursor
        if cursor is not None:
            if cursor.exists():
                self.cursor = _read_cursor(cursor, shards=store.shards)
                _check_ours(cursor, store, self.cursor, {})
            self._remember(self.cursor)

    def take(self, entries: list[Entry], *, upto: tuple[int, ...]) -> None:
        """Print entries, then remember that everything up to one was printed."""
        self._show(entries)
        self._remember(upto)

    def _remember(self, cursor: tuple[int, ...]) -> None:
        if self._cursor is None:
            return
        fresh = self._cursor.with_name(self._cursor.name + ".new")
        with fresh.open("w", encoding="ascii") as file:
            file.write(",".join(map(str, cursor)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._cursor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _FileSink(_Sink):
    """A file that is its own cursor: what it holds was handed over, and it goes on behind that."""

    def __init__(self, path: Path, store: Store) -> None:
        super().__init__(self._write, None, store)
        self._path = path
        self._file: BinaryIO = path.open("r+b" if path.exists() else "x+b")
        try:
            self._resume(store)
        except BaseException:
            self._file.close()
            raise

    def _resume(self, store: Store) -> None:
        """Find the last entry, and cut off a line behind it that was not finished; leave any other file alone."""
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(max(0, size - TAIL_BYTES))
        tail = self._file.read()
        whole, torn = tail[: tail.rfind(b"\n") + 1], tail[tail.rfind(b"\n") + 1 :]
        is_ours = torn.startswith(LINE_START) or LINE_START.startswith(torn)
        if not is_ours or (size > 0 and not whole and size > TAIL_BYTES):
            raise GratisError(f"{self._path}: no ledger; expected a file that --out wrote")
        if whole:
            ends = self._ends(size - len(torn), store.shards)
            self.cursor = tuple(ends[shard].entry if shard in ends else 0 for shard in range(store.shards))
            _check_ours(self._path, store, self.cursor, ends)
        self._file.truncate(size - len(torn))
        self._file.seek(0, os.SEEK_END)

    def _ends(self, end: int, shards: int) -> dict[int, Entry]:
        """The last entry of each shard that the file has, read from its end on."""
        found: dict[int, Entry] = {}
        rest = b""
        while end > 0 and len(found) < shards:
            start = max(0, end - TAIL_BYTES)
            self._file.seek(start)
            block = self._file.read(end - start) + rest
            rest, _, whole = (b"", b"", block) if start == 0 else block.partition(b"\n")
            rest += b"\n" if start else b""
            for line in reversed(whole.splitlines()):
                shard = SHARD.match(line)
                if shard is None or int(shard[1] or 0) not in found:
                    entry = self._entry(line)
                    found.setdefault(entry.shard, entry)
            end = start
        if found and max(found) >= shards:
            raise GratisError(f"{self._path}: it has an entry of shard {max(found)}; expected one of {shards} shards")
        return found

    def _entry(self, line: bytes) -> Entry:
        try:
            return entry_of(parsed(line, line_max=ENTRY_BYTES_MAX))
        except (LedgerError, RequestError):
            raise GratisError(
                f"{self._path}: its last line is no ledger entry; expected a file that --out wrote"
            ) from None

    def _write(self, entries: list[Entry]) -> None:
        self._file.write(b"".join([encode(entry_line(entry)) + b"\n" for entry in entries]))
        self._file.flush()
        os.fsync(self._file.fileno())

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _read_cursor(path: Path, *, shards: int) -> tuple[int, ...]:
    text = path.read_text(encoding="ascii", errors="replace").strip()
    numbers = text.split(",")
    if not all(number.isascii() and number.isdigit() for number in numbers):
        raise GratisError(f"{path}: found {shown(text)}; expected the number of an entry, or one a shard")
    if len(numbers) != shards:
        raise GratisError(f"{path}: it has {len(numbers)} numbers; expected {shards}, one a shard of this store")
    return tuple(map(int, numbers))


def _check_ours(path: Path, store: Store, cursor: tuple[int, ...], last: dict[int, Entry]) -> None:
    """Going on behind an entry of another store would skip or repeat."""
    for shard, number in enumerate(cursor):
        if number == 0:
            continue
        before = tuple(number - 1 if place == shard else end for place, end in enumerate(cursor))
        try:
            ours = next((one for one in store.entries(after=before, upto=cursor) if one.shard == shard), None)
        except UnreadableEntry as gone:
            if gone.entry == number:
                continue  # it was trimmed, which only what was stored is
            raise
        known = last.get(shard)
        if ours is None or (
            known is not None and (ours.decided_at, ours.decision.id) != (known.decided_at, known.decision.id)
        ):
            raise GratisError(
                f"{path}: it ends at entry {number} of another ledger; expected one that this store wrote"
            )


def _sink(arguments: argparse.Namespace, store: Store) -> _Sink:
    if arguments.out is not None:
        return _FileSink(Path(arguments.out), store)
    cursor = None if arguments.cursor is None else Path(arguments.cursor)
    if is_table(arguments.format):
        listing = Listing(COLUMNS)

        def rows(entries: list[Entry]) -> None:
            for entry in entries:
                listing.row(entry_line(entry), "green" if entry.decision.is_free else "red")

        return _Sink(rows, cursor, store)
    output = Output()
    return _Sink(lambda entries: output.lines([entry_line(entry) for entry in entries]), cursor, store)
