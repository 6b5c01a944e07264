"""Recommenders of several kinds of models and blends, to be explained."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from llmgr_rec import Recommender
from llmgr_rec.baselines.blend import Blend, combine
from llmgr_rec.config import Config, StageName
from llmgr_rec.data.dataset import Manifest
from llmgr_rec.distributed.process_group import World
from llmgr_rec.storage.bundle_export import export_bundle
from llmgr_rec.storage.model_factory import ModelFactory
from llmgr_rec.storage.table_io import init_tables
from llmgr_rec.training.neighbors import neighbor_scores
from tests.small_run import config, small_run

STAGE_OF: dict[str, StageName] = {"sbr": "sbr", "llm_text": "llm_text"}
_KNN = ("item_knn", "text_knn")


@cache
def folder() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="llmgr-explained-")


def blend(weights: dict[str, float]) -> Blend | None:
    """The neighbors of the shared data set, each times its weight."""
    if not weights:
        return None
    found = neighbor_scores(list(weights), 20, small_run().dataset, small_run().catalog, World.alone())
    return combine(found, list(weights.values()))


def export(path: Path, settings: Config, weights: dict[str, float], stage: str, manifest: Manifest) -> None:
    """Writes a bundle of an untrained model."""
    factory, cpu, catalog = ModelFactory(), torch.device("cpu"), small_run().catalog
    spec = factory.spec(STAGE_OF.get(stage, "behave"), settings, catalog)
    torch.manual_seed(0)
    model = factory.build(spec, factory.language_parts(spec, catalog, cpu), cpu)
    init_tables(model, 1, 0.5)
    export_bundle(model, spec.stage, settings, catalog, path, World.alone(), manifest, blend(weights))


@cache
def recommender(
    stage: str = "sbr",
    item_knn: float = 0.0,
    text_knn: float = 0.0,
    score: str = "cosine",
    smoothing: float = 0.0,
    **manifest: object,
) -> Recommender:
    """A recommender of a stage with weights of its blend, some settings, and values of its manifest."""
    settings = config()
    settings.encoder.score = score  # type: ignore[assignment]
    settings.tables.knn_smoothing = [smoothing]
    settings.text_encoder.dim = 16
    settings.head.residual = stage != "llm only"
    weights = {name: weight for name, weight in zip(_KNN, (item_knn, text_knn), strict=True) if weight}
    path = Path(folder().name) / f"{len(list(Path(folder().name).iterdir()))}"
    export(path, settings, weights, stage, replace(small_run().dataset.manifest, **manifest))
    return Recommender.load(path)
