"""Rounds, medians, ratios: every figure stands beside its floor, measured in the same rounds.

The machines are noisy, so the rounds of all contestants are interleaved and a ratio is taken within a round; what is
reported is its median, with the lowest and highest round beside it.
"""

from __future__ import annotations

import gc
import platform
import sqlite3
import statistics
import sys
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROUNDS = 7


class Contestant(NamedTuple):
    """One way to do the work: `prepare` makes a fresh state and returns what is timed, for so many items."""

    name: str
    items: int
    prepare: Callable[[], Callable[[], object]]


class Result(NamedTuple):
    """Medians over the rounds, per item."""

    name: str
    micros: float
    ratio: float
    lowest: float
    highest: float


def measure(floor: Contestant, others: Sequence[Contestant], *, rounds: int = ROUNDS) -> list[Result]:
    """Each contestant's time an item, and its ratio to the floor."""
    times: dict[str, list[float]] = {contestant.name: [] for contestant in (floor, *others)}
    for _ in range(rounds):
        for contestant in (floor, *others):
            work = contestant.prepare()
            gc.collect()
            start = perf_counter()
            work()
            times[contestant.name].append((perf_counter() - start) / contestant.items * 1e6)
    results = []
    for name, taken in times.items():
        ratios = [ours / base for ours, base in zip(taken, times[floor.name], strict=True)]
        results.append(Result(name, statistics.median(taken), statistics.median(ratios), min(ratios), max(ratios)))
    return results


def table(title: str, results: Sequence[Result]) -> str:
    """The results as Markdown."""
    lines = [f"### {title}", "", "| work | µs each | × floor | lowest – highest round |", "|---|---:|---:|---:|"]
    lines += [
        f"| {result.name} | {result.micros:.2f} | {result.ratio:.2f} | {result.lowest:.2f} – {result.highest:.2f} |"
        for result in results
    ]
    return "\n".join(lines)


def machine() -> str:
    """What it was measured on."""
    return (
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, {platform.machine()},"
        f" {sys.platform}; median of {ROUNDS} interleaved rounds"
    )
