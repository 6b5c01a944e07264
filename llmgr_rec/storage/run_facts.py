"""What a run folder records of its training: recipe, data set, date, duration, machine, seed and version."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmgr_rec.errors import UserError
from llmgr_rec.remote_path import as_path

TRAINING_RECORD = "training.json"
# Type of each value of a launch.
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "started": str,
    "seconds": (int, float),
    "ended": bool,
    "stages": dict,
    "recipe": str,
    "seed": int,
    "version": str,
    "ranks": int,
    "machine": dict,
}
_MACHINE_FIELDS: dict[str, type | tuple[type, ...]] = {
    "processor": str,
    "cores": int,
    "memory_gib": (int, float),
    "device": str,
}


def read_launches(run: Path) -> list[dict[str, Any]]:
    """The launches of a run, oldest first; none for runs of version 0.2 and earlier, which did not record them.

    Args:
        run: Run folder.

    Raises:
        UserError: The file is damaged.
    """
    file = run / TRAINING_RECORD
    if not file.is_file():
        return []
    try:
        launches = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        launches = None
    if not isinstance(launches, list) or not all(map(_is_launch, launches)):
        raise UserError(f"{file} is damaged; delete it, it only says when and where the run was trained")
    return launches


def dataset_of_run(run: Path) -> Path | None:
    """The data set that a run was last trained on; None for a run that has not recorded it.

    Args:
        run: Run folder.

    Raises:
        UserError: The record is damaged.
    """
    recorded = [launch["dataset"] for launch in read_launches(run) if "dataset" in launch]
    return as_path(recorded[-1]) if recorded else None


def _is_launch(launch: object) -> bool:
    return _has_fields(launch, _FIELDS) and _has_fields(launch["machine"], _MACHINE_FIELDS)  # type: ignore[index]


def _has_fields(value: object, types: Mapping[str, type | tuple[type, ...]]) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in types.items())
