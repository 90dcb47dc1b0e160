"""What kind of report a file is: told by its content, never by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gratis.reconcile.exports import export_of, is_export
from gratis.reconcile.pages import Page, chained, pages_of
from gratis.reconcile.rows import Report, ReportError, merged

if TYPE_CHECKING:
    from collections.abc import Iterable

BOM: Final = b"\xef\xbb\xbf"
FILE_BYTES_MAX: Final = 1 << 30
EXPECTED: Final = (
    "expected a page of the Usage API or the Costs API (JSON, or one a line), or the dashboard's export of activity or"
    " costs (CSV)"
)


def reports_of(files: Iterable[tuple[str, bytes]]) -> Report:
    """What these files say together, each read by what it is."""
    reports: list[Report] = []
    pages: list[Page] = []
    for name, content in files:
        text = content.removeprefix(BOM)
        if len(text) > FILE_BYTES_MAX:
            raise ReportError(name, "", f"found {len(text)} bytes; expected at most {FILE_BYTES_MAX}")
        if text.lstrip()[:1] in (b"{", b"["):
            found = pages_of(text.lstrip(), file=name)
            pages.extend(found)
            reports.extend(page.report for page in found)
        else:
            reports.append(_export(name, text))
    chained(pages)
    return merged(reports)


def _export(name: str, text: bytes) -> Report:
    try:
        table = text.decode()
    except UnicodeDecodeError as error:
        raise ReportError(name, "", f"no UTF-8 text ({error.reason}); {EXPECTED}") from None
    if not is_export(table):
        found = "an empty file" if not table.strip() else "no report that is known"
        raise ReportError(name, "", f"found {found}; {EXPECTED}")
    return export_of(table, file=name)
