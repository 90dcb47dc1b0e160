"""Holds and corrections by example, what is true of the pure functions below them, and thresholds."""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import subprocess
import sys
import threading
from collections import Counter
from datetime import timedelta
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, strategies as st
from msgspec.structs import replace

from gratis import AsyncMeter, Conflict, GratisError, Meter, NotExecuted, OutcomeUnknown, Request
from gratis.classify import charge_for
from gratis.model import (
    NAME_BYTES_MAX,
    Correction,
    Counts,
    Decision,
    Expiry,
    Held,
    Hold,
    Kind,
    Overage,
    Reason,
    Remedy,
    Terms,
    Usage,
    Window,
    check_name,
    correction_id,
)
from gratis.rule import Charge, Holding, Overdue, Tally, admit, contribution, decide
from gratis.stores import Bounds
from gratis.stores.memory import MemoryStore
from gratis.stores.sqlite import SQLiteStore, Synchronous
from gratis.testing import scene as testing_scene
from gratis.testing.scene import (
    DAY,
    ENROLLED,
    HOUR,
    LARGE,
    NOON,
    READINGS,
    SMALL,
    TICK,
    Clock,
    asked,
    in_threads,
    small_offer,
    spent,
)
from gratis.thresholds import PERCENTS, Threshold, log, reached, tell

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

MINUTE = timedelta(minutes=1)
TODAY = Window(NOON.replace(hour=0), NOON.replace(hour=0) + DAY)
BY = {"actor": "ann", "why": "counted twice", "account": "acme"}
# Each row is one step of a day with 1,000 free tokens: what is done, with which request, for how many tokens; then
# whether it is free (or fits), and what is used and held after it.
DAY_OF_HOLDS = (
    ("decide", "a", 300, True, 300, 0),
    ("hold", "b", 400, True, 300, 400),
    ("hold", "c", 301, False, 300, 400),
    ("hold", "d", 300, True, 300, 700),
    ("decide", "e", 500, True, 800, 700),
    ("settle", "b", 150, True, 950, 300),
    ("settle", "c", 51, False, 950, 300),
    ("release", "d", 0, None, 950, 0),
    ("hold", "f", 50, True, 950, 50),
    ("by its bound", "f", 0, True, 1_000, 0),
    ("settle", "f", 20, True, 970, 0),
    ("void", "e", 0, True, 470, 0),
    ("adjust", "a", 100, True, 270, 0),
    ("adjust", "a", 831, False, 170, 0),
    ("hold", "g", 830, True, 170, 830),
    ("an hour later", "", 0, None, 170, 830),
    ("decide", "h", 1, False, 1_000, 0),
    ("settle", "g", 829, True, 999, 0),
    ("decide", "i", 1, True, 1_000, 0),
)


class Scene:
    """A meter over a store in memory, or the same for asyncio, and its clock."""

    def __init__(self, window: str = "day", *, is_async: bool = False, **offer: Any) -> None:
        self.clock = Clock()
        self.told: list[Threshold] = []
        store = MemoryStore(clock=self.clock, bounds=offer.pop("bounds", None))
        kind = AsyncMeter if is_async else Meter
        self.meter = kind(store, small_offer(window, **offer), assume=ENROLLED, on_threshold=self.told.append)
        self.holds: dict[str, Hold] = {}
        self.ask("enroll", "acme", ENROLLED, actor="ann")

    def ask(self, verb: str, *args: Any, **named: Any) -> Any:
        """What a verb answers, awaited where it has to be."""
        answer = getattr(self.meter, verb)(*args, **named)
        return asyncio.run(answer) if inspect.iscoroutine(answer) else answer

    def step(self, verb: str, name: str, tokens: int) -> bool | None:
        """A row's step; whether it was free, or fitted."""
        match verb:
            case "an hour later":
                self.clock.now += HOUR
                return None
            case "hold":
                answer = self.holds[name] = self.ask("hold", asked(name, None), tokens)
            case "release":
                answer = self.ask("release", self.holds[name])
            case "settle" | "by its bound":
                usage = spent(None) if verb == "by its bound" else spent(tokens)
                answer = self.ask("settle", self.holds[name], usage)
            case "decide":
                answer = self.ask("decide", asked(name, tokens))
            case "void":
                answer = self.ask("void", f"r{name}", **BY)
            case _:
                answer = self.ask("adjust", f"r{name}", spent(tokens), **BY)
        return answer and (answer.fits if verb == "hold" else answer.is_free)

    def standing(self, group: str = "large") -> tuple[int, int]:
        """What is used and held of a group."""
        (found,) = [one for one in self.ask("standing", "acme") if one.group == group]
        return found.used, found.held


# -- by example


@pytest.mark.parametrize("is_async", [False, True])
def test_a_day_of_holds(is_async):
    """Each step of the day's table is free or fits as it says, and leaves used and held what it says."""
    scene = Scene(is_async=is_async)
    rows = []
    for verb, name, tokens, *_ in DAY_OF_HOLDS:
        answer = scene.step(verb, name, tokens)
        rows.append((verb, name, tokens, answer, *scene.standing()))
    assert rows == list(DAY_OF_HOLDS)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_hold_across_midnight(is_async):
    """What was held a microsecond before midnight counts in the day that admitted it, whenever it is settled."""
    scene = Scene(is_async=is_async)
    late = TODAY.end - TICK
    scene.clock.now = late
    hold = scene.ask("hold", asked("late", None, at=late), 600)
    scene.clock.now += MINUTE
    following = scene.ask("decide", asked("next", 1_000, at=scene.clock.now))
    settled = scene.ask("settle", hold, spent(700))
    assert [one.window_start for one in (following, settled)] == [TODAY.end, TODAY.start]
    assert [one.used for one in (following, settled)] == [1_000, 700]


def test_a_hold_across_the_end_of_a_rolling_window():
    """What was held a microsecond before a rolling window ended counts in it, though the next one is open."""
    scene = Scene("rolling")
    scene.ask("decide", asked("opens", 1))
    last = NOON + DAY - TICK
    scene.clock.now = last
    hold = scene.ask("hold", asked("late", None, at=last), 999)
    scene.clock.now += MINUTE
    following = scene.ask("decide", asked("next", 1_000, at=scene.clock.now))
    settled = scene.ask("settle", hold, spent(999))
    assert [one.window_start for one in (following, settled)] == [NOON + DAY - TICK + MINUTE, NOON]
    assert [one.used for one in (following, settled)] == [1_000, 1_000]


def test_a_hold_says_by_how_much_it_does_not_fit():
    """A hold that is too large tells the tokens that it is too large by; the largest that fits is that much less."""
    scene = Scene()
    scene.ask("decide", asked("used", 100))
    scene.ask("hold", asked("held", None), 300)
    over = scene.ask("hold", asked("over", None), 625)
    assert (over.fits, over.short, over.used, over.held) == (False, 25, 100, 300)
    assert scene.ask("hold", asked("fits", None), over.tokens_max - over.short).fits


def test_a_conflict_with_a_hold_reads_as_a_sentence():
    """A conflict with a hold says what is held; there is no decision that it could carry."""
    scene = Scene()
    hold = scene.ask("hold", asked(1, None), 10)
    with pytest.raises(Conflict) as caught:
        scene.ask("hold", asked(1, None, model=SMALL), 10)
    expected = "model: request 'r1' of account 'acme' is held with model 'large-1'; that hold stands"
    assert (str(caught.value), caught.value.first, caught.value.hold) == (expected, None, hold)


def test_what_ran_out_may_be_decided_or_released():
    """Of two holds that run out, the one is decided by its bound and marked, the other leaves nothing."""
    scene = Scene()
    for expiry in Expiry:
        scene.ask("hold", asked(expiry, None), 300, for_=MINUTE, on_expiry=expiry)
    scene.clock.now += MINUTE
    (decision,) = scene.ask("expire", "acme")
    assert (decision.id, decision.tokens, decision.is_unmeasured, decision.is_free) == ("rdecided", 300, True, True)
    assert (scene.standing(), scene.ask("holds", "acme")) == ((300, 0), [])


def test_expire_ends_though_the_clock_goes_back():
    """A clock that is set back while holds are ended leaves them as they are, and nobody waits for it."""
    shown = [NOON + HOUR]
    asked_for: Counter[str] = Counter()

    def clock() -> datetime:
        asked_for["the time"] += 1
        assert asked_for["the time"] < 100, "somebody waits for the clock"
        return shown.pop() if len(shown) > 1 else NOON

    meter = Meter(MemoryStore(clock=clock, bounds=None), small_offer(), assume=ENROLLED)
    hold = meter.hold(asked(1, None), 10, for_=MINUTE)
    shown.append(NOON + HOUR)
    assert (meter.expire("acme"), meter.holds("acme")) == ([], [hold])


def test_words_on_a_request_tell_its_story():
    """All that was said of a request is told in its order: by its bound, by its usage, by its owner."""
    scene = Scene()
    hold = scene.ask("hold", asked(1, None), 400, for_=MINUTE)
    scene.clock.now += HOUR
    scene.ask("expire", "acme")
    scene.ask("settle", hold, spent(120))
    scene.ask("adjust", "r1", spent(100), **BY)
    scene.ask("void", "r1", **BY)
    words = scene.ask("decisions", "r1", account="acme")
    told = [(word.correction and word.correction.remedy.value, word.tokens, word.used, word.id) for word in words]
    assert told == [
        (None, 400, 400, "r1"),
        ("settled", 120, 120, "r1"),
        ("adjusted", 100, 100, "r1"),
        ("voided", 0, 0, "r1"),
    ]
    assert [entry.decision for entry in scene.meter.ledger()] == words


# -- explain and standing


def test_explaining_says_what_is_left_beside_holds():
    """What would be free now, what of it nobody holds, and when its window ends, are told together."""
    scene = Scene()
    scene.ask("decide", asked("used", 100))
    scene.ask("hold", asked("held", None), 850)
    found = scene.ask("explain", asked("new", 60))
    assert (found.is_free, found.fits, found.held, found.available) == (True, 900, 850, 50)
    assert (found.window_end, found.elsewhere) == (TODAY.end, ())


@pytest.mark.parametrize(
    ("used", "held", "available"), [(0, 0, 1_000), (0, 1_000, 0), (600, 400, 0), (600, 399, 1), (1_000, 0, 0)]
)
def test_what_is_available_is_what_the_next_hold_may_take(used, held, available):
    """A hold of as much as is available fits, and of one more it does not."""
    scene = Scene()
    scene.ask("decide", asked("used", used))
    scene.ask("hold", asked("held", None), held)
    found = scene.ask("explain", asked("new", 1))
    assert found.available == available
    assert scene.ask("hold", asked("one more", None), available + 1).fits is False
    assert scene.ask("hold", asked("just that", None), available).fits is True


def test_nothing_is_available_where_more_is_held_than_is_left():
    """Requests that were not held may use what others hold: then nothing is available, though some still fits."""
    scene = Scene()
    scene.ask("hold", asked("held", None), 600)
    scene.ask("decide", asked("used", 700))
    found = scene.ask("explain", asked("new", 300))
    assert (found.is_free, found.fits, found.held, found.available) == (True, 300, 600, None)


@pytest.mark.parametrize(
    ("fields", "elsewhere"),
    [
        ({}, ("small",)),
        ({"model": SMALL, "input_tokens": 501}, ("large",)),
        ({"model": "unlisted"}, ("small",)),
        ({"model": "unlisted", "input_tokens": 500}, ("large", "small")),
        ({"model": "ft:large-1", "input_tokens": 500}, ("large", "small")),
        ({"input_tokens": 951}, ()),
        ({"input_tokens": 500}, ()),
        ({"tools": ("web_search",)}, ()),
        ({"kind": "eval"}, ()),
        ({"kind": "fine_tuning_training"}, ()),
        ({"input_tokens": None}, ()),
    ],
)
def test_explaining_names_the_groups_that_would_take_it(fields, elsewhere):
    """Groups with room beside what is held are told where a request is not free, unless no group would take it."""
    scene = Scene()
    scene.ask("decide", asked("large", 400))
    scene.ask("hold", asked("large held", None), 100)
    scene.ask("hold", asked("small held", None, model=SMALL), 50)
    request = asked("new", **{"tokens": 601, "input_tokens": 601, **fields})
    if request.model == SMALL:
        scene.ask("decide", asked("small", 500, model=SMALL))
        request = replace(request, input_tokens=501)
        scene.ask("void", "rlarge", **BY)
    assert scene.ask("explain", request).elsewhere == elsewhere


@pytest.mark.parametrize("facts", [{"sharing": "disabled"}, {"sharing": "selected", "projects": ("p",)}, {"tier": 0}])
@pytest.mark.parametrize("tokens", [0, 10])
def test_no_group_takes_what_an_account_may_not_send(facts, tokens):
    """Where the account or its project is excluded, no other group is offered, not even for nothing."""
    scene = Scene()
    scene.ask("enroll", "acme", type(ENROLLED)(**{"tier": 3, "sharing": "enabled", **facts}), actor="ann")
    assert scene.ask("explain", asked("new", tokens)).elsewhere == ()


def test_no_group_takes_what_is_too_late():
    """A request of a window that is no longer kept is billed under every model."""
    scene = Scene(bounds=Bounds())
    found = scene.ask("explain", asked("new", 10, at=NOON - 9 * DAY))
    assert (found.reason, found.elsewhere) == (Reason.TOO_LATE, ())


def test_standing_tells_what_is_held_of_each_group():
    """Used, held, remaining and available are told of each group; a hold leaves what remains as it is."""
    scene = Scene()
    scene.ask("decide", asked("used", 100))
    for size in (200, 300):
        scene.ask("hold", asked(size, None), size)
    scene.ask("hold", asked("small", None, model=SMALL), 5)
    told = [(one.group, one.used, one.held, one.remaining, one.available) for one in scene.ask("standing", "acme")]
    assert told == [("large", 100, 500, 900, 400), ("small", 0, 5, 1_000, 995)]
    tomorrow = [(one.group, one.held, one.available) for one in scene.ask("standing", "acme", at=NOON + DAY)]
    assert tomorrow == [("large", 0, 1_000), ("small", 0, 1_000)]


# -- the pure functions

tokens_of_a_request = st.integers(0, 1_500)
readings = st.sampled_from(list(READINGS.values()))
tallies = st.none() | st.builds(Tally, st.just(TODAY), st.integers(0, 1_600), st.integers(1, 9))


def charge_of(tokens: int, reading: tuple[str, str] = ("free", "whole"), step: Any = None, name: object = 1) -> Charge:
    """The charge of a request, in one step or another."""
    return replace(charge_for(small_offer(reading=reading), asked(name, tokens), ENROLLED), step=step)


HOLDING = Holding(NOON + HOUR, Expiry.DECIDED)


@given(tokens_of_a_request, readings, tallies, st.integers(0, 1_500))
def test_a_hold_fits_if_and_only_if_it_is_at_most_what_is_left(tokens, reading, tally, held):
    """It fits iff its bound is at most the allowance less what is used and held, under every reading."""
    hold = admit(charge_of(tokens, reading, HOLDING), tally, held=held)
    used = 0 if tally is None else tally.used
    assert (hold.used, hold.held, hold.tokens_max, hold.amount) == (used, held, tokens, tokens)
    assert hold.fits is (tokens <= 1_000 - used - held)
    assert (hold.aside, hold.short) == ((tokens, 0) if hold.fits else (0, tokens - (1_000 - used - held)))
    assert (hold.window, hold.until, hold.expiry) == (TODAY, NOON + HOUR, Expiry.DECIDED)


@pytest.mark.parametrize(
    ("tally", "used", "window"),
    [
        (None, 0, None),
        (Tally(Window(NOON - HOUR, NOON + HOUR), 70, 3), 70, Window(NOON - HOUR, NOON + HOUR)),
        (Tally(Window(NOON - HOUR, NOON), 70, 3), 0, None),
        (Tally(Window(NOON - DAY, NOON - HOUR), 70, 3), 0, None),
    ],
    ids=["none yet", "open", "just over", "long over"],
)
def test_where_windows_roll_a_hold_is_admitted_by_the_open_one(tally, used, window):
    """It counts beside what is used of a window that is open, and beside nothing where none is."""
    charge = replace(charge_for(small_offer("rolling"), asked(1, 10), ENROLLED), step=HOLDING)
    hold = admit(charge, tally, held=5)
    assert (hold.used, hold.held, hold.window, hold.fits) == (used, 5, window, True)


def test_a_hold_of_what_no_allowance_covers_has_no_totals():
    """Excluded, or of a window that is no longer kept, it says why, and has neither totals nor a window."""
    excluded = replace(charge_for(small_offer(), asked(1, 10, model="x"), ENROLLED), step=HOLDING)
    late = charge_of(10, step=HOLDING)
    for hold, reason in (
        (admit(excluded, None, held=5), Reason.MODEL_NOT_LISTED),
        (admit(late, Tally(TODAY, 70, 3), held=5, kept_since=TODAY.end), Reason.TOO_LATE),
    ):
        assert (hold.reason, hold.used, hold.held, hold.window, hold.aside) == (reason, None, None, None, 0)


@given(st.lists(tokens_of_a_request, max_size=12), readings, st.integers(0, 1_000))
def test_holds_alone_never_pass_the_allowance(bounds, reading, used):
    """One after another, beside whatever is used, what holds set aside is never more than what is left."""
    held = 0
    for bound in bounds:
        held += admit(charge_of(bound, reading, HOLDING), Tally(TODAY, used, 1), held=held).aside
        assert used + held <= 1_000


@given(tokens_of_a_request, readings, tallies, st.sampled_from(["held", "overdue"]), st.integers(0, 1_500))
def test_ending_a_hold_is_judged_as_any_request(tokens, reading, tally, step, bound):
    """A decision that ends a hold differs in nothing but its mark from one that ends none."""
    ends = Held(bound, TODAY) if step == "held" else Overdue(bound, TODAY)
    found, after = decide(charge_of(tokens, reading, ends), tally)
    expected, expected_after = decide(charge_of(tokens, reading), tally)
    assert (replace(found, hold=None), after) == (expected, expected_after)
    assert found.hold == Held(bound, TODAY, is_unmeasured=step == "overdue")


def test_what_is_excluded_says_what_it_ends_too():
    """A request that no allowance covers ends its hold, or corrects, as any other."""
    charge = charge_for(small_offer(), asked(1, 10, model="x"), ENROLLED)
    correction = Correction("1", 1, Remedy.ADJUSTED, 0, None, "ann", "a bill")
    steps = [None, Held(10), Overdue(10, None), correction]
    found = [decide(replace(charge, step=step), None)[0] for step in steps]
    marks = [(one.hold, one.correction) for one in found]
    assert marks == [(None, None), (Held(10), None), (Held(10, None, is_unmeasured=True), None), (None, correction)]


@given(tokens_of_a_request, readings, tallies)
def test_a_contribution_is_what_a_decision_added(tokens, reading, tally):
    """What is used after a decision is what was used before it and its contribution."""
    decision, after = decide(charge_of(tokens, reading), tally)
    before = 0 if tally is None else tally.used
    assert contribution(decision, tokens) == after.used - before
    counted = tokens if reading[0] == Counts.ALL else decision.free_tokens
    assert contribution(decision, tokens) == counted


def test_what_was_excluded_contributes_nothing():
    """A request that no allowance covers, or that opened no window, took nothing."""
    excluded, _ = decide(charge_for(small_offer(), asked(1, 10, model="x"), ENROLLED), None)
    windowless, _ = decide(charge_for(small_offer("rolling"), asked(1, 1_001), ENROLLED), None)
    assert [contribution(excluded, 0), contribution(windowless, 1_001)] == [0, 0]


def corrected(words: list[tuple[int, int]], reading: tuple[str, str]) -> tuple[Tally, dict[int, int]]:
    """The tally after words on requests, each said of a number: that of a request that had one before corrects it."""
    tally: Tally | None = None
    latest: dict[int, int] = {}
    said: Counter[int] = Counter()
    for number, tokens in words:
        step = None
        if number in latest:
            step = Correction(f"r{number}", said[number], Remedy.ADJUSTED, latest[number], TODAY, "ann", "why")
        before = 0 if tally is None else tally.used
        decision, tally = decide(charge_of(tokens, reading, step, number), tally)
        assert tally is not None
        latest[number] = tally.used - (before - latest.get(number, 0))
        said[number] += 1
        assert (decision.seq, decision.correction) == (sum(said.values()), step)
    assert tally is not None
    return tally, latest


words_on_requests = st.lists(st.tuples(st.integers(0, 4), tokens_of_a_request), min_size=1, max_size=20)


@given(words_on_requests, readings)
def test_used_is_the_sum_of_the_latest_words(words, reading):
    """Whatever is corrected how often, what is used is what the latest word on each request took; never below 0."""
    tally, latest = corrected(words, reading)
    assert tally.used == sum(latest.values())
    assert min(latest.values()) >= 0
    assert reading[0] == Counts.ALL or tally.used <= 1_000


@given(words_on_requests, readings)
def test_void_restores_what_was_used(words, reading):
    """When every request is adjusted to nothing, nothing is used."""
    tally, _ = corrected([*words, *((number, 0) for number in range(5))], reading)
    assert tally.used == 0


@given(words_on_requests, readings)
def test_adjusted_to_the_same_nothing_changes(words, reading):
    """Saying the latest word on the last request once more leaves what is used as it was."""
    tally, latest = corrected(words, reading)
    again, latest_again = corrected([*words, words[-1]], reading)
    assert (again.used, again.seq, latest_again) == (tally.used, tally.seq + 1, latest)


@given(tokens_of_a_request, tokens_of_a_request, readings, st.integers(0, 1_000))
def test_a_correction_is_judged_as_if_nothing_had_been_said(before, tokens, reading, others):
    """What is corrected is judged as it would be had its first word never been said."""
    tally = Tally(TODAY, others, 1) if others else None
    first, after = decide(charge_of(before, reading), tally)
    step = Correction("r1", 1, Remedy.ADJUSTED, contribution(first, before), first.window)
    found, tally_then = decide(charge_of(tokens, reading, step, "1~1"), after)
    fresh, fresh_tally = decide(charge_of(tokens, reading, None, "1~1"), tally)
    assert (found.reason, found.free_tokens, found.total, found.used) == (
        fresh.reason,
        fresh.free_tokens,
        fresh.total,
        fresh.used,
    )
    assert (tally_then.used, tally_then.seq) == (fresh_tally.used, fresh_tally.seq + 1)


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=255), st.integers(1, 10**6))
def test_the_name_of_a_correction_is_a_name(of, number):
    """Whatever its request is called, a correction's name is a name, and another one for each number."""
    if len(of.encode()) <= NAME_BYTES_MAX:
        names = [correction_id(of, number), correction_id(of, number + 1)]
        for name in names:
            check_name("id", name)
        assert len({of, *names}) == 3


@given(
    st.sampled_from([LARGE, SMALL]),
    st.sampled_from(list(Kind)),
    st.integers(0, 10**12),
    st.sampled_from(["", "p", "q"]),
)
def test_a_settle_says_what_the_request_was(model, kind, tokens, project):
    """What a usage names is taken from it, what it leaves out from the held request; its id and time stay."""
    scene = Scene()
    hold = scene.ask("hold", asked(1, None, project="own", tools=("function",)), 10)
    usage = Usage(
        input_tokens=tokens,
        output_tokens=0,
        cached_tokens=tokens // 2,
        model=model,
        kind=kind,
        project=project or None,
        id="other",
        at=NOON + DAY,
    )
    request = scene.ask("settle", hold, usage).request
    expected = Request(
        id="r1",
        account="acme",
        model=model,
        at=NOON,
        input_tokens=tokens,
        output_tokens=0,
        cached_tokens=tokens // 2,
        project=project or "own",
        kind=kind,
        tools=("function",),
    )
    assert request == expected


# -- thresholds


def names(told: list[Threshold]) -> list[str]:
    """What thresholds are called."""
    return [threshold.name for threshold in told]


@pytest.mark.parametrize("is_async", [False, True])
def test_each_threshold_is_told_once(is_async):
    """At 50, 80, 95 and 100 % and at the first billed request the listener is called, once each, by what reached it."""
    scene = Scene(is_async=is_async)
    rows = []
    for name, tokens in enumerate((499, 1, 0, 299, 1, 150, 51, 50, 0, 1, 2)):
        before = len(scene.told)
        scene.ask("decide", asked(name, tokens))
        rows.append(names(scene.told[before:]))
    assert rows == [[], ["50%"], [], [], ["80%"], ["95%"], ["billed"], ["100%"], [], [], []]
    assert [threshold.decision.id for threshold in scene.told] == ["r1", "r4", "r5", "r6", "r7"]
    assert {threshold.window for threshold in scene.told} == {TODAY}


def test_one_request_may_reach_several_thresholds():
    """A request of the whole allowance reaches all four at once, in their order."""
    scene = Scene()
    scene.ask("decide", asked(1, 1_000))
    assert names(scene.told) == ["50%", "80%", "95%", "100%"]


def test_thresholds_are_of_a_group_and_a_window():
    """Each group, and each window of it, has thresholds of its own."""
    scene = Scene()
    for day in range(2):
        for model in (LARGE, SMALL):
            for number in range(2):
                scene.ask("decide", asked(f"{day} {model} {number}", 500, model=model, at=NOON + day * DAY))
    told = [(one.decision.group, one.window.start, one.name) for one in scene.told]
    expected = [
        (group, TODAY.start + day * DAY, name)
        for day in range(2)
        for group in ("large", "small")
        for name in ("50%", "80%", "95%", "100%")
    ]
    assert told == expected


def test_thresholds_are_of_an_account():
    """What one account reached, another has yet to reach."""
    scene = Scene()
    for account in ("acme", "other", "acme"):
        scene.ask("decide", asked("half", 500, account=account))
    assert [(one.decision.account, one.name) for one in scene.told] == [("acme", "50%"), ("other", "50%")]


def test_holds_reach_no_threshold_until_they_are_decided():
    """What is held is not used: only its settle, or its end, tells."""
    scene = Scene()
    hold = scene.ask("hold", asked("settled", None), 600)
    scene.ask("hold", asked("runs out", None), 400, for_=MINUTE)
    assert names(scene.told) == []
    scene.ask("settle", hold, spent(500))
    assert names(scene.told) == ["50%"]
    scene.clock.now += MINUTE
    scene.ask("expire", "acme")
    assert names(scene.told) == ["50%", "80%"]


def test_corrections_reach_thresholds_and_untell_none():
    """A correction that uses more tells; one that gives back takes no word back, and nothing is told twice."""
    scene = Scene()
    scene.ask("decide", asked(1, 100))
    for said in (spent(800), spent(10), spent(950)):
        scene.ask("adjust", "r1", said, **BY)
    scene.ask("void", "r1", **BY)
    scene.ask("decide", asked(2, 900))
    assert names(scene.told) == ["50%", "80%", "95%"]


def test_a_repeat_tells_what_nobody_told():
    """A decision whose thresholds nobody claimed, as when its process died, is told by who asks again."""
    scene = Scene()
    quiet = Meter(scene.meter._store, small_offer(), assume=ENROLLED)
    quiet.enroll("acme", ENROLLED, actor="ann")
    quiet.decide(asked(1, 800))
    assert names(scene.told) == []
    for _ in range(2):
        scene.ask("decide", asked(1, 800))
    assert names(scene.told) == ["50%", "80%"]


def test_a_process_claims_a_threshold_once(monkeypatch):
    """What a process knows to be told it does not ask its store again."""
    claims: list[str] = []
    claim = MemoryStore.claim
    monkeypatch.setattr(
        MemoryStore,
        "claim",
        lambda self, offer, account, name, *, until, token: (
            claims.append(name.rpartition("\0")[2]) or claim(self, offer, account, name, until=until, token=token)
        ),
    )
    scene = Scene()
    for number in range(4):
        scene.ask("decide", asked(number, 250))
    assert claims == ["50%", "80%", "95%", "100%"]


def test_what_only_asks_tells_nothing():
    """Explaining, standing and looking at decisions tell nothing."""
    scene = Scene()
    quiet = Meter(scene.meter._store, small_offer(), assume=ENROLLED)
    quiet.decide_many([asked(1, 800), asked(2, 201)])
    scene.ask("explain", asked(3, 200))
    scene.ask("standing", "acme")
    scene.ask("decisions", "r1", account="acme")
    assert names(scene.told) == []


def test_a_listener_that_fails_costs_no_decision(caplog):
    """Whatever a listener raises is logged; the decision stands, and the other thresholds are told."""
    heard: list[str] = []

    def listen(threshold: Threshold) -> None:
        heard.append(threshold.name)
        raise RuntimeError(threshold.name)

    meter = Meter(MemoryStore(clock=Clock(), bounds=None), small_offer(), assume=ENROLLED, on_threshold=listen)
    assert meter.decide(asked(1, 800)).is_free
    assert heard == ["50%", "80%"]
    said = [record.getMessage() for record in caplog.records]
    assert said == ["a listener failed at 50% of group large", "a listener failed at 80% of group large"]


def test_many_threads_tell_each_threshold_once():
    """Eight threads over two meters and one store tell each account's thresholds once, whoever reaches them."""
    told: list[tuple[str, str]] = []
    lock = threading.Lock()

    def listen(threshold: Threshold) -> None:
        with lock:
            told.append((threshold.decision.account, threshold.name))

    store = MemoryStore(clock=Clock(), bounds=None)
    meters = [Meter(store, small_offer(), assume=ENROLLED, on_threshold=listen) for _ in range(2)]
    accounts = [f"account {number}" for number in range(6)]

    def spend(caller: int) -> list[object]:
        asking = [asked(f"{caller} {n}", 10, account=account) for n in range(15) for account in accounts]
        return [meters[caller % 2].decide(request) for request in asking]

    in_threads([partial(spend, caller) for caller in range(8)])
    expected = {(account, name): 1 for account in accounts for name in ("50%", "80%", "95%", "100%", "billed")}
    assert Counter(told) == Counter(expected)


PROCESS = """
import sys
from gratis import Meter
from gratis.stores.sqlite import SQLiteStore, Synchronous
from gratis.testing.scene import ENROLLED, Clock, asked, small_offer
store = SQLiteStore(sys.argv[1], clock=Clock(), bounds=None, synchronous=Synchronous.OFF)
say = lambda threshold: print(threshold.name, flush=True)
meter = Meter(store, small_offer(), assume=ENROLLED, on_threshold=say)
sys.stdin.readline()
for number in range(40):
    meter.decide(asked(f"{sys.argv[2]} {number}", 10))
meter.close()
"""


def test_many_processes_tell_each_threshold_once(tmp_path: Path):
    """Three processes on one SQLite file tell each threshold once among them."""
    path = str(tmp_path / "gratis.db")
    SQLiteStore(path, clock=Clock(), bounds=None, synchronous=Synchronous.OFF).close()
    command = [sys.executable, "-c", PROCESS, path]
    callers = [
        subprocess.Popen([*command, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(3)
    ]
    for caller in callers:
        assert caller.stdin is not None
        caller.stdin.write("go\n")
        caller.stdin.flush()
    said = Counter(name for caller in callers for name in caller.communicate()[0].split())
    assert [caller.returncode for caller in callers] == [0, 0, 0]
    assert said == Counter(["50%", "80%", "95%", "100%", "billed"])


@given(st.integers(0, 3_000), st.integers(0, 2_000), st.sampled_from([Reason.WITHIN_ALLOWANCE, Reason.OVER_ALLOWANCE]))
def test_what_is_reached_follows_from_the_decision(used, allowance, reason):
    """The percents at or below the share that is used, and, of a billed request, the word for it."""
    terms = Terms(
        "offer", "2025-01-01", None, ENROLLED, "large", allowance=allowance, overage=Overage.WHOLE, window="day UTC"
    )
    decision, _ = decide(charge_of(1), None)
    decision = replace(decision, terms=terms, used=used, reason=reason)
    expected = [f"{percent}%" for percent in PERCENTS if allowance and used / allowance >= percent / 100]
    expected += ["billed"] if reason is Reason.OVER_ALLOWANCE else []
    assert names(reached(decision)) == expected


def test_what_no_allowance_covers_reaches_nothing():
    """An excluded request, and one that opened no window, tell nothing."""
    for window, request in (("day", asked(1, 10, model="x")), ("rolling", asked(1, 1_001))):
        decision, _ = decide(charge_for(small_offer(window), request, ENROLLED), None)
        assert reached(decision) == []


def test_places_of_thresholds_are_apart():
    """No two thresholds of an account share a place."""
    decisions: list[Decision] = []
    for window in ("day", "month", "rolling"):
        scene = Scene(window)
        for model in (LARGE, SMALL):
            for days in (0, 40):
                decisions += [
                    scene.ask("decide", asked(f"{model} {days} {n}", 1_000 - n, model=model, at=NOON + days * DAY))
                    for n in (0, 1)
                ]
    places = sorted({threshold.place for decision in decisions for threshold in reached(decision)})
    assert len(places) == 3 * 2 * 2 * 5
    assert all(one != other for one, other in pairwise(places))


def test_thresholds_may_just_be_logged(caplog):
    """The listener that ships says each in the log, from 95 % on as a warning."""
    scene = Scene()
    with caplog.at_level(logging.INFO, logger="gratis"):
        for tokens in (800, 150, 51):
            scene.ask("decide", asked(tokens, tokens))
        for threshold in scene.told:
            tell(threshold, log)
    rows = [(record.levelname, record.getMessage()) for record in caplog.records]
    of = "account acme, group large of small-offer"
    end = "the window ends 2025-04-21T00:00:00Z"
    assert rows == [
        ("INFO", f"{of}: 50% of it is used (800 of 1,000 tokens); {end}"),
        ("INFO", f"{of}: 80% of it is used (800 of 1,000 tokens); {end}"),
        ("WARNING", f"{of}: 95% of it is used (950 of 1,000 tokens); {end}"),
        ("WARNING", f"{of}: the first request beyond it was billed (950 of 1,000 tokens); {end}"),
    ]


# -- what changes, or fails, between two calls


@pytest.mark.parametrize(
    ("models", "unit"),
    [
        ({"large-1": "large-3"}, "tokens"),
        ({"large-1": "small-1", "small-1": "large-1"}, "tokens"),
        ({}, "requests"),
    ],
    ids=["no longer listed", "moved to another group", "another unit"],
)
@pytest.mark.parametrize("window", ["day", "rolling"])
def test_a_void_gives_back_what_was_taken_whatever_the_offer_says_by_now(monkeypatch, window, models, unit):
    """A release that corrects a list of models, or the unit of a group, leaves nothing counted that is voided."""
    scene = Scene(window)
    scene.ask("decide", asked(1, 400))
    scene.ask("decide", asked(2, 300))
    text = re.sub("large-1|small-1", lambda found: models.get(found[0], found[0]), testing_scene._OFFER)
    monkeypatch.setattr(testing_scene, "_OFFER", text)
    later = Meter(scene.meter._store, small_offer(window, unit=unit))
    assert later.void("r1", **BY).used == 300
    assert later.void("r1", **BY).replayed
    assert later.adjust("r2", spent(50), **BY).correction.of == "r2"
    assert [each.decision.used for each in later.ledger()][2] == 300
    assert not any(tally.used < 0 for *_, tally in tallies_of(later))


def tallies_of(meter: Meter) -> list[tuple[str, str, Tally]]:
    """What the store keeps of the account's windows."""
    return meter._store.tallies(meter.offer.name, "acme")


def test_a_claim_that_fails_costs_no_decision_and_is_made_by_the_next(monkeypatch, caplog):
    """The decision is told all the same; the threshold is told with the next one, once."""
    scene = Scene()
    claim = MemoryStore.claim
    failing = [True]

    def once(*args, **named):
        if failing:
            failing.pop()
            raise NotExecuted("no write lock")
        return claim(*args, **named)

    monkeypatch.setattr(MemoryStore, "claim", once)
    assert scene.ask("decide", asked(1, 600)).used == 600
    assert scene.told == []
    assert "50% of group large is not told yet: no write lock" in caplog.text
    for name in (2, 3):
        scene.ask("decide", asked(name, 1))
    assert [threshold.name for threshold in scene.told] == ["50%"]


def test_a_claim_whose_answer_was_lost_is_told(monkeypatch):
    """It was written, and this process knows its own claim again."""
    scene = Scene()
    claim = MemoryStore.claim
    losing = [True]

    def lost(*args, **named):
        found = claim(*args, **named)
        if losing:
            losing.pop()
            raise OutcomeUnknown("the answer was lost")
        return found

    monkeypatch.setattr(MemoryStore, "claim", lost)
    for name in (1, 2):
        scene.ask("decide", asked(name, 600 if name == 1 else 1))
    assert [threshold.name for threshold in scene.told] == ["50%"]


def test_who_only_asks_is_never_told_that_something_may_be_written(monkeypatch):
    """`explain` writes nothing, so where its second question fails it says so."""
    scene = Scene()
    scene.ask("decide", asked(1, 1_000))

    def failing(*_args, **_named):
        raise NotExecuted("gone")

    monkeypatch.setattr(MemoryStore, "tallies", failing)
    with pytest.raises(NotExecuted, match="gone"):
        scene.ask("explain", asked(2, 10))


def test_a_listener_that_has_to_be_awaited_is_refused():
    """Nobody would wait for it, and what it was to tell would be lost."""

    async def listener(_threshold):
        """Never called."""

    with pytest.raises(GratisError, match="on_threshold: found a coroutine function"):
        Meter.open("memory:", on_threshold=listener)


def test_a_name_that_a_request_has_is_no_corrections():
    """Whoever names requests as corrections are named is told, and nothing is lost."""
    scene = Scene()
    scene.ask("decide", asked(1, 100))
    scene.ask("decide", asked(2, 10, id=correction_id("r1", 1)))
    with pytest.raises(Conflict, match="id: "):
        scene.ask("void", "r1", **BY)
    assert scene.ask("standing", "acme")[0].used == 110


def test_what_is_ahead_waits_for_what_comes_before_it():
    """Where a meter knew an older enrollment, the second request of an id in a batch is a conflict, as one by one."""
    scene = Scene(bounds=Bounds())
    other = Meter(scene.meter._store, small_offer(), assume=ENROLLED)
    other.decide(asked("known"))
    scene.ask("enroll", "acme", replace(ENROLLED, tier=2), actor="ann")
    edge = NOON + Bounds().ahead
    first, second = other.decide_many([asked(1, at=edge), asked(1, at=edge + TICK)])
    assert first.is_free
    assert (type(second), second.field, second.first) == (Conflict, "at", first)
