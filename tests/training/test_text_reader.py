"""Stage text with a language model that reads sessions: learns, resumes, exports, ranks; what cannot be is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from llmgr_rec.limits import check_limits

from llmgr_rec.config import Config, reader_weights
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.evaluate_run import EvaluationRequest, evaluate_run
from llmgr_rec.evaluation.protocol import evaluate_model
from llmgr_rec.modules.recommender import text_reader_of
from llmgr_rec.modules.text_sequence_encoder import TextSequenceEncoder
from llmgr_rec.score import main as score
from llmgr_rec.scoring.score_run import ScoreRequest, score_run
from llmgr_rec.storage.bundle import load_bundle
from llmgr_rec.training.loop import StageLoop
from llmgr_rec.training.preflight import RunRequest
from llmgr_rec.training.train_run import train_run
from tests.small_run import ONE_RANK
from tests.training.exported import Exported
from tests.training.small_training import numbers, records, small_config, small_dataset

pytestmark = pytest.mark.dist


def reader_config(folder: Path) -> Config:
    config = small_config(folder / "prompts.yaml")
    config.prompt.max_text_tokens = 24
    config.text = replace(config.text, epochs=2, dim=16, clicks=4, drawn_items=24, batch_size=40, lr=1e-3)
    config.align.epochs = config.behave.epochs = 0
    config.blend.neighbors = ["item_knn", "text_knn"]
    config.runtime.checkpoint_every = 2
    return config


def train(folder: Path, name: str, config: Config, resume: bool = False) -> Path:
    train_run(RunRequest(config, small_dataset(), folder / name, "all", resume))
    return folder / name


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    return train(folder, "run", reader_config(folder))


def test_it_learns(run: Path) -> None:
    losses = [values["loss"] for (stage, _, split), values in records(run).items() if (stage, split) == ("text", "")]
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.3


def test_its_bundle_ranks_as_training_said(run: Path) -> None:
    bundle = load_bundle(run)
    assert bundle.stage == "text"
    reader = text_reader_of(bundle.model)
    assert reader is not None
    reader.weight.fill_(1.0)  # as in training
    dataset = Dataset(small_dataset())
    found = evaluate_model(bundle.model, dataset, "valid", bundle.config, ONE_RANK, bundle.catalog)
    said = [
        values["ndcg@20"] for (stage, _, split), values in records(run).items() if (stage, split) == ("text", "valid")
    ]
    assert found["ndcg@20"] == pytest.approx(max(said), abs=1e-6)


def test_its_weight_is_the_best_on_the_validation_sessions(run: Path) -> None:
    bundle, dataset = load_bundle(run), Dataset(small_dataset())
    reader = text_reader_of(bundle.model)
    assert reader is not None
    assert bundle.prior is not None
    chosen, found = float(reader.weight), {}
    for weight in reader_weights(bundle.config):
        reader.weight.fill_(weight)
        judged = evaluate_model(bundle.model, dataset, "valid", bundle.config, ONE_RANK, bundle.catalog, bundle.prior)
        found[weight] = judged["ndcg@20"]
    assert len(set(found.values())) > 3
    assert found[chosen] == max(found.values())
    told = records(run)["text", max(step for stage, step, _ in records(run) if stage == "text"), "prior"]
    assert told["text_reader"] == chosen
    assert told["ndcg@20"] == pytest.approx(found[chosen], abs=1e-6)


def test_at_a_weight_of_zero_the_session_recommender_ranks_as_without_it(tmp_path: Path) -> None:
    config, dataset = reader_config(tmp_path), Dataset(small_dataset())
    config.tables.knn_smoothing = 2.0
    config.text_encoder.score_weight = 0.0
    folder = train(tmp_path, "run", config)
    found = []
    for stage in ("sbr", "text"):
        bundle = load_bundle(folder / "export" / stage)
        found.append(evaluate_model(bundle.model, dataset, "test", bundle.config, ONE_RANK, None, bundle.prior))
    assert found[0] == found[1]


def test_it_is_evaluated_and_scores_sessions(run: Path, tmp_path: Path) -> None:
    metrics = evaluate_run(EvaluationRequest(run, small_dataset(), "test", tmp_path / "metrics.json", device="cpu"))
    assert "text" in metrics["test"]
    score_run(ScoreRequest(run, small_dataset() / "test", tmp_path / "scores", k=5, device="cpu"))
    assert pq.read_table(tmp_path / "scores").num_rows == Dataset(small_dataset()).manifest.num_sessions["test"]


@pytest.mark.parametrize(("stage", "encoded"), [("text", 2), ("sbr", 0)])
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


def test_options_of_scoring_that_steer_prompts_are_refused(run: Path, tmp_path: Path) -> None:
    request = ScoreRequest(run, small_dataset() / "test", tmp_path / "scores", device="cpu", llm_dtype="bfloat16")
    with pytest.raises(UserError, match="a language model that they do not steer; leave the --llm_ options out"):
        score_run(request)


def test_an_interrupted_stage_goes_on_as_if_nothing_had_happened(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = reader_config(tmp_path)
    save = StageLoop._save

    def save_and_stop(loop: StageLoop, position: object) -> None:
        save(loop, position)  # type: ignore[arg-type]
        if loop.name == "text" and position.step >= 4:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(StageLoop, "_save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, "run", config)
    train(tmp_path, "run", config, resume=True)
    assert numbers(tmp_path / "run") == pytest.approx(numbers(run), abs=1e-6)
    expected, found = Exported.read(run / "export/text"), Exported.read(tmp_path / "run/export/text")
    torch.testing.assert_close(found.recommender, expected.recommender, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.tables, expected.tables, rtol=1e-5, atol=1e-6)


def test_other_weights_or_texts_make_another_reader(run: Path, tmp_path: Path) -> None:
    for name in ("random_llm", "shuffled_text"):
        config = reader_config(tmp_path)
        setattr(config.controls, name, True)
        other = load_bundle(train(tmp_path, name, config)).model.text_encoder
        assert isinstance(other, TextSequenceEncoder)
        own = load_bundle(run).model.text_encoder
        assert isinstance(own, TextSequenceEncoder)
        assert torch.equal(other.texts.values, own.texts.values) == (name == "random_llm")
        assert not torch.equal(other.mean_H, own.mean_H)


def test_layers_computed_again_train_alike(run: Path, tmp_path: Path) -> None:
    config = reader_config(tmp_path)
    config.llm.recompute = True
    assert numbers(train(tmp_path, "run", config)) == pytest.approx(numbers(run), abs=1e-4)


def no_later_stage(config: Config) -> None:
    config.behave.epochs = 1


def no_clicks(config: Config) -> None:
    config.text_encoder.max_clicks = 0


def no_weight(config: Config) -> None:
    config.text_encoder.score_weight = []


def a_negative_weight(config: Config) -> None:
    config.text_encoder.score_weight = [1.0, -1.0]


def everything_dropped(config: Config) -> None:
    config.text_encoder.dropout = 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_later_stage, "text.epochs is 2, but stage behave does not go on from stage text; set behave.epochs to 0"),
        (no_weight, "text_encoder.score_weight names no number; give at least one, such as 1"),
        (a_negative_weight, "text_encoder.score_weight is -1.0; give 0 or more"),
        (no_clicks, "text_encoder.max_clicks is 0; give 1 or more"),
        (everything_dropped, "text_encoder.dropout is 1.0; give a probability from 0 to below 1"),
    ],
)
def test_settings_that_do_not_go_together_are_named(
    change: Callable[[Config], None], message: str, tmp_path: Path
) -> None:
    config = reader_config(tmp_path)
    change(config)
    with pytest.raises(UserError, match=message):
        check_limits(config)


def test_more_columns_than_the_language_model_has_are_refused_before_training(tmp_path: Path) -> None:
    config = reader_config(tmp_path)
    config.text_encoder.dim = 100
    with pytest.raises(UserError, match=r"text_encoder.dim is 100, but random-tiny has 64 columns; give 64 at most"):
        train(tmp_path, "run", config)
    assert not (tmp_path / "run").exists()


def test_no_stage_goes_on_from_a_finished_one(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = small_config(tmp_path / "prompts.yaml")
    request = RunRequest(config, small_dataset(), tmp_path / "run", "align", resume=False)
    with pytest.raises(UserError, match=r"stage align does not go on from stage text.*give another --output"):
        train_run(request)
