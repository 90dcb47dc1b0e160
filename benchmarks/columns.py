"""`gratis replay` of Parquet, over reading the same columns of the same file alone; memory and disk beside it.

Each round runs in a process of its own, so that its peak of memory is its own: first it reads the columns alone, then
it judges them. What is compiled is loaded before the clock starts, as it is from the second run on.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gratis.audit.columns.behind import Behind
from gratis.audit.columns.logs import BATCH_ROWS, IDS, Log
from gratis.audit.columns.repeats import NO_REPEATS, Finder
from gratis.audit.columns.tables import Judge
from gratis.audit.columns.writing import lines_of, parquet
from gratis.model import Enrollment, Sharing
from gratis.offers import load

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROWS = 10_000_000
QUICK_ROWS = 1_000_000
ROUNDS = 3
ACCOUNTS = 20_000
GROUP_ROWS = 1 << 20
DAYS = 30
FIRST = np.datetime64("2025-04-17T00:00:00", "us").astype(np.int64)
SPAN = DAYS * 86_400_000_000
LATE = 50  # so many rows' time lie those apart that come in another order
ID_BYTES = 32
REPEATED_EVERY = 1_000
MODELS = {
    "gpt-4.1-2025-04-14": 0.3,
    "gpt-4o-mini-2024-07-18": 0.3,
    "gpt-4o-2024-08-06": 0.2,
    "o3-2025-04-16": 0.1,
    "gpt-4o": 0.05,
    "text-embedding-3-small": 0.05,
}
JUDGED = ("account", "model", "at", "input_tokens", "output_tokens")
WORKS = {
    "totals": "totals, ids trusted (`--totals --trust-ids`)",
    "totals, ids": "totals, ids looked through (`--totals`)",
    "decisions": "decisions as columns, ids looked through, none kept",
    "parquet": "decisions to Parquet, ids looked through (`--out x.parquet`)",
    "lines": "decisions as JSON lines, ids looked through (the default)",
}


def write(path: Path, rows: int, *, seed: int = 20_250_417) -> None:
    """A log of so many rows: few accounts send much, times are almost in order, some ids come twice."""
    chance = np.random.default_rng(seed)
    accounts = pa.array([f"org-{number:05d}" for number in range(ACCOUNTS)])
    schema = pa.schema(
        {
            "id": pa.string(),
            "account": pa.dictionary(pa.int32(), pa.string()),
            "model": pa.dictionary(pa.int32(), pa.string()),
            "input_tokens": pa.int64(),
            "output_tokens": pa.int64(),
            "at": pa.timestamp("us", "UTC"),
        }
    )
    coded = ["account", "model", "input_tokens", "output_tokens"]
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=coded) as file:
        for begin in range(0, rows, GROUP_ROWS):
            size = min(GROUP_ROWS, rows - begin)
            places = np.arange(begin, begin + size) + chance.random(size) * LATE
            columns = [
                _ids(chance, size),
                pa.DictionaryArray.from_arrays(
                    pa.array((chance.random(size) ** 2 * ACCOUNTS).astype(np.int32)), accounts
                ),
                pa.DictionaryArray.from_arrays(
                    pa.array(chance.choice(len(MODELS), size, p=list(MODELS.values())).astype(np.int32)),
                    pa.array(list(MODELS)),
                ),
                pa.array(chance.lognormal(7, 1.2, size).astype(np.int64)),
                pa.array(chance.lognormal(5.5, 1, size).astype(np.int64)),
                pa.array(FIRST + (places * (SPAN / (rows + LATE))).astype(np.int64)).view(pa.timestamp("us", "UTC")),
            ]
            batch = pa.RecordBatch.from_arrays(columns, schema=schema)
            file.write_batch(batch, row_group_size=GROUP_ROWS)
            if begin + size < rows:
                file.write_batch(batch.slice(0, max(1, size // REPEATED_EVERY)))  # a retry is the same row once more


def _ids(chance: np.random.Generator, size: int) -> pa.Array:
    """Ids of 32 hexadecimal digits."""
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)[chance.integers(0, 16, size * ID_BYTES, dtype=np.uint8)]
    offsets = np.arange(0, (size + 1) * ID_BYTES, ID_BYTES, dtype=np.int32)
    return pa.Array.from_buffers(pa.string(), size, [None, pa.py_buffer(offsets), pa.py_buffer(digits)])


def read(path: Path, fields: Sequence[str]) -> float:
    """The seconds that reading these columns alone takes."""
    start = perf_counter()
    with pq.ParquetFile(path, read_dictionary=["account", "model"], pre_buffer=False) as file:
        for _ in file.iter_batches(BATCH_ROWS, columns=list(fields), use_threads=True):
            pass
    return perf_counter() - start


def judge(path: Path, work: str, out: Path) -> tuple[float, int]:
    """The seconds that judging takes, and how many rows were said again."""
    start, log = perf_counter(), Log([path])
    with Finder() as finder:
        repeats = NO_REPEATS
        if work != "totals":
            for batch in log.batches(fields=IDS):
                finder.add(batch)
            repeats = finder.found(lambda: log.batches(fields=IDS))
        judges = Judge(load("openai-data-sharing"), assume=Enrollment(tier=3, sharing=Sharing.ENABLED), repeats=repeats)
        if work in {"totals", "totals, ids"}:
            for batch in log.batches(fields=JUDGED if work == "totals" else ("id", *JUDGED)):
                judges.add(batch)
        else:
            _decide(judges, log, work, out)
        return perf_counter() - start, judges.replayed


def _decide(judges: Judge, log: Log, work: str, out: Path) -> None:
    """Decide each row, and write it down."""
    found = (judges.decide(batch) for batch in log.batches(fields=("id", *JUDGED)))
    if work == "parquet":
        with parquet(out) as file, Behind(file.write_batch) as behind:
            for batch in found:
                behind.put(batch)
    elif work == "lines":
        with out.open("wb") as lines, Behind(lambda batch: lines.writelines(lines_of(batch))) as behind:
            for batch in found:
                behind.put(batch)
    else:
        for _ in found:
            pass


def once(path: Path, work: str) -> dict[str, Any]:
    """One round, in this process: the columns alone, then the work over them."""
    import resource  # noqa: PLC0415 - not on every system, and of use only here

    with tempfile.TemporaryDirectory() as folder:
        warm = Path(folder) / "warm.parquet"
        write(warm, 1_000)
        judge(warm, work, Path(folder) / "out")
        begin = process_time()
        alone = read(path, JUDGED if work == "totals" else ("id", *JUDGED))
        between = process_time()
        seconds, replayed = judge(path, work, Path(folder) / "out")
        work_ratio = (process_time() - between) / (between - begin)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"alone": alone, "seconds": seconds, "work": work_ratio, "peak": peak, "replayed": replayed}


def run(*, is_quick: bool = False, rows: int | None = None, works: Sequence[str] = tuple(WORKS)) -> Iterator[str]:
    """The table."""
    size = rows or (QUICK_ROWS if is_quick else ROWS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.parquet"
        write(path, size)
        head = "| work | M rows/s | × reading the same columns | lowest – highest | × its CPU time | peak of memory |"
        lines = [f"### `gratis replay` of {size:,} rows of Parquet", "", head, "|---|---:|---:|---:|---:|---:|"]
        for work in works:
            rounds = [_round(path, work) for _ in range(ROUNDS)]
            ratios = [one["seconds"] / one["alone"] for one in rounds]
            speed = size / median(one["seconds"] for one in rounds) / 1e6
            peak = max(one["peak"] for one in rounds) / 2**20
            lines.append(
                f"| {WORKS[work]} | {speed:.1f} | {median(ratios):.2f} | {min(ratios):.2f} – {max(ratios):.2f}"
                f" | {median(one['work'] for one in rounds):.2f} | {peak:,.0f} MiB |"
            )
    yield "\n".join(lines)


def _round(path: Path, work: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.columns", str(path), work]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)  # noqa: S603 - ourselves
    return found


if __name__ == "__main__":
    print(json.dumps(once(Path(sys.argv[1]), sys.argv[2])))
