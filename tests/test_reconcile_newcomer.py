"""README's example of a reconciliation, as somebody who is new to it may go wrong: the plain answer comes first."""

import pytest

from gratis.cli import main

SENT = "".join(
    f'{{"id": "{name}", "model": "gpt-4.1-2025-04-14", "input_tokens": {given}, "output_tokens": {made},'
    f' "at": "2025-11-03T{hour:02}:00:00Z"}}\n'
    for name, given, made, hour in (("a", 700_000, 50_000, 9), ("b", 300_000, 200_000, 10), ("c", 90_000, 10_000, 11))
)
ACTIVITY = """\
start_time,end_time,num_model_requests,model,service_tier,input_tokens,output_tokens
1762128000,1762214400,1.0,gpt-4.1-2025-04-14,incentivized-tier,700000.0,50000.0
1762128000,1762214400,2.0,gpt-4.1-2025-04-14,default,390000.0,210000.0
"""
COSTS = """\
start_time,end_time,amount_value,amount_currency,line_item
1762128000,1762214400,0.78,usd,"gpt-4.1-2025-04-14, input"
1762128000,1762214400,1.68,usd,"gpt-4.1-2025-04-14, output"
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with README's files."""
    (tmp_path / "sent.jsonl").write_text(SENT)
    (tmp_path / "activity.csv").write_text(ACTIVITY)
    (tmp_path / "costs.csv").write_text(COSTS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *arguments, log="sent.jsonl"):
    """Exit code, lines of the table, and complaints."""
    code = main(["reconcile", *arguments, "--log", log, "--tier", "3", "--format", "table"])
    said = capsys.readouterr()
    return code, said.out.splitlines(), said.err


def test_the_example_itself(folder, capsys):
    """One difference, one reading that explains it, and money that adds up."""
    code, lines, _ = run(capsys, "activity.csv", "costs.csv")
    assert (code, lines[-1]) == (1, "1 difference, all explained")
    assert "rule_differs: 1 difference, -100,000 free tokens, +0 of all" in lines


def test_nothing_was_free(folder, capsys):
    """The plain cause, no reading and no usage tier that happens to give nothing."""
    (folder / "activity.csv").write_text(ACTIVITY.replace("incentivized-tier", "default"))
    code, lines, _ = run(capsys, "activity.csv")
    why = "   nothing at all is free in the report: sharing is off, not enrolled, or no balance"
    assert (code, lines[-1]) == (1, "1 difference, all explained")
    assert why in lines
    assert not [line for line in lines if "rule_differs" in line or line.startswith(("likely:", "sure:"))]


def test_money_that_fails_is_in_the_last_line(folder, capsys):
    """Tokens that are explained do not hide a charge that is not."""
    (folder / "costs.csv").write_text(COSTS.replace("1.68", "5.00"))
    code, lines, _ = run(capsys, "activity.csv", "costs.csv")
    assert (code, lines[-1]) == (1, "1 difference, all explained; 1 check of money fails: 3.32 usd")
    code, lines, _ = run(capsys, "activity.csv", "costs.csv", "--counts", "all")
    assert (code, lines[-1]) == (1, "no differences in tokens; 1 check of money fails: 3.32 usd")


def test_too_little_charged_fails_as_well(folder, capsys):
    """By how much is without a sign: two that fail do not cancel out."""
    day = "1762128000,1762214400,"
    used = f"{day}1.0,gpt-4.1-mini-2025-04-14,default,1000000.0,0.0\n"
    paid = f'{day}1.08,usd,"gpt-4.1-mini-2025-04-14, input"\n'
    (folder / "activity.csv").write_text(ACTIVITY + used)
    (folder / "costs.csv").write_text(COSTS.replace("1.68", "1.00") + paid)
    code, lines, _ = run(capsys, "activity.csv", "costs.csv", "--counts", "all")
    assert code == 1
    assert lines[-1].endswith("; 2 checks of money fail: 1.36 usd")


def test_a_report_of_another_day(folder, capsys):
    """It says so, and blames nobody."""
    later = ACTIVITY.replace("1762128000", "1764547200").replace("1762214400", "1764633600")
    (folder / "activity.csv").write_text(later)
    code, lines, _ = run(capsys, "activity.csv")
    apart = "no day in common: the report has 2025-12-01, the decisions 2025-11-03"
    assert (code, lines[-1]) == (1, f"2 differences, 2 not or not wholly explained; {apart}")
    assert not [line for line in lines if "missing_in_ledger" in line or "somebody else" in line]
    assert [line for line in lines if line.startswith("   next: compare the same days")]
    assert sum("no day in common" in line for line in lines) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.jsonl", "", "--log: log.jsonl: the log has no request; expected JSON lines"),
        ("log.jsonl", "\n\n", "--log: log.jsonl: the log has no request; expected JSON lines"),
        ("log.csv", "", "--log: log.csv: the log has no request; expected JSON lines"),
        ("log.txt", COSTS, "--log: log.txt: no line of it could be read; expected JSON lines"),
        ("log.csv", COSTS, "--log: log.csv: found a table; expected JSON lines"),
        ("log.TSV", COSTS, "--log: log.TSV: found a table; expected JSON lines"),
        ("log.parquet", "PAR1", "--log: log.parquet: found a table; expected JSON lines"),
    ],
)
def test_a_log_without_a_request(folder, capsys, name, content, message):
    """Nothing was decided, so nothing is compared."""
    (folder / name).write_text(content)
    code, lines, err = run(capsys, "activity.csv", log=name)
    assert (code, lines) == (2, [])
    assert message in err.splitlines()[-1]


def test_a_log_may_have_any_name(folder, capsys):
    """What is told from a table by its first byte is read."""
    (folder / "log.csv").write_text("\ufeff" + SENT, encoding="utf-8")
    assert run(capsys, "activity.csv", log="log.csv") == run(capsys, "activity.csv")


def test_a_log_given_as_a_report(folder, capsys):
    """It is named for what it looks like."""
    code, _, err = run(capsys, "sent.jsonl")
    assert code == 2
    assert "sent.jsonl: line 1: found what looks like a log of requests; " in err
    assert err.rstrip().endswith("and a log as --log FILE")


def test_a_report_that_is_given_twice(folder, capsys):
    """One place is named once, and what is said of tokens and of free tokens is said once."""
    _, lines, _ = run(capsys, "activity.csv", "activity.csv")
    assert "   2 rows of the report are alike: 1 request, 750,000 tokens (activity.csv line 2, read twice)" in lines
    assert "duplicate: 2 differences, +750,000 free tokens, +1,350,000 of all" in lines


def test_the_page_tells_reported_from_decided(folder, capsys):
    """Each number that is seen first says whose it is; the number of differences comes first of all."""
    (folder / "costs.csv").write_text(COSTS.replace("1.68", "5.00"))
    run(capsys, "activity.csv", "costs.csv", "--html", "page.html")
    page = (folder / "page.html").read_text(encoding="utf-8")
    first = page[page.index('<dl class="figures">') : page.index("</dl>")]
    tiles = [part.split("</dt>")[0] for part in first.split("<dt>")[1:]]
    assert tiles == [
        "Differences",
        "Reported: free tokens",
        "Reported: saved, at list price",
        "Reported: charged",
        "Decided: free tokens",
        "Decided: billed beyond the allowance",
        "Decided: not covered",
        "Decided: saved, at list price",
    ]
    values = [part.split("</dd>")[0] for part in first.split('<dd class="value">')[1:]]
    assert values == ["1", "750,000", "$1.80", "$5.78", "850,000", "500,000", "0", "$2.06"]
    assert "all explained; 1 check of money fails: 3.32 usd" in first
    assert ">Saved and spent, as decided by Gratis<" in page
