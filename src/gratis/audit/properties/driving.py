"""How a history is asked of a store: every answer and all that is kept must be what the rule gives."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol

from msgspec import Struct
from msgspec.structs import replace

from gratis.audit.properties.expected import Clash, Expected, Refused, by_place, plain, plain_hold
from gratis.audit.properties.histories import (
    Asking,
    Enrolling,
    Holding,
    Releasing,
    Reopening,
    Settling,
    Together,
)
from gratis.audit.properties.together import Gap, judged, run_lanes
from gratis.chain import UNCHAINED, Stems, link
from gratis.errors import Conflict, EnrollmentError, NotExecuted, OutcomeUnknown, RequestError
from gratis.meter import Meter
from gratis.model import AT_MIN, Change, Decision, Expiry, Hold, Request, Usage
from gratis.stores import Linked, behind

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from gratis.audit.properties.histories import History, Step
    from gratis.model import Entry
    from gratis.offer import Offer
    from gratis.stores import Bounds, Cursor, Store

VIEWS = 2
CHECK_EVERY = 32
AGAIN_MAX = 12


class Opener(Protocol):
    """Opens a view on the store of a space, as another process would; a space that nobody used before is empty."""

    def __call__(self, space: str, *, clock: Callable[[], datetime], bounds: Bounds | None) -> Store:
        """One more view."""
        ...


class Failure(Struct, frozen=True):
    """Where a store and the rule part.

    `what` is compared: a decision, what is kept of a ledger, a tally. `request` is the one that it is about, where it
    is about one. `changes` and `asked` are what led there: enrollments, and requests in the order of their decisions.
    """

    what: str
    where: str
    found: Any
    expected: Any
    step: int
    request: Request | None = None
    asked: tuple[Request, ...] = ()
    changes: tuple[tuple[str, Change], ...] = ()
    versions: dict[tuple[str, str], int] = {}
    """After how many changes of its account's enrollment each request was decided."""
    is_again: bool = False
    """Whether it was found after the last step, when each request was asked once more."""

    @property
    def kind(self) -> tuple[object, ...]:
        """In what way it fails, whatever the names and sizes: a smaller history must fail in the same way."""
        found, expected = self.found, self.expected
        if isinstance(found, Decision) and isinstance(expected, Decision):
            return self.what, found.verdict, expected.verdict, found.replayed == expected.replayed
        return self.what, type(found), type(expected)


class _Part(Exception):  # noqa: N818 - it says that two part, and goes no further than this module
    """The store and the rule part."""

    def __init__(self, gap: Gap) -> None:
        self.gap = gap


class Run:
    """One history, asked of one space of a store."""

    def __init__(self, history: History, offer: Offer, open_store: Opener, space: str) -> None:
        self.seen: Counter[str] = Counter()
        self.steps = 0
        self._history = history
        self._offer = history.offer(offer)
        self._open_store = open_store
        self._space = space
        self._now = AT_MIN
        self._is_again = False
        self._rule = Expected(self._offer, history.bounds)
        self._stores: list[Store] = []
        self._meters: list[Meter] = []
        self._asked: list[Request] = []
        self._rows: Counter[str] = Counter()
        self._cursor: Cursor = 0
        self._ends: dict[str, dict[Any, str]] = {}  # of each account the last links
        self._stems = Stems()
        self._unlinked: Gap | None = None  # told last: an entry that says something else has another link, too
        self._held: dict[tuple[str, str], Hold] = {}

    def failure(self, is_over: Callable[[], bool] = lambda: False) -> Failure | None:
        """Ask every step, as long as there is time; the first place where the store and the rule part."""
        place = 0
        try:
            for view in range(VIEWS):
                self._open(view)
            for place, step in enumerate(self._history.steps):
                if is_over():
                    break
                self._move(step.now)
                self._ask(step)
                if place % CHECK_EVERY == CHECK_EVERY - 1:
                    self._check()
            self._ask_again()
            self._check()
        except _Part as part:
            gap = part.gap
            known = self._rule.accounts.items()
            return Failure(
                what=gap.what,
                where=gap.where,
                found=gap.found,
                expected=gap.expected,
                step=place,
                request=gap.request,
                asked=tuple(self._asked),
                changes=tuple((name, one) for name, account in known for one in account.changes),
                is_again=self._is_again,
                versions={(name, one): at for name, account in known for one, at in account.versions.items()},
            )
        finally:
            for store in self._stores:
                store.close()
        return None

    @property
    def has_opened(self) -> bool:
        """Whether the store could be opened at all."""
        return bool(self._stores)

    def _open(self, view: int) -> None:
        store = self._open_store(self._space, clock=lambda: self._now, bounds=self._history.bounds)
        self._stores[view : view + 1] = [store]
        self._meters[view : view + 1] = [Meter(store, self._offer)]

    def _move(self, now: datetime) -> None:
        """Time passes; a hold that would run out meanwhile is given back."""
        if now <= self._now:
            return
        for hold in self._rule.due(now):
            self._release(hold.account, hold.id, 0)
        self._now = now

    def _ask(self, step: Step) -> None:
        self.steps += sum(map(len, step.lanes)) if isinstance(step, Together) else 1
        match step:
            case Enrolling():
                self._enroll(step)
            case Asking():
                self._decide(step)
            case Holding():
                self._hold(step)
            case Settling():
                self._settle(step)
            case Releasing():
                self._release(step.account, step.request_id, step.view)
            case Reopening():
                self._stores[step.view].close()
                self._open(step.view)
                self.seen["reopened"] += 1
            case Together():
                self._together(step)

    def _enroll(self, step: Enrolling) -> None:
        found = _answer(self._meters[step.view].enroll, step.account, step.enrollment, actor=step.actor)
        expected = self._rule.enroll(step.account, step.enrollment, actor=step.actor, now=self._now)
        self._compare("enrollment", f"account {step.account!r}", found, expected)
        self.seen["enrolled" if isinstance(expected, Change) else "enrollment refused"] += 1

    def _decide(self, step: Asking) -> None:
        requests = [one for one in step.requests if self._rule.is_kept(one, self._now)]
        for request, found in zip(requests, self._answers(replace(step, requests=tuple(requests))), strict=True):
            self._compare_decision(request, found)
        self.seen["batches"] += step.is_batch

    def _settle(self, step: Settling) -> None:
        request, hold = step.request, self._held.pop((step.request.account, step.request.id), None)
        if not self._rule.is_kept(request, self._now):
            return
        meter = self._meters[step.view]
        if hold is None:
            self._compare_decision(request, _answer(meter.decide, request))
            return
        usage = Usage(input_tokens=request.input_tokens, output_tokens=request.output_tokens)
        used = {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens}
        request = replace(hold.request, **used)  # what was held is settled, whatever else is known of the id
        self._compare_decision(request, _answer(meter.settle, hold, usage))
        self.seen["settled"] += 1

    def _compare_decision(self, request: Request, found: Any) -> None:
        expected = self._rule.decide(request, self._now)
        self._asked.append(request)
        self._compare("decision", f"request {request.id!r} of account {request.account!r}", found, expected, request)
        self._count(expected)

    def _count(self, answer: Decision | Clash | Refused) -> None:
        if isinstance(answer, Decision):
            self.seen["replayed" if answer.replayed else answer.reason.value] += 1
            if not answer.replayed and answer.window is not None:
                self.seen["rolling" if answer.terms.window.startswith("rolling ") else "calendar"] += 1
        else:
            self.seen["conflict" if isinstance(answer, Clash) else "ahead of the clock"] += 1

    def _hold(self, step: Holding) -> None:
        request, until = step.request, self._now + step.lasting
        expected = self._rule.hold(request, self._now, until=until, expiry=Expiry.DECIDED)
        if expected is None:
            return
        found = _answer(self._meters[step.view].hold, request, request.tokens or 0, for_=step.lasting)
        self._compare("hold", f"request {request.id!r} of account {request.account!r}", found, expected, request)
        if isinstance(found, Hold):
            self._held[request.account, request.id] = found
        self.seen["held"] += 1

    def _release(self, account: str, request_id: str, view: int) -> None:
        hold, known = self._held.pop((account, request_id), None), self._rule.release(account, request_id)
        if hold is not None and known is not None:
            found = _answer(self._meters[view].release, hold)
            self._compare("release", f"request {request_id!r} of account {account!r}", found, None, hold.request)
            self.seen["released"] += 1

    def _together(self, step: Together) -> None:
        self._check()
        lanes = [
            tuple(
                replace(one, requests=tuple(each for each in one.requests if self._is_plain(each)))
                if isinstance(one, Asking)
                else one
                for one in lane
            )
            for lane in step.lanes
        ]
        calls = run_lanes(lanes, self._answers)
        rows = self._news()
        gap = judged(calls, rows, self._rule, self._now, self._asked)
        if gap is not None:
            raise _Part(gap)
        for call in calls:
            for answer in call.answers:
                if isinstance(answer, Decision | Clash | Refused):
                    self._count(answer)
        for name, account in self._rule.accounts.items():
            self._rows[name] = len(account.rows)
        self.seen["at once"] += 1

    def _answers(self, step: Enrolling | Asking) -> list[Any]:
        """What one call of a caller is answered, request by request."""
        meter = self._meters[step.view]
        if isinstance(step, Enrolling):
            return [_answer(meter.enroll, step.account, step.enrollment, actor=step.actor)]
        if not step.is_batch:
            return [_answer(meter.decide, request) for request in step.requests]
        found = _answer(meter.decide_many, step.requests)
        if isinstance(found, list) and len(found) == len(step.requests):
            return [_plain(one) for one in found]
        return [found] * len(step.requests)

    def _is_plain(self, request: Request) -> bool:
        """Whether several may ask for it at once: what an id that is held is told depends on who settles it."""
        return self._rule.is_kept(request, self._now) and not self._rule.is_held(request)

    def _ask_again(self) -> None:
        """Ids that were decided have the same decision, whichever view is asked."""
        self._is_again = True
        first = {(one.account, one.id): one for one in reversed(self._asked)}
        for place, key in enumerate(list(first)[:AGAIN_MAX]):
            account = self._rule.accounts.get(key[0])
            decision = None if account is None else account.decisions.get(key[1])
            if decision is not None and self._rule.is_kept(decision.request, self._now):
                found = _answer(self._meters[place % VIEWS].decide, decision.request)
                self._compare_decision(decision.request, found)
        self._is_again = False

    def _news(self) -> dict[str, list[tuple[datetime, Decision]]]:
        """What the ledger says since it was read last, of each account; only within one its order means anything."""
        store = self._stores[0]
        found: dict[str, list[tuple[datetime, Decision]]] = {}
        last: dict[int, int] = {}
        entries = _answer(lambda: list(store.entries(after=self._cursor)))
        if not isinstance(entries, list):
            raise _Part(Gap("ledger", "its news", entries, "entries"))
        for entry in entries:
            self._cursor = behind(self._cursor, entry, shards=store.shards)
            if entry.decision.offer == self._offer.name:
                found.setdefault(entry.decision.account, []).append((entry.decided_at, plain(entry.decision)))
            if entry.entry <= last.get(entry.shard, 0):
                raise _Part(Gap("ledger", "numbers of its entries", entry.entry, f"more than {last[entry.shard]}"))
            last[entry.shard] = entry.entry
            self._check_link(entry)
        return found

    def _check_link(self, entry: Entry) -> None:
        """Where a store chains its ledger, each link follows from the one before it in its window."""
        decision, window = entry.decision, entry.decision.window
        place = None if window is None else (decision.terms.group, decision.terms.window, window.start)
        ends = self._ends.setdefault(decision.account, {})
        ends[place] = link(ends.get(place, UNCHAINED), self._stems.of(decision), decision, entry.decided_at)
        if entry.link != (ends[place] if isinstance(self._stores[0], Linked) else entry.link):
            where = f"link of entry {entry.entry} of account {decision.account!r}"
            self._unlinked = self._unlinked or Gap("ledger", where, entry.link, ends[place], decision.request)

    def _check(self) -> None:
        """The ledger's news, and of each account its tallies, counters and enrollments."""
        news = self._news()
        for name in {*news, *self._rule.accounts}:
            account = self._rule.accounts.get(name)
            rows = [] if account is None else account.rows[self._rows[name] :]
            self._compare_rows(name, news.get(name, []), rows)
            self._rows[name] += len(rows)
        if self._unlinked is not None:
            raise _Part(self._unlinked)
        for view, store in enumerate(self._stores):
            self._check_counters(store, view)

    def _compare_rows(self, name: str, found: list[Any], expected: list[Any]) -> None:
        if found == expected:
            return
        pairs = enumerate(zip(found, expected, strict=False))
        place = next((place for place, (one, other) in pairs if one != other), min(len(found), len(expected)))
        one, other = found[place : place + 1], expected[place : place + 1]
        request = (other or one)[0][1].request
        where = f"entry {self._rows[name] + place + 1} of account {name!r}"
        shown: list[Any] = [row[0][1] if row else None for row in (one, other)]
        if shown[0] == shown[1]:  # they differ in when it was decided
            shown = [row[0][0] for row in (one, other)]
        raise _Part(Gap("ledger", where, shown[0], shown[1], request))

    def _check_counters(self, store: Store, view: int) -> None:
        offer, known = self._offer.name, self._rule.accounts
        for name, account in known.items():
            expected = self._rule.tallies(name, self._now)
            since = self._now - self._history.bounds.keep
            last = account.rows[-1][1].request if account.rows else None
            for what, tell in (
                ("tallies", lambda name=name: store.tallies(offer, name)),
                ("counters", lambda name=name: store.counters(offer, name)[2]),
            ):
                found = _answer(tell)
                if isinstance(found, list):
                    found = sorted((row for row in found if row[2].window.end > since), key=by_place)
                self._compare(what, f"account {name!r}, as view {view} tells them", found, expected, last)
            found = _answer(store.enrollments, offer, name)
            self._compare("enrollments", f"account {name!r}, as view {view} tells them", found, account.changes)
        found = _answer(lambda: sorted(name for its, name in store.accounts() if its == offer))
        self._compare("accounts", f"as view {view} tells them", found, sorted(known))

    def _compare(self, what: str, where: str, found: Any, expected: Any, request: Request | None = None) -> None:
        if found != expected:
            raise _Part(Gap(what, where, found, expected, request))


def _answer(ask: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """An answer as every store must give it, or what was raised; a store that is out of order is another matter."""
    try:
        return _plain(ask(*args, **named))
    except (NotExecuted, OutcomeUnknown):
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it is no answer of the rule, and told
        return _plain(error)


def _plain(answer: Any) -> Any:
    match answer:
        case Decision():
            # 5.0 equals 5 in Python, and is no number of tokens.
            return plain(answer) if _is_exact(answer) else repr(answer)
        case Hold():
            return plain_hold(answer)
        case Conflict():
            hold = None if answer.hold is None else plain_hold(answer.hold)
            return Clash(answer.field, None if answer.first is None else plain(answer.first), hold)
        case RequestError():
            return Refused(answer.field)
        case EnrollmentError():
            return Refused("enrollment")
        case _:
            return answer


def _is_exact(decision: Decision) -> bool:
    numbers = (decision.free_tokens, decision.used, decision.total, decision.seq)
    return all(one is None or type(one) is int for one in numbers)
