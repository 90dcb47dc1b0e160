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

from gratis.model import Counts, Decision, Durability, Overage, Reason, Request, Terms, Unit, Window

if TYPE_CHECKING:
    from datetime import datetime

# Looked up once: in Python 3.11 naming a member of an enum costs more than the rule.
_WITHIN, _OVER = Reason.WITHIN_ALLOWANCE, Reason.OVER_ALLOWANCE
_ALL, _EXCESS, _TOKENS = Counts.ALL, Overage.EXCESS, Unit.TOKENS


class Charge(Struct, frozen=True, gc=False):
    """What a store is asked to apply, once.

    `amount` is what the request would take of its allowance. `window` is the one in which it falls; with `rolls`
    it is the one that it would open, were none open. `version` is that of the enrollment it rests on.
    """

    request: Request
    terms: Terms
    version: int
    amount: int
    window: Window | None
    rolls: bool


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
    fits = is_free(amount, allowance=allowance, used=used)
    free = amount if fits else free_part(amount, allowance=allowance, used=used, overage=terms.overage)
    reason, total = (_WITHIN if fits else _OVER), used + amount
    tokens = free_tokens(charge, free=free, fits=fits)
    if charge.rolls and tally is None and not fits and tokens == 0:
        return Decision(request, terms, reason, tokens, used, total, None, None, durability), None
    after = Tally(window, used_after(amount, free=free, used=used, counts=terms.counts), seq + 1)
    return Decision(request, terms, reason, tokens, after.used, total, window, after.seq, durability), after


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


def _excluded(charge: Charge, reason: Reason, durability: Durability) -> Decision:
    """A request that is weighed against no allowance: billed whole, in no window."""
    return Decision(charge.request, charge.terms, reason, 0, None, None, None, None, durability)
