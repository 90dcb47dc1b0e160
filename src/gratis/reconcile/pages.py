"""Pages of the Usage API, of its siblings and of the Costs API, as rows.

Read from the text on, so that no amount of money is ever a float. Fields that a page's grouping leaves null are null
here; fields that later versions of the API add are left alone. A page that says that more follows must be followed.
"""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from gratis.model import TOKENS_MAX, shown
from gratis.reconcile.rows import TOKEN_KINDS, CostRow, Report, ReportError, UsageRow, from_unix, model_of, span

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

COSTS: Final = "costs"
AMOUNT_DIGITS_MAX: Final = 60
NAME_MAX: Final = 1024
LOGGED: Final = frozenset({"id", "at", "input_tokens"})
# What a row of a kind that has no tokens counts.
COUNTED: Final = {
    "images": "images",
    "audio_speeches": "characters",
    "audio_transcriptions": "seconds",
    "web_search_calls": "num_requests",
    "file_search_calls": "num_requests",
    "code_interpreter_sessions": "num_sessions",
    "vector_stores": "usage_bytes",
}

_decoder = msgspec.json.Decoder(float_hook=Decimal)


class Page(Struct, frozen=True):
    """One page: where it stands, what it is about, and how it goes on. `kind` is None where it has no results."""

    file: str
    where: str
    kind: str | None
    has_more: bool
    next_page: str | None
    report: Report


def pages_of(text: bytes, *, file: str) -> list[Page]:
    """The pages of a file: one, a list of them, or one a line."""
    try:
        value = _decode(text)
    except ValueError as whole:
        lines = [(number, line) for number, line in enumerate(text.split(b"\n"), start=1) if line.strip()]
        if len(lines) < 2:  # noqa: PLR2004 - a single line is no JSON lines
            raise ReportError(file, "", f"not JSON: {whole}") from None
        return [_page_of_line(line, file, f"line {number}") for number, line in lines]
    if isinstance(value, list):
        return [page_of(one, file=file, where=f"page {number}") for number, one in enumerate(value, start=1)]
    return [page_of(value, file=file, where="")]


def chained(pages: Iterable[Page]) -> None:
    """Refuse pages of which the end is missing, or that lead on to the same page twice; files may be in any order."""
    seen: dict[str, Page] = {}
    ends: dict[str | None, list[Page]] = {}
    for page in pages:
        ends.setdefault(page.kind, []).append(page)
        if page.next_page is not None and page.has_more:
            before = seen.setdefault(page.next_page, page)
            if before is not page:
                found = f"next_page: the cursor of {before.file} {before.where}".rstrip()
                raise ReportError(page.file, page.where, f"{found} again; expected each page once")
    for kind, found_pages in ends.items():
        others = [] if kind is None else ends.get(None, [])
        if kind is not None and all(page.has_more for page in (*found_pages, *others)):
            last = found_pages[-1]
            raise ReportError(last.file, last.where, "has_more is true and no page follows; expected all pages")


def _no_page(value: object) -> str:
    """What stands in the place of a page."""
    expected = "expected a page of the Usage or the Costs API"
    if isinstance(value, dict) and "error" in value:
        return f"found an error of the provider; {expected}"
    if isinstance(value, dict) and "model" in value and LOGGED & value.keys():
        return f"found what looks like a log of requests; {expected}, and a log as --log FILE"
    return f"found {_a(value)} without data; {expected}"


def page_of(value: object, *, file: str, where: str) -> Page:
    """One page from its JSON."""
    if not isinstance(value, dict) or not isinstance(value.get("data"), list):
        raise ReportError(file, where, _no_page(value))
    has_more, following = value.get("has_more", False), value.get("next_page")
    if type(has_more) is not bool:
        raise ReportError(file, where, f"has_more: found {shown(has_more)}; expected true or false")
    if following is not None and not (isinstance(following, str) and following):
        raise ReportError(file, where, f"next_page: found {shown(following)}; expected a cursor or null")
    if has_more and following is None:
        raise ReportError(file, where, "has_more is true and next_page is null; expected a cursor: the rest is missing")
    usage: list[UsageRow] = []
    costs: list[CostRow] = []
    spans: list[tuple[datetime, datetime]] = []
    kinds: set[str] = set()
    for place, part in enumerate(value["data"]):
        here = f"{where} data[{place}]".strip()
        spans.append(_span(part, file, here))
        results = part.get("results", part.get("result"))
        if not isinstance(results, list):
            raise ReportError(file, here, f"results: found {_a(results)}; expected a list")
        for number, result in enumerate(results):
            row = _row(result, spans[-1], file, f"{here}.results[{number}]")
            kinds.add(COSTS if isinstance(row, CostRow) else row.kind)
            if isinstance(row, CostRow):
                costs.append(row)
            else:
                usage.append(row)
    if len(kinds) > 1:
        raise ReportError(file, where, f"found results of {', '.join(sorted(kinds))}; expected one kind a page")
    kind = next(iter(kinds), None)
    is_usage = kind is None or kind in TOKEN_KINDS  # calls of tools are beside a report of tokens, and are none
    report = Report(
        tuple(usage),
        tuple(costs),
        tuple(spans) if is_usage else (),
        tuple(spans) if kind in {None, COSTS} else (),
    )
    return Page(file, where, kind, has_more, following, report)


def _page_of_line(line: bytes, file: str, where: str) -> Page:
    try:
        return page_of(_decode(line), file=file, where=where)
    except ValueError as error:
        raise ReportError(file, where, f"not JSON: {error}") from None


def _decode(text: bytes) -> object:
    try:
        return _decoder.decode(text)
    except (InvalidOperation, RecursionError) as error:
        raise ValueError(type(error).__name__) from None


def _span(part: object, file: str, where: str) -> tuple[datetime, datetime]:
    if not isinstance(part, dict):
        raise ReportError(file, where, f"found {_a(part)}; expected an object with its times and results")
    start = from_unix(file, where, "start_time", part.get("start_time"))
    return span(file, where, start, from_unix(file, where, "end_time", part.get("end_time")))


def _row(value: object, when: tuple[datetime, datetime], file: str, where: str) -> UsageRow | CostRow:
    if not isinstance(value, dict):
        raise ReportError(file, where, f"found {_a(value)}; expected an object")
    kind = _kind(value, file, where)
    fields = _Fields(value, file, where)
    if kind == COSTS:
        return _cost(fields, when)
    row = UsageRow(
        start=when[0],
        end=when[1],
        kind=kind,
        source=f"{file} {where}".strip(),
        project=fields.name("project_id"),
        model=fields.name("model"),
    )
    if kind not in TOKEN_KINDS:
        return replace(row, count=fields.count(COUNTED[kind]) if kind in COUNTED else 0)
    given, cached = fields.count("input_tokens"), fields.count("input_cached_tokens", absent=0)
    written = fields.count("input_cache_write_tokens", absent=0)
    if cached + written > given:
        raise ReportError(
            file,
            where,
            f"input_cached_tokens: found {cached + written} with those written to the cache, parts of"
            f" input_tokens, of which there are {given}",
        )
    return replace(
        row,
        service_tier=fields.name("service_tier"),
        batch=fields.flag("batch"),
        owner=(fields.name("user_id"), fields.name("api_key_id")),
        input_tokens=given,
        output_tokens=fields.count("output_tokens", absent=None if kind == "completions" else 0),
        cached_tokens=cached,
        cache_write_tokens=written,
        uncached_tokens=None if value.get("input_uncached_tokens") is None else fields.count("input_uncached_tokens"),
        requests=fields.count("num_model_requests"),
    )


def _cost(fields: _Fields, when: tuple[datetime, datetime]) -> CostRow:
    amount = fields.value.get("amount")
    if not isinstance(amount, dict):
        raise ReportError(fields.file, fields.where, f"amount: found {_a(amount)}; expected its value and currency")
    inner = _Fields(amount, fields.file, f"{fields.where}.amount")
    currency = inner.name("currency")
    if currency is None:
        raise ReportError(fields.file, inner.where, "currency: missing; expected its name, such as usd")
    item = fields.name("line_item")
    return CostRow(
        start=when[0],
        end=when[1],
        source=f"{fields.file} {fields.where}".strip(),
        amount=money(fields.file, inner.where, "value", amount.get("value")),
        currency=currency.lower(),
        project=fields.name("project_id"),
        line_item=item,
        model=model_of(item),
        quantity=None
        if fields.value.get("quantity") is None
        else money(fields.file, fields.where, "quantity", fields.value["quantity"]),
        quantity_unit=fields.name("quantity_unit"),
    )


class _Fields:
    """The fields of one result, each checked for what it must be."""

    def __init__(self, value: Mapping[str, Any], file: str, where: str) -> None:
        self.value = value
        self.file = file
        self.where = where

    def count(self, field: str, *, absent: int | None = None) -> int:
        """A whole number; `absent` is what a missing or null one means, None that it must be there."""
        value = self.value.get(field)
        if value is None and absent is not None:
            return absent
        if type(value) is not int or not 0 <= value <= TOKENS_MAX:
            self._refuse(field, value, f"a whole number from 0 to {TOKENS_MAX}")
        assert type(value) is int, "checked above"
        return value

    def name(self, field: str) -> str | None:
        """A name, or None where the report is not grouped by it."""
        value = self.value.get(field)
        if value is not None and (not isinstance(value, str) or not 0 < len(value) <= NAME_MAX):
            self._refuse(field, value, "a name or null")
        return value

    def flag(self, field: str) -> bool | None:
        """True, false, or None where the report is not grouped by it."""
        value = self.value.get(field)
        if value is not None and type(value) is not bool:
            self._refuse(field, value, "true, false or null")
        return value

    def _refuse(self, field: str, value: object, expected: str) -> None:
        what = "missing" if value is None else f"found {shown(_plain(value))}"
        raise ReportError(self.file, self.where, f"{field}: {what}; expected {expected}")


def money(file: str, where: str, field: str, value: object) -> Decimal:
    """An exact number, given as one or as its text."""
    try:
        amount = Decimal(value) if type(value) is int or type(value) is str else value
    except InvalidOperation:
        amount = None
    if isinstance(amount, Decimal) and amount.is_finite():
        _, digits, exponent = amount.as_tuple()
        if isinstance(exponent, int) and len(digits) + abs(exponent) <= AMOUNT_DIGITS_MAX:
            return amount
    raise ReportError(file, where, f"{field}: found {shown(_plain(value))}; expected a plain number")


def _kind(result: Mapping[str, Any], file: str, where: str) -> str:
    """`completions` of organization.usage.completions.result; without that name, what its fields say."""
    name = result.get("object")
    parts = name.split(".") if isinstance(name, str) else []
    match parts:
        case ["organization", "costs", "result"]:
            return COSTS
        case ["organization", "usage", kind, "result"]:
            return kind
    if "amount" in result:
        return COSTS
    if "num_model_requests" in result and "output_tokens" in result:
        return "completions"
    raise ReportError(
        file, where, f"object: found {shown(name)}; expected a result of the Usage API or of the Costs API"
    )


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Decimal) else value


def _a(value: object) -> str:
    return "null" if value is None else f"a value of type {type(value).__name__}"
