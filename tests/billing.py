"""A provider that counts and bills by itself: what truly happened, its usage and cost reports, and both endpoints.

It applies a rule of its own, written without the one under test: exact ids, whole requests or excess only, free tokens
or all of them counted, by UTC day. What it is told of faults (a project that does not share, a model that it lists, a
day on which nothing is free) it knows and the decisions do not.
"""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

DAY = timedelta(days=1)
KEY = "admin-key-of-a-test"
LARGE, SMALL = "gpt-4.1-2025-04-14", "gpt-4.1-mini-2025-04-14"
GROUPS = {LARGE: "1M", "gpt-4o-2024-08-06": "1M", SMALL: "10M", "o4-mini-2025-04-16": "10M"}
LIMITS = {3: {"1M": 1_000_000, "10M": 10_000_000}, 1: {"1M": 250_000, "10M": 2_500_000}}
PRICES = {  # dollars a million: input, cached input, output
    LARGE: ("2.00", "0.50", "8.00"),
    SMALL: ("0.40", "0.10", "1.60"),
    "gpt-4o-2024-08-06": ("2.50", "1.25", "10.00"),
    "o4-mini-2025-04-16": ("1.10", "0.275", "4.40"),
}
COLUMNS = (  # noqa: SIM905 - as the head of the file has them
    "start_time,end_time,start_time_iso,end_time_iso,project_id,num_model_requests,user_id,api_key_id,model,batch,"
    "service_tier,input_tokens,output_tokens,input_cached_tokens,input_uncached_tokens,input_text_tokens,"
    "output_text_tokens,input_cached_text_tokens,input_audio_tokens,input_cached_audio_tokens,output_audio_tokens,"
    "input_image_tokens,input_cached_image_tokens,output_image_tokens"
).split(",")
COST_COLUMNS = (  # noqa: SIM905 - as above
    "start_time,end_time,start_time_iso,end_time_iso,amount_value,amount_currency,line_item,project_id,"
    "organization_id,organization_name"
).split(",")


@dataclass(frozen=True)
class Sent:
    """One request as the provider saw it: when it counted it, and how much."""

    at: datetime
    model: str = LARGE
    given: int = 0
    made: int = 0
    cached: int = 0
    project: str | None = "proj_1"
    hosted: bool = False

    @property
    def tokens(self) -> int:
        """Input and output."""
        return self.given + self.made


@dataclass
class Billing:
    """What the provider knows, and how it reads its own rule."""

    counts: str = "free"
    overage: str = "whole"
    tier: int = 3
    listed: dict[str, str] = field(default_factory=lambda: dict(GROUPS))
    closed_projects: frozenset[str] = frozenset()
    closed_days: frozenset[str] = frozenset()
    closed_from: datetime | None = None
    sent: list[Sent] = field(default_factory=list)

    def free(self) -> list[int]:
        """The free tokens of each request, in order."""
        used: defaultdict[tuple[object, str], int] = defaultdict(int)
        found = []
        for one in self.sent:
            group = self.listed.get(one.model)
            is_open = (
                group is not None
                and one.project not in self.closed_projects
                and one.at.date().isoformat() not in self.closed_days
                and (self.closed_from is None or one.at < self.closed_from)
                and not one.hosted
            )
            if not is_open:
                found.append(0)
                continue
            left = LIMITS[self.tier][group] - used[one.at.date(), group]
            fits = one.tokens <= left
            free = one.tokens if fits else max(0, left) if self.overage == "excess" else 0
            used[one.at.date(), group] += one.tokens if self.counts == "all" else free
            found.append(free)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Sums by day, project, model and tier, as the API's results have them."""
        sums: defaultdict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
        for one, free in zip(self.sent, self.free(), strict=True):
            for tier, tokens in (("incentivized-tier", free), ("default", one.tokens - free)):
                if tokens or (one.tokens == 0 and tier == "incentivized-tier"):
                    given = min(one.given, tokens) if tier == "incentivized-tier" else one.given - min(one.given, free)
                    cell = sums[one.at.date(), one.project, one.model, tier]
                    cell[0] += given
                    cell[1] += tokens - given
                    cell[2] += min(one.cached, given)
                    cell[3] += 1 if tier == "incentivized-tier" or not free else 0
        return [
            {
                "object": "organization.usage.completions.result",
                "day": day,
                "input_tokens": cell[0],
                "output_tokens": cell[1],
                "input_cached_tokens": cell[2],
                "num_model_requests": cell[3],
                "project_id": project,
                "user_id": None,
                "api_key_id": None,
                "model": model,
                "batch": None,
                "service_tier": tier,
            }
            for (day, project, model, tier), cell in sorted(sums.items(), key=str)
        ]

    def costs(self) -> list[dict[str, Any]]:
        """Line items: a model's input, cached input and output, of billed tokens and of free ones at 0."""
        found = []
        for row in self.rows():
            if row["model"] not in PRICES:
                continue
            parts = (row["input_tokens"] - row["input_cached_tokens"], row["input_cached_tokens"], row["output_tokens"])
            for what, tokens, price in zip(
                ("input", "cached input", "output"), parts, PRICES[row["model"]], strict=True
            ):
                if tokens:
                    amount = 0 if row["service_tier"] == "incentivized-tier" else tokens * Decimal(price) / 1_000_000
                    found.append(
                        {
                            "object": "organization.costs.result",
                            "day": row["day"],
                            "amount": {"value": amount, "currency": "usd"},
                            "line_item": f"{row['model']}, {what}",
                            "project_id": row["project_id"],
                            "api_key_id": None,
                            "quantity": tokens,
                            "quantity_unit": "tokens",
                        }
                    )
        return found

    def days(self) -> list[datetime]:
        """The days from the first to the last request."""
        first, last = (midnight(pick(one.at for one in self.sent)) for pick in (min, max))
        return [first + DAY * number for number in range((last - first).days + 1)]

    def pages(self, rows: list[dict[str, Any]] | None = None, *, size: int = 31) -> list[dict[str, Any]]:
        """Pages of results by day, chained by cursors."""
        rows = self.rows() if rows is None else rows
        parts = [
            {
                "object": "bucket",
                "start_time": int(day.timestamp()),
                "end_time": int((day + DAY).timestamp()),
                "results": [
                    {name: value for name, value in row.items() if name != "day"}
                    for row in rows
                    if row["day"] == day.date()
                ],
            }
            for day in self.days()
        ]
        chunks = [parts[start : start + size] for start in range(0, len(parts), size)]
        kind = rows[0]["object"] if rows else "empty"
        return [
            {
                "object": "page",
                "data": chunk,
                "has_more": number < len(chunks),
                "next_page": f"page_{kind}_{number}" if number < len(chunks) else None,
            }
            for number, chunk in enumerate(chunks, start=1)
        ]

    def usage_file(self) -> bytes:
        """The pages of usage, one a line."""
        return lines(self.pages())

    def cost_file(self) -> bytes:
        """The pages of costs, one a line."""
        return lines(self.pages(self.costs()))

    def activity_csv(self, *, delimiter: str = ",") -> bytes:
        """The dashboard's export of activity, with its floats, its capitals and its empty days."""
        out = io.StringIO()
        writer = csv.DictWriter(out, COLUMNS, delimiter=delimiter, restval="", extrasaction="ignore")
        writer.writeheader()
        rows = self.rows()
        for day in self.days():
            those = [row for row in rows if row["day"] == day.date()]
            for row in those or [{}]:
                counts = {name: f"{row[name]}.0" for name in row if isinstance(row[name], int)}
                writer.writerow({**row, **counts, **times(day), **({"batch": "FALSE"} if row else {})})
        return b"\xef\xbb\xbf" + out.getvalue().encode()

    def cost_csv(self) -> bytes:
        """The dashboard's export of costs."""
        out = io.StringIO()
        writer = csv.DictWriter(out, COST_COLUMNS, restval="", extrasaction="ignore")
        writer.writeheader()
        for row in self.costs():
            day = datetime(row["day"].year, row["day"].month, row["day"].day, tzinfo=UTC)
            amount = {"amount_value": f"{row['amount']['value']:.17f}", "amount_currency": "usd"}
            writer.writerow({**row, **amount, **times(day)})
        return out.getvalue().encode()


def midnight(instant: datetime) -> datetime:
    """The midnight with which a day begins."""
    return instant.replace(hour=0, minute=0, second=0, microsecond=0)


def times(day: datetime) -> dict[str, str]:
    """The four columns of time."""
    return {
        "start_time": f"{int(day.timestamp())}",
        "end_time": f"{int((day + DAY).timestamp())}",
        "start_time_iso": day.isoformat(),
        "end_time_iso": (day + DAY).isoformat(),
    }


def lines(pages: list[dict[str, Any]]) -> bytes:
    """Pages as JSON lines; amounts are written as JSON numbers."""
    return b"".join(dumped(page) + b"\n" for page in pages)


def dumped(page: dict[str, Any]) -> bytes:
    """A page as JSON, its amounts with all their digits."""
    numbers: list[str] = []

    def keep(value: object) -> str:
        assert isinstance(value, Decimal)
        numbers.append(f"{value:f}")
        return f"@{len(numbers) - 1}@"

    text = json.dumps(page, default=keep)
    for place, number in enumerate(numbers):
        text = text.replace(f'"@{place}@"', number)
    return text.encode()


@dataclass
class Endpoints:
    """Both endpoints on loopback: pages by cursor, a key that is asked for, and failures on demand."""

    usage: list[dict[str, Any]] = field(default_factory=list)
    costs: list[dict[str, Any]] = field(default_factory=list)
    failures: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)
    always: tuple[int, dict[str, str], bytes] | None = None
    asked: list[tuple[str, dict[str, list[str]], dict[str, str]]] = field(default_factory=list)
    body: bytes | None = None

    def __enter__(self) -> Self:
        """Listen."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def answer(self, path: str, query: dict[str, list[str]]) -> tuple[int, dict[str, str], bytes]:
        """The next answer."""
        if self.always is not None:
            return self.always
        if self.failures:
            return self.failures.pop(0)
        if self.body is not None:
            return 200, {}, self.body
        pages = self.costs if path.endswith("/costs") else self.usage if path.endswith("/completions") else []
        if not pages:
            return 200, {}, json.dumps({"object": "page", "data": [], "has_more": False, "next_page": None}).encode()
        cursor = query.get("page", [None])[0]
        number = 0 if cursor is None else 1 + [page["next_page"] for page in pages].index(cursor)
        return 200, {}, dumped(pages[number])


def _handler(endpoints: Endpoints) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Answers one request."""

        def do_GET(self) -> None:
            """Ask the endpoints."""
            parts = urlsplit(self.path)
            query = parse_qs(parts.query)
            endpoints.asked.append((parts.path, query, dict(self.headers)))
            if self.headers["Authorization"] != f"Bearer {KEY}":
                status, headers, body = (
                    401,
                    {},
                    b'{"error": {"message": "Incorrect API key provided: ' + KEY.encode() + b'"}}',
                )
            else:
                status, headers, body = endpoints.answer(parts.path, query)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    return Handler


def moved(one: Sent, by: timedelta) -> Sent:
    """The same request, counted at another time."""
    return replace(one, at=one.at + by)
