"""Property runs: a sound store never fails, each broken one is caught, and what is printed is the smallest history."""

from __future__ import annotations

from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from gratis import Enrollment, Sharing, StoreError
from gratis.audit.properties import check
from gratis.audit.properties.choosing import VIEWS, history_of
from gratis.audit.properties.driving import Run
from gratis.audit.properties.expected import Clash, Expected, Refused
from gratis.audit.properties.histories import Asking, Enrolling, History, Holding, Settling, Together, cut, requests_of
from gratis.audit.properties.namespaces import Memory, spaces_of
from gratis.audit.properties.shrinking import is_parted, shrunk
from gratis.audit.properties.together import Call, judged, run_lanes
from gratis.model import Change, Counts, Decision, Request
from gratis.offers import load, shipped
from gratis.stores import Bounds
from gratis.stores.redis import calls
from gratis.testing.scene import DAY, HOUR, NOON, TICK

from . import broken_stores
from .broken_stores import Forgetful, Judged, Kept, Sound, kinds_of_spaces
from .servers import Cluster, Server

if TYPE_CHECKING:
    from collections.abc import Iterator

OFFER = load("openai-data-sharing")
MODEL = "gpt-4o-2024-08-06"
ENROLLED = Enrollment(tier=3, sharing=Sharing.ENABLED)
SEEDS = (1, 2, 3)
STEPS = 4_000
# What it takes to see the fault, however small the history is made: the steps that are left.
LONGEST = {
    "CheckThenAct": 4,  # what threads do is not always the same
    "OffByOne": 2,
    "DedupLost": 3,
    "DedupLostSometimes": 3,
    "DedupLostAfterItsWindow": 4,
    "ForgetsTooEarly": 4,
    "CounterSurvives": 3,
    "LocalMidnight": 4,
    "ChangedTokensAccepted": 2,
    "BilledCounts": 3,
    "LosesEntries": 20,  # every tenth entry, so ten steps at least
    "ForgetsLinks": 20,  # as above
    "LateIsToday": 3,
    "SeenLate": 4,
    "HoldsIgnored": 4,
    "AnswersSwapped": 2,
    "WindowsDropped": 3,
    "TalliesTold": 2,
    "CountersTold": 2,
    "ChangesLost": 1,
    "AccountsLost": 1,
    "TimesLost": 1,
    "NumbersRepeat": 2,
}
BROKEN = [
    kind
    for kind in vars(broken_stores).values()
    if isinstance(kind, type) and issubclass(kind, Kept) and kind not in {Kept, Judged, Sound, Forgetful}
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A private server."""
    with Server() as server:
        yield server


def failing(kind: type[Kept], seed: int, steps: int = STEPS):
    """What is reported of a broken store."""
    return check(kinds_of_spaces(kind), seed=seed, steps=steps, shrinking_s=20)


def asked(name: object, tokens: int, at=NOON) -> Request:
    """A request of that size."""
    return Request(id=f"r{name}", account="a", model=MODEL, at=at, input_tokens=tokens, output_tokens=0)


# -- sound stores


@pytest.mark.parametrize("seed", range(8))
def test_a_sound_store_in_memory_never_fails(seed):
    """The memory store answers as the rule does, whatever is asked of it."""
    spaces = Memory()
    report = check(spaces.open, drop=spaces.drop, seed=seed, steps=STEPS)
    assert (report.failure, report.steps) == (None, STEPS)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_sound_file_never_fails(seed, tmp_path):
    """The SQLite store answers as the rule does, over several views."""
    spaces = spaces_of(f"sqlite:///{tmp_path}/gratis.db?synchronous=off")
    report = check(spaces.open, drop=spaces.drop, seed=seed, steps=1_500)
    assert (report.failure, report.steps) == (None, 1_500)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_sound_server_never_fails(seed, server):
    """The Redis store answers as the rule does."""
    spaces = spaces_of(server.url)
    report = check(spaces.open, drop=spaces.drop, seed=seed, steps=2_000)
    assert (report.failure, report.steps) == (None, 2_000)


def test_a_sound_cluster_never_fails():
    """So does the store over a cluster, and nothing is left on any of its masters."""
    with Cluster() as cluster:
        spaces = spaces_of(cluster.url)
        report = check(spaces.open, drop=spaces.drop, seed=1, steps=1_000)
        assert report.failure is None
        assert [master.ask("DBSIZE") for master in cluster.masters] == [0, 0, 0]


@pytest.mark.parametrize("name", shipped())
def test_every_offer_can_be_asked(name):
    """Histories are chosen for any offer: other units, windows and tiers."""
    spaces = Memory()
    report = check(spaces.open, drop=spaces.drop, seed=1, steps=1_500, offer=load(name))
    assert report.failure is None


def test_the_fakes_are_sound_but_for_their_fault():
    """What the broken stores are made of has no fault of its own."""
    assert [failing(Sound, seed).failure for seed in SEEDS] == [None] * len(SEEDS)


def test_everything_is_asked():
    """A usual run meets every kind of answer, step and window."""
    report = check(Memory().open, seed=1, steps=STEPS)
    expected = {
        *("within_allowance", "over_allowance", "too_late", "not_enrolled", "sharing_disabled", "project_not_shared"),
        *("model_not_listed", "fine_tuned_model", "fine_tuning_training", "tool_use", "unmeasured", "evals"),
        *("account_not_eligible", "offer_not_in_force", "assistants_o_series"),
        *("replayed", "conflict", "ahead of the clock", "rolling", "calendar", "batches", "at once", "reopened"),
        *("enrolled", "enrollment refused", "held", "settled", "released"),
    }
    missing = expected - {name for name, count in report.counts.items() if count}
    assert missing <= {"evals", "offer_not_in_force", "assistants_o_series"}  # rare: in some runs, not in each


def test_hostile_names_are_asked():
    """Ids and accounts that look like something else are among the requests."""
    requests = [one for number in range(40) for one in requests_of(history_of(1, number, OFFER).steps)]
    names = {one.id for one in requests} | {one.account for one in requests}
    assert {"x" * 255, "Caf\u00e9", "Cafe\u0301", " ", "a:b", "a}{b", "*", "\u2028", "null"} <= names
    tokens = {one.tokens for one in requests}
    assert {None, 0, 10**12} <= tokens


# -- broken stores


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", BROKEN, ids=[kind.__name__ for kind in BROKEN])
def test_a_broken_store_is_caught(kind, seed):
    """Each fault is found within the default steps, whatever the seed, and shrunk to the few steps that it takes."""
    report = failing(kind, seed)
    assert report.failure is not None
    assert report.steps < STEPS
    assert len(report.history.steps) <= LONGEST[kind.__name__]


def test_each_fault_has_its_bound():
    """The list of bounds names the broken stores that there are."""
    assert sorted(LONGEST) == sorted(kind.__name__ for kind in BROKEN)


class Planted:
    """The files of a package, one of them with a fault."""

    def __init__(self, usual, old: str, new: str) -> None:
        self.usual, self.old, self.new = usual, old, new

    def __call__(self, package):
        """The package's files."""
        self.folder = self.usual(package)
        return self

    def joinpath(self, name):
        """One of the files."""
        self.name = name
        return self

    def read_bytes(self):
        """Its text, with the fault if it is the script."""
        text = self.folder.joinpath(self.name).read_text(encoding="utf-8")
        if self.name == "apply.lua":
            assert text.count(self.old) == 1
            text = text.replace(self.old, self.new)
        return text.encode()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("amount <= allowance - used, amount", "amount < allowance - used, amount"),
        ("  while from do\n", "  while false do\n"),
        ("(counts == 'a' and amount or free)", "(counts == 'a' and free or amount)"),
        ("if span:sub(20) <= kept or", "if span:sub(20) < kept or"),
    ],
    ids=["off by one", "dedup lost", "billed tokens count", "kept too long"],
)
def test_a_fault_in_the_script_is_caught(server, monkeypatch, old, new):
    """A store on Redis whose script is wrong in one place is caught, and its namespaces are removed all the same."""
    monkeypatch.setattr(calls, "files", Planted(calls.files, old, new))
    spaces = spaces_of(server.url)
    report = check(spaces.open, drop=spaces.drop, seed=1, steps=STEPS, shrinking_s=5)
    assert report.failure is not None
    assert server.ask("DBSIZE") == 0


def test_what_a_store_raises_is_a_failure():
    """A store that fails over a name is caught, with what it raised."""

    class Picky(Kept):
        def _apply(self, charge, *rest, dry):
            if not charge.request.id.isascii():
                raise KeyError(charge.request.id)
            return super()._apply(charge, *rest, dry=dry)

    report = failing(Picky, 1)
    assert (type(report.failure.found), len(report.history.steps)) == (KeyError, 1)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("TalliesTold", "tallies"),
        ("CountersTold", "counters"),
        ("ChangesLost", "enrollments"),
        ("AccountsLost", "accounts"),
        ("LosesEntries", "ledger"),
        ("ForgetsLinks", "ledger"),
        ("TimesLost", "ledger"),
    ],
)
def test_what_is_kept_is_compared(name, what):
    """A failure says what was compared: tallies, counters, enrollments, accounts or the ledger."""
    assert failing(getattr(broken_stores, name), 1).failure.what == what


def test_the_ledger_is_compared_without_threads():
    """An entry that is missing, or has another time, is found where one caller asked for it, too."""
    asks = tuple(Asking(NOON + HOUR, (asked(number, 1),)) for number in range(11))
    times = Run(History(asks[:1]), OFFER, kinds_of_spaces(broken_stores.TimesLost), "space").failure()
    assert (times.what, times.found, times.expected) == ("ledger", NOON, NOON + HOUR)
    lost = Run(History(asks), OFFER, kinds_of_spaces(broken_stores.LosesEntries), "space").failure()
    assert (lost.what, lost.found.id, lost.expected.id) == ("ledger", "r10", "r9")


def test_every_id_is_asked_again():
    """An id that is asked only once is asked again at the end."""
    report = failing(broken_stores.DedupLost, 1)
    assert (report.failure.is_again, report.failure.expected.replayed) == (True, True)


def test_an_id_that_is_held_is_asked_by_one():
    """Callers at once do not ask for an id that is held: what they are told depends on who settles it first."""
    hold = Holding(NOON, asked(1, 5), HOUR)
    both = Together(NOON, tuple((Asking(NOON, (asked(1, 1, NOON - at),)),) for at in (DAY, TICK)))
    run = Run(History((Enrolling(NOON, "a", ENROLLED, "ann"), hold, both)), OFFER, Memory().open, "space")
    assert run.failure() is None
    assert run.seen["conflict"] == 0


def test_a_number_that_is_no_integer_is_a_failure():
    """A total that is equal and yet no integer, such as 5.0, is no answer of the rule."""

    class Floating(Judged):
        def judge(self, charge, tally, **options):
            decision, after = super().judge(charge, tally, **options)
            return replace(decision, used=decision.used and float(decision.used)), after

    report = failing(Floating, 1)
    assert "used=1.0" in report.failure.found
    assert len(report.history.steps) == 2


def test_a_store_out_of_order_is_no_failure_of_the_rule():
    """A store that cannot be used is told as that, and nothing is said of the rule."""

    def open_store(space, *, clock, bounds):
        raise StoreError("no server")

    with pytest.raises(StoreError, match="no server"):
        check(open_store, seed=1, steps=10)


# -- seeds, bounds


@pytest.mark.parametrize("kind", ["OffByOne", "LocalMidnight", "HoldsIgnored"])
def test_a_seed_reproduces_a_failure(kind):
    """The same seed finds the same failure at the same step, and shrinks it to the same history."""
    first, second = (failing(getattr(broken_stores, kind), 5) for _ in range(2))
    assert (first.steps, first.history, first.failure) == (second.steps, second.history, second.failure)


def test_as_many_steps_again_find_it_again():
    """Bounded by the steps that a failure took, the same seed finds it."""
    open_store = kinds_of_spaces(broken_stores.OffByOne)
    first = check(open_store, seed=5, steps=STEPS, shrinking_s=0)
    again = check(open_store, seed=5, steps=first.steps, shrinking_s=0)
    assert (again.failure, again.steps) == (first.failure, first.steps)


@pytest.mark.parametrize("error", [StoreError("gone"), KeyboardInterrupt()], ids=["gone", "interrupted"])
def test_what_is_known_of_a_failure_is_told_all_the_same(error):
    """Should the store go away, or somebody interrupt, while a failure is shrunk, it is told as far as it was."""
    opened = []
    open_store = kinds_of_spaces(broken_stores.OffByOne)

    def opening(space, **options):
        opened.append(space)
        if len(opened) > whole + 10:
            raise error
        return open_store(space, **options)

    whole = 1_000_000
    first = check(opening, seed=5, steps=STEPS, shrinking_s=0)
    whole, opened = len(opened), []
    report = check(opening, seed=5, steps=STEPS, shrinking_s=1)
    assert report.failure is not None
    assert report.steps == first.steps
    assert 2 < len(report.history.steps) < first.history.size


def test_seeds_differ():
    """Other seeds and numbers ask other things; the same ones the same."""
    found = [history_of(seed, number, OFFER) for seed in (1, 2) for number in (0, 1)]
    assert len(set(found)) == 4
    assert found == [history_of(seed, number, OFFER) for seed in (1, 2) for number in (0, 1)]


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 333])
def test_steps_bound_a_run(steps):
    """No more steps are asked than was said, those of callers at once counted."""
    assert 0 < check(Memory().open, seed=1, steps=steps).steps <= steps


def test_minutes_bound_a_run():
    """Without a number of steps the time bounds a run."""
    report = check(Memory().open, seed=1, steps=None, minutes=0.01)
    assert report.failure is None
    assert report.steps > 0


def test_what_is_left_is_plain():
    """Of callers at once, batches, names, sizes and times only that is left by which it fails."""
    odd = Request(
        id="x" * 255, account="a}{b", model=MODEL, at=NOON - TICK, input_tokens=50, output_tokens=9, tools=("function",)
    )
    batch = Asking(NOON + TICK, (asked(1, 1), odd, asked(2, 2)), 1, is_batch=True)
    history = History((batch, Together(NOON + HOUR, ((batch,), (batch, batch)))), Counts.ALL)

    def fails(candidate: History) -> bool:
        return any((one.tokens or 0) >= 7 for one in requests_of(candidate.steps))

    step = shrunk(history, fails, lambda: False).steps[0]
    assert step == Asking(
        step.now, (Request(id="r1", account="a", model=MODEL, at=step.now, input_tokens=7, output_tokens=0),)
    )
    assert (step.now.minute, step.now.microsecond) == (0, 0)


def test_histories_cut():
    """A history is cut before the step that would be one too many."""
    together = Together(NOON, ((Asking(NOON, ()),) * 2,) * 2)
    history = History((Asking(NOON, ()), together, Asking(NOON, ())))
    assert [cut(history, steps).size for steps in range(7)] == [0, 1, 1, 1, 1, 5, 6]


def test_every_space_is_dropped(monkeypatch):
    """A space is removed after its history, those of a shrinking failure, too."""
    opened, dropped = set(), []
    open_store = kinds_of_spaces(broken_stores.OffByOne)

    def opening(space, **options):
        opened.add(space)
        return open_store(space, **options)

    assert check(opening, drop=dropped.append, seed=1, steps=STEPS).failure is not None
    assert sorted(opened) == sorted(dropped)


# -- callers at once


def together(*calls: Call, rows: list[Decision], changes: int = 1):
    """What is said of callers at once, of an account that was enrolled before."""
    rule = Expected(OFFER, Bounds())
    for _ in range(changes):
        rule.enroll("a", ENROLLED, actor="ann", now=NOON)
    return judged(list(calls), {"a": [(NOON, row) for row in rows]}, rule, NOON, [])


def told(request: Request, *before: Request, replayed: bool = False) -> Decision:
    """What the rule decides on a request after others."""
    rule = Expected(OFFER, Bounds())
    rule.enroll("a", ENROLLED, actor="ann", now=NOON)
    for one in (*before, request):
        answer = rule.decide(one, NOON)
    assert isinstance(answer, Decision)
    return replace(answer, replayed=replayed)


def call(request: Request, answer: object, start: int, end: int) -> Call:
    """One call."""
    return Call(Asking(NOON, (request,)), start, end, [answer])


ONE, TWO = asked(1, 600_000), asked(2, 500_000)


def test_one_order_that_explains_all_is_accepted():
    """Answers that are the rows of the ledger, in an order that time allows, are as the rule says."""
    first, second = told(ONE), told(TWO, ONE)
    calls = [call(ONE, first, 1, 4), call(TWO, second, 2, 3), call(ONE, replace(first, replayed=True), 5, 6)]
    assert together(*calls, rows=[first, second]) is None


def test_two_firsts_are_found():
    """Two rows that each took the whole allowance as their own are not what the rule gives in any order."""
    gap = together(call(ONE, told(ONE), 1, 3), call(TWO, told(TWO), 2, 4), rows=[told(ONE), told(TWO)])
    assert (gap.what, gap.found.used, gap.expected.used) == ("decision", 500_000, 600_000)


def test_an_answer_that_is_not_its_row_is_found():
    """A caller must be told what the ledger says."""
    gap = together(call(ONE, replace(told(ONE), used=0), 1, 2), rows=[told(ONE)])
    assert (gap.what, gap.found.used, gap.expected.used) == ("decision", 0, 600_000)


def test_an_answer_without_a_row_is_found():
    """What was decided is in the ledger."""
    gap = together(call(ONE, told(ONE), 1, 2), rows=[])
    assert (gap.what, gap.found, gap.expected) == ("ledger", None, told(ONE))


def test_a_row_that_nobody_asked_for_is_found():
    """The ledger has no more than what was asked."""
    gap = together(call(ONE, told(ONE), 1, 2), rows=[told(ONE), told(TWO, ONE)])
    assert (gap.what, gap.found, gap.expected) == ("ledger", told(TWO, ONE), None)


@pytest.mark.parametrize(("replayed", "count"), [((False, False), 2), ((True, True), 0)])
def test_a_new_decision_is_told_once(replayed, count):
    """Of all who ask for an id one is told that it is new, no more and no fewer."""
    calls = [call(ONE, told(ONE, replayed=one), 1, 2) for one in replayed]
    gap = together(*calls, rows=[told(ONE)])
    assert (gap.what, gap.found, gap.expected) == ("answer", count, 1)


def test_an_order_against_time_is_found():
    """What was asked after another was answered does not stand before it."""
    first, second = told(TWO), told(ONE, TWO)
    gap = together(call(ONE, second, 1, 2), call(TWO, first, 3, 4), rows=[first, second])
    assert (gap.what, gap.request) == ("order", ONE)
    assert together(call(ONE, second, 1, 4), call(TWO, first, 3, 4), rows=[first, second]) is None


def test_an_enrollment_that_was_acknowledged_counts():
    """A decision that was asked for after a change was acknowledged rests on it; one asked for before may."""
    low = replace(ENROLLED, tier=1)
    step = Enrolling(NOON, "a", low, "ann")
    made = Change(2, NOON, "ann", replace(low, owners=frozenset({"ann"})))
    old = told(ONE)
    change = Call(step, 1, 2, [made])
    assert together(change, call(ONE, old, 1, 4), rows=[old]) is None
    gap = together(change, call(ONE, old, 3, 4), rows=[old])
    assert (gap.what, gap.expected.terms.enrollment.tier) == ("decision", 1)


def test_lanes_run_at_once_and_errors_are_raised():
    """Each lane has its own thread; what goes wrong in one is raised here, after all have ended."""
    steps = [(Asking(NOON, (asked(number, 1),)),) * 3 for number in range(4)]
    found = run_lanes(steps, lambda step: [step.requests[0].id])
    assert sorted(one.answers[0] for one in found) == sorted(f"r{number}" for number in range(4) for _ in range(3))
    ticks = sorted(tick for one in found for tick in (one.start, one.end))
    assert all(one < other for one, other in pairwise(ticks))

    def fail(_step):
        raise StoreError("gone")

    with pytest.raises(StoreError, match="gone"):
        run_lanes(steps, fail)


# -- the model, and histories as values


def test_ids_may_be_forgotten_when_nothing_is_kept():
    """An id is asked again only as long as stores have to know it."""
    rule = Expected(OFFER, Bounds())
    rule.enroll("a", ENROLLED, actor="ann", now=NOON)
    rule.decide(ONE, NOON)
    end = NOON.replace(hour=0) + DAY + Bounds().keep
    assert [rule.is_kept(ONE, now) for now in (NOON, end - TICK, end)] == [True, True, False]


def test_the_model_answers_as_the_contract_says():
    """A repeat is replayed, a changed one is a conflict, what is ahead is refused, what is too late is billed."""
    rule = Expected(OFFER, Bounds())
    rule.enroll("a", ENROLLED, actor="ann", now=NOON)
    first = rule.decide(ONE, NOON)
    assert rule.decide(ONE, NOON) == replace(first, replayed=True)
    assert rule.decide(replace(ONE, input_tokens=1), NOON) == Clash("input_tokens", first)
    assert rule.decide(asked(3, 1, NOON + Bounds().ahead + TICK), NOON) == Refused("at")
    assert rule.decide(asked(4, 1, NOON - 9 * DAY), NOON).reason == "too_late"
    assert rule.enroll("a", ENROLLED, actor="eve", now=NOON) == Refused("enrollment")


def test_times_part_what_came_before_a_change():
    """A replay goes by time: a request decided before a change must be earlier than those decided after it."""
    before, after = Asking(NOON, (asked(1, 1),)), Asking(NOON + HOUR, (asked(2, 1, NOON + HOUR),))
    change = Enrolling(NOON + timedelta(minutes=1), "a", ENROLLED, "ann")
    assert is_parted(History((before, change, after)))
    assert not is_parted(History((after, change, before)))
    assert not is_parted(History((before, change, before)))
    assert is_parted(History((before, after)))


def test_a_run_may_end_early():
    """When the time is over, what was asked so far is compared, and no more is asked."""
    history = History((Enrolling(NOON, "a", ENROLLED, "ann"), Asking(NOON, (ONE,)), Settling(NOON, TWO)))
    asked_so_far = []
    run = Run(history, OFFER, Memory().open, "space")
    assert run.failure(lambda: len(asked_so_far) == 2 or asked_so_far.append(1)) is None
    assert run.steps == 2


def test_readings_and_bounds_vary():
    """Histories are asked under each reading, under several bounds, and over every view."""
    histories = [history_of(1, number, OFFER) for number in range(60)]
    assert {one.counts for one in histories} == {None, *Counts}
    assert len({one.bounds for one in histories}) == 3
    assert {step.view for one in histories for step in one.steps if not isinstance(step, Together)} == set(range(VIEWS))
