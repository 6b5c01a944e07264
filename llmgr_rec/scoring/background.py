"""Read-ahead and write-behind in background threads with bounded queues."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")

# Seconds between checks of a producer with a full queue whether its consumer has stopped.
_POLL_S = 0.1


class _End:
    """Last element of a queue, with the error that ended it, if any."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def read_ahead(source: Iterable[T], depth: int) -> Iterator[T]:
    """Iterates over a source in a background thread.

    Args:
        source: The source. An exception of its iterator is raised after the elements before it.
        depth: Maximum number of elements in the queue.
    """
    elements: queue.Queue[Any] = queue.Queue(depth)
    stopped = threading.Event()

    def put(element: Any) -> bool:
        while not stopped.is_set():
            try:
                elements.put(element, timeout=_POLL_S)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        error: BaseException | None = None
        try:
            for element in source:
                if not put(element):
                    return
        except BaseException as caught:
            error = caught
        put(_End(error))

    thread = threading.Thread(target=run, name="read-ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(element := elements.get(), _End):
            yield element
        if element.error is not None:
            raise element.error
    finally:
        stopped.set()
        thread.join()


class WriteBehind(Generic[T]):
    """Context manager that calls a function for each element in a background thread, in order.

    Leaving the context waits for the last call.

    Args:
        work: The function. After its first exception it is not called again, and the next `put` or the end of the
            context raises the exception.
        depth: Maximum number of elements in the queue.
    """

    def __init__(self, work: Callable[[T], object], depth: int) -> None:
        self._work = work
        self._elements: queue.Queue[Any] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="write-behind", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._elements.put(_End())
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    def put(self, element: T) -> None:
        """Adds an element to the queue; blocks while it is full."""
        if self._error is not None:
            raise self._error
        self._elements.put(element)

    def _run(self) -> None:
        while not isinstance(element := self._elements.get(), _End):
            if self._error is None:
                try:
                    self._work(element)
                except BaseException as caught:
                    self._error = caught
