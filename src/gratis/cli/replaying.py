"""`gratis replay`: a log judged in order, row by row or as columns, and what becomes of its decisions."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from gratis.audit.replay import Replay
from gratis.cli import report, sheets
from gratis.cli.decisions import BAD_INPUT, COLUMNS, assumed, histories, judged, requests_in
from gratis.cli.screen import Listing, is_table, number as spelled, table
from gratis.cli.streams import Complaints, Output, Progress, batches, parsed, reading
from gratis.errors import GratisError, RequestError
from gratis.lines import decision_fields, encode, request_of
from gratis.offers import load

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from gratis.audit.columns.tables import Judge
    from gratis.audit.story import Story
    from gratis.cli.decisions import Read
    from gratis.model import Change, Decision, Enrollment
    from gratis.offer import Offer

SUFFIXES = {".csv": "csv", ".parquet": "parquet", ".jsonl": "json", ".json": "json"}
TOTALS = ("day", "group", "reason", "requests", "unmeasured", "tokens", "free_tokens", "billed_tokens")
LARGE_BYTES = 32 << 20  # below it loading what is compiled takes longer than it saves
PARQUET = b"PAR1"  # how such a file begins, whatever its name
NAMED = 3  # of them name a line; the others are numbers
Totals = dict[tuple[str, str | None, str], list[int]]


def replay(arguments: argparse.Namespace) -> int:
    """Judge a log in order; keeps nothing."""
    if arguments.tier is None and arguments.enrollments is None:
        raise GratisError("replay: expected --tier N, or --enrollments FILE: who takes part, and at which tier?")
    offer = load(arguments.offer).reading(counts=arguments.counts, overage=arguments.overage)
    changes = {} if arguments.enrollments is None else histories(arguments.enrollments, offer.name)
    form = _form(arguments)
    report.apart(arguments.out, _read(arguments), option="--out")
    if arguments.responses and form != "json":
        raise GratisError("--responses: expected JSON lines")
    if form == "parquet":
        _needs_columns(arguments.file)
    elif arguments.trust_ids or arguments.zone is not None:
        raise GratisError(f"--{'zone' if arguments.zone else 'trust-ids'}: expected with Parquet only")
    if arguments.html is None and form == "parquet":
        return _by_columns(arguments, offer, assumed(arguments), changes)
    if arguments.html is None and form == "json" and _is_large(arguments):
        return _by_spool(arguments, offer, assumed(arguments), changes)
    return _by_rows(arguments, form, Replay(offer, assume=assumed(arguments), changes=changes))


def _by_rows(arguments: argparse.Namespace, form: str, judge: Replay) -> int:
    """Judge one request after the other; a report, which tells of models and prices, is told so, too."""
    offer = load(arguments.offer)
    complain = _Rows(arguments.file) if form == "parquet" else Complaints(arguments.file)
    story = report.begin(arguments.html, f"{offer.title}, replayed", offer.name, reads=_read(arguments))
    try:
        with ExitStack() as stack:
            answers = stack.enter_context(Answers(arguments, story))
            code = judged(_source(arguments, form, stack), judge.decide_many, answers.decisions, complain)
        report.end(arguments.html, story)
        return code
    finally:
        judge.close()


def _read(arguments: argparse.Namespace) -> list[str]:
    """The files that are read: what is written takes the place of none."""
    return [name for name in (arguments.file, arguments.enrollments, arguments.offer) if name is not None]


def _source(arguments: argparse.Namespace, form: str, stack: ExitStack) -> Iterator[list[Read]]:
    """The requests of a log with their numbers, some at a time."""
    if form == "parquet":
        from gratis.audit.columns.logs import Log, requests  # noqa: PLC0415 - an extra, loaded where it is used

        return requests(Log([arguments.file], zone=arguments.zone), zone=arguments.zone)
    file = stack.enter_context(reading(arguments.file))
    return requests_in(arguments, file) if form == "json" else sheets.read(file, arguments.file)


class _Rows(Complaints):
    """Bad rows of Parquet: it has no lines."""

    def __call__(self, number: int, error: Exception) -> None:
        """Report one bad row."""
        self.count += 1
        print(f"gratis: {self._source}: row {number}: {error}", file=sys.stderr)


def _form(arguments: argparse.Namespace) -> str:
    """What a log is written in: as told, or by its name."""
    path = Path(arguments.file)
    if arguments.form is not None:
        form: str = arguments.form
    else:
        form = "parquet" if path.is_dir() else SUFFIXES.get(path.suffix, "json")
    if form != "parquet" and _is_parquet(path):
        if arguments.form is not None:
            raise GratisError(f"{arguments.file}: found Parquet; expected {arguments.form}, as --from says")
        form = "parquet"
    if form == "parquet" and arguments.file == "-":
        raise GratisError("standard input: expected JSON lines or CSV; Parquet is read from a file")
    return form


def _is_parquet(path: Path) -> bool:
    """Whether a file is Parquet, whatever its name."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(PARQUET)) == PARQUET
    except OSError as error:
        raise GratisError(f"{path}: {error.strerror}") from None


def _is_large(arguments: argparse.Namespace) -> bool:
    """Whether JSON lines are so many that it takes less to judge them as columns: of a file, where that is possible."""
    path = Path(arguments.file)
    is_file = arguments.file != "-" and not arguments.responses and path.is_file()
    return is_file and path.stat().st_size >= LARGE_BYTES and not _missing()


def _missing() -> bool:
    """Whether the extra for columns is not installed."""
    return any(find_spec(name) is None for name in ("numba", "pyarrow"))


def _needs_columns(what: str) -> None:
    """Columns are an extra: say how to get it."""
    if _missing():
        raise GratisError(f"{what}: Parquet needs pyarrow and numba: pip install 'gratis[columns]'")


def _by_columns(
    arguments: argparse.Namespace, offer: Offer, assume: Enrollment | None, changes: dict[str, list[Change]]
) -> int:
    """Judge Parquet files: what is remembered of them does not grow with their rows."""
    from gratis.audit.columns.logs import IDS, Log, without_ids  # noqa: PLC0415 - an extra, loaded where it is used
    from gratis.audit.columns.repeats import NO_REPEATS, Finder  # noqa: PLC0415 - as above
    from gratis.audit.columns.tables import Judge  # noqa: PLC0415 - as above

    log = Log([arguments.file], zone=arguments.zone)
    progress, rows = Progress("rows"), _Rows(arguments.file)

    def complain(row: int, error: RequestError) -> None:
        progress.end()
        rows(row, error)

    with Answers(arguments) as answers, Finder() as finder:
        repeats, looks = NO_REPEATS, log.has_ids and not arguments.trust_ids
        if looks:
            for batch in log.batches(fields=IDS):
                finder.add(batch)
            repeats = finder.found(lambda: log.batches(fields=IDS))
        judge = Judge(offer, assume=assume, changes=changes, zone=arguments.zone, repeats=repeats, on_error=complain)
        needs_ids = looks or not arguments.totals
        for batch in log.batches(fields=without_ids(log, needs_ids=needs_ids)):
            answers.take(judge, batch)
            progress.add(batch.num_rows)
        progress.end()
        answers.sum(judge)
    return BAD_INPUT if rows.count else 0


def _by_spool(
    arguments: argparse.Namespace, offer: Offer, assume: Enrollment | None, changes: dict[str, list[Change]]
) -> int:
    """Judge a large file of JSON lines as columns: the same decisions and the same errors as row by row."""
    from gratis.audit.columns.spool import Spool  # noqa: PLC0415 - an extra, loaded where it is used
    from gratis.audit.columns.tables import Judge  # noqa: PLC0415 - as above

    complain, progress = Complaints(arguments.file), Progress("requests")
    told: list[tuple[int, RequestError]] = []
    with (
        Answers(arguments) as answers,
        reading(arguments.file) as file,
        Spool(lambda line: request_of(parsed(line))) as spool,
    ):
        judge = Judge(
            offer,
            assume=assume,
            changes=changes,
            repeats=spool.take(batches(file)),
            on_error=lambda row, error: told.append((row, error)),
        )
        for batch, errors in spool.batches():
            begin = judge.rows + 1
            answers.take(judge, batch)
            lines = batch.column("line")
            found = [(lines[row - begin].as_py(), error) for row, error in told]
            found += [(number, RequestError(field, message)) for number, field, message in errors]
            told.clear()
            progress.end()
            for number, error in sorted(found, key=_by_number):
                complain(number, error)
            progress.add(batch.num_rows)
        progress.end()
        answers.sum(judge)
    return BAD_INPUT if complain.count else 0


def _by_number(error: tuple[int, RequestError]) -> int:
    return error[0]


def _sums(line: dict[str, Any]) -> list[int]:
    return [line[name] for name in TOTALS[NAMED:]]


class Answers:
    """Where decisions go: to standard output, to a file, or into totals; and into a report beside that.

    A file has its name only when all is in it.
    """

    def __init__(self, arguments: argparse.Namespace, story: Story | None = None) -> None:
        self._is_table = is_table(arguments.format)
        self._counts = arguments.totals
        self._story = story
        self._parquet: Any = None
        self._sheet: sheets.Sheet | None = None
        self._file: IO[bytes] | None = None
        self._behind: Any = None
        self._output = Output()
        self._listing = Listing(COLUMNS)
        self._totals: Totals = {}
        self._stack = ExitStack()
        self._path = None if arguments.out is None else Path(arguments.out)
        if self._path is not None and self._counts:
            raise GratisError("--out: expected without --totals, which are printed")
        if self._path is not None:
            _check(self._path)

    def __enter__(self) -> Self:
        if self._path is not None:
            with self._told():
                self._open(self._path, self._stack.enter_context(_whole(self._path)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._told():
            self._stack.__exit__(kind, error, trace)
        if error is None and self._counts:
            self._print()

    def decisions(self, decisions: Sequence[Decision]) -> None:
        """Take the next decisions."""
        if self._story is not None:
            for decision in decisions:
                self._story.add(decision)
        with self._told():
            self._take(decisions)

    def _take(self, decisions: Sequence[Decision]) -> None:
        if self._counts:
            for decision in decisions:
                _add(self._totals, decision)
        elif self._parquet is not None:
            import pyarrow as pa  # noqa: PLC0415 - an extra

            self._parquet.write_batch(
                pa.RecordBatch.from_pylist([decision_fields(one) for one in decisions], self._parquet.schema)
            )
        elif self._sheet is not None:
            self._sheet.write([decision_fields(one) for one in decisions])
        elif self._file is not None:
            self._file.write(b"".join([encode(decision_fields(one)) + b"\n" for one in decisions]))
        elif self._is_table:
            self._listing.decisions(decisions)
        else:
            self._output.decisions(decisions)

    def take(self, judge: Judge, batch: Any) -> None:
        """Judge the next rows, and take what is decided; it is written while the next ones are judged."""
        from gratis.audit.columns.behind import Behind  # noqa: PLC0415 - an extra

        if self._counts:
            judge.add(batch)
            return
        if self._behind is None:
            self._behind = self._stack.enter_context(Behind(self._batch))
        found = judge.decide(batch)
        with self._told():
            self._behind.put(found)

    def sum(self, judge: Judge) -> None:
        """Take the totals of all that was judged."""
        self._totals = {(one["day"], one["group"], one["reason"]): _sums(one) for one in judge.totals()}

    def _batch(self, batch: Any) -> None:
        from gratis.audit.columns.writing import lines_of  # noqa: PLC0415 - an extra

        if self._parquet is not None:
            self._parquet.write_batch(batch)
        elif self._sheet is not None:
            self._sheet.write(batch.to_pylist())
        elif self._is_table and self._file is None:
            for fields in batch.to_pylist():
                fields["at"] = f"{fields['at']:%Y-%m-%dT%H:%M:%SZ}"
                fields["reason"] += " (replayed)" if fields["replayed"] else ""
                self._listing.row(fields, "green" if fields["verdict"] == "free" else "red")
        else:
            file = self._file or sys.stdout.buffer
            for lines in lines_of(batch):
                file.write(lines)
            file.flush()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say in one line that the file cannot be written."""
        try:
            yield
        except OSError as error:
            if self._path is None:
                raise
            said = os.strerror(error.errno) if error.errno else str(error)
            raise GratisError(f"--out: {self._path}: {said}") from None

    def _print(self) -> None:
        """The totals."""
        found = [
            dict(zip(TOTALS, (*key, *sums), strict=True)) for key, sums in sorted(self._totals.items(), key=_in_order)
        ]
        if self._is_table:
            rows = [[str(one[name] or "") for name in TOTALS[:NAMED]] + [*map(spelled, _sums(one))] for one in found]
            print(table(TOTALS, rows, right=TOTALS[NAMED:]))
        else:
            self._output.lines(found)

    def _open(self, path: Path, part: Path) -> None:
        """The file for decisions, in the form that its name says; it is `part` for now."""
        form = SUFFIXES[path.suffix]
        if form == "parquet":
            from gratis.audit.columns.writing import parquet  # noqa: PLC0415 - an extra

            self._parquet = self._stack.enter_context(parquet(part))
        elif form == "csv":
            self._sheet = sheets.Sheet(self._stack.enter_context(part.open("w", encoding="utf-8", newline="")))
        else:
            self._file = self._stack.enter_context(part.open("wb"))


def _check(path: Path) -> None:
    """Refuse a file whose name says no form."""
    form = SUFFIXES.get(path.suffix)
    if form is None:
        raise GratisError(f"--out: found {str(path)!r}; expected a name that ends with .jsonl, .csv or .parquet")
    if form == "parquet":
        _needs_columns(str(path))


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Where to write until all is there: then it gets its name; before that nothing has it."""
    if path.exists() and not path.is_file():
        yield path  # a pipe or a device is written as it is
        return
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        with suppress(OSError):  # where there is no such folder there is nothing to take away
            part.unlink()


def _add(totals: Totals, decision: Decision) -> None:
    """Add a decision to its day, group and reason; one that was said before counts once."""
    if decision.replayed:
        return
    day = decision.at.date().isoformat()
    sums = totals.setdefault((day, decision.group, decision.reason.value), [0] * len(TOTALS[NAMED:]))
    sums[0] += 1
    if decision.tokens is None:
        sums[1] += 1
    else:
        free, billed = decision.free_tokens or 0, decision.billed_tokens or 0
        for place, value in enumerate((decision.tokens, free, billed), start=2):
            sums[place] += value


def _in_order(item: tuple[tuple[str, str | None, str], list[int]]) -> tuple[str, str, str]:
    day, group, reason = item[0]
    return day, group or "", reason
