"""`gratis reconcile`: what the provider reported and charged, beside what was decided."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gratis import clock
from gratis.audit.replay import Replay
from gratis.cli.decisions import assumed, histories
from gratis.cli.screen import is_table, number, paint, safe, table
from gratis.cli.streams import Complaints, Output, Progress, batches, parsed, reading
from gratis.errors import GratisError, LedgerError, RequestError
from gratis.lines import ENTRY_BYTES_MAX, entry_of, request_of
from gratis.offers import load
from gratis.prices import load_prices
from gratis.reconcile.compare import reconcile as compare
from gratis.reconcile.fetch import BASE_URL, LAG_MINUTES, Fetched, fetch
from gratis.reconcile.files import reports_of
from gratis.reconcile.own import gather
from gratis.reconcile.rows import day_of
from gratis.stores.urls import open_store

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from decimal import Decimal

    from gratis.model import Decision
    from gratis.offer import Offer
    from gratis.reconcile.findings import Difference, Fit, Money, Result
    from gratis.reconcile.own import Own

FOUND, BAD_INPUT = 1, 2
KEY_VARIABLE, URL_VARIABLE = "OPENAI_ADMIN_KEY", "OPENAI_BASE_URL"
WHY_MAX = 110


def reconcile(arguments: argparse.Namespace) -> int:
    """Compare reports with decisions; differences make the exit code 1."""
    sources = [name for name in ("ledger", "store", "log") if getattr(arguments, name) is not None]
    if len(sources) > 1:
        raise GratisError(f"reconcile: found --{' and --'.join(sources)}; expected one of --ledger, --store and --log")
    files = list(_files(arguments))
    if not sources:
        if arguments.save is None:
            raise GratisError("reconcile: expected one of --ledger FILE, --store URL and --log FILE to compare with")
        return 0
    complain = Complaints(arguments.log or "")
    offer = load(arguments.offer).reading(counts=arguments.counts, overage=arguments.overage)
    own = _own(arguments, offer, complain)
    prices = load_prices(arguments.prices)
    result = compare(reports_of(files), own, offer, prices=prices, since=arguments.since, until=arguments.until)
    if is_table(arguments.format):
        _show(result)
    else:
        Output().lines(list(result_lines(result)))
    if complain.count:
        return BAD_INPUT
    return 0 if result.is_clean else FOUND


def _files(arguments: argparse.Namespace) -> Iterator[tuple[str, bytes]]:
    """The reports: files, or what is fetched."""
    if bool(arguments.report) is bool(arguments.fetch):
        raise GratisError("reconcile: expected REPORT files, or --fetch")
    if not arguments.fetch:
        if arguments.save is not None:
            raise GratisError("reconcile: --save keeps what --fetch brings; expected both")
        for name in arguments.report:
            with reading(name) as file:
                yield name, file.read()
        return
    for page in _fetched(arguments):
        if arguments.save is not None:
            _save(Path(arguments.save), page)
        yield page.name, page.content


def _fetched(arguments: argparse.Namespace) -> Iterator[Fetched]:
    key = os.environ.get(KEY_VARIABLE, "")
    if not key:
        raise GratisError(f"reconcile: --fetch: expected an admin key in the environment, as {KEY_VARIABLE}")
    if arguments.since is None:
        raise GratisError("reconcile: --fetch: expected --since DATE, and --until DATE unless it is today")
    now = clock.now()
    until = arguments.until or day_of(now) + timedelta(days=1)
    print(
        f"gratis: reports lag: the last {LAG_MINUTES} minutes before {now:%Y-%m-%d %H:%M} UTC may be missing",
        file=sys.stderr,
    )
    progress = Progress("pages")
    base = os.environ.get(URL_VARIABLE) or BASE_URL
    for page in fetch(key=key, since=arguments.since, until=until, wait=time.sleep, base_url=base):
        progress.add(1)
        yield page
    progress.end()


def _save(folder: Path, page: Fetched) -> None:
    """Keep a page as a file; none is written over."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (folder / page.name).open("xb") as file:
            file.write(page.content)
    except FileExistsError:
        raise GratisError(f"{folder / page.name}: there already; expected a folder without reports") from None


def _own(arguments: argparse.Namespace, offer: Offer, complain: Complaints) -> Own:
    """What was decided: by a ledger, by a store's, or by a replay of a log."""
    if arguments.log is not None:
        if arguments.tier is None and arguments.enrollments is None:
            raise GratisError("reconcile: --log: expected --tier N, or --enrollments FILE: who takes part?")
        changes = {} if arguments.enrollments is None else histories(arguments.enrollments, offer.name)
        judge = Replay(offer, assume=assumed(arguments), changes=changes)
        try:
            return _gathered(arguments, offer, _replayed(arguments.log, judge, complain))
        finally:
            judge.close()
    if arguments.ledger is not None:
        return _gathered(arguments, offer, _of_ledger(arguments.ledger))
    store = open_store(arguments.store, must_exist=True)
    try:
        return _gathered(arguments, offer, (entry.decision for entry in store.entries()))
    finally:
        store.close()


def _gathered(arguments: argparse.Namespace, offer: Offer, decisions: Iterator[Decision]) -> Own:
    return gather(decisions, offer=offer.name, account=arguments.account, since=arguments.since, until=arguments.until)


def _of_ledger(name: str) -> Iterator[Decision]:
    progress = Progress("entries")
    with reading(name) as file:
        for batch in batches(file, line_max=ENTRY_BYTES_MAX):
            for place, line in batch:
                if line.strip():
                    try:
                        yield entry_of(parsed(line, line_max=ENTRY_BYTES_MAX)).decision
                    except (LedgerError, RequestError) as error:
                        raise GratisError(f"{name}: line {place}: {error}") from None
            progress.add(len(batch))
    progress.end()


def _replayed(name: str, judge: Replay, complain: Complaints) -> Iterator[Decision]:
    progress = Progress("requests")
    with reading(name) as file:
        for batch in batches(file):
            for place, line in batch:
                if line.strip():
                    try:
                        yield judge.decide(request_of(parsed(line)))
                    except RequestError as error:
                        complain(place, error)
            progress.add(len(batch))
    progress.end()


def result_lines(result: Result) -> Iterator[dict[str, Any]]:
    """A reconciliation as JSON lines; amounts of money are strings, with all their digits."""
    for one in result.differences:
        yield difference_line(one)
    for over in result.over:
        yield {"kind": "over_allowance", **{name: getattr(over, name) for name in over.__struct_fields__}}
    for check in result.identities:
        yield {
            "kind": "identity",
            "number": check.number,
            "text": check.text,
            "checked": check.checked,
            "held": check.held,
            "failed": check.failed,
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


def _amount(value: Decimal | None) -> str | None:
    """An amount with all its digits, and never as 1E-7."""
    return None if value is None else f"{value:f}"


def _show(result: Result) -> None:
    """A reconciliation for people."""
    print(f"{result.offer}, {result.reading or 'no tiers reported'}: {result.since.date()} to {result.until.date()}")
    free = "" if result.reported_free is None else f", {result.reported_free:,} free"
    print(f"reported {result.reported:,} tokens{free}; decided {result.decided:,}, {result.decided_free:,} free\n")
    if result.differences:
        _show_differences(result)
    for over in result.over:
        text = f"{over.day} {over.group}: {over.reported:,} free tokens in the report, allowance {over.allowance:,}"
        print(paint(text, "red"))
    for check in result.identities:
        state = paint("holds", "green") if not check.failed else paint(f"fails {check.failed:,} times", "red")
        print(f"{check.number}. {check.text}: {state}, of {check.checked:,}")
    if result.fit is not None:
        _show_fit(result.fit)
    if result.money is not None:
        _show_money(result.money)
    for note in result.notes:
        print(paint(f"note: {safe(note, 200)}", "dim"))
    print("\nno differences" if result.is_clean else f"\n{len(result.differences):,} differences")


def _show_differences(result: Result) -> None:
    head = ("day", "group", "project", "model", "measure", "reported", "decided", "difference", "unexplained")
    rows, colors = [], []
    for one in result.differences:
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
            )
        )
        colors.append("red" if one.unexplained else "yellow")
    print(table(head, rows, right=head[5:], colors=colors))
    print()
    whys = {(part.cause, part.why): 0 for one in result.differences for part in one.parts}
    for one in result.differences:
        for part in one.parts:
            whys[part.cause, part.why] += 1
    for (cause, why), times in whys.items():
        print(f"{paint(cause, 'yellow')}: {safe(why, WHY_MAX)}" + (f" ({times} differences)" if times > 1 else ""))
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
    print(fit.sentence)


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
        print(
            table(("model", "expected", "charged", "difference", ""), rows, right=("expected", "charged", "difference"))
        )
    for model, tokens in money.unpriced:
        print(f"no price known: {safe(model)}, {tokens:,} free tokens")
    for name, amount in money.other_lines:
        print(f"other: {safe(name)} {_amount(amount)}")
    print(paint(f"prices: {money.prices}, as of {money.as_of}; {safe(money.source, 200)}", "dim"))
