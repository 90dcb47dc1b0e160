"""How a failure is written down: as request lines and enrollments that `gratis replay` reads, and judges by the rule.

A replay has no clock: it knows no time that is too late or ahead, and no holds. It takes the enrollment that was in
force at a request's own time. So the changes are written with times at which they part the requests as they did in
the store, wherever there are such times; whether the replay says what the store should have said is tried here.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from gratis.audit.properties.expected import Clash, Refused, plain
from gratis.audit.properties.histories import (
    Asking,
    Enrolling,
    Holding,
    Releasing,
    Reopening,
    Settling,
    Together,
)
from gratis.audit.replay import Replay
from gratis.errors import RequestError
from gratis.lines import change_line, decision_line, encode, enrollment_line, kept_line, request_line, terms_line
from gratis.model import Change, Decision, Hold, Request, shown, stamp

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from pathlib import Path

    from gratis.audit.properties.driving import Failure
    from gratis.audit.properties.histories import History, Step
    from gratis.offer import Offer
    from gratis.rule import Tally

SHOWN_MAX = 400


class Written(Struct, frozen=True):
    """What was written, the command that judges it, and whether that says what was expected of the store."""

    requests: Path
    enrollments: Path
    command: str
    count: int
    is_same: bool


def write(failure: Failure, history: History, offer: Offer, path: Path, *, offer_name: str) -> Written:
    """Write a failure's requests and enrollments."""
    requests, marked = _requests(failure)
    changes = _timed(failure, requests)
    beside = path.with_name(path.name + ".enrollments.jsonl")
    told = {
        "what": failure.what,
        "where": failure.where,
        "found": line(failure.found),
        "expected": line(failure.expected),
    }
    with path.open("wb") as file:
        for place, request in enumerate(requests):
            file.write(encode({**request_line(request), **(told if place == marked else {})}) + b"\n")
    with beside.open("wb") as file:
        for account, change in sorted(changes, key=lambda one: (one[1].at, one[1].version)):
            file.write(encode(change_line(offer.name, account, change)) + b"\n")
    words = ["gratis", "replay", str(path), "--enrollments", str(beside), "--offer", offer_name]
    if history.counts is not None:
        words += ["--counts", history.counts.value]
    if history.overage is not None:
        words += ["--overage", history.overage.value]
    judge = Replay(history.offer(offer), changes=_by_account(changes))
    try:
        answers = judge.decide_many(requests)
    finally:
        judge.close()
    answer = answers[marked] if 0 <= marked < len(answers) else None
    return Written(path, beside, shlex.join(words), len(requests), _is_same(answer, failure.expected))


def line(value: Any) -> Any:  # noqa: PLR0911 - a row a kind
    """What was found or expected, as JSON."""
    match value:
        case Decision():
            enrollment = value.terms.enrollment
            told = None if enrollment is None else enrollment_line(enrollment)
            return {**decision_line(value), "enrollment": told, "terms": terms_line(value.terms)}
        case Clash():
            first = value.first or value.hold
            return {"conflict": value.field, "first": None if first is None else line(first)}
        case Refused():
            return {"refused": value.field}
        case Hold():
            return kept_line(value)
        case Change():
            return {"version": value.version, **enrollment_line(value.enrollment)}
        case None | int() | str():
            return value
        case list():
            return [_row(one) for one in value]
        case _:
            text = f"{type(value).__name__}: {value}" if isinstance(value, Exception) else repr(value)
            return text if len(text) <= SHOWN_MAX else shown(text)


def _row(value: Any) -> Any:
    """A tally with its group and window, or whatever else a list has."""
    match value:
        case (str(group), str(kind), tally):
            return {"group": group, "window": kind, **_tally_line(tally)}
        case _:
            return line(value)


def _tally_line(tally: Tally) -> dict[str, Any]:
    window = tally.window
    return {"window_start": stamp(window.start), "window_end": stamp(window.end), "used": tally.used, "seq": tally.seq}


def _requests(failure: Failure) -> tuple[list[Request], int]:
    """The requests in the order of their decisions, and which of them the failure is about."""
    requests = list(dict.fromkeys(failure.asked))  # a repeat changes nothing
    if failure.request is None:
        return requests, len(requests) - 1
    if failure.what == "decision" and failure.asked[:-1].count(failure.request):
        return [*requests, failure.request], len(requests)  # it is a repeat that fails
    if failure.request not in requests:
        requests.append(failure.request)
    return requests, requests.index(failure.request)


def _timed(failure: Failure, requests: Sequence[Request]) -> list[tuple[str, Change]]:
    """Each change at a time that parts the requests decided before it from those after it, if there is one."""
    first = {(one.account, one.id): one for one in reversed(requests)}
    changes = []
    for account, change in failure.changes:
        before: list[datetime] = []
        after: list[datetime] = []
        for request in first.values():
            if request.account == account:
                # What was not decided was asked last, under the latest change.
                version = failure.versions.get((account, request.id), change.version)
                (before if version < change.version else after).append(request.at)
        at = change.at
        is_after = not before or max(before) < at
        if not after and not is_after:
            continue  # nobody was decided under it
        if after and (at > min(after) or not is_after) and (not before or max(before) < min(after)):
            at = min(after)
        changes.append((account, replace(change, at=at)))
    return changes


def _by_account(changes: Sequence[tuple[str, Change]]) -> dict[str, list[Change]]:
    histories: dict[str, list[Change]] = {}
    for account, change in changes:
        histories.setdefault(account, []).append(change)
    return histories


def _is_same(answer: Decision | RequestError | None, expected: object) -> bool:
    """Whether a replay says what the store should have said; of holds and counters it says nothing."""
    if isinstance(expected, Decision):
        return isinstance(answer, Decision) and plain(answer) == expected
    if isinstance(expected, Clash):
        return isinstance(answer, RequestError) and answer.field == expected.field
    return False


def differing(found: Any, expected: Any) -> dict[str, list[Any]]:
    """The fields of two lines that are not the same: what was found, what was expected."""
    if not isinstance(found, dict) or not isinstance(expected, dict):
        return {"": [found, expected]}
    differs: dict[str, list[Any]] = {}
    for name in dict.fromkeys([*found, *expected]):
        one, other = found.get(name), expected.get(name)
        if one != other:
            parts = differing(one, other)
            differs |= {f"{name}.{part}" if part else name: pair for part, pair in parts.items()}
    return differs


def step_line(step: Step) -> dict[str, Any]:  # noqa: PLR0911 - a row a kind
    """A step of a history, as JSON."""
    told: dict[str, Any] = {"now": stamp(step.now), "do": _WORDS[type(step)]}
    if not isinstance(step, Together):
        told["view"] = step.view
    match step:
        case Enrolling():
            enrollment = {**enrollment_line(step.enrollment)}
            return {**told, "account": step.account, "actor": step.actor, "enrollment": enrollment}
        case Asking():
            return {**told, "requests": [request_line(request) for request in step.requests]}
        case Holding():
            return {**told, "seconds": step.lasting.total_seconds(), "requests": [request_line(step.request)]}
        case Settling():
            return {**told, "requests": [request_line(step.request)]}
        case Releasing():
            return {**told, "account": step.account, "id": step.request_id}
        case Together():
            return {**told, "callers": [[step_line(one) for one in lane] for lane in step.lanes]}
        case _:
            return told


_WORDS: dict[type, str] = {
    Enrolling: "enroll",
    Asking: "decide",
    Holding: "hold",
    Settling: "settle",
    Releasing: "release",
    Reopening: "reopen",
    Together: "at once",
}
