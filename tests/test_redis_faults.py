"""Whatever fails at a server, nothing is half, and nobody is told what is not so."""

from __future__ import annotations

import re
from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

from gratis import (
    Conflict,
    Decision,
    Enrollment,
    GratisError,
    Meter,
    NotExecuted,
    OutcomeUnknown,
    Request,
    Sharing,
    StoreError,
)
from gratis.errors import UnreadableEntry
from gratis.model import Durability
from gratis.stores import Bounds
from gratis.stores.redis.layout import read_counters
from gratis.testing.compare import follows, plain
from gratis.testing.scene import DAY, ENROLLED, NOON, SMALL, TICK, asked, small_offer

from .bench import ERRORS, EVER, SHARD, Bench, Fault, altered, check, faults_of, text_of
from .servers import Server, binaries

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BINARIES = binaries()
KEEP = Bounds().keep


@pytest.fixture(scope="module", params=BINARIES)
def server(request) -> Iterator[Server]:
    """A server of each kind."""
    with Server(BINARIES[request.param]) as started:
        yield started


@pytest.fixture
def bench(server) -> Iterator[Bench]:
    """A bench at a server that nobody has used."""
    made = Bench(server)
    made.reset()
    yield made
    made.close()


# -- Requests that are asked while calls fail


@dataclass
class Scene:
    """Requests that were decided before, and what is asked then, alone or in one call."""

    before: list[Request]
    asks: list[Request]
    is_behind: bool = False
    """Whether the state has missed the last call of `before`."""
    is_outdated: bool = False
    """Whether the enrollment changed meanwhile."""
    is_large: bool = False
    """Whether what is asked makes more than one entry."""


LATER = NOON + DAY
FIRST = asked(1, 400)
MIXED = [
    FIRST,
    asked(2, 300),
    asked(3, 700, at=LATER),
    asked(2, 300),
    asked(1, 401),
    asked(4, 5, model="unlisted"),
    asked(5, 900, at=LATER),
    asked(6, 20, model=SMALL, account="other"),
]
SCENES = {
    "the first of all": Scene([], [FIRST]),
    "in an open window": Scene([FIRST], [asked(2, 300)]),
    "opens a window": Scene([FIRST], [asked(2, 300, at=LATER)]),
    "a repeat": Scene([FIRST], [FIRST]),
    "a conflict": Scene([FIRST], [asked(1, 401)]),
    "a batch": Scene([FIRST], MIXED),
    "outdated": Scene([FIRST], [asked(2, 300), asked(3, 300)], is_outdated=True),
    "a large batch": Scene([FIRST], [asked(number, number % 70, at=LATER) for number in range(2, 58)], is_large=True),
    "a mend": Scene([FIRST, asked(2, 300), asked(3, 300)], [asked(4, 5, at=LATER)], is_behind=True),
    "a batch on a mend": Scene([FIRST, asked(2, 300)], MIXED, is_behind=True),
    "a mend of what is asked": Scene([FIRST, asked(2, 300)], [asked(2, 300)], is_behind=True),
}
SCRIPTS_OF = {name: ("apply.lua", "swap.lua") if scene.is_behind else ("apply.lua",) for name, scene in SCENES.items()}


def prepared(bench: Bench, scene: Scene, window: str, *, options: str = "") -> Meter:
    """A meter that knows of all that was decided before."""
    bench.reset()
    bench.clock.now = LATER
    meter = bench.meter(window, options=options)
    meter.decide_many(scene.before[:1])
    known = bench.raw.ask("DUMP", SHARD.state) if scene.before else None
    if scene.before[1:]:
        meter.decide_many(scene.before[1:])
    if scene.is_behind:
        bench.raw.ask("RESTORE", SHARD.state, 0, known, "REPLACE")
    if scene.is_outdated:
        bench.meter(window).enroll("acme", Enrollment(tier=1, sharing=Sharing.ENABLED), actor="ann")
    return meter


def ask(meter: Meter, requests: list[Request]) -> list[Any]:
    """What requests are answered: each its decision or error, all the same one where the whole call failed."""
    try:
        return list(meter.decide_many(requests)) if len(requests) > 1 else [meter.decide(requests[0])]
    except GratisError as error:
        return [error] * len(requests)


def calls_of(bench: Bench, meter: Meter, script: str, requests: list[Request]) -> int:
    """How many calls a script makes, when these are asked."""
    with bench.failing(meter, script, Fault(0, 0)):
        ask(meter, requests)
    return int(bench.raw.ask("GET", "calls"))


def check_answers(bench: Bench, scene: Scene, window: str, answers: list[Any], before: dict[bytes, Any]) -> None:
    """What was answered is so, nothing is half, and asking again gives what follows from it."""
    kept = bench.raw.ledger()
    assert [one.number for one in kept] == list(range(1, len(kept) + 1))
    ids = [one.id for one in kept]
    assert len(set(ids)) == len(ids)
    if isinstance(answers[0], StoreError):
        after = bench.raw.contents()
        changes = {key for key in before | after if before.get(key) != after.get(key)}
        if isinstance(answers[0], NotExecuted):
            assert changes <= ({SHARD.state} if scene.is_behind else set()), "what was not executed has written nothing"
        else:  # where there was more than one step
            assert isinstance(answers[0], OutcomeUnknown)
            assert scene.is_outdated or scene.is_large
    meter = bench.meter(window)
    again = ask(meter, scene.asks)
    for request, answer, second in zip(scene.asks, answers, again, strict=True):
        assert not isinstance(second, StoreError), second
        if isinstance(answer, Decision):
            assert request.id in ids
            assert second == replace(answer, replayed=True)
        elif isinstance(answer, Conflict):
            assert plain(second) == plain(answer)
        elif isinstance(second, Decision):
            assert second.replayed == (request.id in ids)
            ids.append(request.id)
        else:
            assert request.id in ids
            assert isinstance(second, Conflict), second
    check(meter)


@pytest.mark.parametrize("window", ["day", "rolling"])
@pytest.mark.parametrize("name", SCENES)
def test_a_call_that_fails_leaves_nothing_half(bench, name, window):
    """Whichever call of a script fails, alone or with all after it: what was told is so, and the rest is asked anew."""
    scene = SCENES[name]
    for script in SCRIPTS_OF[name]:
        count = calls_of(bench, prepared(bench, scene, window), script, scene.asks)
        assert count >= 2
        for fault in faults_of(count):
            meter = prepared(bench, scene, window)
            before = bench.raw.contents()
            with bench.failing(meter, script, fault):
                answers = ask(meter, scene.asks)
            assert int(bench.raw.ask("GETDEL", "calls")) >= fault.first
            check_answers(bench, scene, window, answers, before)


@pytest.mark.parametrize("window", ["day", "rolling"])
def test_a_question_whose_call_fails_changes_nothing(bench, window):
    """Whichever call fails, explaining writes nothing; what it tells is so."""
    scene = Scene([FIRST], [asked(2, 601)])
    expected = prepared(bench, scene, window).explain(scene.asks[0])
    with bench.failing(meter := prepared(bench, scene, window), "apply.lua", Fault(0, 0)):
        meter.explain(scene.asks[0])
    for fault in faults_of(int(bench.raw.ask("GET", "calls"))):
        meter = prepared(bench, scene, window)
        before = bench.raw.contents()
        with bench.failing(meter, "apply.lua", fault), pytest.raises(NotExecuted):
            meter.explain(scene.asks[0])
        bench.raw.ask("DEL", "calls")
        assert bench.raw.contents() == before
        assert meter.explain(scene.asks[0]) == expected


def test_an_enrollment_whose_change_fails_is_what_it_was(bench):
    """Whichever call fails, an account has the enrollment that was told last, and may change it then."""
    second = Enrollment(tier=1, sharing=Sharing.ENABLED)

    def enrolled() -> Meter:
        bench.reset()
        meter = bench.meter(assume=None)
        meter.enroll("acme", ENROLLED, actor="ann")
        meter.decide(FIRST)
        return meter

    with bench.failing(meter := enrolled(), "swap.lua", Fault(0, 0)):
        meter.enroll("acme", second, actor="ann")
    for fault in faults_of(int(bench.raw.ask("GET", "calls"))):
        meter = enrolled()
        before = bench.raw.contents()
        with bench.failing(meter, "swap.lua", fault), pytest.raises(NotExecuted):
            meter.enroll("acme", second, actor="ann")
        bench.raw.ask("DEL", "calls")
        assert bench.raw.contents() == before
        other = bench.meter(assume=None)
        assert [change.enrollment.tier for change in other.enrollments("acme")] == [3]
        assert other.decide(asked(2, 600)).is_free
        assert other.enroll("acme", second, actor="ann").version == 2
        assert meter.decide(asked(3, 1)).terms.allowance == 250
        check(other)


@pytest.mark.parametrize("text", ERRORS, ids=lambda text: text.split()[0])
def test_a_store_whose_scripts_fail_is_not_opened(bench, text):
    """While a script fails, opening is refused with the server's words; afterwards the store is as new as before."""
    fault = Fault(1, EVER, text)
    texts = {"swap.lua": fault.planted_in(text_of("swap.lua"))}
    bench.raw.load(texts)
    with altered(texts), pytest.raises(NotExecuted) as caught:
        bench.store()
    assert text in str(caught.value)
    assert bench.raw.state() == {}
    meter = bench.meter()
    assert meter.decide(FIRST).seq == 1
    check(meter)


# -- Trimming, while calls fail

WEEKS = NOON + KEEP + 2 * DAY
OLD = [asked(1, 400), asked(2, 300), asked(3, 20, model=SMALL, account="other")]
NEW = [asked(4, 100, at=WEEKS), asked(5, 7, model=SMALL, at=WEEKS)]


def weeks_later(bench: Bench, window: str) -> Meter:
    """A meter whose first three decisions nobody can ask for any more."""
    bench.reset()
    meter = bench.meter(window)
    meter.decide_many(OLD[:2])
    meter.decide(OLD[2])
    bench.clock.now = WEEKS
    meter.decide_many(NEW)
    return meter


def index_of(bench: Bench) -> list[int]:
    """The numbers of the decisions that the index knows."""
    found = []
    for name, value in bench.raw.state().items():
        if name.startswith(b"i"):
            assert len(value) % 10 == 0
            found += [int.from_bytes(value[place + 5 : place + 10]) for place in range(0, len(value), 10)]
    return sorted(found)


def check_forgotten(bench: Bench, window: str) -> None:
    """What was to be forgotten is, all else is there, and goes on."""
    state = bench.raw.state()
    assert read_counters(state[b"n"]).base == 3
    assert index_of(bench) == [4, 5]
    listed = {name[1:] + b"\0" + one for name in state if name[:1] == b"l" for one in state[name].split(b"\n")[:-1]}
    assert {name[1:] for name in state if name[:1] == b"t"} == listed
    meter = check_goes_on(bench, window)
    follows(meter._store, [meter.offer.name])


def check_goes_on(bench: Bench, window: str) -> Meter:
    """The ledger goes on where the trim ended, and decisions where the others did."""
    meter = bench.meter(window)
    assert [one.number for one in bench.raw.ledger()] == [4, 5]
    assert [entry.decision.id for entry in meter.ledger()] == ["r4", "r5"]
    assert all(answer.replayed for answer in meter.decide_many(NEW))
    asks = [asked(6, 1, at=WEEKS), asked(7, 2, model=SMALL, account="other", at=WEEKS)]
    assert [(one.seq, one.used) for one in meter.decide_many(asks)] == [(2, 101), (1, 2)]
    return meter


@pytest.mark.parametrize("script", ["swap.lua", "trim.lua"])
@pytest.mark.parametrize("window", ["day", "rolling"])
def test_a_trim_that_fails_is_trimmed_the_next_time(bench, window, script):
    """Whichever call fails, nothing is forgotten that may be asked for, and the next trim goes on."""
    with bench.failing(meter := weeks_later(bench, window), script, Fault(0, 0)):
        assert meter._store.trim(3) == (3,)
    count = int(bench.raw.ask("GETDEL", "calls"))
    check_forgotten(bench, window)
    for fault in faults_of(count):
        meter = weeks_later(bench, window)
        with bench.failing(meter, script, fault), pytest.raises(NotExecuted):
            meter._store.trim(3)
        bench.raw.ask("DEL", "calls")
        other = bench.meter(window)
        assert all(answer.replayed for answer in other.decide_many(NEW))
        assert other._store.trim(3) == (3,)
        check_goes_on(bench, window)


@pytest.mark.parametrize("script", ["swap.lua", "trim.lua"])
def test_what_is_late_is_never_free_after_a_trim_that_failed(bench, script):
    """Whichever call fails, what is asked of a window that is kept no longer is neither free again nor counted."""
    with bench.failing(meter := weeks_later(bench, "day"), script, Fault(0, 0)):
        meter._store.trim(3)
    for fault in faults_of(int(bench.raw.ask("GET", "calls"))):
        for is_trimmed_again in (False, True):
            meter = weeks_later(bench, "day")
            with bench.failing(meter, script, fault), pytest.raises(NotExecuted):
                meter._store.trim(3)
            if is_trimmed_again:
                meter._store.trim(3)
            late = ask(bench.meter(), OLD)
            found = [one.replayed or one.reason for one in late if isinstance(one, Decision)]
            assert set(found) <= {True, "too_late"}, fault


# -- Rights

RIGHTS = ("xadd", "hset", "hget", "hmget", "xrange", "hdel", "xtrim", "xlen", "zadd", "zrem", "zrangebylex")
SCRIPT_RIGHTS = ("eval", "evalsha", "info", "time", "hsetnx")
USER = "&username=gratis&password=word&wait=0.5"


def permit(bench: Bench, *without: str) -> None:
    """The user may do everything but this."""
    rights = ("reset", "on", ">word", "~*", "+@all", *(f"-{command}" for command in without))
    bench.raw.ask("ACL", "SETUSER", "gratis", *rights)


@pytest.fixture
def user(bench) -> Iterator[Bench]:
    """A bench at a server that knows a user."""
    permit(bench)
    yield bench
    bench.close_stores()
    bench.raw.ask("ACL", "DELUSER", "gratis")


@pytest.mark.parametrize("command", [*RIGHTS, *SCRIPT_RIGHTS])
def test_who_lacks_a_right_is_told_which(user, command):
    """Opening is refused with the right's name, and writes nothing; before 7.0 a server cannot tell of each right."""
    can_tell = user.raw.ask("COMMAND", "INFO", "EVAL_RO")[0] is not None
    if command == "eval":  # without it a script cannot be sent where the server does not know it
        user.raw.ask("SCRIPT", "FLUSH")
    permit(user, command)
    if can_tell or command not in RIGHTS:
        with pytest.raises(NotExecuted, match=rf"(?i)\b{command}\b"):
            user.meter(options=USER)
        assert user.raw.state() == {}
    else:
        with suppress(NotExecuted):
            ask(user.meter(options=USER), [FIRST])
    permit(user)
    user.raw.load({})
    again = user.meter(options=USER)
    again.decide(FIRST)
    assert again.decide(asked(2, 1)).seq == 2
    check(again)


def test_without_the_right_to_read_settings_a_store_claims_less(user):
    """Who may not run CONFIG GET cannot know that a server syncs each write, and is not refused."""
    permit(user, "config")
    store = user.store(options=USER)
    assert store.durability is Durability.VOLATILE
    assert user.meter(options=USER).decide(FIRST).seq == 1


@pytest.mark.parametrize("command", [*RIGHTS, *SCRIPT_RIGHTS])
def test_a_right_that_is_withdrawn_leaves_nothing_half(user, command):
    """Whoever lacks a right while he asks: what was told is so, and the rest is asked anew."""
    for scene in SCENES.values():
        for window in ("day", "rolling"):
            permit(user)
            meter = prepared(user, scene, window, options=USER)
            before = user.raw.contents()
            permit(user, command)
            answers = ask(meter, scene.asks)
            permit(user)
            check_answers(user, scene, window, answers, before)


# -- A file that was cut off

CUTS_EACH = 64
LAST_TWO = (
    [asked(3, 100, model=SMALL, at=LATER)],
    [asked(4, 700, at=LATER), asked(5, 301, at=LATER), asked(6, 300, at=LATER)],
)


def the_file(server: Server) -> Path:
    """The file to which a server appends: one of a folder of them from Redis 7 on."""
    (found,) = [*server.folder.glob("appendonly.aof"), *server.folder.glob("appendonlydir/*.incr.aof")]
    return found


@pytest.mark.parametrize("name", BINARIES)
def test_a_file_that_is_cut_anywhere_has_whole_calls(name):
    """Wherever the file of a server ends, its keys are those after whole calls, and it goes on from there."""
    with Server(BINARIES[name], {"appendonly": "yes", "appendfsync": "always"}) as server:
        bench = Bench(server)
        bench.clock.now = LATER
        meter = bench.meter()
        assert meter.durability is Durability.SYNCED
        meter.decide_many([FIRST, asked(2, 1, at=LATER)])
        contents, ends = [bench.raw.contents()], [the_file(server).stat().st_size]
        for requests in LAST_TWO:
            meter.decide_many(requests)
            contents.append(bench.raw.contents())
            ends.append(the_file(server).stat().st_size)
        data = the_file(server).read_bytes()
        assert ends[2] == len(data)
        commands = {ends[0] + found.start() for found in re.finditer(rb"\*\d+\r\n\$\d+\r\n[A-Z]+\r\n", data[ends[0] :])}
        assert len(commands) == 8
        edges = {place + step for place in (*commands, *ends) for step in (-1, 0, 1)}
        for cut in range(ends[0], ends[2] + 1):
            is_edge = cut in edges or cut % CUTS_EACH == 0
            if not is_edge and name != next(iter(BINARIES)):
                continue
            bench.close()
            server.kill()
            the_file(server).write_bytes(data[:cut])
            server.restart()
            bench.connect()
            calls = bisect_right(ends, cut) - 1
            assert bench.raw.contents() == contents[calls], cut
            if is_edge:
                check_after_a_cut(bench, calls)
        bench.close()


def check_after_a_cut(bench: Bench, calls: int) -> None:
    """Asked again, what is in the file is repeated and what is not is decided; both are there after a kill."""
    meter = bench.meter()
    for place, requests in enumerate(LAST_TWO):
        assert [answer.replayed for answer in meter.decide_many(requests)] == [place < calls] * len(requests)
    bench.close()
    bench.server.kill()
    bench.server.restart()
    bench.connect()
    meter = bench.meter()
    check(meter)
    assert [entry.decision.id for entry in meter.ledger()] == [f"r{number}" for number in range(1, 7)]


# -- A state that is gone, or behind, or not ours

SEVERAL = [
    [FIRST],
    [asked(2, 300), asked(3, 700, at=LATER), asked(4, 5, model="unlisted")],
    [asked(5, 20, model=SMALL, account="other")],
    [asked(6, 1_001, account="billed")],
    [asked(7, 301, at=LATER), asked(8, 300, at=LATER)],
]


def decided(bench: Bench, window: str, *, assume: Enrollment | None = ENROLLED) -> Meter:
    """A meter that decided several calls, at one time."""
    bench.reset()
    bench.clock.now = LATER
    meter = bench.meter(window, assume=assume)
    for requests in SEVERAL:
        meter.decide_many(requests)
    return meter


def without_order(state: dict[bytes, bytes]) -> dict[bytes, object]:
    """A state, but for the order in which an account's windows are listed."""
    return {name: sorted(value.split(b"\n")) if name[:1] == b"l" else value for name, value in state.items()}


@pytest.mark.parametrize("window", ["day", "rolling"])
def test_a_state_that_is_gone_is_not_guessed(bench, window):
    """Without its state, with the enrollments, a shard decides nothing, and nobody opens it; with it, it goes on."""
    meter = decided(bench, window)
    state = bench.raw.ask("DUMP", SHARD.state)
    first = list(meter.ledger())
    bench.raw.ask("DEL", SHARD.state)
    before = bench.raw.contents()
    for requests in (SEVERAL[0], SEVERAL[1], [asked(9, 1, at=LATER)]):
        for answer in ask(meter, requests):
            assert isinstance(answer, StoreError)
            assert "gone" in str(answer)
    with pytest.raises(StoreError, match="gone"):
        meter.explain(asked(9, 1, at=LATER))
    with pytest.raises(StoreError, match="gone"):
        bench.store()
    assert bench.raw.contents() == before
    bench.raw.ask("RESTORE", SHARD.state, 0, state)
    assert meter.decide(FIRST).replayed
    assert meter.decide(asked(9, 1, at=LATER)).seq == 4
    assert list(bench.meter(window).ledger())[:-1] == first
    check(meter)


@pytest.mark.parametrize("window", ["day", "rolling"])
def test_the_state_of_a_first_call_follows_from_the_ledger(bench, window):
    """A shard that has but one entry and no state missed its first call; whoever asks next derives it."""
    for requests in (MIXED[1:4], [asked(9, 1, at=LATER)]):
        for is_open in (True, False):
            bench.reset()
            bench.clock.now = LATER
            meter = bench.meter(window)
            first = meter.decide_many([FIRST, *MIXED[1:3]])
            before = bench.raw.state()
            bench.raw.ask("DEL", SHARD.state)
            meter = meter if is_open else bench.meter(window)
            for answer in ask(meter, requests):
                assert answer.replayed == (answer.id != "r9")
            if requests[0].id != "r9":
                assert without_order(bench.raw.state()) == without_order(before)
            assert [entry.decision for entry in meter.ledger()][:3] == first
            check(meter)


@pytest.mark.parametrize("window", ["day", "rolling"])
def test_a_state_that_is_behind_follows_at_the_next_call(bench, window):
    """Whichever of its earlier states a shard has, after the next call it has the last one."""
    bench.reset()
    bench.clock.now = LATER
    meter = bench.meter(window)
    dumps: list[bytes] = []
    for requests in SEVERAL:
        meter.decide_many(requests)
        dumps.append(bench.raw.ask("DUMP", SHARD.state))
    expected = without_order(bench.raw.state())
    for dump in dumps:
        bench.raw.ask("RESTORE", SHARD.state, 0, dump, "REPLACE")
        assert meter.decide(FIRST).replayed
        assert without_order(bench.raw.state()) == expected
        bench.raw.ask("RESTORE", SHARD.state, 0, dump, "REPLACE")
        other = bench.meter(window)
        with pytest.raises(Conflict):
            other.decide(asked(8, 299, at=LATER))
        assert without_order(bench.raw.state()) == expected
        check(other)


@pytest.mark.parametrize("window", ["day", "rolling"])
def test_a_ledger_that_is_gone_makes_nothing_free(bench, window):
    """Without its ledger a shard is not opened; who has it open counts on, is told no repeat, and what is gone."""
    meter = decided(bench, window)
    bench.raw.ask("DEL", SHARD.ledger)
    before = bench.raw.contents()
    with pytest.raises(StoreError, match="its ledger is gone"):
        bench.store()
    for requests in (SEVERAL[0], SEVERAL[1], [asked(1, 401)], [asked(9, 1, at=LATER), FIRST]):
        for answer in ask(meter, requests):
            assert type(answer) is NotExecuted
    assert bench.raw.contents() == before
    later = meter.decide(asked(9, 1, at=LATER))
    assert (later.is_free, later.used, later.seq) == (False, 1_000, 4)
    assert [one.number for one in bench.raw.ledger()] == [9]
    with pytest.raises(UnreadableEntry, match="entries 1 to 8 are gone"):
        list(meter.ledger())
    assert [entry.decision.id for entry in meter.ledger(after=8)] == ["r9"]


LOST = {
    "its keys": ("DEL", SHARD.state, SHARD.ledger, SHARD.holds),
    "what was decided": ("DEL", SHARD.state, SHARD.ledger),
    "all keys": ("FLUSHALL",),
}


@pytest.mark.parametrize("words", LOST.values(), ids=LOST)
@pytest.mark.parametrize("window", ["day", "rolling"])
def test_what_a_server_lost_is_not_decided_anew(bench, window, words):
    """Who saw decisions that are gone is refused whatever he asks, and nothing is written."""
    for requests in (SEVERAL[0], SEVERAL[1], [asked(9, 1, at=LATER)]):
        meter = decided(bench, window)
        bench.raw.ask(*words)
        before = bench.raw.contents()
        for answer in ask(meter, requests):
            assert isinstance(answer, StoreError)
            assert "decision 8 was seen" in str(answer)
        with pytest.raises(StoreError, match="decision 8 was seen"):
            meter.explain(requests[0])
        assert bench.raw.contents() == before


def test_an_older_copy_is_not_decided_on(bench):
    """Who saw decisions that an older copy of the keys has not is refused until they are there again."""
    meter = decided(bench, "day")
    dumps = [(key, bench.raw.ask("DUMP", key)) for key in (SHARD.state, SHARD.ledger)]
    last = meter.decide(asked(9, 1, at=LATER))
    newer = [(key, bench.raw.ask("DUMP", key)) for key in (SHARD.state, SHARD.ledger)]
    for key, dump in dumps:
        bench.raw.ask("RESTORE", key, 0, dump, "REPLACE")
    before = bench.raw.contents()
    for request in (FIRST, asked(9, 1, at=LATER), asked(10, 1, at=LATER)):
        with pytest.raises(StoreError, match="decision 9 was seen"):
            meter.decide(request)
    assert bench.raw.contents() == before
    for key, dump in newer:
        bench.raw.ask("RESTORE", key, 0, dump, "REPLACE")
    assert meter.decide(asked(9, 1, at=LATER)) == replace(last, replayed=True)


OTHER_TYPES = {
    "string": ("SET", "x"),
    "list": ("RPUSH", "x"),
    "set": ("SADD", "x"),
    "sorted set": ("ZADD", 1, "x"),
    "hash": ("HSET", "x", "y"),
    "stream": ("XADD", "1-0", "x", "y"),
}


def kept(bench, name):
    """What a key holds; of a hash its fields, since their order is the server's."""
    if bench.raw.ask("TYPE", name) == b"hash":
        fields = bench.raw.ask("HGETALL", name)
        return dict(zip(fields[::2], fields[1::2], strict=True))
    return bench.raw.ask("DUMP", name)


@pytest.mark.parametrize("key", ["state", "ledger"])
@pytest.mark.parametrize("kind", OTHER_TYPES)
def test_a_key_of_another_type_is_left_alone(bench, key, kind):
    """Where a key of another type stands in the place of one of ours, all is refused and nothing is written."""
    name = getattr(SHARD, key)
    command, *rest = OTHER_TYPES[{("state", "hash"): "stream", ("ledger", "stream"): "hash"}.get((key, kind), kind)]
    for is_empty in (True, False):
        meter = bench.meter() if is_empty else decided(bench, "day")
        bench.clock.now = LATER
        bench.raw.ask("DEL", name)
        bench.raw.ask(command, name, *rest)
        before = {one: kept(bench, one) for one in (SHARD.state, SHARD.ledger)}
        for requests in (SEVERAL[0], SEVERAL[1], [asked(9, 1, at=LATER)]):
            for answer in ask(meter, requests):
                assert type(answer) is NotExecuted, answer
        with pytest.raises(NotExecuted, match="WRONGTYPE"):
            meter.enroll("acme", ENROLLED, actor="ann")
        with pytest.raises(NotExecuted, match="WRONGTYPE"):
            meter._store.trim(1)
        with pytest.raises(NotExecuted, match="WRONGTYPE"):
            bench.store()
        assert {one: kept(bench, one) for one in (SHARD.state, SHARD.ledger)} == before
        bench.reset()


def test_a_foreign_field_changes_nothing(bench):
    """A field that is none of ours is neither read nor lost."""
    expected = without_order((decided(bench, "day"), bench.raw.state())[1])
    bench.reset()
    names = (b"zzz", b"N", b"t", b"l", b"w0", b"a", b"\xff\x00")
    for name in names:
        bench.raw.ask("HSET", SHARD.state, name, "no number")
    bench.clock.now = LATER
    meter = bench.meter()
    for requests in SEVERAL:
        meter.decide_many(requests)
    state = bench.raw.state()
    assert [state.pop(name) for name in names] == [b"no number"] * len(names)
    assert without_order(state) == expected


SPAN = "001745107200000000 001745193600000000"
NO_TALLIES = (
    "", "nan", "1e3", "-1", " ", f"nan 1 {SPAN}", f"1e3 1 {SPAN}", f"-1 1 {SPAN}", f"1.5 1 {SPAN}", f"0x10 1 {SPAN}",
    f"inf 1 {SPAN}", f"1 {SPAN}", f"1 1 {SPAN} ", f" 1 1 {SPAN}", f"1 1 {SPAN[1:]}", f"1 -1 {SPAN}", f"1  {SPAN}",
    f"99999999999999999 1 {SPAN}", f"1 9999999999999999 {SPAN}", "1 1 001745107200000000  01745193600000000",
)  # fmt: skip


@pytest.mark.parametrize("window", ["day", "rolling"])
def test_a_tally_that_is_no_number_is_not_counted_on(bench, window):
    """Where a tally cannot be read, its window decides nothing and nothing is written; all others go on."""
    meter = bench.meter(window)
    meter.decide(FIRST)
    (field,) = [name for name in bench.raw.state() if name[:1] == b"t"]
    for number, text in enumerate(NO_TALLIES):
        bench.raw.ask("HSET", SHARD.state, field, text)
        before = bench.raw.contents()
        for requests in ([asked(2, 1)], [asked(3, 1, model=SMALL), asked(2, 1)], [asked(2, 5_000)]):
            for answer in ask(meter, requests):
                assert type(answer) is NotExecuted, text
                assert "a tally cannot be read" in str(answer)
        with pytest.raises(NotExecuted, match="a tally cannot be read"):
            meter.explain(asked(2, 1))
        assert bench.raw.contents() == before
        assert meter.decide(FIRST).replayed
        assert meter.decide(asked(f"other {number}", 1, model=SMALL)).seq == number + 1


@pytest.mark.parametrize("text", ["", "x", "1 0 2", "-1 0 2 1 ", "nan 0 2 1 ", "1e0 0 2 1 ", "1 0 2 11 ", "1 0 2 1 x"])
def test_counters_that_cannot_be_read_are_not_counted_on(bench, text):
    """Where a shard's counters cannot be read, nothing is decided or forgotten, and nothing is written."""
    meter = bench.meter()
    meter.decide(FIRST)
    bench.raw.ask("HSET", SHARD.state, "n", text)
    before = bench.raw.contents()
    for requests in ([FIRST], [asked(2, 1)], [asked(2, 1), FIRST]):
        for answer in ask(meter, requests):
            assert type(answer) is NotExecuted
            assert "counters cannot be read" in str(answer)
    assert bench.raw.contents() == before


def test_an_entry_of_a_stranger_is_not_decided_on(bench):
    """Where somebody else appended to the ledger, nothing is decided on top of it, and nothing is written."""
    for place, fields in (("2-0", ("x", "y")), ("1000-0", ("x", "y")), ("*", ("x", "y"))):
        bench.reset()
        meter = bench.meter()
        meter.decide(FIRST)
        bench.raw.ask("XADD", SHARD.ledger, place, *fields)
        before = bench.raw.contents()
        with pytest.raises(StoreError, match="expected no gap; nothing was written"):
            meter.decide(asked(2, 1))
        assert bench.raw.contents() == before
        assert meter.decide(FIRST).replayed


# -- What may be forgotten


@pytest.mark.parametrize("window", ["day", "week", "month"])
def test_a_trim_forgets_what_nobody_can_ask_for(bench, window):
    """To the microsecond: what ended as long ago as windows are kept is forgotten, and its requests are too late."""
    bench.reset()
    meter = bench.meter(window)
    first = meter.decide(FIRST)
    meter.decide_many([asked(2, 300), asked(3, 1_001, account="other")])
    bench.clock.now = first.window.end - TICK
    meter.decide(asked(4, 5, at=bench.clock.now))
    bench.clock.now = first.window.end
    meter.decide(asked(5, 7, at=bench.clock.now))
    bench.clock.now = first.window.end + KEEP - TICK
    before = bench.raw.contents()
    assert meter._store.trim(5) == (0,)
    assert bench.raw.contents() == before
    assert meter.decide(FIRST).replayed
    assert meter.decide(asked("just in time", 1)).seq == 4
    bench.clock.now += TICK
    assert meter._store.trim(6) == (4,)
    assert [one.number for one in bench.raw.ledger()] == [5, 6]
    assert index_of(bench) == [5, 6]
    late = meter.decide_many([asked(1, 401), asked(3, 1_001, account="other"), asked("never seen", 1)])
    assert [(one.replayed, one.reason, one.free_tokens, one.seq) for one in late] == [(False, "too_late", 0, None)] * 3
    assert [entry.entry for entry in meter.ledger()] == [5, 6, 7, 8, 9]
    assert [entry.entry for entry in meter.ledger(after=5)] == [6, 7, 8, 9]
    assert meter.decide(asked(6, 3, at=bench.clock.now)).seq == (2 if window == "month" else 1)
    assert meter.decide(asked(5, 7, at=first.window.end)).replayed


@pytest.mark.parametrize("window", ["day", "rolling"])
def test_a_trim_stops_at_what_was_not_stored(bench, window):
    """Behind what the consumer has stored nothing is forgotten, an entry of several decisions as a whole."""
    for stored, expected in ((0, 0), (1, 1), (2, 1), (3, 1), (4, 4), (5, 5), (99, 6)):
        bench.reset()
        meter = bench.meter(window)
        meter.decide(FIRST)
        meter.decide_many([asked(2, 1), asked(3, 1), asked(4, 1)])
        for number in (5, 6):
            meter.decide(asked(number, 1))
        bench.clock.now = WEEKS
        meter.decide(asked(7, 1, at=WEEKS))
        assert meter._store.trim(stored) == (expected,)
        assert [one.number for one in bench.raw.ledger()] == list(range(expected + 1, 8))
        assert index_of(bench) == list(range(expected + 1, 8))
        assert meter._store.trim(stored) == (expected,)
        assert meter._store.trim(0) == (expected,)


@pytest.mark.parametrize("window", ["day", "rolling"])
def test_what_is_not_over_holds_back_what_comes_later(bench, window):
    """The ledger is forgotten from its front: behind a decision that may be asked for, all stays."""
    bench.clock.now = WEEKS
    meter = bench.meter(window)
    meter.decide(asked(1, 1, at=WEEKS))
    bench.clock.now = NOON
    meter.decide(asked(2, 1))
    bench.clock.now = WEEKS + DAY
    assert meter._store.trim(2) == (0,)
    assert [one.number for one in bench.raw.ledger()] == [1, 2]
    assert all(answer.replayed for answer in meter.decide_many([asked(1, 1, at=WEEKS), asked(2, 1)]))


def test_what_was_forgotten_stays_too_late_by_an_earlier_clock(bench):
    """After a trim, a machine whose clock is behind cannot make free again what was forgotten."""
    meter = bench.meter()
    meter.decide(FIRST)
    bench.clock.now = WEEKS
    assert meter._store.trim(1) == (1,)
    bench.clock.now = NOON
    for one in (meter, bench.meter(), Meter(bench.store(bounds=None), small_offer(), assume=ENROLLED)):
        found = one.decide_many([FIRST, asked(2, 1)])
        assert {answer.reason for answer in found} == {"too_late"}
    assert meter._store.trim(9) == (1,)


@pytest.mark.parametrize("window", ["day", "rolling"])
def test_a_trim_gives_memory_back(bench, window):
    """What is forgotten takes no memory any more, but for a word for each account and each fact."""
    meter = bench.meter(window)
    for first in range(0, 9_000, 1_000):
        meter.decide_many([asked(number, 0, account=f"{number % 7}") for number in range(first, first + 1_000)])
    bench.clock.now = WEEKS
    asks = [asked(f"new {number}", 0, account=f"{number % 7}", at=WEEKS) for number in range(100)]
    new = meter.decide_many(asks)
    used = [bench.raw.ask("MEMORY", "USAGE", key, "SAMPLES", 0) for key in (SHARD.state, SHARD.ledger)]
    assert meter._store.trim(9_000) == (9_000,)
    left = [bench.raw.ask("MEMORY", "USAGE", key, "SAMPLES", 0) for key in (SHARD.state, SHARD.ledger)]
    assert left[0] < used[0] / 3
    assert left[1] < used[1] / 20
    assert index_of(bench) == list(range(9_001, 9_101))
    assert meter.decide_many(asks) == [replace(one, replayed=True) for one in new]
    assert meter.decide(asked("more", 0, account="3", at=WEEKS)).seq == 15
