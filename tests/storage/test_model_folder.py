"""Model folders from elsewhere: their code is never run, whatever loads them, and stdin is never asked."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmgr_rec.config import LLMConfig
from llmgr_rec.config_file import load_config, save_config
from llmgr_rec.errors import UserError
from llmgr_rec.evaluate import main as evaluate
from llmgr_rec.experiments.controls import draw_decoder, drawn_weights_hash
from llmgr_rec.plan import main as plan
from llmgr_rec.score import main as score
from llmgr_rec.storage.bundle import load_bundle
from llmgr_rec.storage.bundle_export import export_bundle
from llmgr_rec.storage.model_factory import ModelFactory, meta_language_parts
from llmgr_rec.storage.pretrained import decoder_config, load_decoder, load_tokenizer, num_decoder_layers
from llmgr_rec.train import main as train
from tests.small_run import ONE_RANK, config, run_with, small_run

REFUSED = r"needs code of its own \(auto_map\), and model code from folders is not run"
CODE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

Path({marker!r}).write_text(__name__)
"""


def save_model(folder: Path) -> Path:
    """Saves a harmless LLaMA of one layer with its tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(folder)
    load_tokenizer("random-tiny").save_pretrained(folder)
    return folder


def plant(folder: Path, model_type: str) -> Path:
    """Adds code that writes a marker, as the class of the configuration, the model and the tokenizer.

    Args:
        folder: Of `save_model`.
        model_type: One that transformers knows, or does not.

    Returns:
        The marker.
    """
    marker = folder / "marker"
    (folder / "planted.py").write_text(CODE.format(marker=str(marker)))
    classes = {"AutoConfig": "planted.LlamaConfig", "AutoModel": "planted.LlamaModel"}
    tokenizer = {"AutoTokenizer": ["planted.PreTrainedTokenizerFast", "planted.PreTrainedTokenizerFast"]}
    for name, added in (
        ("config.json", {"model_type": model_type, "auto_map": {**classes, **tokenizer}}),
        ("tokenizer_config.json", {"tokenizer_class": "Planted", "auto_map": tokenizer}),
    ):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **added}))
    return marker


@pytest.fixture
def no_questions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions that stdin was asked, each answered with yes."""
    asked: list[str] = []

    def answer(question: str = "") -> str:
        asked.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    return asked


def run_on(folder: Path, model: Path) -> Path:
    """A run whose last stage has the language model of a folder."""
    settings = config()
    settings.llm = LLMConfig(name_or_path=str(model), num_layers=1, lora_rank=2)
    factory, catalog, cpu = ModelFactory(), small_run().catalog, torch.device("cpu")
    spec = factory.spec("behave", settings, catalog)
    built = factory.build(spec, factory.language_parts(spec, catalog, cpu), cpu)
    run = run_with(folder, "sbr")
    save_config(settings, run / "config.yaml")
    export_bundle(built, "behave", settings, catalog, run / "export" / "behave", ONE_RANK)
    return run


def test_no_command_runs_the_code_of_a_model_folder(tmp_path: Path, no_questions: list[str]) -> None:
    model = save_model(tmp_path / "model")
    run, name, catalog = run_on(tmp_path / "run", model), str(model), small_run().catalog
    marker = plant(model, "planted")
    dataset, out = str(small_run().dataset.path), str(tmp_path / "out")
    settings = load_config(run / "config.yaml")
    spec = ModelFactory().spec("behave", settings, catalog)
    llm = ["--llm.name_or_path", name, "--llm.num_layers", "1"]
    entries: list[Callable[[], object]] = [
        lambda: plan(["--num_items", "9", "--config", "llm", *llm]),
        lambda: train(["--config", "quickstart", "--dataset", dataset, "--output", out, *llm]),
        lambda: evaluate(["--run", str(run), "--dataset", dataset, "--output", out]),
        lambda: score(["--run", str(run), "--input", str(small_run().dataset.path / "test"), "--output", out]),
        lambda: load_bundle(run / "export" / "behave"),
        lambda: ModelFactory().language_parts(spec, catalog, torch.device("cpu")),
        lambda: ModelFactory().item_tokens(settings, catalog),
        lambda: ModelFactory().prompts(settings),
        lambda: meta_language_parts(spec),
        lambda: load_decoder(name),
        lambda: decoder_config(name),
        lambda: num_decoder_layers(name),
        lambda: draw_decoder(name),
        lambda: drawn_weights_hash(name, 0),
    ]
    for entry in entries:
        with pytest.raises(UserError, match=REFUSED) as refused:
            entry()
        assert len(str(refused.value).splitlines()) == 1
        assert not marker.exists()
    assert not Path(out).exists()
    assert no_questions == []


def test_a_class_of_transformers_is_used_in_place_of_that_of_the_folder(
    tmp_path: Path, no_questions: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    expected = load_decoder(str(save_model(tmp_path / "harmless")), dtype="float32").state_dict()
    model = save_model(tmp_path / "model")
    marker = plant(model, "llama")
    found = load_decoder(str(model), dtype="float32").state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    with pytest.raises(UserError, match=REFUSED):
        load_tokenizer(str(model))
    assert "names code of its own (auto_map), which is not run" in caplog.text
    assert not marker.exists()
    assert no_questions == []


def test_weights_from_elsewhere_are_refused(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source")
    outside = tmp_path / "outside.safetensors"
    shutil.copy(source / "model.safetensors", outside)
    for place, (file, content, message) in enumerate(
        [
            ("adapter_config.json", {"peft_type": "LORA"}, "has an adapter"),
            (
                "model.safetensors.index.json",
                {"weight_map": {"a": "../outside.safetensors"}},
                "names the weights '../o",
            ),
            ("model.safetensors.index.json", {"weight_map": {"a": "pytorch_model.bin"}}, "names the weights 'pytorch_"),
            ("model.safetensors.index.json", {"weight_map": {"a": str(outside)}}, "names the weights '/"),
            ("model.safetensors.index.json", [], "is not a JSON object"),
            ("model.safetensors.index.json", {}, "has no weight_map"),
            (
                "config.json",
                {"model_type": "llama", "transformers_weights": "adapter_model.bin"},
                "names the weights 'a",
            ),
            ("config.json", {"model_type": "llama", "transformers_weights": 1}, "names the weights 1"),
            ("config.json", {"model_type": "bert"}, r"lacks \d+ weights of the model"),
            ("config.json", {"model_type": "llama", "num_hidden_layers": None}, "cannot load the configuration"),
            (
                "config.json",
                {"model_type": "llama", "quantization_config": {"quant_method": "awq"}},
                "cannot load the weights",
            ),
            ("model.safetensors", {}, "cannot load the weights"),
        ]
    ):
        folder = tmp_path / str(place)
        shutil.copytree(source, folder)
        (folder / file).write_text(json.dumps(content))
        with pytest.raises(UserError, match=message) as refused:
            load_decoder(str(folder))
        assert len(str(refused.value).splitlines()) == 1
