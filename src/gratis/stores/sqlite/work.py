"""One transaction's work on a SQLite store, and its rows.

The rule is Python's, called inside the transaction. What the work read is read once, and what it changed is
written at its end; the keys that stand for accounts and terms never change, so they are remembered between.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from gratis.enrollment import change
from gratis.errors import GratisError, UnreadableEntry
from gratis.lines import (
    correction_line,
    correction_of,
    decode,
    encode,
    enrollment_line,
    enrollment_of,
    hold_line,
    hold_of,
    terms_line,
    terms_of,
)
from gratis.model import (
    EPOCH,
    Change,
    Correction,
    Decision,
    Durability,
    Entry,
    Held,
    Kind,
    Reason,
    Request,
    Window,
    from_micros,
    micros,
)
from gratis.rule import Holding, Overdue, Tally, admit, decide
from gratis.stores import Receipt, Status, again, stops
from gratis.stores.sqlite.file import UNREADABLE
from gratis.stores.sqlite.holds import Holds

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator, Sequence

    from gratis.model import Enrollment, Hold, Terms
    from gratis.offer import Revision
    from gratis.rule import Charge
    from gratis.stores import Bounds

TERMS_CACHED_MAX = 10_000
_DECIDED, _TOO_LATE = (
    Status.DECIDED,
    Reason.TOO_LATE,
)  # looked up once: in Python 3.11 naming a member of an enum is slow

_TallyKey = tuple[int, str | None, str, datetime | None]

_FIND_ACCOUNT = "SELECT account FROM accounts WHERE offer = ? AND name = ?"
_GET_VERSION = (
    "SELECT version, EXISTS (SELECT 1 FROM holds h WHERE h.account = a.account) FROM accounts a WHERE account = ?"
)
_FIND_ID = (
    "SELECT a.version, EXISTS (SELECT 1 FROM holds h WHERE h.account = a.account), l.entry"
    " FROM accounts a LEFT JOIN ledger l ON l.account = a.account AND l.id = ? WHERE a.account = ?"
)
_FIND_IDS = "SELECT l.id, l.entry FROM json_each(?) asked CROSS JOIN ledger l ON l.account = ? AND l.id = asked.value"
_FIND_CALENDAR = (
    'SELECT window, start, end, used, seq FROM windows WHERE account = ? AND "group" = ? AND kind = ? AND start = ?'
)
_FIND_ROLLING = (
    'SELECT window, start, end, used, seq FROM windows WHERE account = ? AND "group" = ? AND kind = ?'
    " ORDER BY start DESC LIMIT 1"
)
_ADD_WINDOW = 'INSERT INTO windows (account, "group", kind, start, end, used, seq) VALUES (?, ?, ?, ?, ?, ?, ?)'
_SET_WINDOW = 'UPDATE windows SET "end" = ?, used = ?, seq = ? WHERE window = ?'
_ADD_ENTRY = (
    "INSERT INTO ledger (account, id, terms, model, project, input_tokens, output_tokens, cached_tokens, kind, tools,"
    " at, reason, free_tokens, used, total, window, seq, decided_at, durability, hold, correction, corrects)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_ADD_CHANGE = "INSERT INTO enrollments VALUES (?, ?, ?, ?, ?)"
_GET_CHANGES = "SELECT version, at, actor, enrollment FROM enrollments WHERE account = ? ORDER BY version"
_GET_TALLIES = (
    'SELECT "group", w.kind, start, end, used, seq FROM windows w JOIN accounts a ON a.account = w.account'
    " WHERE a.offer = ? AND a.name = ? AND (? IS NULL OR (? < end AND (start <= ? OR w.kind LIKE 'rolling %')))"
    ' ORDER BY "group", w.kind, start'
)
_GET_ENTRIES = (
    "SELECT l.entry, a.name, l.id, l.terms, l.model, l.project, l.input_tokens, l.output_tokens, l.cached_tokens,"
    " l.kind, l.tools, l.at, l.reason, l.free_tokens, l.used, l.total, w.start, w.end, l.seq, l.decided_at,"
    " l.durability, l.hold, l.correction, l.corrects"
    " FROM ledger l JOIN accounts a ON a.account = l.account LEFT JOIN windows w ON w.window = l.window WHERE "
)


class Keys:
    """The keys by which rows name accounts and terms; forgotten when a transaction is rolled back."""

    def __init__(self) -> None:
        self.accounts: dict[tuple[str, str], int] = {}
        self.terms: dict[Terms, int] = {}
        self.by_key: dict[int, Terms] = {}

    def forget(self) -> None:
        """Forget them: some may stand for rows that never came to be."""
        self.accounts.clear()
        self.terms.clear()
        self.by_key.clear()


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
        self._known: dict[int, tuple[int, dict[str, int]]] = {}
        self._holding: set[int] = set()  # accounts that have holds
        self._stopped: set[tuple[str, str]] = set()  # those of which a charge is to be dealt with first
        self._decided: dict[tuple[int, str], Decision] = {}
        self._rows: list[tuple[Any, ...]] = []
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
        if len(self._rows) == 1:
            self._connection.execute(_ADD_ENTRY, self._rows[0])
        elif self._rows:
            self._connection.executemany(_ADD_ENTRY, self._rows)
        for window, tally in self._changed.items():
            self._connection.execute(_SET_WINDOW, (micros(tally.window.end), tally.used, tally.seq, window))
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
        if after is None:
            window = None
        elif window is None or tally is None or tally.window.start != after.window.start:
            window = self._add_window(account, decision.terms, after)
            self._tallies[key] = (window, after)
        else:
            self._changed[window] = after
            self._tallies[key] = (window, after)
        self._decided[account, decision.request.id] = decision
        self._rows.append(self._row(account, decision, window))
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
                version, has_holds, entry = self._connection.execute(_FIND_ID, (ids[0], account)).fetchone()
                self._known[account] = (version, {} if entry is None else {ids[0]: entry})
            else:
                version, has_holds = self._connection.execute(_GET_VERSION, (account,)).fetchone()
                rows = self._connection.execute(_FIND_IDS, (encode(ids).decode(), account))
                self._known[account] = (version, dict(rows.fetchall()))
            if has_holds:
                self._holding.add(account)

    def _found(self, account: int | None, request_id: str) -> tuple[int, Decision | None]:
        """The version of the account's enrollment, and the decision that this id has already."""
        if account is None:
            return 0, None
        version, entries = self._known.get(account, (0, {}))
        first = self._decided.get((account, request_id))
        entry = entries.get(request_id)
        if first is None and entry is not None:
            first = self._entry(self._connection.execute(_GET_ENTRIES + "l.entry = ?", (entry,)).fetchone()).decision
            if first.seq is not None and first.window is None:
                raise ValueError(f"ledger entry {entry}: its window is gone")
        return version, first

    def _row(self, account: int, decision: Decision, window: int | None) -> tuple[Any, ...]:
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
            micros(self._now),
            self._durability.value,
            None if decision.hold is None else encode(hold_line(decision.hold)).decode(),
            None if decision.correction is None else encode(correction_line(decision.correction)).decode(),
            None if decision.correction is None else decision.correction.of,
        )

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

    def claim(self, offer: str, name: str, claimed: str) -> bool:
        """Be the first to claim a name."""
        account = self.account(offer, name)
        return self._holds.claim(self._add_account(offer, name) if account is None else account, claimed)

    def tallies(self, offer: str, name: str, at: datetime | None) -> list[tuple[str, str, Tally]]:
        """Group, kind of window and tally of an account's windows, or of those that take a request of an instant."""
        instant = None if at is None else micros(at)
        rows = self._connection.execute(_GET_TALLIES, (offer, name, instant, instant, instant))
        return [
            (group, kind, Tally(Window(from_micros(start), from_micros(end)), used, seq))
            for group, kind, start, end, used, seq in rows
        ]

    def entries(self, *, after: int, upto: int, most: int) -> Iterator[Entry]:
        """So many entries of the ledger, from behind one on."""
        where = "l.entry > ? AND l.entry <= ? ORDER BY l.entry LIMIT ?"
        for row in self._connection.execute(_GET_ENTRIES + where, (after, upto, most)).fetchall():
            try:
                yield self._entry(row)
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
            window, start, end, used, seq = row
            tally = Tally(Window(from_micros(start), from_micros(end)), used, seq)
            self._tallies[key] = (window, self._changed.get(window, tally))
        return self._tallies[key]

    def _add_window(self, account: int, terms: Terms, tally: Tally) -> int:
        start, end = micros(tally.window.start), micros(tally.window.end)
        row = (account, terms.group, terms.window, start, end, tally.used, tally.seq)
        key = self._connection.execute(_ADD_WINDOW, row).lastrowid
        assert key is not None, "an insert has a row id"
        return key

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

    def _entry(self, row: tuple[Any, ...]) -> Entry:
        """The entry of a row; what cannot be one is a `ValueError`, as is all else that cannot be read."""
        try:
            return self._read(row)
        except GratisError as error:
            raise ValueError(f"ledger entry {row[0]}: {error}") from error

    def _read(self, row: tuple[Any, ...]) -> Entry:
        (
            entry, name, request_id, terms, model, project, input_tokens, output_tokens, cached_tokens,
            kind, tools, at, reason, free_tokens, used, total, start, end, seq, decided_at, durability,
            hold, correction, corrects,
        ) = row  # fmt: skip
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
        return Entry(entry, from_micros(decided_at), decision)

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


def _key(account: int, charge: Charge) -> _TallyKey:
    """What tells a tally in one file; where windows roll there is one that counts, the last."""
    start = None if charge.rolls or charge.window is None else charge.window.start
    return account, charge.terms.group, charge.terms.window, start
