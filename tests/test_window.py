"""In which window an instant falls: calendars tile time in every zone, and the machine's own zone does not matter."""

import os
import subprocess
import sys
from datetime import UTC, date, datetime, time, timedelta
from itertools import product
from zoneinfo import ZoneInfo, available_timezones

import pytest
from hypothesis import given, settings, strategies as st

from gratis.model import AT_MAX, AT_MIN, Window
from gratis.window import WEEKDAYS, Calendar, Rolling, Span, calendar_window, clip, rolling_window

TICK = timedelta(microseconds=1)
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
MACHINES_OWN = {"localtime", "posixrules"}
ZONES = sorted(available_timezones() - MACHINES_OWN)

# Zones whose clocks have done everything that clocks do, with the years in which they did it.
ODD_ZONES = {
    "Africa/Cairo": (2005, 2026),
    "America/Havana": (1990, 2026),
    "America/Los_Angeles": (2000, 2026),
    "America/Sao_Paulo": (1985, 2020),
    "America/St_Johns": (1987, 2012),
    "Antarctica/Troll": (2004, 2026),
    "Asia/Beirut": (2000, 2026),
    "Asia/Kathmandu": (1984, 1990),
    "Australia/Lord_Howe": (1981, 2026),
    "Pacific/Apia": (2009, 2022),
}

# Zone, any instant of a local day, and that day's first instant and length.
DAYS = """
zone                 at                          start                 hours
UTC                  2025-03-09T00:00:00         2025-03-09T00:00:00   24
UTC                  2025-03-09T23:59:59.999999  2025-03-09T00:00:00   24
America/Los_Angeles  2025-03-09T12:00:00         2025-03-09T08:00:00   23
America/Los_Angeles  2025-11-02T12:00:00         2025-11-02T07:00:00   25
America/Los_Angeles  2025-07-01T06:59:59.999999  2025-06-30T07:00:00   24
America/Los_Angeles  2025-07-01T07:00:00         2025-07-01T07:00:00   24
Australia/Lord_Howe  2025-04-06T00:00:00         2025-04-05T13:00:00   24.5
Australia/Lord_Howe  2025-10-05T00:00:00         2025-10-04T13:30:00   23.5
Pacific/Apia         2011-12-30T09:59:59.999999  2011-12-29T10:00:00   24
Pacific/Apia         2011-12-30T10:00:00         2011-12-30T10:00:00   24
Pacific/Apia         2011-12-31T10:00:00         2011-12-31T10:00:00   24
America/Havana       2025-03-09T04:59:59.999999  2025-03-08T05:00:00   24
America/Havana       2025-03-09T05:00:00         2025-03-09T05:00:00   23
America/Havana       2025-11-02T04:30:00         2025-11-02T04:00:00   25
America/Havana       2025-11-02T05:30:00         2025-11-02T04:00:00   25
America/Sao_Paulo    2018-11-04T03:00:00         2018-11-04T03:00:00   23
America/Sao_Paulo    2018-02-18T02:59:59.999999  2018-02-17T02:00:00   25
Asia/Beirut          2024-03-30T22:00:00         2024-03-30T22:00:00   23
Africa/Cairo         2024-04-25T22:00:00         2024-04-25T22:00:00   23
Africa/Cairo         2024-10-31T21:30:00         2024-10-30T21:00:00   25
Asia/Kathmandu       2025-04-16T00:00:00         2025-04-15T18:15:00   24
"""

# Newfoundland changed its clocks at 00:01, so an hour of Saturday came again after Sunday had begun.
NEWFOUNDLAND = """
at                          start                end
2006-10-29T02:29:59.999999  2006-10-28T02:30:00  2006-10-29T02:30:00
2006-10-29T02:30:00         2006-10-29T02:30:00  2006-10-30T03:30:00
2006-10-29T02:31:00         2006-10-29T02:30:00  2006-10-30T03:30:00
2006-10-29T03:29:59.999999  2006-10-29T02:30:00  2006-10-30T03:30:00
2006-10-29T03:30:00         2006-10-29T02:30:00  2006-10-30T03:30:00
2006-04-02T03:30:00         2006-04-02T03:30:00  2006-04-03T02:30:00
"""

# What a script prints on whatever machine: windows of several calendars, and a decision.
SCRIPT = """
import sys
from datetime import UTC, datetime, timedelta
from gratis import Enrollment, Meter, Request
from gratis.lines import decision_line, encode
from gratis.window import Calendar, Span, calendar_window

at = datetime(2011, 12, 28, 0, 30, tzinfo=UTC)
for hours in range(0, 96, 7):
    for span in Span:
        for zone in ("UTC", "Pacific/Apia", "America/Los_Angeles"):
            window = calendar_window(Calendar(span, zone), at + timedelta(hours=hours))
            print(span, zone, window.start.isoformat(), window.end.isoformat())
enrollment = Enrollment(tier=5, sharing="enabled")
for offer, model in (("openai-data-sharing", "gpt-4o-2024-08-06"), ("gemini-free", "gemini-2.5-flash")):
    meter = Meter.open("memory:", offer=offer, assume=enrollment, bounds=None)
    for place, day in enumerate((datetime(2025, 1, 1, 7, tzinfo=UTC), datetime(2025, 11, 2, 23, 30, tzinfo=UTC))):
        request = Request(id=str(place), model=model, at=day, input_tokens=1, output_tokens=1)
        print(encode(decision_line(meter.explain(request).decision)).decode())
"""


def instant(text):
    """A time of a table, which is UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def rows(table):
    """The cells of a text table below its heading."""
    return [line.split() for line in table.strip().splitlines()[1:]]


def check_tile(calendar, at):
    """The window holds the instant; its first and last instants give it again, its end gives the next one."""
    window = calendar_window(calendar, at)
    assert window.start <= at < window.end
    assert calendar_window(calendar, window.start) == window
    assert calendar_window(calendar, window.end - TICK) == window
    assert calendar_window(calendar, window.end).start == window.end
    assert calendar_window(calendar, window.start - TICK).end == window.start
    return window


# -- examples


@pytest.mark.parametrize("row", rows(DAYS), ids=" ".join)
def test_days_by_example(row):
    """A local day starts at its midnight, or where the clocks leapt over it, and is as long as the clocks make it."""
    zone, at, start, hours = row
    window = check_tile(Calendar(Span.DAY, zone), instant(at))
    assert (window.start, window.end - window.start) == (instant(start), float(hours) * HOUR)


@pytest.mark.parametrize("row", rows(NEWFOUNDLAND), ids=" ".join)
def test_an_hour_of_yesterday_comes_again(row):
    """Where the clocks go back across midnight, the day that has begun goes on: windows never return."""
    at, start, end = (instant(cell) for cell in row)
    assert check_tile(Calendar(Span.DAY, "America/St_Johns"), at) == Window(start, end)


def test_utc_day_is_half_open():
    """The UTC day is [00:00, next 00:00): its last microsecond is its own, midnight is the next one's."""
    day = Calendar(Span.DAY, "UTC")
    midnight = instant("2025-03-07T00:00:00")
    assert [calendar_window(day, at) for at in (midnight - TICK, midnight)] == [
        Window(midnight - DAY, midnight),
        Window(midnight, midnight + DAY),
    ]


@pytest.mark.parametrize("starts", range(7), ids=WEEKDAYS)
def test_weeks_start_on_their_day(starts):
    """A week starts at 00:00 of the weekday that it is given, and lasts seven days."""
    calendar = Calendar(Span.WEEK, "UTC", starts)
    for hour in range(0, 24 * 15, 5):
        window = check_tile(calendar, instant("2025-04-28T00:00:00") + hour * HOUR)
        assert (window.start.weekday(), window.start.time(), window.end - window.start) == (starts, time(0), 7 * DAY)


def test_week_across_a_year():
    """The Monday week of 2025-01-01 starts in 2024."""
    window = calendar_window(Calendar(Span.WEEK, "UTC"), instant("2025-01-01T00:00:00"))
    assert window == Window(instant("2024-12-30T00:00:00"), instant("2025-01-06T00:00:00"))


def test_week_in_a_zone_has_the_hours_of_its_days():
    """The week of a change of clocks is an hour shorter or longer."""
    calendar = Calendar(Span.WEEK, "America/Los_Angeles", WEEKDAYS.index("monday"))
    lengths = [
        (window.end - window.start) / HOUR
        for window in (
            check_tile(calendar, instant(day))
            for day in ("2025-03-06T00:00:00", "2025-06-01T00:00:00", "2025-10-30T00:00:00")
        )
    ]
    assert lengths == [167.0, 168.0, 169.0]


@pytest.mark.parametrize(
    ("year", "days"),
    [
        (2024, [31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]),
        (2025, [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]),
    ],
)
def test_months(year, days):
    """A month lasts from its first midnight to the next month's, December to January, leap years included."""
    calendar = Calendar(Span.MONTH, "UTC")
    windows = [
        check_tile(calendar, datetime(year, month, 28, 23, 59, 59, 999_999, tzinfo=UTC)) for month in range(1, 13)
    ]
    assert [(window.start, (window.end - window.start).days) for window in windows] == [
        (datetime(year, month, 1, tzinfo=UTC), length) for month, length in zip(range(1, 13), days, strict=True)
    ]


def test_month_that_lost_a_day():
    """December 2011 had 30 days in Samoa, and ended with the month as the zone names it."""
    window = check_tile(Calendar(Span.MONTH, "Pacific/Apia"), instant("2011-12-15T00:00:00"))
    assert window == Window(instant("2011-12-01T10:00:00"), instant("2011-12-31T10:00:00"))


def test_calendars_at_the_ends_of_time():
    """The first and the last instant that a request may have lie in windows like all others."""
    for span, zone, at in product(Span, ("UTC", "Pacific/Kiritimati", "Pacific/Pago_Pago"), (AT_MIN, AT_MAX - TICK)):
        check_tile(Calendar(span, zone), at)


def test_names_of_windows():
    """A kind of window has one name, by which stores keep it."""
    kinds = [
        Calendar(Span.DAY, "UTC"),
        Calendar(Span.WEEK, "UTC", 6),
        Calendar(Span.MONTH, "Asia/Tokyo"),
        Rolling(24),
    ]
    assert [str(kind) for kind in kinds] == ["day UTC", "week UTC sunday", "month Asia/Tokyo", "rolling 24h"]


# -- properties

instants = st.integers(0, int((datetime(2100, 1, 1, tzinfo=UTC) - AT_MIN) / TICK) - 1).map(
    lambda us: AT_MIN + us * TICK
)
calendars = st.builds(Calendar, st.sampled_from(Span), st.sampled_from(ZONES), st.integers(0, 6))


@settings(max_examples=2000)
@given(calendar=calendars, at=instants)
def test_calendars_tile_time(calendar, at):
    """In every zone each instant lies in exactly one window, whose end is the next one's start."""
    check_tile(calendar, at)


@settings(max_examples=1000)
@given(calendar=calendars, at=instants)
def test_windows_start_where_the_zone_says(calendar, at):
    """By the zone's own clock a window's first day is that of its span, unless the zone skipped that day."""
    zone = ZoneInfo(calendar.zone)
    window = calendar_window(calendar, at)
    first, before = (edge.astimezone(zone).date() for edge in (window.start, window.start - TICK))
    assert before < first
    match calendar.span:
        case Span.DAY:
            assert at.astimezone(zone).date() in {first, first - DAY}
        case Span.WEEK:
            assert first.weekday() == calendar.week_starts or first - before > DAY
        case Span.MONTH:
            assert first.day == 1 or first - before > DAY


@pytest.mark.parametrize("zone", ODD_ZONES)
def test_days_follow_each_other(zone):
    """Walked from end to end, the windows are the local days: each once, in order, none but those that were skipped."""
    first, last = ODD_ZONES[zone]
    calendar, local = Calendar(Span.DAY, zone), ZoneInfo(zone)
    at = datetime(first, 1, 1, 12, tzinfo=UTC)
    days = []
    while at.year < last:
        window = calendar_window(calendar, at)
        days.append(window.start.astimezone(local).date())
        at = window.end
    span = [days[0] + DAY * number for number in range((days[-1] - days[0]).days + 1)]
    assert days == [day for day in span if (zone, day) != ("Pacific/Apia", date(2011, 12, 30))]


@pytest.mark.parametrize("zone", ODD_ZONES)
def test_days_tile_around_each_change_of_clocks(zone):
    """Around every day that is not 24 h long, all instants lie in windows that tile."""
    first, last = ODD_ZONES[zone]
    calendar = Calendar(Span.DAY, zone)
    at = datetime(first, 1, 1, 12, tzinfo=UTC)
    changes = 0
    while at.year < last:
        window = calendar_window(calendar, at)
        if window.end - window.start != DAY:
            changes += 1
            near = window.start - HOUR
            while near < window.end + HOUR:
                check_tile(calendar, near)
                near += 11 * MINUTE
            for edge in (window.start, window.end):
                for off in (-2 * MINUTE, -MINUTE, -TICK, timedelta(0), TICK, MINUTE, 2 * MINUTE):
                    check_tile(calendar, edge + off)
        at = window.end
    assert changes > 0


@settings(max_examples=500)
@given(at=instants, span=st.sampled_from(Span), starts=st.integers(0, 6))
def test_utc_by_any_name(at, span, starts):
    """The UTC day, for which there is a shortcut, is the day of the zone Etc/UTC."""
    assert calendar_window(Calendar(span, "UTC", starts), at) == calendar_window(Calendar(span, "Etc/UTC", starts), at)


@settings(max_examples=200)
@given(at=instants, hours=st.integers(1, 24 * 366))
def test_rolling_window_is_hours_long(at, hours):
    """A rolling window starts at its request and lasts its hours, whatever any clock on a wall does meanwhile."""
    assert rolling_window(Rolling(hours), at) == Window(at, at + hours * HOUR)


# -- switches between kinds of window

CLIPS = """
start                end                  after                before               clipped start        clipped end
2025-03-05T18:00:00  2025-03-06T18:00:00  -                    -                    2025-03-05T18:00:00  2025-03-06T18:00:00
2025-03-05T18:00:00  2025-03-06T18:00:00  -                    2025-03-06T00:00:00  2025-03-05T18:00:00  2025-03-06T00:00:00
2025-03-05T18:00:00  2025-03-06T00:00:00  -                    2025-03-06T00:00:00  2025-03-05T18:00:00  2025-03-06T00:00:00
2025-03-05T08:00:00  2025-03-06T08:00:00  2025-03-06T00:00:00  -                    2025-03-06T00:00:00  2025-03-06T08:00:00
2025-03-06T00:00:00  2025-03-07T00:00:00  2025-03-06T00:00:00  -                    2025-03-06T00:00:00  2025-03-07T00:00:00
2025-03-05T00:00:00  2025-03-08T00:00:00  2025-03-06T00:00:00  2025-03-07T00:00:00  2025-03-06T00:00:00  2025-03-07T00:00:00
2025-03-06T01:00:00  2025-03-06T02:00:00  2025-03-06T00:00:00  2025-03-07T00:00:00  2025-03-06T01:00:00  2025-03-06T02:00:00
"""  # noqa: E501 - a table


@pytest.mark.parametrize("row", rows(CLIPS), ids=" ".join)
def test_clip_by_example(row):
    """A window ends at the switch to another kind of window, and starts no earlier than the last switch."""
    start, end, after, before, clipped_start, clipped_end = (None if cell == "-" else instant(cell) for cell in row)
    assert start is not None
    assert end is not None
    assert clip(Window(start, end), after=after, before=before) == Window(clipped_start, clipped_end)


@settings(max_examples=500)
@given(edges=st.lists(instants, min_size=4, max_size=4, unique=True), inside=instants, sides=st.integers(0, 3))
def test_clip_keeps_what_lies_between_the_switches(edges, inside, sides):
    """An instant lies in the clipped window just if it lies in the window and on this side of both switches."""
    start, end = sorted(edges[:2])
    after, before = sorted(edges[2:])
    low, high = after if sides & 1 else None, before if sides & 2 else None
    clipped = clip(Window(start, end), after=low, before=high)
    for at in (inside, *edges, *(edge - TICK for edge in edges)):
        kept = start <= at < end and (low is None or low <= at) and (high is None or at < high)
        assert (clipped.start <= at < clipped.end) is kept


# -- the machine


@pytest.mark.parametrize("zone", ["Pacific/Apia", "America/Los_Angeles"])
def test_zone_of_the_machine_does_not_matter(zone):
    """Windows and decisions are the same wherever the machine believes to be."""
    assert run(zone) == run("UTC")


def run(zone):
    """What the script prints on a machine of this zone."""
    environment = {**os.environ, "TZ": zone, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 14 * 9 + 4
    return done.stdout
