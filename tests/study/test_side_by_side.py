"""Cells that several processes train and judge: the same figures, each thing once, and no process left behind."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmgr_rec.errors import UserError
from llmgr_rec.experiments import main
from llmgr_rec.study import side_by_side
from llmgr_rec.study.cells import Bench
from llmgr_rec.study.recipe import Variant, load_study
from llmgr_rec.study.side_by_side import Task, fill
from tests.small_run import small_run

RECIPE = """\
title: Side by side
settings: {tables.dim: 8, sbr.epochs: 1, runtime.device: cpu, runtime.threads_per_rank: 1}
variants:
  Popularity: {model: popularity}
  GNN: {model: sbr}
  GNN + item-kNN: {model: sbr, blend: item_knn}
  Drawn: {model: sbr, settings: {tables.neighbour_clicks: 2.0}}
"""


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "beside.yaml"
    file.write_text(RECIPE)
    return file


def words(recipe: Path, output: str, *more: str) -> list[str]:
    data = ["--dataset", str(small_run().dataset.path), "--output", str(recipe.parent / output)]
    return ["--recipe", str(recipe), *data, "--seeds", "0,1", *more]


@pytest.mark.dist
def test_two_processes_find_what_one_does(tmp_path, recipe):
    main(words(recipe, "one"))
    main(words(recipe, "two", "--jobs", "2"))
    assert not multiprocessing.active_children()

    def figures(output):
        results = json.loads((tmp_path / output / "beside.json").read_text())["variants"]
        for variant in results.values():
            del variant["training_minutes"]
        return results

    assert figures("one") == figures("two")
    for folder in ("runs", "cells"):
        names = [{path.name for path in (tmp_path / output / folder).iterdir()} for output in ("one", "two")]
        assert names[0] == names[1]


def _end_itself(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.dist
def test_a_process_that_is_ended_is_one_clear_line(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(side_by_side, "_work", _end_itself)
    study = load_study(str(recipe))
    bench = Bench(tmp_path / "out", small_run().dataset, "test")
    with pytest.raises(UserError, match=r"one of 2 processes was ended from without.* fewer --jobs"):
        fill(bench, study, [Task(study.variants[0], 0)], 2)
    assert not multiprocessing.active_children()


ORPHAN = """
import os, signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from llmgr_rec.study import side_by_side
if __name__ == "__main__":
    print(ProcessPoolExecutor(1, get_context("spawn"), side_by_side._begin).submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.dist
def test_processes_end_with_the_one_that_started_them(tmp_path):
    (tmp_path / "orphan.py").write_text(ORPHAN)
    command = [sys.executable, str(tmp_path / "orphan.py")]
    worker = int(subprocess.run(command, capture_output=True, text=True, timeout=120).stdout)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < deadline, "a process was left behind"
        time.sleep(0.1)


def test_a_point_of_a_grid_is_told_from_the_others():
    variant = Variant("GNN", "sbr", {"sbr.lr": 0.01, "tables.dim": 8}, grid={"sbr.lr": [0.01]})
    assert str(Task(variant.points()[0], 3, tuple(variant.grid))) == "GNN, sbr.lr 0.01, seed 3"
    assert str(Task(variant, 3)) == "GNN, seed 3"


def test_there_is_at_least_one_process(recipe):
    with pytest.raises(UserError, match=r"--jobs is 0; give 1 or more"):
        main(words(recipe, "none", "--jobs", "0"))


def test_what_shares_a_recommender_waits_for_it(tmp_path, recipe):
    study = load_study(str(recipe))
    bench = Bench(tmp_path, small_run().dataset, "test")
    names = {variant.name: bench.recommender_of(study, variant, 0) for variant in study.variants}
    assert names["Popularity"] == "popularity"
    assert names["GNN"] == names["GNN + item-kNN"] == names["Drawn"]
    assert bench.recommender_of(study, study.variants[1], 1) != names["GNN"]
