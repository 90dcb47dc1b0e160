"""What people see on a terminal: tables, colors, bars, times in UTC and in local time."""

from __future__ import annotations

import os
import sys
import unicodedata
from typing import TYPE_CHECKING, Any

from gratis.lines import decision_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from gratis.model import Decision

BAR_WIDTH = 24
BAR_PARTS = " ▏▎▍▌▋▊▉█"
CELL_MAX = 48
_CODES = {"green": "32", "red": "31", "yellow": "33", "dim": "2", "bold": "1"}


def is_terminal() -> bool:
    """Whether people look at standard output."""
    return sys.stdout.isatty()


def paint(text: str, color: str) -> str:
    """The text in a color, where a terminal shows colors."""
    if not is_terminal() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{_CODES[color]}m{text}\x1b[0m"


def safe(text: object, most: int = CELL_MAX) -> str:
    """Text that cannot steer a terminal, cut to a cell."""
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in str(text))
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def number(value: int | None) -> str:
    """An integer with thousands apart; nothing for null."""
    return "" if value is None else f"{value:,}"


def bar(part: int, whole: int) -> str:
    """How much of the whole is left, in eighths of a column."""
    eighths = 0 if whole <= 0 else BAR_WIDTH * 8 * part // whole
    full, rest = divmod(min(eighths, BAR_WIDTH * 8), 8)
    drawn = "█" * full + (BAR_PARTS[rest] if rest else "")
    return drawn.ljust(BAR_WIDTH, "·")


def when(instant: datetime | None) -> str:
    """An instant in UTC and in local time."""
    if instant is None:
        return "no window is open"
    local = instant.astimezone()
    text = f"{instant:%Y-%m-%d %H:%M} UTC"
    return f"{text}, {local:%Y-%m-%d %H:%M} local" if local.utcoffset() else text


def is_table(form: str) -> bool:
    """Whether a command prints tables: asked to, or looked at by people."""
    return form == "table" or (form == "auto" and is_terminal())


class Listing:
    """A table that grows while people look: its columns have fixed widths."""

    def __init__(self, columns: Sequence[tuple[str, int, bool]]) -> None:
        self._columns = columns
        self._has_head = False

    def decisions(self, decisions: Sequence[Decision]) -> None:
        """Print decisions, a row each."""
        for decision in decisions:
            line = decision_line(decision)
            line["at"] = f"{decision.at:%Y-%m-%dT%H:%M:%SZ}"
            marks = [
                *([decision.correction.remedy] if decision.correction else []),
                *(["by its bound"] if decision.is_unmeasured else []),
                *(["replayed"] if decision.replayed else []),
            ]
            if marks:
                line["reason"] = f"{line['reason']} ({', '.join(marks)})"
            self.row(line, "green" if decision.is_free else "red")

    def row(self, line: Mapping[str, Any], color: str | None = None) -> None:
        """Print one row."""
        if not self._has_head:
            self._has_head = True
            heads = {name: name for name, _, _ in self._columns}
            print(paint(self._cells(heads), "bold"))
        text = self._cells(line)
        print(text if color is None else paint(text, color))

    def _cells(self, line: Mapping[str, Any]) -> str:
        cells = []
        for name, width, is_right in self._columns:
            value = line[name]
            cell = number(value) if isinstance(value, int) and not isinstance(value, bool) else safe(value or "", width)
            cells.append(cell.rjust(width) if is_right else cell.ljust(width))
        return "  ".join(cells).rstrip()


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = (), colors: Sequence[str | None] = ()
) -> str:
    """Rows under their heads, columns aligned; those named in `right` to the right."""
    widths = [max(_width(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    lines = [paint(_line(head, widths, head, right), "bold"), paint("  ".join("─" * width for width in widths), "dim")]
    for place, row in enumerate(rows):
        line = _line(row, widths, head, right)
        color = colors[place] if place < len(colors) else None
        lines.append(line if color is None else paint(line, color))
    return "\n".join(lines)


def _line(cells: Sequence[str], widths: Sequence[int], head: Sequence[str], right: Sequence[str]) -> str:
    padded = []
    for cell, width, name in zip(cells, widths, head, strict=True):
        space = " " * (width - _width(cell))
        padded.append(space + cell if name in right else cell + space)
    return "  ".join(padded).rstrip()


def _width(text: str) -> int:
    """Columns on a terminal: wide characters take two, combining ones none."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )
