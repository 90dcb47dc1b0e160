"""What both meters share, written once: the pure question before a store's call, and the pure reading after it.

Where a flow has a branch between two calls (an enrollment that changed meanwhile), it is a generator that
yields charges and is sent receipts; each meter drives it in its own world.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import Struct

from gratis.classify import EXCLUDES, Case, case_of, charge_in, window_at
from gratis.errors import Conflict, NotExecuted, OutcomeUnknown, RequestError
from gratis.model import Kind, Reason, Request, stamp
from gratis.stores import Status
from gratis.window import Rolling

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from datetime import datetime

    from gratis.model import Change, Decision, Enrollment, Unit, Window
    from gratis.offer import Offer
    from gratis.rule import Charge, Tally
    from gratis.stores import Receipt

ROUNDS_MAX = 16
ACCOUNTS_CACHED_MAX = 100_000
CASES_CACHED_MAX = 10_000
OF_ACCOUNTS = frozenset({Reason.NOT_ENROLLED, Reason.ACCOUNT_NOT_ELIGIBLE, Reason.SHARING_DISABLED})

# Looked up once: in Python 3.11 naming a member of an enum is slow.
_DECIDED, _REPLAYED, _OUTDATED = Status.DECIDED, Status.REPLAYED, Status.OUTDATED
_COMPLETION = Kind.COMPLETION


class Explanation(Struct, frozen=True):
    """Whether a request would be free now, and if not, the largest size that still would.

    `fits` is in the unit of the group; None where not even 0 fits, where no allowance covers the request, and where it
    was decided before.
    """

    decision: Decision
    fits: int | None
    unit: Unit | None

    @property
    def is_free(self) -> bool:
        """Whether the request would be free."""
        return self.decision.is_free

    @property
    def reason(self) -> Reason:
        """Why."""
        return self.decision.reason


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

    @property
    def remaining(self) -> int:
        """What is left."""
        return 0 if self.reason is not None else max(0, self.allowance - self.used)


class Cases:
    """Charges of one offer. Requests alike in all but size and time are one case, worked out once for its span."""

    def __init__(self, offer: Offer) -> None:
        self.offer = offer
        self._cases: dict[tuple[Any, ...], Case] = {}

    def charge(self, request: Request, enrollment: Enrollment | None, version: int) -> Charge:
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
        return charge_in(case, request, version)


class Book:
    """What both meters know without asking: the offer, and the enrollment that each account had last."""

    def __init__(self, offer: Offer, assumed: Enrollment | None) -> None:
        self.offer = offer
        self.assumed = assumed
        self._cases = Cases(offer)
        self._latest: dict[str, Change] = {}

    def charge(self, request: Request) -> Charge:
        """What to ask a store about this request."""
        change = self._latest.get(request.account)
        if change is None:
            return self._cases.charge(request, self.assumed, 0)
        return self._cases.charge(request, change.enrollment, change.version)

    def learn(self, account: str, change: Change | None) -> None:
        """Remember the latest change of an account's enrollment."""
        if change is None:
            self._latest.pop(account, None)
            return
        if len(self._latest) >= ACCOUNTS_CACHED_MAX:
            self._latest.clear()
        self._latest[account] = change

    def decisions(
        self, requests: Sequence[Request]
    ) -> Generator[list[Charge], list[Receipt], list[Decision | RequestError]]:
        """Yield charges, be sent their receipts, return each request's decision or error, in order."""
        answers: dict[int, Decision | RequestError] = {}
        pending = list(enumerate(requests))
        for _ in range(ROUNDS_MAX):
            receipts = yield [self.charge(request) for _, request in pending]
            outdated = []
            for (place, request), receipt in zip(pending, receipts, strict=True):
                if receipt.status is _OUTDATED:
                    self.learn(request.account, receipt.change)
                    outdated.append((place, request))
                else:
                    answers[place] = read(request, receipt)
            if not outdated:
                return [answers[place] for place in range(len(requests))]
            pending = outdated
        raise NotExecuted(f"the enrollment changed {ROUNDS_MAX} times while {len(pending)} requests were decided")

    @staticmethod
    def explanation(charge: Charge, receipt: Receipt) -> Explanation:
        """The receipt of a dry charge, read as advice."""
        decision = read(charge.request, receipt)
        if isinstance(decision, RequestError):
            raise decision
        if decision.replayed or decision.total is None:
            return Explanation(decision, None, None)
        terms = decision.terms
        left = terms.allowance - (decision.total - charge.amount)
        return Explanation(decision, left if left >= 0 else None, terms.unit)

    def standing(
        self, account: str, at: datetime, latest: Change | None, tallies: Sequence[tuple[str, str, Tally]]
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
            found.append(
                Standing(
                    account, self.offer.name, revision.name, group.name, group.unit, allowance, used, window, reason
                )
            )
        return found


def partly(error: NotExecuted) -> OutcomeUnknown:
    """What to say of a call of which a part was written before the rest could not be."""
    return OutcomeUnknown(f"a part of the requests was decided before this: {error}; ask again with the same ids")


def read(request: Request, receipt: Receipt) -> Decision | RequestError:
    """What a receipt says of its request."""
    decision = receipt.decision
    if receipt.status is _DECIDED or receipt.status is _REPLAYED:
        assert decision is not None, "a decided charge has its decision"
        assert decision.request.id == request.id, "the answer is that of this request"
        return decision
    if receipt.status is Status.CONFLICT:
        assert decision is not None, "a conflict carries the first decision"
        assert receipt.field is not None, "a conflict names the field"
        return Conflict(receipt.field, decision)
    assert receipt.status is Status.AHEAD, "an outdated charge is asked again, never answered"
    assert receipt.now is not None, "a refusal for time tells the store's"
    ahead = f"found {stamp(request.at)}, ahead of the store's clock, {stamp(receipt.now)}, by more than is allowed"
    return RequestError("at", f"{ahead}; nothing was written")
