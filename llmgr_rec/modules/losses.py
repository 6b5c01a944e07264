"""Losses: ranking by softmax over the catalogue or a sample of it, its distillation, and the structure-aware contrast.

Shapes: B sessions, C candidate columns, Q columns of queries and items, H = d2 hidden width, R hard negatives a row.

A loss is called inside the forward pass that TorchRec's pipeline traces symbolically. Wrap it there, in the calling
file, with `torch.fx.wrap("ranking_loss")`, so that the tracer does not enter it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Scores held at one time, in elements: large enough for efficient matrix products, small beside the model.
_SCORES_AT_ONCE = 1 << 22
# Fewer rows in a block would read and write the items' gradient more often than the products are worth.
_LEAST_ROWS = 64


def _scores(queries_bQ: Tensor, items_CQ: Tensor, bias_C: Tensor | None) -> Tensor:
    return queries_bQ @ items_CQ.T if bias_C is None else torch.addmm(bias_C, queries_bQ, items_CQ.T)


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
        with_gradient: bool,
    ) -> Tensor:
        rows_at_once = max(_LEAST_ROWS, _SCORES_AT_ONCE // max(1, items_CQ.shape[0]))
        total = queries_BQ.new_zeros(())
        grad_queries_BQ = torch.empty_like(queries_BQ) if with_gradient else None
        grad_items_CQ = torch.zeros_like(items_CQ) if with_gradient else None
        for start in range(0, queries_BQ.shape[0], rows_at_once):
            block = slice(start, start + rows_at_once)
            columns_b1, scales_b1 = columns_B[block].unsqueeze(1), scales_B[block].unsqueeze(1)
            scores_bC = _scores(queries_BQ[block], items_CQ, bias_C)
            log_probs_bC = torch.log_softmax(scores_bC, dim=1)
            del scores_bC
            wanted_bC: Tensor | None = None
            if teacher_BQ is None:
                total -= (log_probs_bC.gather(1, columns_b1) * scales_b1).sum()
            else:
                wanted_bC = torch.softmax(_scores(teacher_BQ[block], items_CQ, bias_C), dim=1).mul_(1 - target_weight)
                wanted_bC.scatter_add_(1, columns_b1, torch.full_like(scales_b1, target_weight))
                total -= ((log_probs_bC * wanted_bC).sum(dim=1, keepdim=True) * scales_b1).sum()
            if grad_queries_BQ is None or grad_items_CQ is None:
                continue
            errors_bC = log_probs_bC.exp_()
            if wanted_bC is None:
                errors_bC.scatter_add_(1, columns_b1, -torch.ones_like(scales_b1))
            else:
                errors_bC -= wanted_bC
            grad_queries_BQ[block] = (errors_bC @ items_CQ) * scales_b1
            grad_items_CQ.addmm_(errors_bC.T, queries_BQ[block] * scales_b1)
        if with_gradient:
            ctx.save_for_backward(grad_queries_BQ, grad_items_CQ)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_queries_BQ, grad_items_CQ = ctx.saved_tensors
        return grad_queries_BQ * grad_total, grad_items_CQ * grad_total, None, None, None, None, None, None


def ranking_loss(
    queries_BQ: Tensor,
    items_CQ: Tensor,
    target_columns_B: Tensor,
    weights_B: Tensor,
    global_size: int,
    world_scale: int,
    log_q_C: Tensor | None = None,
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

    Returns:
        Scalar loss of this rank's rows.
    """
    scale = world_scale / global_size
    return _softmax_loss(queries_BQ, items_CQ, target_columns_B, weights_B, scale, log_q_C, None, 1.0)


def distillation_loss(
    queries_BQ: Tensor,
    teacher_BQ: Tensor,
    items_CQ: Tensor,
    target_columns_B: Tensor,
    weights_B: Tensor,
    target_weight: float,
    global_size: int,
    world_scale: int,
    log_q_C: Tensor | None = None,
) -> Tensor:
    """Softmax cross-entropy that wants a teacher's probabilities of the same columns, mixed with the target.

    Args:
        queries_BQ: Session queries that learn.
        teacher_BQ: The teacher's queries on the same items, without gradient.
        items_CQ: Candidate items; every item at most once.
        target_columns_B: Column of each row's target; anything for rows of weight 0.
        weights_B: Weight of each row; 0 marks filler.
        target_weight: Share of the target, 0 to 1; the teacher has the rest.
        global_size: Real rows of the global batch, over all ranks.
        world_scale: Number of ranks, see `ranking_loss`.
        log_q_C: Log of the expected count of each candidate in the sample; None or empty for the full catalogue.

    Returns:
        Scalar loss of this rank's rows.
    """
    scale = world_scale / global_size
    return _softmax_loss(queries_BQ, items_CQ, target_columns_B, weights_B, scale, log_q_C, teacher_BQ, target_weight)


def _softmax_loss(
    queries_BQ: Tensor,
    items_CQ: Tensor,
    target_columns_B: Tensor,
    weights_B: Tensor,
    scale: float,
    log_q_C: Tensor | None,
    teacher_BQ: Tensor | None,
    target_weight: float,
) -> Tensor:
    real_B = weights_B > 0
    columns_B = torch.where(real_B, target_columns_B, 0)
    scales_B = torch.where(real_B, weights_B, 0).to(queries_BQ.dtype) * scale
    bias_C = None if log_q_C is None or log_q_C.numel() == 0 else -log_q_C.to(queries_BQ.dtype)
    with_gradient = torch.is_grad_enabled() and (queries_BQ.requires_grad or items_CQ.requires_grad)
    return _SoftmaxLoss.apply(
        queries_BQ, items_CQ, columns_B, scales_B, bias_C, teacher_BQ, target_weight, with_gradient
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
