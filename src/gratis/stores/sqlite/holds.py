"""Holds, corrections and claims in a SQLite store: what a transaction asks and says of them.

They are written at once, not at the transaction's end: what a later charge of it finds is what an earlier one left.
What all holds set aside of a window is summed up by triggers of the schema.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from gratis.errors import GratisError
from gratis.lines import decode, encode, kept_line, kept_of
from gratis.model import Correction, Expiry, micros
from gratis.rule import Holding, Overdue
from gratis.stores import Receipt, Status, held_again, held_in

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable
    from datetime import datetime

    from gratis.model import Hold
    from gratis.rule import Charge, Tally

DUE_MAX = 100
NONE_OPEN = -1

_FIND = "SELECT hold FROM holds WHERE account = ? AND id = ?"
_FIND_DUE = "SELECT hold FROM holds WHERE account = ? AND until <= ? AND id <> ? ORDER BY until, id LIMIT ?"
_FIND_ALL = "SELECT hold FROM holds WHERE account = ? ORDER BY until, id"
_HELD = 'SELECT start, held FROM held WHERE account = ? AND "group" = ? AND kind = ? AND start IN (?, ?)'
_ADD = "INSERT INTO holds VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_DROP = "DELETE FROM holds WHERE account = ? AND id = ?"
_EXTEND = "UPDATE holds SET until = ?, hold = ? WHERE account = ? AND id = ?"
_COUNT = "SELECT count(*) FROM ledger WHERE account = ? AND corrects = ?"


class Holds:
    """The holds of one transaction's accounts."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._corrections: dict[tuple[int, str], int] = {}

    def one(self, account: int | None, request_id: str) -> Hold | None:
        """The hold of this id."""
        row = self._connection.execute(_FIND, (account, request_id)).fetchone()
        return None if row is None else _read(row[0])

    def all(self, account: int) -> list[Hold]:
        """Every hold of an account, by the time at which it runs out."""
        return _read_all(self._connection.execute(_FIND_ALL, (account,)))

    def held(self, account: int, charge: Charge, tally: Tally | None) -> int:
        """What holds set aside of a charge's window; where windows roll, also those that none was open for."""
        if charge.window is None:
            return 0
        starts = [micros(charge.window.start)] * 2
        if charge.rolls:
            is_open = tally is not None and charge.request.at < tally.window.end
            starts = [NONE_OPEN, micros(tally.window.start) if tally is not None and is_open else NONE_OPEN]
        place = (account, charge.terms.group, charge.terms.window, *starts)
        return sum(held for _, held in self._connection.execute(_HELD, place))

    def keep(self, account: int, hold: Hold) -> None:
        """Set a hold's tokens aside."""
        group, kind, start = held_in(hold)
        since = NONE_OPEN if start is None else micros(start)
        kept = encode(kept_line(hold)).decode()
        row = (account, hold.id, group or "", kind, since, hold.aside, micros(hold.until), kept)
        self._connection.execute(_ADD, row)

    def drop(self, account: int, request_id: str) -> Hold | None:
        """Give a hold's tokens back, if there is such a hold."""
        hold = self.one(account, request_id)
        if hold is not None:
            self._connection.execute(_DROP, (account, request_id))
        return hold

    def extend(self, account: int, request_id: str, until: datetime) -> Hold | None:
        """Have a hold run out at another time."""
        hold = self.one(account, request_id)
        if hold is None:
            return None
        hold = replace(hold, until=until)
        self._connection.execute(_EXTEND, (micros(until), encode(kept_line(hold)).decode(), account, request_id))
        return hold

    def refused(  # noqa: PLR0911 - a row a case
        self, account: int | None, charge: Charge, now: datetime
    ) -> Receipt | None:
        """Why a charge is not applied now, as far as holds and corrections go."""
        step, request_id = charge.step, charge.request.id
        hold = self.one(account, request_id)
        if type(step) is Correction:
            if hold is not None:
                return held_again(charge, hold)
            is_next = account is not None and self.corrections(account, step.of) == step.number - 1
            return None if is_next else Receipt(Status.STALE)
        if type(step) is Overdue:
            if hold is None or hold.until > now:
                return Receipt(Status.GONE)
            if hold.expiry is Expiry.RELEASED and account is not None:
                self.drop(account, request_id)
                return Receipt(Status.GONE)
            return None
        if hold is not None and (type(step) is Holding or charge.request.at != hold.request.at):
            return held_again(charge, hold)
        due = _read_all(self._connection.execute(_FIND_DUE, (account, micros(now), request_id, DUE_MAX)))
        return Receipt(Status.EXPIRED, due=tuple(due)) if due else None

    def corrections(self, account: int, request_id: str) -> int:
        """How often the decision on a request was corrected."""
        key = (account, request_id)
        if key not in self._corrections:
            (self._corrections[key],) = self._connection.execute(_COUNT, key).fetchone()
        return self._corrections[key]

    def corrected(self, account: int, correction: Correction) -> None:
        """Count a correction whose row is not written yet."""
        self._corrections[account, correction.of] = correction.number

    def claim(self, account: int, name: str, token: str) -> bool:
        """Be the first to claim a name; its token tells who was."""
        self._connection.execute("INSERT INTO claims VALUES (?, ?, ?) ON CONFLICT DO NOTHING", (account, name, token))
        asked = "SELECT token FROM claims WHERE account = ? AND name = ?"
        return bool(self._connection.execute(asked, (account, name)).fetchone() == (token,))


def _read_all(rows: Iterable[tuple[str]]) -> list[Hold]:
    return [_read(kept) for (kept,) in rows]


def _read(kept: str) -> Hold:
    try:
        return kept_of(decode(kept))
    except GratisError as error:
        raise ValueError(f"a hold: {error}") from error
