"""Which requests an allowance covers: exact ids by date, every reason and the order in which reasons win."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings, strategies as st

from gratis import Enrollment, Meter, Reason, Request, Sharing
from gratis.book import Book
from gratis.classify import EXCLUDES, case_of, charge_for, exclusion
from gratis.model import Kind, Window
from gratis.offer_file import parse
from gratis.offers import load
from gratis.stores import Bounds
from gratis.stores.memory import MemoryStore

TICK = timedelta(microseconds=1)
HOUR = timedelta(hours=1)
OPENAI = load("openai-data-sharing")
SHARING = Enrollment(tier=5, sharing=Sharing.ENABLED)
LARGE = "gpt-4o-2024-08-06"
SMALL = "gpt-4o-mini-2024-07-18"
GROUPS = {"L": "1M", "S": "10M", ".": None}


def instant(text):
    """A date or time of a table, which is UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def ask(**fields):
    """A small request in April 2025 that is free, but for these fields."""
    usual = {"id": "r", "model": LARGE, "at": instant("2025-04-20"), "input_tokens": 2, "output_tokens": 1}
    return Request(**{**usual, **fields})


def meter(offer=OPENAI, enrollment=SHARING):
    """A meter that judges old data as it was."""
    known = load(offer) if isinstance(offer, str) else offer
    return Meter(MemoryStore(clock=lambda: instant("2027-01-01"), bounds=None), known, assume=enrollment)


def reason_of(offer, request, enrollment=SHARING):
    """Why no allowance covers the request; None if one does."""
    return charge_for(offer, request, enrollment).terms.reason


def group_at(model, at):
    """The group that covers a model of OpenAI's at an instant."""
    return charge_for(OPENAI, ask(model=model, at=at), SHARING).terms.group


# -- the lists


class History(NamedTuple):
    """The text table of lists: when each was in force and was seen, and each model's group in each."""

    names: list[str]
    spans: dict[str, tuple[datetime, datetime, datetime]]
    models: dict[str, dict[str, str | None]]


@cache
def history():
    """The table of the file, parsed."""
    names = []
    spans, models = {}, {}
    text = (Path(__file__).parent / "tables" / "openai_models.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        match line.split():
            case [] | ["#", *_] | ["list", *_]:
                continue
            case ["model", *columns]:
                names = columns
            case [name, start, end, seen] if len(name) == 1:
                spans[name] = (instant(start), instant("2027-01-01" if end == "-" else end), instant(seen))
            case [model, *cells]:
                models[model] = {name: GROUPS[cell] for name, cell in zip(names, cells, strict=True)}
    return History(names, spans, models)


def test_table_of_lists_is_whole():
    """The table tells ten lists that follow each other, and 34 models."""
    names, spans, models = history()
    assert names == list(spans) == list("ABCDEFGHIJ")
    assert len(models) == 34
    starts = [start for start, _, _ in spans.values()]
    ends = [end for _, end, _ in spans.values()]
    assert starts[1:] == ends[:-1]
    assert [start <= seen < end for start, end, seen in spans.values()] == [True] * 10


@pytest.mark.parametrize("name", "ABCDEFGHIJ")
def test_models_of_each_list(name):
    """From the first to the last instant of a list its models are in their groups, and no other list's are in any."""
    start, end, seen = history().spans[name]
    expected = {model: groups[name] for model, groups in history().models.items()}
    for at in (start, seen, end - TICK):
        assert {model: group_at(model, at) for model in expected} == expected


@pytest.mark.parametrize("name", "ABCDEFGHIJ")
def test_lists_hold_nothing_else(name):
    """The groups of each revision hold the models of its list, and not one more."""
    revision = OPENAI.at(history().spans[name][2])
    assert revision is not None
    assert {group.name: group.models for group in revision.groups} == {
        group: frozenset(model for model, groups in history().models.items() if groups[name] == group)
        for group in ("1M", "10M")
    }
    assert dict(revision.aliases) == {}


def test_list_a_under_both_windows():
    """The first list was in force under the rolling window and under the first daily revision alike."""
    first, second = OPENAI.revisions[:2]
    assert [group.models for group in first.groups] == [group.models for group in second.groups]
    assert [str(first.window), str(second.window)] == ["rolling 24h", "day UTC"]


def test_every_o_series_model_of_a_list_is_named():
    """Where the o-series on the Assistants API is excluded, exactly the listed models whose names start with o are."""
    named = {revision.name: revision.o_series for revision in OPENAI.revisions if revision.o_series}
    listed = {
        revision.name: {model for group in revision.groups for model in group.models or () if model.startswith("o")}
        for revision in OPENAI.revisions
        if revision.starts < instant("2026-03-17")
    }
    assert named == listed


# -- traps: model ids that tools have taken for others

TRAPS = """
date        group  model
2026-09-28  10M    gpt-5-mini-2025-08-07
2026-09-28  10M    gpt-5.4-mini-2026-03-17
2026-09-28  10M    gpt-5.1-codex-mini
2026-09-28  10M    gpt-4.1-mini-2025-04-14
2026-09-28  10M    gpt-5.6-luna
2026-09-28  1M     gpt-6-luna
2026-09-28  1M     gpt-5.1-codex
2026-09-28  1M     gpt-6-astra
2026-09-06  -      gpt-6-astra
2026-09-06  -      gpt-6-luna
2026-07-08  -      gpt-5.6-luna
2025-05-01  10M    o3-mini-2025-01-31
2025-05-15  10M    o3-mini-2025-01-31
2025-05-16  -      o3-mini-2025-01-31
2025-06-20  -      o3-mini-2025-01-31
2025-06-20  10M    o4-mini-2025-04-16
2025-04-15  -      o3-2025-04-16
2026-09-21  1M     gpt-4.5-preview-2025-02-27
2026-09-22  -      gpt-4.5-preview-2025-02-27
2026-05-28  10M    gpt-5-mini-2025-08-07
2025-04-20  -      gpt-4o
2025-04-20  -      gpt-4o-mini
2025-04-20  -      gpt-4.1
2025-04-20  -      gpt-4.1-mini
2025-04-20  -      o1
2025-04-20  -      o3
2025-04-20  -      o3-mini
2025-04-20  -      o4-mini
2025-04-20  -      o1-preview
2025-04-20  -      o1-pro
2025-04-20  -      o1-pro-2025-03-19
2026-09-28  -      o3-pro
2026-09-28  -      o3-pro-2025-06-10
2026-09-28  -      o3-deep-research
2025-04-20  -      gpt-4o-mini-tts
2025-04-20  -      gpt-4o-mini-transcribe
2025-04-20  -      gpt-4o-realtime-preview-2024-12-17
2025-04-20  -      gpt-4o-audio-preview-2024-12-17
2025-04-20  -      gpt-4o-search-preview-2025-03-11
2025-04-20  -      gpt-4o-2025-03-26
2025-04-20  -      chatgpt-4o-latest
2025-04-20  -      gpt-4-turbo-2024-04-09
2025-04-20  -      gpt-3.5-turbo-0125
2025-04-20  -      text-embedding-3-small
2025-04-20  -      codex-mini-latest
2026-09-28  -      codex-mini
2026-09-28  -      gpt-5
2026-09-28  -      gpt-5-mini
2026-09-28  -      gpt-5-nano
2026-09-28  -      gpt-5-pro
2026-09-28  -      gpt-5-pro-2025-10-06
2026-09-28  -      gpt-5.1
2026-09-28  -      gpt-5.1-chat-latest
2026-09-28  -      gpt-5.1-codex-max
2026-09-28  -      gpt-5.2
2026-09-28  -      gpt-5.2-chat-latest
2026-09-28  -      gpt-5.2-codex
2026-09-28  -      gpt-5.4
2026-09-28  -      gpt-5.4-mini
2026-09-28  -      gpt-5.4-pro-2026-03-05
2026-09-28  -      gpt-5.5
2026-09-28  -      gpt-5.5-pro
2026-09-28  -      gpt-5.6
2026-09-28  -      gpt-5.6-luna-2026-07-09
2026-09-28  -      gpt-6
2026-09-28  -      gpt-6-terra
2026-09-28  -      gpt-6-luna-mini
2026-09-28  -      gpt-oss-120b
2026-09-28  -      openai/gpt-5-2025-08-07
2026-09-28  -      gpt-5-2025-08-07:free
"""


@pytest.mark.parametrize("row", [line.split() for line in TRAPS.strip().splitlines()[1:]], ids=" ".join)
def test_traps(row):
    """A model is in a group by its very id on that day: by no prefix, family, suffix, alias or later list."""
    date, group, model = row
    request = ask(model=model, at=instant(date))
    charge = charge_for(OPENAI, request, SHARING)
    expected = (None, Reason.MODEL_NOT_LISTED) if group == "-" else (group, None)
    assert (charge.terms.group, charge.terms.reason) == expected


TWISTED = {
    "upper case": "GPT-4O-MINI-2024-07-18",
    "title case": "Gpt-4o-mini-2024-07-18",
    "space after": "gpt-4o-mini-2024-07-18 ",
    "space before": " gpt-4o-mini-2024-07-18",
    "no-break space after": "gpt-4o-mini-2024-07-18\u00a0",
    "tab after": "gpt-4o-mini-2024-07-18\t",
    "newline after": "gpt-4o-mini-2024-07-18\n",
    "NUL after": "gpt-4o-mini-2024-07-18\0",
    "zero-width joiner": "gpt-4o-mini\u200d-2024-07-18",
    "right-to-left mark": "\u200fgpt-4o-mini-2024-07-18",
    "byte order mark": "\ufeffgpt-4o-mini-2024-07-18",
    "Cyrillic o": "gpt-4\u043e-mini-2024-07-18",
    "Cyrillic i": "gpt-4o-m\u0456ni-2024-07-18",
    "no-break hyphen": "gpt\u20114o-mini-2024-07-18",
    "en dash": "gpt-4o-mini-2024\u201307\u201318",
    "full width": "\uff47\uff50\uff54-4o-mini-2024-07-18",
    "Arabic digit": "gpt-\u0664o-mini-2024-07-18",
    "combining mark": "gpt-4o\u0301-mini-2024-07-18",
    "underscores": "gpt_4o_mini_2024_07_18",
    "short date": "gpt-4o-mini-2024-7-18",
    "no date": "gpt-4o-mini",
    "no day": "gpt-4o-mini-2024-07",
    "next day": "gpt-4o-mini-2024-07-19",
    "suffix": "gpt-4o-mini-2024-07-18-preview",
    "prefix": "openai/gpt-4o-mini-2024-07-18",
    "twice": "gpt-4o-mini-2024-07-18gpt-4o-mini-2024-07-18",
    "list": "gpt-4o-mini-2024-07-18,gpt-4o-2024-08-06",
    "wildcard": "gpt-4o-mini-*",
    "pattern": ".*",
    "empty": "",
    "long": "gpt-4o-mini-2024-07-18" + "x" * 1002,
    "deployment": "azure/my-gpt-4o-mini-2024-07-18",
}


@pytest.mark.parametrize("model", TWISTED.values(), ids=TWISTED.keys())
def test_no_name_is_cleaned(model):
    """An id that only looks like a listed one is billed as not listed, and kept as it came."""
    decision = meter().decide(ask(model=model))
    assert (decision.verdict.value, decision.reason, decision.request.model) == (
        "billed",
        Reason.MODEL_NOT_LISTED,
        model,
    )


@pytest.mark.parametrize(
    "model",
    [
        "ft:gpt-4o-mini-2024-07-18:org::id",
        "ft:gpt-4o-mini-2024-07-18",
        "ft:gpt-4.1-2025-04-14:org:suffix:id:ckpt-step-10",
        "ft:",
        "ft:o4-mini-2025-04-16:org::id",
    ],
)
def test_fine_tuned_models(model):
    """A model that starts with ft: is fine-tuned, whatever it was tuned from."""
    assert reason_of(OPENAI, ask(model=model)) is Reason.FINE_TUNED_MODEL


@pytest.mark.parametrize("model", ["FT:gpt-4o-mini-2024-07-18:org::id", " ft:gpt-4o", "gpt-4o:ft-org-2024", "ft"])
def test_what_only_resembles_a_fine_tuned_model(model):
    """What does not start with exactly ft: is an unlisted model like any other."""
    assert reason_of(OPENAI, ask(model=model)) is Reason.MODEL_NOT_LISTED


LISTED = sorted(history().models)
edits = st.tuples(st.sampled_from(LISTED), st.integers(0, 30), st.sampled_from(["cut", "put", "swap", "case"]))


@settings(max_examples=1000)
@given(edit=edits, char=st.characters(exclude_categories=("Cs",)))
def test_edited_ids_are_not_listed(edit, char):
    """One character taken out, put in, replaced or changed in case makes another id, free only if listed itself."""
    model, place, how = edit
    head, tail = model[:place], model[place:]
    twisted = {
        "cut": head + tail[1:],
        "put": head + char + tail,
        "swap": head + char + tail[1:],
        "case": head + tail[:1].upper() + tail[1:],
    }[how]
    listed = history().models.get(twisted, {"J": None})["J"]
    assert group_at(twisted, instant("2026-09-28")) == listed


@settings(max_examples=500)
@given(model=st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_any_text_is_a_model_and_billed(model):
    """Any text may stand as a model; unlisted, it is never free."""
    reason = reason_of(OPENAI, ask(model=model))
    assert reason is (Reason.FINE_TUNED_MODEL if model.startswith("ft:") else Reason.MODEL_NOT_LISTED)


# -- reasons

NOT_STARTED = instant("2025-04-21")
REACHED = {
    Reason.WITHIN_ALLOWANCE: (ask(), SHARING),
    Reason.OVER_ALLOWANCE: (ask(input_tokens=1_000_000), SHARING),
    Reason.MODEL_NOT_LISTED: (ask(model="gpt-4o"), SHARING),
    Reason.FINE_TUNED_MODEL: (ask(model="ft:gpt-4o-mini-2024-07-18:org::id"), SHARING),
    Reason.FINE_TUNING_TRAINING: (ask(kind="fine_tuning_training"), SHARING),
    Reason.TOOL_USE: (ask(tools=["web_search"]), SHARING),
    Reason.ASSISTANTS_O_SERIES: (ask(kind="assistants", model="o1-2024-12-17"), SHARING),
    Reason.EVALS: (ask(kind="eval", at=instant("2026-04-01")), SHARING),
    Reason.NOT_ENROLLED: (ask(), None),
    Reason.ACCOUNT_NOT_ELIGIBLE: (ask(), Enrollment(tier=0, sharing=Sharing.ENABLED)),
    Reason.SHARING_DISABLED: (ask(), Enrollment(tier=5)),
    Reason.PROJECT_NOT_SHARED: (ask(project="q"), Enrollment(tier=5, sharing=Sharing.SELECTED, projects=["p"])),
    Reason.OFFER_NOT_IN_FORCE: (ask(at=instant("2024-11-30T23:59:59.999999")), SHARING),
    Reason.TOO_LATE: (ask(at=instant("2025-04-12T23:59:59.999999")), SHARING),
    Reason.UNMEASURED: (ask(output_tokens=None), SHARING),
}


def test_every_reason_is_told_of():
    """There is a request for each reason, and every exclusion but the first and the last is one row of the table."""
    assert set(REACHED) == set(Reason)
    judged = {Reason.WITHIN_ALLOWANCE, Reason.OVER_ALLOWANCE, Reason.OFFER_NOT_IN_FORCE, Reason.TOO_LATE}
    assert set(EXCLUDES) == set(Reason) - judged


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_is_reached(reason):
    """Each reason is the reason of a decision; all but within_allowance are billed, and only two were judged."""
    request, enrollment = REACHED[reason]
    now = request.at if reason in {Reason.EVALS, Reason.OFFER_NOT_IN_FORCE} else instant("2025-04-20")
    told = Meter(MemoryStore(clock=lambda: now, bounds=Bounds()), OPENAI, assume=enrollment)
    decision = told.decide(request)
    assert (decision.reason, decision.is_free, decision.is_judged) == (
        reason,
        reason is Reason.WITHIN_ALLOWANCE,
        reason in {Reason.WITHIN_ALLOWANCE, Reason.OVER_ALLOWANCE},
    )


@pytest.mark.parametrize(
    "reason", [reason for reason in Reason if reason not in {"within_allowance", "over_allowance"}]
)
def test_excluded_requests_have_no_window(reason):
    """An excluded request is billed whole and has no group, allowance, totals, window or place."""
    request, enrollment = REACHED[reason]
    if reason is Reason.TOO_LATE:
        told = Meter(MemoryStore(clock=lambda: instant("2025-04-20"), bounds=Bounds()), OPENAI, assume=enrollment)
    else:
        told = meter(OPENAI, enrollment)
    decision = told.decide(request)
    nothing = (decision.group, decision.allowance, decision.total, decision.used, decision.remaining)
    assert (*nothing, decision.window_start, decision.window_end, decision.seq) == (None,) * 8
    assert (decision.free_tokens, decision.billed_tokens) == (0, request.tokens)


def test_unmeasured_is_not_zero():
    """Absent usage is unmeasured and billed for an unknown amount; an explicit zero is zero and free."""
    told = meter()
    seen = [
        told.decide(ask(id="both", input_tokens=None, output_tokens=None)),
        told.decide(ask(id="input", input_tokens=None)),
        told.decide(ask(id="output", output_tokens=None)),
        told.decide(ask(id="zero", input_tokens=0, output_tokens=0)),
    ]
    assert [(one.reason.value, one.tokens, one.billed_tokens) for one in seen] == [
        ("unmeasured", None, None),
        ("unmeasured", None, None),
        ("unmeasured", None, None),
        ("within_allowance", 0, 0),
    ]


def test_an_embedding_has_no_output():
    """An embedding is measured by its input alone; with an output count, the count is added."""
    group = 'kinds = ["embedding"]\nunit = "tokens"\nallowance = 10\nany_model = true\n'
    offer = parse(SKELETON + "[revisions.groups.embeddings]\n" + group, file="embeddings.toml")
    told = meter(offer)
    seen = [
        told.decide(ask(id="a", kind="embedding", input_tokens=4, output_tokens=None)),
        told.decide(ask(id="b", kind="embedding", input_tokens=4, output_tokens=2)),
        told.decide(ask(id="c", kind="embedding", input_tokens=None, output_tokens=None)),
        told.decide(ask(id="d", kind="completion", input_tokens=0)),
    ]
    assert [(one.reason.value, one.tokens, one.used) for one in seen] == [
        ("within_allowance", 4, 4),
        ("within_allowance", 6, 10),
        ("unmeasured", None, None),
        ("model_not_listed", 1, None),
    ]


def test_unmeasured_matters_where_tokens_count():
    """Beside a group of tokens a group of requests takes a request whose tokens nobody measured."""
    groups = """
[revisions.groups.calls]
unit = "requests"
allowance = 1
models = ["call"]

[revisions.groups.tokens]
unit = "tokens"
allowance = 1
models = ["count"]
"""
    offer = parse(SKELETON + groups, file="mixed.toml")
    seen = [reason_of(offer, ask(model=model, output_tokens=None)) for model in ("call", "count", "other")]
    assert seen == [None, Reason.UNMEASURED, Reason.MODEL_NOT_LISTED]


SKELETON = """
name = "sample"
title = "A sample"
account = "organization"

[[revisions]]
from = 2025-01-01
source = "this test"
window = { kind = "calendar", span = "day", zone = "UTC" }
counts = "free"
overage = "whole"
reasons = ["not_enrolled", "model_not_listed", "unmeasured"]

"""

# What a request and an enrollment look like for which this reason holds.
FAULTS = {
    Reason.NOT_ENROLLED: ({}, {"starts": instant("2026-12-31")}),
    Reason.ACCOUNT_NOT_ELIGIBLE: ({}, {"tier": 0}),
    Reason.SHARING_DISABLED: ({}, {"sharing": Sharing.DISABLED}),
    Reason.PROJECT_NOT_SHARED: ({}, {"sharing": Sharing.SELECTED, "projects": ["other"]}),
    Reason.FINE_TUNING_TRAINING: ({"kind": "fine_tuning_training"}, {}),
    Reason.EVALS: ({"kind": "eval"}, {}),
    Reason.FINE_TUNED_MODEL: ({"model": "ft:gpt-4o-2024-08-06:org::id"}, {}),
    Reason.MODEL_NOT_LISTED: ({"model": "gpt-4o"}, {}),
    Reason.ASSISTANTS_O_SERIES: ({"kind": "assistants", "model": "o1-2024-12-17"}, {}),
    Reason.TOOL_USE: ({"tools": ("web_search",)}, {}),
    Reason.UNMEASURED: ({"output_tokens": None}, {}),
}


@pytest.mark.parametrize("revision", OPENAI.revisions, ids=[revision.name for revision in OPENAI.revisions])
def test_order_of_reasons_pair_by_pair(revision):
    """Of two reasons that hold at once, the one that the revision names first is given."""
    pairs = []
    for early, late in combinations(revision.reasons, 2):
        asked, enrolled = ({**FAULTS[late][side], **FAULTS[early][side]} for side in (0, 1))
        if enrolled.get("sharing") is Sharing.DISABLED:
            enrolled.pop("projects", None)
        request = ask(**{"at": revision.starts, "project": "p", **asked})
        enrollment = Enrollment(**{"tier": 5, "sharing": Sharing.ENABLED, **enrolled})
        if EXCLUDES[late](revision, request, enrollment):
            pairs.append((early, late, exclusion(revision, request, enrollment)))
    assert [found for _, _, found in pairs] == [early for early, _, _ in pairs]
    assert len(pairs) == (42 if "assistants_o_series" in revision.reasons else 44)


class Facts(NamedTuple):
    """All that bears on the reason of one request."""

    enrolled: str
    account: str
    sharing: str
    kind: Kind
    model: str
    tools: tuple[str, ...]
    measured: bool


# Fine-tuned or not, listed or not, of the o-series or not.
MODELS = {
    "large": set(),
    "o-large": {"o"},
    "ft:large": {"ft"},
    "ft:o-large": {"ft", "o"},
    "unlisted": {"unlisted"},
    "ft:unlisted": {"ft", "unlisted"},
}
WHOLE = """
name = "whole"
title = "Every reason there is"
account = "organization"

[[revisions]]
from = 2025-01-01
source = "this test"
window = { kind = "calendar", span = "day", zone = "UTC" }
counts = "free"
overage = "whole"
reasons = [
  "not_enrolled", "account_not_eligible", "sharing_disabled", "project_not_shared", "fine_tuning_training", "evals",
  "fine_tuned_model", "model_not_listed", "assistants_o_series", "tool_use", "unmeasured",
]
client_side_tools = ["function", "custom"]
excluded_plans = ["enterprise", "edu"]
zero_data_retention = "excluded"
fine_tuned_prefix = "ft:"
o_series = ["o-large"]

[revisions.aliases]
"ft:large" = "large"
"ft:o-large" = "o-large"

[revisions.groups.1M]
unit = "tokens"
allowance = { "1-5" = 1_000_000 }
models = ["large", "o-large"]
"""
EVERY_REASON = parse(WHOLE, file="whole.toml").revisions[0]
facts = st.builds(
    Facts,
    st.sampled_from(["yes", "no", "later", "over"]),
    st.sampled_from(["fine", "fine", "tier 0", "enterprise", "edu", "zdr"]),
    st.sampled_from(["enabled", "enabled", "disabled", "other project", "no project", "this project"]),
    st.sampled_from(Kind),
    st.sampled_from(sorted(MODELS)),
    st.sampled_from([(), ("function",), ("custom", "function"), ("web_search",), ("function", "mcp")]),
    st.booleans(),
)


def case_of_facts(told):
    """The request and enrollment of which these facts are true, and the reasons that hold of them."""
    at = instant("2025-04-20")
    request = ask(
        at=at,
        kind=told.kind,
        model=told.model,
        tools=told.tools,
        project=None if told.sharing == "no project" else "p",
        input_tokens=2 if told.measured else None,
    )
    true = {
        Reason.FINE_TUNING_TRAINING: told.kind is Kind.FINE_TUNING_TRAINING,
        Reason.EVALS: told.kind is Kind.EVAL,
        Reason.FINE_TUNED_MODEL: "ft" in MODELS[told.model],
        Reason.MODEL_NOT_LISTED: "unlisted" in MODELS[told.model],
        Reason.ASSISTANTS_O_SERIES: told.kind is Kind.ASSISTANTS and "o" in MODELS[told.model],
        Reason.TOOL_USE: not set(told.tools) <= {"function", "custom"},
        Reason.UNMEASURED: not told.measured,
        Reason.NOT_ENROLLED: told.enrolled != "yes",
    }
    enrollment = None
    if told.enrolled != "no":
        project = {"other project": "q", "no project": "q", "this project": "p"}.get(told.sharing)
        enrollment = Enrollment(
            tier=0 if told.account == "tier 0" else 3,
            plan=told.account if told.account in {"enterprise", "edu"} else "standard",
            zero_data_retention=told.account == "zdr",
            sharing=Sharing.SELECTED if project else told.sharing,
            projects=[project] if project else [],
            starts=at + TICK if told.enrolled == "later" else None,
            ends=at if told.enrolled == "over" else None,
        )
        true[Reason.ACCOUNT_NOT_ELIGIBLE] = told.account != "fine"
        true[Reason.SHARING_DISABLED] = told.sharing == "disabled"
        true[Reason.PROJECT_NOT_SHARED] = told.sharing not in {"enabled", "this project"}
    return request, enrollment, {reason for reason, holds in true.items() if holds}


@settings(max_examples=1500)
@given(told=facts, order=st.permutations(sorted(EXCLUDES)))
def test_first_reason_in_the_revisions_order_wins(told, order):
    """In whatever order a revision names the reasons, the first of those that hold is given."""
    request, enrollment, true = case_of_facts(told)
    revision = replace(EVERY_REASON, reasons=tuple(order))
    assert exclusion(revision, request, enrollment) is next((reason for reason in order if reason in true), None)


@settings(max_examples=500)
@given(told=facts, left_out=st.sampled_from(sorted(EXCLUDES)))
def test_a_reason_left_out_does_not_apply(told, left_out):
    """A reason that a revision does not name excludes nothing."""
    request, enrollment, true = case_of_facts(told)
    order = [reason for reason in EVERY_REASON.reasons if reason is not left_out]
    revision = replace(EVERY_REASON, reasons=tuple(order))
    assert exclusion(revision, request, enrollment) is next((reason for reason in order if reason in true), None)


EDGES = [instant(day) for day in ("2024-12-01", "2025-03-06", "2025-04-16", "2025-04-20", "2025-05-16", "2026-03-17")]
times = st.builds(
    lambda edge, off: edge + off, st.sampled_from(EDGES), st.sampled_from([-24 * HOUR, -TICK, 0 * HOUR, HOUR])
)


@settings(max_examples=300)
@given(asked=st.lists(st.tuples(facts, times), min_size=1, max_size=8))
def test_remembered_cases_are_worked_out_afresh(asked):
    """What a meter remembers of requests alike gives the same charge as working it out for each request."""
    for enrolled in ("yes", "later", "over", "no"):
        enrollment = case_of_facts(asked[0][0]._replace(enrolled=enrolled))[1]
        book = Book(OPENAI, enrollment)
        for told, at in asked:
            like = case_of_facts(told)[0]
            for model in (LARGE, "o1-2024-12-17"):
                request = ask(at=at, model=model, kind=like.kind, tools=like.tools, project=like.project)
                assert book.charge(request) == charge_for(OPENAI, request, enrollment)


DATED = Enrollment(
    tier=5, sharing=Sharing.ENABLED, starts=instant("2025-04-20T06:00:00"), ends=instant("2025-04-20T18:00:00")
)
SPANS = """
enrolled  at                          model              span start           span end
always    2025-04-20T00:00:00         gpt-4o-2024-08-06  2025-04-20T00:00:00  2025-04-21T00:00:00
always    2025-04-20T23:59:59.999999  gpt-4o-2024-08-06  2025-04-20T00:00:00  2025-04-21T00:00:00
always    2025-04-20T12:00:00         gpt-4o             2025-04-16T00:00:00  2025-05-16T00:00:00
always    2025-01-01T12:00:00         gpt-4o-2024-08-06  2024-12-01T00:00:00  2025-03-06T00:00:00
always    2027-01-01T12:00:00         gpt-4o             2026-09-22T00:00:00  9000-01-01T00:00:00
always    2024-11-30T12:00:00         gpt-4o             2024-11-30T12:00:00  2024-11-30T12:00:00
dated     2025-04-20T05:59:59.999999  gpt-4o-2024-08-06  2025-04-16T00:00:00  2025-04-20T06:00:00
dated     2025-04-20T06:00:00         gpt-4o-2024-08-06  2025-04-20T06:00:00  2025-04-20T18:00:00
dated     2025-04-20T17:59:59.999999  gpt-4o-2024-08-06  2025-04-20T06:00:00  2025-04-20T18:00:00
dated     2025-04-20T18:00:00         gpt-4o-2024-08-06  2025-04-20T18:00:00  2025-05-16T00:00:00
"""


@pytest.mark.parametrize("row", [line.split() for line in SPANS.strip().splitlines()[1:]], ids=" ".join)
def test_how_long_requests_are_alike(row):
    """What is worked out for one request holds for its revision, its window and its enrollment's dates: no longer."""
    enrolled, at, model, start, end = row
    case = case_of(OPENAI, ask(at=instant(at), model=model), DATED if enrolled == "dated" else SHARING)
    assert case.span == Window(instant(start), instant(end))


@settings(max_examples=300)
@given(told=facts, at=times)
def test_requests_within_a_span_are_alike(told, at):
    """At the first and at the last instant of its span a request is judged on the same terms, in the same window."""
    like, enrollment, _ = case_of_facts(told)
    fields = {"kind": like.kind, "tools": like.tools, "project": like.project}
    case = case_of(OPENAI, ask(at=at, **fields), enrollment)
    for edge in (case.span.start, case.span.end - TICK) if case.terms.revision else ():
        other = case_of(OPENAI, ask(at=edge, **fields), enrollment)
        assert (other.terms, other.window, other.span) == (case.terms, case.window, case.span)


@pytest.mark.parametrize(
    ("at", "model", "amount", "rolls", "window"),
    [
        ("2025-01-01T07:00:00", LARGE, 3, True, ("2025-01-01T07:00:00", "2025-01-02T07:00:00")),
        ("2025-03-05T18:00:00", LARGE, 3, True, ("2025-03-05T18:00:00", "2025-03-06T00:00:00")),
        ("2025-04-20T07:00:00", LARGE, 3, False, ("2025-04-20T00:00:00", "2025-04-21T00:00:00")),
        ("2025-01-01T07:00:00", "gpt-4o", 0, False, None),
        ("2025-04-20T07:00:00", "gpt-4o", 0, False, None),
        ("2024-11-30T07:00:00", LARGE, 0, False, None),
    ],
)
def test_charges(at, model, amount, rolls, window):
    """A charge tells how much of which window a request would take; excluded, it takes nothing of any."""
    charge = charge_for(OPENAI, ask(at=instant(at), model=model), SHARING)
    expected = None if window is None else Window(*(instant(edge) for edge in window))
    assert (charge.amount, charge.rolls, charge.window) == (amount, rolls, expected)


def test_decision_where_no_revision_is_in_force():
    """Before the offer began a decision names the offer, and no revision."""
    decision = meter().decide(ask(at=instant("2024-11-30")))
    assert (decision.offer, decision.revision, decision.reason) == (
        "openai-data-sharing",
        None,
        Reason.OFFER_NOT_IN_FORCE,
    )


def test_the_offer_comes_before_all_and_lateness_after_all():
    """Where no revision is in force nothing else is asked; a late request is excluded for every other reason first."""
    assert reason_of(OPENAI, ask(at=instant("2024-11-30"), model="x"), None) is Reason.OFFER_NOT_IN_FORCE
    late = Meter(MemoryStore(clock=lambda: instant("2025-06-01"), bounds=Bounds()), OPENAI, assume=SHARING)
    seen = [
        late.decide(ask(id="unlisted", model="gpt-4o")).reason,
        late.decide(ask(id="tool", tools=("mcp",))).reason,
        late.decide(ask(id="unmeasured", input_tokens=None)).reason,
        late.decide(ask(id="listed")).reason,
    ]
    assert seen == [Reason.MODEL_NOT_LISTED, Reason.TOOL_USE, Reason.UNMEASURED, Reason.TOO_LATE]


def test_no_revision_between_two():
    """In a gap between two revisions, and after the end of the last one, the offer is not in force."""
    group = '[revisions.groups.g]\nunit = "tokens"\nallowance = 1\nany_model = true\n'
    head, body = SKELETON.split("[[revisions]]")
    first = body.replace("from = 2025-01-01", "from = 2025-01-01\nuntil = 2025-02-01")
    second = body.replace("from = 2025-01-01", "from = 2025-03-01\nuntil = 2025-04-01")
    offer = parse(f"{head}[[revisions]]{first}{group}[[revisions]]{second}{group}", file="gap.toml")
    edges = ["2025-01-01", "2025-02-01", "2025-03-01", "2025-04-01"]
    seen = [(reason_of(offer, ask(at=instant(edge) - TICK)), reason_of(offer, ask(at=instant(edge)))) for edge in edges]
    closed = Reason.OFFER_NOT_IN_FORCE
    assert seen == [(closed, None), (None, closed), (closed, None), (None, closed)]


# -- exclusions by date

ASSISTANTS = """
at                          model                    reason
2025-01-01T00:00:00         o1-2024-12-17            assistants_o_series
2025-04-20T00:00:00         o1-mini-2024-09-12       assistants_o_series
2025-04-20T00:00:00         o3-2025-04-16            assistants_o_series
2025-04-20T00:00:00         o4-mini-2025-04-16       assistants_o_series
2025-04-20T00:00:00         gpt-4o-2024-08-06        -
2025-06-20T00:00:00         codex-mini-latest        -
2025-06-20T00:00:00         o3-mini-2025-01-31       model_not_listed
2026-03-16T23:59:59.999999  o3-2025-04-16            assistants_o_series
2026-03-16T23:59:59.999999  gpt-5-2025-08-07         -
2026-03-17T00:00:00         o3-2025-04-16            -
2026-09-28T00:00:00         o1-2024-12-17            -
"""
EVALS = """
at                          model                    reason
2024-12-01T00:00:00         gpt-4o-2024-08-06        -
2025-04-20T00:00:00         o3-2025-04-16            -
2026-03-16T23:59:59.999999  gpt-4o-2024-08-06        -
2026-03-17T00:00:00         gpt-4o-2024-08-06        evals
2026-09-28T00:00:00         gpt-6-luna               evals
"""


@pytest.mark.parametrize("row", [line.split() for line in ASSISTANTS.strip().splitlines()[1:]], ids=" ".join)
def test_o_series_on_the_assistants_api(row):
    """Until 2026-03-17 the o-series was excluded on the Assistants API, and there only."""
    at, model, reason = row
    seen = [reason_of(OPENAI, ask(at=instant(at), model=model, kind=kind)) for kind in ("assistants", "completion")]
    elsewhere = Reason.MODEL_NOT_LISTED if reason == "model_not_listed" else None
    assert seen == [None if reason == "-" else Reason(reason), elsewhere]


@pytest.mark.parametrize("row", [line.split() for line in EVALS.strip().splitlines()[1:]], ids=" ".join)
def test_evals_by_date(row):
    """Evals are excluded since 2026-03-17."""
    at, model, reason = row
    seen = reason_of(OPENAI, ask(at=instant(at), model=model, kind="eval"))
    assert seen is (None if reason == "-" else Reason(reason))


@pytest.mark.parametrize("kind", ["completion", "embedding", "image", "audio", "moderation", "realtime"])
def test_other_kinds_are_judged_by_their_model(kind):
    """A kind of request that no revision excludes is free on a listed model."""
    assert reason_of(OPENAI, ask(kind=kind)) is None


# -- tools


@pytest.mark.parametrize("tools", [(), ("function",), ("custom",), ("function", "custom"), ["function"] * 100])
def test_client_side_tools_are_free(tools):
    """Functions that the caller runs are no tool use."""
    assert reason_of(OPENAI, ask(tools=tools)) is None


@pytest.mark.parametrize(
    "tool",
    [
        "web_search",
        "web_search_preview",
        "file_search",
        "code_interpreter",
        "computer_use_preview",
        "image_generation",
        "mcp",
        "something new",
        "Function",
        "function ",
        "functions",
    ],
)
def test_hosted_tools_are_tool_use(tool):
    """Every tool that is not a client-side one is hosted, alone or among functions, whether known or not."""
    assert [reason_of(OPENAI, ask(tools=tools)) for tools in ((tool,), ("custom", "function", tool))] == [
        Reason.TOOL_USE
    ] * 2


# -- aliases


def aliased():
    """An offer with an alias table."""
    body = """
[revisions.aliases]
"gpt-4o" = "gpt-4o-2024-08-06"
"my-deployment" = "gpt-4o-2024-08-06"
"o1" = "o1-2024-12-17"

[revisions.groups.1M]
unit = "tokens"
allowance = 10
models = ["gpt-4o-2024-08-06", "o1-2024-12-17"]

[revisions.groups.10M]
unit = "tokens"
allowance = 100
models = ["gpt-4o-mini-2024-07-18"]
"""
    text = SKELETON.replace('"unmeasured"]', '"assistants_o_series", "unmeasured"]\no_series = ["o1-2024-12-17"]')
    return parse(text + body, file="aliased.toml")


def test_aliases_are_their_models():
    """A name of the alias table takes from the same allowance as the id that it stands for."""
    told = meter(aliased())
    seen = [
        told.decide(ask(id=model, model=model, input_tokens=3, output_tokens=0))
        for model in ("gpt-4o", "gpt-4o-2024-08-06", "my-deployment", "o1")
    ]
    assert [(one.group, one.used, one.seq, one.is_free) for one in seen] == [
        ("1M", 3, 1, True),
        ("1M", 6, 2, True),
        ("1M", 9, 3, True),
        ("1M", 9, 4, False),
    ]


@pytest.mark.parametrize("model", ["GPT-4o", "gpt-4o ", "gpt-4o-mini", "gpt-4o-2024-05-13", "my-deployment-2", "gpt-4"])
def test_aliases_are_exact(model):
    """An alias is compared as exactly as an id."""
    assert reason_of(aliased(), ask(model=model)) is Reason.MODEL_NOT_LISTED


def test_an_alias_of_the_o_series_is_of_the_o_series():
    """What excludes a model excludes its aliases."""
    seen = [reason_of(aliased(), ask(model=model, kind="assistants")) for model in ("o1", "o1-2024-12-17", "gpt-4o")]
    assert seen == [Reason.ASSISTANTS_O_SERIES, Reason.ASSISTANTS_O_SERIES, None]


# -- the other offers


def decide_alike(told, number, *, at, **fields):
    """Decide so many requests that differ in nothing but their ids."""
    return [told.decide(ask(id=f"{at.isoformat()} {place}", at=at, **fields)) for place in range(number)]


def test_gemini_counts_requests():
    """Gemini's allowance is of requests: each is one, however large or unmeasured, per model."""
    told = meter("gemini-free")
    at = instant("2025-08-01T12:00:00")
    seen = decide_alike(told, 249, at=at, model="gemini-2.5-flash", input_tokens=10**9)
    seen += decide_alike(told, 3, at=at + TICK, model="gemini-2.5-flash", input_tokens=None)
    other = told.decide(ask(id="other", at=at, model="gemini-2.5-flash-lite"))
    assert [one.is_free for one in seen] == [True] * 250 + [False] * 2
    assert (seen[-1].used, seen[-1].total, seen[-1].allowance, seen[-1].reason) == (250, 251, 250, "over_allowance")
    assert (other.group, other.used, other.allowance) == ("gemini-2.5-flash-lite", 1, 1000)


@pytest.mark.parametrize(
    ("at", "start", "hours"),
    [
        ("2025-11-02T06:59:59.999999", "2025-11-01T07:00:00", 24),
        ("2025-11-02T07:00:00", "2025-11-02T07:00:00", 25),
        ("2025-11-03T07:59:59.999999", "2025-11-02T07:00:00", 25),
        ("2026-03-08T08:00:00", "2026-03-08T08:00:00", 23),
        ("2026-03-09T06:59:59.999999", "2026-03-08T08:00:00", 23),
        ("2026-03-09T07:00:00", "2026-03-09T07:00:00", 24),
    ],
)
def test_gemini_day_is_pacific(at, start, hours):
    """Gemini's day ends at midnight Pacific time: 23 or 25 hours when the clocks change."""
    one = meter("gemini-free").decide(ask(at=instant(at), model="gemini-2.5-flash"))
    assert (one.window_start, one.window_end) == (instant(start), instant(start) + hours * HOUR)


def test_gemini_cut_within_a_pacific_day():
    """A revision that starts within a window goes on with it: what was used stays used, under the lower allowance."""
    told = meter("gemini-free")
    before = decide_alike(told, 30, at=instant("2025-11-30T23:59:59.999999"), model="gemini-2.5-flash")[-1]
    after = told.decide(ask(id="after", at=instant("2025-12-01T00:00:00"), model="gemini-2.5-flash"))
    fresh = told.decide(ask(id="fresh", at=instant("2025-12-01T08:00:00"), model="gemini-2.5-flash"))
    assert [(one.is_free, one.allowance, one.used, one.seq, one.window_start) for one in (before, after, fresh)] == [
        (True, 250, 30, 30, instant("2025-11-30T08:00:00")),
        (False, 20, 30, 31, instant("2025-11-30T08:00:00")),
        (True, 20, 1, 1, instant("2025-12-01T08:00:00")),
    ]


def test_groq_does_not_count_cached_input():
    """On Groq cached input takes nothing of the allowance, yet is a part of the tokens."""
    told = meter("groq-free")
    common = {"at": instant("2026-08-01"), "model": "llama-3.3-70b-versatile"}
    seen = [
        told.decide(ask(id="a", input_tokens=140_000, cached_tokens=60_000, output_tokens=10_000, **common)),
        told.decide(ask(id="b", input_tokens=10_001, cached_tokens=0, output_tokens=0, **common)),
        told.decide(ask(id="c", input_tokens=500_000, cached_tokens=500_000, output_tokens=10_000, **common)),
        told.decide(ask(id="d", input_tokens=500_000, cached_tokens=500_000, output_tokens=0, **common)),
    ]
    assert [(one.is_free, one.tokens, one.free_tokens, one.billed_tokens, one.used) for one in seen] == [
        (True, 150_000, 150_000, 0, 90_000),
        (False, 10_001, 0, 10_001, 90_000),
        (True, 510_000, 510_000, 0, 100_000),
        (True, 500_000, 500_000, 0, 100_000),
    ]


def test_excess_of_what_counts():
    """Where cached input takes nothing and only the excess is billed, cached input is never part of the excess."""
    group = 'unit = "tokens"\nallowance = 10\nany_model = true\ncached_input = "not_counted"\n'
    text = SKELETON.replace('overage = "whole"', 'overage = "excess"') + "[revisions.groups.g]\n" + group
    told = meter(parse(text, file="excess.toml"))
    sizes = [(50, 45), (20, 10), (20, 10), (20, 20)]
    seen = [
        told.decide(ask(id=f"{place}", input_tokens=size, cached_tokens=cached, output_tokens=0))
        for place, (size, cached) in enumerate(sizes)
    ]
    assert [(one.verdict.value, one.free_tokens, one.billed_tokens, one.used) for one in seen] == [
        ("free", 50, 0, 5),
        ("billed", 15, 5, 10),
        ("billed", 10, 10, 10),
        ("free", 20, 0, 10),
    ]


def test_openai_counts_cached_input():
    """At OpenAI cached tokens are a part of the input like any other."""
    one = meter().decide(ask(input_tokens=1000, cached_tokens=900, output_tokens=5))
    assert (one.tokens, one.used) == (1005, 1005)


def test_cloudflare_bills_the_excess():
    """On Workers AI only what is beyond the 10,000 Neurons is billed, whatever the model, sharing or tools."""
    told = meter("cloudflare-workers-ai", Enrollment(tier=0))
    sizes = [6_000, 6_000, 1, 0]
    seen = [
        told.decide(
            ask(
                id=f"{place}",
                at=instant("2025-03-01"),
                model=f"@cf/any/{place}",
                input_tokens=size,
                output_tokens=0,
                tools=("mcp",),
            )
        )
        for place, size in enumerate(sizes)
    ]
    assert [(one.verdict.value, one.free_tokens, one.billed_tokens, one.used, one.total) for one in seen] == [
        ("free", 6_000, 0, 6_000, 6_000),
        ("billed", 4_000, 2_000, 10_000, 12_000),
        ("billed", 0, 1, 10_000, 10_001),
        ("free", 0, 0, 10_000, 10_000),
    ]


@pytest.mark.parametrize(("tier", "allowance"), [(1, 50), (2, 1000)])
def test_openrouter_counts_all_free_models_together(tier, allowance):
    """On OpenRouter one allowance of requests holds for all :free models together, by lifetime purchase."""
    told = meter("openrouter-free", Enrollment(tier=tier))
    at = instant("2026-06-01")
    half = allowance // 2
    seen = decide_alike(told, half, at=at, model="openai/gpt-oss-20b:free")
    seen += decide_alike(told, allowance - half + 1, at=at + TICK, model="qwen/qwen3-coder:free", input_tokens=None)
    assert [one.is_free for one in seen] == [True] * allowance + [False]
    assert [one.seq for one in seen] == list(range(1, allowance + 2))
    assert {one.group for one in seen} == {"free-models"}


def test_openrouter_covers_only_free_ids_and_two_tiers():
    """Without :free a model is not listed, and there is no third tier."""
    offer = load("openrouter-free")
    at = instant("2026-06-01")
    seen = [
        reason_of(offer, ask(at=at, model="openai/gpt-oss-20b"), Enrollment(tier=1)),
        reason_of(offer, ask(at=at, model="someone/new:free"), Enrollment(tier=1)),
        reason_of(offer, ask(at=at, model="openai/gpt-oss-20b:free"), Enrollment(tier=3)),
        reason_of(offer, ask(at=at, model="openai/gpt-oss-20b:free"), Enrollment(tier=0)),
    ]
    assert seen == [
        Reason.MODEL_NOT_LISTED,
        Reason.MODEL_NOT_LISTED,
        Reason.ACCOUNT_NOT_ELIGIBLE,
        Reason.ACCOUNT_NOT_ELIGIBLE,
    ]


def test_evals_have_seven_free_runs_a_week():
    """Seven runs of any model and size are free in a week from Monday; the eighth is billed whole."""
    told = meter("openai-evals")
    monday = instant("2025-05-05")
    seen = [
        told.decide(ask(id=f"{day}", at=monday + day * 20 * HOUR, kind="eval", model=f"any-{day}", input_tokens=10**9))
        for day in range(8)
    ]
    last = told.decide(ask(id="sunday", at=monday + 168 * HOUR - TICK, kind="eval", input_tokens=None))
    fresh = told.decide(ask(id="monday", at=monday + 168 * HOUR, kind="eval", input_tokens=None))
    assert [(one.is_free, one.billed_tokens) for one in seen] == [(True, 0)] * 7 + [(False, 10**9 + 1)]
    assert (last.is_free, last.seq, last.used, last.billed_tokens) == (False, 9, 7, None)
    assert (fresh.is_free, fresh.seq, fresh.window_start) == (True, 1, monday + 168 * HOUR)


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.EVAL])
def test_evals_cover_evals_only(kind):
    """No other kind of request is covered by the free runs."""
    assert reason_of(load("openai-evals"), ask(kind=kind, at=instant("2025-05-05"))) is Reason.MODEL_NOT_LISTED


def test_evals_are_for_sharing_accounts():
    """The free runs are for accounts that share, not for enterprise, zero data retention or tier 0."""
    request = ask(kind="eval", at=instant("2025-05-05"))
    seen = [
        reason_of(load("openai-evals"), request, enrollment)
        for enrollment in (
            None,
            Enrollment(tier=1),
            Enrollment(tier=0, sharing=Sharing.ENABLED),
            Enrollment(tier=1, sharing=Sharing.ENABLED, plan="enterprise"),
            Enrollment(tier=1, sharing=Sharing.ENABLED, zero_data_retention=True),
            Enrollment(tier=1, sharing=Sharing.ENABLED),
        )
    ]
    assert seen == [
        Reason.NOT_ENROLLED,
        Reason.SHARING_DISABLED,
        Reason.ACCOUNT_NOT_ELIGIBLE,
        Reason.ACCOUNT_NOT_ELIGIBLE,
        Reason.ACCOUNT_NOT_ELIGIBLE,
        None,
    ]


def test_whole_of_what_is_billed():
    """Where the whole request is billed, input that does not count is billed with it; a request is never split."""
    group = 'unit = "tokens"\nallowance = 10\nany_model = true\ncached_input = "not_counted"\n'
    told = meter(parse(SKELETON + "[revisions.groups.g]\n" + group, file="whole.toml"))
    one = told.decide(ask(id="1", input_tokens=20, cached_tokens=9, output_tokens=0))
    assert (one.verdict.value, one.free_tokens, one.billed_tokens, one.used, one.total) == ("billed", 0, 20, 0, 11)


def test_requests_are_not_split():
    """Where requests are counted, one beyond the allowance is billed whole, even if only the excess is billed."""
    text = SKELETON.replace('overage = "whole"', 'overage = "excess"')
    group = 'unit = "requests"\nallowance = 1\nany_model = true\n'
    told = meter(parse(text + "[revisions.groups.g]\n" + group, file="requests.toml"))
    seen = [told.decide(ask(id=f"{place}", input_tokens=20, output_tokens=5)) for place in range(2)]
    assert [(one.free_tokens, one.billed_tokens, one.used, one.total) for one in seen] == [(25, 0, 1, 1), (0, 25, 1, 2)]
