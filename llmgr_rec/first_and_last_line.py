"""The first and the last line of a command: what it works on, and what came of it. Rank 0 prints them for all ranks."""

import logging
import os
from collections.abc import Iterable

from llmgr_rec import __version__
from llmgr_rec.process_facts import memory_bytes

logger = logging.getLogger(__name__)


def print_start(command: str, reads: Iterable[object] = (), writes: object | None = None, runs_on: str = "") -> None:
    """Logs the first line, which goes to stderr, because stdout is for results.

    Args:
        command: Name of the command, as in `python -m llmgr_rec.NAME`; with its package if that is another one.
        reads: What it reads; None for an option that is not given.
        writes: What it writes.
        runs_on: Device, number of ranks and threads.
    """
    read = ", ".join(str(path) for path in reads if path is not None)
    memory = f"{memory_bytes() / 1e9:.0f} GB memory"
    parts = [f"reads {read}" if read else "", f"writes {writes}" if writes is not None else "", runs_on, memory]
    logger.info("llmgr_rec %s %s: %s", __version__, command, "; ".join(part for part in parts if part))


def print_result(command: str, result: str, wrote: object | None = None) -> None:
    """Prints the last line to stdout.

    Args:
        command: As for `print_start`.
        result: What came of it.
        wrote: What was written.
    """
    if os.environ.get("RANK", "0") == "0":
        print(f"{command}: {result.rstrip('.')}" + (f"; wrote {wrote}" if wrote is not None else ""), flush=True)


def threads_in_use(threads: int) -> str:
    """For `print_start`: the threads of a command of one process.

    Args:
        threads: Number of threads; 0 for one per core.
    """
    number = threads or len(os.sched_getaffinity(0))
    return f"{number} thread{'s' * (number != 1)}"
