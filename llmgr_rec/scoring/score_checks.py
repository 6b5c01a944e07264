"""Request of a scoring job, and the checks before it starts (preflight).

The checks use no collective operation and write no file, so an invalid request ends the job on all ranks together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmgr_rec.bounds import Bounds, check_options
from llmgr_rec.config import PROMPT_STAGES, RANKING_BOUNDS, Device, Domains, DType, StageName, TableDType
from llmgr_rec.data.repeats import RepeatsOption
from llmgr_rec.errors import UserError
from llmgr_rec.scoring.input import SESSION_ID, UnknownItems
from llmgr_rec.scoring.output import OUTPUT_COLUMNS
from llmgr_rec.scoring.routing import Routing
from llmgr_rec.storage.bundle import BundleFiles, open_bundle
from llmgr_rec.storage.bundle_index import default_bundle, is_complete
from llmgr_rec.storage.pretrained import num_decoder_layers

_BOUNDS = {
    **RANKING_BOUNDS,
    "k": Bounds(at_least=1, at_most=2**31),
    "part_rows": Bounds(at_least=1, at_most=2**31),
    "llm_threshold": Bounds(),
}


@dataclass(frozen=True)
class ScoreRequest:
    """Request of a scoring job.

    Args:
        run: Run folder written by train.
        input: Parquet file of sessions, or folder of such files.
        output: Output folder, new or of an interrupted job.
        k: Items per session.
        columns: Input columns that are copied to the output.
        titles: Whether the output has the titles of the items.
        unknown_items: Whether clicks on unknown items are skipped or an error.
        repeats: Whether a list may contain the items of the session's clicks; `auto` takes what the bundle records.
        domains: Which items a list may have, where the catalog has several domains.
        stage: Stage whose bundle is used; None uses the default bundle.
        max_length: Number of newest clicks of a session that are used; None takes what the bundle records.
        part_rows: Sessions per output file.
        batch_size: Sessions per batch of one rank; None uses the setting of the run.
        device: Device of the model; None uses the setting of the run.
        threads: CPU threads of each rank; None uses as many as the work is worth, see `ranking_runtime`.
        allow_code: Packages from which the bundle may import its encoder or head.
        table_dtype: Number format of the embedding tables in memory; None takes that of the bundle.
        llm_dtype: Number format of the language model; None uses the setting of the run.
        llm_layers: Number of layers of the language model, counted from the first; 0 uses all of the run.
        llm_budget: Share of the sessions of each part that is routed to the language model, 0 to 1; None routes all.
        llm_threshold: Uncertainty, in nats, above which a session is routed to the language model, instead of a budget.
    """

    run: Path
    input: Path
    output: Path
    k: int = 20
    columns: list[str] | None = None
    titles: bool = False
    unknown_items: UnknownItems = "skip"
    repeats: RepeatsOption = "auto"
    domains: Domains = "own"
    stage: StageName | None = None
    max_length: int | None = None
    part_rows: int = 16384
    batch_size: int | None = None
    device: Device | None = None
    threads: int | None = None
    allow_code: Sequence[str] = ()
    table_dtype: TableDType | None = None
    llm_dtype: DType | None = None
    llm_layers: int = 0
    llm_budget: float | None = None
    llm_threshold: float | None = None

    @property
    def passed_columns(self) -> list[str]:
        """Input columns that are copied to the output, without duplicates, `session_id` first."""
        return list(dict.fromkeys([SESSION_ID, *(self.columns or [])]))

    @property
    def routing(self) -> Routing:
        """Rule that routes sessions to the language model."""
        return Routing(1.0 if self.llm_budget is None else self.llm_budget, self.llm_threshold)


def preflight(request: ScoreRequest) -> BundleFiles:
    """Checks a request, except for the rows of the input.

    Returns:
        The opened bundle of the request.

    Raises:
        UserError: A value is out of range, there is no complete bundle, or its model does not support an option.
    """
    for check_request in _CHECKS_OF_REQUEST:
        check_request(request)
    bundle = open_bundle(_find_bundle(request), request.allow_code)
    for check_bundle in _CHECKS_OF_BUNDLE:
        check_bundle(request, bundle)
    return bundle


def _check_counts(request: ScoreRequest) -> None:
    check_options({name: getattr(request, name) for name in _BOUNDS}, _BOUNDS)


def _check_columns(request: ScoreRequest) -> None:
    written = [name for name in OUTPUT_COLUMNS if name != "titles" or request.titles]
    if taken := [name for name in request.passed_columns if name in written]:
        raise UserError(f"--columns names {taken[0]}, which is a column of the output; rename the input column")


def _check_budget(request: ScoreRequest) -> None:
    if request.llm_budget is None:
        return
    if not 0 <= request.llm_budget <= 1:
        raise UserError(f"--llm_budget is {request.llm_budget}; give a share from 0 to 1")
    if request.llm_threshold is not None:
        raise UserError(
            "--llm_budget and --llm_threshold are alternatives for routing sessions to the language model; "
            "give one of them"
        )


def _check_has_language_model(request: ScoreRequest, bundle: BundleFiles) -> None:
    if bundle.index.stage in PROMPT_STAGES:
        return
    if request.routing.routes_all and not request.llm_layers and not request.llm_dtype:
        return
    what = (
        "a text sequence encoder, to which they do not apply"
        if bundle.index.stage == "llm_text"
        else "no language model"
    )
    raise UserError(f"{bundle.path} has {what}; leave the --llm_ options out, or give another --stage")


def _check_can_route(request: ScoreRequest, bundle: BundleFiles) -> None:
    if not request.routing.routes_all and not bundle.config.head.residual:
        raise UserError(
            "--llm_budget and --llm_threshold need a model whose head adds the session recommender's score, "
            f"but {bundle.path} was trained with head.residual false; leave them out"
        )


def _check_list_has_entropy(request: ScoreRequest, bundle: BundleFiles) -> None:
    if request.k == 1 and request.routing.compares_sessions:
        raise UserError(
            "--llm_budget and --llm_threshold use the entropy of the scores of a list, which is 0 with --k 1; "
            "give --k 2 or more"
        )


def _check_num_layers(request: ScoreRequest, bundle: BundleFiles) -> None:
    if bundle.index.stage not in PROMPT_STAGES:
        return
    layers = num_decoder_layers(bundle.config.llm.name_or_path, bundle.config.llm.num_layers)
    if not 0 <= request.llm_layers <= layers:
        raise UserError(
            f"--llm_layers is {request.llm_layers}, but the language model of {bundle.path} has {layers} layers; "
            "0 uses all"
        )


_CHECKS_OF_REQUEST = (_check_counts, _check_columns, _check_budget)
_CHECKS_OF_BUNDLE = (_check_has_language_model, _check_can_route, _check_list_has_entropy, _check_num_layers)


def _find_bundle(request: ScoreRequest) -> Path:
    if not request.run.is_dir():
        raise UserError(f"--run {request.run} does not exist; give the --output folder of llmgr_rec.train")
    export = request.run / "export"
    if request.stage is None:
        bundle = default_bundle(export)
    else:
        bundle = export / request.stage if is_complete(export / request.stage) else None
    if bundle:
        return bundle
    what = f"stage {request.stage}" if request.stage else "any stage"
    raise UserError(
        f"--run {request.run} has no complete export of {what}; train it to the end (llmgr_rec.train --resume)"
    )
