"""Runs trials sequentially or in a process pool; models that trials share are trained once."""

import logging
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llmgr_rec.cli import configure_logging
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.errors import UserError
from llmgr_rec.experiments.experiment import Experiment, Variant
from llmgr_rec.experiments.trial import TrialRunner

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """A trial to run.

    Args:
        variant: The variant, without a grid.
        seed: Seed of the training.
        grid_settings: Names of its settings that are from a grid.
    """

    variant: Variant
    seed: int
    grid_settings: tuple[str, ...] = ()

    def __str__(self) -> str:
        chosen = [f", {name} {self.variant.settings[name]}" for name in self.grid_settings]
        return f"{self.variant.name}{''.join(chosen)}, seed {self.seed}"


def run_trials(runner: TrialRunner, experiment: Experiment, tasks: Sequence[Task], jobs: int) -> None:
    """Runs the trials that are not on disk.

    Args:
        runner: Trains and evaluates trials.
        experiment: Experiment of the trials.
        tasks: The trials. The first of those that share a session recommender runs before the others.
        jobs: Number of processes; 1 runs the trials in this process.

    Raises:
        UserError: The data set or a setting is not usable, or a process was killed.
    """
    missing = [task for task in tasks if not runner.has(experiment, task.variant, task.seed)]
    finished = (
        _in_this_process(runner, experiment, missing) if jobs == 1 else _in_pool(runner, experiment, missing, jobs)
    )
    for number, task in enumerate(finished, 1):
        logger.info("%s: done, %d of %d", task, number, len(missing))


def _in_this_process(runner: TrialRunner, experiment: Experiment, tasks: Sequence[Task]) -> Iterator[Task]:
    for task in tasks:
        logger.info("%s", task)
        runner.trial(experiment, task.variant, task.seed)
        yield task


def _in_pool(runner: TrialRunner, experiment: Experiment, tasks: Sequence[Task], jobs: int) -> Iterator[Task]:
    """The tasks in the order in which they finish."""
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(runner.recommender_of(experiment, task.variant, task.seed), []).append(task)
    running: dict[Future[None], tuple[Task, list[Task]]] = {}
    # Not forked: the fork of a process in which torch has started threads may hang.
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _initialize)

    def start(task: Task, then: list[Task]) -> None:
        running[
            pool.submit(_work, runner.folder, runner.dataset.path, runner.split, runner.depth, experiment, task)
        ] = (task, then)

    try:
        for first, *others in groups.values():
            start(first, others)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task, then = running.pop(future)
                future.result()
                for other in then:
                    start(other, [])
                yield task
    except BrokenProcessPool:
        raise UserError(
            f"one of {jobs} processes was killed, possibly out of memory; run the same command again to continue, "
            "with fewer --jobs if necessary"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _initialize() -> None:
    configure_logging()
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Ends this process when its parent ends, even if the parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(folder: Path, dataset: Path, split: str, depth: int, experiment: Experiment, task: Task) -> None:
    """Runs a trial in a process of the pool; its log lines contain the name of the trial."""
    for handler in logging.getLogger("llmgr_rec").handlers:
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {task}: %(message)s", datefmt="%H:%M:%S"))
    _runner(folder, dataset, split, depth).trial(experiment, task.variant, task.seed)


@cache
def _runner(folder: Path, dataset: Path, split: str, depth: int) -> TrialRunner:
    """One runner per process, so that the catalog is loaded once."""
    return TrialRunner(folder, Dataset(dataset), split, depth)
