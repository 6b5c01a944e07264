"""L2 normalization of vectors, with a backward pass of half the memory traffic of torch's.

Shapes: X vectors, D columns.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# As in torch.nn.functional.normalize: smaller norms are replaced by this.
_MIN_NORM = 1e-12


class _Normalize(torch.autograd.Function):
    """L2 normalization whose backward pass goes over the vectors half as often as that of torch."""

    @staticmethod
    def forward(ctx: Any, vectors_XD: Tensor) -> Tensor:
        norms_X1 = torch.linalg.vector_norm(vectors_XD, dim=1, keepdim=True)
        inverse_X1 = norms_X1.clamp(min=_MIN_NORM).reciprocal()
        units_XD = vectors_XD * inverse_X1
        ctx.save_for_backward(units_XD, inverse_X1, norms_X1 > _MIN_NORM)
        return units_XD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XD: Tensor) -> Tensor:
        units_XD, inverse_X1, is_unit_X1 = ctx.saved_tensors
        along_X1 = torch.linalg.vecdot(grad_XD, units_XD).unsqueeze(1) * is_unit_X1
        return torch.addcmul(grad_XD, units_XD, along_X1, value=-1).mul_(inverse_X1)


def normalize(vectors_XD: Tensor) -> Tensor:
    """Divides each row by its Euclidean norm, [X, D]; same result as `torch.nn.functional.normalize`.

    Args:
        vectors_XD: Vectors; rows of zeros stay zeros.
    """
    return _Normalize.apply(vectors_XD)


def divisors(vectors_XD: Tensor) -> Tensor:
    """What `normalize` divides each row by, [X, 1].

    Args:
        vectors_XD: Vectors.
    """
    return torch.linalg.vector_norm(vectors_XD, dim=1, keepdim=True).clamp(min=_MIN_NORM)
