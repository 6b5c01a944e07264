import json
import sys

import pytest
import torch

from benchmarks import session_tower
from benchmarks.session_tower import batches, untrained_tower
from llmgr_rec.cli import run_cli


@torch.no_grad()
def test_both_sides_score_the_same_items_alike(tmp_path):
    tower = untrained_tower(tmp_path, 50).eval()
    together, apart = batches(50, 3, 4, 5)
    torch.testing.assert_close(tower(together).values(), tower(apart).values(), atol=1e-5, rtol=1e-5)


def test_once_a_session_is_at_least_three_times_as_fast(tmp_path):
    session_tower.main(["--output", str(tmp_path / "a.json"), "--rounds", "2", "--num_items", "200", "--threads", "1"])
    results = json.loads((tmp_path / "a.json").read_text())["results"]
    assert results["inference"]["ratio"] > 3
    assert results["training"]["ratio"] > 3


def test_a_bad_argument_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["session_tower", "--shown", "0"])
    with pytest.raises(SystemExit) as ended:
        run_cli(session_tower.main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --shown is 0; set it to 1 or more\n"
