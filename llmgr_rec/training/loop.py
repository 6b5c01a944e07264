"""The training loop of one stage: pipelined steps, metrics, validation, checkpoints and exact resume."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer

from llmgr_rec.cli import progress
from llmgr_rec.config import RuntimeConfig, StageConfig
from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.data.reader import SessionReader
from llmgr_rec.distributed.collectives import gather_from_ranks, mean_over_ranks, start_max_over_ranks
from llmgr_rec.distributed.process_group import World, report_progress, set_collective_timeout
from llmgr_rec.errors import UserError
from llmgr_rec.modules.tasks import LossAndParts
from llmgr_rec.process_facts import peak_memory_mb
from llmgr_rec.progress_bar import LOG_LINE_SECONDS
from llmgr_rec.stop_signals import StopSignals
from llmgr_rec.storage.checkpoint import CheckpointManager, step_of
from llmgr_rec.training.metrics_logger import MetricsLogger
from llmgr_rec.training.optimizers import LearningRates
from llmgr_rec.training.remaining_time import RemainingTime, StageWork, number_of_validations
from llmgr_rec.training.step_time import StepTime
from llmgr_rec.training.weight_average import AveragedSteps, WeightAverage

logger = logging.getLogger(__name__)

SELECTION_METRIC = "ndcg@20"


@dataclass
class Position:
    """Progress of a stage; with the seed, it is the complete training state except weights and optimizer.

    Args:
        epoch: Epoch of the next step.
        epoch_step: Steps done in that epoch.
        step: Steps done in the stage.
        best: Best validation value of `SELECTION_METRIC` so far.
        stale: Number of validations since the best one.
        unvalidated: Whether an epoch has ended whose validation is due.
    """

    epoch: int = 0
    epoch_step: int = 0
    step: int = 0
    best: float = -1.0
    stale: int = 0
    unvalidated: bool = False


@dataclass
class StageLoop:
    """Trains one stage.

    Args:
        name: Stage name, used in metrics and checkpoint folders.
        model: The stage's task, sharded.
        optimizer: From `build_optimizer`.
        reader: Training examples.
        settings: Epochs, learning rate and early stopping of the stage.
        warmup: Share of the steps in linear warm-up, 0 to 1.
        average: Share of the steps, the last ones, over which the weights are averaged, in place of a decay of the
            learning rate; 0 decays it.
        runtime: Logging, validation and checkpoint intervals.
        seed: Seed of dropout and of all other random numbers of the steps.
        world: Ranks.
        metrics: Logger of the training and validation metrics.
        checkpoints: Newest states, for resuming.
        best: Best state by validation, where no mean is taken.
        validate: Computes validation metrics of the current weights; all ranks call it together. None without
            validation: then the last weights are the result.
        remaining: Estimates the time to the end of the run.
        signals: Asks to stop, on any rank: then all ranks write a checkpoint after the same step and raise
            `StopRequested`.
    """

    name: str
    model: DistributedModelParallel
    optimizer: CombinedOptimizer
    reader: SessionReader
    settings: StageConfig
    warmup: float
    average: float
    runtime: RuntimeConfig
    seed: int
    world: World
    metrics: MetricsLogger
    checkpoints: CheckpointManager
    best: CheckpointManager
    validate: Callable[[], dict[str, float]] | None
    remaining: RemainingTime
    signals: StopSignals

    def __post_init__(self) -> None:
        steps = self.settings.epochs * self.reader.steps_per_epoch
        self._total_steps = min(steps, self.settings.max_steps) if self.settings.max_steps else steps
        self._schedule = LearningRates(self.optimizer, self._total_steps, self.warmup, decays=not self.average)
        self._average = None
        self._stored: KeyedOptimizer = self.optimizer
        if self.average:
            averaged = AveragedSteps(self._total_steps, self.average)
            self._average = WeightAverage.of(self.model, self.optimizer, averaged)
            self._stored = CombinedOptimizer([self.optimizer, ("average", self._average)])
        self._bar = progress(self._total_steps, self.name, "step", log_lines=False)
        self._resumed_window: dict[str, Any] = {}
        self._step_time = StepTime(self.name, self.world, self.remaining)

    def run(self, position: Position) -> int:
        """Trains from a position to the end of the stage, then gives the model the weights that are the result.

        These are the mean of the weights where one is taken; otherwise the best weights by validation or, without
        validation, the last ones.

        Returns:
            The step of these weights.

        Raises:
            UserError: The loss is not finite.
            StopRequested: A signal asked to stop. The newest checkpoint is that of the last step, unless the validation
                after it has ended, too.
        """
        self._bar.update(position.step)
        self._last_progress = self._last_saved = time.monotonic()
        set_collective_timeout(self.world, self.runtime.timeout_s)
        try:
            if position.unvalidated:
                self._validate(position)
            while position.step < self._total_steps and not self._out_of_patience(position):
                self._run_epoch(position)
        finally:
            set_collective_timeout(self.world, self.runtime.startup_timeout_s)
        self._bar.close()
        report_progress(f"stage {self.name}, after its {position.step} steps")
        if self._average is not None:
            self._average.keep(position.step)
        elif (best := self.best.latest()) is not None:
            self.best.load(self.model, None)
            return step_of(best)
        return position.step

    def resume(self) -> Position:
        """Loads the newest complete checkpoint into model and optimizer, if there is one, and returns its position.

        Raises:
            UserError: The checkpoint or the training files do not belong to this run.
        """
        position = Position()
        if self.checkpoints.latest() is not None:
            state = self.checkpoints.load(self.model, self._stored)
            self.reader.load_state_dict(state["reader"])
            position = Position(**state["position"])
            self._resumed_window = state.get("window", {})
        self.metrics.rewind(self.name, position.step, validated=not position.unvalidated)
        logger.info("%s resumes after step %d", self.name, position.step)
        return position

    def _run_epoch(self, position: Position) -> None:
        """Trains to the end of the epoch and validates.

        A signal that arrives in a step ends the training after the next one, on all ranks.
        """
        with self.signals.deferred():
            self._run_steps(position)
        if position.unvalidated:
            self._validate(position)

    def _run_steps(self, position: Position) -> None:
        steps = min(
            self.reader.steps_per_epoch - position.epoch_step,
            self._total_steps - position.step,
        )
        last_step = position.epoch_step + steps
        batches = _TimedBatches(islice(self.reader.batches(position.epoch, position.epoch_step), steps))

        def forward(batch: SessionBatch) -> LossAndParts:
            # Seeded here, not before the step, because filling the pipeline (after a resume) draws random numbers.
            torch.manual_seed(step_seed(self.seed, self.name, position.step, self.world.rank))
            batches.used += batch.global_size
            return self.model(batch)

        pipeline = TrainPipelineSparseDist(self.model, self.optimizer, self.world.device, custom_model_fwd=forward)
        self.model.train()
        window = _Window(batches, self._resumed_window, self.world)
        self._resumed_window = {}
        for _ in range(steps):
            report_progress(f"stage {self.name}, step {position.step + 1}")
            # Overlaps with the step.
            requests = self._start_requests()
            factor = self._schedule.apply(position.step)
            with self._step_time.measured(self._left(position, 1)):
                outputs = pipeline.progress(batches)
            position.step += 1
            position.epoch_step += 1
            if self._average is not None:
                self._average.add(position.step)
            window.add(outputs)
            self._bar.update()
            if not pipeline._pipelined_modules:
                raise RuntimeError(
                    f"stage {self.name}: no lookup was pipelined; does forward change the batch before it?"
                )
            stop, minutes_over = requests()
            epoch_ends = position.epoch_step == last_step
            if position.step % self.runtime.log_every == 0 or epoch_ends:
                self._log(position, window, factor)
                window = _Window(batches)
            if epoch_ends:
                self._end_epoch(position)
            if stop or minutes_over or epoch_ends or self._checkpoint_due(position):
                self._save(position, window)
            if stop:
                self._stop(position, stop)
        pipeline.detach()
        # A signal in the last step.
        if stop := self._start_requests()()[0]:
            self._stop(position, stop)

    def _end_epoch(self, position: Position) -> None:
        position.epoch += 1
        position.epoch_step = 0
        every = self.runtime.eval_every
        last = position.step >= self._total_steps
        position.unvalidated = bool(self.validate is not None and every and (last or position.epoch % every == 0))

    def _stop(self, position: Position, number: int) -> None:
        if self.world.rank == 0:
            logger.info(
                "%s stops after step %d, whose checkpoint is complete; --resume continues", self.name, position.step
            )
        self.signals.stop(number)

    def _validate(self, position: Position) -> None:
        assert self.validate is not None
        report_progress(f"stage {self.name}, validation after step {position.step}")
        if self.world.rank == 0:
            logger.info("%s epoch %d: validation starts", self.name, position.epoch)
        start = time.monotonic()
        with nullcontext() if self._average is None else self._average.in_model(position.step):
            metrics = self.validate()
            self.metrics.write(self.name, position.step, split="valid", epoch=position.epoch, **metrics)
            if metrics[SELECTION_METRIC] > position.best:
                position.best, position.stale = metrics[SELECTION_METRIC], 0
                if self._average is None:
                    self.best.save(position.step, self.model, None, {"position": asdict(position)})
            else:
                position.stale += 1
        if self.world.rank == 0:
            logger.info(
                "%s epoch %d: validation %s %.4f, best %.4f, after %.0f s",
                self.name,
                position.epoch,
                SELECTION_METRIC,
                metrics[SELECTION_METRIC],
                position.best,
                time.monotonic() - start,
            )
        position.unvalidated = False
        self.remaining.measured_pass(self.name, time.monotonic() - start)
        self._save(position)

    def _out_of_patience(self, position: Position) -> bool:
        return bool(self.settings.patience) and position.stale >= self.settings.patience

    def _checkpoint_due(self, position: Position) -> bool:
        every = self.runtime.checkpoint_every
        return bool(every) and position.step % every == 0

    def _start_requests(self) -> Callable[[], list[int]]:
        """Starts to ask all ranks; the result is a signal that asks to stop, or 0, and whether a checkpoint is due."""
        minutes = self.runtime.checkpoint_minutes
        # The clock of rank 0 counts for all.
        due = self.world.rank == 0 and minutes and time.monotonic() - self._last_saved >= 60 * minutes
        wait = start_max_over_ranks(torch.tensor([self.signals.requested, int(due)]), self.world)
        return lambda: wait().tolist()

    def _save(self, position: Position, window: "_Window | None" = None) -> None:
        """Writes a checkpoint, whose time does not count in the window.

        Args:
            position: Position after the last step.
            window: The current window; None after a validation.
        """
        # Not the reader's own position, which is ahead by the batches in the pipeline.
        reader = {**self.reader.state_dict(), "epoch": position.epoch, "step": position.epoch_step}
        state = {"position": asdict(position), "reader": reader, "window": window.state(self.world) if window else {}}
        if window and window.steps:
            self._require_finite(mean_over_ranks(window.means(), self.world), position)
        start = time.perf_counter()
        # A process that is killed later loses the events that were not flushed, and a resumed run does not repeat them.
        self.metrics.flush()
        self.checkpoints.save(position.step, self.model, self._stored, state)
        if window:
            window.leave_out(time.perf_counter() - start)
        self._last_saved = time.monotonic()

    def _log(self, position: Position, window: "_Window", factor: float) -> None:
        means = mean_over_ranks(window.means(), self.world)
        self._require_finite(means, position)
        self.remaining.measured_step(self.name, window.step_seconds())
        left = self._left(position)
        in_words = self.remaining.text(self.name, left)
        self._bar.set_postfix_str(f"loss {means['loss']:.4f}, {in_words}")
        self._log_progress(position.step, means["loss"], in_words)
        self.metrics.write(
            self.name,
            position.step,
            epoch=position.epoch,
            lr=self.settings.lr * factor,
            examples_per_s=window.examples() / window.seconds(),
            data_wait=window.waiting_share(),
            memory_mb=peak_memory_mb(),
            seconds_left=self.remaining.seconds(self.name, left)[0],
            **means,
        )

    def _require_finite(self, means: dict[str, float], position: Position) -> None:
        if not all(map(_is_finite, means.values())):
            raise UserError(
                f"stage {self.name}: the loss is not finite at step {position.step}; "
                f"lower --{self.name}.lr or --tables.lr and start again with another --output"
            )

    def _log_progress(self, step: int, loss: float, left: str) -> None:
        """Logs progress and remaining time every `LOG_LINE_SECONDS`, unless a progress bar is shown."""
        now = time.monotonic()
        if not self._bar.disable or now - self._last_progress < LOG_LINE_SECONDS:
            return
        logger.info("%s step %d of %d, loss %.4f, %s", self.name, step, self._total_steps, loss, left)
        self._last_progress = now

    def _left(self, position: Position, steps_done: int = 0) -> StageWork:
        """What is left of the stage when some steps after a position are done."""
        validations = 0
        if self.validate is not None:
            last_epoch = -(-self._total_steps // self.reader.steps_per_epoch)
            validations = number_of_validations(position.epoch, last_epoch, self.runtime.eval_every)
        steps = self._total_steps - position.step - steps_done
        return self.remaining.left(self.name, steps, validations + position.unvalidated)


def step_seed(seed: int, stage: str, step: int, rank: int) -> int:
    """Seed of one step on one rank; as a function of these four, the random state need not be saved.

    Args:
        seed: Seed of the run.
        stage: Stage name.
        step: Step in the stage, from 0.
        rank: Rank.
    """
    mixed = seed
    for value in (sum(map(ord, stage)), step, rank):
        mixed = (mixed * 6364136223846793005 + value + 1442695040888963407) % 2**63
    return mixed


class _TimedBatches(Iterator[SessionBatch]):
    """An iterator of batches that measures the seconds spent waiting for them and counts the examples trained on."""

    def __init__(self, batches: Iterator[SessionBatch]) -> None:
        self._batches = batches
        self.wait_seconds = 0.0
        self.used = 0

    def __next__(self) -> SessionBatch:
        start = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.wait_seconds += time.perf_counter() - start


class _Window:
    """Sums over the steps between two log records; they stay on the device until the record is written.

    Args:
        batches: The batches of the steps.
        state: From `state` of a window that a checkpoint interrupted, to go on with; empty for a new window.
        world: Ranks.
    """

    def __init__(self, batches: _TimedBatches, state: dict[str, Any] | None = None, world: World | None = None) -> None:
        self._batches = batches
        self._wait_seconds_before = batches.wait_seconds
        self._used_before = batches.used
        self._start = time.perf_counter()
        self._sums: dict[str, torch.Tensor | float] = {}
        self.steps = self._steps_before = 0
        if state and world:
            self.steps = self._steps_before = state["steps"]
            self._sums = _sums_of_rank(state["sums"], world)

    def add(self, outputs: dict[str, torch.Tensor]) -> None:
        for name, value in outputs.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self.steps += 1

    def state(self, world: World) -> dict[str, Any]:
        """The sums of all ranks as plain values. A collective: all ranks must call it."""
        return {
            "steps": self.steps,
            "sums": gather_from_ranks({name: float(value) for name, value in self._sums.items()}, world),
        }

    def means(self) -> dict[str, torch.Tensor]:
        return {name: torch.as_tensor(value / self.steps) for name, value in self._sums.items()}

    def leave_out(self, seconds: float) -> None:
        """Does not count the time of something that is not training."""
        self._start += seconds

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def step_seconds(self) -> float:
        """Mean time of the steps of this process."""
        return self.seconds() / max(self.steps - self._steps_before, 1)

    def examples(self) -> int:
        return self._batches.used - self._used_before

    def waiting_share(self) -> float:
        return (self._batches.wait_seconds - self._wait_seconds_before) / self.seconds()


def _sums_of_rank(sums: list[dict[str, float]], world: World) -> dict[str, torch.Tensor | float]:
    """This rank's sums; the means of all ranks if they were written by another number of ranks."""
    if len(sums) == world.size:
        return dict(sums[world.rank])
    return {name: sum(of_rank[name] for of_rank in sums) / len(sums) for name in sums[0]}


def _is_finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
