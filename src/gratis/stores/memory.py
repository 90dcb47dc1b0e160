"""One process, nothing kept after it: the reference store, and the fastest."""

from __future__ import annotations

import os
import weakref
from collections import Counter
from contextlib import nullcontext
from heapq import heappop, heappush
from threading import Lock
from typing import TYPE_CHECKING

from msgspec.structs import replace

from gratis import clock as system
from gratis.chain import UNCHAINED, Stems, link
from gratis.enrollment import change
from gratis.errors import StoreError
from gratis.model import Correction, Durability, Entry, Expiry, Held, Reason
from gratis.rule import Holding, Overdue, admit, decide
from gratis.stores import Bounds, Receipt, Status, again, held_again, held_in, places, stops

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from datetime import datetime

    from gratis.model import Change, Decision, Enrollment, Hold
    from gratis.offer import Revision
    from gratis.rule import Charge, Tally
    from gratis.stores import Cursor, Links

PAGE = 1_000
DUE_MAX = 100
TIMELESS = (Overdue, Correction)  # steps that are about a request whose time was judged before
_DECIDED, _TOO_LATE = (
    Status.DECIDED,
    Reason.TOO_LATE,
)  # looked up once: in Python 3.11 naming a member of an enum is slow


class _Account:
    """All of one account: its changes, its decisions by id, its tallies by window, its holds and what they hold."""

    __slots__ = ("changes", "claims", "corrections", "decisions", "due", "held", "holds", "tallies", "version")

    def __init__(self) -> None:
        self.version = 0
        self.changes: list[Change] = []
        self.decisions: dict[str, Decision] = {}
        self.tallies: dict[tuple[str | None, str], dict[datetime, Tally]] = {}
        self.corrections: dict[str, int] = {}
        self.claims: dict[str, str] = {}
        self.holds: dict[str, Hold] = {}
        self.held: Counter[tuple[str | None, str, datetime | None]] = Counter()
        self.due: list[tuple[datetime, str]] = []  # a heap; a hold that was ended leaves its place in it

    def keep(self, hold: Hold) -> None:
        """Set a hold's tokens aside."""
        self.holds[hold.id] = hold
        self.held[held_in(hold)] += hold.aside
        heappush(self.due, (hold.until, hold.id))

    def drop(self, request_id: str) -> Hold | None:
        """Give a hold's tokens back, if there is such a hold."""
        hold = self.holds.pop(request_id, None)
        if hold is not None:
            place = held_in(hold)
            self.held[place] -= hold.aside
            if self.held[place] == 0:
                del self.held[place]
        return hold

    def ran_out(self, now: datetime, *, but: str | None) -> tuple[Hold, ...]:
        """Some of the holds that ran out of time by now, all but one."""
        while self.due and self._is_stale(*self.due[0]):
            heappop(self.due)
        if not self.due or self.due[0][0] > now:
            return ()
        over = sorted(
            (hold for hold in self.holds.values() if hold.until <= now and hold.id != but),
            key=lambda hold: (hold.until, hold.id),
        )
        return tuple(over[:DUE_MAX])

    def _is_stale(self, until: datetime, request_id: str) -> bool:
        hold = self.holds.get(request_id)
        return hold is None or hold.until != until


class MemoryStore:
    """Keeps everything in memory until it is closed; safe for several threads."""

    durability = Durability.VOLATILE
    is_instant = True
    shards = 1

    def __init__(self, *, clock: Callable[[], datetime] = system.now, bounds: Bounds | None = Bounds()) -> None:
        self._clock = clock
        self._bounds = bounds
        self._lock = Lock()
        self._accounts: dict[tuple[str, str], _Account] = {}
        self._ledger: list[tuple[datetime, Decision]] = []
        self._links: list[str] = []
        self._ends: dict[tuple[str, str], Links] = {}
        self._stems = Stems()
        self._refusal = ""
        _STORES.add(self)

    def now(self) -> datetime:
        """The store's clock."""
        return self._clock()

    def apply(self, charges: Sequence[Charge], *, dry: bool = False) -> list[Receipt]:
        """Apply each charge once, in order; with `dry`, say what would happen and write nothing."""
        with self._lock:
            self._check_open()
            now, bounds = self._clock(), self._bounds
            latest, kept_since = (None, None) if bounds is None else (now + bounds.ahead, now - bounds.keep)
            if len(charges) == 1:
                return [self._apply(charges[0], now, latest, kept_since, dry=dry)]
            return self._apply_many(charges, now, latest, kept_since, dry=dry)

    def _apply_many(
        self,
        charges: Sequence[Charge],
        now: datetime,
        latest: datetime | None,
        kept_since: datetime | None,
        *,
        dry: bool,
    ) -> list[Receipt]:
        receipts: list[Receipt] = []
        stopped: set[tuple[str, str]] = set()
        for charge in charges:
            key = (charge.terms.offer, charge.request.account)
            if key in stopped and charge.request.id not in self._accounts[key].decisions:
                receipts.append(Receipt(Status.WAITING))
                continue
            receipt = self._apply(charge, now, latest, kept_since, dry=dry)
            if receipt.status is not _DECIDED and not dry and stops(charge, receipt):
                stopped.add(key)
            receipts.append(receipt)
        return receipts

    def _apply(
        self, charge: Charge, now: datetime, latest: datetime | None, kept_since: datetime | None, *, dry: bool
    ) -> Receipt:
        key = (charge.terms.offer, charge.request.account)
        account = self._accounts.get(key)
        if account is None:
            account = _Account()
        known = _known(account, charge, now, latest, dry=dry)
        if known is not None:
            return known
        hold = account.holds.get(charge.request.id)
        if hold is not None and charge.step is None and not dry:
            charge = replace(charge, step=Held(hold.tokens_max, hold.window))
        tally = _tally(account, charge)
        if type(charge.step) is Holding:
            hold = admit(charge, tally, held=_held(account, charge, tally), kept_since=kept_since)
            if not dry:
                self._accounts[key] = account
                account.keep(hold)
            return Receipt(Status.HELD, hold=hold)
        decision, after = decide(charge, tally, kept_since=kept_since)
        if decision.reason is _TOO_LATE and decision.correction is not None:
            return Receipt(Status.CLOSED, decision)
        if not dry:
            self._accounts[key] = account
            self._write(account, decision, after, now)
        return Receipt(_DECIDED, decision)

    def _write(self, account: _Account, decision: Decision, after: Tally | None, now: datetime) -> None:
        """Enter a decision with its tally, and end the hold or count the correction that it is."""
        if after is not None:
            terms = decision.terms
            account.tallies.setdefault((terms.group, terms.window), {})[after.window.start] = after
        account.decisions[decision.request.id] = decision
        self._ledger.append((now, decision))
        if decision.hold is not None:
            account.drop(decision.id)
        if decision.correction is not None:
            account.corrections[decision.correction.of] = decision.correction.number

    def extend(self, offer: str, account: str, request_id: str, *, until: datetime) -> Hold | None:
        """Have a hold run out at another time."""
        with self._lock:
            self._check_open()
            known = self._accounts.get((offer, account), _Account())
            hold = known.drop(request_id)
            if hold is None:
                return None
            hold = replace(hold, until=until)
            known.keep(hold)
            return hold

    def release(self, offer: str, account: str, request_id: str) -> Hold | None:
        """Give back what a hold set aside."""
        with self._lock:
            self._check_open()
            return self._accounts.get((offer, account), _Account()).drop(request_id)

    def holds(self, offer: str, account: str) -> list[Hold]:
        """Every hold of an account that was not ended, by the time at which it runs out."""
        with self._lock:
            known = self._accounts.get((offer, account), _Account())
            return sorted(known.holds.values(), key=lambda hold: (hold.until, hold.id))

    def corrections(self, offer: str, account: str, request_id: str) -> int:
        """How often the decision on a request was corrected."""
        with self._lock:
            return self._accounts.get((offer, account), _Account()).corrections.get(request_id, 0)

    def claim(self, offer: str, account: str, name: str, *, until: datetime, token: str) -> bool:  # noqa: ARG002 - kept for good
        """Be the first to claim a name, and the only one."""
        with self._lock:
            self._check_open()
            claims = self._accounts.setdefault((offer, account), _Account()).claims
            return claims.setdefault(name, token) == token

    def enroll(
        self, offer: str, account: str, enrollment: Enrollment, *, actor: str, revision: Revision | None
    ) -> Change:
        """Change an account's enrollment."""
        with self._lock:
            self._check_open()
            known = self._accounts.get((offer, account), _Account())
            made = change(known.changes, enrollment, actor=actor, at=self._clock(), revision=revision)
            known.changes.append(made)
            known.version = made.version
            self._accounts[offer, account] = known
            return made

    def enrollments(self, offer: str, account: str) -> list[Change]:
        """Every change of an account's enrollment, oldest first."""
        with self._lock:
            known = self._accounts.get((offer, account))
            return [] if known is None else list(known.changes)

    def tallies(self, offer: str, account: str, *, at: datetime | None = None) -> list[tuple[str, str, Tally]]:
        """Group, kind of window and tally of an account's windows, or of those that take a request of an instant."""
        with self._lock:
            return self._tallies(offer, account, at)

    def _tallies(self, offer: str, account: str, at: datetime | None) -> list[tuple[str, str, Tally]]:
        known = self._accounts.get((offer, account))
        return [
            (group or "", window, tally)
            for (group, window), tallies in (known.tallies if known else {}).items()
            for tally in tallies.values()
            if at is None or (at < tally.window.end and (tally.window.start <= at or window.startswith("rolling ")))
        ]

    def counters(self, offer: str, account: str) -> tuple[int, int, list[tuple[str, str, Tally]]]:
        """All of an account's tallies at one moment, with its shard and the last entry there at that moment."""
        with self._lock:
            return 0, len(self._ledger), self._tallies(offer, account, None)

    def links(self, offer: str, account: str) -> tuple[int, int, Links]:
        """The last link of each of an account's windows, with its shard and the last entry there at that moment."""
        with self._lock:
            self._chain(len(self._ledger))
            return 0, len(self._ledger), dict(self._ends.get((offer, account), {}))

    def _chain(self, upto: int) -> None:
        """Chain what was decided: only when it is read, since nobody else can reach it before."""
        for now, decision in self._ledger[len(self._links) : upto]:
            terms, window = decision.terms, decision.window
            place = None if window is None else (terms.group or "", terms.window, window.start)
            ends = self._ends.setdefault((decision.offer, decision.account), {})
            ends[place] = link(ends.get(place, UNCHAINED), self._stems.of(decision), decision, now)
            self._links.append(ends[place])

    def entries(self, *, after: Cursor = 0, upto: Cursor | None = None) -> Iterator[Entry]:
        """The ledger from behind an entry on, in order."""
        (place,) = places(after, shards=1)
        end = None if upto is None else places(upto, shards=1)[0]
        while True:
            with self._lock:
                last = len(self._ledger) if end is None else min(end, len(self._ledger))
                upto = min(place + PAGE, last)
                self._chain(upto)
                page = list(zip(self._ledger[place:upto], self._links[place:upto], strict=True))
            if not page:
                return
            for (now, decision), linked in page:
                place += 1
                yield Entry(place, now, decision, link=linked)

    def frozen(self) -> AbstractContextManager[None]:
        """All that is read meanwhile is read as of one moment: nobody else has this store."""
        return nullcontext()

    def accounts(self) -> list[tuple[str, str]]:
        """Offer and name of each account that the store knows."""
        with self._lock:
            return list(self._accounts)

    def close(self) -> None:
        """A closed store refuses."""
        self._refusal = "this memory store is closed"

    def after_fork(self) -> None:
        """In a forked child: two copies of one allowance would be spent twice, so this one refuses."""
        self._lock = Lock()
        self._refusal = "a memory store is of one process; after a fork this is another"

    def _check_open(self) -> None:
        if self._refusal:
            raise StoreError(self._refusal)


def _known(account: _Account, charge: Charge, now: datetime, latest: datetime | None, *, dry: bool) -> Receipt | None:
    """The answer to a charge that needs no judgement: it was decided before, or cannot be applied now."""
    first = account.decisions.get(charge.request.id)
    if first is not None:
        if type(charge.step) is Overdue and not dry:
            account.drop(charge.request.id)
        return again(charge, first)
    if latest is not None and charge.request.at > latest and type(charge.step) not in TIMELESS:
        return Receipt(Status.AHEAD, now=now)
    if charge.version != account.version and type(charge.step) is not Correction:
        return Receipt(Status.OUTDATED, change=account.changes[-1] if account.changes else None)
    if (account.holds or charge.step is not None) and not dry:
        return _refused(account, charge, now)
    return None


def _refused(account: _Account, charge: Charge, now: datetime) -> Receipt | None:  # noqa: PLR0911 - a row a case
    """Why a charge is not applied now, as far as holds and corrections go."""
    step, request_id = charge.step, charge.request.id
    hold = account.holds.get(request_id)
    if type(step) is Correction:
        if hold is not None:
            return held_again(charge, hold)
        is_next = account.corrections.get(step.of, 0) == step.number - 1
        return None if is_next else Receipt(Status.STALE)
    if type(step) is Overdue:
        if hold is None or hold.until > now:
            return Receipt(Status.GONE)
        if hold.expiry is Expiry.RELEASED:
            account.drop(request_id)
            return Receipt(Status.GONE)
        return None
    if hold is not None and (type(step) is Holding or charge.request.at != hold.request.at):
        return held_again(charge, hold)
    due = account.ran_out(now, but=request_id)
    return Receipt(Status.EXPIRED, due=due) if due else None


def _tally(account: _Account, charge: Charge) -> Tally | None:
    """The tally of a charge's window; where windows roll, of the last one opened, unless it is another's turn."""
    tallies = account.tallies.get((charge.terms.group, charge.terms.window))
    if tallies is None or charge.window is None:
        return None
    if not charge.rolls:
        return tallies.get(charge.window.start)
    pin = charge.pin
    return tallies[pin.start if pin is not None and pin.start in tallies else next(reversed(tallies))]


def _held(account: _Account, charge: Charge, tally: Tally | None) -> int:
    """What holds set aside of the window of a charge; where windows roll, also those that none was open for."""
    terms = charge.terms
    if charge.window is None:
        return 0
    if not charge.rolls:
        return account.held[terms.group, terms.window, charge.window.start]
    held = account.held[terms.group, terms.window, None]
    if tally is not None and charge.request.at < tally.window.end:
        held += account.held[terms.group, terms.window, tally.window.start]
    return held


_STORES: weakref.WeakSet[MemoryStore] = weakref.WeakSet()


def _after_fork() -> None:
    for store in list(_STORES):
        store.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
