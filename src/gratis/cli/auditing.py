"""`gratis audit`: a ledger, or a store's, proved; findings are printed, and told in a report for people."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from io import BufferedReader
from typing import TYPE_CHECKING

from gratis.audit.beside import Beside
from gratis.audit.findings import Finding, FindingKind
from gratis.audit.fold import Audit, Printed, Unreadable
from gratis.cli import properties, report
from gratis.cli.decisions import histories
from gratis.cli.screen import is_table, paint, safe
from gratis.cli.streams import Output, Progress, batches, parsed, reading
from gratis.errors import GratisError, LedgerError, RequestError, UnreadableEntry, UnreadableState
from gratis.lines import ENTRY_BYTES_MAX, encode, entry_of
from gratis.offers import DEFAULT_OFFER, load, shipped
from gratis.stores import Linked, Trimmed, behind
from gratis.stores.urls import DEFAULT_URL, open_store

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from gratis.audit.force import History
    from gratis.audit.story import Story
    from gratis.model import Change, Entry
    from gratis.offer import Offer
    from gratis.stores import Store

    Item = Entry | Printed | Unreadable

FOUND = 1
REASON_MAX = 400
SQLITE = b"SQLite format 3\0"


def audit(arguments: argparse.Namespace) -> int:
    """Replay a ledger, or a store's, or one on top of the other, through the rule; findings make the exit code 1."""
    if properties.is_wanted(arguments):
        return properties.run(arguments)
    offers = {} if arguments.offer is None else {(own := load(arguments.offer)).name: own}
    history = None if arguments.enrollments is None else _told(arguments.enrollments)
    url = arguments.store
    if url is None and arguments.file is None:
        url = os.environ.get("GRATIS_STORE") or DEFAULT_URL
    if url == "memory:":
        raise GratisError("audit: memory: ends with its process; expected FILE, the lines of its ledger")
    count, show = 0, _finding_row if is_table(arguments.format) else _finding_line
    offer = next(iter(offers), DEFAULT_OFFER)
    reads = [name for name in (arguments.file, arguments.enrollments, arguments.offer, report.store_file(url)) if name]
    story = report.begin(arguments.html, "Audit", offer, is_audit=True, reads=reads)
    with ExitStack() as stack:
        store = None
        if url is not None:
            store = open_store(url, is_checked=False, must_exist=True)
            stack.callback(store.close)
            history = history or store.enrollments
        fold = Audit(_named(offers), history)
        stack.callback(fold.close)
        watch = _Watch(story)
        for finding in _findings(arguments.file, store, fold, watch):
            watch.progress.end()
            show(finding)
            if story is not None:
                story.found(finding)
            count += 1
    watch.progress.end()
    report.end(arguments.html, story)
    print(f"gratis: {_many(fold.entries, 'entry', 'entries')}, {_many(count, 'finding', 'findings')}", file=sys.stderr)
    if arguments.file is not None and store is not None and watch.beyond:
        print(
            f"gratis: {_many(watch.beyond, 'entry is', 'entries are')} the store's alone, beyond the file",
            file=sys.stderr,
        )
    if fold.unlinked:
        many = _many(fold.unlinked, "entry has", "entries have")
        print(f"gratis: {many} no link: only the rule speaks for them, not the chain", file=sys.stderr)
    return FOUND if count else 0


def _many(count: int, one: str, more: str) -> str:
    return f"{count:,} {one if count == 1 else more}"


class _Watch:
    """Entries on their way: counted, and told in the report."""

    def __init__(self, story: Story | None) -> None:
        self.progress = Progress("entries")
        self.beyond = 0  # of those so many are a store's alone
        self._story = story

    def __call__(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same."""
        for item in items:
            self.progress.add(1)
            self.beyond += not isinstance(item, Printed)
            if self._story is not None and not isinstance(item, Unreadable):
                self._story.add((item.entry if isinstance(item, Printed) else item).decision)
            yield item


def _findings(name: str | None, store: Store | None, fold: Audit, watch: _Watch) -> Iterator[Finding]:
    """Of a file, of a store, or of a file and then of what a store has beyond it."""
    ends: dict[int, int] = {}
    if name is not None:
        items = watch(_passing(_from_file(name), ends))
        if store is None:
            yield from fold.findings(items)
        else:
            beside = Beside(store)
            for item in items:
                found = list(fold.findings((item,)))
                yield from found
                others = list(beside.compared(item.entry)) if isinstance(item, Printed) else []
                yield from [] if found else others  # an edit of the file is told once
            ends.update(beside.ends)
    if store is not None:
        yield from _of_store(store, fold, watch, None if name is None else ends)


def _passing(items: Iterator[Item], ends: dict[int, int]) -> Iterator[Item]:
    """The same, remembering the last entry of each shard."""
    for item in items:
        if isinstance(item, Printed):
            ends[item.entry.shard] = max(item.entry.entry, ends.get(item.entry.shard, 0))
        yield item


def _of_store(store: Store, fold: Audit, watch: _Watch, ends: dict[int, int] | None) -> Iterator[Finding]:
    """The ledger, then counters and links; a live store goes on meanwhile, so each is compared as of its own moment."""
    with store.frozen():
        reader = _Reader(store, ends)
        if isinstance(store, Trimmed) and (kept := store.kept()) is not None:
            fold.forgets(kept)
        if ends is None:
            fold.begin(reader.cursor)
        yield from fold.findings(watch(reader.read(None)))
        for offer, account in dict.fromkeys([*store.accounts(), *fold.accounts()]):
            yield from fold.histories(offer, account)
            try:
                shard, last, tallies = store.counters(offer, account)
                yield from fold.findings(watch(reader.upto(shard, last)))
                yield from fold.counters(offer, account, tallies)
                if isinstance(store, Linked):
                    shard, last, links = store.links(offer, account)
                    yield from fold.findings(watch(reader.upto(shard, last)))
                    yield from fold.links(offer, account, links)
            except UnreadableState as error:
                expected = "counters that can be read"
                yield Finding(FindingKind.COUNTER_DIFFERS, None, account, None, "counters", str(error), expected)


class _Reader:
    """Reads a store's ledger, in several goes; an entry that cannot be read does not hide the others."""

    def __init__(self, store: Store, ends: dict[int, int] | None) -> None:
        self.cursor = store.trimmed() if isinstance(store, Trimmed) else (0,) * store.shards
        self._store = store
        if ends is not None:
            self.cursor = tuple(ends.get(shard, 0) for shard in range(store.shards))

    def upto(self, shard: int, last: int) -> Iterator[Item]:
        """On from where it was, up to an entry of a shard."""
        return self.read(tuple(max(last, own) if place == shard else own for place, own in enumerate(self.cursor)))

    def read(self, upto: tuple[int, ...] | None) -> Iterator[Item]:
        """On from where it was, up to a cursor."""
        while upto is None or self.cursor != upto:
            try:
                for entry in self._store.entries(after=self.cursor, upto=upto):
                    self.cursor = behind(self.cursor, entry, shards=self._store.shards)
                    yield entry
            except UnreadableEntry as error:
                self.cursor = tuple(
                    error.entry if place == error.shard else own for place, own in enumerate(self.cursor)
                )
                yield Unreadable(f"entry {error.entry}", str(error), error.entry, error.shard)
            else:
                return


def _named(offers: dict[str, Offer]) -> Callable[[str], Offer | None]:
    """Offers by name: those given, and those that are shipped; a name in a ledger is never a path."""

    def named(name: str) -> Offer | None:
        if name not in offers and name in shipped():
            offers[name] = load(name)
        return offers.get(name)

    return named


def _told(name: str) -> History:
    """Each account's changes of enrollment, as a file tells them; one that cannot be read ends the audit at once."""
    known = {DEFAULT_OFFER: histories(name, DEFAULT_OFFER)}

    def history(offer: str, account: str) -> list[Change]:
        if offer not in known:
            known[offer] = histories(name, offer)
        return known[offer].get(account, [])

    return history


def _from_file(name: str) -> Iterator[Item]:
    with reading(name) as file:
        if isinstance(file, BufferedReader) and file.peek(len(SQLITE)).startswith(SQLITE):
            raise GratisError(f"{name}: found a SQLite file; expected a ledger's lines, or --store sqlite:///{name}")
        for batch in batches(file, line_max=ENTRY_BYTES_MAX):
            for number, line in batch:
                if line.strip():
                    try:
                        value = parsed(line, line_max=ENTRY_BYTES_MAX)
                        entry = entry_of(value)
                    except (LedgerError, RequestError) as error:
                        yield Unreadable(f"line {number}", str(error))
                    else:
                        assert isinstance(value, dict), "only an object is an entry"
                        yield Printed(entry, value)


def _finding_line(finding: Finding) -> None:
    Output().lines([{name: getattr(finding, name) for name in finding.__struct_fields__}])


def _finding_row(finding: Finding) -> None:
    if finding.kind is FindingKind.UNREADABLE:
        print(f"{paint(finding.kind, 'red')}  {safe(finding.field)}: {safe(finding.found, REASON_MAX)}")
        return
    where = f"entry {finding.entry}" if finding.entry is not None else safe(finding.account or finding.field)
    about = where if finding.id is None else f"{where} {safe(finding.id)}"
    text = f"{safe(finding.field)}: found {_told_value(finding.found)}; expected {_told_value(finding.expected)}"
    print(f"{paint(finding.kind, 'red')}  {about}: {text}")


def _told_value(value: object) -> str:
    return safe(value if isinstance(value, str) else encode(value).decode(), REASON_MAX)
