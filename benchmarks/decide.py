"""One decision, and batches of 100 and 1,000, over the bare work underneath: a dict update, a transaction by hand."""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from benchmarks.harness import Contestant, Result, measure, table

from gratis import AsyncMeter, Enrollment, Meter, Request, Sharing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MODEL = "gpt-5-2025-08-07"
START = datetime(2026, 10, 1, tzinfo=UTC)
ALLOWANCE = 1_000_000
ASSUME = Enrollment(tier=3, sharing=Sharing.ENABLED)
MEMORY_ITEMS = 20_000
SQLITE_ITEMS = {1: 500, 100: 5_000, 1_000: 10_000}
TASKS = 64

_LEDGER = """
CREATE TABLE windows (window INTEGER PRIMARY KEY, used INTEGER NOT NULL, seq INTEGER NOT NULL);
CREATE TABLE ledger (entry INTEGER PRIMARY KEY, account INTEGER, id TEXT, terms INTEGER, model TEXT, project TEXT,
  input_tokens INTEGER, output_tokens INTEGER, cached_tokens INTEGER, kind TEXT, tools TEXT, at INTEGER, reason TEXT,
  free_tokens INTEGER, used INTEGER, total INTEGER, window INTEGER, seq INTEGER, decided_at INTEGER,
  UNIQUE (account, id));
INSERT INTO windows VALUES (1, 0, 0);
"""
_INSERT = (
    "INSERT INTO ledger (account, id, terms, model, project, input_tokens, output_tokens, cached_tokens, kind, tools,"
    " at, reason, free_tokens, used, total, window, seq, decided_at) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)"
)
_UPDATE = "UPDATE windows SET used = ?, seq = ? WHERE window = 1"


def run() -> Iterator[str]:
    """Each table as it is ready."""
    yield table("`memory:` over one dict update", memory())
    for synchronous in ("full", "normal"):
        for batch in SQLITE_ITEMS:
            title = f"`sqlite:` synchronous={synchronous}, {'one decision' if batch == 1 else f'batches of {batch:,}'}"
            yield table(f"{title}, over the same transaction by hand", sqlite(synchronous, batch))
    yield table(f"`sqlite:` synchronous=full, {TASKS} at once, over one decision after another", together())


def requests(count: int) -> list[Request]:
    """Requests of one account that fill one window and go past it."""
    return [
        Request(
            id=f"req_{n:032x}", model=MODEL, at=START + timedelta(milliseconds=n), input_tokens=70, output_tokens=30
        )
        for n in range(count)
    ]


def memory() -> list[Result]:
    """The memory store: from `Request` to `Decision`."""
    asked = requests(MEMORY_ITEMS)

    def bare() -> Callable[[], object]:
        used: dict[str, int] = {"default": 0}

        def work() -> None:
            for request in asked:
                used["default"] = used["default"] + 100 if request.id else 0

        return work

    def rule_with_ids() -> Callable[[], object]:
        used: dict[str, int] = {}
        seen: dict[str, tuple[bool, int, int]] = {}
        lock = Lock()

        def decide(request: Request) -> tuple[bool, int, int]:
            with lock:
                first = seen.get(request.id)
                if first is not None:
                    return first
                before = used.get(request.account, 0)
                tokens = (request.input_tokens or 0) + (request.output_tokens or 0)
                fits = tokens <= ALLOWANCE - before
                if fits:
                    used[request.account] = before + tokens
                answer = seen[request.id] = (fits, before, len(seen) + 1)
                return answer

        def work() -> None:
            for request in asked:
                decide(request)

        return work

    return measure(
        Contestant("one dict update", MEMORY_ITEMS, bare),
        [
            Contestant("the rule with ids and a lock, by hand", MEMORY_ITEMS, rule_with_ids),
            Contestant("`decide`", MEMORY_ITEMS, lambda: _gratis("memory:", asked, 1)),
            Contestant("`decide_many`, 100", MEMORY_ITEMS, lambda: _gratis("memory:", asked, 100)),
            Contestant("`decide_many`, 1,000", MEMORY_ITEMS, lambda: _gratis("memory:", asked, 1_000)),
        ],
    )


def sqlite(synchronous: str, batch: int) -> list[Result]:
    """SQLite, at a named synchronous level: what it does beyond one INSERT and one UPDATE in a transaction."""
    asked = requests(SQLITE_ITEMS[batch])
    with tempfile.TemporaryDirectory() as folder:
        numbers = iter(range(1_000_000))

        def by_hand() -> Callable[[], object]:
            return _by_hand(Path(folder) / f"hand{next(numbers)}.db", synchronous, asked, batch)

        def gratis() -> Callable[[], object]:
            return _gratis(f"sqlite:///{folder}/g{next(numbers)}.db?synchronous={synchronous}", asked, batch)

        return measure(
            Contestant("INSERT and UPDATE by hand", len(asked), by_hand),
            [Contestant("`decide`" if batch == 1 else f"`decide_many`, {batch:,}", len(asked), gratis)],
        )


def together() -> list[Result]:
    """Threads and tasks that decide at once share commits."""
    asked = requests(SQLITE_ITEMS[1])
    with tempfile.TemporaryDirectory() as folder:
        numbers = iter(range(1_000_000))

        def url() -> str:
            return f"sqlite:///{folder}/t{next(numbers)}.db"

        def threads() -> Callable[[], object]:
            meter = Meter.open(url(), assume=ASSUME, bounds=None)
            pool = ThreadPoolExecutor(TASKS)
            return lambda: list(pool.map(meter.decide, asked))

        def tasks() -> Callable[[], object]:
            return lambda: asyncio.run(_tasks(url(), asked))

        return measure(
            Contestant("`decide`, one after another", len(asked), lambda: _gratis(url(), asked, 1)),
            [
                Contestant(f"`decide`, {TASKS} threads", len(asked), threads),
                Contestant(f"`AsyncMeter.decide`, {TASKS} tasks, opening included", len(asked), tasks),
            ],
        )


async def _tasks(url: str, asked: list[Request]) -> None:
    async with AsyncMeter.open(url, assume=ASSUME, bounds=None) as meter:
        gate = asyncio.Semaphore(TASKS)

        async def one(request: Request) -> None:
            async with gate:
                await meter.decide(request)

        await asyncio.gather(*[one(request) for request in asked])


def _gratis(url: str, asked: list[Request], batch: int) -> Callable[[], object]:
    meter = Meter.open(url, assume=ASSUME, bounds=None)
    warm = Request(id="warm", model=MODEL, at=START, input_tokens=0, output_tokens=0)
    meter.decide(warm)

    def work() -> None:
        if batch == 1:
            for request in asked:
                meter.decide(request)
        else:
            for first in range(0, len(asked), batch):
                meter.decide_many(asked[first : first + batch])

    return work


def _by_hand(path: Path, synchronous: str, asked: list[Request], batch: int) -> Callable[[], object]:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    connection.executescript(_LEDGER)
    at = int(START.timestamp() * 1e6)
    rows = [
        (1, r.id, 1, r.model, None, 70, 30, 0, "completion", None, at, "within_allowance", 100, n, n, 1, n, at)
        for n, r in enumerate(asked, start=1)
    ]

    def work() -> None:
        for first in range(0, len(rows), batch):
            part = rows[first : first + batch]
            connection.execute("BEGIN IMMEDIATE")
            if batch == 1:
                connection.execute(_INSERT, part[0])
            else:
                connection.executemany(_INSERT, part)
            connection.execute(_UPDATE, (part[-1][13], part[-1][16]))
            connection.execute("COMMIT")

    return work
