"""The program of docs/embedding.md does on two ranks what the page says."""

import inspect
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import llmgr_rec
from llmgr_rec import SessionRecommender, World, init_distributed, load_bundle
from llmgr_rec.scoring.score_run import ScoreRequest, score_run
from tests.ranks import run_on_ranks
from tests.small_run import run_with

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "embedding.md"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the page's program and what it takes for granted."""
    run_with(tmp_path / "runs/shop", "sbr")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.S | re.M)
    (tmp_path / "ranking.py").write_text("\n\n".join(blocks))
    return tmp_path


def run_program(world: World, folder: str) -> list[float]:
    """Runs the page's program on a rank that has joined its process group already."""

    def joined(*args: Any, **kwargs: Any) -> World:
        inspect.signature(init_distributed).bind(*args, **kwargs)
        return world

    llmgr_rec.init_distributed = joined
    os.chdir(folder)
    return runpy.run_path("ranking.py", run_name="__main__")["losses"]


@pytest.mark.dist
def test_the_program_of_the_page_runs_and_learns(folder: Path) -> None:
    for losses in run_on_ranks(run_program, 2, str(folder)):
        assert sum(losses[:5]) / 5 > 0.6
        assert sum(losses[-5:]) / 5 < 0.4
    sessions = pa.table({"session_id": ["a", "b"], "items": [["i3", "i5"], ["i7"]]})
    pq.write_table(sessions, folder / "sessions.parquet")
    request = ScoreRequest(folder / "runs/joint", folder / "sessions.parquet", folder / "top")
    assert score_run(request).rows_out == 2


@pytest.mark.slow
@pytest.mark.dist
def test_torchrun_starts_the_program_of_the_page(folder: Path) -> None:
    line = re.search(r"`torchrun (.*?) ranking\.py`", PAGE.read_text())
    assert line is not None
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *line[1].split(), "ranking.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert isinstance(load_bundle(folder / "runs/joint").model, SessionRecommender)
