"""The rule: the help article's table under each reading, rolling windows, and properties over numbers of all sizes.

Tables are text, so that whoever knows the offer can check them without knowing Python.
"""

from datetime import UTC, datetime, timedelta
from itertools import pairwise, product
from typing import NamedTuple

import pytest
from hypothesis import given, settings, strategies as st

from gratis import Enrollment, Meter, Reason, Request, Sharing
from gratis.model import TOKENS_MAX, Counts, Overage, Terms, Window
from gratis.offers import load
from gratis.rule import Charge, decide, free_part, is_free, used_after
from gratis.stores import Bounds
from gratis.stores.memory import MemoryStore

OFFER = load("openai-data-sharing")
LARGE = "gpt-4o-2024-08-06"
SMALL = "gpt-4o-mini-2024-07-18"
READINGS = list(product(Counts, Overage))
DAY_OF_ARTICLE = "2025-04-20"

ARTICLE = """
Time (UTC) | Tokens in request | Running total | Free or billed?
09:15 | 120 k | 120 k | Free
12:40 | 140 k | 260 k | Free
14:30 | 150 k | 410 k | Free
16:00 | 150 k | 560 k | Free
18:05 | 150 k | 710 k | Free
20:20 | 150 k | 860 k | Free
22:15 | 115 k | 975 k | Free
23:10 | 30 k | 1 005 k | Billed (entire 30k)
"""

# One more request at 23:30: after the seventh row of the article's table, or after all eight.
ONE_MORE = """
rows counts overage  tokens  verdict  free tokens  used after      total
7    free   whole    20,000  free          20,000     995,000    995,000
7    free   whole    25,000  free          25,000   1,000,000  1,000,000
7    free   whole    25,001  billed             0     975,000  1,000,001
7    all    whole    25,000  free          25,000   1,000,000  1,000,000
7    all    whole    25,001  billed             0   1,000,001  1,000,001
7    free   excess   25,000  free          25,000   1,000,000  1,000,000
7    free   excess   25,001  billed        25,000   1,000,000  1,000,001
7    all    excess   25,001  billed        25,000   1,000,001  1,000,001

8    free   whole         0  free               0     975,000    975,000
8    free   whole    20,000  free          20,000     995,000    995,000
8    free   whole    25,000  free          25,000   1,000,000  1,000,000
8    free   whole    25,001  billed             0     975,000  1,000,001
8    all    whole         0  billed             0   1,005,000  1,005,000
8    all    whole    20,000  billed             0   1,025,000  1,025,000
8    all    whole    25,000  billed             0   1,030,000  1,030,000
8    all    whole    25,001  billed             0   1,030,001  1,030,001
8    free   excess        0  free               0   1,000,000  1,000,000
8    free   excess   20,000  billed             0   1,000,000  1,020,000
8    free   excess   25,000  billed             0   1,000,000  1,025,000
8    free   excess   25,001  billed             0   1,000,000  1,025,001
8    all    excess   20,000  billed             0   1,025,000  1,025,000
8    all    excess   25,000  billed             0   1,030,000  1,030,000
8    all    excess   25,001  billed             0   1,030,001  1,030,001
"""

# Allowance 1,000,000, used 750,000; then 500,000 on one model of the group and 100,000 on another.
COMPARISON = """
counts overage   500k free  500k billed  100k free  100k billed  billed in all
all    whole             0      500,000          0      100,000        600,000
free   whole             0      500,000    100,000            0        500,000
free   excess      250,000      250,000          0      100,000        350,000
all    excess      250,000      250,000          0      100,000        350,000
"""

# The rule alone, whole requests, only free tokens counting.
RULE = """
used  tokens  allowance  verdict  used after
   0       0         10  free              0
   0      10         10  free             10
   0      11         10  billed            0
   9       1         10  free             10
   9       2         10  billed            9
  10       0         10  free             10
  10       1         10  billed           10
  12       0         10  billed           12
  12       1         10  billed           12
   0       0          0  free              0
   0       1          0  billed            0
   0       1          1  free              1
   0       2          1  billed            0
"""

# The offer's own words: free at 07:00 on January 1, then at 08:00 on January 2.
ROLLING = """
at                          tokens     verdict  window start               window end
2025-01-01T07:00:00         1,000      free     2025-01-01T07:00:00        2025-01-02T07:00:00
2025-01-01T12:00:00         1,000      free     2025-01-01T07:00:00        2025-01-02T07:00:00
2025-01-02T06:59:59.999999  1,000      free     2025-01-01T07:00:00        2025-01-02T07:00:00
2025-01-02T08:00:00         1,000      free     2025-01-02T08:00:00        2025-01-03T08:00:00
2025-01-03T07:59:59.999999  1,000      free     2025-01-02T08:00:00        2025-01-03T08:00:00
2025-01-03T08:00:00         1,000      free     2025-01-03T08:00:00        2025-01-04T08:00:00
"""
ON_THE_END = """
at                          tokens     verdict  window start               window end
2025-01-01T07:00:00         1,000,000  free     2025-01-01T07:00:00        2025-01-02T07:00:00
2025-01-02T06:59:59.999999  1          billed   2025-01-01T07:00:00        2025-01-02T07:00:00
2025-01-02T07:00:00         1,000,000  free     2025-01-02T07:00:00        2025-01-03T07:00:00
"""
BILLED_OPENS_NOTHING = """
at                          tokens     verdict  window start               window end
2025-01-01T05:00:00         1,000,001  billed   -                          -
2025-01-01T07:00:00         1,000,000  free     2025-01-01T07:00:00        2025-01-02T07:00:00
2025-01-01T08:00:00         1          billed   2025-01-01T07:00:00        2025-01-02T07:00:00
2025-01-02T07:30:00         1,000,001  billed   -                          -
2025-01-02T09:00:00         1          free     2025-01-02T09:00:00        2025-01-03T09:00:00
"""
ZERO_OPENS = """
at                          tokens     verdict  window start               window end
2025-01-01T07:00:00         0          free     2025-01-01T07:00:00        2025-01-02T07:00:00
2025-01-02T06:00:00         1,000,000  free     2025-01-01T07:00:00        2025-01-02T07:00:00
2025-01-02T06:30:00         0          free     2025-01-01T07:00:00        2025-01-02T07:00:00
2025-01-02T07:00:00         0          free     2025-01-02T07:00:00        2025-01-03T07:00:00
"""
LATE_ARRIVAL = """
at                          tokens     verdict  window start               window end
2025-01-05T12:00:00         600,000    free     2025-01-05T12:00:00        2025-01-06T12:00:00
2025-01-05T11:00:00         400,000    free     2025-01-05T12:00:00        2025-01-06T12:00:00
2025-01-01T00:00:00         1          billed   2025-01-05T12:00:00        2025-01-06T12:00:00
"""
SWITCH = """
at                          tokens     verdict  window start               window end
2025-03-05T18:00:00         900,000    free     2025-03-05T18:00:00        2025-03-06T00:00:00
2025-03-05T23:59:59.999999  100,001    billed   2025-03-05T18:00:00        2025-03-06T00:00:00
2025-03-05T23:59:59.999999  100,000    free     2025-03-05T18:00:00        2025-03-06T00:00:00
2025-03-06T00:00:00         1,000,000  free     2025-03-06T00:00:00        2025-03-07T00:00:00
2025-03-06T17:59:59         1          billed   2025-03-06T00:00:00        2025-03-07T00:00:00
2025-03-05T20:00:00         1          billed   2025-03-05T18:00:00        2025-03-06T00:00:00
2025-03-07T00:00:00         1          free     2025-03-07T00:00:00        2025-03-08T00:00:00
"""

LATE_BY_DAY = """
at                          tokens     verdict  window start               window end
2025-04-20T12:00:00         1,000,001  billed   2025-04-20T00:00:00        2025-04-21T00:00:00
2025-04-21T12:00:00         900,000    free     2025-04-21T00:00:00        2025-04-22T00:00:00
2025-04-20T23:00:00         900,000    free     2025-04-20T00:00:00        2025-04-21T00:00:00
2025-04-21T13:00:00         100,001    billed   2025-04-21T00:00:00        2025-04-22T00:00:00
2025-04-20T00:00:00         100,000    free     2025-04-20T00:00:00        2025-04-21T00:00:00
2025-04-22T00:00:00         1,000,000  free     2025-04-22T00:00:00        2025-04-23T00:00:00
"""


def rows(table):
    """The cells of a text table below its heading; blank lines are for the eye."""
    return [line.split() for line in table.splitlines() if line.strip()][1:]


def number(text):
    """A number as people write it: 1,005,000 or 1 005 k."""
    digits = text.replace(",", "").replace(" ", "")
    return int(digits.removesuffix("k")) * (1000 if digits.endswith("k") else 1)


def instant(text):
    """A time of a table, which is UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def meter(*, counts=None, overage=None, tier=5):
    """A meter for OpenAI's offer that judges old data as it was."""
    assume = None if tier is None else Enrollment(tier=tier, sharing=Sharing.ENABLED)
    store = MemoryStore(clock=lambda: datetime(2026, 1, 1, tzinfo=UTC), bounds=None)
    return Meter(store, OFFER.reading(counts=counts, overage=overage), assume=assume)


def ask(key, at, tokens, *, model=LARGE, account="default", tools=()):
    """A request of this size, two thirds of it input."""
    made = tokens // 3
    return Request(
        id=f"r{key}", model=model, at=at, input_tokens=tokens - made, output_tokens=made, account=account, tools=tools
    )


def decide_table(table, *, counts=None, overage=None):
    """Decide the rows of a table of times, and print it again."""
    told = meter(counts=counts, overage=overage)
    printed = []
    for place, (at, tokens, *_) in enumerate(rows(table)):
        decision = told.decide(ask(place, instant(at), number(tokens)))
        edges = [
            "-" if edge is None else edge.isoformat().removesuffix("+00:00")
            for edge in (decision.window_start, decision.window_end)
        ]
        printed.append([at, tokens, decision.verdict.value, *edges])
    return printed


# -- the article's table


def article():
    """The article's table: time, tokens, running total, verdict."""
    found = []
    for line in ARTICLE.strip().splitlines()[1:]:
        time, tokens, total, verdict = (cell.strip() for cell in line.split("|"))
        found.append((time, number(tokens), number(total), verdict.split()[0].lower()))
    return found


def decide_article(told, *, upto=8):
    """Decide the first rows of the article's table."""
    return [
        told.decide(ask(place, instant(f"{DAY_OF_ARTICLE}T{time}:00"), tokens))
        for place, (time, tokens, _, _) in enumerate(article()[:upto])
    ]


@pytest.mark.parametrize(("counts", "overage"), READINGS)
def test_article_verdicts_and_totals(counts, overage):
    """Under every reading the article's eight rows have the verdicts and running totals that it prints."""
    decisions = decide_article(meter(counts=counts, overage=overage))
    printed = [
        (decision.at.strftime("%H:%M"), decision.tokens, decision.total, decision.verdict.value)
        for decision in decisions
    ]
    assert printed == article()


@pytest.mark.parametrize(("counts", "overage"), READINGS)
def test_article_window_and_order(counts, overage):
    """The eight rows fall in one UTC day of the group 1M, and are numbered in order."""
    decisions = decide_article(meter(counts=counts, overage=overage))
    facts = [(one.group, one.allowance, one.window_start, one.window_end, one.seq) for one in decisions]
    start = instant(f"{DAY_OF_ARTICLE}T00:00:00")
    assert facts == [("1M", 1_000_000, start, start + timedelta(days=1), seq) for seq in range(1, 9)]


@pytest.mark.parametrize(
    ("counts", "overage", "used", "free", "billed"),
    [
        ("free", "whole", 975_000, 0, 30_000),
        ("all", "whole", 1_005_000, 0, 30_000),
        ("free", "excess", 1_000_000, 25_000, 5_000),
        ("all", "excess", 1_005_000, 25_000, 5_000),
    ],
)
def test_article_eighth_row(counts, overage, used, free, billed):
    """The billed row differs between readings only in what is used after it, and in what of it is free."""
    last = decide_article(meter(counts=counts, overage=overage))[-1]
    assert (last.used, last.free_tokens, last.billed_tokens, last.reason, last.remaining) == (
        used,
        free,
        billed,
        Reason.OVER_ALLOWANCE,
        max(0, 1_000_000 - used),
    )


@pytest.mark.parametrize("row", rows(ONE_MORE), ids=" ".join)
def test_one_more_request(row):
    """At 975k used 25,000 is free and 25,001 is billed; what follows the billed row depends on the reading."""
    count, counts, overage, tokens, verdict, free, used, total = row
    told = meter(counts=counts, overage=overage)
    decide_article(told, upto=int(count))
    last = told.decide(ask("more", instant(f"{DAY_OF_ARTICLE}T23:30:00"), number(tokens)))
    assert (last.verdict.value, last.free_tokens, last.used, last.total) == (
        verdict,
        number(free),
        number(used),
        number(total),
    )


@pytest.mark.parametrize("row", rows(COMPARISON), ids=" ".join)
def test_comparison_of_readings(row):
    """750k, 500k and 100k on models of one group are billed 600k, 500k or 350k, depending on the reading."""
    counts, overage, *numbers = row
    told = meter(counts=counts, overage=overage)
    at = instant("2025-04-20T10:00:00")
    told.decide(ask("first", at, 750_000, model="o1-2024-12-17"))
    large = told.decide(ask("large", at, 500_000, model=LARGE))
    small = told.decide(ask("small", at, 100_000, model="o3-2025-04-16"))
    parts = [large.free_tokens, large.billed_tokens, small.free_tokens, small.billed_tokens]
    assert [*parts, (large.billed_tokens or 0) + (small.billed_tokens or 0)] == [number(cell) for cell in numbers]


def test_groups_do_not_share():
    """What the large models used takes nothing from the small ones."""
    told = meter()
    at = instant("2025-04-20T10:00:00")
    told.decide(ask("large", at, 1_000_000))
    small = told.decide(ask("small", at, 10_000_000, model=SMALL))
    assert (small.verdict.value, small.group, small.used, small.seq) == ("free", "10M", 10_000_000, 1)


def test_excluded_requests_count_nowhere():
    """Under counts = all, too, only eligible requests add to what is used; the others have no place in a window."""
    told = meter(counts="all")
    at = instant("2025-04-20T10:00:00")
    excluded = [
        told.decide(ask("unlisted", at, 900_000, model="gpt-4o")),
        told.decide(ask("tool", at, 900_000, tools=("web_search",))),
    ]
    after = told.decide(ask("after", at, 1_000_000))
    assert [(one.used, one.total, one.seq, one.window_start, one.group, one.allowance) for one in excluded] == [
        (None,) * 6,
    ] * 2
    assert (after.verdict.value, after.used, after.seq) == ("free", 1_000_000, 1)


# -- the rule alone


@pytest.mark.parametrize("row", rows(RULE), ids=" ".join)
def test_rule_by_example(row):
    """A request is free if all of it fits in what is left, and a billed one leaves what is used as it was."""
    used, tokens, allowance = (int(cell) for cell in row[:3])
    free = free_part(tokens, allowance=allowance, used=used, overage=Overage.WHOLE)
    verdict = "free" if is_free(tokens, allowance=allowance, used=used) else "billed"
    assert [verdict, str(used_after(tokens, free=free, used=used, counts=Counts.FREE))] == row[3:]


# -- tiers


def test_tier_change_in_a_window():
    """A change of tier applies to later decisions of the same window; earlier ones stand."""
    told = meter(tier=None)
    at = instant("2025-04-20T10:00:00")
    told.enroll("default", Enrollment(tier=2, sharing=Sharing.ENABLED), actor="owner")
    seen = [told.decide(ask(1, at, 200_000)), told.decide(ask(2, at, 100_000))]
    told.enroll("default", Enrollment(tier=3, sharing=Sharing.ENABLED), actor="owner")
    seen.append(told.decide(ask(3, at, 100_000)))
    told.enroll("default", Enrollment(tier=1, sharing=Sharing.ENABLED), actor="owner")
    seen += [told.decide(ask(4, at, 1)), told.decide(ask(5, at, 0)), told.decide(ask(2, at, 100_000))]
    assert [(one.verdict.value, one.allowance, one.used, one.remaining, one.seq) for one in seen] == [
        ("free", 250_000, 200_000, 50_000, 1),
        ("billed", 250_000, 200_000, 50_000, 2),
        ("free", 1_000_000, 300_000, 700_000, 3),
        ("billed", 250_000, 300_000, 0, 4),
        ("billed", 250_000, 300_000, 0, 5),
        ("billed", 250_000, 200_000, 50_000, 2),
    ]


@pytest.mark.parametrize(("tier", "large", "small"), [(t, 250_000, 2_500_000) for t in (1, 2)])
def test_allowances_of_low_tiers(tier, large, small):
    """Tiers 1 and 2 have 250k on the large models and 2.5M on the small ones."""
    assert allowances(tier) == (large, small)


@pytest.mark.parametrize(("tier", "large", "small"), [(t, 1_000_000, 10_000_000) for t in (3, 4, 5)])
def test_allowances_of_high_tiers(tier, large, small):
    """Tiers 3 to 5 have 1M on the large models and 10M on the small ones."""
    assert allowances(tier) == (large, small)


def allowances(tier):
    """What an account of this tier may use on a large and on a small model."""
    told = meter(tier=tier)
    at = instant("2025-04-20T10:00:00")
    return told.decide(ask(1, at, 0)).allowance, told.decide(ask(2, at, 0, model=SMALL)).allowance


# -- rolling windows, and the switch to the UTC day


@pytest.mark.parametrize(
    "table",
    [ROLLING, ON_THE_END, BILLED_OPENS_NOTHING, ZERO_OPENS, LATE_ARRIVAL, SWITCH, LATE_BY_DAY],
    ids=[
        "the article's",
        "on the end",
        "billed opens nothing",
        "zero opens",
        "late arrival",
        "switch of 2025-03-06",
        "late by day",
    ],
)
def test_windows_by_example(table):
    """A window lasts 24 h from the first free request after the last one ended; since 2025-03-06 it is the UTC day."""
    assert decide_table(table) == rows(table)


def test_part_of_a_request_opens_a_rolling_window():
    """Where only the excess is billed, a request with some free tokens opens a window."""
    opened = decide_table(BILLED_OPENS_NOTHING, overage="excess")[0]
    assert opened[2:] == ["billed", "2025-01-01T05:00:00", "2025-01-02T05:00:00"]


def test_billed_request_outside_of_windows():
    """A billed request that opens no window has a total, but no window, no place in it, and nothing used."""
    one = meter().decide(ask(1, instant("2025-01-01T05:00:00"), 1_000_001))
    assert (one.window, one.seq, one.used, one.total, one.remaining, one.reason, one.billed_tokens) == (
        None,
        None,
        0,
        1_000_001,
        1_000_000,
        Reason.OVER_ALLOWANCE,
        1_000_001,
    )


def test_excluded_request_opens_no_rolling_window():
    """An excluded request opens no rolling window either."""
    told = meter()
    told.decide(ask(1, instant("2025-01-01T05:00:00"), 1, model="gpt-4o"))
    one = told.decide(ask(2, instant("2025-01-01T07:00:00"), 1))
    assert (one.window_start, one.seq) == (instant("2025-01-01T07:00:00"), 1)


def test_each_group_rolls_by_itself():
    """The two groups open their rolling windows independently."""
    told = meter()
    told.decide(ask(1, instant("2025-01-01T07:00:00"), 1))
    small = told.decide(ask(2, instant("2025-01-01T09:00:00"), 1, model=SMALL))
    assert small.window_start == instant("2025-01-01T09:00:00")


def test_revisions_at_the_switch():
    """The last microsecond before 2025-03-06 is judged by the rolling revision, midnight by the daily one."""
    told = meter()
    names = [
        told.decide(ask(place, instant(at), 1)).revision
        for place, at in enumerate(["2025-03-05T23:59:59.999999", "2025-03-06T00:00:00"])
    ]
    assert names == ["2024-12-01", "2025-03-06"]


def test_rolling_window_is_kept_for_late_requests():
    """With bounds, a late request is judged in the rolling window that was open, until seven days after its end."""
    clock = [instant("2025-01-01T07:00:00")]
    store = MemoryStore(clock=lambda: clock[0], bounds=Bounds())
    told = Meter(store, OFFER, assume=Enrollment(tier=5, sharing=Sharing.ENABLED))
    told.decide(ask(1, clock[0], 1))
    clock[0] = instant("2025-01-09T06:59:59.999999")
    last = told.decide(ask(2, instant("2025-01-01T08:00:00"), 1))
    clock[0] = instant("2025-01-09T07:00:00")
    late = told.decide(ask(3, instant("2025-01-01T08:00:00"), 1))
    assert [(one.reason, one.used) for one in (last, late)] == [(Reason.WITHIN_ALLOWANCE, 2), (Reason.TOO_LATE, None)]


# -- properties of the rule. Each example is one draw of bytes, read as numbers: that is what makes thousands cheap.


class Step(NamedTuple):
    """One request against one allowance."""

    size: int
    allowance: int
    used: int


class Day(NamedTuple):
    """Requests of one window, in order."""

    sizes: list[int]
    allowance: int
    counts: Counts
    overage: Overage


def step(data):
    """Three numbers of up to 10^12, small ones as often as large ones."""
    third = len(data) // 3
    parts = (data[:third], data[third : 2 * third], data[2 * third :])
    return Step(*(int.from_bytes(part, "big") % (TOKENS_MAX + 1) for part in parts))


def day(data):
    """An allowance up to 30 under some reading, and requests up to 9."""
    return Day([byte % 10 for byte in data[2:]], data[0] % 31, *READINGS[data[1] % len(READINGS)])


steps = st.binary(max_size=15).map(step)
days = st.binary(min_size=2, max_size=12).map(day)


def fold(sizes, allowance, counts, overage):
    """Free part and use after each request, in order."""
    found, used = [], 0
    for size in sizes:
        free = free_part(size, allowance=allowance, used=used, overage=overage)
        used = used_after(size, free=free, used=used, counts=counts)
        found.append((free, used))
    return found


@settings(max_examples=2000)
@given(step=steps)
def test_never_above_the_allowance(step):
    """Where free tokens count, nothing that is free takes the use above the allowance, however high it stood."""
    size, allowance, used = step
    for overage in Overage:
        free = free_part(size, allowance=allowance, used=used, overage=overage)
        after = used_after(size, free=free, used=used, counts=Counts.FREE)
        assert used <= after <= max(used, allowance)


@settings(max_examples=2000)
@given(step=steps)
def test_billed_request_changes_nothing(step):
    """Whole requests: a free one adds all its tokens, a billed one leaves the use as it was."""
    size, allowance, used = step
    free = free_part(size, allowance=allowance, used=used, overage=Overage.WHOLE)
    after = used_after(size, free=free, used=used, counts=Counts.FREE)
    assert (free, after) == ((size, used + size) if used + size <= allowance else (0, used))


@settings(max_examples=2000)
@given(step=steps)
def test_landing_exactly_is_free(step):
    """The largest request that is free lands exactly on the allowance; one token more is billed."""
    _, allowance, used = step
    left = allowance - used
    assert [is_free(size, allowance=allowance, used=used) for size in (left, left + 1)] == [True, False]
    parts = [free_part(max(left, 0) + 1, allowance=allowance, used=used, overage=overage) for overage in Overage]
    assert parts == [0, max(left, 0)]


@settings(max_examples=2000)
@given(step=steps, more=st.integers(0, TOKENS_MAX))
def test_monotone_in_the_allowance(step, more):
    """At the same use a higher allowance never makes less of a request free."""
    size, allowance, used = step
    for overage in Overage:
        lower = free_part(size, allowance=allowance, used=used, overage=overage)
        higher = free_part(size, allowance=allowance + more, used=used, overage=overage)
        assert lower <= higher


@settings(max_examples=2000)
@given(step=steps)
def test_excess_is_whole_or_what_was_left(step):
    """Billing the excess agrees with billing the whole where all fits, and else frees what was left."""
    size, allowance, used = step
    whole = free_part(size, allowance=allowance, used=used, overage=Overage.WHOLE)
    excess = free_part(size, allowance=allowance, used=used, overage=Overage.EXCESS)
    assert (whole, excess) == ((size, size) if size <= allowance - used else (0, max(0, allowance - used)))


def test_every_small_case():
    """For all small numbers the rule is: free if used and tokens together do not exceed the allowance."""
    wrong = [
        (size, allowance, used)
        for size, allowance, used in product(range(20), range(20), range(20))
        if is_free(size, allowance=allowance, used=used) is not (used + size <= allowance)
        or free_part(size, allowance=allowance, used=used, overage=Overage.WHOLE)
        != (size if used + size <= allowance else 0)
        or free_part(size, allowance=allowance, used=used, overage=Overage.EXCESS)
        != len(range(used, min(allowance, used + size)))
    ]
    assert wrong == []


@settings(max_examples=2000)
@given(day=days)
def test_order_decides(day):
    """Order of arrival decides: what comes later changes nothing that came before."""
    whole = fold(*day)
    assert [fold(day.sizes[:upto], *day[1:]) for upto in range(len(whole))] == [
        whole[:upto] for upto in range(len(whole))
    ]


@settings(max_examples=2000)
@given(day=days)
def test_all_or_nothing_after_the_crossing(day):
    """Where every token counts, all is free up to the first crossing and billed from it on, whatever the overage."""
    whole = fold(day.sizes, day.allowance, Counts.ALL, Overage.WHOLE)
    excess = fold(day.sizes, day.allowance, Counts.ALL, Overage.EXCESS)
    totals = [sum(day.sizes[: place + 1]) for place in range(len(day.sizes))]
    assert [used for _, used in whole] == [used for _, used in excess] == totals
    assert [free for free, _ in whole] == [
        size if total <= day.allowance else 0 for size, total in zip(day.sizes, totals, strict=True)
    ]


@settings(max_examples=2000)
@given(day=days)
def test_excess_wastes_nothing(day):
    """Where only the excess is billed, all of the allowance is used if there is enough to use it: never less free."""
    excess = sum(free for free, _ in fold(day.sizes, day.allowance, Counts.FREE, Overage.EXCESS))
    whole = sum(free for free, _ in fold(day.sizes, day.allowance, Counts.FREE, Overage.WHOLE))
    assert excess == min(day.allowance, sum(day.sizes))
    assert whole <= excess


@settings(max_examples=2000)
@given(day=days)
def test_conservation(day):
    """What is used is the sum of what counts, and free and billed tokens are all tokens."""
    sizes, allowance, counts, _ = day
    window = Window(instant("2025-04-20T00:00:00"), instant("2025-04-21T00:00:00"))
    decisions = in_order(day, [window.start] * len(sizes), window=window)
    free = [one.free_tokens or 0 for one in decisions]
    counted = free if counts is Counts.FREE else sizes
    before = [sum(counted[:place]) for place in range(len(sizes))]
    used = [sum(counted[: place + 1]) for place in range(len(sizes))]
    assert [one.used for one in decisions] == used
    assert [one.total for one in decisions] == [size + then for size, then in zip(sizes, before, strict=True)]
    assert [part + (one.billed_tokens or 0) for part, one in zip(free, decisions, strict=True)] == sizes
    assert [one.seq for one in decisions] == list(range(1, len(sizes) + 1))
    assert [one.remaining for one in decisions] == [max(0, allowance - taken) for taken in used]
    assert [one.is_free for one in decisions] == [
        size <= allowance - then for size, then in zip(sizes, before, strict=True)
    ]


def in_order(day, times, *, window=None):
    """Decide charges of one group in order; without a window it rolls for 24 h."""
    sizes, allowance, counts, overage = day
    terms = Terms("offer", "2025-01-01", None, None, "g", allowance=allowance, counts=counts, overage=overage)
    tally = None
    decisions = []
    for place, (size, at) in enumerate(zip(sizes, times, strict=True)):
        own = Window(at, at + timedelta(hours=24)) if window is None else window
        charge = Charge(ask(place, at, size), terms, 0, size, own, rolls=window is None)
        decision, after = decide(charge, tally)
        tally = tally if after is None else after
        decisions.append(decision)
    return decisions


times_of_day = st.binary(min_size=10, max_size=10).map(
    lambda data: [datetime(2025, 1, 1, tzinfo=UTC) + timedelta(minutes=20 * byte) for byte in data]
)


@settings(max_examples=1000)
@given(day=days, times=times_of_day)
def test_rolling_windows_open_at_free_tokens(day, times):
    """Each rolling window starts at a request with something free, lasts 24 h, and begins after the one before."""
    inside = [one for one in in_order(day, times[: len(day.sizes)]) if one.window is not None]
    opening = [one for one in inside if one.seq == 1]
    assert [one.window for one in opening] == [Window(one.at, one.at + timedelta(hours=24)) for one in opening]
    assert [one.is_free or one.free_tokens != 0 for one in opening] == [True] * len(opening)
    assert [earlier.window_end <= later.window_start for earlier, later in pairwise(opening)] == [True] * (
        max(1, len(opening)) - 1
    )
    assert {one.window for one in inside} == {one.window for one in opening}


@settings(max_examples=1000)
@given(day=days, times=times_of_day)
def test_rolling_windows_in_order_of_time(day, times):
    """Requests in order of time lie in the window that judges them; those in none do not fit in a fresh allowance."""
    end = None
    for one in in_order(day, sorted(times[: len(day.sizes)])):
        if one.window is None:
            assert end is None or end <= one.at
            assert (one.used, one.total, one.free_tokens, one.verdict.value) == (0, one.tokens, 0, "billed")
            assert (one.tokens or 0) > day.allowance
        else:
            assert one.window.start <= one.at < one.window.end
            end = one.window.end


@settings(max_examples=1000)
@given(day=days, times=times_of_day)
def test_each_rolling_window_is_the_rule(day, times):
    """Within each rolling window the decisions, in order of seq, are what the rule gives from zero."""
    windows = {}
    for one in in_order(day, times[: len(day.sizes)]):
        if one.window is not None:
            windows.setdefault(one.window, []).append(one)
    for inside in windows.values():
        assert [(one.free_tokens, one.used) for one in inside] == fold([one.tokens or 0 for one in inside], *day[1:])
        assert [one.seq for one in inside] == list(range(1, len(inside) + 1))


@pytest.mark.parametrize("size", [0, 1, 2**53 - 1, 2**53, 2**53 + 1, TOKENS_MAX - 1, TOKENS_MAX])
def test_exact_beyond_floating_point(size):
    """The comparison is exact for integers of every size that the rule may meet, far beyond what floats can tell."""
    assert [is_free(size + more, allowance=size + 7, used=7) for more in (-1, 0, 1)] == [True, True, False]
    assert [is_free(size + more, allowance=10**18 + size, used=10**18) for more in (0, 1)] == [True, False]


def test_largest_numbers_are_decided():
    """A request of 10^12 tokens is judged like any other, and adds up exactly."""
    at = instant("2025-04-20T00:00:00")
    window = Window(at, at + timedelta(days=1))
    day = Day([TOKENS_MAX, TOKENS_MAX, 1], TOKENS_MAX, Counts.ALL, Overage.EXCESS)
    decisions = in_order(day, [at] * 3, window=window)
    assert [(one.verdict.value, one.used, one.total) for one in decisions] == [
        ("free", TOKENS_MAX, TOKENS_MAX),
        ("billed", 2 * TOKENS_MAX, 2 * TOKENS_MAX),
        ("billed", 2 * TOKENS_MAX + 1, 2 * TOKENS_MAX + 1),
    ]
