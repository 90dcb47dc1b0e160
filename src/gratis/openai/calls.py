"""What a call of a model is to the meter: held before it is sent; then settled, released, or left to its hold.

Nothing here waits and nothing knows the SDK: each step is a flow, as the meter's own verbs are, that a blocking and an
asynchronous client drive alike. When in doubt whether the provider ran a call, its hold stays: it runs out by its
bound, and nothing becomes free that may have been charged.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from msgspec import Struct, field
from msgspec.structs import replace

from gratis.errors import Conflict, GratisError, UsageError
from gratis.flows import Ask
from gratis.model import Decision, Kind, Request, Usage, stamp
from gratis.usage import bound, request as request_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime, timedelta

    from gratis.flows import Flow
    from gratis.model import Hold
    from gratis.usage.bound import Count

LATER_MAX: Final = 10_000
SEND: Final = "send"
REFUSE: Final = "refuse"
# What runs a model and answers with it. A call of any other path that names a model is metered as a completion.
METERED: Final = {
    "chat/completions": Kind.COMPLETION,
    "completions": Kind.COMPLETION,
    "responses": Kind.COMPLETION,
    "responses/compact": Kind.COMPLETION,
    "embeddings": Kind.EMBEDDING,
    "images/generations": Kind.IMAGE,
    "images/edits": Kind.IMAGE,
    "images/variations": Kind.IMAGE,
    "audio/transcriptions": Kind.AUDIO,
    "audio/translations": Kind.AUDIO,
    "audio/speech": Kind.AUDIO,
}
# What names a model and takes no tokens of it: a whole path, or the first word of one.
HARMLESS: Final = frozenset({"assistants", "moderations", "responses/input_tokens"})
# What runs models later or elsewhere, so that no answer here tells what it took.
UNSEEN: Final = ("agents", "batches", "chatkit", "evals", "fine_tuning", "live", "realtime", "threads")
STREAMS_ASKED: Final = frozenset({"chat/completions", "completions"})  # they tell their usage only if asked

log = logging.getLogger(__name__)


class Switch(Struct, frozen=True):
    """Other models to send to, in this order, and what to do where none of them fits."""

    models: tuple[str, ...]
    otherwise: str = SEND


class Plan(Struct, frozen=True, kw_only=True):
    """How a client is metered, and what its calls have in common."""

    meter: Any
    account: str
    project: str | None
    otherwise: str | Switch
    tokens_max: int | Callable[[Mapping[str, Any]], int] | None
    output_max: int | None
    count: Count | None
    for_: timedelta
    on_expiry: str
    clock: Callable[[], datetime]
    later: dict[str, Call] = {}
    dropped: deque[Call] = field(default_factory=deque)
    warned: set[str] = set()


class Record(Struct):
    """What is known of a call, for those who hold its answer: the decision, or why there is none."""

    decision: Decision | None = None
    error: Exception | None = None
    why: str = "it has not ended: read its stream to the end, or close it"


class Call(Struct):
    """One call on its way. `changes` are what is sent instead of what the caller's body says.

    `sent` counts the attempts that the SDK began, `refused` those that the provider surely did not run.
    """

    request: Request
    hold: Hold | None
    record: Record
    changes: dict[str, Any] = {}
    is_background: bool = False
    is_poll: bool = False
    is_over: bool = False
    hides_usage: bool = False
    sent: int = 0
    refused: int = 0
    http: Any = None  # the answer, once it has begun
    read: Callable[[], Usage] | None = None  # reads what the answer said of its usage
    told: Callable[[], Usage] | None = None  # the same of what the SDK made of it, if it did


class Scope(Struct, frozen=True):
    """What a caller says of the call inside a `with request(...)`."""

    id: str | None = None
    at: datetime | None = None
    account: str | None = None
    project: str | None = None


class Refused(GratisError):  # noqa: N818 - it is the word of the contract
    """A call that was not sent, because it would not be free.

    `left` is the largest size that still fits, in the unit of its group, and None where no allowance covers the call;
    `until` is when its window ends, None where none is open; `elsewhere` are the groups that would take it.
    """

    def __init__(self, hold: Hold, elsewhere: tuple[str, ...] = ()) -> None:
        self.hold = hold
        self.elsewhere = elsewhere
        self.left = None
        self.until = None if hold.window is None else hold.window.end
        if hold.used is None or hold.held is None:
            super().__init__(f"not sent: no allowance covers {hold.request.model!r} ({hold.reason})")
            return
        self.left = max(0, hold.terms.allowance - hold.used - hold.held)
        until = "" if self.until is None else f" until {stamp(self.until)}"
        others = f"; {' and '.join(elsewhere)} would take it" if elsewhere else ""
        super().__init__(
            f"not sent: up to {hold.amount:,} {hold.terms.unit} of {hold.request.model!r}, and {self.left:,} of"
            f" {hold.terms.allowance:,} are left in {hold.group}{until}{others}"
        )

    def __reduce__(self) -> tuple[type[Refused], tuple[Hold, tuple[str, ...]]]:
        return Refused, (self.hold, self.elsewhere)


_SCOPE: ContextVar[Scope] = ContextVar("gratis.openai.scope", default=Scope())  # noqa: B039 - it is frozen


@contextmanager
def request(
    *,
    id: str | None = None,  # noqa: A002 - the field's name, as everywhere
    at: datetime | None = None,
    account: str | None = None,
    project: str | None = None,
) -> Iterator[None]:
    """Say of the call inside what it is: its id (one call's alone), its time, who owns it and which project sent it.

    A job that may be done again gives its id and the time of its first attempt: one that was held goes on with that
    hold, and one that was decided is a `Conflict` that carries the decision, before anything is sent.
    """
    token = _SCOPE.set(Scope(id, at, account, project))
    try:
        yield
    finally:
        _SCOPE.reset(token)


def admitted(plan: Plan, *, method: str, path: str, body: Mapping[str, Any], project: str | None) -> Flow[Call | None]:
    """The call, held or to be sent without a hold; None if it runs no model, or none whose usage is told here."""
    if method == "get" or path.endswith("/cancel"):
        known = plan.later.get(path.removeprefix("responses/").removesuffix("/cancel"))
        return None if known is None else replace(known, is_poll=True, is_over=False)
    kind = _kind(plan, path, body) if method == "post" else None
    if kind is None:
        return None
    scope, model = _SCOPE.get(), body.get("model")
    asked = Request(
        id=scope.id or uuid4().hex,
        model=model if isinstance(model, str) else "",
        at=scope.at or plan.clock(),
        account=scope.account or plan.account,
        project=scope.project or plan.project or project or None,
        kind=kind,
    )
    hold = yield from _held(plan, asked, body)
    if hold is None and scope.id is not None:
        words = yield Ask("decisions", (asked.id,), {"account": asked.account})
        if words:
            raise Conflict("id", words[0])
    call = Call(asked, hold, Record(), is_background=body.get("background") is True)
    if hold is not None and hold.request.model != asked.model:
        call.changes["model"] = hold.request.model
    if path in STREAMS_ASKED and body.get("stream") is True:
        options = body.get("stream_options")
        options = dict(options) if isinstance(options, Mapping) else {}
        if options.get("include_usage") is not True:
            call.hides_usage = True
            call.changes["stream_options"] = {**options, "include_usage": True}
    return call


def ended(plan: Plan, call: Call) -> Flow[None]:
    """Decide a call that was answered, by what the answer said; where that is not known, by its bound.

    Nothing is raised: the caller has paid for the answer. What went wrong is for those who ask for the decision.
    """
    if call.is_over:
        return
    call.is_over = True
    try:
        usage = Usage() if call.read is None else call.read()
    except Exception as error:  # noqa: BLE001 - whatever it is, the answer is paid for and must reach its caller
        why = error if isinstance(error, UsageError) else type(error).__name__
        log.warning("the usage of request %r is not understood, so it is unmeasured: %s", call.request.id, why)
        usage = Usage()
    call.http = call.read = call.told = None  # an answer may be large, and the call may be kept
    if call.is_background and _is_waited_for(plan, call, usage):
        return
    try:
        call.record.decision = yield _settling(call, usage)
    except Exception as error:  # noqa: BLE001 - whatever it is, the answer is paid for and must reach its caller
        call.record.error = error
        # Without a traceback, here and below: those of the SDK's frames may show what was sent.
        log.error("request %r was answered and not decided: %s", call.request.id, error)  # noqa: TRY400 - see above


def failed(plan: Plan, call: Call) -> Flow[None]:
    """End a call that the SDK gave up: released if no attempt of it was run, decided if one was answered.

    Nothing is raised either: why the call failed is what its caller must see.
    """
    if call.http is not None:
        yield from ended(plan, call)
    elif call.is_poll:
        return
    elif call.hold is None and call.refused < call.sent:
        yield from ended(plan, call)
    elif call.hold is not None and (call.hold.replayed or call.refused < call.sent):
        call.record.why = f"whether it ran is not known: its hold stays until {stamp(call.hold.until)}"
        log.info("request %r may have run; %s", call.request.id, call.record.why)
    else:
        call.record.why = "it was refused by the provider, or never sent; its hold was released"
        if call.hold is not None:
            try:
                yield Ask("release", (call.hold,))
            except Exception as error:  # noqa: BLE001 - why the call failed is what its caller must see
                call.record.error = error
                log.error("request %r was not run and is held still: %s", call.request.id, error)  # noqa: TRY400 - see above


def _kind(plan: Plan, path: str, body: Mapping[str, Any]) -> Kind | None:
    """What sort of call of a model it is; None if it is none, or none that can be metered here."""
    if path in METERED:
        return METERED[path]
    head = path.partition("/")[0]
    if head in UNSEEN:
        if head not in plan.warned:
            plan.warned.add(head)
            log.warning("calls of %r are not metered: what they take is not told in their answers", head)
        return None
    return None if {path, head} & HARMLESS or body.get("model") is None else Kind.COMPLETION


def _held(plan: Plan, asked: Request, body: Mapping[str, Any]) -> Flow[Hold | None]:
    """The hold under which a call is to be sent, for its own model or another; None where it has no bound."""
    policy = plan.otherwise if isinstance(plan.otherwise, Switch) else Switch((), plan.otherwise)
    models, last = policy.models if asked.kind is Kind.COMPLETION else (), policy.otherwise
    try:
        most = _most(plan, asked.kind, body)
    except UsageError as error:
        if last == REFUSE:
            raise UsageError(
                "tokens_max", f"needed to tell whether the call would be free, for it has no bound of its own: {error}"
            ) from error
        return None
    first = yield from _hold(plan, asked, most)
    if first.fits or (last == SEND and not models):
        return first
    if not first.replayed:  # else an attempt before this one may have run
        yield Ask("release", (first,))
    for model in models:
        other = yield from _hold(plan, replace(asked, model=model), most)
        if other.fits:
            return other
        if not other.replayed:
            yield Ask("release", (other,))
    if last == SEND:
        return (yield from _hold(plan, asked, most))
    found = yield Ask("explain", (replace(asked, input_tokens=most, output_tokens=0),))
    raise Refused(first, found.elsewhere)


def _hold(plan: Plan, asked: Request, most: int) -> Flow[Hold]:
    """A hold for a call that was not decided before: what was sent once under an id is not sent again."""
    hold: Hold = yield Ask("hold", (asked, most), {"for_": plan.for_, "on_expiry": plan.on_expiry})
    if hold.decision is not None:
        raise Conflict("id", hold.decision)
    return hold


def _most(plan: Plan, kind: Kind, body: Mapping[str, Any]) -> int:
    """The most tokens that a call can take: by its bytes, or as the plan says where these cannot tell."""
    try:
        return bound(body, output_max=0 if kind is Kind.EMBEDDING else plan.output_max, count=plan.count)
    except UsageError:
        if plan.tokens_max is None:
            raise
        return plan.tokens_max(body) if callable(plan.tokens_max) else plan.tokens_max


def _settling(call: Call, usage: Usage) -> Ask:
    """What decides a call: its hold is settled, or it is decided as it was."""
    if call.hold is not None:
        return Ask("settle", (call.hold, usage))
    asked = call.request
    decided = request_of(
        usage,
        id=asked.id,
        at=asked.at,
        account=asked.account,
        project=usage.project or asked.project,
        model=asked.model,
        kind=usage.kind or asked.kind,
    )
    return Ask("decide", (decided,))


def _is_waited_for(plan: Plan, call: Call, usage: Usage) -> bool:
    """Whether a response that runs in the background has yet to tell its usage: it is decided when it is retrieved."""
    if usage.input_tokens is not None:
        plan.later.pop(usage.id or "", None)
        return False
    call.record.why = "it runs in the background: retrieve it by this client when it has ended"
    if call.hold is None and not call.is_poll:
        log.warning(
            "request %r runs in the background without a hold: it is not known until it is retrieved", call.request.id
        )
    if usage.id is not None and not call.is_poll:
        while len(plan.later) >= LATER_MAX:
            plan.later.pop(next(iter(plan.later)), None)
        plan.later[usage.id] = call
    return True
