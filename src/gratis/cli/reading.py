"""`gratis readings`: one log judged under several readings of an offer, side by side."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from gratis.audit.readings import (
    Comparison,
    Reading,
    Side,
    combinations,
    listed,
    offer_as,
    offer_with,
    revision_sides,
)
from gratis.cli import report
from gratis.cli.decisions import assumed, histories
from gratis.cli.screen import is_table, number, paint, safe, table
from gratis.cli.streams import Complaints, Output, Progress, batches, parsed, reading
from gratis.errors import GratisError, RequestError
from gratis.lines import instant, request_of
from gratis.model import Counts, Overage, stamp
from gratis.offers import load

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from gratis.audit.readings import Moved, Row, Split, Sum
    from gratis.audit.story import Story
    from gratis.model import Decision
    from gratis.offer import Offer

BAD_INPUT = 2
NAME_MAX = 120
UNCOVERED = "(none)"


def readings(arguments: argparse.Namespace) -> int:
    """Judge a log under each reading, and show where they part."""
    if arguments.file.endswith((".csv", ".parquet")):
        raise GratisError(
            f"readings: {arguments.file}: expected JSON lines; CSV and Parquet are read by `gratis replay`"
        )
    if arguments.tier is None and arguments.tiers:
        arguments.tier = arguments.tiers[0]
    if arguments.tier is None and arguments.enrollments is None:
        raise GratisError("readings: expected --tier N, --tiers N,N, or --enrollments FILE: who takes part?")
    offer = load(arguments.offer)
    chosen = _chosen(arguments, offer)
    sides = [Side(str(each), offer_as(offer, each)) for each in chosen]
    also, pairs = _changed(arguments, offer, chosen[0], len(sides))
    compared = Comparison(
        sides,
        also=also,
        assume=assumed(arguments),
        changes={} if arguments.enrollments is None else histories(arguments.enrollments, offer.name),
        models=listed([offer, *(side.offer for side in also)]) if pairs else (),
    )
    title = f"{offer.title}, under {len(sides)} readings"
    reads = [name for name in (arguments.file, arguments.enrollments, arguments.offer) if name]
    story = report.begin(arguments.html, title, offer.name, reads=reads)
    try:
        code = _judge(arguments.file, compared, story)
        if story is not None:
            _tell(story, compared, pairs)
            report.end(arguments.html, story)
        if is_table(arguments.format):
            _print(compared, pairs)
        else:
            Output().lines([*_lines(compared, chosen), *_model_lines(compared, pairs)])
        return code
    finally:
        compared.close()


def _chosen(arguments: argparse.Namespace, offer: Offer) -> list[Reading]:
    """The readings that were asked for; where none was, both of each switch that the text leaves open."""
    revisions = arguments.revisions or [None]
    if revisions == ["all"]:
        revisions = [revision.name for revision in offer.revisions]
    revisions = [_revision(offer, name) for name in revisions]
    counts, overage = arguments.counts, arguments.overage
    if not any((counts, overage, arguments.tiers, arguments.windows, arguments.revisions)):
        counts = _own_first({revision.counts for revision in offer.revisions}, list(Counts))
        overage = _own_first({revision.overage for revision in offer.revisions}, list(Overage))
    return combinations(
        counts=counts or [None],
        overage=overage or [None],
        windows=arguments.windows or [None],
        tiers=arguments.tiers or [None],
        revisions=revisions,
    )


def _revision(offer: Offer, day: str | None) -> str | None:
    """The name of the revision that was in force on a day."""
    try:
        found = None if day is None else offer.at(instant("--revisions", f"{day}T00:00:00Z"))
    except RequestError:
        raise GratisError(f"--revisions: found {day!r}; expected dates, such as 2025-05-01, or all") from None
    if day is not None and found is None:
        raise GratisError(f"--revisions: {offer.name} was not in force on {day}; expected a later date")
    return None if found is None else found.name


def _own_first(own: set[Any], known: list[Any]) -> list[Any]:
    """Every value of a switch, that of the offer first; None where its revisions do not agree on one."""
    if len(own) > 1:
        return [None, *known]
    return sorted(known, key=lambda value: value not in own)


def _changed(
    arguments: argparse.Namespace, offer: Offer, own: Reading, shown: int
) -> tuple[list[Side], list[tuple[int, int]]]:
    """The sides that say what a changed list did, and which two of all sides to compare."""
    also: list[Side] = []
    pairs: list[tuple[int, int]] = []
    if arguments.models:
        also = revision_sides(offer, own)
        pairs = list(pairwise(range(shown, shown + len(also))))
    if arguments.joins or arguments.leaves:
        named = [*(model for model, _ in arguments.joins), *arguments.leaves]
        twice = next((model for model in named if named.count(model) > 1), None)
        if twice is not None:
            raise GratisError(f"readings: found {twice!r} more than once; expected one --with or --without a model")
        supposed = offer_with(offer_as(offer, own), joins=dict(arguments.joins), leaves=arguments.leaves)
        pairs.append((0, shown + len(also)))
        also.append(Side(" ".join([*(f"with {m}={g}" for m, g in arguments.joins), *_without(arguments)]), supposed))
    return also, pairs


def _without(arguments: argparse.Namespace) -> Iterator[str]:
    return (f"without {model}" for model in arguments.leaves)


def _judge(name: str, compared: Comparison, story: Story | None) -> int:
    """Judge a log in its order; a bad line is reported and the others go on."""
    complain, progress = Complaints(name), Progress("requests")
    with reading(name) as file:
        for batch in batches(file):
            for place, line in batch:
                if not line.strip():
                    continue
                try:
                    decision = compared.add(request_of(parsed(line)))
                    if story is not None:
                        story.add(decision)
                except RequestError as error:
                    progress.end()
                    complain(place, error)
            progress.add(len(batch))
    progress.end()
    return BAD_INPUT if complain.count else 0


def _lines(compared: Comparison, chosen: Sequence[Reading]) -> Iterator[dict[str, Any]]:
    """Days first, then where readings part, then totals."""
    for row in compared.rows():
        yield {"what": "day", **_place(compared, row), **_sum_line(row.sum)}
    for part in compared.parts():
        for row in part[1:]:
            if row.split or row.sum != part[0].sum:
                more = row.sum.free_tokens - part[0].sum.free_tokens
                yield {
                    "what": "part",
                    **_place(compared, row),
                    "more_free_tokens": more,
                    "first_different": _split_line(row.split),
                }
    apart = _apart(compared)
    for side, each in enumerate(chosen):
        total = compared.totals[side]
        yield {
            "what": "total",
            "reading": compared.sides[side].name,
            **{name: getattr(each, name) for name in each.__struct_fields__},
            **_sum_line(total),
            "more_free_tokens": total.free_tokens - compared.totals[0].free_tokens,
            "days_apart": apart[side],
            "first_different": _split_line(compared.splits[side]),
        }


def _place(compared: Comparison, row: Row) -> dict[str, Any]:
    return {"day": row.day.isoformat(), "group": row.group, "reading": compared.sides[row.side].name}


def _sum_line(found: Sum) -> dict[str, Any]:
    return {
        "requests": found.requests,
        "free_requests": found.free_requests,
        "billed_requests": found.billed_requests,
        "free_tokens": found.free_tokens,
        "billed_tokens": found.billed_tokens,
        "unmeasured_requests": found.unmeasured,
    }


def _split_line(split: Split | None) -> dict[str, Any] | None:
    if split is None:
        return None
    return {
        "id": split.first.id,
        "account": split.first.account,
        "at": stamp(split.first.at),
        "model": split.first.request.model,
        "tokens": split.first.tokens,
        "first": _verdict(split.first),
        "here": _verdict(split.other),
    }


def _verdict(decision: Decision) -> dict[str, Any]:
    return {
        "verdict": decision.verdict,
        "reason": decision.reason,
        "group": decision.group,
        "free_tokens": decision.free_tokens,
        "billed_tokens": decision.billed_tokens,
    }


def _apart(compared: Comparison) -> list[int]:
    """On how many days each reading differs from the first."""
    days: list[set[Any]] = [set() for _ in range(compared.shown)]
    for part in compared.parts():
        for row in part[1:]:
            if row.split or row.sum != part[0].sum:
                days[row.side].add(row.day)
    return [len(found) for found in days]


def _model_lines(compared: Comparison, pairs: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    for before, after in pairs:
        for moved in compared.moved(before, after):
            yield {
                "what": "model",
                "before": compared.sides[before].name,
                "after": compared.sides[after].name,
                "model": moved.model,
                "change": moved.change,
                "group_before": moved.group_before,
                "group_after": moved.group_after,
                "requests": moved.after.requests,
                "tokens": moved.after.tokens,
                "free_tokens_before": moved.before.free_tokens,
                "free_tokens_after": moved.after.free_tokens,
                "became_free": max(0, moved.became_free),
                "became_billed": max(0, -moved.became_free),
            }


def _tell(story: Story, compared: Comparison, pairs: Sequence[tuple[int, int]]) -> None:
    """What a report says of it, beside the days of the first reading."""
    head = ["reading", "requests", "free", "free tokens", "billed tokens", "free more", "days apart"]
    apart, first = _apart(compared), compared.totals[0]
    totals = [
        [
            side.name,
            *(total.requests, total.free_requests, total.free_tokens, total.billed_tokens),
            *(total.free_tokens - first.free_tokens, days),
        ]
        for side, total, days in zip(compared.sides, compared.totals, apart, strict=False)
    ]
    note = "The days above are those of the first reading; the others are compared with it."
    story.section("Readings side by side", head, totals, note)
    rows: list[list[object]] = []
    for part in compared.parts():
        for row in part[1:]:
            if row.split is not None:
                more = row.sum.free_tokens - part[0].sum.free_tokens
                said = " → ".join(_said(decision) for decision in (row.split.first, row.split.other))
                name = compared.sides[row.side].name
                rows.append([row.day.isoformat(), row.group or UNCOVERED, name, more, row.split.first.id, said])
    head = ["day", "group", "reading", "free more", "first judged differently", "by the first → by this one"]
    note = "Days and groups where one differs from the first." if rows else "They part nowhere in this log."
    story.section("Where they part", head, rows, note)
    changed: list[list[object]] = []
    for before, after in pairs:
        lists = " → ".join(compared.sides[side].name for side in (before, after))
        moved = [each for each in compared.moved(before, after) if each.model is None or each.after.requests]
        if len(moved) > 1:
            changed += [[lists, *_moved_cells(each)] for each in moved]
    if pairs:
        note = "Of models that joined, left or moved, and through the shared allowance of all others."
        story.section("What changed lists do to this log", ["lists", *MODEL_HEAD], changed, note)


def _print(compared: Comparison, pairs: Sequence[tuple[int, int]]) -> None:
    """The same for people: what the readings are, days, where they part, totals, and what lists changed."""
    print(paint("Readings", "bold"))
    for place, side in enumerate(compared.sides[: compared.shown], start=1):
        print(f"  {place}  {safe(side.name, NAME_MAX)}" + ("  (the others are compared with it)" if place == 1 else ""))
    print()
    print(_days(compared))
    parts = _parts(compared)
    print()
    print(parts or "The readings part nowhere in this log.")
    print()
    print(_totals(compared))
    for before, after in pairs:
        print()
        print(_models(compared, before, after))


def _days(compared: Comparison) -> str:
    """A row a reading where they part, one row for all where they do not."""
    rows = []
    found = list(compared.rows())
    for place in range(0, len(found), compared.shown):
        day = found[place : place + compared.shown]
        is_same = all(row.sum == day[0].sum and row.split is None for row in day)
        for row in day[:1] if is_same else day:
            name = "all" if is_same else str(row.side + 1)
            rows.append([*_where(row), name, *_cells(row.sum), _more(row.sum, day[0].sum)])
    head = ["day", "group", "reading", *HEADS, "free more"]
    return table(head, rows, right=["reading", *HEADS, "free more"])


MODEL_HEAD = ["model", "change", "group", "tokens", "free before", "free after", "became free", "became billed"]
HEADS = ["requests", "free", "free tokens", "billed tokens"]


def _where(row: Row) -> list[str]:
    return [row.day.isoformat(), UNCOVERED if row.group is None else safe(row.group)]


def _cells(found: Sum) -> list[str]:
    return [number(each) for each in (found.requests, found.free_requests, found.free_tokens, found.billed_tokens)]


def _more(found: Sum, first: Sum) -> str:
    return _signed(found.free_tokens - first.free_tokens)


def _signed(more: int) -> str:
    return f"{more:+,}" if more else ""


def _parts(compared: Comparison) -> str:
    """Where readings part from the first, and the first request that is judged differently there."""
    rows = []
    for part in compared.parts():
        for row in part[1:]:
            split = row.split
            if split is not None:
                were = " → ".join(_said(decision) for decision in (split.first, split.other))
                when = f"{split.first.at:%H:%M:%S}"
                cells = [safe(split.first.id, 32), when, number(split.first.tokens), were]
                rows.append([*_where(row), str(row.side + 1), _more(row.sum, part[0].sum), *cells])
    if not rows:
        return ""
    head = ["day", "group", "reading", "free more", "first judged differently", "at", "tokens", "by 1 → by this one"]
    return table(head, rows, right=["reading", "free more", "tokens"])


def _said(decision: Decision) -> str:
    if decision.is_free or not decision.free_tokens:
        return f"{decision.verdict} ({decision.group})" if decision.group else str(decision.reason)
    return f"{number(decision.free_tokens)} free ({decision.group})"


def _totals(compared: Comparison) -> str:
    apart = _apart(compared)
    rows = []
    for place, side in enumerate(compared.sides[: compared.shown]):
        total = compared.totals[place]
        more = _more(total, compared.totals[0])
        days = number(apart[place]) if place else ""
        rows.append([str(place + 1), safe(side.name, NAME_MAX), *_cells(total), more, days])
    head = ["", "in all", *HEADS, "free more", "days apart"]
    return table(head, rows, right=["", *HEADS, "free more", "days apart"])


def _models(compared: Comparison, before: int, after: int) -> str:
    """What a changed list did to the models of this log, and through the shared allowance to the others."""
    names = [safe(compared.sides[side].name, NAME_MAX) for side in (before, after)]
    found = compared.moved(before, after)
    seen = [moved for moved in found if moved.after.requests and moved.model]
    rest = len(found) - 1 - len(seen)
    lines = [paint(f"{names[0]} → {names[1]}", "bold")]
    if seen:
        rows = [[_shown(cell) for cell in _moved_cells(moved)] for moved in [*seen, found[-1]]]
        lines.append(table(MODEL_HEAD, rows, right=MODEL_HEAD[3:]))
    if rest:
        more = "1 more model" if rest == 1 else f"{number(rest)} more models"
        lines.append(f"{more} changed of which this log has no request.")
    elif not seen:
        lines.append("No list changed.")
    return "\n".join(lines)


def _moved_cells(moved: Moved) -> list[object]:
    groups = {"others": "", "moved": f"{moved.group_before} → {moved.group_after}"}
    return [
        "all others" if moved.model is None else moved.model,
        "" if moved.model is None else moved.change,
        groups.get(moved.change, moved.group_after or moved.group_before or ""),
        *(moved.after.tokens, moved.before.free_tokens, moved.after.free_tokens),
        *(max(0, moved.became_free), max(0, -moved.became_free)),
    ]


def _shown(cell: object) -> str:
    return number(cell) if isinstance(cell, int) else safe(cell)
