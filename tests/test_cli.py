"""The command line: the contract that scripts rely on, and what people see on a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import sqlite3
import subprocess
import sys
import termios
import threading
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import given, settings, strategies as st

from gratis import Enrollment, Meter, Request
from gratis.cli import main
from gratis.cli.streams import Progress
from gratis.lines import LINE_BYTES_MAX
from gratis.offers import load, shipped
from gratis.stores.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

LARGE = "gpt-4o-2024-08-06"
SMALL = "gpt-4o-mini-2024-07-18"
AT = "2025-04-20T12:00:00Z"
NOON = datetime(2025, 4, 20, 12, tzinfo=UTC)
PATIENCE_S = 60  # a program that does not answer at all fails its test instead of holding it up
BOLD, GREEN, RED = "1", "32", "31"
COMMANDS = (
    *("demo", "decide", "replay", "standing", "explain", "hold", "settle", "release", "holds", "correct", "enroll"),
    *("offers", "ledger", "audit", "readings", "reconcile"),
)
PARTS = ("list", "show", "check", "diff")
FIELDS = [
    "id",
    "account",
    "verdict",
    "reason",
    "group",
    "tokens",
    "free_tokens",
    "billed_tokens",
    "allowance",
    "total",
    "used",
    "remaining",
    "window_start",
    "window_end",
    "seq",
    "offer",
    "revision",
    "at",
    "replayed",
]
ARTICLE = """
Time (UTC) | Tokens in request | Running total | Free or billed?
09:15 | 120 k | 120 k | Free
12:40 | 140 k | 260 k | Free
14:30 | 150 k | 410 k | Free
16:00 | 150 k | 560 k | Free
18:05 | 150 k | 710 k | Free
20:20 | 150 k | 860 k | Free
22:15 | 115 k | 975 k | Free
23:10 | 30 k | 1 005 k | Billed (entire 30k)
"""
# An offer of our own, open-ended, so that a test that asks "now?" means the same in any year.
OWN_OFFER = """
name = "own"
title = "An offer of our own"
account = "organization"
[[revisions]]
from = 2020-01-01
source = "this test"
window = { kind = "calendar", span = "day", zone = "UTC" }
counts = "free"
overage = "whole"
reasons = ["not_enrolled", "account_not_eligible", "sharing_disabled", "project_not_shared", "model_not_listed",
  "tool_use", "unmeasured"]
client_side_tools = ["function"]
excluded_plans = ["enterprise"]
zero_data_retention = "excluded"
[revisions.groups.G]
unit = "tokens"
allowance = { "1-2" = 250, "3-5" = 1_000 }
models = ["m"]
"""


class Answer(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Standard output as the JSON lines that it must be."""
        return [json.loads(line) for line in self.out.splitlines()]


def gratis(*arguments: str | Path, stdin: bytes = b"") -> Answer:
    """Run a command in this process, as if in a pipe."""
    out, err = io.BytesIO(), io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        patch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="utf-8", newline=""))
        patch.setattr(sys, "stderr", io.TextIOWrapper(err, encoding="utf-8", newline=""))
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        for file in (sys.stdout, sys.stderr):
            file.flush()
        return Answer(code, out.getvalue().decode(), err.getvalue().decode())


def line(number: object, tokens: Any = 10, **fields: Any) -> dict[str, Any]:
    """A request as a script would send it."""
    return {"id": f"r{number}", "model": LARGE, "input_tokens": tokens, "output_tokens": 0, "at": AT, **fields}


def sent(lines: Iterable[Any]) -> bytes:
    """Requests as the bytes of JSON lines."""
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


def replay(stdin: bytes, *arguments: str | Path) -> Answer:
    """`gratis replay` at tier 3."""
    return gratis("replay", "--tier", "3", *arguments, stdin=stdin)


@pytest.fixture
def store(tmp_path: Path) -> str:
    """The URL of a SQLite store that is not there yet."""
    return f"sqlite:///{tmp_path}/gratis.db?synchronous=off"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """An offer of our own in a file."""
    path = tmp_path / "own.toml"
    path.write_text(OWN_OFFER, encoding="utf-8")
    return path


# --- The contract of `decide` and `replay` --------------------------------------------------------


def test_a_decision_line_has_the_fields_of_the_contract_in_their_order(store: str) -> None:
    """Both commands print every field, in one order, and null where one does not apply."""
    requests = sent(
        [line(1), line(2, model="unknown"), line(3, None), line(4, 2_000_000), line(5, at="2020-01-01T00:00:00Z")]
    )
    replayed = replay(requests)
    decided = gratis("decide", "--no-bounds", "--tier", "3", "--store", store, stdin=requests)
    assert [list(each) for each in replayed.lines] == [FIELDS] * 5
    assert decided == replayed
    free, unknown, unmeasured, over, before = replayed.lines
    assert free == {
        "id": "r1",
        "account": "default",
        "verdict": "free",
        "reason": "within_allowance",
        "group": "1M",
        "tokens": 10,
        "free_tokens": 10,
        "billed_tokens": 0,
        "allowance": 1_000_000,
        "total": 10,
        "used": 10,
        "remaining": 999_990,
        "window_start": "2025-04-20T00:00:00Z",
        "window_end": "2025-04-21T00:00:00Z",
        "seq": 1,
        "offer": "openai-data-sharing",
        "revision": "2025-04-16",
        "at": AT,
        "replayed": False,
    }
    nothing = dict.fromkeys(
        ("group", "allowance", "total", "used", "remaining", "window_start", "window_end", "seq"), None
    )
    excluded = {**free, **nothing, "verdict": "billed", "free_tokens": 0}
    assert unknown == {**excluded, "id": "r2", "reason": "model_not_listed", "billed_tokens": 10}
    assert unmeasured == {**excluded, "id": "r3", "reason": "unmeasured", "tokens": None, "billed_tokens": None}
    assert over == {
        **free,
        "id": "r4",
        "verdict": "billed",
        "reason": "over_allowance",
        "tokens": 2_000_000,
        "free_tokens": 0,
        "billed_tokens": 2_000_000,
        "total": 2_000_010,
        "seq": 2,
    }
    assert before == {
        **excluded,
        "id": "r5",
        "reason": "offer_not_in_force",
        "billed_tokens": 10,
        "revision": None,
        "at": "2020-01-01T00:00:00Z",
    }


def test_a_repeat_is_marked_and_its_line_is_else_the_same(store: str) -> None:
    """The same request asked again, later and in another process or not, has the same line, but for `replayed`."""
    command = ("decide", "--no-bounds", "--tier", "3", "--store", store)
    first = gratis(*command, stdin=sent([line(1), line(2)]))
    again = gratis(*command, stdin=sent([line(2), line(1), line(2)]))
    marked = [{**each, "replayed": True} for each in first.lines]
    assert again.lines == [marked[1], marked[0], marked[1]]
    assert (first.code, again.code) == (0, 0)


def test_lines_come_in_input_order() -> None:
    """Whatever is decided of each request, answers come in the order of the requests."""
    requests = [line(number, model=(LARGE, SMALL, "?")[number % 3], account=f"a{number % 7}") for number in range(3000)]
    answer = replay(sent(requests))
    assert [each["id"] for each in answer.lines] == [each["id"] for each in requests]


def test_a_bad_line_goes_to_stderr_with_its_number_and_why_and_the_others_are_decided() -> None:
    """Good lines are decided around bad ones, and the exit code is 2."""
    stdin = sent([line(1)]) + b"nonsense\n" + sent([line(2, -1), line(3), {"id": "r4"}])
    answer = replay(stdin)
    assert [each["id"] for each in answer.lines] == ["r1", "r3"]
    assert answer.err.splitlines() == [
        "gratis: standard input: line 2: line: not JSON: JSON is malformed: invalid character (byte 4)",
        "gratis: standard input: line 3: input_tokens: found -1; expected a whole number from 0 to 1000000000000",
        "gratis: standard input: line 5: model: missing; expected in every request: id, model, at",
    ]
    assert answer.code == 2


def test_a_conflict_is_a_bad_line_that_names_the_field_and_the_first_decision(store: str) -> None:
    """An id asked again with other tokens is reported, and the first decision stands."""
    for command in (("replay",), ("decide", "--no-bounds", "--store", store)):
        answer = gratis(*command, "--tier", "3", stdin=sent([line(1, 10), line(1, 11), line(1, 10)]))
        assert answer.err == (
            "gratis: standard input: line 2: input_tokens: request 'r1' of account 'default' was decided before"
            " with input_tokens 10: free; that decision stands\n"
        )
        assert [each["replayed"] for each in answer.lines] == [False, True]
        assert answer.code == 2


def test_a_request_ahead_of_the_clock_is_a_bad_line_and_nothing_is_written(store: str) -> None:
    """More than five minutes ahead is refused as an error: no decision, and not even its account is kept."""
    answer = gratis("decide", "--tier", "3", "--store", store, stdin=sent([line(1, at="8999-12-31T00:00:00Z")]))
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(
        "gratis: standard input: line 1: at: found 8999-12-31T00:00:00Z, ahead of the store's clock"
    )
    assert gratis("ledger", "--store", store).out == ""
    assert gratis("standing", "--store", store).out == ""


def test_old_requests_are_too_late_unless_bounds_are_off(store: str) -> None:
    """`decide` keeps to the bounds of the store; `--no-bounds` judges old data as it was."""
    bound = gratis("decide", "--tier", "3", "--store", store, stdin=sent([line(1)]))
    free = gratis("decide", "--tier", "3", "--store", store, "--no-bounds", stdin=sent([line(2)]))
    assert [bound.lines[0]["reason"], free.lines[0]["reason"]] == ["too_late", "within_allowance"]


@pytest.mark.parametrize(
    ("sharing", "project", "reason"),
    [
        ((), None, "within_allowance"),
        (("--sharing", "enabled"), "p", "within_allowance"),
        (("--sharing", "disabled"), "p", "sharing_disabled"),
        (("--sharing", "selected", "--shared-project", "p"), "p", "within_allowance"),
        (("--shared-project", "q", "--shared-project", "p"), "p", "within_allowance"),
        (("--shared-project", "q"), "p", "project_not_shared"),
        (("--shared-project", "q"), None, "project_not_shared"),
    ],
)
def test_tier_and_sharing_say_how_an_account_that_is_not_enrolled_is_taken(
    store: str, sharing: tuple[str, ...], project: str | None, reason: str
) -> None:
    """`--tier N` stands for an enrollment that shares everything, unless `--sharing` says otherwise."""
    stdin = sent([line(1, project=project)])
    decided = gratis("decide", "--no-bounds", "--store", store, "--tier", "3", *sharing, stdin=stdin)
    assert [each["reason"] for each in decided.lines] == [reason]
    assert replay(stdin, *sharing).out == decided.out


def test_tier_is_not_taken_for_an_account_that_is_enrolled(store: str) -> None:
    """What an account enrolled with counts, whatever `--tier` says; others are taken as it says."""
    gratis("enroll", "--store", store, "--account", "enrolled", "--tier", "1", "--sharing", "enabled", "--by", "ann")
    gratis("enroll", "--store", store, "--account", "off", "--tier", "5", "--by", "ann")
    stdin = sent(line(account, account=account) for account in ("enrolled", "off", "other"))
    answer = gratis("decide", "--no-bounds", "--store", store, "--tier", "3", stdin=stdin)
    assert [each["allowance"] for each in answer.lines] == [250_000, None, 1_000_000]
    assert [each["reason"] for each in answer.lines] == ["within_allowance", "sharing_disabled", "within_allowance"]
    without = gratis("decide", "--no-bounds", "--store", store, stdin=sent([line("new", account="new")]))
    assert [each["reason"] for each in without.lines] == ["not_enrolled"]


def test_defaults_of_a_request(store: str) -> None:
    """Account, project, kind and tools may be absent or null: `default`, none, `completion` and none."""
    bare = {"id": "r1", "model": LARGE, "at": AT, "input_tokens": 1, "output_tokens": 2}
    full = {**bare, "account": "default", "project": None, "kind": "completion", "tools": [], "cached_tokens": 0}
    null = {**bare, "account": None, "project": None, "kind": None, "tools": None, "cached_tokens": None}
    answer = replay(sent([bare, full, null]))
    assert [each["replayed"] for each in answer.lines] == [False, True, True]
    assert {each["tokens"] for each in answer.lines} == {3}


def test_an_unknown_field_is_left_alone_and_a_misspelled_one_is_refused() -> None:
    """What is not ours may stand in a line; what is ours but for its spelling would be missed, so it is an error."""
    answer = replay(sent([line(1, latency_ms=3), line(2, inputTokens=5), line(3, input_token=5), line(4, Project="p")]))
    assert [each["id"] for each in answer.lines] == ["r1"]
    assert [each.split(": ")[3] for each in answer.err.splitlines()] == ["inputTokens", "input_token", "Project"]


# --- Hostile input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "why"),
    [
        (b"5.0", "input_tokens: found 5.0; expected a whole number"),
        (b"true", "input_tokens: found True; expected a whole number"),
        (b'"5"', "input_tokens: found '5'; expected a whole number"),
        (b"-1", "input_tokens: found -1; expected a whole number"),
        (b"NaN", "line: not JSON"),
        (b"Infinity", "line: not JSON"),
        (b"1e3", "input_tokens: found 1000.0; expected a whole number"),
        (b"1e400", "line: not JSON"),
        (b"1000000000001", "input_tokens: found 1000000000001; expected a whole number"),
        (b"9007199254740993", "input_tokens: found 9007199254740993; expected a whole number"),
        (b"9223372036854775808", "input_tokens: found 9223372036854775808; expected a whole number"),
        (b"1" + b"0" * 30, "input_tokens: found 1000000000000000000000000000000; expected a whole number"),
        (b"9" * 5000, "line: not JSON"),
        (b"[]", "input_tokens: found []; expected a whole number"),
        (b"{}", "input_tokens: found {}; expected a whole number"),
        (b"007", "line: not JSON"),
        (b"", "line: not JSON"),
    ],
)
def test_tokens_that_are_no_number_of_ours_are_refused(tokens: bytes, why: str) -> None:
    """Only whole numbers from 0 to 10^12 count tokens; the reason names the field and what was found."""
    answer = replay(sent([line(1)]).replace(b"10,", tokens + b","))
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(f"gratis: standard input: line 1: {why}")
    assert len(answer.err) < 200


@pytest.mark.parametrize("tokens", [0, 1, 10**12])
def test_tokens_at_the_edges_are_taken(tokens: int) -> None:
    """Zero, one and 10^12 are numbers of tokens."""
    answer = replay(sent([line(1, tokens)]))
    assert (answer.code, answer.lines[0]["tokens"]) == (0, tokens)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (b"[1]", "line: found list; expected a JSON object"),
        (b"null", "line: found NoneType; expected a JSON object"),
        (b"{}", "id: missing"),
        (b"{", "line: not JSON"),
        (b"\0", "line: not JSON"),
        (b'{"id":"\xff","model":"m","at":"2025-04-20T12:00:00Z"}', "line: not JSON"),
        (b'{"id":"a\0b","model":"m","at":"2025-04-20T12:00:00Z"}', "line: not JSON"),
        (b'{"id":"a\\u0000b","model":"m","at":"2025-04-20T12:00:00Z"}', "id: found 'a\\x00b'"),
        (b'{"id":"a\\u001b[2Jb","model":"m","at":"2025-04-20T12:00:00Z"}', "id: found 'a\\x1b[2Jb'"),
        (b'{"id":"a\\ud800b","model":"m","at":"2025-04-20T12:00:00Z"}', "line: not JSON"),
        (b'{"id":"","model":"m","at":"2025-04-20T12:00:00Z"}', "id: found 0 bytes; expected 1 to 255"),
        (
            b'{"id":"' + b"x" * 256 + b'","model":"m","at":"2025-04-20T12:00:00Z"}',
            "id: found 256 bytes; expected 1 to 255",
        ),
        (b'{"id":1,"model":"m","at":"2025-04-20T12:00:00Z"}', "id: found 1; expected a string"),
        (b'{"id":"r","model":7,"at":"2025-04-20T12:00:00Z"}', "model: found 7; expected a string"),
        (b'{"id":"r","model":"m","at":"2025-04-20T12:00:00"}', "at: found '2025-04-20T12:00:00'; expected RFC 3339"),
        (
            b'{"id":"r","model":"m","at":"2025-02-30T12:00:00Z"}',
            "at: found '2025-02-30T12:00:00Z'; expected ",
        ),
        (b'{"id":"r","model":"m","at":1745150400}', "at: found 1745150400; expected RFC 3339"),
        (
            b'{"id":"r","model":"m","at":"2025-04-20T12:00:00Z","kind":"chat"}',
            "kind: found 'chat'; expected one of completion",
        ),
        (b'{"id":"r","model":"m","at":"2025-04-20T12:00:00Z","tools":"x"}', "tools: found 'x'; expected a list"),
        (b"[" * 100_000, "line: not JSON"),
        (b'{"id":' * 100_000, "line: not JSON"),
    ],
)
def test_a_bad_line_of_any_sort_is_reported_and_the_next_one_is_decided(bad: bytes, why: str) -> None:
    """No line stops the others, and each reason says what was found and expected."""
    answer = replay(bad + b"\n" + sent([line(1)]))
    assert [each["id"] for each in answer.lines] == ["r1"]
    assert answer.err.startswith(f"gratis: standard input: line 1: {why}")
    assert answer.err.count("\n") == 1
    assert answer.code == 2


@settings(max_examples=150)
@given(st.lists(st.one_of(st.binary(max_size=40), st.sampled_from([b"{", b"[", b'"', b"\\u", b"\xef\xbb\xbf", b"\r"]))))
def test_no_bytes_at_all_break_the_command(pieces: list[bytes]) -> None:
    """Whatever is sent, the line after it is decided, and each bad line is reported on one line."""
    noise = b"".join(pieces)
    answer = replay(noise + b"\n" + sent([line(1)]))
    assert [each["id"] for each in answer.lines] == ["r1"]
    bad = [each for each in noise.removeprefix(b"\xef\xbb\xbf").split(b"\n") if each.strip()]
    assert [each.split(": ")[1] for each in answer.err.splitlines()] == ["standard input"] * len(bad)


def test_line_ends_of_windows_a_byte_order_mark_and_blank_lines_are_read_over() -> None:
    """CRLF, a BOM, blank lines and a last line without an end change nothing; blank lines count as lines."""
    one, two = (json.dumps(line(number)).encode() for number in (1, 2))
    answer = replay(b"\xef\xbb\xbf" + one + b"\r\n\r\n  \n\t\r\n" + b"bad\r\n" + two)
    assert [each["id"] for each in answer.lines] == ["r1", "r2"]
    assert answer.err.startswith("gratis: standard input: line 5: ")
    assert answer.lines == replay(one + b"\n" + two + b"\n").lines


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_line_of_two_mebibytes_is_refused_and_the_next_one_is_decided(end: bytes) -> None:
    """A line beyond the bound is reported once, with its number, wherever it stands."""
    long = b'{"id":"' + b"x" * (2 << 20) + b'"}'
    answer = replay(sent([line(1)]) + long + b"\n" + sent([line(2)]) + long + end)
    assert [each["id"] for each in answer.lines] == ["r1", "r2"]
    assert answer.err.splitlines() == [
        f"gratis: standard input: line {number}: line: longer than {LINE_BYTES_MAX} bytes" for number in (2, 4)
    ]


def test_a_line_just_within_the_bound_is_decided() -> None:
    """A line of exactly the bound is read."""
    request = line(1, note="")
    padded = {**request, "note": "x" * (LINE_BYTES_MAX - len(json.dumps(request)))}
    assert len(json.dumps(padded)) == LINE_BYTES_MAX
    assert [each["id"] for each in replay(sent([padded])).lines] == ["r1"]


def test_a_file_and_a_dash_are_read_alike(tmp_path: Path) -> None:
    """FILE, `-` and nothing at all name the same lines; a bad line of a file is reported under its name."""
    path = tmp_path / "requests.jsonl"
    path.write_bytes(sent([line(1)]))
    answers = [replay(b"", path), replay(path.read_bytes(), "-"), replay(path.read_bytes())]
    assert answers == [answers[0]] * 3
    path.write_bytes(b"bad\n")
    assert replay(b"", path).err.startswith(f"gratis: {path}: line 1: ")


# --- Exit codes and bad use -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("replay",), "gratis: replay: expected --tier N, or --enrollments FILE"),
        (("replay", "--tier", "3", "nowhere.jsonl"), "gratis: nowhere.jsonl: No such file or directory"),
        (("replay", "--tier", "3", "/proc/self/fdinfo"), "gratis: /proc/self/fdinfo: expected .parquet files"),
        (("replay", "--tier", "3", "--offer", "nowhere"), "gratis: nowhere: offer: no such offer; expected a path"),
        (
            ("replay", "--sharing", "enabled", "--enrollments", "-"),
            "gratis: --sharing and --shared-project: expected with",
        ),
        (("decide", "--store", "nowhere"), "gratis: store 'nowhere': unknown kind ''; expected memory:"),
        (("decide", "--store", "sqlite:////nowhere/x.db"), "gratis: /nowhere/x.db: there is no folder '/nowhere'"),
        (("audit", "nowhere.jsonl"), "gratis: nowhere.jsonl: No such file or directory"),
        (("audit", "x.jsonl", "--store", "memory:"), "gratis: audit: memory: ends with its process; expected FILE"),
        (("audit", "x.jsonl", "--html", "."), "gratis: --html: found the folder '.'; expected the name of a file"),
        (("enroll", "--store", "memory:"), "gratis: tier: missing; expected --tier N"),
        (("explain", "--store", "memory:", "--model", "m", "--tokens", "-1"), "gratis: "),
        (("offers", "show", "nowhere"), "gratis: nowhere: offer: no such offer"),
        (("offers", "show", "openai-evals", "--at", "2020-01-01"), "gratis: openai-evals: not in force on 2020-01-01"),
        (("offers", "check", "nowhere.toml"), "gratis: nowhere.toml: offer: no such offer"),
    ],
)
def test_bad_use_is_told_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    """What cannot be done is said on one line of standard error, with exit code 2 and nothing on standard output."""
    answer = gratis(*arguments)
    assert answer.err.startswith(message)
    assert (answer.err.count("\n"), answer.out, answer.code) == (1, "", 2)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("decide", "--nonsense"),
        ("decide", "--tier", "6"),
        ("decide", "--tier", "x"),
        ("decide", "--sharing", "some"),
        ("replay", "--counts", "none"),
        ("replay", "--overage", "none"),
        ("explain",),
        ("standing", "--at", "noon"),
        ("offers", "diff", "openai-evals", "2025-13-01", "2026-01-01"),
        ("ledger", "--after", "-1"),
        ("ledger", "--every", "0"),
        ("ledger", "--out", "a", "--cursor", "b"),
    ],
)
def test_arguments_that_do_not_parse_are_bad_use(arguments: tuple[str, ...]) -> None:
    """Usage goes to standard error, and the exit code is 2."""
    answer = gratis(*arguments)
    assert answer.err.startswith("usage: gratis")
    assert (answer.out, answer.code) == ("", 2)


@pytest.mark.parametrize(
    "url", ["sqlite://[x", "sqlite:///a%00b.db", "sqlite:///nowhere/x.db", "", "redis://x?wait=0.1", "memory:x"]
)
def test_no_store_url_ends_in_a_traceback(url: str) -> None:
    """A URL that names no store is bad use, whatever is wrong with it."""
    answer = gratis("decide", "--store", url)
    assert answer.err.startswith("gratis: ")
    assert (answer.err.count("\n"), answer.code) == (1, 2)


def test_an_offer_with_a_name_too_long_for_a_file_is_no_offer() -> None:
    """A name that no file system takes names no offer, and that is said."""
    answer = gratis("replay", "--tier", "3", "--offer", "x" * 5000 + ".toml")
    assert (answer.code, answer.err[:9]) == (2, "gratis: x")


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS), *(("offers", part) for part in PARTS)])
def test_every_command_tells_how_it_is_used(command: tuple[str, ...]) -> None:
    """`--help` prints usage and every option with a word on it, and ends with 0."""
    answer = gratis(*command, "--help")
    assert answer.out.startswith(f"usage: {' '.join(('gratis', *command))} ")
    assert (answer.err, answer.code) == ("", 0)


def test_the_help_names_every_command_and_the_exit_codes() -> None:
    """Whoever asks `gratis --help` finds each command and what the exit codes mean."""
    answer = gratis("--help")
    named = re.findall(r"^    (\w+)  ", answer.out, flags=re.MULTILINE)
    assert sorted(named) == sorted(COMMANDS)
    assert "Exit codes: 0; 1 for findings" in " ".join(answer.out.split())


def test_the_help_of_the_demo_promises_nothing_else_than_it_does() -> None:
    """The demo stands on memory unless it is told a store: no variable of the environment changes that."""
    assert "GRATIS_STORE" in gratis("decide", "--help").out
    assert "GRATIS_STORE" not in gratis("demo", "--help").out


def test_the_program_tells_its_version() -> None:
    """`gratis --version` prints one line, from the installed program too."""
    assert re.fullmatch(r"gratis \d+\.\d+\.\d+\n", gratis("--version").out)


def test_the_store_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`GRATIS_STORE` names the store of every command that is not told one, and the default is a file here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRATIS_STORE", raising=False)
    gratis("decide", "--no-bounds", "--tier", "3", stdin=sent([line(1)]))
    assert (tmp_path / "gratis.db").exists()
    monkeypatch.setenv("GRATIS_STORE", "sqlite:///other.db")
    gratis("decide", "--no-bounds", "--tier", "3", stdin=sent([line(1), line(2)]))
    assert [len(gratis("ledger", "--store", f"sqlite:///{name}.db").lines) for name in ("gratis", "other")] == [1, 2]


# --- Streams: slow, broken, full ------------------------------------------------------------------


def start(*arguments: str | Path, environment: dict[str, str] | None = None, **streams: Any) -> subprocess.Popen[bytes]:
    """Start the program as a process of its own."""
    command = [sys.executable, "-m", "gratis", *map(str, arguments)]
    return subprocess.Popen(command, env={**os.environ, **(environment or {})}, **streams)


def read_line(file: Any) -> bytes:
    """The next line of an unbuffered pipe."""
    text = b""
    while not text.endswith(b"\n"):
        ready, _, _ = select.select([file], [], [], PATIENCE_S)
        assert ready == [file], f"no answer within {PATIENCE_S} s"
        piece = os.read(file.fileno(), 1 << 16)
        assert piece, "the program ended without an answer"
        text += piece
    return text


def test_each_line_is_answered_before_the_next_is_sent(store: str) -> None:
    """A slow sender is not kept waiting: good lines and bad ones are answered one by one, as they come."""
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
    for command in (("replay",), ("decide", "--no-bounds", "--store", store)):
        with start(*command, "--tier", "3", **pipe) as program:
            for number in range(5):
                program.stdin.write(sent([line(number)]))
                assert json.loads(read_line(program.stdout))["id"] == f"r{number}"
                program.stdin.write(b"bad\n")
                assert read_line(program.stderr).startswith(f"gratis: standard input: line {number * 2 + 2}: ".encode())
            program.stdin.close()
            assert program.stdout.read() == b""
        assert program.returncode == 2


def test_half_a_line_waits_for_its_other_half() -> None:
    """A line that comes in pieces is one line."""
    with start("replay", "--tier", "3", stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as program:
        whole = sent([line(1), line(2)])
        for byte in whole[:-1]:
            program.stdin.write(bytes([byte]))
        assert json.loads(read_line(program.stdout))["id"] == "r1"
        program.stdin.write(whole[-1:])
        assert json.loads(read_line(program.stdout))["id"] == "r2"
        program.stdin.close()


@pytest.mark.parametrize("command", [("replay",), ("decide", "--no-bounds", "--store", "memory:")])
def test_an_interrupt_ends_the_command_quietly(command: tuple[str, ...]) -> None:
    """Control-C while it waits for input is no error to tell: exit code 130, and what was decided was printed."""
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
    with start(*command, "--tier", "3", **pipe) as program:
        program.stdin.write(sent([line(1)]))
        assert json.loads(read_line(program.stdout))["id"] == "r1"
        program.send_signal(signal.SIGINT)
        assert (program.stdout.read(), program.stderr.read()) == (b"", b"")
    assert program.returncode == 130


def test_a_store_that_cannot_be_written_is_told_in_one_line(tmp_path: Path, store: str) -> None:
    """While another program holds the file nothing is decided, and nothing is said to be."""
    gratis("decide", "--no-bounds", "--tier", "3", "--store", store, stdin=sent([line(1)]))
    with closing(sqlite3.connect(tmp_path / "gratis.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        command = ("decide", "--no-bounds", "--tier", "3", "--store", f"{store}&wait=0")
        answer = gratis(*command, stdin=sent([line(2)]))
    assert answer.err.startswith(f"gratis: {tmp_path}/gratis.db: ")
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("command", [("replay", "--tier", "3"), ("ledger",), ("audit",)])
def test_a_reader_that_leaves_is_no_error(tmp_path: Path, store: str, command: tuple[str, ...]) -> None:
    """`| head -1` ends the command quietly."""
    requests = tmp_path / "requests.jsonl"
    requests.write_bytes(sent(line(number, 0) for number in range(5_000)))
    if command[0] != "replay":
        gratis("decide", "--no-bounds", "--tier", "3", "--store", store, requests)
        damage = {"entry": 0}
        ledger = gratis("ledger", "--store", store).lines
        requests.write_bytes(sent({**each, **damage} for each in ledger))
    arguments = (*command, "--store", store) if command == ("ledger",) else (*command, requests)
    with start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        json.loads(program.stdout.readline())
        program.stdout.close()
        assert program.stderr.read() == b""
    assert program.returncode == 0


def test_a_full_disk_is_told_in_one_line() -> None:
    """Where output cannot be written the command says so, and its exit code is not the one for findings."""
    with open("/dev/full", "wb") as full:  # noqa: PTH123 - a device
        program = start("replay", "--tier", "3", stdin=subprocess.PIPE, stdout=full, stderr=subprocess.PIPE)
        _, err = program.communicate(sent([line(1)]))
    assert (program.returncode, err) == (2, b"gratis: standard output: No space left on device\n")


def test_a_closed_standard_input_is_told_in_one_line() -> None:
    """Where there is no standard input at all the command says so."""
    code = "import os, sys; os.close(0); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    command = [sys.executable, "-c", code, "-m", "gratis", "replay", "--tier", "3"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1)


# --- In a pipe: JSON lines and nothing else -------------------------------------------------------


def test_every_command_prints_json_lines_in_a_pipe(tmp_path: Path, store: str, own: Path) -> None:
    """Each line on standard output is one JSON object, without color; progress and tables are for terminals."""
    requests = tmp_path / "requests.jsonl"
    requests.write_bytes(sent([line(1), line(2, model="\x1b[31mred")]))
    commands: list[tuple[str | Path, ...]] = [
        ("decide", "--no-bounds", "--tier", "3", "--store", store, requests),
        ("replay", "--tier", "3", requests),
        ("enroll", "--store", store, "--tier", "3", "--by", "ann"),
        ("enroll", "--store", store, "--history"),
        ("standing", "--store", store, "--at", AT),
        ("explain", "--store", store, "--model", LARGE),
        ("ledger", "--store", store),
        ("offers",),
        ("offers", "list"),
        ("offers", "show", own),
        ("offers", "diff", "openai-data-sharing", "2025-04-01", "2026-10-01"),
        ("offers", "check", own),
    ]
    for command in commands:
        answer = gratis(*command)
        assert answer.code == 0
        assert [type(json.loads(each)) for each in answer.out.splitlines()] == [dict] * answer.out.count("\n")
        assert "\x1b" not in answer.out
        assert answer.err == ""


# --- On a terminal --------------------------------------------------------------------------------


def on_terminal(*arguments: str | Path, stdin: bytes = b"", **environment: str) -> str:
    """What a terminal in Tokyo receives from a command of this process, its output and its errors."""
    ours, theirs = terminal()
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.extend(pieces(ours)))
    reader.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"TZ": "Asia/Tokyo", "NO_COLOR": "", **environment}.items():
            patch.setenv(name, value)
        time.tzset()
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with open(theirs, "w", encoding="utf-8", newline="") as screen:  # noqa: PTH123 - a descriptor
            patch.setattr(sys, "stdout", screen)
            patch.setattr(sys, "stderr", screen)
            main([str(argument) for argument in arguments])
    time.tzset()
    reader.join()
    os.close(ours)
    return b"".join(received).decode()


def terminal() -> tuple[int, int]:
    """Both ends of a terminal that passes line ends on as they were written: ours, and the program's."""
    ours, theirs = pty.openpty()
    modes = termios.tcgetattr(theirs)
    modes[1] &= ~termios.OPOST
    termios.tcsetattr(theirs, termios.TCSANOW, modes)
    return ours, theirs


def pieces(ours: int) -> Iterator[bytes]:
    """What a terminal receives until nobody writes to it any more."""
    while True:
        try:
            piece = os.read(ours, 1 << 16)
        except OSError:  # how Linux says that the other end is closed
            return
        if not piece:
            return
        yield piece


def plain(text: str) -> str:
    """The text without its colors."""
    return re.sub(r"\x1b\[\d+m", "", text)


@pytest.fixture
def used(store: str) -> str:
    """A store with 975,000 of 1,000,000 tokens used on 2025-04-20, and nothing of the small models."""
    requests = [line(1, 975_000), line(2, 25_001), line(3, model="unknown")]
    gratis("decide", "--no-bounds", "--tier", "3", "--store", store, stdin=sent(requests))
    return store


def test_a_terminal_shows_decisions_as_a_table_in_color() -> None:
    """One head, then one row a request: green for free, red for billed."""
    shown = on_terminal("replay", "--tier", "3", stdin=sent([line(1), line(2, 2_000_000)]))
    head, free, billed = shown.splitlines()
    assert plain(head).split() == ["at", "id", "account", "group", "tokens", "total", "remaining", "verdict", "reason"]
    assert plain(free).split() == [AT, "r1", "default", "1M", "10", "10", "999,990", "free", "within_allowance"]
    assert plain(billed).split() == [
        AT,
        "r2",
        "default",
        "1M",
        "2,000,000",
        "2,000,010",
        "999,990",
        "billed",
        "over_allowance",
    ]
    colors = [re.match(r"\x1b\[(\d+)m", row)[1] for row in (head, free, billed)]
    assert colors == [BOLD, GREEN, RED]


def test_standing_on_a_terminal_shows_bars_and_the_reset_in_utc_and_local_time(used: str) -> None:
    """What is left is a bar and a number, and the end of the window stands in both times."""
    shown = plain(on_terminal("standing", "--store", used, "--tier", "3", "--at", AT)).splitlines()
    assert shown[0] == "default under openai-data-sharing, revision of 2025-04-16"
    assert re.split(r"  +", shown[3].strip()) == [
        "1M",
        "975,000",
        "1,000,000",
        "▌" + "·" * 23,
        "25,000 tokens left",
        "2025-04-21 00:00 UTC, 2025-04-21 09:00 local",
    ]
    assert re.split(r"  +", shown[4].strip()) == [
        "10M",
        "0",
        "10,000,000",
        "█" * 24,
        "10,000,000 tokens left",
        "2025-04-21 00:00 UTC, 2025-04-21 09:00 local",
    ]


def test_explain_on_a_terminal_says_it_in_a_sentence(own: Path, store: str) -> None:
    """Free or billed, why, what still fits, and until when, in both times."""
    command = ("explain", "--store", store, "--offer", own, "--tier", "3", "--model", "m")
    free = plain(on_terminal(*command, "--tokens", "1000"))
    billed = plain(on_terminal(*command, "--tokens", "1001"))
    excluded = plain(on_terminal(*command[:-1], "unknown"))
    until = r"\d{4}-\d\d-\d\d 00:00 UTC, \d{4}-\d\d-\d\d 09:00 local\n"
    assert re.fullmatch(f"free: within_allowance; 1,000 tokens of group G still fit until {until}", free)
    assert re.fullmatch(f"billed: over_allowance; 1,000 tokens of group G still fit until {until}", billed)
    assert excluded == "billed: model_not_listed; no allowance covers this request; group G would take it\n"


def test_ledger_audit_offers_and_enrollments_are_tables_on_a_terminal(used: str, own: Path, tmp_path: Path) -> None:
    """Nothing that people look at is JSON."""
    gratis("enroll", "--store", used, "--tier", "3", "--by", "ann", "--account", "acme")
    ledger = gratis("ledger", "--store", used).lines
    ledger[1]["total"] += 1
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_bytes(sent(ledger))
    commands: list[tuple[tuple[str | Path, ...], str]] = [
        (("ledger", "--store", used), r"\s+entry  at"),
        (("audit", wrong), r"wrong_totals  entry 2 r2: total: found 1000002; expected 1000001\n"),
        (("offers",), r"name\s+revisions  from"),
        (("offers", "show", own), r"An offer of our own\n  offer"),
        (("offers", "diff", "openai-data-sharing", "2025-04-15", "2025-04-16"), r".*\n\+ model gpt-4.1-2025-04-14\n"),
        (("enroll", "--store", used, "--account", "acme", "--history"), r"version  at\s+by"),
    ]
    for command, pattern in commands:
        assert re.match(pattern, plain(on_terminal(*command))), command


def test_no_color_takes_the_colors_away_and_nothing_else(used: str) -> None:
    """With NO_COLOR a terminal receives the same table without an escape sequence."""
    command = ("standing", "--store", used, "--tier", "3", "--at", AT)
    colored, bare = on_terminal(*command), on_terminal(*command, NO_COLOR="1")
    assert "\x1b[" in colored
    assert plain(colored) == bare
    assert "\x1b" not in bare


def test_format_chooses_between_json_and_tables(used: str) -> None:
    """`--format json` gives a terminal JSON lines, and `--format table` gives a pipe a table without color."""
    command = ("standing", "--store", used, "--tier", "3", "--at", AT)
    assert on_terminal(*command, "--format", "json") == gratis(*command).out
    table = gratis(*command, "--format", "table").out
    assert table.startswith("default under openai-data-sharing")
    assert "\x1b" not in table


HOSTILE = "\x1b[2J\x07\x9b31m\r\x00\u202eevil\u2028"


def test_control_characters_of_a_request_never_reach_a_terminal(own: Path, store: str) -> None:
    """Ids, models, projects, accounts and tools cannot steer a terminal, whether they are decided or refused."""
    hidden = "a\u202eb\u2066c\u200fd"  # no control characters, so an id may hold them; they turn what follows around
    requests: list[Any] = [
        line(1, model=HOSTILE),
        line(2, account=hidden, project=hidden),
        line(3, id=hidden),
        line(4, id=hidden, input_tokens=11),
        *(
            line(field, **{field: HOSTILE})
            for field in ("id", "account", "project", "at", "kind", "tools", "input_tokens")
        ),
        line(5, tools=[HOSTILE]),
        {HOSTILE: 1},
        HOSTILE,
    ]
    decided = on_terminal("decide", "--no-bounds", "--tier", "3", "--store", store, stdin=sent(requests))
    shown = [
        decided,
        on_terminal("ledger", "--store", store),
        on_terminal("standing", "--store", store, "--at", AT),
        on_terminal("standing", "--store", store, "--at", AT, "--account", HOSTILE.replace("\0", "")),
        on_terminal("explain", "--offer", own, "--store", store, "--model", HOSTILE.replace("\0", "")),
        on_terminal(
            "explain", "--offer", own, "--store", store, "--model", "m", "--account", HOSTILE.replace("\0", "")
        ),
        on_terminal("enroll", "--store", store, "--tier", "3", "--by", HOSTILE.replace("\0", "")),
    ]
    assert decided.count("\n") == 1 + 3 + len(requests) - 3
    for text in shown:
        assert {char for char in plain(text) if not char.isprintable()} == {"\n"}


def test_control_characters_of_a_ledger_or_an_offer_never_reach_a_terminal(tmp_path: Path, used: str) -> None:
    """Files of others are shown, but cannot steer a terminal either."""
    wrong, offer = tmp_path / "wrong.jsonl", tmp_path / "hostile.toml"
    ledger = gratis("ledger", "--store", used).lines
    ledger[0]["terms"]["offer"] = ledger[0]["terms"]["group"] = HOSTILE
    ledger[1]["id"] = HOSTILE
    ledger[2]["model"] = ledger[2]["enrollment"][HOSTILE] = HOSTILE
    wrong.write_bytes(sent(ledger))
    escaped = json.dumps(HOSTILE + "m")
    hostile = (
        OWN_OFFER.replace('"m"', escaped).replace('"An offer of our own"', escaped).replace('"this test"', escaped)
    )
    offer.write_text(hostile, encoding="utf-8")
    for command in (("audit", wrong), ("offers", "show", offer), ("offers", "check", offer)):
        text = plain(on_terminal(*command))
        assert text
        assert {char for char in text if not char.isprintable()} == {"\n"}, command


class Screen(io.StringIO):
    """A standard error that says it is a terminal."""

    def isatty(self) -> bool:
        """People look at it."""
        return True


def test_progress_is_told_on_a_terminal_every_half_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long work says how far it is and how fast, at most twice a second, and takes the line away at its end."""
    screen, instants = Screen(), iter([0.0, 0.1, 0.5, 0.9, 1.0])
    monkeypatch.setattr(sys, "stderr", screen)
    progress = Progress("requests", clock=lambda: next(instants))
    for _ in range(4):
        progress.add(1_000)
    progress.end()
    assert screen.getvalue() == "\r2,000 requests, 4,000/s \r4,000 requests, 4,000/s \r\x1b[K"


def test_progress_is_not_told_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """Where nobody looks, standard error holds bad lines only."""
    instants = iter([0.0, 10.0])
    progress = Progress("requests", clock=lambda: next(instants))
    progress.add(1)
    progress.end()
    assert capsys.readouterr().err == ""


def test_progress_never_shares_a_line_with_a_row() -> None:
    """On one terminal with the table, the progress line is taken away before the next row is printed."""
    ours, theirs = terminal()
    with start(
        *("replay", "--tier", "3"),
        environment={"NO_COLOR": "1"},
        stdin=subprocess.PIPE,
        stdout=theirs,
        stderr=theirs,
        bufsize=0,
    ) as program:
        os.close(theirs)
        text, number = b"", 0
        while b"/s " not in text:  # one line at a time, until half a second has gone by
            program.stdin.write(sent([line(number)]))
            number += 1
            while text.count(b"\n") < number + 1:
                text += os.read(ours, 1 << 16)
        program.stdin.write(sent([line("last")]))
        program.stdin.close()
        text += b"".join(pieces(ours))
    os.close(ours)
    shown = [re.sub(r".*\r\x1b\[K", "", row) for row in text.decode().split("\n")]
    assert [row for row in shown if "requests" in row] == []


# --- standing, explain, enroll --------------------------------------------------------------------


def test_standing_says_what_is_left_of_each_group(used: str) -> None:
    """One line a group: allowance, used, remaining, and the window; every account that the store knows, or one."""
    gratis("decide", "--no-bounds", "--tier", "3", "--store", used, stdin=sent([line(9, model=SMALL, account="acme")]))
    answer = gratis("standing", "--store", used, "--tier", "3", "--at", AT)
    common = {
        "offer": "openai-data-sharing",
        "revision": "2025-04-16",
        "unit": "tokens",
        "reason": None,
        "window_start": "2025-04-20T00:00:00Z",
        "window_end": "2025-04-21T00:00:00Z",
    }
    rows = [
        ("default", "1M", 1_000_000, 975_000, 25_000),
        ("default", "10M", 10_000_000, 0, 10_000_000),
        ("acme", "1M", 1_000_000, 0, 1_000_000),
        ("acme", "10M", 10_000_000, 10, 9_999_990),
    ]
    names = ("account", "group", "allowance", "used", "remaining")
    free = [{"held": 0, "available": row[-1]} for row in rows]
    lines = [{**dict(zip(names, row, strict=True)), **common, **more} for row, more in zip(rows, free, strict=True)]
    assert answer.lines == lines
    one = gratis("standing", "--store", used, "--tier", "3", "--at", AT, "--account", "acme")
    assert one.lines == answer.lines[2:]
    assert gratis("standing", "--store", used, "--at", "2020-01-01T00:00:00Z").out == ""


def test_standing_of_an_account_that_is_not_enrolled_has_no_allowance(used: str) -> None:
    """Without an enrollment, told or kept, nothing is free, and the reason says so."""
    answer = gratis("standing", "--store", used, "--at", AT)
    expected = [(0, 0, "not_enrolled")] * 2
    assert [(each["allowance"], each["remaining"], each["reason"]) for each in answer.lines] == expected


def test_standing_and_explain_say_alike_that_nothing_is_shared(store: str) -> None:
    """An allowance that cannot be used is not shown as what is left."""
    gratis("enroll", "--store", store, "--tier", "3", "--by", "ann")
    standing = gratis("standing", "--store", store).lines
    told = gratis("explain", "--store", store, "--model", LARGE).lines[0]
    assert [(each["remaining"], each["reason"]) for each in standing] == [(0, told["reason"])] * 2
    assert told["reason"] == "sharing_disabled"


@settings(max_examples=100)
@given(
    sizes=st.lists(st.tuples(st.sampled_from([LARGE, SMALL, "?"]), st.integers(0, 400_000)), max_size=8),
    minutes=st.lists(st.integers(0, 3_000), min_size=9, max_size=9),
    model=st.sampled_from([LARGE, SMALL]),
    start=st.sampled_from([NOON, datetime(2025, 3, 4, 20, tzinfo=UTC)]),
    readings=st.tuples(st.sampled_from(["free", "all"]), st.sampled_from(["whole", "excess"])),
    asked=st.integers(0, 1_200_000),
)
def test_explain_agrees_with_decide(  # noqa: PLR0917 - one argument a drawn value
    sizes: list[tuple[str, int]],
    minutes: list[int],
    model: str,
    start: datetime,
    readings: tuple[str, str],
    asked: int,
) -> None:
    """What `explain` says is what `decide` does next; what fits is free, one token more is billed; nothing changes."""
    offer = load("openai-data-sharing").reading(counts=readings[0], overage=readings[1])

    def request(name: str, model: str, tokens: int, minute: int) -> Request:
        return Request(id=name, model=model, at=start + timedelta(minutes=minute), input_tokens=tokens, output_tokens=0)

    def meter() -> Meter:
        made = Meter(MemoryStore(bounds=None), offer, assume=Enrollment(tier=1, sharing="enabled"))
        for number, (name, tokens) in enumerate(sizes):
            made.decide(request(f"h{number}", name, tokens, minutes[number]))
        return made

    one = meter()
    told = one.explain(request("x", model, asked, minutes[-1]))
    assert told == one.explain(request("x", model, asked, minutes[-1]))
    assert len(list(one.ledger())) == len(sizes)
    assert told.decision == one.decide(request("x", model, asked, minutes[-1]))
    if told.fits is not None and told.decision.total - asked <= told.decision.allowance:
        at_most, more = (meter().decide(request("x", model, told.fits + beyond, minutes[-1])) for beyond in (0, 1))
        assert (at_most.is_free, more.is_free) == (True, False)


def test_nothing_fits_where_the_allowance_is_below_what_is_used(own: Path) -> None:
    """An allowance lowered below what is used frees nothing, not even a request of no tokens: no size fits."""
    meter = Meter(MemoryStore(bounds=None), load(own))
    meter.enroll("default", Enrollment(tier=3, sharing="enabled"), actor="ann")
    meter.decide(Request(id="1", model="m", at=NOON, input_tokens=900, output_tokens=0))
    meter.enroll("default", Enrollment(tier=1, sharing="enabled"), actor="ann")
    nothing = Request(id="2", model="m", at=NOON, input_tokens=0, output_tokens=0)
    told = meter.explain(nothing)
    assert not meter.decide(nothing).is_free
    assert told.fits is None


def test_explain_prints_its_advice_as_a_line_and_writes_nothing(own: Path, store: str) -> None:
    """Verdict, reason, and the largest size that still fits, in the unit of the group; the ledger stays empty."""
    command = ("explain", "--store", store, "--offer", own, "--tier", "3", "--account", "acme")
    fits, over, unknown, tool = (
        gratis(*command, *more).lines[0]
        for more in (
            ("--model", "m", "--tokens", "1000"),
            ("--model", "m", "--tokens", "1001"),
            ("--model", "M"),
            ("--model", "m", "--tool", "web_search"),
        )
    )
    assert fits | {"window_end": "…"} == {
        "account": "acme",
        "model": "m",
        "verdict": "free",
        "reason": "within_allowance",
        "tokens": 1_000,
        "fits": 1_000,
        "held": 0,
        "available": 1_000,
        "elsewhere": [],
        "unit": "tokens",
        "group": "G",
        "allowance": 1_000,
        "window_end": "…",
    }
    assert over == {**fits, "verdict": "billed", "reason": "over_allowance", "tokens": 1_001}
    nothing = dict.fromkeys(("fits", "available", "unit", "group", "allowance", "window_end"), None)
    unlisted = {"model": "M", "verdict": "billed", "reason": "model_not_listed", "tokens": 0, "elsewhere": ["G"]}
    assert unknown == {**fits, **nothing, **unlisted}
    assert tool == {**fits, **nothing, "verdict": "billed", "reason": "tool_use", "tokens": 0}
    assert gratis("ledger", "--store", store).out == ""


def test_explain_is_about_no_request_that_was_decided(own: Path, store: str) -> None:
    """Whatever ids an account has used, a question about a size is answered, not taken for a repeat of one."""
    now = datetime.now(UTC)
    with Meter.open(store, offer=own, assume=Enrollment(tier=3, sharing="enabled"), clock=lambda: now) as meter:
        meter.decide(Request(id="explain", model="m", at=now, input_tokens=400, output_tokens=0))
    command = ("explain", "--store", store, "--offer", own, "--tier", "3", "--model", "m", "--at", now.isoformat())
    answers = [gratis(*command, "--tokens", str(tokens)) for tokens in (600, 601, 400)]
    assert [(each.code, each.err) for each in answers] == [(0, "")] * 3
    assert [(each.lines[0]["verdict"], each.lines[0]["fits"]) for each in answers] == [
        ("free", 600),
        ("billed", 600),
        ("free", 600),
    ]


@pytest.mark.parametrize(
    "command",
    [("standing",), ("explain", "--model", LARGE), ("ledger",), ("audit",), ("enroll", "--history")],
)
def test_a_command_that_only_reads_makes_no_store(tmp_path: Path, command: tuple[str, ...]) -> None:
    """A question writes nothing: no store comes to be where there was none."""
    gratis(*command, "--store", f"sqlite:///{tmp_path}/mistyped.db")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["ledger", "audit"])
def test_a_ledger_that_is_not_there_is_bad_use(tmp_path: Path, command: str) -> None:
    """A mistyped store must not look like an honest one without entries."""
    answer = gratis(command, "--store", f"sqlite:///{tmp_path}/mistyped.db")
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)


def test_an_enrollment_keeps_what_is_not_changed(store: str) -> None:
    """Each change builds on the last one; what an argument does not name stays."""
    command = ("enroll", "--store", store, "--by", "ann")
    gratis(*command, "--tier", "3", "--sharing", "selected", "--shared-project", "p", "--shared-project", "q")
    gratis(*command, "--tier", "4")
    gratis(*command, "--sharing", "enabled", "--ends", "2030-01-01T00:00:00+02:00")
    gratis(*command, "--owner", "bob", "--owner", "ann")
    gratis("enroll", "--store", store, "--by", "bob", "--sharing", "disabled", "--plan", "enterprise")
    history = gratis("enroll", "--store", store, "--history").lines
    first = {
        "tier": 3,
        "sharing": "selected",
        "projects": ["p", "q"],
        "plan": "standard",
        "zero_data_retention": False,
        "starts": None,
        "ends": None,
        "owners": ["ann"],
    }
    second = {**first, "tier": 4}
    third = {**second, "sharing": "enabled", "projects": [], "ends": "2029-12-31T22:00:00Z"}
    fourth = {**third, "owners": ["ann", "bob"]}
    fifth = {**fourth, "sharing": "disabled", "plan": "enterprise"}
    assert [each["enrollment"] for each in history] == [first, second, third, fourth, fifth]
    assert [each["actor"] for each in history] == ["ann", "ann", "ann", "ann", "bob"]
    assert [each["version"] for each in history] == [1, 2, 3, 4, 5]
    assert {(each["offer"], each["account"]) for each in history} == {("openai-data-sharing", "default")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--by", "bob", "--tier", "4"), "gratis: actor: 'bob' is no owner of this account; only an owner changes"),
        (
            ("--by", "ann", "--plan", "enterprise"),
            "gratis: sharing: an account on the 'enterprise' plan cannot enable it",
        ),
        (
            ("--by", "ann", "--zero-data-retention"),
            "gratis: sharing: an account with zero data retention cannot enable it",
        ),
        (("--by", "ann", "--sharing", "selected"), "gratis: projects: sharing is 'selected' with 0 projects"),
        (("--by", "ann", "--starts", "2026-01-01T00:00:00Z", "--ends", "2025-01-01T00:00:00Z"), "gratis: ends: "),
        (("--by", "ann"), "gratis: enroll: nothing to change"),
        (("--by", "", "--tier", "3"), "gratis: actor: found 0 bytes"),
    ],
)
def test_a_change_that_may_not_be_is_refused_and_not_kept(store: str, arguments: tuple[str, ...], message: str) -> None:
    """Only an owner changes an enrollment, only to what the offer allows, and a refusal leaves no trace."""
    command = ("enroll", "--store", store)
    gratis(*command, "--by", "ann", "--tier", "3", "--sharing", "enabled")
    before = gratis(*command, "--history").out
    answer = gratis(*command, *arguments)
    assert answer.err.startswith(message)
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert gratis(*command, "--history").out == before


# --- offers and demo ------------------------------------------------------------------------------


def test_offers_are_listed() -> None:
    """Each shipped offer is one line, with its revisions by date; `offers` alone lists too."""
    listed = gratis("offers", "list")
    assert [each["name"] for each in listed.lines] == shipped()
    assert gratis("offers") == listed
    assert {each["name"]: each["revisions"] for each in listed.lines}["openai-evals"] == ["2025-04-16"]


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_offer_is_shown_and_good(name: str) -> None:
    """Each revision of each offer can be shown, in both forms."""
    for revision in load(name).revisions:
        shown = gratis("offers", "show", name, "--at", revision.name)
        assert (shown.lines[0]["offer"], shown.lines[0]["revision"]) == (name, revision.name)
        assert gratis("offers", "show", name, "--at", revision.name, "--format", "table").code == 0


def test_show_takes_the_revision_in_force_on_a_date() -> None:
    """The list of the article is in force from 2025-04-16 until 2025-05-15."""
    shown = [
        gratis("offers", "show", "openai-data-sharing", "--at", day).lines[0] for day in ("2025-04-16", "2025-05-15")
    ]
    assert shown[0] == shown[1]
    assert shown[0]["revision"] == "2025-04-16"
    assert {group["name"]: len(group["models"]) for group in shown[0]["groups"]} == {"1M": 8, "10M": 6}


def test_check_says_what_is_wrong_with_a_file_and_where(tmp_path: Path, own: Path) -> None:
    """A good file is said to be good; a bad one names file, line, key, what was found and what was expected."""
    bad = tmp_path / "bad.toml"
    bad.write_text(OWN_OFFER.replace('counts = "free"', 'counts = "most"'), encoding="utf-8")
    assert (gratis("offers", "check", own).code, gratis("offers", "check", own).err) == (0, "")
    answer = gratis("offers", "check", own, bad)
    assert answer.code == 2
    assert re.fullmatch(rf"gratis: {re.escape(str(bad))}:9: .*counts: .*most.*; expected .*\n", answer.err)


def test_diff_prints_what_changed_between_two_dates() -> None:
    """Models that came and went, and rules that changed, a line each; two dates of one revision differ in nothing."""
    command = ("offers", "diff", "openai-data-sharing")
    answer = gratis(*command, "2025-03-01", "2025-03-07")
    assert answer.lines == [
        {
            "change": "changed",
            "what": "rule",
            "name": "announced_until",
            "first": "2025-02-28",
            "second": "2025-04-30",
        },
        {"change": "changed", "what": "rule", "name": "window", "first": "rolling 24h", "second": "day UTC"},
    ]
    days = ("2025-04-15", "2025-04-16")
    there, back = (gratis(*command, *dates).lines for dates in (days, days[::-1]))
    added = [each["name"] for each in there if (each["change"], each["what"]) == ("added", "model")]
    assert added == [
        "gpt-4.1-2025-04-14",
        "gpt-4.1-mini-2025-04-14",
        "gpt-4.1-nano-2025-04-14",
        "o1-preview-2024-09-12",
        "o3-2025-04-16",
        "o4-mini-2025-04-16",
    ]
    assert [each["name"] for each in back if (each["change"], each["what"]) == ("removed", "model")] == added
    assert gratis(*command, "2025-04-16", "2025-05-15") == Answer(0, "", "")


def test_the_demo_prints_the_day_as_the_article_prints_it() -> None:
    """Eight rows as in the article, then the request that lands on the allowance and the one that would pass it."""
    answer = gratis("demo")
    rows = [" | ".join(cell.strip() for cell in row.split("|")) for row in answer.out.splitlines() if " | " in row]
    assert rows[:9] == ARTICLE.strip().splitlines()
    assert rows[10:] == ["23:30 | 25 k | 1 000 k | Free", "23:30 | 25 001 | 1 000 001 | Billed (entire 25001)"]
    assert (answer.code, answer.err) == (0, "")


def test_the_demo_prints_the_same_on_any_store_and_when_run_again(store: str) -> None:
    """Its requests have ids, so a second run on the same store repeats the first, and the audit finds nothing."""
    runs = [gratis("demo", "--store", store), gratis("demo", "--store", store), gratis("demo")]
    assert runs == [runs[0]] * 3
    assert gratis("audit", "--store", store).code == 0


def test_the_readme_way_to_run_it_works() -> None:
    """`python -m gratis` and the installed program are the same command line."""
    done = subprocess.run([sys.executable, "-m", "gratis", "demo"], capture_output=True, check=True)
    assert done.stdout.decode() == gratis("demo").out
