"""The adapter of a bundle loads with peft alone, onto the decoder and onto the causal language model around it."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from llmgr_rec.errors import UserError
from llmgr_rec.modules.language_model import LoraLanguageModel
from llmgr_rec.storage.adapter_files import load_adapter, save_adapter
from llmgr_rec.storage.bundle import load_bundle
from llmgr_rec.storage.pretrained import load_decoder, load_tokenizer, saved_model
from tests.modules.random_weights import randomize_dense_weights
from tests.small_run import small_run

IDS = torch.tensor([[5, 100, 42, 7]])


def lora_model(name: str, num_layers: int) -> LoraLanguageModel:
    return LoraLanguageModel(load_decoder(name, num_layers, "float32"), rank=2, alpha=4.0, dropout=0.1).eval()


@pytest.fixture(params=["random-tiny", "gpt2"])
def name(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LLMGR_CACHE", str(tmp_path / "cache"))
    if request.param == "random-tiny":
        return "random-tiny"
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=3, n_head=2)).save_pretrained(tmp_path / "gpt2")
    load_tokenizer("random-tiny").save_pretrained(tmp_path / "gpt2")
    return str(tmp_path / "gpt2")


@torch.no_grad()
def last_hidden(model: PeftModel) -> Tensor:
    return model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]


def test_peft_loads_the_adapter_onto_both_classes(name: str, tmp_path: Path) -> None:
    trained = lora_model(name, 2)
    plain = last_hidden(trained.decoder)
    for weight in (weight for key, weight in trained.named_parameters() if "lora_" in key):
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(weight.numel()), std=0.2)
    expected = last_hidden(trained.decoder)
    assert (expected - plain).abs().max() > 0.01
    weights = {key: value for key, value in trained.decoder.state_dict().items() if "lora_" in key}
    save_adapter(trained.decoder, weights, tmp_path / "lora", saved_model(name, 2))

    base = json.loads((tmp_path / "lora/adapter_config.json").read_text())["base_model_name_or_path"]
    size = {"n_layer": 2} if name != "random-tiny" else {}
    for loader in (AutoModel, AutoModelForCausalLM):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            found = PeftModel.from_pretrained(loader.from_pretrained(base, **size), tmp_path / "lora").eval()
        torch.testing.assert_close(last_hidden(found), expected, atol=1e-5, rtol=1e-5)
    # The other layers of the whole model stay as they are.
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    assert len([key for key, _ in whole.named_parameters() if "lora_B" in key]) == len(weights) // 2


def test_the_adapter_is_read_back_also_as_it_was_written_before(name: str, tmp_path: Path) -> None:
    trained, again, former = (lora_model(name, 1) for _ in range(3))
    randomize_dense_weights(torch.nn.ModuleDict({"language_model": trained}))
    weights = {key: value for key, value in trained.decoder.state_dict().items() if "lora_" in key}
    save_adapter(trained.decoder, weights, tmp_path / "lora", name)
    assert load_adapter(again.decoder, tmp_path / "lora") == []
    assert all(torch.equal(again.decoder.state_dict()[key], value) for key, value in weights.items())

    file = tmp_path / "lora/adapter_model.safetensors"
    stored = load_file(file)
    outer = f"base_model.model.{trained.base.base_model_prefix}."
    short = {key: value for key, value in stored.items() if not key.startswith(outer)}
    assert len(short) == len(weights) == len(stored) // 2
    save_file(short, file)
    assert load_adapter(former.decoder, tmp_path / "lora") == []
    assert all(torch.equal(former.decoder.state_dict()[key], value) for key, value in weights.items())

    first = min(short)
    save_file({key: value for key, value in short.items() if key != first}, file)
    (missing,) = load_adapter(former.decoder, tmp_path / "lora")
    assert missing.startswith(first.removesuffix(".weight"))
    save_file({**short, first.replace("0", "7", 1): short[first].clone()}, file)
    with pytest.raises(UserError, match=r"has LoRA weights for .*7.*, which the model lacks"):
        load_adapter(former.decoder, tmp_path / "lora")


def test_the_adapter_of_a_bundle_names_a_base_model_that_loads() -> None:
    bundle = small_run().run / "export" / "behave"
    settings = json.loads((bundle / "lora" / "adapter_config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(settings["base_model_name_or_path"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        found = PeftModel.from_pretrained(model, bundle / "lora").eval()
    own = load_bundle(bundle, dtype="float32").model.language_model.decoder
    torch.testing.assert_close(last_hidden(found), last_hidden(own), atol=1e-5, rtol=1e-5)
