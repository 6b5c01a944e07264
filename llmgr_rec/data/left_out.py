"""Items that go without their id row in training, so that an item vector means something without it.

Shapes: V items of the catalogue, X item occurrences.
"""

import torch
from torch import Tensor

from llmgr_rec.data.hashing import hash_ints

# A float64 holds this many bits of a random number exactly.
_BITS = 53


class LeftOutIds:
    """Says whose id row is left out in which step.

    Items that never occur in training sessions always: as negatives their rows would learn no more than not to be
    recommended. Of the others a share, drawn anew in each step, once an item: as a node and as a candidate it is the
    same, on every rank.

    Args:
        train_count_V: Occurrences of each item in training sessions.
        share: Share of the items that is drawn, 0 to 1.
        seed: Seed of the draws.
    """

    def __init__(self, train_count_V: Tensor, share: float, seed: int) -> None:
        self.share = share
        self.seed = seed
        # Rows that no step touches; they say nothing if they start at zero.
        self.untrained_V = train_count_V == 0 if share < 1 else torch.ones_like(train_count_V, dtype=torch.bool)

    def mask(self, items_X: Tensor, epoch: int, step: int) -> Tensor:
        """Tells which occurrences go without their id row, bool [X].

        Args:
            items_X: Item of each occurrence, int64.
            epoch: Number of the epoch.
            step: Number of the global batch in it.
        """
        left_out_X = self.untrained_V[items_X]
        if not self.share:
            return left_out_X
        drawn_X = (hash_ints(items_X.numpy(), self.seed, epoch, step) >> (64 - _BITS)) < self.share * 2.0**_BITS
        return left_out_X | torch.from_numpy(drawn_X)
