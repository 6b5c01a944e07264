"""Random weights of the language model: the control `random_llm`."""

import pytest
import torch

from llmgr_rec.errors import UserError
from llmgr_rec.experiments import controls
from llmgr_rec.experiments.controls import draw_decoder, drawn_weights_hash
from llmgr_rec.storage.pretrained import load_decoder, weights_hash


def drawn(seed=0, dtype="float32", num_layers=1):
    return draw_decoder("random-tiny", num_layers, dtype, seed=seed)


def matrices(decoder):
    """Weights but for norms, which start at one."""
    return {name: value for name, value in decoder.state_dict().items() if value.dim() > 1}


def test_the_seed_alone_decides_the_weights():
    torch.manual_seed(1)
    first = drawn()
    state = torch.get_rng_state()
    again = drawn()
    assert torch.equal(torch.get_rng_state(), state), "the caller's own draws are disturbed"
    other = matrices(drawn(seed=1))
    for name, value in matrices(first).items():
        assert torch.equal(value, again.state_dict()[name])
        assert not torch.allclose(value, other[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_values_differ_from_the_pretrained_decoder(dtype):
    random, pretrained = drawn(dtype=dtype, num_layers=2), load_decoder("random-tiny", 2, dtype)
    assert random.state_dict().keys() == pretrained.state_dict().keys()
    assert random.dtype == pretrained.dtype
    assert not random.training
    assert not any(parameter.requires_grad for parameter in random.parameters())
    for name, value in matrices(random).items():
        there = pretrained.state_dict()[name]
        assert (value.shape, value.dtype) == (there.shape, there.dtype)
        correlation = torch.corrcoef(torch.stack([value.flatten(), there.flatten()]).float())[0, 1]
        assert abs(correlation) < 0.1, name


def test_another_type_rounds_the_same_weights():
    exact, rounded = drawn(), drawn(dtype="bfloat16")
    for name, value in exact.state_dict().items():
        assert torch.equal(value.bfloat16(), rounded.state_dict()[name])
    assert rounded.rotary_emb.inv_freq.dtype == torch.float32


def test_a_folder_gives_its_architecture(tmp_path):
    saved = load_decoder("random-tiny", 3, "float32")
    saved.save_pretrained(tmp_path)
    decoder = draw_decoder(str(tmp_path), 2, "float32")
    assert len(decoder.layers) == 2
    assert decoder.embed_tokens.weight.shape == saved.embed_tokens.weight.shape
    assert not torch.allclose(decoder.embed_tokens.weight, saved.embed_tokens.weight)
    with pytest.raises(UserError, match=r"llm\.num_layers is 4, but .* has 3 layers"):
        draw_decoder(str(tmp_path), 4)


def test_the_hash_tells_weights_apart():
    hashes = {drawn_weights_hash("random-tiny", seed) for seed in range(4)} | {weights_hash("random-tiny")}
    assert len(hashes) == 5
    assert drawn_weights_hash.__wrapped__("random-tiny", 3) == drawn_weights_hash("random-tiny", 3)


@pytest.mark.parametrize(("factor", "same"), [(1 + 1e-6, True), (1.1, False), (-1.0, False)])
def test_the_hash_overlooks_the_last_bits_alone(monkeypatch, factor, same):
    before = drawn_weights_hash("random-tiny", 0)
    decoder = drawn()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(factor)
    monkeypatch.setattr(controls, "draw_decoder", lambda *_, **__: decoder)
    assert (drawn_weights_hash.__wrapped__("random-tiny", 0) == before) == same
