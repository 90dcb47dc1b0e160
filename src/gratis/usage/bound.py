"""The most tokens that a request can take, known before it is sent and without a network.

Proven: a token of a byte-pair tokenizer stands for one byte or more, so a text is at most as many tokens as it has
bytes of UTF-8; and the output is at most what the body allows. Assumed, with room to spare: what the provider writes
around the text. A message is framed by three or four tokens and its role, and here costs the names of its fields and
eight more; tools and schemas are shown to the model once, and here cost the longest usual form of their JSON.

What bytes cannot bound (an image, a conversation that the provider keeps, what a hosted tool finds, a field that is
not known here) is an error that names it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from gratis.errors import UsageError
from gratis.model import TOKENS_MAX, shown
from gratis.usage.fields import a

# Around each object and text: a chat's message was measured at 3 or 4 and its role, and 3 more open the answer.
FRAME_TOKENS: Final = 8
SCHEMA_TOKENS: Final = 64  # around all tools, or around the form of an answer
LIMITS: Final = ("max_completion_tokens", "max_tokens", "max_output_tokens")
TEXTS: Final = frozenset({"messages", "input", "instructions", "prompt", "suffix", "stop", "reasoning"})
SCHEMAS: Final = frozenset({"tools", "functions", "response_format", "text", "tool_choice", "function_call"})
# What the model is not shown.
PLAIN: Final = frozenset(
    """
    model background best_of dimensions encoding_format extra_headers extra_query frequency_penalty include logit_bias
    logprobs max_tool_calls metadata modalities n parallel_tool_calls presence_penalty prompt_cache_key
    prompt_cache_options prompt_cache_retention reasoning_effort safety_identifier seed service_tier store stream
    stream_options temperature timeout top_logprobs top_p truncation user verbosity
    """.split()  # noqa: SIM905 - words that are read as a list
)
UNBOUNDED: Final = {
    "audio": "spoken answers are not bounded by the output's limit",
    "context_management": "what the provider compacts is read again",
    "conversation": "the provider adds what it keeps",
    "echo": "the prompt is a part of the output",
    "prediction": "what it misses is counted as output too",
    "previous_response_id": "the provider adds what it keeps",
    "web_search_options": "what a search finds becomes input",
}
KNOWN: Final = frozenset({*TEXTS, *SCHEMAS, *PLAIN, *LIMITS, *UNBOUNDED})
ITEMS: Final = frozenset(
    {
        None,
        "message",
        "function_call",
        "function_call_output",
        "custom_tool_call",
        "custom_tool_call_output",
    }
)
PARTS: Final = frozenset({"text", "input_text", "output_text", "refusal"})
CLIENT_SIDE: Final = frozenset({"function", "custom"})
HINT: Final = "pass a bound of your own"

Count = Callable[[str], int]


def bound(body: Mapping[str, Any], *, output_max: int | None = None, count: Count | None = None) -> int:
    """At most so many tokens, input and output together, for the keyword arguments of a create call.

    `output_max` is what one answer may have at most where the body sets no limit (0 for embeddings: they have no
    output). `count` replaces the bytes of a text by the model's own tokenizer, such as `tokenizer(model)`: closer, and
    as sure as that tokenizer is the right one.
    """
    sent = _sent(body)
    for field, value in sent.items():
        if field in UNBOUNDED and value is not False:
            raise UsageError(field, f"{UNBOUNDED[field]}; {HINT}")
        if field not in KNOWN:
            raise UsageError(field, f"not known, and so not bounded; {HINT}")
    counted = _bytes if count is None else count
    total = FRAME_TOKENS
    for field, value in sent.items():
        if field in SCHEMAS:
            _check_tools(field, value)
            total += SCHEMA_TOKENS + counted(_json(field, value))
        elif field in TEXTS:
            total += _weight(field, value, counted)
    return total + _answers(sent) * _output(sent, output_max)


def tokenizer(model: str) -> Count:
    """The tokens of a text by the model's own tokenizer, from tiktoken: the extra `gratis[tokenizer]`.

    Its data is fetched once and kept in the folder that TIKTOKEN_CACHE_DIR names.
    """
    try:
        tiktoken = importlib.import_module("tiktoken")
    except ImportError:
        raise UsageError("tokenizer", "tiktoken is not installed; pip install 'gratis[tokenizer]'") from None
    try:
        encoding = tiktoken.encoding_for_model(model)
    except KeyError:
        raise UsageError("model", f"tiktoken knows no tokenizer of {shown(model)}; bound by bytes instead") from None
    except (OSError, ValueError) as error:
        raise UsageError(
            "tokenizer",
            f"its data cannot be had ({type(error).__name__}); expected it in the folder that TIKTOKEN_CACHE_DIR names,"
            " or a network to fetch it once",
        ) from error
    return lambda text: len(encoding.encode_ordinary(text))


def _sent(body: Mapping[str, Any]) -> dict[str, Any]:
    """What would be sent: without what is absent, with what the SDK adds as it is."""
    if not isinstance(body, Mapping):
        raise UsageError("body", f"found {a(body)}; expected the keyword arguments of a create call")
    extra = body.get("extra_body")
    if not _is_given(extra):
        extra = {}
    elif not isinstance(extra, Mapping):
        raise UsageError("extra_body", f"found {a(extra)}; expected an object")
    merged = {**body, **extra}
    return {field: value for field, value in merged.items() if field != "extra_body" and _is_given(value)}


def _is_given(value: object) -> bool:
    """Not null, and not the marks by which the SDK tells that an argument was left out."""
    return value is not None and type(value).__name__ not in {"NotGiven", "Omit"}


def _bytes(text: str) -> int:
    """The bytes of a text; half of a surrogate pair takes the three of the mark that replaces it."""
    return len(text.encode("utf-8", "surrogatepass"))


def _weight(field: str, value: Any, count: Count) -> int:
    """The most tokens of what a model is shown as it is."""
    value = _plain(value)
    if isinstance(value, str):
        return count(value)
    if isinstance(value, Mapping):
        _check_item(field, value)
        return FRAME_TOKENS + sum(
            count(str(name)) + _weight(f"{field}.{name}", part, count) for name, part in value.items()
        )
    if isinstance(value, list | tuple):
        return sum(
            # Ids of tokens, as embeddings and prompts may be given.
            1 if type(part) is int else FRAME_TOKENS + _weight(f"{field}[{place}]", part, count)
            for place, part in enumerate(value)
        )
    if value is None or isinstance(value, bool | int | float):
        return len(str(value))
    raise UsageError(field, f"found {a(value)}; expected text, a list or an object; or {HINT}")


def _check_item(field: str, item: Mapping[str, Any]) -> None:
    """Refuse what is no text: a message, an item, or a part of the content of one."""
    kind, outermost = item.get("type"), field.partition("[")[0]
    if outermost == "prompt":
        raise UsageError(field, f"found an object: the provider keeps what is in a template; {HINT}")
    if outermost not in {"messages", "input"}:
        return
    is_part = field.endswith("]") and field.rpartition("[")[0].endswith((".content", ".output"))
    if is_part and kind not in PARTS:
        raise UsageError(f"{field}.type", f"found {shown(kind)}, which is no text; {HINT}")
    is_item = field.endswith("]") and field.count("[") == 1
    if is_item and kind not in ITEMS:
        raise UsageError(f"{field}.type", f"found {shown(kind)}, which is no text; {HINT}")
    if is_item and kind is None and "role" not in item:
        raise UsageError(field, f"found no role, so it refers to what the provider keeps; {HINT}")
    if is_item and item.get("audio") is not None:
        raise UsageError(f"{field}.audio", f"the provider adds what it keeps; {HINT}")


def _check_tools(field: str, value: Any) -> None:
    """Refuse hosted tools: what they find becomes input."""
    if field != "tools":
        return
    if not isinstance(value, list | tuple):
        raise UsageError(field, f"found {a(value)}; expected a list; or {HINT}")
    for place, tool in enumerate(value):
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        if kind not in CLIENT_SIDE:
            raise UsageError(f"tools[{place}].type", f"found {shown(kind)}: what it finds becomes input; {HINT}")


def _plain(value: Any) -> Any:
    """An object of the SDK, as the SDK would send it."""
    if hasattr(type(value), "model_dump"):
        return value.model_dump(mode="json", exclude_unset=True, by_alias=True, warnings=False)
    return value


def _json(field: str, value: Any) -> str:
    """The longest of the usual forms of a JSON text: spaced, and all in ASCII."""
    try:
        return json.dumps(value, default=_plain)
    except (TypeError, ValueError, RecursionError):
        raise UsageError(field, f"found {a(value)} that is no JSON; expected plain dicts; or {HINT}") from None


def _answers(sent: Mapping[str, Any]) -> int:
    """How many answers the request asks for: `n` of each prompt, or the best of more that are counted too."""
    prompt = sent.get("prompt")
    is_many = isinstance(prompt, list | tuple) and not all(type(token) is int for token in prompt)
    each = max(_whole(field, sent.get(field, 1), least=1) for field in ("n", "best_of"))
    return each * (max(1, len(prompt)) if is_many and prompt is not None else 1)


def _output(sent: Mapping[str, Any], output_max: int | None) -> int:
    """What one answer may have at most."""
    limits = [_whole(field, sent[field], least=0) for field in LIMITS if field in sent]
    if limits:
        return max(limits)
    if output_max is None:
        raise UsageError(
            "max_completion_tokens",
            f"missing, as are {' and '.join(LIMITS[1:])}; expected one of them, or output_max=… (0 for embeddings)",
        )
    return _whole("output_max", output_max, least=0)


def _whole(field: str, value: object, *, least: int) -> int:
    if type(value) is not int or not least <= value <= TOKENS_MAX:
        raise UsageError(field, f"found {shown(value)}; expected a whole number from {least} to {TOKENS_MAX}")
    return value
