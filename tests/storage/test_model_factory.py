"""Models and batches that the model factory makes of settings and a catalog, and the bundles of these models."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmgr_rec.config import Config, StageName
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.storage.bundle import load_bundle
from llmgr_rec.storage.bundle_export import export_bundle
from llmgr_rec.storage.bundle_index import read_index
from llmgr_rec.storage.model_factory import ModelFactory, meta_language_parts
from tests.data.token_texts import texts_of
from tests.modules.random_weights import randomize_weights
from tests.modules.small_llmgr import raw_sessions
from tests.small_run import NUM_ITEMS, ONE_RANK, config, small_run

CPU = torch.device("cpu")
FACTORY = ModelFactory()


def settings() -> Config:
    chosen = config()
    chosen.llm.dtype = "float32"
    chosen.prompt.templates = "default"
    chosen.prompt.one_pass = False
    chosen.prompt.text_items = 2
    chosen.prompt.max_text_tokens = 64
    chosen.text_encoder.dim = 16
    return chosen


def build(stage: StageName, catalog: Catalog) -> SessionRecommender | LLMGR:
    spec = FACTORY.spec(stage, settings(), catalog)
    return FACTORY.build(spec, FACTORY.language_parts(spec, catalog, CPU), CPU)


def test_prompts_show_the_titles_of_the_last_items() -> None:
    catalog = small_run().catalog
    texts = catalog.texts(["title", "category"])
    raw = raw_sessions([[4, 5, 6], [7]], [-1, -1])
    batch = FACTORY.collator(FACTORY.spec("behave", settings(), catalog), catalog, "rank")(raw)
    assert texts_of(batch.text_tokens) == [f"{texts[5]}; {texts[6]}", texts[7]]
    batch = FACTORY.collator(FACTORY.spec("align", settings(), catalog), catalog, "train")(raw)
    assert texts_of(batch.text_tokens) == [texts[item] for item in batch.text_items_B.tolist()]


def test_texts_of_the_text_encoder_end_with_a_line_break() -> None:
    catalog = small_run().catalog
    spec = FACTORY.spec("llm_text", settings(), catalog)
    language = FACTORY.language_parts(spec, catalog, CPU)
    assert language is not None
    assert texts_of(language.item_tokens) == [f"{text}\n" for text in catalog.texts(["title", "category"])]
    assert FACTORY.language_parts(FACTORY.spec("sbr", settings(), catalog), catalog, CPU) is None


@pytest.mark.parametrize("stage", ["sbr", "align", "behave", "llm_text"])
def test_parts_without_weights_make_a_model_of_the_same_shapes(stage: StageName) -> None:
    catalog = small_run().catalog
    spec = FACTORY.spec(stage, settings(), catalog)
    planned = spec.build(meta_language_parts(spec), "meta")
    built = build(stage, catalog)
    shapes = [
        {name: (value.shape, value.dtype) for name, value in model.named_parameters()} for model in (planned, built)
    ]
    assert shapes[0] == shapes[1]
    assert all(value.is_meta for name, value in planned.named_parameters() if "decoder" in name and "lora" not in name)


@torch.no_grad()
def scores(model: SessionRecommender | LLMGR, stage: StageName, catalog: Catalog) -> Tensor:
    collate = FACTORY.collator(FACTORY.spec(stage, settings(), catalog), catalog, "rank")
    items = model.item_vectors(collate.item_features(torch.arange(NUM_ITEMS)))
    batch = collate(raw_sessions([[3, 5, 3, 9], [7], [0, 1, 2]], [-1, -1, -1]))
    return (model(batch) if isinstance(model, LLMGR) else model.queries(batch)) @ items.T


@pytest.mark.parametrize("stage", ["sbr", "align", "behave", "llm_text"])
def test_a_bundle_scores_as_the_model_that_was_exported(tmp_path: Path, stage: StageName) -> None:
    catalog = small_run().catalog
    model = randomize_weights(build(stage, catalog))
    folder = tmp_path / "export" / stage
    folder.parent.mkdir(parents=True)
    export_bundle(model, stage, settings(), catalog, folder, ONE_RANK)
    bundle = load_bundle(folder)
    assert torch.equal(scores(bundle.model, stage, catalog), scores(model, stage, catalog))
    assert (bundle.stage, bundle.spec.stage, bundle.blend) == (stage, stage, None)
    assert read_index(folder).factory == ""
    expected = FACTORY.decoder_hash(settings()) if isinstance(model, LLMGR) else None
    assert read_index(folder).language_model.get("weights_hash") == expected
