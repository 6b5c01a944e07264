"""Arrow tables from what Python users hold: data frames, Arrow data, Parquet paths, lists, records."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import pyarrow as pa
import pyarrow.compute

from llmgr_rec.data.schema import has_item_indices
from llmgr_rec.errors import UserError

_ACCEPTED = (
    "a pandas or polars data frame, an Arrow table, the path of a Parquet file or folder, a list of records, "
    "or columns by name"
)


def to_table(data: object, name: str) -> pa.Table:
    """The data as an Arrow table. Neither pandas nor polars is imported.

    Args:
        data: A data frame of any library with the Arrow PyCapsule or the dataframe interchange protocol, an Arrow table
            or record batch, the path of a Parquet file or folder, a list of records, or a mapping of column names to
            values.
        name: Name of the argument, for messages.

    Raises:
        UserError: The data are of another kind or a prepared split, a file is missing or unreadable, or records differ
            in type.
    """
    table = _converted(data, name)
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
        return _read(Path(data), name)
    try:
        if hasattr(data, "__arrow_c_stream__") or hasattr(data, "__arrow_c_array__"):
            return pa.table(data)
        if hasattr(data, "__dataframe__"):
            return pa.interchange.from_dataframe(data)
        if isinstance(data, Mapping):
            return pa.table(dict(data))
        if isinstance(data, Sequence) and all(isinstance(record, Mapping) for record in data):
            return pa.Table.from_pylist(list(data))
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{name} cannot be converted to an Arrow table: {_first_line(error)}") from None
    raise UserError(f"{name} is {type(data).__name__}; give {_ACCEPTED}")


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
    if is_lists(data):
        table = pa.table({"items": _lists(data, name)})
    else:
        table = to_table(data, name)
        if "item_id" in table.column_names and "items" not in table.column_names:
            table = _sessions_of_clicks(table, name)
    if "items" not in table.column_names:
        raise UserError(
            f"{name} has no column items (a list of item ids a session), nor item_id (one click a row); it has "
            f"{', '.join(table.column_names)}"
        )
    if "session_id" not in table.column_names:
        table = table.append_column("session_id", pa.array(range(table.num_rows), pa.int64()))
    if nulls := table["items"].null_count:
        raise UserError(f"{name}: column items has {nulls:,} nulls; give an empty list for a session without clicks")
    return table.select(["session_id", "items"])


def to_ids(ids: Collection[Any], name: str) -> pa.Array:
    """Item ids as an Arrow array.

    Args:
        ids: Item ids, all integers or all text.
        name: Name of the argument, for messages.

    Raises:
        UserError: The ids are a single text, or have different types.
    """
    if isinstance(ids, pa.Array | pa.ChunkedArray):
        return ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    if isinstance(ids, str):
        raise UserError(f"{name} is {ids!r}; give a list of item ids")
    try:
        return pa.array(list(ids))
    except (pa.ArrowException, TypeError, OverflowError):
        raise UserError(f"{name}: item ids must all be integers or all text") from None


def is_lists(data: object) -> TypeGuard[Sequence[Any]]:
    """Whether the data are a sequence of something else than records, which should be lists of item ids."""
    if not isinstance(data, Sequence) or isinstance(data, str):
        return False
    return not any(isinstance(row, Mapping) for row in data)


def _lists(rows: Sequence[Any], name: str) -> pa.Array:
    for row in rows:
        if isinstance(row, str) or not hasattr(row, "__iter__"):
            raise UserError(f"{name} holds {row!r}, which is not a list of item ids; give one list a session")
    try:
        lists = pa.array([list(row) for row in rows])
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise UserError(f"{name}: item ids must all be integers or all text ({_first_line(error)})") from None
    return lists if pa.types.is_list(lists.type) else pa.array([[] for _ in rows], pa.list_(pa.null()))


def _sessions_of_clicks(table: pa.Table, name: str) -> pa.Table:
    key = next((column for column in ("session_id", "user_id") if column in table.column_names), None)
    if key is None:
        raise UserError(f"{name} has item_id but neither session_id nor user_id; name the session of each click")
    rows = pa.array(range(table.num_rows), pa.int64())
    clicks = table.select([key, "item_id"]).append_column("row", rows)
    _require_values(table, key, name)
    if "timestamp" in table.column_names:
        _require_values(table, "timestamp", name)
        found = table.schema.field("timestamp").type
        # Text would be sorted by its characters: "10" before "9".
        if not (pa.types.is_integer(found) or pa.types.is_floating(found) or pa.types.is_temporal(found)):
            raise UserError(
                f"{name}: column timestamp is {found}, but must be numbers, timestamps or dates; convert it"
            )
        clicks = clicks.append_column("timestamp", table["timestamp"])
        clicks = clicks.sort_by([("timestamp", "ascending"), ("row", "ascending")])
    grouped = clicks.group_by(key, use_threads=False).aggregate([("item_id", "list"), ("row", "min")])
    grouped = grouped.sort_by("row_min")
    return pa.table({"session_id": grouped[key], "items": grouped["item_id_list"]})


def _require_values(table: pa.Table, column: str, name: str) -> None:
    nulls = pa.compute.sum(pa.compute.is_null(table[column], nan_is_null=True)).as_py() or 0
    if nulls:
        raise UserError(f"{name}: column {column} has {nulls:,} nulls; fill or delete such rows")


def _read(path: Path, name: str) -> pa.Table:
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{name} {path}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
