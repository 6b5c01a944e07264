"""Ctrl-C and SIGTERM at moments at which Python or a library would lose them or print a stack trace.

Imports only the standard library, because it is imported before everything else.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from llmgr_rec.errors import StopRequested

# The exit code of a shell for a command that Ctrl-C (signal 2) has ended.
EXIT_INTERRUPTED = 128 + signal.SIGINT
# Seconds after which a lost signal is sent again; by then the code that cannot be interrupted has returned.
_RESEND_S = 0.05
# Error of DuckDB where a signal has arrived in a query, in place of the exception of the signal handler.
_INTERRUPTED_QUERIES = ("Query interrupted", "INTERRUPT Error: Interrupted!")


def report_interrupt() -> None:
    """Prints the line of a command that Ctrl-C ends, once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write("error: interrupted\n")


def report_interrupts_of_imports() -> None:
    """Makes Ctrl-C one line while a command is still importing its modules; for a package that is run with -m."""
    if sys.argv[:1] != ["-m"]:
        return

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
            return
        report_interrupt()
        sys.stderr.flush()
        os._exit(EXIT_INTERRUPTED)

    sys.excepthook = report


@contextmanager
def no_signal_is_lost() -> Iterator[None]:
    """Raises the exception of a signal that arrives in a finalizer, which ignores it, or in a query of DuckDB."""
    before = sys.unraisablehook

    def resend(lost: Any) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt | StopRequested):
            before(lost)
            return
        number = signal.SIGINT if issubclass(lost.exc_type, KeyboardInterrupt) else signal.SIGTERM
        threading.Timer(_RESEND_S, os.kill, (os.getpid(), number)).start()

    sys.unraisablehook = resend
    try:
        yield
    except Exception as error:
        if str(error) in _INTERRUPTED_QUERIES:
            raise KeyboardInterrupt from None
        raise
    finally:
        sys.unraisablehook = before
