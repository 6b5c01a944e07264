"""A small experiment: right, gone on with, and nothing trained twice."""

import json
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from llmgr_rec.baselines.builders import BASELINES, build_baseline
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.protocol import Measures, evaluate_baseline, evaluate_model
from llmgr_rec.experiments import runs, trial
from llmgr_rec.experiments.__main__ import main
from llmgr_rec.experiments.compare import hit_rate, ndcg
from llmgr_rec.experiments.target_ranks import baseline_ranks, model_ranks, targets_of
from llmgr_rec.storage.bundle import load_bundle
from llmgr_rec.storage.bundle_index import read_index
from llmgr_rec.training import selection
from tests.small_run import ONE_RANK, small_run, without_repeats

EXPERIMENT = """\
title: Small
reference: GNN
settings:
  blend.neighbors: []
  tables.dim: 8
  llm.name_or_path: random-tiny
  llm.num_layers: 1
  llm.lora_rank: 2
  prompt.templates: compact
  prompt.one_pass: true
  sbr.epochs: 2
  align.max_steps: 2
  behave.max_steps: 3
  runtime.device: cpu
  runtime.threads_per_rank: 1
variants:
  Item-kNN: {model: item_knn}
  GNN: {model: sbr}
  GNN + item-kNN: {model: sbr, settings: {blend.neighbors: [item_knn]}}
  LLMGR: {}
  LLMGR, random weights: {controls: [random_llm]}
"""


DATA = pytest.mark.parametrize("data", [lambda: small_run().dataset, without_repeats], ids=["repeats", "none"])


def words(folder: Path, output: Path, seeds: str = "0,1") -> list[str]:
    (folder / "small.yaml").write_text(EXPERIMENT)
    data = ["--dataset", str(small_run().dataset.path), "--output", str(output)]
    return ["--experiment", str(folder / "small.yaml"), *data, "--seeds", seeds]


def test_an_experiment_trains_each_thing_once_and_goes_on(tmp_path, monkeypatch, capsys):
    trained = []
    train = runs.train_run
    monkeypatch.setattr(runs, "train_run", lambda request: trained.append(request) or train(request))
    output = tmp_path / "out"
    main(words(tmp_path, output, "0"))
    # The GNN, once for itself, its blend and both LLMGRs; the own stages of each of these.
    assert [request.config.behave.epochs for request in trained] == [0, 1, 1]
    main(words(tmp_path, output))
    assert [request.config.seed for request in trained] == [0, 0, 0, 1, 1, 1]
    main(words(tmp_path, output))
    assert len(trained) == 6
    results = json.loads((output / "small.json").read_text())
    assert list(results["variants"]) == ["Item-kNN", "GNN", "GNN + item-kNN", "LLMGR", "LLMGR, random weights"]
    assert results["variants"]["GNN"]["ndcg@20"]["gain"] == {"mean": 0, "low": 0, "high": 0}
    assert len(results["variants"]["LLMGR"]["hr@20"]["seeds"]) == 2
    assert results["variants"]["LLMGR"]["training_minutes"] > results["variants"]["GNN"]["training_minutes"] > 0
    means = [results["variants"][name]["mrr@20"]["mean"] for name in ("LLMGR", "LLMGR, random weights")]
    assert means[0] != means[1]
    text = (output / "small.md").read_text()
    assert text in capsys.readouterr().out
    assert all(f"| {name} |" in text for name in results["variants"])
    for plot in ("small-gains.svg", "small-cold.svg"):
        assert "<svg" in (output / plot).read_text()
    ranks = pq.read_table(output / "small-ranks.parquet")
    assert ranks.num_rows == results["sessions"] * (1 + 4 * 2)
    of_model = ranks.filter((pc.field("variant") == "LLMGR") & (pc.field("seed") == 1))
    hits = (of_model["rank"].drop_null().to_numpy() <= 20).sum() / results["sessions"]
    assert hits == pytest.approx(results["variants"]["LLMGR"]["hr@20"]["seeds"][1])
    assert of_model["session"].to_pylist() == list(range(results["sessions"]))
    for file in ("small.csv", "small.tex"):
        assert all(name in (output / file).read_text() for name in results["variants"])


def test_metrics_and_cutoffs_of_the_tables_are_chosen_and_nothing_is_trained_again(tmp_path, monkeypatch):
    (tmp_path / "e.yaml").write_text(EXPERIMENT.split("  GNN + item-kNN")[0])
    data = ["--experiment", str(tmp_path / "e.yaml"), "--dataset", str(small_run().dataset.path)]
    data += ["--output", str(tmp_path / "out"), "--seeds", "0"]
    main(data)
    monkeypatch.setattr(runs, "train_run", lambda request: pytest.fail("trained"))
    main([*data, "--metrics", "mrr,hr", "--cutoffs", "25,5"])
    results = json.loads((tmp_path / "out" / "e.json").read_text())
    assert results["metrics"] == ["mrr@5", "mrr@25", "hr@5", "hr@25"]
    header = next(line for line in (tmp_path / "out" / "e.md").read_text().splitlines() if line.startswith("| variant"))
    assert header.startswith("| variant | MRR@5 | MRR@25 | HR@5 | HR@25 | gain in MRR@5 |")
    bundle = load_bundle(next((tmp_path / "out" / "runs").iterdir()) / "export" / "sbr")
    metrics = evaluate_model(
        bundle.ranking(),
        small_run().dataset,
        "test",
        ONE_RANK,
        bundle.catalog.train_count_V,
        measures=Measures([5, 20, 25]),
    )
    assert results["variants"]["GNN"]["hr@25"]["mean"] == pytest.approx(metrics["hr@25"])
    for words, message in ((["--metrics", "hit"], "--metrics contains hit"), (["--cutoffs", "0"], "--cutoffs has 0")):
        with pytest.raises(UserError, match=message):
            main([*data, *words])


def test_a_point_of_a_grid_is_selected_on_validation_and_never_on_test(tmp_path, monkeypatch):
    evaluated = []
    evaluate = trial.model_ranks
    monkeypatch.setattr(trial, "model_ranks", lambda *words: evaluated.append(words[2]) or evaluate(*words))
    file = tmp_path / "grid.yaml"
    variants = "variants:\n  GNN: {model: sbr, grid: {sbr.epochs: [1, 4], sbr.lr: [0.001]}}\n"
    file.write_text(EXPERIMENT.replace("LLMGR", "X").split("variants:")[0] + variants)
    output = tmp_path / "out"
    data = ["--dataset", str(small_run().dataset.path), "--output", str(output)]
    main(["--experiment", str(file), *data, "--seeds", "0"])
    results = json.loads((output / "grid.json").read_text())["variants"]["GNN"]
    qualities = [point["valid_ndcg@20"] for point in results["grid"]]
    assert qualities == sorted(qualities, reverse=True)
    assert len({point["settings"]["sbr.epochs"] for point in results["grid"]}) == 2
    # What is reported is the selected point's, and only that point was evaluated on test.
    assert results["valid_ndcg@20"] == qualities[0]
    assert evaluated.count("test") == 1
    chosen = results["grid"][0]["settings"]["sbr.epochs"]
    assert f"- GNN: sbr.epochs {chosen}, sbr.lr 0.001, best of 2" in (output / "grid.md").read_text()


def test_a_gain_over_an_untrained_backbone_of_its_own(tmp_path):
    file = tmp_path / "own.yaml"
    untrained = "settings: {sbr.epochs: 0}"
    variants = f"variants:\n  GNN: {{model: sbr}}\n  blank: {{model: sbr, {untrained}}}\n"
    file.write_text(EXPERIMENT.split("variants:")[0] + variants + f"  LLMGR: {{{untrained}, against: blank}}\n")
    data = ["--dataset", str(small_run().dataset.path), "--output", str(tmp_path / "out")]
    main(["--experiment", str(file), *data, "--seeds", "0"])
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


def test_the_rule_of_ranking_is_stated_and_trials_of_another_are_not_taken(tmp_path):
    file, output = tmp_path / "rule.yaml", tmp_path / "out"
    file.write_text(EXPERIMENT.split("  GNN + item-kNN")[0])
    found = []
    for dataset in (small_run().dataset, without_repeats()):
        main(["--experiment", str(file), "--dataset", str(dataset.path), "--output", str(output), "--seeds", "0"])
        results = json.loads((output / "rule.json").read_text())
        assert f"full ranking, {results['ranking']}." in (output / "rule.md").read_text()
        found.append((results["ranking"], results["variants"]["Item-kNN"]["ndcg@20"]["mean"]))
    (rule, with_clicked), (other_rule, without_clicked) = found
    assert (rule, other_rule) == ("no item excluded", "clicked items excluded")
    assert with_clicked != without_clicked
    # Validation chooses what is exported, so that runs differ too; and scoring learns of the rule from the model.
    bundles = [read_index(run / "export" / "sbr") for run in (output / "runs").iterdir()]
    assert sorted(bundle.repeats for bundle in bundles) == ["allow", "exclude"]


def test_an_output_that_cannot_be_made_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt is a file; give the path of a folder"):
        main(words(tmp_path, tmp_path / "notes.txt" / "out"))


@DATA
@pytest.mark.parametrize("stage", ["sbr", "behave"])
def test_target_ranks_give_the_metrics_of_evaluate(stage, data):
    dataset = data()
    bundle = load_bundle(small_run().run / "export" / stage)
    ranks_S = model_ranks(bundle, dataset, "test")
    metrics = evaluate_model(bundle.ranking(), dataset, "test", ONE_RANK, bundle.catalog.train_count_V)
    assert hit_rate(ranks_S).mean() == pytest.approx(metrics["hr@20"])
    assert ndcg(ranks_S).mean() == pytest.approx(metrics["ndcg@20"])


@DATA
@pytest.mark.parametrize("name", BASELINES)
def test_target_ranks_of_a_baseline_give_the_metrics_of_evaluate(name, data):
    dataset = data()
    catalog = Catalog.load(dataset.path)
    baseline = build_baseline(name, dataset, catalog)
    metrics = evaluate_baseline(baseline, dataset, "test", catalog, ONE_RANK)
    assert ndcg(baseline_ranks(baseline, dataset, "test")).mean() == pytest.approx(metrics["ndcg@20"])


def test_targets_are_in_the_order_of_the_split():
    assert len(targets_of(small_run().dataset, "test")) == small_run().dataset.manifest.num_examples["test"]


@pytest.mark.parametrize("seeds", ["x", "0,0", "-1"])
def test_seeds_are_different_numbers(tmp_path, seeds):
    with pytest.raises(UserError, match="--seeds"):
        main(words(tmp_path, tmp_path / "out", seeds))
    assert not (tmp_path / "out").exists()


TEXT = """\
title: Text encoder
reference: GNN
settings:
  tables.dim: 8
  blend.neighbors: [item_knn]
  llm.name_or_path: random-tiny
  llm.num_layers: 1
  prompt.max_text_tokens: 24
  sbr.epochs: 1
  llm_text.max_steps: 2
  text_encoder.dim: 8
  llm_text.epochs: 1
  align.epochs: 0
  behave.epochs: 0
  runtime.device: cpu
  runtime.threads_per_rank: 1
variants:
  GNN: {model: sbr}
  Text: {model: llm_text}
  Text at 0: {model: llm_text, settings: {text_encoder.score_weight: [0.0]}}
  Text at 0 or 64: {model: llm_text, settings: {text_encoder.score_weight: [64.0, 0.0]}}
"""


def test_the_weight_of_a_text_encoder_is_selected_together_with_those_of_neighbors(tmp_path, monkeypatch):
    trained, searched = [], []
    train, search = runs.train_run, selection._validation_ndcg
    monkeypatch.setattr(runs, "train_run", lambda request: trained.append(request) or train(request))
    monkeypatch.setattr(selection, "_validation_ndcg", lambda *words: searched.append(search(*words)) or searched[-1])
    (tmp_path / "text.yaml").write_text(TEXT)
    data = ["--dataset", str(small_run().dataset.path), "--output", str(tmp_path / "out")]
    main(["--experiment", str(tmp_path / "text.yaml"), *data, "--seeds", "0"])
    assert len(trained) == 2, "weights are selected after training"
    found = json.loads((tmp_path / "out" / "text.json").read_text())["variants"]
    assert {name: [*one["selected"][0]] for name, one in found.items()} == {
        "GNN": ["item_knn"],
        **{name: ["item_knn", "text_encoder"] for name in ("Text", "Text at 0", "Text at 0 or 64")},
    }
    # The eight weights of item-kNN at each weight of the text encoder's score.
    assert [len(one) for one in searched] == [8, 6 * 8, 8, 2 * 8]
    assert searched[1][:8] == searched[2] == searched[3][8:] == searched[0]
    assert len({*searched[1]}) > 8
    for one, name in zip(searched, found, strict=True):
        assert found[name]["valid_ndcg@20"] == max(one)
    assert found["Text at 0"]["ndcg@20"]["mean"] == found["GNN"]["ndcg@20"]["mean"]
