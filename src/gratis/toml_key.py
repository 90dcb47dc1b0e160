"""Keys of a TOML text as people write them, and the line on which each stands.

The standard reader tells a value's place only where the text is no TOML at all; this finds it for keys, as far
as the files of offers go: tables, arrays of tables, lists over several lines, inline tables.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

Key = tuple[str | int, ...]

_STRING = r"\"[^\"]*\"|'[^']*'"
_BARE = r"[A-Za-z0-9_-]+"
_HEADER = re.compile(r"(\[{1,2})([^\[\]]+)\]{1,2}\s*(?:#.*)?")
_PART = re.compile(rf"{_STRING}|[^.]+")
_PAIR = re.compile(rf"({_STRING}|{_BARE})\s*=\s*(.*)")
_TOKEN = re.compile(rf"{_STRING}|#.*|[^\s,\[\]#\"']+|[\[\]]")
_INNER = re.compile(rf"[{{,]\s*({_STRING}|{_BARE})\s*=")


def shown(key: Key) -> str:
    """A key as people write it, counting from 1: revisions[2].groups.1M."""
    text = ""
    for part in key:
        text += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "the file"


def line_of(text: str, key: Key) -> int:
    """The line on which a key stands, or else the nearest table around it that has one."""
    lines = dict(_keys(text))
    while key and key not in lines:
        key = key[:-1]
    return lines.get(key, 1)


def _keys(text: str) -> Iterator[tuple[Key, int]]:
    table: Key = ()
    counts: dict[Key, int] = {}
    inside: Key | None = None
    items = 0
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if inside is not None:
            key, value = inside, line
        elif header := _HEADER.fullmatch(line):
            table = _table(header, counts)
            yield table, number
            continue
        elif pair := _PAIR.match(line):
            key, value, items = (*table, _bare(pair[1])), pair[2], 0
            yield key, number
        else:
            continue
        if value.startswith("{"):
            yield from (((*key, _bare(name)), number) for name in _INNER.findall(value))
        elif inside is not None or value.startswith("["):
            tokens = [token for token in _TOKEN.findall(value) if not token.startswith("#")]
            found = [token for token in tokens if token not in {"[", "]"}]
            yield from (((*key, items + item), number) for item in range(len(found)))
            items += len(found)
            inside = None if tokens and tokens[-1] == "]" else key


def _table(header: re.Match[str], counts: dict[Key, int]) -> Key:
    """The key of a table's header; `counts` remembers how many tables each array has so far."""
    table: Key = ()
    parts = [_bare(part.strip()) for part in _PART.findall(header[2])]
    for place, part in enumerate(parts, start=1):
        table = (*table, part)
        if header[1] == "[[" and place == len(parts):
            counts[table] = counts.get(table, -1) + 1
        if table in counts:
            table = (*table, counts[table])
    return table


def _bare(name: str) -> str:
    return name.strip("\"'")
