"""Reading ahead and writing behind in threads, with bounded queues between."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")

# How often a thread that waits for room looks whether the other side has gone, in seconds.
_POLL_S = 0.1


class _End:
    """Closes a queue, with what went wrong if anything did."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def read_ahead(source: Iterable[T], depth: int) -> Iterator[T]:
    """Runs an iteration in a thread of its own.

    Args:
        source: What to iterate over; an exception in it is raised here, in its place in the order.
        depth: Elements held ready at most.
    """
    waiting: queue.Queue[Any] = queue.Queue(depth)
    gone = threading.Event()

    def put(element: Any) -> bool:
        while not gone.is_set():
            try:
                waiting.put(element, timeout=_POLL_S)
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
        while not isinstance(element := waiting.get(), _End):
            yield element
        if element.error is not None:
            raise element.error
    finally:
        gone.set()
        thread.join()


class WriteBehind(Generic[T]):
    """Hands elements to a function in a thread of its own, in order; leaving the block waits for the last.

    Args:
        work: What is done with each element. After it has failed once nothing more is done, and the next `put`, or
            leaving the block, raises the failure.
        depth: Elements that may wait.
    """

    def __init__(self, work: Callable[[T], object], depth: int) -> None:
        self._work = work
        self._waiting: queue.Queue[Any] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="write-behind", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waiting.put(_End())
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    def put(self, element: T) -> None:
        """Queues an element; waits where too many do."""
        if self._error is not None:
            raise self._error
        self._waiting.put(element)

    def _run(self) -> None:
        while not isinstance(element := self._waiting.get(), _End):
            if self._error is None:
                try:
                    self._work(element)
                except BaseException as caught:
                    self._error = caught
