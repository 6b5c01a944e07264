"""Cheaper ways to score: fewer sessions routed to the language model, fewer layers, fewer bits."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmgr_rec.checksums import file_checksum
from llmgr_rec.config import Config
from llmgr_rec.config_file import load_config, save_config
from llmgr_rec.errors import UserError
from llmgr_rec.scoring.score_run import ScoreRequest, score_run
from llmgr_rec.scoring.scorer import batch_bounds
from tests.json_files import edit_json
from tests.scoring.sessions import all_bytes, raw_sessions, read_scores, write_sessions
from tests.scoring.test_score_run import request
from tests.small_run import run_with

SESSIONS = 37


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_sessions(tmp_path / "in.parquet", raw_sessions(SESSIONS))


def scored(source: Path, name: str, **options: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    job = request(source, source.parent / name, **{"stage": "behave", "part_rows": 10, "k": 5, **options})
    totals = score_run(job)
    return read_scores(job.output), vars(totals)


def same_scores(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[bool]:
    return [ours["scores"] == theirs["scores"] for ours, theirs in zip(rows, others, strict=True)]


def test_without_budget_the_session_recommender_answers(source):
    rows, totals = scored(source, "none", llm_budget=0.0)
    expected, sbr = scored(source, "sbr", stage="sbr")
    assert totals["llm_rows"] == sbr["llm_rows"] == 0
    assert [row["item_ids"] for row in rows] == [row["item_ids"] for row in expected]
    for ours, theirs in zip(rows, expected, strict=True):
        np.testing.assert_allclose(ours["scores"], theirs["scores"], rtol=1e-5)


def test_a_budget_routes_the_least_sure_of_each_part_as_if_all_were_routed(source):
    rows, totals = scored(source, "some", llm_budget=0.3)
    by_recommender, _ = scored(source, "none", llm_budget=0.0)
    by_model, all_routed = scored(source, "all")
    is_recommender = same_scores(rows, by_recommender)
    for by_gnn, ours, theirs in zip(is_recommender, rows, by_model, strict=True):
        if not by_gnn:
            assert ours["item_ids"] == theirs["item_ids"]
            np.testing.assert_allclose(ours["scores"], theirs["scores"], rtol=1e-5)
    assert totals["llm_rows"] == is_recommender.count(False) == 3 + 3 + 3 + 3
    assert all_routed["llm_rows"] == SESSIONS - all_routed["fallback_rows"]


@pytest.mark.parametrize(("threshold", "routes"), [(-1.0, True), (1e3, False)])
def test_a_threshold_routes_by_uncertainty_alone(source, threshold, routes):
    rows, totals = scored(source, "threshold", llm_threshold=threshold)
    expected, _ = scored(source, "expected", llm_budget=float(routes))
    assert rows == expected
    assert totals["llm_rows"] == (SESSIONS - totals["fallback_rows"] if routes else 0)


def test_an_interrupted_job_with_a_budget_ends_with_the_same_bytes(source):
    scored(source, "whole", llm_budget=0.5)
    broken = source.parent / "broken"
    shutil.copytree(source.parent / "whole", broken)
    for name in ("_SUCCESS", "part-00001.parquet", "part-00003.parquet"):
        (broken / name).unlink()
    scored(source, "broken", llm_budget=0.5)
    assert all_bytes(broken) == all_bytes(source.parent / "whole")


def test_bfloat16_gives_nearly_the_same_lists(source):
    rows, _ = scored(source, "few", llm_dtype="bfloat16")
    exact, _ = scored(source, "exact", llm_dtype="float32")
    same = np.mean([len({*a["item_ids"]} & {*b["item_ids"]}) for a, b in zip(rows, exact, strict=True)])
    assert same > 4.5
    assert rows != exact


def test_fewer_layers_are_another_job(source):
    scored(source, "out")
    with pytest.raises(UserError, match=r"settings \(llm_layers was 0, is 1\)"):
        scored(source, "out", llm_layers=1)
    manifest = json.loads((source.parent / "out" / "_manifest.json").read_text())
    assert manifest["settings"]["routing"] == {"budget": 1.0, "threshold": None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"llm_budget": 1.5}, "--llm_budget is 1.5; give a share from 0 to 1"),
        ({"llm_budget": 0.5, "llm_threshold": 1.0}, "give one of them"),
        ({"llm_budget": 0.5, "k": 1}, "which is 0 with --k 1; give --k 2 or more"),
        ({"llm_threshold": 1.0, "k": 1}, "which is 0 with --k 1; give --k 2 or more"),
        ({"llm_layers": 2}, r"--llm_layers is 2, but the language model of .* has 1 layers"),
        ({"llm_layers": -1}, "--llm_layers is -1"),
        ({"stage": "sbr", "llm_budget": 0.5}, "has no language model; leave the --llm_ options out"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_written(source, options, message):
    with pytest.raises(UserError, match=message):
        scored(source, "out", **options)
    assert not (source.parent / "out").exists()


def test_a_head_without_the_recommenders_score_cannot_route(tmp_path, source):
    run = run_with(tmp_path / "run", "behave")
    file = run / "export" / "behave" / "config.yaml"
    settings: Config = load_config(file)
    settings.head.residual = False
    save_config(settings, file)

    def record(content: dict[str, Any]) -> None:
        content["files"]["config.yaml"] = file.stat().st_size
        content["checksums"]["config.yaml"] = file_checksum(file)

    edit_json(file.parent / "bundle.json", record)
    with pytest.raises(UserError, match=r"--llm_budget and --llm_threshold need a model whose head adds"):
        score_run(ScoreRequest(run=run, input=source, output=tmp_path / "out", llm_budget=0.5))


def test_batches_of_long_sessions_have_fewer_of_them() -> None:
    assert batch_bounds(np.array([], np.int64), 4) == [0]
    # At most 4 sessions and 32 clicks; a session that is longer makes a batch of its own.
    assert batch_bounds(np.array([1, 1, 1, 1, 1, 12, 20, 20, 20, 30, 50]), 4) == [0, 4, 6, 7, 8, 9, 10, 11]
