"""What an answer of the SDK tells of its call, when it has ended, and where its decision is found.

An answer stays what it was: a stream stays the SDK's own, and a decision is kept beside a response's fields, in none.
"""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from gratis.errors import GratisError
from gratis.model import Usage
from gratis.openai.calls import Record
from gratis.usage import read
from gratis.usage.fields import get, has_fields
from gratis.usage.shapes import project_in
from gratis.usage.tally import Tally

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from gratis.model import Decision
    from gratis.openai.calls import Call

MARK = "_gratis"


def decision(answer: Any) -> Decision:
    """The decision on the call that an answer answers: a response, a raw one, or a stream that has ended.

    Where there is none, the error says why; if the store failed after the provider had answered, it is the store's.
    """
    record = getattr(getattr(answer, "_raw_stream", answer), MARK, None)
    if not isinstance(record, Record):
        raise GratisError(f"found a {type(answer).__name__}, which is no answer to a metered call")
    if record.error is not None:
        raise record.error
    if record.decision is None:
        raise GratisError(f"this call has no decision: {record.why}")
    return record.decision


def marked(answer: Any, call: Call) -> Any:
    """An answer that its decision can be asked for; a mere text or list has no place for it."""
    with suppress(AttributeError, TypeError):
        object.__setattr__(answer, MARK, call.record)
    return answer


def heard(call: Call, parser: Any) -> Callable[[Any], Any]:
    """A parser that reads the usage of what the SDK parsed, before the caller's own parser may fail on it."""

    def parse(answer: Any) -> Any:
        _hear(call, answer)
        return marked(parser(answer) if callable(parser) else answer, call)

    return parse


def usage_of(call: Call) -> Usage:
    """What the answer of a call has said of its usage; nothing where it could not be read."""
    if call.told is None:
        body = _body(call.http)
        usage = Usage() if body is None else read(body)
    else:
        usage = call.told()
    return replace(usage, project=project_in(getattr(call.http, "headers", None)) or usage.project)


def when_closed(owner: Any, end: Callable[[], None], drop: Callable[[], None]) -> None:
    """Call `end` once an answer is closed, as every end of it does; `drop` where it is only thrown away.

    What is thrown away may be closed by the garbage collector in the midst of anything, so nothing is waited for then.
    """
    close = owner.close

    def closed() -> None:
        try:
            close()
        finally:
            (drop if isinstance(sys.exception(), GeneratorExit) else end)()

    owner.close = closed


def when_closed_async(owner: Any, end: Callable[[], Awaitable[None]]) -> None:
    """The same for asyncio, where what is thrown away is closed in a task of its loop."""
    name = "aclose" if hasattr(owner, "aclose") else "close"
    close = getattr(owner, name)

    async def closed() -> None:
        try:
            await close()
        finally:
            await end()

    setattr(owner, name, closed)


def _hear(call: Call, answer: Any) -> None:
    """Have the usage of an answer read: at once of a whole one, chunk by chunk of a stream."""
    openai = importlib.import_module("openai")
    if isinstance(answer, openai.Stream | openai.AsyncStream):
        tally = Tally()
        call.told = tally.understood
        passed = _passed if isinstance(answer, openai.Stream) else _passed_async
        # The SDK's streams take their chunks from here, whoever reads them.
        answer._iterator = passed(answer._iterator, tally, hides_usage=call.hides_usage)  # noqa: SLF001 - no other place
    elif has_fields(answer):
        call.told = lambda: read(answer)


def _passed(chunks: Any, tally: Tally, *, hides_usage: bool) -> Iterator[Any]:
    with closing(chunks):
        for chunk in chunks:
            tally.note(chunk)
            if not (hides_usage and _is_usage_alone(chunk)):
                yield chunk


async def _passed_async(chunks: Any, tally: Tally, *, hides_usage: bool) -> AsyncIterator[Any]:
    try:
        async for chunk in chunks:
            tally.note(chunk)
            if not (hides_usage and _is_usage_alone(chunk)):
                yield chunk
    finally:
        with suppress(RuntimeError):  # a loop that ends closes all that is left at once, this and what it reads from
            await chunks.aclose()


def _is_usage_alone(chunk: Any) -> bool:
    """Whether a chunk is there only because a usage was asked for."""
    return get(chunk, "choices") == [] and get(chunk, "usage") is not None


def _body(http: Any) -> Any:
    """The JSON of an answer that was read and not parsed; None where there is none."""
    if "json" not in str(http.headers.get("content-type")):
        return None
    try:
        body = json.loads(http.content)
    except (ValueError, RuntimeError):  # no JSON, or not read
        return None
    return body if isinstance(body, dict) else None
