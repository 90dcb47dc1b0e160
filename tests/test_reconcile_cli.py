"""`gratis reconcile`: reports in, differences out, and an exit code that scripts can rely on."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gratis.cli import main, reconciling
from gratis.lines import encode, request_line
from gratis.model import Request
from gratis.reconcile.own import gather

from .billing import KEY, LARGE, SMALL, Billing, Endpoints, Sent, lines

FIRST = datetime(2025, 5, 1, tzinfo=UTC)
SENT = [
    Sent(FIRST + timedelta(days=day, hours=hour), model, 10_000 * hour + day, 100, project="proj_1")
    for day in range(2)
    for hour in (3, 9, 15)
    for model in (LARGE, SMALL)
]
TIER = ["--tier", "3"]
CONFIG = Path(__file__).parents[1] / "config"


def log_of(sent):
    """A log of what was sent, one request a line."""
    made = [
        Request(
            id=f"r{number}",
            model=one.model,
            at=one.at,
            input_tokens=one.given,
            output_tokens=one.made,
            project=one.project,
        )
        for number, one in enumerate(sent)
    ]
    return b"".join(encode(request_line(request)) + b"\n" for request in made)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a log and the provider's reports on it."""
    billing = Billing(sent=SENT)
    (tmp_path / "log.jsonl").write_bytes(log_of(SENT))
    (tmp_path / "usage.jsonl").write_bytes(billing.usage_file())
    (tmp_path / "costs.jsonl").write_bytes(billing.cost_file())
    (tmp_path / "activity.csv").write_bytes(billing.activity_csv())
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_ADMIN_KEY", "OPENAI_BASE_URL", "GRATIS_STORE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run(capsys, *arguments):
    """Exit code, lines of JSON and complaints."""
    try:
        code = main(["reconcile", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    found = [json.loads(line) for line in said.out.splitlines() if line.startswith("{")]
    return code, found, said.err


def summary(found):
    """The last line."""
    assert found[-1]["kind"] == "summary"
    return found[-1]


def test_a_log_that_agrees(folder, capsys):
    """No difference is exit code 0; the summary says what was compared."""
    code, found, err = run(capsys, "usage.jsonl", "costs.jsonl", "--log", "log.jsonl", *TIER)
    assert (code, err) == (0, "")
    assert summary(found) == {
        "kind": "summary",
        "offer": "openai-data-sharing",
        "reading": "counts=free overage=whole",
        "since": "2025-05-01",
        "until": "2025-05-03",
        "reported": 1_081_206,
        "decided": 1_081_206,
        "reported_free": 1_081_206,
        "decided_free": 1_081_206,
        "differences": 0,
        "unexplained": 0,
        "money_fails": 0,
        "clean": True,
    }
    money = next(line for line in found if line["kind"] == "money")
    assert (money["saved"], money["spent"], money["prices"]) == ("1.3017672", "0", "openai")


def test_a_ledger_and_a_store_say_the_same(folder, capsys, monkeypatch):
    """Decided in a store, its ledger is compared, be it read from the store or from a file."""
    url = f"sqlite:///{folder}/decided.db"
    decide = ["decide", "log.jsonl", "--store", url, "--offer", "openai-data-sharing", *TIER, "--no-bounds"]
    assert main(decide) == 0
    assert main(["ledger", "--store", url, "--out", "ledger.jsonl"]) == 0
    capsys.readouterr()
    by_log = run(capsys, "activity.csv", "--log", "log.jsonl", *TIER)
    assert run(capsys, "activity.csv", "--store", url) == by_log
    assert run(capsys, "activity.csv", "--ledger", "ledger.jsonl") == by_log
    assert by_log[0] == 0


def test_differences_are_lines_and_exit_code_1(folder, capsys):
    """A difference has its day, group, project and model, its causes, and what they leave unexplained."""
    (folder / "usage.jsonl").write_bytes(Billing(sent=SENT, closed_days=frozenset({"2025-05-02"})).usage_file())
    code, found, _ = run(capsys, "usage.jsonl", "--log", "log.jsonl", *TIER)
    assert code == 1
    first = next(line for line in found if line["kind"] == "difference")
    assert first == {
        "kind": "difference",
        "measure": "free_tokens",
        "day": "2025-05-02",
        "group": "1M",
        "project": "proj_1",
        "model": LARGE,
        "reported": 0,
        "decided": 270_303,
        "difference": -270_303,
        "explained": -270_303,
        "unexplained": 0,
        "causes": [
            {
                "cause": "enrollment_or_balance",
                "tokens": -270_303,
                "why": "nothing was free on this day: enrollment, balance or sharing",
            }
        ],
    }
    assert summary(found)["differences"] == 2


def test_a_table_for_people(folder, capsys):
    """The same as a table, with the readings, the money and its source."""
    (folder / "usage.jsonl").write_bytes(Billing(sent=SENT, closed_projects=frozenset({"proj_1"})).usage_file())
    assert main(["reconcile", "usage.jsonl", "costs.jsonl", "--log", "log.jsonl", *TIER, "--format", "table"]) == 1
    shown = capsys.readouterr().out
    for text in (
        "openai-data-sharing, counts=free overage=whole: 2025-05-01 until before 2025-05-03 (UTC)",
        "unexplained",
        "readings of the rule",
        "saved 0 usd at list price",
        "prices: openai, as of 2026-09-29",
        "4 differences",
    ):
        assert text in shown


def test_a_reading_is_chosen(folder, capsys):
    """A log is judged as it is asked to be."""
    _, found, _ = run(capsys, "usage.jsonl", "--log", "log.jsonl", *TIER, "--counts", "all", "--overage", "excess")
    assert summary(found)["reading"] == "counts=all overage=excess"


def test_days_are_chosen(folder, capsys):
    """Only whole days are compared, and what lies outside is said."""
    _, found, _ = run(capsys, "usage.jsonl", "--log", "log.jsonl", *TIER, "--since", "2025-05-02")
    assert (summary(found)["since"], summary(found)["clean"]) == ("2025-05-02", True)
    code, _, err = run(capsys, "usage.jsonl", "--log", "log.jsonl", *TIER, "--since", "2025-05-02T01:00:00Z")
    assert (code, "expected a midnight in UTC" in err) == (2, True)


def test_a_bad_line_of_a_log(folder, capsys):
    """It is reported with its number, the others are compared, and the exit code is 2."""
    with (folder / "log.jsonl").open("ab") as file:
        file.write(b'{"id": "x"}\n')
    code, found, err = run(capsys, "usage.jsonl", "--log", "log.jsonl", *TIER)
    assert code == 2
    assert "log.jsonl: line 13: " in err
    assert summary(found)["clean"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["usage.jsonl"], "expected one of --ledger FILE, --store URL and --log FILE"),
        (["usage.jsonl", "--log", "log.jsonl", "--ledger", "x"], "found --ledger and --log; expected one of"),
        (["--log", "log.jsonl", *TIER], "expected REPORT files, or --fetch"),
        (
            ["usage.jsonl", "--fetch", "--log", "log.jsonl", *TIER],
            "found --fetch and usage.jsonl; expected REPORT files, or --fetch",
        ),
        (["usage.jsonl", "--ledger", "x", "--counts", "all", *TIER], "found --counts and --tier with --ledger"),
        (["usage.jsonl", "--store", "sqlite:///x.db", "--overage", "excess"], "found --overage with --store"),
        (["usage.jsonl", "--ledger", "x", "--sharing", "enabled"], "found --sharing with --ledger"),
        (["usage.jsonl", "--ledger", "x", "--shared-project", "a"], "found --shared-project with --ledger"),
        (["usage.jsonl", "--ledger", "x", "--enrollments", "y"], "found --enrollments with --ledger"),
        (["usage.jsonl", "--store", "memory:"], "--store memory: ends with its process"),
        (["usage.jsonl", "--log", "log.jsonl", *TIER, "--account", "nobody"], "but those of default; expected one of"),
        (
            ["usage.jsonl", "--log", "log.jsonl", *TIER, "--since", "2025-05-02", "--until", "2025-05-01"],
            "--until: found 2025-05-01; expected a day after --since 2025-05-02",
        ),
        (["usage.jsonl", "--log", "log.jsonl"], "who takes part?"),
        (["usage.jsonl", "--save", "x", "--log", "log.jsonl", *TIER], "--save keeps what --fetch brings"),
        (["gone.json", "--log", "log.jsonl", *TIER], "gone.json: No such file"),
        (
            ["log.jsonl", "--log", "log.jsonl", *TIER],
            "log.jsonl: line 1: found what looks like a log of requests; expected",
        ),
        (
            ["costs.jsonl", "--log", "log.jsonl", *TIER],
            "no report of usage for these days: found costs from 2025-05-01 to 2025-05-02; expected pages of the Usage",
        ),
        (
            ["usage.jsonl", "--log", "log.jsonl", *TIER, "--since", "2025-06-01"],
            "no report of usage for these days: found usage from 2025-05-01 to 2025-05-02",
        ),
        (["usage.jsonl", "--ledger", "log.jsonl"], "log.jsonl: line 1: "),
        (["usage.jsonl", "--store", "sqlite:///gone.db"], "there is none"),
        (["usage.jsonl", "--log", "log.jsonl", *TIER, "--prices", "gone"], "gone: prices: no such table"),
        (["--fetch", "--log", "log.jsonl", *TIER], "as OPENAI_ADMIN_KEY"),
    ],
)
def test_bad_use(folder, capsys, arguments, message):
    """What cannot be done is exit code 2, and says what was expected."""
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert message in err


READ = ("usage.jsonl", "ledger.jsonl", "log.jsonl", "enrollments.jsonl", "prices.toml", "offer.toml", "decided.db")


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("page", ["{}", "./{}", "{}.page"])
def test_a_page_takes_the_place_of_no_file_that_is_read(folder, capsys, name, page):
    """Neither the page nor what it is while it is written, under whatever name."""
    (folder / "offer.toml").write_bytes((CONFIG / "openai-data-sharing.toml").read_bytes())
    (folder / "prices.toml").write_bytes((CONFIG / "prices" / "openai.toml").read_bytes())
    (folder / "enrollments.jsonl").write_bytes(b"")
    assert main(["decide", "log.jsonl", "--store", "sqlite:///decided.db", *TIER, "--no-bounds"]) == 0
    assert main(["ledger", "--store", "sqlite:///decided.db", "--out", "ledger.jsonl"]) == 0
    capsys.readouterr()
    page = page.format(name)
    if page.endswith(".page"):
        (folder / page).symlink_to(name)
    before = (folder / name).read_bytes()
    source = {
        "ledger.jsonl": ["--ledger", "ledger.jsonl"],
        "decided.db": ["--store", "sqlite:///decided.db"],
    }.get(name, ["--log", "log.jsonl", "--enrollments", "enrollments.jsonl"])
    options = [*source, "--offer", "offer.toml", "--prices", "prices.toml"]
    code, found, err = run(capsys, "usage.jsonl", *options, "--html", page)
    assert (code, found) == (2, [])
    assert "--html" in err
    assert "found the file that is read" in err
    assert (folder / name).read_bytes() == before


def test_a_page_half_written_takes_the_place_of_no_file(folder, capsys):
    """Until it is complete it has another name, which may be that of a report."""
    report = (folder / "usage.jsonl").rename(folder / "page.html.part")
    code, _, err = run(capsys, report, "--log", "log.jsonl", *TIER, "--html", "page.html")
    assert (code, "found the file that is read" in err) == (2, True)
    assert report.exists()


@pytest.mark.parametrize(
    "wrong",
    [
        ["--log", "gone.jsonl", *TIER],
        ["--log", "log.jsonl", *TIER, "--prices", "gone"],
        ["--log", "log.jsonl", *TIER, "--offer", "gone"],
        ["--log", "log.jsonl", "--enrollments", "gone.jsonl"],
        ["--log", "log.jsonl", *TIER, "--account", "nobody"],
        ["--ledger", "gone.jsonl"],
        ["--ledger", "log.jsonl"],
        ["--store", "sqlite:///gone.db"],
        [],
    ],
)
def test_nothing_is_fetched_for_what_cannot_be_compared(folder, capsys, monkeypatch, wrong):
    """Prices, offer and decisions are there, or the provider is not asked."""
    with Endpoints(usage=Billing(sent=SENT).pages()) as provider:
        monkeypatch.setenv("OPENAI_ADMIN_KEY", KEY)
        monkeypatch.setenv("OPENAI_BASE_URL", provider.url)
        code, _, _ = run(capsys, "--fetch", "--since", "2025-05-01", "--until", "2025-05-03", *wrong)
    assert (code, provider.asked) == (2, [])


def test_a_store_is_read_after_the_reports(folder, capsys, monkeypatch):
    """A store goes on while reports are fetched, so what they tell of is there when it is read."""
    url, asked = f"sqlite:///{folder}/decided.db", []
    assert main(["decide", "log.jsonl", "--store", url, *TIER, "--no-bounds"]) == 0
    capsys.readouterr()
    with Endpoints(usage=Billing(sent=SENT).pages()) as provider:
        monkeypatch.setenv("OPENAI_ADMIN_KEY", KEY)
        monkeypatch.setenv("OPENAI_BASE_URL", provider.url)

        def gathered(*decisions, **options):
            asked.append(len(provider.asked) > 0)
            return gather(*decisions, **options)

        monkeypatch.setattr(reconciling, "gather", gathered)
        days = ["--since", "2025-05-01", "--until", "2025-05-03"]
        code, found, _ = run(capsys, "--fetch", *days, "--store", url)
    assert (code, summary(found)["clean"], asked) == (0, True, [True])


def test_a_fetched_report_is_not_written_over(folder, capsys, monkeypatch):
    """A page cannot take the place of a report that was just saved."""
    (folder / "saved").mkdir()
    saved = folder / "saved" / "usage-completions-0001.json"
    with Endpoints(usage=Billing(sent=SENT).pages()) as provider:
        monkeypatch.setenv("OPENAI_ADMIN_KEY", KEY)
        monkeypatch.setenv("OPENAI_BASE_URL", provider.url)
        days = ["--since", "2025-05-01", "--until", "2025-05-03"]
        options = ["--save", "saved", "--html", saved, "--store", "sqlite:///decided.db"]
        assert main(["decide", "log.jsonl", "--store", "sqlite:///decided.db", *TIER, "--no-bounds"]) == 0
        capsys.readouterr()
        code, _, err = run(capsys, "--fetch", *days, *options)
    assert (code, "found the file that is read" in err) == (2, True)
    assert saved.read_bytes().startswith(b"{")


def test_reports_are_fetched_saved_and_read_again(folder, capsys, monkeypatch):
    """Fetched from both endpoints they say what the files say; what was saved is read offline; the key is nowhere."""
    billing = Billing(sent=SENT)
    with Endpoints(usage=billing.pages(size=1), costs=billing.pages(billing.costs(), size=1)) as provider:
        monkeypatch.setenv("OPENAI_ADMIN_KEY", KEY)
        monkeypatch.setenv("OPENAI_BASE_URL", provider.url)
        days = ["--since", "2025-05-01", "--until", "2025-05-03"]
        fetched = run(capsys, "--fetch", *days, "--save", "saved", "--log", "log.jsonl", *TIER)
        again = run(capsys, "--fetch", *days, "--save", "saved", "--log", "log.jsonl", *TIER)
    assert fetched[0] == 0
    assert "the last 15 minutes" in fetched[2]
    assert (again[0], "there already" in again[2]) == (2, True)
    saved = sorted((folder / "saved").iterdir())
    offline = run(capsys, *saved, "--log", "log.jsonl", *TIER)
    assert offline[1] == fetched[1]
    assert KEY.encode() not in b"".join(path.read_bytes() for path in saved)
    assert KEY not in fetched[2] + again[2]


def test_a_report_may_be_fetched_for_later(folder, capsys, monkeypatch):
    """With --save alone there is nothing to compare with yet."""
    with Endpoints(usage=Billing(sent=SENT).pages()) as provider:
        monkeypatch.setenv("OPENAI_ADMIN_KEY", KEY)
        monkeypatch.setenv("OPENAI_BASE_URL", provider.url)
        code, found, _ = run(capsys, "--fetch", "--since", "2025-05-01", "--until", "2025-05-03", "--save", "saved")
    assert (code, found) == (0, [])
    assert (folder / "saved" / "usage-completions-0001.json").exists()


def test_a_control_character_cannot_steer_a_terminal(folder, capsys):
    """Names of the report are shown as text."""
    rows = Billing(sent=SENT).rows()
    rows[0]["project_id"] = "\x1b[31mproj"
    (folder / "usage.jsonl").write_bytes(lines(Billing(sent=SENT).pages(rows)))
    main(["reconcile", "usage.jsonl", "--log", "log.jsonl", *TIER, "--format", "table"])
    assert "\x1b" not in capsys.readouterr().out
