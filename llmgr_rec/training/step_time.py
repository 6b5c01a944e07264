"""The time of a training step and of a whole stage, measured on its first steps and logged before the others."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llmgr_rec.distributed.process_group import World

logger = logging.getLogger(__name__)

# The first step also allocates memory and compiles kernels, so it is not measured.
_WARM_UP_STEPS = 1
_MEASURED_STEPS = 2


class StepTime:
    """Measures the first steps after a start or a resume, and logs on rank 0 what a step and the stage take.

    Args:
        stage: Stage name.
        world: Ranks; a step ends on all of them together, so rank 0 measures for all.
    """

    def __init__(self, stage: str, world: World) -> None:
        self._stage = stage
        self._world = world
        self._steps = 0
        self._seconds = 0.0

    @contextmanager
    def measured(self, steps_left: int) -> Iterator[None]:
        """Measures a step, unless enough are measured.

        Args:
            steps_left: Steps of the stage that are left, this one included.
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
            left = in_words(step * (steps_left - 1))
            logger.info("%s: %s a step, %s for the %d left", self._stage, in_words(step), left, steps_left - 1)

    def _now(self) -> float:
        if self._world.device.type == "cuda":
            # Kernels are only queued when a step returns.
            torch.cuda.synchronize(self._world.device)
        return time.perf_counter()


def in_words(seconds: float) -> str:
    """A duration in the unit that suits it.

    Args:
        seconds: The duration.

    >>> [in_words(seconds) for seconds in (0.0123, 6.34, 95, 1800, 12345, 400000)]
    ['about 12 ms', 'about 6.3 s', 'about 95 s', 'about 30 min', 'about 3.4 h', 'about 111 h']
    """
    if seconds < 1:
        return f"about {1000 * seconds:.0f} ms"
    if seconds < 100:
        return f"about {seconds:.2g} s"
    if seconds < 6000:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.3g} h" if seconds >= 36_000 else f"about {seconds / 3600:.2g} h"
