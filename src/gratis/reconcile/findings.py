"""The values that a reconciliation gives: differences with their causes, identities, readings, money."""

from __future__ import annotations

from datetime import date, datetime  # noqa: TC003 - fields of a struct
from decimal import Decimal  # noqa: TC003 - a field of a struct
from enum import StrEnum, unique

from msgspec import Struct

MONEY = 3
"""The identity that is of money."""


@unique
class Cause(StrEnum):
    """Why a report and the decisions differ."""

    LATE_ARRIVAL = "late_arrival"
    MODEL_NOT_LISTED = "model_not_listed"
    PROJECT_NOT_SHARING = "project_not_sharing"
    HOSTED_TOOLS = "hosted_tools"
    ENROLLMENT_OR_BALANCE = "enrollment_or_balance"
    DUPLICATE = "duplicate"
    RULE_DIFFERS = "rule_differs"
    MISSING_IN_REPORT = "missing_in_report"
    MISSING_IN_LEDGER = "missing_in_ledger"
    OTHER_NAME = "other_name"
    UNMEASURED = "unmeasured"
    TIER_UNKNOWN = "tier_unknown"


@unique
class Measure(StrEnum):
    """What is compared: all tokens, those that were free, and, where the sums agree, their parts and their requests."""

    TOKENS = "tokens"
    FREE = "free_tokens"
    INPUT = "input_tokens"
    CACHED = "cached_tokens"
    REQUESTS = "requests"


class Part(Struct, frozen=True):
    """How much of a difference one cause explains, and on what that rests."""

    cause: Cause
    tokens: int
    why: str


class Difference(Struct, frozen=True):
    """Where report and decisions part. What the parts do not add up to is unexplained, whatever its size."""

    measure: Measure
    day: date
    group: str | None
    project: str | None
    model: str | None
    reported: int
    decided: int
    parts: tuple[Part, ...] = ()

    @property
    def difference(self) -> int:
        """By how much the report says more."""
        return self.reported - self.decided

    @property
    def explained(self) -> int:
        """What its causes add up to."""
        return sum(part.tokens for part in self.parts)

    @property
    def unexplained(self) -> int:
        """What no cause accounts for."""
        return self.difference - self.explained


class Check(Struct, frozen=True):
    """One identity at one place: what was found there, and what it should be. None where a check is not by that."""

    found: int | Decimal | None
    expected: int | Decimal | None
    is_held: bool
    day: date | None = None
    group: str | None = None
    project: str | None = None
    model: str | None = None


class Identity(Struct, frozen=True):
    """One of the five checks: how it reads, and each place at which it was made."""

    number: int
    text: str
    checks: tuple[Check, ...]

    @property
    def fails(self) -> tuple[Check, ...]:
        """Where it did not hold."""
        return tuple(check for check in self.checks if not check.is_held)

    @property
    def checked(self) -> int:
        """How often it was made."""
        return len(self.checks)

    @property
    def held(self) -> int:
        """How often it held."""
        return len(self.checks) - len(self.fails)

    @property
    def failed(self) -> int:
        """How often it did not hold."""
        return len(self.fails)


class Ranked(Struct, frozen=True):
    """A reading of the rule beside the reported free tokens.

    `off` is the sum of all differences by day and group; `exact` is on how many of them it is right. `closer` and
    `farther` count those on which it is closer, or farther, than the reading in use.
    """

    reading: str
    off: int
    exact: int
    closer: int = 0
    farther: int = 0
    same_as: tuple[str, ...] = ()
    is_used: bool = False

    @property
    def rivals(self) -> tuple[str, ...]:
        """Those of the same readings that other days could tell from it: under excess only, both counts are one."""
        own = self.reading.replace("counts=all", "counts=free")
        same = [name for name in self.same_as if name.replace("counts=all", "counts=free") == own]
        return tuple(name for name in self.same_as if "overage=excess" not in own or name not in same)


class Fit(Struct, frozen=True):
    """Which reading fits best, and how sure that is."""

    ranked: tuple[Ranked, ...]
    days: int
    deciding: tuple[tuple[date, str | None], ...]
    margin: int
    sentence: str
    is_exact: bool = False

    @property
    def is_likely(self) -> bool:
        """Whether one reading is closer than all others, and exact wherever they part."""
        return self.is_exact and bool(self.deciding) and self.margin > 0 and not self.ranked[0].rivals

    @property
    def is_sure(self) -> bool:
        """Whether that is so on more than one day or group: once may be chance."""
        return self.is_likely and len(self.deciding) > 1


class Charged(Struct, frozen=True):
    """Of one model: what its billed tokens cost at list price, and what was charged. None where it is not known."""

    model: str
    expected: Decimal | None
    charged: Decimal | None
    note: str = ""

    @property
    def difference(self) -> Decimal | None:
        """By how much more was charged."""
        return None if self.expected is None or self.charged is None else self.charged - self.expected


class Money(Struct, frozen=True):
    """What was saved and spent, by which table of prices. Saved is list price: what free tokens would have cost."""

    currency: str
    prices: str
    as_of: date
    source: str
    saved: Decimal
    saved_basis: str
    spent: Decimal | None
    models: tuple[Charged, ...] = ()
    unpriced: tuple[tuple[str, int], ...] = ()
    other_lines: tuple[tuple[str, Decimal], ...] = ()


class Over(Struct, frozen=True):
    """A day and group of which the provider gave more free than its allowance."""

    day: date
    group: str
    reported: int
    allowance: int


class Result(Struct, frozen=True):
    """All that a reconciliation found; `apart` says that report and decisions have no day in common, if so."""

    offer: str
    reading: str
    since: datetime
    until: datetime
    differences: tuple[Difference, ...]
    identities: tuple[Identity, ...]
    over: tuple[Over, ...]
    fit: Fit | None
    money: Money | None
    reported: int
    decided: int
    reported_free: int | None
    decided_free: int
    notes: tuple[str, ...] = ()
    apart: str = ""

    @property
    def money_fails(self) -> tuple[Charged, ...]:
        """The models that were charged otherwise than at list price."""
        models = {check.model for one in self.identities if one.number == MONEY for check in one.fails}
        return tuple(one for one in self.money.models if one.model in models) if self.money is not None else ()

    @property
    def is_clean(self) -> bool:
        """Whether report and decisions agree in everything that was compared."""
        return not self.differences and not self.over and all(identity.failed == 0 for identity in self.identities)
