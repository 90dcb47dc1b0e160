"""What one store under one offer must answer, told a second time: dicts, integers and the words of the contract.

Nothing of Gratis is used here. Times are whole microseconds since 1970, a request is a dict, and so is an answer:
the decision's line, or an error's description. Where one caller asks, the `Oracle` says what must be answered. Where
many ask at once, `faults` says what is wrong with what they were answered. No search is needed for that: the store
says in which order it decided; that order is demanded to be 1..n, to follow the rule, to agree with every answer, and
not to run against real time.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

SECOND = 1_000_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR
KEEP = 7 * DAY
AHEAD = 5 * MINUTE
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

CONFLICT_FIELDS = ("model", "at", "project", "input_tokens", "output_tokens", "cached_tokens", "kind", "tools")

HOLD_FIELDS = ("at", "tokens_max", "reason", "used", "held", "short", "until", "expiry", "replayed")


def micros(text: str) -> int:
    """The instant that a text names, in microseconds."""
    return (datetime.fromisoformat(text).replace(tzinfo=UTC) - EPOCH) // timedelta(microseconds=1)


def text_of(at: int) -> str:
    """The instant as a line prints it: RFC 3339 in UTC, with a fraction only where there is one."""
    return (EPOCH + timedelta(microseconds=at)).isoformat().replace("+00:00", "Z")


OFFER = "openai-data-sharing"
START = micros("2024-12-01")
SWITCH = micros("2025-03-06")
LIST_B = micros("2025-04-16")
END = micros("2025-05-16")

LARGE, SMALL = "1M", "10M"
ALLOWANCES = {
    LARGE: {1: 250_000, 2: 250_000, 3: 1_000_000, 4: 1_000_000, 5: 1_000_000},
    SMALL: {1: 2_500_000, 2: 2_500_000, 3: 10_000_000, 4: 10_000_000, 5: 10_000_000},
}
LIST_A = {
    "gpt-4o-2024-08-06": LARGE,
    "o1-2024-12-17": LARGE,
    "gpt-4o-mini-2024-07-18": SMALL,
    "o3-mini-2025-01-31": SMALL,
}
REVISIONS: list[dict[str, Any]] = [
    {"name": "2024-12-01", "from": START, "until": SWITCH, "window": "rolling", "models": LIST_A},
    {"name": "2025-03-06", "from": SWITCH, "until": LIST_B, "window": "day", "models": LIST_A},
    {
        "name": "2025-04-16",
        "from": LIST_B,
        "until": END,
        "window": "day",
        "models": {**LIST_A, "gpt-4.1-2025-04-14": LARGE, "o1-preview-2024-09-12": LARGE, "o4-mini-2025-04-16": SMALL},
    },
]
O_SERIES = {"o1-2024-12-17", "o3-mini-2025-01-31", "o1-preview-2024-09-12", "o4-mini-2025-04-16"}
CLIENT_SIDE_TOOLS = {"function", "custom"}
EXCLUDED_PLANS = {"enterprise"}


def is_an_owners(words: list[dict[str, Any]]) -> bool:
    """Whether an owner said something of a request: that stands."""
    return any(word["remedy"] in {"voided", "adjusted"} for word in words)


class Oracle:
    """One store and one offer under one reading of it; without bounds, old data is judged as it was."""

    def __init__(
        self, *, counts: str, overage: str, assume: dict[str, Any] | None = None, has_bounds: bool = True
    ) -> None:
        self.counts = counts
        self.overage = overage
        self.assume = assume
        self.has_bounds = has_bounds
        self.enrolled: dict[str, list[dict[str, Any]]] = {}
        self.owners: dict[str, set[str]] = {}
        self.decided: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]] = {}
        self.entries: list[tuple[int, dict[str, Any]]] = []
        self.days: dict[tuple[str, str, int], dict[str, int]] = {}
        self.rolling: dict[tuple[str, str], dict[str, int]] = {}
        self.rolled: dict[tuple[str, str, int], dict[str, int]] = {}
        self.words: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self.held: dict[tuple[str, str], dict[str, Any]] = {}

    def decide(self, request: dict[str, Any], *, now: int, dry: bool = False) -> dict[str, Any]:
        """The line of the one decision on a request, or why there is none; with `dry`, nothing is kept of it."""
        key = request["account"], request["id"]
        known = self.decided.get(key)
        if known is not None:
            if not dry and self.words[key][0]["unmeasured"] and tokens_of(request) is not None:
                return self._settle_late(request, now)
            return self._again(request, *known)
        if self.has_bounds and request["at"] > now + AHEAD:
            return {"error": "ahead", "field": "at"}
        if dry:
            return self._decision(request, now, self.enrollment(request["account"]))[0]
        hold = self.held.get(key)
        if hold is not None and hold["at"] != request["at"]:
            return {"error": "conflict", "field": "at", "hold": said_of(hold)}
        self._run_out(request["account"], now, but=request["id"])
        return self._decide(request, now, hold)

    def fits(self, request: dict[str, Any], *, now: int) -> int | None:
        """The largest size that would still be free now; None if none would be, or the request was decided before."""
        line = self.decide(request, now=now, dry=True)
        if "error" in line or line["replayed"] or line["total"] is None:
            return None
        left = line["allowance"] - (line["total"] - line["tokens"])
        return left if left >= 0 else None

    def standing(self, account: str, *, at: int) -> dict[str, dict[str, Any]]:
        """What is used of each group in the window that a request of this time would meet, if one is open."""
        revision = revision_at(at)
        if revision is None:
            return {}
        found = {}
        for group in (LARGE, SMALL):
            window = self._window(account, group, revision, at)
            is_open = revision["window"] == "day" or window["seq"] > 0
            found[group] = {
                "used": window["used"],
                "window_start": text_of(window["start"]) if is_open else None,
                "window_end": text_of(window["end"]) if is_open else None,
                "held": self._held(account, group, revision["window"], {window["start"] if is_open else None, None}),
            }
        return found

    def hold(self, request: dict[str, Any], tokens: int, *, until: int, expiry: str, now: int) -> dict[str, Any]:
        """What is said of a hold of so many tokens: it fits beside what is used and what others hold, or not."""
        account = request["account"]
        bounded = {**request, "input_tokens": tokens, "output_tokens": 0, "cached_tokens": 0}
        known = self.decided.get((account, request["id"]))
        if known is not None:
            asked, first = known
            if request["at"] != asked["at"]:
                return {"error": "conflict", "field": "at", "first": first}
            return {"request": bounded, "window": None, "decision": {**first, "replayed": True}}
        if self.has_bounds and request["at"] > now + AHEAD:
            return {"error": "ahead", "field": "at"}
        hold = self.held.get((account, request["id"]))
        if hold is not None:
            for name in CONFLICT_FIELDS:
                if bounded[name] != hold["request"][name]:
                    return {"error": "conflict", "field": name, "hold": said_of(hold)}
            return {**hold, "replayed": True}
        self._run_out(account, now, but=request["id"])
        hold = self._admitted(bounded, tokens, until=until, expiry=expiry, now=now)
        self.held[account, request["id"]] = hold
        return hold

    def _admitted(self, request: dict[str, Any], tokens: int, *, until: int, expiry: str, now: int) -> dict[str, Any]:
        """A new hold."""
        account, at = request["account"], request["at"]
        line, _ = self._decision(request, now, self.enrollment(account))
        hold = {
            "request": request,
            "at": at,
            "tokens_max": tokens,
            "reason": line["reason"],
            "used": None,
            "held": None,
            "short": None,
            "place": None,
            "window": None,
            "until": until,
            "expiry": expiry,
            "decision": None,
            "replayed": False,
        }
        if line["total"] is None:
            return hold
        revision = revision_at(at)
        assert revision is not None
        group, kind = line["group"], revision["window"]
        window = self._window(account, group, revision, at)
        is_open = kind == "day" or window["seq"] > 0
        start = window["start"] if is_open else None
        held = self._held(account, group, kind, {start, None})
        left = line["allowance"] - window["used"] - held
        hold["reason"] = "within_allowance" if tokens <= left else "over_allowance"
        hold["used"], hold["held"], hold["short"] = window["used"], held, max(0, tokens - left)
        hold["place"] = (group, kind, start)
        hold["window"] = {"start": window["start"], "end": window["end"]} if is_open else None
        return hold

    def settle(self, hold: dict[str, Any], used: dict[str, Any], *, now: int) -> dict[str, Any]:
        """The line of the decision on a held request by what it used, or by its bound if nobody knows that."""
        request = {**hold["request"], **used}
        if tokens_of(request) is not None:
            return self.decide(request, now=now)
        request = hold["request"]
        key = request["account"], request["id"]
        known = self.decided.get(key)
        if known is not None:
            return self._again(request, *known)
        if self.has_bounds and request["at"] > now + AHEAD:
            return {"error": "ahead", "field": "at"}
        kept = self.held.get(key)
        if kept is not None and kept["at"] != request["at"]:
            return {"error": "conflict", "field": "at", "hold": said_of(kept)}
        self._run_out(request["account"], now, but=request["id"])
        return self._decide(request, now, hold, is_unmeasured=True)

    def release(self, hold: dict[str, Any], *, now: int) -> dict[str, Any] | None:
        """Nothing, if it was held; if it was decided by its bound since, the line of what corrects that."""
        key = hold["request"]["account"], hold["request"]["id"]
        if self.held.pop(key, None) is not None:
            return None
        words = self.words.get(key, [])
        if not words or not words[0]["unmeasured"] or any(word["remedy"] in {"settled", "released"} for word in words):
            return None
        if is_an_owners(words):
            return {**words[-1]["line"], "replayed": True}
        return self._correct(key, words[-1]["request"], "released", now)

    def extend(self, hold: dict[str, Any], *, until: int) -> dict[str, Any]:
        """The hold with another end."""
        key = hold["request"]["account"], hold["request"]["id"]
        if key not in self.held:
            return {"error": "ahead", "field": "id"}
        self.held[key] = {**self.held[key], "until": until}
        return self.held[key]

    def expire(self, account: str, *, now: int) -> list[dict[str, Any]]:
        """The lines of what ran out of time and is decided by its bound."""
        place = len(self.entries)
        self._run_out(account, now, but=None)
        return [line for _, line in self.entries[place:]]

    def holds(self, account: str) -> list[dict[str, Any]]:
        """What is held, by the time at which it runs out, then by id."""
        kept = [hold for (owner, _), hold in self.held.items() if owner == account]
        return sorted(kept, key=lambda hold: (hold["until"], hold["request"]["id"]))

    def correct(
        self, account: str, request_id: str, tokens: int | None, *, actor: str, why: str, now: int
    ) -> dict[str, Any]:
        """The line of an owner's correction: so many tokens, or none of it counts."""
        if actor not in self.owners.get(account, ()):
            return {"error": "not an owner"}
        words = self.words.get((account, request_id))
        if words is None:
            return {"error": "ahead", "field": "id"}
        request = words[-1]["request"]
        if tokens is not None:
            request = {**request, "input_tokens": tokens, "output_tokens": 0, "cached_tokens": 0}
        remedy = "voided" if tokens is None else "adjusted"
        return self._correct((account, request_id), request, remedy, now, actor=actor, why=why)

    def enroll(self, account: str, enrollment: dict[str, Any], *, actor: str) -> int | None:
        """The number of the change; None if it may not be."""
        owners = self.owners.get(account)
        if owners is not None and actor not in owners:
            return None
        cannot_share = enrollment["zero_data_retention"] or enrollment["plan"] in EXCLUDED_PLANS
        if cannot_share and enrollment["sharing"] != "disabled":
            return None
        self.owners[account] = set(enrollment["owners"]) or owners or {actor}
        self.enrolled.setdefault(account, []).append(enrollment)
        return len(self.enrolled[account])

    def enrollment(self, account: str) -> dict[str, Any] | None:
        """The latest acknowledged change; an account that has none is what was assumed."""
        changes = self.enrolled.get(account)
        return changes[-1] if changes else self.assume

    def aim(self, account: str, model: str, at: int) -> tuple[int, int]:
        """The allowance that a request would meet, and what is used of it, so that a test can aim at the edge."""
        revision, enrollment = revision_at(at), self.enrollment(account)
        if revision is None or enrollment is None or model not in revision["models"] or enrollment["tier"] == 0:
            return 250_000, 0
        group = revision["models"][model]
        return ALLOWANCES[group][enrollment["tier"]], self._window(account, group, revision, at)["used"]

    @staticmethod
    def _again(request: dict[str, Any], asked: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
        """What was said before, or that this is another request."""
        for name in CONFLICT_FIELDS:
            if request[name] != asked[name]:
                return {"error": "conflict", "field": name, "first": first}
        return {**first, "replayed": True}

    def _decide(
        self, request: dict[str, Any], now: int, hold: dict[str, Any] | None, *, is_unmeasured: bool = False
    ) -> dict[str, Any]:
        """Decide a request that was not decided before, and end its hold."""
        enrollment = self.enrollment(request["account"])
        pin = None if hold is None else hold["window"]
        line, kept = self._decision(request, now, enrollment, pin=pin)
        if hold is not None:
            line["hold"] = {"tokens_max": hold["tokens_max"], "unmeasured": is_unmeasured, **window_line(pin)}
            self.held.pop((request["account"], request["id"]), None)
        self.decided[request["account"], request["id"]] = (request, line)
        self._write(request, line, kept, now, enrollment, unmeasured=is_unmeasured, pin=pin)
        return line

    def _write(
        self,
        request: dict[str, Any],
        line: dict[str, Any],
        kept: dict[str, int] | None,
        now: int,
        enrollment: Any,
        **word: Any,
    ) -> None:
        """An entry of the ledger: what it says of its request, and what that takes of a window."""
        returned = line["correction"]["returned"] if "correction" in line else 0
        took = 0
        if kept is not None:
            found = self._window(request["account"], line["group"], revision_at(request["at"]), request["at"], kept)
            took = kept["used"] - (found["used"] - returned)
            self._keep(request, kept)
        self.words.setdefault((request["account"], line["id"]), []).append(
            {
                "request": request,
                "line": line,
                "took": took,
                "window": kept,
                "enrollment": enrollment,
                "remedy": line.get("correction", {}).get("remedy"),
                "unmeasured": False,
                "pin": None,
                **word,
            }
        )
        self.entries.append((now, line))

    def _run_out(self, account: str, now: int, *, but: str | None) -> None:
        """Holds that ran out of time are ended, in the order of their ends: decided by their bounds, or given back."""
        for hold in self.holds(account):
            request = hold["request"]
            if hold["until"] <= now and request["id"] != but:
                if hold["expiry"] == "decided":
                    self._decide(request, now, hold, is_unmeasured=True)
                else:
                    del self.held[account, request["id"]]

    def _held(self, account: str, group: str, kind: str, starts: set[int | None]) -> int:
        """What an account's holds set aside of the windows that start then; None where none was open."""
        places = {(group, kind, start) for start in starts}
        return sum(
            hold["tokens_max"]
            for (owner, _), hold in self.held.items()
            if owner == account and hold["place"] in places and hold["reason"] == "within_allowance"
        )

    def _settle_late(self, request: dict[str, Any], now: int) -> dict[str, Any]:
        """What a request really used whose hold had run out of time: once, and it corrects what was assumed."""
        words = self.words[request["account"], request["id"]]
        for word in words:
            if word["remedy"] == "settled":
                return self._again(request, word["request"], word["line"])
        if request["at"] != words[0]["request"]["at"]:
            return {"error": "conflict", "field": "at", "first": words[0]["line"]}
        if is_an_owners(words):
            return {**words[-1]["line"], "replayed": True}
        return self._correct((request["account"], request["id"]), request, "settled", now)

    def _correct(
        self,
        key: tuple[str, str],
        request: dict[str, Any],
        remedy: str,
        now: int,
        *,
        actor: str | None = None,
        why: str | None = None,
    ) -> dict[str, Any]:
        """The line of the next correction: the latest word gives back what it took, then the request is judged anew."""
        words = self.words[key]
        first, latest = words[0], words[-1]
        is_void = remedy in {"voided", "released"}
        if is_void:
            request = {**request, "input_tokens": 0, "output_tokens": 0, "cached_tokens": 0}
        is_same_remedy = latest["remedy"] == remedy or (is_void and latest["remedy"] in {"voided", "released"})
        if is_same_remedy and latest["request"] == request:
            return {**latest["line"], "replayed": True}
        revision = revision_at(request["at"])
        reason = excluded(request, revision, first["enrollment"])
        group = revision["models"][request["model"]] if revision is not None and reason is None else None
        is_same_group = latest["line"]["used"] is None or latest["line"]["group"] == group
        if latest["took"] and not is_same_group:
            gone = self._correct(key, latest["request"], "released", now, actor=actor, why=why)
            if "error" in gone:
                return gone
            return self._correct(key, request, remedy, now, actor=actor, why=why)
        pin = (latest["window"] or first["pin"]) if is_same_group else None
        stays = latest["line"]["reason"] if is_void and latest["window"] is None else None
        line, kept = self._decision(request, now, first["enrollment"], pin=pin, returned=latest["took"], stays=stays)
        if line["reason"] == "too_late":
            return {"error": "ahead", "field": "at"}
        line["correction"] = {
            "number": len(words),
            "remedy": remedy,
            "returned": latest["took"],
            **window_line(pin),
            "actor": actor,
            "why": why,
        }
        self._write(request, line, kept, now, first["enrollment"])
        return line

    def _decision(
        self,
        request: dict[str, Any],
        now: int,
        enrollment: dict[str, Any] | None,
        *,
        pin: dict[str, int] | None = None,
        returned: int = 0,
        stays: str | None = None,
    ) -> tuple[dict[str, Any], dict[str, int] | None]:
        """The line of a decision, and its window after it, if it has one; some stay billed for a reason they had."""
        at, tokens = request["at"], tokens_of(request)
        revision = revision_at(at)
        reason = stays or excluded(request, revision, enrollment)
        line: dict[str, Any] = {
            "id": request["id"],
            "account": request["account"],
            "verdict": "billed",
            "reason": reason,
            "group": None,
            "tokens": tokens,
            "free_tokens": 0,
            "billed_tokens": tokens,
            "allowance": None,
            "total": None,
            "used": None,
            "remaining": None,
            "window_start": None,
            "window_end": None,
            "seq": None,
            "offer": OFFER,
            "revision": None if revision is None else revision["name"],
            "at": text_of(at),
            "replayed": False,
        }
        if reason is not None:
            return line, None
        assert revision is not None
        assert enrollment is not None
        assert tokens is not None
        group = revision["models"][request["model"]]
        window = self._window(request["account"], group, revision, at, pin)
        if self.has_bounds and window["end"] + KEEP <= now:
            line["reason"] = "too_late"
            return line, None
        allowance = ALLOWANCES[group][enrollment["tier"]]
        used = window["used"] - returned
        left = allowance - used
        is_free = tokens <= left
        if is_free:
            free = tokens
        elif self.overage == "excess":
            free = max(0, left)
        else:
            free = 0
        line["verdict"] = "free" if is_free else "billed"
        line["reason"] = "within_allowance" if is_free else "over_allowance"
        line["group"] = group
        line["allowance"] = allowance
        line["free_tokens"] = free
        line["billed_tokens"] = tokens - free
        line["total"] = used + tokens
        if window["seq"] == 0 and revision["window"] == "rolling" and not is_free and free == 0:
            line["used"] = 0
            line["remaining"] = allowance
            return line, None
        counted = tokens if self.counts == "all" else free
        kept = {**window, "used": used + counted, "seq": window["seq"] + 1}
        line["used"] = kept["used"]
        line["remaining"] = max(0, allowance - kept["used"])
        line["window_start"] = text_of(kept["start"])
        line["window_end"] = text_of(kept["end"])
        line["seq"] = kept["seq"]
        return line, kept

    def _window(
        self, account: str, group: str, revision: dict[str, Any], at: int, pin: dict[str, int] | None = None
    ) -> dict[str, int]:
        """The window of an instant: one that is kept, or a new one that nobody has used yet.

        Where windows roll, the one to which a request is pinned comes before the one that is open.
        """
        if revision["window"] == "day":
            start = at - at % DAY
            found = self.days.get((account, group, start))
            return found or {"start": start, "end": start + DAY, "used": 0, "seq": 0}
        if pin is not None and (account, group, pin["start"]) in self.rolled:
            return self.rolled[account, group, pin["start"]]
        last = self.rolling.get((account, group))
        if last is not None and at < last["end"]:
            return last
        return {"start": at, "end": min(at + DAY, SWITCH), "used": 0, "seq": 0}

    def _keep(self, request: dict[str, Any], window: dict[str, int]) -> None:
        revision = revision_at(request["at"])
        assert revision is not None
        account, group = request["account"], revision["models"][request["model"]]
        if revision["window"] == "day":
            self.days[account, group, window["start"]] = window
            return
        self.rolled[account, group, window["start"]] = window
        last = self.rolling.get((account, group))
        if last is None or window["start"] >= last["start"]:
            self.rolling[account, group] = window


def said_of(hold: dict[str, Any]) -> dict[str, Any]:
    """What anybody may see of a hold."""
    return {name: hold[name] for name in HOLD_FIELDS} | {"id": hold["request"]["id"], "model": hold["request"]["model"]}


def window_line(window: dict[str, int] | None) -> dict[str, str | None]:
    """A window as a line prints it."""
    start, end = (None, None) if window is None else (text_of(window["start"]), text_of(window["end"]))
    return {"window_start": start, "window_end": end}


def revision_at(at: int) -> dict[str, Any] | None:
    """The revision in force at an instant."""
    return next((revision for revision in REVISIONS if revision["from"] <= at < revision["until"]), None)


def tokens_of(request: dict[str, Any]) -> int | None:
    """Input and output; None while a part is unmeasured. An embedding has no output."""
    given, made = request["input_tokens"], request["output_tokens"]
    if given is None:
        return None
    if made is None:
        return given if request["kind"] == "embedding" else None
    return given + made


def excluded(request: dict[str, Any], revision: dict[str, Any] | None, enrollment: dict[str, Any] | None) -> str | None:
    """The first reason for which no allowance covers a request, in the order of lists A and B; None if one may."""
    if revision is None:
        return "offer_not_in_force"
    if enrollment is None:
        return "not_enrolled"
    starts, ends, at = enrollment["starts"], enrollment["ends"], request["at"]
    model = request["model"]
    for reason, holds in (
        ("not_enrolled", (starts is not None and at < starts) or (ends is not None and at >= ends)),
        (
            "account_not_eligible",
            enrollment["tier"] == 0 or enrollment["zero_data_retention"] or enrollment["plan"] in EXCLUDED_PLANS,
        ),
        ("sharing_disabled", enrollment["sharing"] == "disabled"),
        (
            "project_not_shared",
            enrollment["sharing"] == "selected" and request["project"] not in enrollment["projects"],
        ),
        ("fine_tuning_training", request["kind"] == "fine_tuning_training"),
        ("fine_tuned_model", model.startswith("ft:")),
        ("model_not_listed", model not in revision["models"]),
        ("assistants_o_series", request["kind"] == "assistants" and model in O_SERIES),
        ("tool_use", any(tool not in CLIENT_SIDE_TOOLS for tool in request["tools"])),
        ("unmeasured", tokens_of(request) is None),
    ):
        if holds:
            return reason
    return None


@dataclass
class Call:
    """One question of one caller: when it was asked and answered, and the answer; None, at infinity, if it was lost."""

    account: str
    id: str
    start: int
    end: float
    line: dict[str, Any] | None


@dataclass
class Change:
    """One change of an account's tier, when it was asked for and acknowledged; at infinity if it never was."""

    account: str
    tier: int
    start: int
    end: float


@dataclass
class History:
    """All calls of all callers, all changes of tiers, and the ledger that is left."""

    calls: list[Call] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    ledger: list[dict[str, Any]] = field(default_factory=list)


def faults(history: History) -> set[str]:
    """What is wrong with a history, in words; nothing, if one order explains it."""
    found = set()
    rows = {(row["account"], row["id"]): row for row in history.ledger}
    if len(rows) < len(history.ledger):
        found.add("an id stands twice in the ledger")
    if [row["entry"] for row in history.ledger] != list(range(1, len(history.ledger) + 1)):
        found.add("entries are not 1..n")

    windows: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in history.ledger:
        if row["seq"] is not None:
            windows.setdefault((row["account"], row["group"], row["window_start"]), []).append(row)
        elif row["reason"] != "over_allowance" or row["tokens"] <= row["allowance"]:
            found.add("a row that belongs in a window has none")
    spans = spans_of(history.calls)
    for window in windows.values():
        window.sort(key=lambda row: row["seq"])
        found |= faults_of_window(window, spans)

    found |= faults_of_answers(history.calls, rows)
    found |= faults_of_tiers(history)
    return found


def faults_of_window(window: list[dict[str, Any]], spans: dict[tuple[str, str], tuple[int, float]]) -> set[str]:
    """What is wrong with the rows of one window, in the order of their `seq`."""
    found = set()
    if [row["seq"] for row in window] != list(range(1, len(window) + 1)):
        found.add("seq is not 1..n")
    used = 0
    latest_start = 0
    for row in window:
        is_free = row["tokens"] <= row["allowance"] - used
        free = row["tokens"] if is_free else 0
        told = (row["verdict"], row["free_tokens"], row["total"], row["used"])
        if told != ("free" if is_free else "billed", free, used + row["tokens"], used + free):
            found.add("a row is not what the rule gives")
        used = row["used"]
        start, end = spans.get((row["account"], row["id"]), (0, float("inf")))
        if latest_start > end:
            found.add("the order runs against real time")
        latest_start = max(latest_start, start)
    return found


def faults_of_answers(calls: list[Call], rows: dict[tuple[str, str], dict[str, Any]]) -> set[str]:
    """Which answers disagree with the ledger, or with each other."""
    found = set()
    first_answers: Counter[tuple[str, str]] = Counter()
    for call in calls:
        if call.line is None:
            continue
        row = rows.get((call.account, call.id))
        if row is None:
            found.add("an answered call is not in the ledger")
            continue
        if any(row[name] != value for name, value in call.line.items() if name != "replayed"):
            found.add("an answer differs from its row")
        first_answers[call.account, call.id] += not call.line["replayed"]
    if any(count > 1 for count in first_answers.values()):
        found.add("an id was decided twice")
    unknown = {(call.account, call.id) for call in calls if call.line is None}
    asked = {(call.account, call.id) for call in calls}
    if any(first_answers[key] == 0 and key not in unknown for key in asked & set(rows)):
        found.add("an id was never answered first")
    if set(rows) - asked:
        found.add("a row was never asked for")
    return found


def faults_of_tiers(history: History) -> set[str]:
    """Whether a decision rests on a tier that a change had replaced before it was asked for, or that came after."""
    found = set()
    for call in history.calls:
        if call.line is None or call.line["replayed"]:
            continue
        changes = [change for change in history.changes if change.account == call.account]
        possible = [
            change.tier
            for place, change in enumerate(changes)
            if change.start <= call.end and all(later.end >= call.start for later in changes[place + 1 :])
        ]
        if call.line["allowance"] not in [ALLOWANCES[call.line["group"]][tier] for tier in possible]:
            found.add("a decision rests on a tier that was not in force")
    return found


def spans_of(calls: list[Call]) -> dict[tuple[str, str], tuple[int, float]]:
    """When each id can have been decided: from its first call to its first known answer."""
    spans: dict[tuple[str, str], tuple[int, float]] = {}
    for call in calls:
        key = (call.account, call.id)
        start, end = spans.get(key, (call.start, float("inf")))
        spans[key] = (min(start, call.start), end if call.line is None else min(end, call.end))
    return spans
