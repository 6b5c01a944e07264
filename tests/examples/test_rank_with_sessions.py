"""The program of docs/embedding.md is examples/rank_with_sessions.py, and does on two ranks what the page says."""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from examples.rank_with_sessions import train
from llmgr_rec import SessionRecommender, World, load_bundle
from llmgr_rec.scoring.score_run import ScoreRequest, score_run
from tests.examples.run_example import ROOT, run_example
from tests.ranks import run_on_ranks
from tests.small_run import run_with

PAGE = (ROOT / "docs" / "embedding.md").read_text()


def test_the_page_shows_the_whole_example() -> None:
    blocks = [block.strip("\n") for block in re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.S | re.M)]
    assert len(blocks) > 3
    assert "\n\n\n".join(blocks) + "\n" == (ROOT / "examples" / "rank_with_sessions.py").read_text()


def train_on_rank(world: World, folder: str) -> list[float]:
    return train(Path(folder) / "shop", Path(folder) / "joint", world)


@pytest.mark.dist
def test_it_learns_and_its_session_recommender_can_be_scored(tmp_path: Path) -> None:
    run_with(tmp_path / "shop", "sbr")
    for losses in run_on_ranks(train_on_rank, 2, str(tmp_path)):
        assert sum(losses[:5]) / 5 > 0.6
        assert sum(losses[-5:]) / 5 < 0.4
    sessions = pa.table({"session_id": ["a", "b"], "items": [["i3", "i5"], ["i7"]]})
    pq.write_table(sessions, tmp_path / "sessions.parquet")
    request = ScoreRequest(tmp_path / "joint", tmp_path / "sessions.parquet", tmp_path / "top")
    assert score_run(request).rows_out == 2


@pytest.mark.slow
@pytest.mark.dist
def test_torchrun_starts_it(tmp_path: Path) -> None:
    run_with(tmp_path / "runs" / "shop", "sbr")
    (arguments,) = re.findall(r"^torchrun .* -m examples\.rank_with_sessions (.*)$", PAGE, re.M)
    printed = run_example("rank_with_sessions", *arguments.split(), ranks=2, folder=tmp_path)
    assert re.search(r"^loss 0\.[67]\d\d in the first steps, 0\.[0-3]\d\d in the last$", printed, re.M)
    assert isinstance(load_bundle(tmp_path / "runs" / "joint").model, SessionRecommender)
