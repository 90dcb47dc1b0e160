"""Who takes part: when a change of an enrollment counts, who may make it, and what is kept of it."""

from __future__ import annotations

from functools import partial

from msgspec.structs import replace

from gratis.classify import charge_for
from gratis.errors import EnrollmentError
from gratis.model import Enrollment, Reason, Sharing
from gratis.offers import load
from gratis.stores import Status
from gratis.testing.compare import kept, refused, same, told
from gratis.testing.scene import (
    ENROLLED,
    FULL,
    NOON,
    TICK,
    Opener,
    Views,
    asked,
    in_threads,
    small_offer,
)

LOW = Enrollment(tier=1, sharing=Sharing.ENABLED)
THREADS = 8
CHANGES_EACH = 5


class Enrolling:
    """Clauses about enrollments."""

    def test_a_change_counts_in_every_view(self, open_store: Opener) -> None:
        """A change acknowledged in one view counts for every decision that starts afterwards in any other."""
        with Views(open_store) as views:
            meters = [views.meter(view=view, assume=None) for view in (0, 1)]
            found = [meters[1].decide(asked("before"))]
            changes = (ENROLLED, LOW, Enrollment(tier=5), replace(ENROLLED, sharing="selected", projects={"p"}))
            for number, enrollment in enumerate(changes):
                meters[number % 2].enroll("acme", enrollment, actor="ann")
                found += [meters[1 - number % 2].decide(asked(number)), meters[number % 2].decide(asked(f"{number} b"))]
            excluded = [(reason, 0, None, None, None) for reason in ("sharing_disabled", "project_not_shared")]
            same(
                told(found),
                [
                    ("not_enrolled", 0, None, None, None),
                    *[("within_allowance", 10, 10 * seq, 10 * seq, seq) for seq in (1, 2, 3, 4)],
                    *excluded[:1] * 2,
                    *excluded[1:] * 2,
                ],
            )
            same([one.allowance for one in found[1:5]], [1_000, 1_000, 250, 250], "allowances")

    def test_a_change_counts_in_a_batch(self, open_store: Opener) -> None:
        """A batch that starts after a change is judged by it, each account by its own."""
        with Views(open_store) as views:
            one, other = views.meter(assume=None), views.meter(view=1, assume=None)
            batch = [asked(1, account=account) for account in ("a", "b", "c")]
            other.decide_many(batch)
            one.enroll("a", ENROLLED, actor="ann")
            one.enroll("b", LOW, actor="ann")
            again = [replace(request, id=name) for name in ("r2", "r3") for request in batch]
            found = other.decide_many(again)
            same([getattr(answer, "allowance", answer) for answer in found], [1_000, 250, None] * 2, "allowances")

    def test_an_outdated_charge_carries_the_latest_change(self, open_store: Opener) -> None:
        """A charge that rests on another version than the latest is told that one, and nothing is written."""
        with Views(open_store) as views:
            offer = small_offer()
            latest = None
            for version in (0, 1, 2):
                if version:
                    latest = views.meter().enroll("acme", ENROLLED, actor="ann")
                before = kept(views.store())
                for wrong in {0, 1, 2, 3} - {version}:
                    charge = charge_for(offer, asked(wrong), ENROLLED, version=wrong)
                    for dry in (False, True):
                        (receipt,) = views.store(1).apply([charge], dry=dry)
                        found = (receipt.status, receipt.change, receipt.decision)
                        same(found, (Status.OUTDATED, latest, None), f"{wrong} in place of {version}")
                same(kept(views.store()), before, "what is kept")
                (receipt,) = views.store(1).apply(
                    [charge_for(offer, asked("new"), ENROLLED, version=version)], dry=True
                )
                same(receipt.status, Status.DECIDED, f"version {version}")

    def test_an_outdated_charge_holds_up_no_other(self, open_store: Opener) -> None:
        """In a batch only the charges of the account that changed are outdated."""
        with Views(open_store) as views:
            offer = small_offer()
            views.meter().enroll("changed", ENROLLED, actor="ann")
            names = ("acme", "changed", "acme", "other", "changed")
            requests = [asked(number, account=name) for number, name in enumerate(names)]
            receipts = views.store(1).apply([charge_for(offer, request, ENROLLED) for request in requests])
            expected = [Status.OUTDATED if name == "changed" else Status.DECIDED for name in names]
            same([receipt.status for receipt in receipts], expected, "what was done")
            seqs = [receipt.decision and receipt.decision.seq for receipt in receipts]
            same(seqs, [1, None, 2, 1, None], "seq")

    def test_every_change_is_kept(self, open_store: Opener) -> None:
        """An account's changes have versions from 1, their times and actors, and every field, in every view."""
        with Views(open_store) as views:
            made = []
            for enrollment, actor in ((Enrollment(tier=0), "ann"), (FULL, "ann"), (LOW, "{x}"), (ENROLLED, "\u05d0")):
                views.clock.now += TICK
                made.append(views.meter().enroll("acme", enrollment, actor=actor))
            same([change.version for change in made], [1, 2, 3, 4], "versions")
            same([change.at for change in made], [NOON + number * TICK for number in (1, 2, 3, 4)], "times")
            same([change.actor for change in made], ["ann", "ann", "{x}", "\u05d0"], "actors")
            owners = [frozenset({"ann"}), *[FULL.owners] * 3]
            enrollments = [Enrollment(tier=0), FULL, LOW, ENROLLED]
            expected = [replace(one, owners=who) for one, who in zip(enrollments, owners, strict=True)]
            same([change.enrollment for change in made], expected, "enrollments")
            for view in (0, 1):
                same(views.meter(view=view).enrollments("acme"), made, "changes")
            same(views.meter().enrollments("other"), [], "changes of another account")

    def test_only_owners_change_it(self, open_store: Opener) -> None:
        """Who enrolls first is the owner; owners hand over; what anyone else tries is refused and changes nothing."""
        with Views(open_store) as views:
            meter, other = views.meter(assume=None), views.meter(view=1, assume=None)
            meter.enroll("acme", ENROLLED, actor="ann")
            before = kept(views.store())
            for actor in ("Ann", "ann ", "bob", "acme", "\uff41nn"):
                refused(EnrollmentError, other.enroll, "acme", LOW, actor=actor)
            same(kept(views.store()), before, "what is kept")
            meter.enroll("acme", replace(LOW, owners={"bob"}), actor="ann")
            refused(EnrollmentError, other.enroll, "acme", ENROLLED, actor="ann")
            other.enroll("acme", ENROLLED, actor="bob")
            other.enroll("other", ENROLLED, actor="ann")
            same([change.actor for change in meter.enrollments("acme")], ["ann", "ann", "bob"], "who enrolled")
            same(meter.decide(asked(1)).allowance, 1_000, "allowance")

    def test_what_the_offer_rules_out_is_refused(self, open_store: Opener) -> None:
        """An enrollment that the offer's revision cannot have is refused, and the account stays unknown."""
        with Views(open_store) as views:
            meter = views.meter(load("openai-data-sharing"), assume=None)
            for enrollment in (replace(ENROLLED, plan="enterprise"), replace(ENROLLED, zero_data_retention=True)):
                refused(EnrollmentError, meter.enroll, "acme", enrollment, actor="ann")
            same(kept(views.store()), {}, "what is kept")
            same(meter.enroll("acme", ENROLLED, actor="bob").version, 1, "version")

    def test_an_enrollment_is_of_one_offer(self, open_store: Opener) -> None:
        """Taking part in one offer is not taking part in another."""
        with Views(open_store) as views:
            one, two = (views.meter(small_offer(name=name), assume=None) for name in ("one", "two"))
            one.enroll("acme", ENROLLED, actor="ann")
            same(two.decide(asked(1)).reason, Reason.NOT_ENROLLED, "reason")
            same(two.enroll("acme", LOW, actor="bob").version, 1, "version")
            same([meter.decide(asked(2)).allowance for meter in (one, two)], [1_000, 250], "allowances")

    def test_what_is_assumed_counts_until_an_account_is_enrolled(self, open_store: Opener) -> None:
        """An account is what a meter assumes, until it is enrolled, and never again."""
        with Views(open_store) as views:
            meter = views.meter(assume=LOW)
            found = [meter.decide(asked(1)).allowance]
            views.meter(view=1).enroll("acme", ENROLLED, actor="ann")
            found += [meter.decide(asked(2)).allowance, meter.decide(asked(3, account="other")).allowance]
            same(found, [250, 1_000, 250], "allowances")

    def test_changes_made_at_once_are_one_after_another(self, open_store: Opener) -> None:
        """Changes from many threads have versions 1..n, each once, and are all kept as they were acknowledged."""
        with Views(open_store) as views:
            meters = [views.meter(view=view) for view in (0, 1)]

            def change(caller: int) -> list[object]:
                tiers = [Enrollment(tier=(caller + number) % 6) for number in range(CHANGES_EACH)]
                return [meters[caller % 2].enroll("acme", one, actor="ann") for one in tiers]

            made = in_threads([partial(change, caller) for caller in range(THREADS)])
            made.sort(key=lambda one: one.version)
            same([one.version for one in made], list(range(1, THREADS * CHANGES_EACH + 1)), "versions")
            same(meters[0].enrollments("acme"), made, "changes")
