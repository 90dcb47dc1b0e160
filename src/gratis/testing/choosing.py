"""What a random program asks: requests, changes and times, aimed at edges.

Edges are what is left of an allowance, the ends of windows, the bounds of time, and ids that were asked before.
"""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec.structs import replace

from gratis.audit.properties.choosing import changed
from gratis.model import TOKENS_MAX, Decision, Enrollment, Expiry, Hold, Kind, Request, Sharing, Usage
from gratis.offer_file import parse
from gratis.stores import Bounds
from gratis.testing.scene import DAY, HOUR, READINGS, TICK, WINDOWS, Clock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from gratis.model import Window
    from gratis.offer import Offer

REMEMBERED_MAX = 2_048
START = datetime(2025, 1, 1, tzinfo=UTC)
REVISION_DAYS = 9
REVISIONS = 40
SECOND, MINUTE = timedelta(seconds=1), timedelta(minutes=1)
MAIN_ACCOUNTS = ("acme", "default")
ACCOUNTS = (
    *MAIN_ACCOUNTS * 8,
    "a",
    "a:b",
    "a}{b",
    " ",
    "Caf\u00e9",
    "Cafe\u0301",
    "\u202e\u05d0\u200fcba",
    "n",
    "x" * 255,
)
STRANGE_IDS = ("s", "t", "n", "a1", "r:1", "b:r1", "}", "{x}", " ", "Caf\u00e9", "Cafe\u0301", "\u05d0", "x" * 255, "0")
LISTED = ("large-1", "large-2", "small-1", "huge-1", "call-1", "run-1")
MODELS = (*LISTED * 8, "ft:large-1", "large", "LARGE-1", "large-1 ", "")
GROUPS = {
    "large-1": "large",
    "large-2": "large",
    "small-1": "small",
    "huge-1": "huge",
    "call-1": "calls",
    "run-1": "runs",
}
SIZES = (0, 1, 2, 7, 60, 100, 250, 251, 333, 999, 1_000, 1_001, 123_456_789, TOKENS_MAX - 1, TOKENS_MAX)
AIMS = (0, 0, 0, 1, 1, -1)
TWISTS: tuple[dict[str, Any], ...] = (
    {"tools": ("function",)},
    {"tools": ("web_search",)},
    {"kind": Kind.ASSISTANTS},
    {"kind": Kind.EVAL},
    {"kind": Kind.FINE_TUNING_TRAINING},
    {"kind": Kind.EMBEDDING, "output_tokens": None},
    {"output_tokens": None},
    {"input_tokens": None},
    {"project": "p"},
    {"project": "q"},
    {"cached_tokens": 1},
    {"cached_tokens": 1},
)
ENROLLMENTS: tuple[dict[str, Any], ...] = (
    *({},) * 14,
    {"sharing": Sharing.DISABLED},
    {"sharing": Sharing.SELECTED, "projects": ("p",)},
    {"plan": "enterprise"},
    {"plan": "enterprise", "sharing": Sharing.DISABLED},
    {"starts": HOUR},
    {"ends": HOUR},
    {"owners": ("ann", "bob")},
    {"owners": ("ann",)},
)
TIERS = (3, 3, 3, 4, 5, 1, 2, 1, 2, 0)
ACTORS = ("ann", "ann", "ann", "bob", "eve")
PASSES = (*(TICK, SECOND, MINUTE, 20 * MINUTE, HOUR) * 3, 2 * HOUR, 5 * HOUR, DAY, 8 * DAY)
PASS_MAX = 40 * DAY
AGES = (TICK, SECOND, HOUR, 5 * HOUR, DAY, 2 * DAY, 7 * DAY, 9 * DAY, 40 * DAY)
BOUNDS = (Bounds(), Bounds(), Bounds(keep=DAY, ahead=timedelta()), Bounds(keep=timedelta(), ahead=HOUR), None)
BATCHES = (0, 1, 2, 3, 5, 8, 30)
HOLD_TIMES = (TICK, SECOND, MINUTE, MINUTE, 20 * MINUTE, HOUR, 5 * HOUR, DAY)
REASONS_WHY = ("counted twice", "refunded", "\u05d0'\"")

_REVISION = """
[[revisions]]
from = {starts}
{until}
source = "the driver"
window = {window}
counts = "{counts}"
overage = "{overage}"
reasons = [
  "not_enrolled", "account_not_eligible", "sharing_disabled", "project_not_shared", "fine_tuning_training", "evals",
  "fine_tuned_model", "model_not_listed", "assistants_o_series", "tool_use", "unmeasured",
]
client_side_tools = ["function"]
excluded_plans = ["enterprise"]
fine_tuned_prefix = "ft:"
o_series = ["large-2"]
groups.large = {{ unit = "tokens", allowance = {{ "1-2" = 250, "3-5" = 1000 }}, models = ["large-1", "large-2"] }}
groups.small = {{ unit = "tokens", allowance = {{ "1-5" = 500 }}, models = ["small-1"], cached_input = "not_counted" }}
groups.huge = {{ unit = "tokens", allowance = {{ "1-2" = 999999, "3-5" = 1000000000000 }}, models = ["huge-1"] }}
groups.calls = {{ unit = "requests", allowance = {{ "1-2" = 0, "3-5" = 6 }}, models = ["call-1"] }}
groups.runs = {{ unit = "runs", allowance = {{ "1-2" = 1, "3-5" = 3 }}, models = ["run-1"] }}
"""


class Step(NamedTuple):
    """One question: to which of the offers' meters, which of its verbs, and with what."""

    offer: int
    verb: str
    args: tuple[Any, ...]
    named: Mapping[str, Any] = {}


class Choices:
    """A seed's choices, and what they know of the answers so far."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)  # noqa: S311 - a schedule, no secret
        self.offers = _offers()
        self.clock = Clock(START + self.chance.randrange(24 * 60) * HOUR)
        self.bounds = self.chance.choice(BOUNDS)
        self.assumed = self.chance.choice((None, Enrollment(tier=2, sharing=Sharing.ENABLED)))
        self._ahead = self.bounds.ahead if self.bounds else timedelta()
        self._keep = self.bounds.keep if self.bounds else timedelta()
        self._asked: list[tuple[int, Request]] = []
        self._last: dict[tuple[int, str, str], Decision] = {}
        self._held: list[tuple[int, Hold]] = []
        self._names = 0
        self._steps: list[Callable[[], Step | None]] = [
            *[self._decide] * 40,
            *[self._decide_again] * 10,
            *[self._decide_batch] * 8,
            *[self._pass_time] * 10,
            *[self._enroll] * 4,
            *[self._explain] * 4,
            *[self._look_at_standing] * 3,
            *[self._hold] * 12,
            *[self._end_hold] * 12,
            *[self._correct] * 5,
            self._hold_again,
            self._expire,
        ]

    def beginning(self) -> Iterator[Step]:
        """The steps before the first: the main accounts are enrolled."""
        for offer in range(len(self.offers)):
            for account in MAIN_ACCOUNTS:
                enrollment = Enrollment(tier=3, sharing=Sharing.ENABLED)
                yield Step(offer, "enroll", (account, enrollment), {"actor": "ann"})

    def step(self) -> Step | None:
        """What is asked next; None where only time passes."""
        return self.chance.choice(self._steps)()

    def learn(self, offer: int, decision: Decision) -> None:
        """A decision that belongs to a window tells where its edges are."""
        self._last[offer, decision.account, decision.terms.group or ""] = decision

    def learn_hold(self, offer: int, hold: Hold) -> None:
        """A hold can be settled, released and extended from now on."""
        if len(self._held) < REMEMBERED_MAX:
            self._held.append((offer, hold))
        else:
            self._held[self.chance.randrange(REMEMBERED_MAX)] = offer, hold

    def _decide(self) -> Step:
        offer = self.chance.randrange(len(self.offers))
        return Step(offer, "decide", (self._request(offer),))

    def _decide_again(self) -> Step:
        offer, request = self._again()
        return Step(offer, "decide", (request,))

    def _decide_batch(self) -> Step:
        offer, chance = self.chance.randrange(len(self.offers)), self.chance
        requests: list[Request] = []
        for _ in range(chance.choice(BATCHES)):
            way = chance.random()
            if requests and way < 1 / 16:
                requests.append(requests[-1])
            elif requests and way < 2 / 16:
                requests.append(changed(chance.choice(requests), chance))
            elif way < 4 / 16:
                requests.append(self._again()[1])
            else:
                requests.append(self._request(offer))
        return Step(offer, "decide_many", (requests,))

    def _explain(self) -> Step:
        offer = self.chance.randrange(len(self.offers))
        if self.chance.random() < 1 / 4:
            offer, request = self._again()
        else:
            request = self._request(offer)
        return Step(offer, "explain", (request,))

    def _look_at_standing(self) -> Step:
        return Step(self.chance.randrange(len(self.offers)), "standing", (self.chance.choice(ACCOUNTS),))

    def _hold(self) -> Step:
        offer, chance = self.chance.randrange(len(self.offers)), self.chance
        request = self._request(offer)
        named = {"for_": chance.choice(HOLD_TIMES), "on_expiry": chance.choice((*Expiry, Expiry.DECIDED))}
        return Step(offer, "hold", (request, request.tokens or chance.choice(SIZES)), named)

    def _hold_again(self) -> Step:
        chance = self.chance
        if not self._held or chance.random() < 1 / 4:
            offer, request = self._again()
        else:
            offer, hold = chance.choice(self._held)
            request = hold.request if chance.random() < 1 / 2 else changed(hold.request, chance)
        return Step(offer, "hold", (request, request.tokens or chance.choice(SIZES)))

    def _end_hold(self) -> Step | None:
        """A hold, most often one of the last, is settled, released or extended; it may be over since long."""
        chance = self.chance
        if not self._held:
            return None
        offer, hold = self._held[-1 - min(int(chance.expovariate(1 / 8)), len(self._held) - 1)]
        verb = chance.choice(("settle", "settle", "settle", "decide", "release", "extend"))
        if verb == "release":
            return Step(offer, verb, (hold,))
        if verb == "extend":
            return Step(offer, verb, (hold,), {"for_": chance.choice(HOLD_TIMES)})
        usage = self._usage(hold)
        if verb == "settle":
            return Step(offer, verb, (hold, usage))
        used = {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens, "cached_tokens": 0}
        return Step(offer, verb, (replace(hold.request, **used),))

    def _usage(self, hold: Hold) -> Usage:
        """What a held request used: as much as was held, less, more, or nobody knows."""
        chance, bound = self.chance, hold.tokens_max
        tokens = min(max(0, bound + chance.choice((0, 0, 1, -1, -7, -bound // 2, -bound, bound))), TOKENS_MAX)
        if chance.random() < 1 / 8:
            return Usage()
        made = tokens // 4
        usage = Usage(
            input_tokens=tokens - made, output_tokens=made, cached_tokens=min(tokens - made, chance.choice((0, 1)))
        )
        if chance.random() < 1 / 8:
            word: dict[str, Any] = chance.choice(
                ({"model": "large-2"}, {"model": "small-1"}, {"tools": ("web_search",)})
            )
            return replace(usage, **word)
        return usage

    def _expire(self) -> Step:
        offer, chance = self.chance.randrange(len(self.offers)), self.chance
        return Step(offer, chance.choice(("expire", "holds")), (chance.choice(ACCOUNTS),))

    def _correct(self) -> Step:
        """What was decided is voided, adjusted or looked at, most often by an owner."""
        chance = self.chance
        offer, request = self._again()
        named: dict[str, Any] = {"account": request.account}
        if chance.random() < 1 / 4:
            return Step(offer, "decisions", (request.id,), named)
        named |= {"actor": chance.choice(ACTORS), "why": chance.choice(REASONS_WHY)}
        if chance.random() < 1 / 2:
            return Step(offer, "void", (request.id,), named)
        tokens = chance.choice((*SIZES, request.tokens or 0))
        return Step(offer, "adjust", (request.id, Usage(input_tokens=tokens, output_tokens=0)), named)

    def _enroll(self) -> Step:
        chance = self.chance
        facts = {"tier": chance.choice(TIERS), "sharing": Sharing.ENABLED, **chance.choice(ENROLLMENTS)}
        for edge in ("starts", "ends"):
            if edge in facts:
                facts[edge] += self.clock.now
        offer, account, actor = chance.randrange(len(self.offers)), chance.choice(ACCOUNTS), chance.choice(ACTORS)
        return Step(offer, "enroll", (account, Enrollment(**facts)), {"actor": actor})

    def _pass_time(self) -> None:
        """Time passes a little, or until an edge of a window or of a hold's time."""
        chance, now = self.chance, self.clock.now
        then = now + chance.choice(PASSES)
        window = self._window()
        if window is not None and chance.random() < 1 / 3:
            end = window.end + chance.choice((timedelta(), self._keep))
            then = end + chance.choice((-TICK, timedelta(), TICK))
        elif self._held and chance.random() < 1 / 3:
            then = self._held[-1][1].until + chance.choice((-TICK, timedelta(), TICK))
        if now < then < now + PASS_MAX:
            self.clock.now = then

    def _request(self, offer: int) -> Request:
        """A new request, aimed at the edges of what is known."""
        chance = self.chance
        account, model = chance.choice(ACCOUNTS), chance.choice(MODELS)
        last = self._last.get((offer, account, GROUPS.get(model, "")))
        tokens = chance.choice(SIZES)
        if last is not None and chance.random() < 1 / 2:
            tokens = min(max(0, (last.remaining or 0) + chance.choice(AIMS)), TOKENS_MAX)
        self._names += 1
        name = chance.choice(STRANGE_IDS) if chance.random() < 1 / 20 else f"r{self._names}"
        made = tokens // 4
        request = Request(
            id=name,
            account=account,
            model=model,
            at=self._time(None if last is None else last.window),
            input_tokens=tokens - made,
            output_tokens=made,
        )
        if chance.random() < 1 / 8:
            twist = chance.choice(TWISTS)
            if "cached_tokens" not in twist or tokens - made > 0:
                request = replace(request, **twist)
        if len(self._asked) < REMEMBERED_MAX:
            self._asked.append((offer, request))
        else:
            self._asked[chance.randrange(REMEMBERED_MAX)] = offer, request
        return request

    def _time(self, window: Window | None) -> datetime:
        chance, now = self.chance, self.clock.now
        way = chance.random()
        if way < 3 / 4:
            return now
        if way < 13 / 16:
            return now - chance.choice(AGES)
        if way < 14 / 16:
            return now + self._ahead + chance.choice((timedelta(), TICK, HOUR))
        if window is None:
            return now - SECOND
        at = chance.choice((window.start, window.end)) + chance.choice((-TICK, timedelta(), TICK))
        return at if at <= now + self._ahead or chance.random() < 1 / 8 else now

    def _again(self) -> tuple[int, Request]:
        """A request that was asked before: the same, or under its id another, or in another account or offer."""
        chance = self.chance
        if not self._asked:
            return 0, self._request(0)
        offer, request = chance.choice(self._asked)
        way = chance.random()
        if way < 1 / 2:
            return offer, request
        if way < 7 / 8:
            return offer, changed(request, chance)
        if way < 15 / 16:
            return chance.randrange(len(self.offers)), request
        return offer, replace(request, account=chance.choice(ACCOUNTS))

    def _window(self) -> Window | None:
        """A window in which something was decided."""
        offer, account = self.chance.randrange(len(self.offers)), self.chance.choice(MAIN_ACCOUNTS)
        last = self._last.get((offer, account, self.chance.choice(("large", "calls"))))
        return None if last is None else last.window


@cache
def _offers() -> list[Offer]:
    """One offer a reading; its revisions go through all kinds of windows, again and again."""
    windows = [*WINDOWS.values(), '{ kind = "rolling", hours = 5 }']
    offers = []
    for name, (counts, overage) in READINGS.items():
        text = f'name = "{name}"\ntitle = "A program of the driver"\naccount = "account"\n'
        for number in range(REVISIONS):
            starts = START.date() + number * REVISION_DAYS * DAY
            until = starts + REVISION_DAYS * DAY
            text += _REVISION.format(
                starts=starts,
                until="" if number == REVISIONS - 1 else f"until = {until}",
                window=windows[number % len(windows)],
                counts=counts,
                overage=overage,
            )
        offers.append(parse(text, file=name))
    return offers
