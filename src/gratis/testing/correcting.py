"""What was decided can be corrected: a new entry that is linked to the first, which stays as it was."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from gratis.classify import charge_for
from gratis.errors import Conflict, EnrollmentError, GratisError, RequestError
from gratis.model import NAME_BYTES_MAX, Correction, Enrollment, Reason, Remedy, Sharing, correction_id
from gratis.stores import Bounds, Status
from gratis.testing.compare import everything, follows, plainly, refused, same, told
from gratis.testing.repeating import HOSTILE
from gratis.testing.scene import (
    ALLOWANCE,
    DAY,
    ENROLLED,
    HOUR,
    NOON,
    SMALL,
    TICK,
    Opener,
    Views,
    asked,
    small_offer,
    spent,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gratis.meter import Meter
    from gratis.model import Entry

MINUTE = timedelta(minutes=1)
BY: dict[str, Any] = {"actor": "ann", "why": "counted twice", "account": "acme"}
# Requests of 600 and 300; then the first turns out to have been of so many: what of it is free, and used then.
ADJUSTED = {
    ("free", "whole"): {0: (0, 300), 600: (600, 900), 700: (700, 1_000), 701: (0, 300)},
    ("free", "excess"): {0: (0, 300), 600: (600, 900), 700: (700, 1_000), 701: (700, 1_000)},
    ("all", "whole"): {0: (0, 300), 600: (600, 900), 700: (700, 1_000), 701: (0, 1_001)},
    ("all", "excess"): {0: (0, 300), 600: (600, 900), 700: (700, 1_000), 701: (700, 1_001)},
}
LONG = ("x" * NAME_BYTES_MAX, "x" * (NAME_BYTES_MAX - 1) + "y", "x" * (NAME_BYTES_MAX - 2), "\u00e9" * 127)


class Correcting:
    """Clauses about corrections."""

    def test_void_gives_back_what_was_used(self, open_store: Opener, window: str, reading: tuple[str, str]) -> None:
        """A voided request counts for nothing: what it took is given back, whether it was free or billed."""
        with Views(open_store) as views:
            meter = _owned(views, window, reading=reading)
            sizes = (600, 300, 200, 100)
            decided = [meter.decide(asked(place, size)) for place, size in enumerate(sizes)]
            taken = [
                one.used - (before or 0)
                for one, before in zip(decided, [0, *(one.used for one in decided)], strict=False)
                if one.used is not None
            ]
            used = decided[-1].used or 0
            for place, first in enumerate(decided):
                voided = meter.void(first.id, **BY)
                used -= taken[place]
                assert voided.correction is not None, "it corrects"
                said = voided.correction
                found = (said.of, said.number, said.remedy, said.returned, said.actor, said.why)
                same(found, (first.id, 1, Remedy.VOIDED, taken[place], "ann", "counted twice"), "the correction")
                same((voided.used, voided.tokens, voided.billed_tokens, voided.seq), (used, 0, 0, 5 + place), first.id)
                same((voided.window, voided.id, voided.at), (first.window, first.id, first.at), first.id)
                same(meter.decisions(first.id, account="acme"), [first, voided], "all that was said of it")
            same((used, meter.standing("acme")[0].used), (0, 0), "used in the end")
            follows(views.store(), ["small-offer"])

    def test_adjust_judges_what_was_really_used(
        self, open_store: Opener, window: str, reading: tuple[str, str]
    ) -> None:
        """What a request took is given back, and the real tokens are judged by the rule in the same window."""
        with Views(open_store) as views:
            meter = _owned(
                views, window, reading=reading, accounts=[f"adjusts to {size}" for size in ADJUSTED[reading]]
            )
            for size, (free, used) in ADJUSTED[reading].items():
                account = f"adjusts to {size}"
                first, other = (meter.decide(asked(number, number, account=account)) for number in (600, 300))
                by = {**BY, "account": account}
                adjusted = meter.adjust("r600", spent(size), **by)
                found = (adjusted.tokens, adjusted.free_tokens, adjusted.total, adjusted.used, adjusted.seq)
                same(found, (size, free, 300 + size, used, 3), account)
                same((adjusted.window, adjusted.terms), (first.window, first.terms), account)
                expected = [replace(first, replayed=True), replace(other, replayed=True)]
                same([meter.decide(asked(number, number, account=account)) for number in (600, 300)], expected, account)
            follows(views.store(), ["small-offer"])

    def test_corrections_are_a_chain(self, open_store: Opener) -> None:
        """Each correction gives back what the one before it took; they are numbered, and all of them are entries."""
        with Views(open_store) as views:
            meter, other = _owned(views), views.meter(view=1)
            first = meter.decide(asked(1, 600))
            said = [
                meter.adjust("r1", spent(500), **BY),
                other.void("r1", **BY),
                meter.adjust("r1", spent(500), **BY),
                other.adjust("r1", spent(900), **BY),
                meter.void("r1", **BY),
            ]
            same(
                [one.correction and (one.correction.number, one.correction.returned) for one in said],
                [(1, 600), (2, 500), (3, 0), (4, 500), (5, 900)],
                "numbers",
            )
            same([one.used for one in said], [500, 0, 500, 900, 0], "used")
            for one in (meter, other):
                same(one.decisions("r1", account="acme"), [first, *said], "all that was said of it")
            entries = list(meter.ledger())
            same([entry.decision for entry in entries], [first, *said], "ledger")
            same(len({entry.decision.request.id for entry in entries}), 6, "ids of their own")

    def test_a_correction_that_is_not_the_next_is_stale(self, open_store: Opener) -> None:
        """A store writes a request's corrections one after another: who missed one is told so, nothing is written."""
        with Views(open_store) as views:
            meter, store = _owned(views), views.store(1)
            first = meter.decide(asked(1, 600))
            meter.adjust("r1", spent(500), **BY)
            before = everything(views.store())
            for number, why in ((3, "counted twice"), (1, "refunded")):
                charge = charge_for(small_offer(), asked(1, 0, id=correction_id("r1", number)), ENROLLED)
                step = Correction("r1", number, Remedy.VOIDED, 600, first.window, "ann", why)
                (receipt,) = store.apply([replace(charge, step=step)])
                same(receipt.status, Status.STALE, f"number {number}")
            same(everything(views.store()), before, "what is kept")

    def test_the_same_said_twice_adds_nothing(self, open_store: Opener) -> None:
        """Void or adjusted to the same again, in any view, by whom and why ever, it is replayed."""
        with Views(open_store) as views:
            meter, other = _owned(views), views.meter(view=1)
            meter.decide(asked(1, 600))
            for said in ("adjust", "void"):
                first = meter.adjust("r1", spent(5), **BY) if said == "adjust" else meter.void("r1", **BY)
                before = everything(views.store())
                for one in (meter, other):
                    for why in ("counted twice", "as I said"):
                        by = {**BY, "why": why}
                        again = one.adjust("r1", spent(5), **by) if said == "adjust" else one.void("r1", **by)
                        same(again, replace(first, replayed=True), said)
                same(everything(views.store()), before, "what is kept")

    def test_only_an_owner_corrects_and_says_why(self, open_store: Opener) -> None:
        """Who owns nothing, gives no reason, or names no decision, corrects nothing; nothing is written."""
        with Views(open_store) as views:
            meter = _owned(views)
            meter.decide(asked(1, 600))
            meter.decide(asked(1, 600, account="assumed"))
            before = everything(views.store())
            for actor in ("eve", "Ann", ""):
                refused(EnrollmentError, meter.void, "r1", **{**BY, "actor": actor})
            refused(EnrollmentError, meter.void, "r1", **{**BY, "account": "assumed"})
            for why in ("", "x" * 256, "\n"):
                same(refused(RequestError, meter.void, "r1", **{**BY, "why": why}).field, "why", "field")
            same(refused(RequestError, meter.adjust, "r1", spent(None), **BY).field, "input_tokens", "field")
            for name in ("r2", "acme", correction_id("r1", 1)):
                same(meter.decisions(name, account="acme"), [], f"what was said of {name}")
                same(refused(RequestError, meter.void, name, **BY).field, "id", name)
                same(refused(RequestError, meter.adjust, name, spent(5), **BY).field, "id", name)
            same(everything(views.store()), before, "what is kept")

    def test_a_correction_rests_on_the_first_decisions_enrollment(self, open_store: Opener) -> None:
        """Whatever the account became since, a correction is judged as its request was."""
        with Views(open_store) as views:
            meter = _owned(views)
            meter.decide(asked(1, 600))
            for later in (Enrollment(tier=1, sharing=Sharing.ENABLED), Enrollment(tier=3)):
                views.meter(view=1).enroll("acme", later, actor="ann")
                adjusted = meter.adjust("r1", spent(1_000 if later.tier == 1 else 900), **BY)
                same(
                    (
                        adjusted.is_free,
                        adjusted.allowance,
                        adjusted.terms.enrollment and adjusted.terms.enrollment.tier,
                    ),
                    (True, 1_000, 3),
                    "adjusted",
                )

    def test_a_correction_counts_in_the_window_of_the_first(self, open_store: Opener, window: str) -> None:
        """When later windows are open, a correction still gives back, and judges, where its request counted."""
        with Views(open_store) as views:
            meter = _owned(views, window)
            first = meter.decide(asked(1, 600))
            assert first.window is not None, "it was judged"
            at = first.window.end
            later = [meter.decide(asked(2, 700, at=at)), meter.decide(asked(3, 100, at=at + DAY * 32))]
            adjusted = meter.adjust("r1", spent(50), **BY)
            same((adjusted.window, adjusted.used, adjusted.seq), (first.window, 50, 2), "adjusted")
            voided = meter.void("r2", **BY)
            same((voided.window, voided.used, voided.seq), (later[0].window, 0, 2), "voided")
            same(
                told([meter.decide(asked(4, 900, at=at + DAY * 32))]), [("within_allowance", 900, 1_000, 1_000, 2)], ""
            )
            follows(views.store(), ["small-offer"])

    def test_a_window_that_is_no_longer_kept_is_not_corrected(self, open_store: Opener, window: str) -> None:
        """A microsecond before seven days after its window a decision is corrected; from then on it stands."""
        with Views(open_store, bounds=Bounds()) as views:
            meter = _owned(views, window)
            first = meter.decide(asked(1, 600))
            assert first.window is not None, "it was judged"
            views.clock.now = first.window.end + Bounds().keep - TICK
            same(meter.adjust("r1", spent(50), **BY).used, 50, "in time")
            views.clock.now += TICK
            before = everything(views.store())
            same(refused(RequestError, meter.void, "r1", **BY).field, "at", "field")
            same(refused(RequestError, meter.adjust, "r1", spent(7), **BY).field, "at", "field")
            same(everything(views.store()), before, "what is kept")

    def test_a_correction_is_not_judged_by_its_time(self, open_store: Opener) -> None:
        """What was decided when its time had come is corrected though the clock has gone back since."""
        with Views(open_store, bounds=Bounds()) as views:
            meter = _owned(views)
            meter.decide(asked(1, 600))
            views.clock.now = NOON - HOUR
            same(meter.adjust("r1", spent(50), **BY).used, 50, "adjusted")
            same(meter.void("r1", **BY).used, 0, "voided")

    def test_what_was_excluded_is_voided_and_nothing_moves(self, open_store: Opener, window: str) -> None:
        """A correction of a request that no allowance covered is an entry, and takes and gives back nothing."""
        with Views(open_store) as views:
            meter = _owned(views, window)
            meter.decide(asked("counts", 10))
            meter.decide(asked("unlisted", 600, model="x"))
            voided = meter.void("runlisted", **BY)
            same((voided.reason, voided.used, voided.window), (Reason.MODEL_NOT_LISTED, None, None), "voided")
            adjusted = meter.adjust("runlisted", spent(5), **BY)
            same(
                (adjusted.reason, adjusted.tokens, adjusted.billed_tokens), (Reason.MODEL_NOT_LISTED, 5, 5), "adjusted"
            )
            same([one.used for one in meter.standing("acme")], [10, 0], "used")

    def test_what_was_unmeasured_is_adjusted(self, open_store: Opener, window: str) -> None:
        """A request whose usage was absent is judged when its owner says what it was."""
        with Views(open_store) as views:
            meter = _owned(views, window)
            same(meter.decide(asked(1, None)).reason, Reason.UNMEASURED, "first")
            same(told([meter.adjust("r1", spent(300), **BY)]), [("within_allowance", 300, 300, 300, 1)], "adjusted")
            same(told([meter.adjust("r1", spent(1_001), **BY)]), [("over_allowance", 0, 1_001, 0, 2)], "adjusted")

    def test_what_opened_no_window_opens_none_when_it_is_voided(self, open_store: Opener) -> None:
        """Where windows roll, a billed request that opened none is voided and opens none; one that now fits does."""
        with Views(open_store) as views:
            meter = _owned(views, "rolling")
            for number in (1, 2):
                same(meter.decide(asked(number, 1_001)).window, None, "billed")
            same(meter.void("r1", **BY).window, None, "voided")
            same([one.window for one in meter.standing("acme")], [None, None], "no window is open")
            adjusted = meter.adjust("r2", spent(1_000), **BY)
            same((adjusted.window_start, adjusted.used, adjusted.seq), (NOON, 1_000, 1), "adjusted")

    def test_requests_are_given_back_one_by_one(self, open_store: Opener, unit: str) -> None:
        """In any unit a void gives back what its request took, and an adjusted one still counts as one."""
        with Views(open_store) as views:
            allowance = ALLOWANCE if unit == "tokens" else 2
            meter = _owned(views, unit=unit, allowance=allowance)
            found = [meter.decide(asked(number, 500)) for number in range(3)]
            same([one.is_free for one in found], [True, True, False], "decided")
            same(meter.adjust("r0", spent(400), **BY).used, 900 if unit == "tokens" else 2, "adjusted")
            same(meter.void("r0", **BY).used, 500 if unit == "tokens" else 1, "voided")
            assert meter.decide(asked(3, 500)).is_free, "there is room again"
            assert meter.void("r0", **BY).replayed, "it is given back once"
            again = meter.adjust("r0", spent(1), **BY)
            same(again.correction and again.correction.returned, 0, "what is given back of what counts for nothing")
            follows(views.store(), ["small-offer"])

    def test_what_answered_still_counts_when_it_is_adjusted(self, open_store: Opener) -> None:
        """Where a late settle named another model, what is adjusted and voided is what counted, in its group."""
        with Views(open_store) as views:
            meter = _owned(views)
            hold = meter.hold(asked(1, None), 400, for_=MINUTE)
            views.clock.now += HOUR
            meter.expire("acme")
            meter.settle(hold, spent(30, model=SMALL))
            adjusted = meter.adjust("r1", spent(40), **BY)
            same((adjusted.group, adjusted.used, adjusted.request.model), ("small", 40, SMALL), "adjusted")
            voided = meter.void("r1", **BY)
            same((voided.group, voided.used), ("small", 0), "voided")

    def test_what_is_settled_late_may_be_corrected(self, open_store: Opener) -> None:
        """A void or an adjustment after a late settle gives back what was settled, not what was assumed."""
        with Views(open_store) as views:
            meter = _owned(views)
            hold = meter.hold(asked(1, None), 400, for_=MINUTE)
            views.clock.now += HOUR
            meter.expire("acme")
            meter.decide(asked(2, 100))
            found = [meter.settle(hold, spent(30)), meter.adjust("r1", spent(40), **BY), meter.void("r1", **BY)]
            same([one.used for one in found], [130, 140, 100], "used")
            same([one.correction and one.correction.returned for one in found], [400, 30, 40], "returned")
            same(meter.settle(hold, spent(30)), replace(found[0], replayed=True), "settled again")

    def test_a_correction_is_of_an_account_and_an_offer(self, open_store: Opener) -> None:
        """The same id in another account, or under another offer, stays as it was."""
        with Views(open_store) as views:
            meters = [_owned(views, name=name, accounts=["other"]) for name in ("one", "two")]
            for meter in meters:
                for account in ("acme", "other"):
                    meter.decide(asked(1, 600, account=account))
            meters[0].void("r1", **BY)
            found = [meter.standing(account)[0].used for meter in meters for account in ("acme", "other")]
            same(found, [0, 600, 600, 600], "used")
            words = [len(meter.decisions("r1", account=account)) for meter in meters for account in ("acme", "other")]
            same(words, [2, 1, 1, 1], "words")

    def test_names_of_what_is_corrected_are_taken_as_they_are(self, open_store: Opener) -> None:
        """Requests with ids of any letters and length are corrected, each for itself, and more than once."""
        with Views(open_store) as views:
            meter = _owned(views)
            names = sorted({*HOSTILE, *LONG, "correction 1 of x", "a~b", "~"})
            meter.decide_many([asked("", 1, id=name) for name in names])
            for left, name in zip(range(len(names) - 1, -1, -1), names, strict=True):
                adjusted = meter.adjust(name, spent(2), **BY)
                voided = views.meter(view=1).void(name, **BY)
                same((adjusted.used, voided.used, adjusted.id, voided.id), (left + 2, left, name, name), repr(name))
                same([one.id for one in meter.decisions(name, account="acme")], [name] * 3, repr(name))
            follows(views.store(), ["small-offer"])

    def test_an_id_that_is_taken_is_no_corrections(self, open_store: Opener) -> None:
        """A request decided or held under the name that a correction would have keeps it; nothing is corrected."""
        with Views(open_store) as views:
            meter = _owned(views)
            for name in ("r1", "r2"):
                meter.decide(asked("", 300, id=name))
            taken = [correction_id(name, 1) for name in ("r1", "r2")]
            decision = meter.decide(asked("", 0, id=taken[0]))
            hold = meter.hold(asked("", None, id=taken[1]), 100)
            before = everything(views.store())
            for name in ("r1", "r2"):
                same(refused(Conflict, meter.void, name, **BY).field, "id", name)
                same(len(meter.decisions(name, account="acme")), 1, name)
            same(everything(views.store()), before, "what is kept")
            same(meter.decide(asked("", 0, id=taken[0])), replace(decision, replayed=True), "the decided one")
            settled = meter.settle(hold, spent(7))
            same((settled.request.id, settled.tokens, settled.used, meter.holds("acme")), (taken[1], 7, 607, []), "")

    def test_a_corrections_name_is_no_request(self, open_store: Opener) -> None:
        """Asked under the name of a correction a request is refused; voiding that name gives nothing back twice."""
        with Views(open_store) as views:
            meter = _owned(views)
            meter.decide(asked(1, 600))
            adjusted = meter.adjust("r1", spent(500), **BY)
            name = adjusted.request.id
            refused(Conflict, meter.decide, asked("", 500, id=name))
            for _ in range(2):
                with suppress(GratisError):
                    meter.void(name, **BY)
            voided = meter.void("r1", **BY)
            same((voided.used, meter.standing("acme")[0].used), (0, 0), "used")
            follows(views.store(), ["small-offer"])

    def test_earlier_entries_are_never_rewritten(self, open_store: Opener, window: str) -> None:
        """Whatever is corrected, what the ledger said before it says still, and corrections come after it."""
        with Views(open_store) as views:
            meter = _owned(views, window)
            said: list[Entry] = []
            for number in range(12):
                meter.decide(asked(number, 100 + number))
                if number in {1, 4, 7, 10}:
                    meter.adjust(f"r{number - 1}", spent(number), **BY)
                if number in {3, 7, 11}:
                    meter.void(f"r{number - 2}", **BY)
                before, said = said, list(views.meter(view=1).ledger())
                same(said[: len(before)], before, "what was said before")
            same(len(said), 12 + 4 + 3, "entries")
            seqs = [entry.decision.seq for entry in said]
            same(seqs, list(range(1, len(said) + 1)), "seq counts corrections, too")
            follows(views.store(), ["small-offer"])

    def test_a_new_view_goes_on_from_corrections(self, open_store: Opener) -> None:
        """A view that is opened later knows what was held and corrected, and numbers on."""
        with Views(open_store) as views:
            meter = _owned(views)
            first = meter.decide(asked(1, 600))
            words = [first, meter.adjust("r1", spent(500), **BY)]
            hold = meter.hold(asked(2, None), 100)
            later = views.meter(view=3)
            same(plainly(later.decisions("r1", account="acme")), plainly(words), "words")
            same(later.holds("acme"), [hold], "holds")
            voided = later.void("r1", **BY)
            same((voided.correction and voided.correction.number, voided.used), (2, 0), "voided")


def _owned(views: Views, window: str = "day", *, accounts: Iterable[str] = (), **offer: Any) -> Meter:
    """A meter before accounts that Ann owns."""
    meter = views.meter(small_offer(window, **offer), assume=ENROLLED)
    for name in {"acme", *accounts}:
        meter.enroll(name, ENROLLED, actor="ann")
    return meter
