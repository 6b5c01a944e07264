"""The program of docs/embedding.md is examples/rank_with_sessions.py, and does on two ranks what the page says."""

import re
from pathlib import Path

import pytest

from examples.rank_with_sessions import train_and_test
from llmgr_rec import Recommender, World
from tests.examples.run_example import ROOT, run_example
from tests.ranks import run_on_ranks
from tests.small_run import run_with, small_run

PAGE = (ROOT / "docs" / "embedding.md").read_text()


def test_the_page_shows_the_whole_example() -> None:
    blocks = [block.strip("\n") for block in re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.S | re.M)]
    assert len(blocks) > 3
    assert "\n\n\n".join(blocks) + "\n" == (ROOT / "examples" / "rank_with_sessions.py").read_text()


def train_on_rank(world: World, dataset: str, bundle: str, output: str) -> tuple[float, float]:
    del world
    without = train_and_test(Path(dataset), None, epochs=30)
    return without, train_and_test(Path(dataset), Path(bundle), epochs=30, output=Path(output))


@pytest.mark.dist
def test_a_ranking_model_gains_by_the_tower_which_can_then_recommend(tmp_path: Path) -> None:
    run = run_with(tmp_path / "shop", "sbr")
    answers = run_on_ranks(train_on_rank, 2, str(small_run().dataset.path), str(run), str(tmp_path / "joint"))
    assert answers[0] == answers[1]
    without, with_tower = answers[0]
    # 0.5 is guessing; the log is a walk through the catalog, so that the last click tells the next one.
    assert with_tower > max(without, 0.5) + 0.03
    assert Recommender.load(tmp_path / "joint").recommend([["i3", "i5"]], k=3)["item_ids"].to_pylist()[0]


@pytest.mark.slow
@pytest.mark.dist
def test_torchrun_starts_it(tmp_path: Path) -> None:
    run_with(tmp_path / "runs" / "shop", "sbr")
    (tmp_path / "shop").symlink_to(small_run().dataset.path)
    (arguments,) = re.findall(r"^torchrun .* -m examples\.rank_with_sessions (.*)$", PAGE, re.M)
    printed = run_example("rank_with_sessions", *arguments.split(), "--output", "joint", ranks=2, folder=tmp_path)
    assert re.search(r"^AUC 0\.\d\d\d without the tower, 0\.\d\d\d with it$", printed, re.M)
    assert (tmp_path / "joint" / "export" / "sbr" / "bundle.json").is_file()
