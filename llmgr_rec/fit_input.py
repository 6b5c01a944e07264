"""Hands clicks and items in the forms that Python users hold to `prepare`, which reads Parquet files."""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmgr_rec.arrow_input import is_table, lists_of, to_sessions, to_table
from llmgr_rec.data.parquet_files import list_parquet_files
from llmgr_rec.data.parquet_footer import read_footer
from llmgr_rec.data.schema import TEXT_COLUMNS
from llmgr_rec.errors import UserError
from llmgr_rec.remote_path import as_path

# Columns by which a mapping is a table, and not tables by the names of their domains.
_COLUMNS = {"item_id", "items", "user_id", "session_id", "timestamp", *TEXT_COLUMNS}


class FitInput:
    """Clicks and items of a `fit`, as options of `prepare`. Paths are read where they are, other forms are written.

    Args:
        interactions: Clicks or sessions, or those of each domain by its name, see `Recommender.fit`.
        items: Items, or those of each domain; None, also of a domain, where there are none.
        folder: Existing folder for what is written.

    Attributes:
        options: Path, or paths by domain, by option of `prepare`: `interactions` or `sessions`, and `items` if there
            are any.

    Raises:
        UserError: The clicks or items are of another kind or lack a column.
    """

    def __init__(self, interactions: object, items: object | None, folder: Path) -> None:
        self._folder = folder
        self._written: dict[Path, str] = {}
        self.options: dict[str, str] = {}
        clicks = {name: self._clicks(one, name) for name, one in by_domain(interactions).items()}
        options = {option: name for name, (option, _) in clicks.items()}
        if len(options) > 1:
            raise UserError(
                f"interactions of the domain {options['sessions']} are sessions, those of {options['interactions']} "
                "are clicks with times; give all in one form"
            )
        self.options[next(iter(options))] = _value({name: path for name, (_, path) in clicks.items()})
        of_domains = {name: one for name, one in by_domain(items).items() if one is not None}
        if of_domains and ("" in of_domains) != ("" in clicks):
            tables, table = ("interactions", "items") if "" in of_domains else ("items", "interactions")
            raise UserError(
                f"{tables} are tables by domain, but {table} are one table; give both by domain: "
                '{"beauty": ..., "films": ...}'
            )
        if of_domains:
            self.options["items"] = _value({name: self._items(one, name) for name, one in of_domains.items()})

    def in_terms_of_caller(self, message: str) -> str:
        """A message of `prepare` with the names of arguments where it has paths of files that were written.

        Args:
            message: One line.
        """
        for path, name in self._written.items():
            message = message.replace(f"{path}, row group 0, ", f"{name}, ").replace(str(path), name)
        return message

    def _clicks(self, interactions: object, domain: str) -> tuple[str, Path]:
        """Option of `prepare` and the file of the clicks of a domain."""
        if isinstance(interactions, str | os.PathLike):
            path = as_path(interactions)
            return ("sessions" if _has_sessions(path) else "interactions"), path
        name = _shown("interactions", domain)
        option, table = _clicks_table(interactions, name)
        return option, self._write(option, domain, table, name)

    def _items(self, items: object, domain: str) -> Path:
        if isinstance(items, str | os.PathLike):
            return as_path(items)
        name = _shown("items", domain)
        return self._write("items", domain, to_table(items, name), name)

    def _write(self, option: str, domain: str, table: pa.Table, name: str) -> Path:
        # A number, because the name of a domain may be none of a file.
        path = self._folder / (f"{option}-{len(self._written)}.parquet" if domain else f"{option}.parquet")
        try:
            # One row group, in which the number of a row is that of the table.
            pq.write_table(table, path, row_group_size=max(table.num_rows, 1))
        except pa.ArrowException as error:
            raise UserError(f"{name} cannot be written as Parquet: {str(error).splitlines()[0]}") from None
        self._written[path] = name
        return path


def by_domain(given: object) -> Mapping[str, Any]:
    """Tables by the names of their domains; a table that is of none has the name "".

    Args:
        given: A table in any form, or a mapping of names to tables.
    """
    if isinstance(given, Mapping) and given and not (_COLUMNS & set(given) or any(map(_is_column, given.values()))):
        return {str(name): one for name, one in given.items()}
    return {"": given}


def _is_column(values: object) -> bool:
    """Whether the values of a mapping are one value a row, and so no table and no list of sessions."""
    if is_table(values) or isinstance(values, Iterator) or not isinstance(values, Iterable):
        return False
    return not isinstance(next(iter(values), None), Iterable) or isinstance(next(iter(values)), str)


def _shown(name: str, domain: str) -> str:
    return f"{name} of {domain}" if domain else name


def _value(paths: Mapping[str, Path]) -> str:
    return ",".join(f"{name}={path}" if name else str(path) for name, path in paths.items())


def _clicks_table(interactions: object, name: str) -> tuple[str, pa.Table]:
    """Option of prepare and its table: clicks with times, or sessions."""
    if lists_of(interactions, name) is not None:
        return "sessions", to_sessions(interactions, name)
    table = to_table(interactions, name)
    columns = table.column_names
    if "items" in columns:
        return "sessions", table if "session_id" in columns else to_sessions(table, name)
    if "item_id" not in columns or not {"user_id", "session_id"} & set(columns):
        raise UserError(
            f"{name} need the columns user_id (or session_id), item_id and timestamp, or the columns session_id "
            f"and items; they have {', '.join(columns) or 'none'}; rename them"
        )
    if "timestamp" not in columns:
        return "sessions", to_sessions(table, name)
    if "user_id" not in columns:
        table = table.rename_columns(["user_id" if column == "session_id" else column for column in columns])
    return "interactions", table


def _has_sessions(path: Path) -> bool:
    """Whether a Parquet file or folder has sessions and not clicks. `prepare` reports what cannot be read."""
    try:
        file = list_parquet_files(path, "interactions").files[0]
        return "items" in read_footer(file.path, "interactions").names
    except UserError:
        return False
