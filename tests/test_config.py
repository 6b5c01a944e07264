"""The settings: the command line is frozen, and each setting has help, bounds and rules that are checked."""

import json
import typing
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from llmgr_rec.cli import make_parser
from llmgr_rec.config import STAGES, BlendConfig, Config, settings, trained_stages
from llmgr_rec.config_file import add_config_arguments, load_config
from llmgr_rec.errors import UserError
from llmgr_rec.setting import Group, SettingInfo

MOST_SETTINGS = 93
# Name, type and default (as JSON) of every setting. A change here is a change of the interface: also change
# llmgr_rec/recipes and the documentation that names the setting.
COMMAND_LINE = """
seed                              int                                               0
tables.dim                        int                                               128
tables.side_features              list of category | brand | word                   ["category", "brand", "word"]
tables.sharding                   table_wise | column_wise | auto                   "column_wise"
tables.optimizer                  adagrad | rowwise_adagrad | sgd | adam            "adagrad"
tables.lr                         float                                             0.2
tables.dtype                      float32 | float16                                 "float32"
tables.init_std                   float                                             0.1
tables.memory_per_rank_gb         float                                             8.0
tables.knn_smoothing              list of float                                     [0.0, 2.0]
encoder.name                      str                                               "gcsan"
encoder.steps                     int                                               1
encoder.attention_layers          int                                               1
encoder.attention_heads           int                                               1
encoder.max_clicks                int                                               50
encoder.dropout                   float                                             0.4
encoder.score                     dot | cosine                                      "cosine"
encoder.temperature               float                                             0.07
encoder.one_pass                  auto | bool                                       false
llm.name_or_path                  str                                               "smollm2"
llm.num_layers                    int                                               4
llm.dtype                         auto | float32 | bfloat16                         "auto"
llm.lora_rank                     int                                               16
llm.lora_alpha                    float                                             16.0
llm.lora_dropout                  float                                             0.05
llm.recompute                     bool                                              false
llm.micro_batches                 int                                               1
llm.fsdp                          bool                                              false
prompt.templates                  str                                               "compact"
prompt.node_source                table | encoder                                   "table"
prompt.node_order                 clicks | unique                                   "clicks"
prompt.max_nodes                  int                                               20
prompt.text_items                 int                                               0
prompt.max_text_tokens            int                                               32
prompt.text_fields                list of title | category | brand | description    ["title", "category"]
prompt.one_pass                   bool                                              true
head.name                         str                                               "tied"
head.residual                     bool                                              true
head.item_text                    bool                                              true
head.separate_loss                bool                                              true
text_encoder.dim                  int                                               128
text_encoder.max_clicks           int                                               10
text_encoder.dropout              float                                             0.1
text_encoder.num_negatives        int                                               512
text_encoder.score_weight         list of float                                     [0.0, 0.125, 0.25, 0.5, 1.0, 2.0]
loss.full_softmax_max_items       int                                               8192
loss.max_cached_items             int                                               200000
loss.num_negatives                int                                               2048
loss.dtype                        auto | float32 | bfloat16                         "auto"
contrast.weight                   float                                             0.1
domains.power                     float                                             1.0
optimizer.weight_decay            float                                             0.01
optimizer.warmup                  float                                             0.05
optimizer.clip_norm               float                                             1.0
optimizer.average                 float                                             0.7
sbr.epochs                        int                                               4
sbr.max_steps                     int                                               0
sbr.batch_size                    int                                               512
sbr.lr                            float                                             0.003
sbr.patience                      int                                               2
align.epochs                      int                                               0
align.max_steps                   int                                               100
align.batch_size                  int                                               64
align.lr                          float                                             0.001
align.patience                    int                                               0
behave.epochs                     int                                               0
behave.max_steps                  int                                               0
behave.batch_size                 int                                               64
behave.lr                         float                                             0.0003
behave.patience                   int                                               0
llm_text.epochs                   int                                               0
llm_text.max_steps                int                                               0
llm_text.batch_size               int                                               128
llm_text.lr                       float                                             0.0001
llm_text.patience                 int                                               2
blend.neighbors                   list of str                                       ["item_knn", "text_knn"]
blend.k_neighbors                 int                                               100
blend.weights                     list of float                                     []
blend.reranker                    none | lambdamart                                 "none"
blend.embedding_model             str                                               "none"
runtime.device                    auto | cpu | cuda                                 "auto"
runtime.threads_per_rank          int                                               0
runtime.reader_workers            int                                               0
runtime.eval_batch_size           int                                               256
runtime.eval_every                int                                               1
runtime.checkpoint_every          int                                               0
runtime.checkpoint_minutes        float                                             10.0
runtime.keep_checkpoints          int                                               2
runtime.log_every                 int                                               10
runtime.trackers                  list of mlflow | wandb                            []
runtime.timeout_s                 int                                               600
runtime.startup_timeout_s         int                                               3600
runtime.grace_s                   int                                               25
"""


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return f"list of {_type_name(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) is typing.Union:
        return " | ".join(map(_type_name, typing.get_args(kind)))
    return str(kind.__name__)


def _options() -> dict[str, Any]:
    """The parser's options of the settings by dotted name; groups and --config are no settings."""
    parser = make_parser("llmgr_rec.train", "Trains.")
    add_config_arguments(parser)
    groups = {item.name for item in fields(Config) if isinstance(getattr(Config(), item.name), Group)}
    others = {"help", "config", "print_config"} | groups
    return {action.dest: action for action in parser._actions if action.dest not in others}


def test_the_command_line_is_frozen() -> None:
    found = [
        f"{name:<34}{_type_name(option._typehint):<50}{json.dumps(option.default)}"
        for name, option in _options().items()
    ]
    assert found == COMMAND_LINE.strip().splitlines()
    assert len(found) <= MOST_SETTINGS


def test_every_setting_of_the_command_line_is_one_of_the_config() -> None:
    found = {one.name: one.default for one in settings(Config())}
    assert found == {name: option.default for name, option in _options().items()}


def test_every_setting_and_every_group_has_a_help_text() -> None:
    for name, option in _options().items():
        assert len(option.help) > 10, name
        assert option.help.rstrip().endswith("."), name
    for item in fields(Config):
        if "group" in item.metadata:
            assert item.metadata["group"][0].endswith("."), item.name


def test_every_number_has_bounds() -> None:
    """Every number has a lowest value; for a list, each of its numbers."""
    types = {name: option._typehint for name, option in _options().items()}
    numbers = [one for one in settings(Config()) if _type_name(types[one.name]) in ("int", "float", "list of float")]
    assert len(numbers) > 50
    for one in numbers:
        assert one.info.at_least is not None or one.info.above is not None, one.name
        assert one.info.at_least is None or one.info.above is None, one.name


def test_a_setting_says_its_unit_once() -> None:
    help_texts = {name: option.help for name, option in _options().items()}
    assert help_texts["tables.dim"].endswith("Unit: columns.")
    assert help_texts["runtime.timeout_s"].endswith("Unit: seconds.")
    assert "Unit" not in help_texts["encoder.name"]


def test_the_default_recipe_is_the_defaults() -> None:
    assert load_config("default") == Config()


def test_configs_do_not_share_their_lists() -> None:
    Config().tables.knn_smoothing.append(9.0)
    assert Config().tables.knn_smoothing == [0.0, 2.0]


def test_settings_are_valid_by_default() -> None:
    Config().validate()


@pytest.mark.parametrize(
    ("info", "value", "problem"),
    [
        (SettingInfo("", at_least=1), 1, ""),
        (SettingInfo("", at_least=1), 0, "give 1 or more"),
        (SettingInfo("", above=0), 1e-9, ""),
        (SettingInfo("", above=0), 0, "give a number above 0"),
        (SettingInfo("", at_least=0, at_most=1), 1.0, ""),
        (SettingInfo("", at_least=0, at_most=1), 1.5, "give 1 at most"),
        (SettingInfo("", at_least=0, below=1), 1.0, "give a number below 1"),
        (SettingInfo("", at_least=4, multiple_of=4), 18, "give a multiple of 4"),
        (SettingInfo("", at_least=0), float("nan"), "give a finite number"),
        (SettingInfo("", above=0), float("inf"), "give a finite number"),
        (SettingInfo("", at_least=0), [0.0, -1.0], "give 0 or more"),
        (SettingInfo("", at_least=0), [], ""),
        (SettingInfo("", at_least=0, needs_values=True), [], "give at least one value"),
        (SettingInfo(""), "gcsan", ""),
        # A bool is an int for Python, but no number here.
        (SettingInfo("", at_least=1), False, ""),
    ],
)
def test_bounds(info: SettingInfo, value: Any, problem: str) -> None:
    assert info.problem(value) == problem


def _text_and(stage: str) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        config.llm_text.epochs = 2
        config.stage(stage).epochs = 1  # type: ignore[arg-type]

    return change


def _set(name: str, value: Any) -> Callable[[Config], None]:
    group, _, field = name.partition(".")
    return lambda config: setattr(getattr(config, group), field, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("tables.knn_smoothing", [0.0, -1.0]), r"tables\.knn_smoothing is \[0\.0, -1\.0\]; give 0 or more"),
        (_set("tables.knn_smoothing", [float("nan")]), r"tables\.knn_smoothing is \[nan\]; give a finite number"),
        (_set("tables.knn_smoothing", []), r"tables\.knn_smoothing is \[\]; give at least one value"),
        (_set("text_encoder.score_weight", []), r"text_encoder\.score_weight is \[\]; give at least one value"),
        (_set("text_encoder.score_weight", [1.0, -1.0]), r"score_weight is \[1\.0, -1\.0\]; give 0 or more"),
        (_set("text_encoder.max_clicks", 0), r"text_encoder\.max_clicks is 0; give 1 or more"),
        (_set("text_encoder.dropout", 1.0), r"text_encoder\.dropout is 1\.0; give a number below 1"),
        (_set("text_encoder.dim", 6), r"text_encoder\.dim is 6; give a multiple of 4"),
        (_set("prompt.node_source", "encoder"), r"prompt\.one_pass is true, but prompt\.node_source is encoder"),
        (_set("prompt.node_order", "unique"), r"prompt\.one_pass is true, but prompt\.node_order is unique"),
        (_text_and("behave"), r"llm_text\.epochs is 2, and no stage goes on from llm_text, but behave\.epochs is 1"),
        (_text_and("align"), r"llm_text\.epochs is 2, and no stage goes on from llm_text, but align\.epochs is 1"),
    ],
)
def test_a_rule_between_or_within_settings_is_checked(change: Callable[[Config], None], message: str) -> None:
    config = Config()
    change(config)
    with pytest.raises(UserError, match=f"^setting .*{message}"):
        config.validate()


@pytest.mark.parametrize(
    ("blend", "message"),
    [
        (BlendConfig(["item_knn"], 0), r"setting blend\.k_neighbors is 0; give 1 or more"),
        (BlendConfig(["item_knn", "item_knn"]), "name each once"),
        (BlendConfig(["item_knn"], weights=[1.0, 2.0]), "has 2 numbers, but blend.neighbors names item_knn; give one"),
        (BlendConfig([], weights=[1.0]), "has 1 numbers, but blend.neighbors names nothing"),
        (BlendConfig(["item_knn"], weights=[-1.0]), r"blend\.weights is \[-1\.0\]; give 0 or more"),
        (BlendConfig(["item_knn"], weights=[float("nan")]), r"blend\.weights is \[nan\]; give a finite number"),
    ],
)
def test_a_blend_that_cannot_be_is_refused(blend: BlendConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config(blend=blend).validate()


def test_trained_stages_are_those_with_epochs_and_sbr() -> None:
    config = Config()
    assert trained_stages(config) == ["sbr"]
    for stage in STAGES:
        config.stage(stage).epochs = 1
    assert trained_stages(config) == list(STAGES)
    config.sbr.epochs = config.align.epochs = 0
    assert trained_stages(config) == ["sbr", "behave", "llm_text"]
