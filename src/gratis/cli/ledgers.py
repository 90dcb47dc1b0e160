"""`gratis ledger` and `gratis audit`: every decision, printed, followed, and proved."""

from __future__ import annotations

import os
import signal
import sys
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Self

from gratis.audit.fold import Audit, Finding, Unreadable
from gratis.cli.screen import Listing, is_table, paint, safe
from gratis.cli.streams import Output, Progress, batches, parsed, reading
from gratis.errors import GratisError, LedgerError, OfferError, RequestError
from gratis.ledger import Filter
from gratis.lines import decode, encode, entry_line, entry_of
from gratis.offers import load
from gratis.stores.urls import DEFAULT_URL, open_store

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from types import FrameType

    from gratis.model import Entry
    from gratis.offer import Offer
    from gratis.stores import Store

FOUND = 1
PAGE = 1_000
TAIL_BYTES = 1 << 20
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
    ("reason", 20, False),
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
    store = open_store(arguments.store, must_exist=True)
    try:
        with _sink(arguments) as sink:
            _pour(store, sink, chosen, after=max(arguments.after, sink.entry), arguments=arguments)
    finally:
        store.close()
    return 0


def _pour(store: Store, sink: _Sink, chosen: Filter, *, after: int, arguments: argparse.Namespace) -> None:
    """Hand over entries in pages, in order, each once; the sink remembers how far it is."""
    if arguments.follow:
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        while True:
            entries = store.entries(after=after)
            while page := list(islice(entries, PAGE)):
                after = page[-1].entry
                sink.take([entry for entry in page if chosen.admits(entry)], upto=after)
            if not arguments.follow:
                return
            time.sleep(arguments.every)
    except KeyboardInterrupt:
        if not arguments.follow:
            raise


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


class _Sink:
    """Where entries go: standard output, with or without a cursor in a file."""

    entry = 0

    def __init__(self, show: Callable[[list[Entry]], None], cursor: Path | None) -> None:
        self._show = show
        self._cursor = cursor
        if cursor is not None and cursor.exists():
            text = cursor.read_text(encoding="ascii", errors="replace").strip()
            if not text.isascii() or not text.isdigit():
                raise GratisError(f"{cursor}: found {text!r:.40}; expected the number of an entry")
            self.entry = int(text)

    def take(self, entries: list[Entry], *, upto: int) -> None:
        """Print entries, then remember that everything up to one was printed."""
        self._show(entries)
        if self._cursor is not None:
            fresh = self._cursor.with_name(self._cursor.name + ".new")
            with fresh.open("w", encoding="ascii") as file:
                file.write(f"{upto}\n")
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self._cursor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _FileSink(_Sink):
    """A file that is its own cursor: what it holds was handed over, and it goes on behind that."""

    def __init__(self, path: Path) -> None:
        super().__init__(self._write, None)
        try:
            self._file: BinaryIO = path.open("r+b" if path.exists() else "x+b")
        except OSError as error:
            raise GratisError(f"{path}: {error.strerror}") from None
        self._path = path
        self.entry = self._resume()

    def _resume(self) -> int:
        """Cut off a line that was not finished, and find the last entry."""
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(max(0, size - TAIL_BYTES))
        tail = self._file.read()
        whole = tail[: tail.rfind(b"\n") + 1]
        if tail and not whole and size > TAIL_BYTES:
            raise GratisError(f"{self._path}: its last line is longer than {TAIL_BYTES} bytes: no ledger")
        self._file.truncate(size - len(tail) + len(whole))
        self._file.seek(0, os.SEEK_END)
        if not whole:
            return 0
        last = whole[:-1].rpartition(b"\n")[2]
        try:
            entry = decode(last)["entry"]
        except (ValueError, KeyError, TypeError):
            entry = None
        if type(entry) is not int:
            raise GratisError(f"{self._path}: its last line is no ledger entry; expected a file that --out wrote")
        return entry

    def _write(self, entries: list[Entry]) -> None:
        self._file.write(b"".join([encode(entry_line(entry)) + b"\n" for entry in entries]))
        self._file.flush()
        os.fsync(self._file.fileno())

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _sink(arguments: argparse.Namespace) -> _Sink:
    if arguments.out is not None:
        return _FileSink(Path(arguments.out))
    cursor = None if arguments.cursor is None else Path(arguments.cursor)
    if is_table(arguments.format):
        listing = Listing(COLUMNS)

        def rows(entries: list[Entry]) -> None:
            for entry in entries:
                listing.row(entry_line(entry), "green" if entry.decision.is_free else "red")

        return _Sink(rows, cursor)
    output = Output()
    return _Sink(lambda entries: output.lines([entry_line(entry) for entry in entries]), cursor)


def audit(arguments: argparse.Namespace) -> int:
    """Replay a ledger, or a store's, through the rule; findings make the exit code 1."""
    if arguments.file is not None and arguments.store is not None:
        raise GratisError("audit: found FILE and --store; expected one of them")
    offers = {} if arguments.offer is None else {(own := load(arguments.offer)).name: own}
    fold, progress, count = Audit(_named(offers)), Progress("entries"), 0
    show = _finding_row if is_table(arguments.format) else _finding_line
    if arguments.file is not None:
        findings = fold.findings(_counted(_from_file(arguments.file), progress))
        for finding in findings:
            progress.end()
            show(finding)
            count += 1
    else:
        url = arguments.store or os.environ.get("GRATIS_STORE") or DEFAULT_URL
        store = open_store(url, is_checked=False, must_exist=True)
        try:
            for finding in _of_store(store, fold, progress):
                progress.end()
                show(finding)
                count += 1
        finally:
            store.close()
    progress.end()
    print(f"gratis: {fold.entries:,} entries, {count:,} findings", file=sys.stderr)
    return FOUND if count else 0


def _of_store(store: Store, fold: Audit, progress: Progress) -> Iterator[Finding]:
    """The ledger and the counters, as of one moment where nobody decides meanwhile."""
    yield from fold.findings(_counted(store.entries(), progress))
    for offer, account in store.accounts():
        yield from fold.counters(offer, account, store.tallies(offer, account))


def _named(offers: dict[str, Offer]) -> Callable[[str], Offer | None]:
    def named(name: str) -> Offer | None:
        if name not in offers:
            try:
                offers[name] = load(name)
            except OfferError:
                return None
        return offers[name]

    return named


def _from_file(name: str) -> Iterator[Entry | Unreadable]:
    with reading(name) as file:
        for batch in batches(file):
            for number, line in batch:
                if line.strip():
                    try:
                        yield entry_of(parsed(line))
                    except (LedgerError, RequestError) as error:
                        yield Unreadable(number, str(error))


def _counted(
    entries: Iterator[Entry] | Iterator[Entry | Unreadable], progress: Progress
) -> Iterator[Entry | Unreadable]:
    for entry in entries:
        progress.add(1)
        yield entry


def _finding_line(finding: Finding) -> None:
    Output().lines([{name: getattr(finding, name) for name in finding.__struct_fields__}])


def _finding_row(finding: Finding) -> None:
    where = f"entry {finding.entry}" if finding.entry is not None else safe(finding.account or finding.field)
    text = f"{finding.field} is {safe(finding.found)}; the rule gives {safe(finding.expected)}"
    print(f"{paint(finding.kind, 'red')}  {where} {safe(finding.id or '')}: {text}")
