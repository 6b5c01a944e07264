"""Reads Parquet files in blocks of bounded size, however large their row groups are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llmgr_rec.data.delimited_text import not_parquet
from llmgr_rec.errors import UserError

# Mean number of values of a column, and of bytes as they are encoded in the file, of a block.
_BLOCK_VALUES, _BLOCK_BYTES = 2**20, 2**26
# Bytes of a column that are read from the file at a time.
_READ_BYTES = 2**20


@dataclass(frozen=True)
class RowGroup:
    """Size of a row group.

    Args:
        rows: Number of rows.
        block_rows: Number of rows that are read at a time, a power of two.
    """

    rows: int
    block_rows: int


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


def open_parquet(path: Path) -> pq.ParquetFile:
    """Opens a file and reads its footer.

    Raises:
        UserError: The file is not a complete Parquet file; for a CSV, with the command that converts it.
    """
    try:
        return pq.ParquetFile(
            path,
            buffer_size=_READ_BYTES,
            page_checksum_verification=True,
            # In nanoseconds, times of Spark beyond the year 2262 become others without a word.
            coerce_int96_timestamp_unit="us",
        )
    except (pa.ArrowException, OSError) as error:
        raise not_parquet(path, "input", error) from None


def row_groups(metadata: pq.FileMetaData, columns: Sequence[str]) -> tuple[RowGroup, ...]:
    """Sizes of the row groups of a file.

    Args:
        metadata: Footer of the file.
        columns: Columns that are read.
    """
    leaves = [
        leaf
        for leaf in range(metadata.num_columns)
        if any(f"{metadata.schema.column(leaf).path}.".startswith(f"{column}.") for column in columns)
    ]
    return tuple(_row_group(metadata.row_group(number), leaves) for number in range(metadata.num_row_groups))


def _row_group(group: pq.RowGroupMetaData, leaves: Sequence[int]) -> RowGroup:
    chunks = [group.column(leaf) for leaf in leaves]
    blocks = max(
        1,
        sum(chunk.total_uncompressed_size for chunk in chunks) / _BLOCK_BYTES,
        *(chunk.num_values / _BLOCK_VALUES for chunk in chunks),
    )
    # Halves of a power of two start where blocks of that size start.
    return RowGroup(group.num_rows, 1 << max(0, int(group.num_rows / blocks).bit_length() - 1))


def read_blocks(path: Path, groups: Sequence[RowGroup], columns: Sequence[str], first_row: int = 0) -> Iterator[Block]:
    """Reads a file from the row group of a row on, in order. The blocks are the same from whichever row it is read.

    Args:
        path: Path of the file.
        groups: Sizes of all its row groups.
        columns: Columns to read.
        first_row: First row that is needed.

    Raises:
        UserError: The file is unreadable.
    """
    with open_parquet(path) as parquet:
        start = 0
        for number, group in enumerate(groups):
            if first_row < start + group.rows:
                for row, table in _read_group(path, parquet, number, group.block_rows, columns):
                    yield Block(start + row, number, table)
            start += group.rows


def _read_group(
    path: Path, parquet: pq.ParquetFile, number: int, block_rows: int, columns: Sequence[str]
) -> Iterator[tuple[int, pa.Table]]:
    done = 0
    while True:
        row = 0
        try:
            for batch in parquet.iter_batches(block_rows, [number], columns=list(columns), use_threads=False):
                if row + batch.num_rows > done:
                    table = pa.Table.from_batches([batch]).select(list(columns)).slice(max(0, done - row))
                    yield max(row, done), table
                    done = row + batch.num_rows
                row += batch.num_rows
            return
        except (pa.ArrowException, OSError) as error:
            # Arrow cannot read lists of text above 2 GiB at once.
            if isinstance(error, pa.ArrowNotImplementedError) and block_rows > 1:
                block_rows //= 2
                continue
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}, row group {number}: unreadable ({reason}); write it again") from None
