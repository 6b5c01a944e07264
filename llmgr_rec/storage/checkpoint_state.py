"""State of a checkpoint: tensors of the model and of its optimizer, by name.

Other optimizer state, such as learning rates and betas, is not saved: it follows from the settings and the step.
"""

import math
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torchrec.optim.keyed import KeyedOptimizer

MODEL, OPTIMIZER = "model.", "optimizer."
# Largest number of values of a block of a table in a checkpoint.
BLOCK_VALUES = 1 << 24
StateTensors = dict[str, Tensor]


def is_stored(name: str) -> bool:
    """Whether a checkpoint contains a tensor of the model: all but the base language model, which is frozen."""
    parts = name.split(".")
    return "language_model" not in parts or any(part.startswith("lora_") for part in parts)


def model_tensors(model: nn.Module) -> StateTensors:
    """Tensors of the model by checkpoint key; they share memory with the model."""
    return {MODEL + name: value for name, value in model.state_dict().items() if is_stored(name)}


def optimizer_tensors(optimizer: KeyedOptimizer, model: nn.Module) -> StateTensors:
    """State tensors of the optimizer by checkpoint key; they share memory with the optimizer.

    A table without a fused optimizer (Adam on CPU) has plain state tensors, with the same key on all ranks for
    different shards of the table. They are converted to sharded tensors with the sharding of their table.

    Args:
        optimizer: Optimizer whose state exists already, for the same parameters on all ranks.
        model: The sharded model that it updates.

    Raises:
        TypeError: The state has a value that is not a tensor.
        ValueError: A state tensor does not have the shape of the local shard of its table.
    """
    parameters = model.state_dict()
    tensors: StateTensors = {}
    for parameter, state in optimizer.state_dict()["state"].items():
        # A CombinedOptimizer prepends the name of the parameter group.
        table = parameters.get(parameter, parameters.get(parameter.partition(".")[2]))
        for name, value in state.items():
            key = f"{OPTIMIZER}{parameter}/{name}"
            if isinstance(table, ShardedTensor) and not isinstance(value, ShardedTensor) and value.dim():
                tensors[key] = _shard_like_table(table, value, key)
            elif isinstance(value, Tensor):
                tensors[key] = value
            else:
                raise TypeError(f"{key} is {type(value).__name__}: a checkpoint contains tensors only")
    return tensors


def equalize_steps(tensors: StateTensors) -> StateTensors:
    """Replaces step counters by copies with their maximum over all ranks. A collective: all ranks must call it.

    A rank without a shard of a table never increments the counter of the table, but a checkpoint stores an unsharded
    tensor only once, from any rank.

    Args:
        tensors: From `optimizer_tensors`.
    """
    equal = dict(tensors)
    for key in sorted(tensors):
        value = tensors[key]
        if not isinstance(value, ShardedTensor) and not value.dim():
            equal[key] = value.clone()
            if dist.get_world_size() > 1:
                dist.all_reduce(equal[key], op=dist.ReduceOp.MAX)
    return equal


def in_blocks(tensors: StateTensors) -> StateTensors:
    """Splits the shards of large sharded tensors into blocks of rows, which share memory with them.

    A tensor is written from a copy and read into one, so that larger ones would need the memory of a second table.

    Args:
        tensors: From `model_tensors` and `optimizer_tensors`.
    """
    return {key: _in_blocks(value) if isinstance(value, ShardedTensor) else value for key, value in tensors.items()}


def _in_blocks(value: ShardedTensor) -> ShardedTensor:
    metadata = value.metadata()
    width = max((math.prod(shard.shard_sizes[1:]) for shard in metadata.shards_metadata), default=1)
    rows = max(BLOCK_VALUES // max(width, 1), 1)
    if all(shard.shard_sizes[0] <= rows for shard in metadata.shards_metadata):
        return value
    blocks = [block for shard in metadata.shards_metadata for block in _blocks(shard, rows)]
    local = [
        Shard(shard.tensor[block.shard_offsets[0] - shard.metadata.shard_offsets[0] :][: block.shard_sizes[0]], block)
        for shard in value.local_shards()
        for block in _blocks(shard.metadata, rows)
    ]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        local, replace(metadata, shards_metadata=blocks), process_group=value._process_group
    )


def _blocks(shard: ShardMetadata, rows: int) -> list[ShardMetadata]:
    first, size = shard.shard_offsets[0], shard.shard_sizes[0]
    return [
        replace(
            shard,
            shard_offsets=[start, *shard.shard_offsets[1:]],
            shard_sizes=[min(rows, first + size - start), *shard.shard_sizes[1:]],
        )
        for start in range(first, first + size, rows)
    ]


def column_widths(tensors: StateTensors) -> dict[str, list[int]]:
    """Widths of all column shards of each sharded table of the model, by checkpoint key; equal on all ranks."""
    return {
        key: [shard.shard_sizes[1] for shard in value.metadata().shards_metadata]
        for key, value in tensors.items()
        if key.startswith(MODEL) and isinstance(value, ShardedTensor)
    }


def _shard_like_table(table: ShardedTensor, value: Tensor, key: str) -> ShardedTensor:
    local = table.local_shards()
    if len(local) > 1 or (local and local[0].tensor.shape != value.shape):
        raise ValueError(f"{key} of shape {list(value.shape)} does not match the local shard of its table")
    shards = [Shard(value.detach(), shard.metadata) for shard in local]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        shards, table.metadata(), process_group=table._process_group
    )
