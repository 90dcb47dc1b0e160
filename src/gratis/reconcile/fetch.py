"""The provider's reports, asked for page by page with an admin key.

Only reads, so asking again is always safe; it is done a bounded number of times, no sooner than the provider says. The
key goes to one host, over TLS unless that is this machine, follows no redirect, and is in no message. What comes is
kept as it came, so that it can be read again offline.
"""

from __future__ import annotations

import http.client
import re
from typing import TYPE_CHECKING, Final
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode, urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

import msgspec
from msgspec import Struct

from gratis.errors import GratisError
from gratis.model import shown
from gratis.reconcile.pages import pages_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime
    from urllib.request import OpenerDirector

BASE_URL: Final = "https://api.openai.com/v1"
LAG_MINUTES: Final = 15
TRIES_MAX: Final = 5
WAIT_MAX_S: Final = 60.0
TIMEOUT_S: Final = 60.0
PAGE_BYTES_MAX: Final = 64 << 20
PAGES_MAX: Final = 10_000
LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
PASSING: Final = frozenset({429, 500, 502, 503, 504})
REFUSED: Final = frozenset({401, 403})
GONE: Final = 404
_CODE = re.compile(r"[a-z_]{1,64}")
_KEY = re.compile(r"[\x21-\x7e]{1,1024}", flags=re.ASCII)


class FetchError(GratisError):
    """A report that could not be fetched."""


class Asked(Struct, frozen=True):
    """One report: its path, by what it is grouped, how many days a page may have, whether it must be there."""

    path: str
    group_by: tuple[str, ...]
    limit: int
    is_needed: bool = True


class Fetched(Struct, frozen=True):
    """One page as it came; `name` is that of a file for it."""

    name: str
    content: bytes


REPORTS: Final = (
    Asked("usage/completions", ("project_id", "model", "service_tier", "batch"), 31),
    Asked("usage/embeddings", ("project_id", "model"), 31, is_needed=False),
    Asked("usage/web_search_calls", ("project_id", "model"), 31, is_needed=False),
    Asked("usage/file_search_calls", ("project_id",), 31, is_needed=False),
    Asked("usage/code_interpreter_sessions", ("project_id",), 31, is_needed=False),
    Asked("costs", ("project_id", "line_item"), 180),
)


def fetch(
    *,
    key: str,
    since: datetime,
    until: datetime,
    wait: Callable[[float], None],
    base_url: str = BASE_URL,
    reports: tuple[Asked, ...] = REPORTS,
) -> Iterator[Fetched]:
    """All pages of all reports for these days, from one midnight to another; each is checked before it is given.

    What is asked is checked at once, before the first page is wanted.
    """
    if not _KEY.fullmatch(key):
        raise FetchError("the admin key: expected printable ASCII without spaces")
    for name, edge in (("since", since), ("until", until)):
        if edge.time().isoformat() != "00:00:00":
            raise FetchError(f"{name}: found {edge.isoformat()}; expected a midnight in UTC: reports are by day")
    if until <= since:
        raise FetchError(f"until: {until.date()} is not after since {since.date()}")
    client = _Client(key, base_url, wait)
    return (page for report in reports for page in _pages(client, report, since, until))


def _pages(client: _Client, report: Asked, since: datetime, until: datetime) -> Iterator[Fetched]:
    """One report, page by page along its cursors."""
    query = [
        ("start_time", str(int(since.timestamp()))),
        ("end_time", str(int(until.timestamp()))),
        ("limit", str(report.limit)),
        *(("group_by", name) for name in report.group_by),
    ]
    seen: set[str] = set()
    cursor: str | None = None
    for number in range(1, PAGES_MAX + 1):
        content = client.get(
            report.path, query if cursor is None else [*query, ("page", cursor)], is_needed=report.is_needed
        )
        if content is None:
            return
        name = f"{report.path.replace('/', '-')}-{number:04}.json"
        found = pages_of(content, file=f"{report.path}, page {number}")
        if len(found) != 1:
            raise FetchError(f"{report.path}: page {number}: found {len(found)} pages; expected one")
        page = found[0]
        yield Fetched(name, content)
        if not page.has_more:
            return
        assert page.next_page is not None, "a page that says more has a cursor"
        cursor = page.next_page
        if cursor in seen:
            raise FetchError(f"{report.path}: page {number}: the cursor of an earlier page again; expected another")
        seen.add(cursor)
    raise FetchError(f"{report.path}: more than {PAGES_MAX} pages")


class _Client:
    """Asks one host, patiently and with bounds."""

    def __init__(self, key: str, base_url: str, wait: Callable[[float], None]) -> None:
        parts = urlsplit(base_url)
        is_near = parts.hostname in LOOPBACK
        if parts.scheme != "https" and not (parts.scheme == "http" and is_near):
            raise FetchError(f"the base URL: found {shown(_bare(base_url))}; expected https, or http to this machine")
        if not parts.hostname or parts.username is not None or parts.query or parts.fragment:
            raise FetchError(f"the base URL: found {shown(_bare(base_url))}; expected https://HOST/v1")
        self._host = parts.netloc
        self._base = base_url.rstrip("/")
        self._key = key
        self._wait = wait
        self._opener: OpenerDirector = build_opener(_NoRedirect(), *([ProxyHandler({})] if is_near else []))

    def get(self, path: str, query: list[tuple[str, str]], *, is_needed: bool) -> bytes | None:
        """What the provider says; None for a report that is not there and need not be."""
        url = f"{self._base}/organization/{path}?{urlencode(query)}"
        said, advice = "", ""
        for turn in range(TRIES_MAX):
            ask = Request(url, headers={"Authorization": f"Bearer {self._key}", "Accept": "application/json"})  # noqa: S310 - the scheme is checked
            try:
                with self._opener.open(ask, timeout=TIMEOUT_S) as answer:
                    content: bytes = answer.read(PAGE_BYTES_MAX + 1)
            except HTTPError as error:
                with error:
                    said, advice = _said(error), ""
                    after = error.headers.get("Retry-After")
                    if error.code == GONE and not is_needed:
                        return None
                    self._check(path, error.code, said)
                self._rest(turn, after)
            except (URLError, OSError, http.client.HTTPException) as error:
                said = f"no answer from {self._host} ({_why(error)})"
                advice = ", or check the network, a proxy and OPENAI_BASE_URL"
                self._rest(turn, None)
            else:
                if len(content) > PAGE_BYTES_MAX:
                    raise FetchError(f"{path}: more than {PAGE_BYTES_MAX} bytes in a page")
                return content
        raise FetchError(f"{path}: {said}, {TRIES_MAX} times; try again later{advice}")

    def _check(self, path: str, status: int, said: str) -> None:
        """Raise for an answer that asking again would not change."""
        if status in REFUSED:
            raise FetchError(f"{path}: {said}: the key is refused; expected an admin key in OPENAI_ADMIN_KEY")
        if status not in PASSING:
            raise FetchError(f"{path}: {said}")

    def _rest(self, turn: int, after: str | None) -> None:
        """Wait as long as the provider says, within bounds, or else twice as long each time; not after the last try."""
        if turn + 1 < TRIES_MAX:
            asked = float(after) if after is not None and re.fullmatch(r"\d{1,6}(\.\d+)?", after) else 2.0**turn
            self._wait(min(asked, WAIT_MAX_S))


class _NoRedirect(HTTPRedirectHandler):
    """A redirect would take the key somewhere else."""

    def redirect_request(self, req: Request, *rest: object) -> Request | None:
        """Refuse; the last argument is where it would lead."""
        where = urlsplit(req.full_url).path
        raise FetchError(f"{where}: a redirect to {shown(urlsplit(str(rest[-1])).hostname)}; none is followed")


def _said(error: HTTPError) -> str:
    """Status, and the provider's word for it: never its message, which may repeat the key."""
    try:
        value = msgspec.json.decode(error.read(1 << 16))
        code = value["error"]["code"] or value["error"]["type"]
    except (msgspec.DecodeError, OSError, KeyError, TypeError, IndexError, http.client.HTTPException):
        code = None
    named = isinstance(code, str) and _CODE.fullmatch(code) is not None
    return f"HTTP {error.code} ({code})" if named else f"HTTP {error.code}"


def _why(error: Exception) -> str:
    """What kept a host from answering: its kind, and the system's words for it."""
    reason = getattr(error, "reason", error)
    words = reason.strerror if isinstance(reason, OSError) else None
    return f"{type(reason).__name__}: {words}" if words else type(reason).__name__


def _bare(url: str) -> str:
    """A URL without what may be secret in it."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
