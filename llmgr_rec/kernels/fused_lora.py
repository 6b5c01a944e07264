"""PEFT's LoRA layers with fewer passes over activations.

With base weight W, LoRA matrices A and B and scale c, a layer computes

    PEFT:  y = x @ W.T;  y = y + c * (dropout(x) @ A.T @ B.T)         scale and sum at output width O
    here:  y = x @ W.T;  y = addmm(y, c * (dropout(x) @ A.T), B.T)    scale at rank R, sum inside the product

and dropout draws one random byte for each activation in place of a 64-bit number. On a CPU, PEFT's scale, sum and
dropout cost as much as the products with W. Names, state and saved files are PEFT's.

Shapes: X tokens, I input width, O output width, R rank.
"""

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn
from torch.nn import functional

_BYTE_VALUES = 256


class ByteDropout(nn.Module):
    """Dropout that draws one random byte for each activation on the CPU.

    An activation is dropped if its byte is below the threshold p * 256. The others are scaled by
    256 / (256 - threshold), so that the mean stays exact whatever p is rounded to.

    Args:
        probability: Chance of dropping an activation, 0 to 1; on the CPU rounded to a multiple of 1/256.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.threshold = round(probability * _BYTE_VALUES)

    def forward(self, inputs: Tensor) -> Tensor:
        """Drops activations in training mode and scales up the others."""
        if not self.training or self.threshold == 0:
            return inputs
        if inputs.device.type != "cpu" or self.threshold == _BYTE_VALUES:
            return functional.dropout(inputs, self.probability)
        # The generator is asked for 64-bit numbers, each of which is eight bytes.
        words = torch.empty((inputs.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        bytes_ = words.view(torch.uint8)[: inputs.numel()].view(inputs.shape)
        # 1 from the threshold on and 0 below it: torch's CPU kernels clamp eight times faster than they compare.
        mask = (bytes_.clamp_(self.threshold - 1, self.threshold) - (self.threshold - 1)).to(inputs.dtype)
        return inputs * mask.mul_(_BYTE_VALUES / (_BYTE_VALUES - self.threshold))


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
        return (orig_weight + module.get_delta_weight(active_adapter)).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """Adds the LoRA term to a weight in place."""
        orig_weight.data.copy_(orig_weight + module.get_delta_weight(active_adapter))

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight without the LoRA term."""
        return orig_weight.data - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


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
            if isinstance(dropout, nn.Dropout):
                module.lora_dropout[adapter] = ByteDropout(dropout.p).train(dropout.training)
