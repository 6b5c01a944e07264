"""Settings from recipes, files and dotted overrides, and the messages for mistakes in them."""

import os
import re
from pathlib import Path

import pytest

from llmgr_rec.cli import make_parser
from llmgr_rec.config import Config, StageName, trained_stages
from llmgr_rec.config_file import add_config_arguments, load_config, parse_with_config, recipe_names, save_config
from llmgr_rec.errors import UserError
from llmgr_rec.former_settings import of_this_version


def _parse(*words: str) -> Config:
    parser = make_parser("llmgr_rec.train", "Trains.")
    add_config_arguments(parser)
    return parse_with_config(parser, words)[1]


def test_defaults_are_the_dataclasses() -> None:
    assert _parse() == Config()


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    config = _parse("--llm.num_layers", "6", "--tables.side_features", "[word]")
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config
    assert config.llm.num_layers == 6
    assert config.tables.side_features == ["word"]


def test_loading_leaves_the_folder_of_the_process_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads may read files by relative paths at the same moment."""
    save_config(Config(), tmp_path / "c.yaml")
    monkeypatch.setattr(os, "chdir", lambda path: pytest.fail(f"changes the folder to {path}"))
    assert load_config(tmp_path / "c.yaml") == Config()


def test_overrides_win_wherever_the_recipe_stands() -> None:
    for words in (("--config", "quickstart", "--sbr.epochs", "99"), ("--sbr.epochs", "99", "--config=quickstart")):
        config = _parse(*words)
        assert config.sbr.epochs == 99
        assert config.align == load_config("quickstart").align


# Stages that each shipped recipe trains.
RECIPES: dict[str, list[StageName]] = {
    "default": ["sbr"],
    "llm": ["sbr", "align", "behave"],
    "llm_text": ["sbr", "llm_text"],
    "paper": ["sbr", "align", "behave"],
    "quickstart": ["sbr", "align", "behave"],
}


def test_there_are_no_other_recipes() -> None:
    assert recipe_names() == sorted(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_loads_and_trains_its_stages(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    config.validate()
    assert trained_stages(config) == RECIPES[name]
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config


def test_recipes_differ_from_the_defaults_where_they_say() -> None:
    assert load_config("paper").blend.neighbors == []
    assert load_config("paper").head.name == "linear"
    assert load_config("llm_text").llm.num_layers == 0
    assert load_config("llm").blend == Config().blend


def test_of_two_files_the_later_one_wins(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("sbr:\n  epochs: 5\n")
    config = _parse("--config", "paper", "--config", str(tmp_path / "c.yaml"))
    assert config.sbr.epochs == 5
    assert config.sbr.batch_size == load_config("paper").sbr.batch_size


def test_a_file_keeps_the_defaults_it_does_not_name(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("align:\n  lr: 0.5\n")
    config = load_config(tmp_path / "c.yaml")
    assert config.align.lr == 0.5
    assert config.align.batch_size == Config().align.batch_size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("llm:\n  num_layer: 4\n", "unknown setting llm.num_layer .*did you mean llm.num_layers"),
        ("lllm: 3\n", "unknown setting lllm .*c.yaml"),
        ("llm:\n  num_layers: x\n", "setting llm.num_layers: .*x.*c.yaml"),
        (
            "tables:\n  knn_smoothing: [0, x]\n",
            r"setting tables.knn_smoothing: .*float.*x \(in .*c.yaml",
        ),
        ("a: [\n", "c.yaml"),
    ],
)
def test_a_mistake_in_a_file_names_key_and_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("name", "near"),
    [("quickstar", "quickstart"), ("defualt", "default"), ("llm-text", "llm_text"), ("papers", "paper")],
)
def test_an_unknown_recipe_names_the_near_one(name: str, near: str) -> None:
    with pytest.raises(UserError, match=rf"^no recipe named {name}, did you mean {re.escape(near)}\?"):
        load_config(name)


def test_an_absent_file_is_named() -> None:
    with pytest.raises(UserError, match=r"absent\.yaml does not exist"):
        load_config("absent.yaml")


def test_a_value_out_of_its_range_is_refused_before_anything_is_made() -> None:
    with pytest.raises(UserError, match=r"setting sbr\.batch_size is 0"):
        _parse("--sbr.batch_size", "0")


def test_settings_of_former_versions_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "config.yaml"
    former = (
        "encoder:\n  last_item_weight: 0.6\n  steps: 2\ncontrast:\n  hard_negatives: 0\nblend:\n  text_encoder: llm\n"
    )
    file.write_text(former)
    parser = make_parser("llmgr_rec.train", "Trains.")
    add_config_arguments(parser)
    for config in (load_config(file), parse_with_config(parser, ["--config", str(file)])[1]):
        assert (config.encoder.steps, config.blend.embedding_model) == (2, "llm")
    assert parse_with_config(parser, ["--blend.text_encoder=llm"])[1].blend.embedding_model == "llm"
    assert "setting blend.text_encoder is called blend.embedding_model now" in caplog.text
    with pytest.raises(UserError, match=r"setting encoder\.last_item_weight is 0\.6 in this version; leave --enc"):
        parse_with_config(parser, ["--encoder.last_item_weight", "0.5"])
    file.write_text("encoder:\n  last_item_weight: 0.5\n")
    with pytest.raises(UserError, match=r"config\.yaml: setting encoder\.last_item_weight is 0\.5, but is 0\.6 in"):
        load_config(file)
    file.write_text("blend:\n  text_encoder: llm\n  embedding_model: llm\n")
    with pytest.raises(UserError, match=r"blend\.text_encoder and blend\.embedding_model are the same; give the"):
        load_config(file)
    checkpoint = {"encoder.last_item_weight": 0.6, "contrast.temperature": 0.1, "seed": 1}
    assert of_this_version(checkpoint) == {"contrast.temperature": 0.1, "seed": 1}
