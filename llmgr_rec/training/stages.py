"""The stages of a run: build the model, load the weights of the previous stage, train, select on validation, export."""

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from llmgr_rec.config import Config, StageName
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.collate import ITEM_ID, Collator
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.domain_balance import DomainBalance
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.reader import DataShard, Prefetch, SamplingOrder, SessionReader
from llmgr_rec.distributed.collectives import broadcast_from_rank0
from llmgr_rec.distributed.process_group import World, report_progress
from llmgr_rec.distributed.ranking import RankingModel
from llmgr_rec.distributed.sharding import shard
from llmgr_rec.evaluation.protocol import evaluate_model
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.model_spec import LanguageParts, ModelSpec, Purpose
from llmgr_rec.modules.param_groups import param_group, select_trainable
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.modules.tasks import CONTRASTIVE_GROUP
from llmgr_rec.modules.text_sequence_encoder import TextSequenceEncoder
from llmgr_rec.stop_signals import StopSignals
from llmgr_rec.storage.bundle import load_weights
from llmgr_rec.storage.bundle_export import export_bundle
from llmgr_rec.storage.bundle_index import latest_bundle, read_config
from llmgr_rec.storage.catalog_mapping import CatalogMapping
from llmgr_rec.storage.checkpoint import CheckpointManager, Identity
from llmgr_rec.storage.finite_weights import require_finite
from llmgr_rec.storage.model_factory import ModelFactory
from llmgr_rec.storage.number_format import resolve_dtype
from llmgr_rec.storage.table_io import init_tables, zero_rows
from llmgr_rec.training.freed_memory import keep_freed_memory, return_freed_memory
from llmgr_rec.training.loop import Position, StageLoop
from llmgr_rec.training.metrics_logger import MetricsLogger
from llmgr_rec.training.optimizers import build_optimizer
from llmgr_rec.training.preflight import CheckedRun, RunRequest
from llmgr_rec.training.rank_memory import Reading
from llmgr_rec.training.remaining_time import RemainingTime, StageWork
from llmgr_rec.training.selection import Selection, select_on_validation, selection_passes
from llmgr_rec.training.text_embeddings import (
    TextEmbeddings,
    cache_catalog,
    embed_catalog,
    fill_text_table,
    refresh_item_vectors,
)
from llmgr_rec.training.warm_start import WarmStart

logger = logging.getLogger(__name__)

# Subfolder of a run that caches the nearest neighbors of its items.
_NEIGHBORS = "neighbors"
# Number of items from which the whitening of the text sequence encoder is estimated.
_WHITENING_ITEMS = 16_384


@dataclass(frozen=True)
class RunContext:
    """Inputs and services that all stages of a run share.

    Args:
        config: All settings.
        dataset: Prepared sessions.
        catalog: Their items.
        run: Run folder.
        world: Ranks.
        metrics: Logger of the metrics.
        resume: Whether to continue from the newest checkpoint, if there is one.
        factory: Builds the models.
        text_embeddings: Folder of text embeddings of the items.
        signals: Signals that ask the run to stop.
        stages: The stages to train, in their order.
        warm_start: The models that the stages start from; None for random weights.
    """

    config: Config
    dataset: Dataset
    catalog: Catalog
    run: Path
    world: World
    metrics: MetricsLogger
    resume: bool
    factory: ModelFactory
    text_embeddings: Path
    signals: StopSignals
    stages: Sequence[StageName]
    warm_start: WarmStart | None = None

    @classmethod
    def of(
        cls, request: RunRequest, checked: CheckedRun, world: World, metrics: MetricsLogger, signals: StopSignals
    ) -> Self:
        """The context of a run that has passed the preflight."""
        return cls(
            config=checked.config,
            dataset=checked.dataset,
            catalog=checked.catalog,
            run=request.output,
            world=world,
            metrics=metrics,
            resume=request.resume,
            factory=request.factory,
            text_embeddings=request.text_embeddings or request.output / "text_embeddings",
            signals=signals,
            stages=checked.stages,
            warm_start=checked.warm_start,
        )

    @cached_property
    def remaining(self) -> RemainingTime:
        """Estimates the time to the end of the run."""
        return RemainingTime({stage: self._work(stage) for stage in self.stages})

    def _work(self, stage: StageName) -> StageWork:
        spec = self.factory.spec(stage, self.config, self.catalog)
        settings, examples = self.config.stage(stage), Reading.of(self.dataset.manifest).examples(spec) or 0
        every = self.config.runtime.eval_every if _is_validated(spec, self.dataset) else 0
        return StageWork.of(settings, examples, every, selection_passes(stage, self.config))

    @property
    def export(self) -> Path:
        """Folder of the bundles."""
        return self.run / "export"

    @cached_property
    def item_tokens(self) -> Jagged:
        """Token ids of each item's text, one row per item, computed once for all stages."""
        return self.factory.item_tokens(self.config, self.catalog)

    @cached_property
    def mapping(self) -> CatalogMapping | None:
        """Rows of the tables of the models that the stages start from; all ranks ask for it together."""
        return self.warm_start.mapping(self.catalog, self.world) if self.warm_start else None


def run_stage(stage: StageName, context: RunContext) -> None:
    """Trains one stage, starting from the bundle of the previous one, and exports it to RUN/export/STAGE.

    Args:
        stage: The stage.
        context: The run; all ranks call together.

    Raises:
        UserError: A file, a setting or a checkpoint is not usable.
    """
    world = context.world
    report_progress(f"stage {stage}, start")
    keep_freed_memory()
    spec = context.factory.spec(stage, _with_selected_smoothing(stage, context), context.catalog)
    task, model = _build(spec, context)
    ranking = RankingModel(
        model,
        _collator(spec, "rank", context),
        spec.config.runtime.eval_batch_size,
        domains=context.catalog.domains,
    )

    def validate() -> dict[str, float]:
        require_finite(model, stage, position.step, world)
        refresh_item_vectors(model, world)
        # The temporary tensors of the steps have other sizes than those of the ranking, and the other way round.
        return_freed_memory()
        metrics = evaluate_model(ranking, context.dataset, "valid", world, context.catalog.train_count_V)
        return_freed_memory()
        return metrics

    loop = StageLoop(
        name=stage,
        model=task,
        optimizer=build_optimizer(task, spec.config.stage(stage), spec.config),
        reader=_reader(spec, context),
        settings=spec.config.stage(stage),
        warmup=spec.config.optimizer.warmup,
        average=spec.average,
        runtime=spec.config.runtime,
        seed=spec.config.seed,
        world=world,
        metrics=context.metrics,
        checkpoints=_checkpoints(spec, context, "steps", spec.config.runtime.keep_checkpoints),
        best=_checkpoints(spec, context, "best", 1),
        validate=validate if _is_validated(spec, context.dataset) else None,
        remaining=context.remaining,
        signals=context.signals,
    )
    position = _start(loop, context)
    step = loop.run(position)
    # With the mean of the weights, which the selection does not need.
    del loop
    _free_memory_of_steps(task)
    require_finite(model, stage, step, world)
    refresh_item_vectors(model, world)
    # After the last checkpoint, so that a resumed run repeats it.
    selection = select_on_validation(
        stage, ranking, spec.config, context.dataset, context.catalog, world, context.run / _NEIGHBORS
    )
    return_freed_memory()
    _export(model, selection, step, spec, context)
    if selection.metrics:
        # After the export: a run that is killed before it selects and logs again when it is resumed.
        context.metrics.write(stage, position.step, split="selection", **selection.metrics)
    if world.rank == 0:
        logger.info("stage %s is complete: %s", stage, context.export / stage)


def _free_memory_of_steps(task: DistributedModelParallel) -> None:
    task.zero_grad(set_to_none=True)
    # Pipeline and optimizers are in cycles.
    gc.collect()
    return_freed_memory()


def _export(
    model: SessionRecommender | LLMGR, selection: Selection, step: int, spec: ModelSpec, context: RunContext
) -> None:
    """Writes the bundle of a stage, with what was selected on validation.

    Args:
        model: The model with the weights of the step.
        selection: Smoothing strength and blend.
        step: Step of the weights.
        spec: The stage.
        context: The run; all ranks call together.
    """
    export_bundle(
        model,
        spec.stage,
        replace(spec.config, tables=replace(spec.config.tables, knn_smoothing=[selection.smoothing])),
        context.catalog,
        context.export / spec.stage,
        context.world,
        context.dataset.manifest,
        selection.blend,
        context.factory,
        step,
    )


def _with_selected_smoothing(stage: StageName, context: RunContext) -> Config:
    """The settings; in stages after sbr with the one smoothing strength that was selected there."""
    config = context.config
    if stage == "sbr":
        return config
    selected = read_config(latest_bundle(context.export)).tables.knn_smoothing
    return replace(config, tables=replace(config.tables, knn_smoothing=selected))


def _build(spec: ModelSpec, context: RunContext) -> tuple[DistributedModelParallel, SessionRecommender | LLMGR]:
    """The stage's task, sharded across ranks, with its initial weights, and the model in it."""
    config, world, factory = spec.config, context.world, context.factory
    language = factory.language_parts(spec, context.catalog, world.device)
    # Before the model is built, which adds LoRA layers to the decoder.
    embeddings = _embed_items(language, spec, context) if language and spec.head_has_text else None
    model = factory.build(spec, language, "meta")
    if isinstance(model, SessionRecommender) and model.text_encoder is not None:
        _whiten(model.text_encoder, spec, world)
    loss_dtype = resolve_dtype(config.loss.dtype, world.device)
    features = _collator(spec, "train", context).side_features if spec.looks_up_whole_tables else None
    task = spec.build_task(model, world.size, loss_dtype, features)
    select_trainable(task, spec.trains)
    sharded = shard(task, config.tables, world, lambda name: param_group(name) in spec.trains, config.llm.fsdp)
    if spec.stage == "sbr":
        init_tables(sharded, config.seed, config.tables.init_std)
        if context.warm_start and context.mapping:
            context.warm_start.load_recommender(model, context.mapping)
    else:
        new = load_weights(model, latest_bundle(context.export))
        if context.warm_start and context.mapping:
            new = context.warm_start.load_missing(model, spec.stage, new, context.mapping)
        if isinstance(model, LLMGR) and "lora" not in spec.trains and any("lora_" in name for name in new):
            # Initial LoRA weights add zero, and no step of this stage changes them.
            model.language_model.leave_out_lora()
    if spec.encodes_text and not any(config.tables.knn_smoothing):
        # Without smoothing, id rows of items without training clicks still have their random initial values.
        zero_rows(sharded, ITEM_ID, context.catalog.train_count_V == 0)
    if embeddings is not None:
        fill_text_table(sharded, embeddings.read)
    if isinstance(model, LLMGR) and spec.caches_catalog:
        cache_catalog(model, _collator(spec, "rank", context), world.device, loss_dtype)
    if spec.stage == "align":
        _warn_of_small_groups(config, world)
    return sharded, model


def _embed_items(language: LanguageParts, spec: ModelSpec, context: RunContext) -> TextEmbeddings:
    weights_hash = context.factory.decoder_hash(spec.config)
    return embed_catalog(language.decoder, context.item_tokens, context.world, context.text_embeddings, weights_hash)


def _whiten(text_encoder: TextSequenceEncoder, spec: ModelSpec, world: World) -> None:
    """Estimates the whitening from a sample of items; broadcast, because processors may round differently."""
    generator = torch.Generator().manual_seed(spec.config.seed)
    items: Tensor = torch.randperm(spec.num_items, generator=generator)[:_WHITENING_ITEMS]
    text_encoder.whiten(items)
    for statistic in (text_encoder.mean_H, text_encoder.map_HK):
        broadcast_from_rank0(statistic, world)


def _warn_of_small_groups(config: Config, world: World) -> None:
    sessions = config.align.batch_size // world.size
    if world.rank == 0 and config.contrast.weight and world.size > 1 and sessions % CONTRASTIVE_GROUP:
        logger.warning(
            "align: %d sessions per rank and batch are not a multiple of the contrastive group of %d, so some sessions "
            "have fewer negatives than on one rank; set --align.batch_size %d",
            sessions,
            CONTRASTIVE_GROUP,
            CONTRASTIVE_GROUP * world.size,
        )


def _reader(spec: ModelSpec, context: RunContext) -> SessionReader:
    config, world, manifest = spec.config, context.world, context.dataset.manifest
    collate = _collator(spec, "train", context)
    if spec.looks_up_whole_tables:
        collate = collate.with_table_rows()
    return SessionReader(
        context.dataset.parts("train"),
        num_items=manifest.num_items,
        collate=collate,
        order=SamplingOrder(
            batch_size=config.stage(spec.stage).batch_size,
            shuffle=True,
            seed=config.seed,
            augment_prefixes="train" in manifest.prefix_augmentation,
            max_prefixes_per_pass=spec.max_prefixes_per_pass,
            whole_rows=spec.stage != "sbr",
        ),
        shard=DataShard(
            world.rank,
            world.size,
            with_global_batch=collate.sampler is not None,
            balanced=spec.balances_clicks,
        ),
        prefetch=Prefetch(config.runtime.reader_workers, pin_memory=world.device.type == "cuda"),
        balance=_balance(config, context.catalog),
    )


def _balance(config: Config, catalog: Catalog) -> DomainBalance | None:
    if catalog.domains is None or config.domains.power == 1:
        return None
    return DomainBalance(catalog.domains, config.domains.power)


def _collator(spec: ModelSpec, purpose: Purpose, context: RunContext) -> Collator:
    tokens = None if spec.prompt_text_source(purpose) == "none" else context.item_tokens
    return context.factory.collator(spec, context.catalog, purpose, tokens)


def _is_validated(spec: ModelSpec, dataset: Dataset) -> bool:
    """Whether training is validated; not in stage align, whose task is not next-item ranking."""
    return spec.stage != "align" and dataset.manifest.num_sessions["valid"] > 0


def _checkpoints(spec: ModelSpec, context: RunContext, kind: str, keep: int) -> CheckpointManager:
    identity = Identity.of(
        spec.stage, context.catalog.features_hash, context.config, context.world.device, context.factory.name
    )
    return CheckpointManager(context.run / "checkpoints" / spec.stage / kind, keep, context.world, identity)


def _start(loop: StageLoop, context: RunContext) -> Position:
    """The position where training starts: the newest checkpoint of a resumed run, or the first step."""
    if context.resume:
        return loop.resume()
    # An earlier run may have been killed before its first checkpoint, with records in the log.
    context.metrics.rewind(loop.name, -1)
    return Position()
