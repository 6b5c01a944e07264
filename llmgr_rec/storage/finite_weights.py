"""Weights that are not finite, which training with too high a learning rate gives, are never exported."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor

from llmgr_rec.distributed.process_group import World, run_on_all_ranks
from llmgr_rec.errors import UserError
from llmgr_rec.storage.checkpoint_state import is_stored


def require_finite(model: nn.Module, stage: str, step: int | None, world: World) -> None:
    """Checks all weights but those of the base language model.

    Args:
        model: The model, sharded or not.
        stage: Stage that trained it.
        step: Steps after which the model has its weights; None if unknown.
        world: Ranks, each of which checks its shards; all call together.

    Raises:
        UserError: A weight is NaN or infinite; raised on all ranks.
    """
    run_on_all_ranks(world, lambda: _check(model, stage, step))


def _check(model: nn.Module, stage: str, step: int | None) -> None:
    for name, value in model.state_dict().items():
        if is_stored(name) and not all(map(_is_finite, _local_tensors(value))):
            after = "" if step is None else f" after step {step}"
            raise UserError(
                f"stage {stage}: tensor {name} has values that are not finite{after}, so nothing is exported; "
                f"lower --{stage}.lr or --tables.lr and start again with another --output"
            )


def _local_tensors(value: Tensor | ShardedTensor | DTensor) -> Iterator[Tensor]:
    if isinstance(value, ShardedTensor):
        yield from (shard.tensor for shard in value.local_shards())
    else:
        yield value.to_local() if isinstance(value, DTensor) else value


def _is_finite(values: Tensor) -> bool:
    if not values.numel() or not values.is_floating_point():
        return True
    # Both are NaN if any value is. Unlike isfinite they need no mask as large as the table.
    low, high = torch.aminmax(values.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))
