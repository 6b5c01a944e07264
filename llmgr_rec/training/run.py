"""A whole training run: what is checked before it starts, and its stages one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmgr_rec.config import Config
from llmgr_rec.data.catalogue import Catalogue
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.pretrained import load_tokenizer
from llmgr_rec.distributed.bundle import is_complete
from llmgr_rec.distributed.process_group import init_distributed, shutdown
from llmgr_rec.errors import UserError
from llmgr_rec.recipes import save_config
from llmgr_rec.training.journal import Journal
from llmgr_rec.training.stages import STAGES, RunContext, StageName, run_stage, stage_settings


@dataclass(frozen=True)
class RunRequest:
    """What the user asks for.

    Args:
        config: All settings.
        dataset: Folder made by prepare.
        output: Run folder.
        stage: One stage, or all in order.
        resume: Continue what is in the run folder.
    """

    config: Config
    dataset: Path
    output: Path
    stage: Literal["all", "sbr", "align", "behave"]
    resume: bool


def train_run(request: RunRequest) -> list[StageName]:
    """Trains the requested stages; see `RunRequest`.

    Returns:
        The stages trained: those that were complete already are left as they are.

    Raises:
        UserError: Anything a user can mend; raised on every rank before any rank waits for another.
    """
    dataset = Dataset(request.dataset)
    catalogue = Catalogue.load(request.dataset)
    stages = _stages_to_run(request)
    _check_settings(request.config, stages, dataset)
    _check_output(request, stages)
    world = init_distributed(request.config.runtime.device, request.config.runtime.timeout_s)
    try:
        if world.rank == 0:
            request.output.mkdir(parents=True, exist_ok=True)
            save_config(request.config, request.output / "config.yaml")
        journal = Journal(request.output, enabled=world.rank == 0)
        context = RunContext(request.config, dataset, catalogue, request.output, world, journal, request.resume)
        for stage in stages:
            run_stage(stage, context)
        journal.close()
    finally:
        shutdown()
    return stages


def _stages_to_run(request: RunRequest) -> list[StageName]:
    """Stages in order, without those that are complete (on resume) or have nothing to do."""
    wanted = [stage for stage in STAGES if request.stage in ("all", stage)]
    done = {stage for stage in STAGES if is_complete(request.output / "export" / stage)}
    if not request.resume and (again := [stage for stage in wanted if stage in done]):
        raise UserError(
            f"stage {again[0]} of {request.output} is complete already; "
            "give another --output, or --resume to go on with what is missing"
        )
    return [stage for stage in wanted if stage not in done and (stage == "sbr" or _epochs(request, stage))]


def _epochs(request: RunRequest, stage: StageName) -> int:
    return stage_settings(request.config, stage).epochs


def _check_settings(config: Config, stages: Sequence[StageName], dataset: Dataset) -> None:
    for stage in stages:
        settings = stage_settings(config, stage)
        if settings.epochs and not settings.trainable:
            raise UserError(f"setting {stage}.trainable is empty; name the parameter groups that the stage trains")
        if settings.batch_size < 1:
            raise UserError(f"setting {stage}.batch_size is {settings.batch_size}; give at least 1")
    if any(stage != "sbr" for stage in stages):
        load_tokenizer(config.llm.name_or_path)
        if not dataset.manifest.has_text:
            raise UserError(
                f"{dataset.path / 'items.parquet'} has no titles, and stages align and behave read item text; "
                "prepare with an items file that has a title column, or train with --stage sbr"
            )


def _check_output(request: RunRequest, stages: Sequence[StageName]) -> None:
    output = request.output
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        missing = [stage for stage in STAGES[: STAGES.index(stages[0])] if _epochs(request, stage) or stage == "sbr"]
        if missing:
            raise UserError(f"stage {stages[0]} goes on from stage {missing[-1]}, which {output} does not hold")
        return
    known = output / "config.yaml"
    if not known.is_file():
        raise UserError(f"output folder {output} is not empty and is no training run; give another --output")
    started = [stage for stage in stages if (output / "checkpoints" / stage).exists()]
    if not request.resume and (request.stage == "all" or started):
        raise UserError(f"{output} holds a run already; add --resume to continue it, or give another --output")
    if stages and stages[0] != "sbr" and not is_complete(output / "export" / "sbr"):
        raise UserError(f"stage {stages[0]} goes on from stage sbr, which is not complete in {output}; train it first")
