"""Products of one input with several frozen weights and their LoRA matrices (Hu et al., arXiv 2106.09685).

With the frozen weight W of a layer, its LoRA matrices A and B and scale c:

    y = x @ W.T + c * (dropout(x) @ A.T) @ B.T

The layers of a call share x, and so one product with their stacked A matrices and one gradient of x, in which all
products are added in place. W and its bias get no gradient.

Shapes: X tokens, I columns of the input, O columns of a layer's result, R rank, S the sum of the ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


@dataclass(frozen=True)
class LoraProduct:
    """A linear layer with LoRA.

    Args:
        weight_OI: Frozen weight, in the dtype of the inputs.
        bias_O: Frozen bias, or None.
        a_RI: LoRA matrix A, of any dtype.
        b_OR: LoRA matrix B, of any dtype.
        scale: Factor of the LoRA term.
    """

    weight_OI: Tensor
    bias_O: Tensor | None
    a_RI: Tensor
    b_OR: Tensor
    scale: float


def lora_products(inputs_XI: Tensor, dropped_XI: Tensor | None, products: Sequence[LoraProduct]) -> tuple[Tensor, ...]:
    """Results of layers with a common input, in the dtype of the input.

    Args:
        inputs_XI: The input.
        dropped_XI: The input of the LoRA terms, after dropout; None takes the input.
        products: The layers.

    Returns:
        [X, O] for each layer; differentiable once, with respect to the inputs and the LoRA matrices.
    """
    frozen = [(product.weight_OI, product.bias_O, product.scale) for product in products]
    matrices = [matrix for product in products for matrix in (product.a_RI, product.b_OR)]
    weights = [product.weight_OI for product in products]
    results: tuple[Tensor, ...] = _LoraProducts.apply(
        inputs_XI, dropped_XI, [(bias, scale) for _, bias, scale in frozen], *weights, *matrices
    )
    return results


class _LoraProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs_XI: Tensor,
        dropped_XI: Tensor | None,
        settings: list[tuple[Tensor | None, float]],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        count, dtype = len(settings), inputs_XI.dtype
        weights, matrices = tensors[:count], tensors[count:]
        stacked_SI = torch.cat(matrices[::2]).to(dtype)
        b_matrices = [matrix.to(dtype) for matrix in matrices[1::2]]
        low_XS = functional.linear(inputs_XI if dropped_XI is None else dropped_XI, stacked_SI)
        ranks = [matrix.shape[1] for matrix in b_matrices]
        parts = [part.mul(scale) for part, (_, scale) in zip(low_XS.split(ranks, dim=1), settings, strict=True)]
        results = []
        for weight_OI, (bias_O, _), low_XR, b_OR in zip(weights, settings, parts, b_matrices, strict=True):
            results.append(functional.linear(inputs_XI, weight_OI, bias_O).addmm_(low_XR, b_OR.T))
        ctx.scales = [scale for _, scale in settings]
        ctx.dtypes = [matrix.dtype for matrix in matrices]
        ctx.has_dropout = dropped_XI is not None
        lora_inputs = inputs_XI if dropped_XI is None else dropped_XI
        ctx.save_for_backward(lora_inputs, stacked_SI, *weights, *b_matrices, *parts)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        lora_inputs_XI, stacked_SI, *tensors = ctx.saved_tensors
        count = len(gradients)
        weights, b_matrices, parts = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        of_low = [
            (gradient @ b).mul_(scale) for gradient, b, scale in zip(gradients, b_matrices, ctx.scales, strict=True)
        ]
        of_low_XS = of_low[0] if count == 1 else torch.cat(of_low, dim=1)
        of_inputs_XI = gradients[0] @ weights[0] if ctx.needs_input_grad[0] else None
        if of_inputs_XI is not None:
            for gradient, weight_OI in zip(gradients[1:], weights[1:], strict=True):
                of_inputs_XI.addmm_(gradient, weight_OI)
        of_dropped_XI = of_low_XS @ stacked_SI if ctx.has_dropout else None
        if not ctx.has_dropout and of_inputs_XI is not None:
            of_inputs_XI.addmm_(of_low_XS, stacked_SI)
        of_a = (of_low_XS.T @ lora_inputs_XI).split([b.shape[1] for b in b_matrices])
        of_b = [gradient.T @ low_XR for gradient, low_XR in zip(gradients, parts, strict=True)]
        of_matrices = [matrix for pair in zip(of_a, of_b, strict=True) for matrix in pair]
        of_matrices = [matrix.to(dtype) for matrix, dtype in zip(of_matrices, ctx.dtypes, strict=True)]
        return of_inputs_XI, of_dropped_XI, None, *[None] * count, *of_matrices
