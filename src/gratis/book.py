"""What both meters know, and what they make of it: the pure question before a store's call, the reading after it."""

from __future__ import annotations

import inspect
import os
from threading import Lock
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from msgspec import Struct
from msgspec.structs import replace

from gratis.classify import EXCLUDES, Case, amount, case_of, charge_in, exclusion, window_at
from gratis.errors import Conflict, GratisError, RequestError
from gratis.model import (
    Correction,
    Decision,
    Hold,
    Kind,
    Reason,
    Remedy,
    Request,
    Unit,
    Window,
    correction_id,
    stamp,
)
from gratis.rule import Charge, contribution
from gratis.stores import Status, held_in
from gratis.window import Rolling

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from gratis.model import Change, Enrollment, Expiry
    from gratis.offer import Offer
    from gratis.rule import Step, Tally
    from gratis.stores import Receipt
    from gratis.thresholds import Threshold

ACCOUNTS_CACHED_MAX = 100_000
CASES_CACHED_MAX = 10_000
OF_ACCOUNTS = frozenset({Reason.NOT_ENROLLED, Reason.ACCOUNT_NOT_ELIGIBLE, Reason.SHARING_DISABLED})

# Looked up once: in Python 3.11 naming a member of an enum is slow.
_DECIDED, _REPLAYED = Status.DECIDED, Status.REPLAYED
_COMPLETION = Kind.COMPLETION
_VOIDS = frozenset({Remedy.VOIDED, Remedy.RELEASED})


class Explanation(Struct, frozen=True):
    """Whether a request would be free now, and if not, the largest size that still would.

    `fits` is in the unit of the group; None where not even 0 fits, where no allowance covers the request, and where it
    was decided before. `held` is what holds set aside of it. `elsewhere` are the groups that would take the request if
    it were for one of their models.
    """

    decision: Decision
    fits: int | None
    unit: Unit | None
    held: int = 0
    elsewhere: tuple[str, ...] = ()

    @property
    def is_free(self) -> bool:
        """Whether the request would be free."""
        return self.decision.is_free

    @property
    def reason(self) -> Reason:
        """Why."""
        return self.decision.reason

    @property
    def available(self) -> int | None:
        """The largest size that fits beside what holds set aside; None where there is none."""
        return None if self.fits is None or self.fits < self.held else self.fits - self.held

    @property
    def window_end(self) -> datetime | None:
        """When the window ends that it would count in; None where none is open."""
        return self.decision.window_end


class Standing(Struct, frozen=True):
    """What an account has of one group's allowance at an instant.

    With a `reason` nothing of it can be used: the account takes no part, or shares nothing. No window is open where
    `window` is None.
    """

    account: str
    offer: str
    revision: str
    group: str
    unit: Unit
    allowance: int
    used: int
    window: Window | None
    reason: Reason | None
    held: int = 0

    @property
    def remaining(self) -> int:
        """What is left, whoever holds it."""
        return 0 if self.reason is not None else max(0, self.allowance - self.used)

    @property
    def available(self) -> int:
        """What is left beside what holds set aside."""
        return max(0, self.remaining - self.held)


class Cases:
    """Charges of one offer. Requests alike in all but size and time are one case, worked out once for its span."""

    def __init__(self, offer: Offer) -> None:
        self.offer = offer
        self._cases: dict[tuple[Any, ...], Case] = {}

    def charge(self, request: Request, enrollment: Enrollment | None, version: int, step: Step | None = None) -> Charge:
        """The charge of a request; an account's version stands for its enrollment."""
        key: tuple[Any, ...] = (request.account, version, request.model, request.project)
        if request.kind is not _COMPLETION or request.tools or request.tokens is None:
            key = (*key, request.kind, request.tools, request.tokens is None)
        case = self._cases.get(key)
        if case is None or not case.span.start <= request.at < case.span.end:
            case = case_of(self.offer, request, enrollment)
            if len(self._cases) >= CASES_CACHED_MAX:
                self._cases.clear()
            self._cases[key] = case
        return charge_in(case, request, version, step)


class Book:
    """What both meters know without asking: the offer, and the enrollment that each account had last."""

    def __init__(
        self, offer: Offer, assumed: Enrollment | None, on_threshold: Callable[[Threshold], None] | None = None
    ) -> None:
        self.offer = offer
        self.assumed = assumed
        if inspect.iscoroutinefunction(on_threshold):
            raise GratisError("on_threshold: found a coroutine function; expected a plain one, which nobody waits for")
        self.on_threshold = on_threshold
        self._claimed: set[tuple[str, str]] = set()
        self._token = uuid4().hex
        self._lock = Lock()
        self._cases = Cases(offer)
        self._latest: dict[str, Change] = {}

    def charge(self, request: Request, step: Step | None = None) -> Charge:
        """What to ask a store about this request."""
        change = self._latest.get(request.account)
        if change is None:
            return self._cases.charge(request, self.assumed, 0, step)
        return self._cases.charge(request, change.enrollment, change.version, step)

    @property
    def token(self) -> str:
        """By what this process knows its own claims again, should an answer be lost."""
        return f"{self._token}{os.getpid()}"

    def takes(self, account: str, place: str) -> bool:
        """Whether it is this caller's turn to claim a threshold, which nobody of this process did so far."""
        with self._lock:
            if (account, place) in self._claimed:
                return False
            if len(self._claimed) >= ACCOUNTS_CACHED_MAX:
                self._claimed.clear()
                self._token = uuid4().hex  # what was told under the old one is not to be told again
            self._claimed.add((account, place))
            return True

    def gives_up(self, account: str, place: str) -> None:
        """Leave a threshold that could not be claimed to whoever comes next."""
        self._claimed.discard((account, place))

    def learn(self, account: str, change: Change | None) -> None:
        """Remember the latest change of an account's enrollment."""
        if change is None:
            self._latest.pop(account, None)
            return
        if len(self._latest) >= ACCOUNTS_CACHED_MAX:
            self._latest.clear()
        self._latest[account] = change

    @staticmethod
    def explanation(charge: Charge, receipt: Receipt, hold: Hold | None) -> Explanation:
        """The receipts of a dry charge, and of a hold of as much, read as advice."""
        decision = read(charge.request, receipt)
        if isinstance(decision, RequestError):
            raise decision
        if decision.replayed or decision.total is None:
            return Explanation(decision, None, None)
        terms = decision.terms
        left = terms.allowance - (decision.total - charge.amount)
        held = 0 if hold is None or hold.held is None else hold.held
        return Explanation(decision, left if left >= 0 else None, terms.unit, held)

    def takers(self, found: Explanation, standings: Sequence[Standing]) -> tuple[str, ...]:
        """The groups, but for the request's own, that would take all of it beside what is held, were it for them."""
        request = found.decision.request
        revision, enrollment = self.offer.at(request.at), found.decision.terms.enrollment
        if revision is None or found.reason is Reason.TOO_LATE:
            return ()
        own = revision.group_of(request.model, request.kind)
        available = {one.group: one.available for one in standings}
        takers = []
        for group in revision.groups:
            asked = replace(request, model=min(group.models or (request.model,)))
            is_other = group is not own and revision.group_of(asked.model, asked.kind) is group
            takes = is_other and exclusion(revision, asked, enrollment) is None
            if takes and amount(group, asked) <= available[group.name]:
                takers.append(group.name)
        return tuple(takers)

    @staticmethod
    def no_hold(request: Request, decision: Decision, *, until: datetime, expiry: Expiry) -> Hold:
        """What is said of a hold whose request was decided before: the decision."""
        return Hold(
            request=request,
            terms=decision.terms,
            tokens_max=request.tokens or 0,
            amount=0,
            reason=decision.reason,
            used=decision.used,
            held=None,
            window=decision.window,
            until=until,
            expiry=expiry,
            decision=decision,
            replayed=True,
        )

    def correction(
        self, words: Sequence[Decision], request: Request, remedy: Remedy, *, actor: str | None, why: str | None
    ) -> Charge | None:
        """The charge that corrects all that was said of a request so far; None if that says the same already."""
        if _is_said(words[-1], request, remedy):
            return None
        charge = corrects(self.offer, words[0], words[-1], request, remedy, number=len(words), actor=actor, why=why)
        step = charge.step
        assert isinstance(step, Correction), "what corrects says so"
        if step.returned and (charge.terms.group, charge.terms.window) != _place(words[-1]):
            # It counts elsewhere, or nowhere: first what was said before is given back where it counted.
            return self.correction(words, words[-1].request, Remedy.RELEASED, actor=actor, why=why)
        return charge

    def standing(
        self,
        account: str,
        at: datetime,
        latest: Change | None,
        tallies: Sequence[tuple[str, str, Tally]],
        holds: Sequence[Hold],
    ) -> list[Standing]:
        """What an account has of each group's allowance; the tallies are of windows that take a request then."""
        revision = self.offer.at(at)
        if revision is None:
            return []
        found = []
        enrollment = self.assumed if latest is None else latest.enrollment
        probe = Request(id="standing", model="", at=at)  # of an account's own reasons the request decides none
        reason = next(
            (one for one in revision.reasons if one in OF_ACCOUNTS and EXCLUDES[one](revision, probe, enrollment)), None
        )
        calendar = None if isinstance(revision.window, Rolling) else window_at(revision, at)
        for group in revision.groups:
            window, used = calendar, 0
            for name, kind, tally in tallies:
                if (name, kind) == (group.name, str(revision.window)):
                    window, used = tally.window, tally.used
            allowance = 0 if enrollment is None else group.allowances.get(enrollment.tier, 0)
            places = {(group.name, str(revision.window), start) for start in (window and window.start, None)}
            held = sum(hold.aside for hold in holds if held_in(hold) in places)
            found.append(
                Standing(
                    account,
                    self.offer.name,
                    revision.name,
                    group.name,
                    group.unit,
                    allowance,
                    used,
                    window,
                    reason,
                    held,
                )
            )
        return found


def corrects(
    offer: Offer,
    first: Decision,
    latest: Decision,
    request: Request,
    remedy: Remedy,
    *,
    number: int,
    actor: str | None,
    why: str | None,
) -> Charge:
    """The charge that corrects the latest word on a request.

    It rests on the enrollment of the first one: what is corrected is how much was used, not who took part. It is
    judged in the window in which that counted, or which had admitted it.
    """
    is_void = remedy in _VOIDS
    if is_void:
        request = replace(request, input_tokens=0, output_tokens=0, cached_tokens=0)
    request = replace(request, id=correction_id(first.request.id, number))
    returned, terms = contribution(latest, _taken(offer, latest)), latest.terms
    pin = latest.window or (None if first.hold is None else first.hold.window)
    if is_void:
        # Whatever the offer says by now, it counts for nothing where it counted; it opens no window.
        step = Correction(first.request.id, number, remedy, returned, pin, actor, why)
        if latest.window is None:
            return Charge(request, replace(terms, reason=latest.reason), 0, 0, None, rolls=False, step=step)
        return Charge(request, terms, 0, 0, latest.window, rolls=terms.window.startswith("rolling "), step=step)
    case = case_of(offer, request, first.terms.enrollment)
    is_same = latest.used is None or (case.terms.group, case.terms.window) == _place(latest)
    step = Correction(first.request.id, number, remedy, returned, pin if is_same else None, actor, why)
    return charge_in(case, request, 0, step)


def _taken(offer: Offer, word: Decision) -> int:
    """What a request took of its allowance; of the offer only whether cached input counts is asked."""
    tokens = word.request.tokens
    if word.used is None or tokens is None or _is_void(word):
        return 0
    if word.terms.unit is not Unit.TOKENS:
        return 1
    revision = offer.at(word.at)
    groups = () if revision is None else revision.groups
    is_all = all(group.counts_cached_input for group in groups if group.name == word.terms.group)
    return tokens if is_all else tokens - word.request.cached_tokens


def _place(word: Decision) -> tuple[str | None, str]:
    return word.terms.group, word.terms.window


def _is_said(latest: Decision, request: Request, remedy: Remedy) -> bool:
    """Whether the latest word on a request is a correction that says this already."""
    if latest.correction is None:
        return False
    if remedy in _VOIDS:
        return _is_void(latest)
    return latest.correction.remedy is remedy and replace(latest.request, id=request.id) == request


def _is_void(word: Decision) -> bool:
    """Whether a request counts for nothing by this."""
    return word.correction is not None and word.correction.remedy in _VOIDS


def read(request: Request, receipt: Receipt) -> Decision | RequestError:
    """What a receipt says of its request."""
    decision = receipt.decision
    if receipt.status is _DECIDED or receipt.status is _REPLAYED:
        assert decision is not None, "a decided charge has its decision"
        assert decision.request.id == request.id, "the answer is that of this request"
        return decision
    if receipt.status is Status.CONFLICT:
        assert receipt.field is not None, "a conflict names the field"
        return Conflict(receipt.field, decision, hold=receipt.hold)
    assert receipt.status is Status.AHEAD, "an outdated charge is asked again, never answered"
    assert receipt.now is not None, "a refusal for time tells the store's"
    ahead = f"found {stamp(request.at)}, ahead of the store's clock, {stamp(receipt.now)}, by more than is allowed"
    return RequestError("at", f"{ahead}; nothing was written")
