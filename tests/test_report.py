"""The report entry point."""

import csv
import itertools
import json
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
from tests.small_run import prepare_small, run_with, small_run


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
        "frequency.png",
        "index.html",
        "losses.png",
        "results.csv",
        "validation.png",
    ]
    assert f"wrote {tmp_path / 'report' / 'index.html'}" in capsys.readouterr().out
    content = json.loads((run / "metrics.json").read_text())
    rows = list(csv.DictReader((tmp_path / "report" / "results.csv").read_text().splitlines()))
    assert [row["model"] for row in rows] == ["popularity", "item_knn", "sbr"]
    for row in rows:
        assert float(row["ndcg@20"]) == pytest.approx(content["test"][row["model"]]["ndcg@20"], abs=1e-6)
    assert page.count('<article class="session">') == 6
    assert "&lt;b&gt;Thing&lt;/b&gt; &amp; i" in page
    assert "<b>Thing" not in page


def test_sessions_shown_are_ranked_by_the_rule_they_are_judged_by(run, tmp_path):
    words = ["--run", str(run), "--dataset", str(small_run().dataset.path), "--models", "sbr"]
    evaluate([*words, "--repeats", "exclude", "--output", str(tmp_path / "excluding.json")])
    pages = [report(run, tmp_path / "plain"), report(run, tmp_path / "r", "--metrics", tmp_path / "excluding.json")]
    assert "full catalog, ties by lower index, no item excluded" in pages[0]
    assert "full catalog, ties by lower index, clicked items excluded" in pages[1]
    assert pages[0].split("<article")[1:] != pages[1].split("<article")[1:]
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
    assert scored.split("<article")[1:] == ranked.split("<article")[1:]
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
    assert "<article" in report(run, tmp_path / "report", "--sessions", "1")
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
    assert not output.exists()


def test_help_is_quick_and_light():
    code = (
        "import sys; from llmgr_rec import evaluate, report, score; print(len({'torch', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "0"
