"""`gratis replay` of CSV and Parquet: the same decisions as of JSON lines, whatever they are written in."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gratis.audit.columns import spool, tables
from gratis.audit.columns.logs import BATCH_ROWS
from gratis.cli import replaying
from gratis.lines import DECISION_FIELDS

from .test_cli import gratis, sent

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LARGE = "gpt-4o-2024-08-06"
NOON = datetime(2025, 4, 20, 12, tzinfo=UTC)
TIER = ("--tier", "3")


def log(rows: int = 300) -> list[dict[str, Any]]:
    """Requests of some accounts; every thirtieth comes again, every fiftieth with other content."""
    found = []
    for number in range(rows):
        again = number - 7 if number % 30 == 29 else number
        found.append(
            {
                "id": f"r{again}",
                "account": None if again % 5 == 0 else f'org "{again % 5}", caf\u00e9',
                "project": None,
                "model": (LARGE, "gpt-4o-mini-2024-07-18", "unlisted")[again % 3],
                "input_tokens": 90_000 + number % 50 // 49,
                "output_tokens": None if again % 13 == 0 else again,
                "at": (NOON + timedelta(minutes=again, microseconds=again % 2)).isoformat(),
                "kind": "completion",
                "tools": ["function"] if again % 4 == 0 else [],
            }
        )
    return found


def parquet(path: Path, rows: Sequence[dict[str, Any]], **options: Any) -> Path:
    """The same log as Parquet, its times as times."""
    table = pa.Table.from_pylist([{**row, "at": datetime.fromisoformat(row["at"])} for row in rows])
    pq.write_table(table.set_column(6, "at", table["at"].cast(pa.timestamp("us", "UTC"))), path, **options)
    return path


def sheet(path: Path, rows: Sequence[dict[str, Any]], lead: bytes = b"\xef\xbb\xbf") -> Path:
    """The same log as CSV: quoted, with lines that end as on Windows, as spreadsheets write it."""
    lines = [",".join(rows[0])]
    for row in rows:
        cells = [
            "" if cell is None else json.dumps(cell) if isinstance(cell, list) else str(cell) for cell in row.values()
        ]
        lines.append(",".join('"' + cell.replace('"', '""') + '"' if cell else "" for cell in cells))
    path.write_bytes(lead + "\r\n".join(lines).encode() + b"\r\n")
    return path


def errors_of(text: str) -> list[tuple[int, str]]:
    """The number of each line or row that was told of, and why."""
    found = []
    for line in text.splitlines():
        place, why = line.split(": ", 2)[2].split(": ", 1) if ": " in line else ("", line)
        found.append((int(place.split()[1]), why))
    return found


def test_each_form_gives_the_same_lines_and_the_same_errors(tmp_path: Path) -> None:
    """JSON lines, CSV from a file or from standard input, and Parquet: byte for byte, and exit code 2 for bad rows."""
    rows = log()
    expected = gratis("replay", *TIER, stdin=sent(rows))
    by_sheet = gratis("replay", sheet(tmp_path / "log.csv", rows), *TIER)
    from_stdin = gratis("replay", "--from", "csv", *TIER, stdin=sheet(tmp_path / "x", rows, b"").read_bytes())
    by_columns = gratis("replay", parquet(tmp_path / "log.parquet", rows, row_group_size=70), *TIER)
    assert (expected.code, len(expected.lines)) == (2, 300 - len(errors_of(expected.err)))
    assert [by_sheet.out, from_stdin.out, by_columns.out] == [expected.out] * 3
    assert errors_of(by_columns.err) == errors_of(expected.err)
    shifted = [(number - 1, why) for number, why in errors_of(by_sheet.err)]
    assert shifted == errors_of(expected.err)
    assert (by_sheet.code, from_stdin.code, by_columns.code) == (2, 2, 2)


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_decisions_go_to_a_file_as_its_name_says(tmp_path: Path, form: str) -> None:
    """Whatever the log was, `--out` holds the decisions that would have been printed, and nothing is printed."""
    rows = log()
    expected = gratis("replay", *TIER, stdin=sent(rows))
    found = []
    for name in (sheet(tmp_path / "log.csv", rows), parquet(tmp_path / "log.parquet", rows)):
        out = tmp_path / f"out.{form}"
        answer = gratis("replay", name, *TIER, "--out", out)
        assert (answer.code, answer.out) == (2, "")
        found.append(out.read_bytes() if form != "parquet" else pq.read_table(out))
    if form == "parquet":
        assert found[0].to_pylist() == found[1].to_pylist()
        assert found[0].schema == found[1].schema
    else:
        assert found[0] == found[1]
    if form == "jsonl":
        assert found[0].decode() == expected.out
    elif form == "csv":
        assert found[0].decode().splitlines()[0] == ",".join(DECISION_FIELDS)
        assert len(found[0].splitlines()) == 1 + len(expected.lines)
    else:
        assert found[0].num_rows == len(expected.lines)
        assert found[0].schema.field("at").type == pa.timestamp("us", "UTC")


def test_totals_are_the_same_of_each_form(tmp_path: Path) -> None:
    """`--totals` prints requests and tokens by day, group and reason, and no decision."""
    rows = log()
    expected = gratis("replay", *TIER, "--totals", stdin=sent(rows))
    found = gratis("replay", parquet(tmp_path / "log.parquet", rows), *TIER, "--totals")
    assert found.out == expected.out
    assert expected.lines[0] == {
        "day": "2025-04-20",
        "group": None,
        "reason": "model_not_listed",
        "requests": 90,
        "unmeasured": 7,
        "tokens": 7_482_409,
        "free_tokens": 0,
        "billed_tokens": 7_482_409,
    }
    table = gratis("replay", parquet(tmp_path / "log.parquet", rows), *TIER, "--totals", "--format", "table")
    assert table.out.splitlines()[0].split() == list(replaying.TOTALS)


def test_a_folder_is_one_log(tmp_path: Path) -> None:
    """The files of a folder are judged in the order of their names, as one log."""
    rows = log()
    for place in range(3):
        parquet(tmp_path / f"part-{place}.parquet", rows[place * 100 : place * 100 + 100])
    assert gratis("replay", tmp_path, *TIER).out == gratis("replay", *TIER, stdin=sent(rows)).out


def test_a_table_shows_what_lines_say(tmp_path: Path) -> None:
    """`--format table` of Parquet is that of JSON lines."""
    rows = log(40)
    found = gratis("replay", parquet(tmp_path / "log.parquet", rows), *TIER, "--format", "table")
    assert found.out == gratis("replay", *TIER, "--format", "table", stdin=sent(rows)).out


def test_rows_without_ids_are_judged_by_their_number(tmp_path: Path) -> None:
    """Without a column of ids every row is a request of its own, and its number is its id."""
    rows = [{name: cell for name, cell in row.items() if name != "id"} for row in log(5)]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "log.parquet")
    by_columns = gratis("replay", tmp_path / "log.parquet", *TIER)
    by_sheet = gratis("replay", sheet(tmp_path / "log.csv", rows), *TIER)
    assert [line["id"] for line in by_columns.lines] == ["1", "2", "3", "4", "5"]
    assert (by_columns.out, by_columns.code) == (by_sheet.out, by_sheet.code)


def test_trusted_ids_are_not_looked_through(tmp_path: Path) -> None:
    """With `--trust-ids` each row is judged, also one whose id was seen before."""
    rows = [log(1)[0], log(1)[0]]
    name = parquet(tmp_path / "log.parquet", rows)
    assert [line["replayed"] for line in gratis("replay", name, *TIER).lines] == [False, True]
    assert [line["replayed"] for line in gratis("replay", name, *TIER, "--trust-ids").lines] == [False, False]


def test_times_without_a_zone_are_refused_unless_it_is_told(tmp_path: Path) -> None:
    """A naive time is no instant; `--zone` says which zone it means."""
    pq.write_table(pa.table({"model": [LARGE], "at": [NOON.replace(tzinfo=None)]}), tmp_path / "log.parquet")
    refused = gratis("replay", tmp_path / "log.parquet", *TIER)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == (
        f"gratis: {tmp_path / 'log.parquet'}: column at: found times that name no zone; expected one,"
        " or `--zone UTC` to say which\n"
    )
    assert [line["at"] for line in gratis("replay", tmp_path / "log.parquet", *TIER, "--zone", "UTC").lines] == [
        "2025-04-20T12:00:00Z"
    ]
    unknown = gratis("replay", tmp_path / "log.parquet", *TIER, "--zone", "Mars/Olympus")
    assert (unknown.code, unknown.out, "Mars/Olympus" in unknown.err) == (2, "", True)


HEAD = "id,model,at,input_tokens,output_tokens,tools\n"
GOOD = f"good,{LARGE},2025-04-20T12:00:00Z,1,1,\n"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (f"b,{LARGE},2025-04-20T12:00:00Z,1.5,1,\n", "input_tokens: found '1.5'; expected a whole number from 0"),
        (f"b,{LARGE},2025-04-20T12:00:00Z,-1,1,\n", "input_tokens: found -1; expected a whole number from 0"),
        (f"b,{LARGE},2025-04-20T12:00:00Z,\u0663,1,\n", "input_tokens: found '\\u0663'; expected a whole number"),
        (f"b,{LARGE},yesterday,1,1,\n", "at: found 'yesterday'; expected RFC 3339"),
        (f",{LARGE},2025-04-20T12:00:00Z,1,1,\n", "id: missing; expected in every request: id, model, at"),
        (f"b,{LARGE},2025-04-20T12:00:00Z,1,1\n", "line: found 5 cells; expected 6, as the header has"),
        (f"b,{LARGE},2025-04-20T12:00:00Z,1,1,,\n", "line: found 7 cells; expected 6, as the header has"),
        (f"b,{LARGE},2025-04-20T12:00:00Z,1,1,[\n", "tools: found '['; expected a JSON list of kinds of tool"),
        (f'"b" x,{LARGE},2025-04-20T12:00:00Z,1,1,\n', "line: not CSV: "),
        (f"{'x' * (2 << 20)},{LARGE},2025-04-20T12:00:00Z,1,1,\n", "line: not CSV: field larger than"),
    ],
)
def test_a_bad_row_of_csv_is_told_by_line_and_column(line: str, why: str) -> None:
    """The others are decided, and the exit code is 2."""
    answer = gratis(
        "replay", "--from", "csv", *TIER, stdin=(HEAD + '"a\nb",x,2025-04-20T12:00:00Z,1,1,\n' + line + GOOD).encode()
    )
    told = answer.err.splitlines()[1]
    assert answer.err.splitlines()[0].startswith(
        "gratis: standard input: line 2: id: found 'a\\nb'; expected no control"
    )
    assert told.startswith(f"gratis: standard input: line 4: {why}")
    assert ([one["id"] for one in answer.lines], answer.code) == (["good"], 2)


@pytest.mark.parametrize(
    ("head", "why"),
    [
        ("", "found 'nothing'; expected a header with at least model and at"),
        ("id,at\n", "found 'id, at'; expected a header with at least model and at"),
        ("id,model,at,model\n", "column 'model' twice; expected each once"),
        ("id,Model,at\n", "column Model: an unknown field; expected 'model', spelled so"),
        ('"id', "not CSV: unexpected end of data"),
    ],
)
def test_a_bad_header_is_bad_input(head: str, why: str) -> None:
    """Nothing is decided under a header that is none."""
    answer = gratis("replay", "--from", "csv", *TIER, stdin=head.encode())
    assert (answer.code, answer.out, answer.err) == (2, "", f"gratis: -: line 1: {why}\n")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("nowhere.parquet",), "nowhere.parquet: No such file or directory"),
        (("-", "--from", "parquet"), "standard input: expected JSON lines or CSV; Parquet is read from a file"),
        (("-", "--trust-ids"), "--trust-ids: expected with Parquet only"),
        (("-", "--zone", "UTC"), "--zone: expected with Parquet only"),
        (("-", "--out", "x.txt"), "--out: found 'x.txt'; expected a name that ends with .jsonl, .csv or .parquet"),
        (("-", "--out", "x.csv", "--totals"), "--out: expected without --totals, which are printed"),
        (("x.csv", "--responses"), "--responses: expected JSON lines"),
    ],
)
def test_bad_use_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], why: str) -> None:
    """What does not go together is refused at once, in one line."""
    monkeypatch.chdir(tmp_path)
    answer = gratis("replay", *arguments, *TIER, stdin=b"")
    assert (answer.code, answer.out, answer.err) == (2, "", f"gratis: {why}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_parquet_is_told(tmp_path: Path) -> None:
    """A name is no proof."""
    (tmp_path / "log.parquet").write_bytes(b"nonsense")
    answer = gratis("replay", tmp_path / "log.parquet", *TIER)
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert answer.err.endswith("; expected a Parquet file\n")


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Parquet needs an extra, and says so in one line; CSV and JSON lines do not."""
    monkeypatch.setattr(replaying, "find_spec", lambda _name: None)
    for arguments in ((tmp_path / "log.parquet",), ("-", "--out", tmp_path / "out.parquet")):
        answer = gratis("replay", *arguments, *TIER, stdin=b"")
        told = f"{arguments[-1]}: Parquet needs pyarrow and numba: pip install 'gratis[columns]'"
        assert (answer.code, answer.out, answer.err) == (2, "", f"gratis: {told}\n")
    assert gratis("replay", sheet(tmp_path / "log.csv", log(3)), *TIER).code == 0


def test_a_log_longer_than_a_batch_is_judged_as_one(tmp_path: Path) -> None:
    """What is used is kept from batch to batch, and rows are counted through."""
    size = 4 * BATCH_ROWS + 3
    table = pa.table(
        {
            "model": pa.array([LARGE]).take(pa.array([0] * size)),
            "at": pa.array([NOON]).take(pa.array([0] * size)),
            "input_tokens": pa.array([4] * (size - 1) + [-4]),
            "output_tokens": pa.array([0] * size),
        }
    )
    pq.write_table(table, tmp_path / "log.parquet")
    answer = gratis("replay", tmp_path / "log.parquet", *TIER, "--totals")
    assert [(one["reason"], one["requests"]) for one in answer.lines] == [
        ("over_allowance", size - 1 - 250_000),
        ("within_allowance", 250_000),
    ]
    assert answer.err == (
        f"gratis: {tmp_path / 'log.parquet'}: row {size}: input_tokens: found -4;"
        " expected a whole number from 0 to 1000000000000\n"
    )


ODD_LINES = [
    b"",
    b"   ",
    b"nonsense",
    b"[]",
    b"{}",
    b'{"id":"a","model":"m","at":"2025-04-20T12:00:00Z","input_tokens":5.0}',
    b'{"id":"b","model":"m","at":"2025-04-20T12:00:00Z","input_tokens":true}',
    b'{"id":"c","model":"m","at":"2025-04-20T12:00:00Z","input_tokens":99999999999999999999999}',
    b'{"id":"d","model":"m","at":"2025-04-20T12:00:00Z","input-tokens":5}',
    b'{"id":"e","model":"m","at":"2025-04-20t12:00:00.1234567+02:00","note":"kept apart","tokens":5}',
    b'{"id":"f","model":"m","at":"2025-02-30T12:00:00Z"}',
    b'{"id":"g","model":"m","at":"2025-04-20T12:00:00"}',
    b'{"id":"h","model":"m","at":"2025-04-20T12:00:00Z","tools":[{"type":"web_search"},"function"]}',
    b'{"id":"h","model":"m","at":"2025-04-20T12:00:00Z","tools":["function","web_search"]}',
    b'{"id":"i","model":"m","at":"2025-04-20T12:00:00Z","tools":"function"}',
    b'{"id":"\\ud800","model":"m","at":"2025-04-20T12:00:00Z"}',
    b'{"id":"j","model":null,"at":"2025-04-20T12:00:00Z"}',
    b'{"id":"k","model":"m","at":"2025-04-20T12:00:00Z","kind":"oven"}',
    b'{"id":"l","model":"m","at":"2025-04-20T12:00:00Z","account":null,"kind":null,"project":null,"tools":null}',
    b'{"id":"n","model":"m"',
    b',"at":"2025-04-20T12:00:00Z"} {"id":"o","model":"m","at":"2025-04-20T12:00:00Z"}',
    b'{"id":"p","model":"m","at":"2025-04-20T12:00:00Z"} {"id":"q","model":"m","at":"2025-04-20T12:00:00Z"}',
    b'{"id":"m","model":"' + b"x" * (1 << 20) + b'","at":"2025-04-20T12:00:00Z"}',
]


@pytest.mark.parametrize("rows", [1, 3, 1 << 16])
@pytest.mark.parametrize("options", [(), ("--totals",), ("--format", "table")])
def test_a_large_file_of_lines_is_judged_as_columns_and_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, options: tuple[str, ...]
) -> None:
    """Each line, each error and their order are those of the way line by line, odd ones included."""
    name = tmp_path / "log.jsonl"
    odd = b"\n".join(ODD_LINES) + b"\n"
    name.write_bytes(b"\xef\xbb\xbf" + sent(log(100)) + odd + sent(log()) + odd)
    expected = gratis("replay", name, *TIER, *options)
    monkeypatch.setattr(replaying, "LARGE_BYTES", 0)
    monkeypatch.setattr(spool, "ROWS", rows)
    found = gratis("replay", name, *TIER, *options)
    assert (found.out, found.err.splitlines(), found.code) == (expected.out, expected.err.splitlines(), 2)
    assert len(found.err.splitlines()) == 36


# -- what is written


@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl"])
def test_a_file_has_its_name_only_when_all_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Who interrupts the work finds what was there before, and nothing half-written beside it."""
    name, out = parquet(tmp_path / "log.parquet", log()), tmp_path / f"out.{form}"
    out.write_bytes(b"before")

    def interrupt(_judge: object, _batch: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tables.Judge, "decide", interrupt)
    assert gratis("replay", name, *TIER, "--out", out).code == 130
    assert (out.read_bytes(), sorted(each.name for each in tmp_path.iterdir())) == (
        b"before",
        sorted([name.name, out.name]),
    )


@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("source", ["parquet", "jsonl"])
def test_a_full_disk_is_told_in_one_line(tmp_path: Path, source: str, form: str) -> None:
    """`/dev/full` is a disk without room: the file cannot be written, and that is said once."""
    out, name = tmp_path / f"out.{form}", tmp_path / f"log.{source}"
    out.symlink_to("/dev/full")
    rows = [{**row, "id": str(number)} for number, row in enumerate(log(20_000))]
    parquet(name, rows) if source == "parquet" else name.write_bytes(sent(rows))
    answer = gratis("replay", name, *TIER, "--out", out)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == f"gratis: --out: {out}: No space left on device\n"


def test_a_report_tells_of_each_form_the_same(tmp_path: Path) -> None:
    """`--html` writes a page beside the decisions, whatever the log is written in; bad rows are told as ever."""
    rows = log()
    names = [parquet(tmp_path / "log.parquet", rows), sheet(tmp_path / "log.csv", rows), tmp_path / "log.jsonl"]
    names[2].write_bytes(sent(rows))
    expected = gratis("replay", names[0], *TIER)
    pages = []
    for name in names:
        page = tmp_path / "page.html"
        answer = gratis("replay", name, *TIER, "--html", page)
        assert (answer.code, answer.out) == (2, expected.out)
        pages.append(re.sub(r"Made .{16} UTC", "", page.read_text()))
    assert pages[0] == pages[1] == pages[2]
    assert ", replayed" in pages[0]
    assert gratis("replay", names[0], *TIER, "--html", page).err == expected.err


def test_a_request_on_two_lines_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are decoded together, but each by itself: as many requests as lines are not enough."""
    name = tmp_path / "log.jsonl"
    name.write_bytes(
        b'{"id":"a","model":"m"\n'
        b',"at":"2025-04-20T12:00:00Z"} {"id":"b","model":"m","at":"2025-04-20T12:00:00Z"}\n'
        b'{"id":"c","model":"m","at":"2025-04-20T12:00:00Z"}\r\n'
    )
    expected = gratis("replay", name, *TIER)
    monkeypatch.setattr(replaying, "LARGE_BYTES", 0)
    found = gratis("replay", name, *TIER)
    assert (found.out, found.err) == (expected.out, expected.err)
    assert ([line["id"] for line in found.lines], len(found.err.splitlines())) == (["c"], 2)


def test_what_is_written_takes_the_place_of_nothing_that_is_read(tmp_path):
    """`--out` and `--html` with the name of the log are refused, by whatever way it is named, and the log stays."""
    log, other = tmp_path / "log.csv", tmp_path / "link.csv"
    log.write_bytes(b"id,model,at\nr,m,2025-04-20T00:00:00Z\n")
    other.symlink_to(log)
    before = log.read_bytes()
    for option in ("--out", "--html"):
        for name in (log, other):
            answer = gratis("replay", log, "--tier", "3", option, name)
            assert (answer.code, answer.out) == (2, "")
            assert answer.err.startswith(f"gratis: {option}: {name}: found the file that is read, ")
    assert log.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.csv", "log.csv"]


def test_a_place_that_cannot_be_is_told_in_one_line(tmp_path):
    """`--out` below a file that is no folder."""
    log = tmp_path / "log.csv"
    log.write_bytes(b"id,model,at\n")
    answer = gratis("replay", log, "--tier", "3", "--out", log / "x.jsonl")
    assert (answer.code, answer.err) == (2, f"gratis: --out: {log}/x.jsonl: Not a directory\n")


def test_parquet_is_known_by_how_it_begins(tmp_path):
    """A file of another name is read as what it is; told to be something else, it is refused in one line."""
    log, other = tmp_path / "log.jsonl", tmp_path / "log"
    log.write_bytes(
        b'{"id":"r","model":"gpt-4o-2024-08-06","at":"2025-04-20T00:00:00Z","input_tokens":1,"output_tokens":0}\n'
    )
    table = pa.table({"id": ["r"], "model": ["gpt-4o-2024-08-06"], "at": ["2025-04-20T00:00:00Z"],
                      "input_tokens": [1], "output_tokens": [0]})  # fmt: skip
    pq.write_table(table, other)
    assert gratis("replay", other, "--tier", "3") == gratis("replay", log, "--tier", "3")
    answer = gratis("replay", other, "--tier", "3", "--from", "json")
    assert (answer.code, answer.err) == (2, f"gratis: {other}: found Parquet; expected json, as --from says\n")
