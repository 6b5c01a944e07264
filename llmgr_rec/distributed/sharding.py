"""Sharding of embedding tables across ranks with TorchRec, and their fused optimizers."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn, optim
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fused_embeddingbag import FusedEmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DataParallelWrapper, DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import KernelConfig, PlannerError, TopologyFactory, TrainerConfig
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    ModuleSharder,
    ShardedModule,
    ShardingEnv,
    ShardingPlan,
    ShardingType,
)
from torchrec.distributed.utils import optimizer_type_to_emb_opt_type
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, DataType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad

from llmgr_rec.config import TablesConfig
from llmgr_rec.distributed.fsdp import fully_shard_decoders
from llmgr_rec.distributed.process_group import World
from llmgr_rec.errors import UserError

GIB = 1024**3
_FLOAT_BYTES = 4
_WEIGHT_TYPES = {"float32": (torch.float32, DataType.FP32), "float16": (torch.float16, DataType.FP16)}
# Largest number of ranks that an error message suggests.
_MAX_RANKS = 256
_OPTIMIZERS: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "adagrad": (optim.Adagrad, {"eps": 1e-8}),
    "rowwise_adagrad": (RowWiseAdagrad, {"eps": 1e-8}),
    "sgd": (optim.SGD, {}),
    "adam": (optim.Adam, {"eps": 1e-8}),
}
# Floats of optimizer state per trained row of `dim` columns.
_STATE_FLOATS: dict[str, Callable[[int], int]] = {
    "adagrad": lambda dim: dim,
    "rowwise_adagrad": lambda dim: 1,
    "sgd": lambda dim: 0,
    "adam": lambda dim: 2 * dim,
}


_COLLECTIONS = (EmbeddingBagCollection, EmbeddingCollection, FusedEmbeddingBagCollection)
# Submodules of collections that have the tables.
_FOLDERS = ("embedding_bags", "embeddings")


@dataclass(frozen=True)
class Footprint:
    """Memory of an embedding table, all shards together.

    Args:
        table: Name of the table in its collection.
        parameter: Qualified name of the table's parameter.
        rows: Number of rows.
        dim: Number of columns.
        weight_bytes: Bytes of the weights.
        state_bytes: Bytes of the optimizer state.
    """

    table: str
    parameter: str
    rows: int
    dim: int
    weight_bytes: int
    state_bytes: int

    @property
    def gib(self) -> float:
        """Memory of weights and optimizer state, in GiB."""
        return (self.weight_bytes + self.state_bytes) / GIB


def footprints(module: nn.Module, tables: TablesConfig, trained: Callable[[str], bool]) -> list[Footprint]:
    """Memory of each table in the unsharded collections of a module. Frozen tables have no optimizer state.

    Args:
        module: The model; its tables may be on the meta device.
        tables: Optimizer of the tables.
        trained: Whether a table trains, by the qualified name of its parameter.
    """
    found = []
    weight_bytes = _WEIGHT_TYPES[tables.dtype][0].itemsize
    for path, collection in _collections(module):
        folder, configs = _tables_of(collection)
        for config in configs:
            parameter = ".".join(filter(None, (path, folder, config.name, "weight")))
            rows, dim = config.num_embeddings, config.embedding_dim
            state = _STATE_FLOATS[tables.optimizer](dim) * rows if trained(parameter) else 0
            found.append(Footprint(config.name, parameter, rows, dim, weight_bytes * rows * dim, _FLOAT_BYTES * state))
    return found


def shard(
    module: nn.Module,
    tables: TablesConfig,
    world: World,
    trained: Callable[[str], bool],
    use_fsdp: bool = False,
) -> DistributedModelParallel:
    """Distributes a model across ranks: tables are sharded, other trained parameters are data parallel.

    Tables are those of each EmbeddingBagCollection, EmbeddingCollection and FusedEmbeddingBagCollection. Each rank
    computes the same plan, so all ranks fail if there is none.

    Args:
        module: The model; its embedding collections may be on the meta device. `requires_grad` states which of the
            other parameters train.
        tables: Sharding and optimizer of the tables. A table that already has an optimizer
            (`apply_optimizer_in_backward`) keeps it.
        world: This process and the world size. All ranks must call this.
        trained: Whether a table trains, by the qualified name of its parameter; all others stay bit-identical.
        use_fsdp: Whether the language model is sharded, too; see `fully_shard_decoders`.

    Returns:
        The sharded model. Tables that were on the meta device are not initialized; see `table_io.init_tables`.

    Raises:
        UserError: There is no sharding plan for the tables, the language model cannot be sharded, or the model has
            another embedding module of TorchRec, or one that is sharded already.
    """
    plan = plan_tables(module, tables, world.size, world.local_size, world.device.type, trained)
    if tables.optimizer == "adam":
        # Torch warns of the way in which fbgemm registers the CPU gradient of its dense lookup. Tests compare the
        # result with torch.optim.Adam on unsharded tables.
        warnings.filterwarnings("ignore", message="fbgemm::dense_embedding_codegen_lookup_function: an autograd kernel")
    if use_fsdp:
        fully_shard_decoders(module, world)
    with _without_log():
        return DistributedModelParallel(
            module,
            device=world.device,
            plan=plan,
            sharders=_sharders(),
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
    """Computes the sharding plan of the tables. Needs no process group, and no memory for tables on the meta device.

    Attaches an optimizer to each table, because the plan includes the memory of its state.

    Args:
        module: Model with unsharded embedding collections.
        tables: Sharding and optimizer of the tables.
        world_size: Number of ranks.
        local_size: Number of ranks per machine.
        device_type: `cpu` or `cuda`.
        trained: Whether a table trains, by the qualified name of its parameter.

    Raises:
        UserError: The tables do not fit into the memory of the ranks, a table's width is not a multiple of 4, or the
            model has an embedding module that cannot be sharded.
    """
    _refuse_other_modules(module)
    sizes = footprints(module, tables, trained)
    for size in sizes:
        _check_width(size)
    _set_dtype(module, tables, device_type)
    dense = _attach_optimizers(module, tables, device_type, trained)
    try:
        with _without_log():
            planner = EmbeddingShardingPlanner(
                topology=_topology(tables, world_size, local_size, device_type),
                constraints={size.table: _constraints(size, tables, world_size, device_type) for size in sizes},
                storage_reservation=FixedPercentageStorageReservation(0.0),
                debug=False,
            )
            plan = planner.plan(module, _sharders())
    except (PlannerError, RuntimeError) as error:
        raise UserError(_explain(error, sizes, tables, world_size)) from error
    _use_dense_kernel(plan, dense)
    return plan


def _collections(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of each collection that is sharded."""
    return ((path, part) for path, part in module.named_modules() if isinstance(part, _COLLECTIONS))


def _tables_of(collection: nn.Module) -> tuple[str, Sequence[BaseEmbeddingConfig]]:
    """Name of the submodule that has the tables of a collection, and their configs."""
    if isinstance(collection, EmbeddingCollection):
        return "embeddings", collection.embedding_configs()
    assert isinstance(collection, EmbeddingBagCollection | FusedEmbeddingBagCollection)
    return "embedding_bags", collection.embedding_bag_configs()


def _refuse_other_modules(module: nn.Module) -> None:
    """Checks that the model has no embedding modules of TorchRec but those that are sharded.

    Others (such as those with managed collisions or feature processors) have a collection inside, which must not be
    sharded without them.
    """
    for path, part in module.named_modules():
        if isinstance(part, _COLLECTIONS) or not type(part).__module__.startswith("torchrec."):
            continue
        if isinstance(part, ShardedModule):
            raise UserError(f"{path} is a {type(part).__name__}, sharded already; give the model before it is sharded")
        if any(isinstance(inner, _COLLECTIONS) for inner in part.modules()) or hasattr(part, "embedding_configs"):
            raise UserError(
                f"{path} is a {type(part).__name__}, which shard does not support; use TorchRec's "
                "DistributedModelParallel with a planner of your own"
            )


def column_width(dim: int, world_size: int) -> int:
    """Columns of a column-wise shard: the smallest divisor of `dim` that gives no more shards than ranks.

    It is a multiple of 4, because fbgemm processes rows in groups of 4 columns.
    """
    widths = (width for width in range(4, dim + 1, 4) if dim % width == 0 and width * world_size >= dim)
    return next(widths, dim)


def _check_width(size: Footprint) -> None:
    if size.dim % 4:
        raise UserError(
            f"table {size.table} has {size.dim} columns, which is not a multiple of 4; set --tables.dim to one"
        )


def _constraints(size: Footprint, tables: TablesConfig, world_size: int, device_type: str) -> ParameterConstraints:
    types = {
        "table_wise": [ShardingType.TABLE_WISE],
        "column_wise": [ShardingType.COLUMN_WISE],
        # With gloo, the row-wise backward needs equal numbers of bags on all ranks. Replicated tables (data_parallel)
        # are never planned, because their checkpoints cannot be loaded into sharded tables.
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


def _sharders() -> list[ModuleSharder[nn.Module]]:
    # The optimizer of tables that have none. SGD with a learning rate of 0 has no state and leaves a table unchanged.
    frozen = {"optimizer": optimizer_type_to_emb_opt_type(optim.SGD), "learning_rate": 0.0}
    sharders = [
        EmbeddingBagCollectionSharder(fused_params=frozen),
        EmbeddingCollectionSharder(fused_params=frozen),
        FusedEmbeddingBagCollectionSharder(),
    ]
    return [cast(ModuleSharder[nn.Module], sharder) for sharder in sharders]


def _set_dtype(module: nn.Module, tables: TablesConfig, device_type: str) -> None:
    """Gives tables their number format, before they get an optimizer. Lookups return float32 once they are sharded."""
    dtype, data_type = _WEIGHT_TYPES[tables.dtype]
    if dtype == torch.float32:
        return
    if tables.optimizer == "adam" and device_type == "cpu":
        raise UserError(
            "setting tables.dtype is float16, but on a CPU the optimizer adam is not fused and would keep its state in "
            "float16, too; set tables.optimizer to adagrad or rowwise_adagrad, or tables.dtype to float32"
        )
    for _, collection in _collections(module):
        folder, configs = _tables_of(collection)
        for config in configs:
            config.data_type = data_type
            weight = getattr(collection, folder)[config.name].weight
            # Keeps the parameter, which may have an optimizer.
            weight.data = weight.data.to(dtype)


def _attach_optimizers(
    module: nn.Module, tables: TablesConfig, device_type: str, trained: Callable[[str], bool]
) -> set[str]:
    """Attaches fused optimizers to trained tables without one; returns those that need a dense Adam instead."""
    kind, extra = _OPTIMIZERS[tables.optimizer]
    dense = set()
    for path, collection in _collections(module):
        for name, parameter in collection.named_parameters():
            qualified = f"{path}.{name}" if path else name
            if isinstance(collection, FusedEmbeddingBagCollection):
                if not trained(qualified):
                    raise UserError(
                        f"table {qualified} is to stay as it is, but a FusedEmbeddingBagCollection trains its tables; "
                        "use an EmbeddingBagCollection"
                    )
                continue
            if hasattr(parameter, "_optimizer_classes"):
                continue
            # TorchRec ignores requires_grad; see `_sharders` for tables that do not train.
            parameter.requires_grad_(True)
            if not trained(qualified):
                continue
            if tables.optimizer == "adam" and device_type == "cpu":
                # The CPU kernels of fbgemm fuse only SGD, Adagrad and row-wise Adagrad.
                dense.add(qualified)
            else:
                # Imported here, because scoring does not need it, and it compiles optimizers on import.
                from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

                apply_optimizer_in_backward(kind, [parameter], {"lr": tables.lr, **extra})
    return dense


@contextmanager
def _without_log() -> Iterator[None]:
    """Disables logging: TorchRec logs long advice and, if planning fails, the whole module. Errors are exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _use_dense_kernel(plan: ShardingPlan, dense: set[str]) -> None:
    """Switches tables of a plan to the dense kernel, which the planner allows for replicated tables only."""
    for path, module_plan in plan.plan.items():
        for table, parameter_plan in cast(EmbeddingModuleShardingPlan, module_plan).items():
            names = {".".join(filter(None, (path, folder, table, "weight"))) for folder in _FOLDERS}
            if names & dense:
                parameter_plan.compute_kernel = EmbeddingComputeKernel.DENSE.value


def _explain(error: Exception, sizes: list[Footprint], tables: TablesConfig, world_size: int) -> str:
    largest = max(sizes, key=lambda size: size.gib)
    total = sum(size.gib for size in sizes)
    limit = tables.memory_per_rank_gb
    if total <= limit * world_size and largest.gib <= limit:
        return f"no sharding plan for tables.sharding {tables.sharding}: {' '.join(str(error).split())[:300]}"
    ranks = _ranks_needed(sizes, tables, world_size)
    more_ranks = f"start {ranks} ranks, " if ranks else ""
    columns = "" if tables.sharding == "column_wise" else "set --tables.sharding column_wise, "
    return (
        f"table {largest.table} with {largest.rows} rows of {largest.dim} columns takes {_rounded(largest.gib)} GiB "
        f"with its optimizer state and all tables take {_rounded(total)} GiB, which {tables.sharding} sharding cannot "
        f"place on {world_size} ranks of {limit:g} GiB; {more_ranks}{columns}take a smaller --tables.dim, or raise "
        "--tables.memory_per_rank_gb"
    )


def _rounded(gib: float) -> str:
    """Two digits, and all digits of a large number."""
    return f"{gib:,.0f}" if gib >= 10 else f"{gib:.2g}"


def _ranks_needed(sizes: list[Footprint], tables: TablesConfig, world_size: int) -> int | None:
    """The smallest number of ranks above `world_size` on which the tables fit, by greedy placement of their shards."""
    for ranks in range(world_size + 1, _MAX_RANKS + 1):
        shards = []
        for size in sizes:
            count = 1 if tables.sharding == "table_wise" else size.dim // column_width(size.dim, ranks)
            shards += [size.gib / count] * count
        loads = [0.0] * ranks
        for gib in sorted(shards, reverse=True):
            loads[loads.index(min(loads))] += gib
        # Inputs and outputs of the tables need some memory as well.
        if max(loads) < 0.95 * tables.memory_per_rank_gb:
            return ranks
    return None


class _TrainedDataParallel(DataParallelWrapper):
    """Wraps a model in DistributedDataParallel for the trained parameters that are not sharded.

    Frozen parameters and buffers are ignored. TorchRec's default wrapper would broadcast the frozen base language model
    at every start.
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
