"""A hold and its settle beside one decision, on each store; and with thousands of other holds on the same account."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.harness import Contestant, Result, measure, table
from tests.servers import Server

from gratis import Enrollment, Meter, Request, Sharing, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MODEL = "gpt-5-2025-08-07"
NOW = datetime(2026, 10, 1, 12, tzinfo=UTC)
ASSUME = Enrollment(tier=3, sharing=Sharing.ENABLED)
USED = Usage(input_tokens=70, output_tokens=30)
BOUND = 400
MANY = 5_000
ITEMS = {"memory:": 5_000, "sqlite": 300, "redis": 1_000}


def run(*, program: Path | None = None) -> Iterator[str]:
    """Each table as it is ready."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        numbers = iter(range(1_000_000))
        yield table("`memory:` over one decision", against("memory:", lambda: "memory:"))
        for synchronous in ("full", "normal"):
            url = f"sqlite:///{folder}/{{}}.db?synchronous={synchronous}"
            found = against("sqlite", partial(_numbered, url, numbers))
            yield table(f"`sqlite:` synchronous={synchronous}, over one decision", found)
        server = stack.enter_context(Server(program))
        url = f"unix://{server.address}?namespace=n{{}}"
        yield table("`redis:` over one decision", against("redis", partial(_numbered, url, numbers)))


def against(store: str, url: Callable[[], str]) -> list[Result]:
    """One store: a decision, a hold that is released, a hold that is settled, and that among many others."""
    items = ITEMS[store]

    def opened(others: int = 0) -> Meter:
        meter = Meter.open(url(), assume=ASSUME, clock=lambda: NOW)
        for n in range(others):
            meter.hold(_request(f"other {n}"), 1, for_=timedelta(hours=1))
        return meter

    def deciding() -> Callable[[], object]:
        meter, asked = opened(), [_request(f"req {n}", 70, 30) for n in range(items)]
        return lambda: [meter.decide(request) for request in asked]

    def settling(others: int = 0) -> Callable[[], object]:
        meter, asked = opened(others), [_request(f"req {n}") for n in range(items)]
        return lambda: [meter.settle(meter.hold(request, BOUND), USED) for request in asked]

    def releasing() -> Callable[[], object]:
        meter, asked = opened(), [_request(f"req {n}") for n in range(items)]
        return lambda: [meter.release(meter.hold(request, BOUND)) for request in asked]

    return measure(
        Contestant("`decide`", items, deciding),
        [
            Contestant("`hold` + `settle`", items, settling),
            Contestant(f"`hold` + `settle`, {MANY:,} others held", items, lambda: settling(MANY)),
            Contestant("`hold` + `release`", items, releasing),
        ],
        rounds=5,
    )


def _numbered(url: str, numbers: Iterator[int]) -> str:
    return url.format(next(numbers))


def _request(name: str, given: int | None = None, made: int | None = None) -> Request:
    return Request(id=name, model=MODEL, at=NOW, input_tokens=given, output_tokens=made)
