"""A gated recurrent unit with products of bfloat16 against torch's own in float32."""

import pytest
import torch
from torch import Tensor

from llmgr_rec.kernels import gated_recurrence
from llmgr_rec.kernels.gated_recurrence import gru_cell

DIM = 8


def states_and_gradients(rows: int, dtype: torch.dtype) -> list[Tensor]:
    """New states, and the gradients of inputs, states and weights."""
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, 2 * DIM), (rows, DIM), (3 * DIM, 2 * DIM), (3 * DIM, DIM), (3 * DIM,), (3 * DIM,)]
    inputs, states, *weights = (torch.randn(shape, generator=generator).mul_(0.3).requires_grad_() for shape in shapes)
    found = gru_cell(inputs, states, weights, dtype)
    found.backward(torch.randn(rows, DIM, generator=generator))
    return [found.detach(), *(tensor.grad for tensor in (inputs, states, *weights))]


@pytest.mark.parametrize("rows", [0, 1, 4, 9])
def test_rounded_products_change_states_and_gradients_by_their_rounding(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gated_recurrence, "_ROW_STEP", 4)
    expected, found = (states_and_gradients(rows, dtype) for dtype in (torch.float32, torch.bfloat16))
    for plain, rounded in zip(expected, found, strict=True):
        assert rounded.dtype == torch.float32
        assert (rounded - plain).norm() <= 0.02 * plain.norm()
    assert rows == 0 or not torch.equal(expected[0], found[0])
