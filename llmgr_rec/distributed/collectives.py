"""Collective operations on small tensors; without effect in a single process."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from llmgr_rec.distributed.process_group import World

T = TypeVar("T")


def sum_over_ranks(values: torch.Tensor, world: World, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Sums a tensor over all ranks, in place, and returns it. A collective: all ranks must call it."""
    if world.size > 1:
        dist.all_reduce(values, group=group)
    return values


def broadcast_from_rank0(values: torch.Tensor, world: World) -> None:
    """Copies a tensor from rank 0 to all ranks, in place. A collective: all ranks must call it."""
    if world.size > 1:
        dist.broadcast(values, 0)


def mean_over_ranks(values: dict[str, torch.Tensor], world: World) -> dict[str, float]:
    """Means of named scalars over all ranks, by one all-reduce. A collective: all ranks must call it.

    Args:
        values: Scalar tensors; the names must be the same on all ranks.
        world: This process and the world size.
    """
    names = sorted(values)
    stacked = torch.stack([values[name].detach().double() for name in names])
    means = sum_over_ranks(stacked, world) / world.size
    return dict(zip(names, means.tolist(), strict=True))


def start_max_over_ranks(values: torch.Tensor, world: World) -> Callable[[], torch.Tensor]:
    """Starts the elementwise maximum of a CPU tensor over all ranks. A collective: all ranks must call it.

    Args:
        values: This rank's values; not to be used before the result.
        world: This process and the world size.

    Returns:
        A function that waits for the maximum and returns it.
    """
    if world.size == 1:
        return lambda: values
    work = dist.all_reduce(values, dist.ReduceOp.MAX, async_op=True)

    def max_over_ranks() -> torch.Tensor:
        work.wait()
        return values

    return max_over_ranks


def gather_from_ranks(value: T, world: World) -> list[T]:
    """The values of all ranks in rank order, on every rank; pickled. A collective: all ranks must call it."""
    if world.size == 1:
        return [value]
    gathered: list[T | None] = [None] * world.size
    dist.all_gather_object(gathered, value)
    return gathered  # type: ignore[return-value]
