"""Reports are fetched page by page, patiently and with bounds, and the key is told to nobody else."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from gratis.errors import GratisError
from gratis.reconcile.fetch import REPORTS, TRIES_MAX, WAIT_MAX_S, FetchError, fetch
from gratis.reconcile.files import reports_of

from .billing import KEY, LARGE, Billing, Endpoints, Sent

FIRST = datetime(2025, 5, 1, tzinfo=UTC)
SENT = [Sent(FIRST + timedelta(days=day, hours=9), LARGE, 1_000 + day, 10) for day in range(5)]
BILLING = Billing(sent=SENT)
USAGE = REPORTS[:1]


@pytest.fixture
def provider():
    """Both endpoints, with five days on three pages each."""
    with Endpoints(usage=BILLING.pages(size=2), costs=BILLING.pages(BILLING.costs(), size=2)) as endpoints:
        yield endpoints


def fetched(provider, *, waits=None, reports=REPORTS, key=KEY, url=None, **options):
    """What is fetched, and how long was waited."""
    slept = [] if waits is None else waits
    options = {"since": FIRST, "until": FIRST + timedelta(days=5), **options}
    return list(fetch(key=key, wait=slept.append, base_url=url or provider.url, reports=reports, **options))


def test_all_pages_of_all_reports_come(provider):
    """Along the cursors, to the last page of each report; what comes can be read offline."""
    pages = fetched(provider)
    names = [page.name for page in pages]
    assert [name for name in names if "completions" in name] == [f"usage-completions-{n:04}.json" for n in (1, 2, 3)]
    assert [name for name in names if "costs" in name] == [f"costs-{n:04}.json" for n in (1, 2, 3)]
    report = reports_of((page.name, page.content) for page in pages)
    assert sum(row.tokens for row in report.usage) == sum(one.tokens for one in SENT)
    assert len(report.costs) == len(BILLING.costs())


def test_what_is_asked(provider):
    """Whole days, grouped by what is compared, as many days a page as there may be."""
    fetched(provider)
    path, query, headers = provider.asked[0]
    assert path == "/v1/organization/usage/completions"
    assert query == {
        "start_time": ["1746057600"],
        "end_time": ["1746489600"],
        "limit": ["31"],
        "group_by": ["project_id", "model", "service_tier", "batch"],
    }
    assert headers["Authorization"] == f"Bearer {KEY}"
    costs = [query for path, query, _ in provider.asked if path.endswith("/costs")]
    assert (costs[0]["limit"], costs[0]["group_by"]) == (["180"], ["project_id", "line_item"])
    assert costs[1]["page"] == ["page_organization.costs.result_1"]


def test_busy_then_fine(provider):
    """A 429 is waited out as long as it says, but never longer than the bound."""
    provider.failures = [(429, {"Retry-After": "7"}, b"{}"), (503, {"Retry-After": "9999"}, b""), (500, {}, b"")]
    waits = []
    assert len(fetched(provider, waits=waits, reports=USAGE)) == 3
    assert waits == [7.0, WAIT_MAX_S, 4.0]


def test_busy_without_end(provider):
    """After so many times it is an error that says what the provider said."""
    provider.always = (429, {}, b'{"error": {"code": "rate_limit_exceeded", "message": "slow down"}}')
    waits = []
    with pytest.raises(FetchError, match=r"usage/completions: HTTP 429 \(rate_limit_exceeded\), 5 times"):
        fetched(provider, waits=waits)
    assert len(provider.asked) == TRIES_MAX
    assert len(waits) == TRIES_MAX - 1


def test_a_refused_key_is_not_repeated(provider):
    """A wrong key is asked about once, and is in no message, though the provider's answer repeats it."""
    with pytest.raises(FetchError, match="the key is refused") as error:
        fetched(provider, key="another-key")
    assert KEY not in str(error.value)
    assert "another-key" not in str(error.value)
    assert len(provider.asked) == 1


@pytest.mark.parametrize("key", ["", "a b", "a\nb", "schlüssel"])
def test_a_key_that_is_none_is_never_sent(provider, key):
    """A header could not carry it; it is not shown either."""
    with pytest.raises(FetchError, match="expected printable ASCII") as error:
        fetched(provider, key=key)
    assert not key or key not in str(error.value)
    assert provider.asked == []


def test_a_redirect_is_not_followed(provider):
    """The key goes to one host only."""
    with Endpoints(usage=BILLING.pages()) as elsewhere:
        provider.always = (302, {"Location": f"{elsewhere.url}/organization/usage/completions"}, b"")
        with pytest.raises(FetchError, match=r"a redirect to '127.0.0.1'; none is followed"):
            fetched(provider)
        assert elsewhere.asked == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://api.example.com/v1", "expected https"),
        ("ftp://127.0.0.1/v1", "expected https"),
        ("https://user:word@api.example.com/v1", "expected https://HOST/v1"),
        ("https:///v1", "expected https://HOST/v1"),
    ],
)
def test_only_tls_or_this_machine(provider, url, message):
    """A key is never sent in the clear; what a URL carries besides is not shown."""
    with pytest.raises(FetchError, match=message) as error:
        fetched(provider, url=url)
    assert "word" not in str(error.value)


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"data": ', b"[]", b"null", b'{"object": "page"}'])
def test_what_is_no_page_is_refused(provider, body):
    """An answer that is no page names the report and the page."""
    provider.body = body
    with pytest.raises(GratisError, match=r"usage/completions"):
        fetched(provider)


def test_a_cursor_that_repeats_ends_it(provider):
    """A provider that leads in circles is left."""
    page = {**BILLING.pages()[0], "has_more": True, "next_page": "again"}
    provider.body = json.dumps(page).encode()
    with pytest.raises(FetchError, match="the cursor of an earlier page again"):
        fetched(provider, reports=USAGE)
    assert len(provider.asked) == 2


def test_more_without_a_cursor_is_refused(provider):
    """What says more and names no cursor is half a report."""
    provider.body = json.dumps({**BILLING.pages()[0], "has_more": True, "next_page": None}).encode()
    with pytest.raises(GratisError, match="has_more is true and next_page is null"):
        fetched(provider)


def test_a_sibling_that_is_not_there_is_left_out(provider):
    """A report that need not be there may be missing; one that must be there may not."""
    gone = (404, {}, b"{}")
    provider.failures = []
    provider.always = gone
    assert fetched(provider, reports=REPORTS[1:2]) == []
    with pytest.raises(FetchError, match=r"usage/completions: HTTP 404"):
        fetched(provider, reports=USAGE)


@pytest.mark.parametrize(
    ("since", "until"),
    [(FIRST, FIRST), (FIRST + timedelta(hours=1), FIRST + timedelta(days=1)), (FIRST, FIRST + timedelta(hours=5))],
)
def test_only_whole_days(provider, since, until):
    """Reports are by day, so half a day cannot be asked for."""
    with pytest.raises(FetchError, match=r"midnight in UTC|is not after"):
        fetched(provider, since=since, until=until)


def test_nobody_is_there():
    """A host that does not answer is an error after so many tries."""
    waits = []
    with Endpoints() as endpoints:
        url = endpoints.url
    with pytest.raises(FetchError, match=r"usage/completions: .*, 5 times; try again later"):
        fetched(None, url=url, waits=waits)
    assert waits == [1.0, 2.0, 4.0, 8.0]


def test_who_does_not_answer_is_named():
    """The host, why, and what to check."""
    with Endpoints() as endpoints:
        host = endpoints.url.split("/")[2]
    with pytest.raises(FetchError) as error:
        fetched(None, url=f"http://{host}/v1")
    assert f"usage/completions: no answer from {host} (ConnectionRefusedError: Connection refused)" in str(error.value)
    assert "check the network, a proxy and OPENAI_BASE_URL" in str(error.value)


def test_what_is_asked_is_checked_before_a_page_is_wanted(provider):
    """A key that is none is refused at once, not when the first page is read."""
    with pytest.raises(FetchError, match="expected printable ASCII"):
        fetch(key="", since=FIRST, until=FIRST + timedelta(days=1), wait=[].append, base_url=provider.url)
