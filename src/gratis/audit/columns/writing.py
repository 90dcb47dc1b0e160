"""Decisions as columns, written as the very lines that `lines.py` would write of each."""

# ruff: noqa: PLR0917, PLR2004 - by place, as compiled functions are called; digits, bytes and the calendar's numbers, each beside what it stands for

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gratis.audit.columns import texts
from gratis.audit.columns.compiled import Array, compiled, inlined, move
from gratis.audit.columns.tables import SCHEMA
from gratis.audit.columns.texts import Texts, frozen, texts_of
from gratis.lines import encode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROWS = 1 << 12
DICTIONARIES = (
    "account",
    "verdict",
    "reason",
    "group",
    "allowance",
    "window_start",
    "window_end",
    "offer",
    "revision",
)
INTEGER, TIME, WORD = range(3)
KINDS = WORD + 1  # what is no word says after its kind where its key stands
VALUE, BEGIN, SIZE = range(3)  # of the time last written in a column: it often comes again
OPENING, ACCOUNT, CLOSING = range(3)  # the parts that each line has
TEXT_COLUMNS = 2  # the id and the account, which come first
NUMBER_BYTES_MAX = 40  # an integer of 64 bits, or a time in quotes
DAY_S = 86_400
SECOND = 1_000_000


def parquet(path: Path) -> pq.ParquetWriter:
    """A file for decisions: what comes again and again as a dictionary, and nothing else, which would take longer."""
    return pq.ParquetWriter(path, SCHEMA, compression="zstd", use_dictionary=list(DICTIONARIES))


def lines_of(batch: pa.RecordBatch) -> Iterator[bytes]:
    """Decisions as JSON lines, so many together."""
    room = np.empty(0, np.uint8)
    for begin in range(0, batch.num_rows, ROWS):
        room, size = _lines(batch.slice(begin, ROWS), room)
        yield room[:size].tobytes()


def _lines(batch: pa.RecordBatch, room: Array) -> tuple[Array, int]:
    """The lines of so many rows, in the room that there is for them, or in more if they need it."""
    names, rows = batch.schema.names, batch.num_rows
    values = np.empty((len(names) - TEXT_COLUMNS, rows), np.int64)
    kinds = np.empty(len(names) - TEXT_COLUMNS, np.int64)
    parts: list[bytes] = [b'{"id":', b',"account":', b"}\n"]
    for place, cells in enumerate(batch.columns[TEXT_COLUMNS:]):
        key = b',"%s":' % names[TEXT_COLUMNS + place].encode()
        kinds[place] = _numbers(cells, key, parts, values[place])
    ids, accounts = texts_of(batch.column(0)), texts_of(batch.column(1))
    fixed = 64 + len(kinds) * (NUMBER_BYTES_MAX + max(map(len, parts)))
    spelled = sum(int(text.starts[-1] - text.starts[0]) for text in (ids, accounts))
    needed = 2 * spelled + rows * fixed
    out = room if needed <= room.size else np.empty(needed, np.uint8)
    last = np.full((len(kinds), 3), -1, np.int64)
    is_plain = texts.is_plain(ids) and texts.is_plain(accounts)
    size = _write(values, kinds, ids, accounts, _joined(parts), last, is_plain, out)
    return out, size


def _numbers(cells: Any, key: bytes, parts: list[bytes], found: Array) -> int:
    """A column as numbers; of which kind.

    What is a word becomes the place of its key and its JSON in `parts`. Of what is none, that of its key is told with
    its kind; that of its key and a null comes after it.
    """
    first = len(parts)
    if pa.types.is_dictionary(cells.type):
        parts.extend(key + encode(word) for word in cells.dictionary.to_pylist())
        parts.append(key + b"null")
        codes = cells.indices if cells.null_count == 0 else pc.fill_null(cells.indices, len(parts) - 1 - first)
        found[:] = codes.to_numpy(zero_copy_only=False)
        found += first
        return WORD
    if pa.types.is_boolean(cells.type):
        parts.extend((key + b"false", key + b"true"))
        found[:] = cells.to_numpy(zero_copy_only=False)
        found += first
        return WORD
    parts.extend((key, key + b"null"))
    plain = cells.view(pa.int64())
    found[:] = (plain if plain.null_count == 0 else pc.fill_null(plain, -1)).to_numpy(zero_copy_only=False)
    return (TIME if pa.types.is_timestamp(cells.type) else INTEGER) + KINDS * first


def _joined(parts: list[bytes]) -> Texts:
    starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    return Texts(frozen(starts), frozen(np.frombuffer(b"".join(parts), np.uint8)))


@inlined
def _part(texts: Texts, one: int, out: Array, place: int) -> int:
    begin = texts.starts[one]
    size = texts.starts[one + 1] - begin
    move(out, place, texts.data, begin, size)
    return place + size


@inlined
def _text(texts: Texts, row: int, is_plain: bool, out: Array, place: int) -> int:  # noqa: FBT001 - as compiled functions are called
    """A name in quotes: it has no control characters, so only two bytes are escaped."""
    out[place] = 34
    place += 1
    if is_plain:
        place = _part(texts, row, out, place)
    else:
        for byte in range(texts.starts[row], texts.starts[row + 1]):
            char = texts.data[byte]
            if char in (34, 92):
                out[place] = 92
                place += 1
            out[place] = char
            place += 1
    out[place] = 34
    return place + 1


@inlined
def _digits(value: int, width: int, out: Array, place: int) -> int:
    """So many digits of a number, and at least one; 0: as many as it has."""
    ten = np.uint64(10)
    rest, size = np.uint64(value), 1
    bound = ten
    while rest >= bound and size < 19:
        bound *= ten
        size += 1
    size = max(size, width)
    for digit in range(size - 1, -1, -1):
        out[place + digit] = 48 + rest % ten
        rest //= ten
    return place + size


@compiled
def _time(since: int, out: Array, place: int) -> int:
    """An instant of UTC in RFC 3339, from microseconds since 1970; its date by eras of 400 years from March on."""
    seconds, micros = since // SECOND, since % SECOND
    days, second = seconds // DAY_S + 719_468, seconds % DAY_S
    era, of_era = days // 146_097, days % 146_097
    year = (of_era - of_era // 1_460 + of_era // 36_524 - of_era // 146_096) // 365
    of_year = of_era - (365 * year + year // 4 - year // 100)
    month = (5 * of_year + 2) // 153
    day = of_year - (153 * month + 2) // 5 + 1
    month = month + 3 if month < 10 else month - 9
    year += era * 400 + (1 if month <= 2 else 0)
    out[place] = 34
    place = _digits(year, 4, out, place + 1)
    out[place] = 45
    place = _digits(month, 2, out, place + 1)
    out[place] = 45
    place = _digits(day, 2, out, place + 1)
    out[place] = 84
    place = _digits(second // 3_600, 2, out, place + 1)
    out[place] = 58
    place = _digits(second // 60 % 60, 2, out, place + 1)
    out[place] = 58
    place = _digits(second % 60, 2, out, place + 1)
    if micros:
        out[place] = 46
        place = _digits(micros, 6, out, place + 1)
    out[place], out[place + 1] = 90, 34
    return place + 2


@inlined
def _again(value: int, last: Array, one: int, out: Array, place: int) -> int:
    """A time; one that the row before has is copied from there."""
    if value == last[one, VALUE]:
        move(out, place, out, last[one, BEGIN], last[one, SIZE])
        size = last[one, SIZE]
    else:
        size = _time(value, out, place) - place
    last[one, VALUE], last[one, BEGIN], last[one, SIZE] = value, place, size
    return place + size


@compiled
def _write(
    values: Array, kinds: Array, ids: Texts, accounts: Texts, parts: Texts, last: Array, is_plain: bool, out: Array  # noqa: FBT001 - as above
) -> int:  # fmt: skip
    """All lines; how many bytes they are."""
    place = 0
    for row in range(values.shape[1]):
        place = _part(parts, OPENING, out, place)
        place = _text(ids, row, is_plain, out, place)
        place = _part(parts, ACCOUNT, out, place)
        place = _text(accounts, row, is_plain, out, place)
        for one in range(kinds.shape[0]):
            value, kind = values[one, row], kinds[one]
            if kind == WORD:
                place = _part(parts, value, out, place)
                continue
            its, key = kind % KINDS, kind // KINDS
            place = _part(parts, key + 1 if value < 0 else key, out, place)
            if value >= 0 and its == TIME:
                place = _again(value, last, one, out, place)
            elif value >= 0:
                place = _digits(value, 0, out, place)
        place = _part(parts, CLOSING, out, place)
    return place
