"""A trainer in a process of its own that trains one epoch whenever it is asked to: JSON lines over stdin and stdout.

The trainer says that it is ready, with what is worth knowing of it; then each line `epoch` is answered by what that
epoch was, and the end of the input ends it. The standard library alone, because the peer's environment reads it too.
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
_LAST_WORDS = 3
_PATIENCE_S = 30.0


class TrainerFailed(Exception):
    """A trainer ended, or said something else than was agreed."""


@dataclass(frozen=True)
class Epoch:
    """What one epoch was.

    Args:
        examples: Training examples.
        seconds: From the first batch to the end of the last step; validation is not in it.
        loss: Mean training loss.
        ndcg: NDCG@20 over the whole catalog after it, on the validation examples.
        validated: Validation examples.
    """

    examples: int
    seconds: float
    loss: float
    ndcg: float
    validated: int


class Replies:
    """The trainer's end of the line; what libraries print goes to stderr from here on."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def ready(self, **facts: Any) -> None:
        """Says what is worth knowing before the first epoch."""
        self._say(facts)

    def done(self, epoch: Epoch) -> None:
        """Tells of an epoch."""
        self._say(asdict(epoch))

    def wait(self) -> bool:
        """Waits for the word to go on; False where there is none to come."""
        return sys.stdin.readline().strip() == GO

    def _say(self, values: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(values) + "\n")
        self._out.flush()


class Trainer:
    """The asking end: a running trainer.

    Args:
        name: As messages call it.
        words: Its command.
        folder: Where it runs; `NAME.log` there gets what it says beside the replies.
        environment: Variables set for it, beside those of this process.

    Raises:
        TrainerFailed: It did not become ready.
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
        """Seconds that it has trained so far."""
        return sum(epoch.seconds for epoch in self.epochs)

    def train(self) -> float:
        """Trains and validates one epoch; returns its training examples.

        Raises:
            TrainerFailed: It ended, or did not answer as agreed.
        """
        with contextlib.suppress(BrokenPipeError):  # what it said last tells more
            self._input.write(f"{GO}\n")
            self._input.flush()
        values = self._read()
        try:
            self.epochs.append(Epoch(**values))
        except TypeError:
            raise TrainerFailed(f"{self.name} told of an epoch by {values}") from None
        return self.epochs[-1].examples

    def close(self) -> None:
        """Ends it."""
        with contextlib.suppress(BrokenPipeError):
            self._input.close()
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    @property
    def _input(self) -> IO[str]:
        if self._process.stdin is None:
            raise RuntimeError("the trainer was started without its input")
        return self._process.stdin

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            said = self._log_path.read_text().strip().splitlines()[-_LAST_WORDS:]
            raise TrainerFailed(f"{self.name} ended: {' | '.join(said) or 'without a word'}")
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            values = None
        if not isinstance(values, dict):
            raise TrainerFailed(f"{self.name} said {line.strip()!r}, which is no JSON object")
        return values
