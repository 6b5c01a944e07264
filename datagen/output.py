"""The two files every program here writes, and the folder that appears only when both are whole."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmgr_rec.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

ITEM_COLUMNS = ("item_id", "title", "category", "brand", "description")
ROW_GROUP_ROWS = 1 << 18

_log = logging.getLogger(__name__)


@contextmanager
def output_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path` that takes its name when the block ends well, and goes when it fails.

    Args:
        path: The folder to make. An empty folder may stand there already.

    Raises:
        UserError: `path` is a file, or a folder that holds something, or cannot be made.
    """
    final = Path(path)
    if final.exists() and not final.is_dir():
        raise UserError(f"--output {final} is a file; name a folder that does not exist yet")
    if final.is_dir() and any(final.iterdir()):
        raise UserError(f"--output {final} is not empty; name a new folder or delete this one first")
    temporary = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output {final} cannot be made: {error.strerror}; check the path and its rights") from None
    try:
        yield temporary
        os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def interactions_schema() -> "pa.Schema":
    """Columns of interactions.parquet: user_id string, item_id string, timestamp int64."""
    import pyarrow as pa

    return pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64())])


def items_schema() -> "pa.Schema":
    """Columns of items.parquet: item_id, title, category, brand, description, all strings; null where unknown."""
    import pyarrow as pa

    return pa.schema([(name, pa.string()) for name in ITEM_COLUMNS])


def write_items(folder: Path, columns: dict[str, Any]) -> None:
    """Writes items.parquet from columns (lists or Arrow arrays of equal length); a column not given is all null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = len(columns["item_id"])
    schema = items_schema()
    arrays = [
        pa.array(columns[name], pa.string()) if name in columns else pa.nulls(rows, pa.string())
        for name in schema.names
    ]
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), folder / "items.parquet")
    _log.info("items.parquet: %d items", rows)
