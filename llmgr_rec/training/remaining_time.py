"""What a training run has left over all its stages, from what its steps and validations have taken so far."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from llmgr_rec.config import StageConfig
from llmgr_rec.durations import in_words


def number_of_steps(stage: StageConfig, examples: int) -> int:
    """Optimizer steps of a stage without early stopping.

    Args:
        stage: Settings of the stage.
        examples: Examples of an epoch.
    """
    steps = -(-examples // stage.batch_size) * stage.epochs
    return min(steps, stage.max_steps) if stage.max_steps else steps


@dataclass(frozen=True)
class StageWork:
    """What a stage does.

    Args:
        steps: Optimizer steps.
        validations: Validations after epochs.
        selection_passes: Passes over the validation sessions that select hyperparameters after the last step.
    """

    steps: int
    validations: int
    selection_passes: int

    @classmethod
    def of(cls, stage: StageConfig, examples: int, eval_every: int, selection_passes: int) -> Self:
        """The work of a stage without early stopping.

        Args:
            stage: Its settings.
            examples: Examples of an epoch.
            eval_every: See `number_of_validations`.
            selection_passes: As of the result.
        """
        steps, epoch = number_of_steps(stage, examples), max(-(-examples // stage.batch_size), 1)
        return cls(steps, number_of_validations(0, -(-steps // epoch), eval_every), selection_passes)

    @property
    def passes(self) -> int:
        """Passes over the validation sessions."""
        return self.validations + self.selection_passes


def number_of_validations(first_epoch: int, last_epoch: int, every: int) -> int:
    """Validations at the ends of epochs: of every n-th one, and of the last.

    Args:
        first_epoch: Epochs that have ended.
        last_epoch: Epochs of the stage.
        every: A validation comes after this many epochs; 0 validates never.

    >>> number_of_validations(0, 5, 2), number_of_validations(2, 5, 2), number_of_validations(5, 5, 2)
    (3, 2, 0)
    """
    if not every or first_epoch >= last_epoch:
        return 0
    return last_epoch // every - first_epoch // every + bool(last_epoch % every)


class RemainingTime:
    """Estimates the time to the end of a run.

    Stages that have not started, and passes before the first one of a stage, have no measured rate; they are named and
    not counted.

    Args:
        work: What each stage does, in the order of the stages, without those that are complete.
    """

    def __init__(self, work: Mapping[str, StageWork]) -> None:
        self._work = work
        self._step_seconds: dict[str, float] = {}
        self._pass_seconds: dict[str, float] = {}

    def measured_step(self, stage: str, seconds: float) -> None:
        """Takes the mean time of a stage's newest steps."""
        self._step_seconds[stage] = seconds

    def measured_pass(self, stage: str, seconds: float) -> None:
        """Takes the time of a stage's newest pass over the validation sessions."""
        self._pass_seconds[stage] = seconds

    def left(self, stage: str, steps: int, validations: int) -> StageWork:
        """What the current stage has left, with its selection."""
        return replace(self._work[stage], steps=steps, validations=validations)

    def seconds(self, stage: str, left: StageWork) -> tuple[float, list[str]]:
        """Time to the end of the run, and the names of what it does not count.

        Args:
            stage: The current stage.
            left: What it has left.
        """
        seconds, unknown = 0.0, list[str]()
        stages = list(self._work)
        for name in stages[stages.index(stage) :]:
            steps, passes = (left.steps, left.passes) if name == stage else (self._work[name].steps, 0)
            if steps and name not in self._step_seconds:
                unknown.append(name)
                continue
            seconds += steps * self._step_seconds.get(name, 0.0)
            if passes and name not in self._pass_seconds:
                unknown.append(f"validation of {name}")
            seconds += passes * self._pass_seconds.get(name, 0.0)
        return seconds, unknown

    def text(self, stage: str, left: StageWork) -> str:
        """Time to the end of the run, such as "about 5.1 min to the end of the run, not counting behave".

        Args:
            stage: The current stage.
            left: What it has left.
        """
        seconds, unknown = self.seconds(stage, left)
        without = f", not counting {_and(unknown)}" if unknown else ""
        return f"{in_words(seconds)} to the end of the run{without}"

    def plan(self) -> str:
        """What is to do, such as "sbr 120 steps and 4 validation passes, align 30 steps"."""
        parts = []
        for name, work in self._work.items():
            passes = f" and {work.passes} validation pass{'' if work.passes == 1 else 'es'}" if work.passes else ""
            parts.append(f"{name} {work.steps} steps{passes}")
        return ", ".join(parts)


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
