"""What a ledger says of each window so far, in constant memory: the latest held, older ones in a temporary file."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from gratis.model import EPOCH, Window, from_micros, micros
from gratis.rule import Tally

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

Account = tuple[str, str]
Kind = tuple[str, str]

HELD_MAX = 100_000
OUTSIDE: Kind = ("\0", "")
"""The kind of what is outside any window: no group has such a name."""
NOWHERE = Tally(Window(EPOCH, EPOCH), 0, 0)

_SCHEMA = (
    'CREATE TABLE windows (offer TEXT, account TEXT, "group" TEXT, kind TEXT, start INTEGER, "end" INTEGER,'
    ' used INTEGER, seq INTEGER, link TEXT, PRIMARY KEY (offer, account, "group", kind, start)) WITHOUT ROWID'
)
_PUT = "INSERT OR REPLACE INTO windows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_GET = (
    'SELECT start, "end", used, seq, link FROM windows'
    ' WHERE offer = ? AND account = ? AND "group" = ? AND kind = ? AND (? IS NULL OR start = ?)'
    " ORDER BY start DESC LIMIT 1"
)
_ALL = 'SELECT "group", kind, start, "end", used, seq, link FROM windows WHERE offer = ? AND account = ?'


class Said(Struct, frozen=True):
    """What the last entry of a window says: its tally, and the link of that entry."""

    tally: Tally
    link: str | None


class Windows:
    """The windows of all accounts, by group, kind and start; and of each what is outside any."""

    def __init__(self, *, held_max: int = HELD_MAX) -> None:
        self._held_max = held_max
        self._held: dict[Account, dict[Kind, dict[datetime, Said]]] = {}
        self._count = 0
        self._file: sqlite3.Connection | None = None

    def put(self, account: Account, kind: Kind, said: Said) -> None:
        """Remember what an entry says of its window."""
        starts = self._held.setdefault(account, {}).setdefault(kind, {})
        self._count += said.tally.window.start not in starts
        starts[said.tally.window.start] = said
        if self._count > self._held_max:
            self._spill()

    def get(self, account: Account, kind: Kind, start: datetime | None) -> Said | None:
        """What was said of a window; without a start, of the last one that was opened."""
        starts = self._held.get(account, {}).get(kind, {})
        if start is not None and start in starts:
            return starts[start]
        held = starts[max(starts)] if start is None and starts else None
        kept = self._kept(account, kind, start)
        if held is None or kept is None:
            return held or kept
        return max(held, kept, key=lambda said: said.tally.window.start)

    def leave(self, account: Account, link: str) -> None:
        """Remember the link of an account's last entry outside any window."""
        self.put(account, OUTSIDE, Said(NOWHERE, link))

    def outside(self, account: Account) -> str | None:
        """The link of an account's last entry outside any window."""
        said = self.get(account, OUTSIDE, EPOCH)
        return None if said is None else said.link

    def of(self, account: Account) -> Iterator[tuple[str, str, Said]]:
        """Every window of an account."""
        return (found for found in self._all(account) if found[:2] != OUTSIDE)

    def _all(self, account: Account) -> Iterator[tuple[str, str, Said]]:
        held = self._held.get(account, {})
        rows = [] if self._file is None else self._file.execute(_ALL, account).fetchall()
        for group, kind, start, *rest in rows:
            said = _said(start, *rest)
            if said.tally.window.start not in held.get((group, kind), {}):
                yield group, kind, said
        for (group, kind), starts in held.items():
            for said in starts.values():
                yield group, kind, said

    def accounts(self) -> list[Account]:
        """Every account of which something was said."""
        kept = (
            [] if self._file is None else self._file.execute("SELECT DISTINCT offer, account FROM windows").fetchall()
        )
        return list(dict.fromkeys([*self._held, *kept]))

    def close(self) -> None:
        """Give the temporary file back."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __del__(self) -> None:
        self.close()

    def _kept(self, account: Account, kind: Kind, start: datetime | None) -> Said | None:
        if self._file is None:
            return None
        at = None if start is None else micros(start)
        row = self._file.execute(_GET, (*account, *kind, at, at)).fetchone()
        return None if row is None else _said(*row)

    def _spill(self) -> None:
        if self._file is None:
            self._file = sqlite3.connect("", isolation_level=None)  # a temporary file, gone when it is closed
            self._file.execute("PRAGMA journal_mode = OFF")
            self._file.execute(_SCHEMA)
        rows: list[tuple[Any, ...]] = [
            (*account, *kind, micros(start), micros(said.tally.window.end), said.tally.used, said.tally.seq, said.link)
            for account, kinds in self._held.items()
            for kind, starts in kinds.items()
            for start, said in starts.items()
        ]
        self._file.execute("BEGIN")
        self._file.executemany(_PUT, sorted(rows))
        self._file.execute("COMMIT")
        self._held.clear()
        self._count = 0


def _said(start: int, end: int, used: int, seq: int, link: str | None) -> Said:
    return Said(Tally(Window(from_micros(start), from_micros(end)), used, seq), link)
