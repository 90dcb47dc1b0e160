"""What the scripts of the store on Redis do, checked in about a second, the quickest first; a fault shows in one."""

import signal
from contextlib import contextmanager, suppress
from functools import partial
from uuid import uuid4

import pytest
from msgspec.structs import force_setattr, replace
from tests.bench import SALT, SHARD, Bench, Fault, Raw, altered, check, check_holds as holds_of
from tests.servers import Server
from tests.twins import History, Twins

from gratis import Conflict, Enrollment, Meter, NotExecuted, RequestError, Sharing, StoreError
from gratis.book import corrects
from gratis.classify import charge_for
from gratis.model import Expiry, Held, Hold, Remedy, micros
from gratis.rule import Holding, Overdue
from gratis.stores import Bounds, Status
from gratis.stores.redis import calls, layout, trim
from gratis.stores.redis.layout import digits, place_of, read_counters
from gratis.testing import StoreContract, drive
from gratis.testing.compare import by_the_rule, plainly, refused, same, singly
from gratis.testing.scene import DAY, ENROLLED, HOUR, NOON, READINGS, SMALL, TICK, asked, small_offer, spent

KEEP = Bounds().keep
LATER = NOON + DAY
WEEKS = NOON + KEEP + 2 * DAY
SHORT_S, LONG_S = 3.0, 30.0
OPTIONS = "&timeout=2"
BUSY_AFTER_MS = 100
EXACT_MAX = (1 << 53) - 1
LEVELS = (8_192, 131_072, 2_097_152)
WORD = b"small-offer\0acme"
HISTORIES, HISTORY_STEPS = range(8), 30
MINUTE = HOUR / 60


class Stage:
    """A private server on which scripts go through the checks; one that hangs is started anew."""

    def __enter__(self):
        self._server = Server(options={"lua-time-limit": BUSY_AFTER_MS}).__enter__()
        self._bench = Bench(self._server, options=OPTIONS)
        return self

    def __exit__(self, *_):
        self._bench.close()
        self._server.__exit__()

    def killer(self, texts, checks=()):
        """The name of the first check that fails with these scripts, or never ends; None if none does."""
        self._bench.texts = texts
        before = signal.signal(signal.SIGALRM, _too_long)
        try:
            for each in checks or CHECKS:
                if self._fails(each):
                    return each.__name__
        finally:
            signal.signal(signal.SIGALRM, before)
        return None

    def _fails(self, each):
        """Whether a check fails, or does not end."""
        signal.setitimer(signal.ITIMER_REAL, LONG_S if each in LONG else SHORT_S)
        try:
            with altered(self._bench.texts):
                self._bench.reset()
                self._bench.raw.load(self._bench.texts)
                each(self._bench)
        except (Exception, NeverEndsError):  # noqa: BLE001 - whatever goes wrong is a fault that shows
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._revive()
            return True
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return False

    def _revive(self):
        """The server is one that answers."""
        self._bench.close()
        try:
            raw = Raw(self._server.address)
            raw.ask("FLUSHALL")
            raw.close()
        except Exception:  # noqa: BLE001 - it is busy with a script that never ends
            self._server.kill()
            self._server.restart()
        self._bench.connect()


class NeverEndsError(BaseException):
    """A check does not end; nobody may take it for a server that does not answer."""


def _too_long(*_):
    raise NeverEndsError


def run(store, flow):
    """What a flow of a store's returns."""
    return store._run(flow)


def without_order(state):
    """A state, but for the order in which an account's windows are listed."""
    return {name: sorted(value.split(b"\n")) if name[:1] == b"l" else value for name, value in state.items()}


def derived(bench):
    """The state is what `mend.py` derives from the ledger, but for enrollments and holds, which are there alone."""
    raw = bench.raw
    state = raw.state()
    with altered({}):
        raw.load({})
        meter = bench.meter()
        raw.ask("HDEL", SHARD.state, *(name for name in state if name[:1] not in {b"v", b"e", b"g", b"h", b"x", b"m"}))
        raw.ask("HSET", SHARD.state, "n", "0 0 0 1 ")
        meter.explain(asked("nobody", account="nobody"))
    same(without_order(state), without_order(raw.state()), "the state, and what follows from the ledger")


def field_of(bench, start):
    """The only field of the state that starts so."""
    (field,) = [name for name in bench.raw.state() if name.startswith(start)]
    return field


# -- What is decided


REQUESTS = [
    asked(1, 400),
    asked(2, 700),
    asked(3, 600, at=LATER),
    asked(4, 5, model="unlisted", at=LATER),
    asked(5, 20, model=SMALL, account="other", at=LATER),
    asked(6, 400, at=LATER),
    asked(7, 1, at=LATER),
    asked(8, 1, at=NOON + TICK),
]


def decides(window, bench):
    """Singly and in a batch the rule's answers are given, once, and kept as they are to be kept."""
    bench.clock.now = LATER
    offer = small_offer(window)
    expected = by_the_rule(offer, REQUESTS)
    meter = bench.meter(window)
    same(plainly(singly(meter, REQUESTS)), expected, "one by one")
    same([one.number for one in bench.raw.ledger()], list(range(1, 9)), "numbers")
    again = [replace(one, replayed=True) for one in expected]
    same(plainly(singly(meter, REQUESTS)), again, "repeats")
    same(plainly(bench.meter(window).decide_many(REQUESTS)), again, "repeats in a batch")
    refused(Conflict, meter.decide, asked(1, 401))
    derived(bench)
    check(meter)
    bench.reset()
    bench.clock.now = LATER
    batch = [one for request in REQUESTS for one in (request, request)]
    answers = bench.meter(window).decide_many(batch)
    same(plainly(answers), [one for pair in zip(expected, again, strict=True) for one in pair], "a batch with repeats")
    same([one.number for one in bench.raw.ledger()], list(range(1, 9)), "numbers of a batch")
    derived(bench)
    check(bench.meter(window))


def check_days(bench):
    """Windows of a calendar."""
    decides("day", bench)


def check_rolling(bench):
    """Windows that roll."""
    decides("rolling", bench)


def check_programs(bench):
    """Short random programs have the rule's answers."""
    for seed in (3, 7):
        bench.reset()
        drive(partial(opened, bench), seed=seed, steps=90)


def opened(bench, *, clock, bounds):
    """One more view, under a clock of one's own."""
    bench.clock = clock
    return bench.store(bounds=bounds)


def check_records(bench):
    """A record says account, facts, letter and numbers, then the id and what only Python reads."""
    for window, span in (("day", b""), ("rolling", b" %b %b")):
        bench.reset()
        bench.clock.now = LATER
        meter = bench.meter(window)
        singly(meter, [*REQUESTS, asked("late", 1, at=NOON - 30 * DAY)])
        today = span % (digits(micros(NOON)), digits(micros(LATER))) if span else b""
        then = span % (digits(micros(LATER)), digits(micros(LATER + DAY))) if span else b""
        late = b"o 1000 5 1 0 " + then if span else b"l"
        expected = [
            b"2 1 w 400 1" + today,
            b"2 1 o 400 2 700 0" + today,
            b"2 1 w 600 1" + then,
            b"2 3 x",
            b"5 4 w 20 1" + then,
            b"2 1 w 1000 2" + then,
            b"2 1 o 1000 3 1 0" + then,
            b"2 1 o 1000 4 1 0" + then if span else b"2 1 w 401 3",
            b"2 1 " + late,
        ]
        found = [
            value.partition(b"\n")[0]
            for _, fields in bench.raw.ask("XRANGE", SHARD.ledger, "-", "+")
            for name, value in zip(fields[::2], fields[1::2], strict=True)
            if name == b"r"
        ]
        same([line.split() for line in found], [line.split() for line in expected], "records")


def check_edges_of_allowances(bench):
    """What an allowance of nothing gives, and what is left where the rest of a request is as much, is by the rule."""
    low = Enrollment(tier=1, sharing=Sharing.ENABLED)
    for reading in READINGS.values():
        for window in ("day", "rolling"):
            for unit in ("tokens", "requests"):
                bench.reset()
                offer = small_offer(window, reading=reading, unit=unit, allowance=3)
                requests = [asked(number, size) for number, size in enumerate((0, 1, 2, 0, 5))]
                meter = Meter(bench.store(), offer, assume=low)
                same(plainly(singly(meter, requests)), by_the_rule(offer, requests, assume=low), f"{reading} {window}")
    bench.reset()
    store = bench.store()
    offer = small_offer("rolling", reading=("free", "excess"))
    charge = charge_for(offer, asked(1, 1_500), ENROLLED)
    for rest in (1_000, 999, 1, 0):
        request = asked(f"rest {rest}", 1_001 + rest, account=f"{rest}")
        (receipt,) = store.apply([replace(charge, amount=1_001, request=request)])
        same((receipt.decision.free_tokens, receipt.decision.seq), (1_000 + rest, 1), f"{rest} beside it")
    for allowance, rest in ((1, 0), (0, 1), (0, 0)):
        request = asked(f"{allowance} {rest}", 5 + rest, account=f"{allowance} {rest}")
        terms = replace(charge.terms, allowance=allowance)
        (receipt,) = store.apply([replace(charge, amount=5, request=request, terms=terms)])
        expected = (allowance + rest, 1 if allowance + rest else None)
        same((receipt.decision.free_tokens, receipt.decision.seq), expected, f"{rest} beside {allowance}")


def check_dry(bench):
    """A question writes nothing, not even in a batch, and what was asked so is then decided."""
    for window in ("day", "rolling"):
        bench.reset()
        meter = bench.meter(window)
        store, charges = meter._store, [charge_for(meter.offer, request, ENROLLED) for request in REQUESTS[:2] * 2]
        before = bench.raw.contents()
        receipts = store.apply(charges, dry=True)
        same([one.decision.used for one in receipts], [400, 700, 400, 700], "each for itself")
        said = meter.explain(asked(1, 400))
        same(bench.raw.contents(), before, "what is kept")
        same(meter.decide(asked(1, 400)), said.decision, "explained, then decided")
        before = bench.raw.contents()
        same(meter.explain(asked(2, 601)).fits, 600, "what fits")
        assert meter.explain(asked(1, 400)).decision.replayed, "explained again"
        same(bench.raw.contents(), before, "what is kept then")


def check_enrollments(bench):
    """What rests on an outdated enrollment is told the latest, singly and in a batch, and then decided."""
    second = Enrollment(tier=1, sharing=Sharing.ENABLED)
    meter, other = bench.meter(assume=None), bench.meter(assume=None)
    same(meter.decide(asked(0, 1)).reason, "not_enrolled", "before")
    meter.enroll("acme", ENROLLED, actor="ann")
    same(meter.decide(asked(1, 200)).terms.allowance, 1_000, "the first")
    other.enroll("acme", second, actor="ann")
    store = meter._store
    charges = [charge_for(meter.offer, request, ENROLLED, version=1) for request in (asked(2, 1), asked(1, 200))]
    receipts = store.apply(charges)
    same([one.status for one in receipts], [Status.OUTDATED, Status.REPLAYED], "outdated, and decided before")
    same(receipts[0].change, other.enrollments("acme")[-1], "the latest")
    same(meter.decide(asked(2, 50)).used, 250, "decided under it")
    assert not meter.decide(asked(3, 1)).is_free, "within its allowance"
    same([change.version for change in meter.enrollments("acme")], [1, 2], "versions")
    check(meter)
    bench.raw.ask("HDEL", SHARD.state, layout.change_field(b"2", WORD))
    same(store.apply(charges)[0].change, None, "a change that is gone")


def check_swaps(bench):
    """Fields are changed if all others are what they were, and else nothing is."""
    store, raw = bench.store(), bench.raw
    swap = store._core.asking.swap
    assert run(store, swap(SHARD, {}, {b"x": b"1", b"y": b"2"})), "nothing expected"
    same(raw.state(), {b"x": b"1", b"y": b"2"}, "two fields")
    cases = [
        ({b"x": b"1", b"y": b"2"}, True),
        ({b"x": b"1", b"y": b"2", b"z": b""}, True),
        ({b"x": b"0"}, False),
        ({b"x": b"1", b"y": b"0"}, False),
        ({b"z": b"1"}, False),
        ({b"x": b""}, False),
        ({b"x": b"1", b"y": b"2", b"z": b"3"}, False),
    ]
    for expected, is_so in cases:
        raw.ask("DEL", SHARD.state)
        raw.ask("HSET", SHARD.state, "x", "1", "y", "2", "v", "0", "u", "0")
        same(run(store, swap(SHARD, expected, {b"x": b"7", b"w": b"8"}, [b"y", b"v", b"no"])), is_so, str(expected))
        after = {b"x": b"7", b"w": b"8", b"u": b"0"} if is_so else {b"x": b"1", b"y": b"2", b"v": b"0", b"u": b"0"}
        same(raw.state(), after, str(expected))
    assert not run(store, swap(SHARD, {b"x": b"0"}, {}, [b"u"])), "something else expected"
    assert b"u" in raw.state(), "nothing dropped"
    assert run(store, swap(SHARD, {b"x": b"1"}, {}, [b"u"])), "expected"
    assert b"u" not in raw.state(), "dropped alone"
    raw.ask("SET", SHARD.ledger, "x")
    before = raw.state()
    refused(NotExecuted, partial(run, store), swap(SHARD, {}, {b"x": b"9"}))
    same(raw.state(), before, "with a ledger of another type")


def check_rights(bench):
    """Who lacks a right that the scripts need is told which, and who has just those is let in."""
    raw = bench.raw
    rights = ("hmget", "hget", "hset", "hdel", "xadd", "xrange", "xlen", "xtrim", "zadd", "zrem", "zrangebylex")
    others = ("hsetnx", "info", "time", "eval", "evalsha", "config")
    try:
        for missing in (None, *rights):
            granted = [f"+{right}" for right in (*rights, *others) if right != missing]
            raw.ask("ACL", "SETUSER", "gratis", "reset", "on", ">word", "~{gratis:*", *granted)
            if missing is None:
                meter = bench.meter(options="&username=gratis&password=word")
                same(meter.decide(asked(1, 1)).seq, 1, "seq")
            else:
                error = refused(NotExecuted, bench.store, options="&username=gratis&password=word")
                assert missing in str(error).lower(), missing
    finally:
        bench.close_stores()
        raw.ask("ACL", "DELUSER", "gratis")


# -- What is found again


def planted_counters(bench, last, *, base=0, top=1):
    """A shard that has decided so many, without any record of it."""
    bench.raw.ask("HSET", SHARD.state, "n", f"{last} {base} 0 {top} ")


def check_numbers(bench):
    """Decisions have the numbers that follow, in the ledger and in the index, however large."""
    for last in (254, 65_534, 16_777_214, 4_294_967_294, (1 << 40) - 9):
        bench.reset()
        planted_counters(bench, last, base=last)
        meter = bench.meter()
        decisions = [meter.decide(asked(1, 1)), *meter.decide_many([asked(2, 2), asked(3, 3)])]
        decisions.append(meter.decide(asked(4, 4)))
        numbers = [last + place for place in range(1, 5)]
        same([one.number for one in bench.raw.ledger()], numbers, "the ledger")
        for number, decision in zip(numbers, decisions, strict=True):
            place = place_of(WORD, decision.id, SALT.encode())
            assert place[5:] + number.to_bytes(5) in bench.raw.state()[b"i" + place[:2]], "index"
        again = [replace(one, replayed=True) for one in decisions]
        same([meter.decide(one.request) for one in decisions], again, "repeats")
        same(meter.decide_many([one.request for one in decisions]), again, "repeats in a batch")
        same([entry.entry for entry in meter.ledger()], numbers, "entries")
        same(read_counters(bench.raw.state()[b"n"]).last, last + 4, "the counter")


def index_levels(bench):
    """How many levels down each id is."""
    return sorted(len(name) - 2 for name, value in bench.raw.state().items() if name[:1] == b"i" for _ in value[::10])


def check_levels(bench):
    """The index goes a level deeper where it has many ids, and ids of all levels are found, whoever asks."""
    for place, most in enumerate(LEVELS, start=1):
        for base in (0, 77):
            bench.reset()
            early = [bench.meter() for _ in range(4)]
            planted_counters(bench, most - 1 + base, base=base, top=place)
            meter = early.pop()
            first = [meter.decide(asked(1, 1))]
            same(index_levels(bench), [place], "the last of its level")
            first.append(meter.decide(asked(2, 2)))
            same(index_levels(bench), [place, place + 1], "the first of the next")
            counters = read_counters(bench.raw.state()[b"n"])
            same((counters.last, counters.base, counters.top), (most + 1 + base, base, place + 1), "counters")
            again = [replace(one, replayed=True) for one in first]
            for one in (early.pop(), bench.meter()):
                same([one.decide(asked(1, 1)), one.decide(asked(2, 2))], again, "repeats")
            for one in (early.pop(), bench.meter()):
                same(one.decide_many([asked(2, 2), asked(1, 1)]), again[::-1], "repeats in a batch")
            third = early.pop().decide_many([asked(1, 1), asked(3, 3)])[1]
            same((third.replayed, third.used), (False, 6), "a new one beside a repeat")
            assert meter.decide(asked(3, 3)).replayed, "its repeat"
        bench.reset()
        meter = bench.meter()
        planted_counters(bench, most - 1, top=place)
        meter.decide_many([asked(1, 1), asked(2, 1)])
        same(index_levels(bench), [place + 1] * 2, "a call that reaches the next level is all on it")
        bench.reset()
        meter = bench.meter()
        planted_counters(bench, most - 1, base=1, top=4)
        meter.decide_many([asked(1, 1), asked(2, 1)])
        same(index_levels(bench), [place] * 2, "what was trimmed does not count")
        same(read_counters(bench.raw.state()[b"n"]).top, 4, "the highest level stays")
        assert bench.meter().decide(asked(1, 1)).replayed, "found below it"


@contextmanager
def places_all(place):
    """Every id has the same place in the index."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "place_of", lambda *_: place)
        patch.setattr(trim, "place_of", lambda *_: place)
        yield


def check_collisions(bench):
    """Ids and accounts whose digests are the same are told apart, wherever in a field they are."""
    for short in (b"\0\0\0\0\0", b"\0\0\0\0\1", b"ab\0\0\0", b"aaaaa", b"%a%a."):
        bench.reset()
        with places_all(b"00000" + short):
            planted_counters(bench, 252, base=252)
            accounts, names = ("acme", "other", "a"), (1, 2, 12)
            asks = [asked(name, 10 + name, account=account) for name in names for account in accounts]
            meter = bench.meter()
            first = [meter.decide(one) for one in asks[:5]] + meter.decide_many(asks[5:])
            same([one.replayed for one in first], [False] * 9, "decisions")
            same([one.id for one in bench.raw.ledger()], [one.id for one in asks], "the ledger")
            again = [replace(one, replayed=True) for one in first]
            same([meter.decide(one) for one in asks], again, "repeats")
            same(bench.meter().decide_many(asks), again, "repeats in a batch")
            assert not meter.decide(asked(3, 1)).replayed, "a new id among them"


def check_candidates(bench):
    """What the index names is a candidate: only its record tells."""
    meter = bench.meter()
    first = meter.decide(asked(1, 1))
    meter.decide(asked(2, 2))
    meter.decide(asked(1, 1, account="other"))
    place = place_of(WORD, "r1", SALT.encode())
    field, short = b"i" + place[:2], place[5:]
    own, second, third = (short + number.to_bytes(5) for number in (1, 2, 3))
    beside = b"12" + short + b"\0\0\1"  # the same bytes, at no place where an id starts
    for value in (second + own, third + own, second + third + own, beside + own, beside + beside + own + second):
        bench.raw.ask("HSET", SHARD.state, field, value)
        same(meter.decide(asked(1, 1)), replace(first, replayed=True), f"a repeat, of {value!r}")
    bench.raw.ask("HSET", SHARD.state, field, own)
    state, ledger = bench.raw.state(), bench.raw.ask("DUMP", SHARD.ledger)
    facts = next(name for name, value in state.items() if name[:1] == b"w" and value[:1] == b"{")
    for lost in (("XDEL", SHARD.ledger, "1-0"), ("DEL", SHARD.ledger), ("HDEL", SHARD.state, facts)):
        bench.raw.ask("RESTORE", SHARD.ledger, 0, ledger, "REPLACE")
        bench.raw.ask(*lost)
        before = bench.raw.contents()
        for asks in ([asked(1, 1)], [asked(1, 1), asked(9, 9)]):
            assert "GRATISSTATE" in str(refused(NotExecuted, meter.decide_many, asks)), "why"
        same(bench.raw.contents(), before, "what is kept")
        bench.raw.ask("HSET", SHARD.state, facts, state[facts])


def check_new_candidates(bench):
    """A new id is decided, though the index names others in its place."""
    meter = bench.meter()
    meter.decide(asked(2, 2))
    meter.decide(asked(1, 1, account="other"))
    place = place_of(WORD, "r1", SALT.encode())
    value = b"".join(place[5:] + number.to_bytes(5) for number in (1, 2))
    bench.raw.ask("HSET", SHARD.state, b"i" + place[:2], value)
    decision = meter.decide(asked(1, 1))
    same((decision.replayed, decision.seq, decision.used), (False, 2, 3), "a new decision")
    same(bench.raw.state()[b"i" + place[:2]], value + place[5:] + (3).to_bytes(5), "the index")


def check_large_batches(bench):
    """A batch of as many accounts, windows and ids as may be is read, kept and found again in parts."""
    asks = [asked(number, number % 7, account=f"account {number}") for number in range(1_000)]
    meter = bench.meter("rolling")
    first = meter.decide_many(asks)
    same([one.used for one in first], [number % 7 for number in range(1_000)], "used")
    same([one.id for one in bench.raw.ledger()], [one.id for one in asks], "the ledger")
    more = [asked("more", 1, account=f"account {number}") for number in range(970)] + asks[970:]
    found = meter.decide_many(more)
    same([one.used for one in found[:970]], [1 + number % 7 for number in range(970)], "used then")
    same(found[970:], [replace(one, replayed=True) for one in first[970:]], "repeats")
    derived(bench)
    batch = [asked(f"one {number % 120}", 1) for number in range(250)]
    found = meter.decide_many(batch)
    same([one.seq for one in found[:120]], list(range(1, 121)), "of one account, in one window")
    same([one.replayed for one in found], [False] * 120 + [True] * 130, "with repeats")
    same(bench.meter("rolling").decide_many(batch), [replace(one, replayed=True) for one in found], "repeats")
    derived(bench)


def check_large_batches_that_fail(bench):
    """Whichever write of a large batch fails, what the ledger has was decided, and the state follows."""
    asks = [asked(number, 1, account=f"account {number % 460}") for number in range(620)]
    with bench.failing(meter := bench.meter(), "apply.lua", Fault(0, 0)):
        meter.decide_many(asks)
    entries, total = len(bench.raw.ask("XRANGE", SHARD.ledger, "-", "+")), int(bench.raw.ask("GET", "calls"))
    for place in (*range(total - entries - 2, total - entries + 2), total - 1, total):
        bench.reset()
        meter = bench.meter()
        answers = []
        is_refused = True
        with suppress(NotExecuted), bench.failing(meter, "apply.lua", Fault(place, place, "OOM")):
            answers = meter.decide_many(asks)
            is_refused = False
        bench.raw.ask("DEL", "calls")
        bench.raw.load(bench.texts)
        known = [one.id for one in bench.raw.ledger()]
        same(known, [one.id for one in asks[: len(known)]], "the ledger")
        same(len(known), 0 if is_refused else len(answers), "what was written")
        same([one.replayed for one in meter.decide_many(asks)], [number < len(known) for number in range(620)], "then")
        derived(bench)


# -- What is refused


SPAN = "001745107200000000 001745193600000000"
NO_TALLIES = (
    "", "x", f"nan 1 {SPAN}", f"1e3 1 {SPAN}", f"-1 1 {SPAN}", f"1.5 1 {SPAN}", f"x1 1 {SPAN}", f"1 {SPAN}",
    f"1 1 {SPAN} ", f" 1 1 {SPAN}", f"1 1 {SPAN[1:]}", f"1 1 0{SPAN}", f"1 -1 {SPAN}", f"{10**16} 1 {SPAN}",
    f"1 {10**15} {SPAN}", f"1 1 {SPAN}x", f"1 1 {SPAN} {'0' * 23}", f"1 1 {SPAN} {'0' * 23}x",
    f"1 1 {SPAN}{'0' * 24}", f"1 1 {SPAN} {'0' * 25}",
    f"1 1 {SPAN[:18]}-{SPAN[19:]}", f"1 x {SPAN}",
)  # fmt: skip


def check_tallies(bench):
    """A tally that cannot be read is not counted on, singly or in a batch, and nothing is written."""
    for window in ("day", "rolling"):
        bench.reset()
        meter = bench.meter(window)
        meter.decide(asked(1, 1))
        field = field_of(bench, b"t")
        for text in NO_TALLIES:
            bench.raw.ask("HSET", SHARD.state, field, text)
            before = bench.raw.contents()
            for asks in ([asked(2, 1)], [asked(3, 1, model=SMALL), asked(2, 1)]):
                error = refused(NotExecuted, meter.decide_many, asks)
                assert "a tally cannot be read" in str(error), text
            same(bench.raw.contents(), before, f"what is kept with {text!r}")
        for used, seq, span in ((9 * 10**14, 10**14, SPAN), (5, 7, SPAN)):
            bench.raw.ask("HSET", SHARD.state, field, f"{used} {seq} {span}")
            found = meter.decide(asked(f"after {used}", 1))
            same((found.used, found.total, found.seq), (used + (used < 1_000), used + 1, seq + 1), "counted on")


def check_counters(bench):
    """Counters that cannot be read are not counted on, and nothing is written."""
    meter = bench.meter()
    meter.decide(asked(1, 1))
    texts = ("", "x", "1 0 2", "-1 0 2 1 ", "x 0 2 1 ", "1 x 2 1 ", "1 0 x 1 ", "1 0 2 11 ", "1 0 2 x ", "1 0 2 1 x",
             "x1 0 2 1 ", " 1 0 2 1 ", "1 0 2 1 0 ")  # fmt: skip
    for text in texts:
        bench.raw.ask("HSET", SHARD.state, "n", text)
        before = bench.raw.contents()
        for asks in ([asked(1, 1)], [asked(2, 1)], [asked(2, 1), asked(3, 1)]):
            error = refused(NotExecuted, meter.decide_many, asks)
            assert "counters cannot be read" in str(error), text
        same(bench.raw.contents(), before, f"what is kept with {text!r}")


def check_exactness(bench):
    """A window's total is counted up to what is exact, and refused beyond."""
    for window in ("day", "rolling"):
        bench.reset()
        offer = small_offer(window, reading=("all", "whole"))
        store = bench.store()
        meter = Meter(store, offer, assume=ENROLLED)
        meter.decide(asked(1, 1))
        field = field_of(bench, b"t")
        span = b" ".join(bench.raw.ask("HGET", SHARD.state, field).split()[2:4])
        bench.raw.ask("HSET", SHARD.state, field, b"%d 1 %b" % (EXACT_MAX - 3, span))
        same(meter.decide(asked(2, 3)).used, EXACT_MAX, "the last that is exact")
        before = bench.raw.contents()
        for asks in ([asked(3, 1)], [asked(4, 1, model=SMALL), asked(3, 1)]):
            error = refused(NotExecuted, meter.decide_many, asks)
            assert "counted exactly" in str(error), "why"
        same(bench.raw.contents(), before, "what is kept")
        same(meter.decide(asked(3, 0)).used, EXACT_MAX, "nothing more")


def check_arguments(bench):
    """What is no number, or too large a one, is not counted on; the largest are."""
    for offer in (small_offer("day"), small_offer("rolling", reading=("free", "excess"))):
        bench.reset()
        store = bench.store()
        charge = charge_for(offer, asked(1, 5), ENROLLED)
        terms = charge.terms
        wrong = [
            replace(charge, amount=-1),
            replace(charge, amount=10**13, request=sized(1, 10**13)),
            replace(charge, terms=replace(terms, allowance=10**15)),
            replace(charge, terms=replace(terms, allowance=-1)),
        ]
        if charge.rolls:
            wrong += [replace(charge, amount=6), replace(charge, request=sized(1, 10**13 + 5))]
        before = bench.raw.contents()
        for one in wrong:
            for charges in ([one], [charge_for(offer, asked(2, 5, model=SMALL), ENROLLED), one]):
                error = refused(NotExecuted, store.apply, charges)
                assert "an argument is no number" in str(error), repr(one)
        same(bench.raw.contents(), before, "what is kept")
        most = replace(terms, allowance=10**15 - 1)
        (receipt,) = store.apply([replace(charge, amount=10**13 - 1, terms=most, request=sized(1, 10**13 - 1))])
        same((receipt.decision.is_free, receipt.decision.used), (True, 10**13 - 1), "the largest")
        if charge.rolls:
            none = replace(terms, allowance=0)
            over = sized(2, 10**13 + 4, account="over")
            (receipt,) = store.apply([replace(charge, terms=none, request=over)])
            same((receipt.decision.free_tokens, receipt.decision.seq), (10**13 - 1, 1), "the largest rest")


def check_arguments_that_are_no_numbers(bench):
    """What a client would never send is not counted on."""
    for window in ("day", "rolling"):
        for garbage in (b"543e1", b"5432x", b"0x543", b"-5432", b"54.21", b" 5432"):
            for place in ("amount", "allowance", "rest"):
                bench.reset()
                store = bench.store()
                offer = small_offer(window, reading=("free", "excess"))
                charge = charge_for(offer, asked(1, 5), ENROLLED)
                if place == "amount":
                    charge = replace(charge, amount=54_321, request=asked(1, 54_321))
                elif place == "allowance":
                    charge = replace(charge, terms=replace(charge.terms, allowance=54_321))
                elif charge.rolls:
                    charge = replace(charge, request=asked(1, 54_326))
                else:
                    continue
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(
                        store._core._calls, "write", partial(_with_garbage, store._core._calls.write, garbage)
                    )
                    for charges in ([charge], [charge_for(offer, asked(2, 5, model=SMALL), ENROLLED), charge]):
                        error = refused(NotExecuted, store.apply, charges)
                        assert "an argument is no number" in str(error), (place, garbage)


def _with_garbage(write, garbage, *args, **named):
    """A call in which a number is something else."""
    call, places = write(*args, **named)
    command = call.command.replace(b"54321", garbage)
    assert command != call.command, "the number is there"
    return replace(call, command=command), places


def sized(name, tokens, **fields):
    """A request of more tokens than one may have."""
    request = asked(name, 5, **fields)
    force_setattr(request, "input_tokens", tokens)
    return request


def check_behind(bench):
    """A state that is behind its ledger is told, whether the ledger or the caller knows better; then it follows."""
    for window in ("day", "rolling"):
        bench.reset()
        bench.clock.now = LATER
        meter, early = bench.meter(window), bench.meter(window)
        planted_counters(bench, 0)
        states = [bench.raw.ask("DUMP", SHARD.state)]
        answers = []
        for number in range(1, 4):
            answers.append(meter.decide(asked(number, 300, at=NOON + number // 3 * DAY)))
            states.append(bench.raw.ask("DUMP", SHARD.state))
        expected = without_order(bench.raw.state())
        for state in states[:-1]:
            for asks in ([asked(1, 300)], [asked(3, 300, at=LATER), asked(2, 300)], [asked(4, 1, model=SMALL)]):
                bench.raw.ask("RESTORE", SHARD.state, 0, state, "REPLACE")
                view = meter if len(asks) == 1 else early
                is_dry = asks[0].id == "r4"
                found = [view.explain(asks[0]).decision] if is_dry else view.decide_many(asks)
                same([one.replayed for one in found], [not is_dry] * len(asks), "repeats")
                if view is meter:
                    same(without_order(bench.raw.state()), expected, "the state")
        before = 0
        for number, state in enumerate(states):
            new = [asked(f"{number} {place}", 1, model=SMALL, at=LATER) for place in range(2 + number % 2 * 2)]
            bench.raw.ask("RESTORE", SHARD.state, 0, state, "REPLACE")
            found = [one.seq for one in bench.meter(window).decide_many(new)]
            same(found, list(range(before + 1, before + 1 + len(new))), "new ones")
            before += len(new)
            derived(bench)
        derived(bench)
        bench.raw.ask("DEL", SHARD.state, SHARD.ledger)
        for ask in (partial(meter.decide, asked(9, 1)), partial(meter.explain, asked(9, 1))):
            error = refused(StoreError, ask)
            assert "ends at decision 0" in str(error), "what was lost"
        same(bench.raw.ask("EXISTS", SHARD.state, SHARD.ledger), 0, "keys")


def check_commits(bench):
    """What the ledger refuses is not executed; what the state refuses was decided nevertheless."""
    meter = bench.meter()
    meter.decide(asked(1, 1))
    dump = bench.raw.ask("DUMP", SHARD.ledger)
    bench.raw.ask("SET", SHARD.ledger, "x")
    before = bench.raw.state()
    error = refused(NotExecuted, meter.decide, asked(2, 1))
    assert "WRONGTYPE" in str(error), "why"
    same(bench.raw.state(), before, "the state")
    bench.raw.ask("RESTORE", SHARD.ledger, 0, dump, "REPLACE")
    with bench.failing(meter, "apply.lua", Fault(0, 0)):
        meter.decide(asked(2, 1))
    before, last = bench.raw.state(), int(bench.raw.ask("GET", "calls"))
    bench.raw.ask("DEL", "calls")
    with bench.failing(meter, "apply.lua", Fault(last, last, "OOM")):
        third = meter.decide(asked(3, 1))
    same((third.used, third.seq, bench.raw.state()), (3, 3, before), "decided, and not derived")
    bench.raw.ask("DEL", "calls")
    with bench.failing(meter, "apply.lua", Fault(last - 1, last - 1, "OOM")):
        error = refused(NotExecuted, meter.decide, asked(4, 1))
    assert "OOM" in str(error), "why"
    bench.raw.load(bench.texts)
    same(meter.decide(asked(3, 1)), replace(third, replayed=True), "a repeat")
    derived(bench)


def check_facts(bench):
    """Facts that were told in a question are told again where a decision needs them, and are kept once."""
    meter = bench.meter()
    meter.explain(asked(1, 1))
    meter.explain(asked(1, 1, account="other"))
    decisions = [meter.decide(asked(1, 1))]
    decisions += meter.decide_many([asked(2, 1), asked(3, 1, account="other"), asked(4, 1)])
    meter.explain(asked(5, 1, project="p"))
    decisions += meter.decide_many([asked(5, 1, project="p"), asked(6, 1, project="p", account="other"), asked(7, 1)])
    words = sorted(value for name, value in bench.raw.state().items() if name[:1] == b"w")
    same([word[:1] for word in words], [b"a", b"a", b"{", b"{"], "words")
    same([entry.decision for entry in bench.meter().ledger()], decisions, "the ledger")
    same(read_counters(bench.raw.state()[b"n"]).words, 4, "the counter of words")
    derived(bench)


# -- What is kept no longer


def trims(store, upto, kept, *fields):
    """What the script says, asked to forget up to a decision."""
    said = [b"%d" % upto, kept, *fields]
    arguments = b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in said)
    return run(store, store._core.asking.reply(trim.TRIM.call(SHARD, arguments, len(said))))


def parts(ids):
    """A field of the index, id by id."""
    return [ids[at : at + 10] for at in range(0, len(ids), 10)]


def check_trims(bench):
    """What was to be forgotten is, to the letter; what stays is found, and goes on."""
    for last in (0, 252, 65_533, 16_777_213, 4_294_967_293):
        bench.reset()
        planted_counters(bench, last, base=last)
        meter = bench.meter()
        old = [meter.decide(asked(1, 400)), *meter.decide_many([asked(2, 300), asked(3, 1, account="other")])]
        bench.clock.now = WEEKS
        new = meter.decide_many([asked(4, 5, at=WEEKS), asked(5, 6, at=WEEKS)])
        state = bench.raw.state()
        index = {name: value for name, value in state.items() if name[:1] == b"i"}
        same(meter._store.trim(last), (last,), "nothing to forget")
        same(bench.raw.state(), state, "the state as it was")
        same(meter._store.trim(last + 4), (last + 3,), "how far")
        expected = {
            name: b"".join(part for part in parts(value) if part[5:] > (last + 3).to_bytes(5))
            for name, value in index.items()
        }
        found = {name: value for name, value in bench.raw.state().items() if name[:1] == b"i"}
        same(found, {name: value for name, value in expected.items() if value}, "the index")
        counters = read_counters(bench.raw.state()[b"n"])
        kept = digits(micros(old[0].window.end))
        same((counters.last, counters.base, counters.kept), (last + 5, last + 3, kept), "counters")
        same((counters.words, counters.top), (read_counters(state[b"n"]).words, 1), "words and top")
        same([one.number for one in bench.raw.ledger()], [last + 4, last + 5], "the ledger")
        again = [replace(one, replayed=True) for one in new]
        same(meter.decide_many([one.request for one in new]), again, "repeats")
        bench.clock.now = NOON
        same({one.reason for one in meter.decide_many([one.request for one in old])}, {"too_late"}, "what is late")


def check_trims_of_one_field(bench):
    """Where many ids share a field of the index, those are forgotten that are to be, and the others stay."""
    for upto in (1, 2, 3, 4):
        bench.reset()
        with places_all(b"00000\0\0\0\0\1"):
            meter = bench.meter()
            meter.decide_many([asked(1, 1)])
            first = [meter.decide(asked(number, number)) for number in range(2, 5)]
            bench.clock.now = WEEKS
            same(meter._store.trim(upto), (upto,), "how far")
            left = [int.from_bytes(part[5:]) for part in parts(bench.raw.state().get(b"i00", b""))]
            same(left, list(range(upto + 1, 5)), "left")
            bench.clock.now = NOON
            for decision in first[max(0, upto - 1) :]:
                same(meter.decide(decision.request), replace(decision, replayed=True), "a repeat")


def check_trims_by_hand(bench):
    """The script forgets what it is told to, once, and never more; what it is told wrong it refuses."""
    meter, raw = bench.meter(), bench.raw
    store = meter._store
    for number in range(1, 5):
        meter.decide(asked(number, 1))
    early, late = digits(1), digits(2)
    ledger = raw.ask("DUMP", SHARD.ledger)
    before = raw.contents()
    refused(NotExecuted, trims, store, 5, early)
    same(raw.contents(), before, "beyond the last")
    same(trims(store, 0, late), 0, "before the first")
    same(raw.contents(), before, "nothing")
    places = [place_of(WORD, f"r{number}", SALT.encode()) for number in range(1, 5)]
    fields = sorted({b"i" + place[: size + 2] for place in places for size in range(3)})
    same(trims(store, 2, late, *fields), 1, "two")
    same([one.number for one in raw.ledger()], [3, 4], "the ledger")
    same(read_counters(raw.state()[b"n"]).kept, late, "until when")
    state = raw.state()
    raw.ask("RESTORE", SHARD.ledger, 0, ledger, "REPLACE")
    same(trims(store, 2, early, *fields), 0, "again")
    same(([one.number for one in raw.ledger()], raw.state()), ([3, 4], state), "the ledger, again")
    same(trims(store, 3, early, *fields), 1, "one more")
    counters = read_counters(raw.state()[b"n"])
    same((counters.last, counters.base, counters.words, counters.top, counters.kept), (4, 3, 2, 1, late), "counters")
    same(trims(store, 4, early, *fields), 1, "the last")
    same((raw.ledger(), [name for name in raw.state() if name[:1] == b"i"]), ([], []), "all")
    same(meter.decide(asked(5, 1)).seq, 5, "what comes then")
    for text in ("", "x", "5 4 2", "x 4 2 1 ", "5 4 2 1 x", "5 4 2 11 ", "x5 4 2 1 "):
        raw.ask("HSET", SHARD.state, "n", text)
        before = raw.contents()
        refused(NotExecuted, trims, store, 5, early)
        same(raw.contents(), before, f"with counters {text!r}")
    raw.ask("HSET", SHARD.state, "n", "5 4 2 1 ")
    raw.ask("SET", SHARD.ledger, "x")
    before = raw.state()
    refused(NotExecuted, trims, store, 5, early, *fields)
    same(raw.state(), before, "with a ledger of another type")
    raw.ask("DEL", SHARD.state)
    refused(NotExecuted, trims, store, 0, early)


def check_trims_of_corrections(bench):
    """How often a decision was corrected is forgotten with its last correction, a claim when it is over."""
    meter = bench.meter(assume=None)
    meter.enroll("acme", ENROLLED, actor="ann")
    store, name, field = meter._store, meter.offer.name, b"c%b\0\xa2r1" % WORD
    end = meter.decide(asked(1, 100)).window.end
    meter.decide(asked(2, 100))
    for number, account in ((1, "r1"), (2, "r1"), (1, "r2")):
        meter.adjust(account, spent(10 * number), actor="ann", why=f"{number}", account="acme")
    for which, until in (("a", end), ("b", WEEKS)):
        assert store.claim(name, "acme", which, until=until, token=uuid4().hex), "claimed"
    for which in ("a", "b"):
        assert not store.claim(name, "acme", which, until=end, token=uuid4().hex), "claimed again"
    bench.clock.now = end + KEEP
    for upto, count in ((1, 2), (2, 2), (3, 2), (4, 0)):
        same(store.trim(upto), (upto,), "how far")
        same(store.corrections(name, "acme", "r1"), count, f"corrections, up to {upto}")
        same(field in bench.raw.state(), count > 0, "its field")
        same(store.corrections(name, "acme", "r2"), 1, "of another")
    claims = bench.raw.state()[b"m" + WORD].split(b"\n")
    same([line.split(b" ", 2)[2] for line in claims[:-1]], [b'"b"'], "what is claimed yet")
    assert store.claim(name, "acme", "a", until=end, token=uuid4().hex), "claimed anew"
    bench.clock.now = WEEKS + KEEP
    same(store.trim(9), (5,), "all")
    same([name for name in bench.raw.state() if name[:1] in {b"c", b"m", b"i"}], [], "fields of what is over")


def check_kept(bench):
    """The later of what the caller and the shard keep no longer counts, to the microsecond, in every window."""
    for window in ("day", "rolling"):
        bench.reset()
        end = bench.meter(window).decide(asked(1, 1)).window.end
        edge = micros(end if window == "day" else NOON)  # where windows roll, a request's own time counts, too
        for kept, reason in ((edge - 1, "within_allowance"), (edge, "too_late"), (edge + 1, "too_late")):
            keep(bench, kept)
            for bounds in (None, Bounds()):
                meter = Meter(bench.store(bounds=bounds), small_offer(window), assume=ENROLLED)
                same(meter.decide(asked(f"{kept} {bounds}", 1)).reason, reason, f"{kept - edge} behind")
            same(read_counters(bench.raw.state()[b"n"]).kept, digits(kept), "what is kept stays")
        bench.clock.now = end + KEEP + HOUR
        meter = bench.meter(window)
        keep(bench, edge - 1)
        same(meter.decide(asked("late", 1)).reason, "too_late", "by the caller's clock")
        same(read_counters(bench.raw.state()[b"n"]).kept, digits(edge - 1), "what a caller keeps is not kept")
    keep(bench, micros(NOON + DAY))
    meter = Meter(bench.store(bounds=None), small_offer("rolling"), assume=ENROLLED)
    reasons = [
        meter.decide(asked(f"{step}", 1, account="new", at=NOON + DAY + step * TICK)).reason for step in (-1, 0, 1)
    ]
    same(reasons, ["too_late", "too_late", "within_allowance"], "where no window is open")


def keep(bench, kept):
    """A shard keeps no longer what ended by an instant."""
    text = bench.raw.ask("HGET", SHARD.state, "n").rpartition(b" ")[0]
    bench.raw.ask("HSET", SHARD.state, "n", text + b" " + digits(kept))


# -- What is held


def check_histories(bench):
    """Short random histories of holds, corrections and claims are as in memory, and what is kept of them is whole."""
    for seed in HISTORIES:
        bench.reset()
        History(bench, seed, shards=1).run(HISTORY_STEPS, partial(exactly, bench))


def exactly(bench):
    """What is kept of holds is whole, and nothing is left of those that ended: the holds that are there."""
    found = holds_of(bench.raw)
    same(sorted(bench.raw.members()), sorted(hold.member for hold in found), "members")
    state = bench.raw.state()
    same([name for name, value in state.items() if name[:1] in {b"g", b"h", b"c"} and not value], [], "empty fields")
    return found


def held(meter, request, minutes, expiry="decided"):
    """A charge that holds a request for so many minutes."""
    charge = charge_for(meter.offer, request, ENROLLED)
    return replace(charge, step=Holding(NOON + minutes * MINUTE, Expiry(expiry)))


def holds_kept(bench):
    """Line and window's name of each hold that is kept, by the request's id."""
    state = bench.raw.state()
    found = {name[1:].split(b"\0", 2)[2]: text.split(b"\n", 2) for name, text in state.items() if name[:1] == b"h"}
    return {name: tuple(parts[:2]) for name, parts in found.items()}


def aside(bench):
    """What is set aside, by the windows' names."""
    return {name[2 + len(WORD) :]: value for name, value in bench.raw.state().items() if name[:1] == b"g"}


def check_holds_that_are_kept(bench):
    """What is kept of a hold says what it is to say, of each kind of answer; so does what is set aside, and by when."""
    for window, kind in (("day", b"day UTC"), ("rolling", b"rolling 24h")):
        bench.reset()
        meter = bench.meter(window)
        meter.hold(asked("before", None), 100, for_=HOUR)
        opened = meter.decide(asked("first", 100)).window
        span = b"%b %b" % (digits(micros(opened.start)), digits(micros(opened.end)))
        group = b"%%b\0%b\0" % kind
        own = group % b"large" + span[:18]
        unopened = (b"-", b"open") if window == "rolling" else (span, span[:18])
        late = (b"5 d o 100 900 5 " + span, own) if window == "rolling" else (b"0 d l - - 5 -", b"")
        rows = [
            (asked("fits", 800), 4, "decided", b"800 d w 100 100 800 " + span, own),
            (asked("not", 701), 3, "released", b"0 r o 100 900 701 " + span, own),
            (asked("nothing", 0), 5, "decided", b"0 d w 100 900 0 " + span, own),
            (asked("excluded", 5, model="unlisted"), 3, "released", b"0 r x - - 5 -", b""),
            (
                asked("small", 7, model=SMALL),
                3,
                "decided",
                b"7 d w 0 0 7 " + unopened[0],
                group % b"small" + unopened[1],
            ),
        ]
        answers = meter._store.apply([held(meter, *row[:3]) for row in rows])
        answers += meter._store.apply([held(meter, asked("too late", 5, at=NOON - 30 * DAY), 2)])
        same([one.status for one in answers], [Status.HELD] * 6, "held")
        late = (late[0].replace(b"5 d o", b"0 d o"), late[1])
        expected = {
            layout.id_bytes(row[0].id): (b"%b %b" % (digits(micros(NOON + row[1] * MINUTE)), row[3]), row[4])
            for row in rows
        }
        expected[layout.id_bytes("rtoo late")] = (b"%b %b" % (digits(micros(NOON + 2 * MINUTE)), late[0]), late[1])
        before = (b"100 d w 0 0 100 " + unopened[0], group % b"large" + unopened[1])
        expected[layout.id_bytes("rbefore")] = (b"%b %b" % (digits(micros(NOON + HOUR)), before[0]), before[1])
        same(holds_kept(bench), expected, "holds")
        sums = {before[1]: b"100", rows[4][4]: b"7"} | {own: b"800" if window == "rolling" else b"900"}
        same(aside(bench), sums, "set aside")
        same(bench.raw.state()[b"x" + WORD], digits(micros(NOON + 2 * MINUTE)), "the first end")
        holds_of(bench.raw)


def check_holds_that_are_listed(bench):
    """All holds of an account are listed, page by page, and those that ran out, the first ones first; of no other."""
    meter, count = bench.meter(), 1_203
    store, raw = meter._store, bench.raw
    for account in ("acm", "acme2", "acme"):
        many = [
            held(meter, asked(f"{number}", number % 2, account=account), number % 400 + 1) for number in range(count)
        ]
        for first in range(0, count if account == "acme" else 3, 400):
            store.apply(many[first : first + 400] if account == "acme" else many[:3])
    found = meter.holds("acme")
    same(len(found), count, "all")
    same(found, sorted(found, key=lambda hold: (hold.until, hold.id)), "in order")
    same([hold.id for hold in meter.holds("acm")], ["r0", "r1", "r2"], "another's")
    due = partial(store._core.holding.due, WORD)
    before = raw.contents()
    same(run(store, due(micros(NOON + MINUTE) - 1)), [], "none ran out")
    same(raw.contents(), before, "what is kept")
    same(run(store, due(micros(NOON + MINUTE))), found[:4], "just now")
    same(run(store, due(micros(NOON + DAY))), found[:100], "the first ones")
    same(raw.contents(), before, "what is kept then")
    stale = [b"%b\0%b\xa2r7" % (WORD, digits(1)), b"%b\0%b\xa4none" % (WORD, digits(2))]
    for member in stale:
        raw.ask("ZADD", SHARD.holds, 0, member)
    raw.ask("HSET", SHARD.state, b"x" + WORD, digits(1))
    same(run(store, due(5)), [], "what is there no more")
    same(raw.contents(), before, "what is kept without it")
    for member in stale:
        raw.ask("ZADD", SHARD.holds, 0, member)
    raw.ask("HSET", SHARD.state, b"x" + WORD, digits(1))
    same(meter.holds("acme"), found, "all again")
    same(raw.contents(), before, "what is kept without it")
    raw.ask("HSET", SHARD.state, b"x" + WORD, digits(1))
    same(run(store, due(5)), [], "when it is the first one's end that was early")
    same(raw.contents(), before, "what is kept then")
    for member in stale:
        raw.ask("ZADD", SHARD.holds, 0, member)
    raw.ask("HSET", SHARD.state, b"x" + WORD, digits(1))
    bench.clock.now += MINUTE / 2
    same(meter.decide(asked("new", 1)).used, 1, "a request")
    same(raw.members(), [member for member in before[SHARD.holds] if member != b"probe"], "what is looked for")


def check_holds_that_are_moved(bench):
    """A hold that is extended or given back changes what is set aside, and by when it is looked at, to the letter."""
    for window in ("day", "rolling"):
        bench.reset()
        meter, raw = bench.meter(window), bench.raw
        meter.decide(asked("first", 1))
        holds = {name: meter.hold(asked(name, None), size, for_=minutes * MINUTE) for name, size, minutes in HELD}
        (sum_field,) = aside(bench)

        def first_end(minutes, holds=tuple(holds)):
            end = b"" if minutes is None else digits(micros(NOON + minutes * MINUTE))
            same(bench.raw.state()[b"x" + WORD], end, "the first end")
            same(sorted(one.id[2:].decode() for one in holds_of(bench.raw)), sorted(holds), "holds")
            exactly(bench)

        first_end(1)
        store, name = meter._store, meter.offer.name
        for which, minutes, first in (
            ("a", 5, 2),
            ("b", 9, 3),
            ("b", 9, 3),
            ("c", 1, 1),
            ("c", 3, 3),
            ("d", 2, 2),
            ("d", 4, 3),
        ):
            end = NOON + minutes * MINUTE
            found = store.extend(name, "acme", f"r{which}", until=end)
            same(found, replace(holds[which], until=end), which)
            holds[which] = found
            first_end(first)
            same(aside(bench), {sum_field: b"371"}, "set aside")
        before = raw.contents()
        same(store.extend(name, "acme", "rnone", until=NOON), None, "none to extend")
        same(store.release(name, "acme", "rnone"), None, "none to give back")
        same(store.release(name, "acm", "ra"), None, "another's")
        same(raw.contents(), before, "what is kept")
        left = 371
        for which, first in (("d", 3), ("c", 5), ("a", 9), ("b", 9), ("e", None)):
            hold = holds.pop(which)
            same(store.release(name, "acme", hold.id), hold, which)
            left -= hold.aside
            same(aside(bench), {sum_field: b"%d" % left} if left else {}, "set aside")
            first_end(first, tuple(holds))
            same(store.release(name, "acme", hold.id), None, "once")
        refused(RequestError, meter.extend, hold)


def check_holds_that_end_in_one_call(bench):
    """What a call puts aside, gives back and ends counts for all that follows in it, of this account alone."""
    meter, raw = bench.meter(), bench.raw
    store = meter._store
    first = [held(meter, asked(name, 100), minutes) for name, minutes in (("a", 1), ("b", 2), ("c", 30))]
    store.apply(
        [*first, held(meter, asked("a", 100, account="other"), 1), held(meter, asked("a", 1, account="acm"), 90)]
    )
    bench.clock.now += 3 * MINUTE
    ends = [replace(one, step=Overdue(100, None)) for one in first[:2]]
    plain = charge_for(meter.offer, asked("new", 5), ENROLLED)
    others = charge_for(meter.offer, asked("new", 5, account="other"), ENROLLED)
    early, early_too = held(meter, asked("early", 7), 1), held(meter, asked("early", 7, account="new"), 2)
    receipts = store.apply([plain, *ends, others, early_too])
    expected = [Status.EXPIRED, Status.WAITING, Status.WAITING, Status.EXPIRED, Status.HELD]
    same([one.status for one in receipts], expected, "before they end")
    receipts = store.apply([*ends, plain, others, early, charge_for(meter.offer, asked("after", 1), ENROLLED), early])
    expected = [*[Status.DECIDED] * 3, Status.EXPIRED, Status.HELD, Status.EXPIRED, Status.WAITING]
    same([one.status for one in receipts], expected, "once they have ended")
    same([hold.id for hold in receipts[5].due], ["rearly"], "what ran out")
    same([one.decision.used for one in receipts[:3]], [100, 200, 205], "used")
    same(raw.state()[b"x" + WORD], digits(micros(NOON + MINUTE)), "the first end")
    receipts = store.apply([replace(early, step=Overdue(7, None)), plain, first[2], replace(first[2], step=None)])
    same([one.status for one in receipts], [Status.DECIDED, Status.REPLAYED, Status.HELD, Status.DECIDED], "then")
    same((receipts[2].hold.replayed, receipts[3].decision.hold.tokens_max), (True, 100), "settled")
    again = store.apply(
        [held(meter, asked("x", 5), 9), charge_for(meter.offer, asked("x", 4), ENROLLED), held(meter, asked("x", 5), 9)]
    )
    same([one.status for one in again], [Status.HELD, Status.DECIDED, Status.REPLAYED], "held and settled")
    left = [b"small-offer\0" + name for name in (b"acm", b"new", b"other")]
    same(sorted(hold.account for hold in exactly(bench)), left, "left")
    check(bench.meter())


def check_holds_that_fail(bench):
    """Whichever call fails while something is held, settled, ended, extended or given back, nothing of it is half."""
    verbs = {
        "hold": lambda meter: meter.hold(asked("new", None), 10),
        "settle": lambda meter: meter.decide(asked("a", 90)),
        "mixed": lambda meter: meter._store.apply(
            [held(meter, asked("new", 10), 30), charge_for(meter.offer, asked("plain", 1), ENROLLED)]
        ),
        "several": lambda meter: meter.decide_many([asked("a", 90), asked("b", 90), asked("more", 1)]),
        "extend": lambda meter: meter.extend(replace(meter.holds("acme")[0]), for_=HOUR),
        "release": lambda meter: (meter.release(meter.holds("acme")[0]), "told"),
    }
    for name, verb in verbs.items():
        for late in (False, True):
            for script in ("apply.lua", "hold.lua"):
                place, total = 0, 0
                while place <= total:
                    bench.reset()
                    meter = bench.meter()
                    for which, size, minutes in HELD:
                        meter.hold(asked(which, None), size, for_=minutes * MINUTE)
                    bench.clock.now += MINUTE * late
                    before = bench.raw.contents()
                    answer = None
                    with suppress(NotExecuted, RequestError), bench.failing(meter, script, Fault(place, place, "OOM")):
                        answer = verb(meter)
                    total = max(total, int(bench.raw.ask("GETDEL", "calls") or 0))  # with no fault it makes them all
                    after = bench.raw.contents()
                    if answer is None and name in {"extend", "release"}:
                        same(after[SHARD.state], before[SHARD.state], f"{name}, {script}, call {place}")
                    kept = {hold.id for hold in holds_of(bench.raw)}
                    if isinstance(answer, Hold) or (name == "mixed" and answer and answer[0].hold):
                        assert name == "extend" or layout.id_bytes("rnew") in kept, f"what {name} said, call {place}"
                    bench.raw.load(bench.texts)
                    if answer is None or name not in {"extend", "release"}:
                        verb(bench.meter())
                    holds_of(bench.raw)
                    bench.clock.now += 2 * HOUR
                    meter = bench.meter()
                    meter.expire("acme")
                    meter.decide(asked("last", 0))
                    same(
                        (holds_of(bench.raw), bench.raw.members()),
                        ([], []),
                        f"what is left of {name}, {script} {place}",
                    )
                    check(meter)
                    place += 1


def check_holds_that_share_a_window(bench):
    """What one call gives back and sets aside of one window adds up, down to the last token, and to large numbers."""
    for window in ("day", "rolling"):
        bench.reset()
        meter = bench.meter(window)
        meter.decide(asked("first", 0))
        store = meter._store
        for size in (1, 2, 900):
            names = (f"a {size}", f"b {size}", f"c {size}", f"d {size}")
            a, b, c, d = (held(meter, asked(name, size), 5) for name in names)
            small = replace(held(meter, asked(names[1], 1), 5))
            store.apply([a, small])
            exactly(bench)
            store.apply([replace(a, step=None), c])
            exactly(bench)
            store.apply([replace(small, step=None), replace(c, step=None), b, d])
            same(len(exactly(bench)), 1, "left")
            store.apply([replace(d, step=None)])
            same(exactly(bench), [], "at last")
        five, one = (held(meter, asked(f"all but {size}", size), 5) for size in (5, 1))
        store.apply([five, one])
        store.apply([replace(five, step=None)])
        same([hold.tokens for hold in exactly(bench)], [1], "all but one")
        store.apply([replace(one, step=None)])
        again = held(meter, asked("again", 5), -5, "released")
        steps = [again, replace(again, step=Overdue(5, None)), again, replace(again, step=Overdue(5, None))]
        steps += [held(meter, asked("again", 6), 7)]
        receipts = store.apply(steps)
        same([one.status for one in receipts], [Status.HELD, Status.GONE] * 2 + [Status.HELD], "again and again")
        same([hold.tokens for hold in exactly(bench)], [6], "the last one")
        terms, most = replace(again.terms, allowance=10**15 - 1), 10**13 - 1
        (before,) = (tally.used for _, _, tally in store.tallies(meter.offer.name, "acme"))
        for number in range(24):
            large = replace(again, amount=most, terms=terms, request=asked(f"large {number}", 5))
            plain = replace(large, step=None, request=asked(f"plain {number}", 5))
            (hold,) = (one.hold for one in store.apply([replace(large, step=held(meter, asked("x"), 9).step)]))
            same((hold.used, hold.held), (before + most * number, 6 + most * number), "what there was")
            (decided,) = store.apply([plain])
            same(decided.decision.used, before + most * (number + 1), "used")
        exactly(bench)
        same(store.release(meter.offer.name, "acme", "rlarge 3").amount, most, "given back")
        exactly(bench)
        store.apply([replace(large, step=None)])
        exactly(bench)
        wrong = replace(held(meter, asked("wrong", 5), 9), amount=10**13, request=sized("wrong", 10**13))
        for charges in ([wrong], [held(meter, asked("fine", 1, model=SMALL), 9), wrong]):
            assert "an argument is no number" in str(refused(NotExecuted, store.apply, charges)), "why"
        exactly(bench)


def check_holds_at_their_ends(bench):
    """To the microsecond: by when a hold has run out, and which window is open for one."""
    meter, raw = bench.meter(), bench.raw
    store, name = meter._store, b"x" + WORD
    ends = [NOON + MINUTE - TICK, NOON + MINUTE, NOON + MINUTE + TICK]
    for which, end in zip("abc", ends, strict=True):
        charge = held(meter, asked(which, 10), 1)
        store.apply([replace(charge, step=replace(charge.step, until=end))])
    bench.clock.now = ends[0]
    same(meter.decide(asked("a", 5)).used, 5, "the first")
    same(raw.state()[name] in {digits(micros(ends[0])), digits(micros(ends[1]))}, True, "the first end")  # noqa: FBT003 - as found
    bench.clock.now = ends[1]
    same(meter.decide(asked("b", 5)).used, 10, "the second")
    same(meter.decide(asked("plain", 1)).used, 11, "none ran out")
    same(raw.state()[name], digits(micros(ends[2])), "the last end")
    bench.clock.now = ends[2]
    (receipt,) = store.apply([charge_for(meter.offer, asked("more", 1), ENROLLED)])
    same((receipt.status, [hold.id for hold in receipt.due]), (Status.EXPIRED, ["rc"]), "ran out")
    same(meter.decide(asked("more", 1)).used, 22, "then")
    same(meter.decide(asked("last", 1)).used, 23, "and then")
    same((exactly(bench), raw.state()[name]), ([], b""), "left")
    released = held(meter, asked("released", 5), 9, "released")
    store.apply([released])
    bench.clock.now = NOON + 9 * MINUTE
    same([one.status for one in store.apply([replace(released, step=Overdue(5, None))])], [Status.GONE], "given back")
    same(exactly(bench), [], "left then")
    ahead = asked("ahead", 5, at=bench.clock.now + HOUR)
    for verb in (partial(meter.hold, ahead, 5), partial(meter.decide, ahead)):
        same(refused(RequestError, verb).field, "at", "ahead")
    same(exactly(bench), [], "left of it")
    bench.reset()
    meter = bench.meter("rolling")
    end = meter.decide(asked("first", 100)).window.end
    bench.clock.now = end + HOUR
    meter.hold(asked("own", None, at=end - TICK), 1)
    for place, (at, expected) in enumerate(((end - TICK, (100, 1)), (end, (0, 0)), (end + TICK, (0, 7)))):
        hold = meter.hold(asked(f"{place}", None, at=at), 7)
        same((hold.used, hold.held, hold.window is None), (*expected, place > 0), f"{place} behind the last")
    exactly(bench)


def check_holds_that_are_settled_late(bench):
    """What follows, in one call, a settle whose hold was decided by its bound waits for it; a question does not."""
    meter, other = bench.meter(), bench.meter()
    store = meter._store
    meter.hold(asked("a", None), 100, for_=MINUTE)
    bench.clock.now += HOUR
    meter.expire("acme")
    late, new, elsewhere, first = (
        charge_for(meter.offer, one, ENROLLED)
        for one in (asked("a", 9), asked("b", 5), asked("b", 5, account="other"), asked("plain", 9, output_tokens=117))
    )
    store.apply([first])
    said = [one.status for one in store.apply([first, late, new, elsewhere, first, new], dry=True)]
    same(
        said, [Status.REPLAYED, Status.CONFLICT, Status.DECIDED, Status.DECIDED, Status.REPLAYED, Status.DECIDED], "dry"
    )
    before = bench.raw.contents()
    said = [one.status for one in store.apply([late, new, first, held(meter, asked("c", 5), 90)])]
    same(said, [Status.CONFLICT, Status.WAITING, Status.REPLAYED, Status.WAITING], "what waits")
    same(bench.raw.contents(), before, "what is kept")
    said = [one.status for one in store.apply([first, new, elsewhere])]
    same(said, [Status.REPLAYED, Status.DECIDED, Status.DECIDED], "what does not")
    early = held(meter, asked("early", 50), 1)
    overdue = replace(early, step=Overdue(50, None))
    plain = charge_for(meter.offer, asked("early", 40), ENROLLED)
    last = charge_for(meter.offer, asked("last", 1), ENROLLED)
    said = [one.status for one in store.apply([early, overdue, plain, last, plain])]
    same(said, [Status.HELD, Status.DECIDED, Status.CONFLICT, Status.WAITING, Status.CONFLICT], "in one call")
    answers = other.decide_many([asked("early", 40), asked("last", 1), asked("a", 9)])
    same([one.used for one in answers], [100 + 126 + 5 + 40, 272, 272 - 91], "in order")
    settled = held(meter, asked("settled", 5), 90)
    said = [
        one.status for one in store.apply([settled, replace(settled, step=None), replace(settled, step=None), last])
    ]
    same(said, [Status.HELD, Status.DECIDED, Status.REPLAYED, Status.REPLAYED], "settled in time")
    fresh = charge_for(meter.offer, asked("fresh", 1), ENROLLED)
    said = [one.status for one in store.apply([replace(settled, step=None), fresh])]
    same(said, [Status.REPLAYED, Status.DECIDED], "settled in time before")
    exactly(bench)
    check(other)


def check_holds_of_windows_before(bench):
    """What is settled, decided by its bound or corrected counts in its own window, whatever has opened since."""
    for is_alone in (True, False):
        bench.reset()
        twins = Twins(bench, small_offer("rolling"), bounds=None)
        until = NOON + 5 * DAY

        def ask(*charges, twins=twins, is_alone=is_alone):
            parts = [[charge] for charge in charges] if is_alone else [charges]
            return [receipt.decision and receipt.decision.window for part in parts for receipt in twins.apply(part)]

        def sized_at(name, size, at=NOON, step=None, twins=twins):
            return twins.charge(asked(name, size, at=at), step)

        (window,) = ask(sized_at("first", 500))
        for name in "abcde":
            ask(sized_at(name, 50, NOON, Holding(until, Expiry.DECIDED)))
        twins.clock.now += DAY
        (second,) = ask(sized_at("second", 300, twins.clock.now))
        step = Held(50, window, is_unmeasured=True)
        found = ask(
            sized_at("x", 10, twins.clock.now),
            sized_at("a", 40),
            sized_at("y", 10, twins.clock.now),
            sized_at("b", 50, NOON, step),
            sized_at("c", 600),
        )
        same(found, [second, window, second, window, window], "in their windows")
        first = next(one for one in twins.meters[0].decisions("ra", account="acme"))
        void = corrects(twins.offer, first, first, first.request, Remedy.VOIDED, number=1, actor="ann", why="a")
        twins.clock.now = until
        third = sized_at("third", 5, twins.clock.now)
        ends = [sized_at(name, 50, NOON, Overdue(50, window)) for name in "de"]
        (opened, *found) = ask(*ends, third, void, sized_at("last", 6, twins.clock.now))
        same([opened, found[0], found[2]], [window] * 3, "in theirs, too")
        twins.check()
        derived(bench)
        exactly(bench)


def check_holds_of_another_type(bench):
    """Where the key of holds is of another type, what is about them is refused and writes nothing; all else goes on."""
    meter, raw = bench.meter(), bench.raw
    hold = meter.hold(asked("a", None), 100, for_=MINUTE)
    raw.ask("SET", SHARD.holds, "x")
    before = raw.contents()
    verbs = (
        partial(meter.hold, asked("b", None), 10),
        partial(meter.decide, asked("a", 10)),
        partial(meter.decide_many, [asked("a", 10), asked("b", 10, account="other")]),
        partial(meter.extend, hold),
        partial(meter.release, hold),
        partial(meter.holds, "acme"),
    )
    for verb in verbs:
        assert "WRONGTYPE" in str(refused(NotExecuted, verb)), "why"
        same(raw.contents(), before, "what is kept")
    same(meter.decide(asked("b", 10, account="other")).used, 10, "where nothing is held")


def check_holds_on_what_was_missed(bench):
    """Who holds, or ends a hold, on a state that is behind its ledger does so once that has followed."""
    other, meter = bench.meter(), bench.meter()
    early = meter.hold(asked("a", None), 50, for_=MINUTE)
    meter.decide(asked("first", 100))
    dump = bench.raw.ask("DUMP", SHARD.state)
    meter.decide(asked("second", 800))
    bench.raw.ask("RESTORE", SHARD.state, 0, dump, "REPLACE")
    hold = other.hold(asked("b", None), 100)
    same((hold.used, hold.held, hold.fits), (900, 50, False), "the hold")
    bench.raw.ask("RESTORE", SHARD.state, 0, dump, "REPLACE")
    assert bench.meter().hold(asked("second", None), 5).decision, "what was decided"
    same(meter.settle(early, spent(5)).used, 905, "settled")
    holds_of(bench.raw)
    derived(bench)


def check_corrections_that_are_refused(bench):
    """A correction that is not the next one, or returns more than there is, writes nothing."""
    for window in ("day", "rolling"):
        bench.reset()
        meter = bench.meter(window, assume=None)
        meter.enroll("acme", ENROLLED, actor="ann")
        first = meter.decide(asked("a", 100))
        meter.decide(asked("b", 20))
        for number, verb in enumerate((partial(meter.void, why="a"), partial(meter.adjust, usage=spent(70), why="b"))):
            word = verb("ra", actor="ann", account="acme")
            same((word.correction.number, word.used, word.seq), (number + 1, 20 + 70 * number, 3 + number), "corrected")
        latest = meter.decisions("ra", account="acme")[-1]
        charge = corrects(meter.offer, first, latest, first.request, Remedy.VOIDED, number=3, actor="ann", why="c")
        before = bench.raw.contents()
        for number, status in ((1, Status.STALE), (2, Status.STALE), (4, Status.STALE)):
            step = replace(charge.step, number=number)
            request = replace(charge.request, id=f"ra~{number}x")
            (receipt,) = meter._store.apply([replace(charge, request=request, step=step)])
            same(receipt.status, status, f"number {number}")
        same(bench.raw.contents(), before, "what is kept")
        much = replace(charge, step=replace(charge.step, returned=91))
        for charges in ([much], [charge_for(meter.offer, asked("c", 0), ENROLLED, version=1), much]):
            assert "more than was used" in str(refused(NotExecuted, meter._store.apply, charges)), "why"
        same(bench.raw.contents(), before, "what is kept then")
        meter.hold(asked("held", None), 5)
        taken = replace(charge, request=replace(charge.request, id="rheld", at=NOON))
        (receipt,) = meter._store.apply([taken])
        same((receipt.status, receipt.hold and receipt.hold.id), (Status.CONFLICT, "rheld"), "an id that is held")
        meter.release(receipt.hold)
        all_of_it = replace(charge, step=replace(charge.step, returned=90))
        same(meter._store.apply([all_of_it])[0].decision.used, 0, "all of it")
        keep(bench, micros(NOON + HOUR))
        bench.clock.now = NOON + 2 * HOUR
        if window == "rolling":  # a window of another account, which is kept no longer, may have ended within this one
            meter.decide(asked("more", 20, at=bench.clock.now))
            later = charge_for(meter.offer, asked("later", 990, at=bench.clock.now), ENROLLED, version=1)
            step = replace(charge.step, number=4, returned=20)
            early = replace(charge, request=replace(charge.request, id="ra~4"), step=step)
            found = meter._store.apply([early, later])
            same((found[0].status, found[1].decision.used), (Status.CLOSED, 20), "what it returned")
        bench.clock.now = NOON + 30 * DAY
        closed = replace(
            charge, request=replace(charge.request, id="ra~4"), step=replace(charge.step, number=4, returned=0)
        )
        other = charge_for(meter.offer, asked("d", 5), ENROLLED, version=1)
        before = bench.raw.contents()
        same(meter._store.apply([closed])[0].status, Status.CLOSED, "closed")
        same(bench.raw.contents(), before, "what is kept at last")
        same([one.status for one in meter._store.apply([closed, other])], [Status.CLOSED, Status.DECIDED], "beside it")


HELD = (("a", 100, 1), ("b", 200, 2), ("c", 70, 3), ("d", 0, 3), ("e", 1, 9))


SLOW = (
    "test_threads_are", "test_the_ledger_is_resumed", "test_totals_are", "test_who_follows", "test_counters_are",
    "test_changes_made", "test_a_task", "test_tasks", "test_an_id_that_all", "test_the_last_token",
)  # fmt: skip


def check_contract(bench):
    """The contract of a store, but for its clauses about threads and large numbers of requests."""
    for name, clause in StoreContract.clauses():
        if not name.startswith(SLOW):
            bench.reset()
            clause(partial(opened, bench))


def check_longer_programs(bench):
    """Longer random programs have the rule's answers."""
    for seed in range(3):
        bench.reset()
        drive(partial(opened, bench), seed=seed, steps=500)


LONG = (
    check_histories,
    check_holds_that_fail,
    check_programs,
    check_large_batches,
    check_large_batches_that_fail,
    check_contract,
    check_longer_programs,
)
CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_") and value not in LONG]
CHECKS += LONG
OF_HOLDS = [each for each in CHECKS if each.__name__.startswith(("check_holds", "check_corrections", "check_hist"))]
