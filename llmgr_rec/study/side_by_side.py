"""Cells of a study, one after another or several at a time, each in a process; what many need is trained first."""

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
from llmgr_rec.study.cells import Bench
from llmgr_rec.study.recipe import Study, Variant

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """A cell that is wanted.

    Args:
        variant: Without a grid.
        seed: Its seed.
        of_grid: Names of the settings that a grid has given it.
    """

    variant: Variant
    seed: int
    of_grid: tuple[str, ...] = ()

    def __str__(self) -> str:
        chosen = [f", {name} {self.variant.settings[name]}" for name in self.of_grid]
        return f"{self.variant.name}{''.join(chosen)}, seed {self.seed}"


def fill(bench: Bench, study: Study, tasks: Sequence[Task], jobs: int) -> None:
    """Has every cell on disk.

    Args:
        bench: Trains and judges.
        study: What is compared.
        tasks: The cells. Of those that share a session recommender the others wait until the first has trained it.
        jobs: Processes; with one, all is trained in this one.

    Raises:
        UserError: The data set or a setting is not usable, or a process was ended from without.
    """
    missing = [task for task in tasks if not bench.has(study, task.variant, task.seed)]
    ended = _here(bench, study, missing) if jobs == 1 else _elsewhere(bench, study, missing, jobs)
    for number, task in enumerate(ended, 1):
        logger.info("%s: done, %d of %d", task, number, len(missing))


def _here(bench: Bench, study: Study, tasks: Sequence[Task]) -> Iterator[Task]:
    for task in tasks:
        logger.info("%s", task)
        bench.cell(study, task.variant, task.seed)
        yield task


def _elsewhere(bench: Bench, study: Study, tasks: Sequence[Task], jobs: int) -> Iterator[Task]:
    """The tasks in the order in which they end."""
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(bench.recommender_of(study, task.variant, task.seed), []).append(task)
    running: dict[Future[None], tuple[Task, list[Task]]] = {}
    # Fresh processes: a copy of one in which torch has started threads may hang.
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin)

    def start(task: Task, then: list[Task]) -> None:
        running[pool.submit(_work, bench.folder, bench.dataset.path, bench.split, study, task)] = (task, then)

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
            f"one of {jobs} processes was ended from without, perhaps for want of memory; the same command goes on "
            "where they stopped, with fewer --jobs if need be"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    configure_logging()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when the one that started it has ended, however that was."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(folder: Path, dataset: Path, split: str, study: Study, task: Task) -> None:
    """Trains and judges in a process of the pool, whose messages say what it is about."""
    for handler in logging.getLogger("llmgr_rec").handlers:
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {task}: %(message)s", datefmt="%H:%M:%S"))
    _bench(folder, dataset, split).cell(study, task.variant, task.seed)


@cache
def _bench(folder: Path, dataset: Path, split: str) -> Bench:
    """One a process, which keeps the baselines that it has built."""
    return Bench(folder, Dataset(dataset), split)
