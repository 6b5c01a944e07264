"""Writes the rows of a split to part files with row groups of equal size."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llmgr_rec.checksums import file_checksum
from llmgr_rec.data.dataset import FileEntry
from llmgr_rec.data.schema import PART_ROWS, ROW_GROUP_ROWS


class PartWriter:
    """Writes part-00000.parquet, part-00001.parquet and so on; at least one part, empty if there are no rows.

    Args:
        folder: Folder of the split; created here.
        schema: Schema of the parts.
    """

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        folder.mkdir()
        self._folder = folder
        self._schema = schema
        self._pending: list[pa.RecordBatch] = []
        self._pending_rows = 0
        self._part_rows = 0
        self._part = self._open(0)
        self._parts = 1
        self.num_rows = 0
        self.num_clicks = 0

    def write(self, columns: list[pa.Array]) -> None:
        """Appends rows.

        Args:
            columns: Arrays in the order of the schema.
        """
        self._pending.append(pa.record_batch(columns, schema=self._schema))
        self._pending_rows += len(columns[0])
        self.num_rows += len(columns[0])
        self.num_clicks += len(columns[1].values)
        if self._pending_rows >= ROW_GROUP_ROWS:
            self._flush(self._pending_rows - self._pending_rows % ROW_GROUP_ROWS)

    def close(self) -> None:
        """Writes the pending rows and closes the last part."""
        self._flush(self._pending_rows)
        self._part.close()

    def _flush(self, rows: int) -> None:
        table = pa.Table.from_batches(self._pending, self._schema).combine_chunks()
        for first in range(0, rows, ROW_GROUP_ROWS):
            if self._part_rows >= PART_ROWS:
                self._part.close()
                self._part = self._open(self._parts)
                self._parts += 1
                self._part_rows = 0
            group = table.slice(first, min(ROW_GROUP_ROWS, rows - first))
            self._part.write_table(group, row_group_size=ROW_GROUP_ROWS)
            self._part_rows += group.num_rows
        self._pending = table.slice(rows).to_batches()
        self._pending_rows -= rows

    def _open(self, number: int) -> pq.ParquetWriter:
        return pq.ParquetWriter(self._folder / f"part-{number:05d}.parquet", self._schema, compression="zstd")


def describe_file(path: Path) -> FileEntry:
    """Number of rows, size, SHA-256 hash and checksum of a Parquet file.

    Args:
        path: Path of the file.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(pq.read_metadata(path).num_rows, path.stat().st_size, digest, file_checksum(path))
