"""The structure-aware contrastive loss of stage align.

Shapes: B sessions, H = d2 hidden width.
"""

import torch
from torch import Tensor
from torch.nn import functional


def contrastive_loss(
    graphs_BH: Tensor,
    nodes_BH: Tensor,
    weights_B: Tensor,
    global_size: int,
    world_scale: int,
    temperature: float,
    groups_B: Tensor | None = None,
) -> Tensor:
    """InfoNCE between the hidden state of a session's graph prompt and those of the node list prompts of all sessions.

    Symmetric: the mean of graph-to-nodes and nodes-to-graph. LLMGR (arXiv 2402.16539) leaves the loss of this task
    open; this definition is ours.

    Args:
        graphs_BH: Hidden states of the graph prompts.
        nodes_BH: Hidden states of the node list prompts, in the same order of sessions.
        weights_B: Weight of each session; sessions of weight 0 are neither anchors nor negatives.
        global_size: Number of sessions of the global batch, over all ranks, without padding.
        world_scale: Number of ranks, see `ranking_loss`.
        temperature: Divisor of the cosine similarities.
        groups_B: Group of each session, int64; only sessions of one group are negatives of each other. None is one
            group of all. The loss does not depend on the number of ranks if no group spans two ranks.

    Returns:
        Scalar loss of this rank's sessions.
    """
    graphs_BH, nodes_BH = functional.normalize(graphs_BH, dim=1), functional.normalize(nodes_BH, dim=1)
    real_B = weights_B > 0
    positive_BB = torch.eye(real_B.shape[0], dtype=torch.bool, device=real_B.device)
    allowed_BB = real_B.unsqueeze(0).expand_as(positive_BB)
    if groups_B is not None:
        allowed_BB = allowed_BB & (groups_B.unsqueeze(0) == groups_B.unsqueeze(1))
    # The positive pair is never masked, so that no row, padding included, has only -inf.
    masked_BB = ~(allowed_BB | positive_BB)
    columns_B = torch.arange(real_B.shape[0], device=real_B.device)
    cosines_BB = graphs_BH @ nodes_BH.T / temperature
    forward_scores = cosines_BB.masked_fill(masked_BB, float("-inf"))
    backward_scores = cosines_BB.T.masked_fill(masked_BB, float("-inf"))
    losses_B = functional.cross_entropy(forward_scores, columns_B, reduction="none")
    losses_B = (losses_B + functional.cross_entropy(backward_scores, columns_B, reduction="none")) / 2
    return (losses_B * weights_B).sum() * (world_scale / global_size)
