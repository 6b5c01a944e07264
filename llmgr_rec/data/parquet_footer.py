"""Reads what a Parquet file has from its footer, which may be damaged."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llmgr_rec.data.delimited_text import not_parquet
from llmgr_rec.remote_path import parquet_source


@dataclass(frozen=True)
class Footer:
    """What a file has, by its footer.

    Args:
        schema: Schema of the file.
        names: Names of its columns.
        group_rows: Number of rows of each row group.
    """

    schema: pa.Schema
    names: list[str]
    group_rows: tuple[int, ...]


def read_footer(path: Path, option: str) -> Footer:
    """Reads the footer of a file.

    Args:
        path: Path of the file.
        option: Command-line option that named the input, for messages.

    Raises:
        UserError: The file is not a complete Parquet file; for a CSV, with the command that converts it.
    """
    try:
        # In nanoseconds, times of Spark beyond the year 2262 become others without a word.
        with pq.ParquetFile(parquet_source(path), coerce_int96_timestamp_unit="us") as parquet:
            metadata, schema = parquet.metadata, parquet.schema_arrow
            # Not the sizes of its columns: pyarrow 26 ends the process where those of a damaged footer do not fit.
            rows = tuple(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))
            if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
                raise pa.ArrowInvalid(f"{metadata.num_rows} rows in row groups of {rows}")
            return Footer(schema, schema.names, rows)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise not_parquet(path, option, error) from None
