"""What the clauses share: small offers, requests, views on one store under one clock, and threads."""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, Self

from gratis.meter import Meter
from gratis.model import Counts, Enrollment, Overage, Request, Sharing, Usage
from gratis.offer_file import parse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from types import TracebackType

    from gratis.offer import Offer
    from gratis.stores import Bounds, Store

NOON = datetime(2025, 4, 20, 12, tzinfo=UTC)
TICK = timedelta(microseconds=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
LARGE, SMALL = "large-1", "small-1"
ALLOWANCE = 1_000
ENROLLED = Enrollment(tier=3, sharing=Sharing.ENABLED)
FULL = Enrollment(
    tier=4,
    sharing=Sharing.SELECTED,
    projects=frozenset({"p", "a}{b", "\u202e\u05d0", "Caf\u00e9", "Cafe\u0301", " ", "'\"\\"}),
    plan="team",
    zero_data_retention=True,
    starts=NOON - TICK,
    ends=NOON + HOUR,
    owners=frozenset({"ann", "{x}", "\u05d0"}),
)

CALENDARS = {
    "day": '{ kind = "calendar", span = "day", zone = "UTC" }',
    "week": '{ kind = "calendar", span = "week", zone = "America/New_York", week_starts = "sunday" }',
    "month": '{ kind = "calendar", span = "month", zone = "Asia/Kathmandu" }',
}
WINDOWS = {**CALENDARS, "rolling": '{ kind = "rolling", hours = 24 }'}
READINGS: Mapping[str, tuple[str, str]] = {
    f"{counts}-{overage}": (counts.value, overage.value) for counts in Counts for overage in Overage
}

_OFFER = """
name = "{name}"
title = "A small offer to try a store with"
account = "account"
[[revisions]]
from = 2025-01-01
source = "the store contract"
window = {window}
counts = "{counts}"
overage = "{overage}"
reasons = [
  "not_enrolled", "account_not_eligible", "sharing_disabled", "project_not_shared", "fine_tuning_training", "evals",
  "fine_tuned_model", "model_not_listed", "tool_use", "unmeasured",
]
client_side_tools = ["function"]
excluded_plans = ["enterprise"]
fine_tuned_prefix = "ft:"
[revisions.groups.large]
unit = "{unit}"
allowance = {{ "1-2" = {low}, "3-5" = {high} }}
models = ["large-1", "large-2"]
[revisions.groups.small]
unit = "{unit}"
allowance = {{ "1-2" = {low}, "3-5" = {high} }}
models = ["small-1"]
"""


class Opener(Protocol):
    """Opens one more view on the same store, as another process would.

    Within a clause every view is given the same clock and the same bounds.
    """

    def __call__(self, *, clock: Callable[[], datetime], bounds: Bounds | None) -> Store:
        """One more view."""
        ...


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self, now: datetime = NOON) -> None:
        self.now = now

    def __call__(self) -> datetime:
        """What it shows."""
        return self.now


class Views:
    """Views on one store under one clock, opened when they are asked for, closed at the end."""

    def __init__(self, open_store: Opener, *, bounds: Bounds | None = None) -> None:
        self.clock = Clock()
        self._open_store = open_store
        self._bounds = bounds
        self._stores: dict[int, Store] = {}

    def store(self, view: int = 0) -> Store:
        """One of the views."""
        if view not in self._stores:
            self._stores[view] = self._open_store(clock=self.clock, bounds=self._bounds)
        return self._stores[view]

    def meter(self, offer: Offer | None = None, *, view: int = 0, assume: Enrollment | None = ENROLLED) -> Meter:
        """A meter before one of the views."""
        return Meter(self.store(view), small_offer() if offer is None else offer, assume=assume)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for store in self._stores.values():
            store.close()


@lru_cache(maxsize=256)
def small_offer(
    window: str = "day",
    *,
    unit: str = "tokens",
    reading: tuple[str, str] = ("free", "whole"),
    allowance: int = ALLOWANCE,
    name: str = "small-offer",
) -> Offer:
    """An offer of two groups, of the same allowance each; a fourth of it in tiers 1 and 2."""
    counts, overage = reading
    text = _OFFER.format(
        name=name,
        window=WINDOWS[window],
        counts=counts,
        overage=overage,
        unit=unit,
        low=allowance // 4,
        high=allowance,
    )
    return parse(text, file=name)


def asked(name: object, tokens: int | None = 10, **fields: Any) -> Request:
    """A request at noon, but for these fields."""
    usual = {"id": f"r{name}", "account": "acme", "model": LARGE, "at": NOON}
    return Request(**{**usual, "input_tokens": tokens, "output_tokens": 0, **fields})


def spent(tokens: int | None, **fields: Any) -> Usage:
    """What a provider said that a request used."""
    return Usage(**{"input_tokens": tokens, "output_tokens": 0, **fields})


def in_threads(jobs: Sequence[Callable[[], Iterable[Any]]]) -> list[Any]:
    """What the jobs gave, each run in a thread of its own, all from one start; threads take turns very often."""
    start = threading.Barrier(len(jobs))
    given: list[Any] = []
    failed: list[BaseException] = []

    def run(job: Callable[[], Iterable[Any]]) -> None:
        try:
            start.wait()
            given.extend(job())
        except BaseException as error:  # noqa: BLE001 - told to the clause below
            failed.append(error)

    with _eager_switches():
        threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for error in failed:
        raise error
    return given


@contextmanager
def _eager_switches() -> Iterator[None]:
    usual = sys.getswitchinterval()
    sys.setswitchinterval(usual / 1_000)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)
