"""Which rows share an id with another row of their account: exact, and in bounded memory.

Each id becomes a number of 64 bits. The numbers go to temporary files by their first bits, and each file is gone
through by itself: so only few rows are left of which others may have the id. The ids of those are compared when they
are judged; where they are too many to keep, they are read again and compared so many at a time.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gratis.audit.columns import kernel, texts
from gratis.audit.columns.compiled import Array, compiled, whole
from gratis.audit.columns.reading import column
from gratis.errors import GratisError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType


PARTITION_BITS = 6
PARTITIONS = 1 << PARTITION_BITS
SHIFT = np.uint64(64 - PARTITION_BITS)
HELD_MAX = 1 << 15  # of each partition
IN_MEMORY_MAX = 1 << 20
COMPARED_MAX = 1 << 20
_ALL: Array = np.zeros(0, bool)
SEED = np.uint64(0x2545F4914F6CDD1D)


class Repeated:
    """The rows whose id comes more than once, and the number of that id."""

    def __init__(self, rows: Array, numbers: Array, count: int, firsts: Array) -> None:
        self._rows = rows
        self._numbers = numbers
        self.count = count
        self.firsts = firsts

    def of(self, begin: int, batch: pa.RecordBatch) -> Array:
        """The numbers of the ids of these rows; -1 of one that comes once. Nothing, if all do."""
        low, high = np.searchsorted(self._rows, [begin, begin + batch.num_rows])
        if low == high:
            return _NOTHING
        found = np.full(batch.num_rows, kernel.NONE, np.int32)
        places = np.asarray(self._rows[low:high]) - begin
        found[places] = self._of(batch, places, low, high)
        return found

    def _of(self, batch: pa.RecordBatch, places: Array, low: int, high: int) -> Array:  # noqa: ARG002 - `Candidates` uses them
        return self._numbers[low:high]


class Candidates(Repeated):
    """The rows whose id may come more than once: the ids are compared when those rows are judged."""

    def __init__(self, rows: Array) -> None:
        super().__init__(rows, _NOTHING, rows.size, np.zeros((rows.size, kernel.FIRST_WIDTH), np.int64))
        self._known: dict[tuple[bytes, bytes], int] = {}

    def _of(self, batch: pa.RecordBatch, places: Array, low: int, high: int) -> Array:  # noqa: ARG002 - where they stand says nothing yet
        known = self._known
        return np.array([known.setdefault(name, len(known)) for name in _names(batch, places)], np.int32)


_NOTHING: Array = np.zeros(0, np.int32)
NO_REPEATS = Repeated(np.zeros(0, np.int64), _NOTHING, 0, np.zeros((1, kernel.FIRST_WIDTH), np.int64))


class _Last(NamedTuple):
    values: Any
    seeds: Array


class Finder:
    """Takes the batches of a log, in order, and finds which of their ids come again."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._held: Array = np.empty((PARTITIONS, HELD_MAX, 2), np.uint64)
        self._counts: Array = np.zeros(PARTITIONS, np.int64)
        self._rows = 0
        self._last: _Last | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the temporary files back. What was found is not usable any more if it was too large for memory."""
        self._counts[:] = 0
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def add(self, batch: pa.RecordBatch) -> None:
        """Take the next rows."""
        ids = column(batch, "id")
        seeds, seed_of = self._seeds(batch)
        mixed = np.empty(batch.num_rows, np.uint64)
        texts.hashes(texts.texts_of(ids), seeds, seed_of, mixed)
        is_there = ids.is_valid().to_numpy(zero_copy_only=False) if ids.null_count else _ALL
        row = 0
        while (row := _hold(mixed, is_there, row, self._rows, self._held, self._counts)) < batch.num_rows:
            self._spill()
        self._rows += batch.num_rows

    def found(self, again: Callable[[], Iterable[pa.RecordBatch]]) -> Repeated:
        """The ids that come again; `again` gives the same batches once more, to compare them if they are many."""
        candidates = self._candidates()
        if not candidates:
            return NO_REPEATS
        if sum(map(len, candidates)) <= COMPARED_MAX:
            return Candidates(np.sort(np.concatenate(candidates)[:, 1].astype(np.int64)))
        rows, groups, begin = [], [], 0
        for part in _slabs(candidates):
            its_rows, its_groups = _compared(part, again())
            rows.append(its_rows)
            groups.append(its_groups + begin)
            begin += int(its_groups.max()) + 1 if its_groups.size else 0
        all_rows, all_groups = np.concatenate(rows), np.concatenate(groups)
        order = np.argsort(all_rows, kind="stable")
        return Repeated(all_rows[order], all_groups[order].astype(np.int32), begin, self._firsts(begin))

    def _firsts(self, count: int) -> Array:
        """What will be said of the first of each id: in memory, or in a file where there are many."""
        shape = (max(count, 1), kernel.FIRST_WIDTH)
        if count <= IN_MEMORY_MAX:
            return np.zeros(shape, np.int64)
        return np.asarray(np.memmap(self._path("firsts"), np.int64, "w+", shape=shape))

    def _path(self, name: str) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="gratis-")
        return Path(self._folder.name) / name

    def _seeds(self, batch: pa.RecordBatch) -> tuple[Array, Array]:
        """A number for each account, and which of them a row has."""
        cells = column(batch, "account")
        if cells is None or pa.types.is_null(cells.type):
            cells = pa.DictionaryArray.from_arrays(np.zeros(batch.num_rows, np.int32), ["default"])
        elif cells.null_count:
            cells = pc.fill_null(cells.cast(pa.large_string()), "default")
        coded = cells if pa.types.is_dictionary(cells.type) else cells.dictionary_encode()
        if self._last is None or not self._last.values.equals(coded.dictionary):
            size = len(coded.dictionary)
            seeds = np.empty(size, np.uint64)
            texts.hashes(
                texts.texts_of(coded.dictionary),
                texts.frozen(np.array([SEED])),
                texts.frozen(np.zeros(size, np.int64)),
                seeds,
            )
            self._last = _Last(coded.dictionary, texts.frozen(seeds))
        return self._last.seeds, texts.frozen(coded.indices.to_numpy(zero_copy_only=False).astype(np.int64))

    def _spill(self) -> None:
        """Move what is held to the files."""
        for part in np.flatnonzero(self._counts):
            with temporary(), self._path(f"part-{part}").open("ab") as file:
                file.write(self._held[part, : self._counts[part]].data)
        self._counts[:] = 0

    def _candidates(self) -> list[Array]:
        """Of each partition the pairs whose number is that of another, sorted by number and row."""
        if self._folder is None:
            parts = (self._held[part, : self._counts[part]] for part in range(PARTITIONS))
        else:
            self._spill()
            paths = [self._path(f"part-{part}") for part in range(PARTITIONS)]
            parts = (np.fromfile(path, np.uint64).reshape(-1, 2) for path in paths if path.exists())
        found = [_doubles(pairs) for pairs in parts]
        return [pairs for pairs in found if len(pairs)]


@contextmanager
def temporary() -> Iterator[None]:
    """Say where temporary files are, if they cannot be written."""
    try:
        yield
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise GratisError(f"temporary files in {tempfile.gettempdir()}: {why}; TMPDIR says where they go") from None


@compiled
def _hold(  # noqa: PLR0917 - by place, as compiled functions are called
    mixed: Array, is_there: Array, begin: int, row: int, held: Array, counts: Array
) -> int:
    """Put numbers and their rows to those of the same first bits, until one of these has no room; where it ended."""
    for place in range(begin, mixed.shape[0]):
        if is_there.shape[0] == 0 or is_there[place]:
            part = mixed[place] >> SHIFT
            count = counts[part]
            if count >= held.shape[1]:
                return place
            held[part, count, 0] = mixed[place]
            held[part, count, 1] = row + place
            counts[part] = count + 1
    return mixed.shape[0]


@compiled
def _sift(pairs: Array, seen: Array, again: Array, found: Array) -> int:
    """Leave out most of the pairs whose number comes once: those of which no other has the same last bits."""
    mask, count = np.uint64(8 * seen.shape[0] - 1), 0
    for place in range(pairs.shape[0]):
        bit = pairs[place, 0] & mask
        byte, one = bit >> np.uint64(3), np.uint8(1 << whole(bit & np.uint64(7)))
        if seen[byte] & one:
            again[byte] |= one
        seen[byte] |= one
    for place in range(pairs.shape[0]):
        bit = pairs[place, 0] & mask
        if again[bit >> np.uint64(3)] & np.uint8(1 << whole(bit & np.uint64(7))):
            found[count] = place
            count += 1
    return count


def _doubles(pairs: Array) -> Array:
    """The pairs whose number is that of another one, by number and row."""
    size = 1 << max(len(pairs).bit_length() + 1, 3)  # 16 bits and more for each pair
    seen, found = np.zeros((2, size), np.uint8), np.empty(len(pairs), np.int64)
    kept = pairs[found[: _sift(pairs, seen[0], seen[1], found)]]
    kept = kept[np.lexsort((kept[:, 1], kept[:, 0]))]
    is_next = kept[1:, 0] == kept[:-1, 0]
    is_double = np.zeros(len(kept), bool)
    is_double[1:] = is_next
    is_double[:-1] |= is_next
    return kept[is_double]


def _slabs(candidates: list[Array]) -> Iterable[Array]:
    """Pairs of one number together, about so many at once as may be compared in memory."""
    held: list[Array] = []
    for part in candidates:
        held.append(part)
        if sum(map(len, held)) >= COMPARED_MAX:
            yield np.concatenate(held)
            held = []
    if held:
        yield np.concatenate(held)


def _compared(pairs: Array, batches: Iterable[pa.RecordBatch]) -> tuple[Array, Array]:
    """The rows whose id comes again, by the id itself, and a number for each such id."""
    rows = np.sort(pairs[:, 1].astype(np.int64))
    groups: dict[tuple[bytes, bytes], list[int]] = {}
    begin = 0
    for batch in batches:
        low, high = np.searchsorted(rows, [begin, begin + batch.num_rows])
        if low < high:
            for row, name in zip(rows[low:high], _names(batch, rows[low:high] - begin), strict=True):
                groups.setdefault(name, []).append(int(row))
        begin += batch.num_rows
    found = [its for its in groups.values() if len(its) > 1]
    numbers = np.repeat(np.arange(len(found)), [len(its) for its in found])
    return np.array([row for its in found for row in its], np.int64), numbers


def _names(batch: pa.RecordBatch, places: Array) -> Iterator[tuple[bytes, bytes]]:
    """The account and the id of rows."""
    rows, accounts = pa.array(places), column(batch, "account")
    ids = _values(column(batch, "id").take(rows))
    named = [None] * len(ids) if accounts is None else _values(accounts.take(rows))
    return ((b"default" if account is None else account, name) for account, name in zip(named, ids, strict=True))


def _values(cells: Any) -> list[Any]:
    """The values of a column; bytes, so that what is no text is compared, too."""
    if pa.types.is_null(cells.type):
        return [None] * len(cells)
    return list(cells.cast(pa.large_string()).view(pa.large_binary()).to_pylist())
