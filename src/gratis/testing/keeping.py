"""What a store keeps: the ledger, tallies that follow from it, the accounts, and what a view is."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from gratis.errors import Conflict, EnrollmentError, RequestError, StoreError
from gratis.model import TOKENS_MAX, Decision, Durability, Kind
from gratis.stores import Bounds, behind
from gratis.testing.compare import BEGINNING, fold, follows, kept, ledger, refused, rows_of, same, tallies
from gratis.testing.scene import (
    DAY,
    ENROLLED,
    FULL,
    HOUR,
    LARGE,
    NOON,
    SMALL,
    TICK,
    Opener,
    Views,
    asked,
    in_threads,
    small_offer,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from gratis.stores import Cursor

ACCOUNTS = ("acme", "other", "a}{b")
MANY = 2_300  # more than two pages of any reader
WRITERS = 4
WRITTEN_EACH = 20


class Keeping:
    """Clauses about what is kept."""

    def test_the_ledger_says_what_was_answered(self, open_store: Opener, window: str, reading: tuple[str, str]) -> None:
        """Each account's entries are its decisions as they were answered, in their order, with their times."""
        with Views(open_store) as views:
            meter = views.meter(small_offer(window, reading=reading))
            expected: dict[str, list[object]] = {account: [] for account in ACCOUNTS}
            for number in range(45):
                views.clock.now += HOUR
                account = ACCOUNTS[number * 7 % 3]
                model = (LARGE, SMALL, "unlisted")[number % 3]
                at = views.clock.now - number % 4 * 5 * HOUR
                decision = meter.decide(asked(number, 60 + number * 9, account=account, model=model, at=at))
                expected[account].append((views.clock.now, decision))
            for view in (0, 1):
                entries, _ = ledger(views.store(view))
                for account in ACCOUNTS:
                    found = entries["small-offer", account]
                    same([(entry.decided_at, entry.decision) for entry in found], expected[account], account)
                    numbers = [entry.entry for entry in found]
                    same(numbers, sorted(set(numbers)), "numbers")

    def test_every_field_is_kept(self, open_store: Opener) -> None:
        """A request of any kind, and the enrollment that it rests on, are read back just as they were."""
        offer = small_offer()
        several = ("function", "a}{b", "\u05d0", "'\"\\", *(f"tool {number}" for number in range(60)))
        requests = [
            *(asked(kind.value, 5, kind=kind) for kind in Kind),
            *(asked(f"{size}", 5, tools=several[:size]) for size in (1, 2, 3, 64)),
            *(asked(f"cached {size}", 5, cached_tokens=size) for size in (1, 5)),
            asked("no output of its own", 5, kind="embedding", output_tokens=None),
            asked("no input", None, output_tokens=7),
            asked("no output", 7, output_tokens=None),
            asked("project", 5, project="p"),
            asked("largest", TOKENS_MAX, cached_tokens=TOKENS_MAX),
            asked("to the microsecond", 5, at=NOON + TICK),
        ]
        with Views(open_store) as views:
            meter = views.meter(offer, assume=None)
            meter.enroll("acme", FULL, actor="ann")
            answers = [meter.decide(request) for request in requests]
            same([answer.request for answer in answers], requests, "requests")
            same([answer.terms.enrollment for answer in answers], [FULL] * len(requests), "enrollments")
            entries, _ = ledger(views.store(1))
            same([entry.decision for entry in entries["small-offer", "acme"]], answers, "ledger")

    def test_the_ledger_keeps_the_order_of_a_batch(self, open_store: Opener) -> None:
        """A batch's decisions stand in its order, each account's for itself."""
        with Views(open_store) as views:
            batch = [asked(number, number % 9, account=ACCOUNTS[number % 3]) for number in range(90)]
            answers = views.meter().decide_many(batch)
            entries, _ = ledger(views.store(1))
            for place, account in enumerate(ACCOUNTS):
                found = [entry.decision for entry in entries["small-offer", account]]
                same(found, answers[place::3], account)

    def test_only_a_new_decision_is_an_entry(self, open_store: Opener) -> None:
        """Repeats, conflicts, refusals, explanations and standings leave the ledger as it was."""
        with Views(open_store, bounds=Bounds()) as views:
            meter = views.meter()
            meter.decide(asked(1))
            before = kept(views.store())
            meter.decide(asked(1))
            meter.decide_many([asked(1), asked(1, 11), asked(2, at=NOON + HOUR)])
            refused(Conflict, meter.decide, asked(1, 12))
            meter.explain(asked(3))
            meter.standing("acme")
            meter.standing("nobody")
            same(kept(views.store()), before, "what is kept")

    def test_the_ledger_is_resumed_behind_any_entry(self, open_store: Opener) -> None:
        """Behind any entry the ledger goes on with just what is left, and up to it is what was before, over pages."""
        with Views(open_store) as views:
            requests = [asked(number, 1, account=ACCOUNTS[number * 5 % 3]) for number in range(MANY)]
            views.meter().decide_many(requests)
            store = views.store(1)
            whole = list(store.entries(after=BEGINNING))
            same(len(whole), MANY, "entries")
            cursor: Cursor = BEGINNING
            stops = {1, 2, 3, MANY // 2, MANY - 1, MANY}
            for place, entry in enumerate(whole, start=1):
                cursor = behind(cursor, entry, shards=store.shards)
                if place in stops:
                    same(list(store.entries(after=cursor)), whole[place:], f"behind place {place}")
                    same(list(store.entries(upto=cursor)), whole[:place], f"up to place {place}")
            same(list(store.entries(after=cursor)), [], "behind the last")
            views.meter().decide(asked("more"))
            same([entry.decision.id for entry in store.entries(after=cursor)], ["rmore"], "what came later")

    def test_who_follows_the_ledger_misses_nothing(self, open_store: Opener) -> None:
        """A reader that goes on from where it was, while others decide, sees each decision once, in order."""
        with Views(open_store) as views:
            store, seen = views.store(2), list[Decision]()

            def look(cursor: Cursor) -> Cursor:
                for entry in store.entries(after=cursor):
                    cursor = behind(cursor, entry, shards=store.shards)
                    seen.append(entry.decision)
                return cursor

            answers = _while_others_decide(views, look)
            for account in ACCOUNTS:
                decided = sorted((one for one in answers if one.account == account), key=lambda one: one.seq or 0)
                same([decision for decision in seen if decision.account == account], decided, account)

    def test_counters_are_of_one_moment(self, open_store: Opener) -> None:
        """Asked while others decide, an account's counters are what its entries make, up to the last one then."""
        with Views(open_store) as views:
            store, looked = views.store(2), dict[tuple[str, int, int], list[Any]]()

            def look(_: Cursor) -> Cursor:
                for account in ACCOUNTS:
                    shard, last, rows = store.counters("small-offer", account)
                    looked[account, shard, last] = sorted(rows, key=lambda row: (row[0], row[1], row[2].window.start))
                return BEGINNING

            _while_others_decide(views, look)
            entries, _ = ledger(views.store())
            for (account, shard, last), rows in looked.items():
                found = entries["small-offer", account]
                same({entry.shard for entry in found}, {shard}, f"the shard of {account!r}")
                then = [entry.decision for entry in found if entry.entry <= last]
                same(rows, rows_of(fold(then)), f"counters of {account!r} at entry {last} of shard {shard}")

    def test_tallies_follow_from_the_ledger(self, open_store: Opener, window: str, reading: tuple[str, str]) -> None:
        """Each window's tally is what the rule makes of its entries, and no other tally is kept."""
        with Views(open_store) as views:
            offer = small_offer(window, reading=reading)
            meter = views.meter(offer)
            for number in range(80):
                views.clock.now += 7 * HOUR
                model = (LARGE, SMALL, "unlisted", "large-2")[number % 4]
                at = views.clock.now - number % 5 * 11 * HOUR
                meter.decide(asked(number, number * 37 % 700, account=ACCOUNTS[number % 3], model=model, at=at))
            follows(views.store(1), [offer.name])

    def test_tallies_of_an_instant(self, open_store: Opener) -> None:
        """Asked for an instant, a store tells the tallies of the windows that take a request of then."""
        with Views(open_store) as views:
            store = views.store()
            for window in ("day", "rolling"):
                meter = views.meter(small_offer(window, name=window))
                for days in (0, 1, 2):
                    meter.decide(asked(days, 1 + days, at=NOON + days * DAY))
                whole = tallies(store, window, "acme")
                same([tally.used for _, _, tally in whole], [1, 2, 3], "used")
                for at in (NOON - DAY, NOON, NOON + DAY - TICK, NOON + DAY, NOON + 3 * DAY):
                    expected = [
                        row
                        for row in whole
                        if at < row[2].window.end and (window == "rolling" or row[2].window.start <= at)
                    ]
                    same(tallies(store, window, "acme", at=at), expected, f"{window} at {at}")
            same(store.tallies("day", "nobody"), [], "tallies of an unknown account")

    def test_standing_is_what_was_used(self, open_store: Opener, window: str) -> None:
        """What an account has left of each group is the same in every view, now and at another time."""
        with Views(open_store) as views:
            views.meter(small_offer(window)).decide_many([asked(1, 300), asked(2, 800), asked(3, 5, model=SMALL)])
            for view in (0, 1):
                meter = views.meter(small_offer(window), view=view)
                found = meter.standing("acme")
                shown = [(one.group, one.used, one.remaining, one.window is not None) for one in found]
                same(shown, [("large", 300, 700, True), ("small", 5, 995, True)], "standing")
                later = meter.standing("acme", at=NOON + 60 * DAY)
                same([(one.used, one.remaining) for one in later], [(0, 1_000)] * 2, "standing later")

    def test_accounts_are_those_that_were_decided_or_enrolled(self, open_store: Opener) -> None:
        """A store knows an account from its first decision or enrollment on; a question or a refusal makes none."""
        with Views(open_store, bounds=Bounds()) as views:
            meter = views.meter()
            meter.explain(asked(1, account="asked"))
            meter.standing("looked at")
            refused(RequestError, meter.decide, asked(1, account="ahead", at=NOON + HOUR))
            refused(EnrollmentError, meter.enroll, "refused", ENROLLED, actor="")
            same(set(views.store().accounts()), set(), "accounts")
            meter.decide(asked(1, account="decided"))
            meter.decide(asked(1, account="billed", model="unlisted"))
            meter.enroll("enrolled", ENROLLED, actor="ann")
            views.meter(small_offer(name="two")).decide(asked(1, account="decided"))
            expected = {("small-offer", name) for name in ("decided", "billed", "enrolled")} | {("two", "decided")}
            for view in (0, 1):
                found = list(views.store(view).accounts())
                same((set(found), len(found)), (expected, len(expected)), "accounts")

    def test_a_new_view_sees_all_that_was_kept(self, open_store: Opener) -> None:
        """A view opened later, after another was closed, goes on where that one was: totals, ids, enrollments."""
        with Views(open_store) as views:
            views.store(1)  # somebody stays, so that a store that lives only while it is open lives on
            meter = views.meter(assume=None)
            meter.enroll("acme", ENROLLED, actor="ann")
            first = meter.decide(asked(1, 700))
            before = kept(views.store())
            views.store().close()
            later = views.meter(view=2, assume=None)
            same(kept(views.store(2)), before, "what is kept")
            same(later.decide(asked(1, 700)), replace(first, replayed=True), "a repeat")
            found = [later.decide(asked(2, 301)), later.decide(asked(3, 300))]
            verdicts = [(one.is_free, one.used, one.seq) for one in (first, *found)]
            same(verdicts, [(True, 700, 1), (False, 700, 2), (True, 1_000, 3)], "decisions")
            same(views.meter(view=1, assume=None).decide(asked(4, 1)).seq, 4, "seq in the view that stayed")

    def test_a_closed_store_refuses(self, open_store: Opener) -> None:
        """What is closed decides nothing and enrolls nobody, and may be closed again; other views go on."""
        with Views(open_store) as views:
            meter, other = views.meter(), views.meter(view=1)
            meter.decide(asked(1))
            before = kept(views.store(1))
            meter.close()
            meter.close()
            for ask in (meter.decide, meter.explain):
                refused(StoreError, ask, asked(2))
            refused(StoreError, meter.decide, asked(1))
            refused(StoreError, meter.decide_many, [asked(2), asked(3)])
            refused(StoreError, meter.enroll, "acme", ENROLLED, actor="ann")
            same(kept(views.store(1)), before, "what is kept")
            same(other.decide(asked(2)).seq, 2, "seq in another view")

    def test_answers_say_what_they_rest_on(self, open_store: Opener) -> None:
        """Each decision has the durability that its store claims, and so have its repeat and its entry."""
        with Views(open_store) as views:
            store = views.store()
            same(type(store.durability), Durability, "the kind of durability")
            found = [views.meter().decide(asked(1)) for _ in range(2)]
            entries, _ = ledger(store)
            found += [entry.decision for entry in entries["small-offer", "acme"]]
            same([decision.durability for decision in found], [store.durability] * 3, "durability")

    def test_the_stores_clock_is_the_one_that_was_given(self, open_store: Opener) -> None:
        """A store tells the time of its clock, to the microsecond."""
        with Views(open_store) as views:
            for _ in range(3):
                views.clock.now += HOUR + TICK
                same(views.store().now(), views.clock.now, "the time")
            views.meter().decide(asked(1))
            (entry,) = views.store().entries(after=BEGINNING)
            same((entry.decided_at, entry.decision.id), (views.clock.now, "r1"), "the entry")


def _while_others_decide(views: Views, look: Callable[[Cursor], Cursor]) -> list[Decision]:
    """What threads over two views were answered, while another looked again and again, at last when all was over."""
    meters = [views.meter(view=view) for view in (0, 1)]
    ended: list[int] = []

    def write(caller: int) -> list[object]:
        try:
            asking = enumerate(ACCOUNTS * WRITTEN_EACH)
            return [meters[caller % 2].decide(asked(f"{caller} {n}", 1, account=account)) for n, account in asking]
        finally:
            ended.append(caller)

    def keep_looking() -> list[object]:
        cursor: Cursor = BEGINNING
        is_last = False
        while not is_last:
            is_last = len(ended) == WRITERS
            cursor = look(cursor)
        return []

    return in_threads([*[partial(write, caller) for caller in range(WRITERS)], keep_looking])
