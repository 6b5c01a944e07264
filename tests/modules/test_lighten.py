"""Language models made light read as before."""

import copy

import pytest
import torch

from llmgr_rec.modules.lighten import lighten
from tests.modules.small_llmgr import make_batch, make_llmgr


@torch.no_grad()
def readings(model):
    batch = make_batch()
    return model.read(model.look_up(batch), batch, "behave")


@pytest.mark.parametrize("share_prefix", [True, False])
def test_without_lora_layers_it_reads_the_same(share_prefix):
    model = make_llmgr().eval()
    model.language_model.share_prefix = share_prefix
    before = readings(model)
    lighten(model.language_model)
    assert not [name for name, _ in model.named_parameters() if "lora_" in name]
    torch.testing.assert_close(readings(model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share_prefix", [True, False])
def test_fewer_layers_are_the_first_ones(share_prefix):
    model = make_llmgr().eval()
    model.language_model.share_prefix = share_prefix
    one_layer = copy.deepcopy(model)
    # A second layer that adds nothing to what the first one gives.
    for name, parameter in one_layer.language_model.named_parameters():
        if "layers.1." in name and ("o_proj" in name or "down_proj" in name):
            torch.nn.init.zeros_(parameter)
    assert not torch.allclose(readings(model), readings(one_layer), atol=1e-3)
    lighten(model.language_model, num_layers=1)
    torch.testing.assert_close(readings(model), readings(one_layer), rtol=1e-5, atol=1e-5)


def test_more_layers_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="first 3 layers"):
        lighten(make_llmgr().language_model, num_layers=3)
