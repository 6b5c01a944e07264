"""All that can be wrong with a run before it starts, found by every rank for itself before any waits for another."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from llmgr_rec.baselines.registry import check_blended
from llmgr_rec.config import STAGES, Config, StageName, neighbour_clicks, reader_weights, trained_stages
from llmgr_rec.data.catalogue import Catalogue
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.row_groups import RowGroups
from llmgr_rec.distributed.assembly import compile_prompts, decoder_hash
from llmgr_rec.distributed.bundle_index import check_trained_on, is_complete, latest_bundle, read_index
from llmgr_rec.distributed.layout import Ranks, Sizes, lay_out
from llmgr_rec.distributed.process_group import World, launched_world
from llmgr_rec.errors import UserError
from llmgr_rec.files import require_writable
from llmgr_rec.limits import check_limits
from llmgr_rec.modules.build import check_parts, contrast_weight, reads_item_text
from llmgr_rec.modules.encoders import ENCODERS, encoder_class
from llmgr_rec.modules.prompts import CompiledPrompt
from llmgr_rec.modules.tasks import CONTRASTIVE_GROUP
from llmgr_rec.recipes import load_config
from llmgr_rec.stage_config import RECOMMENDER_STAGES
from llmgr_rec.training.checkpoint import CheckpointManager, Identity
from llmgr_rec.training.deciding import setting, settings_taken_over

# File of a run folder that a process holds while it trains there.
LOCK = ".lock"


@dataclass(frozen=True)
class RunRequest:
    """What the user asks for.

    Args:
        config: All settings.
        dataset: Folder made by prepare.
        output: Run folder.
        stage: One stage, or all in order.
        resume: Continue what is in the run folder.
        launch: Name of the launch, the same on all ranks and after every restart by the launcher; empty without one.
        item_text: Folder of item text encodings, which runs may share; None keeps them in the run folder.
    """

    config: Config
    dataset: Path
    output: Path
    stage: Literal["all", StageName]
    resume: bool
    launch: str = ""
    item_text: Path | None = None


@dataclass(frozen=True)
class CheckedRun:
    """What is known of a run that may start.

    Args:
        dataset: Prepared sessions.
        catalogue: Their items.
        stages: Stages to train, in order; complete ones are left out.
    """

    dataset: Dataset
    catalogue: Catalogue
    stages: list[StageName]


def check_run(request: RunRequest) -> CheckedRun:
    """Looks at all that a run reads and at the folder it writes to, and changes nothing.

    Args:
        request: What the user asks for.

    Raises:
        UserError: Anything a user can mend.
    """
    check_limits(request.config)
    check_parts(request.config)
    check_blended(request.config.prior.neighbours)
    dataset = Dataset(request.dataset)
    catalogue = Catalogue.load(request.dataset)
    _check_sessions(dataset, catalogue)
    stages = _stages_to_run(request)
    _check_output(request.output)
    if _complete_stages(request.output):
        _check_same_data(latest_bundle(request.output / "export"), dataset, catalogue)
    if stages:
        _check_order(request, stages)
        _check_earlier_stage(request, stages[0])
        for stage in stages:
            _check_checkpoints(request, stage, catalogue)
        if "sbr" in stages and request.config.sbr.one_pass:
            _check_sbr_one_pass(request.config, dataset)
        if "align" in stages:
            _check_contrast(request.config)
        _check_choices(request.config, stages, dataset)
        _check_language(request.config, stages, dataset, catalogue)
        _check_layout(request.config, stages, catalogue)
    return CheckedRun(dataset, catalogue, stages)


def _check_sessions(dataset: Dataset, catalogue: Catalogue) -> None:
    if catalogue.hash != dataset.manifest.catalogue_hash:
        raise UserError(
            f"{dataset.items_path} is not the catalogue that manifest.json tells of; "
            "make the data set again with python -m llmgr_rec.prepare"
        )
    for split in ("train", "valid"):
        groups = RowGroups(dataset.parts(split), num_items=catalogue.num_items, by_click=False)
        if split == "train" and not groups.num_examples:
            raise UserError(f"{dataset.path} has no training sessions; prepare the data set from more interactions")


def _stages_to_run(request: RunRequest) -> list[StageName]:
    """Stages in order, without those that are complete (on resume) or have nothing to do."""
    wanted = [stage for stage in STAGES if request.stage in ("all", stage)]
    done = _complete_stages(request.output)
    if not request.resume and (again := [stage for stage in wanted if stage in done]):
        raise UserError(
            f"stage {again[0]} of {request.output} is complete already; "
            "give another --output, or --resume to go on with what is missing"
        )
    trained = trained_stages(request.config)
    if request.stage != "all" and request.stage not in trained:
        raise UserError(f"setting {request.stage}.epochs is 0, so --stage {request.stage} has nothing to train")
    return [stage for stage in wanted if stage not in done and stage in trained]


def _complete_stages(output: Path) -> set[StageName]:
    return {stage for stage in STAGES if is_complete(output / "export" / stage)}


def _check_output(output: Path) -> None:
    """The folder is absent, empty or a run, and can be written to."""
    require_writable(output)
    held = [path for path in output.iterdir() if path.name != LOCK] if output.exists() else []
    if held and not (output / "config.yaml").is_file():
        raise UserError(f"output folder {output} is not empty and is no training run; give another --output")


def _check_order(request: RunRequest, stages: Sequence[StageName]) -> None:
    """A stage goes on from the ones before it, and none goes on from one that comes after it."""
    output, first, done = request.output, stages[0], _complete_stages(request.output)
    started = [stage for stage in stages if (output / "checkpoints" / stage).exists()]
    if not request.resume and (started or (request.stage == "all" and (output / "config.yaml").exists())):
        raise UserError(f"{output} holds a run already; add --resume to continue it, or give another --output")
    place = STAGES.index(first)
    missing = [stage for stage in trained_stages(request.config) if STAGES.index(stage) < place and stage not in done]
    if missing:
        skip = "" if missing[0] == "sbr" else f", or leave it out with --{missing[0]}.epochs 0"
        raise UserError(
            f"stage {first} goes on from stage {missing[-1]}, which is not complete in {output}; "
            f"train it first with --stage {missing[0]}{skip}"
        )
    if later := [stage for stage in STAGES[place + 1 :] if stage in done]:
        raise UserError(
            f"stage {first} comes before stage {later[0]}, which is complete in {output}; give another --output"
        )


def _check_same_data(bundle: Path, dataset: Dataset, catalogue: Catalogue) -> None:
    """What is complete was trained on these sessions and items, and their words, brands and categories."""
    check_trained_on(bundle, dataset)
    if read_index(bundle).features_hash not in ("", catalogue.features_hash):
        raise UserError(
            f"{bundle} was trained on the same items with other words, brands or categories than {catalogue.file}; "
            "give the data set it was trained on, or another --output"
        )


def _check_earlier_stage(request: RunRequest, first: StageName) -> None:
    """What the first stage goes on from is of the same model."""
    if first == "sbr":
        return
    bundle = latest_bundle(request.output / "export")
    index = read_index(bundle)
    before = load_config(bundle / "config.yaml")
    if index.stage == "text":
        raise UserError(
            f"stage {first} does not go on from stage text, which is complete in {request.output}; "
            "give another --output, and --text.epochs 0"
        )
    for name in settings_taken_over(index.stage, request.config):
        if (now := setting(request.config, name)) != (then := setting(before, name)):
            raise UserError(
                f"setting {name} is {now}, but stage {index.stage} in {request.output} was trained with {then}; "
                "give the same setting, or another --output"
            )
    drawn = before.tables.neighbour_clicks
    if drawn not in neighbour_clicks(request.config):
        raise UserError(
            f"setting tables.neighbour_clicks is {request.config.tables.neighbour_clicks}, but stage sbr in "
            f"{request.output} has drawn rows by {drawn}; give that number, or another --output"
        )
    name = request.config.llm.name_or_path
    if index.language_model and decoder_hash(request.config) != index.language_model["weights_hash"]:
        raise UserError(
            f"setting llm.name_or_path is {name}, whose weights are not those of {index.language_model['name']} that "
            f"stage {index.stage} in {request.output} was trained with; give the same model, or another --output"
        )


def _check_checkpoints(request: RunRequest, stage: StageName, catalogue: Catalogue) -> None:
    """The checkpoint that a stage would be resumed from is its own."""
    folder = request.output / "checkpoints" / stage / "steps"
    device = launched_world(request.config.runtime.device).device
    identity = Identity.of(stage, catalogue.features_hash, request.config, device)
    CheckpointManager(folder, 1, World.alone(), identity).check()


def _check_language(config: Config, stages: Sequence[StageName], dataset: Dataset, catalogue: Catalogue) -> None:
    if set(stages) <= {*RECOMMENDER_STAGES}:
        if "text" in stages:
            _check_text(config, dataset, catalogue)
        return
    prompts = compile_prompts(config)
    if "behave" in stages and config.behave.one_pass:
        _check_one_pass(config, prompts["behave"], dataset)
    if reads_item_text(config) or "align" in stages or config.prompt.text_items:
        _check_text(config, dataset, catalogue)


def _check_text(config: Config, dataset: Dataset, catalogue: Catalogue) -> None:
    if not dataset.manifest.has_text:
        readers, otherwise = "stages align and behave read item text", "train with --stage sbr"
        if config.text.epochs:
            readers, otherwise = "stage text trains on it", "set text.epochs to 0"
        raise UserError(
            f"{dataset.items_path} has no titles, and {readers}; "
            f"prepare with an items file that has a column title, or {otherwise}"
        )
    catalogue.texts(list(config.prompt.text_fields))


def _check_choices(config: Config, stages: Sequence[StageName], dataset: Dataset) -> None:
    """What is left to choose can be chosen on something."""
    if dataset.manifest.num_sessions["valid"]:
        return
    if config.prior.neighbours and not config.prior.weights:
        raise UserError(
            f"setting prior.weights is empty, but {dataset.path} has no validation sessions to choose them on; give "
            "one weight for each of prior.neighbours, or prepare the data set with another --split"
        )
    several = []
    if "sbr" in stages and len(neighbour_clicks(config)) > 1:
        several.append("tables.neighbour_clicks")
    if "text" in stages and len(reader_weights(config)) > 1:
        several.append("text.score_weight")
    if several:
        raise UserError(
            f"setting {several[0]} names several numbers, but {dataset.path} has no validation sessions to "
            "choose on; give one, or prepare the data set with another --split"
        )


def _check_contrast(config: Config) -> None:
    """Every rank has sessions to set against each other."""
    ranks, sessions = launched_world(config.runtime.device).size, config.align.batch_size
    if contrast_weight(config) and sessions < 2 * ranks:
        raise UserError(
            f"setting align.batch_size is {sessions}, which gives a rank fewer than two sessions to contrast; "
            f"give {2 * ranks} or more ({CONTRASTIVE_GROUP * ranks} contrasts {CONTRASTIVE_GROUP} on each), or set "
            "align.contrastive_weight to 0"
        )


def _check_sbr_one_pass(config: Config, dataset: Dataset) -> None:
    if not encoder_class(config.encoder.name).supports_one_pass:
        able = sorted(name for name, encoder in ENCODERS.items() if encoder.supports_one_pass)
        raise UserError(
            f"setting sbr.one_pass is true, but encoder.name is {config.encoder.name}, which reads each prefix of a "
            f"session for itself; set encoder.name to {' or '.join(able)}, or sbr.one_pass to false"
        )
    _check_prefixes_grow("sbr", dataset)


def _check_one_pass(config: Config, prompt: CompiledPrompt, dataset: Dataset) -> None:
    if not prompt.supports_one_pass:
        raise UserError(
            f"setting behave.one_pass is true, but the first place of template behave in {config.prompt.templates} is "
            "not {nodes}, so prefixes of a session cannot share a prompt; set prompt.templates to compact, for one"
        )
    _check_prefixes_grow("behave", dataset)


def _check_prefixes_grow(stage: StageName, dataset: Dataset) -> None:
    if "train" not in dataset.manifest.prefix_augmentation:
        raise UserError(
            f"setting {stage}.one_pass is true, but the training rows of {dataset.path} are prefixes already; "
            f"set {stage}.one_pass to false"
        )


def _check_layout(config: Config, stages: Sequence[StageName], catalogue: Catalogue) -> None:
    """The models of the stages can be built, and their tables find room on the ranks."""
    world = launched_world(config.runtime.device)
    sizes = Sizes(catalogue.num_items, catalogue.num_embeddings)
    asked = replace(
        config,
        align=config.align if "align" in stages else replace(config.align, epochs=0),
        behave=config.behave if "behave" in stages else replace(config.behave, epochs=0),
    )
    for layout in lay_out(asked, sizes, Ranks(world.size, world.local_size, world.device.type)):
        if layout.stage in stages and layout.problem:
            raise UserError(f"stage {layout.stage}: {layout.problem}")
