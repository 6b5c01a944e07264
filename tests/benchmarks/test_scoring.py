"""The benchmark of offline scoring: its sessions, and a plain loop that gives the lists of the command."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks.plain_scoring import score_recommender_plainly
from benchmarks.scoring import compare, evaluation_rates, memory_of_job, rates_of_recommender, write_sessions
from llmgr_rec.scoring.score_run import ScoreRequest, score_run
from llmgr_rec.storage.bundle import load_bundle
from tests.small_run import small_run


def test_a_plain_loop_gives_the_lists_of_the_command(tmp_path: Path) -> None:
    shared, source = small_run(), tmp_path / "in.parquet"
    write_sessions(shared.dataset, 40, source)
    assert all(1 <= len(items) <= 12 for items in pq.read_table(source)["items"].to_pylist())
    bundle = load_bundle(shared.run / "export" / "sbr")
    assert score_recommender_plainly(bundle, source, tmp_path / "plain.parquet", 5, 16) == 40
    score_run(ScoreRequest(shared.run, source, tmp_path / "out", 5, repeats="allow", stage="sbr"))
    same = compare(pq.read_table(tmp_path / "out"), pq.read_table(tmp_path / "plain.parquet"))
    assert same["lists"] == same["same_but_ties"] == 40
    assert same["score"] < 1e-5
    rates = evaluation_rates(bundle, shared.dataset)
    assert 0 < rates["sbr, popularity and item_knn"] < rates["sbr"]


@pytest.mark.slow
def test_rates_of_commands(tmp_path: Path) -> None:
    shared = small_run()
    results = rates_of_recommender(shared.run, shared.dataset, 600, 1)
    assert set(results) == {"sessions_per_s", "two_ranks_to_one", "score_to_plain_loop"}
    assert memory_of_job(shared.run, shared.dataset, 50)["mib"] > 50
