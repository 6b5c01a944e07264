"""Preflight of a run: every rank checks for all user errors before the process group starts."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from llmgr_rec.baselines.builders import check_blended, warn_of_word_rule
from llmgr_rec.baselines.reranker import import_lightgbm
from llmgr_rec.config import STAGES, Config, StageName, trained_stages
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.row_groups import RowGroups
from llmgr_rec.distributed.process_group import World, launched_world
from llmgr_rec.errors import UserError
from llmgr_rec.files import require_writable
from llmgr_rec.folder_lock import LOCK_NAME
from llmgr_rec.modules.encoders import encoder_class
from llmgr_rec.modules.model_spec import ModelSpec
from llmgr_rec.modules.tasks import CONTRASTIVE_GROUP
from llmgr_rec.storage.bundle_index import check_trained_on, is_complete, latest_bundle, read_config, read_index
from llmgr_rec.storage.checkpoint import CheckpointManager, Identity
from llmgr_rec.storage.embedding_model import EmbeddingModel
from llmgr_rec.storage.fingerprint import inherited_settings
from llmgr_rec.storage.model_factory import ModelFactory
from llmgr_rec.training.memory_plan import CatalogSizes, Ranks, plan_memory
from llmgr_rec.training.metric_writers import check_trackers
from llmgr_rec.training.warm_start import WarmStart, open_warm_start

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRequest:
    """Arguments of a training run.

    Args:
        config: All settings.
        dataset: Folder written by prepare.
        output: Run folder.
        stage: One stage, or `all` in order.
        resume: Whether to continue the run in the run folder.
        launch: Run id of the launcher, the same on all ranks and after each of its restarts; empty without a launcher.
        text_embeddings: Folder of text embeddings of the items, which runs may share; None takes a folder in the run.
        factory: Builds the models.
        recipe: Name of the recipe or settings file of `config`, for the record of the run; empty if unknown.
        init_from: Run or bundle whose models the training starts from; None starts with random weights, or from what
            the resumed run started from.
    """

    config: Config
    dataset: Path
    output: Path
    stage: Literal["all", StageName]
    resume: bool
    launch: str = ""
    text_embeddings: Path | None = None
    factory: ModelFactory = field(default_factory=ModelFactory)
    recipe: str = ""
    init_from: Path | None = None


@dataclass(frozen=True)
class CheckedRun:
    """A run that has passed the preflight.

    Args:
        config: All settings, with `encoder.one_pass` resolved.
        dataset: Prepared sessions.
        catalog: Their items.
        stages: Stages to train, in order, without complete ones.
        warm_start: The models that the training starts from; None for random weights.
    """

    config: Config
    dataset: Dataset
    catalog: Catalog
    stages: list[StageName]
    warm_start: WarmStart | None = None


def check_run(request: RunRequest) -> CheckedRun:
    """Checks the settings, the inputs and the run folder of a run, without modifying anything.

    Args:
        request: Arguments of the run.

    Raises:
        UserError: A setting, an input or the run folder is not usable; the message says how to fix it.
    """
    request.config.validate()
    check_blended(request.config.blend.neighbors)
    if (embedding_model := EmbeddingModel.of(request.config)) is not None:
        embedding_model.check()
    check_trackers(request.config.runtime.trackers)
    dataset = Dataset(request.dataset)
    catalog = Catalog.of(dataset)
    _check_sessions(dataset, catalog)
    warn_of_word_rule(dataset, catalog)
    stages = _stages_to_run(request)
    _check_complete_stages(request)
    request = replace(request, config=resolve_one_pass(request.config, dataset, say="sbr" in stages))
    _check_output(request.output)
    if _complete_stages(request.output):
        _check_same_data(latest_bundle(request.output / "export"), dataset, catalog)
    if stages:
        _check_order(request, stages)
        _check_earlier_stage(request, stages[0])
        _check_selection(request.config, stages, dataset)
        _check_reranker(request.config, dataset)
    for stage in stages:
        spec = request.factory.spec(stage, request.config, catalog)
        spec.check()
        _check_checkpoints(request, spec, catalog)
        _check_one_pass(request, spec, dataset)
        _check_contrast(spec)
        _check_item_text(spec, dataset, catalog)
    _check_memory(request.config, stages, catalog)
    warm_start = open_warm_start(request.output, request.init_from, request.resume) if stages else None
    if warm_start:
        warm_start.check(request.config, stages, request.factory)
    catalog.forget_ids()
    return CheckedRun(request.config, dataset, catalog, stages, warm_start)


def _check_sessions(dataset: Dataset, catalog: Catalog) -> None:
    if catalog.hash != dataset.manifest.catalog_hash:
        raise UserError(
            f"{dataset.items_path} is not the catalog of manifest.json; "
            "prepare the data set again with python -m llmgr_rec.prepare"
        )
    for split in ("train", "valid"):
        groups = RowGroups(dataset.parts(split), num_items=catalog.num_items, by_click=False)
        if split == "train" and not groups.num_examples:
            raise UserError(f"{dataset.path} has no training sessions; prepare the data set from more interactions")


def _stages_to_run(request: RunRequest) -> list[StageName]:
    """Stages to train in order, without those that are complete (on resume) or have 0 epochs."""
    requested = [stage for stage in STAGES if request.stage in ("all", stage)]
    complete = _complete_stages(request.output)
    if not request.resume and (repeated := [stage for stage in requested if stage in complete]):
        raise UserError(
            f"stage {repeated[0]} of {request.output} is already complete; "
            "give another --output, or --resume to train the missing stages"
        )
    trained = trained_stages(request.config)
    if request.stage != "all" and request.stage not in trained:
        raise UserError(f"setting {request.stage}.epochs is 0, so --stage {request.stage} has nothing to train")
    return [stage for stage in requested if stage not in complete and stage in trained]


def _check_complete_stages(request: RunRequest) -> None:
    """Checks that the complete stages of a run that is resumed had the schedules that the settings name."""
    complete = _complete_stages(request.output)
    for stage in trained_stages(request.config):
        if stage not in complete or request.stage not in ("all", stage):
            continue
        schedule, trained = (
            getattr(config, stage) for config in (request.config, read_config(request.output / "export" / stage))
        )
        for name, value in vars(trained).items():
            if getattr(schedule, name) != value:
                raise UserError(
                    f"setting {stage}.{name} is {getattr(schedule, name)}, but stage {stage} of {request.output} is "
                    f"complete with {value}; give the same setting, or another --output"
                )


def _complete_stages(output: Path) -> set[StageName]:
    return {stage for stage in STAGES if is_complete(output / "export" / stage)}


def _check_output(output: Path) -> None:
    """Checks that the folder is writable, and absent, empty or a run."""
    require_writable(output)
    files = [path for path in output.iterdir() if path.name != LOCK_NAME] if output.exists() else []
    if files and not (output / "config.yaml").is_file():
        raise UserError(f"output folder {output} is not empty and not a training run; give another --output")


def _check_order(request: RunRequest, stages: Sequence[StageName]) -> None:
    """Checks that the stages before the first one are complete, and that no later one is."""
    output, first, complete = request.output, stages[0], _complete_stages(request.output)
    started = [stage for stage in stages if (output / "checkpoints" / stage).exists()]
    if not request.resume and (started or (request.stage == "all" and (output / "config.yaml").exists())):
        raise UserError(f"{output} already contains a run; add --resume to continue it, or give another --output")
    position = STAGES.index(first)
    earlier = [stage for stage in trained_stages(request.config) if STAGES.index(stage) < position]
    if missing := [stage for stage in earlier if stage not in complete]:
        skip = "" if missing[0] == "sbr" else f", or skip it with --{missing[0]}.epochs 0"
        raise UserError(
            f"stage {first} starts from stage {missing[-1]}, which is not complete in {output}; "
            f"train it first with --stage {missing[0]}{skip}"
        )
    if later := [stage for stage in STAGES[position + 1 :] if stage in complete]:
        raise UserError(
            f"stage {first} precedes stage {later[0]}, which is complete in {output}; give another --output"
        )


def _check_same_data(bundle: Path, dataset: Dataset, catalog: Catalog) -> None:
    """Checks that the complete stages were trained on the same sessions, items and side features."""
    check_trained_on(bundle, dataset)
    if read_index(bundle).features_hash not in ("", catalog.features_hash):
        raise UserError(
            f"{bundle} was trained on the same items with other words, brands or categories than {catalog.file}; "
            "give the data set it was trained on, or another --output"
        )


def _check_earlier_stage(request: RunRequest, first: StageName) -> None:
    """Checks that the bundle from which the first stage starts was trained with the same settings."""
    if first == "sbr":
        return
    config, output = request.config, request.output
    bundle = latest_bundle(output / "export")
    index, trained_config = read_index(bundle), read_config(bundle)
    if index.factory and not request.factory.name:
        raise UserError(
            f"stage {index.stage} in {output} was trained by an experiment with controls {index.factory}; "
            "give another --output"
        )
    trained = inherited_settings(index.stage, trained_config)
    for name, value in inherited_settings(index.stage, config).items():
        if value != trained[name]:
            raise UserError(
                f"setting {name} is {value}, but stage {index.stage} in {output} was trained with {trained[name]}; "
                "give the same setting, or another --output"
            )
    if first == "llm_text" and index.stage != "sbr":
        raise UserError(
            f"stage llm_text starts from stage sbr, but stage {index.stage} is complete in {output}; "
            "give another --output"
        )
    (strength,) = trained_config.tables.knn_smoothing
    if strength not in config.tables.knn_smoothing:
        raise UserError(
            f"setting tables.knn_smoothing is {config.tables.knn_smoothing}, but stage sbr in {output} was exported "
            f"with strength {strength:g}; give [{strength:g}], or another --output"
        )
    if index.language_model and request.factory.decoder_hash(config) != index.language_model["weights_hash"]:
        raise UserError(
            f"setting llm.name_or_path is {config.llm.name_or_path}, but stage {index.stage} in {output} was trained "
            f"with {index.language_model['name']}, whose weights differ; give the same model, or another --output"
        )


def _check_selection(config: Config, stages: Sequence[StageName], dataset: Dataset) -> None:
    """Checks that there are validation sessions if anything is selected on validation."""
    if dataset.manifest.num_sessions["valid"]:
        return
    if config.blend.scores and not config.blend.weights:
        raise UserError(
            f"setting blend.weights is empty, but {dataset.path} has no validation sessions to select them on; "
            f"give one weight for each of {', '.join(config.blend.scores)}, or prepare the data set with another "
            "--split"
        )
    several = []
    if "sbr" in stages and len(config.tables.knn_smoothing) > 1:
        several.append("tables.knn_smoothing")
    if "llm_text" in stages and len(config.text_encoder.score_weight) > 1:
        several.append("text_encoder.score_weight")
    if several:
        raise UserError(
            f"setting {several[0]} has several values, but {dataset.path} has no validation sessions to "
            "select on; give one, or prepare the data set with another --split"
        )


def _check_reranker(config: Config, dataset: Dataset) -> None:
    """Checks that a re-ranker can be fitted, if one is wanted."""
    if config.blend.reranker == "none":
        return
    import_lightgbm()
    if not dataset.manifest.num_sessions["valid"]:
        raise UserError(
            f"setting blend.reranker is {config.blend.reranker}, but {dataset.path} has no validation sessions to fit "
            "it on; set it to none, or prepare the data set with another --split"
        )
    check_reranker_ranks(config, launched_world(config.runtime.device).size)


def check_reranker_ranks(config: Config, ranks: int) -> None:
    """Checks that a re-ranker is fitted by one rank.

    Args:
        config: All settings.
        ranks: Number of ranks of the training.

    Raises:
        UserError: There are several.
    """
    if config.blend.reranker != "none" and ranks > 1:
        raise UserError(
            f"setting blend.reranker is {config.blend.reranker}, which one rank fits, but there are {ranks}; set it to "
            "none, or start one rank"
        )


def _check_checkpoints(request: RunRequest, spec: ModelSpec, catalog: Catalog) -> None:
    """Checks that the checkpoint from which a stage would resume belongs to it."""
    folder = request.output / "checkpoints" / spec.stage / "steps"
    device = launched_world(request.config.runtime.device).device
    identity = Identity.of(spec.stage, catalog.features_hash, request.config, device, request.factory.name)
    CheckpointManager(folder, 1, World.alone(), identity).check()


def resolve_one_pass(config: Config, dataset: Dataset, say: bool = False) -> Config:
    """The settings with `encoder.one_pass` true or false, where it is `auto`: true where encoder and rows allow it.

    Args:
        config: All settings.
        dataset: Prepared sessions.
        say: Whether rank 0 logs what `auto` is.
    """
    if config.encoder.one_pass != "auto":
        return config
    problem = _problem_of_one_pass(config, dataset)
    if say and launched_world(config.runtime.device).rank == 0:
        logger.info("sbr: encoder.one_pass auto is %s", f"false, because {problem}" if problem else "true")
    return replace(config, encoder=replace(config.encoder, one_pass=not problem))


def _problem_of_one_pass(config: Config, dataset: Dataset) -> str:
    """Why stage sbr cannot encode all prefixes of a row in one pass; empty if it can."""
    return encoder_class(config.encoder.name).one_pass_problem(config.encoder) or _problem_of_rows(dataset)


def _problem_of_rows(dataset: Dataset) -> str:
    """Why prefixes of a training row cannot share a pass; empty if they can."""
    if "train" in dataset.manifest.prefix_augmentation:
        return ""
    return f"the training rows of {dataset.path} are already prefixes"


def _check_one_pass(request: RunRequest, spec: ModelSpec, dataset: Dataset) -> None:
    """Checks that encoder or template supports training in one pass, and that training rows are whole sessions."""
    config = spec.config
    if spec.stage == "sbr" and config.encoder.one_pass and (problem := _problem_of_one_pass(config, dataset)):
        raise UserError(f"setting encoder.one_pass is true, but {problem}; set encoder.one_pass to auto or false")
    if spec.stage != "behave" or not config.prompt.one_pass:
        return
    if not request.factory.prompts(config)["behave"].supports_one_pass:
        raise UserError(
            f"setting prompt.one_pass is true, but the first placeholder of template behave in "
            f"{config.prompt.templates} is not {{nodes}}, so prefixes of a session cannot share a prompt; set "
            "prompt.templates to compact, or prompt.one_pass to false"
        )
    if problem := _problem_of_rows(dataset):
        raise UserError(f"setting prompt.one_pass is true, but {problem}; set prompt.one_pass to false")


def _check_contrast(spec: ModelSpec) -> None:
    """Checks that each rank has several sessions to contrast."""
    if spec.stage != "align" or not spec.config.contrast.weight:
        return
    ranks, sessions = launched_world(spec.config.runtime.device).size, spec.config.align.batch_size
    if sessions < 2 * ranks:
        raise UserError(
            f"setting align.batch_size is {sessions}, which gives a rank fewer than two sessions to contrast; "
            f"give {2 * ranks} or more ({CONTRASTIVE_GROUP * ranks} for groups of {CONTRASTIVE_GROUP}), or set "
            "contrast.weight to 0"
        )


def _check_item_text(spec: ModelSpec, dataset: Dataset, catalog: Catalog) -> None:
    """Checks that items have text if a stage requires it."""
    if not spec.needs_item_text:
        return
    if not dataset.manifest.has_text:
        raise UserError(
            f"{dataset.items_path} has no titles, which stage {spec.stage} needs; prepare with an items file with a "
            f"column title, or set {spec.stage}.epochs to 0"
        )
    catalog.require_texts(list(spec.config.prompt.text_fields))


def _check_memory(config: Config, stages: Sequence[StageName], catalog: Catalog) -> None:
    """Checks that the models of the stages can be built, and that their tables fit on the ranks."""
    world = launched_world(config.runtime.device)
    sizes = CatalogSizes(catalog.num_items, catalog.num_embeddings)
    for plan in plan_memory(config, sizes, Ranks(world.size, world.local_size, world.device.type), stages):
        if plan.problem:
            raise UserError(f"stage {plan.spec.stage}: {plan.problem}")
