"""The usage readers: each shape that a provider answers with is read as it is, or refused by name."""

from __future__ import annotations

import copy
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, strategies as st

from gratis import Enrollment, Reason, Request, RequestError
from gratis.classify import exclusion
from gratis.errors import UsageError
from gratis.model import TOKENS_MAX, Kind, Usage
from gratis.offers import load
from gratis.usage import read, request, watch

from . import provider as surfaces
from .provider import CHAT_USAGE, MODEL, USAGE, Provider, batch_line

AT = datetime(2025, 4, 20, 9, 15, tzinfo=UTC)
REVISION = load("openai-data-sharing").at(AT)
STOCK = Provider()
CHAT = surfaces.chat(STOCK, {})
RESPONSE = surfaces.response(STOCK, {})
EMBEDDING = surfaces.embedding(STOCK, {})
IMAGE = surfaces.image(STOCK, {})
AUDIO = surfaces.transcription(STOCK, {})
ANSWERS = [CHAT, surfaces.completion(STOCK, {}), RESPONSE, IMAGE, surfaces.batch(STOCK, {})]
counts = st.integers(min_value=0, max_value=10**9)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


def chat(**fields: Any) -> dict[str, Any]:
    """A chat completion with other fields."""
    return {**CHAT, **fields}


def chunk(*choices: tuple[int, str | None], **fields: Any) -> dict[str, Any]:
    """A chunk of a chat's stream: each choice's place, and why it finished."""
    made = [{"index": index, "delta": {"content": "x"}, "finish_reason": finish} for index, finish in choices]
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": surfaces.CREATED, "model": MODEL}
    return {**head, "choices": made, **fields}


def after(*chunks: Any) -> Usage:
    """What a stream of these chunks said."""
    stream = watch(chunks)
    assert list(stream) == list(chunks)
    return stream.usage


def refusal(answer: Any) -> str:
    """Why an answer is refused."""
    with pytest.raises(UsageError) as caught:
        read(answer)
    assert str(caught.value).startswith(f"{caught.value.field}: ")
    return str(caught.value)


class TestShapes:
    """What is read of each shape."""

    def test_chat(self):
        """A chat completion says both counts, its cached part, and who answered when."""
        assert read(CHAT) == Usage(
            input_tokens=1200,
            output_tokens=300,
            cached_tokens=1000,
            model=MODEL,
            kind=Kind.COMPLETION,
            id="chatcmpl-1",
            at=AT,
        )

    def test_response(self):
        """A response says the same in words of its own."""
        assert read(RESPONSE) == Usage(
            input_tokens=1200,
            output_tokens=300,
            cached_tokens=1000,
            model=MODEL,
            kind=Kind.COMPLETION,
            id="resp_1",
            at=AT,
        )

    def test_embedding(self):
        """An embedding has no output, and names neither an id nor a time."""
        assert read(EMBEDDING) == Usage(input_tokens=8, model=MODEL, kind=Kind.EMBEDDING)

    def test_image(self):
        """An image names no model."""
        assert read(IMAGE) == Usage(input_tokens=1200, output_tokens=300, kind=Kind.IMAGE, at=AT)

    def test_transcription(self):
        """A transcription counts tokens, or seconds, which are no tokens."""
        assert read(AUDIO) == Usage(input_tokens=14, output_tokens=45, kind=Kind.AUDIO)
        seconds = {"text": "Hello", "usage": {"type": "duration", "seconds": 9.5}}
        assert read(seconds) == Usage(kind=Kind.AUDIO)
        assert "found 'words'" in refusal({"text": "Hello", "usage": {"type": "words", "input_tokens": 1}})

    def test_batch(self):
        """A batch's own usage is the sum of its requests, and is no request."""
        whole = surfaces.batch(STOCK, {})
        assert read(whole) == Usage(
            input_tokens=1200, output_tokens=300, cached_tokens=1000, model=MODEL, id="batch_1", at=AT
        )
        with pytest.raises(UsageError, match=r"^object: found 'batch', a sum of many requests"):
            request(whole)

    @pytest.mark.parametrize("name", ["completed", "incomplete", "failed", "cancelled"])
    def test_last_event(self, name):
        """The last event of a response's stream carries all of the response."""
        assert read({"type": f"response.{name}", "response": RESPONSE}) == read(RESPONSE)

    @pytest.mark.parametrize("status", ["incomplete", "failed", "cancelled"])
    def test_ended_without_usage(self, status):
        """A response that ended without a usage is unmeasured."""
        answer = {**RESPONSE, "status": status, "usage": None}
        assert request(answer).tokens is None

    @pytest.mark.parametrize("status", ["queued", "in_progress"])
    def test_not_ended(self, status):
        """A response that has not ended is no request yet: what is decided once is not decided early."""
        with pytest.raises(UsageError, match=r"^status: found '.*'; expected a response that has ended"):
            request({**RESPONSE, "status": status, "usage": None})

    def test_project_of_a_body(self):
        """A project that an answer names is read."""
        assert read(chat(project_id="proj_9")).project == "proj_9"

    def test_kind_wins(self):
        """The kind that the caller tells wins over the shape's."""
        assert read(CHAT, kind=Kind.EVAL).kind is Kind.EVAL


class TestBatchLines:
    """Lines of a batch's output and error files."""

    @pytest.mark.parametrize("body", [CHAT, RESPONSE, EMBEDDING])
    def test_answered(self, body):
        """A line reads as its body does, under the line's own id."""
        found, alone = read(batch_line(body)), read(body)
        assert found.id == "batch_req_1"
        assert (found.input_tokens, found.output_tokens, found.kind, found.at) == (
            alone.input_tokens,
            alone.output_tokens,
            alone.kind,
            alone.at,
        )

    @pytest.mark.parametrize("code", ["batch_expired", "batch_cancelled"])
    def test_never_ran(self, code):
        """A request that never ran took no tokens: there is nothing to decide."""
        assert refusal(batch_line(None, error={"code": code, "message": "…"})) == (
            f"error.code: found '{code}': the request never ran and took no tokens"
        )

    @pytest.mark.parametrize("status", [400, 401, 429])
    def test_refused(self, status):
        """A refused request took no tokens."""
        assert refusal(batch_line({"error": {"message": "…"}}, status=status)) == (
            f"response.status_code: found {status}: the request was refused and took no tokens"
        )

    @pytest.mark.parametrize(
        "line",
        [
            batch_line(None, error={"code": "request_timeout", "message": "…"}),
            batch_line({"error": {"message": "…"}}, status=500),
            batch_line({"error": {"message": "…"}}, status=408),
            batch_line(CHAT, error={"code": "request_timeout", "message": "…"}),
        ],
    )
    def test_unknown_end(self, line):
        """A request that ran and was not answered is unmeasured: what it took is not known."""
        assert read(line) == Usage(id="batch_req_1")

    def test_misread(self):
        """What is wrong in a line's body is named by its place in the line."""
        assert refusal(batch_line(chat(usage={"prompt_tokens": "5"}))).startswith("response.body.usage.prompt_tokens: ")
        assert refusal({**batch_line(CHAT), "response": {"body": CHAT}}).startswith("response.status_code: found None")
        assert refusal({**batch_line(CHAT), "response": {"status_code": 200}}).startswith("response.body: missing")


class TestCounts:
    """Counts are exact, parts are never added, and what is absent stays absent."""

    @given(given_tokens=counts, made=counts, data=st.data())
    def test_never_added_twice(self, given_tokens, made, data):
        """Whatever the parts, the tokens of a request are its input and its output."""
        inside = st.none() | st.integers(min_value=0, max_value=given_tokens)
        outside = st.none() | st.integers(min_value=0, max_value=made)
        parts = {
            "prompt_tokens_details": {
                name: data.draw(inside) for name in ("cached_tokens", "cache_write_tokens", "audio_tokens")
            },
            "completion_tokens_details": {
                name: data.draw(outside) for name in ("reasoning_tokens", "rejected_prediction_tokens")
            },
        }
        usage = {"prompt_tokens": given_tokens, "completion_tokens": made, "total_tokens": given_tokens + made, **parts}
        found = request(chat(usage=usage))
        assert found.tokens == given_tokens + made
        assert found.cached_tokens == (parts["prompt_tokens_details"]["cached_tokens"] or 0)

    @pytest.mark.parametrize("answer", ANSWERS)
    @given(extra=st.dictionaries(st.text(max_size=5).map("x-{}".format), json_values, max_size=3))
    def test_unknown_fields(self, answer, extra):
        """Fields that are not known change nothing, wherever they stand."""
        wider = copy.deepcopy(answer)
        for place in (wider, wider["usage"], *[part for part in wider["usage"].values() if isinstance(part, dict)]):
            place.update(extra)
        assert read(wider) == read(answer)

    @pytest.mark.parametrize("answer", [*ANSWERS, EMBEDDING, AUDIO])
    def test_no_usage(self, answer):
        """No usage is unmeasured, be it null or absent, and never 0."""
        absent = {name: value for name, value in answer.items() if name != "usage"}
        for silent in (absent, {**answer, "usage": None}):
            found = read(silent)
            assert (found.input_tokens, found.output_tokens, found.cached_tokens) == (None, None, 0)

    def test_explicit_zero(self):
        """An explicit 0 is 0."""
        usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        assert request(chat(usage=usage)).tokens == 0

    @pytest.mark.parametrize("details", [{}, {"prompt_tokens_details": None}, {"prompt_tokens_details": {}}])
    def test_no_details(self, details):
        """Details may be absent, null or empty."""
        found = read(chat(usage={"prompt_tokens": 7, "completion_tokens": 2, **details}))
        assert (found.input_tokens, found.output_tokens, found.cached_tokens) == (7, 2, 0)

    def test_one_count(self):
        """With one count of two a request is unmeasured."""
        assert request(chat(usage={"prompt_tokens": 7, "total_tokens": 9})).tokens is None

    @pytest.mark.parametrize("field", ["prompt_tokens", "completion_tokens", "total_tokens"])
    @pytest.mark.parametrize("value", [True, 5.0, "5", -1, float("nan"), TOKENS_MAX + 1, [5], {}])
    def test_no_count(self, field, value):
        """What is no whole number is refused by its name."""
        usage = {"prompt_tokens": 5, "completion_tokens": 0, field: value}
        assert refusal(chat(usage=usage)).startswith(f"usage.{field}: found ")

    @pytest.mark.parametrize(
        ("usage", "said"),
        [
            (
                {**CHAT_USAGE, "prompt_tokens_details": {"cached_tokens": 1201}},
                (
                    "usage.prompt_tokens_details.cached_tokens: found 1201, a part of prompt_tokens,"
                    " of which there are 1200"
                ),
            ),
            (
                {**CHAT_USAGE, "completion_tokens_details": {"reasoning_tokens": 301}},
                (
                    "usage.completion_tokens_details.reasoning_tokens: found 301, a part of completion_tokens,"
                    " of which there are 300"
                ),
            ),
            (
                {**CHAT_USAGE, "total_tokens": 1750},
                "usage.total_tokens: found 1750; expected 1500, input and output together",
            ),
            (
                {**CHAT_USAGE, "prompt_tokens_details": {"cached_tokens": 5.0}},
                f"usage.prompt_tokens_details.cached_tokens: found 5.0; expected a whole number from 0 to {TOKENS_MAX}",
            ),
            (
                {**CHAT_USAGE, "prompt_tokens_details": [5]},
                "usage.prompt_tokens_details: found a value of type list; expected an object or null",
            ),
            (USAGE, f"usage: found the fields {', '.join(USAGE)}; expected prompt_tokens and completion_tokens"),
            ([], "usage: found a value of type list; expected an object or null"),
        ],
    )
    def test_contradictions(self, usage, said):
        """A usage that contradicts itself is refused, and told where."""
        assert refusal(chat(usage=usage)) == said

    def test_singular_details(self):
        """Transcriptions spell their details in the singular; they are checked alike."""
        usage = {**AUDIO["usage"], "input_token_details": {"audio_tokens": 15}}
        assert refusal({**AUDIO, "usage": usage}).startswith("usage.input_token_details.audio_tokens: found 15")

    def test_embedding_total(self):
        """An embedding's total is its input."""
        usage = {"prompt_tokens": 8, "total_tokens": 9}
        assert refusal({**EMBEDDING, "usage": usage}).startswith("usage.total_tokens: found 9; expected 8")


class TestTools:
    """Hosted tools are told from the client's functions, and calls from what was merely declared."""

    @pytest.mark.parametrize(
        ("item", "tool"),
        [
            ("function_call", "function"),
            ("custom_tool_call", "custom"),
            ("web_search_call", "web_search"),
            ("file_search_call", "file_search"),
            ("code_interpreter_call", "code_interpreter"),
            ("image_generation_call", "image_generation"),
            ("computer_call", "computer"),
            ("mcp_call", "mcp"),
            ("mcp_list_tools", "mcp"),
            ("local_shell_call", "local_shell"),
            ("shell_call_output", "shell"),
            ("apply_patch_call", "apply_patch"),
            ("tool_search_output", "tool_search"),
            ("program", "programmatic_tool_calling"),
            ("a_tool_of_tomorrow_call", "a_tool_of_tomorrow"),
        ],
    )
    def test_items(self, item, tool):
        """Each call is named by its tool; one that is not known is a tool too."""
        assert read({**RESPONSE, "output": [{"type": item}, {"type": "message"}]}).tools == (tool,)

    def test_client_side(self):
        """What the readers call function and custom is what the offer takes for client-side; the rest is excluded."""
        enrolled = Enrollment(tier=3, sharing="enabled")
        reasons = {}
        for item in ("function_call", "custom_tool_call", "web_search_call", "mcp_call"):
            found = request({**RESPONSE, "output": [{"type": item}]})
            reasons[item] = exclusion(REVISION, found, enrolled)
        assert reasons == {
            "function_call": None,
            "custom_tool_call": None,
            "web_search_call": Reason.TOOL_USE,
            "mcp_call": Reason.TOOL_USE,
        }

    def test_declared(self):
        """A hosted tool that was declared and not called was not used."""
        assert RESPONSE["tools"][0]["type"] == "file_search"
        assert read(RESPONSE).tools == ()

    @pytest.mark.parametrize("kind", ["reasoning", "message", "compaction"])
    def test_no_tools(self, kind):
        """Thoughts and messages are no tools."""
        assert read({**RESPONSE, "output": [{"type": kind}]}).tools == ()

    def test_chat(self):
        """A chat's calls say what they are, in the old way too, and what a search found is cited."""
        calls = [{"type": "function", "function": {}}, {"type": "custom", "custom": {}}, {"custom": {}}]
        said = {
            "both": {"tool_calls": calls},
            "old": {"function_call": {"name": "f", "arguments": "{}"}},
            "cited": {"annotations": [{"type": "url_citation"}]},
            "plain": {"annotations": [], "tool_calls": None},
        }
        found = {name: read(chat(choices=[{"message": message}])).tools for name, message in said.items()}
        assert found == {"both": ("custom", "function"), "old": ("function",), "cited": ("web_search",), "plain": ()}

    def test_misread(self):
        """A call that cannot be read is refused by its place."""
        assert refusal({**RESPONSE, "output": [{"type": 5}]}) == "output[0].type: found 5; expected a string"
        assert refusal({**RESPONSE, "output": {}}) == "output: found a value of type dict; expected a list"
        assert refusal({**RESPONSE, "output": ["x"]}) == "output[0]: found a value of type str; expected an object"


class TestNotUnderstood:
    """A shape that is not understood is an error that says which."""

    @pytest.mark.parametrize(
        ("answer", "said"),
        [
            ({"object": "foo"}, "object: found 'foo'; expected one of chat.completion, "),
            ({"object": 5}, "object: found 5; expected one of "),
            ({}, "object: missing, with no fields; expected one of "),
            ({"id": "x", "role": "y"}, "object: missing, with the fields id, role; expected one of "),
            (
                dict.fromkeys("abcdefghijklmn"),
                "object: missing, with the fields a, b, c, d, e, f, g, h, i, j, k, l and",
            ),
            ({"type": "response.output_text.delta"}, "type: found 'response.output_text.delta'; expected one of "),
            ({"type": "response.completed"}, "type: found 'response.completed'; expected one of "),
            ({"error": {"code": "x"}}, "error: the provider answered with an error; expected "),
            ({"object": "list", "data": [{"object": "file"}]}, "data[0].object: found 'file'; expected 'embedding'"),
            (None, "response: found a value of type NoneType; expected a dict or an object of the provider's SDK"),
            ("{}", "response: found a value of type str; expected "),
            (chat(model=5), "model: found 5; expected a string"),
            (chat(created="now"), "created: found 'now'; expected a Unix time in seconds"),
            (chat(created=True), "created: found True; expected a Unix time in seconds"),
            (chat(created=float("inf")), "created: found inf; expected a Unix time in seconds"),
            (chat(created=10**20), "created: found 100000000000000000000; expected a Unix time in seconds"),
        ],
    )
    def test_shapes(self, answer, said):
        """What was found is named, and what was expected."""
        assert refusal(answer).startswith(said)

    def test_nothing_private(self):
        """What a model was told or said is never in a message."""
        secret = "the secret prompt"  # noqa: S105 - it is none
        for answer in (secret, {"x": secret}, chat(choices=secret), chat(choices=[secret]), chat(usage=secret)):
            assert "secret" not in refusal(answer)


class TestRequests:
    """What the caller knows wins, all but the model."""

    def test_from_an_answer(self):
        """An answer that says all makes a request alone."""
        assert request(CHAT) == Request(
            id="chatcmpl-1",
            model=MODEL,
            at=AT,
            input_tokens=1200,
            output_tokens=300,
            cached_tokens=1000,
        )

    def test_caller_wins(self):
        """The caller's id, time, account, project, kind and tools win; the model is the one that answered."""
        at = datetime(2025, 4, 21, tzinfo=UTC)
        found = request(
            chat(project_id="theirs"),
            id="mine",
            at=at,
            account="acme",
            project="ours",
            model="gpt-4.1",
            kind=Kind.EVAL,
            tools=("web_search",),
        )
        assert found == Request(
            id="mine",
            model=MODEL,
            at=at,
            input_tokens=1200,
            output_tokens=300,
            cached_tokens=1000,
            account="acme",
            project="ours",
            kind=Kind.EVAL,
            tools=("web_search",),
        )

    def test_missing(self):
        """What neither says is asked for by name."""
        for field in ("id", "at", "model"):
            known = {"id": "x", "at": AT, "model": MODEL}
            del known[field]
            answer = {name: value for name, value in CHAT.items() if name not in ("id", "created", "model")}
            with pytest.raises(UsageError) as caught:
                request(answer, **known)
            assert str(caught.value) == (
                f"{field}: the provider's answer has none; expected it to be passed: {field}=…"
            )

    def test_from_a_usage(self):
        """A usage that was read before makes the same request."""
        assert request(read(CHAT)) == request(CHAT)

    def test_embedding(self):
        """An embedding is measured by its input alone."""
        assert request(EMBEDDING, id="e", at=AT).tokens == 8

    def test_bad_kind(self):
        """A kind that there is not is refused."""
        with pytest.raises(RequestError, match=r"^kind: found 'chat'"):
            request(CHAT, kind="chat")


class TestStreams:
    """A stream tells its usage once, at its end."""

    def test_chat(self):
        """The usage chunk at the end counts."""
        usage = after(chunk((0, None)), chunk((0, "stop")), chunk(usage=CHAT_USAGE))
        assert usage == read(CHAT)

    @pytest.mark.parametrize(
        "chunks",
        [
            [],
            [chunk((0, None))],
            [chunk((0, None)), chunk((0, "stop"))],
            [chunk((0, None)), chunk((0, "stop"), usage=None)],
            [chunk((0, None), usage=CHAT_USAGE)],
            [chunk((0, None), (1, "stop"), usage=CHAT_USAGE)],
            [chunk((0, None), usage=CHAT_USAGE), chunk((0, "stop"))],
            [chunk((0, "stop"), usage=CHAT_USAGE), chunk((1, None))],
            [chunk((0, "stop"), usage=CHAT_USAGE), chunk((1, None)), chunk((1, "stop"))],
        ],
        ids=["nothing", "cut", "not asked", "null", "running", "one of two", "none at the end", "another", "and ends"],
    )
    def test_unmeasured(self, chunks):
        """Without a usage at the end of every choice a stream is unmeasured."""
        found = after(*chunks)
        assert (found.input_tokens, found.output_tokens, found.cached_tokens) == (None, None, 0)

    def test_running_usage(self):
        """Where each chunk tells a usage, the last one counts."""
        first = {"prompt_tokens": 1200, "completion_tokens": 1}
        usage = after(chunk((0, None), usage=first), chunk((0, "stop"), usage=CHAT_USAGE))
        assert (usage.input_tokens, usage.output_tokens) == (1200, 300)

    def test_first_chunk_of_azure(self):
        """A first chunk that knows nothing yet hides nothing of what the others say."""
        blank = {"id": "", "object": "chat.completion.chunk", "created": 0, "model": "", "choices": []}
        assert after(blank, chunk((0, "stop")), chunk(usage=CHAT_USAGE), blank) == read(CHAT)

    def test_tools(self):
        """Tools are gathered from deltas, whose later parts name no type."""
        calls = [
            {"tool_calls": [{"index": 0, "type": "custom", "custom": {"name": "f"}}]},
            {"tool_calls": [{"index": 0, "custom": {"input": "x"}}]},
            {"annotations": [{"type": "url_citation"}]},
        ]
        chunks = [chunk(choices=[{"index": 0, "delta": delta, "finish_reason": "stop"}]) for delta in calls]
        assert after(*chunks).tools == ("custom", "web_search")

    def test_events(self):
        """The last event of a response counts, and the tools of its items."""
        events = surfaces.response_events(Provider(calls=("web_search_call",)), {})
        assert after(*events) == read(surfaces.response(Provider(calls=("web_search_call",)), {}))
        cut = after(*events[:-1])
        assert cut == Usage(model=MODEL, kind=Kind.COMPLETION, id="resp_1", at=AT, tools=("web_search",))

    @pytest.mark.parametrize("status", ["incomplete", "failed"])
    def test_other_ends(self, status):
        """A response that ended early tells what it took."""
        assert after(*surfaces.response_events(Provider(status=status), {})).output_tokens == 300

    def test_other_streams(self):
        """Images and transcriptions tell their usage in an event of their own."""
        said = {"type": "transcript.text.done", "text": "Hello", "usage": surfaces.AUDIO_USAGE}
        assert after({"type": "transcript.text.delta", "delta": "Hel"}, said) == read(AUDIO)
        assert after(*surfaces.image_events(STOCK, {})) == read(IMAGE)

    def test_new_events(self):
        """An event that is not known is left alone in a stream that is."""
        events = surfaces.response_events(STOCK, {})
        assert after({"type": "keepalive"}, *events, {"type": "tomorrow"}) == read(RESPONSE)
        assert after({"type": "response.output_text.delta"}, {"type": "tomorrow"}) == Usage()

    @pytest.mark.parametrize(
        ("strange", "said"),
        [
            (5, r"^chunk: found a value of type int; expected a dict"),
            ({"type": "message_start"}, r"^chunk: found 'message_start'; expected chat.completion, "),
            ({"object": "foo"}, r"^chunk: found 'foo'; expected chat.completion, "),
            ({"x": 1}, r"^chunk: found the fields x; expected chat.completion, "),
            (chunk(usage={"prompt_tokens": "5"}), r"^usage.prompt_tokens: found '5'"),
        ],
    )
    def test_not_understood(self, strange, said):
        """What is not understood passes unchanged, is told at the end, and raised when the usage is asked for."""
        told = []
        stream = watch([strange], on_end=lambda usage, error: told.append((usage, error)))
        assert list(stream) == [strange]
        with pytest.raises(UsageError, match=said):
            _ = stream.usage
        assert [(usage.input_tokens, type(error)) for usage, error in told] == [(None, UsageError)]

    def test_error_spoils_counts(self):
        """A usage that was told before something was not understood is not told to anybody."""
        told = []
        list(watch([chunk(usage=CHAT_USAGE), 5], on_end=lambda usage, _: told.append(usage.input_tokens)))
        assert told == [None]

    def test_no_stream(self):
        """What cannot be iterated is refused."""
        with pytest.raises(UsageError, match=r"^stream: found a value of type int"):
            watch(5)


class TestEnds:
    """`on_end` is told once, however a stream ends."""

    CHUNKS = (chunk((0, None)), chunk((0, "stop")), chunk(usage=CHAT_USAGE))

    def told(self, chunks=CHUNKS):
        """A stream of these chunks, and what its end was told with."""
        told = []
        return watch(iter(chunks), on_end=lambda usage, error: told.append((usage.input_tokens, error))), told

    def test_end(self):
        """At the end of the stream, and not again when it is asked on or closed."""
        stream, told = self.told()
        assert len(list(stream)) == 3
        assert list(stream) == []
        stream.close()
        assert told == [(1200, None)]

    def test_closed_early(self):
        """When it is closed before its end: unmeasured."""
        stream, told = self.told()
        next(stream)
        assert told == []
        stream.close()
        assert told == [(None, None)]

    def test_left(self):
        """When its `with` is left, after the usage came."""
        stream, told = self.told()
        with stream as inside:
            assert inside is stream
            for found in inside:
                if found.get("usage"):
                    break
        assert told == [(1200, None)]

    def test_left_with_an_error(self):
        """When its `with` is left by an exception, with that."""
        stream, told = self.told()
        problem = KeyError("x")

        def work():
            with stream:
                next(stream)
                raise problem

        with pytest.raises(KeyError):
            work()
        assert told == [(None, problem)]

    def test_broken(self):
        """When it breaks, with what broke it."""
        problem = ConnectionError("cut")

        def breaking():
            yield chunk((0, None))
            raise problem

        told = []
        stream = watch(breaking(), on_end=lambda usage, error: told.append((usage.output_tokens, error)))
        with pytest.raises(ConnectionError):
            list(stream)
        assert told == [(None, problem)]
        assert stream.usage.model == MODEL

    def test_dropped(self):
        """Who throws it away tells nobody: the garbage collector may run while a store is asked."""
        stream, told = self.told()
        next(stream)
        del stream
        assert told == []

    def test_close_that_fails(self):
        """When closing it fails too."""

        class Stubborn(list):
            def close(self):
                raise OSError

        told = []
        stream = watch(Stubborn(self.CHUNKS), on_end=lambda usage, error: told.append((usage.input_tokens, error)))
        with pytest.raises(OSError):  # noqa: PT011 - of its own
            stream.close()
        assert told == [(None, None)]

    def test_passed_through(self):
        """Whatever else the stream has is had through the watched one."""

        class Named(list):
            response = "the response"

        stream = watch(Named())
        assert stream.response == "the response"
        with pytest.raises(AttributeError):
            _ = stream.nothing
