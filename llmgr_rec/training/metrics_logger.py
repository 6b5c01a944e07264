"""Metrics logger of a run: metrics.jsonl, TensorBoard events and trackers, written by rank 0."""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmgr_rec.errors import UserError
from llmgr_rec.files import atomic_write, draft_of, storage_errors
from llmgr_rec.log_format import log_metrics
from llmgr_rec.remote_path import RemotePath
from llmgr_rec.training.metric_writers import MetricWriter, TensorBoardWriter

logger = logging.getLogger(__name__)


class MetricsLogger:
    """Appends records to RUN/metrics.jsonl and hands their numbers to RUN/tensorboard and to trackers."""

    def __init__(self, run: Path, enabled: bool, trackers: Sequence[MetricWriter] = ()) -> None:
        """Opens the log.

        Args:
            run: Run folder.
            enabled: False on all ranks except 0, where every call does nothing.
            trackers: From `open_trackers`.
        """
        self._run = run
        self._folder = draft_of(run / "logs") if isinstance(run, RemotePath) else run
        self._path = self._folder / "metrics.jsonl"
        self._enabled = enabled
        if enabled:
            self._download()
        self._writers: list[MetricWriter] = [TensorBoardWriter(self._folder), *trackers] if enabled else []

    def write(self, stage: str, step: int, **values: Any) -> None:
        """Appends one record, with the time of day; its line is in the file when the call returns.

        Args:
            stage: Stage name.
            step: Steps done in the stage.
            **values: JSON values; `split` is part of the tags.

        Raises:
            UserError: The storage is full or fails; the file has whole lines only.
        """
        if not self._enabled:
            return
        record = {"stage": stage, "step": step, **values}
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._append(json.dumps({**record, "time": time}) + "\n")
        log_metrics(logger, record)
        prefix = "/".join(filter(None, (stage, str(values.get("split", "")))))
        numbers = {f"{prefix}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        for writer in self._writers:
            writer.write(stage, step, numbers)

    def _append(self, line: str) -> None:
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with storage_errors(self._path), self._path.open("a") as file:
                file.write(line)
        except UserError:
            if self._path.exists():
                os.truncate(self._path, size)
            raise

    def rewind(self, stage: str, step: int, validated: bool = True) -> None:
        """Deletes the records of a stage after a step, because a resumed run writes them again.

        Args:
            stage: Stage name.
            step: Last step whose records are kept.
            validated: Whether its validation is kept, too.
        """
        if not self._enabled or not self._path.exists():
            return
        lines = [
            line
            for line in self._path.read_text().splitlines()
            if (record := _parse(line)) and not (record["stage"] == stage and _is_later(record, step, validated))
        ]
        with atomic_write(self._path) as partial:
            partial.write_text("".join(f"{line}\n" for line in lines))

    def flush(self) -> None:
        """Writes the TensorBoard events so far to their file; uploads them and the records if the run is remote.

        Raises:
            UserError: The storage is full or fails.
        """
        for writer in self._writers:
            writer.flush()
        self._upload()

    def close(self, complete: bool = True) -> None:
        """Flushes TensorBoard events, and ends the runs of the trackers.

        Args:
            complete: Whether the run has trained all it should.

        Raises:
            UserError: The storage is full or fails.
        """
        for writer in self._writers:
            writer.close(complete)
        self._upload()
        if isinstance(self._run, RemotePath):
            shutil.rmtree(self._folder, ignore_errors=True)

    def _download(self) -> None:
        """Begins with the records of a remote run so far, because remote files cannot be appended to."""
        if isinstance(self._run, RemotePath):
            self._folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                self._path.write_bytes((self._run / self._path.name).read_bytes())

    def _upload(self) -> None:
        if not isinstance(self._run, RemotePath) or not self._enabled:
            return
        for file in self._folder.rglob("*"):
            if file.is_file():
                (self._run / file.relative_to(self._folder)).upload(file)


def _is_later(record: dict[str, Any], step: int, validated: bool) -> bool:
    repeated = record["step"] == step and not validated and record.get("split") == "valid"
    return record["step"] > step or repeated


def _parse(line: str) -> dict[str, Any] | None:
    # The last line of a killed run may be incomplete.
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
