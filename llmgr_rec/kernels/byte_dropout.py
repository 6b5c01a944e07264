"""Dropout that draws one random byte for each activation on the CPU.

`torch.nn.functional.dropout` draws a random number of 64 bits for each activation there, which takes longer than many
layers that it follows.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

_BYTE_VALUES = 256


def byte_dropout(inputs: Tensor, probability: float) -> Tensor:
    """Drops activations and scales up the others.

    On the CPU, an activation is dropped if its byte is below the threshold p * 256. The others are scaled by
    256 / (256 - threshold), so that the mean stays exact whatever p is rounded to. On other devices and while compiling
    it is torch's dropout.

    Args:
        inputs: Activations of any shape.
        probability: Chance of dropping an activation, 0 to 1; on the CPU rounded to a multiple of 1/256.
    """
    threshold = round(probability * _BYTE_VALUES)
    if threshold == 0:
        return inputs
    if inputs.device.type != "cpu" or threshold == _BYTE_VALUES or torch.compiler.is_compiling():
        return functional.dropout(inputs, probability)
    # The generator is asked for 64-bit numbers, each of which is eight bytes.
    words = torch.empty((inputs.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    bytes_ = words.view(torch.uint8)[: inputs.numel()].view(inputs.shape)
    # 1 from the threshold on and 0 below it: torch's CPU kernels clamp eight times faster than they compare.
    mask = bytes_.clamp_(threshold - 1, threshold).sub_(threshold - 1).to(inputs.dtype)
    return inputs * mask.mul_(_BYTE_VALUES / (_BYTE_VALUES - threshold))


class ByteDropout(nn.Dropout):
    """`byte_dropout` as a layer, which rests in eval mode.

    Args:
        p: Chance of dropping an activation, 0 to 1.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Drops activations in training mode and scales up the others."""
        return byte_dropout(input, self.p) if self.training else input
