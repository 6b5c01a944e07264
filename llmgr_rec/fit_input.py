"""Hands clicks and items in the forms that Python users hold to `prepare`, which reads Parquet files."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llmgr_rec.arrow_input import lists_of, to_sessions, to_table
from llmgr_rec.data.parquet_files import list_parquet_files
from llmgr_rec.data.parquet_footer import read_footer
from llmgr_rec.errors import UserError
from llmgr_rec.remote_path import as_path


class FitInput:
    """Clicks and items of a `fit`, as options of `prepare`. Paths are read where they are, other forms are written.

    Args:
        interactions: Clicks or sessions, see `Recommender.fit`.
        items: Items, or None.
        folder: Existing folder for what is written.

    Attributes:
        options: Path by option of `prepare`: `interactions` or `sessions`, and `items` if there are any.

    Raises:
        UserError: The clicks or items are of another kind or lack a column.
    """

    def __init__(self, interactions: object, items: object | None, folder: Path) -> None:
        self._folder = folder
        self.options: dict[str, Path] = {}
        if isinstance(interactions, str | os.PathLike):
            path = as_path(interactions)
            self.options["sessions" if _has_sessions(path) else "interactions"] = path
        else:
            self._write(*_clicks_table(interactions), "interactions")
        if isinstance(items, str | os.PathLike):
            self.options["items"] = as_path(items)
        elif items is not None:
            self._write("items", to_table(items, "items"), "items")

    def in_terms_of_caller(self, message: str) -> str:
        """A message of `prepare` with the names of arguments where it has paths of files that were written.

        Args:
            message: One line.
        """
        for option in ("interactions", "sessions", "items"):
            path = str(self._folder / f"{option}.parquet")
            name = "items" if option == "items" else "interactions"
            message = message.replace(f"{path}, row group 0, ", f"{name}, ").replace(path, name)
        return message

    def _write(self, option: str, table: pa.Table, name: str) -> None:
        path = self._folder / f"{option}.parquet"
        try:
            # One row group, in which the number of a row is that of the table.
            pq.write_table(table, path, row_group_size=max(table.num_rows, 1))
        except pa.ArrowException as error:
            raise UserError(f"{name} cannot be written as Parquet: {str(error).splitlines()[0]}") from None
        self.options[option] = path


def _clicks_table(interactions: object) -> tuple[str, pa.Table]:
    """Option of prepare and its table: clicks with times, or sessions."""
    if lists_of(interactions, "interactions") is not None:
        return "sessions", to_sessions(interactions, "interactions")
    table = to_table(interactions, "interactions")
    columns = table.column_names
    if "items" in columns:
        return "sessions", table if "session_id" in columns else to_sessions(table, "interactions")
    if "item_id" not in columns or not {"user_id", "session_id"} & set(columns):
        raise UserError(
            "interactions need the columns user_id (or session_id), item_id and timestamp, or the columns session_id "
            f"and items; they have {', '.join(columns) or 'none'}; rename them"
        )
    if "timestamp" not in columns:
        return "sessions", to_sessions(table, "interactions")
    if "user_id" not in columns:
        table = table.rename_columns(["user_id" if name == "session_id" else name for name in columns])
    return "interactions", table


def _has_sessions(path: Path) -> bool:
    """Whether a Parquet file or folder has sessions and not clicks. `prepare` reports what cannot be read."""
    try:
        file = list_parquet_files(path, "interactions").files[0]
        return "items" in read_footer(file.path, "interactions").names
    except UserError:
        return False
