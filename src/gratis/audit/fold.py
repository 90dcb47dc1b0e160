"""A ledger replayed through the pure rule; what does not follow is a finding.

Each entry is judged anew from what it carries (request, enrollment, reading) and from the offer, on top of what
the entry before it in its window says was used, and its link is computed anew on top of that entry's. So one wrong
entry is one finding, not one for all that follow; and where entries are missing, the next one is judged on top of what
it says itself was used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from gratis.audit.findings import Finding, FindingKind, finding
from gratis.audit.force import InForce
from gratis.audit.judging import after_gap, differences, misprints, told_before, wrong_correction
from gratis.audit.seen import Seen
from gratis.audit.windows import Said, Windows
from gratis.book import Cases, corrects
from gratis.chain import UNCHAINED, Stems, link
from gratis.model import Correction, Reason, correction_id
from gratis.rule import Tally, decide

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
    from datetime import datetime

    from gratis.audit.force import History
    from gratis.model import Counts, Decision, Enrollment, Entry, Overage, Terms, Window
    from gratis.offer import Offer
    from gratis.rule import Charge
    from gratis.stores import Links

ENROLLMENTS_MAX = 10_000


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
    """Folds entries, in order; afterwards `counters` and `links` compare what a store says of its windows.

    `history` tells an account's changes of enrollment; without one, the enrollments that entries carry are believed.
    """

    def __init__(self, offer_named: Callable[[str], Offer | None], history: History | None = None) -> None:
        self._offer_named = offer_named
        self._cases: dict[tuple[str, bool, Counts, Overage], Cases | None] = {}
        self._enrollments: dict[Enrollment | None, int] = {}
        self._windows = Windows()
        self._linked: set[int] = set()  # shards of which some entry has a link: so have all that follow
        self._stems = Stems()
        self._force = InForce(history)
        self._seen: dict[str, Seen] = {}
        self._entry: dict[int, int] = {}
        self._is_cut = False
        self._forgotten: datetime | None = None
        self.entries = 0
        self.unlinked = 0
        """Of them so many have no link: they may be from before there were links, or somebody took them away."""

    def begin(self, cursor: Sequence[int]) -> None:
        """The ledger begins behind a cursor: what came before was trimmed, and is believed."""
        self._entry = dict(enumerate(cursor))
        self._is_cut = any(cursor)

    def forgets(self, until: datetime) -> None:
        """The store was trimmed: what ended until then may have no counter any more."""
        self._forgotten = until

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
                yield from found or misprints(item.entry, item.line)
            else:
                yield from self._check(item)

    def close(self) -> None:
        """Give back what was kept aside."""
        for seen in self._seen.values():
            seen.close()
        self._windows.close()

    def counters(self, offer: str, account: str, counters: Iterable[tuple[str, str, Tally]]) -> Iterator[Finding]:
        """What a store says of an account's windows that its ledger does not."""
        ours = {
            (group, kind, said.tally.window.start): said.tally
            for group, kind, said in self._windows.of((offer, account))
        }
        for group, kind, tally in counters:
            expected = ours.pop((group, kind, tally.window.start), None)
            if expected != tally and not (expected is None and self._is_cut):
                yield _counter(account, group, tally, expected)
        for (group, _, _), expected in ours.items():
            if not self._is_forgotten(expected.window):
                yield _counter(account, group, None, expected)

    def links(self, offer: str, account: str, links: Links) -> Iterator[Finding]:
        """What a store says of the ends of an account's chains that its ledger does not."""
        known = {
            (group, kind, said.tally.window.start): said
            for group, kind, said in self._windows.of((offer, account))
            if said.link is not None
        }
        ours: Links = {place: said.link for place, said in known.items() if said.link is not None}
        outside = self._windows.outside((offer, account))
        if outside is not None:
            ours[None] = outside
        for place in {**links, **ours}:
            found, expected = links.get(place), ours.get(place)
            if found is None and place is not None and self._is_forgotten(known[place].tally.window):
                continue
            if found != expected and not (self._is_cut and expected is None):
                field = "last link outside any window" if place is None else f"last link of {place[0]}"
                yield Finding(FindingKind.BROKEN_CHAIN, None, account, None, field, found, expected)

    def accounts(self) -> list[tuple[str, str]]:
        """Every account of which the ledger said something that a store is to know."""
        return self._windows.accounts()

    def histories(self, offer: str, account: str) -> Iterator[Finding]:
        """What does not follow within the history of an account's enrollments."""
        yield from self._force.histories(offer, account)

    def _is_forgotten(self, window: Window) -> bool:
        return self._forgotten is not None and window.end <= self._forgotten

    def _check(self, entry: Entry) -> Iterator[Finding]:
        decision = entry.decision
        last = self._entry.get(entry.shard, 0)
        if entry.entry != last + 1:
            kind = FindingKind.ENTRY_GAP if entry.entry > last else FindingKind.ENTRY_REPEATED
            yield finding(kind, entry, "entry", entry.entry, last + 1)
        self._entry[entry.shard] = entry.entry
        seen = self._seen.setdefault(decision.offer, Seen())
        if seen.get(decision.account, decision.request.id) is not None:
            yield finding(FindingKind.DECIDED_TWICE, entry, "id", decision.request.id, "an id not decided before")
        else:
            seen.put(decision)
        cases = self._cases_of(decision.terms)
        charge = None if cases is None else self._charge(entry, cases)
        place = self._place(decision, charge)
        yield from self._chained(entry, place)
        yield from self._force.check(entry)
        if charge is None:
            self._remember(entry, place)
            yield finding(
                FindingKind.OFFER_UNKNOWN,
                entry,
                "offer",
                decision.offer,
                "one that is shipped, or given by --offer FILE",
            )
            return
        expected = yield from self._judge(entry, charge, place)
        self._remember(entry, place, expected)

    def _place(self, decision: Decision, charge: Charge | None) -> tuple[str, str]:
        """Group and kind of window to which an entry belongs: what it says, or where only that follows, the rule."""
        terms = decision.terms
        said = (terms.group or "", terms.window)
        if charge is None or charge.terms.reason is not None or decision.window is None:
            return said
        ours = (charge.terms.group or "", charge.terms.window)
        account, start = (decision.offer, decision.account), decision.window.start
        for place in (said, ours):
            last = self._windows.get(account, place, start)
            if decision.seq == (1 if last is None else last.tally.seq + 1):
                return place
        return said

    def _said(self, decision: Decision, place: tuple[str, str]) -> str | None:
        """The link of the entry before, in the same window."""
        account = (decision.offer, decision.account)
        if decision.window is None:
            return self._windows.outside(account)
        said = self._windows.get(account, place, decision.window.start)
        return None if said is None else said.link

    def _chained(self, entry: Entry, place: tuple[str, str]) -> Iterator[Finding]:
        """Whether an entry's link follows; where the front was trimmed, the first one that is left is believed."""
        decision, shard = entry.decision, entry.shard
        before = self._said(decision, place)
        if entry.link is None:
            self.unlinked += 1
            if shard in self._linked:
                yield finding(FindingKind.BROKEN_CHAIN, entry, "link", None, "a link, as entries before it have")
            return
        self._linked.add(shard)
        if before is None and self._is_cut and decision.seq != 1:
            return
        expected = link(before or UNCHAINED, self._stems.of(decision), decision, entry.decided_at)
        if entry.link != expected:
            yield finding(FindingKind.BROKEN_CHAIN, entry, "link", entry.link, expected)

    def _remember(self, entry: Entry, place: tuple[str, str], expected: Decision | None = None) -> None:
        """Keep what an entry says of its window: so that a wrong one is not a finding in those that follow, too.

        Where it says another window than the rule, and counts on in that of the rule, only its window is wrong.
        """
        found = entry.decision
        account = (found.offer, found.account)
        if found.window is not None and found.seq is not None and found.used is not None:
            is_next = expected is not None and expected.window is not None and expected.seq == found.seq
            window = expected.window if is_next and expected is not None and expected.window else found.window
            tally = Tally(window, found.used, found.seq)
            self._windows.put(account, place, Said(tally, entry.link))
        elif entry.link is not None and found.window is None:
            self._windows.leave(account, entry.link)

    def _cases_of(self, terms: Terms) -> Cases | None:
        """The offer as an entry read it; one that was excluded used no reading."""
        key = (terms.offer, terms.reason is None, terms.counts, terms.overage)
        if key not in self._cases:
            offer = self._offer_named(terms.offer)
            if offer is not None and terms.reason is None:
                offer = offer.reading(counts=terms.counts, overage=terms.overage)
            self._cases[key] = None if offer is None else Cases(offer)
        return self._cases[key]

    def _charge(self, entry: Entry, cases: Cases) -> Charge:
        """What the store must have been asked: the entry's request, under the enrollment that it carries."""
        found, enrollment = entry.decision, entry.decision.terms.enrollment
        if len(self._enrollments) >= ENROLLMENTS_MAX:
            self._enrollments.clear()
            self._cases.clear()
        version = self._enrollments.setdefault(enrollment, len(self._enrollments))
        if found.correction is not None:
            return self._corrects(entry, cases, found.correction)
        return cases.charge(found.request, enrollment, version, found.hold)

    def _judge(self, entry: Entry, charge: Charge, place: tuple[str, str]) -> Generator[Finding, None, Decision]:
        found, terms = entry.decision, entry.decision.terms
        if found.correction is not None:
            first = self._seen[found.offer].get(found.account, found.correction.of)
            yield from wrong_correction(entry, charge, first)
        elif found.is_unmeasured and found.hold is not None and found.tokens != found.hold.tokens_max:
            yield finding(FindingKind.WRONG_TOTALS, entry, "tokens", found.tokens, found.hold.tokens_max)
        for field in terms.__struct_fields__:
            ours, theirs = getattr(charge.terms, field), getattr(terms, field)
            if ours != theirs:
                wrong = FindingKind.WRONG_GROUP if field == "group" else FindingKind.WRONG_TERMS
                yield finding(wrong, entry, field, theirs, ours)
        before = self._before(charge)
        if before is None and self._is_cut:
            # Of a window whose first decisions were trimmed, the first that is left says how it was before.
            before = told_before(found, charge)
        believed = after_gap(found, charge, before)
        if believed is not None:
            yield finding(FindingKind.SEQ_GAP, entry, "seq", found.seq, 1 if before is None else before.seq + 1)
            before = believed
        # Whether a window was still kept is the store's to know; the fold only asks whether it had ended.
        kept_since = entry.decided_at if found.reason is Reason.TOO_LATE else None
        expected, after = decide(charge, before, kept_since=kept_since, durability=found.durability)
        yield from differences(entry, expected)
        if after is not None and found.window is None:
            # It belongs to a window and says that it does not: those that follow are judged on top of it all the same.
            self._windows.put((found.offer, found.account), place, Said(after, entry.link))
        return expected

    def _before(self, charge: Charge) -> Tally | None:
        """The tally of a charge's window, or where windows roll that of the window which it is pinned to."""
        pin, terms = charge.pin, charge.terms
        if charge.window is None:
            return None
        account, kind = (terms.offer, charge.request.account), (terms.group or "", terms.window)
        if charge.rolls and pin is not None:
            said = self._windows.get(account, kind, pin.start)
            if said is not None:
                return said.tally
        said = self._windows.get(account, kind, None if charge.rolls else charge.window.start)
        return None if said is None else said.tally

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


def _counter(account: str, group: str, found: Tally | None, expected: Tally | None) -> Finding:
    return Finding(
        FindingKind.COUNTER_DIFFERS, None, account, None, f"window of {group}", _plain(found), _plain(expected)
    )


def _plain(value: Any) -> Any:
    return None if value is None else {name: getattr(value, name) for name in value.__struct_fields__}
