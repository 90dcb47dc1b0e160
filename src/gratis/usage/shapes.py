"""What a provider's answer says of its usage, whichever of its shapes it has.

Tokens are input and output. Cached, audio, image and reasoning tokens are parts of these two: they are checked
against them and never added. An absent usage is unmeasured, never 0. A shape that is not understood is an error that
says which.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct
from msgspec.structs import replace

from gratis.errors import UsageError
from gratis.model import Kind, Usage, kind_of, shown
from gratis.usage.fields import a, get, has_fields, names, node, nodes, text, tokens, unix_time
from gratis.usage.tools import of_choices, of_items

if TYPE_CHECKING:
    from collections.abc import Iterator

PROJECT_HEADER: Final = "openai-project"
OK: Final = 200
REFUSED: Final = range(400, 500)
TIMED_OUT: Final = 408
NEVER_RAN: Final = frozenset({"batch_expired", "batch_cancelled"})
INPUT_PARTS: Final = ("cached_tokens", "cache_write_tokens", "audio_tokens", "image_tokens", "text_tokens")
OUTPUT_PARTS: Final = (
    "reasoning_tokens",
    "audio_tokens",
    "image_tokens",
    "text_tokens",
    "accepted_prediction_tokens",
    "rejected_prediction_tokens",
)


class Shape(Struct, frozen=True):
    """How one sort of answer names its two counts and its time; None where it has none."""

    kind: Kind | None
    given: str = "input_tokens"
    made: str | None = "output_tokens"
    at: str | None = None


_CHAT = Shape(Kind.COMPLETION, "prompt_tokens", "completion_tokens", "created")
_RESPONSE = Shape(Kind.COMPLETION, at="created_at")
_EMBEDDING = Shape(Kind.EMBEDDING, "prompt_tokens", None)
_IMAGE = Shape(Kind.IMAGE, at="created")
_AUDIO = Shape(Kind.AUDIO)
OBJECTS: Final = {
    "chat.completion": _CHAT,
    "chat.completion.chunk": _CHAT,
    "text_completion": _CHAT,
    "response": _RESPONSE,
    "response.compaction": _RESPONSE,
    "list": _EMBEDDING,
    "batch": Shape(None, at="created_at"),
}
# Events of a stream that carry a usage of their own, and those that carry a whole response.
EVENTS: Final = {
    "image_generation.completed": Shape(Kind.IMAGE, at="created_at"),
    "image_edit.completed": Shape(Kind.IMAGE, at="created_at"),
    "transcript.text.done": _AUDIO,
    "speech.audio.done": _AUDIO,
}
ENDINGS: Final = ("response.completed", "response.incomplete", "response.failed", "response.cancelled")
BEGINNINGS: Final = ("response.created", "response.queued", "response.in_progress")


def read(response: Any, *, kind: Kind | None = None) -> Usage:
    """What an answer says of its usage: a dict, an object of the SDK, a batch's output line, a stream's last event.

    Counts stay None where it says none: no usage, an audio's duration, a batch line whose request timed out. A batch
    line's id is its own: `custom_id` is unique in its file only, and only the line's id is there on every endpoint.
    Lines whose request was refused or never ran took no tokens and are a `UsageError`: there is nothing to decide.
    A `Batch` reads as the sum of its requests. `kind` wins over the one that the shape tells.
    """
    project = None
    if not has_fields(response):
        project = project_in(getattr(response, "headers", None))
        response = _opened(response)
    usage = _read("", response)
    return replace(usage, kind=usage.kind if kind is None else kind_of(kind), project=project or usage.project)


def project_in(headers: Any) -> str | None:
    """The project that the headers of an answer name: its body names none."""
    found = headers.get(PROJECT_HEADER) if hasattr(headers, "get") else None
    return found if type(found) is str and found else None


def _opened(response: Any) -> Any:
    """What is inside a raw response of the SDK, or an object that only knows how to become a dict."""
    for method in ("parse", "to_dict"):
        if callable(getattr(response, method, None)):
            inside = getattr(response, method)()
            if has_fields(inside):
                return inside
    raise UsageError("response", f"found {a(response)}; expected a dict or an object of the provider's SDK")


def _read(where: str, answer: Any) -> Usage:
    label, event = get(answer, "object"), get(answer, "type")
    if type(label) is str and label in OBJECTS:
        return _usage(where, answer, OBJECTS[label])
    if label is None and type(event) is str:
        return _event(where, answer, event)
    if label is None and get(answer, "custom_id") is not None:
        return _batch_line(answer)
    if label is None and get(answer, "created") is not None and get(answer, "data") is not None:
        return _usage(where, answer, _IMAGE)
    if label is None and get(answer, "error") is not None:
        raise UsageError(f"{where}error", "the provider answered with an error; expected an answer with a usage")
    if label is None and type(get(answer, "text")) is str:
        return _usage(where, answer, _AUDIO)
    found = f"missing, with {names(answer)}" if label is None else f"found {shown(label)}"
    raise UsageError(
        f"{where}object",
        f"{found}; expected one of {', '.join(OBJECTS)}, or an answer on images or audio, a batch's output line or"
        " a stream's last event",
    )


def _event(where: str, answer: Any, event: str) -> Usage:
    if event in EVENTS:
        return _usage(where, answer, EVENTS[event])
    inside = node(f"{where}response", get(answer, "response"))
    if event not in ENDINGS + BEGINNINGS or inside is None:
        raise UsageError(f"{where}type", f"found {shown(event)}; expected one of {', '.join((*ENDINGS, *EVENTS))}")
    return _usage(f"{where}response.", inside, _RESPONSE)


def _batch_line(line: Any) -> Usage:
    """One line of a batch's output or error file."""
    error, response = node("error", get(line, "error")), node("response", get(line, "response"))
    own_id = text("id", get(line, "id"))
    if error is not None and get(error, "code") in NEVER_RAN:
        raise UsageError("error.code", f"found {shown(get(error, 'code'))}: the request never ran and took no tokens")
    if response is None:
        return Usage(id=own_id)  # the call timed out: what it took is not known
    status = get(response, "status_code")
    if type(status) is not int:
        raise UsageError("response.status_code", f"found {shown(status)}; expected an HTTP status")
    if status in REFUSED and status != TIMED_OUT:
        raise UsageError("response.status_code", f"found {status}: the request was refused and took no tokens")
    if status != OK or error is not None:
        return Usage(id=own_id)
    body = node("response.body", get(response, "body"))
    if body is None:
        raise UsageError("response.body", "missing; expected the answer to the line's request")
    return replace(_read("response.body.", body), id=own_id)


def _usage(where: str, answer: Any, shape: Shape) -> Usage:
    """The usage of an answer of this shape."""
    if shape is _EMBEDDING:
        for place, item in enumerate(nodes(f"{where}data", get(answer, "data"))[:1]):
            if get(item, "object") != "embedding":
                raise UsageError(
                    f"{where}data[{place}].object", f"found {shown(get(item, 'object'))}; expected 'embedding'"
                )
    given, made, cached = _counts(f"{where}usage", node(f"{where}usage", get(answer, "usage")), shape)
    return Usage(
        input_tokens=given,
        output_tokens=made,
        cached_tokens=cached,
        model=text(f"{where}model", get(answer, "model")),
        project=text(f"{where}project_id", get(answer, "project_id")),
        kind=shape.kind,
        tools=tuple(sorted(set(_tools(where, answer, shape)))),
        id=text(f"{where}id", get(answer, "id")),
        at=None if shape.at is None else unix_time(f"{where}{shape.at}", get(answer, shape.at)),
    )


def _tools(where: str, answer: Any, shape: Shape) -> Iterator[str]:
    if shape is _CHAT:
        yield from of_choices(f"{where}choices", get(answer, "choices"))
    elif shape is _RESPONSE:
        yield from of_items(f"{where}output", get(answer, "output"))


def _counts(field: str, usage: Any, shape: Shape) -> tuple[int | None, int | None, int]:
    """Input, output, and what of the input was cached."""
    if usage is None:
        return None, None, 0
    measure = get(usage, "type")
    if measure == "duration":
        return None, None, 0
    if measure not in (None, "tokens"):
        raise UsageError(f"{field}.type", f"found {shown(measure)}; expected 'tokens' or 'duration'")
    given = tokens(f"{field}.{shape.given}", get(usage, shape.given))
    made = None if shape.made is None else tokens(f"{field}.{shape.made}", get(usage, shape.made))
    if given is None and made is None:
        expected = shape.given if shape.made is None else f"{shape.given} and {shape.made}"
        raise UsageError(field, f"found {names(usage)}; expected {expected}")
    cached = _check_parts(field, usage, shape.given, given, INPUT_PARTS)
    if shape.made is not None:
        _check_parts(field, usage, shape.made, made, OUTPUT_PARTS)
    total = tokens(f"{field}.total_tokens", get(usage, "total_tokens"))
    if total is not None and given is not None and (made is not None or shape.made is None):
        _check_total(field, total, given + (made or 0))
    return given, made, 0 if given is None else cached


def _check_total(field: str, total: int, parts: int) -> None:
    """A total that is more holds tokens that neither count has: which they are would be a guess."""
    if total != parts:
        raise UsageError(f"{field}.total_tokens", f"found {total}; expected {parts}, input and output together")


def _check_parts(field: str, usage: Any, name: str, whole: int | None, parts: tuple[str, ...]) -> int:
    """Each part that is told is at most the whole; the first of them is the answer, 0 if it is not told."""
    first = 0
    # Transcriptions spell it in the singular.
    for spelled in (f"{name}_details", f"{name.removesuffix('s')}_details"):
        where = f"{field}.{spelled}"
        details = node(where, get(usage, spelled))
        if details is None:
            continue
        for part in parts:
            found = tokens(f"{where}.{part}", get(details, part))
            if found is None:
                continue
            if whole is not None and found > whole:
                raise UsageError(f"{where}.{part}", f"found {found}, a part of {name}, of which there are {whole}")
            first = found if part == parts[0] else first
    return first
