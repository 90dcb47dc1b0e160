"""`gratis replay` of JSON lines, over reading and decoding the same file alone with the same decoder."""

from __future__ import annotations

import json
import random
import sys
import tempfile
from contextlib import redirect_stdout
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import Contestant, measure, table

from gratis.cli import main
from gratis.lines import decode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LINES = 200_000
ROUNDS = 3
MODELS = ("gpt-4.1-2025-04-14", "gpt-4o-mini-2024-07-18", "o3-2025-04-16", "gpt-4o", "text-embedding-3-small")


def run() -> Iterator[str]:
    """The table."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        _write(log)

        def floor() -> Callable[[], object]:
            def work() -> None:
                with log.open("rb") as file:
                    for line in file:
                        decode(line)

            return work

        def standard() -> Callable[[], object]:
            def work() -> None:
                with log.open("rb") as file:
                    for line in file:
                        json.loads(line)

            return work

        def replay() -> Callable[[], object]:
            def work() -> None:
                with (Path(folder) / "out.jsonl").open("w") as out, redirect_stdout(out):
                    if main(["replay", str(log), "--tier", "3"]) != 0:
                        sys.exit("the replay failed")

            return work

        results = measure(
            Contestant("reading and decoding alone (msgspec)", LINES, floor),
            [
                Contestant("reading and decoding alone (json)", LINES, standard),
                Contestant("`gratis replay`, a decision line each", LINES, replay),
            ],
            rounds=ROUNDS,
        )
    yield table(f"`gratis replay` of {LINES:,} JSON lines, over decoding them", results)


def _write(log: Path) -> None:
    chance = random.Random(20250417)  # noqa: S311 - the same log each time, no secret
    at = datetime(2025, 4, 17, tzinfo=UTC)
    with log.open("w") as file:
        for n in range(LINES):
            at += timedelta(seconds=1.3)
            line = {
                "id": f"req_{n:032x}",
                "account": f"org-{n % 50}",
                "project": "p1",
                "model": chance.choice(MODELS),
                "input_tokens": chance.randrange(5000),
                "output_tokens": chance.randrange(2000),
                "at": at.isoformat().replace("+00:00", "Z"),
                "kind": "completion",
            }
            file.write(json.dumps(line) + "\n")
