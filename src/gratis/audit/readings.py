"""What an offer's text leaves open, as readings of it, and one log judged under several of them side by side.

A `Reading` is data; `offer_as` is the offer under it, and every reading is judged by the one rule. Each request is
decided once: what a log repeats is left out. What is kept is a row a day, group and reading, never a request.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

from msgspec import Struct, structs

from gratis.audit.replay import Replay, tally_key
from gratis.book import Cases
from gratis.enrollment import in_force
from gratis.errors import GratisError
from gratis.model import AT_MIN, TIER_MAX, Counts, Decision, Overage
from gratis.rule import decide
from gratis.window import Calendar, Rolling, Span

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from datetime import date, datetime

    from gratis.audit.replay import TallyKey
    from gratis.model import Change, Enrollment, Request
    from gratis.offer import Group, Offer, Revision
    from gratis.rule import Tally

WINDOWS: dict[str, Calendar | Rolling] = {"daily": Calendar(Span.DAY, "UTC"), "rolling": Rolling(24)}
READINGS_MAX = 64


class Reading(Struct, frozen=True, kw_only=True):
    """How to read what an offer's text leaves open; None is as the offer says.

    `window` is daily (in UTC) or rolling (24 h from the first free request). `tier` is that of every account, and
    `revision` the name of the one that is taken to be in force always.
    """

    counts: Counts | None = None
    overage: Overage | None = None
    window: str | None = None
    tier: int | None = None
    revision: str | None = None

    def __str__(self) -> str:
        parts = [f"{name}={value}" for name in self.__struct_fields__ if (value := getattr(self, name)) is not None]
        return " ".join(parts) or "as the offer says"


def offer_as(offer: Offer, reading: Reading) -> Offer:
    """The same offer under a reading."""
    revisions = offer.reading(counts=reading.counts, overage=reading.overage).revisions
    if reading.revision is not None:
        always = next((each for each in revisions if each.name == reading.revision), None)
        if always is None:
            names = ", ".join(each.name for each in revisions)
            raise GratisError(f"revision: {offer.name} has none of {reading.revision}; expected one of {names}")
        revisions = (replace(always, starts=AT_MIN, ends=None, after=None, before=None),)
    if reading.window is not None:
        window = WINDOWS.get(reading.window)
        if window is None:
            raise GratisError(f"window: found {reading.window!r}; expected one of {', '.join(WINDOWS)}")
        revisions = tuple(replace(each, window=window, after=None, before=None) for each in revisions)
    if reading.tier is not None:
        if not 0 <= reading.tier <= TIER_MAX:
            raise GratisError(f"tier: found {reading.tier}; expected 0 to {TIER_MAX}")
        revisions = tuple(_at_tier(each, reading.tier) for each in revisions)
    return replace(offer, revisions=revisions)


def offer_with(offer: Offer, *, joins: Mapping[str, str], leaves: Collection[str]) -> Offer:
    """What the offer would be if models joined a group in every revision, or left every list."""
    groups = sorted({group.name for revision in offer.revisions for group in revision.groups})
    listed = {model for each in offer.revisions for model in (*each.aliases, *_lists(each))}
    for model, name in joins.items():
        if name not in groups:
            raise GratisError(f"{model}={name}: {offer.name} has no group {name!r}; expected {', '.join(groups)}")
    for model in leaves:
        if model not in listed:
            raise GratisError(f"{model}: {offer.name} never listed it; expected an exact id of one of its lists")
    return replace(offer, revisions=tuple(_with(each, joins, leaves) for each in offer.revisions))


def combinations(
    *,
    counts: Sequence[Counts | None],
    overage: Sequence[Overage | None],
    windows: Sequence[str | None],
    tiers: Sequence[int | None],
    revisions: Sequence[str | None],
) -> list[Reading]:
    """Each combination once, in order: the first of everything first."""
    found = [
        Reading(counts=one, overage=two, window=three, tier=four, revision=five)
        for five, four, three, one, two in product(revisions, tiers, windows, counts, overage)
    ]
    if len(found) > READINGS_MAX:
        raise GratisError(f"{len(found)} readings; expected at most {READINGS_MAX} at once")
    return found


class Side(Struct, frozen=True):
    """One of the readings that are compared: its name, and the offer as it reads it."""

    name: str
    offer: Offer


class Sum(Struct):
    """Free and billed, added up; `unmeasured` are requests of which nobody knows the tokens."""

    requests: int = 0
    free_requests: int = 0
    tokens: int = 0
    free_tokens: int = 0
    unmeasured: int = 0

    @property
    def billed_requests(self) -> int:
        """What is not free whole."""
        return self.requests - self.free_requests

    @property
    def billed_tokens(self) -> int:
        """What is not free."""
        return self.tokens - self.free_tokens

    def add(self, decision: Decision) -> None:
        """Count one decision."""
        self.requests += 1
        self.free_requests += decision.is_free
        self.tokens += decision.tokens or 0
        self.free_tokens += decision.free_tokens or 0
        self.unmeasured += decision.tokens is None


class Split(Struct, frozen=True):
    """The first request of a day and group that two readings judge differently."""

    id: str
    account: str
    at: datetime
    model: str
    tokens: int | None
    first: Decision
    other: Decision


class Row(Struct, frozen=True):
    """What one reading says of one day and group; no group covers what is in the group None."""

    day: date
    group: str | None
    side: int
    sum: Sum
    split: Split | None


class Moved(Struct, frozen=True):
    """What a list that changed did to one model in this log; model None is all other models together."""

    model: str | None
    group_before: str | None
    group_after: str | None
    before: Sum
    after: Sum

    @property
    def change(self) -> str:
        """What became of the model."""
        if self.model is None:
            return "others"
        if self.group_before is None:
            return "joined"
        return "left" if self.group_after is None else "moved"

    @property
    def became_free(self) -> int:
        """Tokens that are free because of it; negative where they became billed."""
        return self.after.free_tokens - self.before.free_tokens


class Comparison:
    """Judges a log once under each of several readings.

    `changes` and `assume` say who takes part, as `Replay` has it. The first reading is the one that others are
    compared with. Of those in `also` only totals are kept, and those of each of `models`.
    """

    def __init__(
        self,
        sides: Sequence[Side],
        *,
        also: Sequence[Side] = (),
        assume: Enrollment | None = None,
        changes: Mapping[str, Sequence[Change]] | None = None,
        models: Collection[str] = (),
    ) -> None:
        self.sides = (*sides, *also)
        self.shown = len(sides)
        self._first = Replay(self.sides[0].offer, assume=assume, changes=changes)
        self._others = [_Other(side.offer, assume, changes or {}) for side in self.sides[1:]]
        self._models = frozenset(models)
        self._days: dict[tuple[date, str | None], list[Sum]] = {}
        self._splits: dict[tuple[date, str | None, int], Split] = {}
        self._by_model: dict[str | None, list[Sum]] = {}
        self.totals = self._sums()
        self.splits: list[Split | None] = [None] * self.shown
        self.repeats = 0

    def add(self, request: Request) -> Decision:
        """Judge the next request of the log; one that cannot be decided raises, and counts nowhere.

        What the first reading says of it is given back.
        """
        first = self._first.decide(request)
        if first.replayed:
            self.repeats += 1
            return first
        decisions = [first, *(other.decide(request) for other in self._others)]
        day = request.at.date()
        model = request.model if request.model in self._models else None
        sums = self._by_model.get(model) or self._by_model.setdefault(model, self._sums())
        for side, decision in enumerate(decisions):
            sums[side].add(decision)
            self.totals[side].add(decision)
            if side >= self.shown:
                continue
            group = decision.group
            days = self._days.get((day, group)) or self._days.setdefault((day, group), self._sums(self.shown))
            days[side].add(decision)
            if side and _differs(first, decision):
                self._part(side, first, decision)
        return first

    def rows(self) -> Iterator[Row]:
        """Every day and group under every reading; the groups by name, and last what no group covers."""
        for day, group in sorted(self._days, key=_by_day):
            for side, found in enumerate(self._days[day, group]):
                yield Row(day, group, side, found, self._splits.get((day, group, side)))

    def parts(self) -> Iterator[list[Row]]:
        """The days and groups where readings part: the row of each reading, where not all are alike."""
        rows = list(self.rows())
        for place in range(0, len(rows), self.shown):
            day = rows[place : place + self.shown]
            if any(row.sum != day[0].sum or row.split for row in day):
                yield day

    def moved(self, before: int, after: int) -> list[Moved]:
        """What differs between two readings whose lists differ, model by model, and for all others together."""
        groups = [_groups(self.sides[side].offer) for side in (before, after)]
        changed = sorted(m for m in groups[0].keys() | groups[1].keys() if groups[0].get(m) != groups[1].get(m))
        found = []
        for model in changed:
            sums = self._by_model.get(model) or self._sums()
            was, now = sums[before], sums[after]
            found.append(Moved(model, groups[0].get(model), groups[1].get(model), was, now))
        found.append(Moved(None, None, None, self._rest(before, changed), self._rest(after, changed)))
        return found

    def close(self) -> None:
        """Give back what the ids took."""
        self._first.close()

    def _sums(self, count: int | None = None) -> list[Sum]:
        return [Sum() for _ in range(len(self.sides) if count is None else count)]

    def _rest(self, side: int, changed: Collection[str]) -> Sum:
        rest = Sum()
        for model, sums in self._by_model.items():
            if model not in changed:
                for field in Sum.__struct_fields__:
                    setattr(rest, field, getattr(rest, field) + getattr(sums[side], field))
        return rest

    def _part(self, side: int, first: Decision, other: Decision) -> None:
        """Remember the first request of a day and group that is judged differently."""
        request = first.request
        split = Split(request.id, request.account, request.at, request.model, request.tokens, first, other)
        for group in {first.group, other.group}:
            self._splits.setdefault((request.at.date(), group, side), split)
        if self.splits[side] is None:
            self.splits[side] = split


class _Other:
    """Judges under one more reading what the first one has decided: ids need not be asked again."""

    def __init__(self, offer: Offer, assume: Enrollment | None, changes: Mapping[str, Sequence[Change]]) -> None:
        self._cases = Cases(offer)
        self._assume = assume
        self._changes = changes
        self._tallies: dict[TallyKey, Tally] = {}

    def decide(self, request: Request) -> Decision:
        changes = self._changes.get(request.account)
        change = in_force(changes, request.at) if changes else None
        enrollment, version = (self._assume, 0) if not changes else (None, -1)
        if change is not None:
            enrollment, version = change.enrollment, change.version
        charge = self._cases.charge(request, enrollment, version)
        key = tally_key(charge)
        decision, after = decide(charge, self._tallies.get(key))
        if after is not None:
            self._tallies[key] = after
        return decision


def listed(offers: Collection[Offer]) -> frozenset[str]:
    """Every model that some list of some of these offers names."""
    return frozenset(model for offer in offers for each in offer.revisions for model in (*each.aliases, *_lists(each)))


def revision_sides(offer: Offer, reading: Reading) -> list[Side]:
    """The offer under each of its revisions, as if that one were in force always; otherwise as this reading has it."""
    return [
        Side(f"{revision.name} always", offer_as(offer, structs.replace(reading, revision=revision.name)))
        for revision in offer.revisions
    ]


def _differs(first: Decision, other: Decision) -> bool:
    return first.free_tokens != other.free_tokens or first.is_free is not other.is_free or first.group != other.group


def _by_day(key: tuple[date, str | None]) -> tuple[date, bool, str]:
    day, group = key
    return day, group is None, group or ""


def _lists(revision: Revision) -> Iterator[str]:
    return (model for group in revision.groups for model in group.models or ())


def _groups(offer: Offer) -> dict[str, str | None]:
    """The group of each model that is listed; where an offer has several revisions, in the last that lists it."""
    found: dict[str, str | None] = {}
    for revision in offer.revisions:
        names = {model: group.name for group in revision.groups for model in group.models or ()}
        found.update(names)
        found.update({alias: names[model] for alias, model in revision.aliases.items()})
    return found


def _at_tier(revision: Revision, tier: int) -> Revision:
    """The revision for accounts that are all at one tier, whatever their enrollments say."""
    return replace(revision, groups=tuple(_group_at_tier(group, tier) for group in revision.groups))


def _group_at_tier(group: Group, tier: int) -> Group:
    given = group.allowances.get(tier)
    return replace(group, allowances={} if given is None else dict.fromkeys(range(TIER_MAX + 1), given))


def _with(revision: Revision, joins: Mapping[str, str], leaves: Collection[str]) -> Revision:
    gone = {*joins, *leaves}
    groups = []
    for group in revision.groups:
        models = group.models
        if models is not None:
            models = (models - gone) | {model for model, name in joins.items() if name == group.name}
        groups.append(replace(group, models=models))
    aliases = {alias: model for alias, model in revision.aliases.items() if alias not in gone and model not in gone}
    return replace(revision, groups=tuple(groups), aliases=aliases)
