"""A request log judged in order, by the pure rule, under any revision and any reading; nothing is kept.

No bounds apply: old data is judged as it was. What is remembered is one tally a window, and the ids.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from gratis.audit.seen import Seen
from gratis.book import Cases
from gratis.enrollment import in_force
from gratis.errors import Conflict, RequestError
from gratis.rule import decide
from gratis.stores import Status, repeat

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gratis.model import Change, Decision, Enrollment, Request
    from gratis.offer import Offer
    from gratis.rule import Charge, Tally


TallyKey = tuple[str, str, str | None, str, datetime | None]


class Replay:
    """Judges requests one after another.

    `changes` is the history of each account's enrollment, oldest first: the one in force at a request's own time
    counts. An account without a history is taken to have the enrollment `assume`.
    """

    def __init__(
        self, offer: Offer, *, assume: Enrollment | None = None, changes: Mapping[str, Sequence[Change]] | None = None
    ) -> None:
        self._cases = Cases(offer)
        self._assume = assume
        self._changes = changes or {}
        self._tallies: dict[TallyKey, Tally] = {}
        self._seen = Seen()

    def decide_many(self, requests: Sequence[Request]) -> list[Decision | RequestError]:
        """Decide the next requests of the log; one that cannot be decided has its error in its place."""
        answers: list[Decision | RequestError] = []
        for request in requests:
            try:
                answers.append(self.decide(request))
            except RequestError as error:
                answers.append(error)
        return answers

    def decide(self, request: Request) -> Decision:
        """Decide the next request of the log."""
        first = self._seen.get(request.account, request.id)
        if first is not None:
            return _again(request, first)
        changes = self._changes.get(request.account)
        if changes:
            change = in_force(changes, request.at)
            charge = self._cases.charge(
                request, None if change is None else change.enrollment, -1 if change is None else change.version
            )
        else:
            charge = self._cases.charge(request, self._assume, 0)
        key = tally_key(charge)
        decision, after = decide(charge, self._tallies.get(key))
        if after is not None:
            self._tallies[key] = after
        self._seen.put(decision)
        return decision

    def close(self) -> None:
        """Give back what the ids took."""
        self._seen.close()


def tally_key(charge: Charge) -> TallyKey:
    """What tells the tally of a charge's window, or of the last one opened where windows roll."""
    terms = charge.terms
    start = None if charge.rolls or charge.window is None else charge.window.start
    return terms.offer, charge.request.account, terms.group, terms.window, start


def _again(request: Request, first: Decision) -> Decision:
    receipt = repeat(request, first)
    assert receipt.decision is not None, "a repeat carries the first decision"
    if receipt.status is Status.CONFLICT:
        assert receipt.field is not None, "a conflict names the field"
        raise Conflict(receipt.field, receipt.decision)
    return receipt.decision
