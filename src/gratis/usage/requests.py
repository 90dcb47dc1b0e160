"""The request that an answer answers: what the provider said of it, and what only the caller knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

from gratis.errors import UsageError
from gratis.model import Kind, Request, Usage, kind_of, shown
from gratis.usage.fields import get, has_fields
from gratis.usage.shapes import read

if TYPE_CHECKING:
    from datetime import datetime

T = TypeVar("T")
RUNNING: Final = frozenset({"queued", "in_progress"})


def request(
    response: Any,
    *,
    id: str | None = None,  # noqa: A002 - the field's name, as everywhere
    at: datetime | None = None,
    account: str = "default",
    project: str | None = None,
    model: str | None = None,
    kind: Kind | None = None,
    tools: tuple[str, ...] | None = None,
) -> Request:
    """The request that an answer (or its `Usage`) answers; what the caller knows wins.

    All but the model: the provider's answer names the one that answered, and `model` is only for answers that name
    none, as those on images and audio, and streams that broke before they began.
    """
    usage = response if isinstance(response, Usage) else _ended(response, kind)
    return Request(
        id=_had("id", usage.id if id is None else id),
        model=_had("model", model if usage.model is None else usage.model),
        at=_had("at", usage.at if at is None else at),
        account=account,
        project=usage.project if project is None else project,
        kind=kind_of(kind if kind is not None else usage.kind or Kind.COMPLETION),
        tools=usage.tools if tools is None else tools,
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cached_tokens=usage.cached_tokens,
    )


def _ended(response: Any, kind: Kind | None) -> Usage:
    """The usage of one request that has ended: what is decided once must not be decided early."""
    usage = read(response, kind=kind)
    if has_fields(response):
        if get(response, "object") == "batch":
            raise UsageError("object", "found 'batch', a sum of many requests; expected one of its output lines")
        if get(response, "object") == "response" and get(response, "status") in RUNNING:
            raise UsageError("status", f"found {shown(get(response, 'status'))}; expected a response that has ended")
    return usage


def _had(field: str, value: T | None) -> T:
    if value is None:
        raise UsageError(field, f"the provider's answer has none; expected it to be passed: {field}=…")
    return value
