"""Work done behind the one who hands it over: in order, in a thread, with little waiting in between."""

from __future__ import annotations

from queue import Queue
from threading import Thread
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

WAITING_MAX = 2


class Behind:
    """Does something with each item; what goes wrong there is raised at the next item, or at the end."""

    def __init__(self, do: Callable[[Any], object]) -> None:
        self._do = do
        self._items: Queue[Any] = Queue(WAITING_MAX)
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._error is None:
            self._error = error  # what still waits is not done
        self._items.put(None)
        self._thread.join()
        if error is None:
            self._raise()

    def put(self, item: Any) -> None:
        """Hand over the next item."""
        self._raise()
        self._items.put(item)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            if self._error is None:
                try:
                    self._do(item)
                except BaseException as error:  # noqa: BLE001 - it is raised where the items come from
                    self._error = error
