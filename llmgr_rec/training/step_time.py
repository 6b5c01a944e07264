"""The time of a training step and of a whole stage, measured on its first steps and logged before the others."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llmgr_rec.distributed.process_group import World
from llmgr_rec.durations import in_words
from llmgr_rec.training.remaining_time import RemainingTime, StageWork

logger = logging.getLogger(__name__)

# The first step also allocates memory and compiles kernels, so it is not measured.
_WARM_UP_STEPS = 1
_MEASURED_STEPS = 2


class StepTime:
    """Measures the first steps after a start or a resume, and logs on rank 0 what a step and the stage take.

    Args:
        stage: Stage name.
        world: Ranks; a step ends on all of them together, so rank 0 measures for all.
        remaining: Takes the time of a step, and estimates that of the run.
    """

    def __init__(self, stage: str, world: World, remaining: RemainingTime) -> None:
        self._stage = stage
        self._world = world
        self._remaining = remaining
        self._steps = 0
        self._seconds = 0.0

    @contextmanager
    def measured(self, left: StageWork) -> Iterator[None]:
        """Measures a step, unless enough are measured.

        Args:
            left: What the stage has left after the step.
        """
        if self._world.rank or self._steps >= _WARM_UP_STEPS + _MEASURED_STEPS:
            yield
            return
        start = self._now()
        yield
        self._steps += 1
        if self._steps > _WARM_UP_STEPS:
            self._seconds += self._now() - start
        if self._steps == _WARM_UP_STEPS + _MEASURED_STEPS:
            step = self._seconds / _MEASURED_STEPS
            self._remaining.measured_step(self._stage, step)
            logger.info(
                "%s: %s a step, %s for the %d left; %s",
                self._stage,
                in_words(step),
                in_words(step * left.steps),
                left.steps,
                self._remaining.text(self._stage, left),
            )

    def _now(self) -> float:
        if self._world.device.type == "cuda":
            # Kernels are only queued when a step returns.
            torch.cuda.synchronize(self._world.device)
        return time.perf_counter()
