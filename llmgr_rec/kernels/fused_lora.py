"""PEFT's LoRA layers with fewer passes over activations.

With base weight W, LoRA matrices A and B and scale c, a layer computes

    PEFT:  y = x @ W.T;  y = y + c * (dropout(x) @ A.T @ B.T)         scale and sum at output width O
    here:  y = x @ W.T;  y = addmm(y, c * (dropout(x) @ A.T), B.T)    scale at rank R, sum inside the product

and dropout draws one random byte for each activation in place of a 64-bit number. On a CPU, PEFT's scale, sum and
dropout cost as much as the products with W. Names, state and saved files are PEFT's.

Merged bfloat16 weights are rounded at random. W is of that format, and a LoRA term is far smaller than the distance of
its numbers: rounded to the nearest, most weights would stay as they were.

Shapes: X tokens, I input width, O output width, R rank.
"""

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

from llmgr_rec.kernels.byte_dropout import ByteDropout


class FusedLora(LoraVariant):
    """PEFT's LoRA with the scale applied at rank R and the sum folded into the product with B."""

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Base result plus the LoRA term, [.., O]."""
        low_rank = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        low_rank_XR = low_rank.flatten(0, -2) * module.scaling[active_adapter]
        weight_OR = module.lora_B[active_adapter].weight
        return torch.addmm(result.flatten(0, -2), low_rank_XR, weight_OR.T).view_as(result)

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """A new weight with the LoRA term in it."""
        return round_at_random(orig_weight + module.get_delta_weight(active_adapter), orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """Adds the LoRA term to a weight in place."""
        orig_weight.data.copy_(FusedLora.merge_safe(module, active_adapter, orig_weight))

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight without the LoRA term."""
        return orig_weight.data - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


def round_at_random(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds float32 to bfloat16, up or down with the chances that keep the mean (Gupta et al., arXiv 1502.02551).

    The draws are the same in each call, so equal values give equal results.

    Args:
        values: Finite values.
        dtype: Format of the result; others than bfloat16 are rounded to the nearest.
    """
    if dtype != torch.bfloat16:
        return values.to(dtype)
    generator = torch.Generator(values.device).manual_seed(0)
    # A bfloat16 is the upper half of a float32; the lower half carries over as often as it is large.
    draws = torch.randint(1 << 16, values.shape, generator=generator, dtype=torch.int32, device=values.device)
    bits = values.contiguous().view(torch.int32).add(draws).bitwise_and_(-1 << 16)
    return bits.view(torch.float32).to(dtype)


def fuse_lora(model: PeftModel) -> None:
    """Switches the plain LoRA layers of a model to `FusedLora` and `ByteDropout`; state and saved files stay the same.

    Args:
        model: A model with LoRA layers, changed in place.
    """
    for module in model.modules():
        if not isinstance(module, LoraLinear):
            continue
        # Autocast brings input and weight together; PEFT would widen every input to the float32 of the LoRA weights.
        module.cast_input_dtype_enabled = module.get_base_layer().weight.dtype == torch.float32
        for adapter, dropout in module.lora_dropout.items():
            module.lora_variant.setdefault(adapter, FusedLora())
            if isinstance(dropout, nn.Dropout) and not isinstance(dropout, ByteDropout):
                module.lora_dropout[adapter] = ByteDropout(dropout.p).train(dropout.training)
