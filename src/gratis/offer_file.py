"""An offer's TOML text, read strictly.

Whatever is unknown, missing, doubled or contradictory is an `OfferError` with file, line, key and what was
expected. pydantic checks the shape of the file; the functions below check what one value says of another.
"""

from __future__ import annotations

import re
import tomllib
from datetime import UTC, date, datetime, time
from typing import TYPE_CHECKING, Annotated, Any, Literal
from zoneinfo import ZoneInfo

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gratis.errors import OfferError
from gratis.model import MODEL_BYTES_MAX, TIER_MAX, TOKENS_MAX, Counts, Kind, Overage, Reason, Unit
from gratis.offer import Group, Offer, Revision
from gratis.toml_key import line_of, shown
from gratis.window import WEEKDAYS, Calendar, Rolling, Span

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic_core import ErrorDetails

    from gratis.toml_key import Key

HOURS_MAX = 24 * 366
LOCAL_ZONES = frozenset({"localtime", "posixrules", "Factory"})  # they mean something else on each machine
EVERY_TIER = range(TIER_MAX + 1)

NAME, LINE = r"^[A-Za-z0-9._-]{1,64}$", r"^[^\x00-\x1f\x7f]{1,400}$"
PATTERNS = {
    NAME: "1 to 64 letters, digits, dots, hyphens or underscores",
    LINE: "one line of 1 to 400 characters",
}
Name = Annotated[str, Field(pattern=NAME)]
ModelId = Annotated[str, Field(min_length=1, max_length=MODEL_BYTES_MAX)]
Line = Annotated[str, Field(pattern=LINE)]
Exclusion = Literal[
    "not_enrolled",
    "account_not_eligible",
    "sharing_disabled",
    "project_not_shared",
    "fine_tuning_training",
    "evals",
    "fine_tuned_model",
    "model_not_listed",
    "assistants_o_series",
    "tool_use",
    "unmeasured",
]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _CalendarTable(_Table):
    kind: Literal["calendar"]
    span: Literal["day", "week", "month"]
    zone: str
    week_starts: Literal["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"] | None = None


class _RollingTable(_Table):
    kind: Literal["rolling"]
    hours: Annotated[int, Field(ge=1, le=HOURS_MAX)]


class _GroupTable(_Table):
    unit: Literal["tokens", "requests", "runs"]
    allowance: Any
    models: list[ModelId] | None = None
    any_model: Literal[True] | None = None
    kinds: Annotated[list[str], Field(min_length=1)] | None = None
    cached_input: Literal["counted", "not_counted"] = "counted"


class _RevisionTable(_Table):
    from_: Annotated[date, Field(alias="from")]
    until: date | None = None
    observed_on: date | None = None
    announced_until: date | None = None
    source: Line
    window: Annotated[_CalendarTable | _RollingTable, Field(discriminator="kind")]
    counts: Literal["free", "all"]
    overage: Literal["whole", "excess"]
    reasons: list[Exclusion]
    groups: Annotated[dict[Name, _GroupTable], Field(min_length=1)]
    aliases: dict[ModelId, ModelId] = {}
    client_side_tools: list[str] | None = None
    excluded_plans: list[str] | None = None
    zero_data_retention: Literal["excluded", "allowed"] | None = None
    fine_tuned_prefix: Annotated[str, Field(min_length=1)] | None = None
    o_series: list[ModelId] | None = None


class _OfferTable(_Table):
    name: Name
    title: Line
    account: Line
    revisions: Annotated[list[_RevisionTable], Field(min_length=1)]


# What an exclusion needs to know; each key may be given only where its exclusion is checked.
NEEDS = {
    "tool_use": "client_side_tools",
    "account_not_eligible": "excluded_plans",
    "fine_tuned_model": "fine_tuned_prefix",
    "assistants_o_series": "o_series",
}


def parse(text: str, *, file: str) -> Offer:
    """The offer that this text describes; `file` is what an error calls it."""
    fault = _Fault(text, file)
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # tomllib's own is a ValueError; so is a number without end
        place = re.search(r"at line (\d+)", str(error))
        line = int(place[1]) if place else text.count("\n") + 1
        raise OfferError(file=file, line=line, key="TOML", expected="valid TOML", found=str(error)) from None
    try:
        table = _OfferTable.model_validate(data)
    except ValidationError as error:
        errors = error.errors()
        # A key that is unknown is often one that is missing, misspelled: it is the better hint.
        unknown = [found for found in errors if found["type"] == "extra_forbidden"]
        raise fault.of_shape((unknown or errors)[0]) from None
    for number, revision in enumerate(table.revisions):
        _check_revision(revision, ("revisions", number), fault)
    _check_order(table.revisions, fault)
    return Offer(table.name, table.title, table.account, _revisions(table.revisions))


def _check_revision(revision: _RevisionTable, key: Key, fault: _Fault) -> None:
    _check_window(revision.window, (*key, "window"), fault)
    _check_groups(revision, key, fault)
    _check_reasons(revision, key, fault)
    for place, plan in enumerate(revision.excluded_plans or ()):
        if plan != plan.lower():
            raise fault((*key, "excluded_plans", place), f"{plan!r}", "a plan in lower case, as enrollments have it")
    listed = {model for group in revision.groups.values() for model in group.models or ()}
    for place, model in enumerate(revision.o_series or ()):
        if model not in listed:
            raise fault((*key, "o_series", place), f"{model!r} is in no group", "a model that a group lists")
    for alias, model in revision.aliases.items():
        if alias in listed:
            raise fault((*key, "aliases", alias), f"{alias!r} is listed itself", "an alias that is no listed model")
        if model not in listed:
            raise fault(
                (*key, "aliases", alias),
                f"{model!r} is in no group",
                "an alias of a model that a group lists",
            )


def _check_window(window: _CalendarTable | _RollingTable, key: Key, fault: _Fault) -> None:
    if isinstance(window, _RollingTable):
        return
    try:
        if window.zone in LOCAL_ZONES or window.zone.startswith(("posix/", "right/")):
            raise ValueError  # noqa: TRY301 - as if it were unknown
        ZoneInfo(window.zone)
    except (OSError, ValueError, KeyError):
        raise fault((*key, "zone"), f"{window.zone!r}", "the name of an IANA zone, such as UTC") from None
    if (window.week_starts is not None) is not (window.span == "week"):
        raise fault((*key, "week_starts"), f"span is {window.span!r}", "week_starts with span 'week', and only there")


def _check_groups(revision: _RevisionTable, key: Key, fault: _Fault) -> None:
    owner: dict[str, str] = {}
    for name, group in revision.groups.items():
        here = (*key, "groups", name)
        if (group.models is None) is (group.any_model is None):
            raise fault(here, "neither or both of models and any_model", "exactly one of them")
        if group.models == []:
            raise fault((*here, "models"), "an empty list", "at least one model")
        if group.any_model and len(revision.groups) > 1:
            raise fault((*here, "any_model"), "more than one group", "a single group where any model is covered")
        _check_models(group, name, owner, here, fault)
        for place, kind in enumerate(group.kinds or ()):
            if kind not in set(Kind):
                raise fault((*here, "kinds", place), f"{kind!r}", f"one of {', '.join(Kind)}")
        if group.cached_input == "not_counted" and group.unit != "tokens":
            raise fault((*here, "cached_input"), f"unit is {group.unit!r}", "cached_input where tokens are counted")
        _tiers(group.allowance, (*here, "allowance"), fault)
    first, *others = revision.groups
    tiers = set(_tiers(revision.groups[first].allowance, key, fault))
    for name in others:
        if set(_tiers(revision.groups[name].allowance, key, fault)) != tiers:
            raise fault(
                (*key, "groups", name, "allowance"),
                f"other tiers than group {first!r}",
                "the same tiers in every group",
            )


def _check_models(group: _GroupTable, name: str, owner: dict[str, str], here: Key, fault: _Fault) -> None:
    """Each model in one group, once; `owner` remembers the groups of those seen."""
    for place, model in enumerate(group.models or ()):
        if model in owner:
            found = f"{model!r} is in group {owner[model]!r} already"
            raise fault((*here, "models", place), found, "a model in one group, once")
        owner[model] = name


def _check_reasons(revision: _RevisionTable, key: Key, fault: _Fault) -> None:
    reasons: list[str] = [*revision.reasons]
    here = (*key, "reasons")
    for place, reason in enumerate(reasons):
        if reason in reasons[:place]:
            raise fault((*here, place), f"{reason!r} is there already", "each reason once")
    groups = revision.groups.values()
    must = {
        "not_enrolled": True,
        "model_not_listed": any(group.any_model is None or group.kinds is not None for group in groups),
        "unmeasured": any(group.unit == "tokens" for group in groups),
        "account_not_eligible": any(set(_tiers(group.allowance, here, fault)) != set(EVERY_TIER) for group in groups),
    }
    for reason, needed in must.items():
        if needed and reason not in reasons:
            raise fault(here, f"{reason!r} is missing", f"{reason!r} among the reasons of this revision")
    for reason, needed_key in NEEDS.items():
        given = getattr(revision, needed_key) is not None
        if given is not (reason in reasons):
            state = "given" if given else "missing"
            raise fault(
                (*key, needed_key) if given else key,
                f"{needed_key} is {state}",
                f"{needed_key} exactly where {reason!r} is among the reasons",
            )
    if revision.zero_data_retention is not None and "account_not_eligible" not in reasons:
        raise fault(
            (*key, "zero_data_retention"),
            "it is given",
            "it only where 'account_not_eligible' is among the reasons",
        )


def _check_order(revisions: Sequence[_RevisionTable], fault: _Fault) -> None:
    for number, revision in enumerate(revisions):
        key = ("revisions", number)
        if revision.until is not None and revision.until <= revision.from_:
            raise fault((*key, "until"), f"{revision.until} is not after from {revision.from_}", "a later date")
        if number == 0:
            continue
        before = revisions[number - 1]
        if before.until is None or before.until > revision.from_:
            raise fault(
                (*key, "from"),
                f"{revision.from_} while the revision of {before.from_} lasts until {before.until or 'further notice'}",
                "revisions in order that do not overlap",
            )


def _tiers(allowance: object, key: Key, fault: _Fault) -> dict[int, int]:
    """The allowance by tier; a key is one tier ("3") or a span of tiers ("1-2")."""
    if not isinstance(allowance, dict):
        return dict.fromkeys(EVERY_TIER, _amount(allowance, key, fault))
    tiers: dict[int, int] = {}
    for span, amount in allowance.items():
        match = re.fullmatch(r"([0-9])(?:-([0-9]))?", span)
        first = int(match[1]) if match else -1
        last = int(match[2] or match[1]) if match else -1
        if not 0 <= first <= last <= TIER_MAX:
            raise fault((*key, span), f"{span!r}", f'a tier or a span of tiers from 0 to {TIER_MAX}, such as "1-2"')
        for tier in range(first, last + 1):
            if tier in tiers:
                raise fault((*key, span), f"tier {tier} has an allowance already", "each tier once")
            tiers[tier] = _amount(amount, (*key, span), fault)
    if not tiers:
        raise fault(key, "an empty table", "an allowance for at least one tier")
    return tiers


def _amount(value: object, key: Key, fault: _Fault) -> int:
    if type(value) is not int or not 0 <= value <= TOKENS_MAX:
        raise fault(key, _found(value), f"a whole number from 0 to {TOKENS_MAX}, or a table of them by tier")
    return value


def _revisions(tables: Sequence[_RevisionTable]) -> tuple[Revision, ...]:
    windows = [_window(table.window) for table in tables]
    revisions = []
    for number, table in enumerate(tables):
        after = before = None
        for earlier in range(number, 0, -1):
            if windows[earlier - 1] != windows[number]:
                after = _midnight(tables[earlier].from_)
                break
        for later in range(number + 1, len(tables)):
            if windows[later] != windows[number]:
                before = _midnight(tables[later].from_)
                break
        revisions.append(_revision(table, windows[number], after, before))
    return tuple(revisions)


def _revision(
    table: _RevisionTable, window: Calendar | Rolling, after: datetime | None, before: datetime | None
) -> Revision:
    return Revision(
        starts=_midnight(table.from_),
        ends=None if table.until is None else _midnight(table.until),
        source=table.source,
        observed_on=table.observed_on,
        announced_until=table.announced_until,
        window=window,
        counts=Counts(table.counts),
        overage=Overage(table.overage),
        reasons=tuple(Reason(reason) for reason in table.reasons),
        groups=tuple(_group(name, group) for name, group in table.groups.items()),
        aliases=dict(table.aliases),
        client_side_tools=frozenset(table.client_side_tools or ()),
        excluded_plans=frozenset(table.excluded_plans or ()),
        excludes_zero_data_retention=table.zero_data_retention == "excluded",
        fine_tuned_prefix=table.fine_tuned_prefix,
        o_series=frozenset(table.o_series or ()),
        after=after,
        before=before,
    )


def _group(name: str, table: _GroupTable) -> Group:
    allowance = table.allowance
    return Group(
        name=name,
        unit=Unit(table.unit),
        allowances=_tiers(allowance, (), _Fault("", "")),
        models=None if table.models is None else frozenset(table.models),
        kinds=None if table.kinds is None else frozenset(Kind(kind) for kind in table.kinds),
        counts_cached_input=table.cached_input == "counted",
    )


def _window(table: _CalendarTable | _RollingTable) -> Calendar | Rolling:
    if isinstance(table, _RollingTable):
        return Rolling(table.hours)
    return Calendar(Span(table.span), table.zone, WEEKDAYS.index(table.week_starts or WEEKDAYS[0]))


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time(0), UTC)


class _Fault:
    """Makes the error of a key: it knows the text, and so the line."""

    def __init__(self, text: str, file: str) -> None:
        self._text = text
        self._file = file

    def __call__(self, key: Key, found: str, expected: str) -> OfferError:
        return OfferError(
            file=self._file, line=line_of(self._text, key), key=shown(key), expected=expected, found=found
        )

    def of_shape(self, error: ErrorDetails) -> OfferError:
        """What pydantic found, in our words, at the key as the file spells it."""
        key = tuple(part for place, part in enumerate(error["loc"]) if _is_in_file(error["loc"], place))
        kind, context = error["type"], error.get("ctx", {})
        if kind == "extra_forbidden":
            return self(key, "an unknown key", f"one of {', '.join(_keys_beside(key, error['loc']))}")
        if kind == "missing":
            return self(key[:-1], f"{key[-1]} is missing", "a value for it")
        if kind == "string_pattern_mismatch":
            return self(key, _found(error["input"]), PATTERNS[context["pattern"]])
        expected = EXPECTED.get(kind, error["msg"].lower())
        return self(key, _found(error["input"]), expected.format(**context))


def _is_in_file(key: Key, place: int) -> bool:
    """Whether a part of pydantic's key is the file's: it also names the kind of window, and that it means a key."""
    window_kind = place >= 1 and key[place - 1] == "window" and key[place] in {"calendar", "rolling"}
    return not window_kind and key[place] != "[key]"


# pydantic's kinds of error that a file can have, as people would say what was expected.
EXPECTED = {
    "string_type": "a string",
    "int_type": "a whole number",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "date_type": "a date, such as 2025-04-16",
    "date_from_datetime_inexact": "a date, such as 2025-04-16",
    "literal_error": "{expected}",
    "union_tag_not_found": "kind = 'calendar' or kind = 'rolling'",
    "union_tag_invalid": "kind = 'calendar' or kind = 'rolling'",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "string_too_short": "at least one character",
    "string_too_long": "at most {max_length} characters",
    "too_short": "at least one",
}


def _found(value: object) -> str:
    """A value of the file, short and in one line."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, date | time):
        return str(value)
    return f"{value!r:.80}"


def _keys_beside(key: Key, place: tuple[str | int, ...]) -> list[str]:
    """The keys that the table of this key may have: of the file, a revision, its window, or one of its groups."""
    match key:
        case ("revisions", _, "window", _):
            table: type[_Table] = _RollingTable if "rolling" in place else _CalendarTable
        case ("revisions", _, "groups", _, _):
            table = _GroupTable
        case ("revisions", _, _):
            table = _RevisionTable
        case _:
            table = _OfferTable
    return [field.alias or name for name, field in table.model_fields.items()]
