"""Small collectives: the same numbers on every rank, and no process group needed by a single process."""

import pytest
import torch

from llmgr_rec.distributed.collectives import broadcast_from_rank0, mean_over_ranks, sum_over_ranks
from llmgr_rec.distributed.process_group import World
from tests.ranks import run_on_ranks


def collect(world: World) -> tuple[list[int], list[int], dict[str, float]]:
    """What each collective makes of this rank's numbers; rank r has the numbers r + 1 and 10 * (r + 1)."""
    own = torch.tensor([1, 10]) * (world.rank + 1)
    summed, copied = own.clone(), own.clone()
    assert sum_over_ranks(summed, world) is summed
    broadcast_from_rank0(copied, world)
    # The names are in another order on each rank.
    names = ["loss", "context"] if world.rank else ["context", "loss"]
    values = {"loss": own[0].float(), "context": own[1].float()}
    return summed.tolist(), copied.tolist(), mean_over_ranks({name: values[name] for name in names}, world)


@pytest.mark.dist
def test_all_ranks_get_sum_copy_and_mean() -> None:
    expected = ([6, 60], [1, 10], {"loss": 2.0, "context": 20.0})
    assert run_on_ranks(collect, 3) == [expected] * 3


def test_a_single_process_keeps_its_numbers() -> None:
    assert collect(World.alone()) == ([1, 10], [1, 10], {"loss": 1.0, "context": 10.0})
