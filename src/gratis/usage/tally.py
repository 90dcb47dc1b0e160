"""What the chunks of a stream say of its usage: all that is decided of a stream, without waiting for one.

A stream tells its usage once, at its very end. One that was cut, left early or not asked for its usage is unmeasured:
what it made so far is no count.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from gratis.errors import UsageError
from gratis.model import Usage, shown
from gratis.usage.fields import a, get, has_fields, names, nodes
from gratis.usage.shapes import BEGINNINGS, ENDINGS, EVENTS, project_in, read
from gratis.usage.tools import of_items

CHUNKS = frozenset({"chat.completion.chunk", "chat.completion", "text_completion"})
ITEMS = frozenset({"response.output_item.added", "response.output_item.done"})
FAMILIES = ("response.", "image_generation.", "image_edit.", "transcript.", "speech.", "error")


class Tally:
    """What the chunks so far have said: the part that sync and asyncio share, and all that decides."""

    def __init__(self, headers: object = None) -> None:
        self.error: UsageError | None = None
        self._seen = Usage(project=project_in(headers))
        self._counted: Usage | None = None
        self._open: set[object] = set()  # choices that have begun and not finished
        self._stranger: UsageError | None = None
        self._is_known = False
        self._is_told = False

    def note(self, chunk: Any) -> None:
        """One chunk more; what is wrong with it is kept, for the stream must go on."""
        try:
            self._note(chunk)
        except UsageError as error:
            self.error = self.error or error

    def usage(self) -> Usage:
        """What is known: counts only if the stream told them, and all of it was understood."""
        counted = self._counted
        if counted is None or self.trouble() is not None:
            return self._seen
        return replace(
            self._seen,
            input_tokens=counted.input_tokens,
            output_tokens=counted.output_tokens,
            cached_tokens=counted.cached_tokens,
        )

    def trouble(self) -> UsageError | None:
        """What was not understood, if anything was. Strange events are left alone in a stream that is known."""
        return self.error or (None if self._is_known else self._stranger)

    def understood(self) -> Usage:
        """The same, if all of it was understood."""
        trouble = self.trouble()
        if trouble is not None:
            raise trouble
        return self.usage()

    def end(self, error: BaseException | None) -> tuple[Usage, BaseException | None] | None:
        """What is to be told of the end; None if it was told before."""
        if self._is_told:
            return None
        self._is_told = True
        return self.usage(), self.trouble() if error is None else error

    def _note(self, chunk: Any) -> None:
        if not has_fields(chunk):
            raise UsageError("chunk", f"found {a(chunk)}; expected a dict or an object of the provider's SDK")
        label, event = get(chunk, "object"), get(chunk, "type")
        if label in CHUNKS:
            self._note_choices(chunk)
        elif event == "chunk":  # the SDK's helpers wrap each chunk in an event
            self._note(get(chunk, "chunk"))
        elif event in EVENTS or event in ENDINGS:
            self._merge(read(chunk), is_last=True)
        elif event in BEGINNINGS:
            self._merge(read(chunk), is_last=False)
        elif event in ITEMS:
            self._merge(Usage(tools=tuple(of_items("item", [get(chunk, "item")]))), is_last=False)
        elif type(event) is str and event.startswith(FAMILIES):
            self._is_known = True
        else:
            found = shown(event if label is None else label) if event or label else names(chunk)
            expected = f"{', '.join(sorted(CHUNKS))}, or an event of a response"
            self._stranger = self._stranger or UsageError("chunk", f"found {found}; expected {expected}")

    def _note_choices(self, chunk: Any) -> None:
        """Some providers tell a running usage with each chunk: it counts once every choice has finished."""
        for choice in nodes("choices", get(chunk, "choices")):
            place = shown(get(choice, "index"))
            if get(choice, "finish_reason") is None:
                self._open.add(place)
                self._counted = None
            else:
                self._open.discard(place)
        self._merge(read(chunk), is_last=get(chunk, "usage") is not None and not self._open)

    def _merge(self, usage: Usage, *, is_last: bool) -> None:
        seen = self._seen
        self._is_known = True
        self._seen = replace(
            seen,
            model=usage.model or seen.model,  # Azure's first chunk names an empty one
            project=usage.project or seen.project,
            kind=usage.kind or seen.kind,
            tools=tuple(sorted({*seen.tools, *usage.tools})),
            id=usage.id or seen.id,
            at=usage.at or seen.at,
        )
        if is_last:
            self._counted = usage
