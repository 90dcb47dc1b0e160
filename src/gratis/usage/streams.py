"""A stream that is passed on unchanged while its usage is read, and who is told when it ends.

A chat's stream tells its usage only if asked (`stream_options={"include_usage": True}`). Reading never breaks the
stream: a usage that is not understood is raised by `.usage`, and told to `on_end`.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, final, overload

from gratis.errors import UsageError
from gratis.usage.fields import a
from gratis.usage.tally import Tally

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from types import TracebackType

    from gratis.model import Usage

T = TypeVar("T")


@final
class Watched(Generic[T]):
    """A stream whose usage is read while it is passed on; `close` it, or leave its `with`, to stop early."""

    def __init__(
        self, stream: Iterable[T], on_end: Callable[[Usage, BaseException | None], None] | None = None
    ) -> None:
        self._stream = stream
        self._tally = _tally(stream)
        self._on_end = on_end
        self._chunks = iter(stream)

    @property
    def usage(self) -> Usage:
        """What the stream has said of its usage; its counts are None unless it told them at its end."""
        return self._tally.understood()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_stream"], name)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            chunk = next(self._chunks)
        except StopIteration:
            self._finish(None)
            raise
        except BaseException as error:
            self._finish(error)
            raise
        self._tally.note(chunk)
        return chunk

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            _close(self._stream)
        finally:
            self._finish(error)

    def close(self) -> None:
        """Close the stream; if it has not told its usage, it is unmeasured."""
        self.__exit__(None, None, None)

    def _finish(self, error: BaseException | None) -> None:
        told = self._tally.end(error)
        if told is not None and self._on_end is not None:
            self._on_end(*told)


@final
class AsyncWatched(Generic[T]):
    """The same for a stream of asyncio."""

    def __init__(
        self,
        stream: AsyncIterable[T],
        on_end: Callable[[Usage, BaseException | None], Awaitable[None]] | None = None,
    ) -> None:
        self._stream = stream
        self._tally = _tally(stream)
        self._on_end = on_end
        self._chunks = aiter(stream)

    @property
    def usage(self) -> Usage:
        """What the stream has said of its usage; its counts are None unless it told them at its end."""
        return self._tally.understood()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_stream"], name)

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        try:
            chunk = await anext(self._chunks)
        except StopAsyncIteration:
            await self._finish(None)
            raise
        except BaseException as error:
            await self._finish(error)
            raise
        self._tally.note(chunk)
        return chunk

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await _aclose(self._stream)
        finally:
            await self._finish(error)

    async def close(self) -> None:
        """Close the stream; if it has not told its usage, it is unmeasured."""
        await self.__aexit__(None, None, None)

    async def aclose(self) -> None:
        """The name by which async generators are closed."""
        await self.close()

    async def _finish(self, error: BaseException | None) -> None:
        told = self._tally.end(error)
        if told is not None and self._on_end is not None:
            await self._on_end(*told)


@overload
def watch(
    stream: AsyncIterable[T], *, on_end: Callable[[Usage, BaseException | None], Awaitable[None]] | None = None
) -> AsyncWatched[T]: ...
@overload
def watch(
    stream: Iterable[T], *, on_end: Callable[[Usage, BaseException | None], None] | None = None
) -> Watched[T]: ...
def watch(stream: Any, *, on_end: Any = None) -> Watched[Any] | AsyncWatched[Any]:
    """The stream, passed on chunk by chunk, with `.usage` once it has ended.

    `on_end(usage, error)` is called once: when the stream ends (None), breaks (with what broke it), is closed, or left
    with an exception. It is awaited where the stream is asynchronous. A usage that was not understood comes as its
    `UsageError`, with counts that are None. A stream that is thrown away unfinished tells nobody: the garbage collector
    runs anywhere, also while a store is asked, so it is no place to ask one. A hold runs out by itself.
    """
    if isinstance(stream, AsyncIterable):
        return AsyncWatched(stream, on_end)
    if isinstance(stream, Iterable):
        return Watched(stream, on_end)
    raise UsageError("stream", f"found {a(stream)}; expected the stream that the SDK returned")


def _tally(stream: Any) -> Tally:
    """A tally that knows the project, where the stream has the headers of its answer."""
    return Tally(getattr(getattr(stream, "response", None), "headers", None))


def _close(stream: Any) -> None:
    """Close what can be closed: a list cannot."""
    close = getattr(stream, "close", None)
    if close is not None:
        close()


async def _aclose(stream: Any) -> None:
    """Close what can be closed; the SDK's streams say `close`, generators `aclose`."""
    close = getattr(stream, "aclose", None) or getattr(stream, "close", None)
    if close is not None:
        await close()
