"""Random programs: a store and the pure rule are asked the same, and every answer must be the same.

A program is a seed: the same one asks the same, always.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from gratis.errors import Conflict, GratisError, RequestError
from gratis.meter import Meter
from gratis.model import Decision, Hold
from gratis.stores.memory import MemoryStore
from gratis.testing.choosing import Choices
from gratis.testing.compare import BEGINNING, ledger, plain, plainly, tallies

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from gratis.stores import Cursor, Store
    from gratis.testing.choosing import Step
    from gratis.testing.scene import Opener

CHECK_EVERY = 256
REOPEN_EVERY = 100
VIEWS = 2


def drive(open_store: Opener, *, seed: int, steps: int) -> Counter[str]:
    """Ask a store, through two views, and the pure rule the same; count what was asked and answered.

    The store must be empty. The first difference is an AssertionError with the seed, the step and both answers.
    """
    program = _Program(open_store, seed=seed)
    try:
        program.run(steps)
    finally:
        program.close()
    return program.seen


class _Program:
    """A seed's program: its choices, the views on a store, and the rule's store."""

    def __init__(self, open_store: Opener, *, seed: int) -> None:
        self.seen: Counter[str] = Counter()
        self._seed = seed
        self._step = 0
        self._choices = Choices(seed)
        self._chance = self._choices.chance
        self._open_store = open_store
        self._memory = MemoryStore(clock=self._choices.clock, bounds=self._choices.bounds)
        self._rule = self._meters(self._memory)
        self._stores: list[Store] = []
        self._views: list[list[Meter]] = []
        self._enrolled: set[tuple[str, str]] = set()
        self._numbers: dict[tuple[str, str], int] = {}
        self._found_until: Cursor = BEGINNING
        self._expected_until: Cursor = BEGINNING
        for view in range(VIEWS):
            self._open(view)

    def run(self, steps: int) -> None:
        """So many steps; what is kept is compared now and then, and at the end."""
        for step in self._choices.beginning():
            self._ask(step)
        for number in range(1, steps + 1):
            self._step = number
            asked = self._choices.step()
            if asked is not None:
                self._ask(asked)
            if number % REOPEN_EVERY == 0:
                self._reopen()
            if number % CHECK_EVERY == 0:
                self._check_news()
        self._check_news()
        self._check_tallies(list(self._memory.accounts()), at=None)

    def close(self) -> None:
        """Close the views."""
        for store in self._stores:
            store.close()

    def _open(self, view: int) -> None:
        store = self._open_store(clock=self._choices.clock, bounds=self._choices.bounds)
        self._stores[view : view + 1] = [store]
        self._views[view : view + 1] = [self._meters(store)]

    def _meters(self, store: Store) -> list[Meter]:
        return [Meter(store, offer, assume=self._choices.assumed) for offer in self._choices.offers]

    def _reopen(self) -> None:
        """One view is closed and opened again, as when a process ends and another starts."""
        view = self._chance.randrange(VIEWS)
        self._stores[view].close()
        self._open(view)
        self.seen["reopen"] += 1

    def _ask(self, step: Step) -> None:
        """Both are asked, and both must answer the same."""
        view = self._chance.randrange(VIEWS)
        expected = _answer(self._rule[step.offer], step)
        found = _answer(self._views[view][step.offer], step)
        if found != expected and plain(found) != plain(expected):
            raise self._fault(f"view {view}", step, found, expected)
        self.seen[step.verb] += 1
        if step.verb == "enroll":
            self._enrolled.add((self._choices.offers[step.offer].name, step.args[0]))
        for answer in expected if isinstance(expected, list) else (expected,):
            if isinstance(answer, Decision):
                self.seen["replayed" if answer.replayed else answer.reason] += 1
                if answer.correction is not None:
                    self.seen[answer.correction.remedy] += 1
                if answer.window is not None:
                    self._choices.learn(step.offer, answer)
            elif isinstance(answer, Hold):
                self.seen["fits" if answer.fits else "does not fit"] += 1
                self._choices.learn_hold(step.offer, answer)
            elif isinstance(answer, GratisError):
                kinds = {Conflict: "conflict", RequestError: "ahead"}
                self.seen[kinds.get(type(answer), "refused")] += 1

    def _check_news(self) -> None:
        """What the ledger says since the last time, of whom the store knows, and of what was changed."""
        store = self._stores[self._chance.randrange(VIEWS)]
        expected, self._expected_until = ledger(self._memory, self._expected_until)
        found, self._found_until = ledger(store, self._found_until)
        for key in {*expected, *found}:
            entries = found.get(key, [])
            rows = [(entry.decided_at, plain(entry.decision)) for entry in entries]
            self._compare(f"ledger of {key}", rows, [(one.decided_at, one.decision) for one in expected.get(key, [])])
            numbers = [self._numbers.get(key, 0), *(entry.entry for entry in entries)]
            self._compare(f"order of the entries of {key}", numbers, sorted(set(numbers)))
            self._numbers[key] = numbers[-1]
        self._check_tallies(list(expected), at=self._choices.clock.now)
        for key in expected:
            self._compare(f"holds of {key}", plainly(store.holds(*key)), plainly(self._memory.holds(*key)))
        for key in self._enrolled:
            self._compare(f"enrollments of {key}", store.enrollments(*key), self._memory.enrollments(*key))
        self._enrolled.clear()
        self._compare("accounts", sorted(store.accounts()), sorted(self._memory.accounts()))

    def _check_tallies(self, keys: Sequence[tuple[str, str]], *, at: datetime | None) -> None:
        store = self._stores[self._chance.randrange(VIEWS)]
        for key in keys:
            found, expected = tallies(store, *key, at=at), tallies(self._memory, *key, at=at)
            self._compare(f"tallies of {key} at {at}", found, expected)

    def _compare(self, what: str, found: list[Any], expected: list[Any]) -> None:
        if found != expected:
            raise self._fault("what is kept", what, found, expected)

    def _fault(self, where: str, asked: object, found: Any, expected: Any) -> AssertionError:
        """What is told of a difference: of lists, the first place that differs."""
        if isinstance(found, list) and isinstance(expected, list):
            pairs = enumerate(zip(found, expected, strict=False))
            place = next((place for place, (one, other) in pairs if plain(one) != plain(other)), None)
            place = min(len(found), len(expected)) if place is None else place
            where = f"{where}, place {place} of {len(found)} and {len(expected)}"
            found, expected = found[place : place + 1], expected[place : place + 1]
        choices = self._choices
        return AssertionError(
            f"seed {self._seed}, step {self._step}, {choices.clock.now.isoformat()}, {choices.bounds}, {where}\n"
            f"  asked:    {asked}\n  found:    {found!r}\n  expected: {expected!r}"
        )


def _answer(meter: Meter, step: Step) -> Any:
    """An answer, or the error in its place."""
    try:
        return getattr(meter, step.verb)(*step.args, **step.named)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is no answer of the rule, and told
        return error
