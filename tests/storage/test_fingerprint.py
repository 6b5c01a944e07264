"""What a change of a setting invalidates: checkpoints of a stage, the stages after it, its bundle, or nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmgr_rec.config import STAGES, Config, StageName, settings
from llmgr_rec.config_file import load_config, save_config
from llmgr_rec.storage import number_format
from llmgr_rec.storage.fingerprint import fingerprint, inherited_settings

CPU = torch.device("cpu")
PROMPTS = ("align", "behave")

# Setting, another value, stages whose checkpoints it invalidates, stages after which a later stage must have the same.
CASES: list[tuple[str, Any, tuple[str, ...], tuple[str, ...]]] = [
    # What the weights are.
    ("tables.dim", 64, STAGES, STAGES),
    ("tables.side_features", ["word"], STAGES, STAGES),
    ("encoder.name", "srgnn", STAGES, STAGES),
    ("encoder.score", "dot", STAGES, STAGES),
    ("llm.lora_rank", 4, PROMPTS, PROMPTS),
    ("llm.num_layers", 2, (*PROMPTS, "llm_text"), (*PROMPTS, "llm_text")),
    ("prompt.node_source", "encoder", PROMPTS, PROMPTS),
    ("head.name", "linear", PROMPTS, PROMPTS),
    ("head.separate_loss", False, PROMPTS, PROMPTS),
    # How a stage learns.
    ("seed", 1, STAGES, ()),
    ("tables.lr", 0.3, STAGES, ()),
    ("tables.optimizer", "adam", STAGES, ()),
    ("tables.dtype", "float16", STAGES, ()),
    ("encoder.dropout", 0.1, STAGES, ()),
    ("encoder.one_pass", True, ("sbr",), ()),
    ("llm.name_or_path", "random-tiny", (*PROMPTS, "llm_text"), ()),
    ("llm.dtype", "bfloat16", (*PROMPTS, "llm_text"), ()),
    ("llm.lora_dropout", 0.2, PROMPTS, ()),
    ("prompt.templates", "default", PROMPTS, ()),
    ("prompt.max_nodes", 5, PROMPTS, ()),
    ("prompt.text_fields", ["title"], (*PROMPTS, "llm_text"), ()),
    ("prompt.one_pass", False, ("behave",), ()),
    ("text_encoder.dim", 64, ("llm_text",), ()),
    ("text_encoder.dropout", 0.2, ("llm_text",), ()),
    ("loss.num_negatives", 100, STAGES, ()),
    ("loss.dtype", "bfloat16", STAGES, ()),
    ("contrast.weight", 1.0, ("align",), ()),
    ("optimizer.weight_decay", 0.1, STAGES, ()),
    ("runtime.eval_every", 2, STAGES, ()),
    *((f"{stage}.{name}", value, (stage,), ()) for stage in STAGES for name, value in (("lr", 0.5), ("epochs", 77))),
    # What is selected after training.
    ("tables.knn_smoothing", [1.0], (), ()),
    ("text_encoder.score_weight", [1.0], (), ()),
    ("blend.neighbors", ["item_knn"], (), ()),
    ("blend.k_neighbors", 7, (), ()),
    ("blend.weights", [1.0, 2.0], (), ()),
    # How the machine is used.
    ("tables.sharding", "table_wise", (), ()),
    ("tables.memory_per_rank_gb", 1.0, (), ()),
    ("llm.recompute", True, (), ()),
    ("llm.micro_batches", 4, (), ()),
    ("llm.fsdp", True, (), ()),
    ("runtime.checkpoint_every", 3, (), ()),
    ("runtime.device", "cpu", (), ()),
]


def base() -> Config:
    """Number formats are given, because `auto` may resolve to the other value of a case."""
    config = Config()
    config.llm.dtype = config.loss.dtype = "float32"
    return config


def changed(name: str, value: Any) -> Config:
    config = base()
    group, _, field = name.rpartition(".")
    owner = getattr(config, group) if group else config
    assert getattr(owner, field) != value
    setattr(owner, field, value)
    return config


@pytest.mark.parametrize(("name", "value", "of_checkpoint", "inherited"), CASES, ids=[case[0] for case in CASES])
def test_a_setting_invalidates_checkpoints_and_later_stages(
    name: str, value: Any, of_checkpoint: tuple[str, ...], inherited: tuple[str, ...]
) -> None:
    other = changed(name, value)
    assert [stage for stage in STAGES if fingerprint(stage, other, CPU) != fingerprint(stage, base(), CPU)] == [
        stage for stage in STAGES if stage in of_checkpoint
    ]
    assert [stage for stage in STAGES if inherited_settings(stage, other) != inherited_settings(stage, base())] == [
        stage for stage in STAGES if stage in inherited
    ]


def test_the_cases_cover_every_level_of_what_is_invalidated() -> None:
    levels = {one.name: one.info.invalidates for one in settings(Config())}
    assert {levels[name] for name, *_ in CASES} == {"nothing", "bundle", "checkpoint", "stages"}


def test_settings_that_decide_nothing_say_so() -> None:
    config = Config()
    decide = {name for stage in STAGES for name in fingerprint(stage, config, CPU)}
    free = {one.name for one in settings(config) if one.info.invalidates in ("nothing", "bundle")}
    assert decide | free == {one.name for one in settings(config)}
    assert not decide & free


def test_a_later_stage_inherits_only_what_the_earlier_one_depended_on() -> None:
    for stage in STAGES:
        assert inherited_settings(stage, Config()).keys() <= fingerprint(stage, Config(), CPU).keys()


@pytest.mark.parametrize("stage", STAGES)
def test_a_fingerprint_survives_json_and_the_config_file(stage: StageName, tmp_path: Path) -> None:
    config = load_config("paper")
    save_config(config, tmp_path / "c.yaml")
    found = fingerprint(stage, load_config(tmp_path / "c.yaml"), CPU)
    assert found == fingerprint(stage, config, CPU) == json.loads(json.dumps(found))


def test_auto_stands_for_the_number_format_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config()

    def found(stage: StageName, is_faster: bool) -> dict[str, str]:
        monkeypatch.setattr(number_format, "_has_bfloat16", lambda: True)
        monkeypatch.setattr(number_format, "_gain_of_bfloat16", lambda: 2.0 if is_faster else 0.5)
        names = ("llm.dtype", "loss.dtype")
        return {name: value for name, value in fingerprint(stage, config, CPU).items() if name in names}

    assert found("sbr", True) == {"loss.dtype": "bfloat16"}
    assert found("sbr", False) == {"loss.dtype": "float32"}
    assert found("behave", True) == {"llm.dtype": "bfloat16", "loss.dtype": "bfloat16"}
    config.llm.dtype = "float32"
    assert found("behave", True) == {"llm.dtype": "float32", "loss.dtype": "bfloat16"}


def test_templates_are_identified_by_their_texts(tmp_path: Path) -> None:
    from llmgr_rec.data.prompt_templates import load_templates

    config = Config()
    before = fingerprint("behave", config, CPU)
    texts = {task: template.text for task, template in load_templates(config.prompt.templates).items()}
    config.prompt.templates = str(tmp_path / "prompts.yaml")
    (tmp_path / "prompts.yaml").write_text(json.dumps(texts))
    assert fingerprint("behave", config, CPU) == before
    (tmp_path / "prompts.yaml").write_text(json.dumps(texts | {"behave": f"{texts['behave']} Well:"}))
    assert fingerprint("behave", config, CPU) != before
    assert fingerprint("sbr", config, CPU) == fingerprint("sbr", Config(), CPU)
