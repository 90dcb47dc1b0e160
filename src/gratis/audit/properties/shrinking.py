"""The smallest history that still fails: steps are left out, then what is left of them is made plain.

Each attempt is asked of a new space. Nothing is taken over that does not fail in the same way.
"""

from __future__ import annotations

from datetime import timedelta
from itertools import chain, pairwise
from typing import TYPE_CHECKING, TypeVar

from msgspec.structs import replace

from gratis.audit.properties.histories import (
    Asking,
    Enrolling,
    Holding,
    Releasing,
    Settling,
    Together,
    requests_of,
    rewritten,
)
from gratis.model import EPOCH, TOKENS_MAX, Enrollment, Kind, Sharing
from gratis.stores import Bounds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from gratis.audit.properties.histories import History, Step
    from gratis.model import Request

    Lane = tuple[Enrolling | Asking, ...]

PLAIN = Enrollment(tier=3, sharing=Sharing.ENABLED)
T = TypeVar("T")
S = TypeVar("S")
SECOND = timedelta(seconds=1)
UNITS = (timedelta(hours=1), timedelta(minutes=1), SECOND)
ROUNDS_MAX = 6


def shrunk(history: History, fails: Callable[[History], bool], is_over: Callable[[], bool]) -> History:
    """The smallest history found in time that fails as this one does."""
    for _ in range(ROUNDS_MAX):
        before = history
        history = _fewer(history, fails, is_over)
        for candidates in (_apart, _narrower, _plainer, _named, _timely, _spread, _merged, _smaller):
            history = _taken(history, candidates, fails, is_over)
        if history == before or is_over():
            break
    return history


def _fewer(history: History, fails: Callable[[History], bool], is_over: Callable[[], bool]) -> History:
    """Without steps that do not matter: first many at once, from the end on, then one by one."""
    size = max(1, len(history.steps) // 2)
    while not is_over():
        end, has_changed = len(history.steps), False
        while end > 0 and not is_over():
            start = max(0, end - size)
            candidate = replace(history, steps=history.steps[:start] + history.steps[end:])
            if candidate.steps and fails(candidate):
                history, has_changed = candidate, True
            end = start
        if size == 1 and not has_changed:
            break
        size = max(1, size // 2) if not has_changed or size > 1 else 1
    return history


def _taken(
    history: History,
    candidates: Callable[[History], Iterator[History]],
    fails: Callable[[History], bool],
    is_over: Callable[[], bool],
) -> History:
    """The history after every change that leaves it failing; after each one the choice begins anew."""
    tried: set[History] = set()
    has_changed = True
    while has_changed and not is_over():
        has_changed = False
        for candidate in candidates(history):
            if is_over():
                break
            if candidate != history and candidate not in tried and (is_parted(candidate) or not is_parted(history)):
                tried.add(candidate)
                if fails(candidate):
                    history, has_changed = candidate, True
                    break
    return history


def is_parted(history: History) -> bool:
    """Whether times tell which change of an enrollment each request came after; a replay knows nothing else."""
    latest: dict[str, datetime] = {}
    bounds: dict[str, datetime] = {}
    for step in history.steps:
        if isinstance(step, Enrolling):
            if step.account in latest:
                bounds[step.account] = latest[step.account]
        elif isinstance(step, Together) and any(isinstance(one, Enrolling) for lane in step.lanes for one in lane):
            return False
        for request in requests_of([step]):
            name = request.account
            if name in bounds and request.at <= bounds[name]:
                return False
            latest[name] = max(latest.get(name, request.at), request.at)
    return True


def _apart(history: History) -> Iterator[History]:
    """Callers at once ask one after another, in one order or the other, and batches one by one."""
    for place, step in enumerate(history.steps):
        if isinstance(step, Together):
            for lanes in (step.lanes, step.lanes[::-1]):
                yield _with(history, place, *chain.from_iterable(lanes))
        elif isinstance(step, Asking) and step.is_batch:
            yield _with(history, place, *(replace(step, requests=(one,), is_batch=False) for one in step.requests))


def _narrower(history: History) -> Iterator[History]:
    """Fewer callers, fewer steps of each, fewer requests in a call; all of one view."""
    for place, step in enumerate(history.steps):
        if isinstance(step, Together):
            for lanes in _fewer_calls(step.lanes):
                yield _with(history, place, replace(step, lanes=lanes))
        elif isinstance(step, Asking) and len(step.requests) > 1:
            for rest in _without_one(step.requests):
                yield _with(history, place, replace(step, requests=rest))
        if not isinstance(step, Together) and step.view:
            yield _with(history, place, replace(step, view=0))


def _fewer_calls(lanes: tuple[Lane, ...]) -> Iterator[tuple[Lane, ...]]:
    """The callers but for one, then each but for one of its steps."""
    if len(lanes) > 1:
        yield from _without_one(lanes)
    for number, lane in enumerate(lanes):
        for rest in _without_one(lane):
            if rest:
                yield (*lanes[:number], rest, *lanes[number + 1 :])


def _without_one(parts: tuple[T, ...]) -> Iterator[tuple[T, ...]]:
    for place in range(len(parts) - 1, -1, -1):
        yield parts[:place] + parts[place + 1 :]


def _plainer(history: History) -> Iterator[History]:
    """The offer's own reading, the usual bounds, plain enrollments, no holds, requests without anything special."""
    yield replace(history, counts=None, overage=None, bounds=Bounds())
    yield replace(history, counts=None)
    yield replace(history, overage=None)
    yield replace(history, bounds=Bounds())
    for place, step in enumerate(history.steps):
        if isinstance(step, Holding | Settling):
            yield _with(history, place, Asking(step.now, (step.request,), step.view))
        if isinstance(step, Enrolling):
            yield _with(history, place, replace(step, enrollment=PLAIN, actor="ann"))
            yield _with(history, place, replace(step, enrollment=replace(PLAIN, tier=step.enrollment.tier)))
    yield _rewritten(history, _bare)
    for request in _distinct(history):
        for change in (_bare, _whole):
            yield _one(history, request, change(request))
        first = next(requests_of(history.steps))
        yield _one(history, request, replace(request, model=first.model))


def _named(history: History) -> Iterator[History]:
    """Plain names: accounts a, b and so on, requests r1, r2 and so on; or one account for all."""
    accounts = list(dict.fromkeys(chain((one.account for one in _distinct(history)), _enrolled(history))))
    short = {name: chr(ord("a") + place) for place, name in enumerate(accounts[:26])}
    ids = {name: f"r{place}" for place, name in enumerate(dict.fromkeys(one.id for one in _distinct(history)), start=1)}
    yield _renamed(history, short, ids)
    yield _renamed(history, {}, ids)
    yield _renamed(history, short, {})
    for name, other in short.items():
        yield _renamed(history, {name: other}, {})
    for name, other in ids.items():
        yield _renamed(history, {}, {name: other})


def _timely(history: History) -> Iterator[History]:
    """Steps soon after one another, at whole hours, minutes and seconds; requests at the time of their step."""
    steps = history.steps
    for place, (before, step) in enumerate(pairwise(steps), start=1):
        for now in (before.now, before.now + SECOND):
            if now < step.now:
                yield _with(history, place, _at(step, now))
    for unit in UNITS:
        yield replace(history, steps=tuple(_at(_rounded_down(step, unit), _down(step.now, unit)) for step in steps))
        for place, step in enumerate(steps):
            if place == 0 or _down(step.now, unit) >= steps[place - 1].now:
                yield _with(history, place, _at(step, _down(step.now, unit)))
        for request in _distinct(history):
            yield _one(history, request, replace(request, at=_down(request.at, unit)))
    for step in steps:
        for request in requests_of([step]):
            yield _one(history, request, replace(request, at=step.now))


def _spread(history: History) -> Iterator[History]:
    """What comes after a change of an enrollment comes later, so that times part it from what came before."""
    if is_parted(history):
        return
    for place, step in enumerate(history.steps):
        if isinstance(step, Enrolling) and place:
            now = max(history.steps[place - 1].now, step.now) + SECOND
            later = [_at(_not_before(one, now), max(one.now, now)) for one in history.steps[place:]]
            candidate = replace(history, steps=(*history.steps[:place], *later))
            if is_parted(candidate):
                yield candidate


def _not_before(step: Step, now: datetime) -> Step:
    return rewritten(step, lambda request: replace(request, at=max(request.at, now)))


def _merged(history: History) -> Iterator[History]:
    """One request with the tokens of two that follow one another."""
    for place, (one, other) in enumerate(pairwise(history.steps)):
        if isinstance(one, Asking) and isinstance(other, Asking) and len(one.requests) == len(other.requests) == 1:
            (first,), (second,) = one.requests, other.requests
            tokens = (first.tokens or 0) + (second.tokens or 0)
            if first.account == second.account and second.tokens is not None and tokens <= TOKENS_MAX:
                both = replace(second, input_tokens=tokens, output_tokens=0, cached_tokens=0)
                rest = (*history.steps[:place], replace(other, requests=(both,)), *history.steps[place + 2 :])
                yield replace(history, steps=rest)


def _down(instant: datetime, unit: timedelta) -> datetime:
    return EPOCH + (instant - EPOCH) // unit * unit


def _rounded_down(step: Step, unit: timedelta) -> Step:
    return rewritten(step, lambda request: replace(request, at=_down(request.at, unit)))


def _smaller(history: History) -> Iterator[History]:
    """Fewer tokens: none, one, a half, a round number, one less."""
    for request in _distinct(history):
        tokens = request.tokens
        if not tokens:
            continue
        sizes = [0, 1, *(tokens // part for part in (1_000, 10, 2)), *_rounded(tokens), tokens - 1]
        for size in dict.fromkeys(sizes):
            if 0 <= size < tokens or (size == tokens and request.output_tokens):
                yield _one(history, request, replace(request, input_tokens=size, output_tokens=0, cached_tokens=0))


def _rounded(tokens: int) -> list[int]:
    return [tokens - tokens % 10**power for power in range(len(str(tokens)) - 1, 0, -1)]


def _bare(request: Request) -> Request:
    """A request without project, tools and kind, and all of its tokens in its input."""
    return replace(_whole(request), project=None, tools=(), kind=Kind.COMPLETION)


def _whole(request: Request) -> Request:
    tokens = request.tokens
    if tokens is None:
        return request
    return replace(request, input_tokens=tokens, output_tokens=0, cached_tokens=0)


def _distinct(history: History) -> list[Request]:
    return list(dict.fromkeys(requests_of(history.steps)))


def _enrolled(history: History) -> Iterator[str]:
    for step in history.steps:
        for one in chain.from_iterable(step.lanes) if isinstance(step, Together) else (step,):
            if isinstance(one, Enrolling):
                yield one.account


def _with(history: History, place: int, *steps: Step) -> History:
    return replace(history, steps=(*history.steps[:place], *steps, *history.steps[place + 1 :]))


def _rewritten(history: History, change: Callable[[Request], Request]) -> History:
    return replace(history, steps=tuple(rewritten(step, change) for step in history.steps))


def _one(history: History, old: Request, new: Request) -> History:
    """One request as another, wherever it is asked."""
    return _rewritten(history, lambda request: new if request == old else request)


def _renamed(history: History, accounts: dict[str, str], ids: dict[str, str]) -> History:
    def request(one: Request) -> Request:
        return replace(one, account=accounts.get(one.account, one.account), id=ids.get(one.id, one.id))

    def named(one: S) -> S:
        if isinstance(one, Enrolling | Releasing):
            one = replace(one, account=accounts.get(one.account, one.account))
        return replace(one, request_id=ids.get(one.request_id, one.request_id)) if isinstance(one, Releasing) else one

    def step(one: Step) -> Step:
        one = rewritten(one, request)
        if isinstance(one, Together):
            return replace(one, lanes=tuple(tuple(map(named, lane)) for lane in one.lanes))
        return named(one)

    return replace(history, steps=tuple(map(step, history.steps)))


def _at(step: Step, now: datetime) -> Step:
    """A step at another time, and its requests with it where they came at its time."""
    moved = rewritten(step, lambda request: replace(request, at=now) if request.at == step.now else request)
    if isinstance(moved, Together):
        lanes = tuple(tuple(replace(one, now=now) for one in lane) for lane in moved.lanes)
        return replace(moved, now=now, lanes=lanes)
    return replace(moved, now=now)
