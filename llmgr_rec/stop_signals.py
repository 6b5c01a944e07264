"""SIGTERM and SIGINT: an orderly end of the process within a grace period."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from llmgr_rec.errors import StopRequested

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Context manager that turns SIGTERM and SIGINT into `StopRequested`.

    The exception is raised wherever the main thread is. Within a `deferred` block the signal is only noted, so that the
    block can end at a place of its choice; a second SIGINT ends it at once. A process that has not left the context
    when the grace period is over, for example because it waits for another rank, exits without further clean-up.

    Outside of the main thread of the main interpreter, Python delivers no signals, and the context does nothing.

    Args:
        grace_s: Seconds from the first signal to the forced exit.
    """

    def __init__(self, grace_s: float) -> None:
        self.requested = 0
        self._grace_s = grace_s
        self._deferred = False
        self._raised = False
        self._left = threading.Event()
        self._before: dict[int, Any] = {}
        self._wakeup = self._wakeup_before = -1

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # Python calls handlers between two instructions, so not while the main thread waits in a collective. The
            # wake-up descriptor is written to at once.
            received, self._wakeup = os.pipe()
            os.set_blocking(self._wakeup, False)
            self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
            # A process in the background of a shell ignores SIGINT.
            numbers = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in numbers}
            threading.Thread(target=self._limit, args=(received,), name="grace period", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        if self._wakeup >= 0:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._wakeup)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Notes signals in `requested` (0 without one) and raises `StopRequested` at the end of the block only."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.requested:
            self.stop(self.requested)

    def stop(self, number: int) -> NoReturn:
        """Raises `StopRequested`; further signals, as a launcher sends them, do not disturb the clean-up.

        Args:
            number: Signal that asked this or another rank to stop.
        """
        self.requested, self._raised = number, True
        raise StopRequested(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        insists = bool(self.requested) and number == signal.SIGINT
        self.requested = self.requested or number
        if insists or not (self._deferred or self._raised):
            self.stop(self.requested)

    def _limit(self, received: int) -> None:
        with os.fdopen(received, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] in _SIGNALS:
                    break
            else:
                return
            if not self._left.wait(self._grace_s):
                stop = StopRequested(number[0])
                sys.stderr.write(f"{stop}, but not ready after {self._grace_s:g} s; ended without further checkpoint\n")
                sys.stderr.flush()
                os._exit(stop.exit_code)
