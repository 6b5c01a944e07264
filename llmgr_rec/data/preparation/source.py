"""Input files. Columns and types are checked by the Parquet footers, before rows are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmgr_rec.errors import UserError

Kind = Literal["id", "time", "text", "id_list"]
# Columns that DuckDB adds.
_RESERVED = {"file_row_number", "file_index"}
_EXPECTED_TYPES = {
    "id": "string or int64",
    "time": "int64 or a timestamp",
    "text": "string",
    "id_list": "a list of string or int64",
}


@dataclass(frozen=True)
class Source:
    """One or more Parquet files read as one table, in the order of their names.

    Args:
        files: The files.
        types: Type of each column present: string, int64, timestamp or date; for a list, of its elements.
        first_rows: Row number in the table of the first row of each file.
        row_groups: Number of rows of each row group of each file.
    """

    files: tuple[Path, ...]
    types: dict[str, str]
    first_rows: tuple[int, ...]
    row_groups: tuple[tuple[int, ...], ...]

    @property
    def num_rows(self) -> int:
        """Number of rows of all files."""
        return sum(sum(groups) for groups in self.row_groups)

    def locate(self, row: int) -> str:
        """Location of a row for an error message: file, row group and row within the file.

        Args:
            row: Row number in the table.
        """
        file = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        in_file = row - self.first_rows[file]
        group = int(np.searchsorted(np.cumsum(self.row_groups[file]), in_file, side="right"))
        return f"{self.files[file]}, row group {group}, row {in_file}"

    def sql(self) -> str:
        """A DuckDB table expression of the checked columns and `source_row`, the row number in the table."""
        # DuckDB reads each name as a glob pattern; brackets escape its special characters.
        names = ("".join(f"[{c}]" if c in "*?[" else c for c in str(file)) for file in self.files)
        quoted = ", ".join("'" + name.replace("'", "''") + "'" for name in names)
        starts = ", ".join(f"{row}::BIGINT" for row in self.first_rows)
        columns = ", ".join(map(quote, self.types))
        # A folder named category=Tea is not a partition. Files may have different integer widths and time units.
        options = "file_row_number=true, hive_partitioning=false, union_by_name=true"
        return (
            f"(SELECT {columns}, file_row_number + list_extract([{starts}], (file_index + 1)::BIGINT) AS source_row "
            f"FROM read_parquet([{quoted}], {options}))"
        )


def quote(name: str) -> str:
    """A column name as a DuckDB identifier.

    Args:
        name: Column name.
    """
    return '"' + name.replace('"', '""') + '"'


def open_source(path: str, option: str, required: dict[str, Kind], optional: dict[str, Kind]) -> Source:
    """Finds the files of an input and checks that each is a Parquet file with the right columns.

    Args:
        path: Parquet file, or folder of *.parquet files.
        option: Command-line option that named the path, for messages.
        required: Kind of each required column.
        optional: Kind of each optional column.

    Raises:
        UserError: A file is missing or unreadable, or a column is missing or has the wrong type.
    """
    files = _find(Path(path), option)
    first_rows, row_groups, types = [], [], dict[str, str]()
    rows = 0
    for position, file in enumerate(files):
        parquet = _open(file, option)
        found = _column_types(file, parquet.schema_arrow, required, optional)
        if position and found != types:
            name = next(name for name in {**types, **found} if types.get(name) != found.get(name))
            raise UserError(
                f"{file}: column {name} is {found.get(name, 'missing')}, "
                f"but {types.get(name, 'missing')} in {files[0]}; write all files with the same columns and types"
            )
        types = found
        groups = tuple(parquet.metadata.row_group(g).num_rows for g in range(parquet.metadata.num_row_groups))
        first_rows.append(rows)
        row_groups.append(groups)
        rows += sum(groups)
    if rows == 0:
        raise UserError(f"{path} (--{option}) has no rows; give a file with at least one")
    return Source(tuple(files), types, tuple(first_rows), tuple(row_groups))


def _find(path: Path, option: str) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give a Parquet file or a folder of them to --{option}")
    files = sorted(file for file in path.glob("*.parquet") if file.is_file() and file.name[0] not in "._")
    if not files:
        raise UserError(f"folder {path} has no *.parquet file; give another one to --{option}")
    return files


def _open(file: Path, option: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"{file} (--{option}) is not a complete Parquet file ({reason}); write or download it again"
        ) from None


def _column_types(
    file: Path, schema: pa.Schema, required: dict[str, Kind], optional: dict[str, Kind]
) -> dict[str, str]:
    types = {}
    for name in _RESERVED & set(schema.names):
        raise UserError(f"{file}: the name of column {name} is reserved; rename the column")
    for name, kind in {**required, **optional}.items():
        indices = schema.get_all_field_indices(name)
        if len(indices) > 1:
            raise UserError(f"{file}: column {name} occurs {len(indices)} times; keep one of them")
        if not indices:
            if name in optional:
                continue
            raise UserError(f"{file}: column {name} is missing (it has {', '.join(schema.names)}); add or rename it")
        if alike := [other for other in schema.names if other != name and other.casefold() == name.casefold()]:
            raise UserError(f"{file}: columns {name} and {alike[0]} differ only in case; rename or drop one of them")
        found = schema.field(indices[0]).type
        common = _common_type(found, kind)
        if common is None:
            raise UserError(f"{file}: column {name} is {found}, but must be {_EXPECTED_TYPES[kind]}; cast it")
        types[name] = common
    return types


def _common_type(found: pa.DataType, kind: Kind) -> str | None:
    """Type of a column of a given kind: string, int64, timestamp or date; None if the type is not allowed."""
    if kind == "id_list":
        is_list = pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found)
        return _common_type(found.value_type, "id") if is_list else None
    if pa.types.is_dictionary(found):
        found = found.value_type
    if pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_string_view(found):
        return "string" if kind in ("id", "text") else None
    # Some writers give a text column without any value the type null.
    if pa.types.is_null(found):
        return "string" if kind == "text" else None
    if pa.types.is_integer(found) and found != pa.uint64():
        return "int64" if kind in ("id", "time") else None
    if kind == "time" and pa.types.is_timestamp(found):
        return "timestamp"
    return "date" if kind == "time" and pa.types.is_date(found) else None
