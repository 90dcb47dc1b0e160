"""Text and tables as HTML: the only place where anything is escaped.

Whatever comes from outside is text. Characters that could steer are written out as escapes, and all of it is escaped.
"""

from __future__ import annotations

from decimal import Decimal
from html import escape
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import date

CELL_MAX = 200
ROWS_MAX = 800
NARROW_MAX = 3
LONG = 40
SUFFIXES = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k"))

Cell = str | int | Decimal | None


class Column(Struct, frozen=True):
    """The head of a column: numbers stand to the right, code in its own letters, wide text may break."""

    name: str
    kind: str = ""


class Table(Struct, frozen=True):
    """Rows under their heads; `omitted` rows are not shown, and said to be so."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    foot: Sequence[Cell] = ()
    note: str = ""
    omitted: str = ""


def text(value: object, *, most: int = CELL_MAX) -> str:
    """Text from anywhere, so that it can steer neither HTML nor the direction of reading, cut to a cell."""
    found = str(value)
    if len(found) > most:
        found = found[: most - 1] + "…"
    plain = "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode("ascii") for char in found
    )
    return escape(plain.encode("utf-8", "backslashreplace").decode("utf-8"))


def shown(value: Cell) -> str:
    """A cell as people read it: thousands apart, a true minus, nothing for nothing."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:,}".replace("-", "\u2212")


def compact(value: int) -> str:
    """An amount as the scale of a chart says it: 250k, 2.5M."""
    for size, suffix in SUFFIXES:
        if value >= size:
            found = Decimal(value) / size
            places = max(0, 3 - len(str(int(found))))
            said = f"{found:,.{places}f}"
            return (said.rstrip("0").rstrip(".") if places else said) + suffix
    return str(value)


def percent(part: int, whole: int) -> str:
    """A share of the whole, never said to be all or nothing where it is not."""
    found = Decimal(100 * part) / whole
    if 0 < found < Decimal("0.1"):
        return "under 0.1 %"
    if Decimal("99.9") < found < 100:  # noqa: PLR2004 - a hundred percent
        return "over 99.9 %"
    return f"{found:.1f} %"


def day_name(day: date) -> str:
    """A day as people write it."""
    return f"{day.day} {day:%B %Y}"


def table_html(table: Table) -> Iterator[str]:
    """A table in a box of its own, which scrolls where the table is wider than the page."""
    if table.title:
        yield f"<h3>{text(table.title)}</h3>"
    if table.note:
        yield f'<p class="about">{text(table.note, most=2_000)}</p>'
    if table.rows:
        title = text(table.title or table.columns[0].name)
        box = "scroll narrow" if len(table.columns) <= NARROW_MAX else "scroll"
        yield f'<div class="{box}" role="region" aria-label="{title}" tabindex="0"><table><caption>{title}</caption>'
        heads = "".join(f'<th scope="col"{_kind(column.kind)}>{text(column.name)}</th>' for column in table.columns)
        yield f"<thead><tr>{heads}</tr></thead>\n<tbody>"
        yield from (_row(table.columns, row) for row in table.rows)
        yield "</tbody>" + (f"<tfoot>{_row(table.columns, table.foot)}</tfoot>" if table.foot else "")
        yield "</table></div>"
    if table.omitted:
        yield f'<p class="more">{text(table.omitted)}</p>'


def _row(columns: Sequence[Column], row: Sequence[Cell]) -> str:
    cells = []
    for place, (column, cell) in enumerate(zip(columns, row, strict=True)):
        tag = 'th scope="row"' if place == 0 else "td"
        said = text(shown(cell))
        inner = said if column.kind == "n" or not said else f"<bdi>{said}</bdi>"
        kind = f"{column.kind} w".strip() if len(said) > LONG and column.kind != "n" else column.kind
        cells.append(f"<{tag}{_kind(kind)}>{inner}</{tag[:2]}>")
    return f"<tr>{''.join(cells)}</tr>"


def _kind(kind: str) -> str:
    return f' class="{escape(kind)}"' if kind else ""
