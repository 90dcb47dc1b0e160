"""The arithmetic of `rule.py`, over columns: one linear pass over the rows of a log, in their order.

What a request is, which terms hold for it and where windows lie is worked out elsewhere, once for each distinct case
(`cases.py`), and stands here as numbers. Where the pass meets a case, a window or a day that it does not know, it
stops at that row and says so; it goes on there once it was told. All numbers are 64-bit integers; a total that would
not fit stops the pass, too, so what it gives is exact.
"""

# ruff: noqa: PLR0917, PLR2004 - by place, as compiled functions are called; bits and powers of two beside their name

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gratis.audit.columns.compiled import Array, compiled, inlined, unsigned, whole

# Why a pass ended.
DONE, NEW_CASE, NEW_WINDOW, NEW_DAY, FULL, TOO_LARGE = range(6)
# What became of a row.
BAD, DECIDED, REPLAYED, CONFLICT = range(4)
# A row of `Terms.numbers`.
REASON, PLACE, ALLOWANCE, FLAGS, FRAME, LASTS, AFTER, BEFORE = range(8)
# The bits of FLAGS.
COUNTS_ALL, EXCESS, IN_TOKENS, UNCACHED, ROLLS = 1, 2, 4, 8, 16
# A row of `Tallies.kept`, and of `Tallies.opened`.
USED, SEQ = range(2)
OPENED, ENDS = range(2)
# A row of `Answers.numbers`, and of `Answers.sums`.
FREE, USED_AFTER, TOTAL, START, END, SEQ_OF = range(6)
REQUESTS, TOKENS, FREE_TOKENS, BILLED_TOKENS, UNMEASURED = range(5)
# A row of `Repeats.firsts`: is it there, what CONFLICT_FIELDS compares, its terms and verdict, and its answer.
IS_THERE, MODEL, AT, PROJECT, INPUT, OUTPUT, CACHED, KIND, TOOLS, TERMS, FITS, ANSWER = range(12)
FIRST_WIDTH = ANSWER + SEQ_OF + 1

TOKENS_MAX = 10**12
TOTAL_MAX = 2**62
AT_END = 221_845_392_000_000_000  # 9000-01-01, in microseconds
DAY = 86_400_000_000
PAGE_BITS = 6
PAGE = 1 << PAGE_BITS
NONE = -1
EMBEDDING = 1
MIX_1 = np.uint64(0x9E3779B97F4A7C15)
MIX_2 = np.uint64(0xC2B2AE3D27D4EB4F)

# Whether it fits, and the six numbers of an answer.
Said = tuple[int, int, int, int, int, int, int]


class Rows(NamedTuple):
    """A batch as numbers. A negative code is a value that is none; counts that are absent are -1.

    Of accounts, projects, kinds, tools and cached tokens an array of no rows stands for nothing but zeros.
    """

    account: Array
    project: Array
    model: Array
    kind: Array
    tools: Array
    at: Array
    given: Array
    made: Array
    cached: Array
    is_bad: Array


class Terms(NamedTuple):
    """What is known of cases, windows and days."""

    class_of: Array
    spans: Array
    span_from: Array
    span_state: Array
    span_last: Array
    keys: Array
    cells: Array
    numbers: Array
    window_first: Array
    window_of: Array
    window_start: Array
    window_end: Array
    window_last: Array
    place_of: Array
    day_of: Array
    line_of: Array


class Tallies(NamedTuple):
    """What is kept of each window, on pages of accounts that came up together; `opened` only where they roll."""

    pages: Array
    kept: Array
    opened: Array
    made: Array


class Repeats(NamedTuple):
    """Which rows share an id with another, by the number of the id, and what was said of the first."""

    number: Array
    firsts: Array


class Answers(NamedTuple):
    """What is said of each row, or in place of it what is said of all of them together."""

    status: Array
    terms: Array
    fits: Array
    numbers: Array
    sums: Array


@inlined
def _slot(keys: Array, high: int, low: int) -> int:
    """Where the case of this key stands, or would stand."""
    mask, one = unsigned(keys.shape[0] - 1), unsigned(1)
    mixed = (np.uint64(high) * MIX_1) ^ (np.uint64(low) * MIX_2)
    place = unsigned((mixed ^ (mixed >> np.uint64(29))) & mask)
    while keys[place, 0] != NONE and (keys[place, 0] != high or keys[place, 1] != low):
        place = (place + one) & mask
    return place


@compiled
def put(keys: Array, cells: Array, high: int, low: int, terms: int) -> None:
    """Remember the terms of a case."""
    place = _slot(keys, high, low)
    keys[place, 0] = high
    keys[place, 1] = low
    cells[place] = terms


@inlined
def _span(spans: Array, span_from: Array, span_last: Array, its: int, at: int) -> int:
    """The span of a history in which an instant lies."""
    last = span_last[its]
    if span_from[last] <= at < span_from[last + 1]:
        return last
    low, high = spans[its], spans[its + 1] - 1
    while high - low > 1:
        middle = (low + high) >> 1
        if span_from[middle] <= at:
            low = middle
        else:
            high = middle
    span_last[its] = low
    return low


@inlined
def _window(firsts: Array, ones: Array, starts: Array, ends: Array, lasts: Array, frame: int, at: int) -> int:
    """The window of a calendar in which an instant falls, or -1 if it is not known yet."""
    last = lasts[frame]
    if last >= 0 and starts[last] <= at < ends[last]:
        return last
    low, high = firsts[frame], firsts[frame + 1]
    while high > low:
        middle = (low + high) >> 1
        if ends[ones[middle]] <= at:
            low = middle + 1
        else:
            high = middle
    if low == firsts[frame + 1] or at < starts[ones[low]]:
        return NONE
    lasts[frame] = ones[low]
    return ones[low]


@inlined
def _tally(pages: Array, made: Array, room: int, place: int, account: int) -> int:
    """Where the tally of an account's window stands; -1 if there is no page left for it."""
    page = whole(pages[place, account >> PAGE_BITS])
    if page < 0:
        page = made[0]
        if (page + 1) << PAGE_BITS > room:
            return NONE
        made[0] = page + 1
        pages[place, account >> PAGE_BITS] = page
    return (page << PAGE_BITS) + (account & (PAGE - 1))


@inlined
def cell(column: Array, row: int) -> int:
    """A number of a column that may be absent: then it is zero."""
    return whole(column[row]) if column.shape[0] > 0 else whole(0)


@inlined
def tokens_of(given: int, made: int, kind: int) -> int:
    """Input and output together; -1 while either is unmeasured. An embedding has no output."""
    if given < 0:
        return NONE
    if made < 0:
        return given if kind == EMBEDDING else NONE
    return given + made


@inlined
def _is_request(rows: Rows, row: int) -> bool:
    """Whether a row is a request: what its columns have no code for, or is out of bounds, is none."""
    codes = (
        cell(rows.account, row)
        | cell(rows.project, row)
        | rows.model[row]
        | cell(rows.kind, row)
        | cell(rows.tools, row)
    )
    at, given, made, cached = rows.at[row], rows.given[row], rows.made[row], cell(rows.cached, row)
    if codes < 0 or at < 0 or at >= AT_END or (rows.is_bad.shape[0] > 0 and rows.is_bad[row]):
        return False
    if given < NONE or given > TOKENS_MAX or made < NONE or made > TOKENS_MAX:
        return False
    if given >= 0 and made >= 0 and given + made > TOKENS_MAX:
        return False
    return cached >= 0 and cached <= max(given, 0)


@inlined
def _key(rows: Rows, row: int, terms: Terms, tokens: int) -> tuple[int, int]:
    """What tells a row's case: its state, project, model, tools and kind, and whether it is unmeasured."""
    history = terms.class_of[cell(rows.account, row)] if terms.spans.shape[0] > 2 else 0
    span = _span(terms.spans, terms.span_from, terms.span_last, history, rows.at[row])
    high = (whole(terms.span_state[span]) << 32) | cell(rows.project, row)
    unmeasured = 1 if tokens < 0 else 0
    return high, (whole(rows.model[row]) << 32) | (cell(rows.tools, row) << 8) | (
        cell(rows.kind, row) << 1
    ) | unmeasured


@inlined
def _weigh(
    numbers: Array, case: int, kept: Array, opened: Array, tally: int,
    at: int, tokens: int, cached: int, start: int, end: int,
) -> Said:  # fmt: skip
    """`rule.decide` in numbers. It fits with 1 and does not with 0; with a negative the total would be too large."""
    flags, allowance, amount, none = numbers[case, FLAGS], numbers[case, ALLOWANCE], whole(1), whole(NONE)
    if flags & IN_TOKENS:
        amount = tokens - cached if flags & UNCACHED else tokens
    used, seq, is_open = kept[tally, USED], kept[tally, SEQ], True
    if flags & ROLLS:
        if at < opened[tally, ENDS]:
            start, end = opened[tally, OPENED], opened[tally, ENDS]
        else:
            used, seq, is_open = whole(0), whole(0), False
            start, end = max(at, numbers[case, AFTER]), min(at + numbers[case, LASTS], numbers[case, BEFORE])
    total = used + amount
    if total > TOTAL_MAX:
        return whole(-TOO_LARGE), none, none, none, none, none, none
    fits = amount <= allowance - used
    free, free_tokens = amount, tokens
    if not fits:
        free = max(whole(0), allowance - used) if flags & EXCESS else whole(0)
        free_tokens = tokens - (amount - free) if (flags & EXCESS) and (flags & IN_TOKENS) else whole(0)
    if not is_open and not fits and free_tokens == 0:
        return whole(0), free_tokens, used, total, none, none, none
    after = used + (amount if flags & COUNTS_ALL else free)
    kept[tally, USED], kept[tally, SEQ] = after, seq + 1
    if flags & ROLLS:
        opened[tally, OPENED], opened[tally, ENDS] = start, end
    return whole(fits), free_tokens, after, total, start, end, seq + 1


@inlined
def _say(numbers: Array, row: int, said: Said) -> None:
    """Write down what is said of a row."""
    _, free, used, total, start, end, seq = said
    numbers[row, FREE], numbers[row, USED_AFTER], numbers[row, TOTAL] = free, used, total
    numbers[row, START], numbers[row, END], numbers[row, SEQ_OF] = start, end, seq


@compiled
def _again(rows: Rows, row: int, repeats: Repeats) -> int:  # noqa: PLR0911 - a line a field
    """The field in which a row differs from the first of its id; -1 if it is the same request."""
    firsts, number = repeats.firsts, repeats.number[row]
    if firsts[number, MODEL] != rows.model[row]:
        return MODEL
    if firsts[number, AT] != rows.at[row]:
        return AT
    if firsts[number, PROJECT] != cell(rows.project, row):
        return PROJECT
    if firsts[number, INPUT] != rows.given[row]:
        return INPUT
    if firsts[number, OUTPUT] != rows.made[row]:
        return OUTPUT
    if firsts[number, CACHED] != cell(rows.cached, row):
        return CACHED
    if firsts[number, KIND] != cell(rows.kind, row):
        return KIND
    if firsts[number, TOOLS] != cell(rows.tools, row):
        return TOOLS
    return NONE


@compiled
def _remember(rows: Rows, row: int, repeats: Repeats, case: int, said: Said) -> None:
    """Keep the first decision of an id that comes again."""
    firsts, number = repeats.firsts, repeats.number[row]
    firsts[number, IS_THERE], firsts[number, MODEL], firsts[number, AT] = 1, rows.model[row], rows.at[row]
    firsts[number, PROJECT], firsts[number, INPUT] = cell(rows.project, row), rows.given[row]
    firsts[number, OUTPUT], firsts[number, CACHED] = rows.made[row], cell(rows.cached, row)
    firsts[number, KIND], firsts[number, TOOLS] = cell(rows.kind, row), cell(rows.tools, row)
    firsts[number, TERMS], firsts[number, FITS] = case, said[0]
    _say(firsts[:, ANSWER:], number, said)


@inlined
def _settle(rows: Rows, row: int, terms: Terms, tallies: Tallies, case: int, tokens: int) -> Said:
    """Decide a row of a known case; with a negative first number, it is why it cannot be decided yet."""
    numbers, at, window, none = terms.numbers, rows.at[row], 0, whole(NONE)
    if numbers[case, REASON] >= 0:
        return whole(0), whole(0), none, none, none, none, none
    if not numbers[case, FLAGS] & ROLLS:
        window = _window(
            terms.window_first, terms.window_of, terms.window_start, terms.window_end, terms.window_last,
            numbers[case, FRAME], at,
        )  # fmt: skip
    place = terms.place_of[numbers[case, PLACE], window] if window >= 0 else NONE
    if place < 0:
        return whole(-NEW_WINDOW), none, none, none, none, none, none
    tally = _tally(tallies.pages, tallies.made, tallies.kept.shape[0], place, cell(rows.account, row))
    if tally < 0:
        return whole(-FULL), none, none, none, none, none, none
    return _weigh(
        numbers, case, tallies.kept, tallies.opened, unsigned(tally), at, tokens, cell(rows.cached, row),
        terms.window_start[window], terms.window_end[window],
    )  # fmt: skip


@inlined
def _add(sums: Array, day: int, line: int, tokens: int, free: int, fits: int) -> None:
    """Add a decision to its day's sums."""
    sums[day, line, REQUESTS] += 1
    if tokens < 0:
        sums[day, line, UNMEASURED] += 1
        return
    sums[day, line, TOKENS] += tokens
    sums[day, line, FREE_TOKENS] += free
    if fits == 0:
        sums[day, line, BILLED_TOKENS] += tokens - free


@compiled
def case_at(rows: Rows, row: int, terms: Terms) -> tuple[int, int, int]:
    """The key of a row's case, and its terms if they are known."""
    high, low = _key(rows, row, terms, tokens_of(rows.given[row], rows.made[row], cell(rows.kind, row)))
    return high, low, whole(terms.cells[_slot(terms.keys, high, low)])


@compiled
def judge(  # noqa: C901 - the one loop over all rows, a branch each way out of it
    begin: int, rows: Rows, terms: Terms, tallies: Tallies, repeats: Repeats, answers: Answers
) -> tuple[int, int]:
    """Decide the rows from `begin` on; where it stopped, and why."""
    status = answers.status
    is_full, has_repeats = answers.numbers.shape[0] > 0, repeats.number.shape[0] > 0
    day, day_starts = whole(0), whole(AT_END)
    for place in range(begin, rows.at.shape[0]):
        row = unsigned(place)  # an index that cannot be negative is not looked at for that
        if not _is_request(rows, row):
            status[row] = BAD
            continue
        if not is_full and not 0 <= rows.at[row] - day_starts < DAY:
            day, day_starts = whole(terms.day_of[rows.at[row] // DAY]), rows.at[row] // DAY * DAY
            if day < 0:
                return place, NEW_DAY
        number = repeats.number[row] if has_repeats else NONE
        if number >= 0 and repeats.firsts[number, IS_THERE]:
            field = _again(rows, row, repeats)
            status[row] = REPLAYED if field < 0 else CONFLICT + field
            if field < 0 and is_full:
                answers.terms[row], answers.fits[row] = repeats.firsts[number, TERMS], repeats.firsts[number, FITS]
                for one in range(SEQ_OF + 1):
                    answers.numbers[row, one] = repeats.firsts[number, ANSWER + one]
            continue
        tokens = tokens_of(rows.given[row], rows.made[row], cell(rows.kind, row))
        high, low = _key(rows, row, terms, tokens)
        slot = _slot(terms.keys, high, low)
        if terms.keys[slot, 0] == NONE:
            return place, NEW_CASE
        case = terms.cells[slot]
        said = _settle(rows, row, terms, tallies, case, tokens)
        if said[0] < 0:
            return place, -said[0]
        status[row] = DECIDED
        if number >= 0:
            _remember(rows, row, repeats, case, said)
        if is_full:
            answers.terms[row], answers.fits[row] = case, said[0]
            _say(answers.numbers, row, said)
        else:
            _add(answers.sums, day, terms.line_of[case, said[0]], tokens, said[1], said[0])
    return rows.at.shape[0], DONE
