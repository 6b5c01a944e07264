import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from llmgr_rec.kernels.fused_lora import ByteDropout, FusedLora, fuse_lora


def make(dropout=0.0, dtype=torch.float32):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).to(dtype)
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=6.0, lora_dropout=dropout, target_modules=["0", "1"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def run(model, inputs):
    model.zero_grad()
    outputs = model(inputs)
    outputs.square().sum().backward()
    return [outputs.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
def test_fused_equals_peft(shape):
    """In float64, where the order of sums, which the processor chooses, is far below the tolerance."""
    model = make(dtype=torch.float64)
    inputs = torch.randn(shape if len(shape) > 1 else (1, 6), dtype=torch.float64)
    plain = run(model, inputs)
    fuse_lora(model)
    assert all(isinstance(m.lora_variant["default"], FusedLora) for m in model.modules() if hasattr(m, "lora_variant"))
    for fast, expected in zip(run(model, inputs), plain, strict=True):
        assert fast.dtype == torch.float64
        torch.testing.assert_close(fast, expected)


def test_saved_adapter_is_a_plain_one(tmp_path):
    model = make(dropout=0.5).eval()
    fuse_lora(model)
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(make().base_model.unload(), tmp_path).eval()
    inputs = torch.randn(3, 6)
    torch.testing.assert_close(model(inputs), plain(inputs))


@pytest.mark.parametrize("safe", [True, False])
def test_merging_keeps_the_result_and_can_be_undone(safe):
    model = make(dtype=torch.float64).eval()
    fuse_lora(model)
    inputs = torch.randn(3, 6, dtype=torch.float64)
    before, weight = model(inputs), model.base_model.model[0].weight.clone()
    model.merge_adapter(safe_merge=safe)
    assert not torch.equal(model.base_model.model[0].weight, weight)
    torch.testing.assert_close(model(inputs), before)
    model.unmerge_adapter()
    torch.testing.assert_close(model.base_model.model[0].weight, weight)


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
