"""The protocol against a plain loop over sessions, and on two ranks."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmgr_rec.baselines.builders import BASELINES, build_baseline
from llmgr_rec.baselines.knn import Baseline, ItemKNN
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed.process_group import World
from llmgr_rec.evaluation.beyond_accuracy import BeyondAccuracy, ItemProperties
from llmgr_rec.evaluation.protocol import Measures, evaluate_baseline, evaluate_model, identity, split_reader
from llmgr_rec.evaluation.rank_collector import RankCollector
from llmgr_rec.storage.bundle import load_bundle
from tests.data.prepare_inputs import read
from tests.ranks import run_on_ranks
from tests.sharded_bundles import sharded_bundles
from tests.small_run import NUM_ITEMS, ONE_RANK, small_run, without_repeats


def reference(stage: str, dataset: Dataset, split: str) -> dict[str, float]:
    """Scores every session alone against every item, with numpy on top."""
    bundle = load_bundle(small_run().run / "export" / stage)
    ranking, collate = bundle.ranking(), bundle.collate
    items = bundle.model.item_vectors(collate.item_features(torch.arange(bundle.catalog.num_items)))
    ranks = []
    for clicks, batch in split_reader(dataset, split, 1, lambda raw: (raw.items_L, collate(raw))).batches(0):
        scores = (ranking.queries(batch) @ items.T)[0].detach().numpy()
        order = np.argsort(-scores, kind="stable").tolist()
        ranks.append(rank_in(order, set(clicks.tolist()), int(batch.targets_B[0]), dataset))
    return metrics_of(ranks)


def baseline_reference(baseline: Baseline, dataset: Dataset, split: str) -> dict[str, float]:
    """Ranks every session alone over all items."""
    ranks = []
    for raw in split_reader(dataset, split, 1, identity).batches(0):
        order = baseline.rank(raw.items_L.numpy(), raw.offsets_B1.numpy(), NUM_ITEMS)[0][0].tolist()
        ranks.append(rank_in(order, set(raw.items_L.tolist()), int(raw.targets_B[0]), dataset))
    return metrics_of(ranks)


def rank_in(order: list[int], clicked: set[int], target: int, dataset: Dataset) -> float:
    """Rank of the target, from 1, in a list of all items; without seen items where the data set excludes them."""
    if dataset.manifest.repeats == "exclude":
        order = [item for item in order if item not in clicked]
    return order.index(target) + 1 if target in order else float("inf")


def metrics_of(ranks: list[float]) -> dict[str, float]:
    rank = np.array(ranks, float)
    result: dict[str, float] = {"count": len(ranks)}
    for k in (5, 10, 20):
        inside = rank <= k
        result[f"hr@{k}"] = inside.mean()
        result[f"ndcg@{k}"] = (inside / np.log2(rank + 1)).mean()
        result[f"mrr@{k}"] = (inside / rank).mean()
    return result


@pytest.mark.parametrize("data", [lambda: small_run().dataset, without_repeats], ids=["repeats", "none"])
@pytest.mark.parametrize(("stage", "split"), [("sbr", "test"), ("sbr", "train"), ("behave", "valid")])
def test_equals_ranking_every_session_alone(stage: str, split: str, data: Callable[[], Dataset]) -> None:
    dataset = data()
    bundle = load_bundle(small_run().run / "export" / stage)
    result = evaluate_model(bundle.ranking(), dataset, split, ONE_RANK, bundle.catalog.train_count_V)
    expected = reference(stage, dataset, split)
    assert expected["count"] == dataset.manifest.num_examples[split]
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize("data", [lambda: small_run().dataset, without_repeats], ids=["repeats", "none"])
@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_equals_ranking_every_session_alone(name: str, data: Callable[[], Dataset]) -> None:
    dataset, catalog = data(), small_run().catalog
    baseline = build_baseline(name, dataset, catalog)
    result = evaluate_baseline(baseline, dataset, "test", catalog, ONE_RANK)
    for metric, value in baseline_reference(baseline, dataset, "test").items():
        assert result[metric] == pytest.approx(value, abs=1e-9), metric


def test_exclusion_changes_every_figure() -> None:
    both = [everything(ONE_RANK, dataset) for dataset in (small_run().dataset, without_repeats())]
    for name, with_clicked in both[0].items():
        assert with_clicked["ndcg@20"] != both[1][name]["ndcg@20"], name


def test_the_model_keeps_its_mode() -> None:
    shared = small_run()
    bundle = load_bundle(shared.run / "export" / "sbr")
    bundle.model.train()
    evaluate_model(bundle.ranking(), shared.dataset, "test", ONE_RANK, bundle.catalog.train_count_V)
    assert bundle.model.training


def test_item_knn_counts_each_training_session_once_with_its_target() -> None:
    shared = small_run()
    knn = build_baseline("item_knn", shared.dataset, shared.catalog)
    assert isinstance(knn, ItemKNN)
    prepared = read(shared.dataset.path)
    sessions = [{*items, target} for _, items, target in prepared.rows["train"]]
    similarity = knn.similarity_VV.toarray()
    first, second = np.unravel_index(similarity.argmax(), similarity.shape)
    pair = {prepared.ids[first], prepared.ids[second]}
    both = sum(pair <= session for session in sessions)
    each = [sum(item in session for session in sessions) for item in pair]
    assert both > 1
    assert similarity[first, second] == pytest.approx(both / np.sqrt(each[0] * each[1]))


def everything(world: World, dataset: Dataset, run: Path | None = None) -> dict[str, dict[str, Any]]:
    results = {}
    run, catalog = run or small_run().run, Catalog.load(dataset.path)
    items = ItemProperties(catalog)
    for stage in ("sbr", "behave"):
        # Either way of several ranks; plain torch where there is no process group.
        with sharded_bundles() if stage == "behave" else nullcontext():
            bundle = load_bundle(run / "export" / stage, None if world is ONE_RANK else world)
        measures = Measures((1, 20, 30), RankCollector(), BeyondAccuracy(items))
        results[stage] = evaluate_model(
            bundle.ranking(), dataset, "test", world, catalog.train_count_V, measures=measures
        ) | {"ranks": measures.ranks.gather(world).tolist()}
    for name in ("popularity", "item_knn"):
        baseline = build_baseline(name, dataset, catalog)
        measures = Measures(ranks=RankCollector(), beyond_accuracy=BeyondAccuracy(items))
        results[name] = evaluate_baseline(baseline, dataset, "test", catalog, world, measures=measures) | {
            "ranks": measures.ranks.gather(world).tolist()
        }
    return results


def both_data_sets(world: World, run: Path, datasets: list[Dataset]) -> list[dict[str, dict[str, Any]]]:
    return [everything(world, dataset, run) for dataset in datasets]


@pytest.mark.dist
def test_two_ranks_give_the_figures_of_one() -> None:
    shared = (small_run().run, [small_run().dataset, without_repeats()])
    (one,) = run_on_ranks(both_data_sets, 1, *shared)
    for results in run_on_ranks(both_data_sets, 2, *shared):
        assert results == one
    for result in one:
        assert result["item_knn"]["hr@20"] > result["popularity"]["hr@20"] + 0.2
        assert all(len(metrics["ranks"]) == metrics["count"] for metrics in result.values())
