"""Readings side by side: one log under several readings, where they part, and what a changed list did."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings, strategies as st

from gratis import Enrollment, GratisError, Request
from gratis.audit.readings import Comparison, Reading, Side, combinations, offer_as, offer_with
from gratis.audit.replay import Replay
from gratis.lines import request_line
from gratis.model import Change, Counts, Overage
from gratis.offers import load
from gratis.window import Calendar, Rolling, Span

from .test_cli import gratis, sent
from .test_replay import logs, request_at

if TYPE_CHECKING:
    from collections.abc import Sequence

CONFIG = Path(__file__).parents[1] / "config"
OFFER = load("openai-data-sharing")
LARGE = "gpt-4o-2024-08-06"
SMALL = "gpt-4o-mini-2024-07-18"
MORNING = datetime(2025, 4, 20, 9, tzinfo=UTC)
TIER_3 = Enrollment(tier=3, sharing="enabled")
FOUR = combinations(counts=list(Counts), overage=list(Overage), windows=[None], tiers=[None], revisions=[None])


def request(
    name: str, tokens: int | None, *, hours: float = 0, model: str = LARGE, account: str = "default"
) -> Request:
    """A request so many hours after the morning."""
    return Request(
        id=name,
        model=model,
        at=MORNING + timedelta(hours=hours),
        input_tokens=tokens,
        output_tokens=None if tokens is None else 0,
        account=account,
    )


# The article's own numbers: 750k of the allowance are used, then a request of 500k, then one of 100k.
ARTICLE = [
    request("750k", 750_000, model="o1-2024-12-17"),
    request("500k", 500_000, hours=1),
    request("100k", 100_000, hours=2),
]


def compared(log: Sequence[Request], readings: Sequence[Reading], **options: Any) -> Comparison:
    """A log under readings."""
    sides = [Side(str(reading), offer_as(OFFER, reading)) for reading in readings]
    found = Comparison(sides, assume=TIER_3, **options)
    for each in log:
        found.add(each)
    return found


def test_the_articles_numbers_under_three_readings() -> None:
    """750k used, then 500k, then 100k: 600k, 500k and 350k are billed, as the research worked out by hand."""
    readings = [
        Reading(counts=Counts.ALL, overage=Overage.WHOLE),
        Reading(counts=Counts.FREE, overage=Overage.WHOLE),
        Reading(counts=Counts.FREE, overage=Overage.EXCESS),
    ]
    found = compared(ARTICLE, readings)
    assert [total.billed_tokens for total in found.totals] == [600_000, 500_000, 350_000]
    assert [None if split is None else split.first.id for split in found.splits] == [None, "100k", "500k"]


def test_the_command_prints_the_same_three_readings() -> None:
    """Without a choice there are four readings, the offer's own first, with a day, where they part, and totals."""
    answer = gratis("readings", "--tier", "3", stdin=sent(map(request_line, ARTICLE)))
    totals = {line["reading"]: line["billed_tokens"] for line in answer.lines if line["what"] == "total"}
    assert totals == {
        "counts=free overage=whole": 500_000,
        "counts=free overage=excess": 350_000,
        "counts=all overage=whole": 600_000,
        "counts=all overage=excess": 350_000,
    }
    parts = [line for line in answer.lines if line["what"] == "part"]
    assert [(part["reading"], part["more_free_tokens"], part["first_different"]["id"]) for part in parts] == [
        ("counts=free overage=excess", 150_000, "500k"),
        ("counts=all overage=whole", -100_000, "100k"),
        ("counts=all overage=excess", 150_000, "500k"),
    ]
    assert [line["days_apart"] for line in answer.lines if line["what"] == "total"] == [0, 1, 1, 1]
    assert {(line["day"], line["group"]) for line in answer.lines if line["what"] == "day"} == {("2025-04-20", "1M")}
    assert answer.code == 0


@settings(max_examples=60, deadline=None)
@given(
    drawn=logs,
    start=st.sampled_from([MORNING, datetime(2025, 2, 27, 6, tzinfo=UTC), datetime(2025, 3, 4, 20, tzinfo=UTC)]),
    reading=st.builds(
        Reading,
        counts=st.sampled_from([None, *Counts]),
        overage=st.sampled_from([None, *Overage]),
        window=st.sampled_from([None, "daily", "rolling"]),
        tier=st.sampled_from([None, 0, 1, 2, 3, 5]),
        revision=st.sampled_from([None, *(revision.name for revision in OFFER.revisions)]),
    ),
)
def test_sums_equal_a_replay_under_the_same_reading(
    drawn: list[dict[str, Any]], start: datetime, reading: Reading
) -> None:
    """Whatever the log: days and totals of every reading are those of `Replay` under it, each request counted once."""
    offers = [OFFER, offer_as(OFFER, reading), OFFER.reading(counts="all", overage="excess")]
    found = Comparison([Side(str(place), offer) for place, offer in enumerate(offers)], assume=TIER_3)
    replays = [Replay(offer, assume=TIER_3) for offer in offers]
    expected: dict[Any, list[int]] = {}
    for fields in drawn:
        asked = request_at(start, **fields)
        answers = [replay.decide_many([asked])[0] for replay in replays]
        try:
            found.add(asked)
        except GratisError as error:
            assert str(error) == str(answers[0])  # noqa: PT017 - that both refuse it alike is the statement
            continue
        for side, answer in enumerate(answers):
            if not answer.replayed:
                sums = expected.setdefault((answer.at.date(), answer.group, side), [0, 0, 0, 0])
                for place, value in enumerate((1, answer.is_free, answer.tokens or 0, answer.free_tokens or 0)):
                    sums[place] += value
    ours = {
        (row.day, row.group, row.side): [
            row.sum.requests,
            row.sum.free_requests,
            row.sum.tokens,
            row.sum.free_tokens,
        ]
        for row in found.rows()
        if row.sum.requests
    }
    assert ours == expected
    for side, total in enumerate(found.totals):
        mine = [sums for key, sums in expected.items() if key[2] == side]
        assert [total.requests, total.tokens] == [sum(each[0] for each in mine), sum(each[2] for each in mine)]


@pytest.mark.parametrize("options", [("--counts", "all"), ("--overage", "excess"), ("--counts", "free")])
def test_the_first_reading_equals_the_replay_command(options: tuple[str, str]) -> None:
    """`gratis readings` and `gratis replay` under one reading give the same sums."""
    log = [request(f"r{n}", n * 7_919 % 400_000, hours=n / 3) for n in range(60)]
    lines = sent(map(request_line, log))
    total = gratis("readings", "--tier", "3", *options, stdin=lines).lines[-1]
    decisions = gratis("replay", "--tier", "3", *options, stdin=lines).lines
    assert total["free_tokens"] == sum(line["free_tokens"] for line in decisions)
    assert total["billed_tokens"] == sum(line["billed_tokens"] for line in decisions)
    assert total["free_requests"] == sum(line["verdict"] == "free" for line in decisions)


def test_an_offer_as_it_is_read() -> None:
    """Each field of a reading changes what it names, in every revision, and nothing else."""
    daily = offer_as(OFFER, Reading(window="daily"))
    assert {revision.window for revision in daily.revisions} == {Calendar(Span.DAY, "UTC")}
    rolling = offer_as(OFFER, Reading(window="rolling"))
    assert {(each.window, each.after, each.before) for each in rolling.revisions} == {(Rolling(24), None, None)}
    tier = offer_as(OFFER, Reading(tier=1))
    assert {group.allowances[5] for each in tier.revisions for group in each.groups} == {250_000, 2_500_000}
    always = offer_as(OFFER, Reading(revision="2025-04-16"))
    assert [(each.starts.year, each.ends) for each in always.revisions] == [(1970, None)]
    assert offer_as(OFFER, Reading()).revisions[0].groups == OFFER.revisions[0].groups


def test_every_reading_follows_the_history_of_an_enrollment() -> None:
    """Under each reading a request is judged by the enrollment of its own time, as `Replay` does it."""
    tiers = [(0.5, 1), (2.5, 3), (4.5, 5)]
    history = [
        Change(place, MORNING + timedelta(hours=hours), "ann", Enrollment(tier=tier, sharing="enabled"))
        for place, (hours, tier) in enumerate(tiers, start=1)
    ]
    log = [request(f"r{n}", 240_000, hours=n, account=("acme", "other")[n % 2]) for n in range(12)]
    changes = {"acme": history}
    found = compared(log, FOUR, changes=changes)
    for reading, total in zip(FOUR, found.totals, strict=True):
        replay = Replay(offer_as(OFFER, reading), assume=TIER_3, changes=changes)
        decisions = [replay.decide(each) for each in log]
        assert total.free_tokens == sum(decision.free_tokens or 0 for decision in decisions)
        assert total.free_requests == sum(decision.is_free for decision in decisions)
    assert [total.free_requests for total in found.totals] == [8, 8, 8, 8]


def test_a_rolling_reading_opens_at_the_first_free_request() -> None:
    """Where windows roll, what was used last evening still counts in the morning; where they do not, it does not."""
    log = [request("evening", 600_000, hours=12), request("morning", 600_000, hours=23)]
    found = compared(log, [Reading(window="daily"), Reading(window="rolling")])
    assert [total.free_tokens for total in found.totals] == [1_200_000, 600_000]
    assert [(part[1].day.day, part[1].group) for part in found.parts()] == [(21, "1M")]


def test_tiers_side_by_side_need_no_other_word_of_who_takes_part() -> None:
    """`--tiers 1,3` alone judges every account at tier 1, and at tier 3."""
    answer = gratis("readings", "--tiers", "1,3", stdin=sent(map(request_line, ARTICLE)))
    assert [(line["tier"], line["free_tokens"]) for line in answer.lines if line["what"] == "total"] == [
        (1, 100_000),
        (3, 850_000),
    ]


def test_what_is_asked_again_counts_once_and_a_conflict_is_a_bad_line() -> None:
    """A repeated line adds nothing; the same id with other tokens is reported, and the exit code is 2."""
    lines = sent(map(request_line, [*ARTICLE, ARTICLE[0], replace_tokens(ARTICLE[1], 1)]))
    answer = gratis("readings", "--tier", "3", stdin=lines + b"not json\n\n")
    assert answer.lines[-1]["requests"] == 3
    assert [line.split(":")[2].strip() for line in answer.err.splitlines()] == ["line 5", "line 6"]
    assert answer.code == 2


def replace_tokens(asked: Request, tokens: int) -> Request:
    """The same request with other tokens."""
    return Request(id=asked.id, model=asked.model, at=asked.at, input_tokens=tokens, output_tokens=0)


def test_a_model_that_left_its_list() -> None:
    """o3-mini left on 2025-05-16: its tokens became billed, and what it had taken from the others is free again."""
    log = [
        request("mini", 9_950_000, model="o3-mini-2025-01-31"),
        request("small", 100_000, model=SMALL, hours=1),
    ]
    answer = gratis("readings", "--tier", "3", "--models", stdin=sent(map(request_line, log)))
    moved = [
        (line["before"], line["model"], line["change"], line["became_free"], line["became_billed"])
        for line in answer.lines
        if line["what"] == "model" and (line["became_free"] or line["became_billed"])
    ]
    assert moved == [
        ("2025-04-16 always", "o3-mini-2025-01-31", "left", 0, 9_950_000),
        ("2025-04-16 always", None, "others", 100_000, 0),
    ]


def test_what_if_a_model_joined_or_left() -> None:
    """`--with` and `--without` judge the log as if lists were otherwise, and say what became free and billed."""
    log = [*ARTICLE, request("luna", 70_000, model="gpt-6-luna", hours=3)]
    answer = gratis(
        *("readings", "--tier", "3", "--with", "gpt-6-luna=10M", "--without", "o1-2024-12-17"),
        stdin=sent(map(request_line, log)),
    )
    moved = {
        line["model"]: (line["change"], line["became_free"], line["became_billed"])
        for line in answer.lines
        if line["what"] == "model"
    }
    assert moved == {
        "gpt-6-luna": ("moved", 70_000, 0),
        "o1-2024-12-17": ("left", 0, 750_000),
        None: ("others", 500_000, 0),
    }


def test_a_model_may_leave_by_its_alias_or_with_it() -> None:
    """Without a model its aliases lead nowhere; without an alias its model stays."""
    last = OFFER.revisions[-1]
    model = min(last.groups[0].models or ())
    offer = replace(OFFER, revisions=(replace(last, aliases={"short": model}),))
    both = offer_with(offer, joins={}, leaves=[model]).revisions[0]
    alias = offer_with(offer, joins={}, leaves=["short"]).revisions[0]
    kind = ARTICLE[0].kind
    assert [both.group_of(name, kind) for name in ("short", model)] == [None, None]
    assert (alias.group_of("short", kind), alias.group_of(model, kind)) == (None, alias.groups[0])


def test_a_model_that_moved_is_judged_in_one_group_only() -> None:
    """From the small group into the large one: with the same tokens free, both groups part, at that request."""
    supposed = offer_with(OFFER, joins={SMALL: "1M"}, leaves=[])
    found = Comparison([Side("ours", OFFER), Side("supposed", supposed)], assume=TIER_3)
    found.add(request("small", 5, model=SMALL))
    assert [(part[0].group, [row.sum.free_tokens for row in part]) for part in found.parts()] == [
        ("10M", [5, 0]),
        ("1M", [0, 5]),
    ]
    assert {part[1].split.id for part in found.parts() if part[1].split} == {"small"}
    assert all(part[1].split for part in found.parts())
    assert [(moved.model, moved.change, moved.became_free) for moved in found.moved(0, 1)] == [
        (SMALL, "moved", 0),
        (None, "others", 0),
    ]


def test_an_offer_whose_revisions_disagree_is_its_own_first_reading(tmp_path: Path) -> None:
    """Where no single value of a switch is the offer's own, the first reading is as the offer says."""
    text = (CONFIG / "openai-evals.toml").read_text(encoding="utf-8")
    first, second = text.split("[[revisions]]")
    later = second.replace("from = 2025-04-16", "from = 2025-06-01").replace('counts = "free"', 'counts = "all"')
    file = tmp_path / "own.toml"
    earlier = second.replace("from = 2025-04-16", "from = 2025-04-16\nuntil = 2025-06-01")
    file.write_text(f"{first}[[revisions]]{earlier}[[revisions]]{later}", encoding="utf-8")
    answer = gratis("readings", "--tier", "3", "--offer", file, stdin=b"")
    assert [line["reading"] for line in answer.lines] == [
        "overage=whole",
        "overage=excess",
        *(f"counts={counts} overage={overage}" for counts in Counts for overage in ("whole", "excess")),
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--tier", "3", "--revisions", "2020-01-01"), "was not in force on 2020-01-01; expected a later date"),
        (("--tier", "3", "--with", "m=2M"), "m=2M: openai-data-sharing has no group '2M'; expected 10M, 1M"),
        (("--tier", "3", "--without", "m"), "m: openai-data-sharing never listed it"),
        (("--tier", "3", "--with", "m=1M", "--without", "m"), "found 'm' more than once"),
        (("--tier", "3", "--with", "m=1M", "--with", "m=10M"), "found 'm' more than once"),
        (("--tier", "3", "--windows", "weekly"), "found 'weekly'; expected some of daily,rolling"),
        (("--tiers", "9"), "found '9'; expected tiers from 0 to 5"),
        ((), "readings: expected --tier N, --tiers N,N, or --enrollments FILE"),
        (("--tier", "3", "--revisions", "all", "--counts", "free,all", "--overage", "whole,excess", "--tiers", "1,3"),
         "readings; expected at most 64 at once"),
    ],
)  # fmt: skip
def test_bad_use_says_what_was_expected(options: tuple[str, ...], said: str) -> None:
    """A reading that cannot be is refused with exit code 2, and with what was expected."""
    answer = gratis("readings", *options, stdin=b"")
    assert said in answer.err
    assert answer.code == 2


def test_people_see_where_readings_part() -> None:
    """As a table: a row for all where readings agree, a row each where they part, and totals."""
    log = [*ARTICLE, request("alike", 5, hours=24)]
    answer = gratis("readings", "--tier", "3", "--format", "table", stdin=sent(map(request_line, log)))
    text = answer.out.splitlines()
    assert "1  counts=free overage=whole" in text[1]
    assert [line.split()[2] for line in text if line.startswith("2025-04-21")] == ["all"]
    assert [line.split()[2] for line in text if line.startswith("2025-04-20")] == ["1", "2", "3", "4", "2", "3", "4"]


def test_an_empty_log_has_totals_of_nothing() -> None:
    """Without requests there are no days, readings part nowhere, and the exit code is 0."""
    answer = gratis("readings", "--tier", "3", stdin=b"")
    assert [(line["what"], line["requests"]) for line in answer.lines] == [("total", 0)] * 4
    assert answer.code == 0


def test_a_revision_is_named_by_any_day_of_it() -> None:
    """The revision in force on that day is meant, as in `gratis offers diff`."""
    line = b'{"id":"r","model":"gpt-4o-2024-08-06","at":"2025-05-05T00:00:00Z","input_tokens":1,"output_tokens":0}'
    by_day = gratis("readings", "--tier", "3", "--revisions", "2025-04-20,2026-11-01", stdin=line)
    by_name = gratis("readings", "--tier", "3", "--revisions", "2025-04-16,2026-09-22", stdin=line)
    assert (by_day.code, by_day.out) == (0, by_name.out)
    assert gratis("readings", "--tier", "3", "--revisions", "May", stdin=line).err.startswith(
        "gratis: --revisions: found"
    )


@pytest.mark.parametrize("name", ["log.csv", "log.parquet"])
def test_a_log_of_another_form_is_told_so_once(name: str) -> None:
    """Readings are of JSON lines; who reads the others is said."""
    answer = gratis("readings", name, "--tier", "3")
    assert answer.err == f"gratis: readings: {name}: expected JSON lines; CSV and Parquet are read by `gratis replay`\n"
