"""What can go wrong, named by whose fault it is.

GratisError
├── OfferError          an offer file is wrong: file, line, key, and what was expected
├── PricesError         a table of prices is wrong: file, line, key, and what was expected
├── EnrollmentError     an enrollment, or a change of one, that may not be
├── RequestError        a request that cannot be decided: field, and what was expected
│   ├── Conflict        the id was decided with other content; carries the first decision
│   └── UsageError      a provider's answer that is not understood: which field, and what was expected
├── LedgerError         a ledger file that cannot be read: line, and what was expected
└── StoreError          a store that cannot be used, or that would not be safe to use
    ├── NotExecuted     nothing was written; asking again is safe
    ├── OutcomeUnknown  it may have been written; asking again with the same id tells
    └── UnreadableEntry an entry of a store's ledger that is none; carries its number
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gratis.model import Decision, Hold


class GratisError(Exception):
    """Whatever Gratis raises on purpose."""


class OfferError(GratisError):
    """An offer file is wrong."""

    def __init__(self, *, file: str, line: int | None, key: str, expected: str, found: str) -> None:
        self.file = file
        self.line = line
        self.key = key
        self.expected = expected
        self.found = found
        where = file if line is None else f"{file}:{line}"
        super().__init__(f"{where}: {key}: {found}; expected {expected}")


class PricesError(GratisError):
    """A table of prices is wrong."""

    def __init__(self, *, file: str, line: int | None, key: str, expected: str, found: str) -> None:
        self.file = file
        self.line = line
        self.key = key
        where = file if line is None else f"{file}:{line}"
        super().__init__(f"{where}: {key}: {found}; expected {expected}")


class EnrollmentError(GratisError):
    """An enrollment, or a change of one, that may not be."""


class RequestError(GratisError):
    """A request that cannot be decided; nothing was written."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(f"{field}: {message}")


class Conflict(RequestError):  # noqa: N818 - it is the word of the contract
    """The id was decided, or is held, with other content; what was said first stands."""

    def __init__(self, field: str, first: Decision | None, *, hold: Hold | None = None) -> None:
        self.first = first
        self.hold = hold
        known = first or hold
        assert known is not None, "a conflict is with something"
        said = f"request {known.id!r} of account {known.request.account!r}"
        value = _said(field, getattr(known.request, field))
        if first is None:
            super().__init__(field, f"{said} is held with {value}; that hold stands")
        else:
            super().__init__(field, f"{said} was decided before with {value}: {first.verdict}; that decision stands")


class UsageError(RequestError):
    """A provider's answer that is not understood; nothing was written."""


def _said(field: str, value: object) -> str:
    """A field's value as a line would have it."""
    if isinstance(value, datetime):
        return f"{field} '{value.isoformat()[:-6]}Z'"
    if isinstance(value, tuple):
        return f"{field} {', '.join(value)}" if value else f"no {field}"
    if value is None:
        return f"no {field}"
    return f"{field} {value}" if isinstance(value, int) else f"{field} {str(value)!r}"


class LedgerError(GratisError):
    """A ledger file that cannot be read."""


class StoreError(GratisError):
    """A store that cannot be used, or that would not be safe to use."""


class NotExecuted(StoreError):  # noqa: N818 - it is the word of the contract
    """Nothing was written; asking again is safe."""


class OutcomeUnknown(StoreError):  # noqa: N818 - it is the word of the contract
    """It may have been written; asking again with the same id tells."""


class UnreadableState(StoreError):  # noqa: N818 - named as the others are
    """What a store holds beside its ledger cannot be read."""


class UnreadableEntry(StoreError):  # noqa: N818 - named as the others are
    """An entry of a store's ledger cannot be read."""

    def __init__(self, entry: int, message: str, *, shard: int = 0) -> None:
        self.entry = entry
        self.shard = shard
        super().__init__(f"ledger entry {entry} cannot be read: {message}")
