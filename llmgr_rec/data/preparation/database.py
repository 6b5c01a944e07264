"""What the steps of prepare need of an engine: scratch tables, and queries in the SQL of DuckDB."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pyarrow as pa

# Rows per batch of a streamed result.
BATCH_ROWS = 65536


class Database(ABC):
    """A scratch database, whose tables keep no order. Each query that needs an order has an ORDER BY."""

    @abstractmethod
    def create(self, table: str, query: str) -> None:
        """Makes a table of the result of a query, in place of a table of that name, from which the query may read.

        Args:
            table: Name of the table.
            query: SQL.
        """

    @abstractmethod
    def delete(self, table: str, keys: Sequence[str], query: str) -> int:
        """Deletes rows of a table.

        Args:
            table: Name of the table.
            keys: Columns of the table, none of them with nulls.
            query: SQL. The rows are deleted whose keys are in its result, which has the keys as columns.

        Returns:
            Number of deleted rows.
        """

    @abstractmethod
    def drop(self, table: str) -> None:
        """Deletes a table.

        Args:
            table: Name of the table.
        """

    @abstractmethod
    def run(self, query: str) -> list[tuple[Any, ...]]:
        """Executes a query.

        Args:
            query: SQL.

        Returns:
            All rows of the result. Use `stream` for large results.
        """

    def value(self, query: str) -> Any:
        """The single value of a query.

        Args:
            query: SQL.
        """
        return self.run(query)[0][0]

    @abstractmethod
    def stream(self, query: str) -> Iterator[pa.RecordBatch]:
        """Yields the result of a query in batches of `BATCH_ROWS` rows, without holding all of it in memory.

        Args:
            query: SQL.
        """

    @abstractmethod
    def parquet(self, paths: Sequence[Path], columns: Sequence[str]) -> str:
        """SQL of a table of the rows of Parquet files.

        Args:
            paths: The files, whose columns may differ in the width of integers and in the unit of times.
            columns: Columns to read. The table also has `file_index`, the place of a file in `paths` from 0, and
                `file_row_number`, the row in the file from 0.
        """

    @abstractmethod
    def date(self, text: str) -> str:
        """SQL of a date such as 2026-11-30, in the form of a date of `parquet`.

        Args:
            text: SQL of the text of the date.
        """

    @abstractmethod
    def epoch_ns(self, time: str, is_date: bool) -> str:
        """SQL of a time of a Parquet file as nanoseconds since 1970.

        Args:
            time: SQL of a column of `parquet`.
            is_date: Whether it is a date in all files.
        """

    @abstractmethod
    def beyond_epoch_ns(self, time: str) -> str:
        """SQL condition: a time or date of a Parquet file is not between the years 1678 and 2261.

        Args:
            time: SQL of a column of `parquet`.
        """

    @abstractmethod
    def user_errors(self, action: str) -> AbstractContextManager[None]:
        """Converts errors of the engine and of the file system to one-line user errors.

        Errors that point to a bug in the SQL of this package pass unchanged.

        Args:
            action: Start of the message: what was being done.

        Raises:
            UserError: The engine ran out of memory, or a file could not be read or written.
        """

    @abstractmethod
    def close(self) -> None:
        """Closes the database; its files may then be deleted."""


def literal(text: str) -> str:
    """A text as a SQL string literal.

    Args:
        text: Any text.
    """
    return "'" + text.replace("'", "''") + "'"


def identifier(name: str) -> str:
    """A name, such as that of a column, as a SQL identifier.

    Args:
        name: Any name.
    """
    return '"' + name.replace('"', '""') + '"'
