"""`gratis offers`: which there are, what a revision says, whether a file is right, what changed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from gratis import clock as system
from gratis.cli.screen import is_table, number, paint, safe, table
from gratis.cli.streams import Output
from gratis.errors import GratisError, OfferError
from gratis.offers import load, shipped

if TYPE_CHECKING:
    import argparse
    from datetime import datetime

    from gratis.offer import Group, Offer, Revision

BAD_INPUT = 2
CELL_MODEL = 400
RULES = (
    "announced_until",
    "window",
    "counts",
    "overage",
    "reasons",
    "client_side_tools",
    "excluded_plans",
    "zero_data_retention",
    "fine_tuned_prefix",
    "o_series",
    "aliases",
)
GROUP_RULES = ("unit", "allowance", "kinds", "cached_input")


def listing(arguments: argparse.Namespace) -> int:
    """List the offers that are shipped."""
    offers = [load(name) for name in shipped()]
    if is_table(arguments.format):
        rows = [
            [offer.name, str(len(offer.revisions)), offer.revisions[0].name, _until(offer), offer.title]
            for offer in offers
        ]
        print(table(["name", "revisions", "from", "until", "what it is"], rows, right=["revisions"]))
        return 0
    Output().lines(
        [
            {
                "name": offer.name,
                "title": offer.title,
                "account": offer.account,
                "revisions": [revision.name for revision in offer.revisions],
            }
            for offer in offers
        ]
    )
    return 0


def show(arguments: argparse.Namespace) -> int:
    """Show the revision of an offer that is in force on a date."""
    offer = load(arguments.name)
    at = system.now() if arguments.at is None else arguments.at
    revision = _in_force(offer, at)
    if is_table(arguments.format):
        print(_revision_text(offer, revision))
    else:
        Output().lines([{"offer": offer.name, **_revision_line(revision)}])
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Check files of one's own."""
    code = 0
    for name in arguments.file:
        try:
            offer = load(name)
        except OfferError as error:
            print(f"gratis: {error}", file=sys.stderr)
            code = BAD_INPUT
            continue
        models = {model for revision in offer.revisions for group in revision.groups for model in group.models or ()}
        if is_table(arguments.format):
            print(f"{safe(name)}: good: {offer.name}, {len(offer.revisions)} revisions, {len(models)} models")
        else:
            line = {"file": name, "offer": offer.name, "revisions": len(offer.revisions), "models": len(models)}
            Output().lines([line])
    return code


def diff(arguments: argparse.Namespace) -> int:
    """Print what changed between two dates, a line each."""
    offer = load(arguments.name)
    first, second = _in_force(offer, arguments.first), _in_force(offer, arguments.second)
    changes = list(_changes(first, second))
    if is_table(arguments.format):
        print(paint(f"{offer.name}: {first.name} → {second.name}", "bold"))
        for change in changes:
            sign, color = {"added": ("+", "green"), "removed": ("-", "red")}.get(change["change"], ("~", "yellow"))
            became = f": {_text(change['first'])} → {_text(change['second'])}" if sign == "~" else ""
            print(paint(f"{sign} {safe(change['what'])} {safe(change['name'])}{became}", color))
        if not changes:
            print("nothing changed")
    else:
        Output().lines(changes)
    return 0


def _in_force(offer: Offer, at: datetime) -> Revision:
    revision = offer.at(at)
    if revision is None:
        first = offer.revisions[0].name
        raise GratisError(
            f"{offer.name}: not in force on {at:%Y-%m-%d}; expected a date from {first} until {_until(offer)}"
        )
    return revision


def _until(offer: Offer) -> str:
    ends = offer.revisions[-1].ends
    return "further notice" if ends is None else f"{ends:%Y-%m-%d}"


def _changes(first: Revision, second: Revision) -> list[dict[str, Any]]:
    """What differs: models by group, then the values of the revision, then those of each group."""
    old, new = _revision_line(first), _revision_line(second)
    old_groups, new_groups = ({group["name"]: group for group in line["groups"]} for line in (old, new))
    found = _differences("model", _models(first), _models(second))
    found += _differences("rule", *({name: line[name] for name in RULES} for line in (old, new)))
    found += _differences("group", dict.fromkeys(old_groups), dict.fromkeys(new_groups))
    for name in sorted(old_groups.keys() & new_groups.keys()):
        values = ({key: group[name][key] for key in GROUP_RULES} for group in (old_groups, new_groups))
        found += _differences(f"group {name}", *values)
    return found


def _differences(what: str, first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for name in sorted(first.keys() | second.keys()):
        if name not in first:
            change = "added"
        elif name not in second:
            change = "removed"
        elif first[name] != second[name]:
            change = "changed"
        else:
            continue
        row = {"change": change, "what": what, "name": name, "first": first.get(name), "second": second.get(name)}
        found.append(row)
    return found


def _models(revision: Revision) -> dict[str, str]:
    return {model: group.name for group in revision.groups for model in group.models or ()}


def _revision_line(revision: Revision) -> dict[str, Any]:
    return {
        "revision": revision.name,
        "from": f"{revision.starts:%Y-%m-%d}",
        "until": None if revision.ends is None else f"{revision.ends:%Y-%m-%d}",
        "observed_on": _date(revision.observed_on),
        "announced_until": _date(revision.announced_until),
        "source": revision.source,
        "window": str(revision.window),
        "counts": revision.counts,
        "overage": revision.overage,
        "reasons": ["offer_not_in_force", *revision.reasons, "too_late"],
        "client_side_tools": sorted(revision.client_side_tools),
        "excluded_plans": sorted(revision.excluded_plans),
        "zero_data_retention": "excluded" if revision.excludes_zero_data_retention else "allowed",
        "fine_tuned_prefix": revision.fine_tuned_prefix,
        "o_series": sorted(revision.o_series),
        "aliases": dict(sorted(revision.aliases.items())),
        "groups": [_group_line(group) for group in revision.groups],
    }


def _group_line(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "unit": group.unit,
        "allowance": {str(tier): tokens for tier, tokens in sorted(group.allowances.items())},
        "models": None if group.models is None else sorted(group.models),
        "kinds": None if group.kinds is None else sorted(group.kinds),
        "cached_input": "counted" if group.counts_cached_input else "not_counted",
    }


def _date(day: object) -> str | None:
    return None if day is None else str(day)


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(safe(item) for item in value) or "none"
    return safe(value)


def _revision_text(offer: Offer, revision: Revision) -> str:
    line = _revision_line(revision)
    lines = [paint(safe(offer.title, CELL_MODEL), "bold")]
    facts = {
        "offer": offer.name,
        "revision": f"from {line['from']} until {line['until'] or 'further notice'}",
        "observed on": line["observed_on"],
        "announced until": line["announced_until"],
        "source": line["source"],
        "window": line["window"],
        "counts": f"{line['counts']} tokens add to what is used",
        "overage": "a request that does not fit is billed whole"
        if line["overage"] == "whole"
        else "only the part beyond the allowance is billed",
        "excluded, in order": ", ".join(line["reasons"]),
    }
    lines += [f"  {name:<19} {value}" for name, value in facts.items() if value is not None]
    for group in revision.groups:
        allowance = ", ".join(f"tier {span}: {number(tokens)}" for span, tokens in _spans(group).items())
        lines.append(paint(f"{group.name}: {group.unit} ({allowance})", "bold"))
        lines += [f"  {safe(model, CELL_MODEL)}" for model in sorted(group.models or ["any model"])]
    return "\n".join(lines)


def _spans(group: Group) -> dict[str, int]:
    """The allowance by span of tiers, as people write it."""
    spans: list[tuple[int, int, int]] = []
    for tier, tokens in sorted(group.allowances.items()):
        if spans and spans[-1][2] == tokens and spans[-1][1] == tier - 1:
            spans[-1] = (spans[-1][0], tier, tokens)
        else:
            spans.append((tier, tier, tokens))
    return {f"{first}" if first == last else f"{first}-{last}": tokens for first, last, tokens in spans}
