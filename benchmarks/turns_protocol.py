"""Protocol of a trainer process that trains one epoch per request: JSON lines over stdin and stdout.

The trainer first sends facts about itself. It answers each line `epoch` with the results of one more epoch, or says
that its training has ended, and exits at the end of its input. Only the standard library is used, because the
environments of the peers import this module, too.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Self

GO = "epoch"
_ENDED = {"ended": True}
_LOG_LINES = 3
_EXIT_TIMEOUT_S = 30.0


class TrainerFailed(Exception):
    """A trainer exited, or sent what is not in the protocol."""


@dataclass(frozen=True)
class Epoch:
    """Results of one epoch.

    Args:
        examples: Training examples.
        seconds: From the first batch to the end of the last step, without validation.
        processor_seconds: Processor time of all threads of the trainer meanwhile.
        loss: Mean training loss.
        rankings: Array file (NumPy) of the 20 items ranked first for each validation example, [examples, 20], with -1
            at the end of shorter lists; empty if the trainer computes `ndcg` itself.
        ndcg: NDCG@20 on the validation examples after it, ranking the whole catalog.
        validated: Validation examples.
    """

    examples: int
    seconds: float
    processor_seconds: float
    loss: float
    rankings: str = ""
    ndcg: float = 0.0
    validated: int = 0


class Stopwatch:
    """Elapsed time and processor time of this process since it was made."""

    def __init__(self) -> None:
        self._started, self._processor_started = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Elapsed seconds and processor seconds."""
        return time.perf_counter() - self._started, time.process_time() - self._processor_started


class Replies:
    """The trainer's side of the protocol. From here on, what libraries print goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def ready(self, **facts: Any) -> None:
        """Sends facts about the trainer, before the first epoch."""
        self._send(facts)

    def done(self, epoch: Epoch) -> None:
        """Sends the results of an epoch."""
        self._send(asdict(epoch))

    def ended(self) -> None:
        """Answers a request: there is no further epoch."""
        self._send(_ENDED)

    def wait(self) -> bool:
        """Waits for a request; False at the end of the input."""
        return sys.stdin.readline().strip() == GO

    def _send(self, values: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(values) + "\n")
        self._out.flush()


class Trainer:
    """A running trainer, on the side of the benchmark.

    Args:
        name: Name in messages.
        words: Its command.
        folder: Its working folder; `NAME.log` there gets its stderr.
        environment: Environment variables in addition to those of this process.
        measure: NDCG@20 and number of validation examples from the file of `Epoch.rankings`.

    Raises:
        TrainerFailed: It exited before it was ready.
    """

    def __init__(
        self,
        name: str,
        words: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        measure: Callable[[Path], tuple[float, int]] | None = None,
    ) -> None:
        self.name = name
        self.epochs: list[Epoch] = []
        self.ended = False
        self._measure = measure
        self._log_path = folder / f"{name}.log"
        self._log: IO[str] = self._log_path.open("w")
        self._process = subprocess.Popen(
            list(words),
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            self.facts = self._read()
        except TrainerFailed:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return sum(epoch.seconds for epoch in self.epochs)

    def train(self) -> None:
        """Trains and validates one epoch, or notes that the training has ended.

        Raises:
            TrainerFailed: It exited, or did not answer according to the protocol.
        """
        with contextlib.suppress(BrokenPipeError):  # its last log lines say more
            self._input.write(f"{GO}\n")
            self._input.flush()
        values = self._read()
        if values == _ENDED:
            self.ended = True
            return
        try:
            epoch = Epoch(**values)
        except TypeError:
            raise TrainerFailed(f"{self.name} sent {values}, which is no epoch") from None
        if epoch.rankings and self._measure is not None:
            ndcg, validated = self._measure(Path(epoch.rankings))
            epoch = replace(epoch, ndcg=ndcg, validated=validated)
        self.epochs.append(epoch)

    def close(self) -> None:
        """Closes its input and waits until it has exited."""
        with contextlib.suppress(BrokenPipeError):
            self._input.close()
        try:
            self._process.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    @property
    def _input(self) -> IO[str]:
        if self._process.stdin is None:
            raise RuntimeError("the trainer was started without stdin")
        return self._process.stdin

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            last = self._log_path.read_text().strip().splitlines()[-_LOG_LINES:]
            raise TrainerFailed(f"{self.name} exited: {' | '.join(last) or 'without a message'}")
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            values = None
        if not isinstance(values, dict):
            raise TrainerFailed(f"{self.name} sent {line.strip()!r}, which is no JSON object")
        return values
