"""Holds, corrections and claims on a server: whatever fails or is lost, each is kept once, and none blocks for ever."""

from __future__ import annotations

import re
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import pytest
from msgspec.structs import replace

from gratis import (
    Conflict,
    Decision,
    Enrollment,
    Entry,
    GratisError,
    Meter,
    NotExecuted,
    OutcomeUnknown,
    RequestError,
    Sharing,
    StoreError,
)
from gratis.audit.fold import Audit
from gratis.book import corrects
from gratis.model import Expiry, Held, Hold, Remedy
from gratis.rule import Holding, Overdue
from gratis.stores import Bounds, Status
from gratis.stores.redis.core import PROBE
from gratis.stores.redis.url import open_redis
from gratis.testing.compare import plain
from gratis.testing.scene import (
    DAY,
    ENROLLED,
    HOUR,
    NOON,
    READINGS,
    SMALL,
    TICK,
    asked,
    in_threads,
    small_offer,
    spent,
)

from .bench import ERRORS, EVER, SHARD, Bench, Fault, check, check_holds, planted, text_of
from .proxy import Proxy
from .servers import Server, binaries
from .test_redis_faults import USER, permit
from .twins import History, Twins

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from gratis.rule import Charge
    from gratis.stores import Receipt
    from gratis.stores.redis import RedisStore

BINARIES = binaries()
MINUTE = timedelta(minutes=1)
MINE = uuid4().hex
SCRIPTS = ("apply.lua", "hold.lua", "swap.lua")
each_window = pytest.mark.parametrize("window", ["day", "rolling"])


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


# -- Calls that fail


class Scene(NamedTuple):
    """What was done before, what is asked then, and what a shard says of it."""

    before: Callable[[Bench, Meter], Any]
    ask: Callable[[Meter, Any], Any]


def held(size: int = 300, *, expiry: str = Expiry.DECIDED) -> Callable[[Bench, Meter], Hold]:
    """A hold is there."""
    return lambda _, meter: meter.hold(asked(1, None), size, for_=MINUTE, on_expiry=expiry)


def ran_out(size: int = 300, *, expiry: str = Expiry.DECIDED) -> Callable[[Bench, Meter], Hold]:
    """A hold has run out of time, and nobody noticed."""

    def before(bench: Bench, meter: Meter) -> Hold:
        hold = held(size, expiry=expiry)(bench, meter)
        bench.clock.now += 2 * MINUTE
        return hold

    return before


def ended(bench: Bench, meter: Meter) -> Hold:
    """A hold was decided by its bound, since it ran out of time."""
    hold = ran_out()(bench, meter)
    meter.expire("acme")
    return hold


def in_two_windows(bench: Bench, meter: Meter) -> Hold:
    """A hold is there that an earlier window admitted than the one in which others are decided by now."""
    hold = meter.hold(asked(1, None), 300, for_=DAY)
    bench.clock.now += DAY - MINUTE
    meter.extend(hold, for_=HOUR)
    bench.clock.now += 2 * MINUTE
    meter.decide(asked("second window", 50, at=bench.clock.now))
    return hold


def decided(_: Bench, meter: Meter) -> Decision:
    """A request was decided."""
    return meter.decide(asked(1, 300))


def adjusted(_: Bench, meter: Meter) -> Decision:
    """A request was corrected once."""
    meter.decide(asked(1, 300))
    return meter.adjust("r1", spent(200), actor="ann", why="a", account="acme")


def several(bench: Bench, meter: Meter) -> list[Hold]:
    """Some holds are there, of which two have run out of time."""
    holds = [meter.hold(asked(f"early {expiry}", None), 50, for_=MINUTE, on_expiry=expiry) for expiry in Expiry]
    holds += [meter.hold(asked(f"held {number}", None), 100, for_=HOUR) for number in range(3)]
    bench.clock.now += 2 * MINUTE
    return holds


def mixed(meter: Meter, holds: list[Hold]) -> list[Any]:
    """In one call, holds are made, settled, ended, made again and repeated, beside requests that are just decided."""
    soon = Holding(holds[-1].until, Expiry.DECIDED)
    ends = [Overdue(hold.tokens_max, hold.window) for hold in holds]
    return applied(
        meter,
        [
            *[charge_of(meter, hold.request, end) for hold, end in zip(holds[:2], ends[:2], strict=True)],
            charge_of(meter, asked("new", 60), soon),
            charge_of(meter, asked("plain", 70)),
            charge_of(meter, replace(holds[2].request, input_tokens=90)),
            charge_of(meter, asked("new", 60), soon),
            charge_of(meter, asked("new", 61)),
            charge_of(meter, holds[3].request, Held(100, holds[3].window, is_unmeasured=True)),
            charge_of(meter, asked("other", 5, model=SMALL, account="other"), soon),
            charge_of(meter, asked("last", 5, model=SMALL), soon),
        ],
    )


def charge_of(meter: Meter, request: Any, step: Any = None) -> Charge:
    """What a store is asked of a request."""
    return meter._book.charge(request, step)


def applied(meter: Meter, charges: list[Charge]) -> list[Any]:
    """What a store says of charges, in one call, but for the difference between the first and the second time."""
    return [
        (receipt.field, receipt.decision or receipt.hold, len(receipt.due)) for receipt in meter._store.apply(charges)
    ]


SCENES = {
    "hold": Scene(lambda *_: None, lambda meter, _: meter.hold(asked(1, None), 300, for_=MINUTE)),
    "hold the first": Scene(lambda *_: None, lambda meter, _: meter.hold(asked(1, None, account="new"), 5)),
    "hold again": Scene(held(), lambda meter, _: meter.hold(asked(1, None), 300, for_=MINUTE)),
    "hold what is decided": Scene(decided, lambda meter, _: meter.hold(asked(1, None), 300)),
    "settle": Scene(held(), lambda meter, hold: meter.settle(hold, spent(250))),
    "settle as a request": Scene(held(), lambda meter, _: meter.decide(asked(1, 250))),
    "settle in a batch": Scene(
        held(), lambda meter, _: meter.decide_many([asked(1, 250), asked(2, 10), asked(1, 250)])
    ),
    "settle more than fits": Scene(held(), lambda meter, hold: meter.settle(hold, spent(700))),
    "settle by its bound": Scene(held(), lambda meter, hold: meter.settle(hold, spent(None))),
    "settle what ran out": Scene(ran_out(), lambda meter, hold: meter.settle(hold, spent(250))),
    "settle late": Scene(ended, lambda meter, hold: meter.settle(hold, spent(250))),
    "settle in a window before": Scene(in_two_windows, lambda meter, hold: meter.settle(hold, spent(250))),
    "release": Scene(held(), lambda meter, hold: meter.release(hold)),
    "release late": Scene(ended, lambda meter, hold: meter.release(hold)),
    "release one of two": Scene(several, lambda meter, holds: meter.release(holds[3])),
    "extend": Scene(held(), lambda meter, hold: meter.extend(hold, for_=HOUR)),
    "decide after one ran out": Scene(ran_out(), lambda meter, _: meter.decide(asked(2, 10))),
    "hold after one ran out": Scene(ran_out(), lambda meter, _: meter.hold(asked(2, None), 10)),
    "hold after one was released in time": Scene(
        ran_out(expiry=Expiry.RELEASED), lambda meter, _: meter.hold(asked(2, None), 10)
    ),
    "end what ran out": Scene(several, lambda meter, _: meter.expire("acme")),
    "void": Scene(decided, lambda meter, _: meter.void("r1", actor="ann", why="a", account="acme")),
    "adjust": Scene(decided, lambda meter, _: meter.adjust("r1", spent(200), actor="ann", why="a", account="acme")),
    "void what was adjusted": Scene(adjusted, lambda meter, _: meter.void("r1", actor="ann", why="b", account="acme")),
    "claim": Scene(
        lambda bench, _: bench.clock.now + DAY,
        lambda meter, end: meter._store.claim(meter.offer.name, "acme", "a threshold", until=end, token=MINE),
    ),
    "a batch": Scene(several, mixed),
}


BY_OWNERS = {"void", "adjust", "void what was adjusted"}


def prepared(bench: Bench, name: str, window: str) -> tuple[Meter, Any]:
    """A meter that knows of all that was done before, and what that gave."""
    bench.reset()
    meter = bench.meter(window)
    if name in BY_OWNERS:
        meter.enroll("acme", ENROLLED, actor="ann")
    meter.decide(asked("first", 400))
    return meter, SCENES[name].before(bench, meter)


def answer_of(scene: Scene, meter: Meter, given: Any) -> Any:
    """What is answered, as every store must answer, or the error."""
    try:
        return plain(scene.ask(meter, given))
    except GratisError as error:
        return error


def repeated(answer: Any) -> Any:
    """The same decision, told again."""
    return replace(answer, replayed=True) if isinstance(answer, Decision) else answer


def is_of(answer: Any, expected: list[Any]) -> bool:
    """Whether an answer is one of those; of several, each one of those in its place."""
    if isinstance(answer, list):
        likely = [other for other in expected if isinstance(other, list) and len(other) == len(answer)]
        return likely != [] and all(each in others for each, *others in zip(answer, *likely, strict=True))
    return answer in expected


def kept_of(bench: Bench) -> tuple[dict[bytes, Any], Any]:
    """What counts of what is kept: not which end of a hold was found last, nor members of none."""
    state = {name: value for name, value in bench.raw.state().items() if name[:1] != b"x"}
    return state, bench.raw.ask("XRANGE", SHARD.ledger, "-", "+")


def check_over(bench: Bench, window: str) -> list[Any]:
    """When every hold has run out of time, nothing is set aside, and the ledger is whole: what it says."""
    meter = bench.meter(window)
    check_holds(bench.raw)
    bench.clock.now += 2 * HOUR
    for account in ("acme", *({hold.account.partition(b"\0")[2].decode() for hold in bench.raw.holds()} - {"acme"})):
        meter.expire(account)
        meter.decide(asked(f"after {account}", 1, account=account, at=bench.clock.now))
    assert check_holds(bench.raw) == []
    assert bench.raw.members() == []
    assert [name for name, value in bench.raw.state().items() if name[:1] in {b"g", b"h"} and value] == []
    kept = bench.raw.ledger()
    assert [one.number for one in kept] == list(range(1, len(kept) + 1))
    assert len({(one.account, one.id) for one in kept}) == len(kept)
    check(meter)
    return [
        (one.account, one.id, one.reason, one.tokens, one.free_tokens, one.hold, one.correction)
        for one in (entry.decision for entry in meter.ledger())
    ]


@each_window
@pytest.mark.parametrize("name", SCENES)
def test_a_call_that_fails_leaves_nothing_half(bench, name, window):
    """Whichever call of a script fails, alone or with all after it: asked again, all is as if it had not failed."""
    scene = SCENES[name]
    meter, given = prepared(bench, name, window)
    expected = [answer_of(scene, each, given) for each in (meter, bench.meter(window))]
    assert not any(isinstance(answer, StoreError) for answer in expected), expected
    over, tried = check_over(bench, window), 0
    for script in SCRIPTS:
        meter, given = prepared(bench, name, window)
        with bench.failing(meter, script, Fault(0, 0)):
            answer_of(scene, meter, given)
        count = int(bench.raw.ask("GETDEL", "calls") or 0)
        faults = [Fault(first, first, ERRORS[first % len(ERRORS)]) for first in range(1, count + 1)]
        faults += [Fault(first, EVER, ERRORS[first % len(ERRORS)]) for first in range(count // 2, count)]
        for fault in faults:
            meter, given = prepared(bench, name, window)
            before = kept_of(bench)
            with bench.failing(meter, script, fault):
                answer = answer_of(scene, meter, given)
            assert int(bench.raw.ask("GETDEL", "calls")) >= fault.first
            check_holds(bench.raw)
            after = kept_of(bench)
            again = answer_of(scene, bench.meter(window), given)
            if isinstance(answer, StoreError):
                assert type(answer) in {NotExecuted, OutcomeUnknown}
                assert type(answer) is OutcomeUnknown or after == before, (script, fault, answer)
                assert is_of(again, expected), (script, fault, answer)
            else:
                assert is_of(answer, expected), (script, fault)
                assert is_of(again, [expected[1], repeated(answer)]), (script, fault)
            assert check_over(bench, window) == over, (script, fault, answer)
            tried += 1
    assert tried > 0


def test_holds_that_were_made_in_one_large_call_are_whole(bench):
    """Whichever write of a call of hundreds of holds, settles and requests fails, no hold is half."""
    before = [asked(f"held {number}", 10, account=f"account {number}") for number in range(120)]
    soon = Holding(bench.clock.now + MINUTE, Expiry.DECIDED)

    def charges(meter: Meter) -> list[Charge]:
        steps: list[Any] = [charge_of(meter, one) for one in before]
        steps += [charge_of(meter, asked(number, 5, account=f"new {number}")) for number in range(260)]
        steps += [
            charge_of(meter, asked(f"hold {number}", 5, account=f"new {number % 7}"), soon) for number in range(60)
        ]
        return steps[::2] + steps[1::2]

    def started() -> Meter:
        bench.reset()
        meter = bench.meter()
        meter._store.apply([charge_of(meter, one, soon) for one in before])
        return meter

    with bench.failing(meter := started(), "apply.lua", Fault(0, 0)):
        meter._store.apply(charges(meter))
    total, held = int(bench.raw.ask("GET", "calls")), 60
    tidied = 120 * 2 + 120  # of each settled one two fields are deleted, and a member
    first = total - tidied - held
    for place in (first - 2, first - 1, first, first + 30, first + held, total - 5):
        meter = started()
        with bench.failing(meter, "apply.lua", Fault(place, place, ERRORS[0])):
            try:
                meter._store.apply(charges(meter))
            except NotExecuted:
                assert len(check_holds(bench.raw)) == 120
        bench.raw.ask("DEL", "calls")
        check_holds(bench.raw)
        other = bench.meter()
        for receipt in other._store.apply(charges(other)):
            assert (receipt.decision or receipt.hold) is not None
        other.decide(asked("one more", 5))  # asked again, nothing is decided, and a state that is behind stays so
        check(other)
        bench.clock.now += HOUR
        for account in {hold.account for hold in check_holds(bench.raw)}:
            other.expire(account.partition(b"\0")[2].decode())
        assert check_holds(bench.raw) == []
        assert len(bench.raw.ledger()) == 120 + 260 + 1 + 60


@pytest.fixture
def user(bench) -> Iterator[Bench]:
    """A bench at a server that knows a user."""
    permit(bench)
    yield bench
    bench.close_stores()
    bench.raw.ask("ACL", "DELUSER", "gratis")


@pytest.mark.parametrize("command", ["hget", "hset", "hdel", "xadd", "zadd", "zrem", "zrangebylex"])
def test_a_right_that_is_withdrawn_leaves_nothing_half(user, command):
    """Whoever lacks a right while he holds, settles or corrects: what was told is so, and the rest is asked anew."""
    for name, scene in SCENES.items():
        meter, given = prepared(user, name, "rolling")
        expected = [answer_of(scene, each, given) for each in (meter, user.meter("rolling"))]
        over = check_over(user, "rolling")
        _, given = prepared(user, name, "rolling")
        meter = user.meter("rolling", options=USER)
        permit(user, command)
        answer = answer_of(scene, meter, given)
        permit(user)
        assert type(answer) in {NotExecuted, OutcomeUnknown} or is_of(answer, expected), name
        assert is_of(answer_of(scene, user.meter("rolling"), given), [*expected, repeated(answer)]), name
        assert check_over(user, "rolling") == over, name


# -- A state that is behind its ledger


STEPS: list[Callable[[Bench, Meter], Any]] = [
    lambda _, meter: meter.decide(asked("first", 400)),
    lambda bench, meter: [
        applied(meter, [charge_of(meter, asked(name, 50), Holding(bench.clock.now + 2 * DAY, Expiry.DECIDED))])
        for name in ("a", "b", "c", "d")
    ],
    lambda _, meter: meter.decide(asked("a", 40)),
    lambda _, meter: meter.void("rfirst", actor="ann", why="a", account="acme"),
    lambda bench, meter: (move(bench, DAY), meter.decide(asked("next window", 10, at=bench.clock.now))),
    lambda _, meter: meter.decide_many([asked("b", 700), asked("more", 5, at=NEXT), asked("a", 40)]),
    lambda _, meter: meter.adjust("rfirst", spent(30), actor="ann", why="b", account="acme"),
    lambda _, meter: meter.decide(asked("c", 45)),
    lambda bench, meter: (move(bench, 2 * DAY), meter.expire("acme")),
    lambda _, meter: meter.decide(asked("d", 45)),
    lambda bench, meter: meter.decide(asked("last", 7, at=bench.clock.now)),
]
NEXT = asked("").at + DAY


def move(bench: Bench, span: timedelta) -> None:
    """Time passes."""
    bench.clock.now += span


def derived_of(bench: Bench) -> dict[bytes, object]:
    """All of a state that follows from its ledger, but for the order in which an account's windows are listed."""
    return {
        name: sorted(value.split(b"\n")) if name[:1] == b"l" else value
        for name, value in bench.raw.state().items()
        if name[:1] not in {b"g", b"h", b"x", b"e", b"v", b"m"}
    }


@each_window
def test_a_state_that_is_behind_follows_from_its_ledger(bench, window):
    """Whichever settles and corrections a state has missed, after the next call it is as if it had missed none."""
    meter = bench.meter(window)
    meter.enroll("acme", ENROLLED, actor="ann")
    dumps: list[bytes] = []
    for step in STEPS:
        step(bench, meter)
        dumps.append(bench.raw.ask("DUMP", SHARD.state))
    expected, words = derived_of(bench), meter.decisions("rfirst", account="acme")
    assert [word.correction and word.correction.number for word in words] == [None, 1, 2]
    for dump in dumps[:-1]:
        for view in (lambda: meter, partial(bench.meter, window)):
            bench.raw.ask("RESTORE", SHARD.state, 0, dump, "REPLACE")
            with pytest.raises(Conflict):
                view().decide(asked("last", 8, at=bench.clock.now))
            assert derived_of(bench) == expected
            assert meter.decisions("rfirst", account="acme") == words
            check(meter)


def test_what_is_held_rests_on_all_that_was_decided(bench):
    """Who has not seen a decision that the state has missed is told what is left after it, and holds beside it."""
    other = bench.meter()
    meter = bench.meter()
    meter.decide(asked("first", 100))
    dump = bench.raw.ask("DUMP", SHARD.state)
    meter.decide(asked(1, 800))
    bench.raw.ask("RESTORE", SHARD.state, 0, dump, "REPLACE")
    hold = other.hold(asked(2, None), 200)
    assert (hold.used, hold.fits, hold.short) == (900, False, 100)
    bench.raw.ask("RESTORE", SHARD.state, 0, dump, "REPLACE")
    assert bench.meter().hold(asked(1, None), 200).decision is not None
    check_holds(bench.raw)


# -- Keys that are not ours, answers that are lost, scripts that are forgotten

OTHER_TYPES = {
    "string": ("SET", "x"),
    "list": ("RPUSH", "x"),
    "set": ("SADD", "x"),
    "hash": ("HSET", "x", "y"),
    "stream": ("XADD", "1-0", "x", "y"),
}
VERBS: dict[str, Callable[[Meter, Hold], Any]] = {
    "hold": lambda meter, _: meter.hold(asked(2, None), 10),
    "settle": lambda meter, hold: meter.settle(hold, spent(250)),
    "settle in a batch": lambda meter, _: applied(meter, [charge_of(meter, asked(name, 5)) for name in (1, 2)]),
    "settle by its bound": lambda meter, hold: meter.settle(hold, spent(None)),
    "release": lambda meter, hold: meter.release(hold),
    "extend": lambda meter, hold: meter.extend(hold, for_=HOUR),
    "list": lambda meter, _: meter.holds("acme"),
    "look at": lambda meter, _: meter.standing("acme"),
    "claim": lambda meter, hold: meter._store.claim(
        meter.offer.name, "acme", "a threshold", until=hold.until, token=uuid4().hex
    ),
    "explain": lambda meter, _: meter.explain(asked(2, 10)),
}


@pytest.mark.parametrize("kind", OTHER_TYPES)
def test_a_key_of_another_type_is_left_alone(bench, kind):
    """Where a key of another type stands in the place of the holds, nothing is written; without holds, all goes on."""
    meter = bench.meter()
    hold = meter.hold(asked(1, None), 300, for_=MINUTE)
    command, *rest = OTHER_TYPES[kind]
    bench.raw.ask("DEL", SHARD.holds)
    bench.raw.ask(command, SHARD.holds, *rest)
    before = bench.raw.contents()
    for span in (timedelta(), HOUR):
        bench.clock.now += span
        for verb in VERBS.values():
            with pytest.raises(NotExecuted, match="WRONGTYPE"):
                verb(meter, hold)
        if span:
            for ask in (partial(meter.decide, asked(2, 10)), partial(meter.expire, "acme")):
                with pytest.raises(NotExecuted, match="WRONGTYPE"):
                    ask()
        with pytest.raises(NotExecuted, match="WRONGTYPE"):
            bench.store()
        assert bench.raw.contents() == before
    assert meter.decide(asked(1, 10, account="other")).is_free


@pytest.fixture
def door(bench) -> Iterator[Proxy]:
    """What passes on all that is asked of the bench's server."""
    with Proxy(bench.server.address) as proxy:
        yield proxy


SLOW = ("hold", "settle", "release", "extend", "claim", "settle late")
LOST = {"cut_before": SLOW, "cut_after": SCENES, "half": SLOW, "swallow": SLOW}
SHORT_S, LONG_S = 0.3, 20.0


@pytest.mark.parametrize(("fault", "window"), [*zip(LOST, ("day", "rolling") * 2, strict=True), ("cut_after", "day")])
def test_an_answer_that_is_lost_is_asked_for_again(bench, door, fault, window):
    """Whatever is lost, alone or each time for a while: what was asked again is done exactly once, and so told."""
    for name in LOST[fault]:
        scene = SCENES[name]
        meter, given = prepared(bench, name, window)
        expected = [answer_of(scene, each, given) for each in (meter, bench.meter(window))]
        over = check_over(bench, window)
        for wait in (0.001, 20):
            _, given = prepared(bench, name, window)
            timeout = SHORT_S if fault == "swallow" else LONG_S
            with opened(bench, door, window, wait=wait, timeout=timeout) as meter:
                before = kept_of(bench)
                door.arm(fault)
                answer = answer_of(scene, meter, given)
                assert door.left == 0
                after = kept_of(bench)
                again = answer_of(scene, meter, given)
            if isinstance(answer, StoreError):
                assert wait < 1
                assert type(answer) is OutcomeUnknown or (type(answer) is NotExecuted and after == before), answer
                assert is_of(again, expected), (name, wait, answer)
            else:
                assert is_of(answer, expected), (name, wait)
                assert is_of(again, [expected[1], repeated(answer)]), (name, wait)
            check_holds(bench.raw)
            assert check_over(bench, window) == over, (name, wait)


@contextmanager
def opened(bench: Bench, door: Proxy, window: str, *, wait: float, timeout: float) -> Iterator[Meter]:
    """A meter behind a door, which is patient or not."""
    url = f"unix://{door.address}?wait={wait}&timeout={timeout}"
    with Meter(open_redis(url, clock=bench.clock, bounds=Bounds()), small_offer(window), assume=ENROLLED) as meter:
        yield meter


def test_an_answer_to_another_question_is_not_believed(bench):
    """Where an answer is that of another question, nobody is told anything by it."""
    meter = bench.meter()
    hold = meter.hold(asked(1, None), 300)
    asks = [VERBS[name] for name in ("release", "extend", "list", "look at")]
    for text in ("return {'small-offer\\0acme', ''}", "return {'small-offer\\0acme\\0x', '', 'x'}"):
        with planted(meter._store, bench.raw, {"hold.lua": text}):
            for ask in asks:
                with pytest.raises(StoreError, match="another question"):
                    ask(meter, hold)
    text = text_of("apply.lua").replace("answers[i + 1] = place .. answer", "answers[i + 1] = '0123456789' .. answer")
    for name in ("hold", "settle", "settle in a batch", "settle by its bound"):
        with (
            planted(meter._store, bench.raw, {"apply.lua": text}),
            pytest.raises(OutcomeUnknown, match="another request's"),
        ):
            VERBS[name](meter, hold)
    assert meter.release(hold) is None
    assert [entry.decision.id for entry in meter.ledger()] == ["r1", "r2"]
    check_over(bench, "day")


def test_a_server_that_forgets_its_scripts_is_told_them(bench):
    """Before each verb the server has forgotten every script; nobody notices."""
    for verb in VERBS.values():
        bench.reset()
        meter = bench.meter()
        hold = meter.hold(asked(1, None), 300)
        bench.raw.ask("SCRIPT", "FLUSH")
        verb(meter, hold)
        bench.raw.ask("SCRIPT", "FLUSH")
        check_over(bench, "day")
    for name in BY_OWNERS:
        meter, given = prepared(bench, name, "day")
        bench.raw.ask("SCRIPT", "FLUSH")
        SCENES[name].ask(meter, given)
        check_over(bench, "day")


# -- What is over is gone


def test_a_window_that_was_trimmed_takes_no_correction(bench):
    """Its tally is gone while a late decision of it is kept: what corrects that is refused, and nothing else is."""
    meter = bench.meter()
    meter.enroll("acme", ENROLLED, actor="ann")
    by = {"actor": "ann", "why": "a", "account": "acme"}
    early = meter.decide(asked(1, 100))
    bench.clock.now = NOON + 6 * DAY
    late = meter.decide(asked(2, 200))
    assert early.window == late.window
    bench.clock.now = NOON + 8 * DAY
    meter._store.trim(10_000)
    for _ in range(2):
        with pytest.raises(RequestError, match="at: its window is no longer kept"):
            meter.void(late.id, **by)
    assert meter.decide(asked(3, 5, at=bench.clock.now)).used == 5


def test_without_bounds_a_claim_is_kept_for_good(bench):
    """Two processes that judge old data tell each threshold once."""
    first, second = (bench.store(bounds=None) for _ in range(2))
    old = bench.clock.now - 60 * DAY
    for turn, store in enumerate((first, second)):
        for name in ("50%", "80%"):
            assert store.claim("small-offer", "acme", name, until=old, token=uuid4().hex) is (turn == 0)


DAYS = 30


@each_window
def test_what_is_over_leaves_nothing_behind(bench, window):
    """After weeks of holds, corrections and claims that are trimmed each day, no more is kept than after the first."""
    meter = bench.meter(window)
    meter.enroll("acme", ENROLLED, actor="ann")
    sizes: list[int] = []
    trimmed: list[Decision] = []
    entries: list[Entry] = []
    for day in range(DAYS):
        at = bench.clock.now
        first = meter.decide(asked(f"{day:02}", 100, at=at))
        holds = [meter.hold(asked(f"{day:02} {name}", None, at=at), 50, for_=HOUR) for name in range(6)]
        meter.settle(holds[0], spent(40))
        meter.release(holds[1])
        meter.extend(holds[2], for_=3 * HOUR)
        meter.adjust(first.id, spent(60), actor="ann", why="a", account="acme")
        meter.void(first.id, actor="ann", why="b", account="acme")
        meter._store.claim(meter.offer.name, "acme", f"threshold {day:02}", until=first.window.end, token=uuid4().hex)
        bench.clock.now += 2 * HOUR
        assert len(meter.expire("acme")) == 3
        meter.settle(holds[3], spent(30))
        meter.release(holds[4])
        bench.clock.now += 2 * HOUR
        meter.settle(holds[2], spent(None))
        assert [word.correction and word.correction.number for word in meter.decisions(first.id, account="acme")] == [
            None,
            1,
            2,
        ]
        check_holds(bench.raw)
        assert bench.raw.members() == []
        entries += meter.ledger(after=len(entries))
        meter._store.trim(10_000)
        kept = bench.raw.ledger()
        for one in trimmed:
            assert meter._store.corrections(meter.offer.name, "acme", one.id) == 2 * (
                one.id in {each.id for each in kept}
            )
        trimmed.append(first)
        state = bench.raw.state()
        sizes.append(sum(len(name) + len(value) for name, value in state.items()))
        bench.clock.now += DAY - 4 * HOUR
    assert list(Audit(lambda _: meter.offer).findings(entries)) == []
    assert max(sizes[20:]) <= max(sizes[10:20])
    bench.clock.now += 9 * DAY
    meter._store.trim(10_000)
    assert bench.raw.ledger() == []
    assert [name for name in bench.raw.state() if name[:1] in {b"c", b"g", b"h", b"m", b"i"}] == []
    assert bench.raw.ask("ZRANGE", SHARD.holds, 0, -1) == [PROBE]


# -- As in memory

HISTORIES = 200
STEPS_EACH = 25


@pytest.mark.parametrize("shards", [1, 5])
def test_histories_are_as_in_memory(bench, shards):
    """Whatever is held, settled, ended, corrected and claimed, in whatever calls, all is as in memory."""
    own = list(BINARIES.values()).index(bench.server.program)
    for seed in range(own, HISTORIES, len(BINARIES)):
        bench.reset()
        try:
            History(bench, seed, shards=shards).run(STEPS_EACH)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        if shards == 1:
            check_holds(bench.raw)


@pytest.mark.parametrize("name", READINGS)
@pytest.mark.parametrize("is_alone", [True, False], ids=["alone", "in a batch"])
def test_a_hold_is_settled_in_the_window_that_admitted_it(bench, name, is_alone):
    """Whatever has opened since, what a hold used counts in the window of the hold, as does what corrects it."""
    twins = Twins(bench, small_offer("rolling", reading=READINGS[name]), bounds=None)
    start, until = bench.clock.now, bench.clock.now + 5 * DAY

    def ask(*charges: Charge) -> list[Receipt]:
        parts = [[charge] for charge in charges] if is_alone else [charges]
        return [receipt for part in parts for receipt in twins.apply(part)]

    def sized(name: object, size: int, at: datetime = start) -> Charge:
        return twins.charge(asked(name, size, at=at))

    ask(sized("first", 500))
    sizes = {"fits": 100, "more": 400, "void": 50, "unmeasured": 70, "late": 20}
    ask(*(twins.charge(asked(one, size), Holding(until, Expiry.DECIDED)) for one, size in sizes.items()))
    windows = {hold.window for hold in twins.both("holds", "small-offer", "acme")}
    twins.clock.now += DAY
    ask(sized("second", 300, twins.clock.now))
    spans = (Holding(until, Expiry.DECIDED), Held(sizes["unmeasured"], *windows, is_unmeasured=True))
    receipts = ask(
        sized("third", 10, twins.clock.now),
        sized("fits", 90),
        sized("fourth", 20, twins.clock.now),
        sized("more", 700),
        twins.charge(asked("now", 30, at=twins.clock.now), spans[0]),
        twins.charge(asked("unmeasured", sizes["unmeasured"]), spans[1]),
        sized("void", 60),
    )
    assert [one.decision and one.decision.window in windows for one in receipts] == [
        False, True, False, True, None, True, True,
    ]  # fmt: skip
    twins.clock.now += DAY
    ask(sized("fifth", 5, twins.clock.now))
    first = receipts[-1].decision
    void = [
        corrects(twins.offer, first, first, first.request, Remedy.VOIDED, number=1, actor="ann", why="a"),
        sized("sixth", 6, twins.clock.now),
        sized("late", 25),
    ]
    found = [one.decision.window for one in ask(*void)]
    assert [window in windows for window in found] == [True, False, True]
    assert len(twins.both("tallies", "small-offer", "acme")) == 3
    twins.check()
    check(twins.meters[1])


# -- Many holds, many who ask

LIVE = 5_000


def test_what_a_hold_costs_does_not_grow_with_those_that_are_there(bench):
    """However many holds of an account are there, one more is made, settled and given back by as many commands."""
    meter = bench.meter()
    until = bench.clock.now + HOUR
    made, costs = 0, []
    for live in (10, LIVE):
        for first in range(made, live, 500):
            names = range(first, min(first + 500, live))
            holds = [charge_of(meter, asked(f"{name:04}", 0), Holding(until, Expiry.DECIDED)) for name in names]
            assert {receipt.status for receipt in meter._store.apply(holds)} == {Status.HELD}
        made = live
        meter.decide(asked(f"first of {live:04}", 5))
        bench.raw.ask("CONFIG", "RESETSTAT")
        hold = meter.hold(asked(f"one of {live:04}", None), 10)
        meter.settle(hold, spent(5))
        meter.release(meter.hold(asked(f"two of {live:04}", None), 10))
        meter.decide(asked(f"three of {live:04}", 5))
        lines = bench.raw.ask("INFO", "commandstats").decode().split()
        counts = {name: int(calls) for name, calls in re.findall(r"cmdstat_(\w+):calls=(\d+)", " ".join(lines))}
        sent = re.findall(r"total_net_(?:in|out)put_bytes:(\d+)", bench.raw.ask("INFO", "stats").decode())
        costs.append((counts, sum(map(int, sent))))
    (few, few_bytes), (many, many_bytes) = costs
    assert few == many
    assert many_bytes < few_bytes + 500
    assert len(meter.holds("acme")) == LIVE


def test_a_name_is_claimed_once(bench):
    """Of many who claim a name side by side one is the first; claimed again long after it was over, it may be anew."""
    stores = [bench.store(options="&shards=1") for _ in range(4)]
    end = bench.clock.now + DAY

    def claim(store: RedisStore) -> list[tuple[str, bool]]:
        return [
            (name, store.claim("small-offer", "acme", name, until=end, token=uuid4().hex))
            for name in map(str, range(20))
        ]

    found = in_threads([partial(claim, store) for store in stores])
    assert sorted(name for name, is_first in found if is_first) == sorted(map(str, range(20)))
    state = bench.raw.state()
    assert [len(state[b"msmall-offer\0acme"].split(b"\n")) - 1] == [20]
    bench.clock.now = end + Bounds().keep + TICK
    assert stores[0].claim("small-offer", "acme", "new", until=bench.clock.now, token=uuid4().hex)
    assert len(bench.raw.state()[b"msmall-offer\0acme"].split(b"\n")) - 1 == 1


def test_holds_are_ended_by_who_does_not_know_the_enrollment_yet(bench):
    """Who has just started ends what ran out of an account that is enrolled, and goes on."""
    meter = bench.meter(assume=None)
    meter.enroll("acme", ENROLLED, actor="ann")
    meter.hold(asked(1, None), 300, for_=MINUTE)
    bench.clock.now += HOUR
    assert bench.meter(assume=None).decide(asked(2, 10)).used == 310
    meter.hold(asked(3, None), 300, for_=MINUTE)
    meter.enroll("acme", Enrollment(tier=1, sharing=Sharing.ENABLED), actor="ann")
    bench.clock.now += HOUR
    assert [one.id for one in bench.meter(assume=None).expire("acme")] == ["r3"]
    check_over(bench, "day")
