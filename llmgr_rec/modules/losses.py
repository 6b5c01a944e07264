"""Losses: ranking by softmax over the catalogue or a sample of it, and the structure-aware contrast.

Shapes: B sessions, C candidate columns, Q columns of queries and items, H = d2 hidden width, R hard negatives a row.

A loss is called inside the forward pass that TorchRec's pipeline traces symbolically. Wrap it there, in the calling
file, with `torch.fx.wrap("ranking_loss")`, so that the tracer does not enter it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Scores held at one time, in bytes. On a CPU they stay in the cache, through which they are passed five times; a GPU
# wants large products.
_SCORES_ON_CPU = 1 << 21
_SCORES_AT_ONCE = 1 << 24
# Fewer rows in a block would read and write the items' gradient more often than the products are worth.
_LEAST_ROWS = 64
# Sums of rounded products are widened once a block, another pass over that gradient.
_LEAST_ROUNDED_ROWS = 256


def _scores(queries_bQ: Tensor, items_CQ: Tensor, bias_C: Tensor | None, out_bC: Tensor | None = None) -> Tensor:
    if bias_C is None:
        return torch.mm(queries_bQ, items_CQ.T, out=out_bC)
    return torch.addmm(bias_C, queries_bQ, items_CQ.T, out=out_bC)


def _score_buffer(items_CQ: Tensor, rows: int) -> Tensor:
    """Memory for the scores of some rows, [rows, C].

    In float32 on a CPU the items lie in its rows and not in its columns: products of tall matrices, of which each
    thread takes some rows, are faster than those of wide ones, and the loss takes a tenth to a quarter less time.
    """
    if items_CQ.device.type == "cpu" and items_CQ.dtype == torch.float32:
        return items_CQ.new_empty(items_CQ.shape[0], rows).T
    return items_CQ.new_empty(rows, items_CQ.shape[0])


def _softmax_of_targets(scores_bC: Tensor, target_b1: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of rows that want one column each.

    Probabilities are never divided out: a factor for each row does for their products with items and queries, and
    leaves one pass over the scores out. What the targets add to the gradients is two rows of vectors, and left out too.

    Args:
        scores_bC: Scores; on return, probabilities but for the factor.
        target_b1: Score of each row's target, float32.

    Returns:
        Losses and factors, float32 [b, 1] each.
    """
    highest_b1 = scores_bC.amax(dim=1, keepdim=True)
    sums_b1 = scores_bC.sub_(highest_b1).exp_().sum(dim=1, keepdim=True, dtype=target_b1.dtype)
    return sums_b1.log() + highest_b1 - target_b1, sums_b1.reciprocal()


def _softmax_of_teacher(scores_bC: Tensor, wanted_bC: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of rows that want given probabilities.

    Args:
        scores_bC: Scores; on return, probabilities less those that are wanted.
        wanted_bC: Probabilities that are wanted.

    Returns:
        Losses and factors, which are ones here, [b, 1] each.
    """
    log_probs_bC = torch.log_softmax(scores_bC, dim=1)
    losses_b1 = -(log_probs_bC * wanted_bC).sum(dim=1, keepdim=True)
    torch.sub(log_probs_bC.exp_(), wanted_bC, out=scores_bC)
    return losses_b1, torch.ones_like(losses_b1)


class _SoftmaxLoss(torch.autograd.Function):
    """Weighted softmax cross-entropy of queries @ items.T that never holds the whole score matrix.

    Rows are scored block by block, and the gradients of a block are computed while its scores are at hand: one score
    block is alive at a time, and nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries_BQ: Tensor,
        items_CQ: Tensor,
        columns_B: Tensor,
        scales_B: Tensor,
        bias_C: Tensor | None,
        teacher_BQ: Tensor | None,
        target_weight: float,
        dtype: torch.dtype,
        with_gradient: bool,
    ) -> Tensor:
        scores_at_once = _SCORES_ON_CPU if items_CQ.device.type == "cpu" else _SCORES_AT_ONCE
        least_rows = _LEAST_ROWS if dtype == queries_BQ.dtype else _LEAST_ROUNDED_ROWS
        rows_at_once = max(least_rows, scores_at_once // (dtype.itemsize * max(1, items_CQ.shape[0])))
        targets_BQ = items_CQ.index_select(0, columns_B)
        rounded_CQ = items_CQ.to(dtype)
        bias_C = None if bias_C is None else bias_C.to(dtype)
        total = queries_BQ.new_zeros(())
        gradients = (torch.empty_like(queries_BQ), torch.zeros_like(items_CQ)) if with_gradient else None
        # One buffer for all blocks: fresh memory of this size is mapped anew every time.
        scores = _score_buffer(rounded_CQ, min(rows_at_once, queries_BQ.shape[0]))
        for start in range(0, queries_BQ.shape[0], rows_at_once):
            block = slice(start, start + rows_at_once)
            columns_b1, scales_b1 = columns_B[block].unsqueeze(1), scales_B[block].unsqueeze(1)
            scores_bC = _scores(queries_BQ[block].to(dtype), rounded_CQ, bias_C, scores[: scales_b1.shape[0]])
            if teacher_BQ is None:
                # Not taken from the rounded scores: it costs little, and it is half of the loss.
                target_b1 = (queries_BQ[block] * targets_BQ[block]).sum(dim=1, keepdim=True)
                if bias_C is not None:
                    target_b1 = target_b1 + bias_C[columns_b1]
                losses_b1, factors_b1 = _softmax_of_targets(scores_bC, target_b1)
            else:
                wanted_bC = torch.softmax(_scores(teacher_BQ[block], items_CQ, bias_C), dim=1).mul_(1 - target_weight)
                wanted_bC.scatter_add_(1, columns_b1, torch.full_like(scales_b1, target_weight))
                losses_b1, factors_b1 = _softmax_of_teacher(scores_bC, wanted_bC)
            total += (losses_b1 * scales_b1).sum()
            if gradients is None:
                continue
            factors_b1 = factors_b1 * scales_b1
            gradients[0][block] = (scores_bC @ rounded_CQ) * factors_b1
            weighted_bQ = (queries_BQ[block] * factors_b1).to(dtype)
            if dtype == gradients[1].dtype:
                gradients[1].addmm_(scores_bC.T, weighted_bQ)
            else:
                gradients[1].add_(scores_bC.T @ weighted_bQ)
        if gradients is not None and teacher_BQ is None:
            scales_B1 = scales_B.unsqueeze(1)
            gradients[0].sub_(targets_BQ * scales_B1)
            gradients[1].index_add_(0, columns_B, queries_BQ * scales_B1, alpha=-1)
        if gradients is not None:
            ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_queries_BQ, grad_items_CQ = ctx.saved_tensors
        return grad_queries_BQ * grad_total, grad_items_CQ * grad_total, None, None, None, None, None, None, None


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
        log_q_C: Log of the expected count of each candidate in the sample; None or empty for the full catalogue.
        dtype: Number format of scores, probabilities and their products; None takes the queries'. bfloat16 rounds a
            score by up to 1 in 256, sums stay in the queries' format.

    Returns:
        Scalar loss of this rank's rows.
    """
    scale = world_scale / global_size
    return _softmax_loss(queries_BQ, items_CQ, target_columns_B, weights_B, scale, log_q_C, None, 1.0, dtype)


def _softmax_loss(
    queries_BQ: Tensor,
    items_CQ: Tensor,
    target_columns_B: Tensor,
    weights_B: Tensor,
    scale: float,
    log_q_C: Tensor | None,
    teacher_BQ: Tensor | None,
    target_weight: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    real_B = weights_B > 0
    columns_B = torch.where(real_B, target_columns_B, 0)
    scales_B = torch.where(real_B, weights_B, 0).to(queries_BQ.dtype) * scale
    bias_C = None if log_q_C is None or log_q_C.numel() == 0 else -log_q_C.to(queries_BQ.dtype)
    with_gradient = torch.is_grad_enabled() and (queries_BQ.requires_grad or items_CQ.requires_grad)
    return _SoftmaxLoss.apply(
        queries_BQ,
        items_CQ,
        columns_B,
        scales_B,
        bias_C,
        teacher_BQ,
        target_weight,
        dtype or queries_BQ.dtype,
        with_gradient,
    )


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
