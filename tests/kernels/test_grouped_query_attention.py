import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llmgr_rec.kernels import grouped_query_attention as module_under_test
from llmgr_rec.kernels.grouped_query_attention import (
    GROUPED_QUERY_ATTENTION,
    grouped_query_attention,
    use_grouped_query_attention,
)
from llmgr_rec.storage.pretrained import load_decoder


def layer(groups):
    attention = nn.Module()
    attention.num_key_value_groups = groups
    attention.is_causal = True
    return attention


def run(function, groups, dtype, mask, past=2, **settings):
    torch.manual_seed(0)
    query = torch.randn(3, 2 * groups, 4, 8).to(dtype).requires_grad_()
    key, value = (torch.randn(3, 2, past + 4, 8).to(dtype).requires_grad_() for _ in range(2))
    result, weights = function(layer(groups), query, key, value, mask, **settings)
    assert weights is None
    (result.float() * torch.linspace(-1, 1, result.numel()).view(result.shape)).sum().backward()
    return [tensor.float() for tensor in (result.detach(), query.grad, key.grad, value.grad)]


def causal_mask(past, per_prompt=False):
    mask = (torch.arange(past + 4) <= torch.arange(past, past + 4).unsqueeze(1))[None, None]
    if per_prompt:
        mask = mask.repeat(3, 1, 1, 1)
        mask[1, :, :, 1] = False
    return mask


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("per_prompt", [True, False])
@pytest.mark.parametrize("scaling", [None, 0.2])
def test_equals_the_attention_of_transformers(groups, dtype, tolerance, per_prompt, scaling):
    mask = causal_mask(2, per_prompt)
    found = run(grouped_query_attention, groups, dtype, mask, scaling=scaling)
    expected = run(sdpa_attention_forward, groups, torch.float32, mask, scaling=scaling)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def test_without_mask_each_query_attends_to_what_came_before():
    found = run(grouped_query_attention, 3, torch.float32, None, past=0)
    expected = run(grouped_query_attention, 3, torch.float32, causal_mask(0), past=0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_unknown_kinds_of_attention_are_left_to_transformers(monkeypatch):
    given = []

    def record(*arguments, **settings):
        given.append(settings)
        return sdpa_attention_forward(*arguments)

    monkeypatch.setattr(module_under_test, "sdpa_attention_forward", record)
    run(grouped_query_attention, 3, torch.float32, causal_mask(2), position_ids=torch.arange(4), s_aux=None)
    assert given == []
    run(grouped_query_attention, 3, torch.float32, causal_mask(2), position_bias=torch.zeros(1))
    run(grouped_query_attention, 3, torch.float32, causal_mask(2), dropout=0.5)
    assert [list(settings) for settings in given] == [["position_bias"], []]


def test_decoder_uses_it_with_the_same_result():
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    decoder = load_decoder("random-tiny", dtype="float32")
    before = decoder(input_ids=ids, attention_mask=mask).last_hidden_state
    use_grouped_query_attention(decoder)
    assert decoder.config._attn_implementation == GROUPED_QUERY_ATTENTION
    after = decoder(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(after[mask == 1], before[mask == 1], atol=1e-5, rtol=1e-5)


def test_decoder_with_another_attention_stays_as_it_is():
    decoder = load_decoder("random-tiny", dtype="float32")
    decoder.set_attn_implementation("eager")
    use_grouped_query_attention(decoder)
    assert decoder.config._attn_implementation == "eager"
