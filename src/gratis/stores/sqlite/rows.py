"""A decision as a row of a SQLite ledger, and back; accounts and terms stand there by their keys.

The keys that stand for accounts and terms never change, so they are remembered between transactions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gratis.chain import Stems
from gratis.errors import GratisError
from gratis.lines import (
    correction_line,
    correction_of,
    decode,
    encode,
    enrollment_line,
    hold_line,
    hold_of,
    terms_line,
    terms_of,
)
from gratis.model import Decision, Durability, Entry, Kind, Reason, Request, Window, from_micros, micros, shown

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable
    from datetime import datetime

    from gratis.model import Terms

TERMS_CACHED_MAX = 10_000

_ADD_ENTRY = (
    "INSERT INTO ledger (account, id, terms, model, project, input_tokens, output_tokens, cached_tokens, kind, tools,"
    " at, reason, free_tokens, used, total, window, seq, decided_at, durability, hold, correction, corrects, link)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_GET_ENTRIES = (
    "SELECT l.entry, a.name, l.id, l.terms, l.model, l.project, l.input_tokens, l.output_tokens, l.cached_tokens,"
    " l.kind, l.tools, l.at, l.reason, l.free_tokens, l.used, l.total, w.start, w.end, l.seq, l.decided_at,"
    " l.durability, l.hold, l.correction, l.corrects, l.link"
    " FROM ledger l JOIN accounts a ON a.account = l.account LEFT JOIN windows w ON w.window = l.window WHERE "
)


class Keys:
    """The keys by which rows name accounts and terms; forgotten when a transaction is rolled back."""

    def __init__(self) -> None:
        self.accounts: dict[tuple[str, str], int] = {}
        self.terms: dict[Terms, int] = {}
        self.by_key: dict[int, Terms] = {}
        self.stems = Stems()

    def forget(self) -> None:
        """Forget them: some may stand for rows that never came to be."""
        self.accounts.clear()
        self.terms.clear()
        self.by_key.clear()


class Rows:
    """The rows of one transaction."""

    def __init__(self, connection: sqlite3.Connection, keys: Keys) -> None:
        self._connection = connection
        self._keys = keys

    def add(self, rows: list[tuple[Any, ...]]) -> None:
        """Write rows at the ledger's end."""
        if len(rows) == 1:
            self._connection.execute(_ADD_ENTRY, rows[0])
        elif rows:
            self._connection.executemany(_ADD_ENTRY, rows)

    def found(self, where: str, values: Iterable[Any]) -> list[tuple[Any, ...]]:
        """The rows of the ledger for which this holds."""
        return self._connection.execute(_GET_ENTRIES + where, tuple(values)).fetchall()

    def row(
        self,
        account: int,
        decision: Decision,
        window: int | None,
        *,
        now: datetime,
        durability: Durability,
        linked: str,
    ) -> tuple[Any, ...]:
        """A decision as a row of the ledger, in the order of `_ADD_ENTRY`."""
        request = decision.request
        return (
            account,
            request.id,
            self._terms_key(decision.terms),
            request.model,
            request.project,
            request.input_tokens,
            request.output_tokens,
            request.cached_tokens,
            request.kind.value,
            encode(request.tools).decode() if request.tools else None,
            micros(request.at),
            decision.reason.value,
            decision.free_tokens,
            decision.used,
            decision.total,
            window,
            decision.seq,
            micros(now),
            durability.value,
            None if decision.hold is None else encode(hold_line(decision.hold)).decode(),
            None if decision.correction is None else encode(correction_line(decision.correction)).decode(),
            None if decision.correction is None else decision.correction.of,
            linked,
        )

    def entry(self, row: tuple[Any, ...]) -> Entry:
        """The entry of a row; what cannot be one is a `ValueError`, as is all else that cannot be read."""
        try:
            return self._read(row)
        except GratisError as error:
            raise ValueError(f"ledger entry {row[0]}: {error}") from error

    def _read(self, row: tuple[Any, ...]) -> Entry:
        (
            entry, name, request_id, terms, model, project, input_tokens, output_tokens, cached_tokens,
            kind, tools, at, reason, free_tokens, used, total, start, end, seq, decided_at, durability,
            hold, correction, corrects, linked,
        ) = row  # fmt: skip
        for value in (free_tokens, used, total, seq):
            if value is not None and type(value) is not int:
                raise ValueError(f"found {shown(value)}; expected a whole number")
        if linked is not None and type(linked) is not str:
            raise ValueError(f"link: found {shown(linked)}; expected text")
        request = Request(
            id=request_id,
            model=model,
            at=from_micros(at),
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            account=name,
            project=project,
            kind=Kind(kind),
            tools=() if tools is None else tuple(decode(tools)),
            cached_tokens=cached_tokens,
        )
        window = None if start is None else Window(from_micros(start), from_micros(end))
        decision = Decision(
            request,
            self._terms_of(terms),
            Reason(reason),
            free_tokens,
            used,
            total,
            window,
            seq,
            Durability(durability),
            hold=None if hold is None else hold_of(decode(hold)),
            correction=None if correction is None else correction_of(decode(correction), of=corrects),
        )
        return Entry(entry, from_micros(decided_at), decision, link=linked)

    def _terms_key(self, terms: Terms) -> int:
        known = self._keys.terms
        key = known.get(terms)
        if key is None:
            enrollment = None if terms.enrollment is None else enrollment_line(terms.enrollment)
            facts = encode({**terms_line(terms), "enrollment": enrollment}).decode()
            self._connection.execute("INSERT INTO terms (facts) VALUES (?) ON CONFLICT DO NOTHING", (facts,))
            (key,) = self._connection.execute("SELECT terms FROM terms WHERE facts = ?", (facts,)).fetchone()
            if len(known) >= TERMS_CACHED_MAX:
                known.clear()
            known[terms] = key
        return key

    def _terms_of(self, key: int) -> Terms:
        known_by_key = self._keys.by_key
        known = known_by_key.get(key)
        if known is None:
            (facts,) = self._connection.execute("SELECT facts FROM terms WHERE terms = ?", (key,)).fetchone()
            line = decode(facts)
            known = terms_of(line, enrollment=line["enrollment"])
            if len(known_by_key) >= TERMS_CACHED_MAX:
                known_by_key.clear()
            known_by_key[key] = known
        return known
