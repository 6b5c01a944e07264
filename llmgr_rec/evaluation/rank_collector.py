"""Target ranks of single sessions, collected while a model is evaluated; a byte a session.

Shapes: B sessions of a batch, S sessions of a split.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmgr_rec.distributed.collectives import gather_from_ranks
from llmgr_rec.distributed.process_group import World

TargetRanks = NDArray[np.uint8]


class RankCollector:
    """Target ranks of the sessions that this rank has ranked, uint8, in the order of its batches."""

    def __init__(self) -> None:
        self._batches: list[TargetRanks] = []

    def add(self, ranks_B: Tensor, weights_B: Tensor) -> None:
        """Adds one batch.

        Args:
            ranks_B: Target ranks, at most 255.
            weights_B: Weight of each session; those of weight 0 are padding and are left out.
        """
        self._batches.append(ranks_B[weights_B > 0].cpu().numpy().astype(np.uint8))

    def gather(self, world: World) -> TargetRanks:
        """Target ranks of all ranks in the order of the split, uint8 [S]. A collective: all ranks must call it.

        Args:
            world: Ranks, to which `protocol.batches_of_rank` has assigned the batches round-robin.
        """
        batches = [batch for step in zip(*gather_from_ranks(self._batches, world), strict=True) for batch in step]
        return np.concatenate(batches) if batches else np.empty(0, np.uint8)
