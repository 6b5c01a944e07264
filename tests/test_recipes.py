"""Settings come from recipes, files and dotted overrides, and mistakes in them are explained."""

from dataclasses import fields, is_dataclass

import pytest
from docstring_parser import parse as parse_docstring

from llmgr_rec import config as config_module
from llmgr_rec.cli import make_parser
from llmgr_rec.config import Config
from llmgr_rec.config_file import add_config_arguments, load_config, parse_with_config, recipe_names, save_config
from llmgr_rec.errors import UserError


def _parse(*words):
    parser = make_parser("llmgr_rec.train", "Trains.")
    add_config_arguments(parser)
    return parse_with_config(parser, words)[1]


def test_defaults_are_the_dataclasses():
    assert _parse() == Config()


def test_what_is_saved_is_what_is_loaded(tmp_path):
    config = _parse("--llm.num_layers", "6", "--sbr.trainable", "[tables]")
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config
    assert config.llm.num_layers == 6
    assert config.sbr.trainable == ["tables"]


def test_overrides_win_wherever_the_recipe_stands():
    for words in (("--config", "quickstart", "--sbr.epochs", "99"), ("--sbr.epochs", "99", "--config=quickstart")):
        config = _parse(*words)
        assert config.sbr.epochs == 99
        assert config.align == load_config("quickstart").align


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads(name):
    assert isinstance(load_config(name), Config)


def test_a_file_keeps_the_defaults_it_does_not_name(tmp_path):
    (tmp_path / "c.yaml").write_text("align:\n  lr: 0.5\n")
    config = load_config(tmp_path / "c.yaml")
    assert config.align.lr == 0.5
    assert config.align.trainable == Config().align.trainable


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("llm:\n  num_layer: 4\n", "unknown setting llm.num_layer .*did you mean llm.num_layers"),
        ("lllm: 3\n", "unknown setting lllm .*c.yaml"),
        ("llm:\n  num_layers: x\n", "setting llm.num_layers: .*x.*c.yaml"),
        (
            "tables:\n  knn_smoothing: [0, x]\n",
            r"knn_smoothing: Expected <class 'float'> or list\[float\]. Got value: \[0.0, 'x'\] \(in .*c.yaml",
        ),
        ("a: [\n", "c.yaml"),
    ],
)
def test_a_mistake_in_a_file_names_key_and_file(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "c.yaml")


def test_an_unknown_recipe_names_the_near_one():
    with pytest.raises(UserError, match=r"did you mean quickstart\?"):
        load_config("quickstar")


def test_an_absent_file_is_named():
    with pytest.raises(UserError, match=r"absent\.yaml does not exist"):
        load_config("absent.yaml")


def test_every_setting_has_a_help_text():
    for cls in vars(config_module).values():
        if is_dataclass(cls):
            documented = {p.arg_name for base in cls.__mro__ for p in parse_docstring(base.__doc__ or "").params}
            assert {item.name for item in fields(cls)} <= documented


def test_a_value_out_of_its_range_is_refused_before_anything_is_made():
    with pytest.raises(UserError, match=r"setting sbr\.batch_size is 0"):
        _parse("--sbr.batch_size", "0")
