"""Linear layers in 8-bit integers."""

import pytest
import torch
from torch import nn

from llmgr_rec.modules.quantise import Int8Linear, quantise_linear_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 48), (40, 48), (2, 17, 48)])
def test_close_to_the_layer_it_replaces(shape, bias, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(48, 32, bias=bias).to(dtype)
    inputs = torch.randn(shape).to(dtype)
    outputs, expected = Int8Linear(linear)(inputs), linear(inputs)
    assert outputs.dtype == dtype
    assert outputs.shape == expected.shape
    assert (outputs - expected).float().norm() < 0.02 * expected.float().norm()


def test_integers_are_exact():
    linear = nn.Linear(16, 8, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randint(-127, 128, (8, 16)))
        linear.weight[:, 0] = 127
    inputs = torch.randint(-127, 128, (20, 16)).float()
    inputs[:, 0] = 127
    torch.testing.assert_close(Int8Linear(linear)(inputs), inputs @ linear.weight.T, rtol=1e-6, atol=1e-2)


def test_a_large_token_leaves_the_others_their_resolution():
    torch.manual_seed(0)
    layer, inputs = Int8Linear(nn.Linear(16, 8)), torch.randn(3, 16)
    beside_large = torch.cat([inputs, 1e4 * inputs[:1]])
    torch.testing.assert_close(layer(beside_large)[:3], layer(inputs))


def test_a_zero_token_and_no_token_pass():
    layer = Int8Linear(nn.Linear(16, 8, bias=False))
    assert torch.equal(layer(torch.zeros(2, 16)), torch.zeros(2, 8))
    assert layer(torch.zeros(0, 16)).shape == (0, 8)


def test_every_linear_layer_is_replaced_and_nothing_else():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), nn.Embedding(3, 8))
    quantise_linear_layers(model)
    kinds = [type(module) for module in model.modules() if not isinstance(module, nn.Sequential)]
    assert kinds == [Int8Linear, nn.LayerNorm, Int8Linear, nn.Embedding]
