"""How a client of the official SDK is made to meter its calls: a copy of it with four methods of its own.

The SDK sends every call of every resource through `client.request`, its own retries inside; so there a call is held
and decided, once, however it was made. The other three only listen: to the attempts that begin, to what became of
those that are tried again, and to the answer.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload
from urllib.parse import urlsplit

from gratis import clock as system
from gratis.errors import GratisError, RequestError
from gratis.meter import HOLD_TIME, AsyncMeter, Meter
from gratis.model import Expiry, shown
from gratis.openai.answers import heard, marked, usage_of, when_closed, when_closed_async
from gratis.openai.calls import REFUSE, SEND, Call, Plan, Switch, admitted, ended, failed

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Mapping
    from datetime import datetime, timedelta

    from openai import AsyncOpenAI, OpenAI

    from gratis.flows import Flow
    from gratis.usage.bound import Count

    Client = TypeVar("Client", bound=OpenAI)
    AsyncClient = TypeVar("AsyncClient", bound=AsyncOpenAI)

T = TypeVar("T")
LISTENED: Final = ("request", "_prepare_request", "_sleep_for_retry", "_process_response")
REFUSED: Final = range(400, 500)
TIMED_OUT: Final = 408
# What says that there was no connection to send anything on.
UNSENT: Final = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol"})

_CALL: ContextVar[Call | None] = ContextVar("gratis.openai.call", default=None)
_ending: set[asyncio.Task[None]] = set()  # a loop keeps only weak references to its tasks


def switch(*models: str, otherwise: str = SEND) -> Switch:
    """Send a completion that would not be free to the first of other models that has room for it.

    Where none has, `otherwise` says whether it is sent to its own ("send") or refused ("refuse").
    """
    if not models or not all(models):
        raise RequestError("switch", f"found {shown(models)}; expected the models to switch to")
    if otherwise not in (SEND, REFUSE):
        raise RequestError("switch", f"otherwise: found {shown(otherwise)}; expected {SEND!r} or {REFUSE!r}")
    return Switch(models, otherwise)


@overload
def meter(
    client: Client,
    *,
    meter: Meter,
    account: str = ...,
    project: str | None = ...,
    otherwise: str | Switch = ...,
    tokens_max: int | Callable[[Mapping[str, Any]], int] | None = ...,
    output_max: int | None = ...,
    count: Count | None = ...,
    for_: timedelta = ...,
    on_expiry: str = ...,
    clock: Callable[[], datetime] = ...,
) -> Client: ...
@overload
def meter(
    client: AsyncClient,
    *,
    meter: AsyncMeter,
    account: str = ...,
    project: str | None = ...,
    otherwise: str | Switch = ...,
    tokens_max: int | Callable[[Mapping[str, Any]], int] | None = ...,
    output_max: int | None = ...,
    count: Count | None = ...,
    for_: timedelta = ...,
    on_expiry: str = ...,
    clock: Callable[[], datetime] = ...,
) -> AsyncClient: ...
def meter(
    client: Any,
    *,
    meter: Meter | AsyncMeter,
    account: str = "default",
    project: str | None = None,
    otherwise: str | Switch = SEND,
    tokens_max: int | Callable[[Mapping[str, Any]], int] | None = None,
    output_max: int | None = None,
    count: Count | None = None,
    for_: timedelta = HOLD_TIME,
    on_expiry: str = Expiry.DECIDED,
    clock: Callable[[], datetime] = system.now,
) -> Any:
    """A copy of a client that meters each call; the client that was given is left as it was.

    `otherwise` says what becomes of a call that would not be free: "send", "refuse" (`Refused` is raised and nothing
    is sent), or `switch("another-model")`. Whether it would be is judged by the most that it can take: the bytes of
    its input (or `count`, a tokenizer) and its limit of output, or `output_max` where it sets none. What bytes cannot
    bound takes `tokens_max`, a number or a function of the body; without it the call is sent and decided afterwards
    or, where it could be refused, a `UsageError`. `project` is the client's unless given. A hold lasts `for_`, longer
    than the SDK's retries may take; one that runs out is `decided` by its bound, or `released`.
    """
    kind = _kind(client, meter)
    if otherwise not in (SEND, REFUSE) and not isinstance(otherwise, Switch):
        raise RequestError("otherwise", f"found {shown(otherwise)}; expected {SEND!r}, {REFUSE!r} or switch(…)")
    plan = Plan(
        meter=meter,
        account=account,
        project=project,
        otherwise=otherwise,
        tokens_max=tokens_max,
        output_max=output_max,
        count=count,
        for_=for_,
        on_expiry=on_expiry,
        clock=clock,
    )
    methods = _blocking(kind, plan) if isinstance(meter, Meter) else _asynchronous(kind, plan)
    copy = client.copy()
    # A class of its own, so that a copy of the copy (`with_options`) is metered too.
    copy.__class__ = type(kind.__name__, (kind,), {**methods, **_listening(kind), "_gratis_plan": plan})
    return copy


def _kind(client: Any, meter: Any) -> type[Any]:
    """The client's class, if it can be metered, and by this meter."""
    try:
        openai = importlib.import_module("openai")
    except ImportError:
        raise GratisError("the official SDK is not installed; pip install openai") from None
    if not isinstance(client, openai.OpenAI | openai.AsyncOpenAI):
        raise TypeError(f"client: found a {type(client).__name__}; expected an OpenAI or AsyncOpenAI")
    expected = AsyncMeter if isinstance(client, openai.AsyncOpenAI) else Meter
    if not isinstance(meter, expected):
        raise TypeError(f"meter: found a {type(meter).__name__}; expected a {expected.__name__} for this client")
    if hasattr(client, "_gratis_plan"):
        raise GratisError("this client is metered already; expected the one that it was made of")
    kind: type[Any] = type(client)
    if not all(hasattr(kind, name) for name in LISTENED):
        raise GratisError(f"openai {openai.__version__} is not supported: its client has other methods")
    return kind


def _blocking(kind: type[Any], plan: Plan) -> dict[str, Any]:
    """The methods of a client that blocks."""

    def request(self: Any, cast_to: Any, options: Any, *, stream: bool = False, **how: Any) -> Any:
        with suppress(IndexError):
            while True:
                _run(plan.meter, ended(plan, plan.dropped.popleft()))
        call = _run(plan.meter, admitted(plan, **_asked(self, options)))
        if call is None:
            with _current(None):
                return kind.request(self, cast_to, options, stream=stream, **how)
        try:
            with _current(call):
                answer = kind.request(self, cast_to, _sent(options, call), stream=stream, **how)
        except Exception as error:
            _note(call, error)
            _run(plan.meter, failed(plan, call))
            marked(error, call)
            raise
        if call.http is None:  # a class of the caller's answered by itself
            _run(plan.meter, failed(plan, call))
        elif call.http.is_closed:
            _run(plan.meter, ended(plan, call))
        else:
            owner = call.http if stream else answer
            when_closed(owner, lambda: _run(plan.meter, ended(plan, call)), lambda: plan.dropped.append(call))
        return marked(answer, call)

    return {"request": request}


def _asynchronous(kind: type[Any], plan: Plan) -> dict[str, Any]:
    """The methods of a client of asyncio."""

    async def request(self: Any, cast_to: Any, options: Any, *, stream: bool = False, **how: Any) -> Any:
        call = await _admitted(plan, **_asked(self, options))
        if call is None:
            with _current(None):
                return await kind.request(self, cast_to, options, stream=stream, **how)
        try:
            with _current(call):
                answer = await kind.request(self, cast_to, _sent(options, call), stream=stream, **how)
        except Exception as error:
            _note(call, error)
            await _surely(_run_async(plan.meter, failed(plan, call)))
            marked(error, call)
            raise
        if call.http is None:  # a class of the caller's answered by itself
            await _surely(_run_async(plan.meter, failed(plan, call)))
        elif call.http.is_closed:
            await _surely(_run_async(plan.meter, ended(plan, call)))
        else:
            when_closed_async(
                call.http if stream else answer, lambda: _surely(_run_async(plan.meter, ended(plan, call)))
            )
        return marked(answer, call)

    return {"request": request}


def _run(meter: Any, flow: Flow[T]) -> T:
    """Drive a flow."""
    try:
        ask = next(flow)
        while True:
            try:
                answer = getattr(meter, ask.verb)(*ask.args, **ask.options)
            except Exception as error:  # noqa: BLE001 - each error is the flow's to judge
                ask = flow.throw(error)
            else:
                ask = flow.send(answer)
    except StopIteration as end:
        found: T = end.value
        return found


async def _run_async(meter: Any, flow: Flow[T]) -> T:
    """The same, of a meter for asyncio."""
    try:
        ask = next(flow)
        while True:
            try:
                answer = await getattr(meter, ask.verb)(*ask.args, **ask.options)
            except Exception as error:  # noqa: BLE001 - each error is the flow's to judge
                ask = flow.throw(error)
            else:
                ask = flow.send(answer)
    except StopIteration as end:
        found: T = end.value
        return found


def _listening(kind: type[Any]) -> dict[str, Any]:
    """The methods that only listen; of a client of asyncio, they hand on what is to be awaited."""

    def prepare_request(self: Any, request: Any) -> Any:
        call = _CALL.get()
        if call is not None:
            call.sent += 1
        return kind._prepare_request(self, request)  # noqa: SLF001 - the SDK's own hook

    def sleep_for_retry(self: Any, **how: Any) -> Any:
        call, error = _CALL.get(), sys.exception()
        if call is not None and error is not None:
            _note(call, error)
        return kind._sleep_for_retry(self, **how)  # noqa: SLF001 - between two attempts, and nowhere else

    def process_response(self: Any, **how: Any) -> Any:
        call = _CALL.get()
        if call is not None:
            call.http = how["response"]
            call.read = lambda: usage_of(call)
        return kind._process_response(self, **how)  # noqa: SLF001 - the one place that every answer passes

    return {
        "_prepare_request": prepare_request,
        "_sleep_for_retry": sleep_for_retry,
        "_process_response": process_response,
    }


@contextmanager
def _current(call: Call | None) -> Iterator[None]:
    """Have the SDK's methods know which call they are at."""
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)


def _asked(client: Any, options: Any) -> dict[str, Any]:
    """What the SDK is asked to send, as the flows want to know it."""
    path = urlsplit(options.url).path
    if options.url.startswith(("http:", "https:")):
        path = path.partition("/v1/")[2]
    parts = [part for part in (options.json_data, options.extra_json) if isinstance(part, dict)]
    body = {name: value for part in parts for name, value in part.items()}
    return {"method": options.method.lower(), "path": path.strip("/"), "body": body, "project": client.project}


def _sent(options: Any, call: Call) -> Any:
    """The SDK's options, with what is to be sent instead, and a parser that reads the usage first."""
    update: dict[str, Any] = {"post_parser": heard(call, options.post_parser)}
    if call.changes:
        update["extra_json"] = {**(options.extra_json or {}), **call.changes}
    return options.model_copy(update=update)


def _note(call: Call, error: BaseException) -> None:
    """Note of an attempt that failed whether the provider surely did not run it."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        call.refused += status in REFUSED and status != TIMED_OUT
    else:
        call.refused += not {type(error).__name__, type(error.__cause__).__name__}.isdisjoint(UNSENT)


async def _admitted(plan: Plan, **asked: Any) -> Call | None:
    """A call's admission; if its task is cancelled meanwhile nothing is sent, so its hold is given back."""
    admission = asyncio.ensure_future(_run_async(plan.meter, admitted(plan, **asked)))

    async def give_back() -> None:
        with suppress(Exception):
            call = await admission
            if call is not None:
                await _run_async(plan.meter, failed(plan, call))

    try:
        return await asyncio.shield(admission)
    except asyncio.CancelledError:
        _kept(give_back())
        raise


async def _surely(ending: Coroutine[Any, Any, None]) -> None:
    """Have a call ended even if its task is cancelled meanwhile: what is known of it must not be lost."""
    await asyncio.shield(_kept(ending))


def _kept(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Work that goes on whoever waits for it."""
    task = asyncio.ensure_future(work)
    _ending.add(task)
    task.add_done_callback(_ending.discard)
    return task
