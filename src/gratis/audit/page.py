"""How a report looks: plain values in, one HTML page out that needs nothing but itself: it loads and runs nothing."""

from __future__ import annotations

from decimal import Decimal
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from msgspec import Struct

from gratis.audit.bars import Chart, chart_html
from gratis.audit.markup import Table, percent, table_html, text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


class Figure(Struct, frozen=True):
    """A number that is seen first; `tone` is good, bad or nothing."""

    name: str
    value: str
    note: str = ""
    tone: str = ""


class Share(Struct, frozen=True):
    """A part of a whole: its kind is free, billed or none."""

    kind: str
    name: str
    amount: int


class Facts(Struct, frozen=True):
    """Names and what is to be said of them."""

    rows: Sequence[tuple[str, str]]


class Part(Struct, frozen=True):
    """A section of the page."""

    title: str
    about: str
    items: Sequence[Chart | Table | Facts]
    legend: Sequence[tuple[str, str]] = ()


class Page(Struct, frozen=True):
    """All that a page says."""

    title: str
    lede: str
    figures: Sequence[Figure]
    shares: Sequence[Share]
    parts: Sequence[Part]
    made: str


def render(page: Page) -> str:
    """The page as HTML."""
    css = files("gratis").joinpath("audit/page.css").read_text(encoding="utf-8")
    anchors = [(f"part-{place}", part) for place, part in enumerate(page.parts, start=1)]
    links = "".join(f'<li><a href="#{anchor}">{text(part.title)}</a></li>' for anchor, part in anchors)
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">',
            f"<title>{text(page.title)}</title>\n<style>\n{css}</style>\n</head>\n<body>",
            '<a class="skip" href="#main">To the report</a>\n<header>',
            f'<p class="eyebrow">Gratis report</p>\n<h1>{text(page.title)}</h1>',
            f'<p class="lede">{text(page.lede, most=1_000)}</p>',
            f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n</header>\n<main id="main">',
            *_head(page),
            *(line for anchor, part in anchors for line in _part(anchor, part)),
            f"</main>\n<footer><p>{text(page.made, most=1_000)}</p></footer>\n</body>\n</html>\n",
        ]
    )


def _head(page: Page) -> Iterator[str]:
    """The numbers that are seen first, and how the whole is shared."""
    yield '<dl class="figures">'
    for figure in page.figures:
        yield (
            f'<div class="{escape(figure.tone)}"><dt>{text(figure.name)}</dt>'
            f'<dd class="value">{text(figure.value)}</dd><dd class="note">{text(figure.note)}</dd></div>'
        )
    yield "</dl>"
    whole = sum(share.amount for share in page.shares)
    if whole:
        said = [(share, percent(share.amount, whole)) for share in page.shares if share.amount]
        label = ", ".join(f"{share.name} {part}" for share, part in said)
        spans = "".join(
            f'<span class="{share.kind}" style="width:{Decimal(100 * share.amount) / whole:.3f}%"></span>'
            for share, _ in said
        )
        yield f'<div class="share" role="img" aria-label="{text(label)}">{spans}</div>'
        items = "".join(f'<li><i class="{share.kind}"></i>{text(share.name)} {part}</li>' for share, part in said)
        yield f'<ul class="legend" aria-hidden="true">{items}</ul>'


def _part(anchor: str, part: Part) -> Iterator[str]:
    yield f'<section id="{anchor}" aria-labelledby="{anchor}-title">\n<h2 id="{anchor}-title">{text(part.title)}</h2>'
    if part.about:
        yield f"<p>{text(part.about, most=2_000)}</p>"
    if part.legend:
        items = "".join(f'<li><i class="{escape(kind)}"></i>{text(name)}</li>' for kind, name in part.legend)
        yield f'<ul class="legend">{items}</ul>'
    for item in part.items:
        if isinstance(item, Chart):
            yield from chart_html(item)
        elif isinstance(item, Table):
            yield from table_html(item)
        else:
            rows = "".join(f"<dt>{text(name)}</dt><dd>{text(said, most=2_000)}</dd>" for name, said in item.rows)
            yield f'<dl class="facts">{rows}</dl>'
    yield "</section>"
