import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from llmgr_rec.kernels.fused_lora import FusedLora, fuse_lora


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
