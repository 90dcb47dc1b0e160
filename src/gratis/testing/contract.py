"""The contract of a store: all its clauses, and which cases each is tried with."""

from __future__ import annotations

import inspect
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, Final

from gratis.model import Unit
from gratis.stores import CONFLICT_FIELDS
from gratis.testing.correcting import Correcting
from gratis.testing.deciding import Deciding
from gratis.testing.enrolling import Enrolling
from gratis.testing.expiring import Expiring
from gratis.testing.holding import Holding
from gratis.testing.keeping import Keeping
from gratis.testing.racing import Racing
from gratis.testing.repeating import Repeating
from gratis.testing.scene import CALENDARS, READINGS, WINDOWS, Opener
from gratis.testing.timing import Timing
from gratis.testing.together import Together

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

# The arguments that a clause may have beside `open_store`: the name of each case, and its value.
CASES: Final[Mapping[str, Mapping[str, Any]]] = {
    "calendar": {name: name for name in CALENDARS},
    "window": {name: name for name in WINDOWS},
    "reading": READINGS,
    "unit": {unit.value: unit.value for unit in Unit},
    "field": {field: field for field in CONFLICT_FIELDS},
}


class StoreContract(Deciding, Timing, Repeating, Enrolling, Keeping, Together, Holding, Expiring, Correcting, Racing):
    """What is true of every store; each method that starts with `test_` is one clause, tried with each of its cases."""

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Tell pytest the cases of a clause."""
        for name, cases in CASES.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, list(cases.values()), ids=list(cases))

    @classmethod
    def clauses(cls) -> Iterator[tuple[str, Callable[[Opener], None]]]:
        """Each clause with each of its cases, for who does without pytest: its name, and what tries a store with it."""
        for name in dir(cls):
            if name.startswith("test_"):
                clause = getattr(cls(), name)
                names = [one for one in inspect.signature(clause).parameters if one in CASES]
                for case in product(*(CASES[one].items() for one in names)):
                    values = {one: value for one, (_, value) in zip(names, case, strict=True)}
                    title = "-".join(key for key, _ in case)
                    yield (f"{name}[{title}]" if title else name), partial(clause, **values)
