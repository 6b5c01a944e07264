"""Small texts in the real formats of the dumps."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

FLAGS_100K = 19


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    """Writes text, gzipped where the name ends in .gz, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def json_lines(records: list[dict[str, Any]]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(record) + "\n" for record in records)


def interactions(folder: Path) -> list[tuple[str, str, int]]:
    """Rows of interactions.parquet, after a look at its types."""
    table = pq.read_table(folder / "interactions.parquet")
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("user_id", "string"),
        ("item_id", "string"),
        ("timestamp", "int64"),
    ]
    return list(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))


def items(folder: Path) -> list[dict[str, Any]]:
    """Rows of items.parquet, after a look at its types."""
    table = pq.read_table(folder / "items.parquet")
    assert table.column_names == ["item_id", "title", "category", "brand", "description"]
    assert {str(field.type) for field in table.schema} == {"string"}
    return table.to_pylist()


def leftovers(folder: Path, *expected: str) -> list[str]:
    """Names in a folder that are not expected there."""
    return sorted(path.name for path in folder.iterdir() if path.name not in expected)
