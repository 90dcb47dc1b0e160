"""Which decisions were made, by account and id: exact, and in constant memory.

The latest are held in memory, older ones lie in a temporary file. A filter of fixed size knows of most ids that
the file does not have them; only for the others is it asked.
"""

from __future__ import annotations

import sqlite3
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import astuple

from gratis.model import Correction, Decision, Durability, Held, Reason, Request, Terms, Window

HELD_MAX = 50_000
FILTER_BITS = 1 << 27
FILTER_MASK = FILTER_BITS - 1

_SCHEMA = "CREATE TABLE seen (mixed INTEGER PRIMARY KEY, value BLOB)"


class _Kept(Struct, array_like=True, frozen=True):
    """A decision as the file keeps it; its terms are one of few, and stay in memory."""

    request: tuple[Any, ...]
    terms: int
    reason: Reason
    free_tokens: int | None
    used: int | None
    total: int | None
    window: Window | None
    seq: int | None
    hold: Held | None
    correction: Correction | None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Kept).decode


class Seen:
    """The first decision of each id."""

    def __init__(self, *, held_max: int = HELD_MAX) -> None:
        self._held_max = held_max
        self._held: dict[tuple[str, str], Decision] = {}
        self._filter = bytearray(0)
        self._file: sqlite3.Connection | None = None
        self._collided: dict[tuple[str, str], Decision] = {}
        self._terms: dict[Terms, int] = {}
        self._by_key: list[Terms] = []

    def get(self, account: str, request_id: str) -> Decision | None:
        """The decision of this id, if there was one."""
        key = (account, request_id)
        held = self._held.get(key)
        if held is not None or self._file is None:
            return held
        mixed = hash(key)
        for bit in (mixed & FILTER_MASK, (mixed >> 32) & FILTER_MASK):
            if not self._filter[bit >> 3] >> (bit & 7) & 1:
                return None
        row = self._file.execute("SELECT value FROM seen WHERE mixed = ?", (mixed,)).fetchone()
        found = None if row is None else self._decision(row[0])
        if found is not None and (found.account, found.request.id) == key:
            return found
        return self._collided.get(key)

    def put(self, decision: Decision) -> None:
        """Keep the decision of an id that had none."""
        self._held[decision.request.account, decision.request.id] = decision
        if len(self._held) >= self._held_max:
            self._spill()

    def close(self) -> None:
        """Give the temporary file back."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __del__(self) -> None:
        self.close()

    def _spill(self) -> None:
        """Move what is held into the file, ordered as the file is. Two ids of one hash: the second stays in memory."""
        if self._file is None:
            self._filter = bytearray(FILTER_BITS // 8)
            self._file = sqlite3.connect("", isolation_level=None)  # a temporary file, gone when it is closed
            self._file.execute("PRAGMA journal_mode = OFF")
            self._file.execute(_SCHEMA)
        rows = {}
        for key, decision in self._held.items():
            mixed = hash(key)
            bits = self._filter
            for bit in (mixed & FILTER_MASK, (mixed >> 32) & FILTER_MASK):
                bits[bit >> 3] |= 1 << (bit & 7)
            if mixed in rows:
                self._collided[key] = decision
            else:
                rows[mixed] = self._value(decision)
        self._file.execute("BEGIN")
        added = self._file.executemany("INSERT OR IGNORE INTO seen VALUES (?, ?)", sorted(rows.items())).rowcount
        self._file.execute("COMMIT")
        held, self._held = self._held, {}
        if added < len(rows):
            self._collided.update({key: decision for key, decision in held.items() if self.get(*key) is None})

    def _value(self, decision: Decision) -> bytes:
        terms = self._terms.setdefault(decision.terms, len(self._by_key))
        if terms == len(self._by_key):
            self._by_key.append(decision.terms)
        return _encode(
            _Kept(
                astuple(decision.request),
                terms,
                decision.reason,
                decision.free_tokens,
                decision.used,
                decision.total,
                decision.window,
                decision.seq,
                decision.hold,
                decision.correction,
            )
        )

    def _decision(self, value: bytes) -> Decision:
        kept = _decode(value)
        return Decision(
            Request(**dict(zip(Request.__struct_fields__, kept.request, strict=True))),
            self._by_key[kept.terms],
            kept.reason,
            kept.free_tokens,
            kept.used,
            kept.total,
            kept.window,
            kept.seq,
            Durability.VOLATILE,
            hold=kept.hold,
            correction=kept.correction,
        )
