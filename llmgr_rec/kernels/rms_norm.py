"""Root mean square norm (Zhang and Sennrich, arXiv 1910.07467) with a frozen weight, in few passes over the rows.

With r = 1 / sqrt(mean of x^2 + epsilon), n columns and g = weight * (gradient of the result):

    result        = x * r * weight
    gradient of x = g * r - x * r^3 / n * (sum of g * x)

Shapes: X rows, H columns.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(inputs_XH: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
    """Norm of each row; the mean of squares is float32 at least.

    Args:
        inputs_XH: Rows.
        weight_H: Weights of the columns, in the dtype of the rows; gets no gradient.
        epsilon: Added to the mean of squares.

    Returns:
        [X, H], in the dtype of the rows; differentiable once.
    """
    result: Tensor = _RmsNorm.apply(inputs_XH, weight_H, epsilon)
    return result


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs_XH: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
        wide = torch.promote_types(inputs_XH.dtype, torch.float32)
        norm_X1 = torch.linalg.vector_norm(inputs_XH, dim=1, keepdim=True, dtype=wide)
        factor_X1 = norm_X1.square_().div_(inputs_XH.shape[1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(inputs_XH, weight_H, factor_X1)
        return (inputs_XH * factor_X1.to(inputs_XH.dtype)).mul_(weight_H)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_XH: Tensor) -> tuple[Tensor, None, None]:
        inputs_XH, weight_H, factor_X1 = ctx.saved_tensors
        weighted_XH = gradient_XH * weight_H
        sum_X1 = (weighted_XH * inputs_XH).sum(1, keepdim=True, dtype=factor_X1.dtype)
        of_inputs_X1 = sum_X1 * factor_X1**3 / inputs_XH.shape[1]
        weighted_XH.mul_(factor_X1.to(weighted_XH.dtype))
        return weighted_XH.addcmul_(inputs_XH, of_inputs_X1.to(inputs_XH.dtype), value=-1), None, None
