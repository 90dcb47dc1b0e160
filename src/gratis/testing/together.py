"""Many at once: views, threads and tasks are answered as if one had asked after another; `seq` tells the order."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

from gratis.meter import AsyncMeter, Meter
from gratis.model import Decision, Enrollment, Request, Sharing
from gratis.testing.compare import by_the_rule, fold, follows, ledger, plain, plainly, same
from gratis.testing.scene import (
    ALLOWANCE,
    ENROLLED,
    HOUR,
    LARGE,
    NOON,
    SMALL,
    Opener,
    Views,
    asked,
    in_threads,
    small_offer,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

THREADS = 8
REQUESTS = 300
ASKED_EACH = 200
TASKS = 64
SIZES = (0, 1, 7, 20, 60, 61, 130)
LOW = Enrollment(tier=1, sharing=Sharing.ENABLED)


class Together:
    """Clauses about many at once."""

    def test_two_views_are_one_store(self, open_store: Opener, window: str, reading: tuple[str, str]) -> None:
        """Requests that come by turns to two views, singly and in batches, are decided as if to one."""
        offer = small_offer(window, reading=reading)
        requests = [
            asked(number, SIZES[number % len(SIZES)], model=(LARGE, SMALL)[number % 2], at=NOON + number * HOUR)
            for number in range(72)
        ]
        with Views(open_store) as views:
            meters = [views.meter(offer, view=view) for view in (0, 1)]
            answers: list[object] = []
            for first in range(0, 72, 6):
                answers += [meters[place % 2].decide(requests[first + place]) for place in range(3)]
                answers += meters[first // 6 % 2].decide_many(requests[first + 3 : first + 6])
            same(plainly(answers), by_the_rule(offer, requests), "decisions")

    def test_threads_are_answered_in_one_order(self, open_store: Opener, window: str) -> None:
        """Eight threads over two views, asking each other's ids while the tier changes, have the decisions of `seq`."""
        offer = small_offer(window)
        with Views(open_store) as views:
            meters = [views.meter(offer, view=view) for view in (0, 1)]

            def ask(caller: int) -> list[object]:
                if caller == 0:
                    for turn in range(12):
                        meters[turn % 2].enroll("acme", LOW if turn % 2 else ENROLLED, actor="ann")
                return _ask(meters[caller % 2], caller)

            jobs = [partial(ask, caller) for caller in range(THREADS)]
            _explained(views, offer.name, in_threads(jobs))

    def test_an_id_that_all_ask_at_once_is_decided_once(self, open_store: Opener) -> None:
        """Of eight threads with the same request one decides, and the others are told what it decided."""
        with Views(open_store) as views:
            meters = [views.meter(view=view) for view in (0, 1)]
            rounds = range(15)

            def ask(caller: int) -> list[object]:
                return [meters[caller % 2].decide(asked(number, 90)) for number in rounds]

            jobs = [partial(ask, caller) for caller in range(THREADS)]
            answers = in_threads(jobs)
            _explained(views, "small-offer", answers)
            same(sum(not answer.replayed for answer in answers), len(rounds), "new decisions")

    def test_the_last_token_is_given_once(self, open_store: Opener) -> None:
        """Of many that ask at once for what fits once, exactly one is free, again and again."""
        with Views(open_store) as views:
            meters = [views.meter(view=view) for view in (0, 1)]
            rounds = range(12)

            def ask(caller: int) -> list[object]:
                name, accounts = f"of {caller}", (f"account {number}" for number in rounds)
                return [meters[caller % 2].decide(asked(name, ALLOWANCE, account=account)) for account in accounts]

            jobs = [partial(ask, caller) for caller in range(THREADS)]
            answers = in_threads(jobs)
            free = Counter(answer.account for answer in answers if answer.is_free)
            same(free, Counter({f"account {number}": 1 for number in rounds}), "free requests of each account")
            _explained(views, "small-offer", answers)

    def test_asyncio_has_the_same_answers(self, open_store: Opener) -> None:
        """`AsyncMeter` answers each verb as `Meter` does, over the same store."""

        async def run(views: Views) -> None:
            meter = AsyncMeter(views.store(1), small_offer(), assume=ENROLLED)
            plain_meter = views.meter()
            change = await meter.enroll("acme", ENROLLED, actor="ann")
            first = await meter.decide(asked(1, 900))
            said = await meter.explain(asked(2, 101))
            same((said.is_free, said.fits), (False, 100), "explained")
            batch = await meter.decide_many([asked(1, 900), asked(2, 101), asked(3, 100)])
            same([getattr(one, "used", one) for one in batch], [900, 900, 1_000], "used")
            same(plain_meter.decide(asked(1, 900)).seq, first.seq, "seq")
            same(await meter.standing("acme"), plain_meter.standing("acme"), "standing")
            same(await meter.enrollments("acme"), [change], "changes")
            same(await meter.accounts(), plain_meter.accounts(), "accounts")
            same([entry async for entry in meter.ledger()], list(plain_meter.ledger()), "ledger")
            await meter.close()

        with Views(open_store) as views:
            asyncio.run(run(views))

    def test_tasks_in_flight_are_answered_in_one_order(self, open_store: Opener, window: str) -> None:
        """Sixty-four tasks at once, over two views, have the decisions of `seq`, each id one."""
        offer = small_offer(window)

        async def run(views: Views) -> list[object]:
            meters = [AsyncMeter(views.store(view), offer, assume=ENROLLED) for view in (1, 2)]
            requests = [_request(number % 40) for number in range(TASKS)]
            asking = [meters[place % 2].decide(request) for place, request in enumerate(requests)]
            answers = await asyncio.gather(*asking)
            for meter in meters:
                await meter.close()
            return [*answers]

        with Views(open_store) as views:
            answers = asyncio.run(run(views))
            names = [_request(number % 40).id for number in range(TASKS)]
            same([getattr(answer, "id", answer) for answer in answers], names, "ids")
            _explained(views, offer.name, answers)

    def test_a_task_that_gives_up_harms_no_other(self, open_store: Opener) -> None:
        """Of sixty-four tasks every fourth is cancelled: the others have their own answers; asking again is safe."""

        async def run(views: Views, turns: int) -> None:
            meter = AsyncMeter(views.store(1 + turns), small_offer(), assume=ENROLLED)
            requests = [asked(f"{turns} {number}", 5, account=f"account {number % 3}") for number in range(TASKS)]
            tasks = [asyncio.create_task(meter.decide(request)) for request in requests]
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in tasks[::4]:
                task.cancel()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            for place, (request, answer) in enumerate(zip(requests, answers, strict=True)):
                if isinstance(answer, Decision):
                    same(answer.request, request, "the request that was answered")
                else:
                    same((type(answer), place % 4), (asyncio.CancelledError, 0), "what was raised")
            again = await asyncio.gather(*map(meter.decide, requests))
            for request, answer, first in zip(requests, again, answers, strict=True):
                same(answer.request, request, "the request that was answered again")
                if isinstance(first, Decision):
                    same((answer.seq, answer.used, answer.replayed), (first.seq, first.used, True), "asked again")
            await meter.close()

        with Views(open_store) as views:
            for turns in range(5):
                asyncio.run(run(views, turns))
            follows(views.store(), ["small-offer"])
            entries, _ = ledger(views.store())
            names = [entry.decision.id for found in entries.values() for entry in found]
            same((len(names), len(set(names))), (5 * TASKS, 5 * TASKS), "decisions")


def _request(number: int) -> Request:
    """The same number is the same request, whoever asks."""
    size, model = SIZES[number * 5 % len(SIZES)], (LARGE, LARGE, SMALL)[number % 3]
    return asked(number, size, model=model, account=("acme", "other")[number // 3 % 2], at=NOON - number % 5 * HOUR)


def _ask(meter: Meter, caller: int) -> list[object]:
    """Ask what others ask, too: singly and in batches."""
    chance = random.Random(caller)  # noqa: S311 - a schedule, no secret
    answers: list[object] = []
    while len(answers) < ASKED_EACH:
        size = chance.choice((1, 1, 1, 2, 7))
        answers += meter.decide_many([_request(chance.randrange(REQUESTS)) for _ in range(size)])
    return answers


def _explained(views: Views, offer: str, answers: Sequence[object]) -> None:
    """One order explains all answers: that of `seq`. Each id has one decision, which is its entry."""
    entries, _ = ledger(views.store())
    decided = [entry.decision for found in entries.values() for entry in found]
    rows = {(decision.account, decision.id): plain(decision) for decision in decided}
    same(len(rows), len(decided), "ids in the ledger")
    fold(decided)
    follows(views.store(), [offer])
    first = Counter[tuple[str, str]]()
    for answer in answers:
        assert isinstance(answer, Decision), f"this was refused: {answer!r}"
        key = answer.account, answer.id
        first[key] += not answer.replayed
        row = rows.get(key)
        assert isinstance(row, Decision), f"{key} was answered and is not in the ledger"
        found = (answer.request, answer.reason, answer.used, answer.total, answer.window, answer.seq, answer.terms)
        same(found, (row.request, row.reason, row.used, row.total, row.window, row.seq, row.terms), f"{key}")
    same(first, Counter(dict.fromkeys(rows, 1)), "new decisions of each id")
