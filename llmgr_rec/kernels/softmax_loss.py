"""Softmax cross-entropy of queries @ items.T whose score matrix is never held as a whole.

With the score s[b, c] = queries[b] . items[c] + bias[c], the target column t[b] and the weight w[b] of a row:

    m[b]    = max over c of s[b, c], or 0 where no score can be large
    e[b, c] = exp(s[b, c] - m[b])
    Z[b]    = sum over c of e[b, c]

    loss                  = sum over b of w[b] * (log Z[b] + m[b] - s[b, t[b]])
    d loss / d queries[b] = w[b] / Z[b] * (sum over c of e[b, c] * items[c])
                            - w[b] * items[t[b]]
    d loss / d items[c]   = sum over b of e[b, c] * (w[b] / Z[b] * queries[b])
                            - sum over all b with t[b] = c of w[b] * queries[b]

The forward pass computes both gradients, because it has e of a block of rows at hand; the backward pass only scales
them by the gradient of the loss. So one block of scores is alive at a time, and no score is computed twice.

Two steps save passes over the block. It is never divided by Z: w / Z multiplies rows of width Q instead of width C. Its
target columns are never touched: the second term of both gradients is subtracted once, after the last block.

Cosine scores are bounded, by 1 / temperature. On a CPU, m is 0 if the norms of queries and items bound all scores to
what exp and its sums represent, which saves two more passes. A GPU would have to wait for the norms.

Number formats: scores, e and their products with queries and items have the kernel's `dtype`; target scores, Z, the
loss and the gradients have the queries' own. With bfloat16 a score is rounded by up to 1 in 256, which the sum Z and
the target score are not.

`ranking_loss` is this loss with the weights of a distributed step and the logQ correction of a sampled softmax.
TorchRec's training pipeline traces the forward pass that calls it; the calling module excludes it from the trace by
`torch.fx.wrap("ranking_loss")`.

Shapes: B rows, b rows of one block, C columns (candidate items), Q columns of queries and items.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from llmgr_rec.kernels.row_padding import row_padding

# Bytes of one block of scores. On a CPU the block stays in the cache, because it is passed over five times; a GPU needs
# large products.
_CPU_BLOCK_BYTES = 1 << 21
_GPU_BLOCK_BYTES = 1 << 24
# Every block reads and writes the whole gradient of the items, which fewer rows than these do not pay for.
_MIN_BLOCK_ROWS = 64
# In a lower precision the block's part of that gradient is also widened, in one more pass over it.
_MIN_BLOCK_ROWS_LOW_PRECISION = 256
# Bytes of the rows that are widened at once to be summed.
_WIDENED_BYTES = 1 << 20
# A CPU compiles a product in a lower precision for each new shape, and keeps it. Rows are rounded up, see
# `row_padding`. A sampled softmax has another number of columns in each step, rounded up to a multiple of this.
_COLUMN_STEP = 256
# An item with this bias, or a lower one, has no part in the softmax.
_LEFT_OUT = -1000.0
# exp of it, times the number of items, is far from the ends of the range of float32 and bfloat16.
_MAX_UNSHIFTED_SCORE = 40.0


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
    """Softmax cross-entropy over all candidates, or sampled softmax with logQ correction.

    The logQ correction (Bengio and Senecal, 2008; for in-batch negatives Yi et al., RecSys 2019) subtracts from a
    candidate's score the logarithm of its expected count in the sample. A candidate that is the target of another
    session stays an ordinary negative, because its expected count includes that case.

    Args:
        queries_BQ: Session queries.
        items_CQ: Item vectors of the candidates; each item at most once.
        target_columns_B: Index of each session's target among the candidates, int64; ignored for weight 0.
        weights_B: Weight of each session; 0 for padding.
        global_size: Number of sessions of the global batch, over all ranks, without padding.
        world_scale: Number of ranks. Gradients are averaged over ranks, so the loss is the sum over this rank's
            sessions times world_scale / global_size; the average is then the mean over the global batch.
        log_q_C: Logarithm of each candidate's expected count in the sample; None or empty for the full catalog.
        dtype: Dtype of scores, probabilities and their products; None takes that of the queries. bfloat16 has a
            relative rounding error of up to 1/256; sums keep the dtype of the queries.

    Returns:
        Scalar loss of this rank's sessions.
    """
    row_weights_B = weights_B.to(queries_BQ.dtype) * (world_scale / global_size)
    bias_C = None if log_q_C is None or log_q_C.numel() == 0 else -log_q_C.to(queries_BQ.dtype)
    return softmax_loss(queries_BQ, items_CQ, target_columns_B, row_weights_B, bias_C, dtype)


def softmax_loss(
    queries_BQ: Tensor,
    items_CQ: Tensor,
    target_columns_B: Tensor,
    row_weights_B: Tensor,
    bias_C: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Weighted sum of the rows' softmax cross-entropies.

    Args:
        queries_BQ: Queries.
        items_CQ: Items, one for each column.
        target_columns_B: Target column of each row, int64; any value where the row's weight is 0.
        row_weights_B: Weight of each row, 0 or more.
        bias_C: Added to the scores of each column, without a gradient; None adds nothing.
        dtype: Number format of the scores; None takes that of the queries.

    Returns:
        Scalar, differentiable once with respect to queries and items.
    """
    if dtype is not None and (padding := row_padding(queries_BQ.shape[0], dtype, queries_BQ.device)):
        queries_BQ = pad(queries_BQ, (0, 0, 0, padding))
        target_columns_B, row_weights_B = (pad(rows, (0, padding)) for rows in (target_columns_B, row_weights_B))
    is_weighted_B = row_weights_B > 0
    return _SoftmaxLoss.apply(
        queries_BQ,
        items_CQ,
        torch.where(is_weighted_B, target_columns_B, 0),
        torch.where(is_weighted_B, row_weights_B, 0).to(queries_BQ.dtype),
        bias_C,
        dtype or queries_BQ.dtype,
        # Inside of a Function gradients are off, so whether one is wanted has to be asked here.
        torch.is_grad_enabled() and (queries_BQ.requires_grad or items_CQ.requires_grad),
    )


class _SoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries_BQ: Tensor,
        items_CQ: Tensor,
        targets_B: Tensor,
        weights_B: Tensor,
        bias_C: Tensor | None,
        dtype: torch.dtype,
        with_gradients: bool,
    ) -> Tensor:
        columns = _Columns.of(items_CQ, bias_C, dtype)
        target_items_BQ = items_CQ.index_select(0, targets_B)
        gradients = _Gradients.empty(queries_BQ, columns.items_CQ.shape[0]) if with_gradients else None
        loss = queries_BQ.new_zeros(())
        is_small = _scores_are_small(queries_BQ, items_CQ, bias_C)
        rows = _block_rows(queries_BQ.shape[0], columns.items_CQ, low_precision=dtype != queries_BQ.dtype)
        # One buffer for all blocks: the allocator would map memory of this size anew for each of them.
        buffer_bC = _score_buffer(columns.items_CQ, min(rows, queries_BQ.shape[0]))
        for block in _blocks(queries_BQ.shape[0], rows):
            queries_bQ, weights_b1 = queries_BQ[block], weights_B[block].unsqueeze(1)
            scores_bC = columns.scores(queries_bQ, out_bC=buffer_bC[: queries_bQ.shape[0]])
            target_b1 = columns.target_scores(queries_bQ, target_items_BQ[block], targets_B[block])
            losses_b1, sums_b1 = _cross_entropy_in_place(scores_bC, target_b1, is_small)
            loss += (losses_b1 * weights_b1).sum()
            if gradients is not None:
                gradients.add_block(block, scores_bC, sums_b1.reciprocal() * weights_b1, queries_bQ, columns.items_CQ)
        if gradients is not None:
            gradients.subtract_targets(queries_BQ, target_items_BQ, targets_B, weights_B.unsqueeze(1))
            ctx.save_for_backward(gradients.queries_BQ, gradients.items_CQ[: items_CQ.shape[0]])
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_queries_BQ, grad_items_CQ = ctx.saved_tensors
        if grad_loss.device.type == "cpu" and float(grad_loss) == 1:
            return grad_queries_BQ, grad_items_CQ, None, None, None, None, None
        return grad_queries_BQ * grad_loss, grad_items_CQ * grad_loss, None, None, None, None, None


@dataclass
class _Columns:
    """Items and bias of all columns, in the kernel's number format.

    Args:
        items_CQ: Items.
        bias_C: Bias of each column; None where all have none, but for those that are left out.
        left_out_X: Columns that are left out, unless they are by their bias.
    """

    items_CQ: Tensor
    bias_C: Tensor | None = None
    left_out_X: Tensor | None = None

    @classmethod
    def of(cls, items_CQ: Tensor, bias_C: Tensor | None, dtype: torch.dtype) -> "_Columns":
        """The columns; a CPU does not add a bias that only leaves out items, which takes a fourth of the product.

        In a lower precision it has more columns, which have no part in the softmax, up to a multiple of `_COLUMN_STEP`.
        """
        if bias_C is None:
            return cls(items_CQ.to(dtype))
        if bias_C.device.type != "cpu":
            return cls(items_CQ.to(dtype), bias_C.to(dtype))
        if dtype != items_CQ.dtype and (missing := -items_CQ.shape[0] % _COLUMN_STEP):
            more_CQ = items_CQ.new_zeros(items_CQ.shape[0] + missing, items_CQ.shape[1], dtype=dtype)
            more_CQ[: items_CQ.shape[0]] = items_CQ
            items_CQ, bias_C = more_CQ, pad(bias_C, (0, missing), value=2 * _LEFT_OUT)
        left_out_X = (bias_C <= _LEFT_OUT).nonzero().squeeze(1)
        if left_out_X.numel() == torch.count_nonzero(bias_C):
            return cls(items_CQ.to(dtype), left_out_X=left_out_X)
        return cls(items_CQ.to(dtype), bias_C.to(dtype))

    def scores(self, queries_bQ: Tensor, out_bC: Tensor) -> Tensor:
        """Scores of a block, written to `out_bC`."""
        queries_bQ = queries_bQ.to(self.items_CQ.dtype)
        if self.bias_C is not None:
            return torch.addmm(self.bias_C, queries_bQ, self.items_CQ.T, out=out_bC)
        torch.mm(queries_bQ, self.items_CQ.T, out=out_bC)
        return out_bC if self.left_out_X is None else out_bC.index_fill_(1, self.left_out_X, _LEFT_OUT)

    def target_scores(self, queries_bQ: Tensor, target_items_bQ: Tensor, targets_b: Tensor) -> Tensor:
        """Scores of the targets, [b, 1], from unrounded vectors: they are half of the loss and cost little."""
        scores_b1 = (queries_bQ * target_items_bQ).sum(dim=1, keepdim=True)
        return scores_b1 if self.bias_C is None else scores_b1 + self.bias_C[targets_b.unsqueeze(1)]


@dataclass
class _Gradients:
    """Gradients of the loss in the queries' number format, with a row for each of `_Columns`."""

    queries_BQ: Tensor
    items_CQ: Tensor

    @classmethod
    def empty(cls, queries_BQ: Tensor, columns: int) -> "_Gradients":
        # Without rows there is no block to write.
        make = queries_BQ.new_empty if queries_BQ.shape[0] else queries_BQ.new_zeros
        return cls(torch.empty_like(queries_BQ), make(columns, queries_BQ.shape[1]))

    def add_block(
        self, block: slice, exps_bC: Tensor, factors_b1: Tensor, queries_bQ: Tensor, items_CQ: Tensor
    ) -> None:
        """Adds the terms of e; factors_b1 is w / Z. The first block of rows comes first, and writes."""
        self.queries_BQ[block] = (exps_bC @ items_CQ) * factors_b1
        weighted_bQ = (queries_bQ * factors_b1).to(exps_bC.dtype)
        if exps_bC.dtype == self.items_CQ.dtype:
            torch.addmm(self.items_CQ, exps_bC.T, weighted_bQ, beta=min(block.start, 1), out=self.items_CQ)
        elif block.start:
            self.items_CQ.add_(exps_bC.T @ weighted_bQ)
        else:
            self.items_CQ.copy_(exps_bC.T @ weighted_bQ)

    def subtract_targets(
        self, queries_BQ: Tensor, target_items_BQ: Tensor, targets_B: Tensor, weights_B1: Tensor
    ) -> None:
        """Subtracts the terms of the targets."""
        self.queries_BQ.sub_(target_items_BQ * weights_B1)
        self.items_CQ.index_add_(0, targets_B, queries_BQ * weights_B1, alpha=-1)


def _scores_are_small(queries_BQ: Tensor, items_CQ: Tensor, bias_C: Tensor | None) -> bool:
    """Whether exp of all scores is far from overflow and underflow, by the largest norms."""
    if queries_BQ.device.type != "cpu" or not queries_BQ.numel() or not items_CQ.numel():
        return False
    reach_C = torch.linalg.vector_norm(queries_BQ, dim=1).max() * torch.linalg.vector_norm(items_CQ, dim=1)
    # An item that its bias takes out of the softmax changes neither bound.
    highest, surest = (reach_C, -reach_C) if bias_C is None else (bias_C + reach_C, bias_C - reach_C)
    return float(highest.max()) < _MAX_UNSHIFTED_SCORE and float(surest.max()) > -_MAX_UNSHIFTED_SCORE


def _cross_entropy_in_place(scores_bC: Tensor, target_b1: Tensor, is_small: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row.

    Args:
        scores_bC: Scores; on return e, which are the probabilities times Z.
        target_b1: Score of each row's target.
        is_small: Whether exp of the scores needs no shift by their maximum.

    Returns:
        Cross-entropies and Z, [b, 1] each, in the number format of the target scores.
    """
    if is_small:
        sums_b1 = _row_sums(scores_bC.exp_(), target_b1.dtype)
        return sums_b1.log() - target_b1, sums_b1
    highest_b1 = scores_bC.amax(dim=1, keepdim=True)
    sums_b1 = _row_sums(scores_bC.sub_(highest_b1).exp_(), target_b1.dtype)
    return sums_b1.log() + highest_b1 - target_b1, sums_b1


def _row_sums(values_bC: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of each row in a number format, [b, 1].

    A CPU would widen a whole block of a lower precision before it sums, which then is not in the cache any more.
    """
    if values_bC.dtype == dtype or values_bC.device.type != "cpu":
        return values_bC.sum(dim=1, keepdim=True, dtype=dtype)
    rows = max(1, _WIDENED_BYTES // (dtype.itemsize * max(1, values_bC.shape[1])))
    wide_rC = values_bC.new_empty(rows, values_bC.shape[1], dtype=dtype)
    parts = values_bC.split(rows)
    return torch.cat([wide_rC[: part_rC.shape[0]].copy_(part_rC).sum(dim=1, keepdim=True) for part_rC in parts])


def _blocks(num_rows: int, block_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, block_rows):
        yield slice(start, start + block_rows)


def _block_rows(num_rows: int, items_CQ: Tensor, low_precision: bool) -> int:
    """Rows of one block.

    In a lower precision blocks have one size, but for the last, which is hardly smaller: a block of few rows widens as
    large a gradient of the items as any.
    """
    block_bytes = _CPU_BLOCK_BYTES if items_CQ.device.type == "cpu" else _GPU_BLOCK_BYTES
    least = _MIN_BLOCK_ROWS_LOW_PRECISION if low_precision else _MIN_BLOCK_ROWS
    rows = max(least, block_bytes // (items_CQ.dtype.itemsize * max(1, items_CQ.shape[0])))
    return max(1, -(-num_rows // max(1, round(num_rows / rows)))) if low_precision else rows


def _score_buffer(items_CQ: Tensor, rows: int) -> Tensor:
    """Memory for the scores of a block, [rows, C].

    In float32 on a CPU it is column-major. The product is then computed as [C, Q] @ [Q, rows]: of a tall matrix each
    thread takes some rows, which makes the whole loss 10 to 25 % faster.
    """
    if items_CQ.device.type == "cpu" and items_CQ.dtype == torch.float32:
        return items_CQ.new_empty(items_CQ.shape[0], rows).T
    return items_CQ.new_empty(rows, items_CQ.shape[0])
