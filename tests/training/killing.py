"""A training command in processes of its own, to be killed at any moment; none of them is ever left behind."""

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from tests.marked_process import MarkedProcess

_POLL_S = 0.003


class Trainer:
    """`python -m llmgr_rec.train` on some ranks.

    Args:
        words: Arguments.
        ranks: Processes that train; more than one are started through torchrun.
        log: File that takes stdout and stderr.
        restarts: How often torchrun starts all ranks anew when one has ended.
        timeout_s: Longest time that it may take.
    """

    def __init__(self, words: Sequence[str], ranks: int, log: Path, restarts: int = 0, timeout_s: float = 150) -> None:
        self._log = log
        self._deadline = time.monotonic() + timeout_s
        torchrun = ["-m", "torch.distributed.run", "--standalone"]
        launcher = [*torchrun, f"--nproc_per_node={ranks}", f"--max-restarts={restarts}"] if ranks > 1 else []
        self._process = MarkedProcess([*launcher, "-m", "llmgr_rec.train", *words], log)

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def wait(self) -> None:
        """Waits for the end, which must be a good one."""
        try:
            code: int | None = self._process.wait(max(self._deadline - time.monotonic(), 0))
        except TimeoutError:
            code = None
        assert code == 0, f"exit code {code}:\n{self._log.read_text()}"

    def wait_until(self, reached: Callable[[], bool]) -> None:
        """Waits for something that must happen before the end."""
        while not reached():
            assert self._process.code() is None, f"it ended too early:\n{self._log.read_text()}"
            assert time.monotonic() < self._deadline, f"it takes too long:\n{self._log.read_text()}"
            time.sleep(_POLL_S)

    def kill(self) -> None:
        """Kills all processes at once, with no chance to tidy up, and waits until they are gone."""
        self._process.kill()

    def kill_rank(self, rank: int) -> None:
        """Kills one rank only."""
        assert self._process.send(signal.SIGKILL, f"rank {rank}"), f"no process is rank {rank}"
