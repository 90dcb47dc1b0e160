"""Whether a live store answers as the pure rule does: generated histories, asked of it in spaces of their own.

`check` is what `gratis audit --properties` runs, for stores of one's own, too:

    report = check(lambda space, *, clock, bounds: MyStore(space, clock=clock, bounds=bounds), seed=1, steps=4_000)
    assert report.failure is None, report.failure

A view on the same space is a view on the same store; one of a space that nobody used before is empty.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import nullcontext, suppress
from itertools import count
from typing import TYPE_CHECKING

from msgspec import Struct

from gratis.audit.properties.choosing import history_of
from gratis.audit.properties.driving import Failure, Opener, Run
from gratis.audit.properties.histories import History, apart, cut
from gratis.audit.properties.namespaces import new_space
from gratis.audit.properties.shrinking import shrunk
from gratis.errors import StoreError
from gratis.offers import DEFAULT_OFFER, load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gratis.offer import Offer

__all__ = ["Failure", "History", "Opener", "Report", "check"]

MINUTE_S = 60.0
SHRINKING_S = 30.0
TRIES = 8  # of a history that may be answered in several ways


class Report(Struct, frozen=True):
    """What was asked, how often, and the smallest history that fails, if one does."""

    seed: int
    steps: int
    histories: int
    counts: dict[str, int]
    offer: Offer
    failure: Failure | None = None
    history: History | None = None
    shrunk_from: int = 0


def check(
    open_store: Opener,
    *,
    seed: int,
    steps: int | None,
    minutes: float | None = None,
    offer: Offer | None = None,
    drop: Callable[[str], None] | None = None,
    tell: Callable[[int], None] | None = None,
    shrinking_s: float = SHRINKING_S,
) -> Report:
    """Ask a store a seed's histories until so many steps, or minutes, are over; the first failure ends it.

    `drop` removes a space; `tell` hears how many steps were asked. With neither bound it never ends but by a failure.
    """
    known = load(DEFAULT_OFFER) if offer is None else offer
    checked = _Checked(open_store, known, drop or _leave)
    ends = None if minutes is None else time.monotonic() + minutes * MINUTE_S
    number = 0
    for history in _histories(seed, known):
        if steps is not None:
            history = cut(history, steps - checked.steps)  # noqa: PLW2901 - as much of it as is wanted
        if not history.steps or _is_over(ends):
            break
        before = checked.steps
        failure = checked.failure(history, lambda: _is_over(ends))
        number += 1
        if tell is not None:
            tell(checked.steps - before)
        if failure is not None:
            asked, counts = checked.steps, dict(checked.seen)
            small, failure = _smallest(checked, history, failure, time.monotonic() + shrinking_s)
            return Report(seed, asked, number, counts, known, failure, small, history.size)
    return Report(seed, checked.steps, number, dict(checked.seen), known)


def _histories(seed: int, offer: Offer) -> Iterator[History]:
    """A seed's histories; those of callers at once first with callers who take turns.

    So whatever is wrong without threads is found in the same place always, and only a race depends on luck.
    """
    for number in count():
        history = history_of(seed, number, offer)
        yield apart(history)
        if history.is_concurrent:
            yield history


class _Checked:
    """Histories asked of one store, each in a space of its own; what that counts up to."""

    def __init__(self, open_store: Opener, offer: Offer, drop: Callable[[str], None]) -> None:
        self.seen: Counter[str] = Counter()
        self.steps = 0
        self._open_store = open_store
        self._offer = offer
        self._drop = drop

    def failure(self, history: History, is_over: Callable[[], bool] = lambda: False) -> Failure | None:
        """Where a history fails; its space is removed, whatever happens."""
        space = new_space()
        run = Run(history, self._offer, self._open_store, space)
        try:
            return run.failure(is_over)
        finally:
            self.seen += run.seen
            self.steps += run.steps
            # Of a store that never opened there is hardly anything to remove, and its own error says more.
            with nullcontext() if run.has_opened else suppress(StoreError):
                self._drop(space)


def _smallest(checked: _Checked, history: History, failure: Failure, ends: float) -> tuple[History, Failure]:
    """The smallest history that fails in the same way, and how it does; an interrupt ends the search for it."""
    known, wanted = {history: failure}, failure.kind

    def fails(candidate: History) -> bool:
        nonlocal wanted
        for _ in range(TRIES if candidate.is_concurrent else 1):
            try:
                found = checked.failure(candidate)
            except StoreError:  # what is known already is told all the same
                return False
            # What is wrong with a hold is easier to see in a decision.
            if found is not None and (found.kind == wanted or (wanted[0], found.what) == ("hold", "decision")):
                known[candidate], wanted = found, found.kind
                return True
            if _is_over(ends):
                return False
        return False

    with suppress(KeyboardInterrupt):
        shrunk(history, fails, lambda: _is_over(ends))
    return list(known.items())[-1]


def _is_over(ends: float | None) -> bool:
    return ends is not None and time.monotonic() >= ends


def _leave(_space: str) -> None:
    """Whoever opened it removes it."""
