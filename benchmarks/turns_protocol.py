"""Protocol of a trainer process that trains one epoch per request: JSON lines over stdin and stdout.

The trainer first sends facts about itself. It answers each line `epoch` with the results of one more epoch, and exits
at the end of its input. Only the standard library is used, because RecBole's environment imports this module, too.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Self

GO = "epoch"
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
        loss: Mean training loss.
        ndcg: NDCG@20 on the validation examples after it, ranking the whole catalog.
        validated: Validation examples.
    """

    examples: int
    seconds: float
    loss: float
    ndcg: float
    validated: int


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

    Raises:
        TrainerFailed: It exited before it was ready.
    """

    def __init__(self, name: str, words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.epochs: list[Epoch] = []
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

    def train(self) -> float:
        """Trains and validates one epoch; returns its training examples.

        Raises:
            TrainerFailed: It exited, or did not answer according to the protocol.
        """
        with contextlib.suppress(BrokenPipeError):  # its last log lines say more
            self._input.write(f"{GO}\n")
            self._input.flush()
        values = self._read()
        try:
            self.epochs.append(Epoch(**values))
        except TypeError:
            raise TrainerFailed(f"{self.name} sent {values}, which is no epoch") from None
        return self.epochs[-1].examples

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
