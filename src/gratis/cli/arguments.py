"""Which commands there are, and what each takes."""

from __future__ import annotations

import argparse
import os
from importlib.metadata import version
from typing import TYPE_CHECKING

from gratis.audit.readings import WINDOWS
from gratis.cli import (
    accounts,
    auditing,
    decisions,
    demo,
    holding,
    ledgers,
    offering,
    properties,
    reading,
    reconciling,
    replaying,
)
from gratis.errors import RequestError
from gratis.lines import instant
from gratis.model import TIER_MAX, Counts, Expiry, Kind, Overage, Sharing
from gratis.offers import DEFAULT_OFFER
from gratis.prices import DEFAULT_PRICES
from gratis.stores.urls import DEFAULT_URL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import datetime

    from gratis.stores import Cursor

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 - argparse gives it no other name
    Run = Callable[[argparse.Namespace], int]


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="gratis",
        description="Decides for every LLM request whether it is free or billed under a complimentary-token offer.",
        epilog="Exit codes: 0; 1 for findings or differences; 2 for bad use, bad input or a store that cannot be used.",
    )
    top.add_argument("-V", "--version", action=_Version, nargs=0, help="print the version")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _demo(commands)
    _decide(commands)
    _replay(commands)
    _readings(commands)
    _standing(commands)
    _explain(commands)
    _hold(commands)
    _settle(commands)
    _holds(commands)
    _correct(commands)
    _enroll(commands)
    _offers(commands)
    _ledger(commands)
    _audit(commands)
    _reconcile(commands)
    return top


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"gratis {version('gratis')}")
        parser.exit()


def _demo(commands: Commands) -> None:
    command = _command(commands, "demo", demo.demo, "a day under the rule, as the provider's article prints it")
    command.add_argument("--store", default="memory:", metavar="URL", help="where to decide (default: memory:)")


def _decide(commands: Commands) -> None:
    command = _command(commands, "decide", decisions.decide, "decide requests, and keep the decisions")
    _file(command, "requests, one JSON object a line")
    _responses(command)
    _store(command)
    _offer(command)
    _assumed(command)
    command.add_argument(
        "--thresholds",
        action="store_true",
        help="say on stderr when 50, 80, 95 and 100 %% of a group are used, and at the first billed request",
    )
    command.add_argument(
        "--no-bounds", action="store_true", help="judge old data as it was: nothing is too late or ahead of the clock"
    )
    _format(command)


def _replay(commands: Commands) -> None:
    command = _command(commands, "replay", replaying.replay, "judge a log in order under any reading; keeps nothing")
    _file(command, "requests: JSON lines, CSV, Parquet or a folder of Parquet files")
    command.add_argument(
        "--from",
        dest="form",
        choices=["json", "csv", "parquet"],
        help="what they are written in (default: by the name)",
    )
    command.add_argument(
        "--out", metavar="FILE", help="write the decisions to this file: .jsonl, .csv or .parquet (default: stdout)"
    )
    command.add_argument(
        "--totals", action="store_true", help="print only requests and tokens, by UTC day, group and reason"
    )
    command.add_argument(
        "--html",
        metavar="PAGE",
        help="write a report for people, too: one page (slower: some 15,000 rows a second)",
    )
    command.add_argument(
        "--trust-ids", action="store_true", help="Parquet: judge each row, without a look for ids that come again"
    )
    command.add_argument("--zone", metavar="ZONE", help="Parquet: the zone of times that name none, such as UTC")
    _responses(command)
    _offer(command)
    _assumed(command)
    command.add_argument(
        "--enrollments", metavar="FILE", help="histories of enrollments, as `gratis enroll --history` prints them"
    )
    command.add_argument(
        "--counts", choices=[*map(str, Counts)], help="what adds to used, instead of the offer's reading"
    )
    command.add_argument(
        "--overage", choices=[*map(str, Overage)], help="what is billed, instead of the offer's reading"
    )
    _format(command)


def _readings(commands: Commands) -> None:
    command = _command(
        commands, "readings", reading.readings, "judge a log under several readings, and show where they part"
    )
    _file(command, "requests, one JSON object a line")
    _offer(command)
    _assumed(command)
    command.add_argument(
        "--enrollments", metavar="FILE", help="histories of enrollments, as `gratis enroll --history` prints them"
    )
    command.add_argument("--counts", type=_list_of(Counts), metavar="free,all", help="what adds to used")
    command.add_argument("--overage", type=_list_of(Overage), metavar="whole,excess", help="what is billed")
    command.add_argument("--tiers", type=_tiers, metavar="N,N", help="every account at this usage tier")
    command.add_argument("--windows", type=_list_of(WINDOWS), metavar="daily,rolling", help="in which windows")
    command.add_argument(
        "--revisions", type=_names, metavar="DATE,DATE|all", help="each as if it had been in force always"
    )
    command.add_argument(
        "--models", action="store_true", help="what models joining and leaving the lists changed, by this log"
    )
    command.add_argument(
        "--with", dest="joins", type=_join, action="append", default=[], metavar="MODEL=GROUP", help="what if it joined"
    )
    command.add_argument(
        "--without", dest="leaves", action="append", default=[], metavar="MODEL", help="what if it left its list"
    )
    command.add_argument("--html", metavar="FILE", help="write a report for people: one page, complete in itself")
    _format(command)


def _standing(commands: Commands) -> None:
    command = _command(commands, "standing", accounts.standing, "what is left of each allowance, and until when")
    _store(command)
    _offer(command)
    _assumed(command)
    command.add_argument("--account", help="only this account")
    command.add_argument("--at", type=_instant, metavar="TIME", help="at this instant instead of now")
    _format(command)


def _explain(commands: Commands) -> None:
    command = _command(commands, "explain", accounts.explain, "would this request be free now? writes nothing")
    _store(command)
    _offer(command)
    _assumed(command)
    command.add_argument("--account", default="default", help="who owns the allowance (default: default)")
    command.add_argument("--model", required=True, help="the model's exact id")
    command.add_argument("--tokens", type=int, default=0, help="input and output together (default: 0)")
    command.add_argument("--project", help="the request's project")
    command.add_argument("--kind", choices=[*map(str, Kind)], default=Kind.COMPLETION.value)
    command.add_argument("--tool", action="append", default=[], help="a kind of tool that it uses; may be repeated")
    command.add_argument("--at", type=_instant, metavar="TIME", help="the request's time (default: now)")
    _format(command)


def _hold(commands: Commands) -> None:
    command = _command(commands, "hold", holding.hold, "set tokens aside before a request is sent, if they fit")
    _request_id(command)
    command.add_argument("--model", required=True, help="the model's exact id")
    command.add_argument(
        "--tokens-max", type=_count, required=True, metavar="N", help="input and output together, at most"
    )
    command.add_argument("--project", help="the request's project")
    command.add_argument("--kind", choices=[*map(str, Kind)], default=Kind.COMPLETION.value)
    command.add_argument("--tool", action="append", default=[], help="a kind of tool that it uses; may be repeated")
    command.add_argument("--at", type=_instant, metavar="TIME", help="the request's time (default: now)")
    command.add_argument("--for", dest="last", type=_day_seconds, default=600.0, metavar="SECONDS", help="default: 600")
    command.add_argument(
        "--on-expiry",
        choices=[*map(str, Expiry)],
        default=Expiry.DECIDED.value,
        help="what becomes of it when it runs out of time: decided by its bound (default), or just released",
    )


def _settle(commands: Commands) -> None:
    command = _command(commands, "settle", holding.settle, "decide a held request by what it used, or by its bound")
    _request_id(command)
    _used(command)
    command.add_argument("--model", help="the model that answered, if the provider says another")
    command.add_argument("--tool", action="append", default=[], help="a kind of tool that it used; may be repeated")
    command = _command(commands, "release", holding.release, "give back what a hold set aside")
    _request_id(command)


def _holds(commands: Commands) -> None:
    command = _command(commands, "holds", holding.holds, "what is held, and until when")
    _store(command)
    _offer(command)
    _assumed(command)
    command.add_argument("--account", help="only this account")
    command.add_argument("--expire", action="store_true", help="end those that ran out of time: print their decisions")
    _format(command)


def _correct(commands: Commands) -> None:
    command = _command(commands, "correct", holding.correct, "correct a decision by a new one that is linked to it")
    _request_id(command)
    command.add_argument("--void", action="store_true", help="the request is to count for nothing")
    _used(command)
    command.add_argument("--why", required=True, metavar="TEXT", help="what is wrong with the first one")
    command.add_argument("--by", metavar="NAME", help="who corrects it: an owner (default: your user name)")


def _request_id(command: argparse.ArgumentParser) -> None:
    command.add_argument("id", help="the request's id")
    command.add_argument("--account", default="default", help="who owns the allowance (default: default)")
    _store(command)
    _offer(command)
    _assumed(command)
    _format(command)


def _used(command: argparse.ArgumentParser) -> None:
    command.add_argument("--input-tokens", type=_count, metavar="N", help="what it used")
    command.add_argument("--output-tokens", type=_count, metavar="N", help="and what it made")
    command.add_argument("--cached-tokens", type=_count, default=0, metavar="N", help="the cached part of its input")


def _enroll(commands: Commands) -> None:
    command = _command(commands, "enroll", accounts.enroll, "enroll an account, or change its enrollment")
    _store(command)
    _offer(command)
    command.add_argument("--account", default="default", help="who owns the allowance (default: default)")
    command.add_argument("--history", action="store_true", help="print every change so far and change nothing")
    command.add_argument("--by", metavar="NAME", help="who changes it: an owner (default: your user name)")
    _tier(command)
    command.add_argument("--plan", help="the account's plan, such as standard or enterprise")
    command.add_argument("--zero-data-retention", action=argparse.BooleanOptionalAction, default=None)
    command.add_argument("--starts", type=_instant, metavar="TIME", help="no request before this time takes part")
    command.add_argument("--ends", type=_instant, metavar="TIME", help="no request from this time on takes part")
    command.add_argument("--owner", action="append", metavar="NAME", help="who may change it from now on; repeatable")
    _format(command)


def _offers(commands: Commands) -> None:
    command = _command(commands, "offers", offering.listing, "list, show, check and compare offers")
    _format(command)
    parts = command.add_subparsers(title="what", metavar="WHAT")
    part = _command(parts, "list", offering.listing, "the offers that are shipped")
    _format(part, argparse.SUPPRESS)
    part = _command(parts, "show", offering.show, "a revision of an offer: models, allowances, rules, source")
    part.add_argument("name", help="an offer's name, or a path to a .toml file")
    part.add_argument("--at", type=_day, metavar="DATE", help="as of this date (default: today)")
    _format(part, argparse.SUPPRESS)
    part = _command(parts, "check", offering.check, "check a file of your own")
    part.add_argument("file", nargs="+", help="a .toml file")
    _format(part, argparse.SUPPRESS)
    part = _command(parts, "diff", offering.diff, "what changed between two dates")
    part.add_argument("name", help="an offer's name, or a path to a .toml file")
    part.add_argument("first", type=_day, metavar="DATE")
    part.add_argument("second", type=_day, metavar="DATE")
    _format(part, argparse.SUPPRESS)


def _ledger(commands: Commands) -> None:
    command = _command(commands, "ledger", ledgers.ledger, "every decision, in order")
    _store(command)
    command.add_argument(
        "--after", type=_cursor, default=0, metavar="ENTRY", help="only entries behind this one (N,N,… one a shard)"
    )
    command.add_argument("--account", help="only this account")
    command.add_argument("--group", help="only this group")
    command.add_argument("--window", type=_instant, metavar="TIME", help="only windows that hold this instant")
    command.add_argument("--since", type=_instant, metavar="TIME", help="only requests from this time on")
    command.add_argument("--until", type=_instant, metavar="TIME", help="only requests before this time")
    command.add_argument("--follow", action="store_true", help="go on with what comes, until interrupted")
    command.add_argument(
        "--every", type=_seconds, default=0.2, metavar="SECONDS", help="how often to look, with --follow (default: 0.2)"
    )
    place = command.add_mutually_exclusive_group()
    place.add_argument(
        "--out", metavar="FILE", help="append to this file, and go on where it ends: it is its own cursor"
    )
    place.add_argument("--cursor", metavar="FILE", help="remember in this file the last entry printed, and go on there")
    command.add_argument(
        "--trim",
        action="store_true",
        help="with --out: forget on the server what the file has, once nobody can ask for it any more",
    )
    _format(command)


def _audit(commands: Commands) -> None:
    command = _command(commands, "audit", auditing.audit, "replay a ledger, or a store's, through the rule")
    command.add_argument("file", nargs="?", metavar="FILE", help="a ledger as `gratis ledger` prints it; - for stdin")
    command.add_argument(
        "--store",
        metavar="URL",
        help="the ledger, counters and links of this store; with FILE, what it has beyond that",
    )
    command.add_argument("--offer", metavar="NAME|FILE", help="a file for its offer; shipped offers are found by name")
    command.add_argument(
        "--enrollments",
        metavar="HISTORY",
        help="with FILE: histories of enrollments, as `gratis enroll --history` prints them",
    )
    command.add_argument("--html", metavar="PAGE", help="write a report for people: one page, complete in itself")
    properties.options(command)
    _format(command)


def _reconcile(commands: Commands) -> None:
    command = _command(
        commands, "reconcile", reconciling.reconcile, "compare the provider's reports with what was decided"
    )
    command.add_argument("report", nargs="*", metavar="REPORT", help="pages of the Usage or Costs API, or an export")
    command.add_argument("--ledger", metavar="FILE", help="decisions, as `gratis ledger` prints them")
    command.add_argument("--store", metavar="URL", help="the decisions in this store's ledger")
    command.add_argument("--log", metavar="FILE", help="requests, one JSON object a line, judged as `replay` does")
    _offer(command)
    _assumed(command)
    command.add_argument(
        "--enrollments", metavar="FILE", help="histories of enrollments, as `gratis enroll --history` prints them"
    )
    command.add_argument("--counts", choices=[*map(str, Counts)], help="how a log is judged, instead of as the offer")
    command.add_argument("--overage", choices=[*map(str, Overage)], help="as above")
    command.add_argument("--account", help="only decisions of this account: a report is about one organization")
    command.add_argument("--since", type=_day, metavar="DATE", help="only from this day on")
    command.add_argument("--until", type=_day, metavar="DATE", help="only days before this one")
    command.add_argument("--prices", default=DEFAULT_PRICES, metavar="NAME|FILE", help="list prices (default: openai)")
    command.add_argument(
        "--fetch", action="store_true", help="ask the provider for its reports, with $OPENAI_ADMIN_KEY"
    )
    command.add_argument("--save", metavar="FOLDER", help="with --fetch: keep the reports as files")
    command.add_argument("--html", metavar="PAGE", help="write a report for people: one page, complete in itself")
    _format(command)


def _command(commands: Commands, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.set_defaults(run=run)
    return command


def _file(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("file", nargs="?", default="-", metavar="FILE", help=f"{what}; - or nothing for stdin")


def _responses(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--responses", action="store_true", help="the lines are the provider's responses, or a batch's output"
    )
    command.add_argument("--account", default="default", help="with --responses: whose they are (default: default)")
    command.add_argument("--project", help="with --responses: the project that sent them")
    command.add_argument("--model", help="with --responses: of those that name no model")
    command.add_argument("--at", type=_instant, metavar="TIME", help="with --responses: of those that tell no time")


def _store(command: argparse.ArgumentParser) -> None:
    known = os.environ.get("GRATIS_STORE") or DEFAULT_URL
    text = f"memory:, sqlite:///FILE or redis://HOST:PORT (default: $GRATIS_STORE, or {DEFAULT_URL})"
    command.add_argument("--store", default=known, metavar="URL", help=text)


def _offer(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--offer",
        default=DEFAULT_OFFER,
        metavar="NAME|FILE",
        help=f"a shipped offer or a file (default: {DEFAULT_OFFER})",
    )


def _assumed(command: argparse.ArgumentParser) -> None:
    _tier(command, note="; taken for accounts that are not enrolled")


def _tier(command: argparse.ArgumentParser, note: str = "") -> None:
    command.add_argument(
        "--tier", type=int, choices=range(TIER_MAX + 1), metavar="N", help=f"usage tier, 0 to {TIER_MAX}{note}"
    )
    command.add_argument("--sharing", choices=[*map(str, Sharing)], help="whether traffic is shared with the provider")
    command.add_argument(
        "--shared-project", action="append", metavar="PROJECT", help="a project that shares, with --sharing selected"
    )


def _format(command: argparse.ArgumentParser, default: str = "auto") -> None:
    command.add_argument(
        "--format",
        choices=["auto", "json", "table"],
        default=default,
        help="JSON lines or tables (default: tables on a terminal)",
    )


def _instant(text: str) -> datetime:
    """A time, or a date: its midnight in UTC."""
    try:
        return instant("TIME", f"{text}T00:00:00Z" if len(text) == len("2025-04-16") else text)
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _day(text: str) -> datetime:
    """A date, or a time, of UTC."""
    try:
        return instant("DATE", text if "T" in text else f"{text}T00:00:00Z")
    except RequestError:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a date such as 2025-04-16") from None


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a whole number")
    return int(text)


def _list_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """A parser of some of these words, by commas."""
    words = {str(word): word for word in known}

    def parse(text: str) -> list[str]:
        found = _names(text)
        if any(word not in words for word in found):
            raise argparse.ArgumentTypeError(f"found {text!r}; expected some of {','.join(words)}")
        return [words[word] for word in found]

    return parse


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(text.split(",")))


def _tiers(text: str) -> list[int]:
    tiers = [_count(tier) for tier in _names(text)]
    if max(tiers) > TIER_MAX:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected tiers from 0 to {TIER_MAX}")
    return tiers


def _join(text: str) -> tuple[str, str]:
    model, _, group = text.rpartition("=")
    if not model or not group:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected MODEL=GROUP")
    return model, group


def _cursor(text: str) -> Cursor:
    places = tuple(_count(place) for place in text.split(","))
    return places if len(places) > 1 else places[0]


def _seconds(text: str, most: int = 3_600) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= most:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected seconds, at most {most}")
    return seconds


def _day_seconds(text: str) -> float:
    return _seconds(text, 86_400)
