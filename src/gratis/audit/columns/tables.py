"""Tables of requests in, tables of decisions out: the same decisions as `gratis.audit.replay` makes row by row.

`Judge` takes the batches of a log in order and keeps only what `replay` keeps: a tally a window, and what is known of
ids. `decide_table` judges a table at once. No account's decisions depend on another's, so an engine that groups a log
by account may hand over each group by itself, in the order of its rows, on as many machines as it has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gratis.audit.columns import kernel
from gratis.audit.columns.answers import (
    ALLOWANCE,
    BILLED,
    END,
    FREE,
    GROUP,
    REASON,
    REMAINING,
    REVISION,
    SAID,
    SEQ,
    START,
    TOKENS,
    TOTAL,
    USED,
    VERDICT,
    integers,
    spread,
    words,
)  # fmt: skip
from gratis.audit.columns.cases import REASONS, Cases
from gratis.audit.columns.reading import Reader, column
from gratis.audit.columns.repeats import NO_REPEATS, Finder, Repeated
from gratis.audit.columns.texts import frozen
from gratis.errors import Conflict, GratisError, RequestError
from gratis.model import KINDS, Decision, Durability, Reason, Request, Terms, Window, from_micros

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from gratis.audit.columns.cases import Said
    from gratis.audit.columns.compiled import Array
    from gratis.model import Change, Enrollment
    from gratis.offer import Offer

ROWS_MAX = 1 << 20  # sums of so many rows fit into 64 bits
PAGES_MIN = 1 << 10
WORD = pa.dictionary(pa.int32(), pa.string())
TIME = pa.timestamp("us", "UTC")
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "account": pa.string(),
        "verdict": WORD,
        "reason": WORD,
        "group": WORD,
        "tokens": pa.int64(),
        "free_tokens": pa.int64(),
        "billed_tokens": pa.int64(),
        "allowance": pa.int64(),
        "total": pa.int64(),
        "used": pa.int64(),
        "remaining": pa.int64(),
        "window_start": TIME,
        "window_end": TIME,
        "seq": pa.int64(),
        "offer": WORD,
        "revision": WORD,
        "at": TIME,
        "replayed": pa.bool_(),
    }
)
COMPARED = {
    kernel.MODEL: "model",
    kernel.AT: "at",
    kernel.PROJECT: "project",
    kernel.INPUT: "input_tokens",
    kernel.OUTPUT: "output_tokens",
    kernel.CACHED: "cached_tokens",
    kernel.KIND: "kind",
    kernel.TOOLS: "tools",
}
_KIND_NAMES = tuple(KINDS)


def decide_table(
    table: pa.Table,
    offer: Offer,
    *,
    assume: Enrollment | None = None,
    changes: Mapping[str, Sequence[Change]] | None = None,
    zone: str | None = None,
    on_error: Callable[[int, RequestError], None] | None = None,
) -> pa.Table:
    """The decisions on the requests of a table, in its order, as `Replay` gives them.

    A row that is no request, or whose id was decided with other content, is told to `on_error` by its number, from 1
    on, and has no decision; without `on_error` it is raised. No other table's accounts matter, so whatever engine
    groups a log by account runs this on each group. On DuckDB, Polars, Ray, Dask or Spark that is, with a function
    `judged = partial(decide_table, offer=load("openai-data-sharing"), assume=enrollment)`:

        polars.from_arrow(log).group_by("account").map_groups(lambda rows: polars.from_arrow(judged(rows.to_arrow())))
        ray.data.read_parquet(path).groupby("account").map_groups(judged, batch_format="pyarrow")
        spark.read.parquet(path).groupBy("account").applyInArrow(judged, schema)

    The rows of an account have to come in the order of the log: sort each group by its row number where the engine
    does not keep it.
    """
    with Finder() as finder:
        repeats = NO_REPEATS
        if table.schema.get_field_index("id") >= 0:
            for batch in batches_of(table):
                finder.add(batch)
            repeats = finder.found(lambda: batches_of(table))
        judge = Judge(offer, assume=assume, changes=changes, zone=zone, repeats=repeats, on_error=on_error)
        return pa.Table.from_batches([judge.decide(batch) for batch in batches_of(table)], SCHEMA)


def batches_of(table: pa.Table) -> Iterator[pa.RecordBatch]:
    """The rows of a table, so many together."""
    yield from table.to_batches(max_chunksize=ROWS_MAX)


class Judge:
    """Judges the batches of one log, in their order."""

    def __init__(
        self,
        offer: Offer,
        *,
        assume: Enrollment | None = None,
        changes: Mapping[str, Sequence[Change]] | None = None,
        zone: str | None = None,
        repeats: Repeated = NO_REPEATS,
        on_error: Callable[[int, RequestError], None] | None = None,
    ) -> None:
        self._cases = Cases(offer, assume=assume, changes=changes)
        self._reader = Reader(zone=zone)
        self._repeats = repeats
        self._on_error = on_error
        self._enrolled = 0
        self._pages: Array = np.full((1, 1), kernel.NONE, np.int32)
        self._kept: Array = np.zeros((PAGES_MIN << kernel.PAGE_BITS, 2), np.int64)
        self._opened: Array = np.zeros_like(self._kept)
        self._made: Array = np.zeros(1, np.int64)
        self._sums: Array = np.zeros((1, 1, 5), np.int64)
        self._totals: dict[tuple[int, str | None, str], list[int]] = {}
        self._words = _words(offer)
        self._said: Array = np.zeros((1, SAID), np.int64)
        self._is_said = 0
        self.rows = 0
        self.errors = 0
        self.replayed = 0

    def decide(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The decisions on the next rows; those that are none are left out."""
        parts = [self._decide(part) for part in _parts(batch)]
        return parts[0] if len(parts) == 1 else pa.Table.from_batches(parts, SCHEMA).combine_chunks().to_batches()[0]

    def add(self, batch: pa.RecordBatch) -> None:
        """Judge the next rows, and add them to the totals."""
        for part in _parts(batch):
            rows = self._reader.rows(part)
            answers = kernel.Answers(
                status=np.empty(part.num_rows, np.int8),
                terms=np.zeros(0, np.int32),
                fits=np.zeros(0, np.int8),
                numbers=np.zeros((0, 6), np.int64),
                sums=self._sums,
            )
            answers = self._judge(part, rows, answers)
            self._take(answers.sums)
            self._finish(part, answers.status)

    def totals(self) -> list[dict[str, Any]]:
        """Requests and tokens by UTC day, group and reason."""
        return [
            {
                "day": from_micros(day * kernel.DAY).date().isoformat(),
                "group": group,
                "reason": reason,
                "requests": sums[kernel.REQUESTS],
                "unmeasured": sums[kernel.UNMEASURED],
                "tokens": sums[kernel.TOKENS],
                "free_tokens": sums[kernel.FREE_TOKENS],
                "billed_tokens": sums[kernel.BILLED_TOKENS],
            }
            for (day, group, reason), sums in sorted(self._totals.items(), key=_by_day)
        ]

    def _decide(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        rows, size = self._reader.rows(batch), batch.num_rows
        answers = kernel.Answers(
            status=np.empty(size, np.int8),
            terms=np.zeros(size, np.int32),
            fits=np.zeros(size, np.int8),
            numbers=np.zeros((max(size, 1), 6), np.int64),
            sums=self._sums,
        )
        answers = self._judge(batch, rows, answers)
        table = self._table(batch, rows, answers)
        if self._finish(batch, answers.status):
            table = table.filter(pa.array(_is_decided(answers.status)))
        return table

    def _judge(self, batch: pa.RecordBatch, rows: kernel.Rows, answers: kernel.Answers) -> kernel.Answers:
        """Run the kernel over a batch; tell it what it does not know, wherever it stops."""
        cases = self._cases
        names = self._reader.accounts.values
        if self._enrolled < len(names):
            cases.enroll(names[self._enrolled :])
            self._enrolled = len(names)
        repeats = kernel.Repeats(frozen(self._repeats.of(self.rows, batch)), self._repeats.firsts)
        row, why = 0, kernel.NEW_CASE
        while why != kernel.DONE:
            answers = answers._replace(sums=self._room(answers.sums))
            tallies = kernel.Tallies(self._pages, self._kept, self._opened, self._made)
            row, why = kernel.judge(row, rows, cases.numbers, tallies, repeats, answers)
            if why == kernel.DONE:
                break
            at = int(rows.at[row])
            high, low, terms = kernel.case_at(rows, row, cases.numbers)
            if why == kernel.NEW_CASE:
                cases.learn_case(self._reader.request(batch, row, self.rows + row + 1), high, low)
            elif why == kernel.NEW_WINDOW:
                cases.learn_window(terms, at)
            elif why == kernel.NEW_DAY:
                cases.learn_day(at)
            elif why == kernel.FULL:
                self._kept = np.concatenate([self._kept, np.zeros_like(self._kept)])
                self._opened = np.concatenate([self._opened, np.zeros_like(self._opened)])
            else:
                where = f"row {self.rows + row + 1}"
                raise GratisError(f"{where}: what is used passes 2^62; expected totals that 64 bits can hold")
        return answers

    def _room(self, sums: Array) -> Array:
        """Room for each account's page in each window, and for each line of the totals."""
        cases = self._cases
        rows, columns = cases.places + 1, (len(self._reader.accounts.values) >> kernel.PAGE_BITS) + 1
        had = self._pages.shape
        if rows > had[0] or columns > had[1]:
            grown = np.full((_more(rows, had[0]), _more(columns, had[1])), kernel.NONE, np.int32)
            grown[: had[0], : had[1]] = self._pages
            self._pages = grown
        had = sums.shape[:2]
        if len(cases.days) > had[0] or len(cases.lines) > had[1]:
            grown = np.zeros((_more(len(cases.days), had[0]), _more(len(cases.lines), had[1]), 5), np.int64)
            grown[: had[0], : had[1]] = sums
            self._sums = grown
        return self._sums

    def _take(self, sums: Array) -> None:
        """Move the sums of a batch to totals that have no bound."""
        for day, line in np.argwhere(sums[:, :, kernel.REQUESTS]):
            key = (self._cases.days[day], *self._cases.lines[line])
            total = self._totals.setdefault(key, [0] * 5)
            for place, value in enumerate(sums[day, line]):
                total[place] += int(value)
        sums[:] = 0

    def _finish(self, batch: pa.RecordBatch, status: Array) -> int:
        """Tell of the rows that have no decision; how many they are."""
        found = np.flatnonzero(~_is_decided(status))
        begin, self.rows = self.rows, self.rows + batch.num_rows
        self.errors += found.size
        if self._repeats.count:
            self.replayed += int((status == kernel.REPLAYED).sum())
        for row in map(int, found):
            error = self._error(batch, row, begin, int(status[row]))
            if self._on_error is None:
                raise GratisError(f"row {begin + row + 1}: {error}") from error
            self._on_error(begin + row + 1, error)
        return int(found.size)

    def _error(self, batch: pa.RecordBatch, row: int, begin: int, status: int) -> RequestError:
        """What is wrong with a row."""
        try:
            request = self._reader.request(batch, row, begin + row + 1)
        except RequestError as error:
            return error
        assert status >= kernel.CONFLICT, "what the kernel refuses is no request"
        first = self._repeats.firsts[self._repeats.of(begin, batch)[row]]
        return Conflict(COMPARED[status - kernel.CONFLICT], self._first(request, [int(value) for value in first]))

    def _first(self, request: Request, first: list[int]) -> Decision:
        """The decision that was made of an id before."""
        reader, said = self._reader, self._cases.said[first[kernel.TERMS]]
        free, used, total, start, end, seq = (None if value < 0 else value for value in first[kernel.ANSWER :])
        known = Request(
            id=request.id,
            account=request.account,
            model=reader.models.value(first[kernel.MODEL]),
            at=from_micros(first[kernel.AT]),
            input_tokens=None if first[kernel.INPUT] < 0 else first[kernel.INPUT],
            output_tokens=None if first[kernel.OUTPUT] < 0 else first[kernel.OUTPUT],
            cached_tokens=first[kernel.CACHED],
            project=reader.projects.value(first[kernel.PROJECT]),
            kind=KINDS[_KIND_NAMES[first[kernel.KIND]]],
            tools=reader.tools.value(first[kernel.TOOLS]),
        )
        verdict = Reason.WITHIN_ALLOWANCE if first[kernel.FITS] else Reason.OVER_ALLOWANCE
        reason = verdict if said.reason is None else Reason(said.reason)
        window = None if start is None or end is None else Window(from_micros(start), from_micros(end))
        terms = Terms(self._cases.offer.name, said.revision, None, None, group=said.group, allowance=said.allowance)
        return Decision(known, terms, reason, free, used, total, window, seq, Durability.VOLATILE)

    def _table(self, batch: pa.RecordBatch, rows: kernel.Rows, answers: kernel.Answers) -> pa.RecordBatch:
        """The decisions as columns."""
        if self._is_said < len(self._cases.said):
            self._is_said = len(self._cases.said)
            self._said = np.array([_said_by(one, self._words) for one in self._cases.said], np.int64)
        numbers, codes = spread(rows, answers, self._said)
        columns = [
            _ids(batch, self.rows),
            _accounts(batch),
            words(codes[VERDICT], ["billed", "free"]),
            words(codes[REASON], REASONS),
            words(codes[GROUP], self._words),
            integers(numbers[TOKENS]),
            integers(numbers[FREE]),
            integers(numbers[BILLED]),
            integers(numbers[ALLOWANCE]),
            integers(numbers[TOTAL]),
            integers(numbers[USED]),
            integers(numbers[REMAINING]),
            integers(numbers[START]).view(TIME),
            integers(numbers[END]).view(TIME),
            integers(numbers[SEQ]),
            words(np.zeros(batch.num_rows, np.int32), [self._cases.offer.name]),
            words(codes[REVISION], self._words),
            pa.array(rows.at).view(TIME),
            pa.array(answers.status == kernel.REPLAYED),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


_OVER, _WITHIN = REASONS.index(Reason.OVER_ALLOWANCE), REASONS.index(Reason.WITHIN_ALLOWANCE)


def _parts(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    for begin in range(0, max(batch.num_rows, 1), ROWS_MAX):
        yield batch.slice(begin, ROWS_MAX)


def _by_day(item: tuple[tuple[int, str | None, str], list[int]]) -> tuple[int, str, str]:
    day, group, reason = item[0]
    return day, group or "", reason


def _more(needed: int, had: int) -> int:
    return had if needed <= had else max(needed, 2 * had)


def _is_decided(status: Array) -> Array:
    decided: Array = (status == kernel.DECIDED) | (status == kernel.REPLAYED)
    return decided


def _words(offer: Offer) -> list[str]:
    """Each name of a group or a revision."""
    names = {group.name for revision in offer.revisions for group in revision.groups}
    names.update(revision.name for revision in offer.revisions)
    return sorted(names)


def _said_by(one: Said, names: list[str]) -> list[int]:
    """What terms say, as the places of it."""
    reasons = (_OVER, _WITHIN) if one.reason is None else (REASONS.index(Reason(one.reason)),) * 2
    named = [kernel.NONE if name is None else names.index(name) for name in (one.group, one.revision)]
    return [*reasons, *named, one.allowance if one.reason is None else kernel.NONE]


def _ids(batch: pa.RecordBatch, begin: int) -> Any:
    cells = column(batch, "id")
    if cells is None:
        return pa.array(np.arange(begin + 1, begin + batch.num_rows + 1)).cast(pa.string())
    return cells.cast(pa.string())


def _accounts(batch: pa.RecordBatch) -> Any:
    cells = column(batch, "account")
    if cells is None or pa.types.is_null(cells.type):
        return pa.array(["default"] * batch.num_rows, pa.string())
    return pc.fill_null(cells.cast(pa.string()), "default")
