"""What kind of report a file is: told by its content, never by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from gratis.reconcile.exports import export_of, is_export
from gratis.reconcile.overlap import COSTS, Source, once
from gratis.reconcile.pages import Page, chained, pages_of
from gratis.reconcile.rows import COMPLETIONS, HOSTED_TOOLS, TOKEN_KINDS, ReportError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gratis.reconcile.rows import Report, UsageRow

BOM: Final = b"\xef\xbb\xbf"
FILE_BYTES_MAX: Final = 1 << 30
EXPECTED: Final = (
    "expected a page of the Usage API or the Costs API (JSON, or one a line), or the dashboard's export of activity or"
    " costs (CSV)"
)


def reports_of(files: Iterable[tuple[str, bytes]]) -> Report:
    """What these files say together, each read by what it is."""
    sources: list[Source] = []
    pages: list[Page] = []
    for name, content in files:
        text = content.removeprefix(BOM)
        if len(text) > FILE_BYTES_MAX:
            raise ReportError(name, "", f"found {len(text)} bytes; expected at most {FILE_BYTES_MAX}")
        if text.lstrip()[:1] in (b"{", b"["):
            found = pages_of(text.lstrip(), file=name)
            pages.extend(found)
            sources.extend(Source(name, is_export=False, kind=page.kind, report=page.report) for page in found)
        else:
            report = _export(name, text)
            sources.append(
                Source(name, is_export=True, kind=COSTS if report.cost_spans else COMPLETIONS, report=report)
            )
    chained(pages)
    report = once(sources)
    return replace(report, notes=(*report.notes, *_odd(report.usage)))


def _odd(rows: Sequence[UsageRow]) -> Iterable[str]:
    """What rows say that does not add up, and what no decision is about."""
    odd = [row for row in rows if row.uncached_tokens is not None and row.uncached_tokens != _uncached(row)]
    if odd:
        more = f" ({len(odd):,} such rows)" if len(odd) > 1 else ""
        found = f"input_uncached_tokens: found {odd[0].uncached_tokens:,}; expected {_uncached(odd[0]):,}"
        yield f"{odd[0].source}: {found}, what input_tokens are without those of the cache{more}"
    other = sorted({row.kind for row in rows} - TOKEN_KINDS - HOSTED_TOOLS)
    if other:
        yield f"not compared, because no offer here counts it: {', '.join(other)}"


def _uncached(row: UsageRow) -> int:
    return row.input_tokens - row.cached_tokens - row.cache_write_tokens


def _export(name: str, text: bytes) -> Report:
    try:
        table = text.decode()
    except UnicodeDecodeError as error:
        raise ReportError(name, "", f"no UTF-8 text ({error.reason}); {EXPECTED}") from None
    if not is_export(table):
        found = "an empty file" if not table.strip() else "no report that is known"
        raise ReportError(name, "", f"found {found}; {EXPECTED}")
    return export_of(table, file=name)
