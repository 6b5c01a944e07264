"""The protocol against a plain loop over sessions, and on two ranks."""

import numpy as np
import pytest
import torch

from llmgr_rec.distributed.assembly import make_collator
from llmgr_rec.distributed.bundle import load_bundle
from llmgr_rec.distributed.process_group import World
from llmgr_rec.evaluation.baselines import ItemKNN
from llmgr_rec.evaluation.protocol import (
    build_baseline,
    evaluate_baseline,
    evaluate_model,
    session_queries,
    split_reader,
)
from llmgr_rec.modules.llmgr import LLMGR
from tests.data.prepare_inputs import read
from tests.ranks import run_on_ranks
from tests.small_run import ONE_RANK, SmallRun, small_run


def reference(stage: str, split: str) -> dict[str, float]:
    """Scores every session alone against every item, with numpy on top."""
    shared = small_run()
    bundle = load_bundle(shared.run / "export" / stage)
    collate = make_collator(bundle.config, bundle.catalogue, "rank", language=isinstance(bundle.model, LLMGR))
    items = bundle.model.item_vectors(collate.item_features(torch.arange(bundle.catalogue.num_items)))
    places = []
    for batch in split_reader(shared.dataset, split, 1, collate).batches(0):
        scores = (session_queries(bundle.model, batch) @ items.T)[0].detach().numpy()
        order = np.argsort(-scores, kind="stable").tolist()
        places.append(order.index(int(batch.targets_B[0])) + 1)
    place = np.array(places, float)
    result = {"count": len(places)}
    for k in (5, 10, 20):
        inside = place <= k
        result[f"hr@{k}"] = inside.mean()
        result[f"ndcg@{k}"] = (inside / np.log2(place + 1)).mean()
        result[f"mrr@{k}"] = (inside / place).mean()
    return result


@pytest.mark.parametrize(("stage", "split"), [("sbr", "test"), ("sbr", "train"), ("behave", "valid")])
def test_equals_ranking_every_session_alone(stage: str, split: str) -> None:
    shared = small_run()
    bundle = load_bundle(shared.run / "export" / stage)
    result = evaluate_model(bundle.model, shared.dataset, split, bundle.config, ONE_RANK)
    expected = reference(stage, split)
    assert expected["count"] == shared.dataset.manifest.num_examples[split]
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, abs=1e-9), name


def test_the_model_keeps_its_mode() -> None:
    shared = small_run()
    bundle = load_bundle(shared.run / "export" / "sbr")
    bundle.model.train()
    evaluate_model(bundle.model, shared.dataset, "test", bundle.config, ONE_RANK)
    assert bundle.model.training


def test_item_knn_counts_each_training_session_once_with_its_target() -> None:
    shared = small_run()
    knn = build_baseline("item_knn", shared.dataset, shared.catalogue)
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


def everything(world: World, shared: SmallRun) -> dict[str, dict]:
    results = {}
    for stage in ("sbr", "behave"):
        bundle = load_bundle(shared.run / "export" / stage, world)
        results[stage] = evaluate_model(bundle.model, shared.dataset, "test", bundle.config, world)
    for name in ("popularity", "item_knn"):
        baseline = build_baseline(name, shared.dataset, shared.catalogue)
        results[name] = evaluate_baseline(baseline, shared.dataset, "test", shared.catalogue, world)
    return results


@pytest.mark.dist
def test_two_ranks_give_the_figures_of_one() -> None:
    shared = small_run()
    (one,) = run_on_ranks(everything, 1, shared)
    for results in run_on_ranks(everything, 2, shared):
        assert results == one
    assert one["item_knn"]["hr@20"] > one["popularity"]["hr@20"] + 0.2
