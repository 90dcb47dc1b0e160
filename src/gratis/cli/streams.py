"""Lines in, lines out: in order, as they come, in constant memory."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any, BinaryIO

from gratis.errors import GratisError, RequestError
from gratis.lines import LINE_BYTES_MAX, decision_fields, decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gratis.model import Decision

READ_BYTES = 1 << 16
PROGRESS_EVERY_S = 0.5
BOM = b"\xef\xbb\xbf"


@contextlib.contextmanager
def reading(name: str) -> Iterator[BinaryIO]:
    """The file of this name; - is the standard input."""
    if name == "-":
        if sys.stdin is None:
            raise GratisError("standard input: closed")
        yield sys.stdin.buffer
        return
    try:
        file = open(name, "rb")  # noqa: SIM115, PTH123 - closed below; - and paths alike
    except OSError as error:
        raise GratisError(f"{name}: {error.strerror}") from None
    with file:
        yield file


def batches(file: BinaryIO, *, line_max: int = LINE_BYTES_MAX) -> Iterator[list[tuple[int, bytes]]]:
    """Lines with their numbers, as many as came together: a slow sender's line is not kept waiting for more.

    A line beyond the bound comes cut, and its rest is skipped.
    """
    number, rest, is_skipping = 1, b"", False
    read = getattr(file, "read1", file.read)
    while chunk := read(READ_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        batch = []
        for line in lines:
            if not is_skipping:
                batch.append((number, line.removeprefix(BOM) if number == 1 else line))
            is_skipping = False
            number += 1
        if len(rest) > line_max:
            if not is_skipping:
                batch.append((number, rest))
            rest, is_skipping = b"", True
        if batch:
            yield batch
    if rest and not is_skipping:
        yield [(number, rest.removeprefix(BOM) if number == 1 else rest)]


def parsed(line: bytes, *, line_max: int = LINE_BYTES_MAX) -> object:
    """The value of a JSON line."""
    if len(line) > line_max:
        raise RequestError("line", f"longer than {line_max} bytes")
    try:
        return decode(line)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise RequestError("line", f"not JSON: {error}") from None


class Output:
    """Standard output, line by line; each batch is handed over whole before the next is read."""

    def __init__(self) -> None:
        self._file = sys.stdout.buffer

    def lines(self, values: list[dict[str, Any]]) -> None:
        """Print values as JSON lines."""
        self._file.write(b"".join([encode(value) + b"\n" for value in values]))
        self._file.flush()

    def decisions(self, decisions: Sequence[Decision]) -> None:
        """Print decisions as JSON lines."""
        self.lines([decision_fields(decision) for decision in decisions])


class Complaints:
    """Bad lines: to standard error, with number and reason; the others go on."""

    def __init__(self, source: str) -> None:
        self._source = "standard input" if source == "-" else source
        self.count = 0

    def __call__(self, number: int, error: Exception) -> None:
        """Report one bad line."""
        self.count += 1
        print(f"gratis: {self._source}: line {number}: {error}", file=sys.stderr)


class Progress:
    """How far long work is, on a terminal only."""

    def __init__(self, what: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._clock = clock
        self._start = self._shown = clock()
        self._is_shown = sys.stderr.isatty()
        self._has_shown = False
        self.count = 0

    def add(self, count: int) -> None:
        """So many more are done."""
        self.count += count
        now = self._clock()
        if self._is_shown and now - self._shown >= PROGRESS_EVERY_S:
            rate = self.count / (now - self._start)
            print(f"\r{self.count:,} {self._what}, {rate:,.0f}/s ", end="", file=sys.stderr, flush=True)
            self._shown, self._has_shown = now, True

    def end(self) -> None:
        """Take the progress line away."""
        if self._has_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._has_shown = False
