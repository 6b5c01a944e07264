import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from llmgr_rec.kernels.fused_lora import FusedLora, fuse_lora, round_at_random


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


@pytest.mark.parametrize("safe", [True, False])
def test_merged_bfloat16_weights_keep_a_term_that_is_smaller_than_their_steps(safe):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(256, 256)).to(torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=2.0, target_modules=["0"]))
    fuse_lora(model)
    layer = model.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight, std=1e-3)
    before, term = layer.get_base_layer().weight.detach().float(), layer.get_delta_weight("default").detach()
    model.merge_adapter(safe_merge=safe)
    change = layer.get_base_layer().weight.detach().float() - before
    assert term.abs().max() < 0.1 * before.abs().mean()
    # 0.69 by rounding to the nearest.
    assert float((change * term).sum() / term.square().sum()) == pytest.approx(1, abs=0.1)


def test_rounding_at_random_keeps_what_bfloat16_has_and_repeats_itself():
    exact = torch.randn(1000).bfloat16().float()
    assert torch.equal(round_at_random(exact, torch.bfloat16).float(), exact)
    values = torch.randn(100_000)
    rounded = round_at_random(values, torch.bfloat16)
    assert torch.equal(rounded, round_at_random(values, torch.bfloat16))
    assert float((rounded.float() / values - 1).abs().max()) <= 2**-7
    assert abs(float((rounded.float() - values).mean())) < 2**-9 * 0.02
