"""The report entry point."""

import csv
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from llmgr_rec.data.dataset import Dataset
from llmgr_rec.errors import UserError
from llmgr_rec.evaluate import main as evaluate
from llmgr_rec.evaluation.examples import ranked_examples
from llmgr_rec.evaluation.exclusion import RankingRule
from llmgr_rec.report import main
from llmgr_rec.score import main as score
from tests.data.prepare_inputs import edit_manifest
from tests.json_files import edit_json
from tests.small_run import prepare_small, run_with, small_run

SESSION = '<details class="session"'


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """An evaluated run with a journal whose last line was cut short."""
    run = run_with(tmp_path_factory.mktemp("report") / "run", "sbr")
    lines = [{"stage": "sbr", "step": step, "epoch": 0, "loss": 5 - step / 10} for step in range(1, 9)]
    lines.append({"stage": "sbr", "step": 8, "split": "valid", "epoch": 1, "hr@20": 0.1, "ndcg@20": 0.04})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "sb')
    words = ["--dataset", str(small_run().dataset.path), "--output", str(run / "metrics.json")]
    evaluate(["--run", str(run), *words, "--models", "sbr,popularity,item_knn"])
    return run


def report(run: Path, output: Path, *more: str | Path) -> str:
    main(["--run", str(run), "--output", str(output), *map(str, more)])
    return (output / "index.html").read_text()


def test_run_and_output_are_enough(run, tmp_path, capsys):
    page = report(run, tmp_path / "report")
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "gains.svg",
        "index.html",
        "length.svg",
        "loss-sbr.svg",
        "popularity.svg",
        "results.csv",
        "validation-sbr.svg",
    ]
    last = capsys.readouterr().out.splitlines()[-1]
    start, end = "report: The recommender finds the next click among", f"; wrote {tmp_path / 'report' / 'index.html'}"
    assert last.startswith(start)
    assert last.endswith(end)
    assert f"<h1>{last.removeprefix('report: ').removesuffix(end)}" in page.replace("&nbsp;", " ")
    content = json.loads((run / "metrics.json").read_text())
    rows = list(csv.DictReader((tmp_path / "report" / "results.csv").read_text().splitlines()))
    assert [row["model"] for row in rows] == ["popularity", "item_knn", "sbr"]
    for row in rows:
        assert float(row["ndcg@20"]) == pytest.approx(content["test"][row["model"]]["ndcg@20"], abs=1e-6)
    assert page.count('<details class="session"') == 24
    assert "&lt;b&gt;Thing&lt;/b&gt; &amp; i" in page
    assert "<b>Thing" not in page


def test_sessions_shown_are_ranked_by_the_rule_they_are_judged_by(run, tmp_path):
    words = ["--run", str(run), "--dataset", str(small_run().dataset.path), "--models", "sbr"]
    evaluate([*words, "--repeats", "exclude", "--output", str(tmp_path / "excluding.json")])
    pages = [report(run, tmp_path / "plain"), report(run, tmp_path / "r", "--metrics", tmp_path / "excluding.json")]
    assert "full catalog, ties by lower index, no item excluded" in pages[0]
    assert "full catalog, ties by lower index, clicked items excluded" in pages[1]
    assert pages[0].split(SESSION)[1:] != pages[1].split(SESSION)[1:]
    rule = RankingRule("exclude", 50)
    examples = ranked_examples(run / "export" / "sbr", small_run().dataset, "test", rule=rule)
    for example in itertools.islice(examples, 40):
        assert not set(example.clicks) & set(example.recommended)


def test_sessions_of_a_run_that_ends_with_stage_llm_text_are_ranked_by_it(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(run / "export" / "sbr", tmp_path / "run" / "export" / "llm_text")
    assert "Recommendations of GNN + LLM on text for" in report(tmp_path / "run", tmp_path / "report")
    assert "Recommendations of GNN for" in report(run, tmp_path / "other")


def test_sessions_that_are_judged_by_their_prefixes_are_shown_whole(run, tmp_path):
    dataset = tmp_path / "dataset"
    shutil.copytree(small_run().dataset.path, dataset)
    edit_manifest(dataset, lambda values: values.update(prefix_augmentation=["train", "test"]))
    shown = [
        list(itertools.islice(ranked_examples(run / "export" / "sbr", data, "test"), 20))
        for data in (small_run().dataset, Dataset(dataset))
    ]
    assert shown[0] == shown[1]


def test_scored_sessions_look_like_ranked_ones(run, tmp_path):
    dataset = small_run().dataset.path
    score(["--run", str(run), "--input", str(dataset / "test"), "--output", str(tmp_path / "scores")])
    ranked = report(run, tmp_path / "ranked", "--sessions", "9")
    scored = report(run, tmp_path / "scored", "--sessions", "9", "--scores", tmp_path / "scores", "--dataset", dataset)
    assert scored.split(SESSION)[1:] == ranked.split(SESSION)[1:]
    places = scored.count("next click at position")
    assert places == 5
    assert pq.read_table(tmp_path / "scores" / "part-00000.parquet").num_rows == 90


def test_figures_and_scores_of_another_run_are_refused(run, tmp_path):
    dataset = small_run().dataset.path
    score(["--run", str(run), "--input", str(dataset / "test"), "--output", str(tmp_path / "scores")])
    other = run_with(tmp_path / "other", "behave")
    with pytest.raises(UserError, match=r"has metrics of GNN that do not belong to a model in .*other; evaluate"):
        report(other, tmp_path / "report", "--metrics", run / "metrics.json")
    with pytest.raises(UserError, match="belong to another run"):
        report(other, tmp_path / "report", "--scores", tmp_path / "scores", "--dataset", dataset)
    for content in ("[]", "{", '{"model": 5}'):
        (tmp_path / "scores" / "_manifest.json").write_text(content)
        with pytest.raises(UserError, match=r"_manifest\.json is damaged \(.*\); score again"):
            report(run, tmp_path / "report", "--scores", tmp_path / "scores", "--dataset", dataset)


def test_an_earlier_report_is_replaced_and_nothing_else(run, tmp_path):
    report(run, tmp_path / "report", "--sessions", "0")
    # As a report leaves it that is interrupted before it writes the page.
    (tmp_path / "report" / "index.html").unlink()
    (tmp_path / "report" / "losses.png").touch()
    assert SESSION in report(run, tmp_path / "report", "--sessions", "1")
    assert not (tmp_path / "report" / "losses.png").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_text("<html>mine</html>")
    with pytest.raises(UserError, match="not empty and contains no report"):
        report(run, tmp_path / "mine")
    with pytest.raises(UserError, match="is a file"):
        report(run, run / "config.yaml")


def test_a_run_that_was_not_evaluated_still_has_a_page(tmp_path):
    page = report(run_with(tmp_path / "run", "sbr"), tmp_path / "report")
    assert "has not been evaluated" in page
    assert not (tmp_path / "report" / "results.csv").exists()


def test_mistakes_are_named(run, tmp_path):
    output = tmp_path / "report"
    with pytest.raises(UserError, match="is not a run folder"):
        report(tmp_path, output)
    with pytest.raises(UserError, match=r"metrics file .* does not exist"):
        report(run, output, "--metrics", tmp_path / "absent.json")
    with pytest.raises(UserError, match="is not a complete output"):
        report(run, output, "--scores", tmp_path / "absent")
    other = prepare_small(tmp_path, first_item=5)
    with pytest.raises(UserError, match="another data set"):
        report(run, output, "--dataset", other.path)
    with pytest.raises(UserError, match="--sessions is -1"):
        report(run, output, "--sessions", "-1")
    with pytest.raises(UserError, match="names the same folder twice"):
        report(run, output, "--run", f"{run}/../{run.name}")
    with pytest.raises(UserError, match="--metrics is given 1 times for 2 runs"):
        report(run, output, "--run", tmp_path, "--metrics", run / "metrics.json")
    assert not output.exists()


def test_facts_of_the_training_are_shown(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    machine = {"processor": "Some <CPU>", "cores": 1, "memory_gib": 23.5, "device": "CPU"}
    launch = {
        "started": "2026-11-30T10:51:59+00:00",
        "seconds": 3700.0,
        "ended": True,
        "stages": {"sbr": 3690.0},
        "recipe": "default",
        "seed": 3,
        "version": "0.2.0",
        "ranks": 2,
        "machine": machine,
    }
    file = tmp_path / "run" / "training.json"
    file.write_text(json.dumps([launch]))
    page = report(tmp_path / "run", tmp_path / "report", "--sessions", "0")
    assert "<dd>2026-11-30 10:51 UTC, in 62 min</dd>" in page
    assert "<dd>Some &lt;CPU&gt;, 1 core, 24 GiB, no GPU, 2 ranks</dd>" in page
    assert "<dt>Recipe</dt><dd>default, with tables.dim 16, tables.knn_smoothing [0.0]" in page
    assert "<dt>Seed</dt><dd>3</dd>" in page
    assert "<dd>llmgr_rec 0.2.0</dd>" in page
    assert re.search(r"60 items, \d+ training sessions with \d+ examples, leave-one-out split", page)
    assert "no item excluded; sessions show their newest 50 clicks" in page
    assert "Epoch 1 of 1 was kept, the best by NDCG@20 (0.0400)." in page
    assert "In the table it is the row GNN: HR@20 " in page
    launch["machine"] = {**machine, "processor": "Other"}
    file.write_text(json.dumps([{**launch, "ended": False, "machine": machine}, launch]))
    page = report(tmp_path / "run", tmp_path / "report", "--sessions", "0")
    assert "in at least 2 h 3 min (1 of 2 launches killed, or still running)" in page
    assert "; then Other, 1 core" in page


def test_runs_are_compared_session_by_session(run, tmp_path):
    other = tmp_path / "other" / "run"
    shutil.copytree(run, other)
    page = report(run, tmp_path / "report", "--run", other, "--sessions", "2")
    ours, theirs = f"{run.parent.name}/run", "other/run"
    assert f"not distinguishable from the recommender of {theirs}" in page
    assert f'GNN, {ours} <span class="tag">the recommender</span>' in page
    assert f'GNN, {theirs} <span class="tag">other run</span></th>' in page
    assert '+0.00&nbsp;%<span class="ends">[0.00&nbsp;.. 0.00]</span>' in page
    rows = list(csv.DictReader((tmp_path / "report" / "results.csv").read_text().splitlines()))
    assert [(row["run"], row["model"]) for row in rows] == [
        ("", "popularity"),
        ("", "item_knn"),
        (ours, "sbr"),
        (theirs, "sbr"),
    ]
    (other / "metrics.ranks.parquet").unlink()
    page = report(run, tmp_path / "report", "--run", other, "--sessions", "0")
    assert "Target ranks of single sessions are missing for some rows" in page
    edit_json(other / "metrics.json", lambda values: values.update(repeats="exclude", protocol="other"))
    page = report(run, tmp_path / "report", "--run", other, "--sessions", "0")
    assert "were evaluated by different rules" in page
    for change in ({"sessions": "0"}, {"dataset": "0"}, {"count": 5}, {"split": "valid", "valid": {}}):
        shutil.copy(run / "metrics.json", other)
        edit_json(other / "metrics.json", lambda values, change=change: values.update(change))
        with pytest.raises(UserError, match=r"were evaluated on .*, so their figures cannot be compared"):
            report(run, tmp_path / "report", "--run", other)
    (other / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"has no metrics\.json to compare; evaluate it with --output"):
        report(run, tmp_path / "report", "--run", other)


def test_target_ranks_of_another_evaluation_are_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "other")
    file = tmp_path / "other" / "metrics.ranks.parquet"
    pq.write_table(pq.read_table(file).slice(1), file)
    with pytest.raises(UserError, match=r"metrics\.ranks\.parquet is damaged: .*; evaluate again with --output"):
        report(run, tmp_path / "report", "--run", tmp_path / "other")


def test_metrics_of_version_0_2_still_give_a_report(run, tmp_path):
    content = json.loads((run / "metrics.json").read_text())
    kept = ("format", "test", "count", "num_items", "split", "dataset", "dataset_path", "bundles")
    old = {name: content[name] for name in kept}
    for metrics in old["test"].values():
        del metrics["hr@20_by_clicks"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    page = report(run, tmp_path / "report", "--metrics", tmp_path / "old.json", "--sessions", "0")
    assert "The recommender finds the next click among" in page
    assert "so only HR@20 has an interval" in page
    assert '<tr class="ours"><th scope="row">GNN' in page
    assert not (tmp_path / "report" / "length.svg").exists()
    (tmp_path / "old.json").write_text(json.dumps({**old, "count": "many"}))
    with pytest.raises(UserError, match=r"old\.json is damaged"):
        report(run, tmp_path / "report", "--metrics", tmp_path / "old.json")


def test_help_is_quick_and_light():
    code = (
        "import sys; from llmgr_rec import evaluate, report, score; print(len({'torch', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "0"
