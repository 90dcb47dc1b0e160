"""What tokens cost at list price: a dated table with its sources, and exact sums over it.

A table is data, one TOML file a provider, read as strictly as offers are. Every number is a Decimal from the text of
the file on; nothing is ever a float, and a sum that Decimal could not hold exactly would be an error. A model that the
table does not name has no known price, which is not a price of 0. List price is what free tokens save, never what
they cost.
"""

from __future__ import annotations

import os
import tomllib
from datetime import UTC, date, datetime, time
from decimal import Clamped, Context, Decimal, Inexact, InvalidOperation, Overflow, localcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from gratis.errors import PricesError
from gratis.model import AT_MAX, AT_MIN, MODEL_BYTES_MAX, shown as found
from gratis.offers import config_folder, text_of
from gratis.toml_key import line_of, shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from importlib.resources.abc import Traversable

    from gratis.toml_key import Key

DEFAULT_PRICES = "openai"
PRICE_MAX = Decimal(1_000_000)
PRICE_DIGITS_MAX = 12
LINE_MAX = 400
PER = Decimal(1_000_000)
EXACT = Context(prec=200, traps=[Inexact, InvalidOperation, Overflow, Clamped])
"""Enough digits for any sum here; what would be rounded is an error."""

_TABLE_KEYS = ("name", "currency", "as_of", "source", "prices")
_ROW_KEYS = ("models", "from", "until", "seen_on", "source", "input", "cached_input", "cache_write", "output")


class Price(Struct, frozen=True):
    """What a million tokens cost; `cache_write` is that of input that is also kept, where that costs more."""

    input: Decimal
    cached_input: Decimal
    output: Decimal
    cache_write: Decimal | None = None


class PriceRow(Struct, frozen=True):
    """The price of a model from `starts` until before `ends`, when and where it was seen."""

    model: str
    price: Price
    source: str
    seen_on: date
    starts: datetime = AT_MIN
    ends: datetime = AT_MAX


class Prices(Struct, frozen=True):
    """A table of prices: whose, in which currency, as of which date, from where."""

    name: str
    currency: str
    as_of: date
    source: str
    rows: tuple[PriceRow, ...]

    def row(self, model: str, at: datetime) -> PriceRow | None:
        """The row of this very model id that is in force at an instant, if the table has one."""
        return next((row for row in self.rows if row.model == model and row.starts <= at < row.ends), None)

    def price(self, model: str, at: datetime) -> Price | None:
        """The price of this very model id at an instant; None where no price is known, which is not 0."""
        row = self.row(model, at)
        return None if row is None else row.price


def cost(
    price: Price, *, input_tokens: int, cached_tokens: int, output_tokens: int, cache_write_tokens: int = 0
) -> Decimal:
    """What so many tokens cost, exactly; cached tokens and those written to the cache are parts of the input."""
    plain = input_tokens - cached_tokens - cache_write_tokens
    assert min(plain, cached_tokens, cache_write_tokens, output_tokens) >= 0, "parts are no more than the whole"
    written = price.input if price.cache_write is None else price.cache_write
    with localcontext(EXACT):
        return (
            plain * price.input
            + cached_tokens * price.cached_input
            + cache_write_tokens * written
            + output_tokens * price.output
        ) / PER


def total(amounts: Iterable[Decimal]) -> Decimal:
    """The sum, exactly."""
    with localcontext(EXACT):
        return sum(amounts, Decimal(0))


def shipped_prices() -> list[str]:
    """The names of the tables that come with Gratis."""
    return sorted(file.name.removesuffix(".toml") for file in _folder().iterdir() if file.name.endswith(".toml"))


def load_prices(name: str | Path = DEFAULT_PRICES) -> Prices:
    """The table of this name, or the one in this file."""
    if isinstance(name, str) and name in shipped_prices():
        return _read(_folder() / f"{name}.toml", name)
    path = Path(name)
    if path.suffix != ".toml" or not os.path.isfile(path):  # noqa: PTH113 - unlike Path.is_file, never raises
        raise PricesError(
            file=str(name),
            line=None,
            key="prices",
            found="no such table",
            expected=f"a path to a .toml file, or one of {', '.join(shipped_prices())}",
        )
    return _read(path, str(name))


def parse_prices(text: str, *, file: str) -> Prices:
    """The table that this text describes; `file` is what an error calls it."""
    try:
        data = tomllib.loads(text, parse_float=Decimal)
    except InvalidOperation:
        raise PricesError(
            file=file, line=None, key="TOML", found="a number beyond any size", expected="prices of a million tokens"
        ) from None
    except (ValueError, RecursionError) as error:
        raise PricesError(file=file, line=None, key="TOML", found=str(error), expected="valid TOML") from None
    fault = _Fault(text, file)
    _check_keys(data, (), _TABLE_KEYS, _TABLE_KEYS, fault)
    entries = data["prices"]
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise fault(("prices",), found(entries), "at least one [[prices]] table")
    rows: list[PriceRow] = []
    for place, entry in enumerate(entries):
        _check_keys(entry, ("prices", place), _ROW_KEYS, ("models", "seen_on", "source", "input", "output"), fault)
        rows.extend(_rows(entry, ("prices", place), rows, fault))
    return Prices(
        _line(data, (), "name", fault),
        _line(data, (), "currency", fault),
        _date(data["as_of"], ("as_of",), fault),
        _line(data, (), "source", fault),
        tuple(rows),
    )


def _rows(entry: Mapping[str, Any], key: Key, before: list[PriceRow], fault: _Fault) -> list[PriceRow]:
    """A row for each model of an entry, none of which overlaps one of the same model."""
    starts = _midnight(entry["from"], (*key, "from"), fault) if "from" in entry else AT_MIN
    ends = _midnight(entry["until"], (*key, "until"), fault) if "until" in entry else AT_MAX
    if ends <= starts:
        raise fault((*key, "until"), f"{ends.date()} is not after from {starts.date()}", "a later date")
    given = _amount(entry["input"], (*key, "input"), fault)
    price = Price(
        given,
        _amount(entry["cached_input"], (*key, "cached_input"), fault) if "cached_input" in entry else given,
        _amount(entry["output"], (*key, "output"), fault),
        _amount(entry["cache_write"], (*key, "cache_write"), fault) if "cache_write" in entry else None,
    )
    seen_on, source = _date(entry["seen_on"], (*key, "seen_on"), fault), _line(entry, key, "source", fault)
    models = entry["models"]
    if not isinstance(models, list) or not models:
        raise fault((*key, "models"), found(models), "a list of at least one model id")
    rows: list[PriceRow] = []
    for place, model in enumerate(models):
        if not isinstance(model, str) or not 1 <= len(model.encode()) <= MODEL_BYTES_MAX:
            raise fault((*key, "models", place), found(model), f"a model id of 1 to {MODEL_BYTES_MAX} bytes")
        for other in (*before, *rows):
            if other.model == model and starts < other.ends and other.starts < ends:
                raise fault((*key, "models", place), f"{model!r} has a price then already", "one price at a time")
        rows.append(PriceRow(model, price, source, seen_on, starts, ends))
    return rows


def _check_keys(
    table: Mapping[str, Any], key: Key, known: tuple[str, ...], needed: tuple[str, ...], fault: _Fault
) -> None:
    for name in table:
        if name not in known:
            raise fault((*key, name), "an unknown key", f"one of {', '.join(known)}")
    for name in needed:
        if name not in table:
            raise fault(key, f"{name} is missing", "a value for it")


def _amount(value: object, key: Key, fault: _Fault) -> Decimal:
    """A price a million tokens: a number of the file as it is written, never a float."""
    amount = Decimal(value) if type(value) is int else value
    if not isinstance(amount, Decimal) or not amount.is_finite() or not 0 <= amount <= PRICE_MAX:
        raise fault(key, found(str(value)), f"a number from 0 to {PRICE_MAX}: the price of a million tokens")
    if -int(amount.as_tuple().exponent) > PRICE_DIGITS_MAX:
        raise fault(key, found(str(value)), f"at most {PRICE_DIGITS_MAX} digits after the point")
    return amount


def _line(table: Mapping[str, Any], key: Key, name: str, fault: _Fault) -> str:
    value = table[name]
    if not isinstance(value, str) or not 1 <= len(value) <= LINE_MAX or not value.isprintable():
        raise fault((*key, name), found(value), f"one line of 1 to {LINE_MAX} characters")
    return value


def _date(value: object, key: Key, fault: _Fault) -> date:
    if type(value) is not date:
        raise fault(key, found(str(value)), "a date, such as 2026-09-22")
    return value


def _midnight(value: object, key: Key, fault: _Fault) -> datetime:
    return datetime.combine(_date(value, key, fault), time(0), UTC)


class _Fault:
    """Makes the error of a key: it knows the text, and so the line."""

    def __init__(self, text: str, file: str) -> None:
        self._text = text
        self._file = file

    def __call__(self, key: Key, what: str, expected: str) -> PricesError:
        return PricesError(
            file=self._file, line=line_of(self._text, key), key=shown(key), found=what, expected=expected
        )


def _read(file: Traversable, name: str) -> Prices:
    return parse_prices(text_of(file, name, PricesError), file=name)


def _folder() -> Traversable:
    return config_folder() / "prices"
