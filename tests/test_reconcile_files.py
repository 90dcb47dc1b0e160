"""Every shape of report is read for what it says, and what is no report is refused by file, line and field."""

import json
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from time import tzset

import pytest

from gratis.reconcile.files import reports_of
from gratis.reconcile.rows import ReportError

FOLDER = Path(__file__).parent / "reports"
MAY = datetime(2026, 5, 1, tzinfo=UTC)


def read(*names):
    """What these files of the folder say."""
    return reports_of([(name, (FOLDER / name).read_bytes()) for name in names])


def text(content, name="f"):
    """What this content says."""
    return reports_of([(name, content.encode() if isinstance(content, str) else content)])


def changed(name, old, new):
    """A file of the folder with something changed in it."""
    content = (FOLDER / name).read_bytes()
    assert old.encode() in content
    return content.replace(old.encode(), new.encode(), 1)


def short(row):
    """What a row says, but for where it stands."""
    return (
        (row.start.date().isoformat(), row.project, row.model, row.service_tier, row.batch),
        (row.input_tokens, row.output_tokens, row.cached_tokens, row.cache_write_tokens, row.requests),
    )


def test_a_page_of_usage():
    """All fields of the API's result; what it is not grouped by is null; a field that came later is left alone."""
    report = read("usage_2026.json")
    assert [short(row) for row in report.usage] == [
        (("2026-05-01", "proj_a", "gpt-5.4-2026-03-05", "incentivized-tier", False), (59_200, 1_200, 5_760, 0, 10)),
        (("2026-05-01", "proj_a", "gpt-5.4-2026-03-05", "default", False), (700, 30, 0, 0, 1)),
        (("2026-05-01", "proj_b", "gpt-5.4-mini-2026-03-17", "flex-tier", True), (90, 5, 0, 30, 2)),
        (("2026-05-03", "proj_a", "gpt-5.4-2026-03-05", None, None), (11, 2, 0, 0, 1)),
    ]
    assert [row.is_free for row in report.usage] == [True, False, False, False]
    assert len(report.usage_spans) == 3
    assert report.usage[1].source == "usage_2026.json data[0].results[1]"


def test_pages_in_one_file_or_several_say_the_same():
    """One a line, as a list, or a file each: the rows are those of the whole."""
    whole = [short(row) for row in read("usage_2026.json").usage]
    assert [short(row) for row in read("usage_pages.jsonl").usage] == whole
    pages = [json.loads(line) for line in (FOLDER / "usage_pages.jsonl").read_text().splitlines()]
    assert [short(row) for row in text(json.dumps(pages)).usage] == whole
    files = [(f"f{number}", json.dumps(page).encode()) for number, page in enumerate(pages)]
    assert [short(row) for row in reports_of(files).usage] == whole


def test_the_first_shape_of_usage():
    """In March 2025 there were no tiers and fewer parts."""
    assert [short(row) for row in read("usage_2025.json").usage] == [
        (("2025-03-10", None, None, None, None), (1_000, 500, 800, 0, 5))
    ]


def test_hours_are_parts_of_their_day():
    """Spans of an hour count on the day that they are in."""
    report = read("usage_hours.json")
    assert {row.day for row in report.usage} == {MAY}
    assert sum(row.tokens for row in report.usage) == 225


def test_siblings():
    """Embeddings have input only; calls of hosted tools have no tokens, and are counted."""
    report = read("embeddings.json", "web_search_calls.json")
    assert [(row.kind, row.tokens, row.count) for row in report.usage] == [
        ("embeddings", 4_000, 0),
        ("web_search_calls", 0, 3),
    ]


def test_a_page_of_costs():
    """Amounts have the digits of the text, be they numbers or strings, and may be credits."""
    rows = read("costs.json").costs
    assert [str(row.amount) for row in rows] == ["0.00175000000000000012", "0.00045", "0", "0.00009", "-0.5"]
    assert [row.model for row in rows] == ["gpt-5.4-2026-03-05"] * 3 + ["gpt-audio-mini-2025-12-15", None]
    assert {row.currency for row in rows} == {"usd"}
    assert rows[1].quantity == 30


def test_the_export_of_activity():
    """Floats of whole value, FALSE, a row of times only, and two rows of one day and model: all are kept."""
    report = read("activity_2025-10.tsv")
    assert [short(row) for row in report.usage] == [
        (("2025-10-01", "proj_a", "gpt-5-2025-08-07", "default", False), (59_200, 1_200, 5_760, 0, 10)),
        (("2025-10-01", "proj_a", "gpt-5-2025-08-07", "default", False), (100, 5, 0, 0, 1)),
        (("2025-10-03", "proj_a", "gpt-5-2025-08-07", "incentivized-tier", True), (59_200, 1_200, 5_760, 0, 10)),
    ]
    assert len(report.usage_spans) == 4
    assert report.usage[1].source == "activity_2025-10.tsv line 3"


def test_the_export_with_a_mark_and_cache_writes():
    """With commas, a byte order mark and the column of 2026 it says the same."""
    rows = read("activity_2026.csv").usage
    assert [row.cache_write_tokens for row in rows] == [30, 30, 30]
    assert [row.tokens for row in rows] == [row.tokens for row in read("activity_2025-10.tsv").usage]


def test_an_export_of_nothing():
    """Days without traffic are rows of times only: the days are covered, and nothing was used."""
    report = read("activity_empty.csv")
    assert report.usage == ()
    assert len(report.usage_spans) == 3


def test_the_export_of_costs():
    """Seventeen decimals are kept, and so is a number with an exponent."""
    rows = read("costs_2025-10.csv").costs
    assert [row.amount for row in rows] == [Decimal("0.06680000000000001"), Decimal("0.012"), Decimal("0.00009")]
    assert [row.line_item for row in rows] == ["gpt-5-2025-08-07, input", "gpt-5-2025-08-07, output", "web search"]


@pytest.mark.parametrize(
    "time", ["1759276800", "1759276800.0", "2025-10-01T00:00:00Z", "2025-10-01T00:00:00", "2025-10-01"]
)
def test_times_of_an_export(time, monkeypatch):
    """Unix seconds or ISO, with or without an offset: UTC, wherever the program runs."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        tzset()
        report = text(f"start_time,end_time,num_model_requests,input_tokens,output_tokens\n{time},1759363200,1,2,3\n")
    tzset()
    assert report.usage[0].start == datetime(2025, 10, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("usage_no_cursor.json", "usage_no_cursor.json: has_more is true and next_page is null"),
        ("usage_half.json", "usage_half.json: has_more is true and no page follows"),
        ("usage_circle.jsonl", "next_page: the cursor of usage_circle.jsonl line 1 again"),
    ],
)
def test_half_a_report_is_refused(name, message):
    """Pages that are missing, or that lead in circles, fail loudly."""
    with pytest.raises(ReportError) as error:
        read(name)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("usage_2026.json", '"output_tokens": 1200', '"output_tokens": 1200.5', "data[0].results[0]: output_tokens"),
        ("usage_2026.json", '"output_tokens": 1200', '"output_tokens": 1200.0', "found '1200.0'"),
        ("usage_2026.json", '"output_tokens": 1200', '"output_tokens": -1', "found -1; expected a whole number"),
        ("usage_2026.json", '"output_tokens": 1200', '"output_tokens": "1200"', "found '1200'"),
        ("usage_2026.json", '"output_tokens": 1200', '"output_tokens": true', "found True"),
        ("usage_2026.json", '"output_tokens": 1200', '"output_tokens": null', "output_tokens: missing"),
        ("usage_2026.json", '"output_tokens": 1200', '"output_tokens": NaN', "not JSON"),
        ("usage_2026.json", '"input_cached_tokens": 5760', '"input_cached_tokens": 59201', "parts of input_tokens"),
        ("usage_2026.json", '"model": "gpt-5.4-2026-03-05"', '"model": 5', "model: found 5; expected a name or null"),
        ("usage_2026.json", '"batch": false', '"batch": "no"', "batch: found 'no'"),
        ("usage_2026.json", '"has_more": false', '"has_more": "no"', "has_more: found 'no'"),
        ("usage_2026.json", '"next_page": null', '"next_page": 5', "next_page: found 5"),
        ("usage_2026.json", '"start_time": 1777593600', '"start_time": "x"', "start_time: found 'x'"),
        ("usage_2026.json", '"end_time": 1777680000', '"end_time": 1777766400', "a span within one UTC day"),
        ("usage_2026.json", '"end_time": 1777680000', '"end_time": 1777593600', "a span within one UTC day"),
        ("usage_2026.json", "organization.usage.completions.result", "organization.costs.result", "amount: found null"),
        ("costs.json", '"value": 0.00175000000000000012', '"value": "NaN"', "value: found 'NaN'"),
        ("costs.json", '"value": 0.00175000000000000012', '"value": null', "value: found None"),
        ("costs.json", '"value": 0.00175000000000000012', '"value": 1e999', "value"),
        ("costs.json", '"currency": "usd"', '"currency": null', "currency: missing"),
        ("activity_2025-10.tsv", "59200.0", "59200.5", "activity_2025-10.tsv: line 2: input_tokens: found '59200.5'"),
        ("activity_2025-10.tsv", "59200.0", "-59200.0", "line 2: input_tokens: found '-59200.0'"),
        ("activity_2025-10.tsv", "59200.0", "NaN", "line 2: input_tokens: found 'NaN'"),
        ("activity_2025-10.tsv", "59200.0", "1e5", "line 2: input_tokens: found '1e5'"),
        ("activity_2025-10.tsv", "59200.0", "", "line 2: input_tokens: missing"),
        ("activity_2025-10.tsv", "59200.0", "59,200", "line 2: input_tokens"),
        ("activity_2025-10.tsv", "FALSE", "maybe", "line 2: batch: found 'maybe'"),
        ("activity_2025-10.tsv", "\t1200.0", "\t1200.0\t1\t1\t1\t1\t1\t1\t1\t1\t1\t1\t1", "cells; expected 24"),
        ("activity_2025-10.tsv", "2025-10-01T00:00:00+00:00", "2025-10-01T00:00:01+00:00", "start_time_iso: found"),
        ("activity_2025-10.tsv", "1759276800", "yesterday", "line 2: start_time: found 'yesterday'"),
        ("activity_2025-10.tsv", "user_id", "model", "column 'model' is there twice"),
        ("costs_2025-10.csv", "0.06680000000000001", "nan", "line 2: amount_value: found 'nan'"),
        ("costs_2025-10.csv", "0.06680000000000001", "12 cents", "line 2: amount_value: found '12 cents'"),
        ("costs_2025-10.csv", "0.06680000000000001", '"0.0', "no CSV"),
    ],
)
def test_what_is_wrong_is_named(name, old, new, message):
    """Counts that are negative, no numbers or no whole ones, and whatever else cannot be, are refused by place."""
    with pytest.raises(ReportError) as error:
        text(changed(name, old, new), name)
    assert str(error.value).startswith(name)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "found an empty file; expected a page of the Usage API"),
        ("hello", "found no report that is known; expected a page of the Usage API"),
        ("id,model\n1,2\n", "found no report that is known"),
        ("start_time,end_time\n1,2\n", "found no report that is known"),
        ("{}", "expected a page of the Usage or the Costs API"),
        ('{"id": "r1", "model": "m"}', "expected a page of the Usage or the Costs API"),
        ("[1]", "page 1: found a value of type int"),
        ('{"data": [1]}', "data[0]: found a value of type int"),
        ('{"data": [{"start_time": 1, "end_time": 2}]}', "results: found null; expected a list"),
        ('{"data": [{"start_time": 1, "end_time": 2, "results": [{}]}]}', "object: found None; expected a result"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (b"\xff\xfe", "no UTF-8 text"),
    ],
)
def test_what_is_no_report_is_refused(content, message):
    """A file of another kind is told by its content, with what was expected."""
    with pytest.raises(ReportError) as error:
        text(content)
    assert message in str(error.value)
