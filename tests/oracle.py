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

    def decide(self, request: dict[str, Any], *, now: int, dry: bool = False) -> dict[str, Any]:
        """The line of the one decision on a request, or why there is none; with `dry`, nothing is kept of it."""
        known = self.decided.get((request["account"], request["id"]))
        if known is not None:
            asked, first = known
            for field in CONFLICT_FIELDS:
                if request[field] != asked[field]:
                    return {"error": "conflict", "field": field, "first": first}
            return {**first, "replayed": True}
        if self.has_bounds and request["at"] > now + AHEAD:
            return {"error": "ahead", "field": "at"}
        line, kept = self._decision(request, now)
        if not dry:
            if kept is not None:
                self._keep(request, kept)
            self.decided[request["account"], request["id"]] = (request, line)
            self.entries.append((now, line))
        return line

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
            }
        return found

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

    def _decision(self, request: dict[str, Any], now: int) -> tuple[dict[str, Any], dict[str, int] | None]:
        """The line of a decision, and its window after it, if it has one."""
        at, tokens = request["at"], tokens_of(request)
        revision = revision_at(at)
        enrollment = self.enrollment(request["account"])
        reason = excluded(request, revision, enrollment)
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
        window = self._window(request["account"], group, revision, at)
        if self.has_bounds and window["end"] + KEEP <= now:
            line["reason"] = "too_late"
            return line, None
        allowance = ALLOWANCES[group][enrollment["tier"]]
        left = allowance - window["used"]
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
        line["total"] = window["used"] + tokens
        if window["seq"] == 0 and revision["window"] == "rolling" and not is_free and free == 0:
            line["used"] = 0
            line["remaining"] = allowance
            return line, None
        counted = tokens if self.counts == "all" else free
        kept = {**window, "used": window["used"] + counted, "seq": window["seq"] + 1}
        line["used"] = kept["used"]
        line["remaining"] = max(0, allowance - kept["used"])
        line["window_start"] = text_of(kept["start"])
        line["window_end"] = text_of(kept["end"])
        line["seq"] = kept["seq"]
        return line, kept

    def _window(self, account: str, group: str, revision: dict[str, Any], at: int) -> dict[str, int]:
        """The window of an instant: one that is kept, or a new one that nobody has used yet."""
        if revision["window"] == "day":
            start = at - at % DAY
            found = self.days.get((account, group, start))
            return found or {"start": start, "end": start + DAY, "used": 0, "seq": 0}
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
        else:
            self.rolling[account, group] = window


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
