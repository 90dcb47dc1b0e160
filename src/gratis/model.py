"""The nouns: frozen values, each with its own invariants.

Nothing here knows an offer, a store or a clock. What comes from outside is a `Request`, and it is
checked here, once, before anything else sees it; all other values are made by Gratis itself. They are
frozen msgspec structs: a frozen dataclass says the same and takes eight times as long to make. None of them
can be part of a cycle, so the garbage collector need not look at them (`gc=False`).
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import StrEnum, unique
from hashlib import blake2b
from typing import Any

from msgspec import Struct
from msgspec.structs import force_setattr

from gratis.errors import EnrollmentError, RequestError

TOKENS_MAX = 10**12
NAME_BYTES_MAX = 255
MODEL_BYTES_MAX = 1024
TOOLS_MAX = 128
PROJECTS_MAX = 10_000
TIER_MAX = 5
SHOWN_MAX = 80
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
AT_MIN = EPOCH
AT_MAX = datetime(9000, 1, 1, tzinfo=UTC)


@unique
class Verdict(StrEnum):
    """What a request is."""

    FREE = "free"
    BILLED = "billed"


@unique
class Reason(StrEnum):
    """Why a request is free or billed."""

    WITHIN_ALLOWANCE = "within_allowance"
    OVER_ALLOWANCE = "over_allowance"
    MODEL_NOT_LISTED = "model_not_listed"
    FINE_TUNED_MODEL = "fine_tuned_model"
    FINE_TUNING_TRAINING = "fine_tuning_training"
    TOOL_USE = "tool_use"
    ASSISTANTS_O_SERIES = "assistants_o_series"
    EVALS = "evals"
    NOT_ENROLLED = "not_enrolled"
    ACCOUNT_NOT_ELIGIBLE = "account_not_eligible"
    SHARING_DISABLED = "sharing_disabled"
    PROJECT_NOT_SHARED = "project_not_shared"
    OFFER_NOT_IN_FORCE = "offer_not_in_force"
    TOO_LATE = "too_late"
    UNMEASURED = "unmeasured"


@unique
class Kind(StrEnum):
    """What sort of call a request was."""

    COMPLETION = "completion"
    EMBEDDING = "embedding"
    EVAL = "eval"
    FINE_TUNING_TRAINING = "fine_tuning_training"
    ASSISTANTS = "assistants"
    IMAGE = "image"
    AUDIO = "audio"
    MODERATION = "moderation"
    REALTIME = "realtime"


@unique
class Sharing(StrEnum):
    """Whether an account shares its traffic with the provider."""

    DISABLED = "disabled"
    ENABLED = "enabled"
    SELECTED = "selected"


@unique
class Counts(StrEnum):
    """What adds to `used`: free tokens only, or every eligible token."""

    FREE = "free"
    ALL = "all"


@unique
class Overage(StrEnum):
    """What is billed of a request that does not fit: all of it, or the part beyond."""

    WHOLE = "whole"
    EXCESS = "excess"


@unique
class Unit(StrEnum):
    """What a group counts."""

    TOKENS = "tokens"
    REQUESTS = "requests"
    RUNS = "runs"


@unique
class Durability(StrEnum):
    """What an answer rests on."""

    VOLATILE = "volatile"
    JOURNALED = "journaled"
    SYNCED = "synced"
    REPLICATED = "replicated"


@unique
class Expiry(StrEnum):
    """What becomes of a hold that runs out of time: the request is decided by its bound, or given back."""

    DECIDED = "decided"
    RELEASED = "released"


@unique
class Remedy(StrEnum):
    """What a correction does: an owner voids or adjusts, a settle or a release comes after its hold ran out."""

    VOIDED = "voided"
    ADJUSTED = "adjusted"
    SETTLED = "settled"
    RELEASED = "released"


KINDS = {kind.value: kind for kind in Kind}

# Looked up once: in Python 3.11 naming a member of an enum is slow.
_FREE, _BILLED, _WITHIN = Verdict.FREE, Verdict.BILLED, Reason.WITHIN_ALLOWANCE


class Request(Struct, frozen=True, gc=False, kw_only=True):
    """One LLM call as the caller counted it.

    `at` is the caller's own time of the first attempt: a retry is the same request, so it keeps it.
    Token counts that the provider did not report stay None: absent is unmeasured, never 0.
    `cached_tokens` are a part of `input_tokens`, and `tools` are the kinds of tool that it used.
    """

    id: str
    model: str
    at: datetime
    input_tokens: int | None = None
    output_tokens: int | None = None
    account: str = "default"
    project: str | None = None
    kind: Kind = Kind.COMPLETION
    tools: tuple[str, ...] = ()
    cached_tokens: int = 0

    def __post_init__(self) -> None:
        check_name("id", self.id)
        check_name("account", self.account)
        if self.project is not None:
            check_name("project", self.project)
        _check_model(self.model)
        at = self.at
        if type(at) is not datetime or at.tzinfo is not UTC or not AT_MIN <= at < AT_MAX:
            force_setattr(self, "at", utc(at))
        given, made = self.input_tokens, self.output_tokens
        if given is not None and (type(given) is not int or not 0 <= given <= TOKENS_MAX):
            raise _bad_tokens("input_tokens", given)
        if made is not None and (type(made) is not int or not 0 <= made <= TOKENS_MAX):
            raise _bad_tokens("output_tokens", made)
        if given is not None and made is not None and given + made > TOKENS_MAX:
            raise RequestError("tokens", f"{given + made} in all; expected at most {TOKENS_MAX}")
        if type(self.kind) is not Kind:
            force_setattr(self, "kind", kind_of(self.kind))
        if self.tools != ():
            force_setattr(self, "tools", _tools(self.tools))
        if self.cached_tokens != 0 or type(self.cached_tokens) is not int:
            _check_cached(self.cached_tokens, given or 0)

    @property
    def tokens(self) -> int | None:
        """Input and output together; None while either is unmeasured. An embedding has no output."""
        if self.input_tokens is None:
            return None
        if self.output_tokens is None:
            return self.input_tokens if self.kind is Kind.EMBEDDING else None
        return self.input_tokens + self.output_tokens


class Usage(Struct, frozen=True, kw_only=True):
    """What a provider said of a request, as far as it said it: counts that are absent stay None, never 0.

    `model` is the one that answered, `tools` the kinds of tool that were used, `id` and `at` the provider's own.
    """

    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int = 0
    model: str | None = None
    project: str | None = None
    kind: Kind | None = None
    tools: tuple[str, ...] = ()
    id: str | None = None
    at: datetime | None = None


class Window(Struct, frozen=True, gc=False):
    """The span in which one allowance counts: `start` belongs to it, `end` to the next one."""

    start: datetime
    end: datetime


class Enrollment(Struct, frozen=True, gc=False, kw_only=True):
    """An account takes part in an offer: the facts on which eligibility rests.

    `starts` and `ends` bound it by the request's own time. `owners` are those who may change it; left empty,
    they stay who they were, and the one who enrolls first becomes the owner.
    """

    tier: int
    sharing: Sharing = Sharing.DISABLED
    projects: frozenset[str] = frozenset()
    plan: str = "standard"
    zero_data_retention: bool = False
    starts: datetime | None = None
    ends: datetime | None = None
    owners: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if type(self.tier) is not int or not 0 <= self.tier <= TIER_MAX:
            raise EnrollmentError(f"tier: found {shown(self.tier)}; expected a whole number from 0 to {TIER_MAX}")
        if type(self.sharing) is not Sharing:
            force_setattr(self, "sharing", _sharing(self.sharing))
        for field in ("projects", "owners"):
            force_setattr(self, field, _names(field, getattr(self, field)))
        if bool(self.projects) is not (self.sharing is Sharing.SELECTED):
            raise EnrollmentError(
                f"projects: sharing is {self.sharing.value!r} with {len(self.projects)} projects;"
                " expected projects with sharing 'selected', and only with it"
            )
        if type(self.zero_data_retention) is not bool:
            raise EnrollmentError(
                f"zero_data_retention: found {shown(self.zero_data_retention)}; expected true or false"
            )
        try:
            check_name("plan", self.plan)
            for field in ("starts", "ends"):
                if getattr(self, field) is not None:
                    force_setattr(self, field, utc(getattr(self, field), field=field))
        except RequestError as error:
            raise EnrollmentError(str(error)) from None
        _check_plan_and_dates(self)


class Change(Struct, frozen=True, gc=False):
    """One change of an enrollment: what it became, who did it, when it was acknowledged."""

    version: int
    at: datetime
    actor: str
    enrollment: Enrollment


class Terms(Struct, frozen=True, gc=False):
    """What a decision rests on: all that is known of a request before its window is looked at.

    With a `reason` the request is excluded, and no group covers it. `window` names the kind of window.
    """

    offer: str
    revision: str | None
    reason: Reason | None
    enrollment: Enrollment | None
    group: str | None = None
    unit: Unit = Unit.TOKENS
    allowance: int = 0
    counts: Counts = Counts.FREE
    overage: Overage = Overage.WHOLE
    window: str = ""


class Held(Struct, frozen=True, gc=False):
    """That a decision ends a hold: its bound, the window that admitted it, and whether it is decided by its bound.

    So is one that ran out of time, or whose usage nobody could read: what it really used is unmeasured.
    """

    tokens_max: int
    window: Window | None = None
    is_unmeasured: bool = False


class Correction(Struct, frozen=True, gc=False):
    """That a decision corrects what was said before of the request `of`, as the `number`th one to do so.

    First what was said before gives back what it took of the window, `returned`; then the request is judged anew.
    Its decision's request has an id of its own, by which it too is decided once: `correction_id`.
    """

    of: str
    number: int
    remedy: Remedy
    returned: int
    window: Window | None = None
    actor: str | None = None
    why: str | None = None


class Decision(Struct, frozen=True, gc=False):
    """The verdict on one request, with its reason, window and totals.

    A request that was judged against an allowance has a group, an allowance and totals; one that was excluded
    has none of them. `used` is what the rule counts after this request, `total` what the total would be with it.
    """

    request: Request
    terms: Terms
    reason: Reason
    free_tokens: int | None
    used: int | None
    total: int | None
    window: Window | None
    seq: int | None
    durability: Durability
    replayed: bool = False
    hold: Held | None = None
    correction: Correction | None = None

    @property
    def verdict(self) -> Verdict:
        """Free only when all of it is free."""
        return _FREE if self.reason is _WITHIN else _BILLED

    @property
    def is_free(self) -> bool:
        """Whether all of the request is free."""
        return self.reason is _WITHIN

    @property
    def is_judged(self) -> bool:
        """Whether the request was weighed against an allowance; else it was excluded."""
        return self.used is not None

    @property
    def is_unmeasured(self) -> bool:
        """Whether its tokens are the bound of a hold, not what was used."""
        return self.hold is not None and self.hold.is_unmeasured

    @property
    def id(self) -> str:
        """The request's id; of a correction, the id of the request that it is about."""
        return self.request.id if self.correction is None else self.correction.of

    @property
    def account(self) -> str:
        """Who owns the allowance."""
        return self.request.account

    @property
    def at(self) -> datetime:
        """The request's own time."""
        return self.request.at

    @property
    def tokens(self) -> int | None:
        """Input and output together; None if unmeasured."""
        return self.request.tokens

    @property
    def billed_tokens(self) -> int | None:
        """What is not free; None if unmeasured."""
        if self.reason is _WITHIN:
            return 0
        tokens = self.request.tokens
        return None if tokens is None else tokens - (self.free_tokens or 0)

    @property
    def offer(self) -> str:
        """The offer's name."""
        return self.terms.offer

    @property
    def revision(self) -> str | None:
        """The date from which the revision is in force."""
        return self.terms.revision

    @property
    def group(self) -> str | None:
        """The models that share the allowance."""
        return self.terms.group if self.is_judged else None

    @property
    def allowance(self) -> int | None:
        """What is free in the window."""
        return self.terms.allowance if self.is_judged else None

    @property
    def remaining(self) -> int | None:
        """What is left of the allowance after this request."""
        return None if self.used is None else max(0, self.terms.allowance - self.used)

    @property
    def window_start(self) -> datetime | None:
        """The first instant of the window."""
        return None if self.window is None else self.window.start

    @property
    def window_end(self) -> datetime | None:
        """The first instant after the window."""
        return None if self.window is None else self.window.end


class Hold(Struct, frozen=True, gc=False, kw_only=True):
    """Tokens set aside before a request is sent: an upper bound, until it is settled, released, or out of time.

    It fits if its bound does beside what is used and what other holds set aside. One that does not fit sets nothing
    aside; its request may still be sent, and is judged when it is settled. `window` is the one that admitted it; None
    where none was open. With a `decision` the request was decided before, and nothing is held.
    """

    request: Request
    terms: Terms
    tokens_max: int
    amount: int
    reason: Reason
    used: int | None
    held: int | None
    window: Window | None
    until: datetime
    expiry: Expiry = Expiry.DECIDED
    decision: Decision | None = None
    replayed: bool = False

    @property
    def fits(self) -> bool:
        """Whether its bound was set aside."""
        return self.decision is None and self.reason is _WITHIN

    @property
    def aside(self) -> int:
        """What it set aside, in the unit of its group."""
        return self.amount if self.reason is _WITHIN else 0

    @property
    def short(self) -> int | None:
        """By how much it does not fit; 0 if it does, None where no allowance covers the request."""
        if self.used is None or self.held is None:
            return None
        return max(0, self.amount - (self.terms.allowance - self.used - self.held))

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def account(self) -> str:
        """Who owns the allowance."""
        return self.request.account

    @property
    def at(self) -> datetime:
        """The request's own time."""
        return self.request.at

    @property
    def group(self) -> str | None:
        """The models that share the allowance."""
        return self.terms.group if self.used is not None else None


class Entry(Struct, frozen=True, gc=False):
    """One line of the ledger: the decision, its place among all decisions of its shard, and when it was made.

    `link` chains it to the one before it in its window: `chain.py` says how.
    """

    entry: int
    decided_at: datetime
    decision: Decision
    shard: int = 0
    link: str | None = None


def utc(value: object, *, field: str = "at") -> datetime:
    """The instant in UTC; only aware datetimes tell one."""
    if not isinstance(value, datetime):
        raise RequestError(field, f"found {shown(value)}; expected a datetime with its offset from UTC")
    if value.tzinfo is UTC and type(value) is datetime:
        instant = value
    elif value.utcoffset() is None:
        raise RequestError(field, f"found {value.isoformat()}, which names no offset from UTC; expected one")
    else:
        try:
            instant = EPOCH + (value - EPOCH)
        except OverflowError:
            raise RequestError(field, f"found {value.isoformat()}; expected a time that UTC can express") from None
    if not AT_MIN <= instant < AT_MAX:
        raise RequestError(
            field, f"found {instant.isoformat()}; expected a year from {AT_MIN.year} to {AT_MAX.year - 1}"
        )
    return instant


def stamp(instant: datetime) -> str:
    """RFC 3339 in UTC, as every surface prints it."""
    return instant.isoformat()[:-6] + "Z"


def micros(instant: datetime) -> int:
    """Microseconds since 1970-01-01T00:00Z, as stores keep times."""
    since = instant - EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def from_micros(since: int) -> datetime:
    """The instant so many microseconds after 1970-01-01T00:00Z."""
    return EPOCH + timedelta(microseconds=since)


def correction_id(of: str, number: int) -> str:
    """The id under which the `number`th correction of a request is decided."""
    name = f"correction {number} of {of}"
    if len(name.encode()) <= NAME_BYTES_MAX:
        return name
    return f"correction {number} of {blake2b(of.encode(), digest_size=32).hexdigest()}"


def check_name(field: str, value: object) -> None:
    """An id, account or project: 1 to 255 bytes of UTF-8 without control characters, taken as it is."""
    if type(value) is str and 0 < len(value) <= NAME_BYTES_MAX and value.isascii() and value.isprintable():
        return
    if type(value) is not str:
        raise RequestError(field, f"found {shown(value)}; expected a string")
    size = len(_encoded(field, value))
    if not 1 <= size <= NAME_BYTES_MAX:
        raise RequestError(field, f"found {size} bytes; expected 1 to {NAME_BYTES_MAX}")
    if any(ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 for char in value):  # noqa: PLR2004 - C0, DEL and C1
        raise RequestError(field, f"found {shown(value)}; expected no control characters")


def kind_of(value: object) -> Kind:
    """The kind of request that this word names."""
    kind = KINDS.get(value) if isinstance(value, str) else None
    if kind is None:
        raise RequestError("kind", f"found {shown(value)}; expected one of {', '.join(KINDS)}")
    return kind


def _check_model(value: object) -> None:
    """Any text at all: a model that is not listed is billed, whatever it looks like."""
    if type(value) is not str:
        raise RequestError("model", f"found {shown(value)}; expected a string")
    if not value.isascii() or len(value) > MODEL_BYTES_MAX:
        size = len(_encoded("model", value))
        if size > MODEL_BYTES_MAX:
            raise RequestError("model", f"found {size} bytes; expected at most {MODEL_BYTES_MAX}")


def _encoded(field: str, value: str) -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise RequestError(field, f"found {shown(value)}, half of a surrogate pair; expected Unicode text") from None


def _check_cached(cached: object, given: int) -> None:
    if type(cached) is not int or not 0 <= cached <= TOKENS_MAX:
        raise _bad_tokens("cached_tokens", cached)
    if cached > given:
        raise RequestError("cached_tokens", f"found {cached}, a part of input_tokens, of which there are {given}")


def _bad_tokens(field: str, value: object) -> RequestError:
    return RequestError(field, f"found {shown(value)}; expected a whole number from 0 to {TOKENS_MAX}")


def _tools(value: Any) -> tuple[str, ...]:
    """Each kind of tool once, in one order: what counts is which were used."""
    if not isinstance(value, tuple | list | set | frozenset):
        raise RequestError("tools", f"found {shown(value)}; expected a list of kinds of tool")
    if len(value) > TOOLS_MAX:
        raise RequestError("tools", f"found {len(value)} tools; expected at most {TOOLS_MAX}")
    for tool in value:
        check_name("tools", tool)
    return tuple(sorted(set(value)))


def _check_plan_and_dates(enrollment: Enrollment) -> None:
    if enrollment.plan != enrollment.plan.lower():
        # Plans are compared exactly: a misspelled one would be none of those that an offer excludes.
        raise EnrollmentError(f"plan: found {shown(enrollment.plan)}; expected it in lower case")
    starts, ends = enrollment.starts, enrollment.ends
    if starts is not None and ends is not None and ends <= starts:
        raise EnrollmentError(f"ends: {stamp(ends)} is not after starts {stamp(starts)}")


def _sharing(value: Any) -> Sharing:
    try:
        return Sharing(value)
    except (ValueError, TypeError):
        expected = ", ".join(Sharing)
        raise EnrollmentError(f"sharing: found {shown(value)}; expected one of {expected}") from None


def _names(field: str, value: Any) -> frozenset[str]:
    if not isinstance(value, tuple | list | set | frozenset):
        raise EnrollmentError(f"{field}: found {shown(value)}; expected a list of names")
    if len(value) > PROJECTS_MAX:
        raise EnrollmentError(f"{field}: found {len(value)}; expected at most {PROJECTS_MAX}")
    try:
        for name in value:
            check_name(field, name)
    except RequestError as error:
        raise EnrollmentError(str(error)) from None
    return frozenset(value)


def shown(value: object) -> str:
    """What was found, short enough for a line and safe on a terminal."""
    try:
        text = ascii(value)
    except ValueError:  # an integer of thousands of digits
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= SHOWN_MAX else f"{text[:SHOWN_MAX]}… ({len(text)} characters)"
