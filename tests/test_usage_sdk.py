"""The official SDK against a provider on loopback: its objects and streams read as the wire's dicts do."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from gratis.errors import UsageError
from gratis.model import Kind, Usage
from gratis.usage import AsyncWatched, Watched, read, request, watch

from . import provider as surfaces
from .provider import CHAT_USAGE, KEY, MODEL, PROJECT, Provider, batch_line

MESSAGES = [{"role": "user", "content": "Hi"}]
WITH_USAGE = {"include_usage": True}
ANSWER_MOST_S = 20.0


@pytest.fixture
def provider():
    """A provider of this test alone."""
    with Provider() as provider:
        yield provider


@pytest.fixture
def client(provider):
    """The SDK, which asks once."""
    with OpenAI(api_key=KEY, base_url=provider.url, max_retries=0, timeout=ANSWER_MOST_S) as client:
        yield client


def asked(provider: Provider) -> AsyncOpenAI:
    """The SDK of asyncio."""
    return AsyncOpenAI(api_key=KEY, base_url=provider.url, max_retries=0, timeout=ANSWER_MOST_S)


def chat(client: Any, **fields: Any) -> Any:
    """A chat completion."""
    return client.chat.completions.create(model=MODEL, messages=MESSAGES, **fields)


def respond(client: Any, **fields: Any) -> Any:
    """A response."""
    return client.responses.create(model=MODEL, input="Hi", **fields)


class TestObjects:
    """Objects of the SDK."""

    @pytest.mark.parametrize("calls", [(), ("function",), ("custom", "function")])
    @pytest.mark.parametrize("usage", ["usual", None, {"prompt_tokens": 3, "completion_tokens": 4}])
    def test_chat(self, provider, client, calls, usage):
        """A chat completion reads as its dict, be its usage whole, null or without details."""
        provider.calls, provider.usage = calls, usage
        assert read(chat(client)) == read(surfaces.chat(provider, {}))

    @pytest.mark.parametrize("calls", [(), ("function_call",), ("web_search_call", "custom_tool_call", "mcp_call")])
    @pytest.mark.parametrize("usage", ["usual", None])
    def test_response(self, provider, client, calls, usage):
        """A response reads as its dict, tools and all."""
        provider.calls, provider.usage = calls, usage
        assert read(respond(client)) == read(surfaces.response(provider, {}))

    def test_old_completion(self, provider, client):
        """A completion of the oldest sort too."""
        answer = client.completions.create(model=MODEL, prompt="Hi")
        assert read(answer) == read(surfaces.completion(provider, {}))

    def test_embedding(self, provider, client):
        """An embedding too; its id and time are the caller's."""
        answer = client.embeddings.create(model=MODEL, input="Hi", encoding_format="float")
        assert read(answer) == read(surfaces.embedding(provider, {}))
        assert read(answer).kind is Kind.EMBEDDING

    def test_image(self, provider, client):
        """An image too; its model is the caller's."""
        answer = client.images.generate(prompt="Hi", model="gpt-image-1")
        assert read(answer) == read(surfaces.image(provider, {}))
        assert request(answer, id="i", model="gpt-image-1").tokens == 1500

    @pytest.mark.parametrize("usage", ["usual", None, {"type": "duration", "seconds": 3}])
    def test_transcription(self, provider, client, usage):
        """A transcription too, in tokens or in seconds."""
        provider.usage = usage
        answer = client.audio.transcriptions.create(model="gpt-4o-transcribe", file=("a.wav", b"RIFF"))
        assert read(answer) == read(surfaces.transcription(provider, {}))

    def test_batch(self, provider, client):
        """A batch too, and each line of its output."""
        provider.lines = [batch_line(surfaces.chat(provider, {})), batch_line(None, error={"code": "batch_expired"})]
        batch = client.batches.retrieve("batch_1")
        assert read(batch) == read(surfaces.batch(provider, {}))
        answered, expired = map(json.loads, client.files.content(batch.output_file_id).text.splitlines())
        assert request(answered).id == "batch_req_1"
        with pytest.raises(UsageError, match="never ran"):
            read(expired)

    def test_project(self, client):
        """A raw response knows the project, of which the body says nothing."""
        raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES)
        assert request(raw).project == PROJECT
        assert request(raw, project="mine").project == "mine"
        assert request(raw.parse()).project is None

    @pytest.mark.parametrize("value", ["many", 5.5, -1, [1]])
    def test_bad_counts(self, provider, client, value):
        """The SDK lets through what is no count; the reader does not."""
        provider.usage = {**CHAT_USAGE, "prompt_tokens": value}
        with pytest.raises(UsageError, match=r"^usage.prompt_tokens: found .*; expected a whole number"):
            read(chat(client))

    def test_unknown_object(self, provider, client):
        """Another object of the SDK is refused by its name."""
        model = openai.types.Model(id="m", created=1, object="model", owned_by="o")
        with pytest.raises(UsageError, match=r"^object: found 'model'; expected one of "):
            read(model)
        moderation = openai.types.ModerationCreateResponse(id="m", model="m", results=[])
        with pytest.raises(UsageError, match=r"^object: missing, with the fields of ModerationCreateResponse"):
            read(moderation)


class TestStreams:
    """Streams of the SDK, as they are for a loop that waits."""

    def test_chat(self, provider, client):
        """A chat's stream passes unchanged, and says at its end what the whole answer would say."""
        provider.calls = ("function",)
        plain = list(chat(client, stream=True, stream_options=WITH_USAGE))
        with watch(chat(client, stream=True, stream_options=WITH_USAGE)) as stream:
            assert isinstance(stream, Watched)
            assert list(stream) == plain
        assert stream.usage == Usage(
            input_tokens=1200,
            output_tokens=300,
            cached_tokens=1000,
            model=MODEL,
            project=PROJECT,
            kind=Kind.COMPLETION,
            tools=("function",),
            id="chatcmpl-1",
            at=read(surfaces.chat(provider, {})).at,
        )
        assert request(stream.usage).tokens == 1500

    def test_usage_not_asked_for(self, provider, client):
        """Without include_usage a chat's stream is unmeasured."""
        with watch(chat(client, stream=True)) as stream:
            assert len(list(stream)) == 4
        assert provider.asked[-1].body.get("stream_options") is None
        assert (stream.usage.model, stream.usage.input_tokens) == (MODEL, None)

    @pytest.mark.parametrize("make", [chat, respond])
    def test_cut(self, provider, client, make):
        """A connection that breaks in the middle leaves a stream unmeasured, and tells what broke it."""
        provider.cut = "abrupt"
        options = {"stream_options": WITH_USAGE} if make is chat else {}
        told = []
        stream = watch(make(client, stream=True, **options), on_end=lambda *end: told.append(end))
        with pytest.raises(openai.APIConnectionError), stream:
            list(stream)
        assert [(usage.input_tokens, type(error)) for usage, error in told] == [(None, openai.APIConnectionError)]
        assert (stream.usage.model, stream.usage.output_tokens) == (MODEL, None)

    @pytest.mark.parametrize("make", [chat, respond])
    def test_quiet_end(self, provider, client, make):
        """A stream that ends too early without an error is unmeasured all the same."""
        provider.cut = "quiet"
        options = {"stream_options": WITH_USAGE} if make is chat else {}
        told = []
        list(watch(make(client, stream=True, **options), on_end=lambda *end: told.append(end)))
        assert [(usage.input_tokens, error) for usage, error in told] == [(None, None)]

    @pytest.mark.parametrize("status", ["completed", "incomplete", "failed"])
    def test_response(self, provider, client, status):
        """A response's stream says its usage in its last event, and hosted tools with it."""
        provider.status, provider.calls = status, ("code_interpreter_call",)
        with watch(respond(client, stream=True)) as stream:
            assert [event.type for event in stream][-1] == f"response.{status}"
        assert stream.usage == read(
            {**surfaces.response(provider, {}), "project_id": PROJECT},
        )

    def test_left_early(self, provider, client):
        """A loop that is left before the end closes the stream, which is unmeasured."""
        told = []
        with watch(
            chat(client, stream=True, stream_options=WITH_USAGE), on_end=lambda *end: told.append(end)
        ) as stream:
            for _ in stream:
                break
        assert [(usage.model, usage.input_tokens, error) for usage, error in told] == [(MODEL, None, None)]
        assert stream.response.is_closed

    def test_helpers(self, provider, client):
        """The SDK's own helpers for streams are read as well."""
        with client.responses.stream(model=MODEL, input="Hi") as inside:
            stream = watch(inside)
            list(stream)
        assert stream.usage.input_tokens == 1200
        with client.chat.completions.stream(model=MODEL, messages=MESSAGES, stream_options=WITH_USAGE) as inside:
            stream = watch(inside)
            list(stream)
        assert (stream.usage.input_tokens, stream.usage.output_tokens) == (1200, 300)

    def test_image(self, provider, client):
        """An image's stream says its usage in its last event."""
        stream = watch(client.images.generate(prompt="Hi", model="gpt-image-1", stream=True))
        list(stream)
        assert (stream.usage.input_tokens, stream.usage.output_tokens) == (1200, 300)


class TestAsyncio:
    """The same for asyncio, which differs by an await."""

    @pytest.mark.parametrize("make", [chat, respond])
    @pytest.mark.parametrize("cut", ["", "quiet"])
    def test_same(self, provider, client, make, cut):
        """A stream of asyncio says what the other says."""
        provider.cut = cut
        options = {"stream": True, **({"stream_options": WITH_USAGE} if make is chat else {})}
        stream = watch(make(client, **options))
        expected = list(stream)

        async def main():
            async with asked(provider) as asking:
                async with watch(await make(asking, **options)) as stream:
                    assert isinstance(stream, AsyncWatched)
                    found = [chunk async for chunk in stream]
                return found, stream.usage

        assert asyncio.run(main()) == (expected, stream.usage)

    def test_object(self, provider):
        """Whole answers, and raw ones, read alike."""

        async def main():
            async with asked(provider) as asking:
                raw = await asking.responses.with_raw_response.create(model=MODEL, input="Hi")
                return read(await respond(asking)), read(raw).project

        assert asyncio.run(main()) == (read(surfaces.response(provider, {})), PROJECT)

    def ends(self, provider, use):
        """What `on_end` was told, when a stream of asyncio is used so."""
        told = []

        async def on_end(usage, error):
            await asyncio.sleep(0)
            told.append((usage.input_tokens, type(error)))

        async def main():
            async with asked(provider) as asking:
                await use(watch(await chat(asking, stream=True, stream_options=WITH_USAGE), on_end=on_end), told)

        asyncio.run(main())
        return told

    def test_end(self, provider):
        """At its end `on_end` is awaited, once."""

        async def use(stream, told):
            assert len([chunk async for chunk in stream]) == 5
            assert len(told) == 1
            await stream.close()

        assert self.ends(provider, use) == [(1200, type(None))]

    def test_cut(self, provider):
        """When it breaks, with what broke it."""
        provider.cut = "abrupt"

        async def use(stream, told):
            with pytest.raises(openai.APIConnectionError):
                _ = [chunk async for chunk in stream]
            await stream.aclose()

        assert self.ends(provider, use) == [(None, openai.APIConnectionError)]

    def test_closed_early(self, provider):
        """When it is closed before its end."""

        async def use(stream, told):
            async with stream:
                await anext(stream)
            assert len(told) == 1
            assert stream.response.is_closed

        assert self.ends(provider, use) == [(None, type(None))]

    def test_cancelled(self, provider):
        """When the task that reads it is cancelled."""
        told = []

        async def on_end(usage, error):
            told.append((usage.input_tokens, type(error)))

        async def endless():
            yield surfaces.chat_chunks(provider, {})[0]
            await asyncio.Event().wait()

        async def main():
            stream = watch(endless(), on_end=on_end)
            await anext(stream)
            reading = asyncio.create_task(anext(stream))
            await asyncio.sleep(0)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

        asyncio.run(main())
        assert told == [(None, asyncio.CancelledError)]


class TestProvider:
    """The stub does what its switches say, for the tests that rely on it."""

    @pytest.mark.parametrize(
        ("status", "error"),
        [
            (400, openai.BadRequestError),
            (401, openai.AuthenticationError),
            (429, openai.RateLimitError),
            (500, openai.InternalServerError),
        ],
    )
    def test_failures(self, provider, client, status, error):
        """A failure is what the SDK makes of it, once."""
        provider.fail(status)
        with pytest.raises(error):
            chat(client)
        assert read(chat(client)).input_tokens == 1200
        assert [one.path for one in provider.asked] == ["/chat/completions"] * 2

    def test_retries(self, provider):
        """The SDK asks again by itself: the provider saw both."""
        provider.fail(500)
        with OpenAI(api_key=KEY, base_url=provider.url, max_retries=1, timeout=ANSWER_MOST_S) as client:
            assert read(chat(client)).input_tokens == 1200
        assert len(provider.asked) == 2
        assert provider.asked[0].body == provider.asked[1].body

    def test_hold(self, provider):
        """A request that is held is a timeout for those who do not wait."""
        provider.hold()
        with (
            OpenAI(api_key=KEY, base_url=provider.url, max_retries=0, timeout=0.05) as client,
            pytest.raises(openai.APITimeoutError),
        ):
            chat(client)
        assert provider.arrived.wait(ANSWER_MOST_S)
        provider.release()

    def test_records(self, provider, client):
        """It records what it was asked."""
        chat(client, max_completion_tokens=5)
        found = provider.asked[0]
        assert (found.method, found.path, found.body["max_completion_tokens"]) == ("POST", "/chat/completions", 5)
        assert found.headers["authorization"] == f"Bearer {KEY}"
