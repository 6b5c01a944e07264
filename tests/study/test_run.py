"""A small experiment: right, gone on with, and nothing trained twice."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llmgr_rec.baselines.registry import BASELINES, build_baseline
from llmgr_rec.data.catalogue import Catalogue
from llmgr_rec.distributed.assembly import make_collator
from llmgr_rec.distributed.bundle import load_bundle
from llmgr_rec.distributed.bundle_index import read_index
from llmgr_rec.distributed.ranking import BEHIND_ALL
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.clicked import clicked_items
from llmgr_rec.evaluation.metrics import RankingMetrics
from llmgr_rec.evaluation.protocol import as_it_is, evaluate_baseline, evaluate_model, split_reader
from llmgr_rec.experiments import main
from llmgr_rec.study import cells
from llmgr_rec.study.compare import hit_rate, ndcg
from llmgr_rec.study.judge import judge_baseline, judge_model, places, targets_of
from tests.small_run import NUM_ITEMS, ONE_RANK, small_run, without_repeats

RECIPE = """\
title: Small
reference: GNN
settings:
  tables.dim: 8
  llm.name_or_path: random-tiny
  llm.num_layers: 1
  llm.lora_rank: 2
  prompt.templates: compact
  behave.one_pass: true
  sbr.epochs: 2
  align.max_steps: 2
  behave.max_steps: 3
  runtime.device: cpu
  runtime.threads_per_rank: 1
variants:
  Item-kNN: {model: item_knn}
  GNN: {model: sbr}
  GNN + item-kNN: {model: sbr, blend: item_knn}
  LLMGR: {}
  LLMGR, no graph: {settings: {controls.no_graph: true}}
"""


DATA = pytest.mark.parametrize("data", [lambda: small_run().dataset, without_repeats], ids=["repeats", "none"])


def words(folder: Path, output: Path, seeds: str = "0,1") -> list[str]:
    (folder / "small.yaml").write_text(RECIPE)
    data = ["--dataset", str(small_run().dataset.path), "--output", str(output)]
    return ["--recipe", str(folder / "small.yaml"), *data, "--seeds", seeds]


def test_an_experiment_trains_each_thing_once_and_goes_on(tmp_path, monkeypatch, capsys):
    trained = []
    train = cells.train_run
    monkeypatch.setattr(cells, "train_run", lambda request: trained.append(request) or train(request))
    output = tmp_path / "out"
    main(words(tmp_path, output, "0"))
    # The GNN, once for itself, its blend and both LLMGRs; the own stages of each of these.
    assert [request.config.behave.epochs for request in trained] == [0, 1, 1]
    main(words(tmp_path, output))
    assert [request.config.seed for request in trained] == [0, 0, 0, 1, 1, 1]
    main(words(tmp_path, output))
    assert len(trained) == 6
    results = json.loads((output / "small.json").read_text())
    assert list(results["variants"]) == ["Item-kNN", "GNN", "GNN + item-kNN", "LLMGR", "LLMGR, no graph"]
    assert results["variants"]["GNN"]["ndcg@20"]["gain"] == {"mean": 0, "low": 0, "high": 0}
    assert len(results["variants"]["LLMGR"]["hr@20"]["seeds"]) == 2
    assert results["variants"]["LLMGR"]["training_minutes"] > results["variants"]["GNN"]["training_minutes"] > 0
    text = (output / "small.md").read_text()
    assert text in capsys.readouterr().out
    assert all(f"| {name} |" in text for name in results["variants"])
    for plot in ("small-gains.svg", "small-cold.svg"):
        assert "<svg" in (output / plot).read_text()


def test_a_grid_is_chosen_from_on_validation_and_never_on_what_is_judged(tmp_path, monkeypatch):
    judged = []
    judge = cells.judge_model
    monkeypatch.setattr(cells, "judge_model", lambda *words: judged.append(words[2]) or judge(*words))
    file = tmp_path / "grid.yaml"
    variants = "variants:\n  GNN: {model: sbr, grid: {sbr.epochs: [1, 4], sbr.lr: [0.001]}}\n"
    file.write_text(RECIPE.replace("LLMGR", "X").split("variants:")[0] + variants)
    output = tmp_path / "out"
    data = ["--dataset", str(small_run().dataset.path), "--output", str(output)]
    main(["--recipe", str(file), *data, "--seeds", "0"])
    results = json.loads((output / "grid.json").read_text())["variants"]["GNN"]
    qualities = [point["valid_ndcg@20"] for point in results["grid"]]
    assert qualities == sorted(qualities, reverse=True)
    assert len({point["settings"]["sbr.epochs"] for point in results["grid"]}) == 2
    # What is reported is the chosen point's, and only that point was judged on test.
    assert results["valid_ndcg@20"] == qualities[0]
    assert judged.count("test") == 1
    chosen = results["grid"][0]["settings"]["sbr.epochs"]
    assert f"- GNN: sbr.epochs {chosen}, sbr.lr 0.001, best of 2" in (output / "grid.md").read_text()


def test_a_gain_over_an_untrained_backbone_of_its_own(tmp_path):
    file = tmp_path / "own.yaml"
    untrained = "settings: {sbr.epochs: 0}"
    variants = f"variants:\n  GNN: {{model: sbr}}\n  blank: {{model: sbr, {untrained}}}\n"
    file.write_text(RECIPE.split("variants:")[0] + variants + f"  LLMGR: {{{untrained}, against: blank}}\n")
    data = ["--dataset", str(small_run().dataset.path), "--output", str(tmp_path / "out")]
    main(["--recipe", str(file), *data, "--seeds", "0"])
    found = json.loads((tmp_path / "out" / "own.json").read_text())["variants"]
    means = {name: variant["ndcg@20"]["mean"] for name, variant in found.items()}
    assert {name: variant["against"] for name, variant in found.items()} == {
        "GNN": "GNN",
        "blank": "GNN",
        "LLMGR": "blank",
    }
    assert found["blank"]["ndcg@20"]["gain"]["mean"] == pytest.approx(means["blank"] / means["GNN"] - 1)
    assert found["LLMGR"]["ndcg@20"]["gain"]["mean"] == pytest.approx(means["LLMGR"] / means["blank"] - 1)
    assert len(set(means.values())) == 3


def test_the_rule_of_ranking_is_told_and_cells_of_another_are_not_taken(tmp_path):
    file, output = tmp_path / "rule.yaml", tmp_path / "out"
    file.write_text(RECIPE.split("  GNN + item-kNN")[0])
    found = []
    for dataset in (small_run().dataset, without_repeats()):
        main(["--recipe", str(file), "--dataset", str(dataset.path), "--output", str(output), "--seeds", "0"])
        results = json.loads((output / "rule.json").read_text())
        assert f"full ranking, {results['ranking']}." in (output / "rule.md").read_text()
        found.append((results["ranking"], results["variants"]["Item-kNN"]["ndcg@20"]["mean"]))
    (rule, with_clicked), (other_rule, without_clicked) = found
    assert (rule, other_rule) == ("no item excluded", "clicked items left out: no training session repeats one")
    assert with_clicked != without_clicked
    # Validation chooses what is exported, so that runs differ too; and scoring learns of the rule from the model.
    bundles = [read_index(run / "export" / "sbr") for run in (output / "runs").iterdir()]
    assert sorted(bundle.clicks_repeat for bundle in bundles) == [False, True]


def test_an_output_that_cannot_be_made_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt is a file; give the path of a folder"):
        main(words(tmp_path, tmp_path / "notes.txt" / "out"))


@torch.no_grad()
@DATA
@pytest.mark.parametrize("stage", ["sbr", "behave"])
def test_places_give_the_metrics_of_evaluate(stage, data):
    shared, dataset = small_run(), data()
    bundle = load_bundle(shared.run / "export" / stage)
    places_S = judge_model(bundle.model, dataset, "test", bundle.config, shared.catalogue)[0]
    metrics = evaluate_model(bundle.model, dataset, "test", bundle.config, ONE_RANK)
    assert hit_rate(places_S).mean() == pytest.approx(metrics["hr@20"])
    assert ndcg(places_S).mean() == pytest.approx(metrics["ndcg@20"])


@DATA
@pytest.mark.parametrize("name", BASELINES)
def test_places_of_a_baseline_give_the_metrics_of_evaluate(name, data):
    dataset = data()
    catalogue = Catalogue.load(dataset.path)
    baseline = build_baseline(name, dataset, catalogue)
    places_S = judge_baseline(baseline, dataset, "test")[0]
    metrics = evaluate_baseline(baseline, dataset, "test", catalogue, ONE_RANK)
    assert ndcg(places_S).mean() == pytest.approx(metrics["ndcg@20"])


@torch.no_grad()
@DATA
def test_a_blend_of_great_weight_ranks_as_its_baseline(data):
    shared, dataset = small_run(), data()
    bundle = load_bundle(shared.run / "export" / "sbr")
    knn = build_baseline("item_knn", dataset, shared.catalogue)
    judged = judge_model(bundle.model, dataset, "test", bundle.config, shared.catalogue, [knn], [(0.0,), (1e6,)])
    alone = judge_model(bundle.model, dataset, "test", bundle.config, shared.catalogue)
    by_knn = judge_baseline(knn, dataset, "test")[0]
    np.testing.assert_array_equal(judged[0], alone[0])
    # A target that is left out stands behind all items, or behind the list.
    sessions = _related(knn, dataset, "test")
    np.testing.assert_array_equal(np.minimum(judged[1], NUM_ITEMS)[sessions], np.minimum(by_knn, NUM_ITEMS)[sessions])


@torch.no_grad()
def test_a_blend_of_several_adds_all_their_scores():
    shared = small_run()
    bundle = load_bundle(shared.run / "export" / "sbr")
    words = (bundle.model, shared.dataset, "test", bundle.config, shared.catalogue)
    near = [build_baseline(name, shared.dataset, shared.catalogue) for name in ("item_knn", "session_knn")]
    both = judge_model(*words, near, [(1.0, 0.0), (0.0, 2.0), (1.0, 2.0)])
    np.testing.assert_array_equal(both[0], judge_model(*words, near[:1], [(1.0,)])[0])
    np.testing.assert_array_equal(both[1], judge_model(*words, near[1:], [(2.0,)])[0])
    together = SimpleNamespace(scores=lambda *clicks: near[0].scores(*clicks) + 2 * near[1].scores(*clicks))
    np.testing.assert_allclose(both[2], judge_model(*words, [together], [(1.0,)])[0], atol=1)


@torch.no_grad()
@DATA
def test_a_blend_gives_the_places_of_dense_sums(data):
    shared, dataset = small_run(), data()
    bundle = load_bundle(shared.run / "export" / "sbr")
    near = [build_baseline(name, dataset, shared.catalogue) for name in ("item_knn", "session_knn", "text_knn")]
    weights = [(0.0, 0.0, 0.0), (1.0, 0.5, 0.0), (0.0, 4.0, 2.0), (32.0, 1.0, 8.0)]
    judged = judge_model(bundle.model, dataset, "test", bundle.config, shared.catalogue, near, weights)
    collate = make_collator(bundle.config, shared.catalogue, "rank", language=False)
    items_VQ = bundle.model.item_vectors(collate.item_features(torch.arange(NUM_ITEMS)))
    found = []
    for raw in split_reader(dataset, "test", 32, as_it_is).batches(0):
        batch = collate(raw)
        scores_BV = bundle.model.queries(batch) @ items_VQ.T
        if not dataset.manifest.clicks_repeat:
            clicked = clicked_items(batch)
            scores_BV[clicked.row_of_value, clicked.values] = -torch.inf
        terms = [torch.from_numpy(one.scores(raw.items_L.numpy(), raw.offsets_B1.numpy()).toarray()) for one in near]
        sums = [
            scores_BV + sum(weight * term.float() for weight, term in zip(weights_N, terms, strict=True))
            for weights_N in weights
        ]
        found.append(torch.stack([places(total, raw.targets_B) for total in sums])[:, raw.weights_B > 0])
    np.testing.assert_array_equal(judged, torch.cat(found, dim=1).numpy())
    assert len(np.unique(judged, axis=0)) == len(weights)


def _related(knn, dataset, split):
    """Sessions whose target the baseline relates to a click: others are ranked by the model's score."""
    found = []
    for raw in split_reader(dataset, split, 64, as_it_is).batches(0):
        scores_BV = knn.scores(raw.items_L.numpy(), raw.offsets_B1.numpy()).toarray()
        own_B = scores_BV[np.arange(len(scores_BV)), raw.targets_B.numpy()]
        is_tie_B = (np.abs(scores_BV - own_B[:, None]) < 1e-9).sum(1) > 1
        found.append(((own_B > 0) & ~is_tie_B)[raw.weights_B.numpy() > 0])
    return np.concatenate(found)


def test_places_are_those_of_the_list():
    torch.manual_seed(0)
    scores = torch.randint(0, 5, (40, 12)).float()
    targets = torch.randint(0, 12, (40,))
    order = scores.argsort(dim=1, descending=True, stable=True)
    assert torch.equal(places(scores, targets), (order == targets.unsqueeze(1)).float().argmax(1))
    metrics = RankingMetrics(torch.zeros(12, dtype=torch.int64))
    metrics.update(order, targets, torch.ones(40))
    assert metrics.compute()["hr@5"] == pytest.approx((places(scores, targets) < 5).float().mean().item())


def test_a_target_that_is_left_out_stands_behind_all():
    scores = torch.tensor([[1.0, -torch.inf, -torch.inf, 0.0], [2.0, 1.0, -torch.inf, 3.0]])
    assert places(scores, torch.tensor([1, 1])).tolist() == [BEHIND_ALL, 2]


def test_targets_stand_in_the_order_of_the_split():
    assert len(targets_of(small_run().dataset, "test")) == small_run().dataset.manifest.num_examples["test"]


@pytest.mark.parametrize("seeds", ["x", "0,0", "-1"])
def test_seeds_are_different_numbers(tmp_path, seeds):
    with pytest.raises(UserError, match="--seeds"):
        main(words(tmp_path, tmp_path / "out", seeds))
    assert not (tmp_path / "out").exists()


READER = """\
title: Reader
reference: GNN
settings:
  tables.dim: 8
  llm.name_or_path: random-tiny
  llm.num_layers: 1
  prompt.max_text_tokens: 24
  sbr.epochs: 1
  text.max_steps: 2
  text.dim: 8
  text.epochs: 1
  align.epochs: 0
  behave.epochs: 0
  runtime.device: cpu
  runtime.threads_per_rank: 1
variants:
  GNN: {model: sbr, blend: item_knn}
  Reader: {model: text, blend: item_knn}
  Reader at 0: {model: text, blend: item_knn, settings: {text.score_weight: 0.0}}
  Reader at 0 or 64: {model: text, blend: item_knn, settings: {text.score_weight: [64.0, 0.0]}}
"""


def test_the_weight_of_a_reader_is_chosen_together_with_those_of_neighbours(tmp_path, monkeypatch):
    trained, judged = [], []
    train, judge = cells.train_run, cells.judge_model
    monkeypatch.setattr(cells, "train_run", lambda request: trained.append(request) or train(request))
    monkeypatch.setattr(cells, "judge_model", lambda *words: judged.append(judge(*words)) or judged[-1])
    (tmp_path / "reader.yaml").write_text(READER)
    data = ["--dataset", str(small_run().dataset.path), "--output", str(tmp_path / "out")]
    main(["--recipe", str(tmp_path / "reader.yaml"), *data, "--seeds", "0"])
    assert len(trained) == 2, "the weight counts after training alone"
    found = json.loads((tmp_path / "out" / "reader.json").read_text())["variants"]
    assert {name: len(one["blend_weights"][0]) for name, one in found.items()} == {
        "GNN": 1,
        "Reader": 2,
        "Reader at 0": 2,
        "Reader at 0 or 64": 2,
    }
    # Validation, then test, of each variant; the eight weights of item-kNN at each weight of the reader.
    assert [len(one) for one in judged] == [8, 1, 6 * 8, 1, 8, 1, 2 * 8, 1]
    valid = [[ndcg(places_S).mean() for places_S in one] for one in judged[::2]]
    assert valid[1][:8] == valid[2] == valid[3][8:] == valid[0]
    assert len({*valid[1]}) > 8
    for one, name in zip(valid, found, strict=True):
        assert found[name]["valid_ndcg@20"] == pytest.approx(max(one))
    np.testing.assert_array_equal(judged[1], judged[5])
