"""Offer files are read strictly: each fault has its own bad file, and its error names file, line and key.

The first line of a bad file says what its error must be: `# expect: line 9, KEY: FOUND; expected WORDS`. Line, key and
finding are compared exactly; the words, if any, must be among those of the error.
"""

import re
from datetime import timedelta
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from gratis import OfferError
from gratis.model import AT_MAX
from gratis.offer_file import parse
from gratis.offers import DEFAULT_OFFER, FILE_BYTES_MAX, load, shipped

FOLDER = Path(__file__).parent / "offers"
CONFIG = Path(__file__).parents[1] / "config"
BAD = sorted(path.stem for path in FOLDER.glob("*.toml"))

SMALLEST = """
name = "smallest"
title = "The smallest offer"
account = "organization"

[[revisions]]
from = 2025-01-01
source = "this test"
window = { kind = "rolling", hours = 24 }
counts = "free"
overage = "whole"
reasons = ["not_enrolled"]

[revisions.groups.calls]
unit = "requests"
allowance = 1
any_model = true
"""

# What is shipped: unit, kind of window, overage and groups of the last revision, and the number of revisions.
SHIPPED = """
name                   revisions  window                   unit      overage  groups
cloudflare-workers-ai  1          day UTC                  tokens    excess   1
gemini-free            3          day America/Los_Angeles  requests  whole    3
groq-free              1          day UTC                  tokens    whole    4
openai-data-sharing    11         day UTC                  tokens    whole    2
openai-evals           1          week UTC monday          runs      whole    1
openrouter-free        1          day UTC                  requests  whole    1
"""


class Expected(NamedTuple):
    """What the first line of a bad file says."""

    line: int
    key: str
    found: str
    words: str


def expected_of(name):
    """What the error of a bad file must be."""
    first = (FOLDER / f"{name}.toml").read_text(encoding="utf-8").splitlines()[0]
    told = re.fullmatch(r"# expect: line (\d+), (.+?): (.*?)(?:; expected (.+))?", first)
    assert told is not None, first
    return Expected(int(told[1]), told[2], told[3], told[4] or "")


@cache
def error_of(name):
    """The error of a bad file; None if it was taken for a good one."""
    try:
        load(FOLDER / f"{name}.toml")
    except OfferError as error:
        return error
    return None


def errors():
    """The error of each bad file that has one."""
    return {name: error for name in BAD if (error := error_of(name)) is not None}


# -- bad files


def test_bad_files_are_many():
    """There is a bad file for each fault, named for it, and all that lies here is one."""
    assert len(BAD) > 100
    assert [name for name in BAD if not name.startswith("bad_")] == []


@pytest.mark.parametrize("name", BAD)
def test_bad_file(name):
    """A bad file is refused at the line and key of its fault, with what was found and what was expected."""
    error, expected = error_of(name), expected_of(name)
    assert error is not None
    assert (error.line, error.key, error.found) == expected[:3]
    assert expected.words in error.expected


def test_errors_are_one_line_that_says_all():
    """An error is printed as file, line, key, what was found and what was expected, on one line."""
    for name, error in errors().items():
        assert error.file == str(FOLDER / f"{name}.toml")
        assert str(error) == f"{error.file}:{error.line}: {error.key}: {error.found}; expected {error.expected}"
        assert (len(str(error).splitlines()), len(error.expected) > 0) == (1, True)


def test_errors_are_in_the_words_of_the_file():
    """No error speaks of Python or of the library that read the file."""
    foreign = re.compile(r"should|datetime\.|dictionary|object to extract|\[key\]|pattern|after validation")
    told = {name: str(error).removeprefix(error.file) for name, error in errors().items()}
    assert {name: text for name, text in told.items() if foreign.search(text)} == {}


def test_errors_expect_more_than_the_name_of_a_key():
    """What was expected tells the reader something: where a key is missing, what belongs there."""
    told = {name: str(error) for name, error in errors().items() if error.found == f"{error.expected} is missing"}
    assert told == {}


@pytest.mark.parametrize(
    ("table", "keys"),
    [
        ("offer", {"name", "title", "account", "revisions"}),
        ("group", {"unit", "allowance", "models", "any_model", "kinds", "cached_input"}),
        ("window", {"kind", "span", "zone", "week_starts"}),
        ("rolling_window", {"kind", "hours"}),
    ],
)
def test_unknown_keys_are_told_which_are_known(table, keys):
    """Where a key is unknown the error names the keys that this very table may have."""
    told = errors()[f"bad_unknown_key_in_{table}"].expected
    assert set(re.findall(r"\w+", told)) - {"one", "of"} == keys


@pytest.mark.parametrize(
    ("before", "after", "known"),
    [
        ("account =", "window = 1\naccount =", "name, title, account, revisions"),
        ("account =", "groups = 1\naccount =", "name, title, account, revisions"),
        ("[revisions.groups.calls]\n", "[revisions.groups.window]\nlimit = 1\n", "unit, allowance, models"),
        ("[revisions.groups.calls]\n", "[revisions.groups.rolling]\nlimit = 1\n", "unit, allowance, models"),
        ("[revisions.groups.calls]\n", "[revisions.groups.groups]\nlimit = 1\n", "unit, allowance, models"),
    ],
)
def test_names_of_keys_in_other_places(before, after, known):
    """A key or a group that has the name of some other table is told the keys of its own."""
    with pytest.raises(OfferError) as raised:
        parse(SMALLEST.replace(before, after), file="names.toml")
    assert raised.value.expected.startswith(f"one of {known}")


def test_misspelled_key_is_told_as_such():
    """A misspelled key is told as unknown, not only as missing under its right name."""
    with pytest.raises(OfferError) as raised:
        parse(SMALLEST.replace("overage =", "overrage ="), file="misspelled.toml")
    assert "overrage" in str(raised.value)


def test_number_beyond_all_bounds():
    """A number of thousands of digits is an error of the file like any other."""
    text = SMALLEST.replace("allowance = 1", "allowance = 1" + "0" * 5000)
    with pytest.raises(OfferError) as raised:
        parse(text, file="long.toml")
    assert (raised.value.file, len(str(raised.value)) < 500) == ("long.toml", True)


def test_lists_in_lists_without_end():
    """Lists nested a hundred thousand deep are an error of the file like any other."""
    with pytest.raises(OfferError) as raised:
        parse("x = " + "[" * 100_000, file="deep.toml")
    assert (raised.value.file, raised.value.key) == ("deep.toml", "TOML")


@pytest.mark.parametrize("zone", ["posixrules", "localtime"])
def test_zones_that_differ_between_machines(zone):
    """A name under which machines keep a zone of their own is not a zone: an offer means the same everywhere."""
    window = f'{{ kind = "calendar", span = "day", zone = "{zone}" }}'
    with pytest.raises(OfferError):
        parse(SMALLEST.replace('{ kind = "rolling", hours = 24 }', window), file="zone.toml")


# -- good files


def test_smallest_offer():
    """A revision without tokens, models or tiers needs no exclusion but that of accounts which take no part."""
    offer = parse(SMALLEST, file="smallest.toml")
    (revision,) = offer.revisions
    (group,) = revision.groups
    assert (offer.name, revision.name, str(revision.window), revision.ends) == (
        "smallest",
        "2025-01-01",
        "rolling 24h",
        None,
    )
    assert (group.name, group.unit, dict(group.allowances), group.models, group.kinds) == (
        "calls",
        "requests",
        dict.fromkeys(range(6), 1),
        None,
        None,
    )


@pytest.mark.parametrize(
    ("allowance", "tiers"),
    [
        ('{ "1-2" = 5, "3-5" = 7 }', {1: 5, 2: 5, 3: 7, 4: 7, 5: 7}),
        ('{ "0" = 0, "1-5" = 1_000_000_000_000 }', {0: 0, **dict.fromkeys(range(1, 6), 10**12)}),
        ('{ 4 = 1, "2" = 2 }', {4: 1, 2: 2}),
        ("{ 0-5 = 3 }", dict.fromkeys(range(6), 3)),
        ('{ "3-3" = 3 }', {3: 3}),
        ("0", dict.fromkeys(range(6), 0)),
    ],
)
def test_allowances_by_tier(allowance, tiers):
    """An allowance is one number for every tier, or a number for each tier or span of tiers."""
    text = SMALLEST.replace("allowance = 1", f"allowance = {allowance}").replace(
        'reasons = ["not_enrolled"]', 'excluded_plans = []\nreasons = ["not_enrolled", "account_not_eligible"]'
    )
    (revision,) = parse(text, file="tiers.toml").revisions
    assert dict(revision.groups[0].allowances) == tiers


def test_layout_does_not_matter():
    """Comments, line endings, quotes and the order of keys change nothing."""
    text = SMALLEST.replace("\n", '  # a comment, with [brackets] and "quotes"\r\n')
    text = text.replace('name = "smallest"', "'name' = 'smallest'").replace("any_model = true", "'any_model'=true")
    (revision,) = parse(text, file="smallest.toml").revisions
    assert (revision.groups[0].models, dict(revision.groups[0].allowances)[5]) == (None, 1)


# -- lines

TABLES = [name for name in shipped() if name != DEFAULT_OFFER]


def text_of(name):
    """The text of an offer that is shipped."""
    return (CONFIG / f"{name}.toml").read_text(encoding="utf-8")


def places_for_a_key(lines):
    """The numbers of the lines after which a key may stand: not within a list of several lines."""
    places = []
    inside = False
    for number, line in enumerate(lines, start=1):
        if line.endswith("["):
            inside = True
        if line.startswith("]"):
            inside = False
        if not inside:
            places.append(number)
    return places


def fault_of(lines):
    """The error of a text made of these lines."""
    with pytest.raises(OfferError) as raised:
        parse("\n".join(lines), file="mutant.toml")
    return raised.value


@pytest.mark.parametrize(("name", "step"), [*((name, 1) for name in TABLES), (DEFAULT_OFFER, 3)])
def test_line_of_an_unknown_key(name, step):
    """Wherever a key is put into a shipped file, the error names its very line."""
    lines = text_of(name).splitlines()
    for place in places_for_a_key(lines)[::step]:
        error = fault_of([*lines[:place], "zzz = 1", *lines[place:]])
        assert (error.line, error.key.split(".")[-1], error.found) == (place + 1, "zzz", "an unknown key")


@pytest.mark.parametrize(("name", "step"), [*((name, 1) for name in TABLES), (DEFAULT_OFFER, 4)])
def test_line_of_a_value_of_the_wrong_type(name, step):
    """Whichever date, word or number of a shipped file becomes a time of day, the error names its line and key."""
    lines = text_of(name).splitlines()
    revision, groups = 0, 0
    places = []
    for number, line in enumerate(lines, start=1):
        revision += line == "[[revisions]]"
        groups = number if line.startswith("[revisions.groups") else groups
        if found := re.fullmatch(r"(\w+) = [^\[{]+", line):
            places.append((number, found[1], revision))
    for number, key, inside in places[::step]:
        error = fault_of([*lines[: number - 1], f"{key} = 07:32:00", *lines[number:]])
        assert (error.line, error.key.split(".")[-1]) == (number, key)
        assert error.key.startswith(f"revisions[{inside}]." if inside else key)


@pytest.mark.parametrize(("name", "step"), [*((name, 1) for name in TABLES), (DEFAULT_OFFER, 5)])
def test_line_of_a_model_that_is_listed_twice(name, step):
    """Whichever model of a shipped list becomes the first one of its list, the error names its line and its place."""
    lines = text_of(name).splitlines()
    first, items = "", 0
    places = []
    for number, line in enumerate(lines, start=1):
        if line == "models = [":
            items = 0
        elif line == "o_series = [":
            items = -len(lines)
        elif line.startswith('  "') and line.count('"') == 2:
            items += 1
            first = line if items == 1 else first
            if items > 1:
                places.append((number, items, first))
    for number, item, model in places[::step]:
        error = fault_of([*lines[: number - 1], model, *lines[number:]])
        assert (error.line, error.key.split(".")[-1]) == (number, f"models[{item}]")
        assert error.found.startswith(model.strip().strip(",").replace('"', "'"))


# -- what is shipped


def test_shipped_offers():
    """The offers that come with the program are those of config/, one file each."""
    assert shipped() == sorted(path.stem for path in CONFIG.glob("*.toml"))
    assert shipped() == [line.split()[0] for line in SHIPPED.strip().splitlines()[1:]]


@pytest.mark.parametrize("line", SHIPPED.strip().splitlines()[1:], ids=lambda line: line.split()[0])
def test_shape_of_shipped_offers(line):
    """Each shipped offer is of the shape that it is shipped for."""
    name, revisions, window, unit, overage, groups = re.split(r"  +", line)
    offer = load(name)
    last = offer.revisions[-1]
    assert [len(offer.revisions), str(last.window), len(last.groups)] == [int(revisions), window, int(groups)]
    assert {(group.unit.value, last.overage.value) for group in last.groups} == {(unit, overage)}


@pytest.mark.parametrize("name", shipped())
def test_shipped_offer_is_named_for_its_file(name):
    """A shipped offer's name is its file's, by name and by path alike."""
    assert [load(name).name, load(CONFIG / f"{name}.toml").name, load(str(CONFIG / f"{name}.toml")).name] == [name] * 3


@pytest.mark.parametrize("name", shipped())
def test_revisions_are_in_order_and_meet(name):
    """The revisions of a shipped offer follow each other without gap or overlap, and the last one is in force."""
    offer = load(name)
    assert [earlier.ends for earlier, _ in pairwise(offer.revisions)] == [
        later.starts for _, later in pairwise(offer.revisions)
    ]
    assert offer.revisions[-1].ends is None
    tick = timedelta(microseconds=1)
    for revision in offer.revisions:
        assert offer.at(revision.starts) is revision
        assert offer.at((revision.ends or AT_MAX) - tick) is revision
    assert offer.at(offer.revisions[0].starts - tick) is None


@pytest.mark.parametrize("name", shipped())
def test_shipped_revisions_tell_where_they_are_from(name):
    """Every revision but the first of OpenAI's tells on which day it was observed, which is a day of its own."""
    offer = load(name)
    undated = [revision.name for revision in offer.revisions if revision.observed_on is None]
    assert undated == (["2024-12-01"] if name == DEFAULT_OFFER else [])
    for revision in offer.revisions:
        day = revision.observed_on
        assert day is None or (revision.starts.date() <= day)
        assert day is None or revision.ends is None or (day < revision.ends.date())
        assert revision.source


def test_rolling_windows_end_at_the_switch():
    """The rolling revision hands over on 2025-03-06, and every daily one knows since when the day is the window."""
    rolling, *daily = load(DEFAULT_OFFER).revisions
    assert (rolling.after, rolling.before, rolling.ends) == (None, daily[0].starts, daily[0].starts)
    assert {(revision.after, revision.before) for revision in daily} == {(daily[0].starts, None)}


@pytest.mark.parametrize("name", shipped())
def test_another_reading_changes_nothing_else(name):
    """Another reading of an offer differs in what counts and in what of an overage is billed, and in nothing else."""
    offer = load(name)
    read = offer.reading(counts="all", overage="excess")
    assert {(revision.counts.value, revision.overage.value) for revision in read.revisions} == {("all", "excess")}
    same = ("name", "starts", "ends", "window", "reasons", "groups", "aliases", "o_series", "after", "before")
    assert [[getattr(revision, field) for field in same] for revision in read.revisions] == [
        [getattr(revision, field) for field in same] for revision in offer.revisions
    ]
    assert [revision.counts for revision in offer.reading().revisions] == [
        revision.counts for revision in offer.revisions
    ]


# -- finding a file


@pytest.mark.parametrize(
    "name", ["openai", "OPENAI-DATA-SHARING", "openai-data-sharing ", "", "../config/openai-evals", "nowhere.toml"]
)
def test_unknown_offer(name):
    """A name that is neither shipped nor the path of a file is refused, and the message lists what is shipped."""
    with pytest.raises(OfferError) as raised:
        load(name)
    listed = ", ".join(shipped())
    assert str(raised.value) == f"{name}: offer: no such offer; expected a path to a .toml file, or one of {listed}"


@pytest.mark.parametrize("name", ["offer.txt", "offer", "folder.toml"])
def test_what_is_no_toml_file(name, tmp_path):
    """A file that does not end in .toml, and a folder that does, are refused."""
    if name == "folder.toml":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text(SMALLEST, encoding="utf-8")
    with pytest.raises(OfferError, match="no such offer"):
        load(tmp_path / name)


def test_file_that_is_not_utf8(tmp_path):
    """A file in another encoding is refused as such."""
    path = tmp_path / "latin.toml"
    path.write_bytes(SMALLEST.replace("smallest", "kleinste \u00e4").encode("latin-1"))
    with pytest.raises(OfferError) as raised:
        load(path)
    assert (raised.value.file, raised.value.key, raised.value.expected) == (str(path), "the file", "UTF-8 text")


def test_file_that_is_too_large(tmp_path):
    """A file of more than 1 MiB is not read as an offer."""
    path = tmp_path / "large.toml"
    path.write_text(SMALLEST + "#" * FILE_BYTES_MAX, encoding="utf-8")
    with pytest.raises(OfferError) as raised:
        load(path)
    assert str(raised.value) == f"{path}: the file: {path.stat().st_size} bytes; expected at most {FILE_BYTES_MAX}"


def test_offer_by_path(tmp_path):
    """An offer of one's own is loaded by its path, and errors in it name that path."""
    path = tmp_path / "smallest.toml"
    path.write_text(SMALLEST, encoding="utf-8")
    assert load(path).name == "smallest"
    path.write_text(SMALLEST.replace("free", "fee"), encoding="utf-8")
    with pytest.raises(OfferError) as raised:
        load(path)
    assert (raised.value.file, raised.value.line) == (str(path), 10)
