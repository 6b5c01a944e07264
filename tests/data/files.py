"""Small part files and catalogs written by the contract, without prepare."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmgr_rec.data.schema import FEATURES, items_schema, sessions_schema

Session = tuple[list[int], int]


def random_sessions(count: int, num_items: int, max_length: int = 8, seed: int = 0) -> list[Session]:
    """Sessions of 1 to `max_length` clicks, each with its target."""
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(num_items, size=rng.integers(1, max_length + 1)).tolist(), int(rng.integers(num_items)))
        for _ in range(count)
    ]


def write_part(file: Path, sessions: Sequence[Session], row_group_size: int = 8, **options: object) -> Path:
    """Writes a part file of a split."""
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "session_id": pa.array([f"s{row}" for row in range(len(sessions))], pa.string()),
            "items": pa.array([items for items, _ in sessions], pa.list_(pa.int64())),
            "target": pa.array([target for _, target in sessions], pa.int64()),
        },
        schema=sessions_schema("hash"),
    )
    pq.write_table(table, file, row_group_size=row_group_size, **options)
    return file


def write_parts(folder: Path, sessions: Sequence[Session], sizes: Sequence[int], row_group_size: int = 8) -> list[Path]:
    """Writes sessions to part files of the given numbers of rows; the last file takes the rest."""
    ends = [*np.cumsum(sizes).tolist(), len(sessions)]
    starts = [0, *ends[:-1]]
    return [
        write_part(folder / f"part-{number:05d}.parquet", sessions[start:end], row_group_size)
        for number, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]


def prefix_examples(sessions: Sequence[Session]) -> list[Session]:
    """Every example that the rows stand for under prefix augmentation, in order."""
    examples: list[Session] = []
    for items, target in sessions:
        examples += [(items[:end], items[end]) for end in range(1, len(items))]
        examples.append((items, target))
    return examples


def items_table(num_items: int, **columns: Sequence[object] | pa.Array) -> pa.Table:
    """Content of items.parquet with the given columns and plain values in the others."""
    values: dict[str, object] = {
        "index": list(range(num_items)),
        "item_id": [f"id{index}" for index in range(num_items)],
        "title": [f"Title {index}" for index in range(num_items)],
        "category": [None] * num_items,
        "brand": [None] * num_items,
        "description": [None] * num_items,
        "train_count": list(range(num_items, 0, -1)),
        **{f"{name}_ids": [[]] * num_items for name in FEATURES},
        **columns,
    }
    ids = pa.array(values["item_id"])
    return pa.table(values, schema=items_schema(ids.type))


def write_items(folder: Path, num_items: int, **columns: Sequence[object] | pa.Array) -> Path:
    """Writes items.parquet and returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(items_table(num_items, **columns), folder / "items.parquet")
    return folder
