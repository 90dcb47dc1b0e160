"""One transaction's work on a SQLite store.

The rule is Python's, called inside the transaction. What the work read is read once, and what it changed is
written at its end.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from gratis.chain import UNCHAINED, link
from gratis.enrollment import change
from gratis.errors import GratisError, UnreadableEntry
from gratis.lines import (
    decode,
    encode,
    enrollment_line,
    enrollment_of,
)
from gratis.model import (
    EPOCH,
    Change,
    Correction,
    Decision,
    Durability,
    Entry,
    Held,
    Reason,
    Window,
    from_micros,
    micros,
)
from gratis.rule import Holding, Overdue, Tally, admit, decide
from gratis.stores import Receipt, Status, again, stops
from gratis.stores.sqlite.file import UNREADABLE
from gratis.stores.sqlite.holds import Holds
from gratis.stores.sqlite.rows import Rows

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator, Sequence

    from gratis.model import Enrollment, Hold, Terms
    from gratis.offer import Revision
    from gratis.rule import Charge
    from gratis.stores import Bounds, Links
    from gratis.stores.sqlite.rows import Keys

_DECIDED, _TOO_LATE = Status.DECIDED, Reason.TOO_LATE

_TallyKey = tuple[int, str | None, str, datetime | None]

_FIND_ACCOUNT = "SELECT account FROM accounts WHERE offer = ? AND name = ?"
_GET_VERSION = (
    "SELECT version, a.link, EXISTS (SELECT 1 FROM holds h WHERE h.account = a.account) FROM accounts a"
    " WHERE account = ?"
)
_FIND_ID = (
    "SELECT a.version, a.link, EXISTS (SELECT 1 FROM holds h WHERE h.account = a.account), l.entry"
    " FROM accounts a LEFT JOIN ledger l ON l.account = a.account AND l.id = ? WHERE a.account = ?"
)
_FIND_IDS = "SELECT l.id, l.entry FROM json_each(?) asked CROSS JOIN ledger l ON l.account = ? AND l.id = asked.value"
_FIND_CALENDAR = (
    "SELECT window, start, end, used, seq, link FROM windows"
    ' WHERE account = ? AND "group" = ? AND kind = ? AND start = ?'
)
_FIND_ROLLING = (
    'SELECT window, start, end, used, seq, link FROM windows WHERE account = ? AND "group" = ? AND kind = ?'
    " ORDER BY start DESC LIMIT 1"
)
_ADD_WINDOW = (
    'INSERT INTO windows (account, "group", kind, start, end, used, seq, link) VALUES (?, ?, ?, ?, ?, ?, ?, ?)'
)
_SET_WINDOW = 'UPDATE windows SET "end" = ?, used = ?, seq = ?, link = ? WHERE window = ?'
_SET_OUTSIDE = "UPDATE accounts SET link = ? WHERE account = ?"
_GET_LINKS = (
    'SELECT w."group", w.kind, w.start, w.link FROM windows w JOIN accounts a ON a.account = w.account'
    " WHERE a.offer = ? AND a.name = ? UNION ALL"
    " SELECT NULL, NULL, NULL, link FROM accounts WHERE offer = ? AND name = ?"
)
_ADD_CHANGE = "INSERT INTO enrollments VALUES (?, ?, ?, ?, ?)"
_GET_CHANGES = "SELECT version, at, actor, enrollment FROM enrollments WHERE account = ? ORDER BY version"
_GET_TALLIES = (
    'SELECT "group", w.kind, start, end, used, seq FROM windows w JOIN accounts a ON a.account = w.account'
    " WHERE a.offer = ? AND a.name = ? AND (? IS NULL OR (? < end AND (start <= ? OR w.kind LIKE 'rolling %')))"
    ' ORDER BY "group", w.kind, start'
)


class Work:
    """One transaction's work: what it read is read once, what it changed is written at the end."""

    def __init__(
        self, connection: sqlite3.Connection, keys: Keys, *, durability: Durability, bounds: Bounds | None
    ) -> None:
        self._connection = connection
        self._keys = keys
        self._durability = durability
        self._bounds = bounds
        self._tallies: dict[_TallyKey, tuple[int, Tally]] = {}
        self._changed: dict[int, Tally] = {}
        self._links: dict[int, str] = {}  # of each window its last one
        self._outside: dict[int, str] = {}  # and of each account outside any window
        self._left: set[int] = set()  # accounts of which that changed
        self._known: dict[int, tuple[int, dict[str, int]]] = {}
        self._holding: set[int] = set()  # accounts that have holds
        self._stopped: set[tuple[str, str]] = set()  # those of which a charge is to be dealt with first
        self._decided: dict[tuple[int, str], Decision] = {}
        self._written: list[tuple[Any, ...]] = []
        self._rows = Rows(connection, keys)
        self._now = EPOCH
        self._latest: datetime | None = None
        self._kept_since: datetime | None = None
        self._holds = Holds(connection)

    def run(self, charges: Sequence[Charge], now: datetime, *, dry: bool) -> list[Receipt]:
        """Apply each charge, in order."""
        self._now, bounds = now, self._bounds
        if bounds is not None:
            self._latest, self._kept_since = now + bounds.ahead, now - bounds.keep
        self._look_up(charges)
        receipts = [self._apply_next(charge, dry=dry) for charge in charges]
        self._rows.add(self._written)
        for window, tally in self._changed.items():
            row = (micros(tally.window.end), tally.used, tally.seq, self._links[window], window)
            self._connection.execute(_SET_WINDOW, row)
        for account in self._left:
            self._connection.execute(_SET_OUTSIDE, (self._outside[account], account))
        return receipts

    def _apply_next(self, charge: Charge, *, dry: bool) -> Receipt:
        """Apply a charge, unless one before it is to be dealt with first."""
        key = (charge.terms.offer, charge.request.account)
        if key in self._stopped and self._found(self.account(*key), charge.request.id)[1] is None:
            return Receipt(Status.WAITING)
        receipt = self._apply(charge, dry=dry)
        if receipt.status is not _DECIDED and not dry and stops(charge, receipt):
            self._stopped.add(key)
        return receipt

    def _apply(self, charge: Charge, *, dry: bool) -> Receipt:
        request, terms = charge.request, charge.terms
        account = self.account(terms.offer, request.account)
        version, first = self._found(account, request.id)
        known = self._known_answer(account, charge, first, version, dry=dry)
        if known is not None:
            return known
        if account in self._holding and charge.step is None and not dry:
            hold = self._holds.one(account, request.id)
            if hold is not None:
                charge = replace(charge, step=Held(hold.tokens_max, hold.window))
        window, tally, key = (None, None, None) if account is None else self._tally(account, charge)
        if type(charge.step) is Holding:
            held = 0 if account is None else self._holds.held(account, charge, tally)
            hold = admit(charge, tally, held=held, kept_since=self._kept_since)
            if not dry:
                account = account or self._add_account(terms.offer, request.account)
                self._holds.keep(account, hold)
                self._holding.add(account)
            return Receipt(Status.HELD, hold=hold)
        decision, after = decide(charge, tally, kept_since=self._kept_since, durability=self._durability)
        if decision.reason is _TOO_LATE and decision.correction is not None:
            return Receipt(Status.CLOSED, decision)
        if not dry:
            account = account or self._add_account(terms.offer, request.account)
            self._write(account, decision, after, (key or _key(account, charge), window, tally))
        return Receipt(_DECIDED, decision)

    def _known_answer(
        self, account: int | None, charge: Charge, first: Decision | None, version: int, *, dry: bool
    ) -> Receipt | None:
        """The answer to a charge that needs no judgement: it was decided before, or cannot be applied now."""
        if first is not None:
            if type(charge.step) is Overdue and account is not None and not dry:
                self._holds.drop(account, charge.request.id)
            return again(charge, first)
        is_ahead = self._latest is not None and charge.request.at > self._latest
        if is_ahead and type(charge.step) not in {Overdue, Correction}:
            return Receipt(Status.AHEAD, now=self._now)
        if version != charge.version and type(charge.step) is not Correction:
            history = self._history(account)
            return Receipt(Status.OUTDATED, change=history[-1] if history else None)
        if (account in self._holding or charge.step is not None) and not dry:
            return self._holds.refused(account, charge, self._now)
        return None

    def _write(
        self,
        account: int,
        decision: Decision,
        after: Tally | None,
        place: tuple[_TallyKey, int | None, Tally | None],
    ) -> None:
        """Enter a decision with its tally, and end the hold that it settles."""
        key, window, tally = place
        is_new = window is None or tally is None or after is None or tally.window.start != after.window.start
        before = self._outside.get(account, UNCHAINED) if after is None else UNCHAINED
        if window is not None and not is_new:
            before = self._links[window]
        linked = link(before, self._keys.stems.of(decision), decision, self._now)
        if after is None:
            window, self._outside[account] = None, linked
            self._left.add(account)
        elif window is None or is_new:
            window = self._add_window(account, decision.terms, after, linked)
        else:
            self._changed[window] = after
        if window is not None and after is not None:
            self._tallies[key], self._links[window] = (window, after), linked
        self._decided[account, decision.request.id] = decision
        row = self._rows.row(account, decision, window, now=self._now, durability=self._durability, linked=linked)
        self._written.append(row)
        if decision.hold is not None:
            self._holds.drop(account, decision.id)
        if decision.correction is not None:
            self._holds.corrected(account, decision.correction)

    def _look_up(self, charges: Sequence[Charge]) -> None:
        """Ask once for each account which version its enrollment has, and which of the ids were decided before."""
        asked: dict[tuple[str, str], list[str]] = {}
        for charge in charges:
            asked.setdefault((charge.terms.offer, charge.request.account), []).append(charge.request.id)
        for (offer, name), ids in asked.items():
            account = self.account(offer, name)
            if account is None:
                continue
            if len(ids) == 1:
                version, outside, has_holds, entry = self._connection.execute(_FIND_ID, (ids[0], account)).fetchone()
                self._known[account] = (version, {} if entry is None else {ids[0]: entry})
            else:
                version, outside, has_holds = self._connection.execute(_GET_VERSION, (account,)).fetchone()
                rows = self._connection.execute(_FIND_IDS, (encode(ids).decode(), account))
                self._known[account] = (version, dict(rows.fetchall()))
            if has_holds:
                self._holding.add(account)
            self._outside.setdefault(account, outside or UNCHAINED)

    def _found(self, account: int | None, request_id: str) -> tuple[int, Decision | None]:
        """The version of the account's enrollment, and the decision that this id has already."""
        if account is None:
            return 0, None
        version, entries = self._known.get(account, (0, {}))
        first = self._decided.get((account, request_id))
        entry = entries.get(request_id)
        if first is None and entry is not None:
            first = self._rows.entry(self._rows.found("l.entry = ?", (entry,))[0]).decision
            if first.seq is not None and first.window is None:
                raise ValueError(f"ledger entry {entry}: its window is gone")
        return version, first

    def enroll(
        self, offer: str, name: str, enrollment: Enrollment, *, actor: str, now: datetime, revision: Revision | None
    ) -> Change:
        """Change an account's enrollment."""
        account = self.account(offer, name)
        if account is None:
            account = self._add_account(offer, name)
        made = change(self._history(account), enrollment, actor=actor, at=now, revision=revision)
        facts = encode(enrollment_line(made.enrollment)).decode()
        self._connection.execute(_ADD_CHANGE, (account, made.version, micros(made.at), actor, facts))
        self._connection.execute("UPDATE accounts SET version = ? WHERE account = ?", (made.version, account))
        return made

    def enrollments(self, offer: str, name: str) -> list[Change]:
        """Every change of an account's enrollment, oldest first."""
        account = self.account(offer, name)
        return [] if account is None else self._history(account)

    def extend(self, offer: str, name: str, request_id: str, until: datetime) -> Hold | None:
        """Have a hold run out at another time."""
        account = self.account(offer, name)
        return None if account is None else self._holds.extend(account, request_id, until)

    def release(self, offer: str, name: str, request_id: str) -> Hold | None:
        """Give back what a hold set aside."""
        account = self.account(offer, name)
        return None if account is None else self._holds.drop(account, request_id)

    def holds(self, offer: str, name: str) -> list[Hold]:
        """Every hold of an account, by the time at which it runs out."""
        account = self.account(offer, name)
        return [] if account is None else self._holds.all(account)

    def corrections(self, offer: str, name: str, request_id: str) -> int:
        """How often the decision on a request was corrected."""
        account = self.account(offer, name)
        return 0 if account is None else self._holds.corrections(account, request_id)

    def claim(self, offer: str, name: str, claimed: str, token: str) -> bool:
        """Be the first to claim a name."""
        account = self.account(offer, name)
        return self._holds.claim(self._add_account(offer, name) if account is None else account, claimed, token)

    def tallies(self, offer: str, name: str, at: datetime | None) -> list[tuple[str, str, Tally]]:
        """Group, kind of window and tally of an account's windows, or of those that take a request of an instant."""
        instant = None if at is None else micros(at)
        rows = self._connection.execute(_GET_TALLIES, (offer, name, instant, instant, instant))
        return [
            (group, kind, Tally(Window(from_micros(start), from_micros(end)), used, seq))
            for group, kind, start, end, used, seq in rows
        ]

    def links(self, offer: str, name: str) -> Links:
        """The last link of each of an account's windows, and of what is outside any."""
        rows = self._connection.execute(_GET_LINKS, (offer, name, offer, name))
        return {
            None if group is None else (group, kind, from_micros(start)): linked
            for group, kind, start, linked in rows
            if linked is not None
        }

    def entries(self, *, after: int, upto: int, most: int) -> Iterator[Entry]:
        """So many entries of the ledger, from behind one on."""
        where = "l.entry > ? AND l.entry <= ? ORDER BY l.entry LIMIT ?"
        for row in self._rows.found(where, (after, upto, most)):
            try:
                yield self._rows.entry(row)
            except UNREADABLE as error:
                raise UnreadableEntry(row[0], str(error)) from error

    def last_entry(self) -> int:
        """The number of the last entry of the ledger."""
        (last,) = self._connection.execute("SELECT coalesce(max(entry), 0) FROM ledger").fetchone()
        return int(last)

    def _history(self, account: int | None) -> list[Change]:
        rows = self._connection.execute(_GET_CHANGES, (account,)).fetchall()
        try:
            return [
                Change(version, from_micros(at), actor, enrollment_of(decode(facts)))
                for version, at, actor, facts in rows
            ]
        except GratisError as error:
            raise ValueError(f"enrollment of account {account}: {error}") from error

    def account(self, offer: str, name: str) -> int | None:
        """The account's key in the file, if it has one."""
        key = self._keys.accounts.get((offer, name))
        if key is None:
            row = self._connection.execute(_FIND_ACCOUNT, (offer, name)).fetchone()
            if row is None:
                return None
            key = self._keys.accounts[offer, name] = int(row[0])
        return key

    def _add_account(self, offer: str, name: str) -> int:
        key = self._connection.execute("INSERT INTO accounts (offer, name) VALUES (?, ?)", (offer, name)).lastrowid
        assert key is not None, "an insert has a row id"
        self._keys.accounts[offer, name] = key
        return key

    def _tally(self, account: int, charge: Charge) -> tuple[int | None, Tally | None, _TallyKey | None]:
        """The window of a charge, its tally and what tells it; where windows roll, of the last one opened.

        One that is pinned to another window has that, if there is such a window.
        """
        if charge.window is None:
            return None, None, None
        key = _key(account, charge)
        window, tally = self._read_tally(key)
        if charge.rolls and charge.pin is not None and (tally is None or tally.window.start != charge.pin.start):
            pinned = (*key[:3], charge.pin.start)
            found, its = self._read_tally(pinned)
            if found is not None:
                return found, its, pinned
        return window, tally, key

    def _read_tally(self, key: _TallyKey) -> tuple[int | None, Tally | None]:
        if key not in self._tallies:
            *place, start = key
            if start is None:
                row = self._connection.execute(_FIND_ROLLING, place).fetchone()
            else:
                row = self._connection.execute(_FIND_CALENDAR, (*place, micros(start))).fetchone()
            if row is None:
                return None, None
            window, start, end, used, seq, linked = row
            self._links.setdefault(window, linked or UNCHAINED)
            tally = Tally(Window(from_micros(start), from_micros(end)), used, seq)
            self._tallies[key] = (window, self._changed.get(window, tally))
        return self._tallies[key]

    def _add_window(self, account: int, terms: Terms, tally: Tally, linked: str) -> int:
        start, end = micros(tally.window.start), micros(tally.window.end)
        row = (account, terms.group, terms.window, start, end, tally.used, tally.seq, linked)
        key = self._connection.execute(_ADD_WINDOW, row).lastrowid
        assert key is not None, "an insert has a row id"
        return key


def _key(account: int, charge: Charge) -> _TallyKey:
    """What tells a tally in one file; where windows roll there is one that counts, the last."""
    start = None if charge.rolls or charge.window is None else charge.window.start
    return account, charge.terms.group, charge.terms.window, start
