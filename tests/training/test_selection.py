"""Selection of blend weights on validation sessions, and the blend in export, evaluate, score and the report."""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from llmgr_rec.baselines.blend import Blend
from llmgr_rec.baselines.builders import build_baseline
from llmgr_rec.baselines.embedding_knn import EmbeddingKNN
from llmgr_rec.config import BlendConfig, Config
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed import item_vectors
from llmgr_rec.distributed.item_vectors import items_of_rank
from llmgr_rec.distributed.process_group import World
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.evaluate_run import EvaluationRequest, evaluate_run
from llmgr_rec.evaluation.examples import ranked_examples
from llmgr_rec.evaluation.protocol import evaluate_model
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.scoring.score_run import ScoreRequest, score_run
from llmgr_rec.storage.bundle import Bundle, load_bundle
from llmgr_rec.storage.embedding_model import EmbeddingModel
from llmgr_rec.training import neighbors, stages
from llmgr_rec.training.preflight import RunRequest, check_run
from llmgr_rec.training.selection import select_on_validation
from llmgr_rec.training.train_run import train_run
from tests.data.prepare_inputs import edit_manifest, prepare
from tests.modules.small_llmgr import raw_sessions as as_raw
from tests.ranks import run_on_ranks
from tests.scoring.sessions import all_bytes, read_scores, write_sessions
from tests.sharded_bundles import sharded_bundles
from tests.small_run import NUM_ITEMS, ONE_RANK, small_run
from tests.training.small_training import small_config

K = 10


@dataclass(frozen=True)
class Run:
    """A trained run that tests must not write to."""

    config: Config
    dataset: Path
    folder: Path

    def request(self, **changes: Any) -> RunRequest:
        return replace(RunRequest(self.config, self.dataset, self.folder, "all", resume=False), **changes)

    @property
    def catalog(self) -> Catalog:
        return Catalog.load(self.dataset)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, small_dataset: Path) -> Run:
    """Stages sbr and behave, with weights of item_knn chosen after each."""
    folder = tmp_path_factory.mktemp("selection")
    config = small_config(folder / "prompts.yaml")
    config.align.epochs = 0
    config.behave.max_steps = 2
    config.blend.neighbors = ["item_knn"]
    run = Run(config, small_dataset, folder / "run")
    train_run(run.request())
    return run


def selections(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl about selections, without their times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{**line, "time": ""} for line in lines if line.get("split") == "selection"]


def blend_weights(run: Path, stage: str) -> dict[str, float]:
    blend = load_bundle(run / "export" / stage).blend
    assert blend is not None
    return dict(blend.weights)


@pytest.mark.parametrize(("stage", "model"), [("sbr", "sbr"), ("behave", "llmgr")])
def test_what_was_selected_is_evaluated_and_recorded(trained: Run, tmp_path: Path, stage: str, model: str) -> None:
    content = evaluate_run(EvaluationRequest(trained.folder, trained.dataset, "valid", tmp_path / "metrics.json"))
    record = next(line for line in selections(trained.folder) if line["stage"] == stage)
    assert content["blends"][model] == blend_weights(trained.folder, stage) == {"item_knn": record["item_knn"]}
    assert record["item_knn"] > 0, "a blend of weight 0 shows nothing"
    assert content["valid"][model]["ndcg@20"] == pytest.approx(record["ndcg@20"], abs=1e-12)


def test_the_blend_changes_what_is_evaluated_and_not_what_is_validated(trained: Run) -> None:
    ranking = load_bundle(trained.folder / "export/sbr").ranking()
    words = (Dataset(trained.dataset), "valid", ONE_RANK, trained.catalog.train_count_V)
    alone, blended = evaluate_model(replace(ranking, blend=None), *words), evaluate_model(ranking, *words)
    lines = [json.loads(line) for line in (trained.folder / "metrics.jsonl").read_text().splitlines()]
    validated = [line["ndcg@20"] for line in lines if line["stage"] == "sbr" and line.get("split") == "valid"]
    assert validated == [pytest.approx(alone["ndcg@20"], abs=1e-9)]
    assert blended["ndcg@20"] == pytest.approx(selections(trained.folder)[0]["ndcg@20"], abs=1e-9)
    assert blended["ndcg@20"] > alone["ndcg@20"]


def known_sessions(dataset: Path) -> list[list[int]]:
    """Clicks of some sessions, one with an item twice."""
    num_items = Catalog.load(dataset).num_items
    draw = np.random.default_rng(0)
    sessions = [draw.integers(num_items, size=size).tolist() for size in draw.integers(1, 9, size=23)]
    return [*sessions, [4, 7, 4]]


@torch.no_grad()
def dense_scores(bundle: Bundle, clicks: list[int], by_recommender: bool = False) -> Tensor:
    """The model's scores of all items for one session, plus the blend's."""
    assert bundle.blend is not None
    model, collate = bundle.model, bundle.collate
    items = model.item_vectors(collate.item_features(torch.arange(bundle.catalog.num_items)))
    batch = collate(as_raw([clicks], [-1]))
    if isinstance(model, SessionRecommender):
        query = model.queries(batch)
    else:
        query = model.recommender_queries(batch) if by_recommender else model(batch)
    similarity = torch.from_numpy(bundle.blend.similarity_VR.toarray())
    added = sum(0.7**after * similarity[item] for after, item in enumerate(reversed(clicks)))
    return (query @ items.T)[0] + added


def top_items(scores: Tensor, excluded: list[int]) -> list[int]:
    scores[excluded] = -torch.inf
    return scores.argsort(descending=True, stable=True)[:K].tolist()


def sessions_file(trained: Run, folder: Path) -> Path:
    ids = trained.catalog.item_ids.to_pylist()
    sessions = [[ids[item] for item in clicks] for clicks in known_sessions(trained.dataset)]
    return write_sessions(folder / "in.parquet", sessions)


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("sbr", {"repeats": "allow"}),
        ("sbr", {"repeats": "exclude"}),
        ("behave", {"repeats": "allow"}),
        ("behave", {"repeats": "exclude", "llm_budget": 0.0}),
    ],
)
def test_scoring_gives_the_items_of_the_blend_and_the_same_bytes_after_a_restart(
    trained: Run, tmp_path: Path, stage: str, options: dict[str, Any]
) -> None:
    source, output = sessions_file(trained, tmp_path), tmp_path / "out"
    request = ScoreRequest(trained.folder, source, output, k=K, stage=stage, part_rows=10, **options)  # type: ignore[arg-type]
    score_run(request)
    bundle = load_bundle(trained.folder / "export" / stage)
    ids = trained.catalog.item_ids.to_pylist()
    for clicks, row in zip(known_sessions(trained.dataset), read_scores(output), strict=True):
        scores = dense_scores(bundle, clicks, by_recommender="llm_budget" in options)
        expected = top_items(scores, clicks if options["repeats"] == "exclude" else [])
        assert row["item_ids"] == [ids[item] for item in expected]
        np.testing.assert_allclose(row["scores"], scores[expected].numpy(), rtol=1e-4, atol=1e-5)
    whole = all_bytes(output)
    (output / "part-00001.parquet").unlink()
    (output / "_SUCCESS").unlink()
    score_run(request)
    assert all_bytes(output) == whole


def test_the_report_shows_what_the_blend_recommends(trained: Run) -> None:
    bundle = load_bundle(trained.folder / "export/sbr")
    titles, dataset = bundle.catalog.titles(), Dataset(trained.dataset)
    found = [example for example, _ in zip(ranked_examples(bundle.path, dataset, "test"), range(9), strict=False)]
    assert len(found) == 9
    for example in found:
        clicks = [titles.index(title) for title in example.clicks]
        expected = top_items(dense_scores(bundle, clicks), [] if dataset.manifest.repeats == "allow" else clicks)
        assert example.recommended[:K] == [titles[item] for item in expected]


def test_a_run_that_was_stopped_while_it_exported_ends_with_the_same_bytes(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(trained.config, behave=replace(trained.config.behave, epochs=0))
    run = replace(trained, config=config, folder=tmp_path / "run")

    def stop(*_: Any) -> None:
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(stages, "export_bundle", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            train_run(run.request())
    assert not selections(run.folder)
    train_run(run.request(resume=True))
    ours, theirs = (all_bytes(folder / "export/sbr") for folder in (run.folder, trained.folder))
    assert ours["blend.npz"] == theirs["blend.npz"]
    for kept in (ours, theirs):
        del kept["config.yaml"], kept["bundle.json"]
    assert ours == theirs
    assert selections(run.folder) == selections(trained.folder)[:1]


@pytest.fixture
def caught_lines(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "llmgr_rec.training.selection"):
        yield caplog


def select(settings: BlendConfig, dataset: Dataset) -> tuple[Blend, dict[str, float]]:
    bundle = load_bundle(small_run().run / "export/sbr")
    config = replace(bundle.config, blend=settings)
    selection = select_on_validation("sbr", bundle.ranking(), config, dataset, bundle.catalog, ONE_RANK)
    assert selection.blend is not None
    return selection.blend, selection.metrics


def test_given_weights_are_used(caught_lines: pytest.LogCaptureFixture) -> None:
    shared = small_run()
    settings = BlendConfig(["text_knn", "item_knn"], 5, [0.25, 3.0])
    blend, metrics = select(settings, shared.dataset)
    assert blend.weights == metrics == {"text_knn": 0.25, "item_knn": 3.0}
    text, item = (
        build_baseline(name, shared.dataset, shared.catalog, 5).similarity_VV.toarray()  # type: ignore[attr-defined]
        for name in settings.neighbors
    )
    assert (item > 0).sum(axis=1).max() == 5
    np.testing.assert_allclose(blend.similarity_VR.toarray(), 0.25 * text + 3 * item, rtol=1e-6)
    (line,) = caught_lines.messages
    assert line == "sbr: blend weights text_knn 0.25, item_knn 3 (as set)"


def test_an_embedding_model_adds_a_neighbor_score() -> None:
    shared = small_run()
    bundle = load_bundle(shared.run / "export/sbr")
    settings = BlendConfig(["item_knn"], 5, [2.0, 3.0], embedding_model="random-tiny")
    config = replace(bundle.config, blend=settings)
    selection = select_on_validation("sbr", bundle.ranking(), config, shared.dataset, shared.catalog, ONE_RANK)
    assert selection.blend is not None
    assert selection.blend.weights == {"item_knn": 2.0, "embedding_knn": 3.0}
    by_text = EmbeddingKNN(EmbeddingModel("random-tiny").embeddings(shared.catalog), k_neighbors=5).similarity_VV
    np.testing.assert_allclose(
        selection.blend.terms[1].similarity_VR.toarray(), 3 * by_text.toarray(), rtol=1e-5, atol=1e-6
    )


def test_cached_neighbors_are_computed_again_where_they_are_damaged_or_of_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, built = small_run(), []
    build = neighbors._compute
    monkeypatch.setattr(neighbors, "_compute", lambda *words: built.append(words[:2]) or build(*words))

    def scores(k_neighbors: int = 5) -> list[np.ndarray]:
        names = ["item_knn", "text_knn"]
        found = neighbors.neighbor_scores(
            names, k_neighbors, shared.dataset, shared.catalog, ONE_RANK, tmp_path / "cache"
        )
        assert [blend.weights for blend in found] == [{name: 1.0} for name in names]
        return [blend.similarity_VR.toarray() for blend in found]

    first, second = scores(), scores()
    assert built == [("item_knn", 5), ("text_knn", 5)]
    np.testing.assert_array_equal(first, second)
    scores(4)
    assert built[2:] == [("item_knn", 4), ("text_knn", 4)]
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:-9])
    np.testing.assert_array_equal(scores(), first)
    assert len(built) == 6
    assert not list((tmp_path / "cache").glob("*.tmp*"))


def select_and_evaluate(world: World, run: Path, dataset: Dataset) -> tuple[Any, ...]:
    with sharded_bundles():
        bundle = load_bundle(run / "export/sbr", world)
    config = replace(bundle.config, blend=BlendConfig(["item_knn"], 20, embedding_model="random-tiny"))
    selection = select_on_validation("sbr", bundle.ranking(), config, dataset, bundle.catalog, world)
    assert selection.blend is not None
    assert selection.blend.similarity_VR.shape == (NUM_ITEMS, len(items_of_rank(NUM_ITEMS, world)))
    ranking = replace(bundle.ranking(), blend=selection.blend)
    metrics = evaluate_model(ranking, dataset, "test", world, bundle.catalog.train_count_V)
    # As catalogs whose vectors are too large to be kept, three batches at once.
    blocks = {"LARGEST_KEPT_BYTES": 0, "BLOCK_ITEMS": 16, "SESSIONS_PER_PASS": 3 * ranking.batch_size * world.size}
    with mock.patch.multiple(item_vectors, **blocks):
        assert ranking.ranker(world).sessions_at_once > ranking.batch_size
        again = select_on_validation("sbr", bundle.ranking(), config, dataset, bundle.catalog, world)
        assert again.metrics == selection.metrics
        assert evaluate_model(ranking, dataset, "test", world, bundle.catalog.train_count_V) == metrics
    return selection.blend.weights, selection.metrics, metrics


@pytest.mark.dist
def test_two_ranks_select_and_rank_as_one() -> None:
    shared = small_run()
    (one,) = run_on_ranks(select_and_evaluate, 1, shared.run, shared.dataset)
    assert max(one[0].values()) > 0
    assert run_on_ranks(select_and_evaluate, 2, shared.run, shared.dataset) == [one, one]


def test_without_validation_sessions_weights_must_be_given(trained: Run, tmp_path: Path) -> None:
    dataset = tmp_path / "dataset"
    shutil.copytree(trained.dataset, dataset)
    edit_manifest(dataset, lambda values: values["num_sessions"].update(valid=0))
    output = tmp_path / "run"
    with pytest.raises(UserError, match=r"blend\.weights is empty, but .*dataset has no validation sessions"):
        train_run(trained.request(dataset=dataset, output=output, stage="sbr"))
    assert not output.exists()
    given = replace(trained.config, blend=BlendConfig(["item_knn"], weights=[2.0]))
    check_run(trained.request(config=given, dataset=dataset, output=output, stage="sbr"))


def test_a_data_set_without_words_trains_as_if_words_said_nothing(
    trained: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One recipe serves click logs without text as well as shops; smoothing leaves their rows as trained."""
    clicks = [(f"u{user}", f"i{(user + place) % 9}", place) for user in range(20) for place in range(5)]
    items = tmp_path / "items.parquet"
    pq.write_table(
        pa.table({"item_id": [f"i{number}" for number in range(9)], "title": pa.nulls(9, pa.string())}), items
    )
    dataset = prepare(tmp_path, clicks, items=str(items)).dataset
    blend = BlendConfig(["item_knn", "text_knn"])
    bundles = []
    for name, strength in (("plain", 0.0), ("smoothed", 2.0)):
        tables = replace(trained.config.tables, knn_smoothing=[strength])
        config = replace(trained.config, blend=blend, tables=tables)
        train_run(RunRequest(config, dataset.path, tmp_path / name, "sbr", resume=False))
        bundles.append(load_bundle(tmp_path / name / "export/sbr"))
    assert "no item has a word in title, category, brand, so text_knn adds nothing" in caplog.text
    plain, smoothed = bundles
    assert plain.blend is not None
    assert plain.blend.weights["text_knn"] == 0
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(smoothed.model.state_dict()[name], tensor), name
