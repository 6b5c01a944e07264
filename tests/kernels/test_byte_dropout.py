import pytest
import torch

from llmgr_rec.kernels.byte_dropout import ByteDropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probability", [0.05, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(dtype, probability):
    torch.manual_seed(0)
    inputs = torch.ones(500, 401, dtype=dtype, requires_grad=True)
    outputs = ByteDropout(probability)(inputs)
    share = float((outputs == 0).float().mean())
    assert abs(share - probability) < 0.005
    assert abs(float(outputs.detach().float().mean()) - 1) < 0.01
    outputs.sum().backward()
    assert torch.equal(inputs.grad, outputs.detach())


def test_dropout_drops_all_positions_equally():
    """Each byte of a drawn word is used, and none is drawn from fewer values."""
    torch.manual_seed(0)
    dropout = ByteDropout(0.5)
    kept_16 = sum((dropout(torch.ones(16)) > 0).float() for _ in range(2000)) / 2000
    assert (kept_16 - 0.5).abs().max() < 0.06


def test_dropout_follows_the_seed_and_rests_in_eval_mode():
    dropout, inputs = ByteDropout(0.3), torch.randn(5, 7)
    torch.manual_seed(1)
    first = dropout(inputs)
    assert not torch.equal(dropout(inputs), first)
    torch.manual_seed(1)
    assert torch.equal(dropout(inputs), first)
    assert dropout.eval()(inputs) is inputs
    assert (ByteDropout(1.0)(inputs) == 0).all()
    assert ByteDropout(0.0)(inputs) is inputs
