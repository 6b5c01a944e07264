"""Sharding: where each embedding table lies, under the constraints of the settings, and who updates it."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn, optim
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DataParallelWrapper, DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import KernelConfig, PlannerError, TopologyFactory, TrainerConfig
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    ShardingEnv,
    ShardingPlan,
    ShardingType,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad

from llmgr_rec.config import TablesConfig
from llmgr_rec.distributed.fsdp import fully_shard_decoders
from llmgr_rec.distributed.process_group import World
from llmgr_rec.errors import UserError

GIB = 1024**3
_FLOAT_BYTES = 4
# Ranks considered when a remedy is looked for.
_MOST_RANKS = 256
_OPTIMIZERS: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "adagrad": (optim.Adagrad, {"eps": 1e-8}),
    "rowwise_adagrad": (RowWiseAdagrad, {"eps": 1e-8}),
    "sgd": (optim.SGD, {}),
    "adam": (optim.Adam, {"eps": 1e-8}),
}
# Floats of optimizer state that a trained row of `dim` columns carries.
_STATE_FLOATS: dict[str, Callable[[int], int]] = {
    "adagrad": lambda dim: dim,
    "rowwise_adagrad": lambda dim: 1,
    "sgd": lambda dim: 0,
    "adam": lambda dim: 2 * dim,
}


@dataclass(frozen=True)
class Footprint:
    """Memory of one whole table.

    Args:
        table: Name in its collection.
        parameter: Qualified name of its parameter.
        rows: Rows.
        dim: Columns.
        weight_bytes: Bytes of the rows.
        state_bytes: Bytes of optimizer state.
    """

    table: str
    parameter: str
    rows: int
    dim: int
    weight_bytes: int
    state_bytes: int

    @property
    def gib(self) -> float:
        """Rows and state in GiB."""
        return (self.weight_bytes + self.state_bytes) / GIB


def footprints(module: nn.Module, tables: TablesConfig, trained: Callable[[str], bool]) -> list[Footprint]:
    """Memory of every table of a module's unsharded EmbeddingBagCollections; a frozen table has no state."""
    found = []
    for path, collection in module.named_modules():
        if not isinstance(collection, EmbeddingBagCollection):
            continue
        for config in collection.embedding_bag_configs():
            parameter = ".".join(filter(None, (path, "embedding_bags", config.name, "weight")))
            rows, dim = config.num_embeddings, config.embedding_dim
            state = _STATE_FLOATS[tables.optimizer](dim) * rows if trained(parameter) else 0
            found.append(Footprint(config.name, parameter, rows, dim, _FLOAT_BYTES * rows * dim, _FLOAT_BYTES * state))
    return found


def shard(
    module: nn.Module,
    tables: TablesConfig,
    world: World,
    trained: Callable[[str], bool],
    cut_decoders: bool = False,
) -> DistributedModelParallel:
    """Spreads a model over the ranks: tables are cut by plan, everything else that trains is data parallel.

    Every rank makes the same plan by itself, so a plan that cannot be made fails on all ranks at once.

    Args:
        module: The model, its embedding collections on the meta device or any other; `requires_grad` tells which
            other parameters train.
        tables: Sharding and optimizer of the tables. A table that its author has given an optimizer already
            (`apply_optimizer_in_backward`) keeps it.
        world: Ranks.
        trained: Whether a table trains, by the qualified name of its parameter; all others stay bit-identical.
        cut_decoders: Cut the language model over the ranks too, see `fully_shard_decoders`.

    Returns:
        The sharded model. Values of tables on the meta device are not yet set: see `shards.init_tables`.

    Raises:
        UserError: The tables cannot be laid out, or the language model cannot be cut; names the remedy.
    """
    plan = plan_tables(module, tables, world.size, world.local_size, world.device.type, trained)
    if tables.optimizer == "adam":
        # fbgemm registers the CPU gradient of its dense lookup in a way that torch warns of; the tests hold it to
        # torch's own Adam on unsharded tables.
        warnings.filterwarnings("ignore", message="fbgemm::dense_embedding_codegen_lookup_function: an autograd kernel")
    if cut_decoders:
        fully_shard_decoders(module, world)
    with _without_log():
        return DistributedModelParallel(
            module,
            device=world.device,
            plan=plan,
            sharders=[EmbeddingBagCollectionSharder()],
            data_parallel_wrapper=_TrainedDataParallel(),
        )


def plan_tables(
    module: nn.Module,
    tables: TablesConfig,
    world_size: int,
    local_size: int,
    device_type: str,
    trained: Callable[[str], bool],
) -> ShardingPlan:
    """Plans where the tables lie; needs no process group, and no memory where tables are on the meta device.

    Gives every table its optimizer on the way, because the optimizer's state counts in the plan.

    Args:
        module: Model with unsharded embedding collections.
        tables: Sharding and optimizer of the tables.
        world_size: Ranks.
        local_size: Ranks of one machine.
        device_type: `cpu` or `cuda`.
        trained: Whether a table trains, by the qualified name of its parameter.

    Raises:
        UserError: The tables cannot be laid out; names table and remedy.
    """
    sizes = footprints(module, tables, trained)
    for size in sizes:
        _check_width(size)
    dense = _attach_optimizers(module, tables, device_type, trained)
    try:
        with _without_log():
            planner = EmbeddingShardingPlanner(
                topology=_topology(tables, world_size, local_size, device_type),
                constraints={size.table: _constraints(size, tables, world_size, device_type) for size in sizes},
                storage_reservation=FixedPercentageStorageReservation(0.0),
                debug=False,
            )
            plan = planner.plan(module, [EmbeddingBagCollectionSharder()])
    except (PlannerError, RuntimeError) as error:
        raise UserError(_explain(error, sizes, tables, world_size)) from error
    _use_dense_kernel(plan, dense)
    return plan


def column_width(dim: int, world_size: int) -> int:
    """Columns of one column-wise shard: the narrowest divisor of `dim` that leaves no more shards than ranks.

    fbgemm reads rows in groups of 4 columns, so widths are multiples of 4.
    """
    widths = (width for width in range(4, dim + 1, 4) if dim % width == 0 and width * world_size >= dim)
    return next(widths, dim)


def _check_width(size: Footprint) -> None:
    if size.dim % 4:
        raise UserError(
            f"table {size.table} has {size.dim} columns, and tables need a multiple of 4; set --tables.dim to one"
        )


def _constraints(size: Footprint, tables: TablesConfig, world_size: int, device_type: str) -> ParameterConstraints:
    types = {
        "table_wise": [ShardingType.TABLE_WISE],
        "column_wise": [ShardingType.COLUMN_WISE],
        # Row-wise backward needs equal numbers of bags on all ranks where the collectives are gloo's. Replicated
        # tables (data_parallel) are left out everywhere: a checkpoint of them does not fit a sharded run.
        "auto": [ShardingType.TABLE_WISE, ShardingType.COLUMN_WISE]
        + ([ShardingType.ROW_WISE, ShardingType.TABLE_ROW_WISE] if device_type == "cuda" else []),
    }[tables.sharding]
    return ParameterConstraints(
        sharding_types=[kind.value for kind in types],
        compute_kernels=[EmbeddingComputeKernel.FUSED.value],
        min_partition=column_width(size.dim, world_size),
    )


def _topology(tables: TablesConfig, world_size: int, local_size: int, device_type: str) -> Topology:
    capacity = int(tables.memory_per_rank_gb * GIB)
    on_gpu = device_type == "cuda"
    return TopologyFactory.create_topology(
        TrainerConfig(
            world_size=world_size,
            local_world_size=local_size,
            hbm_cap_bytes=capacity if on_gpu else 0,
            ddr_cap_bytes=capacity,
        ),
        kernel_config=KernelConfig(compute_device=device_type),
    )


def _attach_optimizers(
    module: nn.Module, tables: TablesConfig, device_type: str, trained: Callable[[str], bool]
) -> set[str]:
    """Attaches fused optimizers to tables that have none; returns the names of those for a dense Adam instead."""
    kind, extra = _OPTIMIZERS[tables.optimizer]
    dense = set()
    for path, collection in module.named_modules():
        if not isinstance(collection, EmbeddingBagCollection):
            continue
        for name, parameter in collection.named_parameters():
            if hasattr(parameter, "_optimizer_classes"):
                continue
            # Sharding ignores requires_grad, and a table without optimizer would train with a default one:
            # a learning rate of 0 and no state is what keeps a table still.
            parameter.requires_grad_(True)
            qualified = f"{path}.{name}" if path else name
            if not trained(qualified):
                apply_optimizer_in_backward(optim.SGD, [parameter], {"lr": 0.0})
            elif tables.optimizer == "adam" and device_type == "cpu":
                # fbgemm's CPU kernels fuse SGD, Adagrad and row-wise Adagrad only.
                dense.add(qualified)
            else:
                apply_optimizer_in_backward(kind, [parameter], {"lr": tables.lr, **extra})
    return dense


@contextmanager
def _without_log() -> Iterator[None]:
    """TorchRec logs pages of advice, on a failed plan the whole module; what matters comes back as an exception."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _use_dense_kernel(plan: ShardingPlan, dense: set[str]) -> None:
    """Takes tables out of the fused kernel; the planner itself offers the dense one to replicated tables only."""
    for path, module_plan in plan.plan.items():
        for table, parameter_plan in cast(EmbeddingModuleShardingPlan, module_plan).items():
            if (f"{path}.embedding_bags" if path else "embedding_bags") + f".{table}.weight" in dense:
                parameter_plan.compute_kernel = EmbeddingComputeKernel.DENSE.value


def _explain(error: Exception, sizes: list[Footprint], tables: TablesConfig, world_size: int) -> str:
    largest = max(sizes, key=lambda size: size.gib)
    total = sum(size.gib for size in sizes)
    limit = tables.memory_per_rank_gb
    if total <= limit * world_size and largest.gib <= limit:
        return f"no sharding plan for tables.sharding {tables.sharding}: {' '.join(str(error).split())[:300]}"
    needed = _ranks_needed(sizes, tables, world_size)
    more = f"start {needed} ranks, " if needed else ""
    columns = "" if tables.sharding == "column_wise" else "set --tables.sharding column_wise, "
    return (
        f"table {largest.table} with {largest.rows} rows of {largest.dim} columns takes {largest.gib:.2g} GiB with its "
        f"optimizer state and all tables take {total:.2g} GiB, which {tables.sharding} sharding cannot lay on "
        f"{world_size} ranks of {limit:g} GiB; {more}{columns}take a smaller --tables.dim, or raise "
        "--tables.memory_per_rank_gb"
    )


def _ranks_needed(sizes: list[Footprint], tables: TablesConfig, world_size: int) -> int | None:
    """The smallest larger number of ranks on which the parts of the tables fit, the largest part first."""
    for ranks in range(world_size + 1, _MOST_RANKS + 1):
        parts = []
        for size in sizes:
            count = 1 if tables.sharding == "table_wise" else size.dim // column_width(size.dim, ranks)
            parts += [size.gib / count] * count
        loads = [0.0] * ranks
        for part in sorted(parts, reverse=True):
            loads[loads.index(min(loads))] += part
        # What passes through the tables takes some memory beside them.
        if max(loads) < 0.95 * tables.memory_per_rank_gb:
            return ranks
    return None


class _TrainedDataParallel(DataParallelWrapper):
    """Data parallelism of what trains whole; frozen parameters (a base language model) and buffers are left alone.

    TorchRec's own wrapper would broadcast the frozen base model over the network at every start.
    """

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        module = dmp._dmp_wrapped_module.to(device)
        dmp._dmp_wrapped_module = module
        sharded = set(DistributedModelParallel._sharded_parameter_names(module))
        sharded |= {name for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)}
        frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
        if not {name for name, _ in module.named_parameters()} - sharded - frozen:
            return
        buffers = {name for name, _ in module.named_buffers()}
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, sharded | frozen | buffers)
        dmp._dmp_wrapped_module = DistributedDataParallel(
            module,
            device_ids=None if device.type == "cpu" else [device],
            process_group=env.process_group,
            gradient_as_bucket_view=True,
            static_graph=True,
        )
