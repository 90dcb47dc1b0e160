"""The audit knows which enrollment was in force: what rests on another one is found."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from gratis import Enrollment, Meter, Request
from gratis.lines import change_line, encode, entry_line
from gratis.stores.memory import MemoryStore

from .test_audit import LARGE, NOON, OFFER, Clock, file_of, places, said
from .test_cli import Answer, gratis

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HOUR = timedelta(hours=1)
TIERS = (1, 3, 2)
BEFORE = Enrollment(tier=5, sharing="enabled")


def live(meter: Meter, clock: Clock) -> None:
    """An account that is taken for granted first, then enrolls and changes twice; others stay as they are."""
    for number, tier in enumerate((0, *TIERS)):
        if tier:
            meter.enroll("default", Enrollment(tier=tier, sharing="enabled"), actor="ann")
        clock.now += HOUR / 2
        for account in ("default", "never"):
            name = f"{account}{number}"
            meter.decide(Request(id=name, model=LARGE, at=clock.now, input_tokens=9, output_tokens=0, account=account))
        clock.now += HOUR / 2
    meter.void("default1", actor="ann", why="sent twice")


def told() -> tuple[list[Any], list[Any]]:
    """The lines of its ledger, without links, and of its history."""
    clock = Clock(NOON)
    store = MemoryStore(clock=clock)
    meter = Meter(store, OFFER, assume=BEFORE)
    live(meter, clock)
    lines = [json.loads(encode({**entry_line(entry), "link": None})) for entry in meter.ledger()]
    history = [json.loads(encode(change_line(OFFER.name, "default", made))) for made in meter.enrollments("default")]
    return lines, history


def audit(tmp_path: Path, lines: list[Any], history: list[Any]) -> Answer:
    """`gratis audit` of a ledger with a history."""
    (tmp_path / "ledger.jsonl").write_bytes(file_of(lines))
    (tmp_path / "history.jsonl").write_bytes(file_of(history))
    return gratis("audit", tmp_path / "ledger.jsonl", "--enrollments", tmp_path / "history.jsonl")


def test_an_honest_ledger_follows_from_its_history(tmp_path: Path) -> None:
    """What was decided before anybody enrolled, and under each enrollment while it was in force, is no finding."""
    assert audit(tmp_path, *told()) == Answer(0, "", said(9))


@pytest.mark.parametrize(
    ("entry", "tier", "allowance"),
    [(1, None, 0), (3, 3, 1_000_000), (5, 1, 250_000), (7, 3, 1_000_000), (7, 5, 1_000_000)],
)
def test_a_decision_under_another_enrollment_is_found(
    tmp_path: Path, entry: int, tier: int | None, allowance: int
) -> None:
    """An enrollment that was not yet in force, no longer, or never, is found with the one that was."""
    lines, history = told()
    if tier is None:
        lines[entry - 1]["decided_at"] = "2025-04-20T13:45:00Z"
    else:
        lines[entry - 1]["enrollment"]["tier"] = tier
        lines[entry - 1]["terms"]["allowance"] = lines[entry - 1]["allowance"] = allowance
        lines[entry - 1]["remaining"] = allowance - lines[entry - 1]["used"]
    answer = audit(tmp_path, lines, history)
    assert places(answer)[:1] == [("not_in_force", entry)]
    assert {place for _, place in places(answer)} <= {entry, 9}  # which corrects entry 3, and rests on what it says
    assert answer.lines[0]["field"] == "enrollment"
    assert answer.lines[0]["expected"]["tier"] == (1 if entry == 1 else TIERS[entry // 2 - 1])


def test_an_older_enrollment_is_not_used_again(tmp_path: Path) -> None:
    """Once a decision rested on a later change, no later one rests on an earlier one, however close in time."""
    clock = Clock(NOON)
    meter = Meter(MemoryStore(clock=clock), OFFER)
    for tier in (3, 4):
        meter.enroll("default", Enrollment(tier=tier, sharing="enabled"), actor="ann")
        for number in range(2):
            name = f"{tier} {number}"
            meter.decide(Request(id=name, model=LARGE, at=NOON, input_tokens=9, output_tokens=0))
    history = [json.loads(encode(change_line(OFFER.name, "default", made))) for made in meter.enrollments("default")]
    lines = [json.loads(encode({**entry_line(entry), "link": None})) for entry in meter.ledger()]
    assert audit(tmp_path, lines, history).code == 0
    lines[3]["enrollment"]["tier"] = 3
    assert places(audit(tmp_path, lines, history)) == [("not_in_force", 4)]
    lines[2]["enrollment"]["tier"] = 3  # then there is nothing that tells: all of it was one instant
    assert audit(tmp_path, lines, history).code == 0


def test_a_correction_by_somebody_who_was_no_owner_is_found(tmp_path: Path) -> None:
    """Only who owned the account at the time corrects its decisions."""
    lines, history = told()
    lines[8]["correction"]["actor"] = "bob"
    answer = audit(tmp_path, lines, history)
    assert places(answer) == [("wrong_correction", 9)]
    assert (answer.lines[0]["found"], answer.lines[0]["expected"]) == ("bob", "an owner of the account at that time")
    history[2]["enrollment"]["owners"] = lines[6]["enrollment"]["owners"] = ["bob"]
    assert audit(tmp_path, lines, history).code == 0


def _edit(**fields: Any) -> Callable[[Path], None]:
    def edited(path: Path) -> None:
        with closing(sqlite3.connect(path)) as connection:
            for trigger in ("enrollments_keep_what_they_say", "enrollments_keep_what_they_hold"):
                connection.execute(f"DROP TRIGGER {trigger}")
            for field, value in fields.items():
                connection.execute(f"UPDATE enrollments SET {field} = {value} WHERE version = 2")  # noqa: S608 - ours
            connection.commit()

    return edited


def _cut(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TRIGGER enrollments_keep_what_they_hold")
        connection.execute("DELETE FROM enrollments WHERE version = 1")
        connection.commit()


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (_edit(actor="'mallory'"), "wrong_enrollment"),
        (_edit(at="at + 50000000000"), "not_in_force"),
        (_edit(at="at - 50000000000"), "wrong_enrollment"),
        (_edit(enrollment="replace(enrollment, '\"tier\":3', '\"tier\":4')"), "not_in_force"),
        (_cut, "wrong_enrollment"),
    ],
    ids=["actor", "later", "earlier", "tier", "cut"],
)
def test_a_history_that_was_edited_is_found_out(tmp_path: Path, plant: Callable[[Path], None], expected: str) -> None:
    """In a store decisions and history tell on each other."""
    path, clock = tmp_path / "gratis.db", Clock(NOON)
    url = f"sqlite:///{path}"
    with Meter.open(url, offer=OFFER, assume=BEFORE, clock=clock) as meter:
        live(meter, clock)
    assert gratis("audit", "--store", url) == Answer(0, "", "gratis: 9 entries, 0 findings\n")
    plant(path)
    answer = gratis("audit", "--store", url)
    assert expected in {each["kind"] for each in answer.lines}
    assert answer.code == 1


def test_a_history_that_cannot_be_read_is_told_with_its_line(tmp_path: Path) -> None:
    """What is no history ends the audit before it begins."""
    lines, history = told()
    history[1] = {"version": 2}
    answer = audit(tmp_path, lines, history)
    assert answer.code == 2
    assert "history.jsonl: line 2: offer: missing" in answer.err
