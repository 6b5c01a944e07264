"""A command and all processes that it starts, found again by a mark in their environment."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmgr_rec.parent_process import end_with_parent

_MARK = "LLMGR_TEST_COMMAND"
_POLL_S = 0.02


class MarkedProcess:
    """A running `python -m ...`, which ends with this process at the latest.

    Args:
        words: Words after `python`.
        log: File that takes stdout and stderr.
        folder: Working folder; None takes that of this process.
        environment: Variables in addition to those of this process.
    """

    def __init__(
        self, words: Sequence[str], log: Path, folder: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        self._mark = f"{_MARK}={uuid.uuid4()}".encode()
        self.log = log
        name, _, value = self._mark.decode().partition("=")
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, *words],
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {}), name: value},
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

    def send(self, number: int, target: str) -> list[int]:
        """Sends a signal to the command (`command`), to one of its ranks (`rank 1`), or to all processes (`all`).

        Returns:
            The processes that got it.
        """
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
        return pids

    def kill(self) -> None:
        """Kills all processes at once, with no chance to tidy up, and waits until they are gone."""
        while self.send(signal.SIGKILL, "all"):
            time.sleep(_POLL_S)
        self._process.wait()

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
        self.kill()
        return pids


def _start() -> None:
    end_with_parent()
    # A test in the background of a shell ignores SIGINT, and so would its children.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
