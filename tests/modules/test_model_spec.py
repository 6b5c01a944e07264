"""ModelSpec: parts, widths and trained groups of each stage, equal wherever a model is built."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from llmgr_rec.config import STAGES, Config, StageName, TextEncoderConfig
from llmgr_rec.errors import UserError
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.model_spec import ModelSpec, build_recommender, query_width
from llmgr_rec.modules.param_groups import param_group, select_trainable
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.modules.tasks import AlignTask, BehaveTask, LLMTextTask, SbrTask
from llmgr_rec.storage.bundle import load_bundle
from llmgr_rec.storage.bundle_export import export_bundle
from llmgr_rec.storage.model_factory import ModelFactory, meta_language_parts
from llmgr_rec.storage.table_io import init_tables
from tests.modules.small_llmgr import raw_sessions
from tests.small_run import ONE_RANK, config, small_run

CPU = torch.device("cpu")
PROMPT_STAGES = ("align", "behave")


def small_config() -> Config:
    settings = config()
    settings.text_encoder = TextEncoderConfig(dim=8, max_clicks=3)
    return settings


def spec_of(stage: StageName, settings: Config | None = None) -> ModelSpec:
    return ModelFactory().spec(stage, settings or small_config(), small_run().catalog)


def build(spec: ModelSpec) -> SessionRecommender | LLMGR:
    factory, catalog = ModelFactory(), small_run().catalog
    return factory.build(spec, factory.language_parts(spec, catalog, CPU), CPU)


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def parts(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_children() if any(True for _ in module.parameters())}


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("sbr", {"item_tables", "encoder"}),
        ("align", {"recommender", "adapter", "language_model", "head", "text_tables"}),
        ("behave", {"recommender", "adapter", "language_model", "head", "text_tables"}),
        ("llm_text", {"item_tables", "encoder", "text_tables", "text_encoder"}),
    ],
)
def test_parts_of_each_stage(stage: StageName, expected: set[str]) -> None:
    spec = spec_of(stage)
    model = build(spec)
    assert parts(model) == expected
    assert isinstance(model, LLMGR) == spec.encodes_prompts == (stage in PROMPT_STAGES)
    assert spec.encodes_text == (stage == "llm_text")
    assert spec.has_language_model == (stage != "sbr")


def without_text(settings: Config) -> None:
    settings.head.item_text = False


def linear(settings: Config) -> None:
    settings.head.name = "linear"


def without_residual(settings: Config) -> None:
    settings.head.residual = False


def linear_without_residual(settings: Config) -> None:
    linear(settings)
    without_residual(settings)


def dot_score(settings: Config) -> None:
    settings.encoder.score = "dot"


@pytest.mark.parametrize("change", [without_text, linear])
def test_a_head_that_needs_no_item_text_has_no_table_of_it(change: Callable[[Config], None]) -> None:
    settings = small_config()
    change(settings)
    assert not spec_of("behave", settings).head_has_text
    assert "text_tables" not in parts(build(spec_of("behave", settings)))


@pytest.mark.parametrize(
    ("stage", "groups", "task"),
    [
        ("sbr", {"tables", "encoder"}, SbrTask),
        ("align", {"adapter", "head"}, AlignTask),
        ("behave", {"adapter", "lora", "head"}, BehaveTask),
        ("llm_text", {"text_encoder"}, LLMTextTask),
    ],
)
def test_what_each_stage_trains(stage: StageName, groups: set[str], task: type[nn.Module]) -> None:
    spec = spec_of(stage)
    built = spec.build_task(build(spec))
    assert isinstance(built, task)
    select_trainable(built, spec.trains)
    trained = {name for name, parameter in built.named_parameters() if parameter.requires_grad}
    assert {param_group(name) for name in trained} == groups == set(spec.trains)
    assert all(name in trained for name, _ in built.named_parameters() if param_group(name) in groups)
    if stage == "llm_text":
        assert not any("item_text" in name for name in trained), "the table of its own vectors is written, not trained"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("change", [without_text, linear, without_residual, linear_without_residual, dot_score])
@torch.no_grad()
def test_query_width_is_that_of_queries_and_item_vectors(stage: StageName, change: Callable[[Config], None]) -> None:
    settings = small_config()
    change(settings)
    spec = spec_of(stage, settings)
    model = build(spec).eval()
    init_tables(model, 0, 0.5)
    collate = ModelFactory().collator(spec, small_run().catalog, "rank")
    batch = collate(raw_sessions([[1, 2, 3, 2], [7]], [0, 3]))
    queries_BQ = model.queries(batch) if isinstance(model, SessionRecommender) else model(batch)
    items_CQ = model.item_vectors(collate.item_features(torch.arange(5)))
    assert queries_BQ.shape == (2, query_width(model))
    assert items_CQ.shape == (5, query_width(model))
    assert query_width(spec.build(meta_language_parts(spec), "meta")) == query_width(model)


@pytest.mark.parametrize("stage", STAGES)
def test_plan_training_and_bundle_build_the_same_parameters(stage: StageName, tmp_path: Path) -> None:
    settings, catalog, spec = small_config(), small_run().catalog, spec_of(stage)
    planned = spec.build(meta_language_parts(spec), "meta").to("meta")
    trained = build(spec)
    init_tables(trained, 0, 0.5)
    export_bundle(trained, stage, settings, catalog, tmp_path / "bundle", ONE_RANK)
    loaded = load_bundle(tmp_path / "bundle")
    assert shapes(planned) == shapes(trained) == shapes(loaded.model)
    assert all(parameter.is_meta for parameter in planned.parameters())
    assert loaded.spec.trains == spec.trains
    assert loaded.stage == stage


@pytest.mark.parametrize("stage", STAGES)
def test_fresh_weights_depend_on_the_seed_and_not_on_earlier_random_draws(stage: StageName) -> None:
    torch.manual_seed(1)
    first = build(spec_of(stage)).state_dict()
    torch.manual_seed(2)
    again = build(spec_of(stage)).state_dict()
    assert all(torch.equal(again[name], value) for name, value in first.items())
    settings = small_config()
    settings.seed = 5
    other = build(spec_of(stage, settings)).state_dict()
    assert any(not torch.equal(other[name], value) for name, value in first.items())


def test_a_later_stage_has_the_recommender_of_stage_sbr() -> None:
    spec, catalog = spec_of("sbr"), small_run().catalog
    recommender = build_recommender(small_config(), catalog.num_items, catalog.num_embeddings)
    assert shapes(recommender) == shapes(build(spec))
    behave = build(spec_of("behave"))
    assert isinstance(behave, LLMGR)
    assert shapes(behave.recommender) == shapes(recommender)
    assert shapes(recommender).items() <= shapes(build(spec_of("llm_text"))).items()


def test_side_features_that_the_catalog_lacks_have_no_table() -> None:
    settings = small_config()
    spec = ModelSpec("sbr", settings, 60, {"word": 9, "color": 3})
    recommender = spec.build()
    assert isinstance(recommender, SessionRecommender)
    assert recommender.item_tables.feature_names == ["item_id", "word"]


@pytest.mark.parametrize(
    ("stage", "most_full", "train"),
    [
        ("sbr", 60, "full"),
        ("sbr", 59, "sampled"),
        # Tables are frozen, so the vectors of all items are computed once.
        ("align", 60, "cached"),
        ("behave", 60, "cached"),
        ("behave", 59, "sampled"),
    ],
)
def test_candidates_of_a_batch(stage: StageName, most_full: int, train: str) -> None:
    settings = small_config()
    settings.loss.full_softmax_max_items = settings.loss.max_cached_items = most_full
    spec = spec_of(stage, settings)
    assert spec.candidates("train") == train
    assert spec.caches_catalog == (train == "cached")
    assert spec.candidates("rank") == "none"
    assert spec.num_negatives == settings.loss.num_negatives


def test_llm_text_samples_above_its_own_number_of_negatives() -> None:
    settings = small_config()
    settings.text_encoder.num_negatives = 60
    assert spec_of("llm_text", settings).candidates("train") == "full"
    settings.text_encoder.num_negatives = 59
    assert spec_of("llm_text", settings).candidates("train") == "sampled"
    assert spec_of("llm_text", settings).num_negatives == 59


def test_most_prefixes_per_pass() -> None:
    settings = small_config()
    assert [spec_of(stage, settings).max_prefixes_per_pass for stage in STAGES] == [0, 0, 0, 3]
    settings.encoder.one_pass, settings.encoder.max_clicks = True, 7
    settings.prompt.one_pass, settings.prompt.max_nodes = True, 5
    assert [spec_of(stage, settings).max_prefixes_per_pass for stage in STAGES] == [7, 0, 5, 3]
    settings.prompt.max_nodes = 0
    assert spec_of("behave", settings).max_prefixes_per_pass == sys.maxsize


def test_item_text_is_needed_where_a_stage_uses_it() -> None:
    settings = small_config()
    assert [spec_of(stage, settings).needs_item_text for stage in STAGES] == [False, True, True, True]
    settings.head.item_text = False
    assert [spec_of(stage, settings).needs_item_text for stage in STAGES] == [False, True, False, True]
    settings.prompt.text_items = 1
    assert [spec_of(stage, settings).needs_item_text for stage in STAGES] == [False, True, True, True]


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="stage behave needs a language model"):
        spec_of("behave").build()
    with pytest.raises(TypeError, match="stage behave does not train a SessionRecommender"):
        spec_of("behave").build_task(spec_of("sbr").build())
    settings = small_config()
    settings.text_encoder.dim = 100
    with pytest.raises(UserError, match=r"text_encoder\.dim is 100, but random-tiny has 64 columns; give 64 at most"):
        build(spec_of("llm_text", settings))
    settings.encoder.name = "gcsam"
    with pytest.raises(UserError, match=r"encoder\.name"):
        spec_of("sbr", settings).check()
    settings = small_config()
    settings.head.name = "tide"
    spec_of("sbr", settings).check()
    with pytest.raises(UserError, match=r"head\.name"):
        spec_of("behave", settings).check()
