"""Rotary position embedding (Su et al., arXiv 2104.09864) of heads, in transformers' order of columns.

With the halves x1, x2 of a head's columns:

    y1 = x1 * cos1 - x2 * sin1        y2 = x2 * cos2 + x1 * sin2

Shapes: Y tokens, h heads, E columns of a head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotate(heads_YhE: Tensor, cos_YE: Tensor, sin_YE: Tensor) -> Tensor:
    """Rotates each head of each token by the angles of its position.

    Args:
        heads_YhE: Queries or keys.
        cos_YE: Cosines of the angles.
        sin_YE: Their sines.

    Returns:
        [Y, h, E]; differentiable once, with respect to the heads.
    """
    rotated: Tensor = _Rotation.apply(heads_YhE, cos_YE.unsqueeze(1), sin_YE.unsqueeze(1))
    return rotated


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads_YhE: Tensor, cos_Y1E: Tensor, sin_Y1E: Tensor) -> Tensor:
        ctx.save_for_backward(cos_Y1E, sin_Y1E)
        first, second = heads_YhE.chunk(2, dim=2)
        sin_1, sin_2 = sin_Y1E.chunk(2, dim=2)
        rotated = heads_YhE * cos_Y1E
        rotated_1, rotated_2 = rotated.chunk(2, dim=2)
        rotated_1.addcmul_(second, sin_1, value=-1)
        rotated_2.addcmul_(first, sin_2)
        return rotated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_YhE: Tensor) -> tuple[Tensor, None, None]:
        cos_Y1E, sin_Y1E = ctx.saved_tensors
        first, second = gradient_YhE.chunk(2, dim=2)
        sin_1, sin_2 = sin_Y1E.chunk(2, dim=2)
        of_heads = gradient_YhE * cos_Y1E
        of_first, of_second = of_heads.chunk(2, dim=2)
        of_first.addcmul_(second, sin_2)
        of_second.addcmul_(first, sin_1, value=-1)
        return of_heads, None, None
