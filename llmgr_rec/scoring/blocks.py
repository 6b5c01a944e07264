"""Reads Parquet files in blocks of bounded size, however large their row groups are."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llmgr_rec.errors import UserError
from llmgr_rec.remote_path import STREAM_BYTES, RemotePath, parquet_source

# Rows that are decoded at a time, and decoded bytes of a block, unless those rows have more.
_BATCH_ROWS, _BLOCK_BYTES = 2**10, 2**26
# Bytes of a column that are read from the file at a time.
_READ_BYTES = 2**20


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a file.

    Args:
        first_row: First row in the file.
        group: Row group of the rows.
        table: The rows.
    """

    first_row: int
    group: int
    table: pa.Table

    @property
    def end(self) -> int:
        """Row in the file after the last one."""
        return self.first_row + self.table.num_rows


def _open(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(
        parquet_source(path),
        buffer_size=STREAM_BYTES if isinstance(path, RemotePath) else _READ_BYTES,
        page_checksum_verification=True,
        # In nanoseconds, times of Spark beyond the year 2262 become others without a word.
        coerce_int96_timestamp_unit="us",
    )


def read_blocks(path: Path, group_rows: Sequence[int], columns: Sequence[str], first_row: int = 0) -> Iterator[Block]:
    """Reads a file from the row group of a row on, in order. The blocks are the same from whichever row it is read.

    Args:
        path: Path of the file.
        group_rows: Number of rows of each of its row groups.
        columns: Columns to read.
        first_row: First row that is needed.

    Raises:
        UserError: The file is unreadable.
    """
    start = 0
    for number, rows in enumerate(group_rows):
        if first_row < start + rows:
            row = start
            for table in _joined(_read_group(path, number, list(columns))):
                yield Block(row, number, table)
                row += table.num_rows
            if row != start + rows:
                raise UserError(
                    f"{path}, row group {number}: has {row - start} rows, but {rows} by its footer; write it again"
                )
        start += rows


def _joined(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Joins consecutive tables up to the size of a block."""
    pending: list[pa.Table] = []
    size = 0
    for table in tables:
        if pending and size + table.nbytes > _BLOCK_BYTES:
            yield pa.concat_tables(pending)
            pending, size = [], 0
        pending.append(table)
        size += table.nbytes
    if pending:
        yield pa.concat_tables(pending)


def _read_group(path: Path, number: int, columns: list[str]) -> Iterator[pa.Table]:
    """Tables of a row group, from batches of half as many rows each time that Arrow cannot read one, down to one row.

    Raises:
        UserError: The row group is unreadable, also row by row.
    """
    batch_rows, done = _BATCH_ROWS, 0
    while True:
        row = 0
        try:
            with _open(path) as parquet:
                for batch in parquet.iter_batches(batch_rows, [number], columns=columns, use_threads=False):
                    table = pa.Table.from_batches([batch]).select(columns)
                    row += batch.num_rows
                    if row > done:
                        yield table.slice(max(0, table.num_rows - (row - done)))
                        done = row
            return
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if batch_rows == 1 or not isinstance(error, pa.ArrowNotImplementedError):
                reason = str(error).splitlines()[0]
                raise UserError(f"{path}, row group {number}: unreadable ({reason}); write it again") from None
            # Arrow cannot read lists of text above 2 GiB at once.
            batch_rows //= 2
