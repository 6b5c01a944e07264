"""evaluate and score show the model the same clicks and exclude the same items: metrics follow from scores."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from llmgr_rec.evaluation.evaluate_run import EvaluationRequest, evaluate_run
from llmgr_rec.scoring.score_run import ScoreRequest, score_run
from tests.data.prepare_inputs import prepare
from tests.json_files import edit_json
from tests.scoring.sessions import read_scores, write_sessions
from tests.small_run import run_with, write_log

MAX_LENGTH = 5
METRICS = {"hr": lambda place: 1.0, "ndcg": lambda place: 1 / math.log2(place + 1), "mrr": lambda place: 1 / place}


def raw_log(interactions: Path) -> list[tuple[list[str], str]]:
    """Clicks of each user before the last item, however many, and the last item."""
    clicks: dict[str, list[str]] = {}
    for row in pq.read_table(interactions).sort_by("timestamp").to_pylist():
        clicks.setdefault(row["user_id"], []).append(row["item_id"])
    return [(history[:-1], history[-1]) for history in clicks.values()]


def expected_metrics(ranked: list[list[str]], targets: list[str]) -> dict[str, float]:
    """Metrics by their definitions."""
    places = [ids.index(target) + 1 if target in ids else None for ids, target in zip(ranked, targets, strict=True)]
    return {
        f"{name}@{k}": math.fsum(gain(place) for place in places if place and place <= k) / len(places)
        for name, gain in METRICS.items()
        for k in (5, 10, 20)
    }


@pytest.mark.parametrize(
    ("stage", "recorded", "options"),
    [
        ("sbr", {"repeats": "exclude"}, {}),
        ("behave", {"repeats": "exclude"}, {}),
        ("sbr", {"repeats": "allow", "consecutive_repeats": "merge"}, {}),
        ("sbr", {"repeats": "exclude"}, {"repeats": "allow", "max_length": 3}),
    ],
)
def test_metrics_computed_from_scores_equal_those_of_evaluate(
    tmp_path: Path, stage: str, recorded: dict[str, str], options: dict[str, Any]
) -> None:
    interactions, items = write_log(tmp_path / "raw")
    merge = {name: value for name, value in recorded.items() if name == "consecutive_repeats"}
    dataset = prepare(
        tmp_path, interactions=str(interactions), items=str(items), max_length=MAX_LENGTH, **merge
    ).dataset
    run = run_with(tmp_path / "run", stage)
    rule = {"max_length": MAX_LENGTH} | recorded
    edit_json(run / "export" / stage / "bundle.json", lambda content: content.update(rule))
    sessions = raw_log(interactions)
    if merge:
        for history, target in sessions:
            while history[-1] == target:
                history.pop()
    lengths = [len(history) for history, _ in sessions]
    assert min(lengths) < MAX_LENGTH in lengths
    assert max(lengths) > 2 * MAX_LENGTH - 1
    source = write_sessions(tmp_path / "in.parquet", [history for history, _ in sessions])
    totals = score_run(ScoreRequest(run=run, input=source, output=tmp_path / "scores", stage=stage, **options))  # type: ignore[arg-type]
    assert (totals.consecutive_repeats > 0) == bool(merge)
    model = {"sbr": "sbr", "behave": "llmgr"}[stage]
    request = EvaluationRequest(
        run=run, dataset=dataset.path, split="test", output=tmp_path / "metrics.json", models=[model], **options
    )
    content = evaluate_run(request)
    found = expected_metrics([row["item_ids"] for row in read_scores(tmp_path / "scores")], [t for _, t in sessions])
    for name, value in found.items():
        assert content["test"][model][name] == pytest.approx(value, rel=0, abs=1e-15), name
    assert 0.1 < found["hr@20"] < 1
    settings = json.loads((tmp_path / "scores" / "_manifest.json").read_text())["settings"]
    assert (settings["repeats"], settings["max_length"]) == (content["repeats"], content["max_length"])
