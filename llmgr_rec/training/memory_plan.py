"""Memory plan of a run on given ranks. Models are built on the meta device, without data or a process group.

Sizes are in bytes unless stated otherwise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self, cast

import torch
from torch import fx, nn
from torchrec.distributed.train_pipeline.tracing import Tracer
from torchrec.distributed.types import EmbeddingModuleShardingPlan, EnumerableShardingSpec, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from llmgr_rec.config import Config, StageName, trained_stages
from llmgr_rec.data.catalog_columns import memory_of_columns, memory_of_ids
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed.fsdp import decoder_parameters
from llmgr_rec.distributed.sharding import Footprint, footprints, plan_tables
from llmgr_rec.errors import UserError
from llmgr_rec.modules.item_tables import ItemRows
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.model_spec import LanguageParts, ModelSpec, query_width
from llmgr_rec.modules.param_groups import param_group, select_trainable
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.storage.model_factory import meta_language_parts
from llmgr_rec.storage.number_format import resolve_dtype

FROZEN = "frozen"
_FLOAT_BYTES = 4
_CACHES = ("item_rows_VD", "rows_VD", "text_VH")
# Value, gradient and two AdamW moments of a trained dense parameter, all float32.
_TRAINED_BYTES = 4 * _FLOAT_BYTES


@dataclass(frozen=True)
class CatalogSizes:
    """Sizes of a catalog.

    Args:
        num_items: Number of items.
        num_embeddings: Vocabulary size of each side feature.
        catalog_bytes: Memory of its columns without the ids; 0 if it is not known.
        id_bytes: Memory of the ids; 0 if it is not known.
    """

    num_items: int
    num_embeddings: Mapping[str, int] = field(default_factory=dict)
    catalog_bytes: int = 0
    id_bytes: int = 0

    @classmethod
    def of(cls, dataset: Dataset) -> Self:
        """Sizes of the catalog of a data set, from its manifest and the footer of its items.

        Args:
            dataset: The data set.

        Raises:
            UserError: The file of the items is not readable.
        """
        manifest = dataset.manifest
        sizes = {name: feature["num_embeddings"] for name, feature in manifest.features.items()}
        file = dataset.items_path
        return cls(manifest.num_items, sizes, memory_of_columns(file, list(sizes)), memory_of_ids(file))


@dataclass(frozen=True)
class Ranks:
    """Ranks of a run.

    Args:
        size: Number of ranks.
        local_size: Ranks per machine.
        device_type: `cpu` or `cuda`.
    """

    size: int
    local_size: int
    device_type: str


@dataclass(frozen=True)
class TablePlan:
    """Placement of one table.

    Args:
        footprint: Its size.
        sharding: TorchRec sharding type; empty if there is no feasible plan.
        bytes_per_rank: Weights and optimizer state on each rank that has a shard.
    """

    footprint: Footprint
    sharding: str
    bytes_per_rank: dict[int, int]


@dataclass(frozen=True)
class StagePlan:
    """Plan of one stage.

    Args:
        spec: The stage's model.
        tables: Its tables.
        problem: Why there is no feasible sharding of the tables; empty if there is one.
        parameters: Number of dense parameters by parameter group; those that do not train in this stage are FROZEN.
        pipelined: Table lookups that the training pipeline overlaps with computation.
        blocking: Table lookups that it cannot overlap.
        dense_bytes: Memory of the dense parameters on each rank, gradients and optimizer state included; of a language
            model that is sharded across ranks, one shard.
        cached_bytes: Memory of the cached item vectors on each rank.
        averaged_bytes: Memory of the mean of the weights on the rank that has most of it.
        query_width: Number of columns of queries and item vectors in ranking.
        hidden_size: Width of the language model; 0 without one.
        decoder_ranks: Number of ranks that the language model is sharded across; 1 if it is replicated or absent.
    """

    spec: ModelSpec
    tables: list[TablePlan]
    problem: str
    parameters: dict[str, int]
    pipelined: list[str]
    blocking: list[str]
    dense_bytes: int
    cached_bytes: int
    averaged_bytes: int
    query_width: int
    hidden_size: int
    decoder_ranks: int

    @property
    def bytes_per_rank(self) -> dict[int, int]:
        """Weights and optimizer state of all tables on each rank that has a shard."""
        totals: dict[int, int] = {}
        for table in self.tables:
            for rank, table_bytes in table.bytes_per_rank.items():
                totals[rank] = totals.get(rank, 0) + table_bytes
        return totals


def plan_memory(
    config: Config, sizes: CatalogSizes, ranks: Ranks, stages: Sequence[StageName] | None = None
) -> list[StagePlan]:
    """Plans the stages of a run.

    Args:
        config: All settings.
        sizes: The catalog.
        ranks: Ranks of the run.
        stages: Stages to plan; None plans all that the settings train.

    Raises:
        UserError: Settings conflict, or the language model is not available. Tables that do not fit are reported in
            `StagePlan.problem` instead.
    """
    return [
        _plan_stage(ModelSpec(stage, config, sizes.num_items, sizes.num_embeddings), ranks)
        for stage in (trained_stages(config) if stages is None else stages)
    ]


def _plan_stage(spec: ModelSpec, ranks: Ranks) -> StagePlan:
    config = spec.config
    language = meta_language_parts(spec)
    model = _meta_model(spec, language)
    task = spec.build_task(model)
    select_trainable(task, spec.trains)
    decoder_ranks = ranks.size if config.llm.fsdp and any(True for _ in decoder_parameters(task)) else 1
    parameters, dense_bytes = _count(task, decoder_ranks)
    pipelined, blocking = _trace(task)

    def trained(name: str) -> bool:
        return param_group(name) in spec.trains

    tables, problem = footprints(task, config.tables, trained), ""
    try:
        plan = plan_tables(task, config.tables, ranks.size, ranks.local_size, ranks.device_type, trained)
        table_plans = [_table_plan(footprint, plan) for footprint in tables]
    except UserError as error:
        problem = str(error)
        table_plans = [TablePlan(footprint, "", {}) for footprint in tables]
    cached = (buffer for name, buffer in task.named_buffers() if name.endswith(_CACHES))
    return StagePlan(
        spec=spec,
        tables=table_plans,
        problem=problem,
        parameters=parameters,
        pipelined=pipelined,
        blocking=blocking,
        dense_bytes=dense_bytes,
        cached_bytes=sum(buffer.nbytes for buffer in cached),
        averaged_bytes=_averaged_bytes(spec, table_plans, parameters),
        query_width=query_width(model),
        hidden_size=0 if language is None else language.decoder.config.get_text_config(decoder=True).hidden_size,
        decoder_ranks=decoder_ranks,
    )


def _meta_model(spec: ModelSpec, language: LanguageParts | None) -> SessionRecommender | LLMGR:
    # Parameters of a row an item, such as those of the linear head, are not allocated either.
    with torch.device("meta"):
        model = spec.build(language, "meta").to("meta")
    if isinstance(model, LLMGR) and spec.caches_catalog:
        rows_VD = torch.empty(spec.num_items, spec.config.tables.dim, device="meta")
        width = model.language_model.hidden_size
        texts_VH = torch.empty(spec.num_items, width, device="meta") if spec.head_has_text else None
        model.cache_catalog(ItemRows(rows_VD, rows_VD, texts_VH), resolve_dtype(spec.config.loss.dtype))
    return model


def _count(task: nn.Module, decoder_ranks: int) -> tuple[dict[str, int], int]:
    """Number of dense parameters by group, and their memory on one rank; the decoder is sharded across its ranks."""
    counts: dict[str, int] = {}
    size = 0
    sharded = set(decoder_parameters(task))
    for name, parameter in task.named_parameters():
        if "embedding_bags" in name.split("."):
            continue
        group = str(param_group(name)) if parameter.requires_grad else FROZEN
        counts[group] = counts.get(group, 0) + parameter.numel()
        local = -(-parameter.numel() // decoder_ranks) if parameter in sharded else parameter.numel()
        size += local * (_TRAINED_BYTES if parameter.requires_grad else parameter.element_size())
    return counts, size


def _averaged_bytes(spec: ModelSpec, tables: Sequence[TablePlan], parameters: Mapping[str, int]) -> int:
    """Memory of the mean of the weights, float32, on the rank that has most of it."""
    if not spec.average:
        return 0
    values: dict[int, float] = {}
    for table in tables:
        size = table.footprint
        for rank, table_bytes in table.bytes_per_rank.items():
            share = table_bytes / (size.weight_bytes + size.state_bytes)
            values[rank] = values.get(rank, 0.0) + share * size.rows * size.dim
    dense = sum(number for group, number in parameters.items() if group != FROZEN)
    return _FLOAT_BYTES * round(max(values.values(), default=0.0) + dense)


def _table_plan(footprint: Footprint, plan: ShardingPlan) -> TablePlan:
    path = footprint.parameter.rsplit(".embedding_bags.", 1)[0]
    parameter = cast(EmbeddingModuleShardingPlan, plan.plan[path])[footprint.table]
    spec = cast(EnumerableShardingSpec, parameter.sharding_spec)
    bytes_per_rank: dict[int, int] = {}
    for shard in spec.shards:
        rank = shard.placement.rank()
        share = shard.shard_sizes[0] * shard.shard_sizes[1] / (footprint.rows * footprint.dim)
        shard_bytes = round(share * (footprint.weight_bytes + footprint.state_bytes))
        bytes_per_rank[rank] = bytes_per_rank.get(rank, 0) + shard_bytes
    return TablePlan(footprint, parameter.sharding_type, bytes_per_rank)


def _trace(task: nn.Module) -> tuple[list[str], list[str]]:
    """Table lookups that TorchRec's pipeline can overlap, because their input is an attribute of the batch, and others.

    The symbolic trace and the rule are those of TorchRec, which applies them only to sharded models.
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
    """The largest modules that contain no tables."""

    def contains_tables(module: nn.Module) -> bool:
        return any(isinstance(part, EmbeddingBagCollection) for part in module.modules())

    leaves = []
    for name, module in task.named_modules():
        parent = task.get_submodule(name.rpartition(".")[0]) if name else None
        if parent is not None and contains_tables(parent) and not contains_tables(module):
            leaves.append(name)
    return leaves


def _from_batch(argument: object) -> bool:
    if not isinstance(argument, fx.Node):
        return False
    if argument.op == "placeholder":
        return True
    return argument.op == "call_function" and argument.target is getattr and _from_batch(argument.args[0])
