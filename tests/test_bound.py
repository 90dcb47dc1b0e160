"""The bound on a request's tokens: never too low for text, and refused where bytes say nothing."""

from __future__ import annotations

import sys
from functools import cache
from types import ModuleType
from typing import Any

import openai
import pytest
import tiktoken
from hypothesis import example, given, strategies as st
from openai.types.chat import ChatCompletionMessage

from gratis.errors import UsageError
from gratis.usage import bound, tokenizer

MODEL = "gpt-4.1-2025-04-14"
FRAMING = 7  # a chat's message was measured at 3 tokens and its role, and the answer is opened by 3
MERGES = [b"th", b"he", b"the", b" the", b"  ", b"    ", b'":', b'{"', b"\xc3\xa9", b"\xe2\x80", b"\xf0\x9f"]
# The pattern of o200k_base in spirit: letters, digits by three, other signs, spaces.
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
texts = st.text(st.characters(codec="utf-8"), max_size=40) | st.sampled_from(["<|endoftext|>", "é" * 9, "👩‍👩‍👧" * 3])


@cache
def encoding() -> Any:
    """A real byte-pair tokenizer with a vocabulary of our own: the provider's has to be fetched."""
    tokens = [*[bytes([byte]) for byte in range(256)], *MERGES]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding("ours", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 1000})


def real(text: str) -> int:
    """The tokens of a text by that tokenizer."""
    return len(encoding().encode_ordinary(text))


def said(*contents: Any, **fields: Any) -> dict[str, Any]:
    """The keyword arguments of a chat."""
    messages = [{"role": "user", "content": content} for content in contents]
    return {"model": MODEL, "messages": messages, "max_completion_tokens": 0, **fields}


def refusal(body: Any, **given_fields: Any) -> str:
    """Why a body cannot be bounded."""
    with pytest.raises(UsageError) as caught:
        bound(body, **given_fields)
    return str(caught.value)


class TestText:
    """Text is bounded by its bytes."""

    @given(contents=st.lists(texts, max_size=4))
    @example(contents=["\ud800"])
    def test_no_tokenizer_counts_more(self, contents):
        """For any text the bound is at least what a real tokenizer counts, framing and all."""
        tokens = sum(real(content) + real("user") + FRAMING for content in contents)
        assert bound(said(*contents)) >= tokens
        assert bound(said(*contents), count=real) >= tokens

    @given(content=texts)
    def test_every_form(self, content):
        """It holds wherever a surface takes its text."""
        part = {"type": "input_text", "text": content}
        call = {"type": "function_call_output", "call_id": "c", "output": content}
        bodies = [
            {"input": content, "max_output_tokens": 0},
            {"input": "", "instructions": content, "max_output_tokens": 0},
            {"input": [{"role": "user", "content": [part, part]}], "max_output_tokens": 0},
            {"input": [call], "max_output_tokens": 0},
            {"input": [content, content], "max_output_tokens": 0},
            {"prompt": content, "suffix": content, "max_tokens": 0},
            {"messages": [], "extra_body": {"messages": [{"role": "user", "content": content}]}, "max_tokens": 0},
            said(tools=[{"type": "function", "function": {"name": "f", "description": content}}]),
            said(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"title": content}}}),
        ]
        assert [bound(body) >= real(content) for body in bodies] == [True] * len(bodies)

    def test_exact_example(self):
        """The bound of a small chat: 5 bytes of text, the names of two fields and the role, and three frames."""
        framed = len("role") + len("user") + len("content") + 3 * 8
        assert bound(said("Hello", max_completion_tokens=100)) == 100 + len("Hello") + framed

    def test_schemas_in_ascii(self):
        """A schema is bounded by the longest form of its JSON: the model may be shown it escaped."""
        schema = {"type": "function", "function": {"name": "f", "description": "é" * 100}}
        assert bound(said(tools=[schema])) - bound(said()) >= 600

    def test_token_ids(self):
        """Lists of token ids count one each."""
        assert bound({"input": [1, 2, 3]}, output_max=0) == 3 + bound({"input": []}, output_max=0)
        many = bound({"input": [[1, 2], [3]]}, output_max=0)
        assert 3 <= many <= 3 + 3 * 8

    def test_objects_of_the_sdk(self):
        """A message of the SDK weighs what its dict does."""
        fields = {"role": "assistant", "content": "Hello"}
        message = ChatCompletionMessage(**fields)
        assert bound(said(messages=[message])) == bound(said(messages=[fields]))

    def test_left_out(self):
        """What was not given weighs nothing: null, and the marks that the SDK has for it."""
        absent = {"tools": None, "instructions": openai.NOT_GIVEN, "conversation": openai.omit, "extra_body": None}
        assert bound(said("Hi", **absent)) == bound(said("Hi"))

    def test_count(self):
        """A tokenizer of one's own replaces the bytes of each text."""
        assert bound(said("Hello"), count=lambda _: 1) == bound(said("Hello")) - len("roleusercontentHello") + 4


class TestOutput:
    """The output is what the body allows."""

    @pytest.mark.parametrize("field", ["max_completion_tokens", "max_tokens", "max_output_tokens"])
    def test_limits(self, field):
        """Each name of the limit is known, and the body's own wins."""
        body = {"model": MODEL, "messages": []}
        assert bound({**body, field: 50}, output_max=9) == bound(body, output_max=0) + 50

    def test_both_limits(self):
        """Of two limits the larger holds."""
        assert bound(said(max_completion_tokens=5, max_tokens=9)) == bound(said()) + 9

    def test_from_the_caller(self):
        """Without one the caller's holds."""
        assert bound({"messages": []}, output_max=70) == bound({"messages": []}, output_max=0) + 70

    def test_none(self):
        """Without any there is no bound."""
        assert refusal({"messages": []}) == (
            "max_completion_tokens: missing, as are max_tokens and max_output_tokens;"
            " expected one of them, or output_max=… (0 for embeddings)"
        )

    def test_several_answers(self):
        """Each of several answers may have its own output, and each of several prompts."""
        assert bound(said(n=3, max_completion_tokens=10)) == bound(said()) + 30
        prompts = {"prompt": ["a", "b"], "max_tokens": 0}
        assert bound({**prompts, "max_tokens": 10, "n": 2, "best_of": 5}) == bound(prompts) + 100
        assert bound({"prompt": [1, 2], "max_tokens": 10}) == bound({"prompt": [1, 2], "max_tokens": 0}) + 10
        assert bound({"prompt": [[1], [2]], "max_tokens": 10}) == bound({"prompt": [[1], [2]], "max_tokens": 0}) + 20

    @pytest.mark.parametrize(
        ("fields", "said_of_it"),
        [
            ({"n": 0}, "n: found 0; expected a whole number from 1 to "),
            ({"n": True}, "n: found True; expected "),
            ({"max_tokens": -1}, "max_tokens: found -1; expected a whole number from 0 to "),
            ({"max_tokens": 5.0}, "max_tokens: found 5.0; expected "),
        ],
    )
    def test_no_numbers(self, fields, said_of_it):
        """What is no whole number is refused."""
        assert refusal(said(**fields)).startswith(said_of_it)
        assert refusal({"messages": []}, output_max="5").startswith("output_max: found '5'; expected ")


class TestUnbounded:
    """What bytes cannot bound is refused by its name."""

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("previous_response_id", "resp_1"),
            ("conversation", "conv_1"),
            ("prompt", {"id": "pmpt_1"}),
            ("prediction", {"type": "content", "content": "x"}),
            ("web_search_options", {}),
            ("audio", {"voice": "alloy", "format": "wav"}),
            ("echo", True),
            ("context_management", []),
            ("a_field_of_tomorrow", 1),
            ("extra_body", 5),
        ],
    )
    def test_fields(self, field, value):
        """A field that brings in what is not in the body, or that is not known."""
        assert refusal(said(**{field: value})).startswith(f"{field}: ")

    @pytest.mark.parametrize("kind", ["image_url", "input_image", "input_audio", "file", "input_file", "new", None])
    @pytest.mark.parametrize("field", ["messages", "input"])
    def test_parts(self, field, kind):
        """A part of a message that is no text."""
        content = [{"type": "text", "text": "x"}, {"type": kind}]
        body = {field: [{"role": "user", "content": content}]}
        assert refusal(body, output_max=0).startswith(f"{field}[0].content[1].type: found {kind!r}, which is no text; ")

    @pytest.mark.parametrize("kind", ["item_reference", "reasoning", "image_generation_call", "computer_call_output"])
    def test_items(self, kind):
        """An item that is no text, or that the provider keeps."""
        assert refusal({"input": ["x", {"type": kind}]}, output_max=0).startswith(f"input[1].type: found {kind!r}")

    def test_references(self):
        """An item that only names what the provider keeps."""
        assert refusal({"input": [{"id": "msg_1"}]}, output_max=0).startswith("input[0]: found no role")
        message = {"role": "assistant", "audio": {"id": "audio_1"}}
        assert refusal({"messages": [message]}, output_max=0).startswith("messages[0].audio: ")
        image = {"type": "function_call_output", "output": [{"type": "input_image", "file_id": "f"}]}
        assert refusal({"input": [image]}, output_max=0).startswith("input[0].output[0].type: found 'input_image'")

    @pytest.mark.parametrize("kind", ["web_search", "file_search", "code_interpreter", "mcp", "tomorrow"])
    def test_hosted_tools(self, kind):
        """A hosted tool, whose findings become input."""
        assert refusal(said(tools=[{"type": "function"}, {"type": kind}])).startswith(f"tools[1].type: found {kind!r}")

    @pytest.mark.parametrize(
        ("body", "said_of_it"),
        [
            (5, "body: found a value of type int"),
            (said(tools=5), "tools: found a value of type int"),
            (said(messages=iter([])), "messages: found a value of type list_iterator"),
            (said(response_format=ChatCompletionMessage), "response_format: found a value of type"),
            ({"input": b"x"}, "input: found a value of type bytes"),
        ],
    )
    def test_no_body(self, body, said_of_it):
        """What is no text, list or object."""
        assert refusal(body, output_max=0).startswith(said_of_it)

    def test_harmless(self):
        """What the model is not shown changes nothing."""
        harmless = {
            "temperature": 0.5,
            "stream": True,
            "stream_options": {"include_usage": True},
            "metadata": {"x": "y" * 500},
            "echo": False,
            "timeout": 3,
        }
        assert bound(said("Hi", **harmless)) == bound(said("Hi"))


class TestTokenizer:
    """The extra: tiktoken's own tokenizer of a model."""

    @pytest.fixture
    def tiktoken(self, monkeypatch):
        """A tiktoken that fetches nothing."""
        module = ModuleType("tiktoken")
        monkeypatch.setitem(sys.modules, "tiktoken", module)
        return module

    def test_counts(self, tiktoken):
        """It counts what tiktoken does, special words taken as text."""
        tiktoken.encoding_for_model = {MODEL: encoding()}.__getitem__
        assert tokenizer(MODEL)("the <|endoftext|>") == real("the <|endoftext|>")
        assert bound(said("the the the"), count=tokenizer(MODEL)) < bound(said("the the the"))

    def test_unknown_model(self, tiktoken):
        """A model that tiktoken does not know is named."""
        tiktoken.encoding_for_model = {}.__getitem__
        with pytest.raises(UsageError, match=r"^model: tiktoken knows no tokenizer of 'x'; bound by bytes"):
            tokenizer("x")

    def test_no_data(self, tiktoken):
        """Without its data and a network it says where they are looked for."""

        def offline(_model):
            raise ConnectionError

        tiktoken.encoding_for_model = offline
        said = (
            r"^tokenizer: its data cannot be had \(ConnectionError\); expected it in the folder that TIKTOKEN_CACHE_DIR"
        )
        with pytest.raises(UsageError, match=said):
            tokenizer(MODEL)

    def test_not_installed(self, monkeypatch):
        """Without the extra it says how to install it."""
        monkeypatch.setitem(sys.modules, "tiktoken", None)
        said = r"^tokenizer: tiktoken is not installed; pip install 'gratis\[tokenizer\]'"
        with pytest.raises(UsageError, match=said):
            tokenizer(MODEL)
