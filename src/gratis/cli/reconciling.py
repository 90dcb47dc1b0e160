"""`gratis reconcile`: what the provider reported and charged, beside what was decided."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from gratis import clock
from gratis.audit.replay import Replay
from gratis.cli import report as html
from gratis.cli.decisions import assumed, histories
from gratis.cli.reconciled import result_lines, show, tell
from gratis.cli.screen import is_table
from gratis.cli.streams import BOM, Complaints, Output, Progress, batches, parsed, reading
from gratis.errors import GratisError, LedgerError, RequestError
from gratis.lines import ENTRY_BYTES_MAX, entry_of, request_of
from gratis.offers import load
from gratis.prices import load_prices
from gratis.reconcile.compare import check_days, reconcile as compare
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
TABLES = frozenset({".csv", ".tsv", ".parquet"})
# How a log is judged; what is decided already is not.
JUDGING = ("counts", "overage", "tier", "sharing", "shared_project", "enrollments")
KEY_VARIABLE, URL_VARIABLE = "OPENAI_ADMIN_KEY", "OPENAI_BASE_URL"


def reconcile(arguments: argparse.Namespace) -> int:
    """Compare reports with decisions; differences make the exit code 1."""
    _check(arguments)
    complain = Complaints(arguments.log or "")
    offer = load(arguments.offer).reading(counts=arguments.counts, overage=arguments.overage)
    prices = load_prices(arguments.prices)
    title, reads = f"{offer.title}: reported and decided", list(_read(arguments))
    story = html.begin(arguments.html, title, offer.name, prices=prices, reads=reads)
    with ExitStack() as stack:
        decisions = _decisions(arguments, offer, complain, stack)
        files = _fetched(arguments) if arguments.fetch else _files(arguments)
        if decisions is None:
            for _ in files:  # each is kept as it comes
                pass
            return 0
        if story is not None:
            decisions = _told(arguments, offer, decisions, story)
        # A file's decisions are read before anything is fetched; a store goes on meanwhile, and is read after it.
        is_first = arguments.fetch and arguments.store is None
        own = _gathered(arguments, offer, decisions) if is_first else None
        reports = reports_of(files)
        own = own or _gathered(arguments, offer, decisions)
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


def _check(arguments: argparse.Namespace) -> None:
    """Refuse options that contradict each other, before anything is read or fetched."""
    sources = [name for name in ("ledger", "store", "log") if getattr(arguments, name) is not None]
    if len(sources) > 1:
        raise GratisError(f"reconcile: found --{' and --'.join(sources)}; expected one of --ledger, --store and --log")
    if bool(arguments.report) is bool(arguments.fetch):
        found = f"found --fetch and {arguments.report[0]}; " if arguments.fetch else ""
        raise GratisError(f"reconcile: {found}expected REPORT files, or --fetch")
    if arguments.save is not None and not arguments.fetch:
        raise GratisError("reconcile: --save keeps what --fetch brings; expected both")
    if not sources and arguments.save is None:
        raise GratisError("reconcile: expected one of --ledger FILE, --store URL and --log FILE to compare with")
    if arguments.store == "memory:":
        raise GratisError("reconcile: --store memory: ends with its process; expected --ledger FILE, or another store")
    given = [f"--{name.replace('_', '-')}" for name in JUDGING if getattr(arguments, name) is not None]
    if arguments.log is None and given:
        which = f" with --{sources[0]}, which is decided already" if sources else " without a log"
        raise GratisError(f"reconcile: found {' and '.join(given)}{which}; expected --log FILE, which is judged")
    if arguments.log is not None and arguments.tier is None and arguments.enrollments is None:
        raise GratisError("reconcile: --log: expected --tier N, or --enrollments FILE: who takes part?")
    check_days(arguments.since, arguments.until)


def _read(arguments: argparse.Namespace) -> Iterator[str]:
    """The files that are read: a page takes the place of none."""
    yield from arguments.report
    named = (arguments.ledger, arguments.log, arguments.enrollments, arguments.offer, arguments.prices)
    yield from [name for name in (*named, html.store_file(arguments.store)) if name is not None]


def _files(arguments: argparse.Namespace) -> Iterator[tuple[str, bytes]]:
    for name in arguments.report:
        with reading(name) as file:
            yield name, file.read()


def _fetched(arguments: argparse.Namespace) -> Iterator[tuple[str, bytes]]:
    """What the provider reports, asked for as it is read; how it is asked is checked at once."""
    key = os.environ.get(KEY_VARIABLE, "")
    if not key:
        raise GratisError(f"reconcile: --fetch: expected an admin key in the environment, as {KEY_VARIABLE}")
    if arguments.since is None:
        raise GratisError("reconcile: --fetch: expected --since DATE, and --until DATE unless it is today")
    now = clock.now()
    until = arguments.until or day_of(now) + timedelta(days=1)
    base = os.environ.get(URL_VARIABLE) or BASE_URL
    pages = fetch(key=key, since=arguments.since, until=until, wait=time.sleep, base_url=base)
    print(
        f"gratis: reports lag: the last {LAG_MINUTES} minutes before {now:%Y-%m-%d %H:%M} UTC may be missing",
        file=sys.stderr,
    )
    return _kept(arguments, pages)


def _kept(arguments: argparse.Namespace, pages: Iterator[Fetched]) -> Iterator[tuple[str, bytes]]:
    """Pages as they come, each kept where that is asked for."""
    progress = Progress("pages")
    for page in pages:
        if arguments.save is not None:
            folder = Path(arguments.save)
            _save(folder, page)
            html.apart(arguments.html, [str(folder / page.name)])
        progress.add(1)
        yield page.name, page.content
    progress.end()


def _save(folder: Path, page: Fetched) -> None:
    """Keep a page as a file; none is written over."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (folder / page.name).open("xb") as file:
            file.write(page.content)
    except FileExistsError:
        raise GratisError(f"{folder / page.name}: there already; expected a folder without reports") from None


def _decisions(
    arguments: argparse.Namespace, offer: Offer, complain: Complaints, stack: ExitStack
) -> Iterator[Decision] | None:
    """What was decided: by a ledger, by a store's, or by a replay of a log; opened at once, and read later."""
    if arguments.log is not None:
        changes = {} if arguments.enrollments is None else histories(arguments.enrollments, offer.name)
        judge = Replay(offer, assume=assumed(arguments), changes=changes)
        stack.callback(judge.close)
        return _replayed(
            _log(stack.enter_context(reading(arguments.log)), arguments.log), arguments.log, judge, complain
        )
    if arguments.ledger is not None:
        return _of_ledger(stack.enter_context(reading(arguments.ledger)), arguments.ledger)
    if arguments.store is not None:
        store = open_store(arguments.store, must_exist=True)
        stack.callback(store.close)
        return (entry.decision for entry in store.entries())
    return None


def _gathered(arguments: argparse.Namespace, offer: Offer, decisions: Iterator[Decision]) -> Own:
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


def _of_ledger(file: BinaryIO, name: str) -> Iterator[Decision]:
    progress = Progress("entries")
    for batch in batches(file, line_max=ENTRY_BYTES_MAX):
        for place, line in batch:
            if line.strip():
                try:
                    yield entry_of(parsed(line, line_max=ENTRY_BYTES_MAX)).decision
                except (LedgerError, RequestError) as error:
                    raise GratisError(f"{name}: line {place}: {error}") from None
        progress.add(len(batch))
    progress.end()


def _log(file: BinaryIO, name: str) -> BinaryIO:
    """A log, unless its name and its first byte say that it is a table."""
    peek = getattr(file, "peek", None)
    if Path(name).suffix.lower() in TABLES and peek is not None:
        start = peek(1).removeprefix(BOM).lstrip()
        if start and not start.startswith(b"{"):
            raise GratisError(f"--log: {name}: found a table; expected JSON lines, one request a line")
    return file


def _replayed(file: BinaryIO, name: str, judge: Replay, complain: Complaints) -> Iterator[Decision]:
    progress, read = Progress("requests"), 0
    for batch in batches(file):
        for place, line in batch:
            if line.strip():
                try:
                    decision = judge.decide(request_of(parsed(line)))
                except RequestError as error:
                    complain(place, error)
                    continue
                read += 1
                yield decision
        progress.add(len(batch))
    progress.end()
    if not read:
        found = "no line of it could be read" if complain.count else "the log has no request"
        raise GratisError(f"--log: {name}: {found}; expected JSON lines, one request a line")
