"""A store on a server and one in memory, asked the same: what holds, corrections and claims are, they must agree on."""

from __future__ import annotations

import random
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from gratis import Enrollment, GratisError, Meter, Request, Sharing, StoreError
from gratis.book import Cases, corrects
from gratis.model import Expiry, Held, Hold, Reason, Remedy, correction_id
from gratis.rule import Holding, Overdue
from gratis.stores import Bounds, Receipt, Status, stops
from gratis.stores.memory import MemoryStore
from gratis.testing.compare import ledger, plain, tallies
from gratis.testing.scene import DAY, ENROLLED, HOUR, LARGE, NOON, READINGS, SMALL, TICK, asked, small_offer, spent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gratis.offer import Offer
    from gratis.rule import Charge, Step

    from .bench import Bench

MINUTE = timedelta(minutes=1)
KNOWN, REPEATED, OTHERWISE, CORRECTED = 0.8, 0.35, 0.15, 0.3
CHECK_EVERY = 6
CLAIMED_UNTIL = NOON + 1_000 * DAY
SIZES = (0, 1, 9, 100, 250, 400, 600, 999, 1_000, 1_001)
AGES = (*(timedelta(),) * 6, HOUR, DAY, 3 * DAY)
PASSES = (TICK, MINUTE, 10 * MINUTE, HOUR, 5 * HOUR, DAY)
ENDS = (timedelta(), -HOUR, TICK, 10 * MINUTE, 10 * MINUTE, HOUR, DAY)
LENGTHS = (1, 1, 2, 3, 8)
BOUNDS = (Bounds(), Bounds(), Bounds(keep=DAY), None)
ACCOUNTS = ("acme", "other", "a")


class Twins:
    """One offer's meters over a store on a server and over one in memory, under one clock, asked the same."""

    def __init__(self, bench: Bench, offer: Offer, *, bounds: Bounds | None = Bounds(), shards: int = 1) -> None:
        self.clock = bench.clock
        self.offer = offer
        self.memory = MemoryStore(clock=bench.clock, bounds=bounds)
        self.views = [bench.store(bounds=bounds, options=f"&shards={shards}") for _ in range(2)]
        self.meters = [Meter(store, offer, assume=ENROLLED) for store in (self.memory, *self.views)]
        self.versions: dict[str, tuple[Enrollment, int]] = {}
        self._cases = Cases(offer)

    def charge(self, request: Request, step: Step | None = None) -> Charge:
        """What a store is asked, of the enrollment that the account is known to have."""
        enrollment, version = self.versions.get(request.account, (ENROLLED, 0))
        return self._cases.charge(request, enrollment, version, step)

    def apply(self, charges: Sequence[Charge], *, view: int = 0, dry: bool = False) -> list[Receipt]:
        """What both say of charges in one call."""
        return self.compare(charges, self.memory.apply(charges, dry=dry), view, dry=dry)

    def compare(
        self, charges: Sequence[Charge], expected: list[Receipt], view: int, *, dry: bool = False
    ) -> list[Receipt]:
        """What the store on a server says of charges that the one in memory answered."""
        for charge, found, known in zip(charges, self.views[view].apply(charges, dry=dry), expected, strict=True):
            due: list[Hold] = []
            if known.status is Status.EXPIRED:  # those that are left when the whole call is done
                holds = self.memory.holds(self.offer.name, charge.request.account)
                due = [hold for hold in holds if hold.until <= self.clock.now and hold.id != charge.request.id]
            said = replace(found, decision=plain(found.decision))
            if known.status is Status.CLOSED:
                known = replace(known, decision=None)  # noqa: PLW2901 - nobody reads it
            assert said == replace(known, due=tuple(due)), charge
        return expected

    def both(self, verb: str, *args: Any, **named: Any) -> Any:
        """What both stores answer to a verb."""
        found, expected = (getattr(store, verb)(*args, **named) for store in (self.views[0], self.memory))
        assert found == expected
        return expected

    def check(self) -> None:
        """Both have the same holds, tallies, standings, corrections and ledgers."""
        for offer, account in self.memory.accounts():
            self.both("holds", offer, account)
            assert tallies(self.views[1], offer, account) == tallies(self.memory, offer, account)
            standings = [meter.standing(account, at=self.clock.now) for meter in self.meters]
            assert standings == [standings[0]] * len(standings)
        ledgers = [
            {
                key: [(one.decided_at, plain(one.decision)) for one in entries]
                for key, entries in ledger(store)[0].items()
            }
            for store in (self.memory, self.views[0])
        ]
        assert ledgers[0] == ledgers[1]


class History:
    """A seed's requests, holds, ends and corrections, singly and in calls of several, while time passes."""

    def __init__(self, bench: Bench, seed: int, *, shards: int) -> None:
        self.chance = random.Random(seed)  # noqa: S311 - a schedule, no secret
        choose = self.chance.choice
        unit = choose(("tokens", "tokens", "requests"))
        offer = small_offer(
            choose(("day", "rolling")),
            reading=READINGS[choose(list(READINGS))],
            unit=unit,
            allowance=1_000 if unit == "tokens" else 5,
        )
        self.twins = Twins(bench, offer, bounds=choose(BOUNDS), shards=shards)
        self.accounts = ACCOUNTS[: choose((1, 2, 3))]
        self.asked: list[Request] = []
        self.names = 0
        self.steps: list[Callable[[], object]] = [
            *[self.pass_time] * 6, self.enroll, *[self.extend] * 2, *[self.release] * 2, self.claim,
            *[self.apply] * 14, *[self.look] * 2, *[self.ask] * 5,
        ]  # fmt: skip

    def run(self, steps: int, check: Callable[[], object] = lambda: None) -> None:
        """So many steps, after each of which both give the same answers, and now and then have all the same."""
        for step in range(steps, 0, -1):
            self.chance.choice(self.steps)()
            if step % CHECK_EVERY == 1:
                self.twins.check()
            check()

    def pass_time(self) -> None:
        """The clock is moved."""
        self.twins.clock.now += self.chance.choice(PASSES)

    def enroll(self) -> None:
        """An enrollment changes; who asks may not know it yet."""
        account, offer = self.chance.choice(self.accounts), self.twins.offer.name
        enrollment = Enrollment(tier=self.chance.choice((1, 3)), sharing=Sharing.ENABLED)
        made = self.twins.both("enroll", offer, account, enrollment, actor="ann", revision=None)
        if self.chance.random() < KNOWN:
            self.twins.versions[account] = (enrollment, made.version)

    def extend(self) -> None:
        """A hold has another end."""
        hold = self.hold()
        until = self.twins.clock.now + self.chance.choice((-TICK, TICK, HOUR, DAY))
        self.twins.both("extend", self.twins.offer.name, hold.account, hold.id, until=until)

    def release(self) -> None:
        """A hold is given back."""
        hold = self.hold()
        self.twins.both("release", self.twins.offer.name, hold.account, hold.id)

    def claim(self) -> None:
        """A name is claimed, by one of two."""
        args = (self.twins.offer.name, self.chance.choice(self.accounts), self.chance.choice("pq"))
        self.twins.both("claim", *args, until=CLAIMED_UNTIL, token=self.chance.choice("ab") * 16)

    def look(self) -> None:
        """What would be, of requests and holds of which nothing is written."""
        charges = [self.twins.charge(self.request()), self.holding()]
        self.twins.apply(charges, view=self.chance.randrange(2), dry=True)

    def ask(self) -> None:
        """A meter's verb, which may take several calls."""
        hold = self.hold()
        account, name = hold.account, self.chance.choice((hold, self.request())).id
        usage = spent(self.chance.choice((*SIZES, None)))
        verb, *args = self.chance.choice(
            [
                ("decide", self.request()),
                ("decide_many", [self.request() for _ in range(4)]),
                ("settle", hold, usage),
                ("release", hold),
                ("expire", account),
            ]
        )
        found = [verb_of(meter, verb, *args) for meter in self.twins.meters[:2]]
        assert found[0] == found[1], (verb, args)
        for verb, *named in (("void",), ("adjust", spent(7))):
            if self.chance.random() < CORRECTED:
                found = [
                    verb_of(meter, verb, name, *named, actor="ann", why="a", account=account)
                    for meter in self.twins.meters[:2]
                ]
                assert found[0] == found[1], (verb, name)

    def apply(self) -> None:
        """Some charges; what each is about may follow from those before it."""
        charges: list[Charge] = []
        expected: list[Receipt] = []
        kinds = [self.plain] * 4 + [self.holding] * 4 + [self.settle] * 4 + [self.overdue] * 2 + [self.correction] * 3
        stopped: set[str] = set()
        for _ in range(self.chance.choice(LENGTHS)):
            charge = self.chance.choice(kinds)()
            charges.append(charge)
            request = charge.request
            if request.account in stopped and not self.is_decided(request):
                expected.append(Receipt(Status.WAITING))
                continue
            (receipt,) = self.twins.memory.apply([charge])
            expected.append(receipt)
            if stops(charge, receipt):
                stopped.add(request.account)
        self.twins.compare(charges, expected, self.chance.randrange(2))

    def is_decided(self, request: Request) -> bool:
        """Whether a request is decided by now."""
        (receipt,) = self.twins.memory.apply([self.twins.charge(request)], dry=True)
        return receipt.decision is not None and receipt.status is not Status.DECIDED

    def request(self, sizes: Sequence[int] = SIZES) -> Request:
        """One that was asked before, perhaps of another size or time, or a new one."""
        if self.asked and self.chance.random() < REPEATED:
            before = self.chance.choice(self.asked[-12:])
            at = before.at + (TICK if self.chance.random() < OTHERWISE else timedelta())
            return replace(before, at=at, input_tokens=self.chance.choice((before.input_tokens, *sizes)))
        self.names += 1
        at = self.twins.clock.now - self.chance.choice(AGES)
        model = self.chance.choice((LARGE, LARGE, LARGE, SMALL, "unlisted"))
        size, account = self.chance.choice(sizes), self.chance.choice(self.accounts)
        self.asked.append(asked(self.names, size, account=account, model=model, at=at))
        return self.asked[-1]

    def hold(self) -> Hold:
        """One that is there, or one that never was."""
        account = self.chance.choice(self.accounts)
        holds = self.twins.memory.holds(self.twins.offer.name, account)
        if holds:
            return self.chance.choice(holds)
        charge = self.twins.charge(asked("nobody", account=account))
        until = self.twins.clock.now
        return Hold(
            request=charge.request, terms=charge.terms, tokens_max=10, amount=0, reason=Reason.OVER_ALLOWANCE,
            used=None, held=None, window=None, until=until,
        )  # fmt: skip

    def plain(self) -> Charge:
        """That a request is decided."""
        return self.twins.charge(self.request())

    def holding(self) -> Charge:
        """That a request is held, perhaps until a time that has passed."""
        until = self.twins.clock.now + self.chance.choice(ENDS)
        return self.twins.charge(self.request(), Holding(until, self.chance.choice(list(Expiry))))

    def settle(self) -> Charge:
        """By what was used, perhaps of another model, or by its bound."""
        hold, chance = self.hold(), self.chance
        if chance.random() < OTHERWISE:
            return self.twins.charge(hold.request, Held(hold.tokens_max, hold.window, is_unmeasured=True))
        model = chance.choice((SMALL, LARGE, "unlisted")) if chance.random() < OTHERWISE else hold.request.model
        size = chance.choice((0, 1, hold.tokens_max, hold.tokens_max + 1, 500))
        return self.twins.charge(replace(hold.request, input_tokens=size, model=model))

    def overdue(self) -> Charge:
        """That a hold is ended, if it has run out of time."""
        hold = self.hold()
        return self.twins.charge(hold.request, Overdue(hold.tokens_max, hold.window))

    def correction(self) -> Charge:
        """The next one of a decision, or one that is not the next; twice in one call, the second follows the first."""
        account = self.twins.memory._accounts.get((self.twins.offer.name, self.chance.choice(self.accounts)))
        decisions = [] if account is None else [one for one in account.decisions.values() if one.correction is None]
        if account is None or not decisions:
            return self.plain()
        first = self.chance.choice(decisions[-8:])
        if first.reason is Reason.TOO_LATE:
            return self.plain()  # no store is asked to correct that
        number = account.corrections.get(first.id, 0) + 1
        latest = first if number == 1 else account.decisions[correction_id(first.id, number - 1)]
        request = replace(first.request, input_tokens=self.chance.choice((0, 10, 300, 700)))
        remedy = self.chance.choice((Remedy.VOIDED, Remedy.ADJUSTED, Remedy.SETTLED))
        charge = corrects(
            self.twins.offer, first, latest, request, remedy, number=number, actor="ann", why=self.chance.choice("ab")
        )
        other = number + self.chance.choice((0, 0, 0, 0, -1, 2))
        if 0 < other != number:
            step = replace(charge.step, number=other)
            return replace(charge, request=replace(charge.request, id=correction_id(first.id, other)), step=step)
        return charge


def verb_of(meter: Meter, verb: str, *args: Any, **named: Any) -> Any:
    """What a meter's verb answers, or the error's kind."""
    try:
        return plain(getattr(meter, verb)(*args, **named))
    except StoreError as error:
        return type(error)
    except GratisError as error:
        return plain(error)
