"""`gratis audit`, over decoding the same ledger alone; four readings over one; and the chain, over its hash alone."""

from __future__ import annotations

import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from datetime import UTC, datetime, timedelta
from hashlib import sha1
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import Contestant, measure, table

from gratis import Enrollment, Meter, Request, Sharing
from gratis.chain import UNCHAINED, Stems, id_bytes, link, rest_of, verdict_of
from gratis.cli import main
from gratis.lines import decode, encode, entry_line, request_line
from gratis.model import micros
from gratis.offers import load
from gratis.stores.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.harness import Result

    from gratis.model import Entry

ENTRIES = 50_000
ROUNDS = 3
CHAINED = 20_000
BATCH = 10_000
MODELS = ("gpt-4.1-2025-04-14", "gpt-4o-mini-2024-07-18", "o3-2025-04-16", "gpt-4o")


def run() -> Iterator[str]:
    """The tables."""
    entries = _entries()
    with tempfile.TemporaryDirectory() as folder:
        ledger = Path(folder) / "ledger.jsonl"
        ledger.write_bytes(b"".join(encode(entry_line(entry)) + b"\n" for entry in entries))

        def floor() -> Callable[[], object]:
            return lambda: [decode(line) for line in ledger.open("rb")]

        def audit(*more: str) -> Callable[[], Callable[[], object]]:
            def work() -> None:
                with (Path(folder) / "out").open("w") as out, redirect_stdout(out), redirect_stderr(out):
                    if main(["audit", str(ledger), *more]) != 0:
                        sys.exit("the audit failed")

            return lambda: work

        results = measure(
            Contestant("reading and decoding alone (msgspec)", ENTRIES, floor),
            [
                Contestant("`gratis audit`", ENTRIES, audit()),
                Contestant("`gratis audit --html`", ENTRIES, audit("--html", str(Path(folder) / "page.html"))),
            ],
            rounds=ROUNDS,
        )
        log = Path(folder) / "log.jsonl"
        log.write_bytes(b"".join(encode(request_line(entry.decision.request)) + b"\n" for entry in entries))

        def command(*words: str) -> Callable[[], Callable[[], object]]:
            def work() -> None:
                with (Path(folder) / "out").open("w") as out, redirect_stdout(out):
                    if main([words[0], str(log), "--tier", "3", *words[1:]]) != 0:
                        sys.exit(f"{words[0]} failed")

            return lambda: work

        sides = measure(
            Contestant("`gratis replay --totals`: one reading", ENTRIES, command("replay", "--totals")),
            [
                Contestant("`gratis readings`: four", ENTRIES, command("readings")),
                Contestant("`gratis readings --models`", ENTRIES, command("readings", "--models")),
            ],
            rounds=ROUNDS,
        )
    yield table(f"`gratis audit` of {ENTRIES:,} entries, over decoding them", results)
    yield table(f"Readings side by side of {ENTRIES:,} requests, over one of them", sides)
    yield table("A link of the chain, over its hash alone", _links(entries[:CHAINED]))


def _links(entries: list[Entry]) -> list[Result]:
    stems = Stems()
    texts = [
        b"%b%b%b\n%b%b"
        % (
            UNCHAINED.encode(),
            stems.of(entry.decision),
            verdict_of(entry.decision),
            id_bytes(entry.decision.request.id),
            rest_of(entry.decision.request, micros(entry.decision.at), micros(entry.decided_at)),
        )
        for entry in entries
    ]

    def hashed() -> None:
        for text in texts:
            sha1(text, usedforsecurity=False).hexdigest()

    def linked() -> None:
        before = UNCHAINED
        for entry in entries:
            before = link(before, stems.of(entry.decision), entry.decision, entry.decided_at)

    return measure(
        Contestant("SHA-1 of the same bytes", len(entries), lambda: hashed),
        [Contestant("the link of an entry", len(entries), lambda: linked)],
    )


def _entries() -> list[Entry]:
    meter = Meter(
        MemoryStore(bounds=None), load("openai-data-sharing"), assume=Enrollment(tier=3, sharing=Sharing.ENABLED)
    )
    at = datetime(2025, 4, 17, tzinfo=UTC)
    for first in range(0, ENTRIES, BATCH):
        meter.decide_many(
            [
                Request(
                    id=f"req_{n:032x}",
                    account=f"org-{n % 50}",
                    project="p1",
                    model=MODELS[n % len(MODELS)],
                    input_tokens=n * 7 % 5_000,
                    output_tokens=n * 3 % 2_000,
                    at=at + timedelta(seconds=1.3 * n),
                )
                for n in range(first, first + BATCH)
            ]
        )
    return list(meter.ledger())
