"""What the pure rule answers: a model of one offer's accounts, built on `gratis.rule` alone and kept apart from stores.

It is asked in one order, by one caller. Holds run out of time in no history: before that they are given back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from gratis.classify import charge_for
from gratis.enrollment import change
from gratis.errors import EnrollmentError
from gratis.model import Decision, Durability, Held, Hold
from gratis.rule import Holding as Until, admit, decide
from gratis.stores import CONFLICT_FIELDS

if TYPE_CHECKING:
    from datetime import datetime

    from gratis.model import Change, Enrollment, Expiry, Request, Window
    from gratis.offer import Offer
    from gratis.rule import Charge, Tally
    from gratis.stores import Bounds


class Clash(Struct, frozen=True):
    """The id was decided, or is held, with another content: which field differs, and what stands."""

    field: str
    first: Decision | None
    hold: Hold | None = None


class Refused(Struct, frozen=True):
    """Nothing was written, because of this field."""

    field: str


Answer = Decision | Clash | Refused


class Account:
    """All that is known of one account."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.decisions: dict[str, Decision] = {}
        self.versions: dict[str, int] = {}
        self.rows: list[tuple[datetime, Decision]] = []
        self.holds: dict[str, Hold] = {}
        self.tallies: dict[tuple[str, str], dict[datetime, Tally]] = {}

    def enrollment(self, version: int | None = None) -> Enrollment | None:
        """The enrollment after so many changes; the latest if nothing is said."""
        changes = self.changes[:version]
        return changes[-1].enrollment if changes else None


class Expected:
    """What the rule gives, one question after another."""

    def __init__(self, offer: Offer, bounds: Bounds) -> None:
        self.accounts: dict[str, Account] = {}
        self._offer = offer
        self._bounds = bounds

    def enroll(self, name: str, enrollment: Enrollment, *, actor: str, now: datetime) -> Change | Refused:
        """The change of an account's enrollment."""
        account = self.accounts.get(name, Account())
        try:
            made = change(account.changes, enrollment, actor=actor, at=now, revision=self._offer.at(now))
        except EnrollmentError:
            return Refused("enrollment")
        account.changes.append(made)
        self.accounts[name] = account
        return made

    def decide(self, request: Request, now: datetime, *, version: int | None = None) -> Answer:
        """The decision on a request, or the first one again, or why there is none."""
        account = self.accounts.get(request.account, Account())
        first = account.decisions.get(request.id)
        if first is not None:
            return again(request, first)
        if request.at > now + self._bounds.ahead:
            return Refused("at")
        hold = account.holds.get(request.id)
        if hold is not None and hold.at != request.at:
            return Clash("at", None, hold)
        charge = charge_for(self._offer, request, account.enrollment(version))
        if hold is not None:
            charge = replace(charge, step=Held(hold.tokens_max, hold.window))
        decision, after = decide(charge, _tally(account, charge), kept_since=now - self._bounds.keep)
        if after is not None:
            account.tallies.setdefault(_place(charge), {})[after.window.start] = after
        account.decisions[request.id] = decision
        account.versions[request.id] = len(account.changes) if version is None else version
        account.rows.append((now, decision))
        account.holds.pop(request.id, None)
        self.accounts[request.account] = account
        return decision

    def hold(self, request: Request, now: datetime, *, until: datetime, expiry: Expiry) -> Hold | Refused | None:
        """What a hold says; None where the id is known, which histories leave to `decide`."""
        account = self.accounts.get(request.account, Account())
        if request.id in account.decisions or request.id in account.holds:
            return None
        if request.at > now + self._bounds.ahead:
            return Refused("at")
        charge = replace(charge_for(self._offer, request, account.enrollment()), step=Until(until, expiry))
        tally = _tally(account, charge)
        hold = admit(charge, tally, held=_held(account, charge, tally), kept_since=now - self._bounds.keep)
        account.holds[request.id] = hold
        self.accounts[request.account] = account
        return hold

    def release(self, name: str, request_id: str) -> Hold | None:
        """The hold that is given back, if there is one."""
        account = self.accounts.get(name)
        return None if account is None else account.holds.pop(request_id, None)

    def due(self, now: datetime) -> list[Hold]:
        """The holds that would have run out of time by then."""
        return [hold for account in self.accounts.values() for hold in account.holds.values() if hold.until <= now]

    def is_kept(self, request: Request, now: datetime) -> bool:
        """Whether an id must still be known: stores may forget one when its window is no longer kept."""
        account = self.accounts.get(request.account)
        if account is None or request.id not in account.decisions:
            return True
        decision = account.decisions[request.id]
        made = next(at for at, one in account.rows if one is decision)
        until = made if decision.window is None else max(made, decision.window.end)
        return now < until + self._bounds.keep

    def is_held(self, request: Request) -> bool:
        """Whether tokens are set aside for its id."""
        account = self.accounts.get(request.account)
        return account is not None and request.id in account.holds

    def tallies(self, name: str, now: datetime) -> list[tuple[str, str, Tally]]:
        """Group, kind and tally of each window of an account that is still kept."""
        account = self.accounts.get(name, Account())
        return sorted(
            (
                (group, kind, tally)
                for (group, kind), found in account.tallies.items()
                for tally in found.values()
                if tally.window.end > now - self._bounds.keep
            ),
            key=by_place,
        )


def by_place(row: tuple[str, str, Tally]) -> tuple[str, str, datetime]:
    """In which order tallies are compared."""
    return row[0], row[1], row[2].window.start


def again(request: Request, first: Decision) -> Decision | Clash:
    """What is said to an id that was decided before."""
    for field in CONFLICT_FIELDS:
        if getattr(request, field) != getattr(first.request, field):
            return Clash(field, first)
    return replace(first, replayed=True)


def plain(decision: Decision) -> Decision:
    """A decision as every store must give it: without what it rests on."""
    return replace(decision, durability=Durability.VOLATILE)


def plain_hold(hold: Hold) -> Hold:
    """A hold as every store must give it."""
    return hold if hold.decision is None else replace(hold, decision=plain(hold.decision))


def _place(charge: Charge) -> tuple[str, str]:
    assert charge.terms.group is not None, "who has a window has a group"
    return charge.terms.group, charge.terms.window


def _tally(account: Account, charge: Charge) -> Tally | None:
    """The tally that a charge is judged by: of its window; where windows roll, of its hold's, or the last opened."""
    if charge.window is None:
        return None
    found = account.tallies.get(_place(charge))
    if not found:
        return None
    if not charge.rolls:
        return found.get(charge.window.start)
    pin: Window | None = charge.pin
    return found[pin.start if pin is not None and pin.start in found else next(reversed(found))]


def _held(account: Account, charge: Charge, tally: Tally | None) -> int:
    """What other holds set aside of the window of a charge."""
    if charge.window is None:
        return 0
    starts: set[datetime | None] = {charge.window.start}
    if charge.rolls:
        is_open = tally is not None and charge.request.at < tally.window.end
        starts = {None, tally.window.start} if is_open and tally is not None else {None}
    return sum(
        hold.aside
        for hold in account.holds.values()
        if (hold.terms.group, hold.terms.window) == _place(charge)
        and (None if hold.window is None else hold.window.start) in starts
    )
