"""A ledger file read beside the store that wrote it: what both have must be the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gratis.audit.findings import FindingKind, finding
from gratis.errors import UnreadableEntry
from gratis.lines import entry_line
from gratis.stores import Trimmed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gratis.audit.findings import Finding
    from gratis.model import Entry
    from gratis.stores import Store

ENTRY_MAX = (1 << 62) - 1


class Beside:
    """Compares entries of a file, in order, with a store's; of what the store has forgotten the file is believed."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._gone = store.trimmed() if isinstance(store, Trimmed) else (0,) * store.shards
        self._pages: dict[int, Iterator[Entry]] = {}
        self._next: dict[int, Entry | None] = {}
        self._missing: set[int] = set()  # shards whose last entry that was looked for is not there
        self.ends: dict[int, int] = {}  # of each shard whose end is missing, how far the store goes

    def compared(self, entry: Entry) -> Iterator[Finding]:
        """What the store says otherwise of an entry of the file."""
        shard = entry.shard
        if shard >= self._store.shards:
            yield finding(FindingKind.BROKEN_CHAIN, entry, "shard", shard, f"one of the store's {self._store.shards}")
        elif entry.entry > self._gone[shard]:
            try:
                found = self._at(shard, entry.entry)
            except UnreadableEntry as error:
                del self._pages[shard]
                self._gone = tuple(error.entry if place == shard else own for place, own in enumerate(self._gone))
                expected = "the same in file and store"
                yield finding(FindingKind.BROKEN_CHAIN, entry, "entry of the store", str(error), expected)
            else:
                yield from self._differences(entry, found)

    def _at(self, shard: int, number: int) -> Entry | None:
        """The store's entry of a number, if there is one; entries are asked for in order."""
        found = self._next.get(shard)
        while found is None or found.entry < number:
            found = next(self._of(shard), None)
            if found is None:
                self.ends.setdefault(shard, number - 1)
                return None
        self._next[shard] = found
        return found if found.entry == number else None

    def _differences(self, entry: Entry, found: Entry | None) -> Iterator[Finding]:
        shard = entry.shard
        if found is None:
            if shard not in self._missing:  # told once of all that are missing one after the other
                yield finding(FindingKind.ENTRY_GAP, entry, "entry of the store", None, entry.entry)
            self._missing.add(shard)
            return
        self._missing.discard(shard)
        if found != entry:
            ours, theirs = entry_line(found), entry_line(entry)
            for field in {**ours, **theirs}:
                if ours.get(field) != theirs.get(field):
                    told = f"{field} of the store"
                    yield finding(FindingKind.BROKEN_CHAIN, entry, told, ours.get(field), theirs.get(field))

    def _of(self, shard: int) -> Iterator[Entry]:
        if shard not in self._pages:
            far = tuple(ENTRY_MAX if place == shard else own for place, own in enumerate(self._gone))
            self._pages[shard] = self._store.entries(after=self._gone, upto=far)
        return self._pages[shard]
