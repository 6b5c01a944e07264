"""A whole scoring job: what is checked before it starts, its parts, and the mark at its end."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from llmgr_rec.cli import progress
from llmgr_rec.config import Config, Device, DType, StageName
from llmgr_rec.data.catalogue import Catalogue
from llmgr_rec.data.pretrained import num_decoder_layers
from llmgr_rec.distributed.assembly import make_collator
from llmgr_rec.distributed.bundle import load_bundle
from llmgr_rec.distributed.bundle_index import answering_bundle, bundle_hash, is_complete, read_index
from llmgr_rec.distributed.process_group import World, barrier, init_distributed, on_first_rank, shutdown
from llmgr_rec.errors import UserError
from llmgr_rec.modules.lighten import lighten
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.recipes import load_config
from llmgr_rec.scoring.governor import Governor
from llmgr_rec.scoring.input import SESSION_ID, Part, SessionFiles, UnknownItems
from llmgr_rec.scoring.output import ScoreFolder, Totals
from llmgr_rec.scoring.scorer import OUTPUT_COLUMNS, Scorer, ScoreSettings
from llmgr_rec.stage_config import RECOMMENDER_STAGES

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoreRequest:
    """What the user asks for.

    Args:
        run: Run folder made by train.
        input: Parquet file or folder with sessions.
        output: Folder to make or to go on with.
        k: Items a session.
        columns: Input columns that go into the output.
        unknown_items: Whether a click on an unknown item is left out or an error.
        exclude_seen: Whether items of a session are left out of its own list; `auto` leaves them out where no session
            that the model was trained on holds an item twice.
        stage: Export to score with; None takes the furthest.
        max_length: Newest clicks that the model sees.
        part_rows: Sessions of an output file.
        batch_size: Sessions of a batch; None takes the run's setting.
        device: Where the model runs; None takes the run's setting.
        llm_dtype: Number format of the language model; None takes the run's setting.
        llm_layers: First layers of the language model that are used; 0 uses all it was trained with.
        llm_budget: Share of each part's sessions that the language model reads, those least sure without it; the
            session recommender answers the others. None reads all.
        llm_threshold: Uncertainty in nats above which the language model reads a session, in place of the budget.
    """

    run: Path
    input: Path
    output: Path
    k: int = 20
    columns: list[str] | None = None
    unknown_items: UnknownItems = "skip"
    exclude_seen: bool | Literal["auto"] = "auto"
    stage: StageName | None = None
    max_length: int = 50
    part_rows: int = 16384
    batch_size: int | None = None
    device: Device | None = None
    llm_dtype: DType | None = None
    llm_layers: int = 0
    llm_budget: float | None = None
    llm_threshold: float | None = None


def score_run(request: ScoreRequest) -> Totals:
    """Scores the input, or what an interrupted job has left of it.

    Returns:
        What the complete output holds.

    Raises:
        UserError: Anything a user can mend; raised on every rank before any rank waits for another and before anything
            is written.
    """
    _check_numbers(request)
    bundle = _find_bundle(request)
    columns = _columns(request)
    catalogue = Catalogue.load(bundle)
    files = SessionFiles(request.input, columns, catalogue, request.unknown_items)
    config = load_config(bundle / "config.yaml")
    _check_language(request, bundle, config)
    settings = ScoreSettings(
        k=request.k,
        exclude_seen=_excludes_seen(request, bundle),
        max_length=request.max_length,
        batch_size=request.batch_size or config.runtime.eval_batch_size,
        governor=Governor(_budget(request), request.llm_threshold),
    )
    _check_rows(files)
    parts = files.parts(request.part_rows)
    job = {
        "input": {file.name: {"rows": file.rows, "sha256": file.sha256()} for file in files.files},
        "settings": {
            **asdict(settings),
            "llm_dtype": request.llm_dtype or config.llm.dtype,
            "llm_layers": request.llm_layers,
            "columns": columns,
            "unknown_items": request.unknown_items,
            "part_rows": request.part_rows,
        },
        "model": {"stage": bundle.name, "sha256": bundle_hash(bundle), "catalogue": catalogue.hash},
    }
    folder = ScoreFolder(request.output, job, parts)
    runtime = config.runtime
    world = init_distributed(request.device or runtime.device, runtime.timeout_s, runtime.threads_per_rank)
    try:
        totals = _score(request, bundle, files, folder, settings, world)
    finally:
        shutdown()
    return totals


def _score(
    request: ScoreRequest,
    bundle: Path,
    files: SessionFiles,
    folder: ScoreFolder,
    settings: ScoreSettings,
    world: World,
) -> Totals:
    missing: list[Part] = on_first_rank(world, lambda: _open(folder))
    if missing:
        loaded = load_bundle(bundle, world, request.llm_dtype)
        if isinstance(loaded.model, LLMGR):
            lighten(loaded.model.language_model, request.llm_layers)
        collate = make_collator(loaded.config, loaded.catalogue, "rank", language=isinstance(loaded.model, LLMGR))
        scorer = Scorer(loaded.model, loaded.catalogue, collate, settings, world, loaded.prior)
        bar = progress(files.rows, "score", "session", initial=files.rows - sum(part.rows for part in missing))
        scorer.run(files, missing, folder, bar.update)
        bar.close()
    barrier(world)
    return on_first_rank(world, folder.finish)


def _open(folder: ScoreFolder) -> list[Part]:
    folder.open()
    missing = [part for part in folder.parts if not folder.is_done(part)]
    if done := len(folder.parts) - len(missing):
        logger.info("%d of %d parts are finished already", done, len(folder.parts))
    return missing


def _check_numbers(request: ScoreRequest) -> None:
    values: dict[str, Any] = vars(request)
    for name in ("k", "max_length", "part_rows", "batch_size"):
        if values[name] is not None and values[name] < 1:
            raise UserError(f"--{name} is {values[name]}; give at least 1")


def _excludes_seen(request: ScoreRequest, bundle: Path) -> bool:
    if request.exclude_seen == "auto":
        return not read_index(bundle).clicks_repeat
    return request.exclude_seen


def _budget(request: ScoreRequest) -> float:
    return 1.0 if request.llm_budget is None else request.llm_budget


def _check_language(request: ScoreRequest, bundle: Path, config: Config) -> None:
    """What is asked of the language model can be had."""
    if request.llm_budget is not None and not 0 <= request.llm_budget <= 1:
        raise UserError(f"--llm_budget is {request.llm_budget}; give a share from 0 to 1")
    if request.llm_budget is not None and request.llm_threshold is not None:
        raise UserError("--llm_budget and --llm_threshold both say what the language model reads; give one of them")
    governed = _budget(request) < 1 or request.llm_threshold is not None
    if bundle.name in RECOMMENDER_STAGES:
        if governed or request.llm_layers or request.llm_dtype:
            held = "a language model that they do not steer" if bundle.name == "text" else "no language model"
            raise UserError(f"{bundle} holds {held}; leave the --llm_ options out, or give another --stage")
        return
    if governed and not config.head.residual:
        raise UserError(
            "--llm_budget and --llm_threshold need a model whose head adds the session recommender's score, "
            f"and {bundle} was trained with head.residual false; leave them out"
        )
    if request.k == 1 and (request.llm_threshold is not None or 0 < _budget(request) < 1):
        raise UserError(
            "--llm_budget and --llm_threshold go by how the scores of a list are spread, and --k 1 asks for one; "
            "give --k 2 or more"
        )
    layers = num_decoder_layers(config.llm.name_or_path, config.llm.num_layers)
    if not 0 <= request.llm_layers <= layers:
        raise UserError(f"--llm_layers is {request.llm_layers}, and the language model of {bundle} has {layers} layers")


def _check_rows(files: SessionFiles) -> None:
    bar = progress(files.rows, "check input", "session")
    files.check(bar.update)
    bar.close()


def _find_bundle(request: ScoreRequest) -> Path:
    if not request.run.is_dir():
        raise UserError(f"--run {request.run} does not exist; give the --output folder of llmgr_rec.train")
    export = request.run / "export"
    if request.stage is None:
        bundle = answering_bundle(export)
    else:
        bundle = export / request.stage if is_complete(export / request.stage) else None
    if bundle:
        return bundle
    what = f"stage {request.stage}" if request.stage else "any stage"
    raise UserError(
        f"--run {request.run} holds no complete export of {what}; train it to the end (llmgr_rec.train --resume)"
    )


def _columns(request: ScoreRequest) -> list[str]:
    columns = list(dict.fromkeys([SESSION_ID, *(request.columns or [])]))
    if taken := [name for name in columns if name in OUTPUT_COLUMNS]:
        raise UserError(f"--columns names {taken[0]}, which the output uses for its own; rename the input column")
    return columns
