"""The metered client: the official SDK, blocking and on asyncio, against a provider on loopback."""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from contextvars import copy_context
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import openai
import pydantic
import pytest
from msgspec.structs import replace
from openai import AsyncOpenAI, AsyncStream, OpenAI, Stream

import gratis.openai
from gratis import AsyncMeter, Conflict, Enrollment, GratisError, Meter, NotExecuted, Reason, RequestError, Verdict
from gratis.errors import UsageError
from gratis.model import Expiry, Kind
from gratis.offers import load
from gratis.openai import Refused, decision, switch
from gratis.stores.memory import MemoryStore
from gratis.usage import bound

from . import provider as surfaces
from .provider import KEY, MODEL, PROJECT, Provider

if TYPE_CHECKING:
    from collections.abc import Iterator

NOON = datetime(2025, 6, 1, 12, tzinfo=UTC)
MIDNIGHT = datetime(2025, 6, 2, tzinfo=UTC)
TIER_1 = Enrollment(tier=1, sharing="enabled")
ALLOWANCE = 250_000
MINI = "gpt-4.1-mini-2025-04-14"
MESSAGES = [{"role": "user", "content": "Hi"}]
OUTPUT = 2_000
CHAT_BOUND = bound({"model": MODEL, "messages": MESSAGES}, output_max=OUTPUT)
ANSWER_MOST_S = 20.0
NEVER_S = 0.05  # how long a client waits for an answer that is held back
WIRE = getattr(openai._base_client, "httpx", None)  # older SDKs let the wire's own errors through
BROKEN = (openai.APIConnectionError, *([] if WIRE is None else [WIRE.RequestError]))
SECRET = "the-secret-text-of-a-prompt"  # noqa: S105 - what must not be found


@dataclass
class Side:
    """The SDK of one sort, blocking or on asyncio, and a meter of the same sort over a store in memory."""

    provider: Provider
    is_async: bool
    runner: asyncio.Runner
    opened: list[Any] = field(default_factory=list)
    now: datetime = NOON

    def __post_init__(self) -> None:
        self.store = MemoryStore(clock=self.clock)
        self.meter = Meter(self.store, load("openai-data-sharing"), assume=TIER_1)
        self.own = AsyncMeter(self.store, self.meter.offer, assume=TIER_1) if self.is_async else self.meter

    def clock(self) -> datetime:
        """The clock of the store and the client."""
        return self.now

    def plain(self, **options: Any) -> Any:
        """A client that is not metered, which asks once."""
        options = {"base_url": self.provider.url, "max_retries": 0, "timeout": ANSWER_MOST_S, **options}
        client = (AsyncOpenAI if self.is_async else OpenAI)(api_key=KEY, **options)
        self.opened.append(client)
        return client

    def client(self, options: dict[str, Any] | None = None, **plan: Any) -> Any:
        """A metered client."""
        plan = {"meter": self.own, "output_max": OUTPUT, "clock": self.clock, **plan}
        return gratis.openai.meter(self.plain(**(options or {})), **plan)

    def do(self, made: Any) -> Any:
        """What a call gives; on asyncio, once it was awaited."""
        return self.runner.run(_awaited(made), context=copy_context()) if inspect.isawaitable(made) else made

    def chunks(self, stream: Any) -> list[Any]:
        """All of a stream."""
        return self.do(_listed(stream)) if hasattr(stream, "__aiter__") else list(stream)

    def within(self, manager: Any, use: Any) -> Any:
        """What `use` makes of what a manager gives, inside it."""
        if hasattr(manager, "__aenter__"):
            return self.do(_used(manager, use))
        with manager as entered:
            return use(entered)

    def decided(self) -> list[tuple[str, int | None]]:
        """The verdict and the tokens of each decision."""
        return [(str(entry.decision.verdict), entry.decision.tokens) for entry in self.meter.ledger()]

    def used(self) -> dict[str, int]:
        """What is used of each group."""
        return {one.group: one.used for one in self.meter.standing() if one.used}

    def fill(self, left: int, *, model: str = MODEL, allowance: int = ALLOWANCE) -> None:
        """Use all of an allowance but so much."""
        made = gratis.Request(
            id=f"fill {model}", model=model, at=self.now, input_tokens=allowance - left, output_tokens=0
        )
        assert self.meter.decide(made).is_free


def _nothing(_entered: Any) -> None:
    pass


async def _awaited(made: Any) -> Any:
    return await made


async def _listed(stream: Any) -> list[Any]:
    return [chunk async for chunk in stream]


async def _used(manager: Any, use: Any) -> Any:
    async with manager as entered:
        found = use(entered)
        return await found if inspect.isawaitable(found) else found


@pytest.fixture
def provider():
    """A provider of this test alone."""
    with Provider() as provider:
        yield provider


@pytest.fixture(params=["blocking", "asyncio"])
def side(request, provider, monkeypatch):
    """Each of the SDK's two sorts in turn; between two attempts they do not wait."""
    monkeypatch.setattr(openai._base_client.BaseClient, "_calculate_retry_timeout", lambda *_, **__: 0)
    with asyncio.Runner() as runner:
        side = Side(provider, request.param == "asyncio", runner)
        yield side
        for client in side.opened:
            side.do(client.close())


def chat(client: Any, **fields: Any) -> Any:
    """A chat completion."""
    return client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, **fields})


def respond(client: Any, **fields: Any) -> Any:
    """A response."""
    return client.responses.create(**{"model": MODEL, "input": "Hi", **fields})


def embed(client: Any, **fields: Any) -> Any:
    """An embedding."""
    return client.embeddings.create(**{"model": MODEL, "input": "Hi", **fields})


def read_to_end(side: Side, stream: Any) -> Any:
    """A stream, read to its end."""
    side.chunks(stream)
    return stream


def chat_raw_stream(side: Side, client: Any) -> Any:
    """A raw response that was read as a stream."""
    raw = side.do(client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES, stream=True))
    read_to_end(side, raw.parse())
    return raw


def opened_response(side: Side, client: Any, use: Any, **fields: Any) -> Any:
    """A response that is read while it is open, as `use` does."""
    manager = client.chat.completions.with_streaming_response.create(model=MODEL, messages=MESSAGES, **fields)
    found: list[Any] = []

    def inside(raw: Any) -> Any:
        found.append(raw)
        return use(raw)

    side.within(manager, inside)
    return found[0]


def read_parsed(raw: Any) -> Any:
    """Read the stream of an opened response."""
    stream = raw.parse()
    return _parsed_async(stream) if inspect.isawaitable(stream) else list(stream)


async def _parsed_async(stream: Any) -> list[Any]:
    return await _listed(await stream)


def helped(side: Side, manager: Any) -> Any:
    """Read a stream of the SDK's helpers."""
    found: list[Any] = []

    def inside(stream: Any) -> Any:
        found.append(stream)
        return _listed(stream) if hasattr(stream, "__aiter__") else list(stream)

    side.within(manager, inside)
    return found[0]


WAYS = {
    "chat": lambda side, client: side.do(chat(client)),
    "chat, parsed": lambda side, client: side.do(client.chat.completions.parse(model=MODEL, messages=MESSAGES)),
    "chat, raw": lambda side, client: side.do(
        client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES)
    ),
    "chat, opened": lambda side, client: opened_response(side, client, lambda raw: raw.json()),
    "chat, opened and parsed": lambda side, client: opened_response(side, client, lambda raw: raw.parse()),
    "chat, streamed": lambda side, client: read_to_end(side, side.do(chat(client, stream=True))),
    "chat, helped": lambda side, client: helped(side, client.chat.completions.stream(model=MODEL, messages=MESSAGES)),
    "chat, raw stream": chat_raw_stream,
    "chat, opened stream": lambda side, client: opened_response(side, client, read_parsed, stream=True),
    "completion": lambda side, client: side.do(client.completions.create(model=MODEL, prompt="Hi")),
    "response": lambda side, client: side.do(respond(client)),
    "response, parsed": lambda side, client: side.do(client.responses.parse(model=MODEL, input="Hi")),
    "response, streamed": lambda side, client: read_to_end(side, side.do(respond(client, stream=True))),
    "response, helped": lambda side, client: helped(side, client.responses.stream(model=MODEL, input="Hi")),
    "by its path": lambda side, client: side.do(
        client.post("/chat/completions", body={"model": MODEL, "messages": MESSAGES}, cast_to=object)
    ),
}


class TestWays:
    """However a call is made, it has one hold and one decision."""

    @pytest.mark.parametrize("way", WAYS)
    def test_decided_once(self, side, way):
        """It is decided once, by what the provider said that it took, and nothing stays held."""
        answer = WAYS[way](side, side.client(otherwise="refuse"))
        assert side.decided() == [("free", 1500)]
        assert side.meter.holds() == []
        if way != "by its path":  # a dict has no place for it
            assert decision(answer) == next(side.meter.ledger()).decision
            assert decision(answer).request.project == PROJECT

    @pytest.mark.parametrize("way", WAYS)
    def test_held_while_it_is_sent(self, side, provider, monkeypatch, way):
        """When the provider is asked, its bound is set aside."""
        held = []
        takes = provider.takes
        monkeypatch.setattr(
            provider, "takes", lambda asked: (held.extend(one.aside for one in side.meter.holds()), takes(asked))[1]
        )
        WAYS[way](side, side.client())
        (aside,) = held
        assert 1500 < aside < 1.5 * CHAT_BOUND

    def test_embedding(self, side):
        """An embedding has no output: its bound is its input's, and so are its tokens."""
        answer = side.do(embed(side.client(output_max=None, otherwise="refuse")))
        assert decision(answer).tokens == 8
        assert decision(answer).request.kind is Kind.EMBEDDING
        assert len(answer.data[0].embedding) == 2

    def test_images_and_audio(self, side):
        """Images and audio are decided too, under the model that was asked for."""
        client = side.client(tokens_max=10_000)
        image = side.do(client.images.generate(model="gpt-image-1", prompt="Hi"))
        audio = side.do(client.audio.transcriptions.create(model="whisper-1", file=b"RIFF"))
        text = side.do(client.audio.transcriptions.create(model="whisper-1", file=b"RIFF", response_format="text"))
        assert [(decision(one).request.kind, decision(one).tokens) for one in (image, audio)] == [
            (Kind.IMAGE, 1500),
            (Kind.AUDIO, 59),
        ]
        assert isinstance(text, str)
        assert side.decided() == [("billed", 1500), ("billed", 59), ("billed", 59)]
        with pytest.raises(GratisError, match="found a str, which is no answer to a metered call"):
            decision(text)

    def test_speech(self, side, monkeypatch):
        """What tells no usage is unmeasured: decided by its bound."""
        monkeypatch.setitem(surfaces.SURFACES, "/audio/speech", lambda _provider, _body: {"not": "a usage"})
        answer = side.do(side.client(tokens_max=77).audio.speech.create(model="tts-1", voice="alloy", input="Hi"))
        assert decision(answer).is_unmeasured
        assert side.decided() == [("billed", 77)]

    def test_model_of_the_answer(self, side, provider):
        """The model that answered is what counts."""
        provider.model = MINI
        assert decision(side.do(chat(side.client()))).group == "10M"

    def test_tools_of_the_answer(self, side, provider):
        """So are the tools that it called."""
        provider.calls = ("web_search_call",)
        answer = side.do(respond(side.client()))
        assert (decision(answer).verdict, decision(answer).reason) == (Verdict.BILLED, Reason.TOOL_USE)


class TestAnswers:
    """What the caller gets is what it would get without a meter."""

    @pytest.mark.parametrize("make", [chat, respond, embed])
    def test_same_fields(self, side, make):
        """A response has no field more, and prints, dumps and compares as ever."""
        metered, plain = side.do(make(side.client())), side.do(make(side.plain()))
        assert type(metered) is type(plain)
        assert metered.model_dump() == plain.model_dump()
        assert metered.to_json() == plain.to_json()
        assert repr(metered) == repr(plain)
        assert metered == plain
        assert decision(pickle.loads(pickle.dumps(metered))) == decision(metered)  # noqa: S301 - our own
        assert decision(metered.model_copy()) == decision(metered)

    def test_same_chunks(self, side, provider):
        """A stream has the chunks that it has without a meter, though its usage was asked for."""
        stream, plain = (side.do(chat(one, stream=True)) for one in (side.client(), side.plain()))
        assert type(stream) is (AsyncStream if side.is_async else Stream)
        chunks = side.chunks(stream)
        assert [chunk.model_dump() for chunk in chunks] == [chunk.model_dump() for chunk in side.chunks(plain)]
        assert provider.asked[0].body["stream_options"] == {"include_usage": True}
        assert "stream_options" not in provider.asked[1].body
        assert decision(stream).tokens == 1500

    @pytest.mark.parametrize("asked", [False, True])
    def test_usage_that_was_asked_for(self, side, provider, asked):
        """Only who asked for the usage gets its chunk; other options go as they were."""
        options = {"include_usage": asked, "include_obfuscation": False}
        chunks = side.chunks(side.do(chat(side.client(), stream=True, stream_options=options)))
        assert [chunk.choices == [] for chunk in chunks] == [False] * 4 + [True] * asked
        assert provider.asked[0].body["stream_options"] == {**options, "include_usage": True}

    def test_running_usage(self, side, monkeypatch):
        """A provider that tells a usage with each chunk loses none of them but the one that was asked for."""

        def chunks(provider: Provider, body: dict[str, Any]) -> list[dict[str, Any]]:
            made = surfaces.chat_chunks(provider, body)
            return [{**chunk, "usage": surfaces.CHAT_USAGE} for chunk in made]

        monkeypatch.setitem(surfaces.STREAMS, "/chat/completions", chunks)
        stream = side.do(chat(side.client(), stream=True))
        assert [chunk.choices == [] for chunk in side.chunks(stream)] == [False] * 4
        assert decision(stream).tokens == 1500

    def test_parsed_later(self, side):
        """What a raw response is parsed to has its decision too."""
        client = side.client()
        raw = side.do(client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES))
        assert decision(raw.parse()) == decision(raw)

    def test_body_as_it_was(self, side, provider):
        """Nothing else of a call is changed."""
        fields = {"temperature": 0.5, "extra_body": {"metadata": {"a": "b"}}, "extra_headers": {"x-a": "b"}}
        side.do(chat(side.client(), **fields))
        side.do(chat(side.plain(), **fields))
        metered, plain = provider.asked
        assert metered.body == plain.body
        assert metered.headers["x-a"] == "b"
        assert {*metered.headers} == {*plain.headers}

    def test_not_ended(self, side):
        """A stream has no decision before its end; who asks is told so."""
        stream = side.do(chat(side.client(), stream=True))
        with pytest.raises(GratisError, match="no decision: it has not ended: read its stream to the end, or close it"):
            decision(stream)
        side.do(stream.close())

    def test_not_metered(self, side):
        """Neither has an answer of a client that is not metered."""
        with pytest.raises(GratisError, match="found a ChatCompletion, which is no answer to a metered call"):
            decision(side.do(chat(side.plain())))


class TestClients:
    """What is metered is a copy."""

    def test_original(self, side):
        """The client that was given stays as it was."""
        plain = side.plain()
        metered = gratis.openai.meter(plain, meter=side.own, clock=side.clock)
        side.do(chat(plain))
        assert side.decided() == []
        side.do(chat(metered))
        assert side.decided() == [("free", 1500)]

    @pytest.mark.parametrize("method", ["copy", "with_options"])
    def test_copies(self, side, method):
        """Copies of a metered client are metered, and still clients."""
        client = getattr(side.client(), method)(timeout=5)
        assert isinstance(client, AsyncOpenAI if side.is_async else OpenAI)
        assert client.timeout == 5
        side.do(chat(client))
        assert side.decided() == [("free", 1500)]

    def test_own_class(self, side, provider):
        """A client of the caller's own class stays one; what it answers without the provider is given back."""

        class Cached(OpenAI):
            """It answers one call by itself."""

            def request(self, cast_to, options, **how):
                kept = self.__dict__.pop("kept", None)
                return kept or super().request(cast_to, options, **how)

        class CachedAsync(AsyncOpenAI):
            """It answers one call by itself, on asyncio."""

            async def request(self, cast_to, options, **how):
                kept = self.__dict__.pop("kept", None)
                return kept or await super().request(cast_to, options, **how)

        kept = side.do(chat(side.plain()))
        own = (CachedAsync if side.is_async else Cached)(api_key=KEY, base_url=provider.url)
        side.opened.append(own)
        client = gratis.openai.meter(own, meter=side.own, output_max=OUTPUT, clock=side.clock)
        assert isinstance(client, type(own))
        client.kept = kept
        assert side.do(chat(client)) is kept
        assert (side.meter.holds(), side.decided()) == ([], [])
        side.do(chat(client))
        assert side.decided() == [("free", 1500)]

    def test_twice(self, side):
        """A metered client is not metered again: each call would be counted twice."""
        with pytest.raises(GratisError, match="metered already"):
            gratis.openai.meter(side.client(), meter=side.own)

    def test_wrong_things(self, side):
        """What cannot be metered is refused, with what was expected."""
        other = side.meter if side.is_async else AsyncMeter(side.store, side.meter.offer)
        with pytest.raises(TypeError, match="client: found a int; expected an OpenAI or AsyncOpenAI"):
            gratis.openai.meter(5, meter=side.own)
        with pytest.raises(TypeError, match=f"expected a {type(side.own).__name__} for this client"):
            gratis.openai.meter(side.plain(), meter=other)
        with pytest.raises(RequestError, match=r"otherwise: found 'stop'; expected 'send', 'refuse' or switch"):
            side.client(otherwise="stop")
        with pytest.raises(RequestError, match="expected the models to switch to"):
            switch()
        with pytest.raises(RequestError, match="otherwise: found 'stop'"):
            switch(MINI, otherwise="stop")

    def test_without_the_sdk(self, side, monkeypatch):
        """Without the SDK, the error says how to get it."""
        client = side.plain()
        monkeypatch.setitem(sys.modules, "openai", None)
        with pytest.raises(GratisError, match="pip install openai"):
            gratis.openai.meter(client, meter=side.own)

    def test_another_sdk(self, side, monkeypatch):
        """An SDK that works otherwise is refused at once, not when money is at stake."""
        client = side.plain()
        monkeypatch.delattr(openai._base_client.SyncAPIClient, "_sleep_for_retry")
        monkeypatch.delattr(openai._base_client.AsyncAPIClient, "_sleep_for_retry")
        with pytest.raises(GratisError, match=rf"openai {openai.__version__} is not supported"):
            gratis.openai.meter(client, meter=side.own)


class TestPolicies:
    """What becomes of a call that would not be free."""

    def test_send(self, side, provider):
        """It is sent, and billed as it was; what fits after all is free."""
        side.fill(1600)
        client = side.client()
        assert decision(side.do(chat(client))).verdict is Verdict.FREE
        assert decision(side.do(chat(client))).verdict is Verdict.BILLED
        assert len(provider.asked) == 2
        assert side.meter.holds() == []

    def test_refuse(self, side, provider):
        """It is not sent, and the error says what is left, until when, and which group would take it."""
        side.fill(CHAT_BOUND - 1)
        with pytest.raises(Refused) as caught:
            side.do(chat(side.client(otherwise="refuse")))
        error = caught.value
        assert (error.left, error.until, error.elsewhere) == (CHAT_BOUND - 1, MIDNIGHT, ("10M",))
        assert (error.hold.request.model, error.hold.short) == (MODEL, 1)
        assert str(error) == (
            f"not sent: up to {CHAT_BOUND:,} tokens of 'gpt-4.1-2025-04-14', and {CHAT_BOUND - 1:,} of 250,000 are left"
            " in 1M until 2025-06-02T00:00:00Z; 10M would take it"
        )
        assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301 - our own
        assert provider.asked == []
        assert side.meter.holds() == []
        assert len(side.decided()) == 1

    def test_exactly(self, side):
        """A call whose bound is all that is left is sent."""
        side.fill(CHAT_BOUND)
        assert decision(side.do(chat(side.client(otherwise="refuse")))).verdict is Verdict.FREE

    def test_refuse_beside_others(self, side):
        """What other calls are held with is not left."""
        side.fill(CHAT_BOUND + 100)
        client = side.client(otherwise="refuse")
        stream = side.do(chat(client, stream=True))
        with pytest.raises(Refused) as caught:
            side.do(chat(client))
        assert caught.value.left == 100
        side.chunks(stream)
        assert side.meter.holds() == []

    def test_refuse_what_nothing_covers(self, side, provider):
        """A model that no allowance covers is refused by its reason."""
        with pytest.raises(Refused, match=r"no allowance covers 'gpt-9' \(model_not_listed\)") as caught:
            side.do(chat(side.client(otherwise="refuse"), model="gpt-9"))
        assert (caught.value.left, caught.value.until, caught.value.elsewhere) == (None, None, ("1M", "10M"))
        assert provider.asked == []

    @pytest.mark.parametrize("model", [MODEL, "gpt-9"])
    def test_switch(self, side, provider, model):
        """It is sent to the first other model that has room for it, and decided under that."""
        side.fill(0)
        provider.model = MINI
        answer = side.do(chat(side.client(otherwise=switch("gpt-4o-2024-11-20", MINI)), model=model))
        assert [asked.body["model"] for asked in provider.asked] == [MINI]
        assert (decision(answer).verdict, decision(answer).group) == (Verdict.FREE, "10M")
        assert len(side.decided()) == 2
        assert side.meter.holds() == []

    def test_switch_wins_over_extra_body(self, side, provider):
        """Where the caller names the model in `extra_body`, that one is switched too."""
        side.fill(0)
        side.do(chat(side.client(otherwise=switch(MINI)), extra_body={"model": MODEL}))
        assert provider.asked[0].body["model"] == MINI

    def test_switch_is_not_needed(self, side, provider):
        """While it fits, a call keeps its model."""
        side.do(chat(side.client(otherwise=switch(MINI))))
        assert provider.asked[0].body["model"] == MODEL

    def test_switch_to_nothing(self, side, provider):
        """Where no other model has room either, it is sent to its own, or refused."""
        side.fill(0)
        side.fill(0, model=MINI, allowance=2_500_000)
        assert decision(side.do(chat(side.client(otherwise=switch(MINI))))).verdict is Verdict.BILLED
        assert [asked.body["model"] for asked in provider.asked] == [MODEL]
        with pytest.raises(Refused, match="0 of 250,000 are left in 1M"):
            side.do(chat(side.client(otherwise=switch(MINI, otherwise="refuse"))))
        assert len(provider.asked) == 1
        assert side.meter.holds() == []

    def test_only_completions_switch(self, side, provider):
        """An embedding is not sent to a model that completes."""
        side.fill(0)
        with pytest.raises(Refused):
            side.do(embed(side.client(otherwise=switch(MINI, otherwise="refuse"))))
        side.do(embed(side.client(otherwise=switch(MINI))))
        assert [asked.body["model"] for asked in provider.asked] == [MODEL]


class TestBounds:
    """How much a call is held with."""

    def held(self, side: Side, make: Any, **plan: Any) -> Any:
        """The hold of a call that gets no answer."""
        side.provider.hold()
        with pytest.raises(openai.APITimeoutError):
            side.do(make(side.client({"timeout": NEVER_S}, **plan)))
        return side.meter.holds()

    def test_bytes(self, side):
        """It is as many tokens as its input has bytes, its frame, and its limit of output."""
        (hold,) = self.held(side, partial(chat, max_completion_tokens=500), output_max=None)
        assert hold.tokens_max == CHAT_BOUND - OUTPUT + 500

    def test_extra_body(self, side):
        """What the caller puts in `extra_body` is sent, so it counts."""
        (hold,) = self.held(side, partial(chat, max_completion_tokens=5, extra_body={"max_completion_tokens": 700}))
        assert hold.tokens_max == CHAT_BOUND - OUTPUT + 700

    def test_tokenizer(self, side):
        """Or as its tokenizer counts."""
        (hold,) = self.held(side, chat, count=lambda _text: 0)
        assert 2 <= CHAT_BOUND - hold.tokens_max <= 30

    @pytest.mark.parametrize("tokens_max", [4321, lambda body: 4321 if body["model"] == MODEL else 0])
    def test_own(self, side, tokens_max):
        """Where bytes bound nothing, as the caller says; where they do, they win."""
        image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a/b.png"}}]}]
        (hold,) = self.held(side, partial(chat, messages=image), tokens_max=tokens_max)
        assert hold.tokens_max == 4321
        assert CHAT_BOUND in [hold.tokens_max for hold in self.held(side, chat, tokens_max=tokens_max)]

    def test_span(self, side):
        """It lasts as long as the caller says, and runs out as it says."""
        (hold,) = self.held(side, chat, for_=timedelta(minutes=1), on_expiry="released")
        assert (hold.until, hold.expiry) == (NOON + timedelta(minutes=1), Expiry.RELEASED)

    def test_none(self, side, provider):
        """A call without a bound is sent without a hold, and decided by what it took."""
        side.fill(1600)
        client = side.client(output_max=None, otherwise=switch(MINI))
        assert decision(side.do(chat(client))).verdict is Verdict.FREE
        assert decision(side.do(chat(client))).verdict is Verdict.BILLED
        stream = side.do(chat(client, stream=True))
        side.chunks(stream)
        assert [tokens for _, tokens in side.decided()[1:]] == [1500, 1500, 1500]
        assert decision(stream).request.project == PROJECT
        assert len(provider.asked) == 3

    @pytest.mark.parametrize("otherwise", ["refuse", switch(MINI, otherwise="refuse")])
    def test_none_to_refuse_by(self, side, provider, otherwise):
        """Where it could have to be refused it is an error that says what is needed."""
        with pytest.raises(UsageError, match=r"tokens_max: needed .* no bound of its own: max_completion_tokens"):
            side.do(chat(side.client(output_max=None, otherwise=otherwise)))
        assert provider.asked == []

    def test_none_and_no_usage(self, side, provider):
        """Without a bound and without a usage it is billed, as unmeasured."""
        provider.usage = None
        assert decision(side.do(chat(side.client(output_max=None)))).reason is Reason.UNMEASURED


class TestFailures:
    """A call that fails: given back if the provider surely did not run it."""

    @pytest.mark.parametrize("statuses", [[400], [401], [429], [429, 429, 429]])
    def test_refused(self, side, provider, statuses):
        """What the provider refused, however often the SDK tried, is given back."""
        for status in statuses:
            provider.fail(status)
        client = side.client({"max_retries": len(statuses) - 1}, otherwise="refuse")
        with pytest.raises(openai.APIStatusError) as caught:
            side.do(chat(client))
        assert len(provider.asked) == len(statuses)
        assert (side.meter.holds(), side.decided()) == ([], [])
        with pytest.raises(GratisError, match="refused by the provider, or never sent; its hold was released"):
            decision(caught.value)

    @pytest.mark.parametrize("statuses", [[500], [408], [500, 429], [429, 500], [408, 400], [500, 500, 500]])
    def test_in_doubt(self, side, provider, monkeypatch, statuses):
        """What it may have run, in any attempt, stays held, and is decided by its bound when the hold runs out."""
        monkeypatch.setitem(surfaces.ERRORS, 408, ("timeout", None))
        for status in statuses:
            provider.fail(status)
        with pytest.raises(openai.APIStatusError) as caught:
            side.do(chat(side.client({"max_retries": len(statuses) - 1})))
        assert len(provider.asked) == len(statuses)
        (hold,) = side.meter.holds()
        assert hold.aside == CHAT_BOUND
        with pytest.raises(GratisError, match=r"not known: its hold stays until 2025-06-01T12:10:00Z"):
            decision(caught.value)
        side.now = hold.until
        (late,) = side.meter.expire()
        assert (late.tokens, late.is_unmeasured) == (CHAT_BOUND, True)

    def test_timeout(self, side, provider):
        """So does what got no answer in time."""
        provider.hold()
        with pytest.raises(openai.APITimeoutError):
            side.do(chat(side.client({"timeout": NEVER_S})))
        assert [hold.aside for hold in side.meter.holds()] == [CHAT_BOUND]

    def test_nobody_there(self, side):
        """What could not be sent, for nobody listens there, is given back."""
        with pytest.raises(openai.APIConnectionError):
            side.do(chat(side.client({"base_url": "http://127.0.0.1:9/v1", "max_retries": 2})))
        assert (side.meter.holds(), side.decided()) == ([], [])

    def test_not_begun(self, side, provider):
        """So is what the SDK itself could not make a request of."""
        with pytest.raises((TypeError, ValueError)):
            side.do(chat(side.client(), extra_headers={"x-a": "\ud800"}))
        assert provider.asked == []
        assert (side.meter.holds(), side.decided()) == ([], [])

    def test_tried_again(self, side, provider):
        """Three attempts are one call: one id, one hold, one decision."""
        provider.fail(500)
        provider.fail(429)
        answer = side.do(chat(side.client({"max_retries": 2})))
        assert len(provider.asked) == 3
        assert side.decided() == [("free", 1500)]
        assert decision(answer).tokens == 1500
        assert side.meter.holds() == []

    @pytest.mark.parametrize(("status", "decided"), [(400, []), (500, [("billed", None)])])
    def test_without_a_hold(self, side, provider, status, decided):
        """What had no bound and may have run is in the ledger, as unmeasured."""
        provider.fail(status)
        with pytest.raises(openai.APIStatusError):
            side.do(chat(side.client(output_max=None)))
        assert side.decided() == decided

    def test_answer_that_does_not_parse(self, side):
        """What the SDK could not parse was answered: it is decided by what it took, and the error tells how."""

        class Form(pydantic.BaseModel):
            """What an answer should have been."""

            number: int

        with pytest.raises(pydantic.ValidationError):
            side.do(side.client().chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Form))
        assert side.decided() == [("free", 1500)]
        assert side.meter.holds() == []

    @pytest.mark.parametrize("usage", [None, {"prompt_tokens": -5, "completion_tokens": 1}])
    def test_no_usage(self, side, provider, caplog, usage):
        """An answer whose usage is missing or not understood is decided by its bound; the latter is logged."""
        provider.usage = usage
        answer = side.do(chat(side.client()))
        assert decision(answer).is_unmeasured
        assert side.decided() == [("free", CHAT_BOUND)]
        said = [record.getMessage() for record in caplog.records if record.name.startswith("gratis")]
        assert ["usage.prompt_tokens: found -5" in line for line in said] == [True] * (usage is not None)

    @pytest.mark.parametrize("verb", ["hold", "settle", "release"])
    def test_store_fails(self, side, provider, monkeypatch, caplog, verb):
        """No hold, nothing sent; and no failure of the store costs an answer, or hides an error of the provider."""
        error = NotExecuted("the disk is full")

        def fails(*_: Any, **__: Any) -> Any:
            raise error

        async def fails_later(*_: Any, **__: Any) -> Any:
            raise error

        client = side.client()
        monkeypatch.setattr(side.own, verb, fails_later if side.is_async else fails)
        if verb == "release":
            provider.fail(400)
        if verb == "settle":
            answer = side.do(chat(client))
            assert answer.choices[0].message.content == "Hello"
        else:
            with pytest.raises(NotExecuted if verb == "hold" else openai.BadRequestError) as caught:
                side.do(chat(client))
            answer = caught.value
        assert len(provider.asked) == (verb != "hold")
        assert len(side.meter.holds()) == (verb != "hold")
        if verb != "hold":
            assert "the disk is full" in caplog.text
            with pytest.raises(NotExecuted, match="the disk is full"):
                decision(answer)

    def test_bug_of_ours(self, side, monkeypatch):
        """Not even a fault of our own costs the answer."""
        client = side.client()
        with monkeypatch.context() as patch:
            patch.setattr(gratis.openai.answers, "read", None)
            assert decision(side.do(chat(client))).is_unmeasured
        monkeypatch.setattr(side.own, "settle", None)
        answer = side.do(chat(client))
        with pytest.raises(TypeError):
            decision(answer)


class TestStreamsThatBreak:
    """A stream that does not reach its end is unmeasured: decided by its bound."""

    @pytest.mark.parametrize("cut", ["abrupt", "quiet"])
    @pytest.mark.parametrize("make", [chat, respond])
    def test_cut(self, side, provider, cut, make):
        """Be it broken off, or ended without its usage."""
        provider.cut = cut
        stream = side.do(make(side.client(), stream=True))
        with pytest.raises(BROKEN) if cut == "abrupt" else nullcontext():
            side.chunks(stream)
        assert decision(stream).is_unmeasured
        assert [tokens > OUTPUT for _, tokens in side.decided()] == [True]

    def test_closed(self, side):
        """Be it closed before its end, or before its begin."""
        stream = side.do(chat(side.client(), stream=True))
        side.do(stream.close())
        assert side.decided() == [("free", CHAT_BOUND)]
        assert decision(stream).is_unmeasured

    @pytest.mark.parametrize("kind", ["chat", "responses"])
    def test_left(self, side, kind):
        """Be it a helper's that is left by an error of the caller's."""

        def leave(_stream: Any) -> None:
            raise LookupError

        client = side.client()
        manager = (
            client.chat.completions.stream(model=MODEL, messages=MESSAGES)
            if kind == "chat"
            else client.responses.stream(model=MODEL, input="Hi")
        )
        with pytest.raises(LookupError):
            side.within(manager, leave)
        assert [tokens > OUTPUT for _, tokens in side.decided()] == [True]
        assert side.meter.holds() == []

    def test_opened_and_not_read(self, side):
        """Be it an opened response that nobody read, or whose lines the caller read."""

        def read_lines(raw: Any) -> Any:
            lines = raw.iter_lines()
            return _listed(lines) if side.is_async else list(lines)

        for use, fields in ((read_lines, {"stream": True}), (_nothing, {"stream": True}), (_nothing, {})):
            assert decision(opened_response(side, side.client(), use, **fields)).is_unmeasured
        assert side.meter.holds() == []

    @pytest.mark.parametrize("way", ["collected", "closed around it"])
    def test_dropped(self, provider, way):
        """Be it thrown away: never in the midst of a garbage collection, but before the next call."""
        side = Side(provider, is_async=False, runner=None)
        with side.plain() as plain:
            client = gratis.openai.meter(plain, meter=side.own, output_max=OUTPUT, clock=side.clock)

            def around() -> Iterator[Any]:
                with chat(client, stream=True) as stream:
                    yield from stream

            chunks = around() if way == "closed around it" else iter(chat(client, stream=True))
            next(chunks)
            if way == "closed around it":
                chunks.close()
            del chunks
            gc.collect()
            assert (side.decided(), len(side.meter.holds())) == ([], 1)
            chat(client)
        assert side.decided() == [("free", CHAT_BOUND), ("free", 1500)]
        assert side.meter.holds() == []


class TestCancelled:
    """A call that is given up."""

    def test_in_flight(self, provider):
        """A task that is cancelled while it waits leaves its hold: the provider may have run it."""

        async def main() -> None:
            async with AsyncOpenAI(api_key=KEY, base_url=provider.url, max_retries=0) as plain:
                task = asyncio.create_task(chat(side.client()))
                await asyncio.to_thread(provider.arrived.wait, ANSWER_MOST_S)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                provider.release()
                await plain.close()
                await side.opened.pop().close()

        with asyncio.Runner() as runner:
            side = Side(provider, is_async=True, runner=runner)
            provider.hold()
            side.do(main())
        assert [hold.aside for hold in side.meter.holds()] == [CHAT_BOUND]
        assert side.decided() == []

    def test_interrupted(self, provider, monkeypatch):
        """So does a call that the keyboard interrupts."""
        side = Side(provider, is_async=False, runner=None)
        with side.plain() as plain:
            client = gratis.openai.meter(plain, meter=side.own, output_max=OUTPUT, clock=side.clock)

            def interrupt(*_: Any, **__: Any) -> None:
                raise KeyboardInterrupt

            monkeypatch.setattr(client._client, "send", interrupt)
            with pytest.raises(KeyboardInterrupt):
                chat(client)
        assert [hold.aside for hold in side.meter.holds()] == [CHAT_BOUND]

    def test_while_it_is_held(self, provider, monkeypatch):
        """A task that is cancelled before anything was sent gives its hold back, also one that comes too late."""

        async def main() -> None:
            begun, go_on = asyncio.Event(), asyncio.Event()
            hold = side.own.hold

            async def slowly(*what: Any, **how: Any) -> Any:
                begun.set()
                await go_on.wait()
                return await hold(*what, **how)

            monkeypatch.setattr(side.own, "hold", slowly)
            task = asyncio.create_task(chat(side.client()))
            await asyncio.wait_for(begun.wait(), ANSWER_MOST_S)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            go_on.set()
            await asyncio.gather(*gratis.openai.client._ending)
            await side.opened.pop().close()

        with asyncio.Runner() as runner:
            side = Side(provider, is_async=True, runner=runner)
            side.do(main())
        assert provider.asked == []
        assert (side.meter.holds(), side.decided()) == ([], [])

    @pytest.mark.parametrize("stream", [False, True])
    def test_while_it_is_decided(self, provider, monkeypatch, stream):
        """A task that is cancelled when the answer is there does not keep it from being decided."""

        async def main() -> None:
            begun, go_on = asyncio.Event(), asyncio.Event()
            settle = side.own.settle

            async def slowly(*what: Any) -> Any:
                begun.set()
                await go_on.wait()
                return await settle(*what)

            monkeypatch.setattr(side.own, "settle", slowly)
            client = side.client()

            async def call() -> None:
                answer = await chat(client, stream=stream)
                if stream:
                    await _listed(answer)

            task = asyncio.create_task(call())
            await asyncio.wait_for(begun.wait(), ANSWER_MOST_S)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            go_on.set()
            await asyncio.gather(*gratis.openai.client._ending)
            await side.opened.pop().close()

        with asyncio.Runner() as runner:
            side = Side(provider, is_async=True, runner=runner)
            side.do(main())
        assert side.decided() == [("free", 1500)]


class TestIds:
    """Whose call it is."""

    def test_own(self, side):
        """Each call has an id of its own, its client's account and project, and the time of its first attempt."""
        client = side.client({"project": "proj_of_the_client"}, account="acme")
        side.provider.hold()
        with pytest.raises(openai.APITimeoutError):
            side.do(chat(client.with_options(timeout=NEVER_S)))
        side.provider.release()
        first, second = side.do(chat(client)), side.do(chat(client))
        assert decision(first).id != decision(second).id
        assert {len(decision(one).id) for one in (first, second)} == {32}
        (hold,) = side.meter.holds("acme")
        assert (hold.request.account, hold.request.project, hold.request.at) == ("acme", "proj_of_the_client", NOON)

    def test_project(self, side):
        """The project that the meter was told wins over the client's; the one that the provider names, over both."""
        client = side.client({"project": "proj_of_the_client"}, project="p")
        stream = side.do(chat(client, stream=True))
        assert [hold.request.project for hold in side.meter.holds()] == ["p"]
        side.chunks(stream)
        assert decision(stream).request.project == PROJECT
        assert decision(side.do(chat(side.client(project="p", output_max=None)))).request.project == PROJECT

    def test_given(self, side):
        """What the caller says of one call wins."""
        client = side.client({"project": "proj_of_the_client", "timeout": NEVER_S}, account="acme", project="p")
        side.provider.hold()
        at = NOON - timedelta(minutes=1)
        with (
            gratis.openai.request(id="job-7", at=at, account="other", project="q"),
            pytest.raises(openai.APITimeoutError),
        ):
            side.do(chat(client))
        (hold,) = side.meter.holds("other")
        assert (hold.id, hold.request.at, hold.request.project) == ("job-7", at, "q")

    def test_once(self, side, provider):
        """What was decided under an id is not sent again: the conflict carries the decision."""
        client = side.client()
        with gratis.openai.request(id="job-7"):
            first = side.do(chat(client))
            with pytest.raises(Conflict) as caught:
                side.do(chat(client))
        assert caught.value.first == replace(decision(first), replayed=True)
        assert len(provider.asked) == 1

    def test_again(self, side, provider):
        """A job that was killed in mid-flight goes on with its hold."""
        client = side.client()
        provider.fail(500)
        with gratis.openai.request(id="job-7", at=NOON):
            with pytest.raises(openai.InternalServerError):
                side.do(chat(client))
            side.now += timedelta(minutes=1)
            answer = side.do(chat(client))
        assert (decision(answer).id, decision(answer).tokens) == ("job-7", 1500)
        assert side.decided() == [("free", 1500)]
        assert side.meter.holds() == []

    def test_again_refused(self, side, provider):
        """A job whose first attempt may have run keeps its hold, though the second one is refused."""
        client = side.client()
        with gratis.openai.request(id="job-7", at=NOON):
            for status, error in ((500, openai.InternalServerError), (400, openai.BadRequestError)):
                provider.fail(status)
                with pytest.raises(error):
                    side.do(chat(client))
        assert [hold.id for hold in side.meter.holds()] == ["job-7"]
        assert side.decided() == []

    def test_unheld_once(self, side, provider):
        """What could not be held and may have run is decided, so a second attempt under its id is not sent."""
        client = side.client(output_max=None)
        provider.fail(500)
        with gratis.openai.request(id="job-7", at=NOON):
            with pytest.raises(openai.InternalServerError):
                side.do(chat(client))
            with pytest.raises(Conflict) as caught:
                side.do(chat(client))
        assert caught.value.first.reason is Reason.UNMEASURED
        assert len(provider.asked) == 1

    def test_late(self, side, provider, monkeypatch):
        """A call that outlives its hold is decided by what it took all the same: a correction."""
        takes = provider.takes

        def slowly(asked: Any) -> Any:
            side.now += timedelta(hours=1)
            side.meter.expire()
            return takes(asked)

        monkeypatch.setattr(provider, "takes", slowly)
        answer = side.do(chat(side.client()))
        assert decision(answer).tokens == 1500
        assert side.used() == {"1M": 1500}
        assert side.decided() == [("free", CHAT_BOUND), ("free", 1500)]


class TestBackground:
    """Responses that go on after they were answered."""

    @pytest.mark.parametrize("output_max", [OUTPUT, None])
    @pytest.mark.parametrize("way", ["retrieve", "stream", "raw", "cancel"])
    def test_retrieved(self, side, monkeypatch, caplog, way, output_max):
        """They are decided once, when this client sees their end; one without a hold is logged."""
        provider = side.provider
        client = side.client(output_max=output_max)
        provider.status, provider.usage = "queued", None
        begun = side.do(respond(client, background=True))
        side.do(client.responses.retrieve("resp_1"))
        assert side.decided() == []
        assert len(side.meter.holds()) == (output_max is not None)
        with pytest.raises(GratisError, match="runs in the background: retrieve it by this client"):
            decision(begun)
        provider.status, provider.usage = "completed", "usual"
        for _ in range(2):
            if way == "stream":
                monkeypatch.setitem(surfaces.STREAMS, "/responses/resp_1?stream=true", surfaces.response_events)
                side.chunks(side.do(client.responses.retrieve("resp_1", stream=True)))
            elif way == "raw":
                side.do(client.responses.with_raw_response.retrieve("resp_1"))
            else:
                side.do(getattr(client.responses, way)("resp_1"))
        assert side.decided() == [("free", 1500)]
        assert decision(begun).tokens == 1500
        assert side.meter.holds() == []
        assert client._gratis_plan.later == {}
        assert caplog.text.count("runs in the background without a hold") == (output_max is None)

    def test_streamed(self, side):
        """One that is read as a stream is decided at its end."""
        stream = side.do(respond(side.client(), background=True, stream=True))
        side.chunks(stream)
        assert side.decided() == [("free", 1500)]

    def test_retrieval_fails(self, side, provider):
        """A retrieval that fails leaves the hold as it is."""
        client = side.client()
        provider.status, provider.usage = "queued", None
        begun = side.do(respond(client, background=True))
        provider.fail(400)
        with pytest.raises(openai.BadRequestError):
            side.do(client.responses.retrieve("resp_1"))
        assert len(side.meter.holds()) == 1
        with pytest.raises(GratisError, match="runs in the background"):
            decision(begun)

    def test_many(self, side, provider, monkeypatch):
        """As many are waited for as is bounded; the holds of others run out."""
        monkeypatch.setattr(gratis.openai.calls, "LATER_MAX", 1)
        client = side.client()
        provider.status, provider.usage = "queued", None
        begun = []
        for name in ("resp_1", "resp_2"):
            monkeypatch.setitem(
                surfaces.SURFACES, "/responses", lambda p, b, name=name: {**surfaces.response(p, b), "id": name}
            )
            begun.append(side.do(respond(client, background=True)))
        provider.status, provider.usage = "completed", "usual"
        side.do(client.responses.retrieve("resp_2"))
        side.do(client.responses.retrieve("resp_1"))
        assert decision(begun[1]).tokens == 1500
        assert len(side.meter.holds()) == 1


class TestOthers:
    """Calls of no model, and of models whose answers do not tell what they took."""

    @pytest.mark.parametrize(
        ("path", "body"),
        [
            ("/moderations", {"model": "omni-moderation-latest", "input": "Hi"}),
            ("/responses/input_tokens", {"model": MODEL, "input": "Hi"}),
            ("/assistants", {"model": MODEL}),
            ("/files", {"purpose": "batch"}),
        ],
    )
    def test_harmless(self, side, monkeypatch, caplog, path, body):
        """What takes no tokens passes, whatever is left."""
        side.fill(0)
        monkeypatch.setattr(surfaces, "SURFACES", {path: lambda _provider, _body: {"id": "x"}})
        client = side.client(otherwise="refuse")
        assert side.do(client.post(path, body=body, cast_to=object)) == {"id": "x"}
        monkeypatch.setattr(surfaces, "SURFACES", {"/models": lambda _provider, _body: {"data": []}})
        assert side.do(client.get("/models", cast_to=object)) == {"data": []}
        assert side.provider.asked[0].body == body
        assert len(side.decided()) == 1
        assert [record for record in caplog.records if record.name.startswith("gratis")] == []

    def test_unseen(self, side, monkeypatch, caplog):
        """What cannot be metered passes, and is logged, once."""
        monkeypatch.setattr(surfaces, "SURFACES", {"/batches": lambda _provider, _body: {"id": "x"}})
        client = side.client(otherwise="refuse")
        for _ in range(2):
            side.do(client.post("/batches", body={"input_file_id": "file_1"}, cast_to=object))
        said = [record.getMessage() for record in caplog.records if record.name.startswith("gratis")]
        assert said == ["calls of 'batches' are not metered: what they take is not told in their answers"]

    @pytest.mark.parametrize("path", ["/brand/new", "/videos"])
    def test_unknown(self, side, provider, monkeypatch, path):
        """What is not known and names a model is metered: as well as can be, and never silently not."""
        monkeypatch.setattr(surfaces, "SURFACES", {path: lambda _provider, _body: {"object": "new"}})
        body = {"model": "brand-new", "prompt": "Hi"}
        side.do(side.client().post(path, body=body, cast_to=object))
        assert side.decided()[0][0] == "billed"
        with pytest.raises(Refused):
            side.do(side.client(otherwise="refuse").post(path, body=body, cast_to=object))
        assert len(provider.asked) == 1

    @pytest.mark.parametrize("path", ["/embeddings?beta=true", "embeddings"])
    @pytest.mark.parametrize("is_whole", [False, True])
    def test_address(self, side, provider, path, is_whole):
        """An address is metered by its path, however it is written."""
        address = f"{provider.url}/{path.strip('/')}" if is_whole else path
        client = side.client(output_max=None, otherwise="refuse")
        side.do(client.post(address, body={"model": MODEL, "input": "Hi"}, cast_to=object))
        (entry,) = side.meter.ledger()
        assert (entry.decision.request.kind, entry.decision.tokens) == (Kind.EMBEDDING, 8)


class TestTogether:
    """Many calls in flight."""

    CALLS = 20

    def burst(self, side: Side, client: Any, *, fits: int) -> list[Any]:
        """So many calls at once, of which the provider answers none before all others were refused."""
        side.provider.hold()

        async def main() -> list[Any]:
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(max_workers=self.CALLS))

            def one() -> Any:
                return chat(client) if side.is_async else asyncio.to_thread(chat, client)

            tasks = [asyncio.ensure_future(one()) for _ in range(self.CALLS)]
            pending = set(tasks)
            while len(pending) > fits:
                done, pending = await asyncio.wait(pending, timeout=ANSWER_MOST_S, return_when=asyncio.FIRST_COMPLETED)
                assert done, "nobody answers"
            side.provider.release()
            return await asyncio.gather(*tasks, return_exceptions=True)

        return side.runner.run(main())

    def test_exact(self, side):
        """As many are sent as fit, no one more and no one fewer; then until no bound fits any more."""
        output = 30_000
        most = CHAT_BOUND - OUTPUT + output
        fits = ALLOWANCE // most
        side.provider.usage = {"prompt_tokens": most // 3, "completion_tokens": most // 3}
        took = most // 3 * 2
        client = side.client(output_max=output, otherwise="refuse")
        found = self.burst(side, client, fits=fits)
        assert sorted(type(one).__name__ for one in found) == ["ChatCompletion"] * fits + ["Refused"] * (
            self.CALLS - fits
        )
        assert side.used() == {"1M": fits * took}
        used = fits * took
        while ALLOWANCE - used >= most:
            side.do(chat(client))
            used += took
        with pytest.raises(Refused) as caught:
            side.do(chat(client))
        assert caught.value.left == ALLOWANCE - used
        assert side.used() == {"1M": used}
        assert side.meter.holds() == []


class TestPrivate:
    """Nothing of a prompt, an answer or a key is kept, logged or said."""

    def test_nothing(self, side, provider, caplog):
        """Not by calls that are answered, refused, broken, or fail."""
        caplog.set_level(logging.DEBUG, logger="gratis")
        secret = [{"role": "user", "content": SECRET}]
        bad = [{"role": "user", "content": [{"type": SECRET, SECRET: SECRET}]}]
        client, refusing = side.client(), side.client(otherwise="refuse")
        side.do(chat(client, messages=secret))
        side.chunks(side.do(chat(client, messages=secret, stream=True)))
        side.do(respond(client, input=SECRET))
        side.fill(0, allowance=ALLOWANCE - side.used()["1M"])
        errors = []
        for make in (partial(chat, messages=secret), partial(respond, input=SECRET)):
            with pytest.raises(Refused) as caught:
                side.do(make(refusing))
            errors.append(caught.value)
        side.do(chat(client, messages=bad))
        for status in (400, 500):
            provider.fail(status)
            with pytest.raises(openai.APIStatusError):
                side.do(chat(client, messages=secret))
        said = "".join(f"{error!s}{error!r}{pickle.dumps(error)!r}" for error in errors)
        kept = repr([*side.meter.ledger(), *side.meter.holds()])
        logged = "".join(record.getMessage() for record in caplog.records if record.name.startswith("gratis"))
        assert [word in said + kept + logged for word in (SECRET, KEY, "Hello")] == [False] * 3
        assert all([kept, said, logged])
