"""Sessions to score, and readers of what was scored."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.small_run import small_run


def raw_sessions(count: int, seed: int = 0, longest: int = 9) -> list[list[str]]:
    """Sessions of raw ids: some empty, some with items that the catalog lacks, some of those alone."""
    rng = np.random.default_rng(seed)
    known = small_run().catalog.item_ids.to_pylist()
    sessions = []
    for number in range(count):
        session = [known[item] for item in rng.integers(len(known), size=rng.integers(0, longest + 1))]
        if number % 5 == 0:
            session.insert(len(session) // 2, f"new{number}")
        sessions.append(session)
    return sessions


def write_sessions(file: Path, sessions: Sequence[Any], row_group_size: int = 7, **columns: Any) -> Path:
    """Writes sessions with ids that tell file and row, and more columns by name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    table = {
        "session_id": [f"{file.stem}-{row}" for row in range(len(sessions))],
        "items": sessions if isinstance(sessions, pa.Array) else pa.array(sessions, pa.list_(pa.string())),
        **columns,
    }
    pq.write_table(pa.table(table), file, row_group_size=row_group_size)
    return file


def read_scores(folder: Path) -> list[dict[str, Any]]:
    """Rows of all parts in order."""
    return [row for part in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]


def all_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
