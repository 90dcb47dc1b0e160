"""When somebody is told that an allowance is being used up: at which shares of it, and at the first billed request.

Which thresholds a decision has reached follows from the decision alone. That each is told once a group and window,
whichever process notices it first, is the store's doing: whoever claims it tells.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from msgspec import Struct

from gratis.model import Decision, Reason, Window, stamp

if TYPE_CHECKING:
    from collections.abc import Callable

PERCENTS = (50, 80, 95, 100)
SERIOUS = 95
_LOG = logging.getLogger("gratis")


class Threshold(Struct, frozen=True):
    """A share of an allowance that is used, or, without a `percent`, the first request that was billed beyond it.

    `decision` is the one by which it was noticed.
    """

    percent: int | None
    decision: Decision
    window: Window

    @property
    def name(self) -> str:
        """The threshold in a word: '80%', or 'billed'."""
        return "billed" if self.percent is None else f"{self.percent}%"

    @property
    def sentence(self) -> str:
        """What is said of it to people."""
        decision, terms = self.decision, self.decision.terms
        said = "the first request beyond it was billed" if self.percent is None else f"{self.percent}% of it is used"
        return (
            f"account {decision.account}, group {terms.group} of {terms.offer}: {said}"
            f" ({decision.used:,} of {terms.allowance:,} {terms.unit}); the window ends {stamp(self.window.end)}"
        )

    @property
    def place(self) -> str:
        """What it is told of once: group, kind of window, and window."""
        terms = self.decision.terms
        return f"{terms.group}\0{terms.window}\0{stamp(self.window.start)}\0{self.name}"


def reached(decision: Decision) -> list[Threshold]:
    """The thresholds that lie at or below what is used after a decision, and at or before it."""
    window, used, allowance = decision.window, decision.used, decision.terms.allowance
    if window is None or used is None:
        return []
    found = [
        Threshold(percent, decision, window) for percent in PERCENTS if allowance and used * 100 >= percent * allowance
    ]
    if decision.reason is Reason.OVER_ALLOWANCE:
        found.append(Threshold(None, decision, window))
    return found


def log(threshold: Threshold) -> None:
    """Say it in the log of `gratis`: a line of INFO, of WARNING from 95 % on."""
    is_serious = threshold.percent is None or threshold.percent >= SERIOUS
    _LOG.log(logging.WARNING if is_serious else logging.INFO, "%s", threshold.sentence)


def tell(threshold: Threshold, listener: Callable[[Threshold], None]) -> None:
    """Call a listener; what it does wrong is logged, and costs nobody a decision."""
    try:
        listener(threshold)
    except Exception:  # noqa: BLE001 - whatever a listener raises, the decision is made
        _LOG.exception("a listener failed at %s of group %s", threshold.name, threshold.decision.terms.group)


def unclaimed(threshold: Threshold, error: Exception) -> None:
    """Say that a threshold could not be claimed now; it is tried again with the next decision."""
    _LOG.warning("%s of group %s is not told yet: %s", threshold.name, threshold.decision.terms.group, error)
