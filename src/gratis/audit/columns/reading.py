"""Columns of requests as the kernel's numbers, and what is wrong with a row that is none.

Only what differs is looked at in Python: each name, kind and set of tools once. A row that is no request is put
together as the line that it would be, so that its error is the one that `lines.py` gives that line.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gratis.audit.columns import kernel, texts
from gratis.audit.columns.cases import BAD, KIND_CODES, Names
from gratis.errors import GratisError, RequestError
from gratis.lines import REQUEST_FIELDS, decode, instant, request_of
from gratis.model import AT_MAX, AT_MIN, Request, check_name, from_micros, micros, stamp

if TYPE_CHECKING:
    from collections.abc import Callable

    from gratis.audit.columns.compiled import Array

TEXTS = ("id", "account", "project", "model", "kind")
COUNTS = ("input_tokens", "output_tokens", "cached_tokens")
LOOKED_UP_MAX = 100_000
MICROS = {"s": 1_000_000, "ms": 1_000, "us": 1}
NANOS = 1_000
RFC3339 = r"^\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)$"
US_UTC = pa.timestamp("us", "UTC")


class Reader:
    """Reads the batches of one log. `zone` is that of times which name none."""

    def __init__(self, *, zone: str | None = None) -> None:
        self._zone = zone
        self._schema: pa.Schema | None = None
        self.accounts = Names(_name("account"))
        self.projects = Names(_name("project"), first=1)
        self.models = Names(_model)
        self.tools = Names(_tools)
        self.accounts.code("default")
        self.tools.code(())
        self._known: dict[str, tuple[Any, Array]] = {}

    def rows(self, batch: pa.RecordBatch) -> kernel.Rows:
        """A batch as numbers."""
        if batch.schema != self._schema:
            check_columns(batch.schema, zone=self._zone)
            self._schema = batch.schema
        return kernel.Rows(
            account=self._codes(batch, "account", self.accounts.code, self.accounts),
            project=self._codes(batch, "project", self.projects.code, self.projects),
            model=self._codes(batch, "model", self.models.code, self.models, of_null=BAD),
            kind=self._codes(batch, "kind", _kind),
            tools=self._tools(batch),
            at=texts.frozen(_times(column(batch, "at"), self._zone)),
            given=_counts(batch, "input_tokens", of_null=kernel.NONE),
            made=_counts(batch, "output_tokens", of_null=kernel.NONE),
            cached=_counts(batch, "cached_tokens", of_null=0),
            is_bad=_bad_ids(batch),
        )

    def request(self, batch: pa.RecordBatch, row: int, number: int) -> Request:
        """A row as the request that it is; raises what is wrong with it. One without an id has its number."""
        line: dict[str, Any] = {}
        for field in REQUEST_FIELDS:
            cells = column(batch, field)
            if cells is not None:
                line[field] = self._cell(field, cells[row])
        line.setdefault("id", str(number))
        for field in ("id", "model", "at"):
            if line[field] is None:
                break
        else:
            if isinstance(line["at"], RequestError):
                raise line["at"]
        return request_of(line)

    def _cell(self, field: str, cell: Any) -> Any:
        """A cell as a line would have it."""
        if not cell.is_valid:
            return None
        if pa.types.is_timestamp(cell.type):
            return _written(pa.array([cell.value], pa.int64()).view(cell.type), self._zone)
        try:
            value = cell.as_py()
        except UnicodeDecodeError:
            raise RequestError(field, "found bytes that are not UTF-8; expected Unicode text") from None
        return tools_of(value) if field == "tools" and isinstance(value, str) else value

    def _codes(
        self,
        batch: pa.RecordBatch,
        field: str,
        code: Callable[[Any], int],
        names: Names | None = None,
        *,
        of_null: int = 0,
    ) -> Array:
        """The code of each cell."""
        cells = column(batch, field)
        if cells is None or cells.null_count == len(cells):
            return _all(batch.num_rows, of_null, np.int32)
        coded = cells if pa.types.is_dictionary(cells.type) else cells.dictionary_encode()
        indices = coded.indices
        mapping = self._mapping(field, coded.dictionary, code, names)
        if coded.dictionary.null_count:
            mapping = np.where(coded.dictionary.is_null().to_numpy(zero_copy_only=False), np.int32(of_null), mapping)
        if indices.null_count:
            mapping = np.append(mapping, np.int32(of_null))
            indices = pc.fill_null(indices.cast(pa.int64()), len(mapping) - 1)
        return texts.frozen(mapping[indices.to_numpy(zero_copy_only=False)].astype(np.int32, copy=False))

    def _mapping(self, field: str, values: Any, code: Callable[[Any], int], names: Names | None) -> Array:
        """The code of each value of a dictionary: those known before are looked up together."""
        last = self._known.get(field)
        if last is not None and last[0].equals(values):
            return last[1]
        if names is None or not 0 < len(names.values) <= LOOKED_UP_MAX:
            mapping = np.array([code(value) for value in _values(values)], np.int32)
        else:
            found = pc.index_in(values, value_set=pa.array(names.values, values.type))
            mapping = found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
            strange = np.flatnonzero(mapping < 0)
            mapping += np.int32(names.first)
            if strange.size:
                mapping[strange] = [code(value) for value in _values(values.take(pa.array(strange)))]
        self._known[field] = values, mapping
        return mapping

    def _tools(self, batch: pa.RecordBatch) -> Array:
        """The code of each set of tools."""
        cells = column(batch, "tools")
        if cells is None or cells.null_count == len(cells) or is_text(cells.type):
            return self._codes(batch, "tools", self._tools_in)
        code = self.tools.code
        known = [code(tuple(each)) if each else 0 for each in _values(cells)]
        return texts.frozen(np.array(known, np.int32))

    def _tools_in(self, text: str | None) -> int:
        try:
            return self.tools.code(tuple(tools_of(text)))
        except (RequestError, TypeError):
            return BAD


def column(batch: pa.RecordBatch, field: str) -> Any:
    """A column of a batch; None if there is none."""
    place = batch.schema.get_field_index(field)
    return None if place < 0 else batch.column(place)


def check_columns(schema: pa.Schema, *, zone: str | None = None) -> None:
    """Refuse columns that are misspelled, missing, or not of a type that says what they say."""
    try:
        request_of(dict.fromkeys(schema.names))
    except RequestError as error:
        if error.field not in REQUEST_FIELDS:
            raise GratisError(f"column {error}") from None
    for field in ("model", "at"):
        if schema.get_field_index(field) < 0:
            found = ", ".join(name for name in schema.names if name in REQUEST_FIELDS) or "none of ours"
            raise GratisError(f"columns: found {found}; expected at least model and at, each once")
    for field in REQUEST_FIELDS:
        if schema.get_field_index(field) >= 0:
            _check_type(field, schema.field(field).type, zone)


def _check_type(field: str, kind: pa.DataType, zone: str | None) -> None:
    if pa.types.is_null(kind):
        return
    if field in COUNTS:
        is_right, expected = pa.types.is_integer(kind), "integers"
    elif field == "at":
        is_right, expected = pa.types.is_timestamp(kind) or is_text(kind), "timestamps, or RFC 3339 text"
        if pa.types.is_timestamp(kind) and kind.tz is None and zone is None:
            raise GratisError("column at: found times that name no zone; expected one, or `--zone UTC` to say which")
    elif field == "tools":
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        is_right = is_text(kind) or (is_list and is_text(kind.value_type))
        expected = "lists of text, or JSON text"
    else:
        is_right, expected = is_text(kind), "text"
    if not is_right:
        raise GratisError(f"column {field}: found {kind}; expected {expected}")


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text, plain or as a dictionary."""
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain))


def tools_of(text: str | None) -> Any:
    """The tools that a JSON text lists."""
    try:
        found = decode(text or "[]")
    except (ValueError, RecursionError):
        raise RequestError("tools", f"found {text!a:.80}; expected a JSON list of kinds of tool") from None
    if isinstance(found, list):
        return [tool.get("type") if isinstance(tool, dict) else tool for tool in found]
    return [] if found is None else found


def _values(values: Any) -> list[Any]:
    """The texts of a column; None where there is none, or bytes that are no text."""
    try:
        return list(values.to_pylist())
    except UnicodeDecodeError:
        return [_text_or_none(cell) for cell in values]


def _text_or_none(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return None


def _name(field: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        check_name(field, value)
        return value

    return check


def _model(value: Any) -> Any:
    return Request(id="1", model=value, at=AT_MIN).model


def _tools(value: Any) -> Any:
    return Request(id="1", model="", at=AT_MIN, tools=value).tools


def _kind(value: Any) -> int:
    return KIND_CODES.get(value, BAD)


@lru_cache(8)
def _all(size: int, value: int, kind: type) -> Array:
    """A column that is absent; one of zeros needs no rows."""
    return texts.frozen(np.full(size if value else 0, value, kind))


def _counts(batch: pa.RecordBatch, field: str, *, of_null: int) -> Array:
    """Counts as integers of 64 bits; what is beyond them is as bad as a negative one."""
    cells = column(batch, field)
    if cells is None or cells.null_count == len(cells):
        return _all(batch.num_rows, of_null, np.int64)
    if cells.null_count == 0:
        found = cells.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
        is_absent = None
    else:
        found = pc.fill_null(cells, 0).to_numpy(zero_copy_only=False).astype(np.int64)
        is_absent = cells.is_null().to_numpy(zero_copy_only=False)
    if not pa.types.is_unsigned_integer(cells.type) or cells.type == pa.uint64():
        # -1 stands for an absent count: one that is written so is another bad number.
        is_negative = found < 0
        if is_negative.any():
            found = np.where(is_negative, np.int64(-2), found)
    if is_absent is not None:
        found = np.where(is_absent, np.int64(of_null), found)
    return texts.frozen(found)


def _times(cells: Any, zone: str | None) -> Array:
    """Microseconds since 1970; negative where there is no such time."""
    if pa.types.is_null(cells.type):
        return np.full(len(cells), BAD, np.int64)
    if is_text(cells.type):
        return _read_times(cells)
    cells = _zoned(cells, zone)
    raw = cells.view(pa.int64())
    raw = (pc.fill_null(raw, BAD) if raw.null_count else raw).to_numpy(zero_copy_only=False)
    if cells.type.unit == "ns":
        return raw // NANOS
    if cells.type.unit == "us":
        return raw
    times = MICROS[cells.type.unit]
    is_known = (raw >= 0) & (raw < kernel.AT_END // times)
    return np.where(is_known, raw, np.int64(0)) * times + np.where(is_known, np.int64(0), np.int64(BAD))


def _zoned(cells: Any, zone: str | None) -> Any:
    """Times that name their zone."""
    if cells.type.tz is not None:
        return cells
    try:
        return pc.assume_timezone(cells, zone)
    except pa.ArrowInvalid as error:
        raise GratisError(f"column at: {error}; expected times that there are once in {zone}") from None


def _read_times(cells: Any) -> Array:
    """Times that are written as text."""
    plain = cells.cast(pa.string())
    is_plain = pc.match_substring_regex(plain, RFC3339).fill_null(fill_value=True)
    if pc.all(is_plain).as_py() is not False:
        try:
            return pc.fill_null(plain.cast(US_UTC).view(pa.int64()), BAD).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid:
            pass  # a day that there is not: which one is found below
    return np.array([_micros_in(value) for value in _values(plain)], np.int64)


def _micros_in(value: Any) -> int:
    try:
        return micros(instant("at", value))
    except RequestError:
        return BAD


def _written(cells: Any, zone: str | None) -> Any:
    """A time as a line would have it; its error where no line could."""
    since = _zoned(cells, zone).view(pa.int64())[0].as_py()
    since = since // NANOS if cells.type.unit == "ns" else since * MICROS[cells.type.unit]
    try:
        return stamp(from_micros(since))
    except OverflowError:
        years = f"{AT_MIN.year} to {AT_MAX.year - 1}"
        return RequestError("at", f"found {since} microseconds since 1970; expected a year from {years}")


def _bad_ids(batch: pa.RecordBatch) -> Array:
    """Which ids are none; nothing where there is no such column."""
    cells = column(batch, "id")
    if cells is None:
        return texts.frozen(np.zeros(0, np.uint8))
    found = np.zeros(len(cells), np.uint8)
    if texts.check(texts.texts_of(cells), found):
        for row in np.flatnonzero(found == texts.STRANGE):
            found[row] = texts.GOOD if _is_name(cells[int(row)]) else texts.BAD
    if cells.null_count:
        found[cells.is_null().to_numpy(zero_copy_only=False)] = texts.BAD
    return texts.frozen(found)


def _is_name(cell: Any) -> bool:
    try:
        check_name("id", _text_or_none(cell))
    except RequestError:
        return False
    return True
