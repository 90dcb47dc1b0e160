"""What a store decides: the rule in every window, unit and reading, at every edge, singly and in batches."""

from __future__ import annotations

from contextlib import suppress
from itertools import accumulate
from typing import Any

from msgspec.structs import replace

from gratis.classify import charge_for
from gratis.errors import RequestError, StoreError
from gratis.meter import Meter
from gratis.model import TOKENS_MAX, Decision, Enrollment, Sharing, Verdict
from gratis.offers import load
from gratis.stores import Bounds
from gratis.testing.compare import by_the_rule, kept, nameless, plainly, refused, same, singly, told
from gratis.testing.scene import (
    ALLOWANCE,
    ENROLLED,
    HOUR,
    LARGE,
    NOON,
    SMALL,
    TICK,
    Opener,
    Views,
    asked,
    small_offer,
)

SEED_DAY = (
    ("09:15", 120_000, 120_000, "free"),
    ("12:40", 140_000, 260_000, "free"),
    ("14:30", 150_000, 410_000, "free"),
    ("16:00", 150_000, 560_000, "free"),
    ("18:05", 150_000, 710_000, "free"),
    ("20:20", 150_000, 860_000, "free"),
    ("22:15", 115_000, 975_000, "free"),
    ("23:10", 30_000, 1_005_000, "billed"),
)
BY_READING = {
    ("free", "whole"): [(900, 900), (0, 900), (100, 1_000), (0, 1_000)],
    ("free", "excess"): [(900, 900), (100, 1_000), (0, 1_000), (0, 1_000)],
    ("all", "whole"): [(900, 900), (0, 1_100), (0, 1_200), (0, 1_201)],
    ("all", "excess"): [(900, 900), (100, 1_100), (0, 1_200), (0, 1_201)],
}
SIZES = (0, 1, 7, 120, 250, 251, 333, 500, 749, 750, 999, 1_000, 1_001, 5_000)
EXCLUDED: dict[str, dict[str, Any]] = {
    "model_not_listed": {"model": "large"},
    "fine_tuned_model": {"model": "ft:large-1:acme::x"},
    "fine_tuning_training": {"kind": "fine_tuning_training"},
    "evals": {"kind": "eval"},
    "tool_use": {"tools": ("function", "web_search")},
    "unmeasured": {"input_tokens": None},
}
BATCH = 2_500
ACCOUNTS = 200
AHEAD = 11
BEYOND_DOUBLES = 9_008  # so many requests of the largest size are more than a double can count


class Deciding:
    """Clauses about decisions."""

    def test_the_day_of_the_article(self, open_store: Opener) -> None:
        """The provider's own example day has its eight rows; then 25,000 tokens are free and 25,001 are billed."""
        with Views(open_store) as views:
            meter = views.meter(load("openai-data-sharing"))
            for account, last, verdict in (("fits", 25_000, "free"), ("passes", 25_001, "billed")):
                rows = [*SEED_DAY, ("23:30", last, 975_000 + last, verdict)]
                found = []
                for time, tokens, _, _ in rows:
                    at = NOON.replace(hour=int(time[:2]), minute=int(time[3:]))
                    model = "gpt-4.1-2025-04-14"
                    decision = meter.decide(asked(time, tokens, account=account, model=model, at=at))
                    found.append((time, tokens, decision.total, decision.verdict.value))
                same(found, rows, "the day")

    def test_exactly_on_the_allowance_is_free(self, open_store: Opener, window: str, unit: str) -> None:
        """What lands exactly on the allowance is free, and one more is billed, in any window and unit."""
        with Views(open_store) as views:
            meter = views.meter(small_offer(window, unit=unit, allowance=3))
            decisions = [meter.decide(asked(number, 1)) for number in range(4)]
            same(
                told(decisions),
                [
                    ("within_allowance", 1, 1, 1, 1),
                    ("within_allowance", 1, 2, 2, 2),
                    ("within_allowance", 1, 3, 3, 3),
                    ("over_allowance", 0, 4, 3, 4),
                ],
            )
            same([decision.remaining for decision in decisions], [2, 1, 0, 0], "remaining")

    def test_one_request_of_the_whole_allowance_is_free(self, open_store: Opener, window: str) -> None:
        """A first request of just the allowance is free, and one of a token more is billed whole."""
        with Views(open_store) as views:
            meter = views.meter(small_offer(window))
            for tokens, is_free in ((ALLOWANCE, True), (ALLOWANCE + 1, False), (ALLOWANCE - 1, True)):
                decision = meter.decide(asked(1, tokens, account=f"a{tokens}"))
                same((decision.is_free, decision.billed_tokens), (is_free, 0 if is_free else tokens), str(tokens))

    def test_each_reading(self, open_store: Opener, window: str, reading: tuple[str, str]) -> None:
        """What is free and what is used after requests of 900, 200, 100 and 1 is what the reading says."""
        with Views(open_store) as views:
            meter = views.meter(small_offer(window, reading=reading))
            found = [meter.decide(asked(place, size)) for place, size in enumerate((900, 200, 100, 1))]
            same([(decision.free_tokens, decision.used) for decision in found], BY_READING[reading], "free and used")

    def test_long_runs_follow_the_rule(
        self, open_store: Opener, window: str, unit: str, reading: tuple[str, str]
    ) -> None:
        """Seventy requests over five days and two groups are decided as the pure rule decides them."""
        offer = small_offer(window, unit=unit, reading=reading, allowance=ALLOWANCE if unit == "tokens" else 4)
        requests = [
            asked(
                number,
                SIZES[number * 5 % len(SIZES)],
                model=(LARGE, SMALL, "large-2")[number % 3],
                at=NOON + (number * 7 % 25) * 5 * HOUR + number % 2 * TICK,
            )
            for number in range(70)
        ]
        with Views(open_store) as views:
            meter = views.meter(offer)
            same(plainly(map(meter.decide, requests)), by_the_rule(offer, requests), "decisions")

    def test_what_no_allowance_covers_is_billed_in_no_window(self, open_store: Opener, window: str) -> None:
        """An excluded request is billed whole with its reason, and takes nothing of any allowance."""
        with Views(open_store) as views:
            meter = views.meter(small_offer(window))
            meter.decide(asked("before", 10))
            for reason, fields in EXCLUDED.items():
                request = asked(reason, **{"tokens": 20, **fields})
                found = meter.decide(request)
                said = (
                    found.reason.value,
                    found.free_tokens,
                    found.billed_tokens,
                    found.group,
                    found.window,
                    found.seq,
                )
                same(said, (reason, 0, request.tokens, None, None, None), reason)
            same(told([meter.decide(asked("after", 20))]), [("within_allowance", 20, 30, 30, 2)])

    def test_unmeasured_is_not_nothing(self, open_store: Opener, unit: str) -> None:
        """Without usage a request is unmeasured where tokens are counted, and counts as one where they are not."""
        with Views(open_store) as views:
            meter = views.meter(small_offer(unit=unit, allowance=3))
            for place, request in enumerate([asked(1, None), asked(2, 1, output_tokens=None)], start=1):
                decision = meter.decide(request)
                uncounted, counted = (
                    ("unmeasured", 0, None, None, None),
                    ("within_allowance", None, place, place, place),
                )
                same(told([decision]), [uncounted if unit == "tokens" else counted])
            same(meter.decide(asked(3, 0)).verdict, Verdict.FREE, "a measured 0")

    def test_the_largest_size_is_exact(self, open_store: Opener, reading: tuple[str, str]) -> None:
        """A million millions of tokens are compared exactly, and so is nothing."""
        with Views(open_store) as views:
            offer = small_offer(reading=reading, allowance=TOKENS_MAX)
            meter = views.meter(offer)
            sizes = (0, TOKENS_MAX - 1, 2, 1, 0, 1, TOKENS_MAX, 0)
            requests = [asked(place, size) for place, size in enumerate(sizes)]
            same(plainly(map(meter.decide, requests)), by_the_rule(offer, requests), "decisions")

    def test_totals_are_exact_beyond_what_a_double_holds(self, open_store: Opener) -> None:
        """Where billed requests count, a window's total stays exact to the token, or the store refuses to go on."""
        with Views(open_store) as views:
            meter = views.meter(small_offer(reading=("all", "whole"), allowance=TOKENS_MAX))
            asks = [asked(number, TOKENS_MAX) for number in range(BEYOND_DOUBLES)]
            asks += [asked(f"one more {number}", 1) for number in range(3)]
            with suppress(StoreError):
                meter.decide_many(asks)
            found = [entry.decision.used for entry in meter.ledger()]
            same(found, list(accumulate(entry.decision.tokens or 0 for entry in meter.ledger())), "used")
            last = views.store().tallies(meter.offer.name, asks[0].account)[-1][-1]
            same((last.used, last.seq), (found[-1], len(found)), "the tally")

    def test_a_dry_run_says_what_will_be_and_writes_nothing(self, open_store: Opener, window: str) -> None:
        """What is explained is then decided, and explaining it wrote nothing: free, billed, excluded or repeated."""
        with Views(open_store, bounds=Bounds()) as views:
            meter = views.meter(small_offer(window))
            meter.decide(asked("first", 100))
            requests = [
                asked("fits", 900),
                asked("passes", 901),
                asked("unlisted", model="other"),
                asked("other account", 1, account="other"),
                asked("first", 100),
            ]
            for request in requests:
                before = kept(views.store())
                said = meter.explain(request)
                same(kept(views.store()), before, f"what is kept after explaining {request.id!r}")
                same(said.decision, meter.decide(request), f"{request.id!r}, explained and decided")
            before = kept(views.store())
            refused(RequestError, meter.explain, asked("ahead", at=NOON + HOUR))
            same(kept(views.store()), before, "what is kept after explaining what is refused")

    def test_a_dry_run_knows_the_largest_size_that_fits(self, open_store: Opener) -> None:
        """What fits, fits; a token more does not."""
        with Views(open_store) as views:
            meter = views.meter()
            meter.decide(asked("first", 377))
            fits = meter.explain(asked("question", ALLOWANCE)).fits
            same(fits, ALLOWANCE - 377, "what fits")
            same(meter.decide(asked("passes", ALLOWANCE - 376)).verdict, Verdict.BILLED, "a token more")
            same(meter.decide(asked("fits", fits)).verdict, Verdict.FREE, "what fits")

    def test_a_batch_is_the_same_as_one_by_one(self, open_store: Opener, window: str, reading: tuple[str, str]) -> None:
        """A batch, repeats and conflicts and refusals in it, is answered as its requests are one after another."""
        offer = small_offer(window, reading=reading)
        with Views(open_store, bounds=Bounds()) as views:
            meter = views.meter(offer)
            requests = [
                asked(
                    name,
                    SIZES[(name + turn // 2) % len(SIZES)],
                    model=(LARGE, "other", SMALL)[name % 3],
                    at=NOON + HOUR if name == AHEAD else NOON - name * 3 * HOUR,
                )
                for turn in range(3)
                for name in range(20)
            ]
            batch = meter.decide_many([replace(request, account="batch") for request in requests])
            others = singly(meter, [replace(request, account="one by one") for request in requests])
            same(list(map(nameless, batch)), list(map(nameless, others)), "answers")

    def test_a_batch_may_be_large(self, open_store: Opener) -> None:
        """Thousands of requests in one batch have the seq and totals of their order."""
        offer = small_offer()
        requests = [asked(number, number % 5) for number in range(BATCH)]
        with Views(open_store) as views:
            answers = views.meter(offer).decide_many(requests)
            same(plainly(answers), by_the_rule(offer, requests), "decisions")
            same([one.seq for one in answers if isinstance(one, Decision)], list(range(1, BATCH + 1)), "seq")

    def test_a_batch_may_be_of_many_accounts(self, open_store: Opener) -> None:
        """Each account of a batch is decided as if it were alone, and each answer is in its request's place."""
        offer = small_offer()
        requests = [
            asked(f"{turn}", 300 + number % 7, account=f"account {number}")
            for turn in range(5)
            for number in range(ACCOUNTS)
        ]
        with Views(open_store) as views:
            answers = views.meter(offer).decide_many(requests)
            same(plainly(answers), by_the_rule(offer, requests), "decisions")

    def test_a_batch_may_be_of_several_offers(self, open_store: Opener) -> None:
        """Each charge of a batch is applied under its own offer, in its place."""
        offers = [small_offer(name=name) for name in ("one", "two", "three")]
        with Views(open_store) as views:
            charges = [
                charge_for(offers[number % 3], asked(number // 3, 400, account=f"account {number % 2}"), ENROLLED)
                for number in range(36)
            ]
            receipts = views.store().apply(charges)
            for first, offer in enumerate(offers):
                requests = [charge.request for charge in charges[first::3]]
                found = [receipt.decision for receipt in receipts[first::3]]
                same(plainly(found), by_the_rule(offer, requests), f"decisions of offer {offer.name}")

    def test_an_empty_batch_is_answered_with_nothing(self, open_store: Opener) -> None:
        """No charges, no receipts."""
        with Views(open_store) as views:
            same((views.store().apply([]), views.store().apply([], dry=True)), ([], []), "receipts")
            same(kept(views.store()), {}, "what is kept")

    def test_allowances_are_apart(self, open_store: Opener) -> None:
        """Each group of each account under each offer has its own allowance, whatever the others took."""
        with Views(open_store) as views:
            for name in ("one", "two"):
                meter = views.meter(small_offer(name=name))
                for account in ("acme", "other"):
                    for model in (LARGE, SMALL):
                        decision = meter.decide(asked(f"{name} {model}", ALLOWANCE, account=account, model=model))
                        same(told([decision]), [("within_allowance", ALLOWANCE, ALLOWANCE, ALLOWANCE, 1)])
            same(views.meter(small_offer(name="one")).decide(asked("more", 1, model="large-2")).seq, 2, "seq")

    def test_allowances_are_of_a_kind_of_window(self, open_store: Opener) -> None:
        """One group under another kind of window has another allowance, even where the windows begin together."""
        with Views(open_store) as views:
            at = NOON.replace(hour=0)
            for window in ("day", "rolling", "month"):
                decision = views.meter(small_offer(window)).decide(asked(window, ALLOWANCE, at=at))
                same((decision.is_free, decision.seq), (True, 1), window)

    def test_an_allowance_may_change_within_its_window(self, open_store: Opener) -> None:
        """What was used stays used when the tier changes the allowance."""
        with Views(open_store) as views:
            low = Enrollment(tier=1, sharing=Sharing.ENABLED)
            found = []
            for number, enrollment in enumerate((ENROLLED, low, ENROLLED, low)):
                meter = Meter(views.store(), small_offer(), assume=enrollment)
                found.append(meter.decide(asked(number, 240)))
            same(
                told(found),
                [
                    ("within_allowance", 240, 240, 240, 1),
                    ("over_allowance", 0, 480, 240, 2),
                    ("within_allowance", 240, 480, 480, 3),
                    ("over_allowance", 0, 720, 480, 4),
                ],
            )
            same([one.remaining for one in found], [760, 10, 520, 0], "remaining")
