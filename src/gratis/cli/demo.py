"""`gratis demo`: the example day of the provider's article, judged by the real rule on a real store."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from gratis.cli.screen import paint
from gratis.errors import RequestError
from gratis.meter import Meter
from gratis.model import Decision, Enrollment, Request, Sharing

if TYPE_CHECKING:
    import argparse

DAY = datetime(2025, 4, 20, tzinfo=UTC)
MODEL = "gpt-4.1-2025-04-14"
TABLE = (
    ("09:15", 120_000),
    ("12:40", 140_000),
    ("14:30", 150_000),
    ("16:00", 150_000),
    ("18:05", 150_000),
    ("20:20", 150_000),
    ("22:15", 115_000),
    ("23:10", 30_000),
)
LAST = "23:30"
HEADS = ("Time (UTC)", "Tokens in request", "Running total", "Free or billed?")


def demo(arguments: argparse.Namespace) -> int:
    """Print the day as the article prints it, then the two cases at its edge."""
    assume = Enrollment(tier=3, sharing=Sharing.ENABLED)
    with Meter.open(arguments.store, offer="openai-data-sharing", assume=assume, bounds=None) as meter:
        day = _decide(meter, "demo", TABLE)
        seven = TABLE[:-1]
        fits = _decide(meter, "demo-25000", (*seven, (LAST, 25_000)))[-1:]
        passes = _decide(meter, "demo-25001", (*seven, (LAST, 25_001)))[-1:]
    print(f"One day on {MODEL}: the first 1,000,000 tokens are free (group 1M, tiers 3-5).\n")
    print(_table(day))
    print("\nThe same day, with 975 k used and one more request:\n")
    print(_table(fits + passes))
    print("\n25,000 lands exactly on the allowance and is free; 25,001 would pass it and is billed whole.")
    return 0


def _decide(meter: Meter, account: str, rows: tuple[tuple[str, int], ...]) -> list[Decision]:
    """The decisions of a day's rows."""
    requests = []
    for clock, tokens in rows:
        hour, minute = clock.split(":")
        at = DAY.replace(hour=int(hour), minute=int(minute))
        requests.append(
            Request(id=f"demo-{clock}", model=MODEL, at=at, input_tokens=tokens, output_tokens=0, account=account)
        )
    decisions = []
    for answer in meter.decide_many(requests):
        if isinstance(answer, RequestError):
            raise answer
        decisions.append(answer)
    return decisions


def _table(decisions: list[Decision]) -> str:
    rows = [
        (
            f"{decision.at:%H:%M}",
            _thousands(decision.tokens or 0),
            _thousands(decision.total or 0),
            "Free"
            if decision.is_free
            else f"Billed (entire {_thousands(decision.billed_tokens or 0).replace(' ', '')})",
        )
        for decision in decisions
    ]
    widths = [max(len(cell) for cell in column) for column in zip(HEADS, *rows, strict=True)]
    lines = [" | ".join(head.ljust(width) for head, width in zip(HEADS, widths, strict=True)).rstrip()]
    lines.append("-|-".join("-" * width for width in widths))
    for row, decision in zip(rows, decisions, strict=True):
        time, tokens, total, verdict = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        color = "green" if decision.is_free else "red"
        lines.append(" | ".join((time, tokens, total, paint(verdict.rstrip(), color))))
    return "\n".join(lines)


def _thousands(tokens: int) -> str:
    """Tokens as the article writes them: 120 k, 1 005 k; in full where they are no whole thousands."""
    if tokens % 1000:
        return f"{tokens:,}".replace(",", " ")
    return f"{tokens // 1000:,} k".replace(",", " ")
