"""Texts as the bytes of their column: which are no names, and a number for each that repeats can be found by."""

# ruff: noqa: PLR2004 - bytes and bits, each beside what it stands for

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from gratis.audit.columns.compiled import Array, compiled, inlined, word
from gratis.model import NAME_BYTES_MAX

GOOD, BAD, STRANGE = range(3)
_MAX = NAME_BYTES_MAX
MULTIPLY_1 = np.uint64(0xFF51AFD7ED558CCD)
MULTIPLY_2 = np.uint64(0xC4CEB9FE1A85EC53)


class Texts(NamedTuple):
    """A column of texts: where each begins, and the bytes of all of them."""

    starts: Array
    data: Array


def texts_of(column: Any) -> Texts:
    """The bytes of a column, whatever it is kept as; a null is an empty text."""
    plain = column.cast(pa.large_string()) if column.type != pa.large_string() else column
    _, offsets, data = plain.buffers()
    first, size = plain.offset, len(plain)
    if offsets is None or size == 0:
        return Texts(frozen(np.zeros(1, np.int64)), frozen(np.zeros(0, np.uint8)))
    starts = np.frombuffer(offsets, np.int64, size + 1, 8 * first)
    return Texts(frozen(starts), frozen(np.zeros(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)))


def frozen(array: Array) -> Array:
    """The array as one that is not written: so the kernel is compiled once, for these."""
    view = array.view()
    view.setflags(write=False)
    return view


@compiled
def is_plain(texts: Texts) -> bool:
    """Whether all bytes are printable ASCII, and none is escaped in JSON."""
    strange, first, last = np.uint8(0), texts.starts[0], texts.starts[texts.starts.shape[0] - 1]
    for byte in texts.data[first:last]:
        strange |= np.uint8((byte < 0x20) | (byte >= 0x7F) | (byte == 0x22) | (byte == 0x5C))
    return strange == 0


@compiled
def check(texts: Texts, found: Array) -> int:
    """Mark what is no name, and what is not ASCII and has to be looked at; how many are marked."""
    marked, plain = 0, is_plain(texts)
    for row in range(texts.starts.shape[0] - 1):
        start, end = texts.starts[row], texts.starts[row + 1]
        found[row] = GOOD if 0 < end - start <= _MAX else BAD
        if found[row] == GOOD and not plain:
            for place in range(start, end):
                byte = texts.data[place]
                if byte < 0x20 or byte == 0x7F:
                    found[row] = BAD
                elif byte > 0x7F and found[row] == GOOD:
                    found[row] = STRANGE
        marked += found[row] != GOOD
    return marked


@inlined
def _mixed(value: np.uint64) -> np.uint64:
    value ^= value >> np.uint64(33)
    value *= MULTIPLY_1
    value ^= value >> np.uint64(33)
    value *= MULTIPLY_2
    return value ^ (value >> np.uint64(33))


@compiled
def hashes(texts: Texts, seeds: Array, seed_of: Array, found: Array) -> None:
    """A number of 64 bits for each text, and the seed that goes with it."""
    for row in range(texts.starts.shape[0] - 1):
        start, end = texts.starts[row], texts.starts[row + 1]
        total = seeds[seed_of[row]] ^ (np.uint64(end - start) * MULTIPLY_2)
        place = start
        while end - place >= 8:
            total = _mixed(total ^ word(texts.data, place)) * MULTIPLY_1
            place += 8
        rest = np.uint64(0)
        for byte in range(end - place):
            rest |= np.uint64(texts.data[place + byte]) << np.uint64(8 * byte)
        found[row] = _mixed(total ^ rest)
