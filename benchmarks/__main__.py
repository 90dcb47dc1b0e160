"""`python -m benchmarks [decide] [replay] [--write FILE]`: print the tables, and write them as Markdown."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import decide, replay
from benchmarks.harness import machine

PARTS = {"decide": decide.run, "replay": replay.run}


def main() -> None:
    """Run the parts that are asked for, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("part", nargs="*", choices=[[], *PARTS], help="which to run (default: all)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the tables to this file, too")
    arguments = parser.parse_args()
    text = [machine()]
    print(text[0], flush=True)
    for part in arguments.part or PARTS:
        for table in PARTS[part]():
            print(f"\n{table}", flush=True)
            text.append(table)
    if arguments.write is not None:
        arguments.write.write_text("\n\n".join(text) + "\n", encoding="utf-8")


main()
