"""Edits of JSON files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHECKSUMS = {"checksum", "checksums", "tensor_checksums"}


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the content of a JSON file, as someone does who means it: with null for the checksum of the content."""
    values = json.loads(file.read_text())
    if "checksum" in values:
        values["checksum"] = None
    change(values)
    file.write_text(json.dumps(values))


def remove_checksums(value: Any) -> None:
    """Removes all checksums from a JSON value, as it was in version 0.2."""
    if isinstance(value, dict):
        for name in _CHECKSUMS & value.keys():
            del value[name]
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        remove_checksums(inner)
