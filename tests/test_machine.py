"""Random programs drive a memory store and a SQLite file beside the oracle: every answer must be equal, field by field.

Two meters stand before each store, as two processes would: what one changes, the other must not miss.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections import Counter
from datetime import datetime, timedelta
from itertools import combinations, product
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from gratis import Conflict, Decision, Enrollment, EnrollmentError, Meter, Request, RequestError
from gratis.lines import decision_line
from gratis.offers import load
from gratis.stores.memory import MemoryStore
from gratis.stores.sqlite import SQLiteStore, Synchronous

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
    text_of,
)

SHIPPED = load(OFFER)
STEPS_A_PROGRAM = 100
PROGRAMS = 100
STEPS_MIN = 50_000
LAST_CLOCK = micros("2025-05-14")

MAIN_ACCOUNTS = ("default", "acme")
STRANGE_ACCOUNTS = (
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
LISTED = ("gpt-4o-2024-08-06", "gpt-4o-mini-2024-07-18", "o1-2024-12-17", "o3-mini-2025-01-31")
IN_LIST_B = ("gpt-4.1-2025-04-14", "o1-preview-2024-09-12", "o4-mini-2025-04-16")
STRANGE_MODELS = (
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
STRANGE_IDS = ("s", "t", "r:1", "\u0645\u200e", "Caf\u00e9", "Cafe\u0301", " ", "x" * 255)

PLAIN: dict[str, Any] = {}
TWISTS: tuple[dict[str, Any], ...] = (
    PLAIN,
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

WHENS = (
    "now",
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
SIZES = (
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
    120_000,
    249_999,
    10**12,
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
    "a restart",
)
SINGLY = ("neither", "memory", "file")
BEGINNINGS = (
    SWITCH - 2 * DAY - 6 * HOUR,
    SWITCH - 10 * MINUTE,
    START,
    micros("2025-01-01") + 7 * HOUR,
    SWITCH,
    micros("2025-03-20") + 9 * HOUR + 15 * MINUTE,
    LIST_B - 2 * HOUR,
    micros("2025-04-18") + 12 * HOUR,
)
FACTS: tuple[dict[str, Any], ...] = (
    *({},) * 8,
    {"sharing": "disabled"},
    {"sharing": "selected", "projects": ("p1",)},
    {"sharing": "selected", "projects": ("p1", "p2")},
    {"plan": "enterprise"},
    {"plan": "enterprise", "sharing": "disabled"},
    {"plan": "Enterprise"},
    {"zero_data_retention": True},
    {"zero_data_retention": True, "sharing": "disabled"},
    {"starts": 0},
    {"ends": 0},
    {"starts": -DAY, "ends": HOUR, "sharing": "disabled"},
    {"starts": -DAY, "ends": HOUR},
    {"owners": ("ann", "bob")},
    {"owners": ("ann",)},
)
ACTORS = ("ann", "ann", "ann", "bob", "eve")

owned = st.sampled_from(tuple(product(MAIN_ACCOUNTS, LISTED)))
anything = st.sampled_from(
    tuple(product(MAIN_ACCOUNTS * 4 + STRANGE_ACCOUNTS, LISTED * 3 + IN_LIST_B + STRANGE_MODELS))
)
accounts = st.sampled_from(MAIN_ACCOUNTS * 5 + STRANGE_ACCOUNTS)
whens = st.sampled_from(("now",) * 12 + WHENS)
sizes = st.sampled_from(SIZES)
twists = st.sampled_from((PLAIN,) * 8 + TWISTS)
places = st.integers(0, 1_000)
sides = st.integers(0, 1)
plain_asks = st.tuples(owned, whens, sizes)
asks = st.tuples(anything, whens, sizes, twists)
changes = st.sampled_from(
    ((),) * 12 + tuple((field,) for field in CONFLICT_FIELDS) + tuple(combinations(CONFLICT_FIELDS, 2))
)
agains = st.tuples(places, changes)

seen: Counter[str] = Counter()


class Machine(RuleBasedStateMachine):
    """One program: an oracle, a memory store and a SQLite file, two meters before each store, and one clock."""

    def __init__(self, *, counts: str, overage: str) -> None:
        super().__init__()
        self.reading = {"counts": counts, "overage": overage}
        self.offer = SHIPPED.reading(**self.reading)
        self.folder = Path(tempfile.mkdtemp())
        self.now = 0
        self.asked: list[dict[str, Any]] = []
        self.names: Counter[str] = Counter()

    @initialize(beginning=st.sampled_from(BEGINNINGS), tier=st.integers(1, 5), assume=st.sampled_from((None, 2, 4)))
    def begin(self, beginning: int, tier: int, assume: int | None) -> None:
        """The clock is set, the stores are opened, and the main accounts enrolled."""
        self.set_clock(beginning)
        assumed = None if assume is None else enrollment_dict({"tier": assume, "sharing": "enabled"})
        self.oracle = Oracle(**self.reading, assume=assumed)
        self.assumed = None if assumed is None else enrollment_of(assumed)
        self.memory = MemoryStore(clock=self.clock)
        self.remembered = [Meter(self.memory, self.offer, assume=self.assumed) for _ in range(2)]
        self.filed = [self.open_file() for _ in range(2)]
        for account in MAIN_ACCOUNTS:
            self.change(account, {"tier": tier, "sharing": "enabled"}, "ann", 0)

    @rule(ask=plain_asks, side=sides)
    def decide(self, ask: tuple[Any, ...], side: int) -> None:
        """A request that may be free is decided."""
        self.decide_one(self.request(*ask), side)

    @rule(ask=asks, side=sides)
    def decide_anything(self, ask: tuple[Any, ...], side: int) -> None:
        """A request of whatever kind is decided."""
        self.decide_one(self.request(*ask), side)

    @precondition(lambda self: self.asked)
    @rule(place=places, changes=changes, side=sides)
    def decide_again(self, place: int, changes: tuple[str, ...], side: int) -> None:
        """The same id is asked again: with the same content, or with other, and the conflict names what differs."""
        self.decide_one(changed(self.asked_before(place), changes), side)

    @rule(batch=st.lists(plain_asks | asks | agains, max_size=8), side=sides, singly=st.sampled_from(SINGLY))
    def decide_batch(self, batch: list[Any], side: int, singly: str) -> None:
        """A batch, with repeats and conflicts inside, is answered as its requests would be one by one."""
        seen["steps"] += 1
        batched = []
        for first, *rest in batch:
            if not isinstance(first, int):
                batched.append(self.request(first, *rest))
            elif self.asked:
                batched.append(changed(self.asked_before(first), *rest))
        expected = [self.expect(request) for request in batched]
        given = [request_of(request) for request in batched]
        for name, meter in (("memory", self.remembered[side]), ("file", self.filed[side])):
            answers = [decided(meter, one) for one in given] if singly == name else meter.decide_many(given)
            self.compare([answer_of(answer) for answer in answers], expected)

    @rule(how=st.sampled_from(PASSES), whose=owned)
    def pass_time(self, how: str, whose: tuple[str, str]) -> None:
        """Time passes, to the edges of days and windows too."""
        seen["steps"] += 1
        account, model = whose
        midnight = self.now - self.now % DAY + DAY
        window = self.oracle.window_of(account, model, self.now)
        rolled = self.oracle.rolling.get((account, window_group(model)))
        end = rolled["end"] if rolled else midnight if window is None else window[1]["end"]
        then = {
            "a second": self.now + SECOND,
            "4 min": self.now + 4 * MINUTE,
            "an hour": self.now + HOUR,
            "7 h": self.now + 7 * HOUR,
            "back a minute": self.now - MINUTE,
            "a day": self.now + DAY,
            "midnight - 1 us": midnight - 1,
            "midnight": midnight,
            "midnight + 1 us": midnight + 1,
            "window's end - 1 us": end - 1,
            "window's end": end,
            "window's end + 1 us": end + 1,
            "window's end + 7 days - 1 us": end + KEEP - 1,
            "window's end + 7 days": end + KEEP,
            "7 days": self.now + 7 * DAY,
            "the switch - 1 us": SWITCH - 1,
            "the switch": SWITCH,
            "a restart": self.now + SECOND,
        }[how]
        if how == "a restart":
            self.filed[1].close()
            self.filed[1] = self.open_file()
        if (then > self.now or how == "back a minute") and START <= then <= LAST_CLOCK:
            self.set_clock(then)

    @rule(
        account=accounts,
        tier=st.integers(0, 5),
        facts=st.sampled_from(FACTS),
        actor=st.sampled_from(ACTORS),
        side=sides,
    )
    def enroll(self, account: str, tier: int, facts: dict[str, Any], actor: str, side: int) -> None:
        """An enrollment changes, or is refused."""
        seen["steps"] += 1
        edges = {name: self.now + facts[name] for name in ("starts", "ends") if name in facts}
        self.change(account, {"tier": tier, "sharing": "enabled", **facts, **edges}, actor, side)

    def teardown(self) -> None:
        """After a program that failed nowhere, all that is kept follows from what was answered."""
        try:
            if sys.exception() is None and hasattr(self, "filed"):
                self.check_ledgers()
                self.check_windows()
                seen["programs"] += 1
        finally:
            for meter in getattr(self, "filed", ()):
                meter.close()
            shutil.rmtree(self.folder)

    def check_ledgers(self) -> None:
        """Entries are 1..n, each id stands once, and each account's ledger says what was answered, when it was."""
        answered: dict[str, list[dict[str, Any]]] = {}
        for now, line in self.oracle.entries:
            answered.setdefault(line["account"], []).append({"decided_at": now, **line})
        ledgers = []
        for meter in (self.remembered[0], self.filed[0]):
            entries = list(meter.ledger())
            assert [entry.entry for entry in entries] == list(range(1, len(self.oracle.entries) + 1))
            assert len({(entry.decision.account, entry.decision.id) for entry in entries}) == len(entries)
            kept: dict[str, list[dict[str, Any]]] = {}
            for entry in entries:
                line = {"decided_at": microseconds(entry.decided_at), **decision_line(entry.decision)}
                kept.setdefault(entry.decision.account, []).append(line)
            assert kept == answered
            assert list(meter.ledger(account="acme")) == [e for e in entries if e.decision.account == "acme"]
            ledgers.append(sorted((facts_of(entry) for entry in entries), key=itemgetter(0, 1)))
        assert ledgers[0] == ledgers[1]

    def check_windows(self) -> None:
        """Each window's `seq` is 1..n, and its counter is the sum of what its ledger counts."""
        counted = "free_tokens" if self.reading["counts"] == "free" else "tokens"
        sums: Counter[tuple[str, str, str]] = Counter()
        seqs: Counter[tuple[str, str, str]] = Counter()
        for _, line in self.oracle.entries:
            if line["seq"] is not None:
                key = (line["account"], line["group"], line["window_start"])
                sums[key] += line[counted]
                seqs[key] += 1
                assert line["seq"] == seqs[key]
                assert line["used"] == sums[key]
        for store in (self.memory, self.filed[0]._store, self.filed[1]._store):
            kept = {
                (account, group, text_of(microseconds(tally.window.start))): tally
                for account in {account for account, _, _ in seqs}
                for group, _, tally in store.tallies(OFFER, account)
            }
            assert {key: tally.used for key, tally in kept.items()} == {key: sums[key] for key in seqs}
            assert {key: tally.seq for key, tally in kept.items()} == dict(seqs)

    def clock(self) -> Any:
        """The stores' clock."""
        return self.instant

    def set_clock(self, now: int) -> None:
        """It is this time now."""
        self.now = now
        self.instant = EPOCH + timedelta(microseconds=now)

    def open_file(self) -> Meter:
        """A meter over the file."""
        store = SQLiteStore(self.folder / "store.db", clock=self.clock, synchronous=Synchronous.OFF)
        return Meter(store, self.offer, assume=self.assumed)

    def request(
        self, whose: tuple[str, str], when: str, size: int | str, twist: dict[str, Any] = PLAIN
    ) -> dict[str, Any]:
        """A new request, aimed at the edges of what the oracle knows."""
        account, model = whose
        at = self.time_of(when, account, model)
        aim = self.oracle.window_of(account, model, at)
        allowance, used = (250_000, 0) if aim is None else (aim[0], aim[1]["used"])
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

    def time_of(self, when: str, account: str, model: str) -> int:
        """The request's own time."""
        now = self.now
        today = now - now % DAY
        rolled = self.oracle.rolling.get((account, window_group(model)))
        window = rolled or {"start": today, "end": today + DAY}
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

    def asked_before(self, place: int) -> dict[str, Any]:
        """A request that was asked before, the latest ones most often."""
        return self.asked[-1 - place % min(len(self.asked), 1 + place % 7 * 5)]

    def decide_one(self, request: dict[str, Any], side: int) -> None:
        """One request is decided by all, alike."""
        seen["steps"] += 1
        expected = [self.expect(request)]
        for meter in (self.remembered[side], self.filed[side]):
            self.compare([answer_of(decided(meter, request_of(request)))], expected)

    def expect(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the oracle answers."""
        answer = self.oracle.decide(request, now=self.now)
        seen["decisions"] += 1
        seen[answer.get("error") or (answer["replayed"] and "replayed") or answer["reason"]] += 1
        return answer

    def compare(self, answers: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
        """The answers are the oracle's."""
        assert answers == expected

    def change(self, account: str, facts: dict[str, Any], actor: str, side: int) -> None:
        """An enrollment changes in all, alike."""
        wanted = enrollment_dict(facts)
        version = self.oracle.enroll(account, wanted, actor=actor)
        for meter in (self.remembered[side], self.filed[side]):
            if version is None:
                with pytest.raises(EnrollmentError):
                    meter.enroll(account, enrollment_of(wanted), actor=actor)
            else:
                made = meter.enroll(account, enrollment_of(wanted), actor=actor)
                assert (made.version, made.at, made.actor) == (version, self.instant, actor)


def window_group(model: str) -> str:
    """The group of a model of list A."""
    return "10M" if "mini" in model else "1M"


def enrollment_dict(facts: dict[str, Any]) -> dict[str, Any]:
    """An enrollment as the oracle takes it."""
    nothing = {
        "sharing": "disabled",
        "projects": (),
        "plan": "standard",
        "zero_data_retention": False,
        "starts": None,
        "ends": None,
        "owners": (),
    }
    return {**nothing, **facts}


def enrollment_of(facts: dict[str, Any]) -> Enrollment:
    """The same enrollment as Gratis takes it."""
    edges = {name: facts[name] for name in ("starts", "ends")}
    return Enrollment(
        **{**facts, **{name: at if at is None else EPOCH + timedelta(microseconds=at) for name, at in edges.items()}}
    )


def request_of(request: dict[str, Any]) -> Request:
    """The oracle's request as Gratis takes it."""
    return Request(**{**request, "at": EPOCH + timedelta(microseconds=request["at"])})


def changed(request: dict[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
    """The same id, with other content in these fields."""
    other = dict(request)
    given, made = request["input_tokens"], request["output_tokens"]
    if "model" in fields:
        other["model"] = request["model"] + "x"
    if "at" in fields:
        other["at"] = request["at"] - 1
    if "project" in fields:
        other["project"] = None if request["project"] else "p1"
    if "input_tokens" in fields:
        other["input_tokens"] = request["cached_tokens"] + 7 if given is None or given > 10**11 else given + 1
    if "output_tokens" in fields:
        other["output_tokens"] = 0 if made is None or made > 10**11 else made + 1
    if "cached_tokens" in fields and other["input_tokens"]:
        other["cached_tokens"] = 0 if request["cached_tokens"] else 1
    if "kind" in fields:
        other["kind"] = "eval" if request["kind"] == "completion" else "completion"
    if "tools" in fields:
        other["tools"] = () if request["tools"] else ("function",)
    return other


def decided(meter: Meter, request: Request) -> Decision | RequestError:
    """The decision, or the error in its place."""
    try:
        return meter.decide(request)
    except RequestError as error:
        return error


def answer_of(answer: Decision | RequestError) -> dict[str, Any]:
    """An answer as the oracle tells it."""
    if isinstance(answer, Conflict):
        return {"error": "conflict", "field": answer.field, "first": decision_line(answer.first)}
    if isinstance(answer, RequestError):
        return {"error": "ahead", "field": answer.field}
    return decision_line(answer)


def microseconds(at: datetime) -> int:
    """The instant as the oracle tells it."""
    return (at - EPOCH) // timedelta(microseconds=1)


def facts_of(entry: Any) -> tuple[Any, ...]:
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
    )


@pytest.mark.parametrize("overage", ["whole", "excess"])
@pytest.mark.parametrize("counts", ["free", "all"])
def test_every_answer_is_the_oracles(counts: str, overage: str) -> None:
    """Under each reading, fifty thousand steps of random programs are answered by both stores as by the oracle."""
    seen.clear()
    run_state_machine_as_test(
        lambda: Machine(counts=counts, overage=overage),
        settings=settings(max_examples=PROGRAMS, stateful_step_count=STEPS_A_PROGRAM),
    )
    assert seen["steps"] >= STEPS_MIN
