"""Trials in several processes: the same figures, nothing trained twice, and no process left behind."""

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
from llmgr_rec.experiments import process_pool
from llmgr_rec.experiments.__main__ import main
from llmgr_rec.experiments.experiment import Variant, load_experiment
from llmgr_rec.experiments.process_pool import Task, run_trials
from llmgr_rec.experiments.trial import TrialRunner
from tests.small_run import small_run

ROOT = Path(__file__).parents[2]
EXPERIMENT = """\
title: In parallel
settings: {blend.neighbors: [], tables.dim: 8, sbr.epochs: 1, runtime.device: cpu, runtime.threads_per_rank: 1}
variants:
  Popularity: {model: popularity}
  GNN: {model: sbr}
  GNN + item-kNN: {model: sbr, settings: {blend.neighbors: [item_knn]}}
  Smoothed: {model: sbr, settings: {tables.knn_smoothing: [2.0]}}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "parallel.yaml"
    path.write_text(EXPERIMENT)
    return path


def words(file: Path, output: str, *more: str) -> list[str]:
    data = ["--dataset", str(small_run().dataset.path), "--output", str(file.parent / output)]
    return ["--experiment", str(file), *data, "--seeds", "0,1", *more]


@pytest.mark.dist
def test_two_processes_find_what_one_does(tmp_path, file):
    main(words(file, "one"))
    main(words(file, "two", "--jobs", "2"))
    assert not multiprocessing.active_children()

    def figures(output):
        results = json.loads((tmp_path / output / "parallel.json").read_text())["variants"]
        for variant in results.values():
            del variant["training_minutes"]
        return results

    assert figures("one") == figures("two")
    for folder in ("runs", "trials"):
        names = [{path.name for path in (tmp_path / output / folder).iterdir()} for output in ("one", "two")]
        assert names[0] == names[1]


def _kill_itself(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.dist
def test_a_process_that_is_killed_is_one_clear_line(tmp_path, file, monkeypatch):
    monkeypatch.setattr(process_pool, "_work", _kill_itself)
    experiment = load_experiment(str(file))
    runner = TrialRunner(tmp_path / "out", small_run().dataset, "test")
    with pytest.raises(UserError, match=r"one of 2 processes was killed, possibly out of memory.* fewer --jobs"):
        run_trials(runner, experiment, [Task(experiment.variants[0], 0)], 2)
    assert not multiprocessing.active_children()


ORPHAN = """
import os, signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from llmgr_rec.experiments import process_pool
if __name__ == "__main__":
    print(ProcessPoolExecutor(1, get_context("spawn"), process_pool._initialize).submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.dist
def test_processes_end_with_the_one_that_started_them(tmp_path):
    (tmp_path / "orphan.py").write_text(ORPHAN)
    command = [sys.executable, str(tmp_path / "orphan.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    worker = int(done.stdout)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < deadline, "a process was left behind"
        time.sleep(0.1)


def test_a_point_of_a_grid_has_its_own_name():
    variant = Variant("GNN", "sbr", {"sbr.lr": 0.01, "tables.dim": 8}, grid={"sbr.lr": [0.01]})
    assert str(Task(variant.points()[0], 3, tuple(variant.grid))) == "GNN, sbr.lr 0.01, seed 3"
    assert str(Task(variant, 3)) == "GNN, seed 3"


def test_there_is_at_least_one_process(file):
    with pytest.raises(UserError, match=r"--jobs is 0; give 1 or more"):
        main(words(file, "none", "--jobs", "0"))


def test_what_shares_a_recommender_waits_for_it(tmp_path, file):
    experiment = load_experiment(str(file))
    runner = TrialRunner(tmp_path, small_run().dataset, "test")
    names = {variant.name: runner.recommender_of(experiment, variant, 0) for variant in experiment.variants}
    assert names["Popularity"] == "popularity"
    assert names["GNN"] == names["GNN + item-kNN"] == names["Smoothed"]
    assert runner.recommender_of(experiment, experiment.variants[1], 1) != names["GNN"]
