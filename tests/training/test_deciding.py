"""What settings decide: no setting is forgotten, and a later stage may differ in what it should."""

from dataclasses import fields

import pytest
import torch
from llmgr_rec.training.deciding import deciding_settings, setting, settings_taken_over

from llmgr_rec.config import STAGES, Config
from llmgr_rec.training import deciding

CPU = torch.device("cpu")


def all_settings(config: Config) -> set[str]:
    parts = {part.name: getattr(config, part.name) for part in fields(config) if part.name != "seed"}
    return {f"{part}.{field.name}" for part, values in parts.items() for field in fields(values)}


def test_every_setting_decides_something_or_is_said_to_be_free() -> None:
    config = Config()
    deciding_ones = {name for stage in STAGES for name in deciding_settings(stage, config, CPU)} - {"seed"}
    free = {name for name in all_settings(config) if name.startswith(("runtime.", "prior."))} | deciding._FREE
    assert deciding_ones | free == all_settings(config)
    assert not deciding_ones & free


def test_exceptions_name_settings_that_are_there() -> None:
    assert all_settings(Config()) >= deciding._FREE | deciding._LEARNING


def test_a_recommender_does_not_depend_on_the_language_model_unless_it_reads_sessions_as_text() -> None:
    config = Config()
    before = deciding_settings("sbr", config, CPU)
    config.llm.name_or_path, config.head.name, config.behave.lr = "random-tiny", "linear", 1.0
    assert deciding_settings("sbr", config, CPU) == before
    assert deciding_settings("text", config, CPU)["llm.name_or_path"] == "random-tiny"
    assert not any(name.startswith("head.") for name in deciding_settings("text", config, CPU))


@pytest.mark.parametrize(
    ("stage", "some", "others"),
    [
        ("sbr", {"tables.dim", "encoder.name", "controls.shuffled_words"}, {"llm.lora_rank", "text_encoder.dim"}),
        ("align", {"encoder.score", "llm.lora_rank", "head.separate_loss"}, {"prompt.text_fields", "text_encoder.dim"}),
        ("behave", {"llm.lora_rank", "llm.num_layers"}, {"llm.dtype", "prompt.max_nodes", "prompt.max_text_tokens"}),
    ],
)
def test_later_stages_keep_what_gives_weights_their_meaning(stage: str, some: set[str], others: set[str]) -> None:
    names = set(settings_taken_over(stage, Config()))
    assert some <= names
    assert not names & (others | {"tables.lr", "encoder.dropout", "llm.fsdp", "seed"})


def test_what_is_drawn_by_the_seed_keeps_it() -> None:
    config = Config()
    config.controls.shuffled_words = True
    assert "seed" in settings_taken_over("sbr", config)
    config.controls.shuffled_words, config.controls.random_llm = False, True
    assert "seed" not in settings_taken_over("sbr", config)
    assert "seed" in settings_taken_over("align", config)


def test_a_setting_is_found_by_its_dotted_name() -> None:
    assert setting(Config(), "llm.lora_rank") == 16
    assert setting(Config(), "seed") == 0
