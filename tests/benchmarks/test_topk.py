import json
import sys

import pytest
import torch

from benchmarks import topk
from benchmarks.topk import BARE, TOP_K, WHOLE, Settings, compare, table
from llmgr_rec.cli import run_cli

SMALL = Settings(items=5000, dim=8, queries=40, k=5)


def test_every_side_has_a_rate_and_the_table_names_it():
    results = compare(SMALL, rounds=2)
    assert set(results["queries_per_s"]) == {TOP_K, BARE, WHOLE}
    assert results["times_bare"][TOP_K]["median"] > 0
    peak = {"ranking_adds": 1.0, "all_scores_would_take": 8.0}
    text = table(SMALL, 1, {**results, "peak_mib": peak})
    assert all(name in text for name in (TOP_K, BARE, WHOLE))
    json.dumps(results)


def test_the_bare_product_scores_every_item_of_every_query():
    queries, items = torch.randn(700, 4), torch.randn(5000, 4)
    sums = sum(float(block.double().sum()) for block in topk._score_blocks(queries, items))
    assert sums == pytest.approx(float((queries.double() @ items.double().T).sum()), abs=1e-2)


def test_the_sweep_has_every_size(monkeypatch):
    monkeypatch.setattr(topk, "_SWEEP_ITEMS", (300, 500))
    speeds = topk.sweep(SMALL, rounds=1)
    assert list(speeds) == ["300", "500"]
    assert all(speed > 0 for row in speeds.values() for speed in row.values())
    assert len(topk.sweep_table(speeds, 1).splitlines()) == 4


def test_a_ranking_that_holds_all_scores_is_refused(monkeypatch):
    def found(*_, **__):
        return type("Done", (), {"stdout": "100.0 5000.0\n"})

    monkeypatch.setattr(topk.subprocess, "run", found)
    with pytest.raises(RuntimeError, match="added 4900 MiB"):
        topk.memory_in_own_process(Settings(1_000_000, 64, 1024, 20), threads=1)


def test_a_bad_argument_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["topk", "--k", "0"])
    with pytest.raises(SystemExit) as ended:
        run_cli(topk.main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --k is 0; set it to 1 or more\n"
