"""What runs as machine code: how functions over arrays are compiled.

They allocate nothing. Told so (`_nrt`), the compiler does not count who uses an array each time that one is handed to
a function, which would take ten times as long as the arithmetic. What is compiled is cached beside the source, or in
the user's folder; where neither can be written it is compiled in each process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

if TYPE_CHECKING:
    from collections.abc import Callable

Array = np.ndarray[Any, Any]
whole: Any = np.int64  # what makes an integer of 64 bits, of whatever width it was
unsigned: Any = np.uint64  # the same of one that is not negative
Function = TypeVar("Function", bound="Callable[..., Any]")

_options: dict[str, Any] = {"cache": True, "nogil": True, "_nrt": False}


def compiled(function: Function) -> Function:
    """A function that Python calls."""
    return _made(function)


def inlined(function: Function) -> Function:
    """A function that becomes a part of those that call it."""
    return _made(function, forceinline=True)


def _made(function: Function, **more: Any) -> Function:
    options = {**_options, **more}
    try:
        made: Function = njit(**options)(function)
    except RuntimeError:  # there is no folder to cache it in
        made = njit(**(options | {"cache": False}))(function)
    return made


_copy: Any = cgutils.raw_memcpy


def _move(_: Any, target: Any, at: Any, source: Any, begin: Any, size: Any) -> Any:
    """Copy so many bytes from one array to another: a loop over them would take ten times as long."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        places = [
            builder.gep(context.make_array(signature.args[one])(context, builder, values[one]).data, [values[one + 1]])
            for one in (0, 2)
        ]
        _copy(builder, *places, values[4], 1)
        return context.get_dummy_value()

    return types.void(target, at, source, begin, size), generate


def _word(_: Any, source: Any, at: Any) -> Any:
    """Eight bytes of an array as one number, wherever they begin."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, values[0]).data
        kind = context.get_value_type(types.uint64).as_pointer()
        return builder.load(builder.bitcast(builder.gep(data, [values[1]]), kind), align=1)

    return types.uint64(source, at), generate


move: Any = intrinsic(_move)  # move(target, at, source, begin, size)
word: Any = intrinsic(_word)  # word(source, at)
