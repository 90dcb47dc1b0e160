"""What runs as machine code: how functions over arrays are compiled.

They allocate nothing. Told so (`_nrt`), the compiler does not count who uses an array each time that one is handed to
a function, which would take ten times as long as the arithmetic. What is compiled is cached beside the source.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numba import njit

if TYPE_CHECKING:
    from collections.abc import Callable

Array = np.ndarray[Any, Any]
whole: Any = np.int64  # what makes an integer of 64 bits, of whatever width it was
Function = TypeVar("Function", bound="Callable[..., Any]")

_options: dict[str, Any] = {"cache": True, "nogil": True, "_nrt": False}


def compiled(function: Function) -> Function:
    """A function that Python calls."""
    made: Function = njit(**_options)(function)
    return made


def inlined(function: Function) -> Function:
    """A function that becomes a part of those that call it."""
    made: Function = njit(**_options, forceinline=True)(function)
    return made
