"""Which histories are asked: a seed's choices, aimed at edges.

Edges are what is left of an allowance, the ends of windows and of what is kept, switches from one revision to the
next, ids that were asked before, names that look like something else, and callers who all want the last tokens.
The pure rule is asked along, so that what is chosen never depends on the store.
"""

from __future__ import annotations

import random
from datetime import datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from gratis.audit.properties.expected import Expected
from gratis.audit.properties.histories import (
    Asking,
    Enrolling,
    History,
    Holding,
    Releasing,
    Reopening,
    Settling,
    Step,
    Together,
)
from gratis.model import AT_MAX, TOKENS_MAX, Counts, Decision, Enrollment, Expiry, Kind, Overage, Request, Sharing
from gratis.stores import CONFLICT_FIELDS, Bounds
from gratis.window import Rolling

if TYPE_CHECKING:
    from collections.abc import Callable

    from gratis.model import Window
    from gratis.offer import Group, Offer, Revision

VIEWS = 2
LENGTHS = (8, 25, 60, 60, 120, 250)
TICK, SECOND, MINUTE = timedelta(microseconds=1), timedelta(seconds=1), timedelta(minutes=1)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
PASSES = (*(TICK, SECOND, MINUTE, 20 * MINUTE, HOUR) * 4, 5 * HOUR, 9 * HOUR, DAY, 2 * DAY)
PASS_MAX = 9 * DAY
AGES = (TICK, SECOND, HOUR, 5 * HOUR, DAY, 2 * DAY, 7 * DAY, 9 * DAY)
BOUNDS = (Bounds(), Bounds(), Bounds(), Bounds(keep=DAY, ahead=timedelta()), Bounds(keep=timedelta(), ahead=HOUR))
OWNER = "ann"
ACTORS = (OWNER, OWNER, OWNER, OWNER, "bob", "eve")
PROJECTS = ("p", "q")
PLAIN_ACCOUNTS = ("acme", "default")
HOSTILE_ACCOUNTS = (
    "a", "a:b", "a}{b", "{a}", " ", "acme ", "acm", "Acme", "Caf\u00e9", "Cafe\u0301", "\u202e\u05d0\u200fcba", "n",
    "x" * 255, "\U0001f4b6" * 63, "*", "[a-z]*", "a/b", "..", "'; DROP TABLE ledger; --", "%00", "\\", "\u2028",
    "0", "null",
)  # fmt: skip
HOSTILE_IDS = (
    "s", "t", "n", "a1", "r1 ", " r1", "R1", "r1:", "r:1", "b:r1", "}", "{x}", " ", "Caf\u00e9", "Cafe\u0301", "\u05d0",
    "x" * 255, "x" * 254, "\U0001f4b6" * 63, "0", "00", "-1", "1e3", "null", "true", "'", '"', "\\n", "%s", "\u2028",
    "deadbeefdeadbeef", "DEADBEEFDEADBEEF", "correction 1 of r1", "open", "*",
)  # fmt: skip
SMALL = (0, 0, 1, 2, 7, 100, 999, 1_000, 1_001)
TIERS = (3, 3, 4, 5, 1, 2, 1, 0)
AIMS = (0, 0, 0, 1, 1, -1)
HOLD_TIMES = (SECOND, MINUTE, 20 * MINUTE, HOUR, 5 * HOUR, DAY)
BATCHES = (1, 2, 3, 5, 8)
LANES = (2, 4, 8)
TWISTS: tuple[dict[str, Any], ...] = (
    {"tools": ("function",)},
    {"tools": ("web_search",)},
    {"kind": Kind.ASSISTANTS},
    {"kind": Kind.EVAL},
    {"kind": Kind.FINE_TUNING_TRAINING},
    {"kind": Kind.EMBEDDING, "output_tokens": None},
    {"output_tokens": None},
    {"input_tokens": None, "cached_tokens": 0},
    {"project": "p"},
    {"project": "q"},
    {"cached_tokens": 1},
)
ENROLLMENTS: tuple[dict[str, Any], ...] = (
    *({},) * 10,
    {"sharing": Sharing.DISABLED},
    {"sharing": Sharing.DISABLED},
    {"sharing": Sharing.SELECTED, "projects": frozenset({"p"})},
    {"sharing": Sharing.SELECTED, "projects": frozenset({"p", "q"})},
    {"plan": "enterprise"},
    {"plan": "enterprise", "sharing": Sharing.DISABLED},
    {"zero_data_retention": True, "sharing": Sharing.DISABLED},
    {"starts": HOUR},
    {"ends": HOUR},
    {"owners": frozenset({OWNER, "bob"})},
)


def history_of(seed: int, number: int, offer: Offer) -> History:
    """One of a seed's histories: the same, always."""
    chance = random.Random(f"{seed}/{number}")  # noqa: S311 - a schedule, no secret
    counts, overage = chance.choice((None, None, *Counts)), chance.choice((None, None, *Overage))
    history = History((), counts, overage, chance.choice(BOUNDS))
    steps = _Choices(chance, history.offer(offer), history.bounds).steps(chance.choice(LENGTHS))
    return replace(history, steps=tuple(steps))


class _Choices:
    """What one history chooses, and what it knows of the rule's answers so far."""

    def __init__(self, chance: random.Random, offer: Offer, bounds: Bounds) -> None:
        self._chance = chance
        self._offer = offer
        self._bounds = bounds
        self._rule = Expected(offer, bounds)
        self._switches = [revision.starts for revision in offer.revisions[1:]]
        self._now = self._start()
        self._accounts = [PLAIN_ACCOUNTS[0], *chance.sample((*PLAIN_ACCOUNTS[1:], *HOSTILE_ACCOUNTS), 2)]
        self._asked: list[Request] = []
        self._last: dict[tuple[str, str], Decision] = {}
        self._held: list[Request] = []
        self._names = 0

    def steps(self, length: int) -> list[Step]:
        """The steps: first the accounts are enrolled, as a rule."""
        found: list[Step] = [
            self._enrolled(account, Enrollment(tier=3, sharing=Sharing.ENABLED), OWNER)
            for account in self._accounts
            if self._chance.random() < 15 / 16
        ]
        for step in found:
            self._learn(step)
        ways: list[Callable[[], Step]] = [
            *[self._ask] * 40,
            *[self._ask_again] * 14,
            *[self._ask_batch] * 10,
            *[self._enroll] * 6,
            *[self._together] * 5,
            *[self._hold] * 10,
            *[self._end_hold] * 8,
            *[self._reopen] * 2,
        ]
        while len(found) < length:
            if self._chance.random() < 1 / 4:
                self._pass_time()
            step = self._chance.choice(ways)()
            self._learn(step)
            found.append(step)
        return found

    def _start(self) -> datetime:
        """Where a history begins: often shortly before the offer's window changes its kind, or its revision."""
        chance, revisions = self._chance, self._offer.revisions
        kinds = [after.starts for before, after in pairwise(revisions) if str(before.window) != str(after.window)]
        way = chance.random()
        if kinds and way < 1 / 2:
            return chance.choice(kinds) - chance.randrange(1, 72) * HOUR
        if self._switches and way < 3 / 4:
            return chance.choice(self._switches) - chance.randrange(1, 48) * HOUR
        rolling = [one for one in revisions if isinstance(one.window, Rolling)]
        revision = chance.choice(rolling if rolling and way < 7 / 8 else revisions)
        return revision.starts + DAY + chance.randrange(20 * 24) * HOUR + chance.choice((timedelta(), 59 * MINUTE))

    def _pass_time(self) -> None:
        """Time passes a little, or until an edge."""
        chance, edge = self._chance, _edge(self._chance)
        then, window, way = self._now + chance.choice(PASSES), self._window(), chance.random()
        if window is not None and way < 1 / 3:
            then = window.end + chance.choice((timedelta(), timedelta(), self._bounds.keep)) + edge
        elif self._switches and way < 1 / 2:
            then = chance.choice(self._switches) + edge
        if self._now < then < min(self._now + PASS_MAX, AT_MAX - 2 * PASS_MAX):
            self._now = then

    def _learn(self, step: Step) -> None:
        """Ask the rule what was chosen; of callers at once it takes the first one's turn first."""
        if isinstance(step, Enrolling):
            self._rule.enroll(step.account, step.enrollment, actor=step.actor, now=step.now)
        elif isinstance(step, Asking | Settling):
            for request in step.requests if isinstance(step, Asking) else (step.request,):
                answer = self._rule.decide(request, step.now)
                if isinstance(answer, Decision) and answer.window is not None:
                    self._last[answer.account, answer.terms.group or ""] = answer
        elif isinstance(step, Holding):
            self._rule.hold(step.request, step.now, until=step.now + step.lasting, expiry=Expiry.DECIDED)
        elif isinstance(step, Releasing):
            self._rule.release(step.account, step.request_id)
        elif isinstance(step, Together):
            for lane in step.lanes:
                for one in lane:
                    self._learn(one)

    def _ask(self) -> Asking:
        return Asking(self._now, (self._request(),), self._view())

    def _ask_again(self) -> Asking:
        return Asking(self._now, (self._repeat(),), self._view())

    def _ask_batch(self) -> Asking:
        chance = self._chance
        requests: list[Request] = []
        for _ in range(chance.choice(BATCHES)):
            way = chance.random()
            if requests and way < 1 / 16:
                requests.append(requests[-1])
            elif requests and way < 2 / 16:
                requests.append(changed(chance.choice(requests), chance))
            else:
                requests.append(self._repeat() if way < 4 / 16 else self._request())
        return Asking(self._now, tuple(requests), self._view(), is_batch=True)

    def _enroll(self) -> Enrolling:
        chance = self._chance
        facts = {"tier": chance.choice(TIERS), "sharing": Sharing.ENABLED, **chance.choice(ENROLLMENTS)}
        for edge in ("starts", "ends"):
            if edge in facts:
                facts[edge] += self._now
        return self._enrolled(chance.choice(self._accounts), Enrollment(**facts), chance.choice(ACTORS))

    def _enrolled(self, account: str, enrollment: Enrollment, actor: str) -> Enrolling:
        """A change comes a moment after all before it, so that a replay by time can tell them apart."""
        self._now += TICK
        return Enrolling(self._now, account, enrollment, actor, self._view())

    def _reopen(self) -> Reopening:
        return Reopening(self._now, self._view())

    def _hold(self) -> Holding | Asking:
        """A hold of a part of what is left; often beside another, for what that leaves, or what was left before it."""
        chance, request = self._chance, self._request()
        if request.tokens is None or request.tools or request.kind is not Kind.COMPLETION:
            return Asking(self._now, (request,), self._view())
        tokens = request.tokens
        if chance.random() < 3 / 4:
            account, model, held = self._accounts[0], self._listed(), 0
            if self._held and chance.random() < 3 / 4:
                account, model, held = self._held[-1].account, self._held[-1].model, self._held[-1].tokens or 0
            left = self._left(account, model)
            sizes = (left, left - held, left - held + 1, left // 2, left // 2 + 1, left // 3, 1)
            tokens = min(max(0, chance.choice(sizes)), TOKENS_MAX)
            request = replace(request, account=account, model=model, at=self._now)
        request = replace(request, input_tokens=tokens, output_tokens=0, cached_tokens=0)
        self._held.append(request)
        return Holding(self._now, request, chance.choice(HOLD_TIMES), self._view())

    def _end_hold(self) -> Step:
        chance = self._chance
        if not self._held:
            return self._ask()
        held = self._held.pop(chance.randrange(len(self._held)))
        if chance.random() < 1 / 4:
            return Releasing(self._now, held.account, held.id, self._view())
        bound = held.tokens or 0
        used = min(max(0, bound + chance.choice((0, 0, 1, -1, -(bound // 2), -bound, bound))), TOKENS_MAX)
        request = replace(held, input_tokens=used - used // 4, output_tokens=used // 4)
        self._asked.append(request)
        return Settling(self._now, request, self._view())

    def _together(self) -> Together:
        """Callers who all want the same: the last tokens of one allowance, and each other's ids."""
        chance = self._chance
        account, model = chance.choice(self._accounts[:2]), self._listed()
        left = self._left(account, model)
        sizes = (left, left, left // 2 + 1, max(0, left - 1), min(left + 1, TOKENS_MAX), 1, 0)
        shared = [self._new(account, model, chance.choice(sizes), self._now) for _ in range(chance.choice((1, 3, 6)))]
        lanes: list[tuple[Enrolling | Asking, ...]] = []
        for lane in range(chance.choice(LANES)):
            asked: list[Enrolling | Asking] = []
            for _ in range(chance.choice((1, 2, 4))):
                requests = [self._wanted(account, model, sizes, shared) for _ in range(chance.choice((1, 1, 1, 3)))]
                asked.append(Asking(self._now, tuple(requests), lane % VIEWS, is_batch=len(requests) > 1))
            if lane == 0 and chance.random() < 1 / 3:
                enrollment = Enrollment(tier=chance.choice((1, 3, 5)), sharing=Sharing.ENABLED)
                asked.insert(chance.randrange(len(asked) + 1), Enrolling(self._now, account, enrollment, OWNER))
            lanes.append(tuple(asked))
        step = Together(self._now, tuple(lanes))
        self._now += TICK  # so that what follows is not at the time of a change that was made here
        return step

    def _wanted(self, account: str, model: str, sizes: tuple[int, ...], shared: list[Request]) -> Request:
        chance = self._chance
        way = chance.random()
        if way < 1 / 3:
            return chance.choice(shared)
        if way < 5 / 12:
            return changed(chance.choice(shared), chance)
        return self._new(account, model, chance.choice(sizes), self._now)

    def _request(self) -> Request:
        """A new request, aimed at the edges of what is known."""
        chance = self._chance
        account = chance.choice((*self._accounts, self._accounts[0]))
        model, group = self._model()
        tokens = chance.choice(SMALL)
        if group is not None and chance.random() < 7 / 8:
            tokens = self._aimed(account, group)
        last = None if group is None else self._last.get((account, group.name))
        request = self._new(account, model, tokens, self._time(None if last is None else last.window))
        if chance.random() < 1 / 8:
            twist = chance.choice(TWISTS)
            if "cached_tokens" not in twist or request.input_tokens:
                request = replace(request, **twist)
        self._asked.append(request)
        return request

    def _new(self, account: str, model: str, tokens: int, at: datetime) -> Request:
        chance = self._chance
        self._names += 1
        name = chance.choice(HOSTILE_IDS) if chance.random() < 1 / 10 else f"r{self._names}"
        made = tokens // 4 if chance.random() < 1 / 2 else 0
        return Request(id=name, account=account, model=model, at=at, input_tokens=tokens - made, output_tokens=made)

    def _aimed(self, account: str, group: Group) -> int:
        """A size at the edge of what is left, or a part of the allowance."""
        chance = self._chance
        allowance = max(group.allowances.values())
        last = self._last.get((account, group.name))
        left = allowance if last is None or last.remaining is None else last.remaining
        way = chance.random()
        if way < 1 / 3:
            return min(max(0, left + chance.choice(AIMS)), TOKENS_MAX)
        if way < 2 / 3:
            return chance.choice((left // 2, allowance // 3, allowance // 7, allowance // 40))
        return chance.choice((*SMALL, allowance + 1, TOKENS_MAX) if way > 15 / 16 else SMALL)

    def _left(self, account: str, model: str) -> int:
        revision = self._revision()
        group = None if revision is None else revision.group_of(model, Kind.COMPLETION)
        if group is None:
            return 1_000
        last = self._last.get((account, group.name))
        return max(group.allowances.values()) if last is None else last.remaining or 1_000

    def _revision(self) -> Revision | None:
        return self._offer.at(self._now)

    def _listed(self) -> str:
        return self._model()[0] if self._revision() is None else self._of_group()[0]

    def _of_group(self) -> tuple[str, Group | None]:
        revision = self._revision()
        if revision is None:
            return "model", None
        group = self._chance.choice(revision.groups)
        return (self._chance.choice(sorted(group.models)[:3]) if group.models else "any-model"), group

    def _model(self) -> tuple[str, Group | None]:
        """A model of a group, or, now and then, one that only looks so."""
        model, group = self._of_group()
        if self._chance.random() < 1 / 10:
            return self._chance.choice(
                (f"{model} ", model.upper(), f"{model}-2", f"ft:{model}:x", model[:-1], "")
            ), None
        return model, group

    def _time(self, window: Window | None) -> datetime:
        """A request's own time: now, late, early, or at an edge."""
        chance, now = self._chance, self._now
        way = chance.random()
        if way < 3 / 4:
            return now
        if way < 13 / 16:
            return now - chance.choice(AGES)
        if way < 14 / 16:
            return now + self._bounds.ahead + chance.choice((timedelta(), TICK, HOUR))
        if window is None:
            return now - SECOND
        at = chance.choice((window.start, window.end)) + _edge(chance)
        return at if at <= now + self._bounds.ahead or chance.random() < 1 / 8 else now

    def _repeat(self) -> Request:
        """A request that was asked before: the same, or under its id another, or by another account."""
        chance = self._chance
        if not self._asked:
            return self._request()
        request = chance.choice(self._asked[-40:])
        way = chance.random()
        if way < 1 / 2:
            return request
        if way < 7 / 8:
            return changed(request, chance)
        return replace(request, account=chance.choice(self._accounts))

    def _window(self) -> Window | None:
        """A window in which something was decided lately."""
        known = [decision.window for decision in self._last.values() if decision.window is not None]
        return self._chance.choice(known) if known else None

    def _view(self) -> int:
        return self._chance.randrange(VIEWS)


def _edge(chance: random.Random) -> timedelta:
    """The instant itself, or the one before or after it."""
    return chance.choice((-TICK, timedelta(), TICK))


def changed(request: Request, chance: random.Random) -> Request:
    """The same id, with other content: a conflict, in one field."""
    given, made, cached = request.input_tokens, request.output_tokens, request.cached_tokens
    field = chance.choice(CONFLICT_FIELDS)
    if field == "cached_tokens" and not given:
        field = "tools"
    value = {
        "model": request.model + "x",
        "at": request.at - TICK,
        "project": "q" if request.project is None else None,
        "input_tokens": cached + 7 if given is None else given - 1 if given > cached else given + 1,
        "output_tokens": 0 if made is None else made - 1 if made > 0 else 1 if (given or 0) < TOKENS_MAX else None,
        "cached_tokens": 0 if cached else 1,
        "kind": Kind.EVAL if request.kind is Kind.COMPLETION else Kind.COMPLETION,
        "tools": () if request.tools else ("function",),
    }[field]
    return replace(request, **{field: value})
