import json
import sys

import pytest

from benchmarks import sampled_softmax
from benchmarks.sampled_softmax import best_validation, table
from llmgr_rec.cli import run_cli

SPREAD = {"median": 30.0, "low": 29.0, "high": 31.0}


def test_table_has_a_row_for_each_size_and_each_seed():
    text = table(
        {
            "steps": {
                "step_ms": {"100 items": SPREAD, "1,000 items": SPREAD},
                "candidates": {"100 items": 90, "1,000 items": 700},
                "largest_takes_times_smallest": SPREAD,
                "peak_gib": 1.5,
            },
            "quality": {
                "ndcg@20": {"full": [0.05, 0.052], "sampled": [0.049, 0.053]},
                "sampled_of_full": {"median": 0.999, "low": 0.99, "high": 1.01},
            },
        }
    )
    assert "1,000 items" in text
    assert "0.0520            0.0530" in text
    assert "0.999 [0.99 .. 1.01] of full" in text


def test_the_best_validation_counts(tmp_path):
    lines = [
        {"stage": "sbr", "loss": 3.0},
        {"stage": "sbr", "split": "valid", "ndcg@20": 0.2},
        {"stage": "sbr", "split": "valid", "ndcg@20": 0.1},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert best_validation(tmp_path) == 0.2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer", "adam"], "--optimizer is adam; fused ones are adagrad, rowwise_adagrad and sgd"),
        (["--sizes", "[5]"], "--sizes holds 5; a catalog has 32 items or more"),
    ],
)
def test_a_bad_argument_is_one_line(monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["sampled_softmax", *words])
    with pytest.raises(SystemExit) as ended:
        run_cli(sampled_softmax.main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.slow
def test_steps_at_two_sizes(tmp_path, monkeypatch, capsys):
    output = tmp_path / "s.json"
    words = ["--sizes", "[100,1000]", "--sessions", "2000", "--batch_size", "32", "--num_negatives", "64"]
    monkeypatch.setattr(
        sys, "argv", ["sampled_softmax", *words, "--seeds", "0", "--rounds", "1", "--output", str(output)]
    )
    run_cli(sampled_softmax.main)
    steps = json.loads(output.read_text())["results"]["steps"]
    assert steps["candidates"]["100 items"] < steps["candidates"]["1,000 items"]
    assert "1,000 items" in capsys.readouterr().out
