"""A provider of our own on loopback: the surfaces that report a usage, and the ways in which an answer can fail.

It speaks what the official SDK expects, streams by server-sent events, and records what it was asked. Its switches are
plain attributes; `fail` answers the next requests with an error, `hold` keeps them waiting until `release`.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Any, Literal, Self

HOST = "127.0.0.1"
CREATED = 1_745_140_500  # 2025-04-20T09:15:00Z
MODEL = "gpt-4.1-2025-04-14"
PROJECT = "proj_1"
KEY = "key-of-a-test"
WAIT_MOST_S = 30.0
CHAT_USAGE = {
    "prompt_tokens": 1200,
    "completion_tokens": 300,
    "total_tokens": 1500,
    "prompt_tokens_details": {"cached_tokens": 1000, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 250, "audio_tokens": 0},
}
USAGE = {
    "input_tokens": 1200,
    "output_tokens": 300,
    "total_tokens": 1500,
    "input_tokens_details": {"cached_tokens": 1000, "cache_write_tokens": 0},
    "output_tokens_details": {"reasoning_tokens": 250},
}
IMAGE_USAGE = {**USAGE, "input_tokens_details": {"image_tokens": 1000, "text_tokens": 200}}
AUDIO_USAGE = {"type": "tokens", "input_tokens": 14, "output_tokens": 45, "total_tokens": 59}
EMBEDDING_USAGE = {"prompt_tokens": 8, "total_tokens": 8}
ERRORS = {
    400: ("invalid_request_error", "invalid_value"),
    401: ("invalid_request_error", "invalid_api_key"),
    429: ("insufficient_quota", "insufficient_quota"),
    500: ("server_error", None),
}
Cut = Literal["", "abrupt", "quiet"]


@dataclass(frozen=True)
class Asked:
    """One request that the provider got."""

    method: str
    path: str
    body: dict[str, Any]
    headers: dict[str, str]


@dataclass
class Provider:
    """The provider, between `with` and its end.

    `usage` replaces what it reports (None: it reports none). `calls` are the kinds of tool that its answers call.
    A stream is `cut` after `cut_after` chunks: "abrupt" as by a broken connection, "quiet" as if it had ended.
    """

    usage: dict[str, Any] | Literal["usual"] | None = "usual"
    calls: tuple[str, ...] = ()
    model: str = MODEL
    cut: Cut = ""
    cut_after: int = 2
    status: str = "completed"
    lines: list[dict[str, Any]] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._mutex = Lock()
        self._failures: list[int] = []
        self._may_answer = Event()
        self._may_answer.set()
        self.arrived = Event()
        provider = self

        class Handler(_Handler):
            @property
            def provider(self) -> Provider:
                return provider

        self._server = _Server((HOST, 0), Handler)
        self.url = f"http://{HOST}:{self._server.server_address[1]}/v1"
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(WAIT_MOST_S)

    def fail(self, status: int, *, times: int = 1) -> None:
        """Answer the next so many requests with this error."""
        with self._mutex:
            self._failures.extend([status] * times)

    def hold(self) -> None:
        """Keep requests waiting: slow for those who wait for `release`, a timeout for those who do not."""
        self.arrived.clear()
        self._may_answer.clear()

    def release(self) -> None:
        """Answer those that wait, and all others at once."""
        self._may_answer.set()

    def takes(self, asked: Asked) -> int | None:
        """A request arrives; the error that it gets, if any."""
        with self._mutex:
            self.asked.append(asked)
            failure = self._failures.pop(0) if self._failures else None
        self.arrived.set()
        assert self._may_answer.wait(WAIT_MOST_S), "held, and never released"
        return failure

    def counts(self, usual: dict[str, Any]) -> dict[str, Any] | None:
        """The usage that is reported."""
        return usual if self.usage == "usual" else self.usage


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that leaves early is what some tests are about.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    provider: Provider

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer({"stream": True} if "stream=true" in self.path else {})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        is_json = self.headers.get("content-type", "").startswith("application/json")
        self._answer(json.loads(raw) if is_json and raw else {})

    def _answer(self, body: dict[str, Any]) -> None:
        path = self.path.removeprefix("/v1")
        headers = {name.lower(): value for name, value in self.headers.items()}
        failure = self.provider.takes(Asked(self.command, path, body, headers))
        if failure is not None:
            kind, code = ERRORS[failure]
            self._send(failure, {"error": {"message": f"failed with {failure}", "type": kind, "code": code}})
        elif path.startswith("/files/"):
            lines = "".join(json.dumps(line) + "\n" for line in self.provider.lines)
            self._send(200, lines.encode(), "application/octet-stream")
        elif body.get("stream") and path in STREAMS:
            self._stream(STREAMS[path](self.provider, body))
        else:
            surface = next(make for prefix, make in SURFACES.items() if path.startswith(prefix))
            self._send(200, surface(self.provider, body))

    def _head(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("openai-project", PROJECT)
        self.send_header("x-request-id", f"req_{len(self.provider.asked)}")

    def _send(self, status: int, answer: Any, kind: str = "application/json") -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self._head(status, kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, chunks: list[dict[str, Any]]) -> None:
        self._head(200, "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        cut = self.provider.cut
        for chunk in chunks[: self.provider.cut_after] if cut else chunks:
            event = f"event: {chunk['type']}\n" if "type" in chunk else ""
            self._piece(f"{event}data: {json.dumps(chunk)}\n\n")
        if cut == "abrupt":
            self.close_connection = True  # without the piece that ends a chunked answer
            return
        if not cut:
            self._piece("data: [DONE]\n\n")
        with suppress(ConnectionError):
            self.wfile.write(b"0\r\n\r\n")

    def _piece(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


def chat(provider: Provider, _body: dict[str, Any]) -> dict[str, Any]:
    """A chat completion."""
    calls = [_chat_call(place, kind) for place, kind in enumerate(provider.calls)]
    message = {"role": "assistant", "content": "Hello", "refusal": None, **({"tool_calls": calls} if calls else {})}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": CREATED,
        "model": provider.model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        "usage": provider.counts(CHAT_USAGE),
        "service_tier": "default",
    }


def chat_chunks(provider: Provider, body: dict[str, Any]) -> list[dict[str, Any]]:
    """A chat completion, piece by piece; its usage only if asked for."""
    is_asked = bool((body.get("stream_options") or {}).get("include_usage"))
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": CREATED, "model": provider.model}
    calls = [{**_chat_call(place, kind), "index": place} for place, kind in enumerate(provider.calls)]
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        *([{"tool_calls": calls}] if calls else []),
        {},
    ]
    nothing = {"usage": None} if is_asked else {}
    chunks = [
        {
            **head,
            "choices": [{"index": 0, "delta": delta, "finish_reason": None if delta else "stop"}],
            **nothing,
        }
        for delta in deltas
    ]
    usage = provider.counts(CHAT_USAGE)
    if is_asked and usage is not None:
        chunks.append({**head, "choices": [], "usage": usage})
    return chunks


def completion(provider: Provider, _body: dict[str, Any]) -> dict[str, Any]:
    """A completion of the oldest sort."""
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": CREATED,
        "model": provider.model,
        "choices": [{"index": 0, "text": "Hello", "finish_reason": "stop", "logprobs": None}],
        "usage": provider.counts(CHAT_USAGE),
    }


def response(provider: Provider, _body: dict[str, Any]) -> dict[str, Any]:
    """A response."""
    said = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "Hello", "annotations": []}],
    }
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": CREATED,
        "status": provider.status,
        "model": provider.model,
        "output": [*[{"id": f"item_{kind}", "type": kind} for kind in provider.calls], said],
        "tools": [{"type": "file_search", "vector_store_ids": ["vs_1"]}],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "usage": provider.counts(USAGE),
        "service_tier": "default",
    }


def response_events(provider: Provider, body: dict[str, Any]) -> list[dict[str, Any]]:
    """A response, event by event; its usage in the last."""
    whole = response(provider, body)
    begun = {**whole, "status": "in_progress", "output": [], "usage": None, "service_tier": "auto"}
    events: list[dict[str, Any]] = [{"type": "response.created", "response": begun}]
    for place, item in enumerate(whole["output"]):
        begins = {**item, "content": []} if item["type"] == "message" else item
        events.append({"type": "response.output_item.added", "output_index": place, "item": begins})
        if item["type"] == "message":
            part = {"type": "output_text", "text": "", "annotations": []}
            where = {"output_index": place, "content_index": 0, "item_id": item["id"]}
            events.append({"type": "response.content_part.added", **where, "part": part})
            events.append({"type": "response.output_text.delta", **where, "delta": "Hello", "logprobs": []})
        events.append({"type": "response.output_item.done", "output_index": place, "item": item})
    events.append({"type": f"response.{provider.status}", "response": whole})
    return [{**event, "sequence_number": number} for number, event in enumerate(events)]


def embedding(provider: Provider, _body: dict[str, Any]) -> dict[str, Any]:
    """An embedding."""
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.5, -0.5]}],
        "model": provider.model,
        "usage": provider.counts(EMBEDDING_USAGE),
    }


def image(provider: Provider, _body: dict[str, Any]) -> dict[str, Any]:
    """An image."""
    return {"created": CREATED, "data": [{"b64_json": "AAAA"}], "usage": provider.counts(IMAGE_USAGE)}


def image_events(provider: Provider, _body: dict[str, Any]) -> list[dict[str, Any]]:
    """An image, event by event."""
    shared = {"b64_json": "AAAA", "created_at": CREATED, "size": "1024x1024", "quality": "low"}
    shared |= {"background": "auto", "output_format": "png"}
    return [
        {"type": "image_generation.partial_image", "partial_image_index": 0, **shared},
        {"type": "image_generation.completed", **shared, "usage": provider.counts(IMAGE_USAGE)},
    ]


def transcription(provider: Provider, _body: dict[str, Any]) -> dict[str, Any]:
    """What was said in a recording."""
    return {"text": "Hello", "usage": provider.counts(AUDIO_USAGE)}


def batch(provider: Provider, _body: dict[str, Any]) -> dict[str, Any]:
    """A batch that is done."""
    return {
        "id": "batch_1",
        "object": "batch",
        "created_at": CREATED,
        "completion_window": "24h",
        "endpoint": "/v1/chat/completions",
        "input_file_id": "file_1",
        "output_file_id": "file_2",
        "status": "completed",
        "model": provider.model,
        "usage": provider.counts(USAGE),
    }


def batch_line(
    body: dict[str, Any] | None, *, status: int = 200, error: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A line of a batch's output file; without a body, one whose request was not answered."""
    answer = None if body is None else {"status_code": status, "request_id": "req_b", "body": body}
    return {"id": "batch_req_1", "custom_id": "request-1", "response": answer, "error": error}


def _chat_call(place: int, kind: str) -> dict[str, Any]:
    inside = {"name": "f", "input": "x"} if kind == "custom" else {"name": "f", "arguments": "{}"}
    return {"id": f"call_{place}", "type": kind, kind: inside}


SURFACES = {
    "/chat/completions": chat,
    "/completions": completion,
    "/responses": response,
    "/embeddings": embedding,
    "/images/": image,
    "/audio/transcriptions": transcription,
    "/batches/": batch,
}
STREAMS = {
    "/chat/completions": chat_chunks,
    "/responses": response_events,
    "/images/generations": image_events,
}
