"""Which decisions were made, by account and id: exact, and in constant memory.

The latest are held in memory, older ones lie in a temporary file. A filter of fixed size knows of most ids that
the file does not have them; only for the others is it asked.
"""

from __future__ import annotations

import sqlite3

import msgspec
from msgspec import Struct

from gratis.model import Decision, Durability, Reason, Request, Terms, Window

HELD_MAX = 50_000
FILTER_BITS = 1 << 27

_SCHEMA = "CREATE TABLE seen (account TEXT, id TEXT, value BLOB, PRIMARY KEY (account, id)) WITHOUT ROWID"


class _Kept(Struct, array_like=True, frozen=True):
    """A decision as the file keeps it; its terms are one of few, and stay in memory."""

    request: Request
    terms: int
    reason: Reason
    free_tokens: int | None
    used: int | None
    total: int | None
    window: Window | None
    seq: int | None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Kept).decode


class Seen:
    """The first decision of each id."""

    def __init__(self, *, held_max: int = HELD_MAX) -> None:
        self._held_max = held_max
        self._held: dict[tuple[str, str], Decision] = {}
        self._filter = bytearray(0)
        self._file: sqlite3.Connection | None = None
        self._terms: dict[Terms, int] = {}
        self._by_key: list[Terms] = []

    def get(self, account: str, request_id: str) -> Decision | None:
        """The decision of this id, if there was one."""
        key = (account, request_id)
        held = self._held.get(key)
        if held is not None or self._file is None:
            return held
        low, high = _bits(key)
        if not (self._filter[low >> 3] >> (low & 7) & 1 and self._filter[high >> 3] >> (high & 7) & 1):
            return None
        row = self._file.execute("SELECT value FROM seen WHERE account = ? AND id = ?", key).fetchone()
        return None if row is None else self._decision(row[0])

    def put(self, decision: Decision) -> None:
        """Keep the decision of an id that had none."""
        self._held[decision.request.account, decision.request.id] = decision
        if len(self._held) >= self._held_max:
            self._spill()

    def close(self) -> None:
        """Give the temporary file back."""
        if self._file is not None:
            self._file.close()

    def _spill(self) -> None:
        if self._file is None:
            self._filter = bytearray(FILTER_BITS // 8)
            self._file = sqlite3.connect("", isolation_level=None)  # a temporary file, gone when it is closed
            self._file.execute("PRAGMA journal_mode = OFF")
            self._file.execute(_SCHEMA)
        self._file.execute("BEGIN")
        rows = []
        for key in sorted(self._held):
            rows.append((*key, self._value(self._held[key])))
            for bit in _bits(key):
                self._filter[bit >> 3] |= 1 << (bit & 7)
        self._file.executemany("INSERT INTO seen VALUES (?, ?, ?)", rows)
        self._file.execute("COMMIT")
        self._held.clear()

    def _value(self, decision: Decision) -> bytes:
        terms = self._terms.setdefault(decision.terms, len(self._by_key))
        if terms == len(self._by_key):
            self._by_key.append(decision.terms)
        return _encode(
            _Kept(
                decision.request,
                terms,
                decision.reason,
                decision.free_tokens,
                decision.used,
                decision.total,
                decision.window,
                decision.seq,
            )
        )

    def _decision(self, value: bytes) -> Decision:
        kept = _decode(value)
        return Decision(
            kept.request,
            self._by_key[kept.terms],
            kept.reason,
            kept.free_tokens,
            kept.used,
            kept.total,
            kept.window,
            kept.seq,
            Durability.VOLATILE,
        )


def _bits(key: tuple[str, str]) -> tuple[int, int]:
    mixed = hash(key)
    return mixed & (FILTER_BITS - 1), (mixed >> 32) & (FILTER_BITS - 1)
