"""The stages: what each one builds, starts from, trains on and leaves behind."""

import logging
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from transformers import PreTrainedModel

from llmgr_rec.config import Config, StageName, neighbour_clicks
from llmgr_rec.data.catalogue import Catalogue
from llmgr_rec.data.collate import ITEM_ID, Collator
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.pretrained import resolve_dtype
from llmgr_rec.data.reader import DataShard, Prefetch, SamplingOrder, SessionReader
from llmgr_rec.distributed.assembly import (
    assemble_decoder,
    assemble_llmgr,
    assemble_recommender,
    caches_catalogue,
    decoder_hash,
    item_tokens,
    make_collator,
    text_place,
)
from llmgr_rec.distributed.bundle import load_weights
from llmgr_rec.distributed.bundle_export import export_bundle
from llmgr_rec.distributed.bundle_index import CONFIG, latest_bundle
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.reduce import take_from_first_rank
from llmgr_rec.distributed.sharding import shard
from llmgr_rec.distributed.shards import init_tables, zero_rows
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.protocol import evaluate_model
from llmgr_rec.modules.build import build_task, contrast_weight, reads_item_text
from llmgr_rec.modules.groups import group_of, select_trainable
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.modules.tasks import CONTRASTIVE_GROUP
from llmgr_rec.recipes import load_config
from llmgr_rec.stage_config import RECOMMENDER_STAGES, StageConfig
from llmgr_rec.training.checkpoint import CheckpointManager, Identity
from llmgr_rec.training.journal import Journal
from llmgr_rec.training.language import (
    TextEncodings,
    cache_catalogue,
    encode_catalogue,
    fill_text_table,
    renew_texts,
)
from llmgr_rec.training.loop import Position, StageLoop
from llmgr_rec.training.optimizers import build_optimizer
from llmgr_rec.training.selection import select_on_validation

logger = logging.getLogger(__name__)

# Folder of a run where the neighbours of its items are kept.
_NEIGHBOURS = "neighbours"
# Items whose readings tell how readings are spread.
_WHITENED_ITEMS = 16_384


@dataclass(frozen=True)
class RunContext:
    """What every stage of a run works with.

    Args:
        config: All settings.
        dataset: Prepared sessions.
        catalogue: Their items.
        run: Run folder.
        world: Ranks.
        journal: Receives metrics.
        resume: Continue from the newest checkpoint where there is one.
        item_text: Folder of item text encodings; None keeps them in the run folder.
    """

    config: Config
    dataset: Dataset
    catalogue: Catalogue
    run: Path
    world: World
    journal: Journal
    resume: bool
    item_text: Path | None = None

    @cached_property
    def item_tokens(self) -> Jagged:
        """Token ids of every item's text, made once for all stages."""
        return item_tokens(self.config, self.catalogue)


def stage_settings(config: Config, stage: StageName) -> StageConfig:
    """The settings of one stage."""
    settings: StageConfig = getattr(config, stage)
    return settings


def run_stage(stage: StageName, context: RunContext) -> None:
    """Trains one stage from where the one before it ended, and exports its result to RUN/export/<stage>.

    Args:
        stage: The stage.
        context: The run; all ranks call together.

    Raises:
        UserError: A file, a setting or a checkpoint is not usable.
    """
    config, world = _with_clicks_drawn(stage, context), context.world
    settings = stage_settings(config, stage)
    reader = _reader(stage, context)
    model, inner = _start(stage, context)

    def validate() -> dict[str, float]:
        renew_texts(inner, world)
        return _validation(inner, context)

    has_validation = context.dataset.manifest.num_sessions["valid"] > 0
    loop = StageLoop(
        name=stage,
        model=model,
        optimizer=build_optimizer(model, settings, config.tables),
        reader=reader,
        settings=settings,
        runtime=config.runtime,
        seed=config.seed,
        world=world,
        journal=context.journal,
        checkpoints=_checkpoints(stage, context, "steps", config.runtime.keep_checkpoints),
        best=_checkpoints(stage, context, "best", 1),
        validate=validate if has_validation else None,
    )
    if context.resume:
        position = loop.resume()
    else:
        position = Position()
        # What an attempt that died before its first checkpoint told.
        context.journal.rewind(stage, -1)
    loop.run(position)
    renew_texts(inner, world)
    # After the last checkpoint, so that a resumed run does it once, too.
    cache = context.run / _NEIGHBOURS
    selection = select_on_validation(stage, inner, config, context.dataset, context.catalogue, world, cache)
    config = replace(config, tables=replace(config.tables, neighbour_clicks=selection.smoothing))
    folder, manifest = context.run / "export" / stage, context.dataset.manifest
    export_bundle(inner, stage, config, context.catalogue, folder, world, manifest, selection.prior)
    if selection.metrics:
        # After the export, which a resumed run does not make again, so that nothing is written twice.
        context.journal.write(stage, position.step, split="prior", **selection.metrics)
    if world.rank == 0:
        logger.info("stage %s is complete: %s", stage, context.run / "export" / stage)


def _with_clicks_drawn(stage: StageName, context: RunContext) -> Config:
    """The settings, for a stage after sbr with the one number by which that has drawn the id rows of rare items."""
    config = context.config
    if stage == "sbr":
        return config
    drawn = load_config(latest_bundle(context.run / "export") / CONFIG).tables.neighbour_clicks
    return replace(config, tables=replace(config.tables, neighbour_clicks=drawn))


def _validation(model: SessionRecommender | LLMGR, context: RunContext) -> dict[str, float]:
    return evaluate_model(model, context.dataset, "valid", context.config, context.world, context.catalogue)


def _start(stage: StageName, context: RunContext) -> tuple[DistributedModelParallel, SessionRecommender | LLMGR]:
    if stage == "sbr":
        return _start_recommender(context)
    return _start_text(context) if stage == "text" else _start_language(stage, context)


def _start_recommender(context: RunContext) -> tuple[DistributedModelParallel, SessionRecommender]:
    config = context.config
    recommender = assemble_recommender(config, context.catalogue, "meta")
    model = _shard("sbr", recommender, context)
    init_tables(model, config.seed, config.tables.init_std)
    return model, recommender


def _start_text(context: RunContext) -> tuple[DistributedModelParallel, SessionRecommender]:
    config, world = context.config, context.world
    recommender = assemble_recommender(config, context.catalogue, "meta", reads_sessions=True, device=world.device)
    if (text_encoder := recommender.text_encoder) is not None:
        text_encoder.whiten(_some_items(config, context.catalogue))
        # Other processors round otherwise, and nothing else would bring these together.
        for statistic in (text_encoder.mean_H, text_encoder.map_HK):
            take_from_first_rank(statistic, world)
    model = _shard("text", recommender, context)
    load_weights(recommender, latest_bundle(context.run / "export"))
    if not any(neighbour_clicks(_with_clicks_drawn("text", context))):  # which have made up rows for them, or zeros
        # Rows that no click has trained would only blur what the texts say of their items.
        zero_rows(model, ITEM_ID, context.catalogue.train_count_V == 0)
    return model, recommender


def _some_items(config: Config, catalogue: Catalogue) -> Tensor:
    """Items that stand for the catalogue where a statistic of all would take too long."""
    generator = torch.Generator().manual_seed(config.seed)
    return torch.randperm(catalogue.num_items, generator=generator)[:_WHITENED_ITEMS]


def _text_encodings(context: RunContext, decoder: PreTrainedModel) -> TextEncodings:
    """Text encodings of the catalogue by the stage's own decoder."""
    folder = context.item_text or context.run / "item_text"
    return encode_catalogue(decoder, context.item_tokens, context.world, folder, decoder_hash(context.config))


def _start_language(stage: StageName, context: RunContext) -> tuple[DistributedModelParallel, LLMGR]:
    config, world, settings = context.config, context.world, stage_settings(context.config, stage)
    decoder = assemble_decoder(config, world.device)
    encodings: TextEncodings | None = None
    if reads_item_text(config):
        encodings = _text_encodings(context, decoder)
    llmgr = assemble_llmgr(config, context.catalogue, decoder, settings.trainable, "meta")
    if stage == "align" and contrast_weight(config):
        _tell_of_small_groups(config, world)
    model = _shard(stage, llmgr, context)
    load_weights(llmgr, latest_bundle(context.run / "export"))
    if encodings is not None:
        fill_text_table(model, encodings.read)
    if caches_catalogue(config, context.catalogue.num_items, stage):
        cache_catalogue(llmgr, make_collator(config, context.catalogue, "rank", language=False), world.device)
    return model, llmgr


def _tell_of_small_groups(config: Config, world: World) -> None:
    sessions = config.align.batch_size // world.size
    if world.rank == 0 and world.size > 1 and sessions % CONTRASTIVE_GROUP:
        logger.warning(
            "align: a rank has %d sessions of a batch, so not all are contrasted with %d others as on one rank; "
            "--align.batch_size %d would do it",
            sessions,
            CONTRASTIVE_GROUP - 1,
            CONTRASTIVE_GROUP * world.size,
        )


def _shard(stage: StageName, model: SessionRecommender | LLMGR, context: RunContext) -> DistributedModelParallel:
    """The stage's task around a model, over all ranks."""
    config, world, settings = context.config, context.world, stage_settings(context.config, stage)
    task = build_task(stage, model, config, world.size, resolve_dtype(config.loss.dtype, world.device))
    trained = select_trainable(task, settings.trainable)
    if settings.epochs and not trained:
        raise UserError(f"{', '.join(settings.trainable)} name no part of this stage's model; change its trainable")
    return shard(task, config.tables, world, lambda name: group_of(name) in settings.trainable, config.llm.shard)


def _reader(stage: StageName, context: RunContext) -> SessionReader:
    config, world, manifest = context.config, context.world, context.dataset.manifest
    language = stage not in RECOMMENDER_STAGES
    tokens = None if text_place(config, stage, language) == "none" else context.item_tokens
    collate: Collator = make_collator(config, context.catalogue, stage, language, tokens)
    return SessionReader(
        context.dataset.parts("train"),
        num_items=manifest.num_items,
        collate=collate,
        order=SamplingOrder(
            stage_settings(config, stage).batch_size,
            shuffle=True,
            seed=config.seed,
            augment_prefixes="train" in manifest.prefix_augmentation,
            max_prefixes_per_pass=_max_prefixes_per_pass(stage, config),
        ),
        shard=DataShard(world.rank, world.size, with_global_batch=collate.sampler is not None),
        prefetch=Prefetch(config.runtime.reader_workers, pin_memory=world.device.type == "cuda"),
    )


def _max_prefixes_per_pass(stage: StageName, config: Config) -> int:
    """Prefixes of a session encoded in one pass: the clicks that the encoder sees, or the nodes that a prompt shows."""
    if stage == "sbr" and config.sbr.one_pass:
        return config.encoder.max_clicks
    if stage == "text":
        return config.text.clicks
    if stage == "behave" and config.behave.one_pass:
        return config.prompt.max_nodes or sys.maxsize
    return 0


def _checkpoints(stage: StageName, context: RunContext, kind: str, keep: int) -> CheckpointManager:
    identity = Identity.of(stage, context.catalogue.features_hash, context.config, context.world.device)
    return CheckpointManager(context.run / "checkpoints" / stage / kind, keep, context.world, identity)
