"""A command and all processes that it starts, found again by a mark in their environment."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from llmgr_rec.parent_process import end_with_parent

_MARK = "LLMGR_SOAK"
_POLL_S = 0.02


class MarkedProcess:
    """A running `python -m ...`.

    Args:
        words: Words after `python`.
        folder: Working folder.
        log: File that takes stdout and stderr.
    """

    def __init__(self, words: Sequence[str], folder: Path, log: Path) -> None:
        self._mark = f"{_MARK}={uuid.uuid4()}".encode()
        self.log = log
        name, _, value = self._mark.decode().partition("=")
        scratch = folder / "tmp"
        scratch.mkdir(exist_ok=True)
        root = str(Path(__file__).parents[2])
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", *words],
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, name: value, "OMP_NUM_THREADS": "1", "TMPDIR": str(scratch), "PYTHONPATH": root},
                start_new_session=True,
                preexec_fn=_start,
            )

    def code(self) -> int | None:
        """Exit code; None while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float) -> int:
        """Waits for the end of the command.

        Raises:
            TimeoutError: It does not end; everything is killed.
        """
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL, "all")
            raise TimeoutError(f"it did not end within {timeout_s:.0f} s; see {self.log}") from None

    def send(self, number: int, target: str) -> None:
        """Sends a signal to the command (`command`), to one of its ranks (`rank 1`), or to all processes (`all`)."""
        if target == "command":
            pids = [self._process.pid] if self.code() is None else []
        elif target == "all":
            pids = self.pids()
        else:
            pids = self.pids(target.upper().replace(" ", "=").encode())
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def pids(self, *marks: bytes) -> list[int]:
        """Processes of the command that have not ended."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    # A process that has ended, but was not waited for, has an empty environment.
                    environment = (folder / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                if all(mark in environment for mark in (self._mark, *marks)):
                    found.append(int(folder.name))
        return found

    def left_after(self, timeout_s: float) -> list[int]:
        """Waits for the end of all processes, and kills and returns those that have not ended by then."""
        end = time.monotonic() + timeout_s
        while (pids := self.pids()) and time.monotonic() < end:
            self.code()
            time.sleep(_POLL_S)
        while self.pids():
            self.send(signal.SIGKILL, "all")
            time.sleep(_POLL_S)
        self._process.wait()
        return pids


def _start() -> None:
    end_with_parent()
    # A soak in the background of a shell ignores SIGINT, and so would its children.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
