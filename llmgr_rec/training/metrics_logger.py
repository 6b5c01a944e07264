"""Metrics logger of a run: metrics.jsonl and TensorBoard events, written by rank 0."""

import json
import os
from pathlib import Path
from typing import Any

from llmgr_rec.errors import UserError
from llmgr_rec.files import atomic_write, storage_errors


class MetricsLogger:
    """Appends records to RUN/metrics.jsonl and writes their numbers to RUN/tensorboard."""

    def __init__(self, run: Path, enabled: bool) -> None:
        """Opens the log.

        Args:
            run: Run folder.
            enabled: False on all ranks except 0, where every call does nothing.
        """
        self._path = run / "metrics.jsonl"
        self._events = run / "tensorboard"
        self._enabled = enabled
        self._writer: Any = None
        if enabled:
            from torch.utils.tensorboard import SummaryWriter

            with storage_errors(self._events):
                self._writer = SummaryWriter(str(self._events))

    def write(self, stage: str, step: int, **values: Any) -> None:
        """Appends one record; its line is in the file when the call returns.

        Args:
            stage: Stage name.
            step: Steps done in the stage.
            **values: JSON values; `split` is part of the TensorBoard tag.

        Raises:
            UserError: The storage is full or fails; the file has whole lines only.
        """
        if not self._enabled:
            return
        self._append(json.dumps({"stage": stage, "step": step, **values}) + "\n")
        prefix = "/".join(str(values[key]) for key in ("split",) if key in values)
        with storage_errors(self._events):
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar("/".join(filter(None, (stage, prefix, name))), value, step)

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
        """Writes the TensorBoard events so far to their file.

        Raises:
            UserError: The storage is full or fails.
        """
        if self._writer is not None:
            with storage_errors(self._events):
                self._writer.flush()

    def close(self) -> None:
        """Flushes TensorBoard events.

        Raises:
            UserError: The storage is full or fails.
        """
        if self._writer is not None:
            with storage_errors(self._events):
                self._writer.close()


def _is_later(record: dict[str, Any], step: int, validated: bool) -> bool:
    repeated = record["step"] == step and not validated and record.get("split") == "valid"
    return record["step"] > step or repeated


def _parse(line: str) -> dict[str, Any] | None:
    # The last line of a killed run may be incomplete.
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
