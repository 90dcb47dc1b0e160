"""Which enrollment a decision may rest on: the one in force when it was made.

Decisions of an account and changes of its enrollment have one order, that of their versions, which is exact. Their
times come from clocks that are read before either is written, so by time alone both are given a minute on the way.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from gratis.audit.findings import Finding, FindingKind, finding
from gratis.enrollment import change, in_force
from gratis.errors import GratisError, UnreadableState
from gratis.lines import enrollment_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from datetime import datetime

    from gratis.model import Change, Enrollment, Entry

    History = Callable[[str, str], Sequence[Change]]

ON_THE_WAY = timedelta(minutes=1)
ACCOUNTS_MAX = 10_000


class InForce:
    """Compares each entry with its account's history of enrollments, as far as that is known."""

    def __init__(self, history: History | None) -> None:
        self._history = history
        self._known: dict[tuple[str, str], Sequence[Change]] = {}
        self._latest: dict[tuple[str, str], int] = {}
        self.unread: dict[tuple[str, str], str] = {}

    def check(self, entry: Entry) -> Iterator[Finding]:
        """What does not follow from the history of the entry's account."""
        decision = entry.decision
        account = (decision.offer, decision.account)
        history = self._of(account)
        enrollment, latest = decision.terms.enrollment, self._latest.get(account, 0)
        correction = decision.correction
        if not history:
            # Never enrolled: whoever decided took an enrollment for granted, and the entry says which. Nobody owns it.
            is_known = self._history is not None and account not in self.unread
            if is_known and correction is None and enrollment is not None and enrollment.owners:
                yield finding(FindingKind.NOT_IN_FORCE, entry, "enrollment", _line(enrollment), "none")
            return
        if correction is not None:
            if correction.actor is not None and not _owns(history, correction.actor, entry.decided_at):
                expected = "an owner of the account at that time"
                yield finding(FindingKind.WRONG_CORRECTION, entry, "actor", correction.actor, expected)
            return  # it rests on what it corrects
        version = _version(history, enrollment, entry.decided_at, latest)
        if version is None:
            history = self._of(account, is_fresh=True)  # it may have changed while the ledger was read
            version = _version(history, enrollment, entry.decided_at, latest)
        if version is None:
            then = in_force(history, entry.decided_at)
            yield finding(
                FindingKind.NOT_IN_FORCE,
                entry,
                "enrollment",
                _line(enrollment),
                "none" if then is None else _line(then.enrollment),
            )
        else:
            self._latest[account] = version

    def histories(self, offer: str, account: str) -> Iterator[Finding]:
        """What does not follow within a history itself: each change is the next one, made by an owner."""
        made: list[Change] = []
        self._of((offer, account))
        if (offer, account) in self.unread:
            told = self.unread[offer, account]
            yield Finding(
                FindingKind.WRONG_ENROLLMENT, None, account, None, "history", told, "changes that can be read"
            )
        for found in self._of((offer, account)):
            try:
                expected = change(made, found.enrollment, actor=found.actor, at=found.at, revision=None)
                is_next = expected.version == found.version and (not made or made[-1].at <= found.at + ON_THE_WAY)
                expects: object = expected.version
            except GratisError as error:
                is_next, expects = False, str(error)
            if not is_next:
                kind = FindingKind.WRONG_ENROLLMENT
                yield Finding(kind, None, account, None, f"change {len(made) + 1}", found.version, expects)
            made.append(found)

    def _of(self, account: tuple[str, str], *, is_fresh: bool = False) -> Sequence[Change]:
        if self._history is None:
            return ()
        if is_fresh or account not in self._known:
            if len(self._known) >= ACCOUNTS_MAX:
                self._known.clear()
            try:
                self._known[account] = self._history(*account)
            except UnreadableState as error:
                self._known[account] = ()
                self.unread.setdefault(account, str(error))
        return self._known[account]


def _version(history: Sequence[Change], enrollment: Enrollment | None, at: datetime, latest: int) -> int | None:
    """The first version from the latest on that is this enrollment and may have been in force; 0 before any was."""
    for place, made in enumerate(history):
        if made.version < latest or made.enrollment != enrollment or at < made.at - ON_THE_WAY:
            continue
        following = history[place + 1 : place + 2]
        if not following or at <= following[0].at + ON_THE_WAY:
            return made.version
    is_taken_for_granted = enrollment is None or not enrollment.owners
    return 0 if latest == 0 and is_taken_for_granted and at <= history[0].at + ON_THE_WAY else None


def _owns(history: Sequence[Change], actor: str, at: datetime) -> bool:
    """Whether somebody was an owner about then."""
    return any(
        actor in made.enrollment.owners and made.at - ON_THE_WAY <= at and (ends is None or at <= ends + ON_THE_WAY)
        for made, ends in zip(history, [*(later.at for later in history[1:]), None], strict=True)
    )


def _line(enrollment: Enrollment | None) -> object:
    return None if enrollment is None else enrollment_line(enrollment)
