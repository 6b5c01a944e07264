"""The output folder of all programs in this package, which appears only when it is complete, and its two main files."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmgr_rec.errors import UserError
from llmgr_rec.files import atomic_folder, require_writable

if TYPE_CHECKING:
    import pyarrow as pa

ITEM_COLUMNS = ("item_id", "title", "category", "brand", "description")
ROW_GROUP_ROWS = 1 << 18

_log = logging.getLogger(__name__)


@contextmanager
def output_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder, which is renamed to `path` if the block succeeds and deleted if it fails.

    Args:
        path: Output folder. May exist if it is empty.

    Raises:
        UserError: `path` is a file or a folder that is not empty, or cannot be created.
    """
    final = Path(path)
    if final.exists() and not final.is_dir():
        raise UserError(f"--output {final} is a file; give a folder that does not exist")
    if final.is_dir() and any(final.iterdir()):
        raise UserError(f"--output {final} is not empty; give a new folder or delete this one first")
    require_writable(final.parent)
    with atomic_folder(final) as temporary:
        yield temporary


def describe_output(folder: str | Path) -> str:
    """Number of rows of each file of an output folder."""
    import pyarrow.parquet as pq

    files = sorted(Path(folder).glob("*.parquet"))
    return ", ".join(f"{file.name} with {pq.read_metadata(file).num_rows:,} rows" for file in files)


def interactions_schema() -> "pa.Schema":
    """Columns of interactions.parquet: user_id string, item_id string, timestamp int64."""
    import pyarrow as pa

    return pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64())])


def items_schema() -> "pa.Schema":
    """Columns of items.parquet: item_id, title, category, brand, description, all strings; null where unknown."""
    import pyarrow as pa

    return pa.schema([(name, pa.string()) for name in ITEM_COLUMNS])


def write_items(folder: Path, columns: dict[str, Any]) -> None:
    """Writes items.parquet from columns (lists or Arrow arrays of equal length); missing columns are null."""
    write_items_in_parts(folder, [columns])


def write_items_in_parts(folder: Path, parts: Iterable[dict[str, Any]]) -> None:
    """Writes items.parquet from columns of consecutive items; see `write_items`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, done = items_schema(), 0
    with pq.ParquetWriter(folder / "items.parquet", schema) as writer:
        for columns in parts:
            rows = len(columns["item_id"])
            arrays = [
                pa.array(columns[name], pa.string()) if name in columns else pa.nulls(rows, pa.string())
                for name in schema.names
            ]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            done += rows
    _log.info("items.parquet: %d items", done)
