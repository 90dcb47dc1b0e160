"""An entry compared with what the rule gives in its place: each difference as a finding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gratis.audit.findings import FindingKind, finding
from gratis.lines import correction_line, decision_fields, decision_line
from gratis.model import Correction, Remedy, stamp
from gratis.rule import Tally

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gratis.audit.findings import Finding
    from gratis.model import Decision, Entry
    from gratis.rule import Charge

TIMES = ("window_start", "window_end", "at")
MISPRINTS = {
    "verdict": FindingKind.WRONG_REASON,
    "reason": FindingKind.WRONG_REASON,
    "replayed": FindingKind.WRONG_REASON,
    "window_start": FindingKind.WRONG_WINDOW,
    "window_end": FindingKind.WRONG_WINDOW,
    "group": FindingKind.WRONG_GROUP,
    "allowance": FindingKind.WRONG_TERMS,
    "offer": FindingKind.WRONG_TERMS,
    "revision": FindingKind.WRONG_TERMS,
}
OWNERS = frozenset({Remedy.VOIDED, Remedy.ADJUSTED})


def told_before(found: Decision, charge: Charge) -> Tally | None:
    """How its window was before a decision, as it says itself; None where it says that it was the first."""
    if found.window is None or found.total is None or found.seq is None or found.seq <= 1:
        return None
    used = found.total - charge.amount + (0 if found.correction is None else found.correction.returned)
    return Tally(found.window, used, found.seq - 1)


def after_gap(found: Decision, charge: Charge, before: Tally | None) -> Tally | None:
    """What is believed of a window of which decisions are missing: the next one would else be accused for them.

    Only of the window in which it belongs, and only of what missing ones can have done: to take more of it.
    """
    told = told_before(found, charge)
    if told is None or charge.window is None:
        return None
    if not charge.rolls:
        belongs = told.window == charge.window
    elif before is None or told.window.start >= before.window.end:
        belongs = told.window.start <= charge.request.at < told.window.end
    else:
        belongs = told.window == before.window
    used, seq = (before.used, before.seq) if before is not None and before.window == told.window else (0, 0)
    return told if belongs and told.seq > seq and told.used >= used else None


def wrong_correction(entry: Entry, charge: Charge, first: Decision | None) -> Iterator[Finding]:
    """What a correction says of itself that does not follow from what it corrects."""
    found, expected = entry.decision.correction, charge.step
    assert found is not None, "the entry is a correction"
    assert isinstance(expected, Correction), "its charge is one"
    if not expected.of:
        yield finding(FindingKind.WRONG_CORRECTION, entry, "id", found.of, "a request that was decided before")
        return
    # An owner's correction may need another one before it, which gives back what counted elsewhere.
    is_owners = found.actor is not None if found.remedy is Remedy.RELEASED else found.remedy in OWNERS
    if (found.actor is not None, found.why is not None) != (is_owners, is_owners):
        yield finding(FindingKind.WRONG_CORRECTION, entry, "actor", found.actor, "an owner who says why, or nobody")
    if found.actor is None and first is not None and not first.is_unmeasured:
        expected_of = "that of an owner: what it corrects was measured"
        yield finding(FindingKind.WRONG_CORRECTION, entry, "remedy", found.remedy, expected_of)
    ours, theirs = correction_line(expected), correction_line(found)
    for field in ("returned", "window_start", "window_end"):
        if ours[field] != theirs[field]:
            yield finding(FindingKind.WRONG_CORRECTION, entry, field, theirs[field], ours[field])


def misprints(entry: Entry, line: Mapping[str, Any]) -> Iterator[Finding]:
    """Fields of a line that do not follow from its others."""
    for field, value in decision_fields(entry.decision).items():
        found, expected = line.get(field, "nothing"), value
        if field in TIMES and value is not None:
            if isinstance(found, str):
                continue  # the same instant may be written in more than one way, and was read
            expected = stamp(value)
        if found != expected or (type(found) is not type(expected) and not isinstance(expected, str)):
            kind = MISPRINTS.get(field, FindingKind.WRONG_TOTALS)
            yield finding(kind, entry, field, found, expected)


def differences(entry: Entry, expected: Decision) -> Iterator[Finding]:
    """What an entry says otherwise than the rule gives."""
    found = entry.decision
    if found == expected:
        return
    if found.is_free is not expected.is_free:
        kind = FindingKind.WRONGLY_FREE if found.is_free else FindingKind.NEEDLESS_BILLING
        yield finding(kind, entry, "verdict", found.verdict, expected.verdict)
    elif found.reason is not expected.reason:
        yield finding(FindingKind.WRONG_REASON, entry, "reason", found.reason, expected.reason)
    if found.seq != expected.seq:
        kind = FindingKind.WRONG_WINDOW  # it has a place in a window, and should have none, or the other way round
        if found.seq is not None and expected.seq is not None:
            kind = FindingKind.SEQ_GAP if found.seq > expected.seq else FindingKind.SEQ_REPEATED
        yield finding(kind, entry, "seq", found.seq, expected.seq)
    ours, theirs = decision_line(expected), decision_line(found)
    kinds = {
        FindingKind.WRONG_WINDOW: ("window_start", "window_end"),
        FindingKind.WRONG_TOTALS: ("free_tokens", "used", "total"),
    }
    for kind, fields in kinds.items():
        for field in fields:
            if theirs[field] != ours[field]:
                yield finding(kind, entry, field, theirs[field], ours[field])
