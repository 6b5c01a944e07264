"""examples/score_with_spark.py and examples/score_with_ray.py give the rows of `python -m llmgr_rec.score`."""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmgr_rec.score import main as score
from tests.examples.run_example import ROOT
from tests.marked_process import MarkedProcess
from tests.optional_programs import needs_ray, needs_spark
from tests.scoring.sessions import raw_sessions, write_sessions
from tests.small_run import run_with

TIMEOUT_S = 240
# Engines start their workers with the Python of the tests, listen on this machine only and send nothing home.
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "PYSPARK_PYTHON": sys.executable,
    "SPARK_LOCAL_IP": "127.0.0.1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    "name", [pytest.param("score_with_spark", marks=needs_spark), pytest.param("score_with_ray", marks=needs_ray)]
)
def test_an_engine_gives_the_rows_of_score(tmp_path: Path, name: str) -> None:
    run = run_with(tmp_path / "run", "sbr")
    for seed, file in enumerate(("a", "b")):
        write_sessions(tmp_path / "in" / f"{file}.parquet", raw_sessions(20, seed))
    paths = [str(run), str(tmp_path / "in"), str(tmp_path / "out")]
    process = MarkedProcess(["-m", f"examples.{name}", *paths], tmp_path / "log", tmp_path, ENVIRONMENT)
    try:
        assert process.wait(TIMEOUT_S) == 0, process.log.read_text()
        assert not process.left_after(30)
    finally:
        process.kill()
    score(["--run", paths[0], "--input", paths[1], "--output", str(tmp_path / "scores")])
    found, expected = (sorted_rows(tmp_path / folder) for folder in ("out", "scores"))
    assert found.schema.equals(expected.schema)
    for column in ("session_id", "item_ids", "fallback"):
        assert found[column].to_pylist() == expected[column].to_pylist()
    np.testing.assert_allclose(*(np.concatenate(one["scores"].to_pylist()) for one in (found, expected)), rtol=1e-5)


def sorted_rows(folder: Path) -> pa.Table:
    return pq.read_table(folder).sort_by("session_id")
