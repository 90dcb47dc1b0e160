"""What a reconciliation found, and what to do next: as JSON lines, as tables on a terminal, as sections of a page."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

from gratis.audit.page import Figure
from gratis.cli.screen import number, paint, safe, table
from gratis.prices import total
from gratis.reconcile.findings import Cause, Measure
from gratis.reconcile.totals import many

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gratis.audit.story import Story
    from gratis.reconcile.findings import Check, Difference, Fit, Money, Result

WHY_MAX = 160
SHOWN_MAX = 60
FAILS_SHOWN_MAX = 5
DIFFERENCE: Final = (
    "day",
    "group",
    "project",
    "model",
    "measure",
    "reported",
    "decided",
    "difference",
    "unexplained",
)
NEXT: Final[Mapping[Cause, str]] = {
    Cause.LATE_ARRIVAL: "nothing to correct: the provider counts such requests on the other side of midnight",
    Cause.MODEL_NOT_LISTED: "compare the provider's list of models with the offer's file: `gratis offers show`",
    Cause.PROJECT_NOT_SHARING: "look at the sharing of this project, at the provider and in `gratis enroll`",
    Cause.HOSTED_TOOLS: "log the tools of each request: hosted ones are billed, client-side functions are not",
    Cause.ENROLLMENT_OR_BALANCE: "look at sharing, enrollment, usage tier and balance at the provider on these days",
    Cause.DUPLICATE: "count it once: take the copy out of the report or the log",
    Cause.RULE_DIFFERS: "decide under the reading that fits: --counts and --overage, or the offer's file",
    Cause.MISSING_IN_REPORT: "fetch the report again later; what stays missing was not billed, or not sent",
    Cause.MISSING_IN_LEDGER: "find who else uses the organization: group the report by project and key",
    Cause.OTHER_NAME: "log the model that the response names, not the one that was asked for",
    Cause.UNMEASURED: "log the usage of each response: what nobody measured cannot be decided by its size",
    Cause.TIER_UNKNOWN: "ask the provider what this service tier is: no evidence of free or billed",
}
UNEXPLAINED_NEXT: Final = "no cause accounts for it: ask the provider about this day, project and model"
APART_NEXT: Final = "compare the same days: fetch the report of those that were decided, or take the log of these"


def result_lines(result: Result) -> Iterator[dict[str, Any]]:
    """A reconciliation as JSON lines; amounts of money are strings, with all their digits."""
    for one in result.differences:
        yield difference_line(one)
    for over in result.over:
        yield {"kind": "over_allowance", **{name: getattr(over, name) for name in over.__struct_fields__}}
    for identity in result.identities:
        for check in identity.checks:
            yield {"kind": "check", "identity": identity.number, **_check_line(check)}
        yield {
            "kind": "identity",
            "number": identity.number,
            "text": identity.text,
            "checked": identity.checked,
            "held": identity.held,
            "failed": identity.failed,
        }
    if result.fit is not None:
        yield from _fit_lines(result.fit)
    if result.money is not None:
        yield from _money_lines(result.money)
    for note in result.notes:
        yield {"kind": "note", "text": note}
    yield {
        "kind": "summary",
        "offer": result.offer,
        "reading": result.reading or None,
        "since": result.since.date(),
        "until": result.until.date(),
        "reported": result.reported,
        "decided": result.decided,
        "reported_free": result.reported_free,
        "decided_free": result.decided_free,
        "differences": len(result.differences),
        "unexplained": sum(1 for one in result.differences if one.unexplained),
        "money_fails": len(result.money_fails),
        "clean": result.is_clean,
    }


def difference_line(one: Difference) -> dict[str, Any]:
    """A difference as its line."""
    return {
        "kind": "difference",
        "measure": one.measure,
        "day": one.day,
        "group": one.group,
        "project": one.project,
        "model": one.model,
        "reported": one.reported,
        "decided": one.decided,
        "difference": one.difference,
        "explained": one.explained,
        "unexplained": one.unexplained,
        "causes": [{"cause": part.cause, "tokens": part.tokens, "why": part.why} for part in one.parts],
    }


def show(result: Result) -> None:
    """A reconciliation for people."""
    print(_head(result) + "\n")
    if result.differences:
        _show_differences(result)
    for over in result.over:
        text = f"{over.day} {over.group}: {over.reported:,} free tokens in the report, allowance {over.allowance:,}"
        print(paint(text, "red"))
    _show_identities(result)
    if result.fit is not None:
        _show_fit(result.fit)
    if result.money is not None:
        _show_money(result.money)
    for note in result.notes:
        if note == result.apart:  # the verdict says it
            continue
        print(paint(f"note: {safe(note, 200)}", "dim"))
    print(f"\n{_verdict(result)}")


def _show_identities(result: Result) -> None:
    for identity in result.identities:
        state = "holds" if identity.checked else "nothing to check"
        if identity.checked:
            state += f" {identity.checked:,} of {identity.checked:,} times"
        if identity.failed:
            state = f"fails {identity.failed:,} of {identity.checked:,} times"
        print(f"{identity.number}. {identity.text}: {paint(state, 'red' if identity.failed else 'green')}")
        for check in identity.fails[:FAILS_SHOWN_MAX]:
            print(f"   {safe(_where(check))}: {_found(check.found)}, expected {_found(check.expected)}")
        if identity.failed > FAILS_SHOWN_MAX:
            print(f"   and {identity.failed - FAILS_SHOWN_MAX:,} more; --format json has all")


def tell(story: Story, result: Result) -> None:
    """A reconciliation as sections of a page."""
    story.beside(*_headline(story, result))
    sums: dict[tuple[object, str], list[int]] = {}
    for identity in result.identities:
        if identity.number == 2:  # noqa: PLR2004 - the one that is by day and group
            for check in identity.checks:
                sums[check.day, check.group or "all"] = [_whole(check.found), _whole(check.expected)]
    rows = [(str(day), group, there, ours, there - ours) for (day, group), (there, ours) in sums.items()]
    story.section(
        "Free tokens, reported and decided",
        ("day", "group", "reported", "decided", "difference"),
        rows,
        _head(result).replace("\n", "; "),
    )
    _tell_differences(story, result)
    checks = [
        (f"{identity.number}. {identity.text}", identity.checked, identity.held, identity.failed)
        for identity in result.identities
    ]
    story.section("The five identities", ("identity", "checked", "held", "failed"), checks)
    fails = [
        (identity.number, _where(check), check.found, check.expected)
        for identity in result.identities
        for check in identity.fails
    ]
    if fails:
        story.section("Where an identity fails", ("identity", "where", "found", "expected"), fails)
    if result.fit is not None:
        head = ("reading", "off by tokens", "exact days and groups", "of", "in use")
        readings = [
            (" = ".join((one.reading, *one.same_as)), one.off, one.exact, result.fit.days, "yes" if one.is_used else "")
            for one in result.fit.ranked
        ]
        story.section("Which reading of the rule fits", head, readings, _sentence(result.fit))
    if result.money is not None:
        _tell_money(story, result.money)
    if result.notes:
        story.section("Notes", ("note",), [(note,) for note in result.notes])


def _headline(story: Story, result: Result) -> Iterator[Figure]:
    """What the report says, to stand beside what was decided."""
    count = len(result.differences)
    said = _verdict(result).removeprefix(f"{many(count, 'difference')}, ")
    yield Figure("Differences", f"{count:,}" if count else "none", said, "good" if result.is_clean else "bad")
    if result.reported_free is not None:
        yield Figure("Reported: free tokens", number(result.reported_free), f"{number(result.reported)} in all")
    money = result.money
    if money is not None and result.reported_free is not None:
        yield Figure("Reported: saved, at list price", story.money(money.saved), f"prices of {money.as_of}")
    if money is not None and money.spent is not None:
        yield Figure("Reported: charged", story.money(money.spent), "by the report of costs")


def _tell_differences(story: Story, result: Result) -> None:
    causes = [
        (cause or "unexplained", count, free, tokens, why) for cause, count, free, tokens, why in _by_cause(result)
    ]
    head = ("cause", "differences", "free tokens", "all tokens", "what to do")
    story.section("Why they differ", head, causes, _verdict(result))
    whys = _evidence(result)
    if whys:
        reasons = [(cause.value, why, times) for (cause, why), times in whys.items()]
        story.section("Evidence", ("cause", "evidence", "times"), reasons)
    rows = [
        (
            one.day.isoformat(),
            one.group or "none",
            one.project or "all",
            one.model or "all",
            one.measure.value,
            one.reported,
            one.decided,
            one.difference,
            one.unexplained,
            ", ".join(dict.fromkeys(part.cause.value for part in one.parts)),
        )
        for one in result.differences
    ]
    if rows:
        story.section("Each difference", (*DIFFERENCE, "causes"), rows)


def _tell_money(story: Story, money: Money) -> None:
    spent = "the reports say nothing of costs" if money.spent is None else f"spent {_amount(money.spent)}"
    about = (
        f"Saved {_amount(money.saved)} {money.currency.upper()} at list price, by {money.saved_basis}; {spent}. Prices:"
        f" {money.prices}, as of {money.as_of}; {money.source}."
    )
    rows: list[tuple[object, ...]] = [
        (one.model, one.expected, one.charged, one.difference, one.note) for one in money.models
    ]
    rows += [(name, None, amount, None, "no model of the report") for name, amount in money.other_lines]
    rows += [(model, None, None, None, f"no price known of {free:,} free tokens") for model, free in money.unpriced]
    story.section(
        "Saved and charged, by the reports", ("model", "expected", "charged", "difference", "note"), rows, about
    )


def _head(result: Result) -> str:
    last = result.until.date().isoformat()
    free = "" if result.reported_free is None else f", {result.reported_free:,} free"
    return (
        f"{result.offer}, {result.reading or 'no tiers reported'}: {result.since.date()} until before {last} (UTC)\n"
        f"reported {result.reported:,} tokens{free}; decided {result.decided:,}, {result.decided_free:,} free"
    )


def _verdict(result: Result) -> str:
    """In one line, whether anybody has to look: the differences, and what fails beside them."""
    left = [one for one in result.differences if one.unexplained]
    said = [f"{many(len(result.differences), 'difference')}, {_left(len(left))}"]
    if not result.differences:
        said = ["no differences" if result.is_clean else "no differences in tokens"]
    fails = result.money_fails
    if fails and result.money is not None:
        amount = _amount(total(abs(one.difference or Decimal(0)) for one in fails))
        verb = "fails" if len(fails) == 1 else "fail"
        checks = "1 check" if len(fails) == 1 else f"{len(fails):,} checks"
        said.append(f"{checks} of money {verb}: {amount} {result.money.currency}")
    if result.over:
        said.append(f"more free than the allowance {many(len(result.over), 'time')}")
    return "; ".join([*said, *([result.apart] if result.apart else [])])


def _left(count: int) -> str:
    return f"{count:,} not or not wholly explained" if count else "all explained"


def _evidence(result: Result) -> Counter[tuple[Cause, str]]:
    """What each cause rests on, and of how many days, projects and models: tokens and free tokens are one of them."""
    places = {
        (part.cause, part.why, one.day, one.project, one.model) for one in result.differences for part in one.parts
    }
    found = Counter((cause, why) for cause, why, *_ in places)
    order = dict.fromkeys((part.cause, part.why) for one in result.differences for part in one.parts)
    return Counter({each: found[each] for each in order})


def _by_cause(result: Result) -> list[tuple[Cause | None, int, int, int, str]]:
    """By cause: how many differences, how many tokens of them, free and all, and what to do; at last the rest."""
    counts, free, tokens = Counter[Cause | None](), Counter[Cause | None](), Counter[Cause | None]()
    for one in result.differences:
        sums = Counter[Cause | None]()
        for part in one.parts:
            sums[part.cause] += part.tokens
        if one.unexplained:
            sums[None] = one.unexplained
        for cause, amount in sums.items():
            counts[cause] += 1
            if one.measure is Measure.FREE:
                free[cause] += amount
            elif one.measure is Measure.TOKENS:
                tokens[cause] += amount
    order = sorted(counts, key=lambda cause: (cause is None, cause or ""))
    rest = APART_NEXT if result.apart else UNEXPLAINED_NEXT
    return [
        (cause, counts[cause], free[cause], tokens[cause], NEXT[cause] if cause is not None else rest)
        for cause in order
    ]


def _show_differences(result: Result) -> None:
    head = (*DIFFERENCE, "causes")
    rows, colors = [], []
    for one in result.differences[:SHOWN_MAX]:
        rows.append(
            (
                one.day.isoformat(),
                safe(one.group or "-"),
                safe(one.project or "-"),
                safe(one.model or "-"),
                one.measure.value,
                number(one.reported),
                number(one.decided),
                f"{one.difference:+,}",
                f"{one.unexplained:+,}" if one.unexplained else "",
                ", ".join(dict.fromkeys(part.cause.value for part in one.parts)),
            )
        )
        colors.append("red" if one.unexplained else "yellow")
    print(table(head, rows, right=head[5:9], colors=colors))
    if len(result.differences) > SHOWN_MAX:
        print(f"and {len(result.differences) - SHOWN_MAX:,} more; --format json has all")
    print()
    whys: dict[Cause, Counter[str]] = {}
    for (cause_of, why), times in _evidence(result).items():
        whys.setdefault(cause_of, Counter())[why] = times
    for cause, count, free, tokens, todo in _by_cause(result):
        name = paint("unexplained" if cause is None else cause.value, "red" if cause is None else "yellow")
        print(f"{name}: {many(count, 'difference')}, {free:+,} free tokens, {tokens:+,} of all")
        found = whys.get(cause, Counter[str]()) if cause is not None else Counter[str]()
        for why, times in list(found.items())[:FAILS_SHOWN_MAX]:
            print(f"   {safe(why, WHY_MAX)}" + (f" ({times:,} times)" if times > 1 else ""))
        if len(found) > FAILS_SHOWN_MAX:
            print(f"   and {len(found) - FAILS_SHOWN_MAX:,} more such reasons")
        print(f"   next: {todo}")
    print()


def _show_fit(fit: Fit) -> None:
    print("\nreadings of the rule, by how far they are off what was reported as free")
    rows = [
        (
            safe(one.reading) + (" *" if one.is_used else ""),
            number(one.off),
            f"{one.exact:,} of {fit.days:,}",
            number(one.closer),
            number(one.farther),
        )
        for one in fit.ranked
    ]
    head = ("reading (* in use)", "off", "exact", "closer", "farther")
    print(table(head, rows, right=head[1:]))
    print(_sentence(fit))


def _sentence(fit: Fit) -> str:
    sure = "sure" if fit.is_sure else "likely" if fit.is_likely else "not sure"
    return f"{sure}: {fit.sentence}"


def _show_money(money: Money) -> None:
    print(f"\nsaved {_amount(money.saved)} {money.currency} at list price ({money.saved_basis})")
    if money.spent is not None:
        print(f"spent {_amount(money.spent)} {money.currency}")
    if money.models:
        rows = [
            (
                safe(one.model),
                _amount(one.expected) or "",
                _amount(one.charged) or "",
                _amount(one.difference) or "",
                safe(one.note),
            )
            for one in money.models
        ]
        head = ("billed model", "expected", "charged", "difference", "note")
        print(table(head, rows, right=head[1:4]))
    for model, tokens in money.unpriced:
        print(f"no price known: {safe(model)}, {tokens:,} free tokens")
    for name, amount in money.other_lines:
        print(f"other: {safe(name)} {_amount(amount)}")
    print(paint(f"prices: {money.prices}, as of {money.as_of}; {safe(money.source, 200)}", "dim"))


def _fit_lines(fit: Fit) -> Iterator[dict[str, Any]]:
    for rank, one in enumerate(fit.ranked, start=1):
        yield {
            "kind": "reading",
            "rank": rank,
            "reading": one.reading,
            "same_as": list(one.same_as),
            "off": one.off,
            "exact": one.exact,
            "closer": one.closer,
            "farther": one.farther,
            "used": one.is_used,
        }
    deciding = [{"day": day, "group": group} for day, group in fit.deciding]
    yield {
        "kind": "fit",
        "days": fit.days,
        "deciding": deciding,
        "margin": fit.margin,
        "sure": fit.is_sure,
        "sentence": fit.sentence,
    }


def _money_lines(money: Money) -> Iterator[dict[str, Any]]:
    for one in money.models:
        yield {
            "kind": "charged",
            "model": one.model,
            "expected": _amount(one.expected),
            "charged": _amount(one.charged),
            "difference": _amount(one.difference),
            "note": one.note or None,
        }
    yield {
        "kind": "money",
        "currency": money.currency,
        "saved": _amount(money.saved),
        "saved_basis": money.saved_basis,
        "spent": _amount(money.spent),
        "prices": money.prices,
        "as_of": money.as_of,
        "source": money.source,
        "no_price_known": dict(money.unpriced),
        "other_lines": {name: _amount(amount) for name, amount in money.other_lines},
    }


def _check_line(check: Check) -> dict[str, Any]:
    return {
        "day": check.day,
        "group": check.group,
        "project": check.project,
        "model": check.model,
        "found": _amount(check.found) if isinstance(check.found, Decimal) else check.found,
        "expected": _amount(check.expected) if isinstance(check.expected, Decimal) else check.expected,
        "held": check.is_held,
    }


def _where(check: Check) -> str:
    parts = (check.day and check.day.isoformat(), check.group, check.project, check.model)
    return " ".join(part for part in parts if part) or "all"


def _found(value: int | Decimal | None) -> str:
    return _amount(value) or "" if isinstance(value, Decimal) else number(value)


def _whole(value: int | Decimal | None) -> int:
    return value if isinstance(value, int) else 0


def _amount(value: Decimal | None) -> str | None:
    """An amount with all its digits, none that is only a 0 at the end, and never as 1E-7."""
    if value is None:
        return None
    text = f"{value:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text
