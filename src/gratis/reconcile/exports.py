"""The two exports of the provider's dashboard, activity and costs, as rows.

They are CSV with commas or tabs. Counts are printed as floats of whole value, a day without traffic is a row of times
only, and a day and model may come in several rows, which add up. Whatever is no such number is refused by file, line
and field: a count that was guessed would be a difference that nobody made.
"""

from __future__ import annotations

import csv
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from gratis.model import TOKENS_MAX, shown
from gratis.reconcile.pages import money
from gratis.reconcile.rows import COMPLETIONS, CostRow, Report, ReportError, UsageRow, from_unix, model_of, span

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from decimal import Decimal

TIMES: Final = ("start_time", "end_time", "start_time_iso", "end_time_iso")
ACTIVITY: Final = frozenset({"num_model_requests", "input_tokens", "output_tokens"})
COST: Final = frozenset({"amount_value"})
FIELD_MAX: Final = 1 << 16
# Columns that say who, not what: a row may name them and still be a day without traffic.
WHOSE: Final = frozenset({*TIMES, "project_id", "organization_id", "organization_name", "amount_currency"})
_COUNT = re.compile(r"(\d{1,13})(?:\.0*)?", flags=re.ASCII)
_SECONDS = re.compile(r"(\d{1,11})(?:\.0*)?", flags=re.ASCII)
_BOOLS: Final = {"true": True, "false": False, "": None}


def is_export(text: str) -> bool:
    """Whether the first line is the head of one of the two exports."""
    names = set(_names(text))
    return bool(names & set(TIMES)) and (names >= ACTIVITY or names >= COST)


def export_of(text: str, *, file: str) -> Report:
    """The rows of an export, whichever of the two it is."""
    names = _names(text)
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ReportError(file, "line 1", f"column {twice!r} is there twice; expected each column once")
    is_cost = set(names) >= COST
    usage: list[UsageRow] = []
    costs: list[CostRow] = []
    spans: list[tuple[datetime, datetime]] = []
    for where, cells in _cells(text, names, file):
        spans.append(_when(cells, file, where))
        if all(value == "" or name in WHOSE for name, value in cells.items()):
            continue  # a day without traffic
        if is_cost:
            costs.append(_cost(cells, spans[-1], file, where))
        else:
            usage.append(_usage(cells, spans[-1], file, where))
    return Report(tuple(usage), tuple(costs), () if is_cost else tuple(spans), tuple(spans) if is_cost else ())


def _delimiter(text: str) -> str:
    head = text.split("\n", 1)[0]
    return "\t" if "\t" in head else ";" if ";" in head and "," not in head else ","


def _names(text: str) -> list[str]:
    head = text.lstrip("\ufeff").split("\n", 1)[0].rstrip("\r")
    try:
        return [name.strip().lower() for name in next(csv.reader([head], delimiter=_delimiter(head)), [])]
    except csv.Error:
        return []


def _cells(text: str, names: list[str], file: str) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Each row's place and cells by the name of their column."""
    lines = csv.reader(text.lstrip("\ufeff").splitlines(), delimiter=_delimiter(text), strict=True)
    try:
        next(lines)
        for values in lines:
            where = f"line {lines.line_num}"
            if not any(value.strip() for value in values):
                continue
            if len(values) > len(names) and any(value.strip() for value in values[len(names) :]):
                raise ReportError(file, where, f"found {len(values)} cells; expected {len(names)}, one a column")
            padded = [*values, *[""] * (len(names) - len(values))]
            yield where, {name: value.strip() for name, value in zip(names, padded, strict=False)}
    except csv.Error as error:
        raise ReportError(file, f"line {lines.line_num}", f"no CSV: {error}") from None


def _when(cells: Mapping[str, str], file: str, where: str) -> tuple[datetime, datetime]:
    ends = []
    for side in ("start_time", "end_time"):
        times = [_time(file, where, name, cells[name]) for name in (side, f"{side}_iso") if cells.get(name, "") != ""]
        if not times:
            raise ReportError(file, where, f"{side}: missing; expected a Unix time or an ISO one")
        if times[0] != times[-1]:
            raise ReportError(
                file, where, f"{side}_iso: found {cells[f'{side}_iso']}; expected the time of {side}, {times[0]}"
            )
        ends.append(times[0])
    return span(file, where, ends[0], ends[1])


def _time(file: str, where: str, field: str, text: str) -> datetime:
    """An instant from Unix seconds or from ISO 8601; the exports are in UTC, so a time without an offset is."""
    seconds = _SECONDS.fullmatch(text)
    if seconds:
        return from_unix(file, where, field, int(seconds[1]))
    try:
        read = datetime.fromisoformat(text)
        return read.replace(tzinfo=UTC) if read.tzinfo is None else read.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ReportError(file, where, f"{field}: found {shown(text)}; expected a Unix time or an ISO one") from None


def _usage(cells: Mapping[str, str], when: tuple[datetime, datetime], file: str, where: str) -> UsageRow:
    given = _count(cells, "input_tokens", file, where)
    cached = _count(cells, "input_cached_tokens", file, where, absent=0)
    written = _count(cells, "input_cache_write_tokens", file, where, absent=0)
    if cached + written > given:
        parts = f"found {cached + written} with those written to the cache"
        raise ReportError(
            file, where, f"input_cached_tokens: {parts}, parts of input_tokens, of which there are {given}"
        )
    return UsageRow(
        start=when[0],
        end=when[1],
        kind=COMPLETIONS,
        source=f"{file} {where}",
        project=cells.get("project_id") or None,
        model=cells.get("model") or None,
        service_tier=cells.get("service_tier") or None,
        batch=_flag(cells, "batch", file, where),
        owner=(cells.get("user_id") or None, cells.get("api_key_id") or None),
        input_tokens=given,
        output_tokens=_count(cells, "output_tokens", file, where),
        cached_tokens=cached,
        cache_write_tokens=written,
        uncached_tokens=_count(cells, "input_uncached_tokens", file, where)
        if cells.get("input_uncached_tokens")
        else None,
        requests=_count(cells, "num_model_requests", file, where),
    )


def _cost(cells: Mapping[str, str], when: tuple[datetime, datetime], file: str, where: str) -> CostRow:
    item, quantity = cells.get("line_item") or None, cells.get("quantity", "")
    return CostRow(
        start=when[0],
        end=when[1],
        source=f"{file} {where}",
        amount=_amount(cells, "amount_value", file, where),
        currency=(cells.get("amount_currency") or "usd").lower(),
        project=cells.get("project_id") or None,
        line_item=item,
        model=model_of(item),
        quantity=_amount(cells, "quantity", file, where) if quantity else None,
        quantity_unit=cells.get("quantity_unit") or None,
    )


def _amount(cells: Mapping[str, str], field: str, file: str, where: str) -> Decimal:
    return money(file, where, field, cells.get(field, ""))


def _count(cells: Mapping[str, str], field: str, file: str, where: str, *, absent: int | None = None) -> int:
    """A whole number, though it may be printed as 10.0."""
    text = cells.get(field, "")
    if text == "" and absent is not None:
        return absent
    whole = _COUNT.fullmatch(text)
    if whole is None or int(whole[1]) > TOKENS_MAX:
        found = "missing" if text == "" else f"found {shown(text)}"
        raise ReportError(file, where, f"{field}: {found}; expected a whole number from 0 to {TOKENS_MAX}")
    return int(whole[1])


def _flag(cells: Mapping[str, str], field: str, file: str, where: str) -> bool | None:
    text = cells.get(field, "").lower()
    if text not in _BOOLS:
        raise ReportError(file, where, f"{field}: found {shown(text)}; expected TRUE or FALSE")
    return _BOOLS[text]
