"""Stage llm_text: it learns, resumes, exports and ranks, and refuses what it cannot do."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from llmgr_rec.config import Config, StageConfig, TextEncoderConfig
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.evaluate_run import EvaluationRequest, evaluate_run
from llmgr_rec.evaluation.protocol import evaluate_model
from llmgr_rec.modules.recommender import text_encoder_of
from llmgr_rec.modules.text_sequence_encoder import TextSequenceEncoder
from llmgr_rec.score import main as score
from llmgr_rec.scoring.score_run import ScoreRequest, score_run
from llmgr_rec.storage.bundle import Bundle, load_bundle
from llmgr_rec.training.loop import Position, StageLoop
from llmgr_rec.training.preflight import RunRequest
from llmgr_rec.training.train_run import train_run
from tests.small_run import ONE_RANK
from tests.training.exported import Exported
from tests.training.small_training import numbers, records, small_config, small_dataset

pytestmark = pytest.mark.dist


def text_config(folder: Path) -> Config:
    config = small_config(folder / "prompts.yaml")
    config.prompt.max_text_tokens = 24
    config.llm_text = StageConfig(epochs=2, batch_size=40, lr=1e-3)
    config.text_encoder = TextEncoderConfig(dim=16, max_clicks=4, num_negatives=24)
    config.align.epochs = config.behave.epochs = 0
    config.blend.neighbors = ["item_knn", "text_knn"]
    config.runtime.checkpoint_every = 2
    return config


def train(folder: Path, name: str, config: Config, resume: bool = False) -> Path:
    train_run(RunRequest(config, small_dataset(), folder / name, "all", resume))
    return folder / name


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm-text")
    return train(folder, "run", text_config(folder))


def test_it_learns(run: Path) -> None:
    losses = [
        values["loss"] for (stage, _, split), values in records(run).items() if (stage, split) == ("llm_text", "")
    ]
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.3


def valid_ndcg(bundle: Bundle, blended: bool) -> float:
    ranking = bundle.ranking() if blended else replace(bundle.ranking(), blend=None)
    dataset = Dataset(small_dataset())
    return float(evaluate_model(ranking, dataset, "valid", ONE_RANK, bundle.catalog.train_count_V)["ndcg@20"])


def text_encoder(bundle: Bundle) -> TextSequenceEncoder:
    encoder = text_encoder_of(bundle.model)
    assert encoder is not None
    return encoder


def test_its_bundle_ranks_as_the_last_validation_did(run: Path) -> None:
    bundle = load_bundle(run)
    assert bundle.stage == "llm_text"
    text_encoder(bundle).weight.fill_(1.0)  # as in training
    logged = [
        values["ndcg@20"]
        for (stage, _, split), values in records(run).items()
        if (stage, split) == ("llm_text", "valid")
    ]
    assert valid_ndcg(bundle, blended=False) == pytest.approx(max(logged), abs=1e-6)


def test_its_weight_is_the_best_on_the_validation_sessions(run: Path) -> None:
    bundle = load_bundle(run)
    assert bundle.blend is not None
    selected, found = float(text_encoder(bundle).weight), {}
    for weight in bundle.config.text_encoder.score_weight:
        text_encoder(bundle).weight.fill_(weight)
        found[weight] = valid_ndcg(bundle, blended=True)
    assert len(set(found.values())) > 3
    assert found[selected] == max(found.values())
    logged = records(run)["llm_text", max(step for stage, step, _ in records(run) if stage == "llm_text"), "selection"]
    assert logged["text_encoder"] == selected
    assert logged["ndcg@20"] == pytest.approx(found[selected], abs=1e-6)


def test_at_a_weight_of_zero_the_session_recommender_ranks_as_without_it(tmp_path: Path) -> None:
    config, dataset = text_config(tmp_path), Dataset(small_dataset())
    config.tables.knn_smoothing = [2.0]
    config.text_encoder.score_weight = [0.0]
    folder = train(tmp_path, "run", config)
    found = []
    for stage in ("sbr", "llm_text"):
        bundle = load_bundle(folder / "export" / stage)
        found.append(evaluate_model(bundle.ranking(), dataset, "test", ONE_RANK, bundle.catalog.train_count_V))
    assert found[0] == found[1]


def test_it_is_evaluated_and_scores_sessions(run: Path, tmp_path: Path) -> None:
    metrics = evaluate_run(EvaluationRequest(run, small_dataset(), "test", tmp_path / "metrics.json", device="cpu"))
    assert "llm_text" in metrics["test"]
    score_run(ScoreRequest(run, small_dataset() / "test", tmp_path / "scores", k=5, device="cpu"))
    assert pq.read_table(tmp_path / "scores").num_rows == Dataset(small_dataset()).manifest.num_sessions["test"]


@pytest.mark.parametrize(("stage", "encoded"), [("llm_text", 2), ("sbr", 0)])
def test_scoring_counts_the_sessions_that_it_encodes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, encoded: int
) -> None:
    first, second, third = Catalog.load(small_dataset()).item_ids.to_pylist()[:3]
    sessions = pa.array([[first, second], [], [third], []], pa.list_(pa.string()))
    pq.write_table(pa.table({"session_id": [1, 2, 3, 4], "items": sessions}), tmp_path / "in.parquet")
    output = tmp_path / "scores"
    score(["--run", str(run), "--input", str(tmp_path / "in.parquet"), "--output", str(output), "--stage", stage])
    assert f"{encoded} were encoded by a language model" in capsys.readouterr().out
    counts = json.loads((output / "_SUCCESS").read_text())
    assert (counts["llm_rows"], counts["fallback_rows"]) == (encoded, 2)


def test_options_of_scoring_that_are_for_prompts_are_refused(run: Path, tmp_path: Path) -> None:
    request = ScoreRequest(run, small_dataset() / "test", tmp_path / "scores", device="cpu", llm_dtype="bfloat16")
    with pytest.raises(UserError, match=r"a text sequence encoder, to which they do not apply; .* --llm_"):
        score_run(request)


def test_an_interrupted_stage_goes_on_as_if_nothing_had_happened(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = text_config(tmp_path)
    save = StageLoop._save

    def save_and_stop(loop: StageLoop, position: Position, window: Any = None) -> None:
        save(loop, position, window)
        if loop.name == "llm_text" and position.step >= 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(StageLoop, "_save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, "run", config)
    train(tmp_path, "run", config, resume=True)
    assert numbers(tmp_path / "run") == pytest.approx(numbers(run), abs=1e-6)
    expected, found = Exported.read(run / "export/llm_text"), Exported.read(tmp_path / "run/export/llm_text")
    torch.testing.assert_close(found.recommender, expected.recommender, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.tables, expected.tables, rtol=1e-5, atol=1e-6)


def test_layers_computed_again_train_alike(run: Path, tmp_path: Path) -> None:
    config = text_config(tmp_path)
    config.llm.recompute = True
    assert numbers(train(tmp_path, "run", config)) == pytest.approx(numbers(run), abs=1e-4)


def test_more_columns_than_the_language_model_has_are_refused_before_training(tmp_path: Path) -> None:
    config = text_config(tmp_path)
    config.text_encoder.dim = 100
    with pytest.raises(UserError, match=r"text_encoder.dim is 100, but random-tiny has 64 columns; give 64 at most"):
        train(tmp_path, "run", config)
    assert not (tmp_path / "run").exists()


def test_no_stage_goes_on_from_a_finished_one(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = small_config(tmp_path / "prompts.yaml")
    request = RunRequest(config, small_dataset(), tmp_path / "run", "align", resume=False)
    with pytest.raises(UserError, match=r"stage align \w.* stage llm_text.*give another --output"):
        train_run(request)
