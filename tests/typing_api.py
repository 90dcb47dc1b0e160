"""The public API as a type checker sees it: never run, only checked."""

from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from typing import assert_type

from gratis import (
    AsyncMeter,
    Decision,
    Enrollment,
    Entry,
    Explanation,
    Meter,
    Reason,
    Request,
    RequestError,
    Sharing,
    Standing,
    Verdict,
)


def sync(meter: Meter, request: Request) -> None:
    """The verbs of a meter."""
    decision = meter.decide(request)
    assert_type(decision, Decision)
    assert_type(decision.verdict, Verdict)
    assert_type(decision.reason, Reason)
    assert_type(decision.tokens, int | None)
    assert_type(decision.window_end, datetime | None)
    assert_type(meter.decide_many([request]), list[Decision | RequestError])
    assert_type(meter.explain(request), Explanation)
    assert_type(meter.standing("acme"), list[Standing])
    assert_type(meter.ledger(after=3), Iterator[Entry])
    meter.enroll("acme", Enrollment(tier=3, sharing=Sharing.ENABLED), actor="ana")
    with Meter.open("memory:") as opened:
        assert_type(opened, Meter)


async def asynchronous(request: Request) -> None:
    """The same verbs for asyncio."""
    async with AsyncMeter.open("memory:") as meter:
        assert_type(meter, AsyncMeter)
        assert_type(await meter.decide(request), Decision)
        assert_type(await meter.decide_many([request]), list[Decision | RequestError])
        assert_type(await meter.explain(request), Explanation)
        assert_type(await meter.standing(), list[Standing])
        assert_type(meter.ledger(), AsyncIterator[Entry])
