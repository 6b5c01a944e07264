"""Arrow tables from what Python users hold: data frames, Arrow data, Parquet paths, lists, records."""

import os
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmgr_rec.data.delimited_text import parquet_problem
from llmgr_rec.data.schema import has_item_indices
from llmgr_rec.errors import UserError
from llmgr_rec.remote_path import as_path

_ACCEPTED = (
    "a pandas or polars data frame, an Arrow table, the path of a Parquet file or folder, a list of records, "
    "columns by name"
)


def to_table(data: object, name: str) -> pa.Table:
    """The data as an Arrow table. Neither pandas nor polars is imported.

    Args:
        data: A data frame of any library with the Arrow PyCapsule or the dataframe interchange protocol, an Arrow
            table, record batch or reader of batches, a DuckDB relation, the path of a Parquet file or folder, a list of
            records, or a mapping of column names to values.
        name: Name of the argument, for messages.

    Returns:
        A table without dictionaries (pandas and polars categoricals) and string views, of which pyarrow and DuckDB
        support less.

    Raises:
        UserError: The data are of another kind or a prepared split, a file is missing or unreadable, or records differ
            in type.
    """
    table = _plain(_converted(data, name))
    if has_item_indices(table.schema):
        raise UserError(
            f"{name}: items are indices, because this is a split of a prepared data set; give raw item ids (python -m "
            "llmgr_rec.score takes such a split)"
        )
    return table


def _converted(data: object, name: str) -> pa.Table:
    if isinstance(data, pa.Table):
        return data
    if isinstance(data, str | os.PathLike):
        return _read(as_path(data), name)
    try:
        if hasattr(data, "__arrow_c_stream__") or hasattr(data, "__arrow_c_array__"):
            return pa.table(data)
        if hasattr(data, "__dataframe__"):
            return pa.interchange.from_dataframe(data)
        if isinstance(data, Mapping):
            _refuse_tables(data, name)
            return pa.table(dict(data))
        if isinstance(data, Sequence) and all(isinstance(record, Mapping) for record in data):
            return pa.Table.from_pylist(list(data))
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{name} cannot be converted to an Arrow table: {_first_line(error)}") from None
    raise UserError(f"{name} is {type(data).__name__}; give {_ACCEPTED}")


def _refuse_tables(data: Mapping[object, object], name: str) -> None:
    """Refuses tables by domain where one table is needed."""
    for key, column in data.items():
        if hasattr(column, "columns") or isinstance(column, str | os.PathLike | Mapping):
            raise UserError(
                f"{name} has a {type(column).__name__} for {key}, but must be one table; with several domains, give "
                "the rows of all, with full ids such as beauty:B001"
            )


def _plain(table: pa.Table) -> pa.Table:
    """The table with dictionaries and string views, at any level of lists, as their values."""
    for place, found in enumerate(table.schema):
        if (plain := _plain_type(found.type)) != found.type:
            table = table.set_column(place, found.name, _cast(table.column(place), plain))
    return table


def _cast(column: pa.ChunkedArray, plain: pa.DataType) -> pa.ChunkedArray:
    try:
        return column.cast(plain)
    except pa.ArrowNotImplementedError:
        # pyarrow 26 has no cast for dictionaries of string views, which categoricals of polars are.
        return pa.chunked_array([pa.array(column.to_pylist(), plain)])


def _plain_type(found: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(found):
        return _plain_type(found.value_type)
    if pa.types.is_string_view(found):
        return pa.large_string()
    if pa.types.is_list(found):
        return pa.list_(_plain_type(found.value_type))
    if pa.types.is_large_list(found):
        return pa.large_list(_plain_type(found.value_type))
    return found


def to_sessions(data: object, name: str = "sessions") -> pa.Table:
    """Sessions as a table with `items`, a list of raw item ids each, and `session_id`.

    Args:
        data: Lists of item ids, oldest first, one a session; or anything that `to_table` takes, with a column `items`
            of lists, or with one click a row: `item_id`, `session_id` or `user_id`, and `timestamp` unless the clicks
            of a session are in their order.
        name: Name of the argument, for messages.

    Returns:
        Columns `session_id` and `items`. Sessions without an id are numbered from 0. Sessions of clicks are in order of
        their first row.

    Raises:
        UserError: The data are of another kind or lack a column, item ids have different types, or an id or a time is
            null or no time.
    """
    lists = lists_of(data, name)
    if lists is not None:
        table = pa.table({"items": lists})
    else:
        table = to_table(data, name)
        if "item_id" in table.column_names and "items" not in table.column_names:
            table = _sessions_of_clicks(table, name)
    if "items" not in table.column_names:
        raise UserError(
            f"{name} has no column items (a list of item ids a session), nor item_id (one click a row); it has "
            f"{', '.join(table.column_names)}"
        )
    if not hasattr(table.schema.field("items").type, "value_field"):
        raise UserError(f"{name}: column items is {table.schema.field('items').type}; give a list of item ids a row")
    if "session_id" not in table.column_names:
        table = table.append_column("session_id", pa.array(range(table.num_rows), pa.int64()))
    if nulls := table["items"].null_count:
        raise UserError(f"{name}: column items has {nulls:,} nulls; give an empty list for a session without clicks")
    return table.select(["session_id", "items"])


def lists_of(data: object, name: str) -> pa.ChunkedArray | None:
    """The lists of a sequence or column of lists; None if the data are no sequence, or a sequence of records.

    Args:
        data: Lists of item ids in a list, array, series or generator.
        name: Name of the argument, for messages.

    Raises:
        UserError: An element is no list, or item ids have different types.
    """
    if not isinstance(data, Iterable) or is_table(data):
        return None
    rows = list(data)
    if rows and isinstance(rows[0], Mapping):
        return None
    for row in rows:
        if isinstance(row, Set):
            raise UserError(f"{name} holds a set, which has no order; give the item ids of a session oldest first")
        if isinstance(row, str | bytes | Mapping) or not isinstance(row, Iterable):
            raise UserError(
                f"{name} holds {_plain_value(row)!r}, which is not a list of item ids; give one list a session, also "
                "for a single session: [session]"
            )
    try:
        lists = pa.array([[_plain_value(item) for item in row] for row in rows])
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise UserError(f"{name}: item ids must all be integers or all text ({_first_line(error)})") from None
    if not pa.types.is_list(lists.type):
        lists = pa.array([[] for _ in rows], pa.list_(pa.null()))
    return pa.chunked_array([lists])


def is_table(data: object) -> bool:
    """Whether the data are a table or a path, and no sequence: an Arrow table is a sequence of columns for Python."""
    if isinstance(data, str | bytes | os.PathLike | Mapping | pa.Table | pa.RecordBatch):
        return True
    return hasattr(data, "column_names") or hasattr(data, "columns") or hasattr(data, "schema")


def to_ids(ids: object, name: str) -> pa.Array:
    """Item ids as an Arrow array.

    Args:
        ids: Item ids in a list, set, array or series, all integers or all text.
        name: Name of the argument, for messages.

    Raises:
        UserError: This is a single id, a table or a list of lists, or the ids have different types.
    """
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise UserError(f"{name} is {ids!r}; give a list of item ids: [{ids!r}]")
    if is_table(ids):
        raise UserError(f"{name} is {type(ids).__name__}; give a list or a column of item ids")
    try:
        array = _array(ids)
    except (pa.ArrowException, TypeError, OverflowError):
        raise UserError(f"{name}: item ids must all be integers or all text") from None
    if pa.types.is_nested(array.type):
        raise UserError(f"{name} holds lists; give one list of item ids")
    return array


def _array(ids: Iterable[object]) -> pa.Array:
    if isinstance(ids, pa.ChunkedArray):
        return ids.combine_chunks()
    return ids if isinstance(ids, pa.Array) else pa.array([_plain_value(item) for item in ids])


def _plain_value(value: object) -> object:
    """A scalar of pyarrow as its Python value; pyarrow takes those of numpy."""
    return value.as_py() if isinstance(value, pa.Scalar) else value


def _sessions_of_clicks(table: pa.Table, name: str) -> pa.Table:
    key = next((column for column in ("session_id", "user_id") if column in table.column_names), None)
    if key is None:
        raise UserError(f"{name} has item_id but neither session_id nor user_id; name the session of each click")
    _require_values(table, key, name)
    # The dictionary is in order of first occurrence.
    sessions = table[key].combine_chunks().dictionary_encode()
    order = {"session": sessions.indices}
    if "timestamp" in table.column_names:
        order["timestamp"] = _times(table, name)
    rows = pa.table({**order, "row": pa.array(range(table.num_rows), pa.int64())})
    sorted_rows = pc.sort_indices(rows, sort_keys=[(column, "ascending") for column in rows.column_names])
    lengths = np.bincount(sessions.indices.to_numpy(), minlength=len(sessions.dictionary))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    items = table["item_id"].combine_chunks().take(sorted_rows)
    return pa.table({"session_id": sessions.dictionary, "items": pa.LargeListArray.from_arrays(offsets, items)})


def _times(table: pa.Table, name: str) -> pa.ChunkedArray:
    _require_values(table, "timestamp", name)
    found = table.schema.field("timestamp").type
    # Text would be sorted by its characters: "10" before "9".
    if not (
        pa.types.is_integer(found) or pa.types.is_floating(found) or pa.types.is_temporal(found) or not table.num_rows
    ):
        raise UserError(f"{name}: column timestamp is {found}, but must be numbers, timestamps or dates; convert it")
    return table["timestamp"]


def _require_values(table: pa.Table, column: str, name: str) -> None:
    nulls = pc.sum(pc.is_null(table[column], nan_is_null=True)).as_py() or 0
    if nulls:
        raise UserError(f"{name}: column {column} has {nulls:,} nulls; fill or delete such rows")


def _read(path: Path, name: str) -> pa.Table:
    import pyarrow.parquet as pq

    if not path.exists():
        raise UserError(f"{name}: {path} does not exist; give a Parquet file, or a folder of them")
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        if path.is_file():
            problem = parquet_problem(path, name.removeprefix("--"), error)
            raise UserError(f"{name} {path} {problem}") from None
        raise UserError(f"{name} {path}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
