"""What may come in: numbers, names, models, times and lines. What is hostile is refused before anything is written."""

import enum
import json
import math
import unicodedata
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from itertools import permutations
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import given, settings, strategies as st

from gratis import Conflict, Enrollment, Meter, Request, RequestError, Sharing
from gratis.lines import (
    DECISION_FIELDS,
    REQUEST_FIELDS,
    decision_line,
    decode,
    encode,
    instant,
    request_line,
    request_of,
)
from gratis.model import AT_MAX, AT_MIN, KINDS, TOKENS_MAX, Kind
from gratis.offers import load
from gratis.stores.memory import MemoryStore
from gratis.stores.sqlite import SQLiteStore, Synchronous

AT = datetime(2025, 4, 20, 9, 15, tzinfo=UTC)
TICK = timedelta(microseconds=1)
OPENAI = load("openai-data-sharing")
ENABLED = Enrollment(tier=5, sharing=Sharing.ENABLED)
WHOLE_NUMBER = f"expected a whole number from 0 to {TOKENS_MAX}"


def ask(**fields):
    """A small request that is free, but for these fields."""
    usual = {"id": "r", "model": "gpt-4o-2024-08-06", "at": AT, "input_tokens": 2, "output_tokens": 1}
    return Request(**{**usual, **fields})


def refusal(**fields):
    """Why a request with these fields is refused."""
    with pytest.raises(RequestError) as raised:
        ask(**fields)
    assert str(raised.value).startswith(f"{raised.value.field}: ")
    return str(raised.value)


def line(**fields):
    """The line of a small request, but for these fields."""
    usual = {"id": "r", "model": "m", "at": "2025-04-20T09:15:00Z", "input_tokens": 2, "output_tokens": 1}
    return {**usual, **fields}


# -- numbers


class Long(int):
    """A whole number of another type, as numeric libraries have them."""


class Size(enum.IntEnum):
    """A whole number with a name."""

    SMALL = 5


class Indexable:
    """An object that can stand as an index, and so as a whole number."""

    def __index__(self):
        """Five."""
        return 5

    def __repr__(self):
        """Its name."""
        return "Indexable()"


HOSTILE = [
    True,
    False,
    5.0,
    0.0,
    -0.0,
    1e3,
    math.nan,
    math.inf,
    -math.inf,
    Decimal(5),
    Decimal("NaN"),
    Fraction(5, 1),
    complex(5),
    "5",
    "",
    " 5",
    "0x10",
    "nan",
    b"5",
    -1,
    -TOKENS_MAX,
    TOKENS_MAX + 1,
    2**53,
    2**63,
    2**64,
    10**30,
    Long(5),
    Long(0),
    Size.SMALL,
    Indexable(),
    [],
    [5],
    (5,),
    {},
    {"value": 5},
    timedelta(5),
]


@pytest.mark.parametrize("field", ["input_tokens", "output_tokens", "cached_tokens"])
@pytest.mark.parametrize("value", HOSTILE, ids=repr)
def test_only_whole_numbers_are_tokens(field, value):
    """A count of tokens is exactly an int from 0 to 10^12: nothing that only equals one, or resembles one."""
    assert refusal(**{field: value}) == f"{field}: found {value!r}; {WHOLE_NUMBER}"


@pytest.mark.parametrize("field", ["input_tokens", "output_tokens", "cached_tokens"])
@pytest.mark.parametrize("value", [10**4299, 10**4300, 10**5000, -(10**5000)], ids=["4300", "4301", "5001", "-5001"])
def test_numbers_of_thousands_of_digits(field, value):
    """A number too long to be printed is refused like any other, in a message that stays short."""
    text = refusal(**{field: value})
    assert (text.startswith(f"{field}: found "), text.endswith(WHOLE_NUMBER), len(text) < 300) == (True,) * 3


@pytest.mark.parametrize("size", [0, 1, 2**53 // 10**4, TOKENS_MAX - 1, TOKENS_MAX])
def test_bounds_of_tokens(size):
    """From 0 to 10^12 every count is taken as it is."""
    request = ask(input_tokens=size, output_tokens=0, cached_tokens=size)
    assert (request.tokens, request.input_tokens, request.cached_tokens) == (size, size, size)


@pytest.mark.parametrize(
    ("given_tokens", "made", "total"),
    [(TOKENS_MAX, 1, TOKENS_MAX + 1), (1, TOKENS_MAX, TOKENS_MAX + 1), (TOKENS_MAX, TOKENS_MAX, 2 * TOKENS_MAX)],
)
def test_sum_of_tokens_is_bounded(given_tokens, made, total):
    """Input and output together may not exceed 10^12 either."""
    found = refusal(input_tokens=given_tokens, output_tokens=made)
    assert found == f"tokens: {total} in all; expected at most {TOKENS_MAX}"


def test_sum_of_tokens_may_reach_the_bound():
    """Exactly 10^12 in all is a request."""
    assert ask(input_tokens=TOKENS_MAX - 1, output_tokens=1).tokens == TOKENS_MAX


@pytest.mark.parametrize(
    ("given_tokens", "made", "kind", "tokens"),
    [
        (0, 0, "completion", 0),
        (3, 4, "completion", 7),
        (None, None, "completion", None),
        (3, None, "completion", None),
        (None, 4, "completion", None),
        (0, None, "completion", None),
        (3, None, "embedding", 3),
        (0, None, "embedding", 0),
        (None, None, "embedding", None),
        (None, 4, "embedding", None),
        (3, 4, "embedding", 7),
        (3, None, "moderation", None),
    ],
)
def test_tokens_are_input_and_output(given_tokens, made, kind, tokens):
    """Tokens are input and output together; absent is unmeasured, never 0; an embedding has no output."""
    assert ask(input_tokens=given_tokens, output_tokens=made, kind=kind).tokens == tokens


def test_cached_tokens_are_never_added():
    """Cached tokens are a part of the input: they are in the tokens once."""
    assert ask(input_tokens=100, output_tokens=10, cached_tokens=100).tokens == 110


@pytest.mark.parametrize(("given_tokens", "cached"), [(2, 3), (0, 1), (None, 1), (None, TOKENS_MAX)])
def test_cached_tokens_are_a_part_of_the_input(given_tokens, cached):
    """More cached tokens than input is no usage."""
    assert refusal(input_tokens=given_tokens, cached_tokens=cached).startswith(f"cached_tokens: found {cached}, ")


@pytest.mark.parametrize("field", ["input_tokens", "output_tokens", "cached_tokens"])
def test_nothing_is_written_of_a_bad_number(field):
    """A bad number is refused before a store hears of it: its id is free for the right one."""
    meter = Meter(MemoryStore(bounds=None), OPENAI, assume=ENABLED)
    for value in HOSTILE:
        with pytest.raises(RequestError):
            meter.decide(ask(**{field: value}))
    assert list(meter.ledger()) == []
    assert meter.decide(ask()).seq == 1


# -- ids, accounts, projects

NAMES_TAKEN = {
    "one letter": "t",
    "another": "s",
    "like a field": "r:1",
    "like a group": "t:1M",
    "255 bytes": "x" * 255,
    "255 bytes of 2": "\u00e9" * 127 + "x",
    "252 bytes of 4": "\U0001f600" * 63,
    "a space": " ",
    "spaces around": " a ",
    "composed": "caf\u00e9",
    "decomposed": "cafe\u0301",
    "right-to-left mark": "\u200fa",
    "right-to-left override": "a\u202eb",
    "zero-width space": "\u200b",
    "line separator": "a\u2028b",
    "no-break space": "\u00a0",
    "byte order mark": "\ufeff",
    "not a character": "\uffff",
    "braces": "a}{b",
    "hash tag": "{x}",
    "closing brace": "}",
    "colon": "a:b",
    "slash": "../../etc/passwd",
    "quote": "'; DROP TABLE ledger; --",
    "wildcard": "%",
    "star": "*",
    "percent": "%s%n",
    "backslash": "\\",
    "empty JSON": "{}",
    "null": "null",
    "None": "None",
    "zero": "0",
    "default": "default",
}
NAMES_REFUSED = {
    "empty": ("", "found 0 bytes; expected 1 to 255"),
    "256 bytes": ("x" * 256, "found 256 bytes; expected 1 to 255"),
    "256 bytes of 2": ("\u00e9" * 128, "found 256 bytes; expected 1 to 255"),
    "256 bytes of 4": ("\U0001f600" * 64, "found 256 bytes; expected 1 to 255"),
    "10 MB": ("x" * 10_000_000, "found 10000000 bytes; expected 1 to 255"),
    "NUL": ("a\0b", "found 'a\\x00b'; expected no control characters"),
    "newline": ("a\nb", "found 'a\\nb'; expected no control characters"),
    "newline at the end": ("a\n", "found 'a\\n'; expected no control characters"),
    "carriage return": ("a\r", "found 'a\\r'; expected no control characters"),
    "tab": ("a\tb", "found 'a\\tb'; expected no control characters"),
    "escape": ("\x1b[31m", "found '\\x1b[31m'; expected no control characters"),
    "delete": ("\x7f", "found '\\x7f'; expected no control characters"),
    "next line": ("\x85", "found '\\x85'; expected no control characters"),
    "control of 8 bits": ("\x9b", "found '\\x9b'; expected no control characters"),
    "high surrogate": ("a\ud800", "found 'a\\ud800', half of a surrogate pair; expected Unicode text"),
    "low surrogate": ("\udfff", "found '\\udfff', half of a surrogate pair; expected Unicode text"),
    "pair of surrogates": ("\ud83d\ude00", "found '\\ud83d\\ude00', half of a surrogate pair; expected Unicode text"),
    "bytes": (b"r", "found b'r'; expected a string"),
    "number": (5, "found 5; expected a string"),
    "true": (True, "found True; expected a string"),
    "list": (["r"], "found ['r']; expected a string"),
}


@pytest.mark.parametrize("field", ["id", "account", "project"])
@pytest.mark.parametrize("name", NAMES_TAKEN.values(), ids=NAMES_TAKEN.keys())
def test_names_are_taken_as_they_are(field, name):
    """A name of 1 to 255 bytes without control characters is taken as it is, however odd."""
    assert getattr(ask(**{field: name}), field) == name


@pytest.mark.parametrize("field", ["id", "account", "project"])
@pytest.mark.parametrize(("name", "message"), NAMES_REFUSED.values(), ids=NAMES_REFUSED.keys())
def test_names_that_are_refused(field, name, message):
    """Empty, too long, unprintable or no text: refused with what was found, which stays short and safe to print."""
    found = refusal(**{field: name})
    assert (found, found.isprintable()) == (f"{field}: {message}", True)


@pytest.mark.parametrize("field", ["id", "account"])
def test_names_that_may_not_be_missing(field):
    """An id and an account are always named; a project may be absent."""
    assert refusal(**{field: None}) == f"{field}: found None; expected a string"
    assert ask(project=None).project is None


def test_composed_and_decomposed_are_two_ids():
    """No name is normalised: what only looks the same is another id, account and project."""
    composed, decomposed = NAMES_TAKEN["composed"], NAMES_TAKEN["decomposed"]
    assert unicodedata.normalize("NFC", decomposed) == composed
    meter = Meter(MemoryStore(bounds=None), OPENAI, assume=ENABLED)
    seen = [meter.decide(ask(id=name)) for name in (composed, decomposed, composed)]
    assert [(one.seq, one.replayed) for one in seen] == [(1, False), (2, False), (1, True)]


def test_odd_names_are_distinct_in_a_store(tmp_path):
    """Whatever the names, each account has its own window and each id its own decision, in a file as in memory."""
    stores = [
        MemoryStore(bounds=None),
        SQLiteStore(tmp_path / "names.db", bounds=None, synchronous=Synchronous.OFF),
    ]
    names = list(NAMES_TAKEN.values())
    ledgers = []
    for store in stores:
        meter = Meter(store, OPENAI, assume=ENABLED)
        requests = [ask(id=key, account=account, project=key) for account in names for key in names]
        first, again = meter.decide_many(requests), meter.decide_many(requests)
        assert [one.seq for one in first] == list(range(1, len(names) + 1)) * len(names)
        assert [one.replayed for one in (*first, *again)] == [False] * len(first) + [True] * len(first)
        ledgers.append([decision_line(entry.decision) for entry in meter.ledger()])
        meter.close()
    assert ledgers[0] == ledgers[1]


def test_ids_belong_to_their_account():
    """The same id of two accounts is two requests; of one account, with another model, a conflict."""
    meter = Meter(MemoryStore(bounds=None), OPENAI, assume=ENABLED)
    assert [meter.decide(ask(account=account)).replayed for account in ("a", "b", "a:b", "a")] == [False] * 3 + [True]
    with pytest.raises(Conflict) as raised:
        meter.decide(ask(account="a", model="gpt-4o-mini-2024-07-18"))
    assert (raised.value.field, raised.value.first.seq) == ("model", 1)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"model": "gpt-4o-mini-2024-07-18"}, "model 'gpt-4o-2024-08-06'"),
        ({"at": AT + TICK}, "at '2025-04-20T09:15:00Z'"),
        ({"project": "p"}, "no project"),
        ({"input_tokens": 3}, "input_tokens 2"),
        ({"output_tokens": None}, "output_tokens 1"),
        ({"cached_tokens": 1}, "cached_tokens 0"),
        ({"kind": "eval"}, "kind 'completion'"),
        ({"tools": ["function"]}, "no tools"),
    ],
    ids=repr,
)
def test_conflict_tells_what_was_decided(fields, told):
    """A conflict names the field that differs and its first value, in words that a person reads on every surface."""
    meter = Meter(MemoryStore(bounds=None), OPENAI, assume=ENABLED)
    meter.decide(ask())
    with pytest.raises(Conflict) as raised:
        meter.decide(ask(**fields))
    assert str(raised.value) == (
        f"{next(iter(fields))}: request 'r' of account 'default' was decided before with {told}: free;"
        " that decision stands"
    )


# -- models


@pytest.mark.parametrize(
    "model",
    ["", " ", "\0", "a\nb", "x" * 1024, "\u00e9" * 512, "\u200f", "\uffff", "null", "*"],
    ids=lambda text: ascii(text)[:12],
)
def test_any_text_is_a_model(model):
    """A model is any text of up to 1,024 bytes: unlisted it is billed, never refused."""
    decision = Meter(MemoryStore(bounds=None), OPENAI, assume=ENABLED).decide(ask(model=model))
    assert (decision.request.model, decision.reason.value) == (model, "model_not_listed")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("x" * 1025, "found 1025 bytes; expected at most 1024"),
        ("\u00e9" * 513, "found 1026 bytes; expected at most 1024"),
        ("x" * 10_000_000, "found 10000000 bytes; expected at most 1024"),
        ("\ud800", "found '\\ud800', half of a surrogate pair; expected Unicode text"),
        (None, "found None; expected a string"),
        (5, "found 5; expected a string"),
        (b"gpt", "found b'gpt'; expected a string"),
        (["gpt"], "found ['gpt']; expected a string"),
    ],
    ids=lambda value: ascii(value)[:16],
)
def test_models_that_are_refused(model, message):
    """What is no text, or more than 1,024 bytes of it, names no model."""
    assert refusal(model=model) == f"model: {message}"


# -- kinds and tools


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_by_their_words(kind):
    """A kind may be given by its word."""
    assert ask(kind=kind).kind is Kind(kind)


@pytest.mark.parametrize(
    "kind", ["", "Completion", "completion ", "chat", "evals", None, True, 5, [], b"eval", ["eval"]]
)
def test_kinds_that_are_refused(kind):
    """A word that is no kind is refused, with the kinds that there are."""
    assert refusal(kind=kind) == f"kind: found {kind!r}; expected one of {', '.join(KINDS)}"


@pytest.mark.parametrize(
    ("tools", "kept"),
    [
        ((), ()),
        ([], ()),
        (set(), ()),
        (["function", "function"], ("function",)),
        (("web_search", "function"), ("function", "web_search")),
        ({"b", "a"}, ("a", "b")),
        (frozenset({"a"}), ("a",)),
        (["function"] * 128, ("function",)),
    ],
    ids=lambda value: f"{type(value).__name__} {sorted(value)}"[:24],
)
def test_tools_are_a_set_of_kinds(tools, kept):
    """What counts is which kinds of tool were used: each once, in one order."""
    assert ask(tools=tools).tools == kept


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("function", "tools: found 'function'; expected a list of kinds of tool"),
        (None, "tools: found None; expected a list of kinds of tool"),
        ({"function": 1}, "tools: found {'function': 1}; expected a list of kinds of tool"),
        (True, "tools: found True; expected a list of kinds of tool"),
        ([""], "tools: found 0 bytes; expected 1 to 255"),
        ([None], "tools: found None; expected a string"),
        ([{"type": "function"}], "tools: found {'type': 'function'}; expected a string"),
        ([["function"]], "tools: found ['function']; expected a string"),
        (["a\n"], "tools: found 'a\\n'; expected no control characters"),
        (["function"] * 129, "tools: found 129 tools; expected at most 128"),
    ],
    ids=lambda value: ascii(value)[:24],
)
def test_tools_that_are_refused(tools, message):
    """Tools are a list of names, and no longer than anyone needs."""
    assert refusal(tools=tools) == message


def test_order_of_tools_is_no_conflict():
    """The same request with its tools in another order is the same request."""
    meter = Meter(MemoryStore(bounds=None), OPENAI, assume=ENABLED)
    meter.decide(ask(tools=["function", "custom"]))
    assert meter.decide(ask(tools=("custom", "function", "custom"))).replayed


# -- times


class Stamp(datetime):
    """A datetime of another type, as data-frame libraries have them."""


class Nowhere(tzinfo):
    """A zone that does not know its offset."""

    def utcoffset(self, _at):
        """Unknown."""

    def dst(self, _at):
        """Unknown."""

    def tzname(self, _at):
        """Its name."""
        return "nowhere"


PACIFIC = ZoneInfo("America/Los_Angeles")
ZONES = [ZoneInfo(name) for name in ("America/St_Johns", "Asia/Kathmandu", "Pacific/Apia", "Pacific/Kiritimati")]


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (AT, "2025-04-20T09:15:00+00:00"),
        (datetime(2025, 4, 20, 15, 0, tzinfo=ZoneInfo("Asia/Kathmandu")), "2025-04-20T09:15:00+00:00"),
        (datetime(2025, 11, 2, 1, 30, tzinfo=PACIFIC), "2025-11-02T08:30:00+00:00"),
        (datetime(2025, 11, 2, 1, 30, fold=1, tzinfo=PACIFIC), "2025-11-02T09:30:00+00:00"),
        (datetime(2025, 3, 9, 2, 30, tzinfo=PACIFIC), "2025-03-09T10:30:00+00:00"),
        (datetime(2025, 1, 1, tzinfo=timezone(timedelta(hours=-23, minutes=-59))), "2025-01-01T23:59:00+00:00"),
        (datetime(2025, 1, 1, tzinfo=timezone(timedelta(microseconds=1))), "2024-12-31T23:59:59.999999+00:00"),
        (datetime(2025, 1, 1, tzinfo=timezone(timedelta(0), "GMT")), "2025-01-01T00:00:00+00:00"),
        (Stamp(2025, 4, 20, 9, 15, tzinfo=UTC), "2025-04-20T09:15:00+00:00"),
        (Stamp(2025, 4, 20, 15, 0, tzinfo=ZoneInfo("Asia/Kathmandu")), "2025-04-20T09:15:00+00:00"),
        (AT_MIN, "1970-01-01T00:00:00+00:00"),
        (AT_MAX - TICK, "8999-12-31T23:59:59.999999+00:00"),
    ],
    ids=str,
)
def test_times_are_instants(at, expected):
    """An aware time of any zone and type is kept as its instant, a plain datetime in UTC."""
    kept = ask(at=at).at
    assert (type(kept), kept.tzinfo, kept.isoformat()) == (datetime, UTC, expected)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (datetime(2025, 1, 1), "found 2025-01-01T00:00:00, which names no offset from UTC; expected one"),  # noqa: DTZ001 - naive, to be refused
        (
            datetime(2025, 1, 1, tzinfo=Nowhere()),
            "found 2025-01-01T00:00:00, which names no offset from UTC; expected one",
        ),
        (date(2025, 1, 1), "found datetime.date(2025, 1, 1); expected a datetime with its offset from UTC"),
        ("2025-01-01T00:00:00Z", "found '2025-01-01T00:00:00Z'; expected a datetime with its offset from UTC"),
        (1735689600, "found 1735689600; expected a datetime with its offset from UTC"),
        (1735689600.0, "found 1735689600.0; expected a datetime with its offset from UTC"),
        (None, "found None; expected a datetime with its offset from UTC"),
        (True, "found True; expected a datetime with its offset from UTC"),
        (AT_MIN - TICK, "found 1969-12-31T23:59:59.999999+00:00; expected a year from 1970 to 8999"),
        (AT_MAX, "found 9000-01-01T00:00:00+00:00; expected a year from 1970 to 8999"),
        (datetime.max.replace(tzinfo=UTC), "found 9999-12-31T23:59:59.999999+00:00; expected a year from 1970 to 8999"),
        (datetime.min.replace(tzinfo=UTC), "found 0001-01-01T00:00:00+00:00; expected a year from 1970 to 8999"),
        (
            datetime.max.replace(tzinfo=timezone(timedelta(hours=-14))),
            "found 9999-12-31T23:59:59.999999-14:00; expected",
        ),
        (datetime.min.replace(tzinfo=timezone(timedelta(hours=14))), "found 0001-01-01T00:00:00+14:00; expected"),
    ],
    ids=str,
)
def test_times_that_are_refused(at, message):
    """A time without an offset is no instant; nor is what lies beyond the years that stores can keep."""
    assert refusal(at=at).startswith(f"at: {message}")


@settings(max_examples=300)
@given(
    at=st.datetimes(datetime(1970, 1, 2), datetime(8999, 12, 30), timezones=st.sampled_from(ZONES)),  # noqa: DTZ001 - bounds are naive
)
def test_any_zone_is_the_same_instant(at):
    """A time and the same time in UTC are one instant."""
    assert ask(at=at) == ask(at=at.astimezone(UTC))
    assert instant("at", at.astimezone(UTC).isoformat()) == ask(at=at).at


# -- lines

TAKEN = """
2025-04-20T09:15:00Z                 2025-04-20T09:15:00
2025-04-20t09:15:00z                 2025-04-20T09:15:00
2025-04-20T09:15:00z                 2025-04-20T09:15:00
2025-04-20_09:15:00Z                 2025-04-20T09:15:00
2025-04-20T09:15:00+00:00            2025-04-20T09:15:00
2025-04-20T09:15:00-00:00            2025-04-20T09:15:00
2025-04-20T15:00:00+05:45            2025-04-20T09:15:00
2025-04-19T09:16:00-23:59            2025-04-20T09:15:00
2025-04-20T09:15:00.5Z               2025-04-20T09:15:00.500000
2025-04-20T09:15:00.123456Z          2025-04-20T09:15:00.123456
2025-04-20T09:15:00.1234567Z         2025-04-20T09:15:00.123456
2025-04-20T09:15:00.999999999+00:00  2025-04-20T09:15:00.999999
2025-04-20T09:15:00.0000000000001Z   2025-04-20T09:15:00
1970-01-01T00:00:00Z                 1970-01-01T00:00:00
2024-02-29T23:59:59Z                 2024-02-29T23:59:59
"""
REFUSED = """
2025-04-20
2025-04-20T09:15:00
2025-04-20T09:15Z
2025-04-20T09:15:00+0545
2025-04-20T09:15:00+05
2025-04-20T09:15:00+24:00
2025-04-20T09:15:00UTC
2025-04-20T09:15:00_Z
2025-04-20T9:15:00Z
2025-4-20T09:15:00Z
25-04-20T09:15:00Z
2025-04-20T09:15:00,5Z
2025-04-20T09:15:00.Z
2025-04-20T24:00:00Z
2025-04-20T09:60:00Z
2025-02-30T00:00:00Z
2025-02-29T00:00:00Z
2025-13-01T00:00:00Z
0000-01-01T00:00:00Z
12025-04-20T09:15:00Z
-2025-04-20T09:15:00Z
2025-W16-7T09:15:00Z
2025-110T09:15:00Z
20250420T091500Z
1745140500
2025/04/20T09:15:00Z
T09:15:00Z
now
Z
\u0662\u0660\u0662\u0665-04-20T09:15:00Z
2025-04-20T09:15:00\uff3a
9999-12-31T23:59:59-14:00
1969-12-31T23:59:59Z
9000-01-01T00:00:00Z
"""


@pytest.mark.parametrize("row", TAKEN.strip().splitlines(), ids=lambda row: row.split()[0])
def test_times_of_lines(row):
    """A line's time is RFC 3339 with its offset, in either case; digits beyond microseconds are cut off."""
    text, expected = (cell.replace("_", " ") for cell in row.split())
    assert request_of(line(at=text)).at == datetime.fromisoformat(expected).replace(tzinfo=UTC)


@pytest.mark.parametrize("text", [row.replace("_", " ") for row in REFUSED.strip().splitlines()])
def test_times_of_lines_that_are_refused(text):
    """What is no RFC 3339 time with its offset is refused: no form is guessed."""
    with pytest.raises(RequestError) as raised:
        request_of(line(at=text))
    assert (raised.value.field, "expected" in str(raised.value)) == ("at", True)


@pytest.mark.parametrize("text", ["", " 2025-04-20T09:15:00Z", "2025-04-20T09:15:00Z ", "2025-04-20T09:15:00Z\n", "\0"])
def test_times_with_something_around_them(text):
    """Nothing is stripped from a time."""
    with pytest.raises(RequestError, match=r"^at: found .*; expected RFC 3339"):
        request_of(line(at=text))


@pytest.mark.parametrize("value", [1745140500, 1745140500.5, True, [], {}, ["2025-04-20T09:15:00Z"]])
def test_times_that_are_no_text(value):
    """A time is text: a number of seconds could be of anything."""
    with pytest.raises(RequestError, match=r"^at: found .*; expected RFC 3339"):
        request_of(line(at=value))


def test_time_that_is_a_number_of_thousands_of_digits():
    """A number too long to be printed is refused as a time, too."""
    with pytest.raises(RequestError, match=r"^at: found .*; expected RFC 3339"):
        request_of(line(at=10**5000))


@pytest.mark.parametrize("field", ["id", "model", "at"])
@pytest.mark.parametrize("fields", [{}, None], ids=["absent", "null"])
def test_fields_that_every_line_has(field, fields):
    """Without an id, a model or a time a line is no request."""
    told = line()
    if fields is None:
        told[field] = None
    else:
        del told[field]
    with pytest.raises(RequestError) as raised:
        request_of(told)
    assert str(raised.value) == f"{field}: missing; expected in every request: id, model, at"


def test_smallest_line():
    """All else may be absent or null: the account is default, the kind a completion, the usage unmeasured."""
    smallest = {"id": "r", "model": "m", "at": "2025-04-20T09:15:00Z"}
    expected = Request(id="r", model="m", at=AT)
    assert request_of(smallest) == request_of({**dict.fromkeys(REQUEST_FIELDS), **smallest}) == expected
    assert (expected.account, expected.project, expected.kind, expected.tools, expected.cached_tokens) == (
        "default",
        None,
        Kind.COMPLETION,
        (),
        0,
    )
    assert expected.tokens is None


@pytest.mark.parametrize("value", [None, True, 5, "r", ["r"], [line()], b"{}"])
def test_lines_that_are_no_object(value):
    """A line is a JSON object."""
    with pytest.raises(RequestError) as raised:
        request_of(value)
    assert str(raised.value) == f"line: found {type(value).__name__}; expected a JSON object"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("ID", "id"),
        ("Id", "id"),
        ("Account", "account"),
        ("accounts", "account"),
        ("projects", "project"),
        ("Model", "model"),
        ("models", "model"),
        ("input-tokens", "input_tokens"),
        ("inputTokens", "input_tokens"),
        ("input_token", "input_tokens"),
        ("inputtokens", "input_tokens"),
        ("INPUT_TOKENS", "input_tokens"),
        ("output__tokens", "output_tokens"),
        ("outputTokens", "output_tokens"),
        ("cachedTokens", "cached_tokens"),
        ("cached_token", "cached_tokens"),
        ("At", "at"),
        ("Kind", "kind"),
        ("kinds", "kind"),
        ("tool", "tools"),
        ("Tools", "tools"),
        ("_tools", "tools"),
    ],
)
def test_misspelled_fields(name, meant):
    """A field that is one of ours but for case, hyphens, underscores or a plural is refused: it would be missed."""
    with pytest.raises(RequestError) as raised:
        request_of(line(**{name: 5}))
    assert str(raised.value) == f"{name}: an unknown field; expected {meant!r}, spelled so"


@pytest.mark.parametrize("names", list(permutations(["Model", "Kind", "ID"])), ids=" ".join)
def test_first_of_several_misspelled_fields(names):
    """Of several misspelled fields the first of the line is told, on every run."""
    with pytest.raises(RequestError) as raised:
        request_of({**dict.fromkeys(names, 5), **line()})
    assert raised.value.field == names[0]


@pytest.mark.parametrize(
    "name",
    ["", "user", "prompt", "total_tokens", "usage", "service_tier", "created", "metadata", "cost", "\u00e9", "x" * 300],
)
def test_unknown_fields_are_left_alone(name):
    """Fields that are not ours are nobody's business here."""
    assert request_of(line(**{name: {"deep": [1, None]}})) == request_of(line())


@pytest.mark.parametrize("name", sorted(set(DECISION_FIELDS) - set(REQUEST_FIELDS)))
def test_decisions_can_be_fed_back(name):
    """The fields of a decision may stand in a request's line, and say nothing there."""
    assert request_of(line(**{name: "anything"})) == request_of(line())


@pytest.mark.parametrize(
    ("tools", "kept"),
    [
        (None, ()),
        ([], ()),
        (["web_search", "function"], ("function", "web_search")),
        ([{"type": "function", "function": {"name": "f", "parameters": {}}}], ("function",)),
        ([{"type": "web_search"}, "function", {"type": "function"}], ("function", "web_search")),
    ],
)
def test_tools_of_lines(tools, kept):
    """A line tells its tools by kind, or as the objects that requests carry."""
    assert request_of(line(tools=tools)).tools == kept


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("function", "tools: found 'function'; expected a list of kinds of tool"),
        ({"type": "function"}, "tools: found {'type': 'function'}; expected a list of kinds of tool"),
        (5, "tools: found 5; expected a list of kinds of tool"),
        ([{}], "tools: found None; expected a string"),
        ([{"name": "f"}], "tools: found None; expected a string"),
        ([{"type": 5}], "tools: found 5; expected a string"),
        ([{"type": ""}], "tools: found 0 bytes; expected 1 to 255"),
        ([None], "tools: found None; expected a string"),
        ([["function"]], "tools: found ['function']; expected a string"),
    ],
    ids=repr,
)
def test_tools_of_lines_that_are_refused(tools, message):
    """A tool without a kind is no tool: it might be a hosted one."""
    with pytest.raises(RequestError) as raised:
        request_of(line(tools=tools))
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": 5}, "id: found 5; expected a string"),
        ({"id": ""}, "id: found 0 bytes; expected 1 to 255"),
        ({"account": ""}, "account: found 0 bytes; expected 1 to 255"),
        ({"account": 7}, "account: found 7; expected a string"),
        ({"project": ["p"]}, "project: found ['p']; expected a string"),
        ({"model": {"name": "m"}}, "model: found {'name': 'm'}; expected a string"),
        ({"input_tokens": "5"}, f"input_tokens: found '5'; {WHOLE_NUMBER}"),
        ({"input_tokens": 5.0}, f"input_tokens: found 5.0; {WHOLE_NUMBER}"),
        ({"output_tokens": True}, f"output_tokens: found True; {WHOLE_NUMBER}"),
        ({"output_tokens": -1}, f"output_tokens: found -1; {WHOLE_NUMBER}"),
        ({"cached_tokens": 3}, "cached_tokens: found 3, "),
        ({"kind": "chat"}, "kind: found 'chat'; expected one of completion, "),
        ({"kind": 5}, "kind: found 5; expected one of completion, "),
    ],
    ids=repr,
)
def test_bad_values_of_lines(fields, message):
    """A value of a line is checked as strictly as a program's."""
    with pytest.raises(RequestError) as raised:
        request_of(line(**fields))
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    "number",
    ["5.0", "5e0", "-0.0", "-1", "1e12", "1000000000001", "1" + "0" * 30, "true", '"5"', "[5]", "9223372036854775808"],
)
def test_numbers_of_json(number):
    """What JSON can write as a number is tokens only as a plain whole number within bounds."""
    text = json.dumps(line()).replace('"input_tokens": 2', f'"input_tokens": {number}')
    with pytest.raises(RequestError, match=rf"^input_tokens: found .*; {WHOLE_NUMBER}$"):
        request_of(decode(text))


@pytest.mark.parametrize(
    "number", ["NaN", "Infinity", "-Infinity", "1e400", "0x10", "05", "+5", "5.", "1" + "0" * 5000]
)
def test_numbers_that_are_no_json(number):
    """What other readers take for numbers is no JSON here."""
    text = json.dumps(line()).replace('"input_tokens": 2', f'"input_tokens": {number}')
    with pytest.raises(msgspec.DecodeError):
        decode(text)


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
names = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20)
counts = st.none() | st.integers(0, TOKENS_MAX // 2)
requests = st.builds(
    Request,
    id=names,
    model=texts,
    at=st.integers(0, (AT_MAX - AT_MIN) // TICK - 1).map(lambda us: AT_MIN + us * TICK),
    input_tokens=st.integers(10, TOKENS_MAX // 2),
    output_tokens=counts,
    account=names,
    project=st.none() | names,
    kind=st.sampled_from(Kind),
    tools=st.lists(names, max_size=3),
    cached_tokens=st.integers(0, 10),
)


@settings(max_examples=500)
@given(request=requests)
def test_requests_go_through_json(request):
    """A request and its line say the same, whatever is in it."""
    assert request_of(decode(encode(request_line(request)))) == request
    assert request_of(json.loads(json.dumps(request_line(request)))) == request


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=500)
@given(field=st.sampled_from(REQUEST_FIELDS), value=json_values)
def test_any_json_is_a_request_or_refused(field, value):
    """Whatever JSON stands in a field, the line is a request or is refused with a field that it names."""
    found, request = None, None
    try:
        request = request_of(line(**{field: value}))
    except RequestError as error:
        found = error
    if found is None:
        assert request_of(request_line(request)) == request
    else:
        assert found.field in {*REQUEST_FIELDS, "tokens"}
        assert str(found).isprintable()


def test_decision_line_is_the_contract():
    """A decision's line has the fields of the contract in their order, and null where one does not apply."""
    meter = Meter(MemoryStore(bounds=None), OPENAI, assume=ENABLED)
    free, excluded = meter.decide(ask()), meter.decide(ask(id="x", model="x"))
    assert list(decision_line(free)) == list(DECISION_FIELDS)
    assert decode(encode(decision_line(free))) == {
        "id": "r",
        "account": "default",
        "verdict": "free",
        "reason": "within_allowance",
        "group": "1M",
        "tokens": 3,
        "free_tokens": 3,
        "billed_tokens": 0,
        "allowance": 1_000_000,
        "total": 3,
        "used": 3,
        "remaining": 999_997,
        "window_start": "2025-04-20T00:00:00Z",
        "window_end": "2025-04-21T00:00:00Z",
        "seq": 1,
        "offer": "openai-data-sharing",
        "revision": "2025-04-16",
        "at": "2025-04-20T09:15:00Z",
        "replayed": False,
    }
    nothing = ("group", "allowance", "total", "used", "remaining", "window_start", "window_end", "seq")
    assert {field: value for field, value in decision_line(excluded).items() if value is None} == dict.fromkeys(nothing)


@pytest.mark.parametrize(("name", "meant"), [("prompt_tokens", "input_tokens"), ("completionTokens", "output_tokens")])
def test_the_providers_words_are_not_passed_over(name, meant):
    """Tokens under the provider's name would be unmeasured, and billed; beside ours they are left alone."""
    line = {"id": "r", "model": "m", "at": "2025-04-20T00:00:00Z", name: 5}
    with pytest.raises(RequestError, match=f"{name}: the provider's word, which is not read; expected '{meant}'"):
        request_of(line)
    assert getattr(request_of({**line, meant: 7}), meant) == 7
