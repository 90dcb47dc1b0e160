"""When a request counts: the edges of windows, and how far its time may lie from the clock, to the microsecond."""

from __future__ import annotations

from msgspec.structs import replace

from gratis.errors import RequestError
from gratis.model import AT_MAX, EPOCH, Reason, Window
from gratis.stores import Bounds
from gratis.testing.compare import by_the_rule, kept, ledger, plainly, refused, same, told
from gratis.testing.scene import ALLOWANCE, DAY, HOUR, NOON, TICK, Opener, Views, asked, small_offer


class Timing:
    """Clauses about time."""

    def test_calendar_windows_follow_each_other(self, open_store: Opener, calendar: str) -> None:
        """A window's first and last microsecond are of it; those beside them are of other allowances."""
        with Views(open_store) as views:
            meter = views.meter(small_offer(calendar))
            window = meter.decide(asked("first")).window
            assert window is not None, "it was judged"
            edges = (window.start, window.end - TICK, window.end, window.start - TICK)
            found = [meter.decide(asked(place, 1, at=at)) for place, at in enumerate(edges)]
            same(told(found)[:2], [("within_allowance", 1, 11, 11, 2), ("within_allowance", 1, 12, 12, 3)])
            same(told(found)[2:], [("within_allowance", 1, 1, 1, 1)] * 2, "beside the window")
            same((found[2].window_start, found[3].window_end), (window.end, window.start), "the windows beside it")

    def test_a_rolling_window_opens_at_the_first_free_token(self, open_store: Opener) -> None:
        """A billed request opens no window; the first with a free token opens one at its own microsecond."""
        with Views(open_store) as views:
            meter = views.meter(small_offer("rolling"))
            found = [
                meter.decide(asked("billed", ALLOWANCE + 1, at=NOON - HOUR)),
                meter.decide(asked("empty", 0, at=NOON + TICK)),
                meter.decide(asked("next", 1, at=NOON + 2 * TICK)),
            ]
            same(
                told(found),
                [
                    ("over_allowance", 0, ALLOWANCE + 1, 0, None),
                    ("within_allowance", 0, 0, 0, 1),
                    ("within_allowance", 1, 1, 1, 2),
                ],
            )
            window = Window(NOON + TICK, NOON + DAY + TICK)
            same([decision.window for decision in found], [None, window, window], "windows")

    def test_a_rolling_window_closes_to_the_microsecond(self, open_store: Opener) -> None:
        """The last microsecond of a rolling window is in it, and its end opens the next."""
        with Views(open_store) as views:
            meter = views.meter(small_offer("rolling"))
            times = (NOON, NOON + DAY - TICK, NOON + DAY, NOON + 2 * DAY + HOUR)
            found = [meter.decide(asked(place, 600, at=at)) for place, at in enumerate(times)]
            same([(one.is_free, one.seq) for one in found], [(True, 1), (False, 2), (True, 1), (True, 1)])
            starts = [NOON, NOON, NOON + DAY, NOON + 2 * DAY + HOUR]
            same([one.window_start for one in found], starts, "window starts")

    def test_a_late_request_is_judged_in_the_open_window(self, open_store: Opener) -> None:
        """Where windows roll, a request from before the open window is judged in it."""
        with Views(open_store) as views:
            meter = views.meter(small_offer("rolling"))
            times = (NOON, NOON - TICK, NOON - 30 * DAY, NOON + DAY, NOON)
            found = [meter.decide(asked(place, 400, at=at)) for place, at in enumerate(times)]
            same([(one.is_free, one.seq) for one in found], [(True, 1), (True, 2), (False, 3), (True, 1), (True, 2)])
            same([one.window_start for one in found], [NOON] * 3 + [NOON + DAY] * 2, "window starts")

    def test_too_late_is_billed(self, open_store: Opener, window: str) -> None:
        """Until a microsecond before seven days after its window a request is judged; from then on it is billed."""
        with Views(open_store, bounds=Bounds()) as views:
            meter = views.meter(small_offer(window))
            first = meter.decide(asked("first", 1))
            assert first.window is not None, "it was judged"
            views.clock.now = first.window.end + Bounds().keep - TICK
            judged = meter.decide(asked("judged", 1))
            same((judged.reason, judged.seq, judged.window), (Reason.WITHIN_ALLOWANCE, 2, first.window), "in time")
            views.clock.now += TICK
            late = meter.decide(asked("late", 1))
            found = (late.reason, late.free_tokens, late.billed_tokens, late.used, late.seq, late.window, late.group)
            same(found, (Reason.TOO_LATE, 0, 1, None, None, None, None), "too late")
            same(meter.decide(asked("late", 1)), replace(late, replayed=True), "again")

    def test_ahead_of_the_clock_is_refused(self, open_store: Opener) -> None:
        """What is more than five minutes ahead of the clock is refused, and nothing is written, not even its id."""
        with Views(open_store, bounds=Bounds()) as views:
            meter = views.meter()
            meter.decide(asked("first"))
            before = kept(views.store())
            edge = views.clock.now + Bounds().ahead
            same(refused(RequestError, meter.decide, asked(1, at=edge + TICK)).field, "at", "field")
            same(kept(views.store()), before, "what is kept")
            same(meter.decide(asked(2, at=edge)).seq, 2, "seq on the edge")
            views.clock.now += TICK
            again = meter.decide(asked(1, at=edge + TICK))
            same((again.replayed, again.seq), (False, 3), "when its time has come")

    def test_without_bounds_every_time_is_judged(self, open_store: Opener, window: str) -> None:
        """A store that is opened without bounds judges a request of any time."""
        with Views(open_store) as views:
            views.clock.now = NOON + 400 * DAY
            meter = views.meter(small_offer(window))
            found = [meter.decide(asked(days, 1, at=NOON + days * DAY)) for days in (0, 100, 2_000)]
            same([one.reason for one in found], [Reason.WITHIN_ALLOWANCE] * 3, "reasons")

    def test_far_times_are_exact(self, open_store: Opener, window: str) -> None:
        """At the first and the last times that may be, a microsecond is told from the next, now and when read back."""
        offer = small_offer(window)
        edges = (EPOCH, AT_MAX - 2 * DAY, AT_MAX - 2 * DAY + TICK, AT_MAX - DAY - TICK, AT_MAX - DAY, AT_MAX - TICK)
        requests = [asked(place, 600, at=at) for place, at in enumerate(edges)]
        with Views(open_store) as views:
            views.clock.now = AT_MAX - 3 * TICK
            meter, other = views.meter(offer), views.meter(offer, view=1)
            answers = [meter.decide(request) for request in requests]
            same(plainly(answers), by_the_rule(offer, requests), "decisions")
            same([other.decide(one) for one in requests], [replace(one, replayed=True) for one in answers], "repeats")
            entries, _ = ledger(views.store(1))
            (found,) = entries.values()
            same([entry.decision for entry in found], answers, "ledger")
