"""What a checkpoint holds: named tensors of the model and its optimizer, sharded ones with their place.

Only tensors: whatever else an optimizer keeps (learning rates, betas) follows from settings and step.
"""

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torchrec.optim.keyed import KeyedOptimizer

MODEL, OPTIMIZER = "model.", "optimizer."
StateTensors = dict[str, Tensor]


def is_stored(name: str) -> bool:
    """Whether a checkpoint holds a tensor of the model: everything but the base language model.

    That one is frozen; its name and hash stand in the export bundle.
    """
    parts = name.split(".")
    return "language_model" not in parts or any(part.startswith("lora_") for part in parts)


def model_tensors(model: nn.Module) -> StateTensors:
    """The model's tensors by checkpoint key; they share memory with the model."""
    return {MODEL + name: value for name, value in model.state_dict().items() if is_stored(name)}


def optimizer_tensors(optimizer: KeyedOptimizer, model: nn.Module) -> StateTensors:
    """The optimizer's state tensors by checkpoint key; they share memory with it.

    A table without a fused optimizer (Adam on CPU) has plain state tensors on each rank, the same key for different
    parts of the table. They become sharded tensors cut like their table.

    Args:
        optimizer: Its state exists already, on every rank for the same parameters.
        model: The sharded model that it updates.
    """
    parameters = model.state_dict()
    tensors: StateTensors = {}
    for parameter, state in optimizer.state_dict()["state"].items():
        # A CombinedOptimizer puts the name of the parameter's group in front.
        table = parameters.get(parameter, parameters.get(parameter.partition(".")[2]))
        for name, value in state.items():
            key = f"{OPTIMIZER}{parameter}/{name}"
            if isinstance(table, ShardedTensor) and not isinstance(value, ShardedTensor) and value.dim():
                tensors[key] = _cut_like(table, value, key)
            elif isinstance(value, Tensor):
                tensors[key] = value
            else:
                raise TypeError(f"{key} is {type(value).__name__}: a checkpoint holds tensors only")
    return tensors


def equalise_steps(tensors: StateTensors) -> StateTensors:
    """Takes the highest of all ranks for step counters of tables, in copies.

    A rank that holds no part of a table never steps its counter, and a checkpoint keeps one copy of an unsharded value.

    Args:
        tensors: From `optimizer_tensors`; all ranks must call together.
    """
    equal = dict(tensors)
    for key in sorted(tensors):
        value = tensors[key]
        if not isinstance(value, ShardedTensor) and not value.dim():
            equal[key] = value.clone()
            if dist.get_world_size() > 1:
                dist.all_reduce(equal[key], op=dist.ReduceOp.MAX)
    return equal


def column_widths(tensors: StateTensors) -> dict[str, list[int]]:
    """Widths of the shards of every sharded table of a model, by checkpoint key; the same on all ranks."""
    return {
        key: [shard.shard_sizes[1] for shard in value.metadata().shards_metadata]
        for key, value in tensors.items()
        if key.startswith(MODEL) and isinstance(value, ShardedTensor)
    }


def _cut_like(table: ShardedTensor, value: Tensor, key: str) -> ShardedTensor:
    local = table.local_shards()
    if len(local) > 1 or (local and local[0].tensor.shape != value.shape):
        raise ValueError(f"{key} of shape {list(value.shape)} does not match this rank's part of its table")
    shards = [Shard(value.detach(), shard.metadata) for shard in local]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        shards, table.metadata(), process_group=table._process_group
    )
