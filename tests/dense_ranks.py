"""The readable reference of target ranks, over all scores at once."""

import torch
from torch import Tensor

from llmgr_rec.distributed.ranking import EXCLUDED_RANK


def dense_target_ranks(scores_BV: Tensor, targets_B: Tensor) -> Tensor:
    """How many items are ranked before each target: those of a higher score, and of an equal score and lower index.

    A target that is excluded itself has rank `EXCLUDED_RANK`.

    Args:
        scores_BV: Scores of all items; -inf for excluded ones.
        targets_B: The item that was clicked next.
    """
    own_B1 = scores_BV.gather(1, targets_B.clamp(min=0).unsqueeze(1))
    earlier_BV = torch.arange(scores_BV.shape[1], device=scores_BV.device) < targets_B.unsqueeze(1)
    before_BV = (scores_BV > own_B1) | ((scores_BV == own_B1) & earlier_BV)
    return torch.where(own_B1.squeeze(1).isneginf(), EXCLUDED_RANK, before_BV.sum(dim=1))
