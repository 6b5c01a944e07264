"""Where metrics go beside metrics.jsonl: TensorBoard files, and experiment trackers through their own clients.

A tracker reads its address and its credentials from its own environment variables, so no setting of a run holds them.
"""

import importlib.util
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from llmgr_rec.config import Config
from llmgr_rec.errors import UserError
from llmgr_rec.files import atomic_write, storage_errors
from llmgr_rec.remote_path import RemotePath

logger = logging.getLogger(__name__)

# Ids of a run at the trackers, with which a resumed run goes on.
TRACKED = "trackers.json"
# Name of the experiment (MLflow) or project (Weights & Biases) where the environment names none.
_EXPERIMENT = "llmgr_rec"
_MAX_PARAM_CHARACTERS = 500


class MetricWriter(Protocol):
    """Takes the numbers of the records of a run, on rank 0."""

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers by tag, such as `sbr/valid/ndcg@20`."""

    def flush(self) -> None:
        """Makes what was written outlive a kill, where that depends on this process."""

    def close(self, complete: bool) -> None:
        """Ends the run.

        Args:
            complete: Whether it has trained all it should.
        """


class TensorBoardWriter:
    """Writes RUN/tensorboard.

    Args:
        run: Run folder.
    """

    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._events = run / "tensorboard"
        with storage_errors(self._events):
            self._writer = SummaryWriter(str(self._events))

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Adds one scalar for each value."""
        with storage_errors(self._events):
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)

    def flush(self) -> None:
        """Writes the events so far to their file."""
        with storage_errors(self._events):
            self._writer.flush()

    def close(self, complete: bool) -> None:
        """Writes and closes the file."""
        with storage_errors(self._events):
            self._writer.close()


class MLflowWriter:
    """Writes a run of MLflow, at MLFLOW_TRACKING_URI, in the experiment MLFLOW_EXPERIMENT_NAME.

    Args:
        name: Name of the run.
        tracked: Id of the run that is continued; empty for a new one.
        parameters: Settings by dotted name.
    """

    def __init__(self, name: str, tracked: str, parameters: Mapping[str, str]) -> None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        self.id = tracked
        if self.id:
            self._client.update_run(self.id, status="RUNNING")
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _EXPERIMENT
        found = self._client.get_experiment_by_name(experiment)
        run = self._client.create_run(
            found.experiment_id if found else self._client.create_experiment(experiment), run_name=name
        )
        self.id = run.info.run_id
        params = [Param(key, value[:_MAX_PARAM_CHARACTERS]) for key, value in parameters.items()]
        # As many as a call may have.
        for first in range(0, len(params), 100):
            self._client.log_batch(self.id, params=params[first : first + 100])

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Writes values under their tags, with `_at_` for @, which MLflow does not allow."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(tag.replace("@", "_at_"), float(value), now, step) for tag, value in values.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def flush(self) -> None:
        """Nothing: each call has written."""

    def close(self, complete: bool) -> None:
        """Sets the status of the run."""
        self._client.set_terminated(self.id, "FINISHED" if complete else "KILLED")


class WandbWriter:
    """Writes a run of Weights & Biases, in the project WANDB_PROJECT.

    Args:
        name: Name of the run.
        tracked: Id of the run that is continued; empty for a new one.
        parameters: Settings by dotted name.
        folder: Where the client keeps its files; None leaves it to the client.
    """

    def __init__(self, name: str, tracked: str, parameters: Mapping[str, str], folder: Path | None) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _EXPERIMENT,
            id=tracked or None,
            resume="allow",
            name=name,
            config=dict(parameters),
            dir=str(folder) if folder else None,
        )
        self.id = str(self._run.id)
        self._stages: set[str] = set()

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Writes values under their tags; `STAGE/step` is their axis, because each stage counts its own steps."""
        if stage not in self._stages:
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        self._run.log({**values, f"{stage}/step": step})

    def flush(self) -> None:
        """Nothing: a process of the client has what was written."""

    def close(self, complete: bool) -> None:
        """Ends the run."""
        self._run.finish(exit_code=0 if complete else 1)


class _Forgiving:
    """A tracker whose failures end the tracking, not the training."""

    def __init__(self, name: str, writer: MetricWriter) -> None:
        self._name, self._writer = name, writer
        self._failed = False

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self._try(lambda: self._writer.write(stage, step, values))

    def flush(self) -> None:
        self._try(self._writer.flush)

    def close(self, complete: bool) -> None:
        self._try(lambda: self._writer.close(complete))

    def _try(self, work: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            work()
        except Exception as error:
            self._failed = True
            logger.warning(
                "%s takes no more metrics (%s); training goes on, and metrics.jsonl has them all",
                self._name,
                _first_line(error),
            )


def check_trackers(names: Sequence[str]) -> None:
    """Checks that the clients of trackers are installed.

    Args:
        names: Trackers, as in `runtime.trackers`.

    Raises:
        UserError: A package is missing; names the command that installs it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"setting runtime.trackers names {name}, which is not installed; pip install 'llmgr-rec[{name}]'"
            )


def open_trackers(run: Path, config: Config) -> list[MetricWriter]:
    """Starts the runs of all trackers, or continues those that the run folder has ids of. Only rank 0 calls this.

    Args:
        run: Run folder.
        config: All settings; `runtime.trackers` names the trackers.

    Raises:
        UserError: A tracker cannot be reached or refuses the run.
    """
    file = run / TRACKED
    ids = json.loads(file.read_text()) if file.is_file() else {}
    parameters = dict(_flat(asdict(config)))
    name = run.resolve().name
    # A client keeps its files on a local disk.
    local = None if isinstance(run, RemotePath) else run
    writers: list[MetricWriter] = []
    for tracker in config.runtime.trackers:
        try:
            writer: MLflowWriter | WandbWriter = (
                MLflowWriter(name, ids.get(tracker, ""), parameters)
                if tracker == "mlflow"
                else WandbWriter(name, ids.get(tracker, ""), parameters, local)
            )
        except Exception as error:
            raise UserError(
                f"{tracker} does not start ({_first_line(error)}); set its environment variables, or leave it out of "
                "runtime.trackers"
            ) from error
        ids[tracker] = writer.id
        writers.append(_Forgiving(tracker, writer))
    if writers:
        with atomic_write(file) as partial:
            partial.write_text(json.dumps(ids) + "\n")
    return writers


def _flat(values: Mapping[str, Any], prefix: str = "") -> "list[tuple[str, str]]":
    """Nested settings by dotted name."""
    found = []
    for name, value in values.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", str(value))]
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
