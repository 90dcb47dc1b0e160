"""Holds and corrections by many at once: what fits once is held once, and a race leaves one decision."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from gratis.errors import GratisError
from gratis.meter import AsyncMeter
from gratis.model import Decision, Expiry, Hold, Remedy
from gratis.testing.compare import follows, same
from gratis.testing.scene import (
    ALLOWANCE,
    DAY,
    ENROLLED,
    HOUR,
    NOON,
    Opener,
    Views,
    asked,
    in_threads,
    small_offer,
    spent,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gratis.meter import Meter

CALLERS = 8
HOLDERS = 64
BOUND = 70
ROUNDS = 6
BY: dict[str, Any] = {"actor": "ann", "why": "counted twice", "account": "acme"}


class Racing:
    """Clauses about holds and corrections by many at once."""

    def test_no_more_is_held_than_there_is(self, open_store: Opener, window: str) -> None:
        """Sixty-four threads hold at once: just as many fit as the allowance has room for, in any window."""
        offer = small_offer(window)
        with Views(open_store) as views:
            meters = [views.meter(offer, view=view) for view in (0, 1)]

            def hold(caller: int) -> list[object]:
                return [meters[caller % 2].hold(asked(caller, None), BOUND)]

            jobs = [partial(hold, caller) for caller in range(HOLDERS)]
            holds = in_threads(jobs)
            same(sum(one.fits for one in holds), ALLOWANCE // BOUND, "holds that fit")
            same(sum(one.aside for one in meters[0].holds("acme")), ALLOWANCE // BOUND * BOUND, "tokens set aside")
            same(len(meters[1].holds("acme")), HOLDERS, "holds")
            same([one.held for one in meters[0].standing("acme")], [ALLOWANCE // BOUND * BOUND, 0], "standing")

    def test_holds_and_settles_at_once_never_pass_the_allowance(self, open_store: Opener) -> None:
        """Where everybody holds first and spends no more than that, all that fits is free, and nothing is left held."""
        with Views(open_store) as views:
            meters = [views.meter(view=view) for view in (0, 1)]

            def spend(caller: int) -> list[object]:
                meter, decisions = meters[caller % 2], []
                for number in range(12):
                    hold = meter.hold(asked(f"{caller} {number}", None), BOUND)
                    if not hold.fits:
                        meter.release(hold)
                    elif number % 3:
                        decisions.append(meter.settle(hold, spent(BOUND - number)))
                    else:
                        meter.release(hold)
                return [*decisions]

            jobs = [partial(spend, caller) for caller in range(CALLERS)]
            decisions = in_threads(jobs)
            same({decision.is_free for decision in decisions}, {True}, "verdicts")
            same((meters[0].holds("acme"), [one.held for one in meters[1].standing("acme")]), ([], [0, 0]), "held")
            follows(views.store(), ["small-offer"])

    def test_one_hold_that_all_ask_for_is_held_once(self, open_store: Opener) -> None:
        """Of eight threads with the same hold one is told that it is new, and it is held once."""
        with Views(open_store) as views:
            meters = [views.meter(view=view) for view in (0, 1)]

            def hold(caller: int) -> list[object]:
                return [meters[caller % 2].hold(asked(number, None), 50) for number in range(ROUNDS)]

            jobs = [partial(hold, caller) for caller in range(CALLERS)]
            holds = in_threads(jobs)
            new = Counter(one.id for one in holds if not one.replayed)
            same(new, Counter({f"r{number}": 1 for number in range(ROUNDS)}), "new holds")
            same((len(meters[0].holds("acme")), meters[1].standing("acme")[0].held), (ROUNDS, ROUNDS * 50), "held")

    def test_a_race_for_a_hold_leaves_one_decision(self, open_store: Opener) -> None:
        """Settled, released, extended and run out at once, a hold leaves at most one decision, and is gone."""
        with Views(open_store) as views:
            meters = [views.meter(view=view) for view in (0, 1)]
            for number in range(ROUNDS):
                account = f"round {number}"
                expiry = Expiry.DECIDED if number % 3 else Expiry.RELEASED
                hold = meters[0].hold(asked(1, None, account=account), 400, for_=HOUR, on_expiry=expiry)
                views.clock.now = hold.until
                jobs = [partial(_try, verb) for verb in _verbs(meters, hold)]
                in_threads(jobs)
                for meter in meters:
                    meter.expire(account)
                    meter.release(hold)
                words = meters[0].decisions("r1", account=account)
                firsts = [e.decision for e in meters[1].ledger(account=account) if e.decision.correction is None]
                assert [one.id for one in firsts].count("r1") <= 1, f"it was decided twice: {firsts!r}"
                same(meters[1].holds(account), [], "what is held")
                standing = meters[0].standing(account, at=NOON)[0]
                same(standing.held, 0, "held")
                last = words[-1].tokens if words else 0
                assert last in {0, 30, 400}, f"it counts for {last} tokens"
                others = sum(one.tokens or 0 for one in firsts if one.id != "r1")
                same(standing.used, (last or 0) + others, "used")
            follows(views.store(), ["small-offer"])

    def test_what_ran_out_is_ended_once(self, open_store: Opener) -> None:
        """Of many that notice at once what ran out, each hold is decided once, before any of theirs."""
        with Views(open_store) as views:
            meters = [views.meter(view=view) for view in (0, 1)]
            for number in range(20):
                meters[0].hold(asked(f"held {number:02}", None), 10, for_=HOUR)
            views.clock.now += HOUR

            def decide(caller: int) -> list[object]:
                return [meters[caller % 2].decide(asked(f"by {caller}", 1))]

            jobs = [partial(decide, caller) for caller in range(CALLERS)]
            decisions = in_threads(jobs)
            names = [entry.decision.id for entry in meters[0].ledger()]
            same(names[:20], [f"rheld {number:02}" for number in range(20)], "what ran out")
            same(sorted(names[20:]), sorted(one.id for one in decisions), "what noticed it")
            same(max(one.used for one in decisions), 200 + CALLERS, "used")

    def test_a_late_settle_by_many_is_one_correction(self, open_store: Opener) -> None:
        """Eight threads settle the same late: one correction, and all are told it."""
        with Views(open_store) as views:
            meters = [views.meter(view=view) for view in (0, 1)]
            for number in range(ROUNDS):
                hold = meters[0].hold(asked(number, None), 100, for_=HOUR)
                views.clock.now += HOUR
                meters[0].expire("acme")

                def settle(caller: int, hold: Hold = hold) -> list[object]:
                    return [meters[caller % 2].settle(hold, spent(10))]

                jobs = [partial(settle, caller) for caller in range(CALLERS)]
                found = in_threads(jobs)
                same(Counter(one.replayed for one in found), Counter({True: CALLERS - 1, False: 1}), "new")
                same({one.used for one in found}, {10 * (number + 1)}, "used")
            follows(views.store(), ["small-offer"])

    def test_owners_correct_one_after_another(self, open_store: Opener) -> None:
        """Threads adjust and void one request at once: corrections are numbered 1..n, each on the one before it."""
        with Views(open_store) as views:
            meters = [views.meter(view=view) for view in (0, 1)]
            meters[0].enroll("acme", ENROLLED, actor="ann")
            meters[0].decide(asked(1, 600))

            def correct(caller: int) -> list[object]:
                meter = meters[caller % 2]
                return [meter.void("r1", **BY), meter.adjust("r1", spent(10 * caller), **BY)]

            jobs = [partial(correct, caller) for caller in range(1, 5)]
            in_threads(jobs)
            words = meters[0].decisions("r1", account="acme")
            corrections = [one.correction for one in words if one.correction is not None]
            same([one.number for one in corrections], list(range(1, len(words))), "numbers")
            tokens = [one.tokens for one in words]
            same([one.returned for one in corrections], tokens[:-1], "what each gives back")
            same({one.remedy for one in corrections}, {Remedy.VOIDED, Remedy.ADJUSTED}, "remedies")
            same(meters[1].standing("acme")[0].used, tokens[-1], "used")
            follows(views.store(), ["small-offer"])

    def test_a_name_is_claimed_by_one_of_many(self, open_store: Opener) -> None:
        """Of eight threads that claim the same names at once exactly one has each."""
        with Views(open_store) as views:
            stores = [views.store(view) for view in (0, 1)]
            names = [f"{percent}%" for percent in (50, 80, 95, 100)]

            def claim(caller: int) -> list[object]:
                store = stores[caller % 2]
                return [(name, store.claim("one", "acme", name, until=NOON + DAY, token=uuid4().hex)) for name in names]

            jobs = [partial(claim, caller) for caller in range(CALLERS)]
            found = Counter(in_threads(jobs))
            same({name: found[name, True] for name in names}, dict.fromkeys(names, 1), "who was first")

    def test_asyncio_holds_and_corrects_as_well(self, open_store: Opener) -> None:
        """Each verb of holds and corrections has the same answers from `AsyncMeter`, which `Meter` then replays."""

        async def run(views: Views) -> None:
            meter, other = AsyncMeter(views.store(1), small_offer(), assume=ENROLLED), views.meter()
            await meter.enroll("acme", ENROLLED, actor="ann")
            holds = await asyncio.gather(*[meter.hold(asked(n, None), 300, for_=(n + 1) * HOUR) for n in range(4)])
            same(sum(one.fits for one in holds), 3, "holds that fit")
            same(await meter.holds("acme"), other.holds("acme"), "holds")
            settled = await meter.settle(holds[3], spent(20))
            same(await meter.release(holds[2]), None, "released")
            longer = await meter.extend(holds[1], for_=DAY)
            same([one.until for one in other.holds("acme")], [NOON + HOUR, longer.until], "extended")
            same(await meter.standing("acme"), other.standing("acme"), "standing")
            views.clock.now += HOUR
            (ran_out,) = await meter.expire("acme")
            same((ran_out.id, ran_out.used), ("r0", 320), "what ran out")
            late = await meter.settle(holds[0], spent(50))
            adjusted = await meter.adjust("r0", spent(60), **BY)
            voided = await meter.void("r0", **BY)
            same([one.used for one in (settled, late, adjusted, voided)], [20, 70, 80, 20], "used")
            same(await meter.decisions("r0", account="acme"), [ran_out, late, adjusted, voided], "words")
            same(other.decisions("r0", account="acme"), [ran_out, late, adjusted, voided], "words in another view")
            said, same_said = await meter.explain(asked("new", 981)), other.explain(asked("new", 981))
            same((said, said.available, said.elsewhere), (same_said, 680, ("small",)), "explained")
            await meter.close()

        with Views(open_store) as views:
            asyncio.run(run(views))

    def test_tasks_hold_no_more_than_there_is(self, open_store: Opener) -> None:
        """Sixty-four tasks hold at once, and settle what fitted: all of that is free, to the last token."""

        async def run(views: Views) -> list[Decision]:
            meter = AsyncMeter(views.store(1), small_offer(), assume=ENROLLED)
            holds = await asyncio.gather(*[meter.hold(asked(n, None), BOUND) for n in range(HOLDERS)])
            fitting = [hold for hold in holds if hold.fits]
            decisions = await asyncio.gather(*[meter.settle(hold, spent(BOUND)) for hold in fitting])
            await meter.close()
            return [*decisions]

        with Views(open_store) as views:
            decisions = asyncio.run(run(views))
            expected = [(True, BOUND * (place + 1)) for place in range(ALLOWANCE // BOUND)]
            same(sorted((one.is_free, one.used) for one in decisions), expected, "decisions")
            follows(views.store(), ["small-offer"])


def _verbs(meters: Sequence[Meter], hold: Hold) -> list[Callable[[], object]]:
    """What eight callers do with one hold that has run out of time."""
    account = hold.account
    return [
        partial(meters[0].settle, hold, spent(30)),
        partial(meters[1].settle, hold, spent(30)),
        partial(meters[0].settle, hold, spent(None)),
        partial(meters[1].release, hold),
        partial(meters[0].expire, account),
        partial(meters[1].decide, asked("other", 1, account=account)),
        partial(meters[0].decide, asked(1, 30, account=account)),
        partial(meters[1].extend, hold, for_=HOUR),
    ]


def _try(verb: Callable[[], object]) -> list[object]:
    """What a caller was answered; who came too late is told so."""
    try:
        return [verb()]
    except GratisError as error:
        return [error]
