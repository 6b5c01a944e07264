"""The packed causal block against torch's own encoder layer, which computes the padding too."""

import pytest
import torch
from torch import Tensor, nn

from llmgr_rec.kernels.packed_sequences import pack_sequences
from llmgr_rec.modules import causal_block
from llmgr_rec.modules.causal_block import CausalBlock
from tests.modules.graphs import graphs_of

DIM, HEADS = 8, 2
ROWS = pack_sequences(graphs_of([[1, 2, 3, 2, 4, 1, 0], [5], [], [3, 3, 1], [0, 7, 0, 7, 0, 8]]), max_clicks=6)
# Ours to torch's.
NAMES = {
    "attention_norm.": "norm1.",
    "query_key_value.": "self_attn.in_proj_",
    "project.": "self_attn.out_proj.",
    "feed_forward_norm.": "norm2.",
    "expand.": "linear1.",
    "contract.": "linear2.",
}


def torchs_layer(dropout: float) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(DIM, HEADS, 4 * DIM, dropout, "gelu", batch_first=True, norm_first=True).double()


def torchs_name(name: str) -> str:
    part = name.rpartition(".")[0] + "."
    return name.replace(part, NAMES[part])


def both(dropout: float = 0.0) -> tuple[CausalBlock, nn.TransformerEncoderLayer]:
    """The two with the same weights, biases and norms that are not their initial ones included."""
    torch.manual_seed(0)
    block, layer = CausalBlock(DIM, HEADS, dropout).double(), torchs_layer(dropout)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    layer.load_state_dict({torchs_name(name): value for name, value in block.state_dict().items()})
    return block, layer


def states() -> Tensor:
    return torch.randn(ROWS.node_L.numel(), DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def padded(layer: nn.TransformerEncoderLayer, states_LD: Tensor) -> Tensor:
    def every_place(set_out: Tensor) -> Tensor:
        length = set_out.shape[1]
        return layer(set_out, src_mask=torch.ones(length, length, dtype=torch.bool).triu(1))

    return ROWS.map_padded(every_place, states_LD)


def test_agrees_with_torchs_layer() -> None:
    block, layer = (module.eval() for module in both(dropout=0.5))
    with torch.no_grad():
        torch.testing.assert_close(block(states(), ROWS), padded(layer, states()), rtol=0, atol=1e-12)


def test_gradients_agree_with_torchs_layer() -> None:
    block, layer = (module.train() for module in both())
    ours, theirs = states().requires_grad_(), states().requires_grad_()
    for result in (block(ours, ROWS), padded(layer, theirs)):
        (result * torch.linspace(-1, 2, DIM, dtype=torch.float64)).sin().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-11)
    expected = dict(layer.named_parameters())
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[torchs_name(name)].grad, rtol=0, atol=1e-11, msg=name)


def test_starts_from_torchs_values() -> None:
    torch.manual_seed(0)
    block, layer = CausalBlock(64, 2, 0.0), nn.TransformerEncoderLayer(64, 2, 256, norm_first=True)
    theirs = dict(layer.named_parameters())
    for name, parameter in block.named_parameters():
        ours, reference = parameter.detach(), theirs[torchs_name(name)].detach()
        assert float(ours.square().mean()) == pytest.approx(float(reference.square().mean()), rel=0.2), name
        assert float(ours.abs().max()) == pytest.approx(float(reference.abs().max()), rel=0.1), name


def test_dropout_acts_where_torchs_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout that drops nothing, what remains is torch's layer."""
    block, layer = both(dropout=0.5)
    calls: list[object] = []

    def keep(weights: Tensor, probability: float) -> Tensor:
        calls.append(probability)
        return weights

    monkeypatch.setattr(block.dropout, "forward", lambda values: calls.append(tuple(values.shape)) or values)
    monkeypatch.setattr(causal_block, "byte_dropout", keep)
    clicks = ROWS.node_L.numel()
    result = block(states(), ROWS)
    # The attention's weights of each bucket, its projection, the hidden layer, the result.
    assert calls == [0.5] * len(ROWS.buckets) + [(clicks, DIM), (clicks, 4 * DIM), (clicks, DIM)]
    torch.testing.assert_close(result, padded(layer.eval(), states()), rtol=0, atol=1e-12)
    calls.clear()
    block.eval()(states(), ROWS)
    assert 0.5 not in calls
