"""One id, one decision: what a request asked again is answered, and what is another request."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from gratis.classify import charge_for
from gratis.errors import Conflict
from gratis.model import NAME_BYTES_MAX, Decision, Enrollment, Request
from gratis.stores import CONFLICT_FIELDS, Bounds, Status
from gratis.testing.compare import kept, ledger, plain, plainly, refused, same
from gratis.testing.scene import (
    ALLOWANCE,
    DAY,
    ENROLLED,
    LARGE,
    NOON,
    SMALL,
    TICK,
    Opener,
    Views,
    asked,
    small_offer,
)

RICH: dict[str, Any] = {
    "output_tokens": 5,
    "project": "p",
    "kind": "assistants",
    "tools": ("function",),
    "cached_tokens": 3,
}
OTHER: dict[str, tuple[Any, ...]] = {
    "model": ("large-2", SMALL, "LARGE-1", ""),
    "at": (NOON + TICK, NOON - TICK, NOON + DAY),
    "project": ("P", "q", None),
    "input_tokens": (11, 9, None, 0),
    "output_tokens": (4, None, 0),
    "cached_tokens": (0, 2, 4),
    "kind": ("completion", "eval"),
    "tools": ((), ("custom",), ("function", "web_search")),
}
PARTS = ("a}{b", "}", "{x}", "{", "a:b", ":", "a", "b", " ", "a ", " a", "a\u00a0", "%s", "\\", "'", '"', "/", "|", ",")
FIELDS = (
    "n",
    "t",
    "s",
    "c",
    "a1",
    "v",
    "r:1",
    "0",
    "1",
    "-1",
    "1-1",
    "e0",
    "1e3",
    "nan",
    "null",
    "None",
    "*",
    "$",
    "+",
)
LETTERS = (
    "Caf\u00e9",
    "Cafe\u0301",
    "caf\u00e9",
    "\u202e\u05d0\u200fcba",
    "\u0645\u200e",
    "\U0001f600",
    "\u0130",
    "i\u0307",
    "\uff21",
    "A",
    "\u00e9" * (NAME_BYTES_MAX // 2) + "x",
    "x" * NAME_BYTES_MAX,
    "x" * (NAME_BYTES_MAX - 1),
)
HOSTILE = (*PARTS, *FIELDS, *LETTERS)
JOINTS = (":", "/", "|", "}", "{", " ", ",", "-", ".", "#", "\\", "\u2028")


class Repeating:
    """Clauses about ids."""

    def test_a_repeat_has_the_first_decision(self, open_store: Opener, window: str, reading: tuple[str, str]) -> None:
        """Free, billed and excluded requests asked again have their decision, marked replayed; nothing is written."""
        with Views(open_store) as views:
            meter = views.meter(small_offer(window, reading=reading))
            sizes = {"free": 900, "over": 101, "fits": 100}
            requests = [asked(name, size) for name, size in sizes.items()] + [asked("unlisted", model="x")]
            first = [meter.decide(request) for request in requests]
            before = kept(views.store())
            again = [meter.decide(request) for request in reversed(requests)]
            same(again[::-1], [replace(decision, replayed=True) for decision in first], "answers")
            same([one.replayed for one in first], [False] * 4, "the first answers are marked")
            same(kept(views.store()), before, "what is kept")

    def test_a_repeat_has_it_in_another_view_and_later(self, open_store: Opener) -> None:
        """A repeat has the first decision in any view, in a later window, under another enrollment."""
        with Views(open_store) as views:
            first = views.meter().decide(asked(1, ALLOWANCE))
            expected = replace(first, replayed=True)
            same(views.meter(view=1).decide(asked(1, ALLOWANCE)), expected, "in another view")
            views.clock.now += DAY
            same(views.meter(view=2).decide(asked(1, ALLOWANCE)), expected, "in a view opened a day later")
            views.meter(view=1).enroll("acme", Enrollment(tier=1), actor="ann")
            same(views.meter().decide(asked(1, ALLOWANCE)), expected, "after a change")
            same(views.meter(assume=None).decide(asked(1, ALLOWANCE)), expected, "under another enrollment")

    def test_a_repeat_is_not_judged_by_its_time(self, open_store: Opener) -> None:
        """A decided request has its decision when it would be too late, and when the clock has gone back."""
        with Views(open_store, bounds=Bounds()) as views:
            meter = views.meter()
            expected = replace(meter.decide(asked(1)), replayed=True)
            for days in (30, -30):
                views.clock.now = NOON + days * DAY
                same(meter.decide(asked(1)), expected, f"{days} days later")

    def test_a_repeat_rests_on_no_version(self, open_store: Opener) -> None:
        """A decided request is answered whatever enrollment its charge rests on."""
        with Views(open_store) as views:
            first = views.meter().decide(asked(1))
            for version in (0, 1, 7):
                (receipt,) = views.store().apply([charge_for(small_offer(), asked(1), ENROLLED, version=version)])
                found = (receipt.status, receipt.decision)
                same(found, (Status.REPLAYED, replace(first, replayed=True)), f"version {version}")

    def test_other_content_is_a_conflict(self, open_store: Opener, field: str) -> None:
        """The same id with another value of a field is a conflict that names it, and changes nothing."""
        with Views(open_store) as views:
            meter = views.meter(small_offer())
            request = asked(1, 10, **RICH)
            first = meter.decide(request)
            before = kept(views.store())
            for value in OTHER[field]:
                fields = {"cached_tokens": 0, field: value} if field == "input_tokens" else {field: value}
                conflict = refused(Conflict, meter.decide, replace(request, **fields))
                same((conflict.field, conflict.first), (field, first), f"{field} {value!r}")
            same(kept(views.store()), before, "what is kept")
            same(meter.decide(request), replace(first, replayed=True), "the request as it was")

    def test_a_conflict_names_the_first_field_that_differs(self, open_store: Opener) -> None:
        """Of several fields that differ it names the first, in one order in all stores."""
        with Views(open_store) as views:
            meter = views.meter()
            request = asked(1, 10, **RICH)
            meter.decide(request)
            for place, field in enumerate(CONFLICT_FIELDS):
                later = {name: OTHER[name][0] for name in CONFLICT_FIELDS[place:]}
                conflict = refused(Conflict, meter.decide, replace(request, **later))
                same(conflict.field, field, "field")

    def test_an_id_is_the_accounts(self, open_store: Opener, window: str) -> None:
        """The same id under another group, or in another window, is the same request with other content."""
        with Views(open_store) as views:
            meter = views.meter(small_offer(window))
            first = meter.decide(asked(1))
            changes: dict[str, Any] = {"model": SMALL, "at": NOON + 60 * DAY}
            for field, value in changes.items():
                conflict = refused(Conflict, meter.decide, asked(1, **{field: value}))
                same((conflict.field, conflict.first), (field, first), "the conflict")
            unlisted = meter.decide(asked(2, model="unlisted"))
            conflict = refused(Conflict, meter.decide, asked(2))
            same(conflict.first, unlisted, "the first decision")

    def test_one_id_in_two_accounts_is_two_requests(self, open_store: Opener) -> None:
        """Ids of different accounts, and of one account under different offers, have nothing to do with each other."""
        with Views(open_store) as views:
            for name in ("one", "two"):
                for account in ("acme", "other"):
                    decision = views.meter(small_offer(name=name)).decide(asked(1, 600, account=account))
                    same((decision.replayed, decision.is_free, decision.seq), (False, True, 1), f"{name} {account}")

    def test_an_id_twice_in_one_batch(self, open_store: Opener, window: str) -> None:
        """Within a batch the first of an id is decided, and the others are its repeats or conflicts."""
        with Views(open_store) as views:
            meter = views.meter(small_offer(window))
            batch = [asked(1), asked(2), asked(1), asked(1, 11), asked(2), asked(1, account="other"), asked(1)]
            answers = meter.decide_many(batch)
            shown = [
                (one.field, one.first == answers[0])
                if isinstance(one, Conflict)
                else isinstance(one, Decision) and (one.account, one.replayed, one.seq)
                for one in answers
            ]
            new, again = ("acme", False, 1), ("acme", True, 1)
            expected = [new, ("acme", False, 2), again, ("input_tokens", True), ("acme", True, 2)]
            same(shown, [*expected, ("other", False, 1), again], "answers")
            same(meter.decide(asked("more")).used, 30, "used")

    def test_a_repeat_explained_is_a_repeat(self, open_store: Opener) -> None:
        """Explaining a decided request tells its decision, and other content is a conflict there, too."""
        with Views(open_store) as views:
            meter = views.meter()
            first = meter.decide(asked(1))
            same(meter.explain(asked(1)).decision, replace(first, replayed=True), "explained")
            same(refused(Conflict, meter.explain, asked(1, 11)).field, "input_tokens", "field")

    def test_names_are_taken_as_they_are(self, open_store: Opener) -> None:
        """Ids and accounts of any letters are themselves, and no two of them are the same."""
        offer = small_offer()
        with Views(open_store) as views:
            meter = views.meter(offer)
            requests = [asked("", 1, id=name) for name in HOSTILE]
            requests += [asked("", 1, id="the same", account=name) for name in HOSTILE]
            requests += [asked("", 1, id=name, account=name) for name in HOSTILE]
            _apart(views, requests)
            answers = views.meter(offer, view=1).decide_many(requests)
            same([isinstance(one, Decision) and one.replayed for one in answers], [True] * len(requests), "asked again")
            names = {account for _, account in views.store().accounts()}
            same(names, {request.account for request in requests}, "accounts")
            for name in HOSTILE:
                meter.enroll(name, ENROLLED, actor=name)
                same([change.actor for change in meter.enrollments(name)], [name], "who enrolled")

    def test_names_do_not_run_together(self, open_store: Opener) -> None:
        """An account and an id are two names, wherever one could be taken to end."""
        with Views(open_store) as views:
            pairs = [pair for mark in JOINTS for pair in (("a", f"b{mark}c"), (f"a{mark}b", "c"))]
            _apart(views, [asked("", 1, account=account, id=name) for account, name in pairs])

    def test_models_and_projects_are_taken_as_they_are(self, open_store: Opener) -> None:
        """A model or a project of any letters is kept as it is; a model that only resembles one is not listed."""
        with Views(open_store) as views:
            meter = views.meter()
            odd = [LARGE + " ", LARGE.upper(), LARGE + "\n", "large-\uff11", "", "\0", "\x1b[0m", "x" * 1_024]
            requests = [asked(f"model {place}", 1, model=model) for place, model in enumerate((*odd, *HOSTILE))]
            requests += [asked(f"project {place}", 1, project=name) for place, name in enumerate(HOSTILE)]
            for request in requests:
                decision = meter.decide(request)
                same((decision.request, decision.is_free), (request, request.model == LARGE), "the decision")
            entries, _ = ledger(views.store(1))
            (found,) = entries.values()
            same([entry.decision.request for entry in found], requests, "requests in the ledger")


def _apart(views: Views, requests: list[Request]) -> None:
    """Each request has a decision of its own, singly and in one batch."""
    meter = views.meter()
    half = len(requests) // 2
    answers = [*meter.decide_many(requests[:half]), *map(meter.decide, requests[half:])]
    for request, answer in zip(requests, answers, strict=True):
        assert isinstance(answer, Decision), f"{request!r} was refused: {answer!r}"
        same((answer.request, answer.replayed), (request, False), "the decision")
    entries, _ = ledger(views.store(1))
    decided: dict[str, list[object]] = {}
    for answer in answers:
        assert isinstance(answer, Decision), "it was one above"
        decided.setdefault(answer.account, []).append(plain(answer))
    for (_, account), found in entries.items():
        same(plainly(entry.decision for entry in found), decided.get(account), f"the ledger of {account!r}")
