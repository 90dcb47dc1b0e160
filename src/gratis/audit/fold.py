"""A ledger replayed through the pure rule; what does not follow is a finding.

Each entry is judged anew from what it carries (request, enrollment, reading) and from the offer, on top of what
the entry before it in its window says was used. So one wrong entry is one finding, not one for all that follow.
"""

from __future__ import annotations

from enum import StrEnum, unique
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from gratis.audit.replay import TallyKey, tally_key
from gratis.audit.seen import Seen
from gratis.book import Cases, corrects
from gratis.lines import correction_line, decision_line
from gratis.model import Correction, Reason, Remedy, correction_id
from gratis.rule import Tally, decide

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from gratis.model import Counts, Decision, Enrollment, Entry, Overage, Terms
    from gratis.offer import Offer
    from gratis.rule import Charge

ENROLLMENTS_MAX = 10_000
TIMES = ("window_start", "window_end", "at")


@unique
class FindingKind(StrEnum):
    """What can be wrong with a ledger."""

    UNREADABLE = "unreadable"
    OFFER_UNKNOWN = "offer_unknown"
    ENTRY_GAP = "entry_gap"
    ENTRY_REPEATED = "entry_repeated"
    DECIDED_TWICE = "decided_twice"
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


class Unreadable(Struct, frozen=True):
    """A place of a ledger that could not be read: "line 3" of a file, or an entry of a store."""

    place: str
    message: str
    entry: int | None = None
    shard: int = 0


class Printed(Struct, frozen=True):
    """An entry that was read from a line, and the line: scripts read every field of it."""

    entry: Entry
    line: dict[str, Any]


class Audit:
    """Folds entries, in order; afterwards `counters` compares what a store says of its windows."""

    def __init__(self, offer_named: Callable[[str], Offer | None]) -> None:
        self._offer_named = offer_named
        self._cases: dict[tuple[str, bool, Counts, Overage], Cases | None] = {}
        self._enrollments: dict[Enrollment | None, int] = {}
        self._tallies: dict[TallyKey, Tally] = {}
        self._last: dict[tuple[str, str, str, str, Any], Tally] = {}
        self._seen: dict[str, Seen] = {}
        self._entry: dict[int, int] = {}
        self._is_cut = False
        self.entries = 0

    def begin(self, cursor: Sequence[int]) -> None:
        """The ledger begins behind a cursor: what came before was trimmed, and is believed."""
        self._entry = dict(enumerate(cursor))
        self._is_cut = any(cursor)

    def findings(self, entries: Iterable[Entry | Printed | Unreadable]) -> Iterator[Finding]:
        """What does not follow, entry by entry."""
        for item in entries:
            self.entries += 1
            if isinstance(item, Unreadable):
                if item.entry is not None:
                    self._entry[item.shard] = item.entry
                yield Finding(
                    FindingKind.UNREADABLE, item.entry, None, None, item.place, item.message, "a ledger entry"
                )
            elif isinstance(item, Printed):
                found = list(self._check(item.entry))
                yield from found or _misprints(item)
            else:
                yield from self._check(item)

    def close(self) -> None:
        """Give back what was kept aside."""
        for seen in self._seen.values():
            seen.close()

    def counters(self, offer: str, account: str, counters: Iterable[tuple[str, str, Tally]]) -> Iterator[Finding]:
        """What a store says of an account's windows that its ledger does not."""
        ours = {key[2:]: tally for key, tally in self._last.items() if key[:2] == (offer, account)}
        for group, kind, tally in counters:
            expected = ours.pop((group, kind, tally.window.start), None)
            if expected != tally and not (expected is None and self._is_cut):
                yield _counter(account, group, tally, expected)
        for (group, _, _), expected in ours.items():
            if self._is_cut:
                continue  # a window that was trimmed has no counter any more
            yield _counter(account, group, None, expected)

    def _check(self, entry: Entry) -> Iterator[Finding]:
        decision = entry.decision
        last = self._entry.get(entry.shard, 0)
        if entry.entry != last + 1:
            kind = FindingKind.ENTRY_GAP if entry.entry > last else FindingKind.ENTRY_REPEATED
            yield _finding(kind, entry, "entry", entry.entry, last + 1)
        self._entry[entry.shard] = entry.entry
        seen = self._seen.setdefault(decision.offer, Seen())
        if seen.get(decision.account, decision.request.id) is not None:
            yield _finding(FindingKind.DECIDED_TWICE, entry, "id", decision.request.id, "an id not decided before")
        else:
            seen.put(decision)
        cases = self._cases_of(decision.terms)
        if cases is None:
            yield _finding(
                FindingKind.OFFER_UNKNOWN,
                entry,
                "offer",
                decision.offer,
                "one that is shipped, or given by --offer FILE",
            )
            return
        yield from self._judge(entry, cases)

    def _cases_of(self, terms: Terms) -> Cases | None:
        """The offer as an entry read it; one that was excluded used no reading."""
        key = (terms.offer, terms.reason is None, terms.counts, terms.overage)
        if key not in self._cases:
            offer = self._offer_named(terms.offer)
            if offer is not None and terms.reason is None:
                offer = offer.reading(counts=terms.counts, overage=terms.overage)
            self._cases[key] = None if offer is None else Cases(offer)
        return self._cases[key]

    def _judge(self, entry: Entry, cases: Cases) -> Iterator[Finding]:
        found, terms = entry.decision, entry.decision.terms
        if len(self._enrollments) >= ENROLLMENTS_MAX:
            self._enrollments.clear()
            self._cases.clear()
        version = self._enrollments.setdefault(terms.enrollment, len(self._enrollments))
        if found.correction is None:
            charge = cases.charge(found.request, terms.enrollment, version, found.hold)
            if found.is_unmeasured and found.hold is not None and found.tokens != found.hold.tokens_max:
                yield _finding(FindingKind.WRONG_TOTALS, entry, "tokens", found.tokens, found.hold.tokens_max)
        else:
            charge = self._corrects(entry, cases, found.correction)
            first = self._seen[found.offer].get(found.account, found.correction.of)
            yield from _wrong_correction(entry, charge, first)
        for field in terms.__struct_fields__:
            ours, theirs = getattr(charge.terms, field), getattr(terms, field)
            if ours != theirs:
                yield _finding(FindingKind.WRONG_TERMS, entry, field, theirs, ours)
        before = self._before(charge)
        if before is None and self._is_cut and found.window and found.total is not None and found.seq:
            # Of a window whose first decisions were trimmed, the first that is left says how it was before.
            used = found.total - charge.amount + (found.correction.returned if found.correction else 0)
            before = Tally(found.window, used, found.seq - 1) if found.seq > 1 else None
        # Whether a window was still kept is the store's to know; the fold only asks whether it had ended.
        kept_since = entry.decided_at if found.reason is Reason.TOO_LATE else None
        expected, after = decide(charge, before, kept_since=kept_since, durability=found.durability)
        yield from _differences(entry, expected)
        window = found.window or expected.window
        if window is not None and found.seq is not None and found.used is not None:
            # Under what the entry itself says, so that a wrong one is not a finding in another window, too.
            tally = Tally(window, found.used, found.seq)
            start = None if terms.window.startswith("rolling ") else window.start
            key = (found.offer, found.account, terms.group, terms.window, start)
            if key not in self._tallies or self._tallies[key].window.start <= window.start:
                self._tallies[key] = tally  # not of one that was judged in a window before the last one
            self._last[found.offer, found.account, terms.group or "", terms.window, window.start] = tally
        elif after is not None:
            self._tallies[tally_key(charge)] = after

    def _before(self, charge: Charge) -> Tally | None:
        """The tally of a charge's window, or where windows roll that of the window which it is pinned to."""
        pin, terms = charge.pin, charge.terms
        if charge.rolls and pin is not None:
            place = (terms.offer, charge.request.account, terms.group or "", terms.window, pin.start)
            if place in self._last:
                return self._last[place]
        return self._tallies.get(tally_key(charge))

    def _corrects(self, entry: Entry, cases: Cases, correction: Correction) -> Charge:
        """The charge that a correction must have been; of what was trimmed, the correction itself is believed."""
        found, seen = entry.decision, self._seen[entry.decision.offer]
        first = seen.get(found.account, correction.of)
        latest = first
        if correction.number > 1:
            latest = seen.get(found.account, correction_id(correction.of, correction.number - 1))
        if first is None or latest is None:
            step = correction if self._is_cut else replace(correction, of="", window=None)
            return cases.charge(found.request, found.terms.enrollment, -1, step)
        request = replace(found.request, id=correction.of)
        return corrects(
            cases.offer,
            first,
            latest,
            request,
            correction.remedy,
            number=correction.number,
            actor=correction.actor,
            why=correction.why,
        )


MISPRINTS = {
    "verdict": FindingKind.WRONG_REASON,
    "reason": FindingKind.WRONG_REASON,
    "replayed": FindingKind.WRONG_REASON,
    "window_start": FindingKind.WRONG_WINDOW,
    "window_end": FindingKind.WRONG_WINDOW,
    "group": FindingKind.WRONG_TERMS,
    "allowance": FindingKind.WRONG_TERMS,
    "offer": FindingKind.WRONG_TERMS,
    "revision": FindingKind.WRONG_TERMS,
}


OWNERS = frozenset({Remedy.VOIDED, Remedy.ADJUSTED})


def _wrong_correction(entry: Entry, charge: Charge, first: Decision | None) -> Iterator[Finding]:
    """What a correction says of itself that does not follow from what it corrects."""
    found, expected = entry.decision.correction, charge.step
    assert found is not None, "the entry is a correction"
    assert isinstance(expected, Correction), "its charge is one"
    if not expected.of:
        yield _finding(FindingKind.WRONG_CORRECTION, entry, "id", found.of, "a request that was decided before")
        return
    # An owner's correction may need another one before it, which gives back what counted elsewhere.
    is_owners = found.actor is not None if found.remedy is Remedy.RELEASED else found.remedy in OWNERS
    if (found.actor is not None, found.why is not None) != (is_owners, is_owners):
        yield _finding(FindingKind.WRONG_CORRECTION, entry, "actor", found.actor, "an owner who says why, or nobody")
    if found.actor is None and first is not None and not first.is_unmeasured:
        expected_of = "that of an owner: what it corrects was measured"
        yield _finding(FindingKind.WRONG_CORRECTION, entry, "remedy", found.remedy, expected_of)
    ours, theirs = correction_line(expected), correction_line(found)
    for field in ("returned", "window_start", "window_end"):
        if ours[field] != theirs[field]:
            yield _finding(FindingKind.WRONG_CORRECTION, entry, field, theirs[field], ours[field])


def _misprints(printed: Printed) -> Iterator[Finding]:
    """Fields of a line that do not follow from its others."""
    for field, expected in decision_line(printed.entry.decision).items():
        found = printed.line.get(field, "nothing")
        if field in TIMES and isinstance(found, str) and expected is not None:
            continue  # the same instant may be written in more than one way, and was read
        if found != expected or (type(found) is not type(expected) and not isinstance(expected, str)):
            kind = MISPRINTS.get(field, FindingKind.WRONG_TOTALS)
            yield _finding(kind, printed.entry, field, found, expected)


def _differences(entry: Entry, expected: Decision) -> Iterator[Finding]:
    found = entry.decision
    if found.is_free is not expected.is_free:
        kind = FindingKind.WRONGLY_FREE if found.is_free else FindingKind.NEEDLESS_BILLING
        yield _finding(kind, entry, "verdict", found.verdict, expected.verdict)
    elif found.reason is not expected.reason:
        yield _finding(FindingKind.WRONG_REASON, entry, "reason", found.reason, expected.reason)
    if found.seq != expected.seq:
        is_gap = found.seq is not None and expected.seq is not None and found.seq > expected.seq
        kind = FindingKind.SEQ_GAP if is_gap else FindingKind.SEQ_REPEATED
        yield _finding(kind, entry, "seq", found.seq, expected.seq)
    ours, theirs = decision_line(expected), decision_line(found)
    kinds = {
        FindingKind.WRONG_WINDOW: ("window_start", "window_end"),
        FindingKind.WRONG_TOTALS: ("free_tokens", "used", "total"),
    }
    for kind, fields in kinds.items():
        for field in fields:
            if theirs[field] != ours[field]:
                yield _finding(kind, entry, field, theirs[field], ours[field])


def _finding(kind: FindingKind, entry: Entry, field: str, found: object, expected: object) -> Finding:
    return Finding(kind, entry.entry, entry.decision.account, entry.decision.id, field, found, expected)


def _counter(account: str, group: str, found: Tally | None, expected: Tally | None) -> Finding:
    return Finding(
        FindingKind.COUNTER_DIFFERS, None, account, None, f"window of {group}", _plain(found), _plain(expected)
    )


def _plain(value: Any) -> Any:
    return None if value is None else {name: getattr(value, name) for name in value.__struct_fields__}
