"""JSON lines as columns: decoded once, and kept in a temporary file until it is known which ids come again.

A line of the usual shape becomes cells at once. Any other is read as `lines.py` reads it: so it is the same request,
or the same error.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec
import pyarrow as pa
from msgspec import Struct

from gratis.audit.columns.repeats import Finder, temporary
from gratis.errors import RequestError
from gratis.lines import LINE_BYTES_MAX, request_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from gratis.audit.columns.repeats import Repeated
    from gratis.model import Request

ROWS = 1 << 15
TEXT = pa.string()
SCHEMA = pa.schema(
    {
        "id": TEXT,
        "model": TEXT,
        "at": TEXT,
        "input_tokens": pa.int64(),
        "output_tokens": pa.int64(),
        "cached_tokens": pa.int64(),
        "account": TEXT,
        "project": TEXT,
        "kind": TEXT,
        "tools": pa.list_(TEXT),
        "line": pa.int64(),
    }
)
Error = tuple[int, str, str]


class _Line(Struct, forbid_unknown_fields=True, gc=False):
    """A line of the usual shape: no other fields, each of its type."""

    id: str
    model: str
    at: str
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    account: str | None = None
    project: str | None = None
    kind: str | None = None
    tools: list[str] | None = None


_decode = msgspec.json.Decoder(_Line).decode
_decode_lines = msgspec.json.Decoder(_Line).decode_lines
_errors = msgspec.json.Decoder(list[Error]).decode


class Spool:
    """The lines of a log as batches, which may be gone through again."""

    def __init__(self, read: Callable[[bytes], Request]) -> None:
        self._read = read
        self._folder = tempfile.TemporaryDirectory(prefix="gratis-")
        self._path = Path(self._folder.name) / "lines"
        self.finder = Finder()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finder.close()
        self._folder.cleanup()

    def take(self, lines: Iterable[list[tuple[int, bytes]]]) -> Repeated:
        """Take all lines, and tell which of their ids come again."""
        with temporary(), self._path.open("wb") as file, pa.ipc.new_stream(file, SCHEMA) as out:
            found: list[_Line] = []
            numbers: list[int] = []
            errors: list[Error] = []
            for batch in lines:
                if not _take(batch, found, numbers):
                    for number, line in batch:
                        self._line(number, line, found, numbers, errors)
                if len(found) + len(errors) >= ROWS:
                    self._put(out, found, numbers, errors)
                    found, numbers, errors = [], [], []
            self._put(out, found, numbers, errors)
        return self.finder.found(lambda: (batch for batch, _ in self.batches()))

    def batches(self) -> Iterator[tuple[pa.RecordBatch, list[Error]]]:
        """The rows that may be requests, and the lines among them that are none."""
        with self._path.open("rb") as file, pa.ipc.open_stream(file) as source:
            while True:
                try:
                    found = source.read_next_batch_with_custom_metadata()
                except StopIteration:
                    return
                yield found.batch, _errors(found.custom_metadata[b"errors"])

    def _line(self, number: int, line: bytes, found: list[_Line], numbers: list[int], errors: list[Error]) -> None:
        """One line: to the rows, or to the errors."""
        try:
            if len(line) > LINE_BYTES_MAX:
                raise ValueError(number)  # noqa: TRY301 - as any other that is not of the usual shape
            found.append(_decode(line))
        except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
            try:
                found.append(_of(self._read(line)))
            except RequestError as error:
                if line.strip():
                    errors.append((number, error.field, str(error).removeprefix(f"{error.field}: ")))
                return
        numbers.append(number)

    def _put(self, out: Any, found: list[_Line], numbers: list[int], errors: list[Error]) -> None:
        """Write the rows so far as a batch."""
        try:
            batch = _batch(found, numbers)
        except (OverflowError, pa.ArrowInvalid, UnicodeEncodeError):  # a number or a text that no column holds
            found, numbers = self._held(found, numbers, errors)
            batch = _batch(found, numbers)
        out.write_batch(batch, custom_metadata={"errors": msgspec.json.encode(sorted(errors))})
        self.finder.add(batch)

    def _held(self, found: list[_Line], numbers: list[int], errors: list[Error]) -> tuple[list[_Line], list[int]]:
        """The rows that columns hold; the others are no requests, and are told why."""
        kept: list[_Line] = []
        its: list[int] = []
        for line, number in zip(found, numbers, strict=True):
            try:
                self._read(msgspec.json.encode(line))
            except RequestError as error:
                errors.append((number, error.field, str(error).removeprefix(f"{error.field}: ")))
            else:
                kept.append(line)
                its.append(number)
        return kept, its


def _take(batch: list[tuple[int, bytes]], found: list[_Line], numbers: list[int]) -> bool:
    """Decode lines together, if each of them is of the usual shape; whether that was so."""
    its, lines = zip(*batch, strict=True)
    if max(map(len, lines)) > LINE_BYTES_MAX:
        return False
    joined = b"\n".join(lines)
    ends = joined.count(b"}\n") + joined.count(b"}\r\n") + joined.endswith((b"}", b"}\r"))
    if ends != len(lines):  # an object holds no other: where one is closed at the end of a line, a request ends
        return False
    try:
        decoded = _decode_lines(joined)
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
        return False
    if len(decoded) != len(lines):  # two requests on a line
        return False
    found.extend(decoded)
    numbers.extend(its)
    return True


def _of(request: Request) -> _Line:
    line = request_line(request)
    return _Line(**{name: line[name] for name in _Line.__struct_fields__})


def _batch(found: list[_Line], numbers: list[int]) -> pa.RecordBatch:
    """Rows as columns."""
    columns = [
        [line.id for line in found],
        [line.model for line in found],
        [line.at for line in found],
        [line.input_tokens for line in found],
        [line.output_tokens for line in found],
        [line.cached_tokens for line in found],
        [line.account for line in found],
        [line.project for line in found],
        [line.kind for line in found],
        [line.tools for line in found],
        numbers,
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)
