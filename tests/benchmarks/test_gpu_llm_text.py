"""The script for a GPU, on the CPU with a tiny language model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmgr_rec.experiments.experiment import load_experiment
from tests.documented import ROOT
from tests.small_run import small_run

SCRIPT = ROOT / "benchmarks/gpu_llm_text.sh"
TINY = """
config: llm_text
settings: {llm.name_or_path: random-tiny, llm.num_layers: 1, llm_text.max_steps: 2, sbr.max_steps: 2, tables.dim: 16,
  text_encoder.dim: 16, text_encoder.max_clicks: 2, text_encoder.score_weight: [0.5], prompt.max_text_tokens: 4,
  blend.weights: [1.0, 1.0], runtime.device: cpu, runtime.threads_per_rank: 1}
variants: {Recipe default: {model: sbr}, Recipe llm_text: {model: llm_text}}
"""


def run_script(arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **variables}
    words = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=170, env=environment, check=False)


def test_its_experiment_is_recipe_llm_text_and_it_says_how_it_is_called() -> None:
    experiment = load_experiment(str(ROOT / "benchmarks/gpu_llm_text.yaml"))
    assert [variant.model for variant in experiment.variants] == ["sbr", "llm_text"]
    assert (experiment.config, dict(experiment.settings)) == ("llm_text", {})
    called = run_script(["runs/gpu"])
    assert called.returncode == 2
    assert called.stderr == "usage: bash benchmarks/gpu_llm_text.sh OUTPUT NAME=DATASET...\n"


@pytest.mark.slow
def test_it_stops_in_time_goes_on_and_leaves_results_of_every_seed(tmp_path: Path) -> None:
    (tmp_path / "gpu_llm_text.yaml").write_text(TINY)
    variables = {"EXPERIMENT": str(tmp_path / "gpu_llm_text.yaml"), "SEEDS": "2"}
    arguments = [str(tmp_path / "out"), f"small={small_run().dataset.path}"]
    stopped = run_script(arguments, LIMIT_S="31", **variables)
    assert stopped.returncode == 3, stopped.stderr
    finished = run_script(arguments, **variables)
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "out/small/gpu_llm_text.json").read_text())
    assert set(results["variants"]) == {"Recipe default", "Recipe llm_text"}
    assert [len(variant["ndcg@20"]["seeds"]) for variant in results["variants"].values()] == [2, 2]
