"""`python -m benchmarks [PART…] [--out FILE]`: print the tables of the parts, or of all, and write them, too."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import audit, columns, decide, holds, on_redis, replay
from benchmarks.harness import machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PARTS = ("decide", "replay", "columns", "audit", "holds", "redis")


def main() -> None:
    """Run the parts that are asked for, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("part", nargs="*", choices=[[], *PARTS], help="which to run (default: all)")
    parser.add_argument("--out", "--write", type=Path, metavar="FILE", help="write the tables to this file, too")
    parser.add_argument(
        "--quick", action="store_true", help="redis: fewer rounds, and 100,000 where it would be 1,000,000; columns: 1M"
    )
    parser.add_argument("--rows", type=int, metavar="N", help="columns: so many rows (default: 10,000,000)")
    parser.add_argument(
        "--server", type=Path, metavar="PATH", help="redis: the server's program (default: one is found)"
    )
    arguments = parser.parse_args()
    runs: dict[str, Callable[[], Iterator[str]]] = {
        "decide": decide.run,
        "replay": replay.run,
        "audit": audit.run,
        "columns": partial(columns.run, is_quick=arguments.quick, rows=arguments.rows),
        "holds": partial(holds.run, program=arguments.server),
        "redis": partial(on_redis.run, program=arguments.server, is_quick=arguments.quick),
    }
    text = [machine()]
    print(text[0], flush=True)
    for part in arguments.part or PARTS:
        for table in runs[part]():
            print(f"\n{table}", flush=True)
            text.append(table)
    if arguments.out is not None:
        arguments.out.write_text("\n\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
