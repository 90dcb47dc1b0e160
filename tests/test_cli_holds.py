"""Holds and corrections on the command line: set aside, settled, given back, listed, corrected; and raw responses."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from gratis.lines import encode

from .test_cli import FIELDS, Answer, gratis, own, store  # noqa: F401 - fixtures are asked for by name

if TYPE_CHECKING:
    from pathlib import Path

HOLD_FIELDS = [
    *("id", "account", "project", "model", "at", "kind", "tools", "tokens_max", "amount", "fits", "short", "reason"),
    *("group", "allowance", "used", "held", "window_start", "window_end", "until", "on_expiry", "offer", "revision"),
]


class Shell:
    """Commands on one store under our own offer, 250 tokens a day at tier 1."""

    def __init__(self, offer: Path, url: str) -> None:
        self._place = ("--store", url, "--offer", offer)
        self.url = url
        assert self("enroll", "--tier", "1", "--sharing", "enabled", "--by", "ann").code == 0

    def __call__(self, command: str, *arguments: str) -> Answer:
        """What a command says; a ledger is of every offer."""
        return gratis(command, *arguments, *(self._place[:2] if command == "ledger" else self._place))

    def hold(self, name: str, tokens: int, *more: str) -> dict[str, object]:
        """The line of a hold."""
        answer = self("hold", name, "--model", "m", "--tokens-max", str(tokens), *more)
        assert (answer.code, answer.err) == (0, "")
        (line,) = answer.lines
        return line


@pytest.fixture
def shell(own: Path, store: str) -> Shell:  # noqa: F811 - the fixtures of test_cli.py
    """A shell on a store that is not there yet."""
    return Shell(own, store)


def test_a_hold_says_whether_it_fits_and_by_how_much_not(shell: Shell) -> None:
    """The fields of a hold, in their order; a second one does not fit beside the first."""
    first, second = shell.hold("r1", 200), shell.hold("r2", 100)
    assert list(first) == HOLD_FIELDS
    parts = ("fits", "short", "reason", "used", "held")
    assert [first[part] for part in parts] == [True, 0, "within_allowance", 0, 0]
    assert [second[part] for part in parts] == [False, 50, "over_allowance", 0, 200]
    assert [line["id"] for line in shell("holds").lines] == ["r1", "r2"]
    standing = shell("standing").lines[0]
    assert [standing[part] for part in ("used", "held", "remaining", "available")] == [0, 200, 250, 50]


def test_a_hold_asked_for_again_is_the_same_hold(shell: Shell) -> None:
    """The command may be repeated; with another bound it is refused and says what is held."""
    assert shell.hold("r1", 200) == shell.hold("r1", 200)
    refused = shell("hold", "r1", "--model", "m", "--tokens-max", "201")
    assert (refused.code, refused.out) == (2, "")
    expected = "input_tokens: request 'r1' of account 'default' is held with input_tokens 200; that hold stands"
    assert refused.err == f"gratis: {expected}\n"


def test_settle_decides_by_what_was_used_and_repeats(shell: Shell) -> None:
    """A settle prints the decision with its hold; asked again it is replayed; other tokens are a conflict."""
    shell.hold("r1", 200)
    used = ("--input-tokens", "100", "--output-tokens", "20")
    (line,) = shell("settle", "r1", *used).lines
    assert list(line) == [*FIELDS, "hold"]
    assert [line[part] for part in ("verdict", "tokens", "used", "seq", "replayed")] == ["free", 120, 120, 1, False]
    assert line["hold"]["tokens_max"] == 200
    assert shell("settle", "r1", *used).lines == [line | {"replayed": True}]
    assert shell("settle", "r1", "--input-tokens", "1", "--output-tokens", "0").code == 2
    assert shell("holds").lines == []
    assert shell.hold("r1", 200)["verdict"] == "free"  # decided already: the decision is what there is to say


def test_without_counts_a_settle_is_decided_by_its_bound(shell: Shell) -> None:
    """What nobody could measure counts as its bound, and says so; the real usage corrects it later."""
    shell.hold("r1", 200)
    (line,) = shell("settle", "r1").lines
    assert (line["tokens"], line["hold"]["unmeasured"]) == (200, True)
    (later,) = shell("settle", "r1", "--input-tokens", "10", "--output-tokens", "5").lines
    assert list(later) == [*FIELDS, "correction"]
    assert [later["id"], later["tokens"], later["used"], later["seq"]] == ["r1", 15, 15, 2]
    assert (later["correction"]["remedy"], later["correction"]["returned"]) == ("settled", 200)


def test_release_gives_back(shell: Shell) -> None:
    """A released hold holds nothing; what was never held is told."""
    shell.hold("r1", 200)
    given_back = {"id": "r1", "account": "default", "released": True}
    assert shell("release", "r1").lines == [given_back]
    assert shell("standing").lines[0]["held"] == 0
    assert shell("release", "r1").lines == [given_back | {"released": False}]
    shell.hold("r2", 200)
    shell("settle", "r2", "--input-tokens", "1", "--output-tokens", "1")
    assert shell("release", "r2").lines == [given_back | {"id": "r2", "released": False}]


@pytest.mark.parametrize("counts", [("--input-tokens", "1"), ("--output-tokens", "1")])
def test_half_a_usage_settles_nothing(shell: Shell, counts: tuple[str, str]) -> None:
    """Who forgets one of the counts is told; the hold stays."""
    shell.hold("r1", 200)
    refused = shell("settle", "r1", *counts)
    expected = "expected --input-tokens N and --output-tokens N, or neither: then its bound counts"
    assert refused == Answer(2, "", f"gratis: settle: {expected}\n")
    assert [line["id"] for line in shell("holds").lines] == ["r1"]


def test_what_was_given_back_is_not_settled_by_its_id(shell: Shell) -> None:
    """Nothing is known of it any more, so the command says how to decide it."""
    shell.hold("r1", 200)
    shell("release", "r1")
    refused = shell("settle", "r1", "--input-tokens", "1", "--output-tokens", "1")
    gone = "it was released, or ran out of time; `gratis decide` decides it all the same"
    assert refused == Answer(2, "", f"gratis: id: no hold of request 'r1' in account 'default': {gone}\n")


def test_what_ran_out_of_time_is_ended_by_asking(shell: Shell) -> None:
    """`holds --expire` decides those that ran out by their bounds, once."""
    hold = shell.hold("r1", 200, "--for", "0.001")
    while datetime.now(UTC) <= datetime.fromisoformat(str(hold["until"])):
        pass
    (line,) = shell("holds", "--expire").lines
    assert (line["id"], line["tokens"], line["hold"]["unmeasured"]) == ("r1", 200, True)
    assert shell("holds", "--expire").lines == []


def test_an_owner_corrects_and_says_why(shell: Shell) -> None:
    """A correction is a new line of the ledger that says what it corrects, who did it, and why."""
    shell.hold("r1", 200)
    shell("settle", "r1", "--input-tokens", "100", "--output-tokens", "20")
    (void,) = shell("correct", "r1", "--void", "--why", "sent twice", "--by", "ann").lines
    assert [void["id"], void["tokens"], void["used"], void["seq"]] == ["r1", 0, 0, 2]
    said = {"number": 1, "remedy": "voided", "returned": 120, "actor": "ann", "why": "sent twice"}
    assert void["correction"].items() >= said.items()
    adjust = ("--input-tokens", "7", "--output-tokens", "1", "--why", "a bill", "--by", "ann")
    assert shell("correct", "r1", *adjust).lines[0]["used"] == 8
    assert shell("correct", "r1", *adjust).lines[0]["replayed"] is True
    assert [(line["seq"], line["used"]) for line in shell("ledger").lines] == [(1, 120), (2, 0), (3, 8)]
    assert shell("audit").err == "gratis: 3 entries, 0 findings\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("r1", "--void", "--why", "x", "--by", "bob"), "actor: 'bob' is no owner of this account; only an owner"),
        (("r9", "--void", "--why", "x", "--by", "ann"), "id: no decision on request 'r9' of account 'default'"),
        (("r1", "--why", "x", "--by", "ann"), "correct: expected --void, or --input-tokens N"),
        (("r1", "--input-tokens", "1", "--why", "x", "--by", "ann"), "output_tokens: missing; expected what"),
        (("r1", "--void", "--input-tokens", "1", "--why", "x", "--by", "ann"), "correct: expected --void, or what it"),
        (("r1", "--void", "--why", "", "--by", "ann"), "why: found 0 bytes; expected 1 to 255"),
    ],
)
def test_what_cannot_be_corrected_is_told(shell: Shell, arguments: tuple[str, ...], message: str) -> None:
    """Nobody but an owner, no decision that is not there, nothing without a reason."""
    shell.hold("r1", 200)
    shell("settle", "r1", "--input-tokens", "100", "--output-tokens", "20")
    refused = shell("correct", *arguments)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith(f"gratis: {message}")
    assert len(shell("ledger").lines) == 1


def test_explain_names_what_fits_beside_what_is_held(shell: Shell) -> None:
    """The largest size that is free now, what holds set aside of it, and what is left beside them."""
    shell.hold("r1", 200)
    (line,) = shell("explain", "--model", "m", "--tokens", "260").lines
    assert [line[part] for part in ("verdict", "fits", "held", "available", "elsewhere")] == [
        "billed",
        250,
        200,
        50,
        [],
    ]
    assert "; 200 are held" in shell("explain", "--model", "m", "--format", "table").out


def test_explain_names_the_group_that_would_take_it(store: str) -> None:  # noqa: F811 - as above
    """What is too large for its own group, or for none, may fit another one."""
    asked = ("explain", "--store", store, "--tier", "1", "--tokens", "300000")
    (line,) = gratis(*asked, "--model", "gpt-4o-2024-08-06").lines
    assert (line["reason"], line["fits"], line["elsewhere"]) == ("over_allowance", 250_000, ["10M"])
    (line,) = gratis(*asked, "--model", "gpt-4o").lines
    assert (line["reason"], line["fits"], line["elsewhere"]) == ("model_not_listed", None, ["10M"])
    said = gratis(*asked, "--model", "gpt-4o-2024-08-06", "--format", "table").out
    assert "billed: over_allowance; 250,000 tokens of group 1M still fit until" in said
    assert said.endswith("; group 10M would take it\n")


def test_thresholds_are_said_once(store: str) -> None:  # noqa: F811 - as above
    """`decide --thresholds` tells on standard error what share is used and that one was billed, each once a window."""
    sizes = [120_000, 10_000, 80_000, 40_000, 1, 1]
    lines = [
        {
            "id": f"r{n}",
            "model": "gpt-4o-2024-08-06",
            "input_tokens": size,
            "output_tokens": 0,
            "at": f"2025-04-20T{n:02}:00:00Z",
        }
        for n, size in enumerate(sizes)
    ]
    asked = ("decide", "--store", store, "--tier", "1", "--no-bounds", "--thresholds")
    answer = gratis(*asked, stdin=b"\n".join(map(encode, lines)))
    shares = [line.split(": ")[2].split(" (")[0] for line in answer.err.splitlines()]
    assert shares == [f"{share}% of it is used" for share in (50, 80, 95, 100)] + [
        "the first request beyond it was billed"
    ]
    assert gratis(*asked, stdin=b"\n".join(map(encode, lines))).err == ""
    assert answer.err.splitlines()[0] == (
        "gratis: account default, group 1M of openai-data-sharing: 50% of it is used (130,000 of 250,000 tokens);"
        " the window ends 2025-04-21T00:00:00Z"
    )


def test_raw_responses_are_decided_as_they_are() -> None:
    """Lines may be what the provider answered, or a batch's output; the model is the one that answered."""
    chat = {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1_745_150_400, "model": "gpt-4.1-2025-04-14",
        "choices": [],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15,
                  "prompt_tokens_details": {"cached_tokens": 8}},
    }  # fmt: skip
    batch = {
        "id": "batch_req_1", "custom_id": "c", "error": None,
        "response": {"status_code": 200, "request_id": "r", "body": {**chat, "id": "chatcmpl-2"}},
    }  # fmt: skip
    broken = {"object": "thing"}
    stdin = b"\n".join(json.dumps(line).encode() for line in (chat, batch, broken))
    answer = gratis("replay", "--tier", "3", "--responses", "--account", "acme", "--project", "p", stdin=stdin)
    expected = [("chatcmpl-1", "acme", 15, 15), ("batch_req_1", "acme", 15, 30)]
    assert [(line["id"], line["account"], line["tokens"], line["used"]) for line in answer.lines] == expected
    assert answer.code == 2
    assert (
        answer.err.startswith("gratis: <stdin>: line 3: object: found 'thing'")
        or "line 3: object: found 'thing'" in answer.err
    )
