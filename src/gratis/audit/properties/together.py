"""Whether one order explains what callers at once were told; the ledger says which.

No search is needed: in the order of the ledger the rule must give every decision, each answer must equal its row, each
id has one, and no decision stands before another that was known before the first was asked for.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from contextlib import contextmanager
from itertools import count
from math import inf
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from gratis.audit.properties.expected import Refused, again
from gratis.audit.properties.histories import Asking, Enrolling
from gratis.model import Change, Decision, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from datetime import datetime

    from gratis.audit.properties.expected import Expected

SWITCHES = 1_000
AT_ONCE = "of several callers at once"
Rows = dict[str, list[tuple["datetime", Decision]]]


class Gap(Struct, frozen=True):
    """A difference: what was compared, where, and what it is about."""

    what: str
    where: str
    found: Any
    expected: Any
    request: Request | None = None


class Call(Struct):
    """One call of a caller: what was asked, when it began and ended (places in one order), and the answers."""

    step: Enrolling | Asking
    start: int
    end: int
    answers: list[Any]


class _Callers:
    """Threads that ask at once, and what they were told."""

    def __init__(self, count_: int, ask: Callable[[Enrolling | Asking], list[Any]]) -> None:
        self.calls: list[Call] = []
        self.failed: list[BaseException] = []
        self.stop = threading.Event()
        self.start = threading.Barrier(count_)
        self._ask = ask
        self._ticks = count()

    def run(self, lane: Sequence[Enrolling | Asking]) -> None:
        """One caller's turn."""
        try:
            self.start.wait()
            for step in lane:
                if self.stop.is_set():
                    return
                start = next(self._ticks)
                answers = self._ask(step)
                self.calls.append(Call(step, start, next(self._ticks), answers))
        except BaseException as error:  # noqa: BLE001 - raised anew in the thread that waits for all
            self.failed.append(error)


def run_lanes(
    lanes: Sequence[Sequence[Enrolling | Asking]], ask: Callable[[Enrolling | Asking], list[Any]]
) -> list[Call]:
    """Have each lane ask in a thread of its own, all from one start; an interrupt waits for calls under way."""
    callers = _Callers(len(lanes), ask)
    threads = [threading.Thread(target=callers.run, args=(lane,)) for lane in lanes]
    with _eager_switches():
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:
            callers.stop.set()
            callers.start.abort()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            raise
    for error in callers.failed:
        raise error
    return callers.calls


@contextmanager
def _eager_switches() -> Iterator[None]:
    """Threads take turns very often meanwhile: what can come between two things, does."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(usual / SWITCHES)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def judged(calls: Sequence[Call], rows: Rows, rule: Expected, now: datetime, asked: list[Request]) -> Gap | None:
    """Where the callers' answers and the ledger part from the rule; the rule is told what the ledger decided."""
    court = _Court(calls, rule, now, asked)
    gap = court.changed()
    for name, news in rows.items():
        gap = gap or court.follows(name, news)
    return gap or court.answered(rows) or _in_time(calls, rows)


class _Court:
    """What is known of the calls: by whom what was asked, and how far the rule has been told."""

    def __init__(self, calls: Sequence[Call], rule: Expected, now: datetime, asked: list[Request]) -> None:
        self._calls = calls
        self._rule = rule
        self._now = now
        self._asked = asked
        self._before = {name: len(account.changes) for name, account in rule.accounts.items()}
        self._starts: dict[Request, int] = {}
        for call in calls:
            for request in call.step.requests if isinstance(call.step, Asking) else ():
                self._starts[request] = min(call.start, self._starts.get(request, call.start))

    def changed(self) -> Gap | None:
        """Each change of an enrollment is the next one, in some order."""
        made = [(call.step, call.answers[0]) for call in self._calls if isinstance(call.step, Enrolling)]
        for step, found in sorted(made, key=lambda one: one[1].version if isinstance(one[1], Change) else 0):
            expected = self._rule.enroll(step.account, step.enrollment, actor=step.actor, now=self._now)
            if found != expected:
                return Gap("enrollment", f"account {step.account!r}, {AT_ONCE}", found, expected)
        return None

    def follows(self, name: str, news: Sequence[tuple[datetime, Decision]]) -> Gap | None:
        """In the order of the ledger the rule gives every decision, under an enrollment that was in force."""
        version = self._before.get(name, 0)
        for decided_at, found in news:
            where = f"request {found.id!r} of account {name!r}, {AT_ONCE}"
            request = found.request
            self._asked.append(request)
            if request not in self._starts or decided_at != self._now:
                return Gap("ledger", where, found, None, request)
            version = self._version(name, found, version)
            expected = self._rule.decide(request, self._now, version=version)
            if found != expected:
                return Gap("decision", where, found, expected, request)
        return None

    def _version(self, name: str, found: Decision, version: int) -> int:
        """Under which change it was decided: no older one than the last, nor than one acknowledged before it."""
        account = self._rule.accounts.get(name)
        if account is None:
            return 0
        known = [
            call.answers[0].version
            for call in self._calls
            if isinstance(call.step, Enrolling) and call.step.account == name
            if isinstance(call.answers[0], Change) and call.end < self._starts[found.request]
        ]
        least = max([version, *known])
        versions = range(least, len(account.changes) + 1)
        return next((one for one in versions if account.enrollment(one) == found.terms.enrollment), least)

    def answered(self, rows: Rows) -> Gap | None:
        """Each answer is that of its id's row; of all who ask for a new id, one is told that it is new."""
        new = {(name, decision.id) for name, news in rows.items() for _, decision in news}
        told: Counter[tuple[str, str]] = Counter()
        for call in self._calls:
            for request, found in _pairs(call):
                is_new = isinstance(found, Decision) and not found.replayed
                told[request.account, request.id] += is_new
                gap = self._told(request, replace(found, replayed=True) if is_new else found)
                if gap is not None:
                    return gap
        for name, one in sorted({*new, *told}):
            if told[name, one] != ((name, one) in new):
                where = f"how many were told a new decision on request {one!r} of account {name!r}"
                request = self._rule.accounts[name].decisions[one].request
                return Gap("answer", where, told[name, one], int((name, one) in new), request)
        return None

    def _told(self, request: Request, found: Any) -> Gap | None:
        """One answer: that of its row, or a refusal where it has none."""
        account = self._rule.accounts.get(request.account)
        row = None if account is None else account.decisions.get(request.id)
        where = f"request {request.id!r} of account {request.account!r}, {AT_ONCE}"
        if row is not None:
            expected: Any = again(request, row)
            return None if found == expected else Gap("decision", where, found, expected, request)
        self._asked.append(request)
        expected = self._rule.decide(request, self._now)
        if isinstance(expected, Decision):
            return Gap("ledger", where, None, expected, request)
        return None if found == expected else Gap("decision", where, found, expected, request)


def _in_time(calls: Sequence[Call], rows: Rows) -> Gap | None:
    """No decision stands in the ledger before one that was known before it was asked for."""
    spans: dict[tuple[str, str], tuple[float, float]] = {}
    for call in calls:
        for request, found in _pairs(call):
            if isinstance(found, Refused):
                continue
            key = request.account, request.id
            start, end = spans.get(key, (inf, inf))
            spans[key] = min(start, call.start), min(end, call.end)
    for name, news in rows.items():
        latest = -inf
        for _, decision in news:
            start, end = spans[name, decision.id]
            if latest > end:
                where = f"request {decision.id!r} of account {name!r}, {AT_ONCE}"
                return Gap("order", where, "after one that was asked for later", "before it", decision.request)
            latest = max(latest, start)
    return None


def _pairs(call: Call) -> Iterator[tuple[Request, Any]]:
    """Each request of a call, with its answer."""
    if isinstance(call.step, Asking):
        yield from zip(call.step.requests, call.answers, strict=True)
