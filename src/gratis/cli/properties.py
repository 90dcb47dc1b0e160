"""`gratis audit --properties`: a live store, asked generated histories in a namespace of its own.

A failure is printed as the smallest history that fails, and written as a file that `gratis replay` judges by the rule.
"""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, Any

from gratis.audit.properties import check
from gratis.audit.properties.namespaces import spaces_of
from gratis.audit.properties.written import differing, line, step_line, write
from gratis.cli.screen import is_table, number, paint, safe
from gratis.cli.streams import Output, Progress
from gratis.errors import GratisError
from gratis.offers import DEFAULT_OFFER, load
from gratis.stores.urls import DEFAULT_URL, exists

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from types import FrameType

    from gratis.audit.properties import Report
    from gratis.audit.properties.written import Written

FOUND = 1
STEPS, MINUTES = 4_000, 1.0
SEEDS = 1 << 32
LINE_MAX = 400
OWN = ("seed", "steps", "minutes", "out")


def options(command: argparse.ArgumentParser) -> None:
    """What `gratis audit` takes for this."""
    command.add_argument(
        "--properties",
        action="store_true",
        help="ask the live store generated histories, in a namespace of its own that is removed, and compare with the"
        " rule",
    )
    command.add_argument("--seed", type=int, metavar="N", help="with --properties: ask what this seed asked before")
    command.add_argument(
        "--steps", type=int, metavar="N", help=f"with --properties: how many steps (default: {STEPS}, or by --minutes)"
    )
    command.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help=f"with --properties: how long (default: {MINUTES:g}, or by --steps); a failure is then shrunk for a while",
    )
    command.add_argument(
        "--out", metavar="FILE", help="with --properties: where a failure is written (gratis-properties-SEED.jsonl)"
    )


def is_wanted(arguments: argparse.Namespace) -> bool:
    """Whether this is what was asked for; its own options make sense with nothing else."""
    for name in OWN:
        if getattr(arguments, name) is not None and not arguments.properties:
            raise GratisError(f"audit: found --{name}; expected it with --properties")
    return bool(arguments.properties)


def run(arguments: argparse.Namespace) -> int:
    """Drive the store; a failure is shrunk, printed and written, and makes the exit code 1."""
    if arguments.file is not None:
        raise GratisError("audit: found FILE and --properties; expected --store URL, the live store to ask")
    for name in ("enrollments", "html"):
        if getattr(arguments, name, None) is not None:
            raise GratisError(f"audit: found --{name} and --properties; expected one of them")
    steps, minutes = _bounds(arguments)
    offer_name = arguments.offer or DEFAULT_OFFER
    offer = load(offer_name)
    url = arguments.store or os.environ.get("GRATIS_STORE") or DEFAULT_URL
    spaces = spaces_of(url)
    seed = secrets.randbelow(SEEDS) if arguments.seed is None else arguments.seed
    path = Path(arguments.out or f"gratis-properties-{seed}.jsonl")
    if not os.access(path.parent, os.W_OK) or path.is_dir():
        raise GratisError(f"--out: {path}: cannot be written; expected a file in a folder that can be")
    print(f"gratis: seed {seed}, {_told(steps, minutes)}", file=sys.stderr)
    if not exists(url):
        print(f"gratis: {url}: there is no such store yet; only the folder where it would be is tried", file=sys.stderr)
    progress = Progress("steps")
    with _terminated():
        report = check(
            spaces.open,
            drop=_uninterrupted(spaces.drop),
            seed=seed,
            steps=steps,
            minutes=minutes,
            offer=offer,
            tell=progress.add,
        )
    progress.end()
    written = None
    if report.failure is not None and report.history is not None:
        written = write(report.failure, report.history, offer, path, offer_name=offer_name)
    if is_table(arguments.format):
        _show(report, written, offer_name)
    else:
        Output().lines([_line(report, written)])
    return FOUND if written is not None else 0


def _bounds(arguments: argparse.Namespace) -> tuple[int | None, float | None]:
    steps, minutes = arguments.steps, arguments.minutes
    if steps is not None and steps < 1:
        raise GratisError(f"--steps: found {steps}; expected a whole number from 1 on")
    if minutes is not None and not 0 < minutes < float("inf"):
        raise GratisError(f"--minutes: found {minutes}; expected a number above 0")
    return (STEPS, MINUTES) if steps is None and minutes is None else (steps, minutes)


def _told(steps: int | None, minutes: float | None) -> str:
    bounds = [*([] if steps is None else [f"{steps:,} steps"]), *([] if minutes is None else [f"{minutes:g} min"])]
    return f"at most {' or '.join(bounds)}"


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM ends it as Ctrl-C does: the namespace is removed first."""
    if current_thread() is not main_thread():
        yield
        return

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    usual = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)


def _uninterrupted(drop: Callable[[str], None]) -> Callable[[str], None]:
    """Removing a namespace is not cut short by a signal: it is heard afterwards. The removal's time is bounded."""

    def dropped(space: str) -> None:
        if current_thread() is not main_thread():
            drop(space)
            return
        heard: list[int] = []
        usual = {
            one: signal.signal(one, lambda number, _frame: heard.append(number))
            for one in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            drop(space)
        finally:
            for one, handler in usual.items():
                signal.signal(one, handler)
        if heard:
            raise KeyboardInterrupt

    return dropped


def _line(report: Report, written: Written | None) -> dict[str, Any]:
    failure, history = report.failure, report.history
    told: dict[str, Any] = {
        "seed": report.seed,
        "steps": report.steps,
        "histories": report.histories,
        "counts": dict(sorted(report.counts.items())),
        "failure": None,
    }
    if failure is None or history is None or written is None:
        return told
    found, expected = line(failure.found), line(failure.expected)
    told["failure"] = {
        "what": failure.what,
        "where": failure.where,
        "found": found,
        "expected": expected,
        "differs": differing(found, expected),
        "history": [step_line(step) for step in history.steps],
        "asked_again": failure.is_again,
        "counts": history.counts,
        "overage": history.overage,
        "shrunk_from": report.shrunk_from,
        "file": str(written.requests),
        "enrollments": str(written.enrollments),
        "replay": written.command,
        "replay_agrees": written.is_same,
    }
    return told


def _show(report: Report, written: Written | None, offer_name: str) -> None:
    """The report for people."""
    failure, history = report.failure, report.history
    histories = "1 history" if report.histories == 1 else f"{number(report.histories)} histories"
    done = f"{number(report.steps)} steps in {histories} of seed {report.seed}"
    if failure is None or history is None or written is None:
        print(paint(f"as the rule says: {done}", "green"))
        for name, count in sorted(report.counts.items(), key=lambda one: (-one[1], one[0])):
            print(f"{number(count):>10}  {name}")
        return
    print(paint(f"not as the rule says: {safe(failure.what)}, {safe(failure.where, LINE_MAX)}", "red"))
    found, expected = line(failure.found), line(failure.expected)
    for name, (one, other) in differing(found, expected).items():
        print(f"  {name or failure.what}: found {_shown(one)}; the rule gives {_shown(other)}")
    print(f"\nafter {done}; the smallest history that fails so, of {report.shrunk_from} steps:")
    for place, step in enumerate(history.steps, start=1):
        for text in _step_texts(step_line(step)):
            print(f"{place:>4}  {safe(text, LINE_MAX)}")
    if failure.is_again:
        print(f"{len(history.steps) + 1:>4}  each request once more")
    print(f"\n{written.count} requests written: {safe(written.requests, LINE_MAX)}")
    print(f"judged by the rule: {safe(written.command, LINE_MAX)}")
    if not written.is_same:
        print(
            "(a replay goes by the requests' own times and has no holds or counters: it does not show this difference)"
        )
    offer = "" if offer_name == DEFAULT_OFFER else f" --offer {shlex.quote(offer_name)}"
    again = f"gratis audit --properties --seed {report.seed} --steps {report.steps}{offer} --store …"
    print(f"again: {safe(again, LINE_MAX)}")


def _shown(value: object) -> str:
    return "nothing" if value is None else safe(value, LINE_MAX)


def _step_texts(step: dict[str, Any]) -> Iterator[str]:
    """A step in words, a line a request."""
    head = f"{step['now']}  {step['do']}"
    view = f"  (view {step['view'] + 1})" if step.get("view") else ""
    for request in step.get("requests", ()):
        tokens = [request[name] for name in ("input_tokens", "output_tokens") if request[name]]
        size = " + ".join(f"{one:,}" for one in tokens) or ("0" if request["input_tokens"] == 0 else "unmeasured")
        at = "" if request["at"] == step["now"] else f" at {request['at']}"
        yield f"{head} {request['id']} of {request['account']}: {request['model']}, {size} tokens{at}{view}"
    for place, lane in enumerate(step.get("callers", ()), start=1):
        for one in lane:
            for text in _step_texts(one):
                yield f"{head}, caller {place}: {text.partition('  ')[2]}"
    if "enrollment" in step:
        one = step["enrollment"]
        special = {name: value for name, value in one.items() if value and name not in {"tier", "sharing"}}
        rest = f" {special}" if special != {"plan": "standard"} else ""
        yield f"{head} {step['account']} by {step['actor']}: tier {one['tier']}, sharing {one['sharing']}{rest}{view}"
    elif "requests" not in step and "callers" not in step:
        yield f"{head} {step.get('id', '')}{view}"
