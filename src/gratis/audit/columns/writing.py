"""Decisions as columns, written as the very lines that `lines.py` would write of each."""

# ruff: noqa: PLR0917, PLR2004 - by place, as compiled functions are called; digits, bytes and the calendar's numbers, each beside what it stands for

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gratis.audit.columns.compiled import Array, compiled, inlined
from gratis.audit.columns.texts import Texts, frozen, texts_of
from gratis.lines import encode

if TYPE_CHECKING:
    from collections.abc import Iterator

ROWS = 1 << 14
INTEGER, TIME, WORD = range(3)
TEXT_COLUMNS = 2  # the id and the account, which come first
NUMBER_BYTES_MAX = 40  # an integer of 64 bits, or a time in quotes
DAY_S = 86_400
SECOND = 1_000_000


def lines_of(batch: pa.RecordBatch) -> Iterator[bytes]:
    """Decisions as JSON lines, so many together."""
    for begin in range(0, batch.num_rows, ROWS):
        yield _lines(batch.slice(begin, ROWS))


def _lines(batch: pa.RecordBatch) -> bytes:
    names, rows = batch.schema.names, batch.num_rows
    values = np.empty((rows, len(names) - TEXT_COLUMNS), np.int64)
    kinds = np.empty(len(names) - TEXT_COLUMNS, np.int64)
    words: list[bytes] = []
    for place, cells in enumerate(batch.columns[TEXT_COLUMNS:]):
        kinds[place], values[:, place] = _numbers(cells, words)
    keys = [b',"%s":' % name.encode() for name in names[TEXT_COLUMNS:]]
    ids, accounts = texts_of(batch.column(0)), texts_of(batch.column(1))
    longest = max(map(len, words)) if words else 0
    fixed = sum(map(len, keys)) + len(keys) * max(NUMBER_BYTES_MAX, longest) + 64
    spelled = sum(int(text.starts[-1] - text.starts[0]) for text in (ids, accounts))
    out = np.empty(2 * spelled + rows * fixed, np.uint8)
    size = _write(values, kinds, ids, accounts, _joined(keys), _joined(words), out)
    return out[:size].tobytes()


def _numbers(cells: Any, words: list[bytes]) -> tuple[int, Array]:
    """A column as numbers: what is null is -1, what is a word has the place of its JSON in `words`."""
    if pa.types.is_dictionary(cells.type):
        first = len(words)
        words.extend(encode(word) for word in cells.dictionary.to_pylist())
        words.append(b"null")
        found = pc.fill_null(cells.indices, len(words) - 1 - first).to_numpy(zero_copy_only=False)
        return WORD, found.astype(np.int64) + first
    if pa.types.is_boolean(cells.type):
        words.extend((b"false", b"true"))
        return WORD, cells.to_numpy(zero_copy_only=False).astype(np.int64) + len(words) - 2
    kind = TIME if pa.types.is_timestamp(cells.type) else INTEGER
    return kind, pc.fill_null(cells.view(pa.int64()), -1).to_numpy(zero_copy_only=False)


def _joined(parts: list[bytes]) -> Texts:
    starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    return Texts(frozen(starts), frozen(np.frombuffer(b"".join(parts), np.uint8)))


@inlined
def _part(texts: Texts, one: int, out: Array, place: int) -> int:
    for byte in range(texts.starts[one], texts.starts[one + 1]):
        out[place] = texts.data[byte]
        place += 1
    return place


@inlined
def _text(texts: Texts, row: int, out: Array, place: int) -> int:
    """A name in quotes: it has no control characters, so only two bytes are escaped."""
    out[place] = 34
    place += 1
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
    size, rest = 1, value
    while rest >= 10:
        rest //= 10
        size += 1
    size = max(size, width)
    rest = value
    for digit in range(size - 1, -1, -1):
        out[place + digit] = 48 + rest % 10
        rest //= 10
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


@compiled
def _write(values: Array, kinds: Array, ids: Texts, accounts: Texts, keys: Texts, words: Texts, out: Array) -> int:
    """All lines; how many bytes they are."""
    place = 0
    for row in range(values.shape[0]):
        for char in (123, 34, 105, 100, 34, 58):  # {"id":
            out[place] = char
            place += 1
        place = _text(ids, row, out, place)
        for char in (44, 34, 97, 99, 99, 111, 117, 110, 116, 34, 58):  # ,"account":
            out[place] = char
            place += 1
        place = _text(accounts, row, out, place)
        for one in range(kinds.shape[0]):
            place = _part(keys, one, out, place)
            value = values[row, one]
            if kinds[one] == WORD:
                place = _part(words, value, out, place)
            elif value < 0:
                for char in (110, 117, 108, 108):  # null
                    out[place] = char
                    place += 1
            elif kinds[one] == TIME:
                place = _time(value, out, place)
            else:
                place = _digits(value, 0, out, place)
        out[place], out[place + 1] = 125, 10  # }
        place += 2
    return place
