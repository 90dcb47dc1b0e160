"""`gratis decide` and `gratis replay`: requests in, decisions out."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

from gratis import usage
from gratis.audit.replay import Replay
from gratis.cli.screen import Listing, is_table, safe
from gratis.cli.streams import Complaints, Output, Progress, batches, parsed, reading
from gratis.errors import EnrollmentError, GratisError, RequestError
from gratis.lines import ENTRY_BYTES_MAX, LINE_BYTES_MAX, change_of, request_of
from gratis.meter import Meter
from gratis.model import Decision, Enrollment, Sharing
from gratis.offers import load
from gratis.stores import Bounds

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from gratis.model import Change, Request
    from gratis.thresholds import Threshold

BAD_INPUT = 2
SENTENCE_MAX = 1_000
RESPONSE_BYTES_MAX = 16 << 20  # a response carries its text
COLUMNS = (
    ("at", 20, False),
    ("id", 20, False),
    ("account", 12, False),
    ("group", 6, False),
    ("tokens", 13, True),
    ("total", 13, True),
    ("remaining", 13, True),
    ("verdict", 7, False),
    ("reason", 32, False),
)

Answer = Decision | RequestError


def decide(arguments: argparse.Namespace) -> int:
    """Decide requests, and keep the decisions."""
    bounds = None if arguments.no_bounds else Bounds()
    tell = _say if arguments.thresholds else None
    with Meter.open(
        arguments.store, offer=arguments.offer, assume=assumed(arguments), bounds=bounds, on_threshold=tell
    ) as meter:
        return _judge(arguments, meter.decide_many)


def _say(threshold: Threshold) -> None:
    print(f"gratis: {safe(threshold.sentence, SENTENCE_MAX)}", file=sys.stderr)


def replay(arguments: argparse.Namespace) -> int:
    """Judge a log in order; keeps nothing."""
    if arguments.tier is None and arguments.enrollments is None:
        raise GratisError("replay: expected --tier N, or --enrollments FILE: who takes part, and at which tier?")
    offer = load(arguments.offer).reading(counts=arguments.counts, overage=arguments.overage)
    changes = {} if arguments.enrollments is None else _histories(arguments.enrollments, offer.name)
    judge = Replay(offer, assume=assumed(arguments), changes=changes)
    try:
        return _judge(arguments, judge.decide_many)
    finally:
        judge.close()


def assumed(arguments: argparse.Namespace) -> Enrollment | None:
    """The enrollment that --tier, --sharing and --shared-project say accounts have."""
    if arguments.tier is None:
        if arguments.sharing is not None or arguments.shared_project is not None:
            raise GratisError("--sharing and --shared-project: expected with --tier N")
        return None
    projects = frozenset(arguments.shared_project or ())
    sharing = Sharing(arguments.sharing or (Sharing.SELECTED if projects else Sharing.ENABLED))
    return Enrollment(tier=arguments.tier, sharing=sharing, projects=projects)


def _judge(arguments: argparse.Namespace, judge: Callable[[Sequence[Request]], list[Answer]]) -> int:
    """Judge a stream of requests in its order; a bad line is reported and the others go on."""
    complain, progress = Complaints(arguments.file), Progress("requests")
    read = partial(_of_response, arguments) if arguments.responses else request_of
    show = Listing(COLUMNS).decisions if is_table(arguments.format) else Output().decisions
    line_max = RESPONSE_BYTES_MAX if arguments.responses else LINE_BYTES_MAX
    with reading(arguments.file) as file:
        for batch in batches(file, line_max=line_max):
            numbers: list[int] = []
            requests: list[Request] = []
            errors: list[tuple[int, RequestError]] = []
            for number, line in batch:
                try:
                    requests.append(read(parsed(line, line_max=line_max)))
                    numbers.append(number)
                except RequestError as error:
                    if line.strip():
                        errors.append((number, error))
            decisions = []
            for number, answer in zip(numbers, judge(requests), strict=True):
                if isinstance(answer, RequestError):
                    errors.append((number, answer))
                else:
                    decisions.append(answer)
            progress.end()
            show(decisions)
            for number, reason in sorted(errors, key=_by_number):
                complain(number, reason)
            progress.add(len(batch))
    progress.end()
    return BAD_INPUT if complain.count else 0


def _of_response(arguments: argparse.Namespace, line: object) -> Request:
    """A request from the provider's response to it, or from a line of a batch's output."""
    if not isinstance(line, dict):
        raise RequestError("line", f"found {type(line).__name__}; expected a JSON object")
    return usage.request(
        line,
        account=arguments.account,
        project=arguments.project,
        model=arguments.model,
        at=_unless_told(line, arguments.at),
    )


def _unless_told(line: dict[str, object], at: datetime | None) -> datetime | None:
    """The time that is given, for an answer that tells none."""
    return at if at is not None and usage.read(line).at is None else None


def _by_number(error: tuple[int, RequestError]) -> int:
    return error[0]


def _histories(name: str, offer: str) -> dict[str, list[Change]]:
    """The history of each account's enrollment in an offer, from a file of changes."""
    histories: dict[str, list[Change]] = {}
    with reading(name) as file:
        for batch in batches(file, line_max=ENTRY_BYTES_MAX):
            for number, line in batch:
                if not line.strip():
                    continue
                try:
                    its_offer, account, change = change_of(parsed(line, line_max=ENTRY_BYTES_MAX))
                except (EnrollmentError, RequestError) as error:
                    raise GratisError(f"{name}: line {number}: {error}") from None
                if its_offer == offer:
                    histories.setdefault(account, []).append(change)
    for history in histories.values():
        history.sort(key=_by_version)
    return histories


def _by_version(change: Change) -> int:
    return change.version
