"""Reports as people have them, with faults planted: each day counts once, and every fault gets its own cause."""

import json
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal

import pytest

from gratis.cli import main
from gratis.cli.reconciled import result_lines
from gratis.errors import GratisError
from gratis.reconcile.files import reports_of
from gratis.reconcile.findings import Cause, Measure

from .billing import LARGE, SMALL, Billing, Sent, lines
from .test_reconcile import at, causes, compared, crossing, identity, quiet, requests_of, unexplained
from .test_reconcile_cli import log_of

MINUTE = timedelta(minutes=1)


def files_of(billing, *, rows=None, **more):
    """Pages of usage and of costs, and more."""
    usage = lines(billing.pages(billing.rows() if rows is None else rows))
    return [("usage.jsonl", usage), ("costs.jsonl", billing.cost_file()), *more.items()]


def hourly(billing, *, first=0, until=72):
    """The same traffic in pages of hours."""
    parts = []
    for hour in range(first, until):
        start = at(0) + timedelta(hours=hour)
        those = replace(billing, sent=[one for one in billing.sent if start <= one.at < start + timedelta(hours=1)])
        results = [{name: value for name, value in row.items() if name != "day"} for row in those.rows()]
        times = {"start_time": int(start.timestamp()), "end_time": int(start.timestamp()) + 3600}
        parts.append({**times, "results": results})
    return json.dumps({"object": "page", "data": parts, "has_more": False, "next_page": None}).encode()


def test_pages_and_exports_of_the_same_days_count_once():
    """All four reports together say what two of them say."""
    billing = Billing(sent=crossing())
    both = compared(billing, files=files_of(billing, **{"a.csv": billing.activity_csv(), "c.csv": billing.cost_csv()}))
    alone = compared(billing)
    assert (both.is_clean, both.reported, both.money) == (True, alone.reported, alone.money)
    assert "a.csv: the pages say the same of 3 days, which count once" in both.notes


def test_an_export_that_says_otherwise_is_noted():
    """The pages are counted, and what the export has of a day is said beside what they have."""
    billing = Billing(sent=quiet())
    fewer = Billing(sent=quiet()[:-1])
    result = compared(billing, files=files_of(billing, **{"a.csv": fewer.activity_csv()}))
    assert (result.is_clean, result.reported) == (True, sum(one.tokens for one in quiet()))
    assert any(note.startswith("a.csv: 2025-05-03: found ") for note in result.notes)


def test_an_export_beside_pages_of_other_days_counts():
    """Where the pages are about other days, the export is all that there is."""
    billing = Billing(sent=quiet())
    pages = billing.pages()
    pages[0]["data"] = pages[0]["data"][:1]
    result = compared(billing, files=[("usage", lines(pages)), ("a.csv", billing.activity_csv())])
    assert result.is_clean


def test_what_would_count_twice_is_refused():
    """Two groupings of a day, or its hours and the day, are two reports of the same traffic."""
    billing = Billing(sent=quiet())
    bare = [{**row, "project_id": None} for row in billing.rows()]
    with pytest.raises(GratisError, match="expected one grouping of a day"):
        reports_of([("usage", billing.usage_file()), ("bare", lines(billing.pages(bare)))])
    with pytest.raises(GratisError, match="overlaps a span of"):
        reports_of([("usage", billing.usage_file()), ("hours", hourly(billing))])


@pytest.mark.parametrize(("first", "until"), [(0, 60), (10, 72), (30, 34)])
def test_hours_that_the_report_is_not_about_are_not_compared(first, until):
    """A report that begins or ends within a day is compared with what was decided in its hours."""
    billing = Billing(sent=quiet())
    result = compared(billing, files=[("hours", hourly(billing, first=first, until=until))])
    inside = [one for one in quiet() if first <= (one.at - at(0)) / timedelta(hours=1) < until]
    assert (result.is_clean, result.decided) == (True, sum(one.tokens for one in inside))
    assert any("the report has only" in note for note in result.notes)


def test_a_report_of_tool_calls_adds_no_days():
    """Days of which only hosted tools are known are not days without traffic."""
    billing = Billing(sent=quiet())
    pages = billing.pages()
    pages[0]["data"] = pages[0]["data"][:1]
    row = {"object": "organization.usage.web_search_calls.result", "day": at(2).date(), "num_requests": 3}
    result = compared(billing, files=[("usage", lines(pages)), ("web", lines(billing.pages([row])))])
    assert (result.is_clean, result.until) == (True, at(1))


@pytest.mark.parametrize("named", ["web", None])
def test_projects_of_other_names_are_compared_together(named):
    """Where a log names projects otherwise than the report, or not all of them, their sum is compared."""
    billing = Billing(sent=quiet())
    ours = requests_of(
        [replace(one, project=named if one.project == "proj_1" or named else "proj_2") for one in quiet()]
    )
    result = compared(billing, ours)
    assert result.is_clean
    assert any("all projects are compared together" in note for note in result.notes)


def test_rows_that_are_there_again_cost_and_save_nothing():
    """A file that is given twice differs in tokens, and neither in what was saved nor in what should be charged."""
    billing = Billing(sent=crossing())
    result = compared(billing, files=[*files_of(billing), ("usage.jsonl", billing.usage_file())])
    assert causes(result, Measure.TOKENS) == {Cause.DUPLICATE: sum(one.tokens for one in crossing())}
    assert unexplained(result) == 0
    assert result.money.saved == compared(billing).money.saved
    assert identity(result, 3) == 0
    assert "(usage.jsonl data[0].results[0], read twice)" in str(result.differences)


def test_a_request_that_comes_again_within_minutes():
    """A retry that was logged under a new id is a duplicate; one that comes an hour later is not in the report."""
    billing = Billing(sent=quiet())
    ours = requests_of(quiet())
    for by, cause in ((MINUTE, Cause.DUPLICATE), (60 * MINUTE, Cause.MISSING_IN_REPORT)):
        again = replace(quiet()[4], at=quiet()[4].at + by)
        result = compared(billing, [*ours, *requests_of([*quiet(), again])[-1:]])
        assert causes(result) == {cause: -2 * again.tokens}
        assert unexplained(result) == 0


def test_requests_of_one_size_are_not_taken_for_each_other():
    """Where many requests are alike, one that is missing is not said to be another again."""
    sent = [Sent(at(0, 5, minute), LARGE, 900, 100) for minute in range(9)]
    result = compared(Billing(sent=sent[:-1]), requests_of(sent))
    assert set(causes(result)) == {Cause.MISSING_IN_REPORT}


def test_cached_tokens_and_requests_that_differ():
    """What was cached costs less, so a wrong count of it is a difference; and so is a wrong count of requests."""
    billing = Billing(sent=quiet())
    for name, measure, by in (("input_cached_tokens", Measure.CACHED, 7), ("num_model_requests", Measure.REQUESTS, 1)):
        rows = billing.rows()
        rows[0][name] += by
        result = compared(billing, files=files_of(billing, rows=rows))
        assert [(one.measure, one.difference, one.unexplained) for one in result.differences] == [(measure, by, by)]


def test_a_log_without_cached_tokens_is_not_compared_by_them():
    """Where no request says what was cached, that is said, and is no difference."""
    billing = Billing(sent=quiet())
    result = compared(billing, requests_of([replace(one, cached=0) for one in quiet()]))
    assert result.is_clean
    assert any("how many of its tokens were cached" in note for note in result.notes)


def test_parts_of_the_input_that_do_not_add_up_are_noted():
    """What is not cached is what the input has beside it; a row that says otherwise is named by its place."""
    billing = Billing(sent=quiet())
    rows = [
        {**row, "input_uncached_tokens": row["input_tokens"] - row["input_cached_tokens"]} for row in billing.rows()
    ]
    assert not any("uncached" in note for note in compared(billing, files=files_of(billing, rows=rows)).notes)
    rows[1]["input_uncached_tokens"] += 5
    notes = compared(billing, files=files_of(billing, rows=rows)).notes
    assert any(note.startswith("usage.jsonl data[0].results[1]: input_uncached_tokens: found") for note in notes)


def test_another_usage_tier_is_an_enrollment():
    """Who is at another tier with the provider is enrolled otherwise; the rule is the same."""
    result = compared(Billing(tier=1, sent=crossing()))
    assert set(causes(result)) == {Cause.ENROLLMENT_OR_BALANCE}
    assert unexplained(result) == 0
    both = compared(Billing(tier=1, counts="all", sent=[*crossing(), Sent(at(0, 8), SMALL, 7_000, 0)]))
    assert set(causes(both)) == {Cause.ENROLLMENT_OR_BALANCE, Cause.RULE_DIFFERS}


def test_amounts_of_two_currencies_make_no_sum():
    """What is charged in another currency than that of the prices is refused by its place."""
    billing = Billing(sent=quiet())
    costs = billing.cost_file().replace(b'"usd"', b'"eur"', 1)
    with pytest.raises(GratisError, match=r"costs data\[0\].results\[0\]: currency: found eur; expected usd"):
        compared(billing, files=[("usage", billing.usage_file()), ("costs", costs)])


def test_free_line_items_are_no_other_lines():
    """A line of a model that is in the report is that model's, though it cost nothing."""
    billing = Billing(sent=quiet())
    row = {"object": "organization.costs.result", "amount": {"value": Decimal("0.06"), "currency": "usd"}}
    costs = [*billing.costs(), {**row, "day": at(0).date(), "line_item": "web search tool calls"}]
    result = compared(billing, files=[*files_of(billing)[:1], ("costs", lines(billing.pages(costs)))])
    assert result.money.other_lines == (("web search tool calls", Decimal("0.06")),)


def test_a_name_of_the_report_that_no_list_has():
    """What the report calls by an alias of a listed model is another name, and the offer's file is not stale."""
    billing = Billing(sent=quiet())
    rows = [{**row, "model": row["model"].removesuffix("-2025-04-14")} for row in billing.rows()]
    result = compared(billing, files=files_of(billing, rows=rows))
    assert {part.cause for one in result.differences for part in one.parts} == {Cause.OTHER_NAME}
    assert (unexplained(result), identity(result, 4)) == (0, 0)


def test_somebody_elses_traffic_on_a_day_that_crosses():
    """When it came nobody here knows: what fitted beside it is explained by it, and by no fault of the enrollment."""
    other = "gpt-4o-2024-08-06"
    sizes = (127, -92, -75, -151, 149, 20, 114, -37, 79, 30, -124, -28, -158)  # below 0: of the other model
    own = [
        Sent(at(0, hour), LARGE if size > 0 else other, abs(size) * 1_000) for hour, size in enumerate(sizes, start=1)
    ]
    theirs = [Sent(at(0, hour, 30), LARGE, size) for hour, size in ((4, 134_000), (1, 62_000), (1, 156_000))]
    result = compared(Billing(sent=sorted([*own, *theirs], key=lambda one: one.at)), requests_of(own))
    assert {part.cause for one in result.differences for part in one.parts} == {Cause.MISSING_IN_LEDGER}
    assert (unexplained(result), identity(result, 5)) == (0, 0)


def test_a_request_that_the_provider_does_not_have_took_no_allowance():
    """What was free there in its stead is explained by it, too."""
    sent = [*crossing(1), Sent(at(0, 23), SMALL, 500, 0)]
    result = compared(Billing(sent=[sent[0], *sent[2:]]), requests_of([*sent[:3], *sent[3:]]))
    assert set(causes(result)) == {Cause.MISSING_IN_REPORT}
    assert unexplained(result) == 0
    tight = [Sent(at(0, hour), LARGE, 300_000 + hour, 0) for hour in range(1, 6)]
    result = compared(Billing(sent=[*tight[:1], *tight[2:]]), requests_of(tight))
    assert {one.difference for one in result.differences if one.measure is Measure.FREE} == {2}
    assert set(causes(result)) == {Cause.MISSING_IN_REPORT}
    assert unexplained(result) == 0


def test_a_request_that_is_missing_in_a_project_that_does_not_share():
    """Each of two faults in one cell accounts for its own tokens, and neither twice."""
    billing = Billing(sent=[*quiet()[:5], *quiet()[6:]], closed_projects=frozenset({"proj_2"}))
    assert quiet()[5].project == "proj_2"
    result = compared(billing, requests_of([*quiet()[:5], *quiet()[6:], quiet()[5]]))
    shut = sum(one.tokens for one in billing.sent if one.project == "proj_2")
    missing = quiet()[5].tokens
    assert causes(result, Measure.FREE) == {Cause.PROJECT_NOT_SHARING: -shut, Cause.MISSING_IN_REPORT: -missing}
    assert unexplained(result) == 0


def test_a_reading_that_is_exact_nowhere_is_not_sure():
    """The nearest of several that all fail on the day that would tell is not called sure."""
    billing = Billing(sent=crossing(2))
    rows = billing.rows()
    for row in rows:
        if row["service_tier"] == "incentivized-tier":
            row["input_tokens"] -= 777
    result = compared(billing, files=files_of(billing, rows=rows))
    assert (result.fit.margin > 0, result.fit.is_sure) == (True, False)
    assert "explain the other differences first" in result.fit.sentence


def test_one_day_that_tells_is_likely_and_not_sure():
    """A reading that only one day speaks for is called likely; two days make it sure."""
    found = [compared(Billing(counts="all", sent=crossing(days))).fit for days in (1, 2)]
    assert [(one.is_likely, one.is_sure) for one in found] == [(True, False), (True, True)]
    assert found[0].sentence.endswith("one such day is little evidence")


def test_amounts_end_in_no_zeros():
    """An amount has all its digits, and none that says nothing."""
    result = compared(Billing(sent=crossing()))
    charged = [line for line in result_lines(result) if line["kind"] == "charged"]
    assert [line["difference"] for line in charged] == ["0"]
    assert [Decimal(line["charged"]) for line in charged] == [one.charged for one in result.money.models]
    assert not any(line["charged"].endswith("0") for line in charged)


def test_checks_are_by_day_group_project_and_model():
    """Each identity says where it was checked, what was found there, and what should be."""
    billing = Billing(sent=quiet(1))
    rows = billing.rows()
    rows[0]["input_tokens"] += 5
    result = compared(billing, files=files_of(billing, rows=rows))
    (failed,) = result.identities[0].fails
    assert (failed.day, failed.group, failed.project, failed.model) == (at(0).date(), "1M", "proj_1", LARGE)
    assert failed.found - failed.expected == 5
    assert [one.checked for one in result.identities] == [2, 2, 0, 0, 2]


def test_kinds_that_no_offer_counts_are_named():
    """Images, and whatever comes later, are not compared, and that is said."""
    billing = Billing(sent=quiet(1))
    row = {"object": "organization.usage.images.result", "day": at(0).date(), "images": 3}
    result = compared(billing, files=[*files_of(billing), ("images", lines(billing.pages([row])))])
    assert (result.is_clean, [note for note in result.notes if "images" in note]) == (
        True,
        ["not compared, because no offer here counts it: images"],
    )


def test_an_error_of_the_provider_is_no_page():
    """What was saved instead of a page is told by its kind; its text, which may hold a key, is not repeated."""
    with pytest.raises(GratisError) as raised:
        reports_of([("page.json", b'{"error": {"message": "Incorrect API key: sk-1"}}')])
    assert str(raised.value).startswith("page.json: found an error of the provider; expected a page")


def test_a_page_for_people(tmp_path, monkeypatch, capsys):
    """--html writes what the table says: days, causes, identities, readings and money, and loads nothing."""
    monkeypatch.chdir(tmp_path)
    billing = Billing(sent=crossing(), closed_projects=frozenset({"proj_9"}))
    (tmp_path / "log.jsonl").write_bytes(log_of([*billing.sent, Sent(at(0, 23), SMALL, 500, 0, project="proj_1")]))
    (tmp_path / "usage.jsonl").write_bytes(billing.usage_file())
    (tmp_path / "costs.jsonl").write_bytes(billing.cost_file())
    arguments = ["usage.jsonl", "costs.jsonl", "--log", "log.jsonl", "--tier", "3", "--html", "page.html"]
    assert main(["reconcile", *arguments]) == 1
    capsys.readouterr()
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    for title in (
        "Free tokens, reported and decided",
        "Why they differ",
        "Each difference",
        "The five identities",
        "Where an identity fails",
        "Which reading of the rule fits",
        "Saved and charged, by the reports",
    ):
        assert f">{title}<" in text
    assert "missing_in_report" in text
    assert Counter(part in text for part in ("<script src", 'http-equiv="refresh', "<link", "@import")) == {False: 4}
    assert main(["reconcile", *arguments[:-1], "nowhere/page.html"]) == 2


def test_a_table_says_what_to_do_next(tmp_path, monkeypatch, capsys):
    """Each cause comes with its sums, its evidence and what to do; what has none is called unexplained."""
    monkeypatch.chdir(tmp_path)
    billing = Billing(sent=quiet(1))
    rows = billing.rows()
    rows[0]["input_tokens"] += 5
    (tmp_path / "log.jsonl").write_bytes(log_of([*billing.sent, Sent(at(0, 23), SMALL, 500, 0, project="proj_2")]))
    (tmp_path / "usage.jsonl").write_bytes(lines(billing.pages(rows)))
    assert main(["reconcile", "usage.jsonl", "--log", "log.jsonl", "--tier", "3", "--format", "table"]) == 1
    shown = capsys.readouterr().out
    for text in (
        "missing_in_report: 2 differences, -500 free tokens, -500 of all",
        "next: fetch the report again later",
        "unexplained: 2 differences, +5 free tokens, +5 of all",
        "next: no cause accounts for it",
        f"2025-05-01 1M proj_1 {LARGE}: ",
        "4 differences, 2 not or not wholly explained",
    ):
        assert text in shown
