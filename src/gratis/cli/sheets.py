"""CSV in and out: the fields of the contract as columns, a row a request or a decision."""

from __future__ import annotations

import csv
import io
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any

from gratis.errors import GratisError, RequestError
from gratis.lines import DECISION_FIELDS, LINE_BYTES_MAX, REQUEST_FIELDS, decode, request_of
from gratis.model import shown, stamp

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from gratis.model import Request

BATCH_ROWS = 1_000
COUNTS = ("input_tokens", "output_tokens", "cached_tokens")
DIGITS_MAX = 40

Read = tuple[int, "Request | RequestError"]


def read(file: IO[bytes], name: str) -> Iterator[list[Read]]:
    """The requests of a CSV file with the number of their line, some at a time; what is wrong stands in its place."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(LINE_BYTES_MAX)
    try:
        rows = csv.reader(text, strict=True)
        yield from _batches(rows, _header(rows, name))
    finally:
        with suppress(ValueError):  # it is closed already where nobody wants more
            text.detach()  # the file is its opener's to close


def _batches(rows: Any, header: list[str]) -> Iterator[list[Read]]:
    batch: list[Read] = []
    for number, (line, cells) in enumerate(_numbered(rows), start=1):
        if not cells:
            continue
        batch.append((line, _request(header, cells, number)))
        if len(batch) >= BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _numbered(rows: Any) -> Iterator[tuple[int, list[str] | RequestError]]:
    """The rows with the number of the line on which each begins."""
    while True:
        line = rows.line_num + 1
        try:
            yield line, next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, RequestError("line", f"not CSV: {error}")


def _header(rows: Any, name: str) -> list[str]:
    """The names of the columns, each once; those that are not ours are left alone, unless misspelled."""
    try:
        header: list[str] = next(rows, [])
    except csv.Error as error:
        raise GratisError(f"{name}: line 1: not CSV: {error}") from None
    ours = [column for column in header if column in REQUEST_FIELDS]
    if twice := next((column for column in ours if ours.count(column) > 1), None):
        raise GratisError(f"{name}: line 1: column {twice!r} twice; expected each once")
    try:
        request_of(dict.fromkeys(header))
    except RequestError as error:
        if error.field not in REQUEST_FIELDS:
            raise GratisError(f"{name}: line 1: column {error}") from None
    if not {"model", "at"} <= set(ours):
        found = ", ".join(header) or "nothing"
        raise GratisError(f"{name}: line 1: found {shown(found)}; expected a header with at least model and at")
    return header


def _request(header: list[str], cells: list[str] | RequestError, number: int) -> Request | RequestError:
    """A row as a request; without a column of ids, its number is its id."""
    if isinstance(cells, RequestError):
        return cells
    if len(cells) != len(header):
        return RequestError("line", f"found {len(cells)} cells; expected {len(header)}, as the header has")
    line: dict[str, Any] = {column: cell for column, cell in zip(header, cells, strict=True) if cell}
    if "id" not in header:
        line["id"] = str(number)
    for field in COUNTS:
        if field in line:
            line[field] = _count(line[field])
    try:
        if "tools" in line:
            line["tools"] = tools_of(line["tools"])
        return request_of(line)
    except RequestError as error:
        return error


def _count(cell: str) -> int | str:
    """A whole number; what is none stays text, and is refused as such."""
    digits = cell.removeprefix("-")
    return int(cell) if digits.isascii() and digits.isdigit() and len(digits) <= DIGITS_MAX else cell


def tools_of(cell: str) -> Any:
    """The tools that a cell lists in JSON."""
    try:
        return decode(cell)
    except (ValueError, RecursionError):
        raise RequestError("tools", f"found {shown(cell)}; expected a JSON list of kinds of tool") from None


class Sheet:
    """Decisions as rows of CSV, under a header."""

    def __init__(self, file: IO[str]) -> None:
        self._rows = csv.writer(file, lineterminator="\n")
        self._rows.writerow(DECISION_FIELDS)

    def write(self, decisions: Iterable[dict[str, Any]]) -> None:
        """Write decisions; a null is an empty cell."""
        self._rows.writerows([_cell(fields[name]) for name in DECISION_FIELDS] for fields in decisions)


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return stamp(value) if hasattr(value, "isoformat") else value
