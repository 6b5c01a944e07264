"""Small tensors that ranks bring together."""

import torch
import torch.distributed as dist

from llmgr_rec.distributed.process_group import World


def sum_over_ranks(values: torch.Tensor, world: World) -> torch.Tensor:
    """Element-wise sum of a tensor over all ranks; every rank gets it and must call together."""
    if world.size > 1:
        dist.all_reduce(values)
    return values


def broadcast_from_rank0(values: torch.Tensor, world: World) -> None:
    """Makes a tensor on all ranks what it is on the first; all must call together."""
    if world.size > 1:
        dist.broadcast(values, 0)


def mean_over_ranks(values: dict[str, torch.Tensor], world: World) -> dict[str, float]:
    """Means of named scalars over all ranks, in one exchange.

    Args:
        values: The same names on every rank, each a scalar tensor.
        world: Ranks.
    """
    names = sorted(values)
    stacked = torch.stack([values[name].detach().double() for name in names])
    means = sum_over_ranks(stacked, world) / world.size
    return dict(zip(names, means.tolist(), strict=True))
