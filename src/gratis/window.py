"""In which window an instant falls.

Calendar windows tile time: each instant lies in exactly one, whatever the zone's clocks do. A rolling window
opens at a request, so where it stands is a store's to know; here is only how long it would be.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from enum import StrEnum, unique
from zoneinfo import ZoneInfo

from msgspec import Struct

from gratis.model import Window

DAY = timedelta(days=1)
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
WEEK_DAYS = len(WEEKDAYS)
MONTHS = 12


@unique
class Span(StrEnum):
    """How long a calendar window is."""

    DAY = "day"
    WEEK = "week"
    MONTH = "month"


class Calendar(Struct, frozen=True):
    """A day, week or month of a zone's calendar; `week_starts` counts from Monday, 0."""

    span: Span
    zone: str
    week_starts: int = 0

    def __str__(self) -> str:
        week = f" {WEEKDAYS[self.week_starts]}" if self.span is Span.WEEK else ""
        return f"{self.span} {self.zone}{week}"


class Rolling(Struct, frozen=True):
    """So many hours from the first request with a free token after the last window ended."""

    hours: int

    def __str__(self) -> str:
        return f"rolling {self.hours}h"


def calendar_window(calendar: Calendar, at: datetime) -> Window:
    """The window of the calendar in which the instant lies."""
    if calendar.span is Span.DAY and calendar.zone == "UTC":
        start = at.replace(hour=0, minute=0, second=0, microsecond=0)
        return Window(start, start + DAY)
    zone = ZoneInfo(calendar.zone)
    first = _first_day(calendar, at.astimezone(zone).date())
    window = _span(calendar, first, zone)
    # Where clocks went back across midnight, a day's name returns after the next day has begun.
    if at >= window.end:
        return _span(calendar, _next(calendar, first), zone)
    assert at >= window.start, "a day that was named has begun"
    return window


def rolling_window(rolling: Rolling, at: datetime) -> Window:
    """The window that a request at this instant would open."""
    return Window(at, at + timedelta(hours=rolling.hours))


def clip(window: Window, *, after: datetime | None, before: datetime | None) -> Window:
    """The window without what lies beyond a switch to another kind of window."""
    if (after is None or window.start >= after) and (before is None or window.end <= before):
        return window
    start = window.start if after is None else max(window.start, after)
    end = window.end if before is None else min(window.end, before)
    return Window(start, end)


def _first_day(calendar: Calendar, day: date) -> date:
    match calendar.span:
        case Span.DAY:
            return day
        case Span.WEEK:
            return day - DAY * ((day.weekday() - calendar.week_starts) % WEEK_DAYS)
        case Span.MONTH:
            return day.replace(day=1)


def _next(calendar: Calendar, first: date) -> date:
    match calendar.span:
        case Span.DAY:
            return first + DAY
        case Span.WEEK:
            return first + DAY * WEEK_DAYS
        case Span.MONTH:
            return date(first.year + first.month // MONTHS, first.month % MONTHS + 1, 1)


def _span(calendar: Calendar, first: date, zone: ZoneInfo) -> Window:
    return Window(_begin(first, zone), _begin(_next(calendar, first), zone))


def _begin(day: date, zone: ZoneInfo) -> datetime:
    """The first instant of a day: midnight's first occurrence, or the jump that leapt over it."""
    return datetime.combine(day, time(0), zone).astimezone(UTC)
