"""What a hold is: tokens set aside beside what is used, which change no verdict, until it is settled or released."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

from msgspec.structs import replace

from gratis.errors import Conflict, RequestError
from gratis.model import TOKENS_MAX, Enrollment, Expiry, Reason, Sharing
from gratis.stores import CONFLICT_FIELDS, Bounds
from gratis.testing.compare import everything, follows, ledger, nameless, refused, same, singly, told
from gratis.testing.repeating import HOSTILE
from gratis.testing.scene import (
    ALLOWANCE,
    DAY,
    ENROLLED,
    HOUR,
    LARGE,
    NOON,
    SMALL,
    TICK,
    Opener,
    Views,
    asked,
    small_offer,
    spent,
)

if TYPE_CHECKING:
    from gratis.book import Standing

LOW = Enrollment(tier=1, sharing=Sharing.ENABLED)
# Of 1,000 tokens of which 500 are used, 400 are held and so many then spent: what is free, and used in the end.
SETTLED = {
    ("free", "whole"): {400: (400, 900), 100: (100, 600), 500: (500, 1_000), 501: (0, 500), 0: (0, 500)},
    ("free", "excess"): {400: (400, 900), 100: (100, 600), 500: (500, 1_000), 501: (500, 1_000), 0: (0, 500)},
    ("all", "whole"): {400: (400, 900), 100: (100, 600), 500: (500, 1_000), 501: (0, 1_001), 0: (0, 500)},
    ("all", "excess"): {400: (400, 900), 100: (100, 600), 500: (500, 1_000), 501: (500, 1_001), 0: (0, 500)},
}
RICH: dict[str, Any] = {"project": "p", "kind": "assistants", "tools": ("function",)}
OTHER: dict[str, Any] = {
    "model": "large-2",
    "at": NOON + TICK,
    "project": "q",
    "kind": "completion",
    "tools": ("custom",),
}
EXCLUDED: dict[str, dict[str, Any]] = {
    "model_not_listed": {"model": "large"},
    "fine_tuning_training": {"kind": "fine_tuning_training"},
    "tool_use": {"tools": ("web_search",)},
}


class Holding:
    """Clauses about holds."""

    def test_a_hold_fits_beside_what_is_used_and_held(self, open_store: Opener, window: str) -> None:
        """A hold fits if its bound is at most the allowance less what is used and held; else it says by how much."""
        with Views(open_store) as views:
            meter = views.meter(small_offer(window))
            first = meter.decide(asked("first", 300))
            found = [meter.hold(asked(size, None), size) for size in (400, 301, 300, 1, 0)]
            says = [(one.fits, one.aside, one.short, one.used, one.held, one.reason.value) for one in found]
            same(
                says,
                [
                    (True, 400, 0, 300, 0, "within_allowance"),
                    (False, 0, 1, 300, 400, "over_allowance"),
                    (True, 300, 0, 300, 400, "within_allowance"),
                    (False, 0, 1, 300, 700, "over_allowance"),
                    (True, 0, 0, 300, 700, "within_allowance"),
                ],
                "holds",
            )
            same([hold.window for hold in found], [first.window] * 5, "windows")
            same(_shown(meter.standing("acme")), {"large": (300, 700, 700, 0), "small": (0, 0, 1_000, 1_000)}, "")

    def test_a_hold_of_the_whole_allowance_fits_and_one_more_does_not(self, open_store: Opener, window: str) -> None:
        """Landing exactly on the allowance fits, in a window that nobody used before."""
        with Views(open_store) as views:
            meter = views.meter(small_offer(window))
            for size, fits, short in (
                (ALLOWANCE, True, 0),
                (ALLOWANCE + 1, False, 1),
                (TOKENS_MAX, False, 10**12 - 1_000),
            ):
                hold = meter.hold(asked(size, None, account=f"a{size}"), size)
                same((hold.fits, hold.short, hold.tokens_max), (fits, short, size), str(size))

    def test_holds_are_in_the_unit_of_the_group(self, open_store: Opener, unit: str) -> None:
        """Where a group counts requests or runs, a hold of any bound sets one of them aside."""
        allowance = ALLOWANCE if unit == "tokens" else 2
        with Views(open_store) as views:
            meter = views.meter(small_offer(unit=unit, allowance=allowance))
            holds = [meter.hold(asked(number, None), 500) for number in range(3)]
            amount = 500 if unit == "tokens" else 1
            same(
                [(one.fits, one.aside, one.held) for one in holds],
                [(True, amount, 0), (True, amount, amount), (False, 0, 2 * amount)],
            )
            found = [meter.settle(hold, spent(450)) for hold in holds]
            same([one.used for one in found[:2]], [450, 900] if unit == "tokens" else [1, 2], "used")
            same((found[2].is_free, meter.holds("acme")), (False, []), "the third")

    def test_holds_change_no_verdict(self, open_store: Opener, window: str, reading: tuple[str, str]) -> None:
        """A request is free or billed by what is used alone, however much is held."""
        with Views(open_store) as views:
            meter = views.meter(small_offer(window, reading=reading))
            hold = meter.hold(asked("held", None), ALLOWANCE)
            decision = meter.decide(asked("other", ALLOWANCE))
            same(told([decision]), [("within_allowance", 1_000, 1_000, 1_000, 1)], "the other")
            same(_shown(meter.standing("acme"))["large"], (1_000, 1_000, 0, 0), "standing")
            settled = meter.settle(hold, spent(1))
            same((settled.is_free, settled.free_tokens, settled.total), (False, 0, 1_001), "the held one")
            same(_shown(meter.standing("acme"))["large"][1], 0, "held")

    def test_a_settle_is_judged_by_what_was_spent(
        self, open_store: Opener, window: str, reading: tuple[str, str]
    ) -> None:
        """As much as was held, less, more that fits, and more that does not: the rule, over what is used alone."""
        with Views(open_store) as views:
            meter, other = (views.meter(small_offer(window, reading=reading), view=view) for view in (0, 1))
            for size, (free, used) in SETTLED[reading].items():
                account = f"spends {size}"
                meter.decide(asked("first", 500, account=account))
                hold = meter.hold(asked("held", None, account=account), 400)
                meter.hold(asked("by another", None, account=account), 100)
                decision = other.settle(hold, spent(size))
                found = (decision.free_tokens, decision.used, decision.total, decision.seq, decision.tokens)
                same(found, (free, used, 500 + size, 2, size), account)
                same((decision.is_unmeasured, decision.correction), (False, None), "marks")
                said = (decision.hold and decision.hold.tokens_max, decision.hold and decision.hold.window)
                same(said, (400, hold.window), "the hold that it ends")
                same([one.id for one in meter.holds(account)], ["rby another"], "what is still held")
                same(meter.settle(hold, spent(size)), replace(decision, replayed=True), "settled again")
                refused(Conflict, meter.settle, hold, spent(size + 1))
            follows(views.store(), ["small-offer"])

    def test_a_held_request_may_just_be_decided(self, open_store: Opener) -> None:
        """To decide a held id is to settle it: only its time must be the same, and its hold is then over."""
        with Views(open_store) as views:
            meter = views.meter()
            hold = meter.hold(asked(1, None), 900)
            before = everything(views.store())
            conflict = refused(Conflict, meter.decide, asked(1, 20, at=NOON + TICK))
            same((conflict.field, conflict.first, conflict.hold), ("at", None, hold), "the conflict")
            same(everything(views.store()), before, "what is kept")
            decision = meter.decide(asked(1, 20, model=SMALL, project="p", tools=("function",), kind="assistants"))
            same((decision.group, decision.used, decision.is_free), ("small", 20, True), "the decision")
            same((meter.holds("acme"), _shown(meter.standing("acme"))["large"][1]), ([], 0), "what is held")

    def test_what_does_not_fit_is_remembered(self, open_store: Opener, window: str) -> None:
        """A hold that does not fit, or that no allowance covers, sets nothing aside, and is settled as others are."""
        with Views(open_store) as views:
            meter = views.meter(small_offer(window))
            meter.hold(asked("first", None), 600)
            over = meter.hold(asked("over", None), 401)
            unlisted = [meter.hold(asked(name, None, **fields), 5) for name, fields in EXCLUDED.items()]
            says = [(one.reason.value, one.fits, one.aside, one.short, one.group, one.window) for one in unlisted]
            same(says, [(name, False, 0, None, None, None) for name in EXCLUDED], "excluded")
            same({one.id for one in meter.holds("acme")}, {"rfirst", "rover", *(f"r{name}" for name in EXCLUDED)}, "")
            same(_shown(meter.standing("acme"))["large"], (0, 600, 1_000, 400), "standing")
            same(told([meter.settle(over, spent(401))]), [("within_allowance", 401, 401, 401, 1)], "settled")
            same([meter.settle(one, spent(5)).reason.value for one in unlisted], list(EXCLUDED), "settled")
            same([one.id for one in meter.holds("acme")], ["rfirst"], "what is still held")

    def test_the_provider_knows_what_answered(self, open_store: Opener) -> None:
        """The model, project and tools of the answer are those by which a held request is judged."""
        with Views(open_store) as views:
            meter = views.meter()
            holds = [meter.hold(asked(number, None), 100) for number in range(4)]
            words: list[dict[str, Any]] = [{"model": SMALL}, {"model": "other"}, {"tools": ("web_search",)}, {}]
            found = [meter.settle(hold, spent(10, **word)) for hold, word in zip(holds, words, strict=True)]
            same(
                [(one.group, one.reason.value) for one in found],
                [
                    ("small", "within_allowance"),
                    (None, "model_not_listed"),
                    (None, "tool_use"),
                    ("large", "within_allowance"),
                ],
                "groups",
            )

    def test_without_counts_a_hold_is_settled_by_its_bound(self, open_store: Opener, window: str) -> None:
        """Where nobody could read the usage, the bound is what counts, and the decision is marked."""
        with Views(open_store) as views:
            meter = views.meter(small_offer(window))
            hold = meter.hold(asked(1, None), 400)
            decision = meter.settle(hold, spent(None))
            same(told([decision]), [("within_allowance", 400, 400, 400, 1)], "the decision")
            same((decision.is_unmeasured, decision.tokens, meter.holds("acme")), (True, 400, []), "its mark")
            same(meter.settle(hold, spent(None)), replace(decision, replayed=True), "again")

    def test_what_the_provider_said_counts_without_counts(self, open_store: Opener) -> None:
        """A model or a tool that no allowance covers makes nothing free, though nobody could read the counts."""
        with Views(open_store) as views:
            meter = views.meter()
            words: dict[str, dict[str, Any]] = {
                "model_not_listed": {"model": "other"},
                "tool_use": {"tools": ("web_search",)},
            }
            for reason, word in words.items():
                decision = meter.settle(meter.hold(asked(reason, None), 10), spent(None, **word))
                same((decision.reason.value, decision.is_free), (reason, False), reason)

    def test_a_hold_is_settled_in_the_window_that_admitted_it(self, open_store: Opener, window: str) -> None:
        """A hold of a window's last microsecond is settled there, even when the next one is open."""
        with Views(open_store) as views:
            meter, other = (views.meter(small_offer(window), view=view) for view in (0, 1))
            first = meter.decide(asked("first", 100))
            assert first.window is not None, "it was judged"
            views.clock.now = first.window.end - TICK
            names = ("settled", "by its bound", "decided", "released")
            holds = {name: meter.hold(asked(name, None, at=views.clock.now), 200, for_=DAY) for name in names}
            views.clock.now += HOUR
            later = meter.decide(asked("later", 1_000, at=views.clock.now))
            same((later.is_free, later.seq, later.window_start is not None), (True, 1, True), "in the next window")
            found = [
                other.settle(holds["settled"], spent(150)),
                other.settle(holds["by its bound"], spent(None)),
                meter.decide(asked("decided", 250, at=holds["decided"].request.at)),
            ]
            same(
                [(one.window, one.used, one.seq) for one in found],
                [(first.window, 250, 2), (first.window, 450, 3), (first.window, 700, 4)],
            )
            meter.release(holds["released"])
            same(meter.holds("acme"), [], "what is held")
            same(meter.decide(asked("last", 1, at=views.clock.now)).window, later.window, "the next request")
            follows(views.store(), ["small-offer"])

    def test_where_windows_roll_a_hold_may_come_before_its_window(self, open_store: Opener) -> None:
        """Held where none is open, tokens count beside whatever window is opened, and are settled in it."""
        with Views(open_store) as views:
            meter = views.meter(small_offer("rolling"))
            early = [meter.hold(asked(size, None), size, for_=DAY) for size in (300, 500, 201)]
            same(
                [(one.window, one.held, one.fits) for one in early],
                [(None, 0, True), (None, 300, True), (None, 800, False)],
            )
            same([(one.window, one.held) for one in meter.standing("acme")], [(None, 800), (None, 0)], "standing")
            views.clock.now += HOUR
            opened = meter.decide(asked("opens", 100, at=views.clock.now))
            late = meter.hold(asked("late", None, at=views.clock.now), 101)
            same((late.window, late.used, late.held, late.fits), (opened.window, 100, 800, False), "in the window")
            settled = meter.settle(early[0], spent(300))
            same((settled.window, settled.used, settled.seq), (opened.window, 400, 2), "settled")
            standing = _shown(meter.standing("acme"))
            same(standing["large"], (400, 500, 600, 100), "standing")

    def test_where_windows_roll_the_first_settle_opens_one(self, open_store: Opener) -> None:
        """A hold opens no window; its settle does, if anything of it is free, at the request's own time."""
        with Views(open_store) as views:
            meter = views.meter(small_offer("rolling"))
            holds = [meter.hold(asked(name, None), 10) for name in ("billed", "opens")]
            views.clock.now += TICK
            billed, opens = meter.settle(holds[0], spent(1_001)), meter.settle(holds[1], spent(10))
            same((billed.window, billed.seq), (None, None), "billed")
            same((opens.window_start, opens.seq, opens.used), (NOON, 1, 10), "the first")

    def test_a_repeated_hold_is_the_same(self, open_store: Opener, window: str) -> None:
        """A hold that is asked for again is the one that there is, marked replayed, in any view; it is held once."""
        with Views(open_store) as views:
            meter = views.meter(small_offer(window))
            requests = [
                (asked("fits", None, **RICH), 700),
                (asked("over", None), 301),
                (asked("x", None, model="x"), 5),
            ]
            first = [meter.hold(request, size) for request, size in requests]
            same([hold.replayed for hold in first], [False] * 3, "marks")
            before = everything(views.store())
            views.clock.now += TICK
            for view in (0, 1):
                again = [
                    views.meter(small_offer(window), view=view).hold(one, size, for_=DAY) for one, size in requests
                ]
                same(again, [replace(hold, replayed=True) for hold in first], "again")
            same(everything(views.store()), before, "what is kept")

    def test_a_hold_of_other_content_is_a_conflict(self, open_store: Opener) -> None:
        """The same id with another bound or another value of a field is a conflict that names it and tells the hold."""
        with Views(open_store) as views:
            meter = views.meter()
            request = asked(1, None, **RICH)
            hold = meter.hold(request, 400)
            before = everything(views.store())
            for field in CONFLICT_FIELDS:
                if field in OTHER:
                    conflict = refused(Conflict, meter.hold, replace(request, **{field: OTHER[field]}), 400)
                    same((conflict.field, conflict.first, conflict.hold), (field, None, hold), field)
            for size in (399, 401, 0):
                conflict = refused(Conflict, meter.hold, request, size)
                same((conflict.field, conflict.first, conflict.hold), ("input_tokens", None, hold), str(size))
            same(everything(views.store()), before, "what is kept")

    def test_a_hold_of_a_decided_id_tells_the_decision(self, open_store: Opener) -> None:
        """Nothing is held of what was decided; only at another time it is another request."""
        with Views(open_store) as views:
            meter = views.meter()
            first = meter.decide(asked(1, 300))
            before = everything(views.store())
            for request, size in ((asked(1, None), 300), (asked(1, None, model=SMALL, project="p"), 7)):
                hold = meter.hold(request, size)
                expected = (replace(first, replayed=True), False, True, 0)
                same((hold.decision, hold.fits, hold.replayed, hold.aside if hold.decision is None else 0), expected)
            conflict = refused(Conflict, meter.hold, asked(1, None, at=NOON + TICK), 300)
            same((conflict.field, conflict.first, conflict.hold), ("at", first, None), "the conflict")
            same(everything(views.store()), before, "what is kept")

    def test_a_release_gives_back(self, open_store: Opener, window: str) -> None:
        """What was released is held no more, once; the id is then as if nobody had held it."""
        with Views(open_store) as views:
            meter, other = (views.meter(small_offer(window), view=view) for view in (0, 1))
            hold = meter.hold(asked(1, None), 700)
            same([other.release(hold), meter.release(hold)], [None, None], "releases")
            same((meter.holds("acme"), _shown(meter.standing("acme"))["large"]), ([], (0, 0, 1_000, 1_000)), "")
            same(list(meter.ledger()), [], "the ledger")
            again = meter.hold(asked(1, None, at=NOON + TICK), 1_000)
            same((again.fits, again.replayed), (True, False), "held anew")
            meter.release(again)
            decision = meter.decide(asked(1, 30))
            same((decision.seq, decision.used, decision.hold), (1, 30, None), "decided")
            same(meter.release(hold), None, "released when it was decided")
            same(meter.decisions("r1", account="acme"), [decision], "what was said of it")

    def test_holds_are_of_an_account_a_group_a_window_and_an_offer(self, open_store: Opener, window: str) -> None:
        """What is held of one allowance leaves every other one whole."""
        with Views(open_store) as views:
            meter = views.meter(small_offer(window))
            meter.hold(asked(1, None), ALLOWANCE)
            later = NOON + 40 * DAY
            others = [
                (meter, asked(1, None, account="other")),
                (meter, asked(2, None, model=SMALL)),
                (views.meter(small_offer(window, name="two")), asked(1, None)),
            ]
            if window != "rolling":
                others.append((meter, asked("later", None, at=later)))
            for one, request in others:
                hold = one.hold(request, ALLOWANCE)
                same((hold.fits, hold.held, hold.replayed), (True, 0, False), str(request))
            same(meter.hold(asked(3, None, model="large-2"), 1).held, ALLOWANCE, "another model of the group")

    def test_a_window_that_ended_holds_nothing_of_the_next(self, open_store: Opener) -> None:
        """Where windows roll, what is held in one is not held of the one that is opened after it."""
        with Views(open_store) as views:
            meter = views.meter(small_offer("rolling"))
            meter.decide(asked("opens", 1))
            meter.hold(asked(1, None), 999, for_=DAY)
            later = meter.hold(asked(2, None, at=NOON + DAY), 1_000)
            same((later.fits, later.held, later.used, later.window), (True, 0, 0, None), "after its end")
            found = meter.standing("acme", at=NOON + DAY)[0]
            same((found.held, found.used, found.window), (1_000, 0, None), "standing after its end")
            before = meter.standing("acme", at=NOON)[0]
            same((before.held, before.used), (1_999, 1), "standing before it, with what no window was open for")

    def test_holds_rest_on_the_latest_enrollment(self, open_store: Opener) -> None:
        """A hold fits under the enrollment of its moment, and is settled under that of the settle's."""
        with Views(open_store) as views:
            meter, other = views.meter(assume=None), views.meter(view=1, assume=None)
            same(meter.hold(asked("before", None), 10).reason, Reason.NOT_ENROLLED, "before")
            meter.enroll("acme", ENROLLED, actor="ann")
            hold = other.hold(asked(1, None), 900)
            same((hold.fits, hold.terms.allowance), (True, 1_000), "enrolled")
            other.enroll("acme", LOW, actor="ann")
            lower = meter.hold(asked(2, None), 100)
            same((lower.fits, lower.short, lower.terms.allowance), (False, 750, 250), "beside what is held already")
            same(told([meter.settle(hold, spent(251))]), [("over_allowance", 0, 251, 0, 1)], "settled")
            same(
                (meter.hold(asked(3, None), 250).fits, _shown(meter.standing("acme"))["large"]),
                (True, (0, 250, 250, 0)),
                "",
            )

    def test_holds_are_not_in_the_ledger(self, open_store: Opener) -> None:
        """The ledger has an entry a decision: a hold is none, its release neither, its settle is one."""
        with Views(open_store) as views:
            meter = views.meter()
            holds = [meter.hold(asked(number, None), 10) for number in range(3)]
            meter.extend(holds[0])
            meter.release(holds[1])
            same(list(meter.ledger()), [], "before")
            decision = meter.settle(holds[2], spent(3))
            same([entry.decision for entry in meter.ledger()], [decision], "after")
            same(views.store(1).durability, decision.durability, "what it rests on")

    def test_every_view_tells_every_hold(self, open_store: Opener) -> None:
        """Holds are told by the time at which they run out, then by id, as they were answered, in every view."""
        with Views(open_store) as views:
            meter = views.meter(assume=None)
            meter.enroll("acme", ENROLLED, actor="ann")
            minutes = {"b": 5, "a": 5, "d": 1, "c": 9, "\u00e9": 5, "Z": 5}
            made = {
                name: meter.hold(asked("", None, id=name, **RICH), 7, for_=time * HOUR / 60, on_expiry=expiry)
                for (name, time), expiry in zip(minutes.items(), [*Expiry] * 3, strict=True)
            }
            order = ["d", "Z", "a", "b", "\u00e9", "c"]
            for view in (0, 1, 2):
                same(views.meter(view=view).holds("acme"), [made[name] for name in order], f"view {view}")
            same(meter.holds("nobody"), [], "of an unknown account")
            same({hold.until for hold in made.values()}, {NOON + time * HOUR / 60 for time in minutes.values()}, "")

    def test_names_of_holds_are_taken_as_they_are(self, open_store: Opener) -> None:
        """Held ids and accounts of any letters are themselves, and no two of them are the same."""
        with Views(open_store) as views:
            meter, other = views.meter(), views.meter(view=1)
            asking = [asked("", None, id=name) for name in HOSTILE]
            asking += [asked("", None, id=name, account=name) for name in HOSTILE]
            held = [meter.hold(request, 1) for request in asking]
            same(
                [(one.id, one.account, one.replayed) for one in held], [(one.id, one.account, False) for one in asking]
            )
            same({one.id for one in other.holds("acme")}, set(HOSTILE), "holds of one account")
            for name in HOSTILE:
                same([(one.id, one.account) for one in other.holds(name)], [(name, name)], "holds of an account")
                same([(one.group, one.held) for one in other.standing(name)], [("large", 1), ("small", 0)], "standing")
            for hold in held[::2]:
                same(other.settle(hold, spent(1)).request.id, hold.id, "settled")
            for hold in held[1::2]:
                other.release(other.extend(hold, for_=HOUR))
            same([meter.holds(name) for name in ("acme", *HOSTILE)], [[]] * (1 + len(HOSTILE)), "what is held")
            entries, _ = ledger(views.store())
            found = sorted((one.decision.account, one.decision.id) for part in entries.values() for one in part)
            same(found, sorted((hold.account, hold.id) for hold in held[::2]), "the ledger")

    def test_a_hold_keeps_to_the_bounds_of_time(self, open_store: Opener) -> None:
        """Ahead of the clock nothing is held; what is too late is not covered, and settled as that."""
        with Views(open_store, bounds=Bounds()) as views:
            meter = views.meter()
            edge = NOON + Bounds().ahead
            same(refused(RequestError, meter.hold, asked(1, None, at=edge + TICK), 5).field, "at", "field")
            same((list(views.store().accounts()), meter.holds("acme")), ([], []), "what is kept")
            assert meter.hold(asked(1, None, at=edge), 5).fits, "it is on the edge"
            late = meter.hold(asked(2, None, at=NOON - 8 * DAY), 5)
            same((late.reason, late.fits, late.short), (Reason.TOO_LATE, False, None), "too late")
            same(meter.settle(late, spent(5)).reason, Reason.TOO_LATE, "settled")

    def test_bad_bounds_and_times_are_refused(self, open_store: Opener) -> None:
        """A bound is a whole number of tokens, a time is more than nothing and at most a day; nothing is written."""
        with Views(open_store) as views:
            meter = views.meter()
            bad: list[Any] = [-1, True, 5.0, "5", TOKENS_MAX + 1, None]
            for size in bad[:-1]:
                refused(RequestError, meter.hold, asked(1, None), size)
            for span in (0 * HOUR, -HOUR, DAY + TICK):
                same(refused(RequestError, meter.hold, asked(1, None), 5, for_=span).field, "for_", "field")
            refused(RequestError, meter.hold, asked(1, None), 5, on_expiry="forgotten")
            same((list(views.store().accounts()), meter.holds("acme")), ([], []), "what is kept")

    def test_explaining_tells_what_is_held_and_writes_nothing(self, open_store: Opener, window: str) -> None:
        """What fits, and what is left of it beside holds, are told of any request; nothing is kept of the question."""
        with Views(open_store) as views:
            meter = views.meter(small_offer(window))
            meter.decide(asked("first", 100))
            meter.hold(asked("held", None), 600)
            before = everything(views.store())
            for size, is_free in ((0, True), (300, True), (301, True), (900, True), (901, False)):
                found = meter.explain(asked("new", size))
                same((found.is_free, found.fits, found.held, found.available), (is_free, 900, 600, 300), str(size))
            same(meter.explain(asked("new", 901)).elsewhere, ("small",), "elsewhere")
            same(meter.explain(asked("new", 1_001)).elsewhere, (), "nowhere")
            same(everything(views.store()), before, "what is kept")

    def test_a_batch_settles_as_one_by_one(self, open_store: Opener, window: str) -> None:
        """A batch with held ids among others is decided as its requests are one after another."""
        with Views(open_store) as views:
            meter = views.meter(small_offer(window))
            requests = [asked(number, 60 + number * 9, model=(LARGE, SMALL)[number % 2]) for number in range(24)]
            requests += [replace(requests[3], at=NOON + TICK), replace(requests[5], model=LARGE), requests[4]]
            for account in ("batch", "one by one"):
                for request in requests[:24:3]:
                    meter.hold(replace(request, account=account), 100)
            batch = meter.decide_many([replace(one, account="batch") for one in requests])
            others = singly(meter, [replace(one, account="one by one") for one in requests])
            same(list(map(nameless, batch)), list(map(nameless, others)), "answers")
            same([meter.holds(name) for name in ("batch", "one by one")], [[], []], "what is held")

    def test_names_are_claimed_once(self, open_store: Opener) -> None:
        """The first to claim a name has it, in any view; names are an account's, and an offer's."""
        with Views(open_store) as views:
            stores = [views.store(view) for view in (0, 1)]
            asking = [("one", "acme", "50%"), ("one", "other", "50%"), ("two", "acme", "50%"), ("one", "acme", "80%")]
            asking += [("one", account, name) for account in HOSTILE for name in ("a\0b", account)]
            for turn, store in enumerate((*stores, stores[0])):
                found = [store.claim(*place, until=NOON + DAY, token=uuid4().hex) for place in asking]
                same(found, [turn == 0] * len(asking), f"turn {turn}")


def _shown(standings: list[Standing]) -> dict[str, tuple[int, int, int, int]]:
    """Of each group: used, held, remaining, and what is available beside holds."""
    return {one.group: (one.used, one.held, one.remaining, one.available) for one in standings}
