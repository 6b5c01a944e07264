"""Ways to damage a copy of a prepared data set."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmgr_rec.checksums import file_checksum
from tests.data.prepare_inputs import edit_manifest

PART = "train/part-00000.parquet"


def rewrite(dataset: Path, name: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Changes a file of a data set and lets the manifest agree with it."""
    table = change(pq.read_table(dataset / name))
    pq.write_table(table, dataset / name)
    agree(dataset, name)


def agree(dataset: Path, name: str) -> None:
    file = dataset / name
    entry = {"bytes": file.stat().st_size, "checksum": file_checksum(file)}
    edit_manifest(dataset, lambda manifest: manifest["files"][name].update(entry))


def set_target(table: pa.Table, value: int) -> pa.Table:
    return table.set_column(2, table.schema.field("target"), pa.array([value, *table["target"].to_pylist()[1:]]))


def set_first_click(table: pa.Table, value: int) -> pa.Table:
    rows = table["items"].to_pylist()
    rows[0][0] = value
    return table.set_column(1, table.schema.field("items"), pa.array(rows, pa.list_(pa.int64())))


def without_text(table: pa.Table) -> pa.Table:
    for name in ("title", "category", "brand", "description"):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, pa.nulls(len(table), pa.string()))
    return table


def without_one_text(table: pa.Table) -> pa.Table:
    first = pc.equal(table["index"], 5)
    for name in ("title", "category"):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, pc.if_else(first, None, table[name]))
    return table


def truncate(dataset: Path) -> None:
    content = (dataset / PART).read_bytes()
    (dataset / PART).write_bytes(content[: len(content) // 2])


def truncate_silently(dataset: Path) -> None:
    truncate(dataset)
    agree(dataset, PART)


def no_text(dataset: Path) -> None:
    rewrite(dataset, "items.parquet", without_text)
    edit_manifest(dataset, lambda manifest: manifest.update(has_text=False))


def of_another_catalog(dataset: Path) -> None:
    def rename(table: pa.Table) -> pa.Table:
        return table.set_column(1, "item_id", pa.array([f"other{row}" for row in range(len(table))]))

    rewrite(dataset, "items.parquet", rename)


def no_sessions(dataset: Path) -> None:
    rewrite(dataset, PART, lambda table: table.slice(0, 0))
