"""`gratis reconcile`: what the provider reported and charged, beside what was decided."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from gratis import clock
from gratis.audit.replay import Replay
from gratis.cli import report as html
from gratis.cli.decisions import assumed, histories
from gratis.cli.reconciled import result_lines, show, tell
from gratis.cli.screen import is_table
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
    from datetime import datetime

    from gratis.audit.story import Story
    from gratis.model import Decision
    from gratis.offer import Offer
    from gratis.reconcile.own import Own

FOUND, BAD_INPUT = 1, 2
KEY_VARIABLE, URL_VARIABLE = "OPENAI_ADMIN_KEY", "OPENAI_BASE_URL"


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
    prices = load_prices(arguments.prices)
    reports = reports_of(files)
    story = html.begin(arguments.html, f"{offer.title}: reported and decided", offer.name, prices=prices)
    own = _own(arguments, offer, complain, story)
    result = compare(reports, own, offer, prices=prices, since=arguments.since, until=arguments.until)
    if story is not None:
        tell(story, result)
        html.end(arguments.html, story)
    if is_table(arguments.format):
        show(result)
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


def _own(arguments: argparse.Namespace, offer: Offer, complain: Complaints, story: Story | None) -> Own:
    """What was decided: by a ledger, by a store's, or by a replay of a log."""
    if arguments.log is not None:
        if arguments.tier is None and arguments.enrollments is None:
            raise GratisError("reconcile: --log: expected --tier N, or --enrollments FILE: who takes part?")
        changes = {} if arguments.enrollments is None else histories(arguments.enrollments, offer.name)
        judge = Replay(offer, assume=assumed(arguments), changes=changes)
        try:
            return _gathered(arguments, offer, _replayed(arguments.log, judge, complain), story)
        finally:
            judge.close()
    if arguments.ledger is not None:
        return _gathered(arguments, offer, _of_ledger(arguments.ledger), story)
    store = open_store(arguments.store, must_exist=True)
    try:
        return _gathered(arguments, offer, (entry.decision for entry in store.entries()), story)
    finally:
        store.close()


def _gathered(arguments: argparse.Namespace, offer: Offer, decisions: Iterator[Decision], story: Story | None) -> Own:
    if story is not None:
        decisions = _told(arguments, offer, decisions, story)
    return gather(decisions, offer=offer.name, account=arguments.account, since=arguments.since, until=arguments.until)


def _told(
    arguments: argparse.Namespace, offer: Offer, decisions: Iterator[Decision], story: Story
) -> Iterator[Decision]:
    """The decisions, and the page told of those that are compared."""
    for decision in decisions:
        is_ours = decision.offer == offer.name and arguments.account in {None, decision.account}
        if is_ours and not decision.replayed and _is_within(decision.at, arguments.since, arguments.until):
            story.add(decision)
        yield decision


def _is_within(at: datetime, since: datetime | None, until: datetime | None) -> bool:
    return (since is None or since <= at) and (until is None or at < until)


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
