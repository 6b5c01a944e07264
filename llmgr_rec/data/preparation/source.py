"""Input files. Columns and types are checked by the Parquet footers, before rows are read."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Literal, cast

import numpy as np
import pyarrow as pa

from llmgr_rec.data.item_ids import LARGEST_EXACT_FLOAT, LARGEST_EXACT_FLOAT32, plain_id_sql
from llmgr_rec.data.parquet_files import ParquetFile, list_parquet_files
from llmgr_rec.data.parquet_footer import read_footer
from llmgr_rec.data.preparation.database import Database, identifier, literal
from llmgr_rec.data.preparation.domain_inputs import paths_by_domain
from llmgr_rec.data.schema import DOMAIN_SEPARATOR, has_item_indices
from llmgr_rec.errors import UserError, did_you_mean
from llmgr_rec.remote_path import as_path

Kind = Literal["id", "time", "text", "id_list"]
# Columns that DuckDB adds to those of a file, in any case, and the column that `Source.sql` adds.
_RESERVED = {"file_row_number", "file_index"}
_SOURCE_ROW = "source_row"
_EXPECTED_TYPES = {
    "id": "string, int64 or whole floats",
    "time": "int64, float or a timestamp",
    "text": "string",
    "id_list": "a list of string, int64 or whole floats",
}
# From this number on, an integer may stand for others, by type.
_EXACT = {"float": LARGEST_EXACT_FLOAT, "float32": LARGEST_EXACT_FLOAT32}
# Type of a column that a file does not have, and the name of its folder has.
_FROM_FOLDER = "from the folder name"
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_SQL_TYPES = {"string": "VARCHAR", "int64": "BIGINT", "float": "DOUBLE"}


@dataclass(frozen=True)
class Source:
    """One or more Parquet files read as one table, in the order of their names.

    Args:
        files: The files.
        types: Type that each column present is read as: string, int64, float, timestamp or date; for a list, that of
            its elements. Ids are string or int64.
        first_rows: Row number in the table of the first row of each file.
        row_groups: Number of rows of each row group of each file.
        partitions: Value in each file of the columns that come from folder names such as `dt=2026-11-01`.
        description: Which files were read and which were skipped; empty for a single file.
        stored: Type of each column in each file.
        kinds: Kind of each column.
        domains: Name of the domain of each file, by which its ids begin; empty if the files are not of domains.
        names: Name in the files of the columns that have another one there.
    """

    files: tuple[Path, ...]
    types: dict[str, str]
    first_rows: tuple[int, ...]
    row_groups: tuple[tuple[int, ...], ...]
    partitions: dict[str, tuple[str | None, ...]]
    description: str
    stored: tuple[dict[str, str], ...]
    kinds: dict[str, Kind]
    domains: tuple[str, ...] = ()
    names: dict[str, str] = field(default_factory=dict)

    @property
    def float_ids(self) -> list[str]:
        """Columns of ids that are floats in a file. `sql` has a column `inexact(NAME)` for each."""
        return [
            name
            for name in self.types
            if self.kinds[name] in ("id", "id_list") and any(types[name] in _EXACT for types in self.stored)
        ]

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

    def sql(self, database: Database) -> str:
        """SQL of a table of the checked columns and `source_row`, the row number in the table.

        Ids have the type in `types`, those that are whole floats as integers (`12.0` is 12, also in text), after the
        name of their domain, if there is one; NaN and infinity are null. A float that is no exact integer is true in
        the column `inexact(NAME)`.

        Args:
            database: Database that reads the files.
        """
        # Not one query for all files, where DuckDB would cast integers to floats if another file has floats.
        groups: dict[tuple[str, tuple[tuple[str, str], ...]], list[int]] = {}
        for place, stored in enumerate(self.stored):
            groups.setdefault((self._domain(place), tuple(stored.items())), []).append(place)
        return "(" + " UNION ALL ".join(self._files_sql(database, places) for places in groups.values()) + ")"

    def _domain(self, place: int) -> str:
        return self.domains[place] if self.domains else ""

    def _files_sql(self, database: Database, places: list[int]) -> str:
        """SQL of some of the files, which store all columns as the same types and are of the same domain."""
        stored = self.stored[places[0]]
        starts = ", ".join(f"{self.first_rows[place]}::BIGINT" for place in places)
        columns = [
            f"{self._column_sql(database, name, stored.get(name), places)} AS {identifier(name)}" for name in self.types
        ]
        columns += [f"{self._inexact_sql(name, stored.get(name))} AS {inexact(name)}" for name in self.float_ids]
        files = database.parquet(
            [self.files[place] for place in places],
            [self.names.get(name, name) for name in stored if name not in self.partitions],
        )
        row = f"file_row_number + list_extract([{starts}], (file_index + 1)::BIGINT)"
        return f"SELECT {', '.join(columns)}, {row} AS {_SOURCE_ROW} FROM {files}"

    def _column_sql(self, database: Database, name: str, stored: str | None, places: list[int]) -> str:
        target = self.types[name]
        if stored is None:
            return f"CAST(NULL AS {_SQL_TYPES[target]})"
        if name in self.partitions:
            values = [self.partitions[name][place] for place in places]
            texts = ", ".join("NULL" if value is None else literal(value) for value in values)
            text = f"list_extract([{texts}]::VARCHAR[], (file_index + 1)::BIGINT)"
            return database.date(text) if target == "date" else f"CAST({text} AS {_SQL_TYPES[target]})"
        column = self._identifier(name)
        if self.kinds[name] == "id":
            return self._in_domain(_id_sql(column, stored, target), places)
        if self.kinds[name] == "id_list":
            return f"list_transform({column}, lambda x: {self._in_domain(_id_sql('x', stored, target), places)})"
        if target == "float":
            return f"CASE WHEN isfinite({column}) THEN CAST({column} AS DOUBLE) END"
        return column

    def _identifier(self, name: str) -> str:
        """SQL of a column of the files."""
        return identifier(self.names.get(name, name))

    def _in_domain(self, value: str, places: list[int]) -> str:
        """SQL of an id after the name of the domain of its file; an empty id stays empty, and a null null."""
        domain = self._domain(places[0])
        if not domain:
            return value
        return f"CASE WHEN {value} = '' THEN '' ELSE {literal(domain + DOMAIN_SEPARATOR)} || {value} END"

    def _inexact_sql(self, name: str, stored: str | None) -> str:
        if stored not in _EXACT:
            return "false"
        # Not isnan, which DuckDB takes for false where the statistics of a file have a minimum and a maximum.
        wrong = f"isfinite({{0}}) AND ({{0}} <> floor({{0}}) OR abs({{0}}) >= {_EXACT[stored]})"
        if self.kinds[name] == "id":
            return f"coalesce({wrong.format(self._identifier(name))}, false)"
        return (
            f"coalesce(array_length(list_filter({self._identifier(name)}, lambda x: {wrong.format('x')})) > 0, false)"
        )


def _id_sql(value: str, stored: str, target: str) -> str:
    """SQL of an id in the type `target`."""
    if stored == "string":
        return plain_id_sql(f"CAST({value} AS VARCHAR)")
    number = f"TRY_CAST({value} AS BIGINT)" if stored in _EXACT else f"CAST({value} AS BIGINT)"
    return f"CAST({number} AS VARCHAR)" if target == "string" else number


def inexact(name: str) -> str:
    """The column of `Source.sql` that says whether an id of column `name` is a float but no exact integer, quoted.

    Args:
        name: Column name.
    """
    return identifier(f"inexact({name})")


def open_source(
    value: str, option: str, required: dict[str, Kind], optional: dict[str, Kind], names: dict[str, str]
) -> Source:
    """Finds the files of an input and checks that each is a Parquet file with the right columns.

    A column that no file has may come from the names of folders, `dt=2026-11-01`. Files without rows may have any
    columns. Ids may be strings in one file, integers or whole floats in another.

    Args:
        value: Parquet file, or folder of Parquet files at any depth; or one of each domain, see `paths_by_domain`.
            Files of a domain may lack an optional text that those of another have.
        option: Command-line option that named the path, for messages.
        required: Kind of each required column.
        optional: Kind of each optional column.
        names: Name in the files of the columns that have another one there. A log without `user_id` may have
            `session_id`.

    Raises:
        UserError: A file is missing or unreadable, or a column is missing or has the wrong type.
    """
    paths = paths_by_domain(value, option)
    listings = {domain: list_parquet_files(as_path(path), option) for domain, path in paths.items()}
    files: list[ParquetFile] = []
    domains: list[str] = []
    first_rows, row_groups, stored = [], [], list[dict[str, str]]()
    types: dict[str, str] = {}
    kinds = {**required, **optional}
    rows = 0
    for domain, file in ((domain, file) for domain, listing in listings.items() for file in listing.files):
        footer = read_footer(file.path, option)
        if "items" in required and has_item_indices(footer.schema):
            raise UserError(
                f"{file.path} is a split of a prepared data set, whose items are indices; give the log or the sessions "
                "from which it was prepared"
            )
        # Some writers give the columns of a file without rows no types.
        if not sum(footer.group_rows):
            continue
        if not files:
            names = _with_session_id(names, required, {*footer.schema.names, *file.partitions})
        found = _column_types(file, option, footer.schema, required, optional, names)
        types = _types_of_both(types, found, kinds, bool(domain), (files[0].path, file.path)) if files else dict(found)
        files.append(file)
        domains.append(domain)
        stored.append(found)
        first_rows.append(rows)
        row_groups.append(footer.group_rows)
        rows += sum(footer.group_rows)
    if rows == 0:
        raise UserError(f"{value} (--{option}) has no rows; give a file with at least one")
    partitions = {
        name: tuple(file.partitions[names.get(name, name)] for file in files)
        for name, found in types.items()
        if found == _FROM_FOLDER
    }
    types |= {name: _partition_type(name, values, kinds[name], value) for name, values in partitions.items()}
    for name, found_type in types.items():
        if found_type in _EXACT:
            types[name] = "float" if kinds[name] == "time" else "int64"
    in_domains = "" not in paths
    if in_domains:
        types |= {name: "string" for name in types if kinds[name] in ("id", "id_list")}
    return Source(
        files=tuple(file.path for file in files),
        types=types,
        first_rows=tuple(first_rows),
        row_groups=tuple(row_groups),
        partitions=partitions,
        description="; ".join(
            f"{domain}: {listing.describe()}" if domain else listing.describe()
            for domain, listing in listings.items()
            if as_path(paths[domain]).is_dir()
        ),
        stored=tuple(stored),
        kinds={name: kinds[name] for name in types},
        domains=tuple(domains) if in_domains else (),
        names=names,
    )


def _with_session_id(names: dict[str, str], required: dict[str, Kind], columns: set[str]) -> dict[str, str]:
    """The names of columns, where a log that has sessions and no users names them session_id."""
    if "user_id" in required and "user_id" not in {*names, *columns} and "session_id" in columns:
        return {**names, "user_id": "session_id"}
    return names


def _types_of_both(
    types: dict[str, str], found: dict[str, str], kinds: dict[str, Kind], in_domains: bool, files: tuple[Path, Path]
) -> dict[str, str]:
    """Types of the columns of the files so far, the first of which is named for messages, and of one more file."""
    unified = {name: _unify(types.get(name), found.get(name), kinds[name], in_domains) for name in {**types, **found}}
    for name, common in unified.items():
        if common is None:
            raise UserError(
                f"{files[1]}: column {name} is {found.get(name, 'missing')}, but {types.get(name, 'missing')} in "
                f"{files[0]}; write all files with the same columns and types"
            )
    return cast("dict[str, str]", unified)


def _unify(first: str | None, second: str | None, kind: Kind, in_domains: bool) -> str | None:
    """Type of a column that two files store as different types; None if it is missing in one or cannot be unified."""
    both = {first, second}
    if len(both) == 1:
        return first
    # A text that the items of one domain have, and those of another do not.
    if in_domains and both == {None, "string"}:
        return "string"
    if both <= {"timestamp", "date"}:
        return "timestamp"
    if kind != "text" and both <= {"int64", *_EXACT}:
        return "float"
    return "string" if kind in ("id", "id_list") and both <= {"string", "int64", *_EXACT} else None


def _partition_type(name: str, values: Sequence[str | None], kind: Kind, path: str) -> str:
    """Type of a column whose values are parts of folder names."""
    known = [value for value in values if value is not None]
    if kind == "text":
        return "string"
    if all(_INTEGER.fullmatch(value) for value in known):
        return "int64"
    if kind == "id":
        return "string"
    wrong = [value for value in known if not _is_date(value)]
    if kind == "time" and not wrong:
        return "date"
    raise UserError(
        f"{path}: column {name} is in the folder name {name}={(wrong or known)[0]}, but must be "
        f"{_EXPECTED_TYPES[kind]}; write it into the files"
    )


def _is_date(text: str) -> bool:
    try:
        return bool(_DATE.fullmatch(text) and date.fromisoformat(text))
    except ValueError:
        return False


def _column_types(
    source: ParquetFile,
    option: str,
    schema: pa.Schema,
    required: dict[str, Kind],
    optional: dict[str, Kind],
    names: dict[str, str],
) -> dict[str, str]:
    file, types = source.path, {}
    for name in schema.names:
        if name.lower() in _RESERVED or (name == _SOURCE_ROW and name in {**required, **optional}):
            raise UserError(f"{file}: the name of column {name} is reserved; rename the column")
    for name, kind in {**required, **optional}.items():
        column = names.get(name, name)
        indices = schema.get_all_field_indices(column)
        if len(indices) > 1:
            raise UserError(f"{file}: column {column} occurs {len(indices)} times; keep one of them")
        if not indices:
            if column in source.partitions:
                types[name] = _FROM_FOLDER
                continue
            if name in optional and name not in names:
                continue
            raise _missing(file, option, name, column, [*schema.names, *source.partitions])
        if alike := [other for other in schema.names if other != column and other.casefold() == column.casefold()]:
            raise UserError(f"{file}: columns {column} and {alike[0]} differ only in case; rename or drop one of them")
        found = schema.field(indices[0]).type
        common = _common_type(found, kind)
        if common is None:
            raise UserError(
                f"{file}: column {column} is {found}, but must be {_EXPECTED_TYPES[kind]}; {_cast(found, kind)}"
            )
        types[name] = common
    return types


def _missing(file: Path, option: str, name: str, column: str, known: list[str]) -> UserError:
    """The error for a column that a file lacks."""
    if column != name:
        return UserError(f"{file}: column {column}, which is to be {name}, is missing{did_you_mean(column, known)}")
    return UserError(
        f"{file}: column {name} is missing (it has {', '.join(known)}); add it, or name yours by "
        f"{'--rename_items' if option == 'items' else '--rename'} COLUMN={name}"
    )


def _cast(found: pa.DataType, kind: Kind) -> str:
    """How to convert a column of a type that is not allowed."""
    if kind == "time" and _common_type(found, "text"):
        return "cast it, as pandas.to_datetime does"
    return "join its lists, with ' > ' or ' | '" if kind == "text" and hasattr(found, "value_type") else "cast it"


def _common_type(found: pa.DataType, kind: Kind) -> str | None:
    """Type that a column of a given kind is stored as; None if the type is not allowed."""
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
    if pa.types.is_floating(found) and found != pa.float16():
        return {pa.float32(): "float32", pa.float64(): "float"}[found] if kind in ("id", "time") else None
    if kind == "time" and pa.types.is_timestamp(found):
        return "timestamp"
    return "date" if kind == "time" and pa.types.is_date(found) else None
