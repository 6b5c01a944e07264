"""Language models that are prepared for inference give the same hidden states."""

import copy

import pytest
import torch

from llmgr_rec.modules.prepare_for_inference import prepare_for_inference
from tests.modules.small_llmgr import make_batch, make_llmgr


@torch.no_grad()
def hidden(model):
    batch = make_batch()
    return model.encode(model.look_up(batch), batch, "behave")


@pytest.mark.parametrize("packs_prompts", [True, False])
def test_merging_lora_changes_no_hidden_state(packs_prompts):
    model = make_llmgr().eval()
    model.language_model.packs_prompts = packs_prompts
    before = hidden(model)
    prepare_for_inference(model.language_model)
    assert not [name for name, _ in model.named_parameters() if "lora_" in name]
    torch.testing.assert_close(hidden(model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packs_prompts", [True, False])
def test_fewer_layers_are_the_first_ones(packs_prompts):
    model = make_llmgr().eval()
    model.language_model.packs_prompts = packs_prompts
    one_layer = copy.deepcopy(model)
    # A second layer that adds nothing to what the first one gives.
    for name, parameter in one_layer.language_model.named_parameters():
        if "layers.1." in name and ("o_proj" in name or "down_proj" in name):
            torch.nn.init.zeros_(parameter)
    assert not torch.allclose(hidden(model), hidden(one_layer), atol=1e-3)
    prepare_for_inference(model.language_model, num_layers=1)
    torch.testing.assert_close(hidden(model), hidden(one_layer), rtol=1e-5, atol=1e-5)


def test_more_layers_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="not have 3 layers"):
        prepare_for_inference(make_llmgr().language_model, num_layers=3)
