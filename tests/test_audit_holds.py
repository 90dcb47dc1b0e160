"""The audit understands holds and corrections: honest ones have no findings, and what is planted in them is found."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings, strategies as st

from gratis import Enrollment, GratisError, Meter, Request, Usage
from gratis.lines import entry_line
from gratis.offers import load
from gratis.stores.memory import MemoryStore
from gratis.stores.sqlite import SQLiteStore
from gratis.stores.sqlite.file import Synchronous

from .test_audit import OFFER, STARTS, Clock, audit_of, audited, line_of, readings, said

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

LARGE, SMALL = "gpt-4o-2024-08-06", "gpt-4o-mini-2024-07-18"
NOON = datetime(2025, 4, 20, 12, tzinfo=UTC)
ENROLLED = Enrollment(tier=1, sharing="enabled", owners=frozenset({"ann"}))
TOKENS = st.one_of(st.integers(0, 10), st.integers(0, 200_000), st.sampled_from([250_000, 250_001]))
USAGES = st.builds(
    Usage,
    input_tokens=st.one_of(TOKENS, st.none()),
    output_tokens=st.sampled_from([0, 0, 0, None]),
    model=st.sampled_from([None, None, None, SMALL, "unknown"]),
    tools=st.sampled_from([(), (), ("web_search",)]),
)
steps = st.one_of(
    st.tuples(st.just("decide"), st.integers(0, 9), TOKENS),
    st.tuples(st.just("hold"), st.integers(0, 9), TOKENS, st.sampled_from(["decided", "released"])),
    st.tuples(st.just("settle"), st.integers(0, 9), USAGES),
    st.tuples(st.just("release"), st.integers(0, 9)),
    st.tuples(st.just("void"), st.integers(0, 9)),
    st.tuples(st.just("adjust"), st.integers(0, 9), USAGES),
    st.tuples(st.just("wait"), st.sampled_from([1, 5, 15, 600, 1_440, 3_000])),
)


def live(meter: Meter, clock: Clock, history: Iterable[tuple[Any, ...]]) -> None:
    """Let a history happen; what is refused leaves no trace, so it is passed over."""
    meter.enroll("default", ENROLLED, actor="ann")
    holds: dict[int, Any] = {}
    for what, *how in history:
        try:
            if what == "wait":
                clock.now += timedelta(minutes=how[0])
            elif what == "hold":
                request = Request(id=f"r{how[0]}", model=LARGE, at=clock.now)
                holds[how[0]] = meter.hold(request, how[1], on_expiry=how[2])
            elif what == "decide":
                meter.decide(Request(id=f"r{how[0]}", model=LARGE, at=clock.now, input_tokens=how[1], output_tokens=0))
            elif what == "void":
                meter.void(f"r{how[0]}", actor="ann", why="a test")
            elif what == "adjust":
                meter.adjust(f"r{how[0]}", how[1], actor="ann", why="a test")
            elif how[0] in holds and what == "settle":
                meter.settle(holds[how[0]], how[1])
            elif how[0] in holds:
                meter.release(holds[how[0]])
        except GratisError:
            pass


@settings(max_examples=150)
@given(start=st.sampled_from(STARTS), history=st.lists(steps, max_size=40), reading=readings)
def test_an_honest_history_with_holds_and_corrections_has_no_findings(
    start: datetime, history: list[tuple[Any, ...]], reading: tuple[str, str]
) -> None:
    """Whatever was held, ran out, was settled late, voided or adjusted, under each reading and kind of window."""
    offer = OFFER.reading(counts=reading[0], overage=reading[1])
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock(start)
        for store in (
            MemoryStore(clock=clock),
            SQLiteStore(Path(folder) / "gratis.db", clock=clock, synchronous=Synchronous.OFF),
        ):
            clock.now = start
            meter = Meter(store, offer)
            live(meter, clock, history)
            assert audited(store) == []
            lines.append([{**entry_line(entry), "durability": "any", "link": "of it"} for entry in meter.ledger()])
            store.close()
    assert lines[0] == lines[1]


def ledger() -> list[Any]:
    """A day of holds and corrections: settled, run out, settled late, released late, voided, adjusted twice."""
    clock = Clock(NOON)
    meter = Meter(MemoryStore(clock=clock), load("openai-data-sharing"))
    meter.enroll("default", ENROLLED, actor="ann")
    asked = [Request(id=f"r{n}", model=LARGE, at=NOON) for n in range(5)]
    holds = [meter.hold(request, 40_000) for request in asked]
    meter.settle(holds[0], Usage(input_tokens=1_000, output_tokens=10))
    clock.now += timedelta(minutes=15)
    meter.expire()
    meter.settle(holds[1], Usage(input_tokens=2_000, output_tokens=20))
    meter.release(holds[2])
    meter.void("r0", actor="ann", why="sent twice")
    meter.adjust("r3", Usage(input_tokens=30, output_tokens=3), actor="ann", why="a bill says so")
    meter.adjust("r3", Usage(input_tokens=40, output_tokens=4), actor="ann", why="another bill")
    return [line_of(entry) for entry in meter.ledger()]


def edit(entry: int, part: str, **fields: Any) -> Callable[[list[Any]], None]:
    """Change what an entry says of its hold or its correction."""
    return lambda lines: lines[entry - 1][part].update(fields)


PLANTED: list[tuple[str, Callable[[list[Any]], None], tuple[str, int]]] = [
    ("more returned than was taken", edit(6, "correction", returned=50_000), ("wrong_correction", 6)),
    ("less returned than was taken", edit(8, "correction", returned=1_000), ("wrong_correction", 8)),
    ("a correction of nothing", lambda lines: lines[8].update(id="r9"), ("wrong_correction", 9)),
    ("a number left out", edit(10, "correction", number=3), ("wrong_correction", 10)),
    ("a number said twice", edit(10, "correction", number=1), ("decided_twice", 10)),
    ("an owner without a reason", edit(8, "correction", why=None), ("wrong_correction", 8)),
    (
        "a release of what was measured",
        edit(8, "correction", remedy="released", actor=None, why=None),
        ("wrong_correction", 8),
    ),
    (
        "a settle of what was measured",
        edit(8, "correction", remedy="settled", actor=None, why=None),
        ("wrong_correction", 8),
    ),
    ("nobody who voids", edit(8, "correction", actor=None), ("wrong_correction", 8)),
    ("an owner who settles", edit(6, "correction", actor="ann"), ("wrong_correction", 6)),
    ("another window", edit(6, "correction", window_start="2025-04-19T00:00:00Z"), ("wrong_correction", 6)),
    ("a bound that is not what counted", edit(2, "hold", tokens_max=39_999), ("wrong_totals", 2)),
    ("unmeasured with its real tokens", edit(1, "hold", unmeasured=True), ("wrong_totals", 1)),
    ("a void that is free of more", lambda lines: lines[7].update(free_tokens=7), ("wrong_totals", 8)),
]


def test_an_honest_ledger_has_no_findings_as_lines() -> None:
    """Before anything is planted the audit is silent."""
    answer = audit_of(ledger())
    assert (answer.code, answer.out, answer.err) == (0, "", said(10))


@pytest.mark.parametrize(("plant", "expected"), [row[1:] for row in PLANTED], ids=[row[0] for row in PLANTED])
def test_what_is_planted_in_a_hold_or_a_correction_is_found(
    plant: Callable[[list[Any]], None], expected: tuple[str, int]
) -> None:
    """The first finding is of the kind and at the entry where it was planted, and the exit code is 1."""
    lines = ledger()
    plant(lines)
    answer = audit_of(lines)
    assert (answer.lines[0]["kind"], answer.lines[0]["entry"]) == expected
    assert answer.code == 1


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("hold", 7, "hold: found 7; expected a JSON object"),
        ("hold", {"tokens_max": None, "unmeasured": False}, "hold: found"),
        ("hold", {"tokens_max": 5, "unmeasured": 1, "window_start": None}, "hold: found"),
        ("correction", "x", "correction: found 'x'; expected a JSON object"),
        ("correction", {"number": 0, "returned": 1}, "correction: found"),
        ("correction", {"number": 1}, "returned: missing"),
    ],
)
def test_what_is_no_hold_or_correction_is_told(part: str, value: object, message: str) -> None:
    """A line whose hold or correction cannot be read is a finding that says why."""
    lines = ledger()
    lines[-1][part] = value
    (found,) = audit_of(lines).lines
    assert found["kind"] == "unreadable"
    assert message in found["found"]
