"""`gratis decide`: requests in, decisions out, and how any command judges a stream of them."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

from gratis import usage
from gratis.cli.screen import Listing, is_table, safe
from gratis.cli.streams import Complaints, Output, Progress, batches, parsed, reading
from gratis.errors import EnrollmentError, GratisError, RequestError
from gratis.lines import ENTRY_BYTES_MAX, LINE_BYTES_MAX, change_of, request_of
from gratis.meter import Meter
from gratis.model import Decision, Enrollment, Sharing
from gratis.stores import Bounds

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from datetime import datetime

    from gratis.model import Change, Request
    from gratis.thresholds import Threshold

    Judge = Callable[[Sequence[Request]], list["Answer"]]
    Read = tuple[int, Request | RequestError]
    Show = Callable[[Sequence[Decision]], None]

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


def assumed(arguments: argparse.Namespace) -> Enrollment | None:
    """The enrollment that --tier, --sharing and --shared-project say accounts have."""
    if arguments.tier is None:
        if arguments.sharing is not None or arguments.shared_project is not None:
            raise GratisError("--sharing and --shared-project: expected with --tier N")
        return None
    projects = frozenset(arguments.shared_project or ())
    sharing = Sharing(arguments.sharing or (Sharing.SELECTED if projects else Sharing.ENABLED))
    return Enrollment(tier=arguments.tier, sharing=sharing, projects=projects)


def _judge(arguments: argparse.Namespace, judge: Judge) -> int:
    """Judge a stream of lines, and print the decisions."""
    show = Listing(COLUMNS).decisions if is_table(arguments.format) else Output().decisions
    with reading(arguments.file) as file:
        return judged(requests_in(arguments, file), judge, show, Complaints(arguments.file))


def judged(source: Iterable[list[Read]], judge: Judge, show: Show, complain: Complaints) -> int:
    """Judge a stream of requests in its order; a bad line is reported and the others go on."""
    progress = Progress("requests")
    for batch in source:
        numbers: list[int] = []
        requests: list[Request] = []
        errors: list[tuple[int, RequestError]] = []
        for number, request in batch:
            if isinstance(request, RequestError):
                errors.append((number, request))
            else:
                numbers.append(number)
                requests.append(request)
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


def requests_in(arguments: argparse.Namespace, file: BinaryIO) -> Iterator[list[Read]]:
    """The requests of JSON lines with their numbers; what is wrong with a line stands in its place."""
    read = partial(_of_response, arguments) if arguments.responses else request_of
    line_max = RESPONSE_BYTES_MAX if arguments.responses else LINE_BYTES_MAX
    for batch in batches(file, line_max=line_max):
        found: list[Read] = []
        for number, line in batch:
            try:
                found.append((number, read(parsed(line, line_max=line_max))))
            except RequestError as error:
                if line.strip():
                    found.append((number, error))
        yield found


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


def histories(name: str, offer: str) -> dict[str, list[Change]]:
    """The history of each account's enrollment in an offer, from a file of changes."""
    found: dict[str, list[Change]] = {}
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
                    found.setdefault(account, []).append(change)
    for history in found.values():
        history.sort(key=_by_version)
    return found


def _by_version(change: Change) -> int:
    return change.version
