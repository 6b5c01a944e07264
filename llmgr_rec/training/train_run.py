"""A training run: preflight, then its stages one after the other."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from llmgr_rec.config import Config, StageName
from llmgr_rec.config_file import save_config
from llmgr_rec.distributed.process_group import World, init_distributed, run_on_rank0, shutdown
from llmgr_rec.errors import UserError
from llmgr_rec.files import atomic_write
from llmgr_rec.training.metrics_logger import MetricsLogger
from llmgr_rec.training.preflight import LOCK, CheckedRun, RunRequest, check_run
from llmgr_rec.training.stages import RunContext, run_stage

logger = logging.getLogger(__name__)

# File with the name of the launch that last worked on a run, by which a restart by the launcher is recognized.
LAUNCH = "launch"


def train_run(request: RunRequest) -> list[StageName]:
    """Trains the requested stages; see `RunRequest`.

    Returns:
        The stages trained; stages that were complete already stay as they are.

    Raises:
        UserError: Anything that the user can fix; raised on every rank before any rank waits for another.
    """
    checked = check_run(request)
    runtime = request.config.runtime
    world = init_distributed(runtime.device, runtime.timeout_s, runtime.threads_per_rank)
    try:
        with _locked(request.output, world):
            _train(request, checked, world)
    finally:
        shutdown()
    return checked.stages


def _train(request: RunRequest, checked: CheckedRun, world: World) -> None:
    config, output = request.config, request.output
    # A complete run keeps the settings that it was trained with.
    if world.rank == 0 and checked.stages:
        _save_config(config, output / "config.yaml")
        (output / LAUNCH).write_text(request.launch)
    metrics = MetricsLogger(output, enabled=world.rank == 0)
    context = RunContext(
        config=config,
        dataset=checked.dataset,
        catalog=checked.catalog,
        run=output,
        world=world,
        metrics=metrics,
        resume=request.resume,
        factory=request.factory,
        text_embeddings=request.text_embeddings or output / "text_embeddings",
    )
    for stage in checked.stages:
        run_stage(stage, context)
    metrics.close()


@contextmanager
def _locked(output: Path, world: World) -> Iterator[None]:
    """Makes the run folder and keeps other processes from training in it; the lock ends with the process.

    Raises:
        UserError: Another process is training in it; raised on every rank.
    """
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / LOCK, timeout=0)
    run_on_rank0(world, lambda: _acquire(lock, output))
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: BaseFileLock, output: Path) -> None:
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another process is training in {output}; wait until it has ended, or give another --output"
        ) from None
    except (NotImplementedError, OSError) as error:
        logger.warning("%s cannot be locked (%s); do not start a second process in it", output, error)


def _save_config(config: Config, path: Path) -> None:
    """Writes the file atomically: its presence marks the folder as a run."""
    with atomic_write(path) as partial:
        save_config(config, partial)
