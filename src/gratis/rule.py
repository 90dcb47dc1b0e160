"""When a request is free. This is the only place in Python that says so.

A request is free if all of it fits in what is left of its allowance; else all of it is billed. Two switches of
the revision say what its text leaves open: `counts`, whether a billed request adds to what is used, and
`overage`, whether only the part beyond the allowance is billed. All numbers are integers; the comparison is a
subtraction, so that it stays exact in any language that repeats it.

`decide` is that rule with its surroundings: exclusions before it, lateness, and which window it is about. It
knows no store and no clock: it takes what a store holds of one window, and gives back what to hold after.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from gratis.model import (
    Correction,
    Counts,
    Decision,
    Durability,
    Expiry,
    Held,
    Hold,
    Overage,
    Reason,
    Request,
    Terms,
    Unit,
    Window,
)

if TYPE_CHECKING:
    from datetime import datetime

# Looked up once: in Python 3.11 naming a member of an enum costs more than the rule.
_WITHIN, _OVER = Reason.WITHIN_ALLOWANCE, Reason.OVER_ALLOWANCE
_ALL, _EXCESS, _TOKENS = Counts.ALL, Overage.EXCESS, Unit.TOKENS


class Holding(Struct, frozen=True, gc=False):
    """That a charge is not to be decided but held: until when, and what becomes of it then."""

    until: datetime
    expiry: Expiry


class Overdue(Struct, frozen=True, gc=False):
    """That a charge decides a held request by its bound because its hold ran out of time, if it still has."""

    tokens_max: int
    window: Window | None


Step = Holding | Overdue | Held | Correction


class Charge(Struct, frozen=True, gc=False):
    """What a store is asked to apply, once.

    `amount` is what the request would take of its allowance. `window` is the one in which it falls; with `rolls`
    it is the one that it would open, were none open. `version` is that of the enrollment it rests on. Most charges
    are just decided; a `step` says that one is held, ends a hold, or corrects what was decided.
    """

    request: Request
    terms: Terms
    version: int
    amount: int
    window: Window | None
    rolls: bool
    step: Step | None = None

    @property
    def pin(self) -> Window | None:
        """The window in which it is judged whatever is open by now: that of its hold, or of what it corrects."""
        return None if self.step is None or isinstance(self.step, Holding) else self.step.window


class Tally(Struct, frozen=True, gc=False):
    """What a store keeps of one window: free tokens taken so far, and how many decisions."""

    window: Window
    used: int
    seq: int


def is_free(amount: int, *, allowance: int, used: int) -> bool:
    """A request is free if all of it fits in what is left."""
    return amount <= allowance - used


def free_part(amount: int, *, allowance: int, used: int, overage: Overage) -> int:
    """How much of a request is free: all, nothing, or, if only the excess is billed, what is left."""
    if is_free(amount, allowance=allowance, used=used):
        return amount
    if overage is _EXCESS:
        return max(0, allowance - used)
    return 0


def used_after(amount: int, *, free: int, used: int, counts: Counts) -> int:
    """What is used after a request of which `free` was free."""
    return used + (amount if counts is _ALL else free)


def admit(charge: Charge, tally: Tally | None, *, held: int, kept_since: datetime | None = None) -> Hold:
    """What a hold says of its charge, given the tally of its window and what other holds set aside of it.

    It fits if it would be free beside all of them: so holds alone never set aside more than an allowance has.
    """
    step, terms, request = charge.step, charge.terms, charge.request
    assert type(step) is Holding, "who asks for a hold says until when"
    tokens, used, window = request.tokens, None, None
    assert tokens is not None, "a hold has a bound"
    decision, _ = decide(charge, tally, kept_since=kept_since)
    reason = decision.reason
    if decision.total is not None:
        used = decision.total - charge.amount
        reason = _WITHIN if is_free(charge.amount, allowance=terms.allowance, used=used + held) else _OVER
        window = charge.window
        if charge.rolls:
            window = tally.window if tally is not None and request.at < tally.window.end else None
    return Hold(
        request=request,
        terms=terms,
        tokens_max=tokens,
        amount=charge.amount,
        reason=reason,
        used=used,
        held=None if used is None else held,
        window=window,
        until=step.until,
        expiry=step.expiry,
    )


def contribution(decision: Decision, amount: int) -> int:
    """What a decision added to what is used in its window, where its request would take so much."""
    if decision.used is None or decision.total is None:
        return 0
    return decision.used - (decision.total - amount)


def decide(
    charge: Charge,
    tally: Tally | None,
    *,
    kept_since: datetime | None = None,
    durability: Durability = Durability.VOLATILE,
) -> tuple[Decision, Tally | None]:
    """Decide one charge, given the tally of its window (of the last one opened, if it rolls).

    A window that ended at `kept_since` or before is no longer kept. The second value is the tally after it, or
    None where the decision belongs to no window.
    """
    request, terms, window = charge.request, charge.terms, charge.window
    if terms.reason is not None:
        return _excluded(charge, terms.reason, durability), None
    assert window is not None, "a request that is not excluded has a window, or would open one"
    if charge.rolls and tally is not None:
        if request.at < tally.window.end:
            window = tally.window
        else:
            tally = None
    if kept_since is not None and window.end <= kept_since:
        return _excluded(charge, Reason.TOO_LATE, durability), None

    amount, allowance = charge.amount, terms.allowance
    used, seq = (0, 0) if tally is None else (tally.used, tally.seq)
    step = charge.step
    if step is not None and type(step) is Correction:
        used -= step.returned
    fits = is_free(amount, allowance=allowance, used=used)
    free = amount if fits else free_part(amount, allowance=allowance, used=used, overage=terms.overage)
    reason, total = (_WITHIN if fits else _OVER), used + amount
    tokens = free_tokens(charge, free=free, fits=fits)
    if charge.rolls and tally is None and not fits and tokens == 0:
        decision, after = Decision(request, terms, reason, tokens, used, total, None, None, durability), None
    else:
        after = Tally(window, used_after(amount, free=free, used=used, counts=terms.counts), seq + 1)
        decision = Decision(request, terms, reason, tokens, after.used, total, window, after.seq, durability)
    return (decision if step is None else _marked(decision, step)), after


def free_tokens(charge: Charge, *, free: int, fits: bool) -> int | None:
    """The tokens that are free, where `free` of the amount is; None if all are and nobody measured them.

    Where only the excess is billed, that is the part of the amount beyond the allowance, and nothing else.
    """
    tokens, terms = charge.request.tokens, charge.terms
    if fits:
        return tokens
    if terms.overage is not _EXCESS or terms.unit is not _TOKENS:
        return 0
    assert tokens is not None, "a group that counts tokens excludes the unmeasured"
    return tokens - (charge.amount - free)


def _marked(decision: Decision, step: Step) -> Decision:
    """A decision that says what it ends or corrects."""
    if type(step) is Held:
        return replace(decision, hold=step)
    if type(step) is Overdue:
        return replace(decision, hold=Held(step.tokens_max, step.window, is_unmeasured=True))
    return replace(decision, correction=step) if type(step) is Correction else decision


def _excluded(charge: Charge, reason: Reason, durability: Durability) -> Decision:
    """A request that is weighed against no allowance: billed whole, in no window."""
    decision = Decision(charge.request, charge.terms, reason, 0, None, None, None, None, durability)
    return decision if charge.step is None else _marked(decision, charge.step)
