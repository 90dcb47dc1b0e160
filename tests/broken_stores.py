"""Stores that break a promise, each in one way: what a check that drives a live store must catch.

Each is the memory store but for one fault. Views on a space share what is kept, and each view is numbered.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext, suppress
from zlib import crc32
from zoneinfo import ZoneInfo

from msgspec.structs import replace

from gratis.model import Counts
from gratis.rule import Holding, Tally, decide
from gratis.stores import memory
from gratis.stores.memory import MemoryStore
from gratis.testing.scene import DAY, HOUR

MEET_S = 0.003
PATCHING = threading.RLock()


class Kept(MemoryStore):
    """A view on what a space keeps; closing it closes no other."""

    view = 0

    def close(self):
        """It goes with its space."""

    def join(self, other):
        """Share what another view keeps."""
        for name in ("_lock", "_accounts", "_ledger"):
            setattr(self, name, getattr(other, name))


class Judged(Kept):
    """A store that judges charges by a rule of its own."""

    def apply(self, charges, *, dry=False):
        """Judge by `judge`."""
        with PATCHING, patched(memory, "decide", self.judge):
            return super().apply(charges, dry=dry)

    def judge(self, charge, tally, **options):
        """The pure rule."""
        return decide(charge, tally, **options)


@contextmanager
def patched(module, name, value):
    """A module's name means something else meanwhile."""
    usual = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, usual)


def kinds_of_spaces(kind):
    """Opens spaces of stores of this kind."""
    spaces = {}

    def open_store(space, *, clock, bounds):
        views = spaces.setdefault(space, [])
        store = kind(clock=clock, bounds=bounds)
        store.view = len(views)
        if views:
            store.join(views[0])
        views.append(store)
        return store

    return open_store


class Sound(Judged):
    """No fault at all."""


class CheckThenAct(Kept):
    """It reads, decides, and writes, and others may come between: two threads that meet there do."""

    def __init__(self, **options):
        super().__init__(**options)
        self._lock = nullcontext()
        self._gap = threading.Barrier(2)

    def join(self, other):
        """Share also what this fault keeps."""
        super().join(other)
        self._gap = other._gap

    def _write(self, account, decision, after, now):
        if threading.current_thread() is not threading.main_thread():
            try:
                self._gap.wait(MEET_S)
            except threading.BrokenBarrierError:
                with suppress(threading.BrokenBarrierError):
                    self._gap.reset()
        super()._write(account, decision, after, now)


class OffByOne(Judged):
    """Landing exactly on the allowance is billed: `<` for `<=`."""

    def judge(self, charge, tally, **options):
        """Judge as this fault does."""
        terms = replace(charge.terms, allowance=charge.terms.allowance - 1)
        used = 0 if tally is None else tally.used
        if charge.amount != charge.terms.allowance - used:
            return decide(charge, tally, **options)
        decision, after = decide(replace(charge, terms=terms), tally, **options)
        return replace(decision, terms=charge.terms), after


class Forgetful(Kept):
    """Ids are forgotten, where `forgets` says so."""

    def _apply(self, charge, now, *bounds, dry):
        account = self._accounts.get((charge.terms.offer, charge.request.account))
        first = account and account.decisions.get(charge.request.id)
        if first and self.forgets(first, now):
            del account.decisions[charge.request.id]
        return super()._apply(charge, now, *bounds, dry=dry)


class DedupLost(Forgetful):
    """No id is remembered."""

    def forgets(self, first, now):
        """Whether this id is forgotten by now."""
        return True


class DedupLostSometimes(Forgetful):
    """One id in fifty is not remembered."""

    def forgets(self, first, now):
        """Whether this id is forgotten by now."""
        return crc32(first.id.encode()) % 50 == 0


class DedupLostAfterItsWindow(Forgetful):
    """An id is forgotten as soon as its window ends."""

    def forgets(self, first, now):
        """Whether this id is forgotten by now."""
        return first.window is not None and first.window.end <= now


class ForgetsTooEarly(Forgetful):
    """An id is forgotten a day after its window, and not when that is no longer kept."""

    def forgets(self, first, now):
        """Whether this id is forgotten by now."""
        return first.window is not None and first.window.end + DAY <= now


class CounterSurvives(Judged):
    """A new day's counter goes on where the last one's ended: it had to run out of time, and did not."""

    def judge(self, charge, tally, **options):
        """Judge as this fault does."""
        terms = charge.terms
        if tally is None and charge.window is not None and not charge.rolls:
            account = self._accounts.get((terms.offer, charge.request.account))
            found = account.tallies.get((terms.group, terms.window)) if account else None
            if found:
                tally = Tally(charge.window, found[max(found)].used, 0)
        return decide(charge, tally, **options)


class LocalMidnight(Judged):
    """Days are told by a clock elsewhere than in Greenwich; what is said of the window is as it should be."""

    def judge(self, charge, tally, **options):
        """Judge as this fault does."""
        if charge.window is None or charge.rolls or charge.terms.reason is not None:
            return decide(charge, tally, **options)
        zone = ZoneInfo("America/Los_Angeles")
        key = (charge.request.account, charge.terms.group, charge.request.at.astimezone(zone).date())
        known = self.days.get(key)
        if known is not None:
            tally = Tally(charge.window, known.used, 0 if tally is None else tally.seq)
        decision, after = decide(charge, tally, **options)
        if after is not None:
            self.days[key] = after
        return decision, after

    def __init__(self, **options):
        super().__init__(**options)
        self.days = {}

    def join(self, other):
        """Share also what this fault keeps."""
        super().join(other)
        self.days = other.days


class ChangedTokensAccepted(Kept):
    """A retry with other tokens is told the first decision."""

    def _apply(self, charge, now, *bounds, dry):
        account = self._accounts.get((charge.terms.offer, charge.request.account))
        first = account and account.decisions.get(charge.request.id)
        if first:
            same = {name: getattr(first.request, name) for name in ("input_tokens", "output_tokens", "cached_tokens")}
            charge = replace(charge, request=replace(charge.request, **same))
        return super()._apply(charge, now, *bounds, dry=dry)


class BilledCounts(Judged):
    """What is billed adds to what is used, though only free tokens count."""

    def judge(self, charge, tally, **options):
        """Judge as this fault does."""
        decision, after = decide(replace(charge, terms=replace(charge.terms, counts=Counts.ALL)), tally, **options)
        return replace(decision, terms=charge.terms), after


class LosesEntries(Kept):
    """Every tenth decision is missing in the ledger."""

    def _write(self, account, decision, after, now):
        super()._write(account, decision, after, now)
        self.__dict__["count"] = self.__dict__.get("count", 0) + 1
        if self.__dict__["count"] % 10 == 0:
            del self._ledger[-1]


class ForgetsLinks(Kept):
    """The chain of a window begins anew at every tenth entry."""

    def _chain(self, upto):
        for place in range(len(self._links), upto):
            if place % 10 == 9:
                self._ends.clear()
            super()._chain(place + 1)


class LateIsToday(Kept):
    """A late request is judged in the window that is open now."""

    def _apply(self, charge, now, *bounds, dry):
        window = charge.window
        if window is not None and not charge.rolls and window.end <= now:
            days = (now - window.start) // DAY
            charge = replace(charge, window=type(window)(window.start + days * DAY, window.end + days * DAY))
        return super()._apply(charge, now, *bounds, dry=dry)


class SeenLate(Kept):
    """Every view but the first takes the last enrollment but one for the latest."""

    def _apply(self, charge, now, *bounds, dry):
        account = self._accounts.get((charge.terms.offer, charge.request.account))
        if self.view and account is not None and charge.version == account.version - 1 > 0:
            charge = replace(charge, version=account.version)
        return super()._apply(charge, now, *bounds, dry=dry)


class HoldsIgnored(Kept):
    """What is set aside is forgotten when the next hold is asked for."""

    def _apply(self, charge, now, *bounds, dry):
        account = self._accounts.get((charge.terms.offer, charge.request.account))
        if type(charge.step) is Holding and account is not None:
            account.held.clear()
        return super()._apply(charge, now, *bounds, dry=dry)


class AnswersSwapped(Kept):
    """The answers to the first two of a batch change places, where both are of one account."""

    def apply(self, charges, *, dry=False):
        """Answer as this fault does."""
        receipts = super().apply(charges, dry=dry)
        if len(charges) > 1 and charges[0].request.account == charges[1].request.account:
            receipts[:2] = receipts[1::-1]
        return receipts


class WindowsDropped(Kept):
    """The counter of a day is dropped an hour after its end, though late requests are to be judged by it."""

    def _apply(self, charge, now, *bounds, dry):
        for account in self._accounts.values():
            for found in account.tallies.values():
                for start in [start for start, one in found.items() if one.window.end + HOUR <= now]:
                    del found[start]
        return super()._apply(charge, now, *bounds, dry=dry)


class TalliesTold(Kept):
    """What is told of a window is not what is kept of it."""

    def tallies(self, offer, account, *, at=None):
        """One token more than was used."""
        found = super().tallies(offer, account, at=at)
        return [(group, kind, replace(tally, used=tally.used + 1)) for group, kind, tally in found]


class CountersTold(Kept):
    """The counters that an audit reads are not what is kept."""

    def counters(self, offer, account):
        """None of the windows."""
        shard, last, _ = super().counters(offer, account)
        return shard, last, []


class ChangesLost(Kept):
    """A history of enrollments has lost its beginning."""

    def enrollments(self, offer, account):
        """All changes but the first."""
        return super().enrollments(offer, account)[1:]


class AccountsLost(Kept):
    """An account is not told of."""

    def accounts(self):
        """All accounts but one."""
        return super().accounts()[1:]


class TimesLost(Kept):
    """The ledger says that everything was decided at noon."""

    def entries(self, **places):
        """Entries of another time."""
        for entry in super().entries(**places):
            yield replace(entry, decided_at=entry.decided_at.replace(hour=12))


class NumbersRepeat(Kept):
    """Entries of the ledger have one and the same number."""

    def entries(self, **places):
        """Entries without numbers of their own."""
        for entry in super().entries(**places):
            yield replace(entry, entry=1)
