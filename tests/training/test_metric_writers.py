"""Trackers: what their clients are called with, resuming, failures, and MLflow itself where it is installed."""

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest

from llmgr_rec.config import Config
from llmgr_rec.errors import UserError
from llmgr_rec.remote_path import as_path
from llmgr_rec.training.metric_writers import check_trackers, open_trackers
from llmgr_rec.training.metrics_logger import MetricsLogger


class FakeClient:
    """Stands for MlflowClient and for a run of wandb: notes its calls."""

    calls: ClassVar[list[tuple[Any, ...]]] = []
    failing = ""
    id = "run-1"
    info = types.SimpleNamespace(run_id="run-1")

    def __getattr__(self, name: str) -> Any:
        def call(*words: Any, **options: Any) -> Any:
            if name == self.failing:
                raise ConnectionError(f"no route to the server\nin {name}")
            FakeClient.calls.append((name, *words, options))
            return {"get_experiment_by_name": None, "create_experiment": "7", "create_run": self}.get(name)

        return call


def fake_clients(patch: pytest.MonkeyPatch, failing: str = "") -> list[tuple[Any, ...]]:
    """Puts modules in place of both clients; returns the calls that they will have got."""
    FakeClient.calls, FakeClient.failing = [], failing

    def record(*values: Any) -> tuple[Any, ...]:
        # Without the time of day.
        return values[:2] + values[3:]

    def init(**options: Any) -> FakeClient:
        FakeClient().init(**options)
        return FakeClient()

    modules = {
        "mlflow": {},
        "mlflow.entities": {"Metric": record, "Param": lambda *pair: pair},
        "mlflow.tracking": {"MlflowClient": FakeClient},
        "wandb": {"init": init},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        patch.setitem(sys.modules, name, module)
    return FakeClient.calls


def config_with(*trackers: Any) -> Config:
    config = Config()
    config.runtime.trackers = list(trackers)
    return config


def log(run: Path, config: Config) -> None:
    metrics = MetricsLogger(run, enabled=True, trackers=open_trackers(run, config))
    metrics.write("sbr", 3, loss=0.5)
    metrics.write("sbr", 4, split="valid", **{"ndcg@20": 0.25, "by": {"0": 1}})
    metrics.close()


def test_mlflow_gets_settings_and_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_clients(monkeypatch)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "shop")
    log(tmp_path, config_with("mlflow"))
    assert ("create_experiment", "shop", {}) in calls
    assert ("create_run", "7", {"run_name": tmp_path.name}) in calls
    batches = [call for call in calls if call[0] == "log_batch"]
    assert ("tables.dim", "128") in [pair for call in batches for pair in call[-1].get("params", [])]
    metrics = [record for call in batches for record in call[-1].get("metrics", [])]
    # The number of a record without its time.
    assert metrics == [("sbr/loss", 0.5, 3), ("sbr/valid/ndcg_at_20", 0.25, 4)]
    assert calls[-1] == ("set_terminated", "run-1", "FINISHED", {})
    # A resumed run goes on in the same run of the tracker.
    calls.clear()
    log(tmp_path, config_with("mlflow"))
    assert calls[0] == ("update_run", "run-1", {"status": "RUNNING"})
    assert "create_run" not in [call[0] for call in calls]


def test_wandb_gets_settings_and_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_clients(monkeypatch)
    log(tmp_path, config_with("wandb"))
    (_, first), *_ = calls
    assert (first["project"], first["id"], first["resume"], first["dir"]) == ("llmgr_rec", None, "allow", str(tmp_path))
    assert first["config"]["tables.dim"] == "128"
    assert ("define_metric", "sbr/*", {"step_metric": "sbr/step"}) in calls
    assert [call[1] for call in calls if call[0] == "log"] == [
        {"sbr/loss": 0.5, "sbr/step": 3},
        {"sbr/valid/ndcg@20": 0.25, "sbr/step": 4},
    ]
    assert calls[-1] == ("finish", {"exit_code": 0})
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "run-1"}
    calls.clear()
    log(tmp_path, config_with("wandb"))
    assert calls[0][1]["id"] == "run-1"


def test_the_id_of_a_remote_run_is_kept_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_clients(monkeypatch)
    run = as_path("memory://trackers/shop")
    for _ in range(2):
        open_trackers(run, config_with("wandb"))
    assert [call[1]["id"] for call in calls] == [None, "run-1"]
    assert [(call[1]["name"], call[1]["dir"]) for call in calls] == [("shop", None)] * 2


def test_a_tracker_that_fails_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = fake_clients(monkeypatch, failing="log")
    log(tmp_path, config_with("wandb"))
    assert "finish" not in [call[0] for call in calls]
    (warned,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert (
        warned
        == "wandb takes no more metrics (no route to the server); training goes on, and metrics.jsonl has them all"
    )
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_tracker_that_does_not_start_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_clients(monkeypatch, failing="create_run")
    with pytest.raises(UserError, match=r"^mlflow does not start \(no route to the server\); set its environment"):
        open_trackers(tmp_path, config_with("mlflow"))
    assert not (tmp_path / "trackers.json").exists()


def test_a_missing_client_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb, which is not installed; pip install 'llmgr-rec\[wandb\]'"):
        check_trackers(["wandb"])
    check_trackers([])


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="needs pip install 'mlflow-skinny>=3.17,<4'")
def test_mlflow_itself_keeps_what_it_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    (tmp_path / "run").mkdir()
    for _ in range(2):
        log(tmp_path / "run", config_with("mlflow"))
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    run = client.get_run(json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"])
    assert run.info.status == "FINISHED"
    assert run.data.params["tables.dim"] == "128"
    assert run.data.metrics == {"sbr/loss": 0.5, "sbr/valid/ndcg_at_20": 0.25}
    assert len(client.get_metric_history(run.info.run_id, "sbr/loss")) == 2
