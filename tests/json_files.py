"""Edits of JSON files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the content of a JSON file, as someone does who means it: without the checksum of the former content."""
    values = json.loads(file.read_text())
    values.pop("checksum", None)
    change(values)
    file.write_text(json.dumps(values))
