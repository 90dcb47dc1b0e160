"""Random programs drive stores beside the oracle: every answer must be equal, field by field.

In memory, in a SQLite file, and on a real server.

Two meters stand before each store, as two processes would: what one changes, the other must not miss. A program is
a row of steps, a step six bytes; each byte chooses from a table whose first value is the plainest. So drawing costs
little, and Hypothesis makes a failing program short and plain; what it then did is told beside the failure.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timedelta
from functools import partial
from itertools import chain, combinations, count
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import Phase, given, settings, strategies as st

from gratis import (
    Conflict,
    Decision,
    Enrollment,
    EnrollmentError,
    Entry,
    Hold,
    Meter,
    Reason,
    Request,
    RequestError,
    Usage,
)
from gratis.lines import decision_line
from gratis.model import Remedy, micros as micros_of, stamp
from gratis.offers import load
from gratis.stores import Bounds
from gratis.stores.redis.url import open_redis
from gratis.stores.sqlite import SQLiteStore, Synchronous

from .memory import View
from .oracle import (
    AHEAD,
    CONFLICT_FIELDS,
    DAY,
    EPOCH,
    HOUR,
    KEEP,
    LIST_B,
    MINUTE,
    OFFER,
    SECOND,
    START,
    SWITCH,
    Oracle,
    micros,
    said_of,
)
from .servers import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gratis.testing import Opener

STEPS_A_PROGRAM = 120
PROGRAMS = 400
STEPS_MIN = 40_000
SERVED_PROGRAMS = 1_000
SERVED_STEPS_MIN = 100_000
NAMESPACES = (f"program {number}" for number in count())
LAST_CLOCK = micros("2025-05-14")
SHIPPED = load(OFFER)

MAIN_ACCOUNTS = ("default", "acme")
ACCOUNTS = (
    *MAIN_ACCOUNTS * 5,
    "a}{b",
    "a:b",
    "a",
    " ",
    "Caf\u00e9",
    "Cafe\u0301",
    "\u202e\u05d0\u200fcba",
    "default ",
    "\u00e9" * 127 + "x",
)
STRANGE_IDS = ("s", "t", "r:1", "\u0645\u200e", "Caf\u00e9", "Cafe\u0301", " ", "x" * 255)
LISTED = ("gpt-4o-2024-08-06", "gpt-4o-mini-2024-07-18", "o1-2024-12-17", "o3-mini-2025-01-31")
MODELS = (
    *LISTED * 4,
    "gpt-4.1-2025-04-14",
    "o1-preview-2024-09-12",
    "o4-mini-2025-04-16",
    "gpt-4o",
    "GPT-4o-2024-08-06",
    "gpt-4o-2024-08-06 ",
    "gpt-4o-2024-08-06\n",
    "ft:gpt-4o-2024-08-06:acme::abc",
    "FT:gpt-4o-2024-08-06",
    "o1-pro",
    "",
    "gpt-4o-2024-08-0\uff16",
)
TWISTS: tuple[dict[str, Any], ...] = (
    *({},) * 9,
    {"tools": ("function",)},
    {"tools": ("custom", "function")},
    {"tools": ("web_search",)},
    {"tools": ("function", "web_search")},
    {"tools": ("Function",)},
    {"kind": "assistants"},
    {"kind": "assistants", "tools": ("code_interpreter",)},
    {"kind": "eval"},
    {"kind": "fine_tuning_training"},
    {"kind": "realtime"},
    {"kind": "embedding", "output_tokens": None},
    {"kind": "embedding", "input_tokens": None},
    {"output_tokens": None},
    {"input_tokens": None},
    {"input_tokens": None, "output_tokens": None},
    {"project": "p1"},
    {"project": "p2"},
    {"project": "P1"},
    {"project": "p1", "kind": "fine_tuning_training", "output_tokens": None},
    {"cached_tokens": 1},
)
CHANGES = (
    *((),) * 16,
    *((field,) for field in CONFLICT_FIELDS),
    *combinations(CONFLICT_FIELDS, 2),
)
SIZES = (
    120_000,
    "what is left",
    "what is left + 1",
    "what is left - 1",
    "allowance",
    "allowance + 1",
    "half the allowance",
    0,
    1,
    7,
    999,
    20_000,
    30_001,
    99_999,
    249_999,
    10**12,
)
WHENS = (
    *("now",) * 16,
    "a second ago",
    "1 us ago",
    "an hour ago",
    "a day ago",
    "2 days ago",
    "5 min ahead",
    "5 min and 1 us ahead",
    "an hour ahead",
    "today's start",
    "today's start - 1 us",
    "today's end - 1 us",
    "7 days before today",
    "7 days before today - 1 us",
    "8 days before today",
    "a month ago",
    "window's start - 1 us",
    "window's start",
    "window's end - 1 us",
    "window's end",
    "window's end + 1 us",
    "switch - 1 us",
    "switch",
    "list B - 1 us",
    "list B",
    "offer's start - 1 us",
    "offer's start",
)
PASSES = (
    "a second",
    "4 min",
    "an hour",
    "7 h",
    "back a minute",
    "a day",
    "midnight - 1 us",
    "midnight",
    "midnight + 1 us",
    "window's end - 1 us",
    "window's end",
    "window's end + 1 us",
    "window's end + 7 days - 1 us",
    "window's end + 7 days",
    "7 days",
    "the switch - 1 us",
    "the switch",
)
ENROLLMENTS: tuple[dict[str, Any], ...] = (
    *({},) * 8,
    {"sharing": "disabled"},
    {"sharing": "selected", "projects": ("p1",)},
    {"sharing": "selected", "projects": ("p1", "p2")},
    {"plan": "enterprise"},
    {"plan": "enterprise", "sharing": "disabled"},
    {"plan": "enterprise-trial"},
    {"zero_data_retention": True},
    {"zero_data_retention": True, "sharing": "disabled"},
    {"starts": 0},
    {"ends": 0},
    {"starts": -DAY, "ends": HOUR, "sharing": "disabled"},
    {"starts": -DAY, "ends": HOUR},
    {"owners": ("ann", "bob")},
    {"owners": ("ann",)},
)
ACTORS = ("ann", "ann", "ann", "ann", "bob", "eve")
BEGINNINGS = (
    micros("2025-04-18") + 12 * HOUR,
    SWITCH - 2 * DAY - 6 * HOUR,
    SWITCH - 10 * MINUTE,
    START,
    micros("2025-01-01") + 7 * HOUR,
    SWITCH,
    micros("2025-03-20") + 9 * HOUR + 15 * MINUTE,
    LIST_B - 2 * HOUR,
)
SETTLES: tuple[tuple[str, dict[str, Any]], ...] = (
    *(("as held", {}),) * 3,
    ("one less", {}),
    ("one more", {}),
    ("half", {}),
    ("nothing", {}),
    ("what is left", {}),
    ("what is left + 1", {}),
    *(("unmeasured", {}),) * 2,
    ("half", {"model": "gpt-4o-mini-2024-07-18"}),
    ("half", {"model": "gpt-4o-2024-08-06"}),
    ("half", {"model": "gpt-4o"}),
    ("half", {"tools": ("web_search",)}),
    ("half", {"project": "p1"}),
)
HOLD_TIMES = (MINUTE, SECOND, 10 * MINUTE, HOUR, 7 * HOUR, DAY)
VERBS = (
    "nothing",
    *("decide",) * 12,
    *("decide anything",) * 8,
    *("decide again",) * 6,
    *("batch",) * 3,
    *("pass time",) * 6,
    *("enroll",) * 4,
    *("explain",) * 2,
    *("explain again", "standing", "restart"),
    *("hold",) * 5,
    *("settle",) * 4,
    *("correct",) * 3,
    *("hold again", "decide held", "release", "extend", "expire", "words"),
)
HOLD_VERBS = frozenset({"hold", "hold again", "settle", "release", "extend", "expire", "correct", "words"})


class Program:
    """A row of steps; what is shown of it is those that do anything."""

    def __init__(self, *steps: bytes) -> None:
        self.steps = steps

    def _repr_pretty_(self, printer: Any, _cycle: object) -> None:
        printer.text(" ".join(step.hex() for step in self.steps if any(step)))


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """A program of so many steps, and before them what the world is like."""
    step = st.binary(min_size=6, max_size=6)
    return Program(*[draw(step) for _ in range(1 + STEPS_A_PROGRAM)])


class World:
    """An oracle and some stores, two meters before each store, and one clock."""

    def __init__(self, openers: Sequence[Opener], beginning: bytes, *, counts: str, overage: str) -> None:
        self.openers = openers
        self.counts = counts
        self.seen: Counter[str] = Counter()
        self.story: list[tuple[Any, ...]] = []
        self.asked: list[dict[str, Any]] = []
        self.held: list[tuple[dict[str, Any], Hold]] = []
        self.names: Counter[str] = Counter()
        self.batch: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.batch_size = 0
        self.offer = SHIPPED.reading(counts=counts, overage=overage)

        self.set_clock(BEGINNINGS[beginning[0] % len(BEGINNINGS)])
        tier = 1 + beginning[1] % 5
        assume = (None, 2, 4)[beginning[2] % 3]
        has_bounds = beginning[3] % 8 != 7
        assumed = None if assume is None else enrollment_dict({"tier": assume})
        self.story.append(
            ("an offer", {"counts": counts, "overage": overage}, "in tier", tier, "else", assumed, has_bounds)
        )
        self.bounds = Bounds() if has_bounds else None
        self.assumed = None if assumed is None else enrollment_of(assumed)
        self.oracle = Oracle(counts=counts, overage=overage, assume=assumed, has_bounds=has_bounds)
        self.legs = [[self.open(opener) for _ in range(2)] for opener in openers]
        for account in MAIN_ACCOUNTS:
            self.change(account, {"tier": tier}, "ann", 0)

    def open(self, opener: Opener) -> Meter:
        """A meter over a store."""
        return Meter(opener(clock=self.clock, bounds=self.bounds), self.offer, assume=self.assumed)

    def close(self) -> None:
        """Close the stores."""
        for meter in chain(*self.legs):
            meter.close()

    def clock(self) -> datetime:
        """The stores' clock."""
        return self.instant

    def set_clock(self, now: int) -> None:
        """It is this time now."""
        self.now = now
        self.instant = instant(now)
        self.story.append(("it is", now))

    def run(self, program: tuple[bytes, ...]) -> None:
        """Every step, and after them all that must be true of what is kept."""
        for place, step in enumerate(program):
            verb = VERBS[step[0] % len(VERBS)]
            side = place // 2 % 2
            if verb == "decide":
                self.ask(self.request(LISTED[step[2] % 4], {}, step), side)
            elif verb == "decide anything":
                self.ask(self.request(MODELS[step[2] % len(MODELS)], TWISTS[step[3] % len(TWISTS)], step), side)
            elif verb == "decide again":
                self.ask(self.again(step), side)
            elif verb == "decide held":
                self.ask(self.settled(step), side)
            elif verb in HOLD_VERBS:
                self.answer_batch(side)
                self.seen["steps"] += 1
                self.manage_holds(verb, step, side)
            else:
                self.answer_batch(side)
                self.manage(verb, step, side)
        self.answer_batch(0)
        self.check_ledgers()
        self.check_windows()
        self.check_enrollments()

    def manage(self, verb: str, step: bytes, side: int) -> None:
        """A step that decides nothing."""
        account, model = ACCOUNTS[step[1] % len(ACCOUNTS)], LISTED[step[2] % 4]
        if verb in {"nothing", "batch"}:
            self.batch_size = step[1] % 9 if verb == "batch" else 0
            return
        self.seen["steps"] += 1
        if verb == "pass time":
            self.pass_time(PASSES[step[3] % len(PASSES)], account, model)
        elif verb == "enroll":
            facts = dict(ENROLLMENTS[step[3] % len(ENROLLMENTS)])
            edges = {name: self.now + facts[name] for name in ("starts", "ends") if name in facts}
            self.change(account, {"tier": step[2] % 6, **facts, **edges}, ACTORS[step[4] % len(ACTORS)], side)
        elif verb == "explain":
            self.explain(self.request(MODELS[step[2] % len(MODELS)], TWISTS[step[3] % len(TWISTS)], step), side)
        elif verb == "explain again":
            self.explain(self.again(step), side)
        elif verb == "standing":
            self.check_standing(account, side)
        else:
            self.story.append(("one process closes its stores and opens them again",))
            for leg, opener in zip(self.legs, self.openers, strict=True):
                leg[side].close()
                leg[side] = self.open(opener)

    def manage_holds(self, verb: str, step: bytes, side: int) -> None:
        """A step of holds and corrections."""
        if verb == "hold":
            twist = TWISTS[step[3] % len(TWISTS)] if step[3] % 3 == 0 else {}
            self.hold(self.request(MODELS[step[2] % len(MODELS)], twist, step), step, side)
        elif verb == "hold again":
            self.hold(self.again(step), step, side)
        elif verb in {"settle", "release", "extend"}:
            self.end_hold(verb, step, side)
        elif verb == "expire":
            self.expire(ACCOUNTS[step[1] % len(ACCOUNTS)], side)
        else:
            self.correct(verb, step, side)

    def ask(self, request: dict[str, Any] | None, side: int) -> None:
        """A request is decided by the oracle at once, and by the stores too, or when its batch is full."""
        if request is None:
            return
        answer = self.oracle.decide(request, now=self.now)
        self.story.append(("decide", request, answer))
        self.seen["steps"] += 1
        self.seen[answer.get("error") or (answer["replayed"] and "replayed") or answer["reason"]] += 1
        self.batch.append((request, answer))
        if len(self.batch) >= self.batch_size:
            self.answer_batch(side)

    def answer_batch(self, side: int) -> None:
        """The requests that wait are answered by the stores, in one batch or one by one, as by the oracle."""
        batch, self.batch = self.batch, []
        expected = [answer for _, answer in batch]
        given = [request_of(request) for request, _ in batch]
        singly = 0 if len(given) == 1 else 1 + len(self.story) % 3
        for number, meter in enumerate(leg[side] for leg in self.legs):
            if singly in {0, number + 1}:
                answers = [decided(meter, request) for request in given]
            else:
                answers = meter.decide_many(given)
            assert [answer_of(answer) for answer in answers] == expected

    def explain(self, request: dict[str, Any] | None, side: int) -> None:
        """What would be decided is said by all, alike, and nothing is written."""
        if request is None:
            return
        expected = self.oracle.decide(request, now=self.now, dry=True)
        fits = self.oracle.fits(request, now=self.now)
        self.story.append(("explain", request, expected, fits))
        self.seen["explained"] += 1
        for meter in (leg[side] for leg in self.legs):
            assert explained(meter, request_of(request)) == (expected, fits)

    def hold(self, request: dict[str, Any] | None, step: bytes, side: int) -> None:
        """A hold is asked for, of all alike; beside what is used, holds alone never pass an allowance."""
        if request is None:
            return
        tokens = request["input_tokens"] or 0
        span, expiry = HOLD_TIMES[step[4] % len(HOLD_TIMES)], ("decided", "released")[step[5] % 2]
        expected = self.oracle.hold(request, tokens, until=self.now + span, expiry=expiry, now=self.now)
        self.story.append(("hold", request, tokens, span, expiry, expected))
        self.seen["held" if "error" not in expected else "not held"] += 1
        asked, for_ = request_of(request), timedelta(microseconds=span)
        for meter in (leg[side] for leg in self.legs):
            found = answered(meter.hold, asked, tokens, for_=for_, on_expiry=expiry)
            if isinstance(found, Hold):
                assert hold_of(found) == hold_as(expected)
                if found.fits and not found.replayed:
                    assert found.used + found.held + found.amount <= found.terms.allowance
            else:
                assert answer_of(found) == expected
        if "error" not in expected:
            self.held.append((expected, found))
        self.check_standing(request["account"], side, only=len(self.story))

    def spending(self, step: bytes) -> tuple[dict[str, Any], Hold, dict[str, Any]] | None:
        """A hold that was asked for, and what its request then used."""
        if not self.held:
            return None
        hold, made = self.held[-1 - step[1] % len(self.held)]
        how, word = SETTLES[step[2] % len(SETTLES)]
        request = hold["request"]
        allowance, used = self.oracle.aim(request["account"], request["model"], request["at"])
        left, bound = max(0, allowance - used), request["input_tokens"]
        tokens = {
            "as held": bound,
            "one less": max(0, bound - 1),
            "one more": min(bound + 1, 10**12),
            "half": bound // 2,
            "nothing": 0,
            "what is left": left,
            "what is left + 1": left + 1,
            "unmeasured": None,
        }[how]
        return hold, made, {"input_tokens": tokens, "output_tokens": 0, **word}

    def settled(self, step: bytes) -> dict[str, Any] | None:
        """A held request with what it used, to be decided as any other."""
        found = self.spending(step)
        if found is None or found[2]["input_tokens"] is None:
            return None
        hold, _, used = found
        return merged(hold["request"], used)

    def end_hold(self, verb: str, step: bytes, side: int) -> None:
        """A hold is settled, released or extended, in all alike; it may be over since long."""
        found = self.spending(step)
        if found is None:
            return
        hold, made, used = found
        if verb == "settle":
            request = merged(hold["request"], used)
            changed = {field: request[field] for field in ("model", "project", "tools")}
            expected = self.oracle.settle(hold, {**used, **changed}, now=self.now)
            asking = [(meter[side].settle, (made, Usage(**used)), {}) for meter in self.legs]
        elif verb == "release":
            expected = self.oracle.release(hold, now=self.now)
            asking = [(meter[side].release, (made,), {}) for meter in self.legs]
        else:
            span = HOLD_TIMES[step[4] % len(HOLD_TIMES)]
            expected = self.oracle.extend(hold, until=self.now + span)
            for_ = timedelta(microseconds=span)
            asking = [(meter[side].extend, (made,), {"for_": for_}) for meter in self.legs]
        self.story.append((verb, hold["request"], used, expected))
        self.seen[verb] += 1
        for verb_of, args, named in asking:
            told = answered(verb_of, *args, **named)
            if isinstance(told, Hold):
                assert hold_of(told) == hold_as(expected)
            else:
                assert (told and answer_of(told)) == expected
        if isinstance(expected, dict) and "correction" in expected:
            self.seen[expected["correction"]["remedy"]] += 1
        self.check_standing(hold["request"]["account"], side, only=len(self.story))

    def expire(self, account: str, side: int) -> None:
        """What ran out of time is ended, in all alike; what is left is told."""
        expected = self.oracle.expire(account, now=self.now)
        self.story.append(("expire", account, expected))
        self.seen["ran out"] += len(expected)
        holds = [hold_as(hold) for hold in self.oracle.holds(account)]
        for meter in (leg[side] for leg in self.legs):
            assert [answer_of(decision) for decision in meter.expire(account)] == expected
            assert [{**hold_of(hold), "replayed": None} for hold in meter.holds(account)] == [
                {**hold, "replayed": None} for hold in holds
            ]
        self.check_standing(account, side, only=len(self.story))

    def correct(self, verb: str, step: bytes, side: int) -> None:
        """What was decided is voided or adjusted, in all alike, or just told."""
        decided = list(self.oracle.words)
        if not decided:
            return
        account, name = decided[-1 - step[1] % len(decided)]
        name = "nobody" if step[5] % 16 == 15 else name
        if verb == "correct":
            actor, why = ACTORS[step[4] % len(ACTORS)], ("counted twice", "refunded")[step[5] % 2]
            size = SIZES[step[3] % len(SIZES)]
            tokens = size if isinstance(size, int) and step[2] % 2 else None
            expected = self.oracle.correct(account, name, tokens, actor=actor, why=why, now=self.now)
            self.story.append((actor, "corrects", account, name, tokens, expected))
            self.seen[expected.get("error") or expected["correction"]["remedy"]] += 1
            for meter in (leg[side] for leg in self.legs):
                by = {"actor": actor, "why": why, "account": account}
                if tokens is None:
                    found = answered(meter.void, name, **by)
                else:
                    found = answered(meter.adjust, name, Usage(input_tokens=tokens, output_tokens=0), **by)
                assert answer_of(found) == expected
        words = [word["line"] for word in self.oracle.words.get((account, name), ())]
        meter = self.legs[len(self.story) % len(self.legs)][side]
        assert [decision_line(decision) for decision in meter.decisions(name, account=account)] == words
        self.check_standing(account, side, only=len(self.story))

    def pass_time(self, how: str, account: str, model: str) -> None:
        """Time passes, to the edges of days and windows too."""
        now = self.now
        midnight = now - now % DAY + DAY
        rolled = self.oracle.rolling.get((account, group_of(model)))
        end = midnight if rolled is None else rolled["end"]
        then = {
            "a second": now + SECOND,
            "4 min": now + 4 * MINUTE,
            "an hour": now + HOUR,
            "7 h": now + 7 * HOUR,
            "back a minute": now - MINUTE,
            "a day": now + DAY,
            "midnight - 1 us": midnight - 1,
            "midnight": midnight,
            "midnight + 1 us": midnight + 1,
            "window's end - 1 us": end - 1,
            "window's end": end,
            "window's end + 1 us": end + 1,
            "window's end + 7 days - 1 us": end + KEEP - 1,
            "window's end + 7 days": end + KEEP,
            "7 days": now + 7 * DAY,
            "the switch - 1 us": SWITCH - 1,
            "the switch": SWITCH,
        }[how]
        if (then > now or how == "back a minute") and START <= then <= LAST_CLOCK:
            self.set_clock(then)

    def time_of(self, when: str, account: str, model: str) -> int:
        """A request's own time."""
        now = self.now
        today = now - now % DAY
        window = self.oracle.rolling.get((account, group_of(model))) or {"start": today, "end": today + DAY}
        at = {
            "now": now,
            "a second ago": now - SECOND,
            "1 us ago": now - 1,
            "an hour ago": now - HOUR,
            "a day ago": now - DAY,
            "2 days ago": now - 2 * DAY,
            "5 min ahead": now + AHEAD,
            "5 min and 1 us ahead": now + AHEAD + 1,
            "an hour ahead": now + HOUR,
            "today's start": today,
            "today's start - 1 us": today - 1,
            "today's end - 1 us": today + DAY - 1,
            "7 days before today": today - KEEP,
            "7 days before today - 1 us": today - KEEP - 1,
            "8 days before today": today - KEEP - DAY,
            "a month ago": now - 30 * DAY,
            "window's start - 1 us": window["start"] - 1,
            "window's start": window["start"],
            "window's end - 1 us": window["end"] - 1,
            "window's end": window["end"],
            "window's end + 1 us": window["end"] + 1,
            "switch - 1 us": SWITCH - 1,
            "switch": SWITCH,
            "list B - 1 us": LIST_B - 1,
            "list B": LIST_B,
            "offer's start - 1 us": START - 1,
            "offer's start": START,
        }[when]
        return at if at <= now + AHEAD or "ahead" in when else now

    def request(self, model: str, twist: dict[str, Any], step: bytes) -> dict[str, Any]:
        """A new request, aimed at the edges of what the oracle knows."""
        account = ACCOUNTS[step[1] % len(ACCOUNTS)]
        at = self.time_of(WHENS[step[4] % len(WHENS)], account, model)
        size = SIZES[step[5] % len(SIZES)]
        allowance, used = self.oracle.aim(account, model, at)
        left = max(1, allowance - used)
        tokens = (
            size
            if isinstance(size, int)
            else {
                "what is left": left,
                "what is left + 1": left + 1,
                "what is left - 1": left - 1,
                "allowance": allowance,
                "allowance + 1": allowance + 1,
                "half the allowance": allowance // 2,
            }[size]
        )
        self.names[account] += 1
        number = self.names[account]
        name = STRANGE_IDS[number // 10] if number % 10 == 0 and number // 10 < len(STRANGE_IDS) else f"{number}"
        made = tokens // 4
        request = {
            "id": name,
            "account": account,
            "project": None,
            "model": model,
            "input_tokens": tokens - made,
            "output_tokens": made,
            "cached_tokens": 0,
            "at": at,
            "kind": "completion",
            "tools": (),
            **twist,
        }
        request["cached_tokens"] = min(request["cached_tokens"], request["input_tokens"] or 0)
        self.asked.append(request)
        return request

    def again(self, step: bytes) -> dict[str, Any] | None:
        """A request that was asked before, the same or with other content."""
        if not self.asked:
            return None
        return changed(self.asked[-1 - step[1] % len(self.asked)], CHANGES[step[2] % len(CHANGES)])

    def change(self, account: str, facts: dict[str, Any], actor: str, side: int) -> None:
        """An enrollment changes in all, alike, or is refused by all."""
        wanted = enrollment_dict(facts)
        version = self.oracle.enroll(account, wanted, actor=actor)
        self.story.append((actor, "enrolls", account, wanted, version))
        self.seen["refused" if version is None else "enrolled"] += 1
        expected = None if version is None else (version, self.instant, actor)
        for meter in (leg[side] for leg in self.legs):
            assert enrolled(meter, account, enrollment_of(wanted), actor) == expected

    def check_standing(self, account: str, side: int, *, only: int | None = None) -> None:
        """What an account has used and held of each group is said by all, alike, or by one of them."""
        expected = self.oracle.standing(account, at=self.now)
        self.story.append(("standing", account, expected))
        self.seen["standing"] += 1
        legs = self.legs if only is None else [self.legs[only % len(self.legs)]]
        for meter in (leg[side] for leg in legs):
            found = {}
            for standing in meter.standing(account):
                window = standing.window
                found[standing.group] = {
                    "used": standing.used,
                    "held": standing.held,
                    "window_start": None if window is None else stamp(window.start),
                    "window_end": None if window is None else stamp(window.end),
                }
            assert found == expected

    def check_ledgers(self) -> None:
        """Entries are 1..n, each id stands once, and each account's ledger says what was answered, when it was."""
        answered: dict[str, list[dict[str, Any]]] = {}
        for now, line in self.oracle.entries:
            answered.setdefault(line["account"], []).append({"decided_at": instant(now), **line})
        ledgers = []
        for meter in (leg[0] for leg in self.legs):
            entries = list(meter.ledger())
            assert [entry.entry for entry in entries] == list(range(1, len(self.oracle.entries) + 1))
            assert len({(entry.decision.account, entry.decision.request.id) for entry in entries}) == len(entries)
            kept: dict[str, list[dict[str, Any]]] = {}
            for entry in entries:
                line = {"decided_at": entry.decided_at, **decision_line(entry.decision)}
                kept.setdefault(entry.decision.account, []).append(line)
            assert kept == answered
            assert list(meter.ledger(account="acme")) == [e for e in entries if e.decision.account == "acme"]
            ledgers.append(sorted((facts_of(entry) for entry in entries), key=itemgetter(0, 1)))
        assert all(ledger == ledgers[0] for ledger in ledgers)

    def check_windows(self) -> None:
        """Each window's `seq` is 1..n, and its counter is the sum of what its ledger counts."""
        counted = "free_tokens" if self.counts == "free" else "tokens"
        sums: Counter[tuple[str, str, str]] = Counter()
        seqs: Counter[tuple[str, str, str]] = Counter()
        for _, line in self.oracle.entries:
            if line["seq"] is not None:
                key = (line["account"], line["group"], line["window_start"])
                sums[key] += line[counted] - line.get("correction", {"returned": 0})["returned"]
                seqs[key] += 1
                assert line["seq"] == seqs[key]
                assert line["used"] == sums[key]
        expected = {key: (sums[key], seqs[key]) for key in seqs}
        for store in (leg[0]._store for leg in self.legs):
            kept = {
                (account, group, stamp(tally.window.start)): (tally.used, tally.seq)
                for _, account in store.accounts()
                for group, _, tally in store.tallies(OFFER, account)
            }
            assert kept == expected

    def check_enrollments(self) -> None:
        """A store knows the accounts that were enrolled or asked, and every change that was acknowledged."""
        known = {account for account, _ in self.oracle.decided} | set(self.oracle.enrolled)
        known |= {hold["request"]["account"] for hold, _ in self.held}
        for meter in (leg[0] for leg in self.legs):
            assert sorted(meter._store.accounts()) == sorted((OFFER, account) for account in known)
            for account in known:
                tiers = [change.enrollment.tier for change in meter.enrollments(account)]
                assert tiers == [facts["tier"] for facts in self.oracle.enrolled.get(account, ())]


def instant(at: int) -> datetime:
    """The oracle's time as Gratis takes it."""
    return EPOCH + timedelta(microseconds=at)


def group_of(model: str) -> str:
    """The group of a model, if it has one."""
    return "10M" if "mini" in model else "1M"


def enrollment_dict(facts: dict[str, Any]) -> dict[str, Any]:
    """An enrollment as the oracle takes it."""
    plain = {
        "sharing": "enabled",
        "projects": (),
        "plan": "standard",
        "zero_data_retention": False,
        "starts": None,
        "ends": None,
        "owners": (),
    }
    return {**plain, **facts}


def enrollment_of(facts: dict[str, Any]) -> Enrollment:
    """The same enrollment as Gratis takes it."""
    edges = {name: None if facts[name] is None else instant(facts[name]) for name in ("starts", "ends")}
    return Enrollment(**{**facts, **edges})


def request_of(request: dict[str, Any]) -> Request:
    """The oracle's request as Gratis takes it."""
    return Request(**{**request, "at": instant(request["at"])})


def changed(request: dict[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
    """The same id, with other content in these fields."""
    given, made = request["input_tokens"], request["output_tokens"]
    other = dict(request)
    for field in fields:
        other[field] = {
            "model": request["model"] + "x",
            "at": request["at"] - 1,
            "project": None if request["project"] else "p1",
            "input_tokens": request["cached_tokens"] + 7 if given is None or given > 10**11 else given + 1,
            "output_tokens": 0 if made is None or made > 10**11 else made + 1,
            "cached_tokens": 0 if request["cached_tokens"] or not given else 1,
            "kind": "eval" if request["kind"] == "completion" else "completion",
            "tools": () if request["tools"] else ("function",),
        }[field]
    return other


def decided(meter: Meter, request: Request) -> Decision | RequestError:
    """The decision, or the error in its place."""
    try:
        return meter.decide(request)
    except RequestError as error:
        return error


def merged(request: dict[str, Any], used: dict[str, Any]) -> dict[str, Any]:
    """A held request with what the provider said of it."""
    return {**request, **used, "tools": tuple(sorted({*request["tools"], *used.get("tools", ())}))}


def answered(verb: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """What a verb answers, or the error in its place."""
    try:
        return verb(*args, **named)
    except (RequestError, EnrollmentError) as error:
        return error


def hold_of(hold: Hold) -> dict[str, Any]:
    """A hold as the oracle tells it."""
    if hold.decision is not None:
        return {"decision": decision_line(hold.decision), "fits": hold.fits}
    said = {
        "id": hold.id,
        "model": hold.request.model,
        "at": micros_of(hold.at),
        "tokens_max": hold.tokens_max,
        "reason": hold.reason,
        "used": hold.used,
        "held": hold.held,
        "short": hold.short,
        "until": micros_of(hold.until),
        "expiry": hold.expiry,
        "replayed": hold.replayed,
    }
    return {
        **said,
        "window": hold.window and {"start": micros_of(hold.window.start), "end": micros_of(hold.window.end)},
    }


def hold_as(hold: dict[str, Any]) -> dict[str, Any]:
    """The oracle's hold in the same words."""
    if hold["decision"] is not None:
        return {"decision": hold["decision"], "fits": False}
    return {**said_of(hold), "window": hold["window"]}


def explained(meter: Meter, request: Request) -> tuple[dict[str, Any], int | None]:
    """What would be decided, and the largest size that would be free."""
    try:
        explanation = meter.explain(request)
    except RequestError as error:
        return answer_of(error), None
    return decision_line(explanation.decision), explanation.fits


def enrolled(meter: Meter, account: str, enrollment: Enrollment, actor: str) -> tuple[int, datetime, str] | None:
    """The change that was acknowledged; None if it was refused."""
    try:
        made = meter.enroll(account, enrollment, actor=actor)
    except EnrollmentError:
        return None
    return made.version, made.at, made.actor


def answer_of(answer: Decision | RequestError | EnrollmentError) -> dict[str, Any]:
    """An answer as the oracle tells it."""
    if isinstance(answer, Conflict):
        if answer.first is None:
            hold = hold_of(answer.hold)
            del hold["window"]
            return {"error": "conflict", "field": answer.field, "hold": hold}
        return {"error": "conflict", "field": answer.field, "first": decision_line(answer.first)}
    if isinstance(answer, EnrollmentError):
        return {"error": "not an owner"}
    if isinstance(answer, RequestError):
        return {"error": "ahead", "field": answer.field}
    return decision_line(answer)


def facts_of(entry: Entry) -> tuple[Any, ...]:
    """All that an entry says but for its place and what it rests on."""
    decision = entry.decision
    return (
        decision.account,
        decision.id,
        entry.decided_at,
        decision.request,
        decision.terms,
        decision.reason,
        decision.free_tokens,
        decision.used,
        decision.total,
        decision.window,
        decision.seq,
        decision.replayed,
        decision.hold,
        decision.correction,
    )


@contextmanager
def embedded() -> Iterator[list[Opener]]:
    """A store in memory and one in a file."""
    with tempfile.TemporaryDirectory() as folder:
        kept: dict[str, Any] = {}
        yield [
            partial(View, kept),
            partial(SQLiteStore, Path(folder) / "store.db", synchronous=Synchronous.OFF),
        ]


@contextmanager
def served(url: str) -> Iterator[list[Opener]]:
    """A store on a server: a namespace that nobody had before."""
    yield [partial(open_redis, f"{url}?namespace={next(NAMESPACES)}")]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A private server."""
    with Server() as started:
        yield started


@pytest.mark.parametrize("overage", ["whole", "excess"])
@pytest.mark.parametrize("counts", ["free", "all"])
def test_every_answer_is_the_oracles(counts: str, overage: str) -> None:
    """Under each reading, forty thousand steps of random programs are answered by both stores as by the oracle."""
    drive(embedded, counts, overage, programs_max=PROGRAMS, steps_min=STEPS_MIN)


@pytest.mark.parametrize("overage", ["whole", "excess"])
@pytest.mark.parametrize("counts", ["free", "all"])
def test_every_answer_of_a_server_is_the_oracles(server: Server, counts: str, overage: str) -> None:
    """Under each reading, 100,000 steps of random programs are answered over a real server as by the oracle."""
    drive(partial(served, server.url), counts, overage, programs_max=SERVED_PROGRAMS, steps_min=SERVED_STEPS_MIN)
    server.ask("FLUSHALL")


def drive(
    stores: Callable[[], AbstractContextManager[list[Opener]]],
    counts: str,
    overage: str,
    *,
    programs_max: int,
    steps_min: int,
) -> None:
    """Run random programs; each answer must be the oracle's, and all kinds of answer must have been seen."""
    seen: Counter[str] = Counter()

    @settings(max_examples=programs_max, phases=set(Phase) - {Phase.explain})
    @given(program=programs())
    def run(program: Program) -> None:
        with stores() as openers:
            world = World(openers, program.steps[0], counts=counts, overage=overage)
            try:
                world.run(program.steps[1:])
            except Exception as error:
                error.add_note("\n".join(" | ".join(map(str, event)) for event in world.story))
                raise
            finally:
                world.close()
        seen.update(world.seen)

    run()
    assert seen["steps"] >= steps_min
    reasons = {*Reason, "replayed", "conflict", "ahead", "enrolled", "refused", "explained", "standing"}
    reasons |= {"held", "not held", "settle", "release", "extend", "ran out", "not an owner", *Remedy}
    assert reasons - set(seen) == {Reason.EVALS}
