"""Who takes part: what an enrollment may say, who may change it, and when a change counts."""

from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings, strategies as st

from gratis import Enrollment, EnrollmentError, GratisError, Meter, Reason, Request, Sharing
from gratis.enrollment import in_force, takes_part
from gratis.lines import change_line, change_of, enrollment_line, enrollment_of
from gratis.model import Change
from gratis.offers import load
from gratis.stores.memory import MemoryStore
from gratis.stores.sqlite import SQLiteStore, Synchronous

OPENAI = load("openai-data-sharing")
NOON = datetime(2025, 4, 20, 12, tzinfo=UTC)
TICK = timedelta(microseconds=1)
HOUR = timedelta(hours=1)
LARGE = "gpt-4o-2024-08-06"
ENABLED = Enrollment(tier=5, sharing=Sharing.ENABLED)


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.now = NOON

    def __call__(self):
        """What it shows."""
        return self.now


@pytest.fixture
def clock():
    """The time that the store goes by."""
    return Clock()


@pytest.fixture(params=["memory", "sqlite"])
def open_meter(request, clock, tmp_path):
    """Open one more meter over the same store; for SQLite each has a connection of its own."""
    memory = MemoryStore(clock=clock)
    stores = [memory]

    def opened():
        if request.param == "memory":
            return Meter(memory, OPENAI)
        stores.append(SQLiteStore(tmp_path / "gratis.db", clock=clock, synchronous=Synchronous.OFF))
        return Meter(stores[-1], OPENAI)

    yield opened
    for store in stores:
        store.close()


def ask(key, **fields):
    """A small request at noon that is free, but for these fields."""
    usual = {"id": f"r{key}", "model": LARGE, "at": NOON, "input_tokens": 2, "output_tokens": 1}
    return Request(**{**usual, **fields})


# -- who may change it


def test_first_to_enroll_is_the_owner(open_meter):
    """Who enrolls an account becomes its owner, and only an owner changes its enrollment."""
    meter = open_meter()
    meter.enroll("a", ENABLED, actor="alice")
    with pytest.raises(EnrollmentError) as raised:
        meter.enroll("a", Enrollment(tier=1), actor="mallory")
    assert str(raised.value) == (
        "actor: 'mallory' is no owner of this account; only an owner changes its enrollment: alice"
    )
    assert [(change.actor, change.enrollment.tier) for change in meter.enrollments("a")] == [("alice", 5)]
    assert meter.decide(ask(1, account="a")).is_free


@pytest.mark.parametrize("actor", ["Alice", "alice ", "ALICE", "al\u0131ce", "alic\u0435", "bob", "default", "a"])
def test_owners_are_compared_exactly(open_meter, actor):
    """An actor is an owner by exactly the owner's name."""
    meter = open_meter()
    meter.enroll("a", ENABLED, actor="alice")
    with pytest.raises(EnrollmentError, match="is no owner of this account"):
        meter.enroll("a", ENABLED, actor=actor)


def test_owners_hand_over(open_meter):
    """An owner may name others; who is no longer named may no longer change anything."""
    meter = open_meter()
    meter.enroll("a", Enrollment(tier=1, owners={"alice", "bob"}), actor="alice")
    meter.enroll("a", Enrollment(tier=2), actor="bob")
    meter.enroll("a", Enrollment(tier=3, owners={"carol"}), actor="alice")
    with pytest.raises(EnrollmentError, match=r"'bob' is no owner of this account; .*: carol$"):
        meter.enroll("a", Enrollment(tier=4), actor="bob")
    meter.enroll("a", Enrollment(tier=5), actor="carol")
    assert [(change.enrollment.tier, sorted(change.enrollment.owners)) for change in meter.enrollments("a")] == [
        (1, ["alice", "bob"]),
        (2, ["alice", "bob"]),
        (3, ["carol"]),
        (5, ["carol"]),
    ]


def test_who_enrolls_first_may_name_others_only(open_meter):
    """Who enrolls an account for others need not be one of its owners."""
    meter = open_meter()
    meter.enroll("a", Enrollment(tier=1, owners={"owner"}), actor="admin")
    with pytest.raises(EnrollmentError, match="'admin' is no owner"):
        meter.enroll("a", Enrollment(tier=2), actor="admin")


def test_owning_one_account_is_not_owning_another(open_meter):
    """Each account has its own owners and its own enrollment."""
    meter = open_meter()
    meter.enroll("a", ENABLED, actor="alice")
    meter.enroll("b", Enrollment(tier=1, sharing=Sharing.ENABLED), actor="bob")
    with pytest.raises(EnrollmentError):
        meter.enroll("b", ENABLED, actor="alice")
    allowances = [meter.decide(ask(account, account=account)).allowance for account in ("a", "b", "c")]
    assert allowances == [1_000_000, 250_000, None]


def test_enrollment_is_of_one_offer(clock):
    """Taking part in one offer is not taking part in another over the same store."""
    store = MemoryStore(clock=clock)
    Meter(store, OPENAI).enroll("default", ENABLED, actor="alice")
    evals = Meter(store, load("openai-evals"))
    assert evals.decide(ask(1, kind="eval")).reason is Reason.NOT_ENROLLED
    evals.enroll("default", ENABLED, actor="bob")
    assert evals.decide(ask(2, kind="eval")).is_free


@pytest.mark.parametrize(
    ("actor", "message"),
    [
        ("", "actor: found 0 bytes; expected 1 to 255"),
        ("x" * 256, "actor: found 256 bytes; expected 1 to 255"),
        ("a\nb", "actor: found 'a\\nb'; expected no control characters"),
        ("\ud800", "actor: found '\\ud800', half of a surrogate pair; expected Unicode text"),
        (None, "actor: found None; expected a string"),
        (True, "actor: found True; expected a string"),
        (7, "actor: found 7; expected a string"),
    ],
)
def test_actors_are_named(open_meter, actor, message):
    """A change without a proper actor is refused, and nothing is kept of it."""
    meter = open_meter()
    with pytest.raises(EnrollmentError) as raised:
        meter.enroll("a", ENABLED, actor=actor)
    assert str(raised.value) == message
    assert meter.enrollments("a") == []


@pytest.mark.parametrize(
    "account",
    ["", "x" * 256, "a\nb", "a\0", "\ud800", None, True, 7, 1.5, b"a", ["a"]],
    ids=lambda value: ascii(value)[:12],
)
def test_accounts_are_named(open_meter, account):
    """Only what a request may name as its account can be enrolled; anything else is refused, and nothing is kept."""
    meter = open_meter()
    with pytest.raises(GratisError, match=r"^account: found"):
        meter.enroll(account, ENABLED, actor="alice")
    assert [meter.enrollments(name) for name in ("", "7", "1", "True", "None", "a")] == [[]] * 6


# -- what is kept


def test_every_change_is_kept(open_meter, clock):
    """Each change is kept in order, with who made it and when it was acknowledged, in whatever store."""
    meter = open_meter()
    wanted = [
        Enrollment(tier=1),
        Enrollment(tier=1, sharing=Sharing.ENABLED),
        Enrollment(tier=3, sharing=Sharing.SELECTED, projects={"p", "q"}, plan="business"),
        Enrollment(tier=3, starts=NOON, ends=NOON + HOUR, zero_data_retention=True),
        Enrollment(tier=0, plan="enterprise"),
    ]
    made = []
    for place, enrollment in enumerate(wanted):
        clock.now = NOON + place * HOUR
        made.append(meter.enroll("a", enrollment, actor="alice"))
    kept = open_meter().enrollments("a")
    assert kept == made
    assert [(change.version, change.at, change.actor) for change in kept] == [
        (place + 1, NOON + place * HOUR, "alice") for place in range(5)
    ]
    assert [enrollment_line(change.enrollment) | {"owners": []} for change in kept] == [
        enrollment_line(enrollment) for enrollment in wanted
    ]


def test_refused_change_leaves_everything(open_meter):
    """A change that is refused is in no history, and the enrollment before it stays in force."""
    meter = open_meter()
    meter.enroll("a", ENABLED, actor="alice")
    before = meter.enrollments("a")
    for actor, enrollment in [
        ("bob", Enrollment(tier=0)),
        ("alice", Enrollment(tier=5, sharing=Sharing.ENABLED, plan="enterprise")),
        ("alice", Enrollment(tier=5, sharing=Sharing.ENABLED, zero_data_retention=True)),
        ("", Enrollment(tier=0)),
    ]:
        with pytest.raises(EnrollmentError):
            meter.enroll("a", enrollment, actor=actor)
    assert meter.enrollments("a") == before
    assert meter.decide(ask(1, account="a")).is_free


def test_no_history_without_enrollment(open_meter):
    """An account that was never enrolled has no history, whether it was decided for or not."""
    meter = open_meter()
    meter.decide(ask(1, account="a"))
    assert [meter.enrollments("a"), meter.enrollments("b"), meter.enrollments()] == [[], [], []]


def test_in_force_at_an_instant():
    """For a replay the change in force is the one acknowledged last, the instant of a change included."""
    first = Change(1, NOON, "alice", Enrollment(tier=1))
    second = Change(2, NOON + HOUR, "bob", Enrollment(tier=2))
    history = [first, second]
    instants = [NOON - TICK, NOON, NOON + HOUR - TICK, NOON + HOUR, NOON + 1000 * HOUR]
    assert [in_force(history, at) for at in instants] == [None, first, first, second, second]
    assert in_force([], NOON) is None


def test_in_force_of_two_changes_at_once():
    """Of two changes in the same microsecond the later one is in force."""
    first, second = (Change(version, NOON, "alice", Enrollment(tier=version)) for version in (1, 2))
    assert in_force([first, second], NOON) is second


def test_changes_go_through_json():
    """A change and its line say the same."""
    enrollment = Enrollment(
        tier=4,
        sharing=Sharing.SELECTED,
        projects={"p", "\u00e9"},
        plan="team",
        starts=NOON,
        ends=NOON + TICK,
        owners={"alice"},
    )
    change = Change(3, NOON + TICK, "alice", enrollment)
    line = change_line("openai-data-sharing", "a", change)
    assert change_of(line) == ("openai-data-sharing", "a", change)
    assert enrollment_of({"tier": 2}) == Enrollment(tier=2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({}, "tier: missing; expected the account's usage tier"),
        ({"tier": 1, "share": True}, "share: an unknown field; expected tier, sharing, projects, plan, "),
        ({"tier": 1, "starts": "2025-04-20"}, "starts: found '2025-04-20'; expected RFC 3339"),
        ({"tier": "1"}, "tier: found '1'; expected a whole number from 0 to 5"),
    ],
)
def test_bad_enrollment_lines(line, message):
    """What is wrong with the JSON of an enrollment is told by its field."""
    with pytest.raises(GratisError) as raised:
        enrollment_of(line)
    assert str(raised.value).startswith(message)


# -- what it allows


@pytest.mark.parametrize(
    "fields",
    [
        {"sharing": "enabled", "plan": "enterprise"},
        {"sharing": "selected", "projects": ["p"], "plan": "enterprise"},
        {"sharing": "enabled", "zero_data_retention": True},
        {"sharing": "selected", "projects": ["p"], "zero_data_retention": True},
    ],
)
def test_who_cannot_enable_sharing(open_meter, fields):
    """Enterprise and zero-data-retention accounts cannot enable sharing, in part or for all; they may be enrolled."""
    meter = open_meter()
    why = "zero data retention" if "zero_data_retention" in fields else "'enterprise' plan"
    with pytest.raises(EnrollmentError, match=rf"^sharing: an account .*{why} cannot enable it$"):
        meter.enroll("a", Enrollment(tier=5, **fields), actor="alice")
    off = {**fields, "sharing": "disabled", "projects": []}
    meter.enroll("a", Enrollment(tier=5, **off), actor="alice")
    assert meter.decide(ask(1, account="a")).reason is Reason.ACCOUNT_NOT_ELIGIBLE


def test_offer_without_such_a_rule_lets_all_enroll(clock):
    """Who may not share is data of the offer: where it names nobody, every plan may."""
    meter = Meter(MemoryStore(clock=clock), load("groq-free"))
    clock.now = datetime(2026, 8, 1, tzinfo=UTC)
    enrollment = Enrollment(tier=0, sharing=Sharing.ENABLED, plan="enterprise", zero_data_retention=True)
    meter.enroll("default", enrollment, actor="alice")
    request = ask(1, at=clock.now, model="llama-3.1-8b-instant")
    assert meter.decide(request).is_free


@pytest.mark.parametrize(
    ("tier", "reason", "allowance"),
    [
        (0, "account_not_eligible", None),
        (1, "within_allowance", 250_000),
        (2, "within_allowance", 250_000),
        (3, "within_allowance", 1_000_000),
        (4, "within_allowance", 1_000_000),
        (5, "within_allowance", 1_000_000),
    ],
)
def test_tiers(open_meter, tier, reason, allowance):
    """Tier 0 is not eligible; the others have the allowance of their tier."""
    meter = open_meter()
    meter.enroll("a", Enrollment(tier=tier, sharing=Sharing.ENABLED), actor="alice")
    decision = meter.decide(ask(1, account="a"))
    assert (decision.reason.value, decision.allowance) == (reason, allowance)


@pytest.mark.parametrize("plan", ["standard", "team", "business", "edu"])
def test_other_plans_are_eligible(plan):
    """A plan that the offer does not exclude is eligible."""
    meter = Meter(MemoryStore(bounds=None), OPENAI, assume=Enrollment(tier=5, sharing=Sharing.ENABLED, plan=plan))
    assert meter.decide(ask(1)).is_free


@pytest.mark.parametrize(
    ("sharing", "project", "reason"),
    [
        ("disabled", None, "sharing_disabled"),
        ("disabled", "p", "sharing_disabled"),
        ("enabled", None, "within_allowance"),
        ("enabled", "anything", "within_allowance"),
        ("selected", None, "project_not_shared"),
        ("selected", "p", "within_allowance"),
        ("selected", "q", "within_allowance"),
        ("selected", "r", "project_not_shared"),
        ("selected", "P", "project_not_shared"),
        ("selected", "p ", "project_not_shared"),
        ("selected", "p,q", "project_not_shared"),
    ],
)
def test_sharing_by_project(open_meter, sharing, project, reason):
    """Sharing is off, on for all projects, or on for the selected ones by exactly their names."""
    meter = open_meter()
    projects = {"p", "q"} if sharing == "selected" else set()
    meter.enroll("a", Enrollment(tier=5, sharing=sharing, projects=projects), actor="alice")
    assert meter.decide(ask(1, account="a", project=project)).reason.value == reason


def test_sharing_projects_have_one_allowance(open_meter):
    """All sharing projects drain one allowance, and traffic of the others drains none."""
    meter = open_meter()
    meter.enroll("a", Enrollment(tier=5, sharing="selected", projects=["p", "q"]), actor="alice")
    seen = [
        meter.decide(ask(place, account="a", project=project, input_tokens=size, output_tokens=0))
        for place, (project, size) in enumerate([("p", 600_000), ("r", 600_000), ("q", 400_001), ("q", 400_000)])
    ]
    assert [(one.is_free, one.used) for one in seen] == [
        (True, 600_000),
        (False, None),
        (False, 600_000),
        (True, 1_000_000),
    ]


# -- when it counts


def test_dates_bound_it_by_the_requests_time(open_meter, clock):
    """An enrollment holds for requests from its start until before its end, whenever they arrive."""
    meter = open_meter()
    meter.enroll("a", Enrollment(tier=5, sharing="enabled", starts=NOON - HOUR, ends=NOON + HOUR), actor="alice")
    clock.now = NOON + 48 * HOUR
    edges = [NOON - HOUR - TICK, NOON - HOUR, NOON, NOON + HOUR - TICK, NOON + HOUR]
    seen = [meter.decide(ask(at.isoformat(), at=at, account="a")).reason.value for at in edges]
    inside = ["within_allowance"] * 3
    assert seen == ["not_enrolled", *inside, "not_enrolled"]


@pytest.mark.parametrize(
    ("starts", "ends", "expected"),
    [
        (None, None, [True, True, True]),
        (NOON, None, [False, True, True]),
        (None, NOON, [True, False, False]),
        (NOON - HOUR, NOON + TICK, [True, True, False]),
    ],
)
def test_takes_part(starts, ends, expected):
    """A missing date is no bound."""
    enrollment = Enrollment(tier=1, starts=starts, ends=ends)
    assert [takes_part(enrollment, at) for at in (NOON - TICK, NOON, NOON + TICK)] == expected
    assert [takes_part(None, at) for at in (NOON - TICK, NOON, NOON + TICK)] == [False] * 3


def test_change_counts_for_the_next_decision_of_another_meter(open_meter):
    """A change acknowledged to one meter counts for every decision that starts afterwards in another."""
    one, other = open_meter(), open_meter()
    seen = [other.decide(ask(1, account="a")).reason.value]
    one.enroll("a", Enrollment(tier=1), actor="alice")
    seen.append(other.decide(ask(2, account="a")).reason.value)
    one.enroll("a", ENABLED, actor="alice")
    seen.append(other.decide(ask(3, account="a", input_tokens=900_000)).reason.value)
    other.enroll("a", Enrollment(tier=1, sharing="enabled"), actor="alice")
    seen.append(one.decide(ask(4, account="a")).reason.value)
    other.enroll("a", Enrollment(tier=5), actor="alice")
    seen.append(one.decide(ask(5, account="a")).reason.value)
    assert seen == ["not_enrolled", "sharing_disabled", "within_allowance", "over_allowance", "sharing_disabled"]


def test_change_counts_in_a_batch(open_meter):
    """A batch that starts after a change is judged by it as a whole, each account by its own."""
    one, other = open_meter(), open_meter()
    for account in ("a", "b"):
        one.enroll(account, Enrollment(tier=1), actor="alice")
    other.decide_many([ask(1, account="a"), ask(1, account="b"), ask(1, account="c")])
    one.enroll("a", ENABLED, actor="alice")
    seen = other.decide_many([ask(key, account=account) for key in (2, 3) for account in ("a", "b", "c")])
    assert [decision.reason.value for decision in seen] == [
        "within_allowance",
        "sharing_disabled",
        "not_enrolled",
    ] * 2


def test_explain_knows_the_latest_change(open_meter):
    """What a meter explains rests on the latest change, made by whichever meter."""
    one, other = open_meter(), open_meter()
    one.enroll("a", ENABLED, actor="alice")
    before = other.explain(ask(1, account="a"))
    one.enroll("a", Enrollment(tier=1), actor="alice")
    after = other.explain(ask(1, account="a"))
    assert [(said.reason.value, said.fits) for said in (before, after)] == [
        ("within_allowance", 1_000_000),
        ("sharing_disabled", None),
    ]


def test_standing_knows_the_latest_change(open_meter):
    """What a meter says an account has rests on the latest change."""
    one, other = open_meter(), open_meter()
    seen = []
    for enrollment in (None, ENABLED, Enrollment(tier=1, sharing="enabled")):
        if enrollment is not None:
            one.enroll("a", enrollment, actor="alice")
        seen.append([(group.group, group.allowance) for group in other.standing("a")])
    assert seen == [
        [("1M", 0), ("10M", 0)],
        [("1M", 1_000_000), ("10M", 10_000_000)],
        [("1M", 250_000), ("10M", 2_500_000)],
    ]


def test_sharing_can_be_turned_off_at_any_time(open_meter):
    """Turned off, what was decided stands; turned on again in the same window, what was used is still used."""
    meter = open_meter()
    meter.enroll("a", ENABLED, actor="alice")
    first = meter.decide(ask(1, account="a", input_tokens=900_000, output_tokens=0))
    meter.enroll("a", Enrollment(tier=5), actor="alice")
    off = meter.decide(ask(2, account="a"))
    again = meter.decide(ask(1, account="a", input_tokens=900_000, output_tokens=0))
    meter.enroll("a", ENABLED, actor="alice")
    on = meter.decide(ask(3, account="a", input_tokens=100_000, output_tokens=0))
    over = meter.decide(ask(4, account="a", input_tokens=1, output_tokens=0))
    assert [(one.is_free, one.used, one.seq, one.replayed) for one in (first, off, again, on, over)] == [
        (True, 900_000, 1, False),
        (False, None, None, False),
        (True, 900_000, 1, True),
        (True, 1_000_000, 2, False),
        (False, 1_000_000, 3, False),
    ]


def test_late_request_is_judged_by_the_latest_change(open_meter, clock):
    """On a store the latest acknowledged change counts, also for a request from before it."""
    meter = open_meter()
    meter.enroll("a", ENABLED, actor="alice")
    clock.now = NOON + 24 * HOUR
    meter.enroll("a", Enrollment(tier=5), actor="alice")
    assert meter.decide(ask(1, account="a", at=NOON)).reason is Reason.SHARING_DISABLED


def test_assumed_enrollment_is_for_accounts_never_enrolled(clock):
    """What is assumed of accounts counts until they are enrolled, and never again."""
    store = MemoryStore(clock=clock)
    assuming, plain = Meter(store, OPENAI, assume=ENABLED), Meter(store, OPENAI)
    seen = [assuming.decide(ask(1)).reason.value, plain.decide(ask(2)).reason.value]
    plain.enroll("default", Enrollment(tier=5), actor="alice")
    seen += [assuming.decide(ask(3)).reason.value, assuming.decide(ask(4, account="other")).reason.value]
    assert seen == ["within_allowance", "not_enrolled", "sharing_disabled", "within_allowance"]


enrollments = st.sampled_from(
    [
        ENABLED,
        Enrollment(tier=1, sharing="enabled"),
        Enrollment(tier=3),
        Enrollment(tier=0, sharing="enabled"),
        Enrollment(tier=4, sharing="selected", projects=["p"]),
        Enrollment(tier=4, sharing="enabled", starts=NOON + HOUR),
        Enrollment(tier=4, sharing="enabled", ends=NOON + HOUR),
    ]
)
steps = st.tuples(
    st.integers(0, 2),
    st.sampled_from("ab"),
    enrollments | st.tuples(st.sampled_from([0, 1, 2]), st.sampled_from([0, 1, 300_000]), st.sampled_from([None, "p"])),
)


@settings(max_examples=200)
@given(history=st.lists(steps, max_size=15))
def test_meters_over_one_store_decide_like_one(history):
    """However changes and decisions are spread over meters, all is as if one that remembers nothing had been asked."""
    several, single = MemoryStore(clock=Clock(), bounds=None), MemoryStore(clock=Clock(), bounds=None)
    meters = [Meter(several, OPENAI) for _ in range(3)]
    for place, (which, account, what) in enumerate(history):
        alone = Meter(single, OPENAI)
        if isinstance(what, Enrollment):
            changes = [meter.enroll(account, what, actor="alice") for meter in (meters[which], alone)]
            assert changes[0] == changes[1]
        else:
            hours, size, project = what
            at = NOON + hours * HOUR
            request = ask(place, account=account, at=at, input_tokens=size, output_tokens=0, project=project)
            if which == 2:
                assert meters[which].decide_many([request, request])[0] == alone.decide(request)
            else:
                assert meters[which].decide(request) == alone.decide(request)
    assert list(several.entries()) == list(single.entries())


# -- values that may not be


@pytest.mark.parametrize("tier", [True, False, 6, -1, "3", 3.0, None, 10**30, float("nan")])
def test_tier_is_a_whole_number(tier):
    """A tier is a whole number from 0 to 5, and nothing that only resembles one."""
    with pytest.raises(EnrollmentError) as raised:
        Enrollment(tier=tier)
    assert str(raised.value) == f"tier: found {tier!r}; expected a whole number from 0 to 5"


def test_tier_of_many_digits():
    """A tier of thousands of digits is refused like any other."""
    with pytest.raises(EnrollmentError, match=r"^tier: found .*; expected a whole number from 0 to 5$"):
        Enrollment(tier=10**5000)


@pytest.mark.parametrize("sharing", ["on", "", "ENABLED", "enabled ", None, True, 1, [], b"enabled"])
def test_sharing_is_a_word(sharing):
    """Sharing is one of three words."""
    with pytest.raises(EnrollmentError) as raised:
        Enrollment(tier=1, sharing=sharing)
    assert str(raised.value) == f"sharing: found {sharing!r}; expected one of disabled, enabled, selected"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sharing": "selected"}, "projects: sharing is 'selected' with 0 projects; expected "),
        ({"projects": ["p"]}, "projects: sharing is 'disabled' with 1 projects; expected "),
        ({"sharing": "enabled", "projects": ["p", "q"]}, "projects: sharing is 'enabled' with 2 projects; expected "),
        ({"sharing": "selected", "projects": "pq"}, "projects: found 'pq'; expected a list of names"),
        ({"sharing": "selected", "projects": None}, "projects: found None; expected a list of names"),
        ({"sharing": "selected", "projects": {"p": 1}}, "projects: found {'p': 1}; expected a list of names"),
        ({"sharing": "selected", "projects": [""]}, "projects: found 0 bytes; expected 1 to 255"),
        ({"sharing": "selected", "projects": ["p", 5]}, "projects: found 5; expected a string"),
        ({"sharing": "selected", "projects": [["p"]]}, "projects: found ['p']; expected a string"),
        ({"sharing": "selected", "projects": ["p\0"]}, "projects: found 'p\\x00'; expected no control characters"),
        ({"sharing": "selected", "projects": ["x" * 256]}, "projects: found 256 bytes; expected 1 to 255"),
        ({"projects": list("p" * 10_001)}, "projects: found 10001; expected at most 10000"),
        ({"plan": ""}, "plan: found 0 bytes; expected 1 to 255"),
        ({"plan": None}, "plan: found None; expected a string"),
        ({"plan": "a\tb"}, "plan: found 'a\\tb'; expected no control characters"),
        ({"zero_data_retention": None}, "zero_data_retention: found None; expected true or false"),
        ({"zero_data_retention": 1}, "zero_data_retention: found 1; expected true or false"),
        ({"zero_data_retention": "no"}, "zero_data_retention: found 'no'; expected true or false"),
        ({"starts": datetime(2025, 1, 1)}, "starts: found 2025-01-01T00:00:00, which names no offset from UTC"),  # noqa: DTZ001 - naive, to be refused
        ({"ends": "2025-01-01T00:00:00Z"}, "ends: found '2025-01-01T00:00:00Z'; expected a datetime with its offset"),
        ({"ends": date(2025, 1, 1)}, "ends: found datetime.date(2025, 1, 1); expected a datetime with its offset"),
        ({"starts": datetime(9999, 1, 1, tzinfo=UTC)}, "starts: found 9999-01-01T00:00:00+00:00; expected a year"),
        ({"starts": NOON, "ends": NOON}, "ends: 2025-04-20T12:00:00Z is not after starts 2025-04-20T12:00:00Z"),
        ({"starts": NOON, "ends": NOON - TICK}, "ends: 2025-04-20T11:59:59.999999Z is not after starts"),
        ({"owners": "alice"}, "owners: found 'alice'; expected a list of names"),
        ({"owners": [""]}, "owners: found 0 bytes; expected 1 to 255"),
        ({"owners": [None]}, "owners: found None; expected a string"),
        ({"owners": None}, "owners: found None; expected a list of names"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_bad_values(fields, message):
    """A value that an enrollment cannot have is refused with its field, what was found and what was expected."""
    with pytest.raises(EnrollmentError) as raised:
        Enrollment(**{"tier": 1, **fields})
    assert str(raised.value).startswith(message)


def test_dates_of_any_zone_are_instants():
    """The dates of an enrollment are kept in UTC, whatever zone they came in."""
    east = NOON.astimezone(tz=ZoneInfo("Asia/Kathmandu"))
    assert Enrollment(tier=1, starts=east) == Enrollment(tier=1, starts=NOON)
