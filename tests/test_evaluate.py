"""The evaluate entry point: what it writes and prints, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmgr_rec.data.preparation.pipeline import prepare_dataset
from llmgr_rec.data.preparation.settings import PrepareSettings
from llmgr_rec.errors import UserError
from llmgr_rec.evaluate import main
from tests.json_files import edit_json
from tests.small_run import prepare_small, run_with, small_run, without_repeats, write_log


def arguments(output: Path, **options: str | Path) -> list[str]:
    shared = small_run()
    given = {"run": shared.run, "dataset": shared.dataset.path, "output": output, **options}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def test_writes_all_models_and_prints_the_table(tmp_path, capsys):
    output = tmp_path / "new" / "metrics.json"
    main(arguments(output))
    content = json.loads(output.read_text())
    assert set(content["test"]) == {"popularity", "item_knn", "sbr", "llmgr"}
    assert {"hr@5", "hr@10", "hr@20", "ndcg@20", "mrr@5"} <= set(content["test"]["llmgr"])
    assert content["count"] == 90
    assert content["split"] == "test"
    assert content["dataset"] == small_run().dataset.manifest.catalog_hash
    assert content["stages"] == {"sbr": "sbr", "llmgr": "behave"}
    assert list(tmp_path.rglob("*.tmp*")) == []
    assert content["protocol"] == "full catalog, ties by lower index, no item excluded"
    printed = capsys.readouterr().out
    assert content["protocol"] in printed
    best = max(models["hr@20"] for models in content["test"].values())
    assert f"{best:.4f}*" in printed
    assert str(output) in printed
    assert "The recommender finds the next click among 20 in " in printed
    _check_single_sessions(output, content)


def _check_single_sessions(output: Path, content: dict) -> None:
    """Metrics and gains of the file are those of the sessions in the file beside it."""
    table = pq.read_table(output.with_name("metrics.ranks.parquet"))
    columns = {name: table.column(name).to_numpy() for name in table.column_names}
    dataset = small_run().dataset
    rows = pq.read_table(dataset.parts("test")[0])
    assert columns["clicks"].tolist() == [len(items) for items in rows["items"].to_pylist()]
    assert (
        columns["train_count"].tolist() == small_run().catalog.train_count_V.numpy()[rows["target"].to_numpy()].tolist()
    )
    for model, metrics in content["test"].items():
        hit_S = columns[f"rank_{model}"] < 20
        assert hit_S.mean() == pytest.approx(metrics["hr@20"])
        cells = metrics["hr@20_by_clicks"].values()
        assert sum(cell["count"] for cell in cells) == content["count"]
        assert sum((cell["hr"] or 0) * cell["count"] for cell in cells) == pytest.approx(hit_S.sum())
        low, high = content["intervals"][model]["hr@20"]
        assert low < metrics["hr@20"] < high
    assert set(content["gains"]) == {"sbr", "llmgr"}
    hits = {model: (columns[f"rank_{model}"] < 20).sum() for model in ("sbr", "item_knn")}
    assert content["gains"]["sbr"]["item_knn"]["hr@20"]["mean"] == pytest.approx(hits["sbr"] / hits["item_knn"] - 1)


def test_says_that_clicked_items_are_excluded(tmp_path, capsys):
    output = tmp_path / "metrics.json"
    main(arguments(output, dataset=without_repeats().path, models="item_knn"))
    rule = "full catalog, ties by lower index, clicked items excluded"
    content = json.loads(output.read_text())
    assert (content["protocol"], content["repeats"], content["max_length"]) == (rule, "exclude", 50)
    assert rule in capsys.readouterr().out


def test_replaces_a_metrics_file_with_another_split(tmp_path):
    output = tmp_path / "metrics.json"
    main(arguments(output, models="popularity"))
    main(arguments(output, models="text_knn,item_knn,popularity", split="valid"))
    content = json.loads(output.read_text())
    assert list(content["valid"]) == ["popularity", "item_knn", "text_knn"]
    assert "test" not in content


def test_a_run_without_language_model_is_evaluated_without_it(tmp_path):
    output = tmp_path / "metrics.json"
    main(arguments(output, run=run_with(tmp_path / "run", "sbr")))
    assert set(json.loads(output.read_text())["test"]) == {"popularity", "item_knn", "sbr"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run": "nowhere"}, "nowhere does not exist"),
        ({"dataset": "nowhere"}, "not a prepared data set"),
        ({"models": "sbrr"}, "did you mean sbr"),
        ({"models": ","}, "--models is empty"),
        ({"batch_size": "0"}, "--batch_size is 0"),
        ({"split": "train"}, "split"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        main(arguments(tmp_path / "metrics.json", **options))
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_export_is_refused(tmp_path):
    run = run_with(tmp_path / "run")
    with pytest.raises(UserError, match="no complete export"):
        main(arguments(tmp_path / "metrics.json", run=run))
    with pytest.raises(UserError, match=r"no complete export of llmgr \(stage behave or align\)"):
        main(arguments(tmp_path / "metrics.json", run=run_with(tmp_path / "sbr", "sbr"), models="llmgr"))


def test_a_dataset_of_another_catalog_is_refused(tmp_path):
    other = prepare_small(tmp_path, first_item=7)
    with pytest.raises(UserError, match="another catalog"):
        main(arguments(tmp_path / "metrics.json", dataset=other.path))


def test_a_dataset_of_other_training_sessions_is_refused(tmp_path):
    """The catalog is the same, so nothing else would tell that the model has learned what it is tested on."""
    shared = small_run()
    index = run_with(tmp_path / "run", "sbr") / "export" / "sbr" / "bundle.json"
    for trained_on, outcome in (("other", "trained on other sessions"), (shared.dataset.manifest.sessions_hash, "")):
        edit_json(index, lambda values, trained_on=trained_on: values.update(sessions_hash=trained_on))
        words = arguments(tmp_path / "metrics.json", run=tmp_path / "run", models="sbr")
        if outcome:
            with pytest.raises(UserError, match=outcome):
                main(words)
        else:
            main(words)


def test_words_count_as_the_model_knows_them(tmp_path):
    """Preparing the same clicks anew with other titles numbers words, brands and categories otherwise."""
    found = []
    for name in ("same", "other"):
        interactions, items = write_log(tmp_path / name / "raw")
        if name == "other":
            table = pq.read_table(items)
            categories = pa.array([f"Kind {number % 11}" for number in range(table.num_rows)][::-1])
            pq.write_table(table.set_column(table.schema.get_field_index("category"), "category", categories), items)
        output = str(tmp_path / name / "dataset")
        inputs = {"interactions": str(interactions), "items": str(items), "output": output}
        prepare_dataset(PrepareSettings(**inputs, min_interactions=0, threads=1))
        main(arguments(tmp_path / f"{name}.json", dataset=output, models="sbr,llmgr"))
        found.append(json.loads((tmp_path / f"{name}.json").read_text())["test"])
        # The diversity of a list is by the categories that the data set has now.
        diversities = [metrics.pop("beyond_accuracy")["category_diversity"] for metrics in found[-1].values()]
    assert found[0] == found[1]
    assert all(diversities)


def test_a_foreign_output_is_left_alone(tmp_path):
    file = tmp_path / "notes.json"
    file.write_text("{}")
    with pytest.raises(UserError, match="is not a metrics file"):
        main(arguments(file))
    assert file.read_text() == "{}"
    with pytest.raises(UserError, match="is a folder"):
        main(arguments(tmp_path))
    with pytest.raises(UserError, match=r"notes.json is a file; give the path of a folder"):
        main(arguments(file / "metrics.json"))


def test_the_command_exits_2_with_one_line(tmp_path):
    command = [sys.executable, "-m", "llmgr_rec.evaluate", *arguments(tmp_path / "m.json", run="nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --run nowhere does not exist")
