"""The ledger: all decisions in order, read back, filtered, and followed.

A cursor is a place in it: the number of an entry or, of a store of several shards, one a shard. `behind(cursor, entry,
shards=…)` moves it behind an entry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from gratis.stores import Cursor, behind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from datetime import datetime

    from gratis.model import Entry

__all__ = ["Cursor", "Filter", "behind", "select"]


class Filter(Struct, frozen=True, kw_only=True):
    """Which entries: of an account, of a group, of a window (by an instant in it), by the requests' own time."""

    account: str | None = None
    group: str | None = None
    window: datetime | None = None
    since: datetime | None = None
    until: datetime | None = None

    def admits(self, entry: Entry) -> bool:
        """Whether an entry is one of these."""
        decision = entry.decision
        return (
            (self.account is None or decision.account == self.account)
            and (self.group is None or decision.group == self.group)
            and (self.since is None or self.since <= decision.at)
            and (self.until is None or decision.at < self.until)
            and (
                self.window is None
                or (decision.window is not None and decision.window.start <= self.window < decision.window.end)
            )
        )


def select(entries: Iterable[Entry], chosen: Filter) -> Iterator[Entry]:
    """The entries that a filter admits."""
    return (entry for entry in entries if chosen.admits(entry))
