"""What a provider gives: dated revisions of groups, allowances and rules, and how to ask them.

An offer is data. Nothing in it decides; `classify.py` asks it, and `offer_file.py` reads it from TOML.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from gratis.model import Counts, Kind, Overage, Reason, Unit

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import date, datetime

    from gratis.window import Calendar, Rolling


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Models that share one allowance. `models` or `kinds` left None: any."""

    name: str
    unit: Unit
    allowances: Mapping[int, int]
    models: frozenset[str] | None
    kinds: frozenset[Kind] | None = None
    counts_cached_input: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Revision:
    """One dated version of an offer, in force from `starts` until before `ends`.

    `reasons` are the exclusions that apply, in the order in which they win. `after` and `before` are the instants
    at which a neighbour with another kind of window hands over: no window outlives such a switch.
    """

    starts: datetime
    ends: datetime | None
    source: str
    observed_on: date | None
    announced_until: date | None
    window: Calendar | Rolling
    counts: Counts
    overage: Overage
    reasons: tuple[Reason, ...]
    groups: tuple[Group, ...]
    aliases: Mapping[str, str]
    client_side_tools: frozenset[str] = frozenset()
    excluded_plans: frozenset[str] = frozenset()
    excludes_zero_data_retention: bool = False
    fine_tuned_prefix: str | None = None
    o_series: frozenset[str] = frozenset()
    after: datetime | None = None
    before: datetime | None = None
    _by_model: Mapping[str, Group] = field(init=False, repr=False)
    _for_any: Group | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        listed = {model: group for group in self.groups for model in group.models or ()}
        listed.update({alias: listed[model] for alias, model in self.aliases.items()})
        object.__setattr__(self, "_by_model", listed)
        object.__setattr__(self, "_for_any", next((g for g in self.groups if g.models is None), None))

    @property
    def name(self) -> str:
        """The date from which it is in force: no two revisions of an offer share it."""
        return self.starts.date().isoformat()

    def listed_id(self, model: str) -> str:
        """The id that the lists use for this model: its entry in the alias table, or itself."""
        return self.aliases.get(model, model)

    def group_of(self, model: str, kind: Kind) -> Group | None:
        """The group that covers this very model id, by itself or through the alias table."""
        group = self._by_model.get(model, self._for_any)
        if group is None or (group.kinds is not None and kind not in group.kinds):
            return None
        return group


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """What a provider gives, over time."""

    name: str
    title: str
    account: str
    revisions: tuple[Revision, ...]
    _starts: tuple[datetime, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        assert self.revisions, "an offer has at least one revision"
        object.__setattr__(self, "_starts", tuple(revision.starts for revision in self.revisions))

    def at(self, instant: datetime) -> Revision | None:
        """The revision in force at this instant, if any."""
        place = bisect_right(self._starts, instant)
        if place == 0:
            return None
        revision = self.revisions[place - 1]
        return revision if revision.ends is None or instant < revision.ends else None

    def reading(self, *, counts: Counts | str | None = None, overage: Overage | str | None = None) -> Offer:
        """The same offer under another reading of what its text leaves open."""
        return replace(
            self,
            revisions=tuple(
                replace(
                    revision,
                    counts=revision.counts if counts is None else Counts(counts),
                    overage=revision.overage if overage is None else Overage(overage),
                )
                for revision in self.revisions
            ),
        )
