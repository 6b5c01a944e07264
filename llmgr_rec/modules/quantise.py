"""Linear layers in 8-bit integers, for scoring on a CPU: weights rounded once, activations as they come.

Shapes: X tokens, I input width, O output width.
"""

import torch
from torch import Tensor, nn

_LARGEST = 127


class Int8Linear(nn.Module):
    """A linear layer whose product runs in 8-bit integers with sums in 32 bits.

    Each row of weights has a scale, and so has each token, found when it comes: one large activation does not cost the
    other tokens their resolution.

    Args:
        linear: The layer to replace.
    """

    weight_OI: Tensor
    scale_O: Tensor
    bias_O: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_OI, scale_O1 = _round_rows(linear.weight.detach().float())
        self.register_buffer("weight_OI", weight_OI)
        self.register_buffer("scale_O", scale_O1.squeeze(1))
        self.register_buffer("bias_O", None if linear.bias is None else linear.bias.detach())

    def forward(self, inputs: Tensor) -> Tensor:
        """The layer's result, [.., O] in the type of the inputs [.., I]."""
        rounded_XI, scale_X1 = _round_rows(inputs.flatten(0, -2))
        sums_XO = torch._int_mm(rounded_XI, self.weight_OI.T)
        result_XO = (sums_XO * scale_X1).mul_(self.scale_O).to(inputs.dtype)
        if self.bias_O is not None:
            result_XO = result_XO + self.bias_O
        return result_XO.unflatten(0, inputs.shape[:-1])


def _round_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as integers -127 .. 127, and the scale of each, float32 [.., 1]."""
    scale = rows.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / _LARGEST
    return (rows / scale).round_().to(torch.int8), scale


def quantise_linear_layers(module: nn.Module) -> None:
    """Puts `Int8Linear` in the place of every linear layer.

    Args:
        module: A module without LoRA, changed in place.
    """
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, Int8Linear(child))
        else:
            quantise_linear_layers(child)
