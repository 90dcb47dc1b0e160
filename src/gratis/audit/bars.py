"""Charts: amounts by day as bars of SVG, each of them a row of a table, too.

One plot shows up to two months, longer spans have a small plot a month; all on a scale that one huge day does not
spoil. Bars stretch with the page, so nothing round and no letters are among them.
"""

from __future__ import annotations

from calendar import monthrange
from datetime import date, timedelta
from decimal import Decimal
from itertools import groupby
from typing import TYPE_CHECKING

from msgspec import Struct

from gratis.audit.markup import ROWS_MAX, Column, Table, compact, day_name, table_html, text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gratis.audit.markup import Cell

DAYS_MAX = 62
MONTHS_MAX = 36
TALL = 5
ROOM = Decimal("1.06")
TORN_AT = Decimal("1.35")
HEIGHT = 100
SLOT = 10
GAP = 2
PLOT_REMS = 5
SLOT_REMS = 4
MONTH_SLOTS = 31
LABELS_MAX = 5
TICKS_MAX = 4


class Bar(Struct, frozen=True):
    """One day (or window): what was free, what was billed, and the allowance, where there is one line to draw."""

    day: date
    free: int
    billed: int
    allowance: int | None
    requests: int
    free_requests: int

    @property
    def total(self) -> int:
        """How high it is."""
        return self.free + self.billed


class Chart(Struct, frozen=True):
    """Bars in the order of their days. Those that no group covers are all `billed`, and drawn as `none`.

    `step` says of what there is a bar each: a day, or a longer window. `span` is what is drawn, if not just the bars.
    """

    title: str
    about: str
    unit: str
    bars: Sequence[Bar]
    step: str = "day"
    is_covered: bool = True
    span: tuple[date, date] | None = None

    @property
    def days(self) -> tuple[date, int]:
        """The first day that is drawn, and how many: of charts side by side they are the same."""
        first, last = self.span or (self.bars[0].day, self.bars[-1].day)
        return first, (last - first).days + 1


def chart_html(chart: Chart) -> Iterator[str]:
    """Bars of days: one plot of up to two months, else a small one a month, all on one scale."""
    bars = chart.bars
    top = scale(bars)
    torn = sum(bar.total > top for bar in bars)
    highest = max(bars, key=_height)
    yield f"<h3>{text(chart.title)}</h3>\n<figure>"
    yield f'<figcaption class="about">{text(chart.about, most=2_000)}</figcaption>'
    first, days = chart.days
    if chart.step != "day":
        yield from _plot(chart, list(bars[-DAYS_MAX:]), top)
    elif days <= DAYS_MAX:
        yield from _plot(chart, _filled(bars, first, days), top)
    else:
        yield from _months(chart, top)
    if torn:
        many = "1 bar is" if torn == 1 else f"{torn:,} bars are"
        said = f"{many} cut at the torn line: the highest is {highest.total:,} {chart.unit} on {day_name(highest.day)}."
        yield f'<p class="more">{text(said)}</p>'
    yield "</figure>"
    yield from _numbers(chart)


def _numbers(chart: Chart) -> Iterator[str]:
    """The same as a table, the latest first to stay if there are too many."""
    kept = chart.bars[-ROWS_MAX:]
    columns = [Column(chart.step.capitalize())]
    columns += [Column(name, "n") for name in (("Free", "Billed") if chart.is_covered else ("Not covered",))]
    if chart.is_covered:
        columns += [Column("Allowance", "n"), Column("Free requests", "n")]
    columns.append(Column("Requests", "n"))
    rows: list[list[Cell]] = []
    for bar in kept:
        middle = [bar.free, bar.billed, bar.allowance, bar.free_requests] if chart.is_covered else [bar.billed]
        rows.append([bar.day.isoformat(), *middle, bar.requests])
    omitted = len(chart.bars) - len(kept)
    said = f"{omitted:,} earlier ones are left out here, and counted in every sum." if omitted else ""
    yield f"<details><summary>{text(chart.title)} in numbers</summary>"
    yield from table_html(Table(f"{chart.title}, {chart.unit} a {chart.step}", columns, rows, omitted=said))
    yield "</details>"


def scale(bars: Sequence[Bar]) -> int:
    """How high the scale goes: one huge day must not make all others invisible."""
    *others, highest = sorted(bar.total for bar in bars)
    line = max(bar.allowance or 0 for bar in bars)
    busy = [total for total in others if total]
    usual = max(line, busy[(len(busy) - 1) * 4 // 5] if busy else 0) or highest or 1
    seen = max([usual, *(total for total in (*busy, highest) if total <= TALL * usual)])
    return int(max(seen * ROOM, usual * TORN_AT if highest > seen else 0)) + 1


def _height(bar: Bar) -> int:
    return bar.total


def _filled(bars: Sequence[Bar], first: date, days: int) -> list[Bar | None]:
    """A place for every day, also for those without a request."""
    found = {bar.day: bar for bar in bars}
    return [found.get(first + timedelta(days=place)) for place in range(days)]


def _plot(chart: Chart, slots: Sequence[Bar | None], top: int) -> Iterator[str]:
    known = [bar for bar in slots if bar is not None]
    # A few bars stay slender: the plot is then narrower than the page.
    yield f'<div class="plot" style="max-width:{PLOT_REMS + SLOT_REMS * len(slots)}rem"><div class="field">'
    for value in _ticks(top):
        at = _part_of(value, top)
        yield f'<div class="tick" style="bottom:{at}%" aria-hidden="true"><b>{compact(value)}</b></div>'
    yield _svg(chart, slots, top, len(slots), _summary(chart, known))
    first, _ = chart.days
    days = [first + timedelta(days=place) for place in range(len(slots))]
    if chart.step != "day":
        days = [bar.day for bar in known]
    yield f'</div><div class="days" aria-hidden="true">{_labels(days)}</div></div>'


def _labels(days: Sequence[date]) -> str:
    """A few days of the axis under their bars, the first and the last among them."""
    last = len(days) - 1
    count = min(LABELS_MAX, last + 1)
    spans = []
    for place in sorted({last * place // max(count - 1, 1) for place in range(count)}):
        day = days[place]
        at = _part_of(100 * place + 50, 100 * len(days))
        spans.append(f'<span style="left:{at}%">{day.day} {day:%b}</span>')
    return "".join(spans)


def _months(chart: Chart, top: int) -> Iterator[str]:
    """A small plot a month, on one scale."""
    found = [(month, list(bars)) for month, bars in groupby(chart.bars, key=_month)]
    kept = found[-MONTHS_MAX:]
    yield '<ul class="months">'
    for month, bars in kept:
        first = month.replace(day=1)
        days = monthrange(first.year, first.month)[1]
        said = f"<p><b>{first:%B %Y}</b><span>{compact(sum(map(_height, bars)))}</span></p>"
        drawn = _svg(chart, _filled(bars, first, days), top, MONTH_SLOTS, f"{first:%B %Y}: {_summary(chart, bars)}")
        yield f'<li class="month">{said}<div class="field">{drawn}</div></li>'
    yield "</ul>"
    if len(found) > len(kept):
        said = f"{len(found) - len(kept):,} earlier months are left out here, and counted in every sum."
        yield f'<p class="more">{text(said)}</p>'
    yield f'<p class="more">One scale for all months: {compact(top)} {text(chart.unit)} from the ground to the top.</p>'


def _month(bar: Bar) -> date:
    return bar.day.replace(day=1)


def _summary(chart: Chart, bars: Sequence[Bar]) -> str:
    """What a plot shows, in words."""
    free, billed = sum(bar.free for bar in bars), sum(bar.billed for bar in bars)
    many = f"{len(bars):,} {chart.step}{'' if len(bars) == 1 else 's'}"
    if not chart.is_covered:
        return f"{chart.title}: {billed:,} {chart.unit} on {many}"
    return f"{chart.title}: {free:,} {chart.unit} free and {billed:,} billed on {many}"


def _svg(chart: Chart, slots: Sequence[Bar | None], top: int, width: int, label: str) -> str:
    """The bars themselves: they stretch with the page, so nothing round and no letters are among them."""
    drawn = "".join(_bar(chart, bar, place, top) for place, bar in enumerate(slots) if bar is not None)
    line = _line(slots, top)
    view = f'viewBox="0 0 {width * SLOT} {HEIGHT}" preserveAspectRatio="none"'
    return f'<svg {view} role="img" aria-label="{text(label)}">{drawn}{line}</svg>'


def _bar(chart: Chart, bar: Bar, place: int, top: int) -> str:
    left, wide = place * SLOT + GAP // 2, SLOT - GAP
    free, total = _high(min(bar.free, top), top), _high(min(bar.total, top), top)
    kind = "billed" if chart.is_covered else "none"
    rects = [
        f'<rect class="{name}" x="{left}" y="{_number(HEIGHT - to)}" width="{wide}" height="{_number(to - since)}"/>'
        for name, since, to in (("free", Decimal(0), free), (kind, free, total))
        if to > since
    ]
    if bar.total > top:
        rects.append(f'<path class="torn" d="M{left} 9l{wide} -4v2.5l-{wide} 4z"/>')
    said = f"{bar.day.isoformat()}: {bar.total:,} {chart.unit} not covered"
    if chart.is_covered:
        of = "" if bar.allowance is None else f", allowance {bar.allowance:,}"
        said = f"{bar.day.isoformat()}: {bar.free:,} {chart.unit} free, {bar.billed:,} billed{of}"
    return f"<g><title>{text(said)}</title>{''.join(rects)}</g>"


def _line(slots: Sequence[Bar | None], top: int) -> str:
    """The allowance as a line: a step where it changes, on over days without a request."""
    steps: list[str] = []
    last: int | None = None
    for place, bar in enumerate(slots):
        if bar is None or bar.allowance is None:
            continue
        at = _number(HEIGHT - _high(bar.allowance, top))
        if last is None:
            steps.append(f"M{place * SLOT} {at}")
        elif bar.allowance != last:
            steps.append(f"H{place * SLOT}V{at}")
        last = bar.allowance
    if last is None:
        return ""
    return f'<path class="allowance" d="{"".join(steps)}H{len(slots) * SLOT}"/>'


def _high(value: int, top: int) -> Decimal:
    """How high an amount is drawn; whatever is there can be seen."""
    if value <= 0:
        return Decimal(0)
    return max(Decimal(HEIGHT * value) / top, Decimal("0.6"))


def _number(value: Decimal) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _part_of(value: int, whole: int) -> str:
    return _number(Decimal(100 * value) / whole)


def _ticks(top: int) -> list[int]:
    """Two to four round values of the scale, above its ground."""
    size = 10 ** (len(str(top)) - 1)
    steps = (size // 5, size // 4, size // 2, size, 2 * size, 4 * size)
    step = next(step for step in steps if step and top // step <= TICKS_MAX)
    return [step * place for place in range(1, top // step + 1)]
