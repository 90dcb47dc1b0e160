"""The audit: silent on an honest ledger, and each kind of finding where it was planted."""

from __future__ import annotations

import json
import sqlite3
import tempfile
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import Phase, given, settings, strategies as st

from gratis import Decision, Enrollment, EnrollmentError, Meter, Request, RequestError
from gratis.audit import seen
from gratis.audit.findings import Finding, FindingKind
from gratis.audit.fold import Audit
from gratis.audit.seen import Seen
from gratis.errors import LedgerError
from gratis.lines import decode, encode, entry_line, entry_of
from gratis.model import Durability
from gratis.offers import load
from gratis.stores.memory import MemoryStore
from gratis.stores.sqlite import SQLiteStore, Synchronous

from .test_cli import OWN_OFFER, Answer, gratis

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gratis.model import Entry

NOON = datetime(2025, 4, 20, 12, tzinfo=UTC)
LARGE = "gpt-4o-2024-08-06"
SMALL = "gpt-4o-mini-2024-07-18"
OFFER = load("openai-data-sharing")
ENROLLED = Enrollment(tier=3, sharing="enabled")
STARTS = (NOON, datetime(2025, 3, 3, 12, tzinfo=UTC), datetime(2025, 4, 14, tzinfo=UTC))
COLUMNS = '(account, "group", kind, start, end, used, seq)'  # of a window in SQLite
ACCOUNTS = ("default", "acme", "caf\u00e9")
STATES: tuple[dict[str, Any], ...] = (
    *({"tier": tier, "sharing": "enabled"} for tier in range(6)),
    {"tier": 3, "sharing": "selected", "projects": ["p", "q"]},
    {"tier": 3, "sharing": "disabled", "plan": "enterprise"},
    {"tier": 1, "sharing": "enabled", "ends": NOON + timedelta(days=2)},
)


# --- Honest histories -----------------------------------------------------------------------------

requests_made = st.builds(
    lambda name, account, model, tokens, minutes, project, kind, tools: (
        "decide",
        {
            "id": f"r{name}",
            "account": account,
            "model": model,
            "input_tokens": tokens,
            "output_tokens": None if tokens is None else 0,
            "project": project,
            "kind": kind,
            "tools": tools,
        },
        minutes,
    ),
    name=st.integers(0, 30),
    account=st.sampled_from(ACCOUNTS),
    model=st.sampled_from([LARGE, LARGE, SMALL, "gpt-4.1-2025-04-14", "unknown", "ft:" + LARGE]),
    tokens=st.one_of(st.integers(0, 10), st.integers(0, 400_000), st.sampled_from([None, 250_000, 1_000_000, 10**12])),
    minutes=st.one_of(st.just(0), st.integers(-3_000, 5), st.integers(-15_000, 10)),
    project=st.sampled_from([None, "p", "z"]),
    kind=st.sampled_from(["completion", "completion", "completion", "embedding", "eval", "assistants"]),
    tools=st.sampled_from([(), (), ("function",), ("web_search",)]),
)
changes_made = st.tuples(st.just("enroll"), st.sampled_from(ACCOUNTS), st.sampled_from(STATES))
days_passed = st.tuples(st.just("wait"), st.integers(0, 6_000))
histories = st.lists(st.one_of(requests_made, requests_made, requests_made, changes_made, days_passed), max_size=40)
readings = st.tuples(st.sampled_from(["free", "all"]), st.sampled_from(["whole", "excess"]))


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self) -> datetime:
        """The time."""
        return self.now


def live(meter: Meter, clock: Clock, history: Iterable[tuple[Any, ...]]) -> None:
    """Let a history happen; what is refused leaves no trace, so it is passed over."""
    for what, *how in history:
        try:
            if what == "wait":
                clock.now += timedelta(minutes=how[0])
            elif what == "enroll":
                meter.enroll(how[0], Enrollment(**how[1]), actor="ann")
            else:
                fields, minutes = how
                meter.decide(Request(**fields, at=clock.now + timedelta(minutes=minutes)))
        except (RequestError, EnrollmentError):
            pass


def audited(store: MemoryStore | SQLiteStore) -> list[Finding]:
    """What an audit finds in a store: its ledger, read back from lines, its counters, and the ends of its chains."""
    audit = Audit({OFFER.name: OFFER}.get, store.enrollments)
    found = list(audit.findings(entry_of(decode(encode(entry_line(entry)))) for entry in store.entries()))
    for offer, account in store.accounts():
        found += audit.counters(offer, account, store.tallies(offer, account))
        found += audit.links(offer, account, store.links(offer, account)[2])
        found += audit.histories(offer, account)
    return found


@settings(max_examples=150)
@given(start=st.sampled_from(STARTS), history=histories, reading=readings)
def test_an_honest_history_has_no_findings(
    start: datetime, history: list[tuple[Any, ...]], reading: tuple[str, str]
) -> None:
    """Whatever happened, under each reading and kind of window, with changes, lateness and repeats."""
    offer = OFFER.reading(counts=reading[0], overage=reading[1])
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock(start)
        for store in (
            MemoryStore(clock=clock),
            SQLiteStore(Path(folder) / "gratis.db", clock=clock, synchronous=Synchronous.OFF),
        ):
            clock.now = start
            live(Meter(store, offer, assume=ENROLLED), clock, history)
            assert audited(store) == []
            store.close()


def test_honest_ledgers_of_several_offers_in_one_store_have_no_findings(tmp_path: Path) -> None:
    """Each entry is judged by its own offer, whose ids and windows are its own."""
    url = f"sqlite:///{tmp_path}/gratis.db"
    for name in ("openai-data-sharing", "openai-evals", "groq-free", "cloudflare-workers-ai"):
        assume = Enrollment(tier=3, sharing="enabled")
        with Meter.open(url, offer=name, assume=assume, bounds=None) as meter:
            offered = meter.offer.revisions[-1].starts
            for number in range(5):
                meter.decide(
                    Request(id=f"r{number}", model="m", at=offered, input_tokens=5, output_tokens=5, kind="eval")
                )
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_text(gratis("ledger", "--store", url).out, encoding="utf-8")
    for place in (("--store", url), (str(ledger),)):
        answer = gratis("audit", *place)
        assert (answer.code, answer.out, answer.err) == (0, "", "gratis: 20 entries, 0 findings\n")


# --- Findings, planted one by one -----------------------------------------------------------------

TABLE = (120_000, 140_000, 150_000, 150_000, 150_000, 150_000, 115_000, 30_000)


def _requests() -> list[Request]:
    """The article's day, as entries 1 to 8, and what others do around it."""
    day = [
        Request(id=f"r{number}", model=LARGE, at=NOON, input_tokens=tokens, output_tokens=0)
        for number, tokens in enumerate(TABLE, 1)
    ]
    others = [
        Request(id="r9", model="unknown", at=NOON, input_tokens=5, output_tokens=0),
        Request(id="r10", model=LARGE, at=NOON, input_tokens=10, output_tokens=0, account="acme"),
        Request(id="r11", model=SMALL, at=NOON, input_tokens=11, output_tokens=0),
        Request(id="r12", model=LARGE, at=NOON, input_tokens=12, output_tokens=0, account="acme"),
        Request(id="r13", model=LARGE, at=NOON - timedelta(days=1), input_tokens=13, output_tokens=0),
        Request(id="r14", model=LARGE, at=NOON, input_tokens=14, output_tokens=0),
        Request(id="r15", model=LARGE, at=NOON - timedelta(days=1), input_tokens=15, output_tokens=0),
        Request(id="r16", model="unknown", at=NOON, input_tokens=16, output_tokens=0),
    ]
    return [*day, *others]


def _ledger() -> list[dict[str, Any]]:
    """The lines of an honest ledger, of before there were links: what the rule alone finds in it."""
    meter = Meter(MemoryStore(clock=lambda: NOON), OFFER, assume=ENROLLED)
    meter.decide_many(_requests())
    return [line_of(entry) for entry in meter.ledger()]


def line_of(entry: Entry) -> dict[str, Any]:
    """An entry's line without its link."""
    line = json.loads(encode(entry_line(entry)))
    assert len(line.pop("link")) == 24
    return line


LEDGER = _ledger()


def ledger() -> list[dict[str, Any]]:
    """A fresh copy of the honest ledger's lines."""
    return json.loads(json.dumps(LEDGER))


def said(entries: int, findings: int = 0, *, unlinked: int | None = None) -> str:
    """What an audit says at its end; of these lines none has a link."""
    many = "1 entry" if entries == 1 else f"{entries} entries"
    found = "1 finding" if findings == 1 else f"{findings} findings"
    no_link = entries if unlinked is None else unlinked
    has = "1 entry has" if no_link == 1 else f"{no_link} entries have"
    return f"gratis: {many}, {found}\ngratis: {has} no link: only the rule speaks for them, not the chain\n"


def file_of(lines: Iterable[Any]) -> bytes:
    """Lines as a ledger file; what is bytes already stays as it is."""
    return b"".join((each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in lines)


def audit_of(lines: Iterable[Any], *arguments: str) -> Answer:
    """`gratis audit -` of these lines."""
    return gratis("audit", "-", *arguments, stdin=file_of(lines))


def places(answer: Answer) -> list[tuple[str, int | None]]:
    """Kind and entry of each finding."""
    return [(each["kind"], each["entry"]) for each in answer.lines]


def consistent(line: dict[str, Any]) -> None:
    """Write anew what a line says twice, as whoever forges one would."""
    terms, sizes = line["terms"], (line["input_tokens"], line["output_tokens"])
    tokens = None if None in sizes else sum(sizes)
    is_free, is_judged = line["reason"] == "within_allowance", line["used"] is not None
    line.update(
        verdict="free" if is_free else "billed",
        tokens=tokens,
        billed_tokens=0 if is_free else None if tokens is None else tokens - line["free_tokens"],
        group=terms["group"] if is_judged else None,
        allowance=terms["allowance"] if is_judged else None,
        remaining=max(0, terms["allowance"] - line["used"]) if is_judged else None,
        offer=terms["offer"],
        revision=terms["revision"],
    )


def edit(entry: int, terms: dict[str, Any] | None = None, /, **fields: Any) -> Callable[[list[Any]], None]:
    """Change fields of one entry and of its terms, and what follows from them in its line."""

    def edited(lines: list[Any]) -> None:
        lines[entry - 1].update(fields)
        lines[entry - 1]["terms"].update(terms or {})
        consistent(lines[entry - 1])

    return edited


def _cut(entry: int) -> Callable[[list[Any]], None]:
    return lambda lines: lines.pop(entry - 1)


def _double(entry: int) -> Callable[[list[Any]], None]:
    return lambda lines: lines.insert(entry, lines[entry - 1])


def _spoil(entry: int) -> Callable[[list[Any]], None]:
    return lambda lines: lines.__setitem__(entry - 1, b"spoiled")


PLANTED: list[tuple[str, Callable[[list[Any]], None], list[tuple[str, int | None]]]] = [
    ("unreadable", _spoil(16), [("unreadable", None)]),
    ("offer_unknown", edit(16, {"offer": "nobody"}), [("offer_unknown", 16)]),
    ("entry_gap", _cut(9), [("entry_gap", 10)]),
    ("entry_repeated", edit(16, entry=15), [("entry_repeated", 15)]),
    ("decided_twice", edit(16, id="r9"), [("decided_twice", 16)]),
    ("wrong_terms", edit(4, {"allowance": 900_000}), [("wrong_terms", 4)]),
    ("wrong_group", edit(4, {"group": "10M"}), [("wrong_group", 4)]),
    ("wrong_reason", edit(9, reason="fine_tuned_model"), [("wrong_reason", 9)]),
    ("needless_billing", edit(14, reason="over_allowance"), [("needless_billing", 14)]),
    ("wrongly_free", edit(8, reason="within_allowance"), [("wrongly_free", 8)]),
    ("seq_gap", edit(14, seq=10), [("seq_gap", 14)]),
    ("seq_repeated", edit(14, seq=8), [("seq_repeated", 14)]),
    ("wrong_window", edit(14, window_start="2025-04-20T01:00:00Z"), [("wrong_window", 14)]),
    ("wrong_totals", edit(4, total=560_001), [("wrong_totals", 4)]),
    ("wrong_totals", edit(14, used=1), [("wrong_totals", 14)]),
    ("wrong_totals", edit(14, free_tokens=13), [("wrong_totals", 14)]),
]


@pytest.mark.parametrize("plant", [_cut, _spoil])
@pytest.mark.parametrize("entry", range(1, 16))
def test_what_is_missing_is_held_against_no_other_entry(
    plant: Callable[[int], Callable[[list[Any]], None]], entry: int
) -> None:
    """Where an entry was cut or cannot be read, a gap is found behind it, and no verdict or total is called wrong."""
    lines = ledger()
    plant(entry)(lines)
    kinds = {each["kind"] for each in audit_of(lines).lines}
    assert "entry_gap" in kinds
    assert kinds <= {"entry_gap", "seq_gap", "unreadable"}


def test_a_gap_does_not_hide_what_is_wrong_behind_it() -> None:
    """What stands behind a gap is judged on top of what it says was used: by that it still can be wrong."""
    lines = ledger()
    edit(14, reason="over_allowance", free_tokens=0)(lines)
    _cut(8)(lines)
    assert {("seq_gap", 14), ("needless_billing", 14)} <= set(places(audit_of(lines)))


def test_a_gap_is_no_excuse_for_a_total_that_shrank() -> None:
    """What is missing can have taken more of a window, and never less: who says so is not believed."""
    lines = ledger()
    amount = lines[13]["total"] - lines[12]["total"]
    edit(14, seq=10, total=amount, used=amount)(lines)
    assert {"seq_gap", "wrong_totals"} <= {each["kind"] for each in audit_of(lines).lines}


@pytest.mark.parametrize("entry", range(1, 9))
def test_a_gap_in_windows_that_roll_is_held_against_no_other_entry(entry: int) -> None:
    """Also where the entry is missing that opened a window, the next one says which window that was."""
    start = STARTS[1]
    clock = Clock(start)
    meter = Meter(MemoryStore(clock=clock), OFFER, assume=ENROLLED)
    for number in range(9):
        clock.now = start + timedelta(hours=5 * number)
        request = Request(id=f"r{number}", model=LARGE, at=clock.now, input_tokens=150_000, output_tokens=0)
        assert meter.decide(request).group == "1M"
    lines = [json.loads(encode(entry_line(each))) for each in meter.ledger()]
    assert len({line["window_start"] for line in lines}) == 2  # the second opens after a day
    del lines[entry - 1]
    kinds = {each["kind"] for each in audit_of(lines).lines}
    assert "entry_gap" in kinds
    assert kinds <= {"entry_gap", "seq_gap", "broken_chain"}


def test_the_honest_ledger_has_no_findings() -> None:
    """Before anything is planted the audit is silent."""
    answer = audit_of(ledger())
    assert (answer.code, answer.out, answer.err) == (0, "", said(16))


def test_every_kind_of_finding_is_planted() -> None:
    """No kind is without its test; counters are a store's, and planted in one below."""
    elsewhere = {
        "counter_differs",
        "wrong_correction",  # in test_audit_holds.py
        "broken_chain",  # in test_audit_chain.py
        "not_in_force",  # in test_audit_enrollments.py
        "wrong_enrollment",  # as above
    }
    assert {kind for kind, _, _ in PLANTED} | elsewhere == set(FindingKind)


@pytest.mark.parametrize(("kind", "plant", "expected"), PLANTED)
def test_each_kind_of_finding_is_found_where_it_was_planted(
    kind: str, plant: Callable[[list[Any]], None], expected: list[tuple[str, int | None]]
) -> None:
    """The audit reports kind and place, and its exit code is 1; the planted fact is the first thing it says."""
    lines = ledger()
    plant(lines)
    answer = audit_of(lines)
    assert places(answer)[:1] == expected
    assert kind in {each["kind"] for each in answer.lines}
    assert answer.code == 1
    assert answer.err.startswith(said(len(lines), len(answer.lines)).partition("\n")[0])


@pytest.mark.parametrize(("kind", "plant", "expected"), PLANTED)
def test_one_wrong_entry_does_not_cascade(
    kind: str, plant: Callable[[list[Any]], None], expected: list[tuple[str, int | None]]
) -> None:
    """Findings stay at the wrong entry and the one that builds on it: those further on follow from what they found."""
    lines = ledger()
    plant(lines)
    assert len({entry for _, entry in places(audit_of(lines))}) <= 2


def test_a_finding_says_what_is_there_and_what_the_rule_gives() -> None:
    """A finding carries kind, entry, account, id, field, what was found and what was expected."""
    lines = ledger()
    edit(14, used=1)(lines)
    assert audit_of(lines).lines == [
        {
            "kind": "wrong_totals",
            "entry": 14,
            "account": "default",
            "id": "r14",
            "field": "used",
            "found": 1,
            "expected": 975_014,
        }
    ]


@pytest.mark.parametrize(
    ("entry", "field", "value"),
    [
        (4, "verdict", "billed"),
        (8, "verdict", "free"),
        (4, "reason", "over_allowance"),
        (4, "group", "10M"),
        (4, "tokens", 1),
        (4, "free_tokens", 1),
        (4, "billed_tokens", 1),
        (8, "billed_tokens", 0),
        (4, "allowance", 2_000_000),
        (4, "total", 1),
        (4, "used", 1),
        (4, "remaining", 1),
        (4, "window_start", "2025-04-19T00:00:00Z"),
        (4, "window_end", "2025-04-22T00:00:00Z"),
        (4, "seq", 7),
        (4, "offer", "openai-evals"),
        (4, "revision", "2025-05-16"),
        (4, "model", "unknown"),
        (4, "input_tokens", 1),
        (4, "output_tokens", None),
        (4, "at", "2025-04-21T12:00:00Z"),
        (4, "kind", "fine_tuning_training"),
        (4, "tools", ["web_search"]),
        (4, "replayed", True),
        (9, "allowance", 1_000_000),
        (9, "group", "1M"),
        (9, "free_tokens", 5),
        (9, "seq", 1),
    ],
)
def test_no_field_of_a_decision_can_be_changed_unseen(entry: int, field: str, value: object) -> None:
    """Whichever field of a line is not what the rule gives, the audit says so: scripts read every one of them."""
    lines = ledger()
    assert lines[entry - 1][field] != value
    lines[entry - 1][field] = value
    answer = audit_of(lines)
    assert answer.code == 1
    assert answer.lines != []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("offer", "openai-evals"),
        ("revision", "2025-05-16"),
        ("reason", "model_not_listed"),
        ("group", "10M"),
        ("unit", "requests"),
        ("allowance", 2_000_000),
        ("counts", "all"),
        ("overage", "excess"),
        ("window", "day Asia/Tokyo"),
    ],
)
def test_no_term_of_a_decision_can_be_changed_unseen(field: str, value: object) -> None:
    """What a decision rested on is judged too, where another term gives another decision."""
    lines = ledger()
    assert lines[7]["terms"][field] != value
    edit(8, {field: value})(lines)
    assert audit_of(lines).code == 1


@pytest.mark.parametrize("tier", [0, 1])
def test_a_tier_that_gives_another_allowance_is_found(tier: int) -> None:
    """An enrollment that does not give the terms of its entry is a finding."""
    lines = ledger()
    lines[3]["enrollment"]["tier"] = tier
    assert places(audit_of(lines))[0] == ("wrong_terms", 4)


@pytest.mark.parametrize(
    "change", [{"model": "unknown"}, {"at": "2025-04-19T12:00:00Z"}, {"model": SMALL}, {"input_tokens": 1}]
)
def test_a_changed_request_is_found_at_its_entry_and_not_all_over(change: dict[str, Any]) -> None:
    """A request that is not the one that was decided concerns its entry and the next of its own window, no others."""
    lines = ledger()
    edit(4, **change)(lines)
    found = places(audit_of(lines))
    assert found[0][1] == 4
    assert {entry for _, entry in found} <= {4, 5}


def test_a_second_decision_of_an_id_is_found_whatever_another_offer_decided() -> None:
    """Ids are an account's under one offer: the same id under another offer first hides nothing."""
    store = MemoryStore(clock=lambda: NOON)
    one = Request(id="r1", model=LARGE, at=NOON, input_tokens=1, output_tokens=0)
    run = Request(id="r1", model=LARGE, at=NOON, kind="eval")
    Meter(store, OFFER, assume=ENROLLED).decide(one)
    Meter(store, load("openai-evals"), assume=ENROLLED).decide(run)
    lines = [line_of(entry) for entry in store.entries()]
    assert audit_of(lines).code == 0
    again = {**lines[1], "entry": 3, "seq": 2, "used": 2, "total": 2}
    assert places(audit_of([*lines, again])) == [("decided_twice", 3)]


# --- What cannot be read --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"spoiled", "line: not JSON: "),
        (b"\xff", "line: not JSON: "),
        (b"[]", "found list; expected a JSON object"),
        (b"{}", "window_start: missing; expected a line as `gratis ledger` prints it"),
        (b'{"' + b"x" * (5 << 20) + b'": 1}', "line: longer than "),
    ],
)
def test_a_line_that_cannot_be_read_is_a_finding_with_its_number(line: bytes, message: str) -> None:
    """What is no entry is told with its line and why; the lines around it are judged."""
    lines: list[Any] = ledger()
    lines[15] = line
    edit(14, used=1)(lines)
    found = audit_of(lines).lines
    assert [(each["kind"], each["field"]) for each in found] == [("wrong_totals", "used"), ("unreadable", "line 16")]
    assert found[1]["found"].startswith(message)


@pytest.mark.parametrize("field", sorted(LEDGER[0].keys() - {"project", "tools", "cached_tokens", "kind", "account"}))
def test_a_line_without_one_of_its_fields_is_a_finding(field: str) -> None:
    """A ledger line has every field; one that lacks some is not taken as it is."""
    lines = ledger()
    del lines[3][field]
    answer = audit_of(lines)
    assert answer.code == 1
    assert answer.lines[0]["entry"] == 4 or answer.lines[0]["field"] == "line 4"


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from([0, 1, -1, 10**12, 10**30, 0.5, "", "x", "free", "2025-04-20T12:00:00Z", "x" * 5000 + ".toml"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(["tier", "x"]), inner)),
    max_leaves=3,
)


@settings(max_examples=400, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # small as they are
@given(st.data())
def test_no_value_in_a_ledger_breaks_the_audit(data: st.DataObject) -> None:
    """Whatever stands where in a line, the audit ends with findings or without, never with a traceback."""
    lines = ledger()
    for _ in range(data.draw(st.integers(1, 2))):
        place: Any = lines[data.draw(st.integers(0, 15))]
        inside = data.draw(st.sampled_from(["", "", "terms", "enrollment"]))
        place = place[inside] if inside and isinstance(place[inside], dict) else place
        place[data.draw(st.sampled_from(sorted(place)))] = data.draw(json_values)
    answer = audit_of(lines)
    assert answer.code in {0, 1}
    assert answer.err.startswith(said(16, len(answer.lines)).partition("\n")[0])


@settings(max_examples=200)
@given(json_values)
def test_a_value_is_an_entry_or_a_ledger_error(value: object) -> None:
    """Reading a line gives an entry, or says why it is none."""
    with pytest.raises(LedgerError):
        entry_of(value)


# --- Which offer, which file ----------------------------------------------------------------------


def _own_ledger(tmp_path: Path) -> tuple[Path, Path]:
    """An offer of our own, and a ledger under it."""
    offer, lines = tmp_path / "mine.toml", tmp_path / "ledger.jsonl"
    offer.write_text(OWN_OFFER, encoding="utf-8")
    meter = Meter(MemoryStore(bounds=None), load(offer), assume=ENROLLED)
    meter.decide(Request(id="r1", model="m", at=NOON, input_tokens=1_000, output_tokens=0))
    lines.write_bytes(file_of(map(line_of, meter.ledger())))
    return offer, lines


def test_a_file_of_ones_own_offer_is_given_by_path(tmp_path: Path) -> None:
    """A ledger under an offer that is not shipped is judged by the file that `--offer` names, and unknown without."""
    offer, lines = _own_ledger(tmp_path)
    assert gratis("audit", "--offer", offer, lines) == Answer(0, "", said(1))
    assert places(gratis("audit", lines)) == [("offer_unknown", 1)]
    offer.write_text(OWN_OFFER.replace("1_000", "999"), encoding="utf-8")
    assert ("wrongly_free", 1) in places(gratis("audit", "--offer", offer, lines))
    assert gratis("audit", "--offer", "nowhere", lines).code == 2


def test_a_ledger_does_not_choose_the_file_by_which_it_is_judged(tmp_path: Path) -> None:
    """An offer's name in a ledger is a name, not a path: only shipped offers and `--offer` are asked."""
    offer, lines = _own_ledger(tmp_path)
    entry = json.loads(lines.read_bytes())
    entry["offer"] = entry["terms"]["offer"] = str(offer)
    assert places(audit_of([entry])) == [("offer_unknown", 1)]


@pytest.mark.parametrize("name", ["", "nobody", "x" * 5000 + ".toml", "/dev/zero", "\0.toml", "..", 5, None, ["x"], {}])
def test_any_offer_that_a_ledger_names_is_known_or_a_finding(name: object) -> None:
    """An offer that cannot be is no traceback."""
    lines = ledger()
    edit(16, {"offer": name})(lines)
    answer = audit_of(lines)
    assert [each["kind"] for each in answer.lines] in (["offer_unknown"], ["unreadable"])


def test_a_file_standard_input_and_a_store_are_audited_alike(tmp_path: Path) -> None:
    """The same ledger has the same findings wherever it is read."""
    url = f"sqlite:///{tmp_path}/gratis.db"
    with Meter.open(url, offer=OFFER, assume=ENROLLED, clock=lambda: NOON) as meter:
        meter.decide_many(_requests())
    with closing(sqlite3.connect(tmp_path / "gratis.db")) as connection:
        connection.execute("DROP TRIGGER ledger_keeps_what_it_says")
        connection.execute("UPDATE ledger SET total = total + 1 WHERE entry IN (2, 10)")
        connection.commit()
    lines = tmp_path / "ledger.jsonl"
    lines.write_text(gratis("ledger", "--store", url).out, encoding="utf-8")
    of_store, of_file = gratis("audit", "--store", url), gratis("audit", lines)
    of_input = gratis("audit", "-", stdin=lines.read_bytes())
    assert places(of_store) == [("wrong_totals", 2), ("wrong_totals", 10)]
    assert [of_file, of_input] == [of_store, of_store]
    assert of_store.code == 1


# --- Findings planted in a file of SQLite ---------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("UPDATE ledger SET reason = 'within_allowance' WHERE entry = 8", ("wrongly_free", 8)),
        ("UPDATE ledger SET reason = 'over_allowance' WHERE entry = 14", ("needless_billing", 14)),
        ("UPDATE ledger SET reason = 'evals' WHERE entry = 9", ("wrong_reason", 9)),
        ("UPDATE ledger SET used = used - 1 WHERE entry = 14", ("wrong_totals", 14)),
        ("UPDATE ledger SET free_tokens = 0 WHERE entry = 14", ("wrong_totals", 14)),
        ("UPDATE ledger SET seq = 10 WHERE entry = 14", ("seq_gap", 14)),
        ("UPDATE ledger SET seq = 8 WHERE entry = 14", ("seq_repeated", 14)),
        ("UPDATE ledger SET entry = 99 WHERE entry = 16", ("entry_gap", 99)),
        ("DELETE FROM ledger WHERE entry = 9", ("entry_gap", 10)),
        ("UPDATE windows SET end = end + 1 WHERE window = 1", ("wrong_window", 1)),
        ("UPDATE terms SET facts = replace(facts, '1000000', '2000000')", ("wrong_terms", 1)),
        ("UPDATE terms SET facts = replace(facts, 'openai-data', 'nobodys-data')", ("offer_unknown", 1)),
        ("UPDATE windows SET used = used - 1 WHERE window = 1", ("counter_differs", None)),
        ("UPDATE windows SET seq = seq + 1 WHERE window = 2", ("counter_differs", None)),
        (f"INSERT INTO windows {COLUMNS} VALUES (1, '1M', 'day UTC', 0, 1, 7, 1)", ("counter_differs", None)),  # noqa: S608 - ours
        ("DELETE FROM windows WHERE window = 1", ("counter_differs", None)),
    ],
)
def test_what_was_planted_in_a_store_is_found(tmp_path: Path, statement: str, expected: tuple[str, int | None]) -> None:
    """Whoever edits the file behind the back of Gratis is found out, with kind and place and exit code 1."""
    path = tmp_path / "gratis.db"
    with Meter.open(f"sqlite:///{path}", offer=OFFER, assume=ENROLLED, clock=lambda: NOON) as meter:
        meter.decide_many(_requests())
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TRIGGER ledger_keeps_what_it_says")
        connection.execute("DROP TRIGGER ledger_keeps_what_it_holds")
        connection.execute(statement)
        connection.commit()
    answer = gratis("audit", "--store", f"sqlite:///{path}")
    assert expected in places(answer)
    assert answer.code == 1


def test_an_unreadable_row_of_a_store_is_a_finding_and_the_others_are_judged(tmp_path: Path) -> None:
    """As with a file: what cannot be read is told with its place, and does not hide what else is wrong."""
    path = tmp_path / "gratis.db"
    with Meter.open(f"sqlite:///{path}", offer=OFFER, assume=ENROLLED, clock=lambda: NOON) as meter:
        meter.decide_many(_requests())
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TRIGGER ledger_keeps_what_it_says")
        connection.execute("UPDATE ledger SET kind = 'nonsense' WHERE entry = 9")
        connection.execute("UPDATE ledger SET total = total + 1 WHERE entry = 14")
        connection.commit()
    answer = gratis("audit", "--store", f"sqlite:///{path}")
    assert {each["kind"] for each in answer.lines} == {"unreadable", "wrong_totals", "broken_chain"}
    assert answer.code == 1


def test_a_store_that_is_in_use_is_audited_as_of_one_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decisions made while a live store is audited are no findings."""
    url = f"sqlite:///{tmp_path}/gratis.db"
    with Meter.open(url, offer=OFFER, assume=ENROLLED, clock=lambda: NOON) as meter:
        meter.decide_many(_requests())
        known = SQLiteStore.accounts

        def accounts(store: SQLiteStore) -> list[tuple[str, str]]:
            meter.decide(Request(id="meanwhile", model=LARGE, at=NOON, input_tokens=1, output_tokens=0))
            return known(store)

        monkeypatch.setattr(SQLiteStore, "accounts", accounts)
        assert gratis("audit", "--store", url) == Answer(0, "", "gratis: 16 entries, 0 findings\n")


def test_a_ledger_whose_lines_are_long_is_read_back(tmp_path: Path) -> None:
    """The largest enrollment that may be gives lines that every command takes."""
    path, lines = tmp_path / "gratis.db", tmp_path / "ledger.jsonl"
    projects = [f"{number:05}".ljust(255, "x") for number in range(10_000)]
    with Meter.open(f"sqlite:///{path}", offer=OFFER, clock=lambda: NOON) as meter:
        meter.enroll("default", Enrollment(tier=3, sharing="selected", projects=projects), actor="ann")
        meter.decide(Request(id="r1", model=LARGE, at=NOON, input_tokens=1, output_tokens=0, project=projects[0]))
    for _ in range(2):
        assert gratis("ledger", "--store", f"sqlite:///{path}", "--out", lines).code == 0
    assert gratis("audit", lines) == Answer(0, "", "gratis: 1 entry, 0 findings\n")


# --- Which ids were seen: exact, in constant memory -----------------------------------------------

names = st.tuples(st.sampled_from(ACCOUNTS), st.text("ab", min_size=1, max_size=3))


@settings(max_examples=150)
@given(
    made=st.lists(names, max_size=60),
    asked=st.lists(names, max_size=20),
    held_max=st.integers(1, 9),
    mixed=st.sampled_from([hash, lambda _: 0, lambda key: len(key[1]), lambda key: -(1 << 63) + len(key[1])]),
)
def test_what_was_seen_is_what_a_dict_remembers(
    made: list[tuple[str, str]],
    asked: list[tuple[str, str]],
    held_max: int,
    mixed: Callable[[object], int],
) -> None:
    """However little is held in memory, and however ids collide, each has its own first decision and no other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seen, "hash", mixed, raising=False)
        patch.setattr(seen, "FILTER_BITS", 1 << 16)
        patch.setattr(seen, "FILTER_MASK", (1 << 16) - 1)
        meter = Meter(MemoryStore(bounds=None), OFFER, assume=ENROLLED)
        known, expected = Seen(held_max=held_max), dict[tuple[str, str], Decision]()
        for number, (account, name) in enumerate(made):
            assert known.get(account, name) == expected.get((account, name))
            if (account, name) not in expected:
                decision = meter.decide(
                    Request(
                        id=name,
                        account=account,
                        model=(LARGE, SMALL, "?")[number % 3],
                        at=NOON + timedelta(microseconds=number),
                        input_tokens=None if number % 7 == 3 else number,
                        output_tokens=0,
                        project=(None, "p")[number % 2],
                        tools=((), ("function", "custom"))[number % 2],
                    )
                )
                expected[account, name] = decision
                known.put(decision)
                assert len(known._held) <= held_max
        for account, name in [*expected, *asked]:
            assert known.get(account, name) == expected.get((account, name))
        known.close()


def test_the_audit_finds_a_repeated_id_however_long_ago_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """An id that memory no longer holds is found too."""
    monkeypatch.setattr(seen.Seen.__init__, "__kwdefaults__", {"held_max": 2})
    lines = ledger()
    edit(16, id="r1")(lines)
    assert places(audit_of(lines)) == [("decided_twice", 16)]


def test_an_entry_says_what_it_rests_on() -> None:
    """Durability and time of decision are in the ledger, and are the store's word: the rule does not judge them."""
    lines = ledger()
    edit(4, durability="synced", decided_at="2030-01-01T00:00:00Z")(lines)
    entries: list[Entry] = [entry_of(each) for each in lines]
    assert entries[3].decision.durability is Durability.SYNCED
    assert audit_of(lines).code == 0
