"""What the kernel said of each row, as the columns of a table of decisions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from gratis.audit.columns import kernel
from gratis.audit.columns.compiled import Array, compiled

if TYPE_CHECKING:
    from collections.abc import Sequence

# The columns of `Spread.numbers`.
TOKENS, FREE, BILLED, ALLOWANCE, TOTAL, USED, REMAINING, START, END, SEQ = range(10)
NUMBERS = SEQ + 1
# The columns of `Spread.codes`, and of what terms say: the reasons are where it does not fit, and where it does.
VERDICT, REASON, GROUP, REVISION = range(4)
CODES = REVISION + 1
SAID_OVER, SAID_WITHIN, SAID_GROUP, SAID_REVISION, SAID_ALLOWANCE = range(5)
SAID = SAID_ALLOWANCE + 1


class Spread(NamedTuple):
    """A row a column: numbers, where a negative one is absent, and places of words, where -1 is none."""

    numbers: Array
    codes: Array


@compiled
def _spread(rows: kernel.Rows, answers: kernel.Answers, said: Array, found: Spread) -> None:
    numbers, codes = found
    for row in range(rows.at.shape[0]):
        terms, fits, given = answers.terms[row], answers.fits[row], answers.numbers
        tokens = kernel.tokens_of(rows.given[row], rows.made[row], kernel.cell(rows.kind, row))
        free, used, allowance = given[row, kernel.FREE], given[row, kernel.USED_AFTER], said[terms, SAID_ALLOWANCE]
        numbers[TOKENS, row] = tokens
        numbers[FREE, row] = free
        numbers[BILLED, row] = kernel.NONE if tokens < 0 and not fits else 0 if fits else tokens - max(free, 0)
        numbers[ALLOWANCE, row] = allowance
        numbers[TOTAL, row] = given[row, kernel.TOTAL]
        numbers[USED, row] = used
        numbers[REMAINING, row] = kernel.NONE if allowance < 0 else max(allowance - used, 0)
        numbers[START, row] = given[row, kernel.START]
        numbers[END, row] = given[row, kernel.END]
        numbers[SEQ, row] = given[row, kernel.SEQ_OF]
        codes[VERDICT, row] = fits
        codes[REASON, row] = said[terms, SAID_WITHIN] if fits else said[terms, SAID_OVER]
        codes[GROUP, row] = said[terms, SAID_GROUP]
        codes[REVISION, row] = said[terms, SAID_REVISION]


def spread(rows: kernel.Rows, answers: kernel.Answers, said: Array) -> Spread:
    """The answers as columns; `said` is what each row's terms say beside its numbers."""
    size = rows.at.shape[0]
    found = Spread(np.empty((NUMBERS, size), np.int64), np.empty((CODES, size), np.int32))
    _spread(rows, answers, said, found)
    return found


def integers(values: Array) -> Any:
    """Integers of a column; negative ones are nulls."""
    return _array(pa.int64(), values)


def words(codes: Array, names: Sequence[str]) -> Any:
    """Places of names as the names themselves; a negative one is a null."""
    return pa.DictionaryArray.from_arrays(_array(pa.int32(), codes), pa.array(names, pa.string()))


def _array(kind: pa.DataType, values: Array) -> Any:
    valid, absent = None, 0
    if values.size and values.min() < 0:
        is_there = values >= 0
        valid, absent = pa.py_buffer(np.packbits(is_there, bitorder="little")), int((~is_there).sum())
    return pa.Array.from_buffers(kind, values.size, [valid, pa.py_buffer(values)], absent)
