"""A whole training run: checked first, then its stages one after the other."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from llmgr_rec.config import Config, StageName
from llmgr_rec.distributed.process_group import World, init_distributed, run_on_rank0, shutdown
from llmgr_rec.errors import UserError
from llmgr_rec.files import atomic_write
from llmgr_rec.recipes import save_config
from llmgr_rec.training.checks import LOCK, RunRequest, check_run
from llmgr_rec.training.journal import Journal
from llmgr_rec.training.stages import RunContext, run_stage

logger = logging.getLogger(__name__)

# Name of the launch that last worked on a run: a restart by the launcher is known by it.
LAUNCH = "launch"


def train_run(request: RunRequest) -> list[StageName]:
    """Trains the requested stages; see `RunRequest`.

    Returns:
        The stages trained: those that were complete already are left as they are.

    Raises:
        UserError: Anything a user can mend; raised on every rank before any rank waits for another.
    """
    checked = check_run(request)
    config, output = request.config, request.output
    runtime = config.runtime
    world = init_distributed(runtime.device, runtime.timeout_s, runtime.threads_per_rank)
    try:
        with _alone(output, world):
            # A complete run keeps the settings that it was trained with.
            if world.rank == 0 and checked.stages:
                _save_config(config, output / "config.yaml")
                (output / LAUNCH).write_text(request.launch)
            journal = Journal(output, enabled=world.rank == 0)
            context = RunContext(
                config, checked.dataset, checked.catalogue, output, world, journal, request.resume, request.item_text
            )
            for stage in checked.stages:
                run_stage(stage, context)
            journal.close()
    finally:
        shutdown()
    return checked.stages


@contextmanager
def _alone(output: Path, world: World) -> Iterator[None]:
    """Keeps other processes from training in a run folder, which is made; a lock ends with the process that holds it.

    Raises:
        UserError: Another one is at it; raised on every rank.
    """
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / LOCK, timeout=0)
    run_on_rank0(world, lambda: _take(lock, output))
    try:
        yield
    finally:
        lock.release()


def _take(lock: BaseFileLock, output: Path) -> None:
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another process is training in {output}; wait until it has ended, or give another --output"
        ) from None
    except (NotImplementedError, OSError) as error:
        logger.warning("%s cannot be locked (%s); start no second process in it", output, error)


def _save_config(config: Config, path: Path) -> None:
    """Replaces the file whole: it marks the folder as a run, so it must never be half there."""
    with atomic_write(path) as partial:
        save_config(config, partial)
