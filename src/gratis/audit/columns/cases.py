"""Which terms hold for the rows of a log: asked of `classify.py` once for each distinct case, and kept as numbers.

Names become codes in the order in which they come up; an account's history of enrollments becomes spans of time in
each of which one enrollment and one revision are in force; calendars become windows as rows fall into them.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from msgspec.structs import replace

from gratis.audit.columns import kernel
from gratis.classify import case_of, window_at
from gratis.enrollment import in_force, takes_part
from gratis.errors import RequestError
from gratis.model import (
    AT_MAX,
    AT_MIN,
    KINDS,
    Counts,
    Kind,
    Overage,
    Reason,
    Request,
    Unit,
    from_micros,
    micros,
)
from gratis.window import Rolling

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime

    from gratis.audit.columns.compiled import Array
    from gratis.classify import Case
    from gratis.model import Change, Enrollment
    from gratis.offer import Offer, Revision

BAD = -1
CELLS_MIN = 1 << 12
NEVER = np.iinfo(np.int64).max
KIND_CODES = {name: code for code, name in enumerate(KINDS)}
REASONS = tuple(Reason)
REASON_CODES = {reason: code for code, reason in enumerate(REASONS)}
assert KIND_CODES[Kind.EMBEDDING] == kernel.EMBEDDING, "the kernel knows what has no output"
assert micros(AT_MAX) == kernel.AT_END, "and when time ends"


class State(NamedTuple):
    """An enrollment, and an instant at which it and a revision are in force."""

    enrollment: Enrollment | None
    at: datetime


class Said(NamedTuple):
    """What the terms of a case say in a decision, beside its numbers."""

    reason: str | None
    group: str | None
    revision: str | None
    allowance: int


class Names:
    """Values of a column, and their codes. One that is none has the code -1."""

    def __init__(self, check: Callable[[Any], Any], first: int = 0) -> None:
        self._check = check
        self.first = first
        self.codes: dict[Any, int] = {}
        self.values: list[Any] = []

    def code(self, value: Any) -> int:
        """The code of a value."""
        found = self.codes.get(value)
        if found is not None:
            return found
        try:
            clean = self._check(value)
        except RequestError:
            return BAD
        code = self.codes.get(clean)
        if code is None:
            code = self.codes[clean] = len(self.values) + self.first
            self.values.append(clean)
        return code

    def value(self, code: int) -> Any:
        """The value of a code; None for a code that stands for nothing."""
        return self.values[code - self.first] if code >= self.first else None


class Table:
    """Rows of numbers that grow by doubling."""

    def __init__(self, width: int, *, dtype: type = np.int64, fill: int = 0, rows: int = 64) -> None:
        self._fill = fill
        self.array: Array = np.full((rows, width) if width else rows, fill, dtype)
        self.count = 0

    def reserve(self, count: int) -> Array:
        """At least so many rows."""
        rows = self.array.shape[0]
        if count > rows:
            grown = np.full((max(count, 2 * rows), *self.array.shape[1:]), self._fill, self.array.dtype)
            grown[:rows] = self.array
            self.array = grown
        return self.array

    def add(self, *values: int) -> int:
        """One more row; its number."""
        self.reserve(self.count + 1)
        self.array[self.count] = values if len(values) > 1 else values[0]
        self.count += 1
        return self.count - 1


class Cases:
    """The cases of one offer under one reading, and which enrollments are in force."""

    def __init__(
        self, offer: Offer, *, assume: Enrollment | None = None, changes: Mapping[str, Sequence[Change]] | None = None
    ) -> None:
        self.offer = offer
        self._assume = assume
        self._changes = changes or {}
        self._states: dict[tuple[Any, ...], int] = {}
        self.states: list[State] = []
        self._classes: dict[tuple[Change, ...], int] = {}
        self._spans = [0]
        self._span_from: list[int] = []
        self._span_state: list[int] = []
        self._class_of = Table(0, dtype=np.int32)
        self._keys: Array = np.full((CELLS_MIN, 2), kernel.NONE, np.int64)
        self._cells: Array = np.zeros(CELLS_MIN, np.int32)
        self._cells_used = 0
        self._numbers = Table(8)
        self._terms: dict[tuple[Any, ...], int] = {}
        self.said: list[Said] = []
        self._places: dict[tuple[Any, ...], int] = {}
        self._place_codes: dict[tuple[Any, ...], int] = {}
        self._frames: dict[tuple[Any, ...], int] = {}
        self._revisions: list[Revision] = []
        self._frame_windows: list[list[tuple[int, int, int]]] = []
        self._windows: list[tuple[int, int]] = [(0, 0)]  # the first stands for the windows that roll
        self._place_of: Array = np.full((4, 64), kernel.NONE, np.int32)
        self._day_of: Array = np.full(kernel.AT_END // kernel.DAY, kernel.NONE, np.int32)
        self.days: list[int] = []
        self._lines: dict[tuple[str | None, str], int] = {}
        self.lines: list[tuple[str | None, str]] = []
        self._line_of = Table(2, dtype=np.int32)
        self._class(())
        self.numbers = self._tables()

    @property
    def places(self) -> int:
        """How many tallies one account can have: a group's in a window."""
        return len(self._places)

    def enroll(self, accounts: Sequence[str]) -> None:
        """Learn which history each of the next accounts has."""
        if not self._changes:
            self._class_of.reserve(self._class_of.count + len(accounts))
            self._class_of.count += len(accounts)
        else:
            for account in accounts:
                self._class_of.add(self._class(tuple(self._changes.get(account) or ())))
        self.numbers = self.numbers._replace(**self._of_histories())

    def learn_case(self, request: Request, high: int, low: int) -> None:
        """Ask what holds for requests like this one."""
        enrollment, at = self.states[high >> 32]
        case = case_of(self.offer, _like(request, at), enrollment)
        terms = self._code(case)
        if 2 * (self._cells_used + 1) > self._cells.size:
            self._grow()
        kernel.put(self._keys, self._cells, high, low, terms)
        self._cells_used += 1
        self.numbers = self.numbers._replace(
            keys=self._keys, cells=self._cells, numbers=self._numbers.array, line_of=self._line_of.array
        )
        self._make_room()
        if len(self._frames) != self.numbers.window_last.size or self._place_of is not self.numbers.place_of:
            self.numbers = self.numbers._replace(**self._of_windows())

    def learn_window(self, row_terms: int, at: int) -> None:
        """Learn the window of an instant, and where the tallies of a group in it stand."""
        numbers = self._numbers.array[row_terms]
        place, window = int(numbers[kernel.PLACE]), 0
        key: tuple[Any, ...] = (place,)
        if not numbers[kernel.FLAGS] & kernel.ROLLS:
            window = self._window(int(numbers[kernel.FRAME]), at)
            key = (place, self._windows[window][0])
        self._make_room()
        self._place_of[place, window] = self._places.setdefault(key, len(self._places))
        self.numbers = self.numbers._replace(**self._of_windows())

    def _make_room(self) -> None:
        """Room for each group in each window, known or not: the kernel looks before anything is learned of it."""
        rows, columns = self._place_of.shape
        if len(self._place_codes) > rows or len(self._windows) > columns:
            shape = (max(rows, 2 * len(self._place_codes)), max(columns, 2 * len(self._windows)))
            grown = np.full(shape, kernel.NONE, np.int32)
            grown[:rows, :columns] = self._place_of
            self._place_of = grown

    def learn_day(self, at: int) -> None:
        """Learn that there are rows of a UTC day."""
        day = at // kernel.DAY
        self._day_of[day] = len(self.days)
        self.days.append(day)

    def _class(self, history: tuple[Change, ...]) -> int:
        """The number of a history: from when on which enrollment and revision are in force."""
        found = self._classes.get(history)
        if found is not None:
            return found
        enrollments = [change.enrollment for change in history] or ([self._assume] if self._assume else [])
        edges = {AT_MIN}
        edges.update(change.at for change in history)
        for revision in self.offer.revisions:
            edges.update(edge for edge in (revision.starts, revision.ends) if edge is not None)
        for one in enrollments:
            edges.update(edge for edge in (one.starts, one.ends) if edge is not None)
        for at in sorted(edge for edge in edges if AT_MIN <= edge < AT_MAX):
            change = in_force(history, at) if history else None
            enrollment = (None if change is None else change.enrollment) if history else self._assume
            self._span_from.append(micros(at))
            self._span_state.append(self._state(enrollment, at))
        self._span_from.append(NEVER)  # stands between this history and the next one
        self._span_state.append(0)
        self._spans.append(len(self._span_from))
        return self._classes.setdefault(history, len(self._classes))

    def _state(self, enrollment: Enrollment | None, at: datetime) -> int:
        revision = self.offer.at(at)
        if enrollment is not None and enrollment.owners:
            enrollment = replace(enrollment, owners=frozenset())  # who may change it decides nothing
        key = (enrollment, takes_part(enrollment, at), None if revision is None else revision.starts)
        state = self._states.setdefault(key, len(self._states))
        if state == len(self.states):
            self.states.append(State(enrollment, at))
        return state

    def _code(self, case: Case) -> int:
        """The number of the terms of a case."""
        terms, group, revision = case.terms, case.group, case.revision
        is_cached = group is None or group.counts_cached_input
        key = (terms.revision, terms.reason, terms.group, terms.allowance, is_cached)
        found = self._terms.get(key)
        if found is not None:
            return found
        if terms.reason is not None or revision is None:
            assert terms.reason is not None, "outside of an offer's time there is a reason"
            self._numbers.add(REASON_CODES[terms.reason], 0, 0, 0, 0, 0, 0, 0)
        else:
            rolls = isinstance(revision.window, Rolling)
            flags = (
                kernel.COUNTS_ALL * (terms.counts is Counts.ALL)
                + kernel.EXCESS * (terms.overage is Overage.EXCESS)
                + kernel.IN_TOKENS * (terms.unit is Unit.TOKENS)
                + kernel.UNCACHED * (not is_cached)
                + kernel.ROLLS * rolls
            )
            place = self._place_codes.setdefault((terms.group, terms.window), len(self._place_codes))
            lasts = revision.window.hours * 3_600_000_000 if isinstance(revision.window, Rolling) else 0
            after = 0 if revision.after is None else micros(revision.after)
            before = NEVER if revision.before is None else micros(revision.before)
            self._numbers.add(kernel.NONE, place, terms.allowance, flags, self._frame(revision), lasts, after, before)
        self._add_said(case)
        return self._terms.setdefault(key, len(self._terms))

    def _add_said(self, case: Case) -> None:
        terms = case.terms
        self.said.append(Said(terms.reason, terms.group, terms.revision, terms.allowance))
        reasons = (Reason.OVER_ALLOWANCE, Reason.WITHIN_ALLOWANCE) if terms.reason is None else (terms.reason,) * 2
        numbers = []
        for reason in reasons:
            number = self._lines.setdefault((terms.group, reason.value), len(self._lines))
            if number == len(self.lines):
                self.lines.append((terms.group, reason.value))
            numbers.append(number)
        self._line_of.add(*numbers)

    def _frame(self, revision: Revision) -> int:
        """The number of a calendar, as far as it reaches."""
        key = (str(revision.window), revision.after, revision.before)
        found = self._frames.setdefault(key, len(self._frames))
        if found == len(self._revisions):
            self._revisions.append(revision)
            self._frame_windows.append([])
        return found

    def _window(self, frame: int, at: int) -> int:
        """The number of the window in which an instant falls."""
        known = self._frame_windows[frame]
        place = bisect_right(known, (at, NEVER, 0))
        if place and known[place - 1][0] <= at < known[place - 1][1]:
            return known[place - 1][2]
        window = window_at(self._revisions[frame], from_micros(at))
        start, end, number = micros(window.start), micros(window.end), len(self._windows)
        self._windows.append((start, end))
        insort(known, (start, end, number))
        return number

    def _grow(self) -> None:
        keys, cells = self._keys, self._cells
        self._keys = np.full((2 * cells.size, 2), kernel.NONE, np.int64)
        self._cells = np.zeros(2 * cells.size, np.int32)
        for place in np.flatnonzero(keys[:, 0] != kernel.NONE):
            kernel.put(self._keys, self._cells, keys[place, 0], keys[place, 1], cells[place])

    def _of_histories(self) -> dict[str, Array]:
        return {
            "class_of": self._class_of.array,
            "spans": np.array(self._spans, np.int64),
            "span_from": np.array(self._span_from, np.int64),
            "span_state": np.array(self._span_state, np.int32),
            "span_last": np.array(self._spans[:-1], np.int64),
        }

    def _of_windows(self) -> dict[str, Array]:
        windows = np.array(self._windows, np.int64)
        return {
            "window_first": np.cumsum([0, *map(len, self._frame_windows)], dtype=np.int64),
            "window_of": np.array([window[2] for known in self._frame_windows for window in known], np.int64),
            "window_start": windows[:, 0].copy(),
            "window_end": windows[:, 1].copy(),
            "window_last": np.full(len(self._frames), kernel.NONE, np.int64),
            "place_of": self._place_of,
        }

    def _tables(self) -> kernel.Terms:
        """All of it as the kernel reads it."""
        return kernel.Terms(
            **self._of_histories(),
            keys=self._keys,
            cells=self._cells,
            numbers=self._numbers.array,
            **self._of_windows(),
            day_of=self._day_of,
            line_of=self._line_of.array,
        )


def _like(request: Request, at: datetime) -> Request:
    """The same request at an instant of its state."""
    return Request(
        id="1",
        model=request.model,
        at=at,
        input_tokens=request.input_tokens,
        output_tokens=request.output_tokens,
        project=request.project,
        kind=request.kind,
        tools=request.tools,
    )
