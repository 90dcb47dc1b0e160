"""What can be wrong with a ledger, as values."""

from __future__ import annotations

from enum import StrEnum, unique
from typing import TYPE_CHECKING, Any

from msgspec import Struct

if TYPE_CHECKING:
    from gratis.model import Entry


@unique
class FindingKind(StrEnum):
    """What can be wrong with a ledger."""

    UNREADABLE = "unreadable"
    OFFER_UNKNOWN = "offer_unknown"
    ENTRY_GAP = "entry_gap"
    ENTRY_REPEATED = "entry_repeated"
    BROKEN_CHAIN = "broken_chain"
    DECIDED_TWICE = "decided_twice"
    NOT_IN_FORCE = "not_in_force"
    WRONG_ENROLLMENT = "wrong_enrollment"
    WRONG_GROUP = "wrong_group"
    WRONG_TERMS = "wrong_terms"
    WRONG_REASON = "wrong_reason"
    NEEDLESS_BILLING = "needless_billing"
    WRONGLY_FREE = "wrongly_free"
    SEQ_GAP = "seq_gap"
    SEQ_REPEATED = "seq_repeated"
    WRONG_WINDOW = "wrong_window"
    WRONG_TOTALS = "wrong_totals"
    WRONG_CORRECTION = "wrong_correction"
    COUNTER_DIFFERS = "counter_differs"


class Finding(Struct, frozen=True):
    """One thing that does not follow: what it is, where, what was found, and what the rule gives."""

    kind: FindingKind
    entry: int | None
    account: str | None
    id: str | None
    field: str
    found: Any
    expected: Any


def finding(kind: FindingKind, entry: Entry, field: str, found: object, expected: object) -> Finding:
    """A finding about an entry."""
    return Finding(kind, entry.entry, entry.decision.account, entry.decision.id, field, found, expected)
