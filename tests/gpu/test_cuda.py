"""The product on one GPU computes what it computes on the CPU. Skipped where there is no GPU."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq
import pytest
import torch

from llmgr_rec.config import Config
from llmgr_rec.evaluation.evaluate_run import EvaluationRequest, evaluate_run
from llmgr_rec.modules.encoders import ENCODERS
from llmgr_rec.scoring.score_run import ScoreRequest, score_run
from llmgr_rec.training.preflight import RunRequest
from llmgr_rec.training.train_run import train_run
from tests.training.small_training import numbers, small_config, small_dataset

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


def whole_config(folder: Path) -> Config:
    """The language stages, with neighbors."""
    config = small_config(folder / "prompts.yaml")
    config.blend.neighbors = ["item_knn", "text_knn"]
    return config


def train_on(
    device: Literal["cpu", "cuda"], folder: Path, config: Config, stage: Literal["all", "sbr"] = "all"
) -> Path:
    config = replace(config, runtime=replace(config.runtime, device=device))
    run = folder / device
    train_run(RunRequest(config, small_dataset(), run, stage, resume=False))
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gpu")
    return {
        "cpu": train_on("cpu", folder, whole_config(folder)),
        "cuda": train_on("cuda", folder, whole_config(folder)),
    }


def test_all_stages_train_alike(trained: dict[str, Path]) -> None:
    on_cpu, on_gpu = numbers(trained["cpu"]), numbers(trained["cuda"])
    losses = [name for name in on_cpu if name.endswith("/loss")]
    assert {name.split("/")[0] for name in losses} == {"sbr", "align", "behave"}
    for name in losses:
        assert on_gpu[name] == pytest.approx(on_cpu[name], rel=2e-3), name


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_session_encoder_trains_alike(tmp_path: Path, encoder: str) -> None:
    config = small_config(tmp_path / "prompts.yaml")
    config.encoder.name = encoder
    config.encoder.one_pass = ENCODERS[encoder].supports_one_pass
    on_cpu = numbers(train_on("cpu", tmp_path, config, "sbr"))
    on_gpu = numbers(train_on("cuda", tmp_path, config, "sbr"))
    for name in (name for name in on_cpu if name.endswith("/loss")):
        assert on_gpu[name] == pytest.approx(on_cpu[name], rel=2e-3), name


def test_a_run_is_evaluated_alike(trained: dict[str, Path], tmp_path: Path) -> None:
    results = [
        evaluate_run(
            EvaluationRequest(trained["cpu"], small_dataset(), "test", tmp_path / f"{device}.json", device=device)
        )
        for device in ("cpu", "cuda")
    ]
    on_cpu, on_gpu = (result["test"] for result in results)
    assert on_cpu.keys() == on_gpu.keys()
    for model, metrics in on_cpu.items():
        # One session more or less, of 120, at a rank where two scores are equal but for rounding.
        assert on_gpu[model]["hr@20"] == pytest.approx(metrics["hr@20"], abs=1.01 / 120), model


def test_sessions_are_scored_alike(trained: dict[str, Path], tmp_path: Path) -> None:
    lists = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        score_run(ScoreRequest(trained["cpu"], small_dataset() / "test", out, k=10, device=device))
        lists.append(pq.read_table(out).to_pydict())
    on_cpu, on_gpu = lists
    assert on_cpu.keys() == on_gpu.keys()
    scores = next(name for name in on_cpu if "score" in name)
    for mine, theirs in zip(on_cpu[scores], on_gpu[scores], strict=True):
        assert theirs == pytest.approx(mine, rel=1e-3, abs=1e-3)


def test_a_text_sequence_encoder_trains_alike(tmp_path: Path) -> None:
    """Its decoder computes in bfloat16 on the GPU."""
    config = small_config(tmp_path / "prompts.yaml")
    config.prompt.max_text_tokens = 24
    config.llm_text.epochs, config.text_encoder.dim, config.text_encoder.dropout = 1, 16, 0.0
    config.align.epochs = config.behave.epochs = 0
    on_cpu, on_gpu = (numbers(train_on(device, tmp_path, config, "all")) for device in ("cpu", "cuda"))
    for name in (name for name in on_cpu if name.startswith("llm_text/train") and name.endswith("/loss")):
        assert on_gpu[name] == pytest.approx(on_cpu[name], rel=0.05), name


def test_bfloat16_trains_close_to_float32(trained: dict[str, Path], tmp_path: Path) -> None:
    config = whole_config(tmp_path)
    config.llm.dtype = "bfloat16"
    config.loss.dtype = "auto"
    exact, rounded = numbers(trained["cuda"]), numbers(train_on("cuda", tmp_path, config))
    for name in (name for name in exact if name.endswith("/loss")):
        assert rounded[name] == pytest.approx(exact[name], rel=0.05), name
