"""`gratis replay`: the same answers as a meter that keeps everything, line by line, in constant memory."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings, strategies as st

from gratis import Conflict, Decision, Enrollment, Meter, Request, RequestError
from gratis.audit import seen
from gratis.audit.replay import Replay
from gratis.lines import decision_line, request_line
from gratis.model import Counts, Overage
from gratis.offers import load
from gratis.stores.memory import MemoryStore

from .test_cli import gratis, sent

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gratis import Offer

OFFER = load("openai-data-sharing")
LARGE = "gpt-4o-2024-08-06"
SMALL = "gpt-4o-mini-2024-07-18"
READINGS = list(product(Counts, Overage))
DAILY = datetime(2025, 4, 19, 18, tzinfo=UTC)
ROLLING = datetime(2025, 2, 27, 6, tzinfo=UTC)
SWITCH = datetime(2025, 3, 4, 20, tzinfo=UTC)

# What a million lines may take beyond a hundred thousand. Both have moved ids to a file and hold as many in memory, so
# what differs is what the allocator and SQLite's page cache did not give back: less than one mebibyte was seen, and
# more may be on another system. Ids kept in memory would take over 500.
MEMORY_BYTES_MAX = 16 << 20

requests = st.fixed_dictionaries(
    {
        "id": st.integers(0, 40).map("r{}".format),
        "account": st.sampled_from(["default", "default", "acme", "caf\u00e9"]),
        "model": st.sampled_from([LARGE, LARGE, LARGE, SMALL, "gpt-4.1-2025-04-14", "unknown", ""]),
        "minutes": st.integers(0, 60 * 50),
        "input_tokens": st.one_of(
            st.integers(0, 20),
            st.integers(0, 600_000),
            st.sampled_from([None, 250_000, 250_001, 1_000_000, 10_000_000, 10**12]),
        ),
        "output_tokens": st.sampled_from([0, 0, 0, None]),
        "project": st.sampled_from([None, "p", "q"]),
        "kind": st.sampled_from(["completion", "completion", "completion", "embedding", "assistants", "eval"]),
        "tools": st.sampled_from([(), (), (), ("function",), ("web_search",)]),
    }
)
logs = st.lists(requests, max_size=40)


def request_at(start: datetime, minutes: int, **fields: Any) -> Request:
    """A drawn request, so many minutes after the start of its log."""
    return Request(**fields, at=start + timedelta(minutes=minutes))


def kept(log: Sequence[Request], offer: Offer, assume: Enrollment | None) -> tuple[list[Any], list[int]]:
    """The lines that a meter over memory gives without bounds, and the numbers of those that are bad."""
    meter, lines, bad = Meter(MemoryStore(bounds=None), offer, assume=assume), [], []
    for number, request in enumerate(log, 1):
        try:
            lines.append(decision_line(meter.decide(request)))
        except RequestError:
            bad.append(number)
    return lines, bad


@settings(max_examples=150)
@given(
    drawn=logs,
    start=st.sampled_from([DAILY, ROLLING, SWITCH]),
    reading=st.sampled_from(READINGS),
    tier=st.integers(0, 5),
    held_max=st.sampled_from([2, 50_000]),
)
def test_it_equals_a_meter_that_keeps_everything_line_by_line(
    drawn: list[dict[str, Any]], start: datetime, reading: tuple[Counts, Overage], tier: int, held_max: int
) -> None:
    """Each reading, tier and kind of window, repeats and conflicts included: the same lines, the same bad ones."""
    log = [request_at(start, **fields) for fields in drawn]
    counts, overage = reading
    lines, bad = kept(log, OFFER.reading(counts=counts, overage=overage), Enrollment(tier=tier, sharing="enabled"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seen.Seen.__init__, "__kwdefaults__", {"held_max": held_max})
        patch.setattr(seen, "FILTER_BITS", 1 << 16)
        patch.setattr(seen, "FILTER_MASK", (1 << 16) - 1)
        options = ("--counts", counts, "--overage", overage, "--tier", str(tier))
        answer = gratis("replay", *options, stdin=sent(map(request_line, log)))
    assert answer.lines == lines
    assert [int(each.split("line ")[1].split(":")[0]) for each in answer.err.splitlines()] == bad
    assert answer.code == (2 if bad else 0)


@pytest.mark.parametrize(
    "name", ["gemini-free", "cloudflare-workers-ai", "openrouter-free", "groq-free", "openai-evals"]
)
def test_it_judges_under_any_offer(name: str) -> None:
    """Requests, runs, other zones and cached input are judged as the offer says, as a meter does."""
    offer = load(name)
    revision = offer.revisions[-1]
    models = sorted({model for group in revision.groups for model in group.models or ["any"]})
    log = [
        Request(
            id=f"r{number}",
            model=models[number % len(models)],
            at=revision.starts + timedelta(hours=number % 60),
            input_tokens=number * 997 % 60_000,
            output_tokens=number % 5,
            cached_tokens=number * 997 % 60_000 // 2,
            kind=("completion", "eval")[number % 2],
        )
        for number in range(300)
    ]
    lines, bad = kept(log, offer, Enrollment(tier=1, sharing="enabled"))
    answer = gratis("replay", "--offer", name, "--tier", "1", stdin=sent(map(request_line, log)))
    assert (answer.lines, bad, answer.code) == (lines, [], 0)
    assert {line["verdict"] for line in lines} >= {"free"}


def test_without_a_reading_the_offers_own_counts() -> None:
    """`--counts` and `--overage` replace what the offer says; left out, the offer's own stands."""
    log = sent(
        {"id": f"r{number}", "model": LARGE, "at": "2025-04-20T12:00:00Z", "input_tokens": tokens, "output_tokens": 0}
        for number, tokens in enumerate((900_000, 200_000, 50_000))
    )
    answers = {
        (counts, overage): [
            (line["verdict"], line["free_tokens"], line["used"])
            for line in gratis(
                "replay",
                "--tier",
                "3",
                *(("--counts", counts) if counts else ()),
                *(("--overage", overage) if overage else ()),
                stdin=log,
            ).lines
        ]
        for counts in ("", "free", "all")
        for overage in ("", "whole", "excess")
    }
    first = ("free", 900_000, 900_000)
    whole = [first, ("billed", 0, 900_000), ("free", 50_000, 950_000)]
    all_whole = [first, ("billed", 0, 1_100_000), ("billed", 0, 1_150_000)]
    excess = [first, ("billed", 100_000, 1_000_000), ("billed", 0, 1_000_000)]
    assert answers == {
        **dict.fromkeys([("", ""), ("free", ""), ("", "whole"), ("free", "whole")], whole),
        **dict.fromkeys([("", "excess"), ("free", "excess")], excess),
        **dict.fromkeys([("all", ""), ("all", "whole")], all_whole),
        ("all", "excess"): [first, ("billed", 100_000, 1_100_000), ("billed", 0, 1_150_000)],
    }


def test_repeats_and_conflicts_are_told_however_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """An id that comes again has its first decision, or its conflict, also when memory no longer holds it."""
    monkeypatch.setattr(seen.Seen.__init__, "__kwdefaults__", {"held_max": 10})
    log = [
        {"id": f"r{number}", "model": LARGE, "at": "2025-04-20T12:00:00Z", "input_tokens": 1, "output_tokens": 0}
        for number in range(100)
    ]
    changed = [{**each, "input_tokens": 2} for each in log]
    answer = gratis("replay", "--tier", "3", stdin=sent([*log, *log, *changed]))
    first = answer.lines[:100]
    assert answer.lines[100:] == [{**line, "replayed": True} for line in first]
    assert answer.err.splitlines() == [
        f"gratis: standard input: line {201 + number}: input_tokens: request 'r{number}' of account 'default' was"
        " decided before with input_tokens 1: free; that decision stands"
        for number in range(100)
    ]


def test_late_lines_are_judged_in_their_own_window() -> None:
    """Old data has no bounds: a line that comes years late is judged in its own day, in the order of the log."""
    days = ["2026-01-01", "2025-12-31", "2025-10-01", "2025-12-31", "2026-01-01"]
    log = [
        {"id": f"r{number}", "model": LARGE, "at": f"{day}T12:00:00Z", "input_tokens": 600_000, "output_tokens": 0}
        for number, day in enumerate(days)
    ]
    answer = gratis("replay", "--tier", "3", stdin=sent(log))
    assert [(line["window_start"][:10], line["seq"], line["verdict"]) for line in answer.lines] == [
        ("2026-01-01", 1, "free"),
        ("2025-12-31", 1, "free"),
        ("2025-10-01", 1, "free"),
        ("2025-12-31", 2, "billed"),
        ("2026-01-01", 2, "billed"),
    ]


def test_lines_older_than_the_open_rolling_window_are_judged_in_it() -> None:
    """The article's example: free at 07:00, refreshed at the next free request; what comes late meets what is open."""
    times = ["01-01T07:00", "01-02T06:59", "01-02T08:00", "01-01T23:00", "01-03T07:59", "01-03T08:00"]
    log = [
        {"id": f"r{number}", "model": LARGE, "at": f"2025-{time}:00Z", "input_tokens": 1, "output_tokens": 0}
        for number, time in enumerate(times)
    ]
    answer = gratis("replay", "--tier", "3", stdin=sent(log))
    assert [(line["window_start"], line["window_end"], line["seq"]) for line in answer.lines] == [
        ("2025-01-01T07:00:00Z", "2025-01-02T07:00:00Z", 1),
        ("2025-01-01T07:00:00Z", "2025-01-02T07:00:00Z", 2),
        ("2025-01-02T08:00:00Z", "2025-01-03T08:00:00Z", 1),
        ("2025-01-02T08:00:00Z", "2025-01-03T08:00:00Z", 2),
        ("2025-01-02T08:00:00Z", "2025-01-03T08:00:00Z", 3),
        ("2025-01-03T08:00:00Z", "2025-01-04T08:00:00Z", 1),
    ]


def test_the_first_decision_is_what_a_conflict_carries() -> None:
    """The library's replay raises the same conflict as a meter, with the same first decision."""
    assume = Enrollment(tier=3, sharing="enabled")
    first = Request(id="r", model=LARGE, at=DAILY, input_tokens=5, output_tokens=0)
    other = Request(id="r", model=SMALL, at=DAILY, input_tokens=5, output_tokens=0)
    judge, meter = Replay(OFFER, assume=assume), Meter(MemoryStore(bounds=None), OFFER, assume=assume)
    one, conflict = judge.decide_many([first, other])
    two, expected = meter.decide_many([first, other])
    assert isinstance(one, Decision)
    assert one == two
    assert isinstance(conflict, Conflict)
    assert isinstance(expected, Conflict)
    assert (conflict.first, conflict.field, str(conflict)) == (expected.first, "model", str(expected))
    judge.close()


# --- The enrollment in force at the request's time ------------------------------------------------


def change(
    version: int, at: str, account: str = "default", offer: str = OFFER.name, **enrollment: Any
) -> dict[str, Any]:
    """A line as `gratis enroll --history` prints it."""
    return {
        "offer": offer,
        "account": account,
        "version": version,
        "at": at,
        "actor": "ann",
        "enrollment": {"tier": 3, "sharing": "enabled", **enrollment},
    }


def test_a_history_of_enrollments_counts_by_the_requests_own_time(tmp_path: Path) -> None:
    """Each request is judged by the last change acknowledged before it was made, wherever it stands in the log."""
    history = tmp_path / "history.jsonl"
    history.write_bytes(
        sent(
            [
                change(2, "2025-04-20T10:00:00Z", tier=1),
                change(1, "2025-04-18T00:00:00Z"),
                change(3, "2025-04-21T00:00:00Z", sharing="disabled"),
                change(1, "2025-04-01T00:00:00Z", account="acme", sharing="selected", projects=["p"]),
                change(9, "2025-04-20T11:00:00Z", offer="openai-evals", tier=0),
            ]
        )
    )
    times = ["20T09:59:59.999999", "20T10:00:00", "17T23:59:59.999999", "18T00:00:00", "21T00:00:00", "20T12:00:00"]
    log = [
        {"id": f"r{number}", "model": LARGE, "at": f"2025-04-{time}Z", "input_tokens": 1, "output_tokens": 0}
        for number, time in enumerate(times)
    ]
    log += [{**log[0], "id": "p", "account": "acme", "project": "p"}, {**log[0], "id": "q", "account": "acme"}]
    log += [{**log[0], "id": "other", "account": "other"}]
    answer = gratis("replay", "--enrollments", history, stdin=sent(log))
    assert [(line["reason"], line["allowance"]) for line in answer.lines] == [
        ("within_allowance", 1_000_000),
        ("within_allowance", 250_000),
        ("not_enrolled", None),
        ("within_allowance", 1_000_000),
        ("sharing_disabled", None),
        ("within_allowance", 250_000),
        ("within_allowance", 1_000_000),
        ("project_not_shared", None),
        ("not_enrolled", None),
    ]
    assumed = gratis("replay", "--enrollments", history, "--tier", "2", stdin=sent(log))
    assert assumed.lines[:-1] == answer.lines[:-1]
    assert (assumed.lines[-1]["reason"], assumed.lines[-1]["allowance"]) == ("within_allowance", 250_000)


def test_a_store_is_replayed_by_its_own_history(tmp_path: Path) -> None:
    """What `enroll --history` prints `replay --enrollments` reads: the replay of a store's log equals its ledger."""
    url, history = f"sqlite:///{tmp_path}/gratis.db?synchronous=off", tmp_path / "history.jsonl"
    start, log = datetime(2025, 4, 20, 8, tzinfo=UTC), []
    now = [start]
    with Meter.open(url, offer=OFFER, clock=lambda: now[0]) as meter:
        for number, state in enumerate([{"tier": 3}, {"tier": 1}, {"tier": 5}, {"tier": 5, "sharing": "disabled"}]):
            now[0] = start + timedelta(hours=number)
            meter.enroll("default", Enrollment(**{"sharing": "enabled", **state}), actor="ann")
            log += [
                Request(id=f"r{number}{each}", model=LARGE, at=now[0], input_tokens=140_000, output_tokens=0)
                for each in range(3)
            ]
            meter.decide_many(log[-3:])
        expected = [decision_line(entry.decision) for entry in meter.ledger()]
    history.write_text(gratis("enroll", "--store", url, "--history").out, encoding="utf-8")
    answer = gratis("replay", "--enrollments", history, stdin=sent(map(request_line, log)))
    assert answer.lines == expected


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"nonsense", "line: not JSON"),
        (b"[]", "found list; expected a JSON object"),
        (b"{}", "version: missing; expected a line as `gratis enroll` prints it"),
        (sent([change(1, "noon")]), "at: found 'noon'; expected RFC 3339"),
        (sent([change(1, "2025-04-20T10:00:00Z", tier=9)]), "tier: found 9; expected a whole number from 0 to 5"),
        (sent([change(1, "2025-04-20T10:00:00Z", colour="red")]), "colour: an unknown field; expected tier, sharing"),
        (sent([{**change(1, "2025-04-20T10:00:00Z"), "enrollment": []}]), ""),
        (sent([{**change(1, "2025-04-20T10:00:00Z"), "enrollment": None}]), ""),
        (sent([{**change(1, "2025-04-20T10:00:00Z"), "version": "x"}]), ""),
        (sent([{**change(1, "2025-04-20T10:00:00Z"), "account": ["x"]}]), ""),
        (sent([change(1, "2025-04-20T10:00:00Z", **{"\x1b[31m": 1})]), ""),
    ],
)
def test_a_history_that_cannot_be_read_is_bad_input(tmp_path: Path, line: bytes, why: str) -> None:
    """A history is taken whole or not at all; the message names file and line, and cannot steer a terminal."""
    history = tmp_path / "history.jsonl"
    history.write_bytes(
        sent([change(1, "2025-04-18T00:00:00Z")]) + line + b"\n" + sent([change(2, "2025-04-19T00:00:00Z")])
    )
    answer = gratis("replay", "--enrollments", history, stdin=b"")
    assert answer.err.startswith(f"gratis: {history}: line 2: {why}")
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert answer.err.rstrip("\n").isprintable()


# --- Memory ---------------------------------------------------------------------------------------

# Started by a small process, because the peak that the system tells of a child begins at what its parent had.
PEAK = """
import resource, subprocess, sys
lines = '''
import sys
for thousand in range(int(sys.argv[1]) // 1000):
    minute, second = divmod(thousand * 7, 60)
    hour, minute = divmod(minute, 60)
    rest = '"model":"gpt-4o-2024-08-06","output_tokens":7,"at":"2025-04-%02dT%02d:%02d:%02dZ"}\\\\n' % (
        17 + hour // 24, hour % 24, minute, second)
    sys.stdout.write("".join(
        '{"id":"request-%06d%03d","account":"a%d","input_tokens":%d,%s' % (thousand, number, number % 10, number, rest)
        for number in range(1000)
    ))
'''
source = subprocess.Popen([sys.executable, "-c", lines, sys.argv[1]], stdout=subprocess.PIPE)
program = subprocess.run([sys.executable, "-m", "gratis", "replay", "--tier", "3"], stdin=source.stdout, check=True)
source.stdout.close()
source.wait()
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
"""


def peak_of(lines: int) -> int:
    """The most memory, in bytes, that a replay of so many lines takes; each line is answered."""
    command = [sys.executable, "-c", PEAK, str(lines)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        answered, last = 0, b""
        while piece := program.stdout.read(1 << 20):
            answered += piece.count(b"\n")
            last = (last + piece)[-1_000:]
        peak = int(program.stderr.read())
    assert program.returncode == 0
    assert answered == lines
    assert json.loads(last.splitlines()[-1])["id"] == f"request-{lines - 1:09}"
    return peak if sys.platform == "darwin" else peak * 1024


def test_a_million_lines_take_no_more_memory_than_a_hundred_thousand() -> None:
    """Memory does not grow with the log."""
    small, large = peak_of(100_000), peak_of(1_000_000)
    assert large - small <= MEMORY_BYTES_MAX
