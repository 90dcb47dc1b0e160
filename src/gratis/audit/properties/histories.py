"""What a history is: plain steps that are asked of a store, each at a time of the store's clock.

A step carries its own time, so that it means the same when others before it are taken away.
"""

from __future__ import annotations

from collections.abc import Callable  # noqa: TC003 - a field of a struct
from datetime import datetime, timedelta  # noqa: TC003 - fields of structs
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from gratis.model import Counts, Enrollment, Overage, Request  # noqa: TC001 - fields of structs
from gratis.stores import Bounds

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gratis.offer import Offer


class Enrolling(Struct, frozen=True):
    """An account's enrollment is changed."""

    now: datetime
    account: str
    enrollment: Enrollment
    actor: str
    view: int = 0


class Asking(Struct, frozen=True):
    """Requests are decided: one, or several in one call."""

    now: datetime
    requests: tuple[Request, ...]
    view: int = 0
    is_batch: bool = False


class Holding(Struct, frozen=True):
    """Tokens are set aside for a request, for a time."""

    now: datetime
    request: Request
    lasting: timedelta
    view: int = 0


class Settling(Struct, frozen=True):
    """A request that was held is decided by what it used."""

    now: datetime
    request: Request
    view: int = 0


class Releasing(Struct, frozen=True):
    """A hold is given back."""

    now: datetime
    account: str
    request_id: str
    view: int = 0


class Reopening(Struct, frozen=True):
    """One view is closed and opened again, as when a process ends and another starts."""

    now: datetime
    view: int = 0


class Together(Struct, frozen=True):
    """Several callers at once, each with steps of its own; the clock stands still."""

    now: datetime
    lanes: tuple[tuple[Enrolling | Asking, ...], ...]


Step = Enrolling | Asking | Holding | Settling | Releasing | Reopening | Together


class History(Struct, frozen=True):
    """The steps, and under which reading and which bounds they are asked."""

    steps: tuple[Step, ...]
    counts: Counts | None = None
    overage: Overage | None = None
    bounds: Bounds = Bounds()

    def offer(self, offer: Offer) -> Offer:
        """The offer under this history's reading."""
        return offer.reading(counts=self.counts, overage=self.overage)

    @property
    def size(self) -> int:
        """How many steps are asked, those of each caller counted."""
        return sum(sum(map(len, step.lanes)) if isinstance(step, Together) else 1 for step in self.steps)

    @property
    def is_concurrent(self) -> bool:
        """Whether several callers ask at once: then the same history may be answered in several ways."""
        return any(isinstance(step, Together) for step in self.steps)


def apart(history: History) -> History:
    """The same steps with callers who take turns: what is asked and answered then depends on no threads."""
    steps: list[Step] = []
    for step in history.steps:
        if isinstance(step, Together):
            turns = max(map(len, step.lanes))
            steps += [lane[turn] for turn in range(turns) for lane in step.lanes if turn < len(lane)]
        else:
            steps.append(step)
    return replace(history, steps=tuple(steps))


def cut(history: History, steps: int) -> History:
    """A history's beginning, of at most so many steps."""
    left, kept = steps, 0
    for step in history.steps:
        left -= sum(map(len, step.lanes)) if isinstance(step, Together) else 1
        if left < 0:
            break
        kept += 1
    return replace(history, steps=history.steps[:kept])


def requests_of(steps: Sequence[Step]) -> Iterator[Request]:
    """Each request that steps ask about."""
    for step in steps:
        if isinstance(step, Asking):
            yield from step.requests
        elif isinstance(step, Holding | Settling):
            yield step.request
        elif isinstance(step, Together):
            for lane in step.lanes:
                yield from requests_of(lane)


def rewritten(step: Step, change: Callable[[Request], Request]) -> Step:
    """A step with other requests."""
    if isinstance(step, Asking):
        return replace(step, requests=tuple(map(change, step.requests)))
    if isinstance(step, Holding | Settling):
        return replace(step, request=change(step.request))
    if isinstance(step, Together):
        return replace(step, lanes=tuple(tuple(rewritten(one, change) for one in lane) for lane in step.lanes))
    return step
