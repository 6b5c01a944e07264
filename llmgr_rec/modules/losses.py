"""Losses: ranking by softmax over the catalog or a sample of it, and the structure-aware contrast.

Shapes: B sessions, C candidate columns, Q columns of queries and items, H = d2 hidden width, R hard negatives a row.

A loss is called inside the forward pass that TorchRec's pipeline traces symbolically. Wrap it there, in the calling
file, with `torch.fx.wrap("ranking_loss")`, so that the tracer does not enter it.
"""

import torch
from torch import Tensor
from torch.nn import functional

from llmgr_rec.kernels.softmax_loss import softmax_loss


def ranking_loss(
    queries_BQ: Tensor,
    items_CQ: Tensor,
    target_columns_B: Tensor,
    weights_B: Tensor,
    global_size: int,
    world_scale: int,
    log_q_C: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Softmax cross-entropy over all candidate columns, or over a sample with the logQ correction.

    In a sample, a column that is another row's target stays an ordinary negative: the correction by its expected
    count already accounts for how it came in.

    Args:
        queries_BQ: Session queries.
        items_CQ: Candidate items; every item at most once.
        target_columns_B: Column of each row's target; anything for rows of weight 0.
        weights_B: Weight of each row; 0 marks filler.
        global_size: Real rows of the global batch, over all ranks.
        world_scale: Number of ranks. Gradients are averaged over ranks, so a sum over this rank's rows times
            world_scale / global_size makes that average the mean over the global batch.
        log_q_C: Log of the expected count of each candidate in the sample; None or empty for the full catalog.
        dtype: Number format of scores, probabilities and their products; None takes the queries'. bfloat16 rounds a
            score by up to 1 in 256, sums stay in the queries' format.

    Returns:
        Scalar loss of this rank's rows.
    """
    row_weights_B = weights_B.to(queries_BQ.dtype) * (world_scale / global_size)
    bias_C = None if log_q_C is None or log_q_C.numel() == 0 else -log_q_C.to(queries_BQ.dtype)
    return softmax_loss(queries_BQ, items_CQ, target_columns_B, row_weights_B, bias_C, dtype)


def structure_loss(
    graphs_BH: Tensor,
    nodes_BH: Tensor,
    weights_B: Tensor,
    global_size: int,
    world_scale: int,
    temperature: float,
    hard_nodes_BRH: Tensor | None = None,
    groups_B: Tensor | None = None,
) -> Tensor:
    """Contrasts the reading of a session graph with that of its own node list against other sessions' (InfoNCE).

    Symmetric: the mean of graph-to-nodes and nodes-to-graph. Only the former sees the hard negatives. The form of
    this task is ours; the paper leaves it open.

    Args:
        graphs_BH: Readings of the session graphs.
        nodes_BH: Readings of the node lists, row by row of the same sessions.
        weights_B: Weight of each row; rows of weight 0 are neither anchors nor negatives.
        global_size: Real rows of the global batch, over all ranks.
        world_scale: Number of ranks, see `ranking_loss`.
        temperature: Divisor of the cosine similarities.
        hard_nodes_BRH: Readings of corrupted node lists of each row's own session.
        groups_B: Only rows of one group are negatives of each other; None puts all rows into one. Groups that never
            straddle two ranks make the loss independent of the number of ranks.

    Returns:
        Scalar loss of this rank's rows.
    """
    graphs_BH, nodes_BH = functional.normalize(graphs_BH, dim=1), functional.normalize(nodes_BH, dim=1)
    real_B = weights_B > 0
    own_BB = torch.eye(real_B.shape[0], dtype=torch.bool, device=real_B.device)
    allowed_BB = real_B.unsqueeze(0).expand_as(own_BB)
    if groups_B is not None:
        allowed_BB = allowed_BB & (groups_B.unsqueeze(0) == groups_B.unsqueeze(1))
    # The own pair always stays, so that no row, filler included, is without a column.
    masked_BB = ~(allowed_BB | own_BB)
    columns_B = torch.arange(real_B.shape[0], device=real_B.device)
    cosines_BB = graphs_BH @ nodes_BH.T / temperature
    forward_scores = cosines_BB.masked_fill(masked_BB, float("-inf"))
    if hard_nodes_BRH is not None:
        hard_BRH = functional.normalize(hard_nodes_BRH, dim=2)
        hard_BR = torch.einsum("bh,brh->br", graphs_BH, hard_BRH) / temperature
        forward_scores = torch.cat([forward_scores, hard_BR], dim=1)
    backward_scores = cosines_BB.T.masked_fill(masked_BB, float("-inf"))
    losses_B = functional.cross_entropy(forward_scores, columns_B, reduction="none")
    losses_B = (losses_B + functional.cross_entropy(backward_scores, columns_B, reduction="none")) / 2
    return (losses_B * weights_B).sum() * (world_scale / global_size)
