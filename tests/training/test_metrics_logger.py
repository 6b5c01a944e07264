"""MetricsLogger: lines are appended, and dropped after the step at which a run is resumed."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from llmgr_rec.config_file import save_config
from llmgr_rec.training.metrics_logger import MetricsLogger
from llmgr_rec.training.preflight import RunRequest
from llmgr_rec.training.train_run import train_run
from tests.training.small_training import small_config, small_dataset


def lines(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return [(event.step, round(event.value, 6)) for event in events.Scalars("sbr/loss")]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    metrics = MetricsLogger(tmp_path, enabled=True)
    for step in (1, 2, 3):
        metrics.write("sbr", step, loss=step / 10)
    metrics.write("sbr", 3, split="valid", **{"ndcg@20": 0.5, "hr@20_by_train_count": {"0": {"hr": None}}})
    metrics.write("behave", 1, loss=9.0)
    metrics.close()
    return tmp_path


def test_records_are_lines_and_tensorboard_events(run: Path) -> None:
    first = lines(run)[0]
    assert datetime.now(UTC) - datetime.fromisoformat(str(first.pop("time"))) < timedelta(minutes=10)
    assert first == {"stage": "sbr", "step": 1, "loss": 0.1}
    assert lines(run)[3]["hr@20_by_train_count"] == {"0": {"hr": None}}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"sbr/loss", "sbr/valid/ndcg@20", "behave/loss"}
    assert losses(run) == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_flushed_events_outlive_a_kill(tmp_path: Path) -> None:
    metrics = MetricsLogger(tmp_path, enabled=True)
    metrics.write("sbr", 1, loss=0.1)
    metrics.flush()
    # What a process leaves that is killed now.
    assert losses(tmp_path) == [(1, 0.1)]
    metrics.close()


def test_rewinding_drops_records_of_one_stage(run: Path) -> None:
    MetricsLogger(run, enabled=True).rewind("sbr", 2)
    assert [(line["stage"], line["step"]) for line in lines(run)] == [("sbr", 1), ("sbr", 2), ("behave", 1)]


def test_rewinding_to_the_end_keeps_everything(run: Path) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    MetricsLogger(run, enabled=True).rewind("sbr", 3)
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("torn", ['{"stage": "behave", "st', '{"stage": "behave", "step": 2, "loss": 0.', "{"])
def test_a_line_cut_short_by_a_kill_is_dropped(run: Path, torn: str) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(torn)
    metrics = MetricsLogger(run, enabled=True)
    metrics.rewind("behave", 1)
    metrics.write("behave", 2, loss=1.0)
    assert [(line["stage"], line["step"]) for line in lines(run)][-2:] == [("behave", 1), ("behave", 2)]
    assert len(lines(run)) == 6


def test_other_ranks_write_nothing(run: Path, tmp_path: Path) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    other = MetricsLogger(run, enabled=False)
    other.write("sbr", 9, loss=1.0)
    other.rewind("sbr", 0)
    other.close()
    assert (run / "metrics.jsonl").read_bytes() == before
    MetricsLogger(tmp_path / "new", enabled=False).write("sbr", 1)
    assert not (tmp_path / "new").exists()


def test_a_restarted_stage_drops_the_records_of_an_attempt_that_died(tmp_path: Path) -> None:
    config = small_config(tmp_path / "prompts.yaml")
    config.sbr.max_steps, config.align.epochs, config.behave.epochs = 2, 0, 0
    run = tmp_path / "run"
    dead = MetricsLogger(run, enabled=True)
    dead.write("sbr", 9, loss=9.0)
    dead.close()
    save_config(config, run / "config.yaml")
    train_run(RunRequest(config, small_dataset(), run, "sbr", False))
    assert {line["step"] for line in lines(run)} <= {1, 2}


def test_there_may_be_nothing_to_rewind(tmp_path: Path) -> None:
    MetricsLogger(tmp_path, enabled=True).rewind("sbr", 0)
    assert not (tmp_path / "metrics.jsonl").exists()
