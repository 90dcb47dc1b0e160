"""Every store keeps the contract that ships for stores of one's own; and that contract finds a store that does not.

A row of `STORES` is a name and a context manager that gives a function which opens one more view on one empty store.
"""

from __future__ import annotations

import tempfile
import threading
import unicodedata
from collections import Counter
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from gratis import Reason
from gratis.model import Correction, Overage, Remedy
from gratis.rule import Tally, decide
from gratis.stores import Receipt, Status, held_again, memory as store_in_memory, repeat
from gratis.stores.memory import MemoryStore, _Account, _held, _tally
from gratis.stores.redis.url import open_redis
from gratis.stores.sqlite import SQLiteStore, Synchronous
from gratis.testing import StoreContract, drive

from .fake import fake_server
from .memory import View
from .servers import Cluster, Server, binaries, binary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gratis.testing import Opener

PROGRAMS = 6
STEPS = 2_000
FAULTY_PROGRAMS = 8
TURN_S = 0.000_2


@contextmanager
def memory(view: type[View] = View) -> Iterator[Opener]:
    """In memory."""
    yield partial(view, {})


@contextmanager
def sqlite() -> Iterator[Opener]:
    """In a file, each view with a connection of its own."""
    with tempfile.TemporaryDirectory() as folder:
        yield partial(SQLiteStore, Path(folder) / "gratis.db", synchronous=Synchronous.OFF)


def served(kind: str, options: str = "") -> Callable[[], AbstractContextManager[Opener]]:
    """A store in a namespace of its own, on a server that all tests of this file share."""

    @contextmanager
    def row() -> Iterator[Opener]:
        yield partial(open_redis, f"{SERVERS.url(kind)}?namespace={next(NAMESPACES)}{options}")

    return row


class Servers:
    """Servers that are started when somebody asks for one, and stopped together."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._urls: dict[str, str] = {}

    def url(self, kind: str) -> str:
        """Where the server of a kind is."""
        if kind not in self._urls:
            self._urls[kind] = self._start(kind)
        return self._urls[kind]

    def _start(self, kind: str) -> str:
        if kind == "cluster":
            return self._stack.enter_context(Cluster()).url
        if kind == "fakeredis":
            return self._stack.enter_context(fake_server())
        program = binaries().get(kind) or binary()
        return self._stack.enter_context(Server(program)).url

    def stop(self) -> None:
        """Stop them all."""
        self._stack.close()
        self._urls.clear()


SERVERS = Servers()
NAMESPACES = (f"row {number}" for number in count())
STORES = {
    "memory": memory,
    "sqlite": sqlite,
    "fakeredis": served("fakeredis"),
    **{name: served(name) for name in binaries() or ["a server"]},
    "shards": served("a server", "&shards=5"),
    "cluster": served("cluster"),
}


@pytest.fixture(scope="module", autouse=True)
def _servers() -> Iterator[None]:
    """They end with this file's tests."""
    yield
    SERVERS.stop()


class TestStores(StoreContract):
    """Each clause, for each store."""

    @pytest.fixture(params=STORES)
    def open_store(self, request):
        """Open one more view on the store of this row."""
        with STORES[request.param]() as opened:
            yield opened


@pytest.mark.parametrize("store", STORES)
def test_random_programs_are_answered_as_by_the_rule(store):
    """Thousands of steps of random programs have the rule's answers, one by one."""
    seen = Counter()
    for seed in range(PROGRAMS):
        with STORES[store]() as opened:
            seen += drive(opened, seed=seed, steps=STEPS)
    expected = {*Reason, "replayed", "conflict", "ahead", "refused", "explain", "standing", "enroll", "reopen"}
    expected |= {*Remedy, "fits", "does not fit", "settle", "release", "extend", "expire", "holds", "decisions"}
    assert expected - set(seen) == set()


# -- stores that do not keep it


class Open(View):
    """The memory store's steps where nothing is held, one method each, so that each fault below is one method."""

    def _apply(self, charge, now, latest, kept_since, *, dry):
        request = charge.request
        account = self.account(charge)
        first = self.first(account, charge)
        if charge.step is not None or account.holds or (first is not None and first.correction is not None):
            return super()._apply(charge, now, latest, kept_since, dry=dry)
        if first is not None:
            return self.repeat(request, first)
        if latest is not None and request.at > latest:
            return self.refuse(account, charge, now)
        if charge.version != self.version(account):
            return Receipt(Status.OUTDATED, change=account.changes[-1] if account.changes else None)
        decision, after = self.decide(charge, self.tally(account, charge), kept_since)
        if not dry:
            self.keep(account, charge, now, decision, after)
        return Receipt(Status.DECIDED, decision)

    def account(self, charge):
        """What is known of the account."""
        return self._accounts.get((charge.terms.offer, charge.request.account)) or _Account()

    def first(self, account, charge):
        """The decision that the id has already."""
        return account.decisions.get(self.id_of(charge))

    def id_of(self, charge):
        """What tells one request from another."""
        return charge.request.id

    def repeat(self, request, first):
        """What a request asked again is answered."""
        return repeat(request, first)

    def refuse(self, _account, _charge, now):
        """What is said of a request ahead of the clock."""
        return Receipt(Status.AHEAD, now=now)

    def version(self, account):
        """The version of the latest change."""
        return account.version

    def tally(self, account, charge):
        """The tally of the window, or of the last one opened."""
        tallies = self.tallies_of(account, charge)
        if charge.window is None or not tallies:
            return None
        return tallies.get(next(reversed(tallies)) if charge.rolls else charge.window.start)

    def tallies_of(self, account, charge):
        """The tallies of the group."""
        return account.tallies.get((charge.terms.group, charge.terms.window), {})

    def decide(self, charge, tally, kept_since):
        """The rule."""
        return decide(charge, tally, kept_since=kept_since)

    def keep(self, account, charge, now, decision, after):
        """What is written."""
        self._accounts.setdefault((charge.terms.offer, charge.request.account), account)
        if after is not None:
            tallies = self.tallies_of(account, charge)
            tallies[after.window.start] = after
            account.tallies.setdefault((charge.terms.group, charge.terms.window), tallies)
        account.decisions[self.id_of(charge)] = decision
        self.write(now, decision)

    def write(self, now, decision):
        """The ledger's entry."""
        self._ledger.append((now, decision))


class OffByOne(Open):
    """What lands exactly on the allowance is billed."""

    def decide(self, charge, tally, kept_since):
        """Judge it as if there was one less to give away."""
        decision, after = super().decide(charge, tally, kept_since)
        if decision.reason is Reason.WITHIN_ALLOWANCE and decision.total == charge.terms.allowance and charge.amount:
            low = replace(charge, terms=replace(charge.terms, allowance=charge.terms.allowance - 1))
            decision, after = super().decide(low, tally, kept_since)
            decision = replace(decision, terms=charge.terms)
        return decision, after


class DedupLost(Open):
    """An id is forgotten with the view."""

    def first(self, account, charge):
        """Only what this view decided itself."""
        self.seen = getattr(self, "seen", set())
        return super().first(account, charge) if (id(account), charge.request.id) in self.seen else None

    def keep(self, account, charge, now, decision, after):
        """Remember it here."""
        super().keep(account, charge, now, decision, after)
        self.seen.add((id(account), charge.request.id))


class DedupByGroup(Open):
    """An id is unique in its group only."""

    def id_of(self, charge):
        """Group and id."""
        return charge.terms.group, charge.request.id


class DedupByWindow(Open):
    """An id is unique in its window only."""

    def id_of(self, charge):
        """Window and id."""
        return None if charge.window is None or charge.rolls else charge.window.start, charge.request.id


class CheckThenAct(Open):
    """Nobody holds the store between the check and the act."""

    def apply(self, charges, *, dry=False):
        """Without the lock."""
        now, bounds = self._clock(), self._bounds
        self._check_open()
        latest, kept_since = (None, None) if bounds is None else (now + bounds.ahead, now - bounds.keep)
        return [self._apply(charge, now, latest, kept_since, dry=dry) for charge in charges]

    def decide(self, charge, tally, kept_since):
        """Another thread has its turn, if there is one."""
        if threading.active_count() > 1:
            threading.Event().wait(TURN_S)
        return super().decide(charge, tally, kept_since)


class TalliesOfAView(Open):
    """Each view counts for itself, and a new one starts from nothing."""

    def tallies_of(self, account, charge):
        """The tallies of this view."""
        self.own = getattr(self, "own", {})
        return self.own.setdefault((id(account), charge.terms.group, charge.terms.window), {})


class StaleEnrollment(Open):
    """A view that saw an account's enrollment once takes it for the latest for ever."""

    def version(self, account):
        """What was seen first."""
        self.seen = getattr(self, "seen", {})
        return self.seen.setdefault(id(account), account.version) if account.version else 0


class TooLateIsFree(Open):
    """A request of a window that is no longer kept is judged in it."""

    def decide(self, charge, tally, _kept_since):
        """As if everything was kept."""
        return super().decide(charge, tally, None)


class TooLateOneTickLate(Open):
    """A window is kept a microsecond too long."""

    def decide(self, charge, tally, kept_since):
        """Seven days, inclusive."""
        later = None if kept_since is None else kept_since - timedelta(microseconds=1)
        return super().decide(charge, tally, later)


class SeqRepeated(Open):
    """A billed request has the seq of the one before it."""

    def decide(self, charge, tally, kept_since):
        """Count the free ones."""
        decision, after = super().decide(charge, tally, kept_since)
        if tally is not None and after is not None and decision.reason is Reason.OVER_ALLOWANCE:
            decision, after = replace(decision, seq=tally.seq), replace(after, seq=tally.seq)
        return decision, after


class BatchReordered(Open):
    """The small requests of a batch come first."""

    def apply(self, charges, *, dry=False):
        """By size, and the receipts back in their places."""
        order = sorted(range(len(charges)), key=lambda place: charges[place].amount)
        receipts = super().apply([charges[place] for place in order], dry=dry)
        return [receipts[order.index(place)] for place in range(len(charges))]


class AnswersReordered(Open):
    """The receipts of a batch are in the order of the accounts."""

    def apply(self, charges, *, dry=False):
        """Grouped, and not put back."""
        receipts = super().apply(charges, dry=dry)
        order = sorted(range(len(charges)), key=lambda place: charges[place].request.account)
        return [receipts[place] for place in order]


class DryRunWrites(Open):
    """An explained request is a decided one."""

    def _apply(self, charge, now, latest, kept_since, *, dry):
        return super()._apply(charge, now, latest, kept_since, dry=dry and charge.request.id.endswith("x"))


class RefusedIsKept(Open):
    """The id of a request that was refused is taken."""

    def refuse(self, account, charge, now):
        """Keep it as billed."""
        self.keep(account, charge, now, *self.decide(charge, None, now + timedelta(days=9_999)))
        return super().refuse(account, charge, now)


class CachedTokensIgnored(Open):
    """A request with other cached tokens is taken for the same."""

    def repeat(self, request, first):
        """Compare all but them."""
        same_cached = replace(request, cached_tokens=min(first.request.cached_tokens, request.input_tokens or 0))
        return repeat(same_cached, first)


class ConflictWins(Open):
    """Other content under an id replaces its decision."""

    def repeat(self, request, first):
        """Answer as before, but forget."""
        receipt = super().repeat(request, first)
        if receipt.status is Status.CONFLICT:
            del self._accounts[first.offer, request.account].decisions[request.id]
        return receipt


class NamesNormalized(Open):
    """Two ways to write one letter are one."""

    def id_of(self, charge):
        """As one would see it."""
        return unicodedata.normalize("NFC", charge.request.id)


class NamesCut(Open):
    """An id counts up to its 250th letter."""

    def id_of(self, charge):
        """Its beginning."""
        return charge.request.id[:250]


class RollingEndIsInside(Open):
    """A rolling window's end belongs to it."""

    def decide(self, charge, tally, kept_since):
        """Judge the end a microsecond earlier."""
        if charge.rolls and tally is not None and charge.request.at == tally.window.end:
            early = replace(charge, request=replace(charge.request, at=charge.request.at - timedelta(microseconds=1)))
            decision, after = super().decide(early, tally, kept_since)
            return replace(decision, request=charge.request), after
        return super().decide(charge, tally, kept_since)


class LateOpensAWindow(Open):
    """Where windows roll, a request from before the open one opens its own."""

    def tally(self, account, charge):
        """None for it."""
        tally = super().tally(account, charge)
        return None if charge.rolls and tally is not None and charge.request.at < tally.window.start else tally


class BilledOpensAWindow(Open):
    """Where windows roll, a billed request opens one, too."""

    def decide(self, charge, tally, kept_since):
        """Give it a window."""
        decision, after = super().decide(charge, tally, kept_since)
        if charge.rolls and decision.total is not None and decision.window is None:
            after = Tally(charge.window, 0, 1)
            decision = replace(decision, window=charge.window, seq=1)
        return decision, after


class TotalsAreDoubles(Open):
    """Totals are kept as numbers with a point."""

    def decide(self, charge, tally, kept_since):
        """Round."""
        decision, after = super().decide(charge, tally, kept_since)
        if after is None:
            return decision, after
        used = int(float(after.used))
        return replace(decision, used=used), replace(after, used=used)


class ExcessIsNotCounted(Open):
    """What is free of a request that does not fit is not added."""

    def decide(self, charge, tally, kept_since):
        """Only in the tally."""
        decision, after = super().decide(charge, tally, kept_since)
        if (
            tally is not None
            and after is not None
            and decision.reason is Reason.OVER_ALLOWANCE
            and (charge.terms.overage is Overage.EXCESS)
        ):
            after = replace(after, used=tally.used)
        return decision, after


class LedgerUnordered(Open):
    """Entries are written in the order of their requests' times."""

    def write(self, now, decision):
        """Before the last one, if it is older."""
        is_older = self._ledger and decision.at < self._ledger[-1][1].at
        self._ledger.insert(len(self._ledger) - 1 if is_older else len(self._ledger), (now, decision))


class EntryLost(Open):
    """A decision that belongs to no window is not in the ledger."""

    def write(self, now, decision):
        """Only what was judged."""
        if decision.window is not None:
            super().write(now, decision)


class EntriesSkipped(Open):
    """A reader that goes on from an entry misses the one behind it."""

    def entries(self, *, after=0, upto=None):
        """One too far."""
        return super().entries(after=after if isinstance(after, int) else after[0] + 1, upto=upto)


class AnyoneEnrolls(Open):
    """Nobody owns an enrollment."""

    def enroll(self, offer, account, enrollment, *, actor, revision):
        """In the name of an owner."""
        changes = self.enrollments(offer, account)
        owner = min(changes[-1].enrollment.owners) if changes else actor
        return super().enroll(offer, account, enrollment, actor=owner, revision=revision)


class ClosedGoesOn(Open):
    """A closed store decides."""

    def close(self):
        """Nothing."""


# Faults in what is held and corrected: what the memory store is made of, and what stands there instead.
def _ran_out(self, now, *, but):
    """What ran out of time."""
    over = [hold for hold in self.holds.values() if hold.until <= now and hold.id != but]
    return tuple(sorted(over, key=lambda hold: (hold.until, hold.id)))


def _spared(charge, tally, **options):
    """Judge, but give nothing back."""
    if isinstance(charge.step, Correction):
        charge = replace(charge, step=replace(charge.step, returned=0))
    return decide(charge, tally, **options)


def _unpinned(account, charge):
    """The window that is open, whichever admitted the hold."""
    return _tally(account, replace(charge, step=None))


def _kept_aside(self, hold):
    """Set a hold aside even if it does not fit."""
    _KEEP(self, replace(hold, reason=Reason.WITHIN_ALLOWANCE))


def _known_held(charge, hold):
    """The hold, whatever was asked."""
    return Receipt(Status.HELD, hold=replace(hold, replayed=True)) if charge.step else held_again(charge, hold)


def _bound_forgotten(charge, tally, **options):
    """Decide what ran out as if it was measured."""
    decision, after = decide(charge, tally, **options)
    if decision.hold is not None:
        decision = replace(decision, hold=replace(decision.hold, is_unmeasured=False))
    return decision, after


_KEEP = _Account.keep
HOLD_FAULTS = {
    "holds are not counted": (store_in_memory, "_held", lambda *_: 0),
    "holds of all windows count": (store_in_memory, "_held", lambda account, *_: sum(account.held.values())),
    "holds count twice": (store_in_memory, "_held", lambda *args: 2 * _held(*args)),
    "what does not fit is set aside": (_Account, "keep", _kept_aside),
    "nothing runs out": (_Account, "ran_out", lambda *_, **__: ()),
    "a microsecond late": (
        _Account,
        "ran_out",
        lambda self, now, *, but: _ran_out(self, now - timedelta(microseconds=1), but=but),
    ),
    "its own hold runs out, too": (
        _Account,
        "ran_out",
        lambda self, now, *, but: _ran_out(self, now, but=but and None),
    ),
    "the last runs out first": (_Account, "ran_out", lambda self, now, *, but: _ran_out(self, now, but=but)[::-1]),
    "settled in the open window": (store_in_memory, "_tally", _unpinned),
    "any hold is the same": (store_in_memory, "held_again", _known_held),
    "a bound is a measure": (store_in_memory, "decide", _bound_forgotten),
    "nothing is given back": (store_in_memory, "decide", _spared),
    "everybody is first to claim": (MemoryStore, "claim", lambda *_, **__: True),
    "nobody is first to claim": (MemoryStore, "claim", lambda *_, **__: False),
    "nothing is extended": (
        MemoryStore,
        "extend",
        lambda self, offer, account, name, *, until: self._accounts[offer, account].holds.get(name),
    ),
    "nothing is released": (
        MemoryStore,
        "release",
        lambda self, offer, account, name: self._accounts[offer, account].holds.get(name),
    ),
    "corrections are not counted": (MemoryStore, "corrections", lambda *_: 0),
    "holds are told in any order": (
        MemoryStore,
        "holds",
        lambda self, *key: list(self._accounts[key].holds.values()) if key in self._accounts else [],
    ),
}
FAULTY = Open.__subclasses__()
# What a random program does not come across: threads, closing, and names and totals that are rare.
BY_CLAUSES = {CheckThenAct, ClosedGoesOn, NamesNormalized, NamesCut, TotalsAreDoubles}


def findings(kind):
    """The clauses that a store does not keep."""
    for name, clause in StoreContract.clauses():
        with memory(kind) as opened:
            try:
                clause(opened)
            except Exception:  # noqa: BLE001 - whatever a fault leads to
                yield name


def test_without_a_fault_nothing_is_found():
    """The store in which the faults are planted keeps every clause, and answers a program as the rule does."""
    assert list(findings(Open)) == []
    with memory(Open) as opened:
        drive(opened, seed=1, steps=STEPS)


@pytest.mark.parametrize("kind", FAULTY, ids=lambda kind: kind.__name__)
def test_a_clause_finds_each_fault(kind):
    """A store with a fault fails a clause."""
    assert next(findings(kind), None) is not None


@pytest.mark.parametrize("fault", HOLD_FAULTS)
def test_a_clause_finds_each_fault_of_holds(monkeypatch, fault):
    """A store with a fault in what it holds or corrects fails a clause."""
    monkeypatch.setattr(*HOLD_FAULTS[fault])
    assert next(findings(View), None) is not None


@pytest.mark.parametrize("kind", [kind for kind in FAULTY if kind not in BY_CLAUSES], ids=lambda kind: kind.__name__)
def test_a_program_finds_most_faults(kind):
    """A store with a fault answers a random program otherwise than the rule; seed, step and both answers are told."""

    def run():
        for seed in range(FAULTY_PROGRAMS):
            with memory(kind) as opened:
                drive(opened, seed=seed, steps=STEPS)

    with pytest.raises(AssertionError, match=r"^seed \d+, step \d+, .*\n  asked: .*\n  found: .*\n  expected: "):
        run()
