"""What a run would do on given ranks, found without data, memory or a process group: models are built on meta.

Sizes are bytes unless named otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast, get_args

import torch
from torch import fx, nn
from torchrec.distributed.train_pipeline.tracing import Tracer
from torchrec.distributed.types import EmbeddingModuleShardingPlan, EnumerableShardingSpec, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from transformers import AutoModel, PreTrainedModel

from llmgr_rec.config import STAGES, Config, StageName
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.pretrained import RANDOM_TINY, decoder_config, load_decoder, resolve_dtype
from llmgr_rec.data.prompt_files import Task
from llmgr_rec.distributed.assembly import caches_catalogue
from llmgr_rec.distributed.decoder_shards import decoder_parameters
from llmgr_rec.distributed.sharding import Footprint, footprints, plan_tables
from llmgr_rec.errors import UserError
from llmgr_rec.modules.build import build_llmgr, build_recommender, build_task, check_parts, reads_item_text
from llmgr_rec.modules.groups import group_of, select_trainable
from llmgr_rec.modules.item_tables import ItemRows
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.prompts import CompiledPrompt
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.modules.text_reader import TextReader
from llmgr_rec.stage_config import RECOMMENDER_STAGES, StageConfig

FROZEN = "frozen"
_FLOAT_BYTES = 4
_CACHES = ("item_rows_VD", "rows_VD", "text_VH")
# A trained dense parameter has its value, its gradient and AdamW's two moments, all float32.
_TRAINED_BYTES = 4 * _FLOAT_BYTES


@dataclass(frozen=True)
class Sizes:
    """What is known of a catalogue.

    Args:
        num_items: Items.
        num_embeddings: Size of the vocabulary of each side feature.
    """

    num_items: int
    num_embeddings: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Ranks:
    """Where a run would take place.

    Args:
        size: Ranks in all.
        local_size: Ranks of one machine.
        device_type: `cpu` or `cuda`.
    """

    size: int
    local_size: int
    device_type: str


@dataclass(frozen=True)
class TableLayout:
    """Where one table lies.

    Args:
        footprint: Its size.
        sharding: Sharding type; empty where there is no plan.
        bytes_per_rank: Rows and optimizer state on each rank that holds a part.
    """

    footprint: Footprint
    sharding: str
    bytes_per_rank: dict[int, int]


@dataclass(frozen=True)
class StageLayout:
    """One stage on the ranks.

    Args:
        stage: Its name.
        tables: Its tables.
        problem: Why the tables cannot be laid out; empty where they can.
        parameters: Number of parameters outside of tables by group; what never trains or not in this stage is FROZEN.
        trained_groups: Groups that the stage trains.
        pipelined: Lookups that a training pipeline overlaps with computing.
        blocking: Lookups that it cannot overlap.
        dense_bytes: Memory of parameters outside of tables on every rank, gradients and optimizer state included; of a
            language model that is cut over the ranks, a rank's part.
        cached_bytes: Memory of the item vectors that a stage with frozen tables keeps on every rank.
        decoder_ranks: Ranks that the language model is cut over; 1 where each holds all of it, or there is none.
    """

    stage: str
    tables: list[TableLayout]
    problem: str
    parameters: dict[str, int]
    trained_groups: list[str]
    pipelined: list[str]
    blocking: list[str]
    dense_bytes: int
    cached_bytes: int
    decoder_ranks: int


def lay_out(config: Config, sizes: Sizes, ranks: Ranks) -> list[StageLayout]:
    """Plans every stage that the settings train.

    Args:
        config: All settings.
        sizes: The catalogue.
        ranks: Where the run would take place.

    Raises:
        UserError: Settings that do not go together, or a language model that is not to be had. Tables that do not fit
            are reported in the layout instead.
    """
    check_parts(config)
    settings: dict[StageName, StageConfig] = {stage: getattr(config, stage) for stage in STAGES}
    return [
        _lay_out_stage(stage, settings[stage], config, sizes, ranks)
        for stage in STAGES
        if stage == "sbr" or settings[stage].epochs
    ]


def _lay_out_stage(stage: StageName, settings: StageConfig, config: Config, sizes: Sizes, ranks: Ranks) -> StageLayout:
    task = build_task(stage, _meta_model(stage, settings, config, sizes), config)
    select_trainable(task, settings.trainable)
    decoder_ranks = ranks.size if config.llm.shard and any(True for _ in decoder_parameters(task)) else 1
    parameters, dense_bytes = _count(task, decoder_ranks)
    pipelined, blocking = _trace(task)

    def trained(name: str) -> bool:
        return group_of(name) in settings.trainable

    tables, problem = footprints(task, config.tables, trained), ""
    try:
        plan = plan_tables(task, config.tables, ranks.size, ranks.local_size, ranks.device_type, trained)
        layouts = [_table_layout(footprint, plan) for footprint in tables]
    except UserError as error:
        problem = str(error)
        layouts = [TableLayout(footprint, "", {}) for footprint in tables]
    groups = [str(group) for group in settings.trainable]
    cached_bytes = sum(buffer.numel() * _FLOAT_BYTES for name, buffer in task.named_buffers() if name.endswith(_CACHES))
    return StageLayout(
        stage, layouts, problem, parameters, groups, pipelined, blocking, dense_bytes, cached_bytes, decoder_ranks
    )


def _meta_model(stage: StageName, settings: StageConfig, config: Config, sizes: Sizes) -> SessionRecommender | LLMGR:
    if stage in RECOMMENDER_STAGES:
        text_encoder = _meta_text_encoder(config, sizes) if stage == "text" else None
        return build_recommender(config, sizes.num_items, sizes.num_embeddings, "meta", text_encoder).to("meta")
    # Only that the prompts are there matters for the layout, not what they say.
    prompts = {task: CompiledPrompt([0], ["nodes", "graph"]) for task in get_args(Task)}
    decoder = _meta_decoder(config)
    llmgr = build_llmgr(
        config,
        sizes.num_items,
        sizes.num_embeddings,
        decoder,
        prompts,
        settings.trainable,
        "meta",
        embedding_norm=1.0,
    )
    if caches_catalogue(config, sizes.num_items, stage):
        rows_VD = torch.empty(sizes.num_items, config.tables.dim, device="meta")
        width = llmgr.language_model.hidden_size
        text_VH = torch.empty(sizes.num_items, width, device="meta") if reads_item_text(config) else None
        llmgr.cache_catalogue(ItemRows(rows_VD, rows_VD, text_VH))
    return llmgr


def _meta_text_encoder(config: Config, sizes: Sizes) -> TextReader:
    decoder = _meta_decoder(config).float()
    width = decoder.get_input_embeddings().weight.shape[1]
    if config.text.dim > width:
        raise UserError(
            f"setting text.dim is {config.text.dim}, but {config.llm.name_or_path} has {width} columns; "
            f"give {width} at most"
        )
    texts = Jagged.empty(sizes.num_items)
    return TextReader(decoder, texts, config.text.dim, config.text.clicks, config.text.dropout)


def _meta_decoder(config: Config) -> PreTrainedModel:
    """The decoder without its weights."""
    dtype = resolve_dtype(config.llm.dtype)
    if config.llm.name_or_path == RANDOM_TINY:
        return load_decoder(RANDOM_TINY, config.llm.num_layers, config.llm.dtype).to("meta")
    settings = decoder_config(config.llm.name_or_path, config.llm.num_layers)
    with torch.device("meta"):
        return AutoModel.from_config(settings).to(dtype)


def _count(task: nn.Module, decoder_ranks: int) -> tuple[dict[str, int], int]:
    """Parameters outside of tables by group, and their memory on a rank that holds one of the decoder's parts."""
    counts: dict[str, int] = {}
    size = 0
    cut = set(decoder_parameters(task))
    for name, parameter in task.named_parameters():
        if "embedding_bags" in name.split("."):
            continue
        group = str(group_of(name)) if parameter.requires_grad else FROZEN
        counts[group] = counts.get(group, 0) + parameter.numel()
        held = -(-parameter.numel() // decoder_ranks) if parameter in cut else parameter.numel()
        size += held * (_TRAINED_BYTES if parameter.requires_grad else parameter.element_size())
    return counts, size


def _table_layout(footprint: Footprint, plan: ShardingPlan) -> TableLayout:
    path = footprint.parameter.rsplit(".embedding_bags.", 1)[0]
    parameter = cast(EmbeddingModuleShardingPlan, plan.plan[path])[footprint.table]
    spec = cast(EnumerableShardingSpec, parameter.sharding_spec)
    bytes_per_rank: dict[int, int] = {}
    for shard in spec.shards:
        rank = shard.placement.rank()
        share = shard.shard_sizes[0] * shard.shard_sizes[1] / (footprint.rows * footprint.dim)
        own = round(share * (footprint.weight_bytes + footprint.state_bytes))
        bytes_per_rank[rank] = bytes_per_rank.get(rank, 0) + own
    return TableLayout(footprint, parameter.sharding_type, bytes_per_rank)


def _trace(task: nn.Module) -> tuple[list[str], list[str]]:
    """Table lookups that TorchRec's pipeline can and cannot move ahead: their input must come straight from the batch.

    The same symbolic trace and rule as TorchRec's own, which needs the model sharded and ranks to shard it over.
    """
    collections = {name for name, module in task.named_modules() if isinstance(module, EmbeddingBagCollection)}
    graph = _LookupTracer(leaf_modules=_leaves(task)).trace(task)
    pipelined: list[str] = []
    blocking: list[str] = []
    for node in graph.nodes:
        if node.op == "call_module" and node.target in collections:
            (pipelined if all(_from_batch(argument) for argument in node.args) else blocking).append(str(node.target))
    return sorted(set(pipelined)), sorted(set(blocking))


class _LookupTracer(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, EmbeddingBagCollection) or super().is_leaf_module(m, module_qualified_name)


def _leaves(task: nn.Module) -> list[str]:
    """The largest modules that hold no tables."""

    def holds_tables(module: nn.Module) -> bool:
        return any(isinstance(part, EmbeddingBagCollection) for part in module.modules())

    leaves = []
    for name, module in task.named_modules():
        parent = task.get_submodule(name.rpartition(".")[0]) if name else None
        if parent is not None and holds_tables(parent) and not holds_tables(module):
            leaves.append(name)
    return leaves


def _from_batch(argument: object) -> bool:
    if not isinstance(argument, fx.Node):
        return False
    if argument.op == "placeholder":
        return True
    return argument.op == "call_function" and argument.target is getattr and _from_batch(argument.args[0])
