"""Which rows share an id with another row of their account: exact, and in bounded memory.

Each id becomes a number of 64 bits. The numbers go to temporary files by their first bits, and each file is sorted by
itself: so only few rows are left of which others may have the id. Of those the ids are read again and compared.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gratis.audit.columns import kernel, texts
from gratis.audit.columns.compiled import Array, compiled, whole
from gratis.audit.columns.reading import column

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType


PARTITION_BITS = 6
PARTITIONS = 1 << PARTITION_BITS
HELD_MAX = 1 << 22
IN_MEMORY_MAX = 1 << 20
COMPARED_MAX = 1 << 20
PAIR = np.dtype([("mixed", np.uint64), ("row", np.int64)])
SEED = np.uint64(0x2545F4914F6CDD1D)


class Repeated:
    """The rows whose id comes more than once, and the number of that id."""

    def __init__(self, rows: Array, numbers: Array, count: int, firsts: Array) -> None:
        self._rows = rows
        self._numbers = numbers
        self.count = count
        self.firsts = firsts

    def of(self, begin: int, size: int) -> Array:
        """The numbers of the ids of so many rows; -1 of one that comes once. Nothing, if all do."""
        low, high = np.searchsorted(self._rows, [begin, begin + size])
        if low == high:
            return _NOTHING
        found = np.full(size, kernel.NONE, np.int32)
        found[np.asarray(self._rows[low:high]) - begin] = self._numbers[low:high]
        return found


_NOTHING: Array = np.zeros(0, np.int32)
NO_REPEATS = Repeated(np.zeros(0, np.int64), _NOTHING, 0, np.zeros((1, kernel.FIRST_WIDTH), np.int64))


class _Last(NamedTuple):
    values: Any
    seeds: Array


class Finder:
    """Takes the batches of a log, in order, and finds which of their ids come again."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._held: list[Array] = []
        self._held_rows = 0
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
        self._held = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def add(self, batch: pa.RecordBatch) -> None:
        """Take the next rows."""
        ids = column(batch, "id")
        seeds, seed_of = self._seeds(batch)
        mixed = np.empty(batch.num_rows, np.uint64)
        texts.hashes(texts.texts_of(ids), seeds, seed_of, mixed)
        pairs = np.empty(batch.num_rows, PAIR)
        pairs["mixed"], pairs["row"] = mixed, np.arange(self._rows, self._rows + batch.num_rows)
        if ids.null_count:
            pairs = pairs[ids.is_valid().to_numpy(zero_copy_only=False)]
        self._rows += batch.num_rows
        self._held.append(pairs)
        self._held_rows += len(pairs)
        if self._held_rows >= HELD_MAX:
            self._spill()

    def found(self, again: Callable[[], Iterable[pa.RecordBatch]]) -> Repeated:
        """The ids that come again; `again` gives the same batches once more, to compare them."""
        candidates = self._candidates()
        if not candidates:
            return NO_REPEATS
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
        pairs = np.concatenate(self._held)
        sorted_pairs, ends = np.empty_like(pairs), np.zeros(PARTITIONS + 1, np.int64)
        _partition(pairs["mixed"], pairs["row"], sorted_pairs["mixed"], sorted_pairs["row"], ends, ends.copy())
        for part in range(PARTITIONS):
            if ends[part] < ends[part + 1]:
                with self._path(f"part-{part}").open("ab") as file:
                    sorted_pairs[ends[part] : ends[part + 1]].tofile(file)
        self._held, self._held_rows = [], 0

    def _candidates(self) -> list[Array]:
        """Of each file the pairs whose number is that of another, sorted by number and row."""
        if self._folder is None:
            found = [_doubles(np.concatenate(self._held))] if self._held else []
        else:
            self._spill() if self._held else None
            paths = [self._path(f"part-{part}") for part in range(PARTITIONS)]
            found = [_doubles(np.fromfile(path, PAIR)) for path in paths if path.exists()]
        return [part for part in found if len(part)]


@compiled
def _partition(  # noqa: PLR0917 - by place, as compiled functions are called
    mixed: Array, rows: Array, mixed_out: Array, rows_out: Array, ends: Array, nexts: Array
) -> None:
    """Order pairs by the first bits of their number."""
    shift = np.uint64(64 - PARTITION_BITS)
    for place in range(mixed.shape[0]):
        ends[whole(mixed[place] >> shift) + 1] += 1
    for part in range(PARTITIONS):
        ends[part + 1] += ends[part]
    for part in range(PARTITIONS + 1):
        nexts[part] = ends[part]
    for place in range(mixed.shape[0]):
        part = whole(mixed[place] >> shift)
        mixed_out[nexts[part]] = mixed[place]
        rows_out[nexts[part]] = rows[place]
        nexts[part] += 1


def _doubles(pairs: Array) -> Array:
    """The pairs whose number is that of another one, by number and row."""
    numbers = np.sort(pairs["mixed"])
    twice = np.unique(numbers[1:][numbers[1:] == numbers[:-1]])
    if not twice.size:
        return pairs[:0]
    places = np.searchsorted(twice, pairs["mixed"])
    is_double = twice[np.minimum(places, twice.size - 1)] == pairs["mixed"]
    found = pairs[is_double]
    return found[np.lexsort((found["row"], found["mixed"]))]


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
    rows = np.sort(pairs["row"])
    groups: dict[tuple[bytes, bytes], list[int]] = {}
    begin = 0
    for batch in batches:
        low, high = np.searchsorted(rows, [begin, begin + batch.num_rows])
        if low < high:
            places = pa.array(rows[low:high] - begin)
            ids = _values(column(batch, "id").take(places))
            accounts = column(batch, "account")
            named = [None] * len(ids) if accounts is None else _values(accounts.take(places))
            for row, account, name in zip(rows[low:high], named, ids, strict=True):
                groups.setdefault((b"default" if account is None else account, name), []).append(int(row))
        begin += batch.num_rows
    found = [its for its in groups.values() if len(its) > 1]
    numbers = np.repeat(np.arange(len(found)), [len(its) for its in found])
    return np.array([row for its in found for row in its], np.int64), numbers


def _values(cells: Any) -> list[Any]:
    """The values of a column; bytes, so that what is no text is compared, too."""
    if pa.types.is_null(cells.type):
        return [None] * len(cells)
    return list(cells.cast(pa.large_string()).view(pa.large_binary()).to_pylist())
