"""The script for a GPU, on the CPU with a tiny language model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documented import ROOT
from tests.small_run import small_run

SCRIPT = ROOT / "benchmarks/gpu_cross_encoder.sh"


def run_script(arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **variables}
    words = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=170, env=environment, check=False)


def test_it_says_how_it_is_called() -> None:
    called = run_script(["runs/gpu"])
    assert called.returncode == 2
    assert called.stderr == "usage: bash benchmarks/gpu_cross_encoder.sh OUTPUT NAME=DATASET...\n"


@pytest.mark.slow
def test_it_stops_in_time_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("lightgbm", reason="the extra rerank is not installed")
    variables = {
        "SEEDS": "2",
        "TRAINING": "--sbr.max_steps 2 --tables.dim 16 --runtime.device cpu --runtime.threads_per_rank 1",
        "OPTIONS": "--llm random-tiny --layers 1 --epochs 1 --sessions 20 --depth 40 --threads 1",
    }
    arguments = [str(tmp_path / "out"), f"small={small_run().dataset.path}"]
    stopped = run_script(arguments, LIMIT_S="31", **variables)
    assert stopped.returncode == 3, stopped.stderr
    finished = run_script(arguments, **variables)
    assert finished.returncode == 0, finished.stderr
    for seed in range(2):
        results = json.loads((tmp_path / f"out/small-{seed}.json").read_text())["results"]
        assert {"default", "pretrained", "random"} <= set(results)
