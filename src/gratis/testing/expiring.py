"""When a hold runs out of time: what it is then decided by, who notices, and what becomes of a late settle."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from msgspec.structs import replace

from gratis.classify import charge_for
from gratis.errors import Conflict, RequestError
from gratis.model import Enrollment, Expiry, Reason, Remedy, Sharing
from gratis.rule import Overdue
from gratis.stores import Bounds, Status
from gratis.testing.compare import everything, follows, nameless, refused, same, singly, told
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
    from gratis.meter import Meter

MINUTE = timedelta(minutes=1)
LOW = Enrollment(tier=1, sharing=Sharing.ENABLED)
MANY = 250  # more than a store tells at once
BY_EXPIRY = {
    ("free", "whole"): [(400, 400), (0, 400), (600, 1_000)],
    ("free", "excess"): [(400, 400), (600, 1_000), (0, 1_000)],
    ("all", "whole"): [(400, 400), (0, 1_100), (0, 1_700)],
    ("all", "excess"): [(400, 400), (600, 1_100), (0, 1_700)],
}


class Expiring:
    """Clauses about holds that run out of time."""

    def test_a_hold_runs_out_to_the_microsecond(self, open_store: Opener, window: str) -> None:
        """Until a microsecond before its time it is a hold; at its time the next request finds it decided."""
        with Views(open_store) as views:
            meter = views.meter(small_offer(window))
            hold = meter.hold(asked("held", None), 400, for_=MINUTE)
            same(hold.until, NOON + MINUTE, "until")
            views.clock.now = hold.until - TICK
            meter.decide(asked("before", 1))
            same([one.id for one in meter.holds("acme")], ["rheld"], "before its time")
            views.clock.now = hold.until
            same(told([meter.decide(asked("after", 1))]), [("within_allowance", 1, 402, 402, 3)], "the next")
            same(meter.holds("acme"), [], "after its time")
            (found,) = meter.decisions("rheld", account="acme")
            same(told([found]), [("within_allowance", 400, 401, 401, 2)], "the one that was held")
            said = (found.is_unmeasured, found.tokens, found.correction, found.window)
            same(said, (True, 400, None, hold.window or found.window), "its mark")
            same([entry.decision.id for entry in meter.ledger()], ["rbefore", "rheld", "rafter"], "ledger")

    def test_a_hold_may_just_be_released_in_time(self, open_store: Opener) -> None:
        """A hold that is to be released when it runs out leaves nothing; its id is as if nobody had held it."""
        with Views(open_store) as views:
            meter = views.meter()
            hold = meter.hold(asked("held", None), ALLOWANCE, for_=MINUTE, on_expiry=Expiry.RELEASED)
            views.clock.now = hold.until
            following = meter.hold(asked("next", None), ALLOWANCE)
            same((following.fits, following.held, following.used), (True, 0, 0), "the next hold")
            same(meter.decisions("rheld", account="acme"), [], "what was said of it")
            late = meter.settle(hold, spent(30))
            same((late.used, late.hold, late.correction, late.seq), (30, None, None, 1), "settled late")

    def test_each_reading_of_what_ran_out(self, open_store: Opener, window: str, reading: tuple[str, str]) -> None:
        """Holds that run out are decided by their bounds, in the order of their times, then of their ids."""
        with Views(open_store) as views:
            meter = views.meter(small_offer(window, reading=reading))
            for name, size, minutes in (("b", 700, 2), ("c", 600, 2), ("a", 400, 1)):
                meter.hold(asked(name, None), size, for_=minutes * MINUTE)
            views.clock.now += HOUR
            found = meter.expire("acme")
            same([one.id for one in found], ["ra", "rb", "rc"], "order")
            same([(one.free_tokens, one.used) for one in found], BY_EXPIRY[reading], "free and used")
            same([one.is_unmeasured for one in found], [True] * 3, "marks")
            same((meter.expire("acme"), meter.holds("acme")), ([], []), "once")
            same([entry.decision for entry in meter.ledger()], found, "ledger")
            follows(views.store(), ["small-offer"])

    def test_whatever_writes_ends_what_ran_out_first(self, open_store: Opener) -> None:
        """A request, a hold and a settle are judged after what ran out before them, in any view."""
        with Views(open_store) as views:
            for verb in ("decide", "decide_many", "hold", "settle", "by its bound"):
                meter, other = views.meter(), views.meter(view=1)
                own = meter.hold(asked("own", None, account=verb), 1, for_=DAY)
                meter.hold(asked("held", None, account=verb), 400, for_=MINUTE)
                views.clock.now += MINUTE
                if verb == "decide":
                    used = other.decide(asked(1, 5, account=verb)).used
                elif verb == "decide_many":
                    (answer,) = other.decide_many([asked(1, 5, account=verb)])
                    used = getattr(answer, "used", None)
                elif verb == "hold":
                    hold = other.hold(asked(1, None, account=verb), 5)
                    same(hold.held, 1, "held")
                    used = None if hold.used is None else hold.used + 5
                else:
                    used = other.settle(own, spent(5 if verb == "settle" else None)).used
                same(used, 401 if verb == "by its bound" else 405, verb)
                same(meter.decisions("rheld", account=verb)[0].used, 400, verb)

    def test_who_only_looks_ends_nothing(self, open_store: Opener) -> None:
        """Explaining, standing, the ledger, a repeat and a refusal leave what ran out as it is."""
        with Views(open_store) as views:
            meter = views.meter()
            first = meter.decide(asked("first", 100))
            meter.hold(asked("held", None), 400, for_=MINUTE)
            views.clock.now += HOUR
            before = everything(views.store())
            found = meter.explain(asked("new", 501))
            same((found.is_free, found.fits, found.held, found.available), (True, 900, 400, 500), "explained")
            same([(one.used, one.held) for one in meter.standing("acme")], [(100, 400), (0, 0)], "standing")
            same(meter.decide(asked("first", 100)), replace(first, replayed=True), "repeated")
            refused(Conflict, meter.decide, asked("first", 101))
            meter.decide(asked("other", 1, account="other"))
            same(everything(views.store())[1]["small-offer", "acme"], before[1]["small-offer", "acme"], "holds")
            same([entry.decision.id for entry in meter.ledger(account="acme")], ["rfirst"], "ledger")

    def test_a_settle_that_comes_before_anybody_noticed_just_settles(self, open_store: Opener, window: str) -> None:
        """A hold that is over time but still there is settled, released and extended as any other."""
        with Views(open_store) as views:
            meter = views.meter(small_offer(window))
            for account in ("settles", "by its bound", "releases", "extends", "decides"):
                hold = meter.hold(asked("held", None, account=account), 400, for_=MINUTE)
                views.clock.now += HOUR
                if account == "releases":
                    same(meter.release(hold), None, account)
                elif account == "extends":
                    same(meter.extend(hold, for_=HOUR), replace(hold, until=views.clock.now + HOUR), account)
                    same(meter.hold(asked("next", None, account=account), 1).held, 400, account)
                elif account == "decides":
                    decision = meter.decide(asked("held", 30, account=account))
                    same((decision.used, decision.correction, decision.is_unmeasured), (30, None, False), account)
                else:
                    decision = meter.settle(hold, spent(30 if account == "settles" else None))
                    same((decision.used, decision.correction), (30 if account == "settles" else 400, None), account)
                expected = {"releases": 0, "extends": 0}.get(account, 1)
                same(len(list(meter.ledger(account=account))), expected, f"entries of {account}")

    def test_a_longer_time_counts(self, open_store: Opener) -> None:
        """An extended hold runs out at its new time and not before; one that is gone is refused."""
        with Views(open_store) as views:
            meter, other = views.meter(), views.meter(view=1)
            hold = meter.hold(asked("held", None), 400, for_=HOUR)
            views.clock.now += MINUTE
            for span in (DAY, 2 * HOUR, MINUTE, HOUR):
                longer = other.extend(hold, for_=span)
                same(longer, replace(hold, until=views.clock.now + span), "extended")
                same(meter.holds("acme"), [longer], "what is held")
                same(_held(meter), 400, "held once")
            views.clock.now += HOUR - TICK
            meter.decide(asked(1, 1))
            same(len(meter.holds("acme")), 1, "before its new time")
            views.clock.now += TICK
            same(meter.decide(asked(2, 1)).used, 402, "at its new time")
            same(refused(RequestError, meter.extend, hold).field, "id", "extended too late")
            same(refused(RequestError, meter.extend, replace(hold, request=asked("never", 1))).field, "id", "unknown")

    def test_who_ends_a_hold_too_early_ends_nothing(self, open_store: Opener) -> None:
        """Told to end a hold that has time again, or is over, a store says that it is gone, and writes nothing."""
        with Views(open_store) as views:
            meter = views.meter()
            hold = meter.hold(asked("held", None), 400, for_=MINUTE)
            for name in ("held", "never"):
                charge = charge_for(small_offer(), replace(hold.request, id=f"r{name}"), ENROLLED)
                before = everything(views.store())
                (receipt,) = views.store(1).apply([replace(charge, step=Overdue(400, hold.window))])
                same((receipt.status, receipt.decision), (Status.GONE, None), name)
                same(everything(views.store()), before, "what is kept")

    def test_what_ran_out_is_decided_in_its_window(self, open_store: Opener, window: str) -> None:
        """A hold that runs out when the next window is open is decided in the one that admitted it."""
        with Views(open_store) as views:
            meter = views.meter(small_offer(window))
            first = meter.decide(asked("first", 100))
            assert first.window is not None, "it was judged"
            views.clock.now = first.window.end - TICK
            meter.hold(asked("held", None, at=views.clock.now), 300, for_=HOUR)
            views.clock.now += MINUTE
            later = meter.decide(asked("later", 7, at=views.clock.now))
            views.clock.now += HOUR
            last = meter.decide(asked("last", 7, at=views.clock.now))
            (found,) = meter.decisions("rheld", account="acme")
            same((found.window, found.used, found.seq), (first.window, 400, 2), "what ran out")
            same((last.window, last.used, last.seq), (later.window, 14, 2), "the next window")

    def test_what_ran_out_is_decided_under_the_latest_enrollment(self, open_store: Opener) -> None:
        """Whoever learns late of a change still ends what ran out, as the account stands now, and goes on."""
        with Views(open_store) as views:
            meter, other = views.meter(), views.meter(view=1)
            meter.enroll("acme", ENROLLED, actor="ann")
            meter.hold(asked("held", None), 400, for_=MINUTE)
            other.enroll("acme", LOW, actor="ann")
            views.clock.now += HOUR
            same(told([meter.decide(asked(1, 250))]), [("within_allowance", 250, 250, 250, 2)], "the next")
            (found,) = meter.decisions("rheld", account="acme")
            same(told([found]), [("over_allowance", 0, 400, 0, 1)], "what ran out")

    def test_any_number_runs_out_at_once(self, open_store: Opener) -> None:
        """Hundreds of holds that ran out are all ended before the next request, in one order, whoever asks."""
        with Views(open_store) as views:
            meter = views.meter(small_offer(allowance=10**6))
            for number in range(MANY):
                expiry = Expiry.RELEASED if number % 5 == 0 else Expiry.DECIDED
                meter.hold(asked(f"{number * 7 % MANY:03}", None), 1, for_=(1 + number % 3) * MINUTE, on_expiry=expiry)
            order = [hold.id for hold in meter.holds("acme") if hold.expiry is Expiry.DECIDED]
            views.clock.now += HOUR
            decision = views.meter(small_offer(allowance=10**6), view=1).decide(asked("next", 1))
            same((decision.used, decision.seq, meter.holds("acme")), (len(order) + 1, len(order) + 1, []), "the next")
            same([entry.decision.id for entry in meter.ledger()], [*order, "rnext"], "order")

    def test_a_batch_ends_what_ran_out_as_one_by_one(self, open_store: Opener) -> None:
        """Wherever in a batch a held id stands whose hold ran out, it is decided as one after another would be."""
        orders = ([0, 1, 2], [2, 0, 1], [1, 2, 0], [0, 2, 1], [2, 1, 0], [1, 0, 2], [2, 0, 2, 1, 0], [0, 0, 2])
        for place, order in enumerate(orders):
            found = []
            with Views(open_store) as views:
                for is_batch in (True, False):
                    meter, account = views.meter(), f"{place} {is_batch}"
                    for number in (0, 1):
                        meter.hold(asked(number, None, account=account), 400, for_=(2 - number) * MINUTE)
                    views.clock.now += HOUR
                    requests = [asked(number, 300, account=account) for number in order]
                    answers = meter.decide_many(requests) if is_batch else singly(meter, requests)
                    rows = [nameless(entry.decision) for entry in meter.ledger(account=account)]
                    found.append(([nameless(answer) for answer in answers], rows))
            same(found[0], found[1], f"order {order}")

    def test_a_late_settle_corrects_what_was_assumed(
        self, open_store: Opener, window: str, reading: tuple[str, str]
    ) -> None:
        """What the bound took is given back, then the real tokens are judged; the first decision stays as it was."""
        with Views(open_store) as views:
            meter = views.meter(small_offer(window, reading=reading))
            room = 700
            for size in (400, 0, 30, room, room + 1):
                account = f"spends {size}"
                hold = meter.hold(asked("held", None, account=account), 400, for_=MINUTE)
                views.clock.now += HOUR
                meter.decide(asked("other", 300, account=account))
                decision = meter.settle(hold, spent(size))
                free = size if size <= room else room if reading[1] == "excess" else 0
                used = 300 + (size if reading[0] == "all" else free)
                found = (decision.free_tokens, decision.total, decision.used, decision.seq, decision.is_free)
                same(found, (free, 300 + size, used, 3, size <= room), account)
                correction = decision.correction
                assert correction is not None, "it corrects"
                said = (correction.of, correction.number, correction.remedy, correction.returned, decision.id)
                same(said, ("rheld", 1, Remedy.SETTLED, 400, "rheld"), account)
                words = meter.decisions("rheld", account=account)
                same([(one.tokens, one.is_unmeasured) for one in words], [(400, True), (size, False)], account)
                same([entry.decision.id for entry in meter.ledger(account=account)], ["rheld", "rother", "rheld"], "")
            follows(views.store(), ["small-offer"])

    def test_a_late_settle_is_made_once(self, open_store: Opener) -> None:
        """Settled late again it is replayed, in any view; with other tokens or another time it is a conflict."""
        with Views(open_store) as views:
            meter, other = views.meter(), views.meter(view=1)
            hold = meter.hold(asked("held", None), 400, for_=MINUTE)
            views.clock.now += HOUR
            meter.expire("acme")
            same(refused(Conflict, meter.decide, asked("held", 30, at=NOON + TICK)).field, "at", "another time, before")
            first = meter.settle(hold, spent(30))
            before = everything(views.store())
            again = replace(first, replayed=True)
            found = [
                other.settle(hold, spent(30)),
                meter.decide(asked("held", 30)),
                *other.decide_many([asked("held", 30)]),
            ]
            same(found, [again] * 3, "again")
            for request in (asked("held", 31), asked("held", 30, model=SMALL), asked("held", 30, at=NOON + TICK)):
                conflict = refused(Conflict, other.decide, request)
                expected = next(
                    name
                    for name in ("model", "at", "input_tokens")
                    if getattr(request, name) != getattr(asked("held", 30), name)
                )
                same(conflict.field, expected, "the conflict")
            same(everything(views.store()), before, "what is kept")

    def test_a_late_settle_within_a_batch_is_made_in_its_place(self, open_store: Opener) -> None:
        """What a late settle gives back is there for the next request of its batch, as one by one."""
        with Views(open_store) as views:
            meter = views.meter()
            found = []
            for account in ("batch", "one by one"):
                meter.hold(asked("held", None, account=account), 900, for_=MINUTE)
                views.clock.now += HOUR
                meter.expire(account)
                requests = [asked("held", 30, account=account), asked("next", 500, account=account)]
                answers = meter.decide_many(requests) if account == "batch" else singly(meter, requests)
                found.append([nameless(answer) for answer in answers])
            same(found[0], found[1], "answers")
            same([getattr(answer, "used", None) for answer in found[1]], [30, 530], "used")

    def test_a_late_settle_of_a_window_that_is_gone_is_refused_in_its_place(self, open_store: Opener) -> None:
        """Where the window is no longer kept what was assumed stands, and the rest of a batch is decided."""
        with Views(open_store, bounds=Bounds()) as views:
            meter = views.meter()
            hold = meter.hold(asked("held", None), 400, for_=MINUTE)
            views.clock.now += HOUR
            meter.expire("acme")
            views.clock.now += 9 * DAY
            now = views.clock.now
            same(refused(RequestError, meter.settle, hold, spent(30)).field, "at", "settled")
            answers = meter.decide_many([asked(1, 5, at=now), asked("held", 30), asked(2, 7, at=now)])
            same([getattr(one, "used", "refused") for one in answers], [5, "refused", 12], "answers")
            same(len(meter.decisions("rheld", account="acme")), 1, "what was said of it")

    def test_a_late_release_corrects_what_was_assumed(self, open_store: Opener, window: str) -> None:
        """Released after it was decided by its bound, a request counts for nothing: a new entry, once."""
        with Views(open_store) as views:
            meter, other = (views.meter(small_offer(window), view=view) for view in (0, 1))
            hold = meter.hold(asked("held", None), 400, for_=MINUTE)
            views.clock.now += HOUR
            meter.decide(asked("other", 300))
            released = meter.release(hold)
            assert released is not None, "it was decided before"
            assert released.correction is not None, "it corrects"
            said = (released.correction.remedy, released.correction.returned, released.tokens, released.used)
            same(said, (Remedy.RELEASED, 400, 0, 300), "released")
            same([other.release(hold), meter.release(hold)], [None, None], "again")
            same(len(list(meter.ledger())), 3, "entries")

    def test_a_release_after_a_settle_changes_nothing(self, open_store: Opener) -> None:
        """What was settled, in time or late, stays so when its hold is released."""
        with Views(open_store) as views:
            meter = views.meter()
            for account in ("in time", "late"):
                hold = meter.hold(asked("held", None, account=account), 400, for_=MINUTE)
                if account == "late":
                    views.clock.now += HOUR
                    meter.expire(account)
                meter.settle(hold, spent(30))
                before = everything(views.store())
                same(meter.release(hold), None, account)
                same(everything(views.store()), before, account)

    def test_a_late_settle_may_be_of_another_group(self, open_store: Opener, window: str) -> None:
        """Where another model answered, what was assumed is given back where it counted, and judged where it counts."""
        with Views(open_store) as views:
            meter = views.meter(small_offer(window))
            for model, group, reason in (
                (SMALL, "small", Reason.WITHIN_ALLOWANCE),
                ("x", None, Reason.MODEL_NOT_LISTED),
            ):
                account = f"answered by {model}"
                hold = meter.hold(asked("held", None, account=account), 400, for_=MINUTE)
                views.clock.now += HOUR
                meter.expire(account)
                decision = meter.settle(hold, spent(30, model=model))
                same((decision.group, decision.reason), (group, reason), account)
                used = {one.group: one.used for one in meter.standing(account, at=NOON)}
                same(used, {"large": 0, "small": 30 if group else 0}, account)
                same(meter.settle(hold, spent(30, model=model)), replace(decision, replayed=True), account)
            follows(views.store(), ["small-offer"])


def _held(meter: Meter) -> int:
    return sum(one.held for one in meter.standing("acme"))
