"""A provider with hidden faults is reconciled: each planted difference gets its cause, and nothing is hidden."""

from collections import defaultdict
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from random import Random

import pytest
from hypothesis import given, settings, strategies as st
from msgspec import structs

from gratis import Meter, Usage
from gratis.audit.readings import offer_as
from gratis.audit.replay import Replay
from gratis.errors import GratisError
from gratis.model import Enrollment, Kind, Reason, Request, Sharing
from gratis.offers import load
from gratis.prices import load_prices
from gratis.reconcile.cells import beside
from gratis.reconcile.compare import reconcile
from gratis.reconcile.files import reports_of
from gratis.reconcile.findings import Cause, Measure
from gratis.reconcile.free import explain_free
from gratis.reconcile.own import gather, judged
from gratis.reconcile.rows import UsageRow
from gratis.reconcile.totals import explain

from .billing import LARGE, SMALL, Billing, Sent, lines, moved

OFFER = load("openai-data-sharing")
FIRST = datetime(2025, 5, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def at(day, hour=0, minute=0):
    """A time of one of the days."""
    return FIRST + timedelta(days=day, hours=hour, minutes=minute)


def requests_of(sent):
    """The same requests as their sender logged them."""
    return [
        Request(
            id=f"r{number}",
            model=one.model,
            at=one.at,
            input_tokens=one.given,
            output_tokens=one.made,
            cached_tokens=one.cached,
            project=one.project,
        )
        for number, one in enumerate(sent)
    ]


def decided(requests, *, tier=3, offer=OFFER, enrollment=None):
    """The decisions of a replay."""
    replay = Replay(offer, assume=enrollment or Enrollment(tier=tier, sharing=Sharing.ENABLED))
    try:
        return replay.decide_many(requests)
    finally:
        replay.close()


def compared(billing, requests=None, *, files=None, **options):
    """A provider's reports beside our decisions on what we think that we sent."""
    requests = requests_of(billing.sent) if requests is None else requests
    named = [("usage", billing.usage_file()), ("costs", billing.cost_file())] if files is None else files
    own = gather(decided(requests, **options))
    return reconcile(reports_of(named), own, OFFER, prices=load_prices())


def causes(result, measure=None):
    """How many tokens each cause explains, over all differences."""
    sums = defaultdict(int)
    for one in result.differences:
        for part in one.parts:
            if measure is None or one.measure is measure:
                sums[part.cause] += part.tokens
    return {cause: tokens for cause, tokens in sums.items() if tokens}


def unexplained(result):
    """What is left over, by the size of each."""
    return sum(abs(one.unexplained) for one in result.differences)


def identity(result, number):
    """How often an identity failed."""
    return next(one.failed for one in result.identities if one.number == number)


def quiet(days=3):
    """Days on which nothing comes near an allowance."""
    return [
        Sent(at(day, hour), model, 1_000 + 37 * hour + day, 200 + hour, cached=100, project=project)
        for day in range(days)
        for hour in range(1, 20, 3)
        for model, project in ((LARGE, "proj_1"), (SMALL, "proj_2"))
    ]


def crossing(days=3):
    """Days on which a request does not fit, and a smaller one that still does follows."""
    return [
        Sent(at(day, hour), LARGE, size - 1_000, 1_000, project="proj_1")
        for day in range(days)
        for hour, size in ((9, 600_000), (12, 375_000), (20, 30_000 + day), (21, 20_000), (22, 9_000))
    ]


def test_nothing_planted_nothing_found():
    """A provider that reads the rule as we do leaves no difference in tokens, free tokens or money."""
    result = compared(Billing(sent=quiet() + crossing(2)))
    assert result.differences == ()
    assert result.is_clean
    assert result.reported == result.decided
    assert result.reported_free == result.decided_free
    assert [one.failed for one in result.identities] == [0, 0, 0, 0, 0]
    assert result.money.saved > 0


def test_the_exports_say_the_same_as_the_pages():
    """Both CSV exports, with commas or tabs, lead to the same result as the API's pages."""
    billing = Billing(counts="all", sent=quiet() + crossing(2))
    pages = compared(billing)
    for delimiter in ",\t":
        files = [("a.csv", billing.activity_csv(delimiter=delimiter)), ("c.csv", billing.cost_csv())]
        assert compared(billing, files=files) == pages


@pytest.mark.parametrize("counts", ["free", "all"])
@pytest.mark.parametrize("tier", [1, 3])
def test_the_best_reading_is_the_hidden_one(counts, tier):
    """Whatever reading the provider has, the data that tell readings apart name it."""
    small = Sent(at(0, 8), SMALL, 900, 100, project="proj_1")
    result = compared(Billing(counts=counts, tier=tier, sent=[small, *crossing()]))
    best = result.fit.ranked[0]
    assert best.off == 0
    assert f"counts={counts}" in best.reading
    assert "overage=whole" in best.reading
    assert ("tier" in best.reading) is (tier == 1)
    assert result.fit.is_sure
    assert causes(result).keys() <= {Cause.RULE_DIFFERS, *([Cause.ENROLLMENT_OR_BALANCE] if tier == 1 else [])}
    assert unexplained(result) == 0


@pytest.mark.parametrize("counts", ["free", "all"])
def test_excess_only_is_told_from_whole(counts):
    """Under excess only both ways of counting give the same free tokens, and both are named."""
    result = compared(Billing(counts=counts, overage="excess", sent=crossing()))
    best = result.fit.ranked[0]
    assert best.off == 0
    assert {best.reading, *best.same_as} == {"counts=free overage=excess", "counts=all overage=excess"}
    assert result.fit.is_sure
    assert unexplained(result) == 0


def test_quiet_days_tell_no_readings_apart():
    """Where nothing crosses an allowance, that is said, and what would tell."""
    result = compared(Billing(sent=quiet()))
    assert not result.fit.is_sure
    assert result.fit.deciding == ()
    assert "cannot tell the readings apart" in result.fit.sentence


def test_a_late_request_is_known_by_both_its_days():
    """A request that the provider counts after midnight is explained on the day that lacks it and on the next."""
    sent = quiet()
    last = Sent(at(0, 23, 58), LARGE, 40_000, 2_000)
    result = compared(Billing(sent=[*sent, moved(last, 5 * MINUTE)]), requests_of([*sent, last]))
    assert causes(result) == {}  # as much on one day as on the other
    assert {part.cause for one in result.differences for part in one.parts} == {Cause.LATE_ARRIVAL}
    assert len(result.differences) == 4
    assert unexplained(result) == 0
    assert not result.is_clean


def test_a_late_request_on_the_edge_of_the_report():
    """A request from before the report's first day is known by its tokens."""
    sent = quiet()
    early = Sent(at(-1, 23, 59), LARGE, 40_000, 2_000)
    result = compared(Billing(sent=[*sent, moved(early, 3 * MINUTE)]), requests_of([early, *sent]))
    assert causes(result) == {Cause.LATE_ARRIVAL: 84_000}
    assert unexplained(result) == 0


def test_a_model_that_no_list_here_has():
    """Free tokens of a model that no list has are the file's fault, and so is what they displaced."""
    new = "gpt-9-2031-01-01"
    sent = [*quiet(), *[Sent(at(day, 12), new, 5_000, 1_000) for day in (1, 2)]]
    billing = Billing(sent=sent)
    billing.listed[new] = "1M"
    result = compared(billing)
    assert causes(result) == {Cause.MODEL_NOT_LISTED: 12_000}
    assert unexplained(result) == 0
    assert identity(result, 4) == 2


def test_a_project_that_does_not_share():
    """What is billed in a project that was taken to share is that project's."""
    result = compared(Billing(sent=quiet(), closed_projects=frozenset({"proj_2"})))
    assert set(causes(result)) == {Cause.PROJECT_NOT_SHARING}
    assert unexplained(result) == 0
    assert identity(result, 5) > 0


def test_a_project_that_shares_though_it_was_taken_not_to():
    """What is free in a project that was taken not to share is that project's, too."""
    closed = Enrollment(tier=3, sharing=Sharing.SELECTED, projects=frozenset({"proj_1"}))
    result = compared(Billing(sent=quiet()), enrollment=closed)
    assert set(causes(result)) == {Cause.PROJECT_NOT_SHARING}
    assert unexplained(result) == 0


def test_a_day_on_which_nothing_was_free():
    """A day without a free token, though all would fit, is one of enrollment or balance."""
    result = compared(Billing(sent=quiet(), closed_days=frozenset({at(1).date().isoformat()})))
    assert set(causes(result)) == {Cause.ENROLLMENT_OR_BALANCE}
    assert {one.day.day for one in result.differences} == {2}
    assert unexplained(result) == 0


@pytest.mark.parametrize("counts", ["free", "all"])
@pytest.mark.parametrize("tier", [1, 3])
@pytest.mark.parametrize("others", [(), (Sent(at(0, 10), LARGE, 600_000, 0, project="proj_1"),)])
def test_where_nothing_at_all_was_free_the_plain_cause_comes_first(counts, tier, others):
    """No free token on any day is sharing, enrollment or balance, though a reading or a tier would give none, too."""
    closed = frozenset(f"2025-05-0{day}" for day in range(1, 4))
    billing = Billing(counts=counts, tier=tier, sent=[*crossing(), *others], closed_days=closed)
    offer = OFFER.reading(counts="all" if others else "free", overage="whole")
    result = compared(billing, requests_of(crossing()), offer=offer)
    assert causes(result, Measure.FREE) == {Cause.ENROLLMENT_OR_BALANCE: -result.decided_free}
    assert unexplained(result) == 0
    whys = {part.why for one in result.differences if one.measure is Measure.FREE for part in one.parts}
    assert whys == {"nothing at all is free in the report: sharing is off, not enrolled, or no balance"}
    assert not result.fit.is_likely


def test_one_free_token_is_not_nothing():
    """Where something is free, an account shares, and a usage tier may explain the rest."""
    small = Sent(at(0, 8), SMALL, 1, 0, project="proj_1")
    result = compared(Billing(counts="all", tier=1, sent=[small, *crossing()]))
    assert causes(result).keys() == {Cause.ENROLLMENT_OR_BALANCE, Cause.RULE_DIFFERS}


def test_no_day_in_common_is_no_traffic_of_somebody_else():
    """A report of days before or after those that were decided tells nothing of them: nothing explains it."""
    for days, said in ((-9, "2025-04-22 to 2025-04-24"), (9, "2025-05-10 to 2025-05-12")):
        sent = [replace(one, at=one.at + timedelta(days=days)) for one in quiet()]
        result = compared(Billing(sent=quiet()), requests_of(sent))
        assert result.apart == f"no day in common: the report has 2025-05-01 to 2025-05-03, the decisions {said}"
        assert result.notes[0] == result.apart
        assert causes(result) == {}
        assert unexplained(result) > 0


@pytest.mark.parametrize(("days", "hour"), [(-1, 23), (3, 0)])
def test_one_day_away_is_no_day_in_common(days, hour):
    """The day before the first and the day after the last of a report are not in it."""
    one = Sent(at(days, hour), LARGE, 1_000, 0, project="proj_1")
    assert compared(Billing(sent=quiet()), requests_of([one])).apart.endswith(f"decisions {one.at.date()}")
    assert compared(Billing(sent=quiet()), requests_of([one, *quiet()[-1:]])).apart == ""


def test_no_decision_at_all_is_no_day_in_common():
    """Without a decision there is nothing to compare with."""
    assert compared(Billing(sent=quiet()), []).apart.endswith(", the decisions none")


def test_days_around_a_report_are_days_in_common():
    """Who decided before and after it, and nothing on its days, is told of the traffic of others."""
    sent = [Sent(at(day, 12), LARGE, 1_000, 0, project="proj_1") for day in (-5, 9)]
    result = compared(Billing(sent=quiet()), requests_of(sent))
    assert result.apart == ""
    assert causes(result).keys() == {Cause.MISSING_IN_LEDGER}


def test_an_afternoon_on_which_nothing_was_free():
    """When the balance ran out in the middle of a day, the instant is found."""
    result = compared(Billing(sent=quiet(1), closed_from=at(0, 11)))
    assert set(causes(result)) == {Cause.ENROLLMENT_OR_BALANCE}
    assert "nothing was free from here on: 13:00:00 UTC" in result.differences[0].parts[0].why
    assert unexplained(result) == 0


def test_hosted_tools_that_the_ledger_did_not_know():
    """Requests that were billed on a day with calls of hosted tools are theirs."""
    sent = [*quiet(), Sent(at(1, 15), LARGE, 3_000, 333, hosted=True)]
    billing = Billing(sent=sent)
    calls = [{"object": "organization.usage.web_search_calls.result", "num_requests": 2, "num_model_requests": 1}]
    page = billing.pages([{**calls[0], "day": at(1).date(), "project_id": "proj_1", "model": None}])
    files = [("usage", billing.usage_file()), ("tools", lines(page))]
    result = compared(billing, files=files)
    assert causes(result) == {Cause.HOSTED_TOOLS: -3_333}
    assert unexplained(result) == 0


def test_rows_that_are_there_twice_are_summed_and_named():
    """A row of the report that comes twice counts twice, and is named as the cause."""
    billing = Billing(sent=quiet())
    rows = billing.rows()
    result = compared(billing, files=[("usage", lines(billing.pages([*rows, rows[0]])))])
    assert set(causes(result)) == {Cause.DUPLICATE}
    assert unexplained(result) == 0
    assert len(result.differences) == 2


def test_a_request_that_was_logged_twice():
    """A request under two ids is named, with both."""
    sent = quiet()
    requests = requests_of([*sent, sent[4]])
    result = compared(Billing(sent=sent), requests)
    assert set(causes(result)) == {Cause.DUPLICATE}
    assert unexplained(result) == 0
    assert "'r42'" in result.differences[0].parts[0].why


def test_traffic_of_somebody_else():
    """Tokens that only the report has are missing here, free ones as well."""
    sent = quiet()
    billing = Billing(sent=[*sent, Sent(at(1, 5), SMALL, 70_000, 7, project="proj_9")])
    result = compared(billing, requests_of(sent))
    assert causes(result, Measure.TOKENS) == {Cause.MISSING_IN_LEDGER: 70_007}
    assert causes(result, Measure.FREE) == {Cause.MISSING_IN_LEDGER: 70_007}
    assert unexplained(result) == 0


def test_a_report_that_lags():
    """What the report does not have yet is missing in it, and on its last day that may be its lag."""
    sent = quiet()
    late = Sent(at(2, 21), LARGE, 1_234, 5)
    result = compared(Billing(sent=sent), requests_of([*sent, late]))
    assert causes(result, Measure.TOKENS) == {Cause.MISSING_IN_REPORT: -1_239}
    assert causes(result, Measure.FREE) == {Cause.MISSING_IN_REPORT: -1_239}
    assert "may lag" in result.differences[0].parts[0].why
    assert unexplained(result) == 0


@pytest.mark.parametrize("field", ["input_tokens", "output_tokens"])
@pytest.mark.parametrize("by", [7, -7])
def test_what_no_cause_accounts_for_stays_unexplained(field, by):
    """A sum that is wrong by itself is shown, and given no cause."""
    billing = Billing(sent=quiet())
    rows = billing.rows()
    rows[0][field] += by
    result = compared(billing, files=[("usage", lines(billing.pages(rows)))])
    assert causes(result) == {}
    assert unexplained(result) == 14  # of all tokens, and of the free ones
    assert not result.is_clean


def test_input_that_is_taken_for_output_is_shown():
    """Where only the split of input and output differs, that is a difference, too."""
    billing = Billing(sent=quiet())
    rows = billing.rows()
    rows[0]["input_tokens"] += 5
    rows[0]["output_tokens"] -= 5
    result = compared(billing, files=[("usage", lines(billing.pages(rows)))])
    assert [(one.measure, one.difference, one.unexplained) for one in result.differences] == [(Measure.INPUT, 5, 5)]


def test_ungrouped_reports_are_compared_as_far_as_they_go():
    """Without tiers there is no word on what is free; without projects and models they are compared together."""
    billing = Billing(sent=quiet())
    rows = [{**row, "project_id": None, "model": None, "service_tier": None} for row in billing.rows()]
    result = compared(billing, files=[("usage", lines(billing.pages(rows)))])
    assert result.differences == ()
    assert result.reported_free is None
    assert any("not grouped by service tier" in note for note in result.notes)


def test_an_unknown_tier_is_no_evidence():
    """Tokens of a tier that nobody knows are neither free nor billed; what they may explain, they do."""
    billing = Billing(sent=quiet())
    rows = billing.rows()
    rows[0]["service_tier"] = "a-new-tier"
    result = compared(billing, files=[("usage", lines(billing.pages(rows)))])
    assert set(causes(result)) == {Cause.TIER_UNKNOWN}
    assert unexplained(result) == 0
    assert any("a-new-tier" in note for note in result.notes)


def test_more_free_than_the_allowance_is_a_finding():
    """What the report gives free beyond an allowance is named by day and group."""
    for tokens, over in ((250_000, []), (250_001, [("1M", 250_000)])):
        result = compared(Billing(tier=3, sent=[Sent(at(0, 1), LARGE, tokens, 0)]), tier=1)
        assert [(one.group, one.allowance) for one in result.over] == over
    assert identity(result, 2) == 1


def test_money_is_exact():
    """Saved is list price, spent is what was charged, both to the last digit."""
    sent = [Sent(at(0, 1), LARGE, 999_999, 1, cached=333), Sent(at(0, 2), LARGE, 7, 3, cached=1)]
    result = compared(Billing(sent=sent))
    saved = (999_999 - 333) * Decimal("2.00") + 333 * Decimal("0.50") + 1 * Decimal("8.00")
    spent = 6 * Decimal("2.00") + 1 * Decimal("0.50") + 3 * Decimal("8.00")
    assert (result.money.saved * 1_000_000, result.money.spent * 1_000_000) == (saved, spent)
    assert [(one.model, one.difference) for one in result.money.models] == [(LARGE, Decimal(0))]
    assert (result.money.prices, result.money.currency) == ("openai", "usd")


def test_a_model_without_a_price_is_named_and_never_free_of_charge():
    """What has no known price adds nothing to what was saved, and is listed with its tokens."""
    new = "gpt-9-2031-01-01"
    billing = Billing(sent=[Sent(at(0, 1), new, 100, 10), Sent(at(0, 2), LARGE, 100, 10)])
    billing.listed[new] = "1M"
    result = compared(billing)
    assert result.money.unpriced == ((new, 110),)
    assert result.money.saved * 1_000_000 == 100 * 2 + 10 * 8


def test_a_wrong_charge_fails_the_third_identity():
    """Billed tokens that were charged otherwise than by list are a difference in money."""
    billing = Billing(sent=[Sent(at(0, 1), "gpt-4o-2024-08-06", 3_000_000, 0)])
    for charged, failed in (("7.50", 0), ("7.51", 0), ("7.4899999", 1), ("7.52", 1)):
        costs = [{**row, "amount": {**row["amount"], "value": charged}} for row in billing.costs()]
        result = compared(billing, files=[("usage", billing.usage_file()), ("costs", lines(billing.pages(costs)))])
        assert identity(result, 3) == failed
        assert result.is_clean is (failed == 0)
        assert result.money.models[0].difference == Decimal(charged) - Decimal("7.5")


def test_decisions_of_several_accounts_are_refused():
    """A report is about one organization."""
    requests = [Request(id=name, account=name, model=LARGE, at=at(0), input_tokens=1, output_tokens=1) for name in "ab"]
    with pytest.raises(GratisError, match="2 accounts"):
        gather(decided(requests))


SIZES = st.one_of(st.integers(0, 3_000), st.integers(100_000, 700_000))


@st.composite
def histories(draw):
    """What was sent, and a provider with some faults of its own."""
    sent = draw(
        st.lists(
            st.builds(
                lambda minute, model, given, made, project: Sent(
                    FIRST + timedelta(minutes=minute), model, given, made, project=project
                ),
                st.integers(0, 3 * 24 * 60 - 1),
                st.sampled_from([LARGE, SMALL, "gpt-9-2031-01-01"]),
                SIZES,
                st.integers(0, 500),
                st.sampled_from(["proj_1", "proj_2", None]),
            ),
            min_size=1,
            max_size=25,
        )
    )
    billing = Billing(
        counts=draw(st.sampled_from(["free", "all"])),
        overage=draw(st.sampled_from(["whole", "excess"])),
        tier=draw(st.sampled_from([1, 3])),
        closed_projects=draw(st.sampled_from([frozenset(), frozenset({"proj_1"})])),
        sent=sorted(sent, key=lambda one: one.at),
    )
    if draw(st.booleans()):
        billing.listed["gpt-9-2031-01-01"] = "1M"
    ours = [one for one in billing.sent if draw(st.integers(0, 9))]
    return billing, [*ours, *draw(st.lists(st.sampled_from(billing.sent), max_size=3))]


@settings(max_examples=150)
@given(histories(), st.integers(-50, 50))
def test_explained_and_unexplained_are_the_difference(history, noise):
    """Whatever differs, the causes and the rest add up to it exactly, and every cell that differs is there."""
    billing, ours = history
    rows = billing.rows()
    rows[0]["output_tokens"] = max(0, rows[0]["output_tokens"] + noise)
    files = [("usage", lines(billing.pages(rows)))]
    requests = requests_of(sorted(ours, key=lambda one: one.at))
    result = compared(billing, requests, files=files)
    for one in result.differences:
        assert one.explained + one.unexplained == one.reported - one.decided
        assert all(part.tokens for part in one.parts)
    tokens = sum(one.difference for one in result.differences if one.measure is Measure.TOKENS)
    assert tokens == result.reported - result.decided
    if result.reported_free is not None:
        free = sum(one.difference for one in result.differences if one.measure is Measure.FREE)
        assert free == result.reported_free - result.decided_free


@settings(max_examples=60)
@given(histories())
def test_what_is_judged_by_days_is_what_is_judged_whole(history):
    """The chain judges only the days on which something is otherwise; all requests judged at once say the same."""
    billing, ours = history
    own = gather(decided(requests_of(sorted(ours, key=lambda one: one.at))))
    table = beside(reports_of([("usage", billing.usage_file())]), own, since=None, until=None)
    chain = explain_free(table, own, OFFER, explain(table, own))
    assert chain.current == judged(own, chain.offer, chain.amended, chain.others)
    for reading, free in chain.free.items():
        assert free == judged(own, offer_as(OFFER, reading), chain.amended, chain.others)


def busy(rng, *, days=6, count=40):
    """Days on which the large group's allowance is crossed, more or less."""
    models = (LARGE, LARGE, SMALL, "gpt-4o-2024-08-06")
    return [
        Sent(
            at(rng.randrange(days)) + timedelta(seconds=rng.randrange(86_400)),
            rng.choice(models),
            rng.choice((rng.randint(500, 5_000), rng.randint(20_000, 60_000), rng.randint(1_000, 90_000))),
            rng.randint(1, 900),
            project=rng.choice(("proj_1", "proj_2", "proj_3")),
        )
        for _ in range(days * count)
    ]


def late_ones(rng, billing, sent):
    """Two requests are counted on the day after."""
    late = [Sent(at(day, 23, 58), LARGE, rng.randint(1_000, 40_000), rng.randint(1, 900)) for day in (1, 3)]
    return [*sent, *(moved(one, 5 * MINUTE) for one in late)], [*sent, *late]


def foreign_ones(rng, billing, sent):
    """Somebody else uses the allowance, too."""
    theirs = [Sent(at(2, 5), LARGE, rng.randint(1_000, 90_000), 7, project="proj_9") for _ in range(3)]
    return [*sent, *theirs], sent


def missing_ones(rng, billing, sent):
    """The last requests are not in the report yet."""
    return sorted(sent, key=lambda one: one.at)[:-2], sent


def doubled_ones(rng, billing, sent):
    """Two requests are logged twice."""
    return sent, [*sent, *rng.sample(sent, 2)]


def new_ones(rng, billing, sent):
    """A model that no list has is free from the third day on."""
    billing.listed["gpt-9-2031-01-01"] = "1M"
    new = [Sent(at(day, 12), "gpt-9-2031-01-01", rng.randint(1_000, 9_000), 1) for day in range(2, 6)]
    return [*sent, *new], [*sent, *new]


def delisted_ones(rng, billing, sent):
    """A model that is listed here is billed."""
    del billing.listed["gpt-4o-2024-08-06"]
    return sent, sent


def closed_project(rng, billing, sent):
    """A project does not share."""
    billing.closed_projects = frozenset({"proj_2"})
    return sent, sent


def closed_day(rng, billing, sent):
    """Nothing is free on a day."""
    billing.closed_days = frozenset({at(2).date().isoformat()})
    return sent, sent


def closed_from(rng, billing, sent):
    """Nothing is free from an instant on."""
    billing.closed_from = at(3, 9)
    return sent, sent


PLANTED = {
    late_ones: Cause.LATE_ARRIVAL,
    foreign_ones: Cause.MISSING_IN_LEDGER,
    missing_ones: Cause.MISSING_IN_REPORT,
    doubled_ones: Cause.DUPLICATE,
    new_ones: Cause.MODEL_NOT_LISTED,
    delisted_ones: Cause.MODEL_NOT_LISTED,
    closed_project: Cause.PROJECT_NOT_SHARING,
    closed_day: Cause.ENROLLMENT_OR_BALANCE,
    closed_from: Cause.ENROLLMENT_OR_BALANCE,
}


@pytest.mark.parametrize("counts", ["free", "all"])
@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_fault_is_told_from_another_reading(plant, counts):
    """On days that cross the allowance, a fault and a hidden reading are told apart, and nothing is left over."""
    for seed in range(3):
        rng = Random(seed)  # noqa: S311 - a test, not a secret
        billing = Billing(counts=counts)
        theirs, ours = plant(rng, billing, busy(rng))
        billing.sent = sorted(theirs, key=lambda one: one.at)
        result = compared(billing, requests_of(sorted(ours, key=lambda one: one.at)))
        found = {part.cause for one in result.differences for part in one.parts}
        assert PLANTED[plant] in found
        assert found <= {PLANTED[plant], *([Cause.RULE_DIFFERS] if counts == "all" else [])}
        assert unexplained(result) == 0
        best = result.fit.ranked[0]
        assert f"counts={counts} overage=whole" in {best.reading, *best.same_as}
        assert best.off == 0


def test_a_corrected_request_counts_once_by_its_last_word():
    """Of a ledger with corrections the last word on a request is compared; what was voided is no request."""
    sent = [Sent(at(0, hour), LARGE, 5_000 + hour, 7) for hour in (1, 2, 3)]
    with Meter.open("memory:", offer=OFFER, bounds=None) as meter:
        meter.enroll("default", Enrollment(tier=3, sharing=Sharing.ENABLED), actor="owner")
        meter.decide_many(requests_of(sent))
        meter.adjust("r0", Usage(input_tokens=4_000, output_tokens=1), actor="owner", why="miscounted")
        meter.void("r1", actor="owner", why="never sent")
        own = gather(entry.decision for entry in meter.ledger())
    assert [(item.tokens, item.free) for item in own.items] == [(4_001, 4_001), (5_010, 5_010)]


def test_a_late_request_among_others():
    """Of several requests before midnight just those are late whose tokens make up what the days lack and have."""
    sent = quiet()
    late, punctual = Sent(at(0, 23, 40), LARGE, 40_000, 2_000), Sent(at(0, 23, 50), LARGE, 777, 1)
    result = compared(Billing(sent=[*sent, moved(late, 25 * MINUTE), punctual]), requests_of([*sent, late, punctual]))
    assert {part.cause for one in result.differences for part in one.parts} == {Cause.LATE_ARRIVAL}
    assert unexplained(result) == 0


def test_a_late_request_explains_no_more_than_itself():
    """Five tokens too many beside a late request are no request of anybody, and stay unexplained."""
    sent = quiet()
    last = Sent(at(0, 23, 58), LARGE, 40_000, 2_000)
    billing = Billing(sent=[*sent, moved(last, 5 * MINUTE)])
    rows = billing.rows()
    next(row for row in rows if row["day"].day == 2 and row["model"] == LARGE)["output_tokens"] += 5
    files = [("usage", lines(billing.pages(rows)))]
    result = compared(billing, requests_of([*sent, last]), files=files)
    assert {part.cause for one in result.differences for part in one.parts} == {Cause.LATE_ARRIVAL}
    assert unexplained(result) == 10


def test_a_request_that_is_missing_has_tokens_of_its_own():
    """A request fewer in the report explains no difference that none of ours could make."""
    billing = Billing(sent=quiet())
    rows = billing.rows()
    rows[0]["output_tokens"] -= 7
    rows[0]["num_model_requests"] -= 1
    result = compared(billing, files=[("usage", lines(billing.pages(rows)))])
    assert causes(result) == {}
    assert unexplained(result) == 14


def test_a_supposition_that_leads_away_is_dropped():
    """Of two requests with tools only one is free in the report: to take both for free would be farther off."""
    sent = [Sent(at(0, 1), LARGE, 1_000, 1), Sent(at(0, 2), LARGE, 9_000, 1)]
    requests = [structs.replace(request, tools=("web_search",)) for request in requests_of(sent)]
    billing = Billing(sent=[sent[0], replace(sent[1], hosted=True)])
    result = compared(billing, requests)
    assert causes(result) == {}
    assert [one.unexplained for one in result.differences] == [1_001]


def test_tools_that_exclude_nothing_there():
    """Requests with tools that are free in the report are named as such."""
    sent = quiet(1)
    requests = [structs.replace(request, tools=("web_search",)) for request in requests_of(sent)]
    result = compared(Billing(sent=sent), requests)
    assert set(causes(result)) == {Cause.HOSTED_TOOLS}
    assert unexplained(result) == 0


def test_a_reading_that_is_wrong_where_ours_is_right_explains_nothing():
    """Two days under one reading and one under another fit neither, and neither is named as the cause."""
    sent = crossing()
    rows = [row for row in Billing(counts="all", sent=sent).rows() if row["day"].day < 3]
    rows += [row for row in Billing(counts="free", sent=sent).rows() if row["day"].day == 3]
    billing = Billing(sent=sent)
    result = compared(billing, files=[("usage", lines(billing.pages(rows)))])
    assert Cause.RULE_DIFFERS not in causes(result)


def test_what_would_not_have_fit_is_no_fault_of_its_project():
    """Where the allowance was used up, that a project got nothing free does not say that it does not share."""
    sent = [
        Sent(at(0, 9), LARGE, 975_000, 0, project="proj_1"),
        Sent(at(0, 20), LARGE, 30_000, 0, project="proj_1"),
        Sent(at(0, 21), LARGE, 20_000, 0, project="proj_2"),
        Sent(at(1, 9), SMALL, 1_000, 0, project="proj_1"),
    ]
    billing = Billing(overage="excess", sent=sent)
    rows = billing.rows()
    next(row for row in rows if row["model"] == SMALL)["input_tokens"] += 7
    result = compared(billing, files=[("usage", lines(billing.pages(rows)))])
    assert set(causes(result)) == {Cause.RULE_DIFFERS}
    assert unexplained(result) == 14


def test_a_request_that_was_billed_by_itself_makes_room_for_others():
    """A large request that was billed though it would fit explains, too, what fitted in its stead."""
    sent = [
        Sent(at(0, 9), "gpt-4o-2024-08-06", 600_000, 0),
        Sent(at(0, 9, 30), "gpt-4o-2024-08-06", 1_000, 0),
        Sent(at(0, 12), LARGE, 375_000, 0),
        Sent(at(0, 20), LARGE, 30_000, 0),
    ]
    billing = Billing(sent=[replace(sent[0], hosted=True), *sent[1:]])
    result = compared(billing, requests_of(sent))
    assert causes(result) == {Cause.ENROLLMENT_OR_BALANCE: -570_000}
    assert unexplained(result) == 0


def test_only_the_exact_tier_is_free():
    """No name is guessed: what only looks like the tier of free tokens is not it."""
    for tier, is_free in (("incentivized-tier", True), ("data_sharing_incentive", False), ("Incentivized-Tier", False)):
        row = UsageRow(start=FIRST, end=at(1), kind="completions", source="", service_tier=tier)
        assert row.is_free is is_free


@pytest.mark.parametrize("counts", ["free", "all"])
@pytest.mark.parametrize("fault", [closed_day, new_ones])
def test_a_late_request_on_a_day_with_another_fault(fault, counts):
    """What is judged by days is right for requests that count on another day than their own, too."""
    for seed in range(5):
        rng = Random(seed)  # noqa: S311 - a test, not a secret
        billing = Billing(counts=counts)
        theirs, ours = late_ones(rng, billing, busy(rng, count=70))
        more, _ = fault(rng, billing, [])
        theirs, ours = [*theirs, *more], [*ours, *more]
        billing.sent = sorted(theirs, key=lambda one: one.at)
        own = gather(decided(requests_of(sorted(ours, key=lambda one: one.at))))
        table = beside(reports_of([("usage", billing.usage_file())]), own, since=None, until=None)
        chain = explain_free(table, own, OFFER, explain(table, own))
        assert chain.current == judged(own, chain.offer, chain.amended, chain.others)
        for reading, free in chain.free.items():
            assert free == judged(own, offer_as(OFFER, reading), chain.amended, chain.others)


def test_a_request_that_came_too_late_here_is_free_there():
    """What was billed only because it came late is explained by that; a ledger that does not follow, by the rule."""
    sent = quiet(1)
    for reason, cause in ((Reason.TOO_LATE, Cause.LATE_ARRIVAL), (Reason.OVER_ALLOWANCE, Cause.RULE_DIFFERS)):
        decisions = decided(requests_of(sent))
        decisions[3] = structs.replace(decisions[3], reason=reason, free_tokens=0)
        report = reports_of([("usage", Billing(sent=sent).usage_file())])
        result = reconcile(report, gather(decisions), OFFER)
        assert causes(result) == {cause: sent[3].tokens}
        assert unexplained(result) == 0


def test_a_day_that_is_used_up_tells_overage_only():
    """Where nothing small follows what does not fit, how billed requests count stays open, and that is said."""
    sent = [Sent(at(0, 9), LARGE, 975_000, 0), Sent(at(0, 23), LARGE, 30_000, 0)]
    result = compared(Billing(sent=sent))
    assert result.fit.ranked[0].same_as == ("counts=all overage=whole",)
    assert not result.fit.is_sure
    assert "a smaller one that still would comes after it" in result.fit.sentence


def test_a_model_that_was_logged_by_its_alias():
    """What was logged as gpt-4.1 and reported as a dated id is named so, and not as missing on both sides."""
    sent = quiet()
    requests = [
        structs.replace(request, model="gpt-4.1") if request.model == LARGE else request
        for request in requests_of(sent)
    ]
    result = compared(Billing(sent=sent), requests)
    assert {part.cause for one in result.differences for part in one.parts} == {Cause.OTHER_NAME}
    assert causes(result, Measure.FREE) == {Cause.OTHER_NAME: sum(one.tokens for one in sent if one.model == LARGE)}
    assert unexplained(result) == 0


def test_embeddings_are_compared_with_their_own_report():
    """Requests for embeddings are beside the report of embeddings, and set aside where there is none."""
    sent = quiet(1)
    more = Request(id="e", model="text-embedding-3-small", at=at(0, 1), input_tokens=400, kind=Kind.EMBEDDING)
    billing = Billing(sent=sent)
    row = {
        "object": "organization.usage.embeddings.result",
        "day": at(0).date(),
        "input_tokens": 400,
        "num_model_requests": 1,
        "project_id": None,
        "model": more.model,
    }
    usage, embeddings = ("usage", billing.usage_file()), ("embeddings", lines(billing.pages([row])))
    assert compared(billing, [*requests_of(sent), more], files=[usage, embeddings]).is_clean
    without = compared(billing, [*requests_of(sent), more], files=[usage])
    assert without.is_clean
    assert any("1 requests of kind embedding are not compared" in note for note in without.notes)
    assert causes(compared(billing, files=[usage, embeddings]), Measure.TOKENS) == {Cause.MISSING_IN_LEDGER: 400}


def test_what_others_used_counts_as_each_reading_counts():
    """Somebody else's billed tokens are beyond the allowance where all tokens count, and nothing where free ones do."""
    theirs = [Sent(at(0, hour), LARGE, size, 0, project="proj_9") for hour, size in ((1, 600_000), (2, 700_000))]
    ours = [Sent(at(0, 5), LARGE, 100_000, 0)]
    for counts in ("free", "all"):
        result = compared(Billing(counts=counts, sent=[*theirs, *ours]), requests_of(ours))
        assert result.fit.ranked[0].reading == f"counts={counts} overage=whole"
        assert result.fit.ranked[0].off == 0
        assert unexplained(result) == 0


def test_a_line_that_is_there_again_is_the_same_request():
    """A log that repeats a request has it once."""
    requests = requests_of(quiet(1))
    assert compared(Billing(sent=quiet(1)), [*requests, *requests]).is_clean
