"""What a report keeps of decisions and findings as they go by: sums, and a few of them whole.

A request is counted once: what was asked again adds nothing, and a correction takes the place of what was said before.
Sums are kept a day, group and model; single requests and findings are bounded in number, and what is left out counts.
"""

from __future__ import annotations

from collections import Counter
from decimal import ROUND_HALF_EVEN, Decimal
from heapq import heapify, heappush, heapreplace
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from msgspec import Struct

from gratis.audit.seen import Seen
from gratis.model import Counts, Decision, Overage, Reason, Remedy, Unit, correction_id
from gratis.prices import Price, cost

if TYPE_CHECKING:
    from datetime import date, datetime

    from gratis.audit.findings import Finding
    from gratis.model import Terms
    from gratis.prices import Prices

CROSSINGS_MAX = 100
FINDINGS_MAX = 200
MODELS_MAX = 200
GROUPS_MAX = 20
ACCOUNTS_MAX = 1_000
WORDS_MAX = 12
PRICES_CACHED_MAX = 10_000
OTHERS = "all other models"
Place = tuple[str, str]
REST: Place = ("", "other groups")
_VOIDS = frozenset({Remedy.VOIDED, Remedy.RELEASED})
_OVER, _TOKENS, _FREE, _WHOLE = Reason.OVER_ALLOWANCE, Unit.TOKENS, Counts.FREE, Overage.WHOLE
READS = {
    (Counts.FREE, Overage.WHOLE): "A request that does not fit is billed whole, and takes nothing of the allowance",
    (Counts.ALL, Overage.WHOLE): "A request that does not fit is billed whole, and still counts in the running total",
    (Counts.FREE, Overage.EXCESS): "Of a request that does not fit only the part beyond the allowance is billed",
    (Counts.ALL, Overage.EXCESS): (
        "Of a request that does not fit only the part beyond the allowance is billed, and all of it counts"
    ),
}


class Day(Struct):
    """Sums of one day and group, in the group's unit; the allowance of each account that was seen."""

    free: int = 0
    billed: int = 0
    requests: int = 0
    free_requests: int = 0
    allowances: dict[str, int] = {}


class Spent(Struct):
    """Sums of one model."""

    requests: int = 0
    free: int = 0
    billed: int = 0
    uncovered: int = 0


class Priced(Struct):
    """Tokens that are priced alike: those of requests that were free whole, and of all others."""

    input: int = 0
    cached: int = 0
    output: int = 0


class Crossing(Struct, frozen=True, order=True):
    """A request that did not fit: by how much, and what would still have fitted."""

    billed: int
    number: int
    decision: Decision

    @property
    def used(self) -> int:
        """What was used before it."""
        return used_before(self.decision)

    @property
    def fits(self) -> int:
        """The largest size that would still have been free; 0 where nothing was left."""
        return max(0, self.decision.terms.allowance - self.used)


def used_before(decision: Decision) -> int:
    """What was used before a request that did not fit."""
    assert decision.total is not None, "it was judged"
    assert decision.used is not None, "it was judged"
    terms = decision.terms
    if terms.unit is not _TOKENS:
        return decision.total - 1
    if terms.counts is _FREE and terms.overage is _WHOLE:
        return decision.used  # to which it added nothing
    return decision.total - (decision.tokens or 0)


class Kept:
    """Adds decisions up, in constant memory for each."""

    def __init__(self, prices: Prices | None) -> None:
        self.prices = prices
        self.days: dict[Place | None, dict[date, Day]] = {}
        self.steps: dict[Place, tuple[str, Unit]] = {}
        self.reasons: dict[Reason, list[int]] = {}
        self.models: dict[str, Spent] = {}
        self.money: dict[tuple[str, Price | None, str], Priced] = {}
        self.partly: dict[str, Decimal] = {}
        self.crossings: list[Crossing] = []
        self.crossed = 0
        self.findings: list[Finding] = []
        self.kinds: Counter[str] = Counter()
        self.accounts: set[str] = set()
        self.words: dict[str, dict[str, None]] = {}
        self.first: datetime | None = None
        self.last: datetime | None = None
        self.unmeasured = self.repeats = self.corrected = self.unknown = 0
        self._number = 0
        self._seen: dict[str, Seen] = {}
        self._noted: dict[int, Terms] = {}
        self._price_of: dict[tuple[str, date], Price | None] = {}

    def add(self, decision: Decision) -> None:
        """Keep of one decision what the report tells."""
        seen = self._seen.get(decision.offer) or self._seen.setdefault(decision.offer, Seen())
        if seen.get(decision.account, decision.request.id) is not None:
            self.repeats += 1
            return
        correction = decision.correction
        if correction is not None:
            self.corrected += 1
            of, number = correction.of, correction.number
            before = seen.get(decision.account, of if number == 1 else correction_id(of, number - 1))
            if before is None:
                self.unknown += 1
            else:
                self._count(before, -1)
        seen.put(decision)
        self._count(decision, 1)
        self._note(decision)

    def found(self, finding: Finding) -> None:
        """Keep of one finding what the report tells."""
        self.kinds[str(finding.kind)] += 1
        if len(self.findings) < FINDINGS_MAX:
            self.findings.append(finding)

    def close(self) -> None:
        """Give back what the ids took."""
        for seen in self._seen.values():
            seen.close()

    def _count(self, decision: Decision, sign: int) -> None:
        """Add what a decision says, or take it back; what was voided counts for nothing."""
        if decision.correction is not None and decision.correction.remedy in _VOIDS:
            return
        group = self._group_of(decision)
        days = self.days.setdefault(group, {})
        day = days.get(when := _day_of(decision)) or days.setdefault(when, Day())
        tokens, free = decision.tokens or 0, decision.free_tokens or 0
        self.unmeasured += sign * (decision.tokens is None)
        day.requests += sign
        day.free_requests += sign * decision.is_free
        if decision.is_judged and decision.terms.unit is not _TOKENS:
            day.free += sign * decision.is_free
            day.billed += sign * (not decision.is_free)
        else:
            day.free += sign * free
            day.billed += sign * (tokens - free)
        if decision.is_judged:
            if decision.account in day.allowances or len(day.allowances) < ACCOUNTS_MAX:
                day.allowances[decision.account] = decision.terms.allowance
        else:
            reason = self.reasons.setdefault(decision.reason, [0, 0])
            reason[0] += sign
            reason[1] += sign * tokens
        self._spend(decision, sign)
        if decision.reason is _OVER:
            self._cross(decision, sign)

    def _spend(self, decision: Decision, sign: int) -> None:
        """Sums by model, and by what its tokens cost."""
        request = decision.request
        model = request.model
        if model not in self.models and len(self.models) >= MODELS_MAX:
            model = OTHERS
        spent = self.models.get(model) or self.models.setdefault(model, Spent())
        tokens, free = request.tokens or 0, decision.free_tokens or 0
        spent.requests += sign
        spent.free += sign * free
        if decision.is_judged:
            spent.billed += sign * (tokens - free)
        else:
            spent.uncovered += sign * (tokens - free)
        if self.prices is None or not tokens:
            return
        price = self._price(request.model, request.at)
        what = "free" if decision.is_free else "billed" if decision.is_judged else "uncovered"
        parts = self.money.setdefault((model, price, what), Priced())
        parts.input += sign * (request.input_tokens or 0)
        parts.cached += sign * request.cached_tokens
        parts.output += sign * (request.output_tokens or 0)
        if free and not decision.is_free and price is not None:
            # The free part of a request, in proportion to its input and output: nobody says which tokens it was.
            whole = cost(
                price,
                input_tokens=request.input_tokens or 0,
                cached_tokens=request.cached_tokens,
                output_tokens=request.output_tokens or 0,
            )
            part = (whole * free / tokens).quantize(Decimal("1e-12"), ROUND_HALF_EVEN)
            self.partly[model] = self.partly.get(model, Decimal(0)) + sign * part

    def _price(self, model: str, at: datetime) -> Price | None:
        """The list price of a model on a day: prices change at midnight UTC."""
        assert self.prices is not None, "there is a table to ask"
        key = (model, at.date())
        if key not in self._price_of:
            if len(self._price_of) >= PRICES_CACHED_MAX:
                self._price_of.clear()
            self._price_of[key] = self.prices.price(model, at)
        return self._price_of[key]

    def _cross(self, decision: Decision, sign: int) -> None:
        """Keep the requests of which most was billed, the first of two alike."""
        self.crossed += sign
        if sign < 0:
            said = (decision.account, decision.request.id)
            kept = [each for each in self.crossings if (each.decision.account, each.decision.request.id) != said]
            self.crossings = kept
            heapify(self.crossings)
            return
        self._number += 1
        crossing = Crossing(decision.billed_tokens or 0, -self._number, decision)
        if len(self.crossings) < CROSSINGS_MAX:
            heappush(self.crossings, crossing)
        elif crossing > self.crossings[0]:
            heapreplace(self.crossings, crossing)

    def _group_of(self, decision: Decision) -> Place | None:
        """Under which head a decision is told; None is where no group covers it."""
        group = decision.group
        if group is None:
            return None
        place = (decision.offer, group)
        if place not in self.steps:
            if len(self.steps) >= GROUPS_MAX:
                place = REST
            self.steps.setdefault(place, (decision.terms.window, decision.terms.unit))
        return place

    def _note(self, decision: Decision) -> None:
        """What the story rests on."""
        terms, at = decision.terms, decision.at
        self.first = at if self.first is None or at < self.first else self.first
        self.last = at if self.last is None or at > self.last else self.last
        if len(self.accounts) <= ACCOUNTS_MAX:
            self.accounts.add(decision.account)
        if self._noted.get(id(terms)) is terms:
            return
        if len(self._noted) >= ACCOUNTS_MAX:
            self._noted.clear()
        self._noted[id(terms)] = terms
        self._word("offer", terms.offer)
        if terms.revision is not None:
            self._word("revision", terms.revision)
        if decision.is_judged:
            self._word(
                "reading", f"{READS[terms.counts, terms.overage]} (counts={terms.counts}, overage={terms.overage})"
            )
            self._word("window", terms.window)
        enrollment = terms.enrollment
        said = "none" if enrollment is None else f"tier {enrollment.tier}, sharing {enrollment.sharing}"
        self._word("enrollment", said)

    def _word(self, what: str, said: str) -> None:
        words = self.words.get(what) or self.words.setdefault(what, {})
        if said not in words and len(words) <= WORDS_MAX:
            words[said] = None


def step_of(window: str) -> tuple[str, str]:
    """Of what bars there is one each, and in which zone: of rolling windows there is one a UTC day."""
    span, _, rest = window.partition(" ")
    return (span, rest.partition(" ")[0]) if span in {"day", "week", "month"} else ("day", "")


def _day_of(decision: Decision) -> date:
    """The day to which a decision belongs: the first of its window, where that is one of a calendar."""
    window = decision.window
    if window is None or decision.terms.window in {"day UTC", ""} or decision.terms.window.startswith("rolling"):
        return decision.at.date()
    zone = step_of(decision.terms.window)[1]
    try:
        return window.start.astimezone(ZoneInfo(zone)).date()
    except (ValueError, KeyError, OSError):  # a ledger that names no zone there is
        return decision.at.date()
