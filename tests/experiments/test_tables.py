"""The table of an experiment, and its column for items that training never saw."""

import json

import pytest

from llmgr_rec.baselines.builders import BASELINES
from llmgr_rec.errors import UserError
from llmgr_rec.evaluate import MODELS
from llmgr_rec.evaluation.results import MODEL_NAMES
from llmgr_rec.experiments import runs
from llmgr_rec.experiments.__main__ import main
from llmgr_rec.experiments.experiment import Experiment
from llmgr_rec.experiments.tables import plot_gains, table
from tests.data.prepare_inputs import prepare, write_items
from tests.experiments.test_run_experiment import EXPERIMENT as SMALL

METRICS = ("hr@20", "ndcg@20", "mrr@20")
EXPERIMENT = Experiment("Unseen", "a", "quickstart", {}, ())


def results_of(buckets):
    metric = {"mean": 0.25, "low": 0.24, "high": 0.27, "sd": 0.01, "seeds": [0.24, 0.26]}
    metric |= {"gain": {"mean": 0.1, "low": 0.05, "high": 0.2}, "p": 0.004, "p_holm": 0.012}
    by_count = {name: {"hr": hr, "count": count} for name, (hr, count) in buckets.items()}
    variant = dict.fromkeys(METRICS, metric)
    variant |= {"hr@20_by_train_count": by_count, "training_minutes": 1.5, "grid": [], "against": "a"}
    split = {"split": "test", "protocol": "leave_one_out", "sessions": 1200, "items": 4000, "chance_hr@20": 0.005}
    split["ranking"] = "no item excluded"
    alone = dict.fromkeys(METRICS, metric | {"sd": None, "seeds": [0.25], "p": None, "p_holm": None})
    return {"reference": "a", **split, "metrics": list(METRICS), "variants": {"a": variant | alone, "b": variant}}


def rows(text):
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]


def test_targets_without_training_interactions_have_a_column_and_their_chance():
    text = table(EXPERIMENT, results_of({"0": (0.5, 1100.0), "1-4": (0.1, 100.0), "21+": (0.9, 10.0)}))
    header, _, first, second = rows(text)
    assert len(header) == len(first) == len(second)
    assert dict(zip(header, second, strict=True)) == {
        "variant": "b",
        "HR@20": "0.2500 ± 0.0100 [0.2400 .. 0.2700]",
        "NDCG@20": "0.2500 ± 0.0100 [0.2400 .. 0.2700]",
        "MRR@20": "0.2500 ± 0.0100 [0.2400 .. 0.2700]",
        "gain in HR@20": "+10.0% [+5.0% .. +20.0%] *",
        "gain in NDCG@20": "+10.0% [+5.0% .. +20.0%] *",
        "gain in MRR@20": "+10.0% [+5.0% .. +20.0%] *",
        "HR@20, targets of 0 training interactions": "0.5000",
        "HR@20, targets of 0 to 8 training interactions": "0.4667",
        "training, minutes": "1.5",
    }
    # One seed or no training: no spread over seeds.
    assert dict(zip(header, first, strict=True))["NDCG@20"] == "0.2500 [0.2400 .. 0.2700]"
    assert "1,100 targets have no training interaction; a list of 20 random items holds a target in 0.0050" in text


@pytest.mark.parametrize("rule", ["no item excluded", "clicked items excluded"])
def test_the_rule_of_ranking_stands_above_the_table(rule):
    text = table(EXPERIMENT, results_of({"21+": (0.9, 10.0)}) | {"ranking": rule})
    assert f"4,000 items, full ranking, {rule}. Means" in text


def test_no_such_column_without_such_targets():
    text = table(EXPERIMENT, results_of({"1-4": (0.1, 100.0), "21+": (0.9, 10.0)}))
    header, _, _, second = rows(text)
    assert "HR@20, targets of 0 training interactions" not in header
    assert dict(zip(header, second, strict=True))["HR@20, targets of 0 to 8 training interactions"] == "0.1000"
    assert "random" not in text
    assert rows(table(EXPERIMENT, results_of({"21+": (0.9, 10.0)})))[2][-2] == "none"


def test_a_gain_over_another_variant_than_the_reference_says_over_which(tmp_path):
    results = results_of({"21+": (0.9, 10.0)})
    results["variants"]["c"] = results["variants"]["b"] | {"against": "b"}
    text = table(EXPERIMENT, results)
    header, _, *lines = rows(text)
    assert [dict(zip(header, line, strict=True))["against"] for line in lines] == ["", "a", "b"]
    assert [dict(zip(header, line, strict=True))["gain in HR@20"] == "" for line in lines] == [True, False, False]
    assert "gains relative to the variant in column against" in text
    plot_gains(EXPERIMENT, results, tmp_path / "gains.svg")
    drawn = (tmp_path / "gains.svg").read_text()
    assert "<!-- over b -->" in drawn
    assert "<!-- gain over the variant named below each, with its 95 % interval -->" in drawn


def test_gains_over_what_knows_nothing_leave_the_others_room(tmp_path):
    scales = []
    for gain in (1.0, 80.0):
        results = results_of({"21+": (0.9, 10.0)})
        results["variants"]["b"] |= {"ndcg@20": {"gain": {"mean": gain, "low": gain / 2, "high": 2 * gain}}}
        plot_gains(EXPERIMENT, results, tmp_path / "gains.svg")
        scales.append("<!-- +1000% -->" in (tmp_path / "gains.svg").read_text())
    assert scales == [False, True]


def test_without_such_a_variant_the_table_and_the_plot_name_the_reference_alone(tmp_path):
    results = results_of({"21+": (0.9, 10.0)})
    text = table(EXPERIMENT, results)
    assert "against" not in rows(text)[0]
    assert "gains relative to a," in text
    plot_gains(EXPERIMENT, results, tmp_path / "gains.svg")
    assert "<!-- gain over a, with its 95 % interval -->" in (tmp_path / "gains.svg").read_text()


VARIANTS = "variants:\n  GNN: {model: sbr}\n  Item-kNN: {model: item_knn}\n  Text-kNN: {model: text_knn}\n"


def log(folder, **settings):
    clicks = [(f"u{user}", f"i{(user + place) % 30}", place) for user in range(40) for place in range(6)]
    return prepare(folder, clicks, **settings).dataset


def test_an_experiment_on_held_out_items(tmp_path):
    for name, options in (("plain", {}), ("held-out", {"hold_out_items": 0.2})):
        (tmp_path / f"of-{name}.yaml").write_text(VARIANTS.replace("  GNN: {model: sbr}\n", ""))
        log(tmp_path, output=str(tmp_path / name), **options)
        words = ["--experiment", str(tmp_path / f"of-{name}.yaml"), "--dataset", str(tmp_path / name)]
        main([*words, "--output", str(tmp_path / "out"), "--seeds", "0"])
        results = json.loads((tmp_path / "out" / f"of-{name}.json").read_text())
        assert ("0" in results["variants"]["Text-kNN"]["hr@20_by_train_count"]) == bool(options)
        assert ("targets of 0 training" in (tmp_path / "out" / f"of-{name}.md").read_text()) == bool(options)
        assert results["chance_hr@20"] == pytest.approx(20 / 30)
    # The catalog is the same, the data set is not: nothing of the one was taken for the other.
    assert len(list((tmp_path / "out" / "trials").iterdir())) == 4


def test_what_needs_text_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "train_run", lambda request: pytest.fail("trained"))
    (tmp_path / "e.yaml").write_text(VARIANTS)
    ids = [f"i{number}" for number in range(30)]
    dataset = log(tmp_path, items=str(write_items(tmp_path / "items.parquet", ids, title=["-"] * 30)))
    words = ["--experiment", str(tmp_path / "e.yaml"), "--dataset", str(dataset.path)]
    with pytest.raises(UserError, match="no item has a word in title, category, brand, by which text_knn ranks"):
        main([*words, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_text_knn_beside_a_model_adds_nothing_to_a_log_without_words(tmp_path, caplog):
    """One experiment serves click logs as well as shops."""
    ids = [f"i{number}" for number in range(30)]
    dataset = log(tmp_path, items=str(write_items(tmp_path / "items.parquet", ids, title=["-"] * 30)))
    one, both = ({"blend.neighbors": names} for names in (["item_knn"], ["item_knn", "text_knn"]))
    variants = {"one": {"model": "sbr", "settings": one}, "both": {"model": "sbr", "settings": both}}
    experiment = (
        SMALL.split("variants:")[0].replace("reference: GNN", "reference: one") + f"variants: {json.dumps(variants)}"
    )
    (tmp_path / "e.yaml").write_text(experiment)
    words = ["--experiment", str(tmp_path / "e.yaml"), "--dataset", str(dataset.path)]
    main([*words, "--output", str(tmp_path / "out"), "--seeds", "0"])
    one, both = json.loads((tmp_path / "out" / "e.json").read_text())["variants"].values()
    assert both["ndcg@20"]["mean"] == one["ndcg@20"]["mean"]
    assert both["selected"] == [one["selected"][0] | {"text_knn": 0.0}]
    assert "no item has a word in title, category, brand, so text_knn adds nothing" in caplog.text


def test_every_model_is_known_by_name_everywhere():
    assert set(MODELS) == set(MODEL_NAMES) > set(BASELINES)
