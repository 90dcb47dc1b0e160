"""How one field of a provider's answer is had, be it a dict or an object of the provider's SDK.

An object is asked field by field and never copied: what a model was told and what it said is not looked at. A field
that is unset reads as one that is null. Nothing of the SDK is imported; its objects are known by `model_dump`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from gratis.errors import UsageError
from gratis.model import AT_MAX, EPOCH, TOKENS_MAX, shown

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

NAMES_SHOWN_MAX = 12


def has_fields(value: object) -> bool:
    """Whether it is a dict or an object of the SDK."""
    return isinstance(value, Mapping) or hasattr(type(value), "model_dump")


def get(node: Any, name: str) -> Any:
    """A field, or None where it is absent, unset or null."""
    return node.get(name) if isinstance(node, Mapping) else getattr(node, name, None)


def node(field: str, value: object) -> Any:
    """An object with fields, or None."""
    if value is None or has_fields(value):
        return value
    raise UsageError(field, f"found {a(value)}; expected an object or null")


def nodes(field: str, value: object) -> Sequence[Any]:
    """A list of objects with fields; none where it is null."""
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise UsageError(field, f"found {a(value)}; expected a list")
    for place, item in enumerate(value):
        if not has_fields(item):
            raise UsageError(f"{field}[{place}]", f"found {a(item)}; expected an object")
    return value


def text(field: str, value: object) -> str | None:
    """A string, or None."""
    if value is None or type(value) is str:
        return value
    raise UsageError(field, f"found {shown(value)}; expected a string")


def tokens(field: str, value: object) -> int | None:
    """A count of tokens, or None: whole numbers only, for 5.0 and "5" are guesses, and true is none."""
    if value is None or (type(value) is int and 0 <= value <= TOKENS_MAX):
        return value
    raise UsageError(field, f"found {shown(value)}; expected a whole number from 0 to {TOKENS_MAX}")


def unix_time(field: str, value: object) -> datetime | None:
    """The instant of a Unix time in seconds, or None; 0 is what Azure sends before it knows."""
    if value is None or (type(value) in (int, float) and value == 0):
        return None
    latest = (AT_MAX - EPOCH).total_seconds()
    if (type(value) is int or (type(value) is float and math.isfinite(value))) and 0 < value < latest:
        return EPOCH + timedelta(seconds=value)
    raise UsageError(field, f"found {shown(value)}; expected a Unix time in seconds")


def names(value: Any) -> str:
    """What an object calls its fields, for a message: never what they hold."""
    if not isinstance(value, Mapping):
        return f"the fields of {type(value).__name__}"
    found = [shown(name)[1:-1] if type(name) is str else a(name) for name in value]
    more = "" if len(found) <= NAMES_SHOWN_MAX else f" and {len(found) - NAMES_SHOWN_MAX} more"
    return f"the fields {', '.join(found[:NAMES_SHOWN_MAX])}{more}" if found else "no fields"


def a(value: object) -> str:
    """What sort of thing was found: never what it holds, which may be private."""
    return f"a value of type {type(value).__name__}"
