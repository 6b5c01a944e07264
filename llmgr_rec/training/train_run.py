"""A training run: preflight, then its stages in order."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmgr_rec.config import PROMPT_STAGES, Config, StageName, trained_stages
from llmgr_rec.config_file import save_config
from llmgr_rec.data.prompt_templates import save_templates
from llmgr_rec.distributed.process_group import World, describe_ranks, process_group, run_on_rank0
from llmgr_rec.errors import RankLostError, StopRequested
from llmgr_rec.files import atomic_write
from llmgr_rec.first_and_last_line import print_start
from llmgr_rec.folder_lock import FolderLock
from llmgr_rec.stop_signals import StopSignals
from llmgr_rec.storage.bundle_index import CONFIG, PROMPTS
from llmgr_rec.training.freed_memory import return_freed_memory, share_freed_memory
from llmgr_rec.training.metric_writers import MetricWriter, open_trackers
from llmgr_rec.training.metrics_logger import MetricsLogger
from llmgr_rec.training.preflight import CheckedRun, RunRequest, check_run
from llmgr_rec.training.stages import RunContext, run_stage
from llmgr_rec.training.training_record import TrainingRecord

logger = logging.getLogger(__name__)

# File with the run id of the last launch, by which a restart by the launcher is recognized.
LAUNCH = "launch"


def train_run(request: RunRequest) -> list[StageName]:
    """Trains the requested stages.

    Args:
        request: Arguments of the run.

    Returns:
        The stages trained, without those that were already complete.

    Raises:
        UserError: A setting, an input or the run folder is not usable. Except for a locked folder or a loss that is not
            finite, it is raised on every rank before the process group starts.
        StopRequested: SIGTERM or SIGINT; a resumed run continues after the last step.
    """
    share_freed_memory()
    checked = check_run(request)
    # What reading the catalog has left, which may be as large as the catalog.
    return_freed_memory()
    runtime = request.config.runtime
    with StopSignals(runtime.grace_s) as signals:
        try:
            with process_group(runtime) as world, _locked(request.output, world):
                recipe = f"recipe {request.recipe}; " if request.recipe else ""
                print_start("train", [request.dataset], request.output, recipe + describe_ranks(runtime))
                _train(request, checked, world, signals)
        except RankLostError:
            # Another rank has stopped before this one.
            if signals.requested:
                raise StopRequested(signals.requested) from None
            raise
    return checked.stages


def _train(request: RunRequest, checked: CheckedRun, world: World, signals: StopSignals) -> None:
    config, output = checked.config, request.output
    # A complete run keeps the settings of its training.
    if world.rank == 0 and checked.stages:
        _save_config(config, output)
        if checked.warm_start:
            checked.warm_start.record(output)
        with atomic_write(output / LAUNCH) as partial:
            partial.write_text(request.launch)
    trackers: list[MetricWriter] = []
    if checked.stages:
        # Any rank reports that a tracker does not start; rank 0 alone has them.
        run_on_rank0(world, lambda: trackers.extend(open_trackers(output, config)))
    metrics = MetricsLogger(output, enabled=world.rank == 0, trackers=trackers)
    context = RunContext.of(request, checked, world, metrics, signals)
    complete = False
    try:
        if checked.stages:
            _train_stages(request, checked, context)
        complete = True
    finally:
        metrics.close(complete)


def _train_stages(request: RunRequest, checked: CheckedRun, context: RunContext) -> None:
    logger.info("to train: %s", context.remaining.plan())
    with TrainingRecord(request.output, request.recipe, request.dataset, request.config.seed, context.world) as record:
        for number, stage in enumerate(checked.stages, start=1):
            logger.info("stage %s starts, %d of %d", stage, number, len(checked.stages))
            with record.stage(stage):
                run_stage(stage, context)


@contextmanager
def _locked(output: Path, world: World) -> Iterator[None]:
    """Creates and locks the run folder; the operating system releases the lock when the process ends.

    Raises:
        UserError: Another process is training in the folder; raised on every rank.
    """
    output.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(output, "training")
    run_on_rank0(world, lock.acquire)
    lock.join()
    try:
        yield
    finally:
        lock.release()


def _save_config(config: Config, output: Path) -> None:
    """Writes the settings, which mark the folder as a run, and the complete prompt templates beside them."""
    with atomic_write(output / CONFIG) as partial:
        save_config(config, partial)
    if set(PROMPT_STAGES) & set(trained_stages(config)):
        with atomic_write(output / PROMPTS) as partial:
            save_templates(config.prompt.templates, partial)
