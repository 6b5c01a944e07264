"""A whole training run: checked first, then its stages one after the other."""

from pathlib import Path

from llmgr_rec.config import Config, StageName
from llmgr_rec.distributed.process_group import init_distributed, shutdown
from llmgr_rec.outputs import replaced
from llmgr_rec.recipes import save_config
from llmgr_rec.training.checks import RunRequest, check_run
from llmgr_rec.training.journal import Journal
from llmgr_rec.training.stages import RunContext, run_stage

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
        # A complete run keeps the settings that it was trained with.
        if world.rank == 0 and checked.stages:
            output.mkdir(parents=True, exist_ok=True)
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


def _save_config(config: Config, path: Path) -> None:
    """Replaces the file whole: it marks the folder as a run, so it must never be half there."""
    with replaced(path) as partial:
        save_config(config, partial)
