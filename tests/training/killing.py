"""A training command in processes of its own, to be killed at any moment; none of them is ever left behind."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

_MARK = "LLMGR_TEST_TRAINER"
_POLL_S = 0.003


class Trainer:
    """`python -m llmgr_rec.train` on some ranks, found again by a mark in the environment of all its processes.

    Args:
        words: Arguments.
        ranks: Processes that train; more than one are started through torchrun.
        log: File that takes stdout and stderr.
        restarts: How often torchrun starts all ranks anew when one has ended.
        timeout_s: Longest time that it may take.
    """

    def __init__(self, words: Sequence[str], ranks: int, log: Path, restarts: int = 0, timeout_s: float = 150) -> None:
        self._mark = f"{_MARK}={uuid.uuid4()}".encode()
        self._log = log
        self._deadline = time.monotonic() + timeout_s
        torchrun = ["-m", "torch.distributed.run", "--standalone"]
        launcher = [*torchrun, f"--nproc_per_node={ranks}", f"--max-restarts={restarts}"] if ranks > 1 else []
        name, _, value = self._mark.decode().partition("=")
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "llmgr_rec.train", *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, name: value, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def wait(self) -> None:
        """Waits for the end, which must be a good one."""
        try:
            code = self._process.wait(timeout=max(self._deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            code = None
        assert code == 0, f"exit code {code}:\n{self._log.read_text()}"

    def wait_until(self, reached: Callable[[], bool]) -> None:
        """Waits for something that must happen before the end."""
        while not reached():
            assert self._process.poll() is None, f"it ended too early:\n{self._log.read_text()}"
            assert time.monotonic() < self._deadline, f"it takes too long:\n{self._log.read_text()}"
            time.sleep(_POLL_S)

    def kill(self) -> None:
        """Kills all processes at once, with no chance to tidy up, and waits until they are gone."""
        while pids := self._pids(self._mark):
            _kill(pids)
            time.sleep(_POLL_S)
        self._process.wait()

    def kill_rank(self, rank: int) -> None:
        """Kills one rank only."""
        pids = self._pids(self._mark, f"RANK={rank}".encode())
        assert pids, f"no process is rank {rank}"
        _kill(pids)

    @staticmethod
    def _pids(*marks: bytes) -> list[int]:
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    # A process that has ended, but was not waited for, has an empty environment.
                    environment = (folder / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                if all(mark in environment for mark in marks):
                    found.append(int(folder.name))
        return found


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
