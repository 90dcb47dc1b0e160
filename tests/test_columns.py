"""Columns and rows: the compiled kernel and `rule.py` say the same of every log."""

from __future__ import annotations

import json
import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings, strategies as st

from gratis.audit.columns import compiled, kernel, repeats, tables
from gratis.audit.columns.repeats import Finder
from gratis.audit.columns.tables import SCHEMA, Judge, decide_table
from gratis.audit.columns.writing import lines_of
from gratis.audit.replay import Replay
from gratis.errors import GratisError, RequestError
from gratis.lines import DECISION_FIELDS, decision_fields, encode, request_of
from gratis.model import TOKENS_MAX, Change, Counts, Enrollment, Kind, Overage, Reason, Unit, stamp
from gratis.offer import Group, Offer, Revision
from gratis.offers import load, shipped
from gratis.stores import CONFLICT_FIELDS
from gratis.window import Calendar, Rolling, Span

if TYPE_CHECKING:
    from collections.abc import Sequence

OPENAI = load("openai-data-sharing")
LARGE = "gpt-4o-2024-08-06"
SMALL = "gpt-4o-mini-2024-07-18"
SHARING = Enrollment(tier=3, sharing="enabled")
NOON = datetime(2025, 4, 20, 12, tzinfo=UTC)
SWITCH = datetime(2025, 3, 6, tzinfo=UTC)
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
TICK = timedelta(microseconds=1)
COUNTED = ("input_tokens", "output_tokens", "cached_tokens")


# -- the two ways, side by side


def by_rows(
    rows: Sequence[dict[str, Any]], offer: Offer, assume: Enrollment | None, changes: dict[str, list[Change]]
) -> tuple[list[bytes], list[tuple[int, str]]]:
    """The lines of the decisions that the rule makes one after another, and the errors with their row's number."""
    replay, lines, errors = Replay(offer, assume=assume, changes=changes), [], []
    for number, row in enumerate(rows, start=1):
        line = {name: stamp(cell) if isinstance(cell, datetime) else cell for name, cell in row.items()}
        line.setdefault("id", str(number))
        try:
            lines.append(encode(decision_fields(replay.decide(request_of(line)))) + b"\n")
        except RequestError as error:
            errors.append((number, str(error)))
    replay.close()
    return lines, errors


def by_columns(table: pa.Table, offer: Offer, **options: Any) -> tuple[list[bytes], list[tuple[int, str]]]:
    """The same of the kernel."""
    errors: list[tuple[int, str]] = []
    found = decide_table(table, offer, on_error=lambda number, error: errors.append((number, str(error))), **options)
    assert found.schema == SCHEMA
    return written(found), errors


def written(found: pa.Table) -> list[bytes]:
    """Decisions as the lines that they are printed as."""
    return b"".join(part for batch in found.to_batches() for part in lines_of(batch)).splitlines(keepends=True)


def same(rows: Sequence[dict[str, Any]], offer: Offer = OPENAI, assume: Enrollment | None = SHARING) -> list[Any]:
    """What both ways say of a log, which has to be the same; as the values of the lines."""
    lines, errors = by_rows(rows, offer, assume, {})
    assert by_columns(table_of(rows), offer, assume=assume) == (lines, errors)
    return [json.loads(line) for line in lines] + errors


def table_of(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Rows as a table; a column is there if a row has it."""
    names = sorted({name for row in rows for name in row})
    return pa.table({name: column_of(name, [row.get(name) for row in rows]) for name in names})


def column_of(name: str, cells: list[Any]) -> Any:
    """Cells as the type that says what they are."""
    if name == "at" and any(isinstance(cell, datetime) for cell in cells):
        return pa.array(cells, pa.timestamp("us", "UTC"))
    if name in COUNTED:
        return pa.array(cells, pa.int64())
    return pa.array(cells, pa.list_(pa.string()) if name == "tools" else pa.string())


def request(number: int, at: datetime = NOON, tokens: int | None = 0, **fields: Any) -> dict[str, Any]:
    """A row."""
    return {"id": f"r{number}", "model": LARGE, "at": at, "input_tokens": tokens, "output_tokens": 0, **fields}


def verdicts(found: list[Any]) -> list[tuple[str, int | None, int | None]]:
    """Of each decision its verdict, its free tokens and what is used after it."""
    return [(one["verdict"], one["free_tokens"], one["used"]) for one in found]


# -- any offer, any log


ZONES = ("UTC", "America/Los_Angeles", "America/Havana", "Africa/Cairo", "Asia/Kathmandu")
windows = st.one_of(
    st.builds(Rolling, hours=st.sampled_from([1, 24, 100])),
    st.builds(
        Calendar, span=st.sampled_from(Span), zone=st.sampled_from(ZONES), week_starts=st.sampled_from([0, 3])
    ).map(lambda window: window if window.span is Span.WEEK else Calendar(window.span, window.zone)),
)
# Clocks go back and forth, the provider's switch, the turns of weeks, months and years.
EDGES = [
    datetime(2025, 11, 2, 4, tzinfo=UTC),
    datetime(2025, 11, 2, 9, tzinfo=UTC),
    datetime(2025, 3, 9, 10, tzinfo=UTC),
    datetime(2025, 4, 24, 22, tzinfo=UTC),
    SWITCH,
    datetime(2025, 3, 31, 23, 59, 59, 999_999, tzinfo=UTC),
    datetime(2026, 1, 1, tzinfo=UTC),
]
instants = st.builds(
    lambda edge, steps, step: edge + steps * step,
    st.sampled_from(EDGES),
    st.integers(-40, 40),
    st.sampled_from([TICK, MINUTE, HOUR, HOUR, DAY]),
)


@st.composite
def groups(draw: st.DrawFn) -> tuple[Group, ...]:
    """One group for any model, or two for some."""
    drawn = {
        "unit": st.sampled_from([Unit.TOKENS, Unit.TOKENS, Unit.REQUESTS, Unit.RUNS]),
        "counts_cached_input": st.booleans(),
        "kinds": st.sampled_from([None, None, frozenset({Kind.COMPLETION, Kind.EMBEDDING})]),
    }
    allowances = st.sampled_from([0, 1, 5, 100, 1_000]).map(lambda most: {1: most, 3: 2 * most, 5: 2 * most + 1})
    small = Group("small", allowances=draw(allowances), models=None, **draw(st.fixed_dictionaries(drawn)))
    if draw(st.booleans()):
        return (small,)
    large = Group(
        "large", allowances=draw(allowances), models=frozenset({LARGE, "m"}), **draw(st.fixed_dictionaries(drawn))
    )
    return (
        large,
        Group("small", small.unit, small.allowances, frozenset({SMALL}), small.kinds, small.counts_cached_input),
    )


NEEDED = (Reason.NOT_ENROLLED, Reason.ACCOUNT_NOT_ELIGIBLE, Reason.MODEL_NOT_LISTED, Reason.UNMEASURED)
RULES = {Reason.WITHIN_ALLOWANCE, Reason.OVER_ALLOWANCE, Reason.OFFER_NOT_IN_FORCE, Reason.TOO_LATE}
REASONS = tuple(reason for reason in Reason if reason not in {*NEEDED, *RULES})


@st.composite
def offers(draw: st.DrawFn) -> Offer:
    """An offer of one to three revisions, with gaps or without, that hand over between kinds of windows."""
    starts = sorted(draw(st.lists(instants, min_size=1, max_size=3, unique_by=lambda at: at.date())))
    made: list[Revision] = []
    for place, start in enumerate(starts):
        following = starts[place + 1] if place + 1 < len(starts) else None
        ends = following if draw(st.booleans()) else (following or start + 60 * DAY) - HOUR
        made.append(
            Revision(
                starts=start,
                ends=ends if ends is None or ends > start else following,
                source="drawn",
                observed_on=None,
                announced_until=None,
                window=draw(windows),
                counts=draw(st.sampled_from(Counts)),
                overage=draw(st.sampled_from(Overage)),
                reasons=tuple(draw(st.permutations(NEEDED))) + draw(st.sampled_from([(), REASONS])),
                groups=draw(groups()),
                aliases={},
                client_side_tools=frozenset({"function"}),
                excluded_plans=frozenset({"enterprise"}),
                excludes_zero_data_retention=draw(st.booleans()),
                fine_tuned_prefix="ft:",
                o_series=frozenset({LARGE}),
                after=start if draw(st.booleans()) else None,
                before=following if draw(st.booleans()) else None,
            )
        )
    return Offer("drawn", "an offer", "account", tuple(made))


numbers = st.one_of(
    st.sampled_from([None, 0, 0, 1, 4, 5, 6, 100, 101]), st.sampled_from([-1, -2, TOKENS_MAX, TOKENS_MAX + 1, 2**62])
)
rows = st.fixed_dictionaries(
    {
        "id": st.sampled_from(["a", "b", "c", "d", 'q"\\', "caf\u00e9", None, "", "x\n", "y" * 255, "z" * 256, "\x85"]),
        "account": st.sampled_from([None, "default", "acme", "acme", "umbrella", "", "\x7f"]),
        "project": st.sampled_from([None, None, "p", "q", "\t"]),
        "model": st.sampled_from([LARGE, LARGE, SMALL, "m", "", None, "ft:m", "x" * 1025]),
        "kind": st.sampled_from([None, *[kind.value for kind in Kind], "completion", "completion", "oven"]),
        "tools": st.sampled_from([None, None, None, [], ["function"], ["web", "function", "web"], [""]]),
        "at": st.one_of(instants, instants, instants, st.sampled_from([None, datetime(1969, 12, 31, tzinfo=UTC)])),
        "input_tokens": numbers,
        "output_tokens": st.one_of(st.just(0), numbers),
        "cached_tokens": st.sampled_from([None, 0, 0, 1, 4, -1, 10**13]),
    }
)
good = st.fixed_dictionaries(
    {
        "id": st.integers(0, 60).map("r{}".format),
        "account": st.sampled_from([None, "acme", "acme"]),
        "project": st.sampled_from([None, "p"]),
        "model": st.sampled_from([LARGE, SMALL, "m"]),
        "kind": st.sampled_from([None, "completion", "embedding", "embedding"]),
        "tools": st.sampled_from([None, None, ["function"]]),
        "at": st.one_of(st.sampled_from(EDGES), instants),
        "input_tokens": st.sampled_from([None, 0, 1, 2, 5, 6, 100, 101]),
        "output_tokens": st.sampled_from([None, 0, 0, 1]),
        "cached_tokens": st.sampled_from([None, 0]),
    }
).flatmap(lambda row: st.integers(0, row["input_tokens"] or 0).map(lambda cached: {**row, "cached_tokens": cached}))
enrollments = st.builds(
    lambda tier, sharing, plan, retention, starts, lasts: Enrollment(
        tier=tier,
        sharing=sharing,
        projects={"p"} if sharing == "selected" else set(),
        plan=plan,
        zero_data_retention=retention,
        starts=starts,
        ends=None if starts is None or lasts is None else starts + lasts,
        owners={"ann"},
    ),
    st.sampled_from([0, 1, 3, 3, 5]),
    st.sampled_from(["disabled", "enabled", "enabled", "selected"]),
    st.sampled_from(["standard", "standard", "enterprise"]),
    st.booleans(),
    st.one_of(st.none(), st.none(), instants),
    st.sampled_from([None, HOUR, DAY]),
)
histories = st.dictionaries(
    st.sampled_from(["acme", "default"]),
    st.lists(st.tuples(instants, enrollments), max_size=3).map(
        lambda made: [Change(version, at, "ann", enrollment) for version, (at, enrollment) in enumerate(made, start=1)]
    ),
)


@st.composite
def logs(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows, some of them once more, and some of them with columns left out."""
    drawn = draw(st.lists(st.one_of(good, good, good, good, rows), max_size=40))
    again = draw(st.lists(st.integers(0, len(drawn) - 1), max_size=5)) if drawn else []
    absent = draw(st.sets(st.sampled_from(["id", "account", "project", "kind", "tools", "cached_tokens"]), max_size=3))
    return [
        {name: cell for name, cell in row.items() if name not in absent} for row in drawn + [drawn[n] for n in again]
    ]


def shaped(table: pa.Table, shape: str, size: int) -> pa.Table:
    """The same table, kept in another way."""
    for place, field in enumerate(table.schema):
        cells = table.column(place)
        if pa.types.is_string(field.type) and shape == "dictionary":
            cells = cells.dictionary_encode()
        elif pa.types.is_string(field.type) and shape == "large":
            cells = cells.cast(pa.large_string())
        elif pa.types.is_list(field.type) and shape == "large":
            texts = [None if tools is None else json.dumps(tools) for tools in cells.to_pylist()]
            cells = pa.chunked_array([texts], pa.string())
        elif pa.types.is_timestamp(field.type) and shape == "large":
            texts = [None if at is None else stamp(at) for at in cells.to_pylist()]
            cells = pa.chunked_array([texts], pa.string())
        elif pa.types.is_timestamp(field.type) and shape == "dictionary":
            cells = cells.cast(pa.timestamp("ns", "America/New_York"))
        table = table.set_column(place, field.name, cells)
    return pa.concat_tables([table.slice(at, size) for at in range(0, len(table), size)]) if len(table) else table


@settings(max_examples=400, deadline=None)
@given(
    log=logs(),
    offer=st.one_of(offers(), st.sampled_from([load(name) for name in shipped()])),
    assume=st.one_of(st.none(), enrollments, st.just(SHARING), st.just(SHARING), st.just(SHARING)),
    changes=histories,
    shape=st.sampled_from(["plain", "dictionary", "large"]),
    size=st.sampled_from([1, 7, 100]),
)
def test_kernel_and_rule_say_the_same(  # noqa: PLR0917 - drawn by name
    log: list[dict[str, Any]],
    offer: Offer,
    assume: Enrollment | None,
    changes: dict[str, list[Change]],
    shape: str,
    size: int,
) -> None:
    """Whatever the offer, the reading, the enrollments and the rows: each field, each error, byte for byte."""
    if not log:
        return
    table = shaped(table_of(log), shape, size)
    assert by_columns(table, offer, assume=assume, changes=changes) == by_rows(log, offer, assume, changes)


def dense(seed: int, offer: Offer) -> list[dict[str, Any]]:
    """Many requests of few accounts, nearly all of them good, about the dates of an offer."""
    chance = random.Random(seed)  # noqa: S311 - the same log of the same seed, no secret
    models = [LARGE, SMALL, "m", *sorted(model for group in offer.revisions[-1].groups for model in group.models or ())]
    edges = [edge for revision in offer.revisions for edge in (revision.starts, revision.ends) if edge is not None]
    found: list[dict[str, Any]] = []
    for number in range(chance.choice([10, 80])):
        given = chance.choice([None, 0, 1, 2, 3, 5, 6, 99, 100, 101, 250_000, 1_000_000])
        row = {
            "id": f"r{number}",
            "account": chance.choice([None, "acme", "acme"]),
            "project": chance.choice([None, "p", "q"]),
            "model": chance.choice(models),
            "kind": chance.choice([None, None, "embedding", "assistants"]),
            "tools": chance.choice([None, None, ["function"], ["web"]]),
            "at": chance.choice(edges) + chance.randint(-3, 30) * chance.choice([TICK, MINUTE, HOUR, HOUR, DAY]),
            "input_tokens": given,
            "output_tokens": chance.choice([0, 0, 0, 1, None]),
            "cached_tokens": chance.randint(0, given or 0),
        }
        if found and not chance.randrange(8):
            first = chance.choice(found)
            row = {
                **first,
                **({} if chance.randrange(2) else {name: row[name] for name in [chance.choice(list(row)[1:])]}),
            }
            row["cached_tokens"] = min(row["cached_tokens"], row["input_tokens"] or 0)
        found.append(row)
    return found


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    offer=st.one_of(offers(), offers(), st.sampled_from([load(name) for name in shipped()])),
    assume=st.one_of(enrollments, st.just(SHARING), st.just(SHARING)),
    changes=st.one_of(st.just({}), histories),
)
def test_kernel_and_rule_say_the_same_of_busy_windows(
    seed: int, offer: Offer, assume: Enrollment, changes: dict[str, list[Change]]
) -> None:
    """Where windows fill up, open again and hand over, and requests come again: each decision, error and total."""
    log = dense(seed, offer)
    lines, errors = by_rows(log, offer, assume, changes)
    assert by_columns(table_of(log), offer, assume=assume, changes=changes) == (lines, errors)
    assert totals_of(table_of(log), offer, assume, changes) == summed(lines)


@settings(max_examples=100, deadline=None)
@given(log=logs(), offer=offers(), assume=st.one_of(enrollments, st.just(SHARING)), changes=histories)
def test_totals_are_the_sums_of_the_decisions(
    log: list[dict[str, Any]], offer: Offer, assume: Enrollment, changes: dict[str, list[Change]]
) -> None:
    """Requests and tokens by day, group and reason are those of the decisions, each request once."""
    if not log:
        return
    found = totals_of(table_of(log), offer, assume, changes)
    assert found == summed(by_rows(log, offer, assume, changes)[0])


def totals_of(
    table: pa.Table, offer: Offer, assume: Enrollment | None, changes: dict[str, list[Change]]
) -> Counter[tuple[Any, ...]]:
    """The totals of the kernel."""
    with Finder() as finder:
        found = repeats.NO_REPEATS
        if "id" in table.column_names:
            for batch in table.to_batches():
                finder.add(batch)
            found = finder.found(table.to_batches)
        judge = Judge(offer, assume=assume, changes=changes, repeats=found, on_error=lambda _number, _error: None)
        for batch in table.to_batches():
            judge.add(batch)
    told: Counter[tuple[Any, ...]] = Counter()
    for line in judge.totals():
        for name in ("requests", "unmeasured", "tokens", "free_tokens", "billed_tokens"):
            told[line["day"], line["group"], line["reason"], name] = line[name]
    return told


def summed(lines: list[bytes]) -> Counter[tuple[Any, ...]]:
    """The totals of decisions, each request once."""
    expected: Counter[tuple[Any, ...]] = Counter()
    for one in map(json.loads, lines):
        key = (one["at"][:10], one["group"], one["reason"])
        if not one["replayed"]:
            expected[*key, "requests"] += 1
            expected[*key, "unmeasured"] += one["tokens"] is None
            for name in ("tokens", "free_tokens", "billed_tokens"):
                expected[*key, name] += 0 if one["tokens"] is None else one[name]
    return expected


# -- the edges, one by one


@pytest.mark.parametrize(("counts", "overage"), list(product(Counts, Overage)))
def test_the_rows_of_the_table(counts: Counts, overage: Overage) -> None:
    """Exactly the allowance is free, one more is not, nothing is always free; each reading says what follows."""
    sizes = (975_000, 25_001, 25_000, 1, 0, TOKENS_MAX, 5)
    found = same(
        [request(number, NOON + number * MINUTE, size) for number, size in enumerate(sizes)],
        OPENAI.reading(counts=counts, overage=overage),
    )
    expected = {
        (Counts.FREE, Overage.WHOLE): [
            ("free", 975_000, 975_000),
            ("billed", 0, 975_000),
            ("free", 25_000, 1_000_000),
            ("billed", 0, 1_000_000),
            ("free", 0, 1_000_000),
            ("billed", 0, 1_000_000),
            ("billed", 0, 1_000_000),
        ],
        (Counts.FREE, Overage.EXCESS): [
            ("free", 975_000, 975_000),
            ("billed", 25_000, 1_000_000),
            ("billed", 0, 1_000_000),
            ("billed", 0, 1_000_000),
            ("free", 0, 1_000_000),
            ("billed", 0, 1_000_000),
            ("billed", 0, 1_000_000),
        ],
        (Counts.ALL, Overage.WHOLE): [
            ("free", 975_000, 975_000),
            ("billed", 0, 1_000_001),
            ("billed", 0, 1_025_001),
            ("billed", 0, 1_025_002),
            ("billed", 0, 1_025_002),
            ("billed", 0, 1_025_002 + TOKENS_MAX),
            ("billed", 0, 1_025_007 + TOKENS_MAX),
        ],
        (Counts.ALL, Overage.EXCESS): [
            ("free", 975_000, 975_000),
            ("billed", 25_000, 1_000_001),
            ("billed", 0, 1_025_001),
            ("billed", 0, 1_025_002),
            ("billed", 0, 1_025_002),
            ("billed", 0, 1_025_002 + TOKENS_MAX),
            ("billed", 0, 1_025_007 + TOKENS_MAX),
        ],
    }
    assert verdicts(found) == expected[counts, overage]


def test_a_window_begins_at_its_first_instant_and_ends_before_its_last() -> None:
    """The last microsecond of a day counts in it, midnight in the next, and a late row in its own."""
    midnight = NOON + 12 * HOUR
    times = (NOON, midnight - TICK, midnight, midnight + DAY - TICK, NOON, midnight + DAY)
    found = same([request(number, at, 400_000) for number, at in enumerate(times)])
    assert verdicts(found) == [
        ("free", 400_000, 400_000),
        ("free", 400_000, 800_000),
        ("free", 400_000, 400_000),
        ("free", 400_000, 800_000),
        ("billed", 0, 800_000),
        ("free", 400_000, 400_000),
    ]
    assert [one["seq"] for one in found] == [1, 2, 1, 2, 3, 1]


def test_a_rolling_window_opens_again_only_at_a_free_request() -> None:
    """At its very end the next one may open; what is billed opens none; the switch ends it; older rows fall into it."""
    start = datetime(2025, 3, 3, 7, tzinfo=UTC)
    log = [
        request(1, start, 900_000),
        request(2, start + DAY - TICK, 200_000),
        request(3, start + DAY, 1_000_001),
        request(4, start + DAY + HOUR, 0),
        request(5, start, 1_000_000),
        request(6, start + 2 * DAY + HOUR, 7),
        request(7, SWITCH - TICK, 1_000_000),
        request(8, SWITCH, 1_000_000),
    ]
    found = same(log)
    assert [(one["verdict"], one["window_start"], one["window_end"], one["seq"]) for one in found] == [
        ("free", "2025-03-03T07:00:00Z", "2025-03-04T07:00:00Z", 1),
        ("billed", "2025-03-03T07:00:00Z", "2025-03-04T07:00:00Z", 2),
        ("billed", None, None, None),
        ("free", "2025-03-04T08:00:00Z", "2025-03-05T08:00:00Z", 1),
        ("free", "2025-03-04T08:00:00Z", "2025-03-05T08:00:00Z", 2),
        ("free", "2025-03-05T08:00:00Z", "2025-03-06T00:00:00Z", 1),
        ("billed", "2025-03-05T08:00:00Z", "2025-03-06T00:00:00Z", 2),
        ("free", "2025-03-06T00:00:00Z", "2025-03-07T00:00:00Z", 1),
    ]


def test_the_excess_may_open_a_rolling_window() -> None:
    """Where only what is beyond is billed, a request free in part opens a window."""
    start = datetime(2025, 3, 3, 7, tzinfo=UTC)
    log = [request(1, start, 1_000_001), request(2, start + HOUR, 5), request(3, start + DAY, 7)]
    found = same(log, OPENAI.reading(overage="excess"))
    assert [(one["free_tokens"], one["used"], one["window_start"], one["seq"]) for one in found] == [
        (1_000_000, 1_000_000, "2025-03-03T07:00:00Z", 1),
        (0, 1_000_000, "2025-03-03T07:00:00Z", 2),
        (7, 7, "2025-03-04T07:00:00Z", 1),
    ]


def test_the_unmeasured_are_a_case_of_their_own() -> None:
    """Of two requests alike the one without a count is billed as unmeasured, in whatever order they come."""
    log = [request(1, tokens=5), request(2, tokens=None), request(3, tokens=5), request(4, tokens=None, model=SMALL)]
    log += [request(5, tokens=5, model=SMALL)]
    assert [one["reason"] for one in same(log)] == [
        "within_allowance",
        "unmeasured",
        "within_allowance",
        "unmeasured",
        "within_allowance",
    ]


@pytest.mark.parametrize(
    ("first", "hours"), [(datetime(2026, 3, 8, 8, tzinfo=UTC), 23), (datetime(2025, 11, 2, 7, tzinfo=UTC), 25)]
)
def test_a_day_has_as_many_hours_as_its_zone_says(first: datetime, hours: int) -> None:
    """Where clocks change a day has 23 or 25 hours, and its allowance lasts as long."""
    end = first + hours * HOUR
    log = [request(n, at, 0, model="gemini-2.5-flash") for n, at in enumerate((first - TICK, first, end - TICK, end))]
    found = same(log, load("gemini-free"))
    assert [(one["window_start"], one["seq"]) for one in found] == [
        (found[0]["window_start"], 1),
        (stamp(first), 1),
        (stamp(first), 2),
        (stamp(end), 1),
    ]


def test_cached_input_is_left_out_where_it_does_not_count() -> None:
    """A request that fits without its cached tokens is free whole."""
    at = datetime(2026, 8, 1, tzinfo=UTC)
    log = [
        request(number, at, size, cached_tokens=cached, model="llama-3.3-70b-versatile")
        for number, (size, cached) in enumerate([(100_000, 50_000), (90_000, 40_000), (1, 0), (1, 1)])
    ]
    assert verdicts(same(log, load("groq-free"))) == [
        ("free", 100_000, 50_000),
        ("free", 90_000, 100_000),
        ("billed", 0, 100_000),
        ("free", 1, 100_000),
    ]


def test_totals_that_64_bits_cannot_hold_stop_the_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing wraps around: the row is named, and no decision after it is made."""
    offer = OPENAI.reading(counts="all")
    judge = Judge(offer, assume=SHARING)
    [batch] = table_of([request(1, NOON, 1)]).to_batches()
    judge.decide(batch)
    judge._kept[0, kernel.USED] = kernel.TOTAL_MAX - 1
    [more] = table_of([request(2, NOON, 1), request(3, NOON, 1)]).to_batches()
    with pytest.raises(GratisError, match=r"row 3: what is used passes 2\^62"):
        judge.decide(more)


def test_the_first_and_the_last_time() -> None:
    """Time begins with 1970 and ends before 9000: the microsecond beside is told as it is of a line."""
    first, end = datetime(1970, 1, 1, tzinfo=UTC), datetime(9000, 1, 1, tzinfo=UTC)
    found = same([request(number, at) for number, at in enumerate((first - TICK, first, end - TICK, end))])
    assert [one if isinstance(one, tuple) else one["at"] for one in found] == [
        "1970-01-01T00:00:00Z",
        "8999-12-31T23:59:59.999999Z",
        (1, "at: found 1969-12-31T23:59:59.999999+00:00; expected a year from 1970 to 8999"),
        (4, "at: found 9000-01-01T00:00:00+00:00; expected a year from 1970 to 8999"),
    ]


def test_a_row_that_is_none_is_raised_unless_it_is_asked_for() -> None:
    """Without `on_error` the first bad row is raised, with its number."""
    log = table_of([request(1), request(2, tokens=-1)])
    with pytest.raises(GratisError, match="row 2: input_tokens: found -1; expected a whole number from 0"):
        decide_table(log, OPENAI, assume=SHARING)


@pytest.mark.parametrize(
    ("name", "cells", "why"),
    [
        ("input_tokens", pa.array([1.0]), "column input_tokens: found double; expected integers"),
        ("id", pa.array([1]), "column id: found int64; expected text"),
        ("at", pa.array([1]), "column at: found int64; expected timestamps, or RFC 3339 text"),
        ("at", pa.array([NOON.replace(tzinfo=None)]), "column at: found times that name no zone"),
        ("tools", pa.array([[1]]), "column tools: found list<.*>; expected lists of text, or JSON text"),
        ("Model", pa.array(["x"]), "column Model: an unknown field; expected 'model', spelled so"),
        ("input-token", pa.array([1]), "an unknown field; expected 'input_tokens', spelled so"),
    ],
)
def test_a_column_of_another_type_is_refused(name: str, cells: Any, why: str) -> None:
    """What a column cannot say is refused at once, by its name."""
    columns = {"model": pa.array([LARGE]), "at": pa.array([NOON]), name: cells}
    with pytest.raises(GratisError, match=why):
        decide_table(pa.table(columns), OPENAI, assume=SHARING)


def test_times_of_every_unit_and_zone_are_the_same_instants() -> None:
    """Seconds to nanoseconds, naive with a zone given, or in a zone of their own; nanoseconds are cut off."""
    log = table_of([request(1), request(2)])
    at = log.schema.get_field_index("at")
    expected = by_columns(log, OPENAI, assume=SHARING)
    for kind in ("s", "ms", "us", "ns"):
        for zone in ("UTC", "Asia/Kathmandu"):
            cells = log.column("at").cast(pa.timestamp(kind, zone))
            assert by_columns(log.set_column(at, "at", cells), OPENAI, assume=SHARING) == expected
        cells = pa.chunked_array([[NOON.replace(tzinfo=None)] * 2], pa.timestamp(kind))
        assert by_columns(log.set_column(at, "at", cells), OPENAI, assume=SHARING, zone="UTC") == expected
    nanos = pa.chunked_array([[1_745_150_400_000_000_999] * 2], pa.int64()).cast(pa.timestamp("ns", "UTC"))
    assert by_columns(log.set_column(at, "at", nanos), OPENAI, assume=SHARING) == expected
    far = pa.chunked_array([[2**62, 1]], pa.int64()).cast(pa.timestamp("s", "UTC"))
    assert by_columns(log.set_column(at, "at", far), OPENAI, assume=SHARING)[1] == [
        (1, f"at: found {2**62 * 10**6} microseconds since 1970; expected a year from 1970 to 8999")
    ]


def test_integers_of_every_width_are_the_same_numbers() -> None:
    """Eight to sixty-four bits, with a sign or without; what 64 bits with a sign cannot hold is told as it is."""
    log = table_of([request(1, tokens=7), request(2, tokens=100), request(3, tokens=None)])
    place, expected = log.schema.get_field_index("input_tokens"), by_columns(log, OPENAI, assume=SHARING)
    for kind in (pa.int8(), pa.uint8(), pa.int16(), pa.uint16(), pa.int32(), pa.uint32(), pa.uint64()):
        cells = log.column("input_tokens").cast(kind)
        assert by_columns(log.set_column(place, "input_tokens", cells), OPENAI, assume=SHARING) == expected
    large = pa.chunked_array([[2**64 - 1, 2**63, 7]], pa.uint64())
    assert by_columns(log.set_column(place, "input_tokens", large), OPENAI, assume=SHARING)[1] == [
        (1, f"input_tokens: found {2**64 - 1}; expected a whole number from 0 to {TOKENS_MAX}"),
        (2, f"input_tokens: found {2**63}; expected a whole number from 0 to {TOKENS_MAX}"),
    ]


def test_bytes_that_are_no_text_are_bad_rows() -> None:
    """A name that is not UTF-8 is told as such; the rows beside it are decided."""
    for name in ("id", "account", "model"):
        log = table_of([request(1, account="a"), request(2, account="a")])
        bad = pa.array([b"\xff\xfe", b"a"], pa.binary()).view(pa.string())
        log = log.set_column(log.schema.get_field_index(name), name, bad)
        lines, errors = by_columns(log, OPENAI, assume=SHARING)
        assert (len(lines), errors) == (1, [(1, f"{name}: found bytes that are not UTF-8; expected Unicode text")])


# -- ids that come again


def test_repeated_ids_are_found_across_files_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moved to files, compared in slabs and kept in a file, repeats are what they are in memory."""
    monkeypatch.setattr(repeats, "HELD_MAX", 5)
    monkeypatch.setattr(repeats, "COMPARED_MAX", 10)
    monkeypatch.setattr(repeats, "IN_MEMORY_MAX", 3)
    log = [
        request(number % 130, NOON + (number % 130) * MINUTE, number // 250, account=f"a{number % 3}")
        for number in range(600)
    ]
    lines, errors = by_rows(log, OPENAI, SHARING, {})
    assert by_columns(shaped(table_of(log), "plain", 70), OPENAI, assume=SHARING) == (lines, errors)
    assert (len(lines), len(errors)) == (390, 210)


def test_ids_of_one_number_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ids that share all 64 bits are two ids: the numbers only say which to compare."""

    def all_alike(_texts: Any, _seeds: Any, _seed_of: Any, found: Any) -> None:
        found[:] = np.uint64(7)

    monkeypatch.setattr(repeats.texts, "hashes", all_alike)
    log = [request(number % 9, NOON + number % 9 * MINUTE, 5, account=f"a{number % 2}") for number in range(30)]
    assert by_columns(table_of(log), OPENAI, assume=SHARING) == by_rows(log, OPENAI, SHARING, {})


def test_the_account_none_and_the_account_default_are_one() -> None:
    """An account that is absent is `default`, for its ids, too."""
    found = same([request(1, account=None), request(1, account="default"), request(1, account="other")])
    assert [one["replayed"] for one in found] == [False, True, False]


# -- an account by itself


def sample() -> list[dict[str, Any]]:
    """A log of some accounts over three days, with repeats and conflicts."""
    return [
        request(
            number if number % 11 else number - 5,
            SWITCH - DAY + (number - 5 * (number % 11 == 0)) * 6 * MINUTE,
            (number * 7_919) % 300_000,
            account=f"org-{number % 7}",
            model=(LARGE, SMALL, "unlisted")[number % 3],
        )
        for number in range(600)
    ]


def judged(rows_of_one: pa.Table, errors: list[Any]) -> pa.Table:
    """What an engine runs on the rows of each account."""
    found = decide_table(rows_of_one, OPENAI, assume=SHARING, on_error=lambda number, error: errors.append(str(error)))
    return found.cast(pa.schema([field.with_type(plain(field.type)) for field in found.schema]))


def plain(kind: pa.DataType) -> pa.DataType:
    """Words as text: each engine has its own idea of a dictionary."""
    return pa.string() if pa.types.is_dictionary(kind) else kind


def as_lines(found: pa.Table) -> list[bytes]:
    """Decisions as lines, in the order of their text: engines do not keep that of the log."""
    return sorted(encode(line) + b"\n" for line in found.select(list(DECISION_FIELDS)).to_pylist())


def test_polars_judges_each_account_by_itself() -> None:
    """`map_groups` gives the same decisions, byte for byte, as one pass over the whole log."""
    lines, errors = by_rows(sample(), OPENAI, SHARING, {})
    found: list[Any] = []
    table = (
        pl.from_arrow(table_of(sample()))
        .group_by("account", maintain_order=True)
        .map_groups(lambda rows_of_one: pl.from_arrow(judged(rows_of_one.to_arrow(), found)))
        .to_arrow()
    )
    assert as_lines(table) == sorted(lines)
    assert sorted(found) == sorted(error for _, error in errors)


def test_duckdb_hands_over_each_account_by_itself() -> None:
    """Rows selected and ordered by a database, account by account: the same decisions again."""
    log = table_of(sample()).append_column("row", pa.array(range(600)))
    lines, errors = by_rows(sample(), OPENAI, SHARING, {})
    found: list[Any] = []
    with duckdb.connect() as base:
        base.register("log", log)
        accounts = [account for (account,) in base.sql("SELECT DISTINCT account FROM log").fetchall()]
        parts = [
            judged(base.sql("FROM log WHERE account = ? ORDER BY row", params=[account]).to_arrow_table(), found)
            for account in accounts
        ]
    assert as_lines(pa.concat_tables(parts)) == sorted(lines)
    assert sorted(found) == sorted(error for _, error in errors)


def test_the_schema_has_the_fields_of_the_contract() -> None:
    """A decision's columns are its line's fields, in their order."""
    assert tuple(SCHEMA.names) == DECISION_FIELDS


def test_what_is_compared_of_repeats_is_what_stores_compare() -> None:
    """The kernel knows the fields of a conflict, in the order in which they win."""
    assert tuple(tables.COMPARED.values()) == CONFLICT_FIELDS


def test_where_nothing_can_be_cached_it_is_compiled_each_time(monkeypatch):
    """A folder that cannot be written, as in a sealed container, takes no replay away."""
    known = compiled.njit

    def picky(**options):
        def made(function):
            if options["cache"]:
                raise RuntimeError("no locator available")
            return known(**options)(function)

        return made

    monkeypatch.setattr(compiled, "njit", picky)
    assert compiled.compiled(lambda one: one + 1)(1) == 2
