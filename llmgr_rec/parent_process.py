"""Processes that end with the process that started them, even if that one is killed."""

import ctypes
import os
import signal
import sys

# Environment variable of a command that ends with the process that started it: the id of that process.
PARENT_VARIABLE = "LLMGR_PARENT"
_PR_SET_PDEATHSIG = 1


def end_with_parent(number: int = signal.SIGKILL, parent: int | None = None) -> None:
    """Lets the kernel end this process when the thread that started it ends. Without effect except on Linux.

    Args:
        number: Signal that this process gets.
        parent: Id of the process that started this one, which may have ended before this call; None takes the present
            parent.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid() if parent is None else parent
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        # It ended before the call.
        os.kill(os.getpid(), number)


def become_worker() -> None:
    """Called first in a forked worker process: signals are for the parent, which then ends this process.

    A launcher and a terminal send signals to the whole process group of the parent, so a worker has its own.
    """
    end_with_parent()
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
