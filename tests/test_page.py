"""The report for people: one page that needs nothing else, says what was decided, and lets no text steer it."""

from __future__ import annotations

import re
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from html.parser import HTMLParser
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings, strategies as st

from gratis import Enrollment, Meter, Request, Usage
from gratis.audit.bars import Bar, Chart, chart_html, scale
from gratis.audit.fold import Finding, FindingKind
from gratis.audit.kept import CROSSINGS_MAX, FINDINGS_MAX, MODELS_MAX
from gratis.audit.markup import compact, percent, text
from gratis.audit.replay import Replay
from gratis.audit.story import Story
from gratis.lines import request_line
from gratis.offers import load
from gratis.prices import load_prices
from gratis.stores.memory import MemoryStore

from .test_cli import gratis, sent
from .test_readings import ARTICLE
from .test_replay import logs, request_at

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from gratis import Decision

OFFER = load("openai-data-sharing")
PRICES = load_prices("openai")
LARGE = "gpt-4o-2024-08-06"
SMALL = "gpt-4o-mini-2024-07-18"
MORNING = datetime(2025, 4, 20, 9, tzinfo=UTC)
MADE = datetime(2026, 11, 21, 17, 20, tzinfo=UTC)
TIER_3 = Enrollment(tier=3, sharing="enabled")
HOSTILE = "</td></table><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u202e"
VOID = {"meta", "img", "link", "br", "hr", "input", "path", "rect"}


class Read(HTMLParser):
    """A page as its tree is: every tag is closed where it must be, tables are kept as cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.captions: list[str] = []
        self.said: list[str] = []
        self._rows: list[list[str]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag that begins."""
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._rows = []
            self.captions.append("")
        elif tag == "tr":
            self._rows.append([])
        elif tag in {"td", "th"}:
            self._rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag that begins."""
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        """A tag ends: the one that is open."""
        assert self.open.pop() == tag
        if tag == "table":
            self.tables[self.captions[-1]] = self._rows

    def handle_data(self, data: str) -> None:
        """Text belongs to the cell or caption that is open."""
        if "caption" in self.open:
            self.captions[-1] += data
        elif {"td", "th"} & set(self.open):
            self._rows[-1][-1] += data
        elif "style" not in self.open:
            self.said.append(data)

    def table(self, title: str) -> list[dict[str, str]]:
        """The rows of a table by their heads; what is repeated among the heads has its place behind it."""
        head, *rows = self.tables[title]
        names = [f"{name} {place}" if head.count(name) > 1 else name for place, name in enumerate(head)]
        return [dict(zip(names, row, strict=True)) for row in rows]


def story(decisions: Iterable[Decision], **options: Any) -> Story:
    """What is told of decisions."""
    told = Story("A report", **options)
    for decision in decisions:
        told.add(decision)
    return told


def judged(log: Iterable[Request], offer: Any = OFFER) -> list[Decision]:
    """What the rule says of a log."""
    replay = Replay(offer, assume=TIER_3)
    return [replay.decide(each) for each in log]


def ask(name: str, tokens: int | None, *, days: float = 0, model: str = LARGE, **fields: Any) -> Request:
    """A request so many days after the morning."""
    at = MORNING + timedelta(days=days)
    output = None if tokens is None else 0
    return Request(id=name, model=model, at=at, input_tokens=tokens, output_tokens=output, **fields)


def whole(cell: str) -> int:
    """A number as people read it."""
    return int(cell.replace(",", "").replace("\u2212", "-") or 0)


def figures(page: str) -> dict[str, str]:
    """The numbers that are seen first."""
    return dict(re.findall(r'<dt>([^<]*)</dt><dd class="value">([^<]*)</dd>', page))


# --- What it says ---------------------------------------------------------------------------------


def test_the_crossing_request_is_told_with_what_would_have_fitted() -> None:
    """750k used, then 500k: it crossed by 250k, and 250k would still have fitted."""
    read = Read(story(judged(ARTICLE)).html(MADE))
    assert read.table("Request") == [
        {
            "Request": "500k",
            "At (UTC)": "2025-04-20 10:00:00",
            "Model": LARGE,
            "Group": "1M",
            "Size": "500,000",
            "Used before": "750,000",
            "Allowance": "1,000,000",
            "Over by": "250,000",
            "Would have fitted": "250,000",
        }
    ]


@pytest.mark.parametrize(
    ("counts", "overage", "expected"),
    [
        ("free", "whole", [("500k", 750_000, 250_000, 500_000)]),
        ("all", "whole", [("500k", 750_000, 250_000, 500_000), ("100k", 1_250_000, 0, 100_000)]),
        ("free", "excess", [("500k", 750_000, 250_000, 250_000), ("100k", 1_000_000, 0, 100_000)]),
        ("all", "excess", [("500k", 750_000, 250_000, 250_000), ("100k", 1_250_000, 0, 100_000)]),
    ],
)
def test_what_was_used_before_follows_the_reading(counts: str, overage: str, expected: list[Any]) -> None:
    """Under each reading: what was used before a request that did not fit, what would have fitted, what was billed."""
    rows = Read(story(judged(ARTICLE, OFFER.reading(counts=counts, overage=overage))).html(MADE)).table("Request")
    found = [
        (
            row["Request"],
            *(whole(row["Used before"]), whole(row["Would have fitted"])),
            whole(row.get("Billed tokens", row["Size"])),
        )
        for row in rows
    ]
    assert found == expected


@settings(max_examples=60, deadline=None)
@given(drawn=logs, start=st.sampled_from([MORNING, datetime(2025, 3, 4, 20, tzinfo=UTC)]))
def test_days_and_figures_are_the_sums_of_the_decisions(drawn: list[dict[str, Any]], start: datetime) -> None:
    """Whatever the log: days a group, the figures on top and the table by model add up to what was decided."""
    answers = Replay(OFFER, assume=TIER_3).decide_many([request_at(start, **fields) for fields in drawn])
    decisions = [answer for answer in answers if not isinstance(answer, Exception)]
    page = story(decisions, prices=PRICES).html(MADE)
    read, once = Read(page), [decision for decision in decisions if not decision.replayed]
    expected: dict[Any, list[int]] = {}
    for one in once:
        sums = expected.setdefault((one.group, one.at.date().isoformat()), [0, 0, 0])
        for place, value in enumerate((one.free_tokens or 0, one.billed_tokens or 0, 1)):
            sums[place] += value
    for group in {one.group for one in once}:
        title = "Not covered by any allowance" if group is None else f"Group {group}"
        for row in read.table(f"{title}, tokens a day"):
            billed = row["Not covered"] if group is None else row["Billed"]
            ours = [whole(row.get("Free", "0")), whole(billed), whole(row["Requests"])]
            assert ours == expected.pop((group, row["Day"]))
    assert expected == {}
    sums = [sum(one.free_tokens or 0 for one in once), sum(one.billed_tokens or 0 for one in once)]
    told = figures(page)
    assert [
        whole(told["Free tokens"]),
        whole(told["Billed beyond the allowance"]) + whole(told["Not covered"]),
    ] == sums
    if once:
        rows = read.table("Model")
        assert sum(whole(row["Requests"]) for row in rows[:-1]) == whole(rows[-1]["Requests"]) == len(once)


def test_what_was_asked_again_counts_once() -> None:
    """A replayed decision adds nothing, wherever it comes from."""
    decisions = judged([*ARTICLE, *ARTICLE])
    assert figures(story(decisions).html(MADE)) == figures(story(judged(ARTICLE)).html(MADE))
    assert "3 lines: asked for a request again" in story(decisions).html(MADE)


def test_a_correction_takes_the_place_of_what_was_said_before() -> None:
    """Voided, and adjusted twice: only the last word counts, in days, crossings, models and money."""
    meter = Meter(MemoryStore(bounds=None), OFFER, assume=TIER_3)
    meter.enroll("default", TIER_3, actor="ann")
    for each in ARTICLE:
        meter.decide(each)
    meter.void("500k", actor="ann", why="sent twice")
    meter.adjust("100k", Usage(input_tokens=70_000, output_tokens=0), actor="ann", why="a bill says so")
    meter.adjust("100k", Usage(input_tokens=60_000, output_tokens=0), actor="ann", why="another bill")
    page = story((entry.decision for entry in meter.ledger()), prices=PRICES).html(MADE)
    left = [replace_tokens(each, 60_000) if each.id == "100k" else each for each in ARTICLE if each.id != "500k"]
    expected = story(judged(left), prices=PRICES).html(MADE)
    assert figures(page) == figures(expected)
    assert [Read(each).table("Group 1M, tokens a day") for each in (page, expected)] == [
        [
            {
                "Day": "2025-04-20",
                "Free": "810,000",
                "Billed": "0",
                "Allowance": "1,000,000",
                "Free requests": "2",
                "Requests": "2",
            }
        ]
    ] * 2
    assert Read(page).table("Model") == Read(expected).table("Model")
    assert "None: every request that an allowance covers was free." in page


def replace_tokens(asked: Request, tokens: int) -> Request:
    """The same request with other tokens."""
    return Request(id=asked.id, model=asked.model, at=asked.at, input_tokens=tokens, output_tokens=0)


def test_a_crossing_that_was_corrected_is_told_no_more() -> None:
    """Of two requests that did not fit the one that was voided leaves the table, and the other stays."""
    meter = Meter(MemoryStore(bounds=None), OFFER, assume=TIER_3)
    meter.enroll("default", TIER_3, actor="ann")
    for each in (*ARTICLE, ask("more", 900_000, days=0.2)):
        meter.decide(each)
    meter.void("500k", actor="ann", why="sent twice")
    page = story(entry.decision for entry in meter.ledger()).html(MADE)
    assert [row["Request"] for row in Read(page).table("Request")] == ["more"]
    assert "1 request did not fit" in page


def test_a_correction_of_what_is_not_told_is_said_to_be_one() -> None:
    """Of a ledger that begins behind the first word, what that said cannot be taken back; the page says so."""
    meter = Meter(MemoryStore(bounds=None), OFFER, assume=TIER_3)
    meter.enroll("default", TIER_3, actor="ann")
    meter.decide(ARTICLE[0])
    meter.adjust("750k", Usage(input_tokens=5, output_tokens=0), actor="ann", why="a bill says so")
    page = story([list(meter.ledger())[-1].decision]).html(MADE)
    assert "1 correction: is of a request that is not among these" in page


def test_savings_are_the_list_price_of_free_tokens() -> None:
    """Input, cached and output tokens each at their price, a model without a price listed as such, never as 0."""
    log = [
        Request(id="a", model=LARGE, at=MORNING, input_tokens=100_000, cached_tokens=40_000, output_tokens=10_000),
        Request(id="b", model="gpt-4.5-preview-2025-02-27", at=MORNING, input_tokens=1, output_tokens=0),
        Request(id="c", model=LARGE, at=MORNING, input_tokens=1_000_000, output_tokens=0),
        Request(id="d", model="nobody-knows", at=MORNING, input_tokens=7, output_tokens=0),
    ]
    rows = {row["Model"]: row for row in Read(story(judged(log), prices=PRICES).html(MADE)).table("Model")}
    assert rows[LARGE]["Saved"] == f"${Decimal(60) * 2500 / 10**6 + Decimal(40) * 1250 / 10**6 + Decimal('0.1'):.4f}"
    assert rows[LARGE]["At list price 5"] == "$2.50"
    assert rows["nobody-knows"]["At list price 7"] == "no price"
    assert rows["All"]["At list price 7"] == "no price"
    assert "nobody-knows" in story(judged(log), prices=PRICES).html(MADE)


def test_the_free_part_of_a_request_saves_its_part() -> None:
    """Where only the excess is billed, the free half of a request saves half of its list price."""
    log = [ask("a", 2_000_000)]
    rows = Read(story(judged(log, OFFER.reading(overage="excess")), prices=PRICES).html(MADE)).table("Model")
    assert [(row["Saved"], row["At list price 5"]) for row in rows] == [("$2.50", "$2.50")] * 2


def test_a_sum_without_a_price_of_every_model_is_at_least_so_much() -> None:
    """Where the price of one model is not known, the sum of the others is said to be the least that it can be."""
    log = [ask("a", 100_000, model="not-listed"), ask("b", 100_000, tools=("web_search",))]
    rows = Read(story(judged(log), prices=PRICES).html(MADE)).table("Model")
    assert rows[-1]["At list price 7"] == "\u2265 $0.2500"


def test_the_line_is_the_allowance_of_all_accounts_of_a_day() -> None:
    """Two accounts have twice the allowance; the crossing requests then say whose they are."""
    log = [ask("a", 1, account="x"), ask("b", 2_000_000, account="y"), ask("c", 1, days=1, account="y")]
    read = Read(story(judged(log)).html(MADE))
    assert [row["Allowance"] for row in read.table("Group 1M, tokens a day")] == ["2,000,000", "1,000,000"]
    assert [row["Account"] for row in read.table("Request")] == ["y"]


def test_small_money_is_never_nothing() -> None:
    """A tenth of a thousandth of a dollar is shown as what it is, and less than that as less than that."""
    rows = Read(story(judged([ask("a", 40), ask("b", 1, model=SMALL)]), prices=PRICES).html(MADE)).table("Model")
    assert [row["Saved"] for row in rows] == ["$0.0001", "under $0.0001", "$0.0001"]


def test_findings_are_told_with_what_was_found_and_expected() -> None:
    """Each kind is counted, each finding names its place; without any, an audit says that there was none."""
    told = story([], is_audit=True)
    assert "None: every decision follows from the rule." in told.html(MADE)
    told.found(Finding(FindingKind.WRONGLY_FREE, 7, "default", "r7", "verdict", "free", "billed"))
    told.found(Finding(FindingKind.COUNTER_DIFFERS, None, "default", None, "window of 1M", {"used": 5, "seq": 1}, None))
    page = told.html(MADE)
    assert Read(page).table("By kind") == [
        {"Kind": "wrongly free", "Findings": "1"},
        {"Kind": "counter differs", "Findings": "1"},
    ]
    assert [(row["Entry"], row["Found"], row["Expected"]) for row in Read(page).table("One by one")] == [
        ("7", "free", "billed"),
        ("", "used 5, seq 1", "nothing"),
    ]
    assert figures(page)["Findings"] == "2"
    assert "Findings" not in figures(story([]).html(MADE))


def test_other_tables_are_told_as_sections() -> None:
    """A section has its heads and rows: numbers to the right with thousands apart, all else as it is."""
    told = story([])
    told.section(
        "Parts", ["day", "free more", "cost"], [["a", -1234, Decimal("1.50")], ["b", None, Decimal(3)]], "Why."
    )
    page = told.html(MADE)
    assert Read(page).table("Day") == [
        {"Day": "a", "Free more": "\u22121,234", "Cost": "1.50"},
        {"Day": "b", "Free more": "", "Cost": "3"},
    ]
    assert "<p>Why.</p>" in page


def test_windows_of_other_zones_and_lengths_have_their_own_bars() -> None:
    """A bar is a day of the offer's zone, or a week, where its windows are; requests and runs are counted as such."""
    gemini, evals = load("gemini-free"), load("openai-evals")
    model = min(gemini.revisions[-1].groups[0].models or ["any"])
    late = datetime(2026, 1, 10, 5, tzinfo=UTC)  # still the ninth on the Pacific coast
    starts = max(late, gemini.revisions[-1].starts.replace(hour=5) + timedelta(days=3))
    asked = Request(id="a", model=model, at=starts, input_tokens=3, output_tokens=0)
    tables = Read(story(judged([asked], gemini)).html(MADE)).tables
    day = (starts - timedelta(days=1)).date().isoformat()
    assert [rows[1][0] for title, rows in tables.items() if title.endswith("requests a day")] == [day]
    run = Request(
        id="b", model="m", at=datetime(2025, 5, 1, 9, tzinfo=UTC), input_tokens=3, output_tokens=0, kind="eval"
    )
    rows = Read(story(judged([run], evals)).html(MADE)).table("Group evals, runs a week")
    assert [(row["Week"], row["Free"], row["Allowance"]) for row in rows] == [("2025-04-28", "1", "7")]


def test_the_page_names_what_it_rests_on() -> None:
    """Reading, windows, revision, enrollment, prices with date and source, when and with what it was made."""
    page = story(judged(ARTICLE), prices=PRICES).html(MADE)
    for said in (
        "billed whole, and takes nothing of the allowance (counts=free, overage=whole)",
        *("day UTC", "2025-04-16", "tier 3, sharing enabled", str(PRICES.as_of)),
        *("Made 2026-11-21 17:20 UTC with Gratis", "20 April 2025 (UTC) · 3 requests of 1 account"),
    ):
        assert said in page


# --- What it is -----------------------------------------------------------------------------------


def test_it_needs_nothing_but_itself() -> None:
    """No script, no image, no address but its own sections, no import; and a policy that would forbid them."""
    page = story(judged(ARTICLE), prices=PRICES).html(MADE)
    read = Read(page)
    assert {tag for tag in read.tags if tag in {"script", "img", "link", "iframe", "object", "form", "base"}} == set()
    assert [value for _, name, value in read.attributes if name == "href" and not value.startswith("#")] == []
    assert [
        name for _, name, _ in read.attributes if name in {"src", "srcset", "action"} or name.startswith("on")
    ] == []
    assert re.findall(r"url\(|@import|https?:", page) == []
    policy = next(value for _, name, value in read.attributes if name == "content" and "default-src" in value)
    assert '<meta http-equiv="Content-Security-Policy"' in page
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")


def test_text_from_outside_steers_nothing() -> None:
    """Ids, models, accounts, groups, fields, found values and titles that look like HTML stay text, and are shown."""
    name = HOSTILE[:-1]
    log = [ask(name, 2_000_000, account=name), ask("b", 5, model=HOSTILE + "\x00"), ask("c", 1, model="\ud7ff\u2066")]
    told = Story(HOSTILE, PRICES)
    decisions = judged(log)
    for decision in decisions:
        told.add(decision)
    terms = structs_replace(decisions[0].terms, group=HOSTILE, offer=HOSTILE, window="day " + HOSTILE)
    told.add(structs_replace(decisions[0], request=ask("d", 5, account=name), terms=terms))
    told.found(Finding(FindingKind.UNREADABLE, None, HOSTILE, HOSTILE, HOSTILE, HOSTILE, {HOSTILE: HOSTILE}))
    told.section(HOSTILE, [HOSTILE, "b"], [[HOSTILE, 1]], HOSTILE)
    page = told.html(MADE)
    read, plain = Read(page), Read(story(judged([ask("a", 2_000_000)]), prices=PRICES).html(MADE))
    assert set(read.tags) <= {*plain.tags, "tfoot"}
    assert {name for _, name, _ in read.attributes} <= {name for _, name, _ in plain.attributes}
    assert [char for char in page if not char.isprintable() and char != "\n"] == []
    assert name in {row["Request"] for row in read.table("Request")}
    assert page.encode("utf-8")


def structs_replace(value: Any, **changes: Any) -> Any:
    """A struct with other values, as a ledger from elsewhere may have them."""
    from msgspec.structs import replace as change  # noqa: PLC0415 - beside its only use

    return change(value, **changes)


def test_it_reads_well_aloud() -> None:
    """One h1, headings in order, captions and scopes in every table, words for every chart, boxes that keys reach."""
    page = story(judged(ARTICLE), prices=PRICES).html(MADE)
    read = Read(page)
    levels = [int(level) for level in re.findall(r"<h(\d)", page)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert read.tags["caption"] == read.tags["table"] == len([c for c in read.captions if c])
    scopes = [value for tag, name, value in read.attributes if tag == "th" and name == "scope"]
    assert len(scopes) == read.tags["th"]
    assert {"row", "col"} == set(scopes)
    assert page.count("<svg") == page.count('role="img" aria-label="Group')
    assert page.count('class="scroll') == page.count('tabindex="0"')
    assert '<html lang="en">' in page
    assert '<main id="main">' in page
    anchors = {value for _, name, value in read.attributes if name == "id"}
    assert {value[1:] for _, name, value in read.attributes if name == "href"} <= anchors


def test_the_same_story_is_the_same_page() -> None:
    """Nothing in it depends on when or where it was made but the time that it is given."""
    log = [ask(f"r{n}", n * 7_919 % 400_000, days=n / 9, model=(LARGE, SMALL, "x")[n % 3]) for n in range(90)]
    pages = {story(judged(log), prices=PRICES).html(MADE) for _ in range(2)}
    assert len(pages) == 1


def test_nothing_to_tell_is_a_page_too() -> None:
    """Without a request there are figures of 0, no chart, and no share of nothing."""
    page = story([], prices=PRICES).html(MADE)
    assert "There is no request to tell of." in page
    assert (figures(page)["Free tokens"], Read(page).tags["svg"], 'class="share"' in page) == ("0", 0, False)


def test_its_size_is_bounded_and_what_is_left_out_is_counted() -> None:
    """Many days, models, crossings and findings: the page stays small, sums hold all, and what is missing is said."""
    told = Story("Much", PRICES)
    for decision in judged(
        ask(f"r{n}", 1_500_000, days=n, model=LARGE if n % 2 else f"model-{n}") for n in range(4_000)
    ):
        told.add(decision)
    for n in range(5_000):
        told.found(Finding(FindingKind.SEQ_GAP, n, "default", f"r{n}", "seq", n + 1, n))
    told.section("Much", ["a"], [[n] for n in range(10_000)])
    page = told.html(MADE)
    read = Read(page)
    assert len(page) < 1_500_000
    assert figures(page)["Findings"] == "5,000"
    assert (
        whole(figures(page)["Not covered"]) + whole(figures(page)["Billed beyond the allowance"]) == 4_000 * 1_500_000
    )
    assert len(read.table("Request")) == CROSSINGS_MAX
    assert len(read.table("One by one")) == FINDINGS_MAX
    assert len(read.table("Model")) == MODELS_MAX + 2
    for said in ("more requests left out", "4,800 more findings left out", "earlier months", "9,200 more rows"):
        assert said in page


def test_of_many_crossings_those_stay_of_which_most_was_billed() -> None:
    """However many do not fit, the largest are shown, in the order of time."""
    sizes = [1_000_001 + n * 7_919 % 5_003 for n in range(300)]
    rows = Read(story(judged(ask(f"r{n}", size) for n, size in enumerate(sizes))).html(MADE)).table("Request")
    largest = sorted(sorted(range(300), key=lambda n: -sizes[n])[:CROSSINGS_MAX])
    assert [row["Request"] for row in rows] == [f"r{n}" for n in largest]


# --- Bars -----------------------------------------------------------------------------------------


def bar(total: int, allowance: int | None = 1_000) -> Bar:
    """A bar that is all free."""
    return Bar(date(2025, 4, 20), total, 0, allowance, 1, 1)


@pytest.mark.parametrize(
    ("totals", "expected"),
    [
        ([500], 1_061),  # the line, and room above it
        ([500, 900, 4_000], 4_241),  # a high day is not a huge one
        ([500] * 9 + [10**12], 1_351),  # a huge one is cut
        ([10**12], 1_351),
        ([], 1_061),
    ],
)
def test_one_huge_day_does_not_hide_the_others(totals: list[int], expected: int) -> None:
    """The scale follows what is usual; what is far beyond is cut, and said to be."""
    assert scale([bar(total) for total in totals] or [bar(0)]) == expected


def test_a_bar_that_is_cut_is_said_to_be() -> None:
    """The page names the highest bar in full where it does not fit its chart."""
    log = [ask(f"r{n}", 10**11 if n == 3 else 500_000, days=n) for n in range(8)]
    page = story(judged(log)).html(MADE)
    assert "1 bar is cut at the torn line: the highest is 100,000,000,000 tokens on 23 April 2025." in page
    assert page.count('class="torn"') == 1
    tops = re.findall(r'y="([-\d.]+)" width="8" height="([\d.]+)"', page)
    assert {Decimal(top) + Decimal(height) <= 100 and Decimal(top) >= 0 for top, height in tops} == {True}


def test_bars_are_as_high_as_their_numbers() -> None:
    """Free below, billed above it, on one scale with the allowance; a day without requests keeps its place."""
    log = [ask("a", 500_000), ask("b", 250_000, days=2), ask("c", 1_000_000, days=2.1)]
    page = story(judged(log)).html(MADE)
    top = int(1_250_000 * Decimal("1.06")) + 1
    rects = re.findall(r'<rect class="(\w+)" x="(\d+)" y="([\d.]+)" width="8" height="([\d.]+)"', page)
    high = {name: Decimal(100 * tokens) / top for name, tokens in (("a", 500_000), ("b", 250_000), ("c", 1_250_000))}
    assert [(kind, left, Decimal(height)) for kind, left, _, height in rects] == [
        ("free", "1", high["a"].quantize(Decimal("0.01"))),
        ("free", "21", high["b"].quantize(Decimal("0.01"))),
        ("billed", "21", (high["c"] - high["b"]).quantize(Decimal("0.01"))),
    ]
    assert f'class="allowance" d="M0 {(100 - Decimal(100_000_000) / top).quantize(Decimal("0.01"))}H30"' in page


def test_the_line_steps_where_the_allowance_changes() -> None:
    """A change of the allowance is a step at the day on which it was seen; days without requests keep the last one."""
    days = [date(2025, 4, 20), date(2025, 4, 21), date(2025, 4, 24)]
    bars = [Bar(day, 10, 0, allowance, 1, 1) for day, allowance in zip(days, (50, 100, 100), strict=True)]
    drawn = "".join(chart_html(Chart("Group", "", "tokens", bars)))
    assert re.findall(r'class="allowance" d="([^"]*)"', drawn) == ["M0 53.27H10V6.54H50"]


def test_long_spans_have_a_plot_a_month() -> None:
    """Up to 62 days are one plot; beyond that each month with a request has its own."""
    short = story(judged([ask("a", 1), ask("b", 1, days=61)])).html(MADE)
    long = story(judged([ask("a", 1), ask("b", 1, days=62)])).html(MADE)
    assert (short.count("<svg"), long.count("<svg")) == (1, 2)
    assert ("April 2025</b>" in short, "April 2025</b>" in long, "June 2025</b>" in long) == (False, True, True)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (999, "999"),
        (1_000, "1k"),
        (250_000, "250k"),
        (2_500_000, "2.5M"),
        (999_999, "1,000k"),
        (10**12, "1T"),
    ],
)
def test_the_scale_is_labelled_in_short(value: int, expected: str) -> None:
    """Thousands, millions, billions: three digits and a letter."""
    assert compact(value) == expected


@pytest.mark.parametrize(
    ("part", "total", "expected"),
    [
        (0, 5, "0.0 %"),
        (5, 5, "100.0 %"),
        (1, 10**9, "under 0.1 %"),
        (10**9 - 1, 10**9, "over 99.9 %"),
        (1, 3, "33.3 %"),
    ],
)
def test_a_share_is_not_all_or_nothing_unless_it_is(part: int, total: int, expected: str) -> None:
    """A little is not said to be nothing, and nearly all not to be all."""
    assert percent(part, total) == expected


@given(st.text())
def test_any_text_is_only_text(value: str) -> None:
    """No text becomes a tag, an attribute, a control or half a character."""
    shown = text(value)
    assert not set(shown) & set("<>\"'")
    assert shown.isprintable()
    assert shown.encode("utf-8").decode() == shown


# --- The command ----------------------------------------------------------------------------------


def test_readings_write_the_page_beside_their_lines(tmp_path: Path) -> None:
    """`--html FILE` changes no line of the output, and the page has the readings and where they part."""
    file, lines = tmp_path / "report.html", sent(map(request_line, ARTICLE))
    with_page = gratis("readings", "--tier", "3", "--models", "--html", file, stdin=lines)
    assert with_page.out == gratis("readings", "--tier", "3", "--models", stdin=lines).out
    read = Read(file.read_text(encoding="utf-8"))
    assert [row["Billed tokens"] for row in read.table("Reading")] == ["500,000", "350,000", "600,000", "350,000"]
    assert [row["First judged differently"] for row in read.table("Day")] == ["500k", "100k", "500k"]
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_page_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    """A folder, or a place that is not there, is an error with exit code 2, and nothing is judged."""
    for place in (tmp_path, tmp_path / "nowhere" / "report.html"):
        answer = gratis("readings", "--tier", "3", "--html", place, stdin=b"not a request")
        assert (answer.code, answer.out) == (2, "")
        assert answer.err.startswith("gratis: --html: ")


@pytest.mark.parametrize("command", [("audit",), ("readings", "--tier", "3")])
def test_a_page_never_takes_the_place_of_what_it_tells_of(command: tuple[str, ...], tmp_path: Path) -> None:
    """`--html` with the name of the file that is read is refused, by whatever way it is named; the file stays."""
    log, other = tmp_path / "log.jsonl", tmp_path / "link"
    log.write_bytes(b"kept")
    other.symlink_to(log)
    for page in (log, other):
        answer = gratis(*command, str(log), "--html", str(page))
        assert (answer.code, answer.out) == (2, "")
        assert answer.err.startswith(f"gratis: --html: {page}: found the file that is read, ")
        assert answer.err.endswith("; expected another\n")
    assert log.read_bytes() == b"kept"
