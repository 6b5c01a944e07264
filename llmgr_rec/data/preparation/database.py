"""A DuckDB database in a scratch file. Its memory is limited; what exceeds the limit spills to disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from llmgr_rec.errors import UserError
from llmgr_rec.files import storage_error

# Rows per batch of a streamed result.
_BATCH_ROWS = 65536
# Bugs in the SQL of this package, and Ctrl-C in a query.
_NOT_OF_THE_USER = (
    duckdb.BinderException,
    duckdb.CatalogException,
    duckdb.ParserException,
    duckdb.InternalException,
    duckdb.InterruptException,
)


class Database:
    """A scratch database.

    Insertion order is not preserved, which saves memory. Each query that needs an order has an ORDER BY.

    Args:
        folder: Existing folder for the database file and spilled data.
        memory_gb: Memory limit in GiB.
        threads: Number of threads; 0 uses one per core.
    """

    def __init__(self, folder: Path, memory_gb: float, threads: int) -> None:
        options = {"threads": threads} if threads else {}
        self._connection = connect(
            folder, memory_limit=f"{max(int(memory_gb * 1024), 1)}MiB", preserve_insertion_order="false", **options
        )

    def run(self, statement: str) -> list[tuple[Any, ...]]:
        """Executes a statement.

        Args:
            statement: SQL.

        Returns:
            All rows of the result. Use `stream` for large results.
        """
        return self._connection.execute(statement).fetchall()

    def value(self, query: str) -> Any:
        """The single value of a query.

        Args:
            query: SQL.
        """
        return self.run(query)[0][0]

    def stream(self, query: str) -> Iterator[pa.RecordBatch]:
        """Yields the result of a query in batches, without holding all of it in memory.

        Args:
            query: SQL.
        """
        # A separate cursor, because DuckDB allows one open result per connection.
        with self._connection.cursor() as cursor:
            yield from cursor.sql(query).to_arrow_reader(_BATCH_ROWS)

    def close(self) -> None:
        """Closes the database; its files may then be deleted."""
        self._connection.close()


def connect(folder: Path, **options: Any) -> duckdb.DuckDBPyConnection:
    """Creates a database in a folder, beside its spilled data.

    Args:
        folder: Existing folder.
        options: Options of DuckDB.

    Raises:
        UserError: DuckDB cannot create files in the folder, because it changes the path.
    """
    if changed := set(str(folder.resolve())) & set("\\?"):
        raise UserError(
            f"DuckDB cannot keep temporary files in {folder.parent}, because its path has a {changed.pop()}; give one "
            "without it"
        )
    # DuckDB takes the start of a relative path such as `md:data` for an extension to load.
    folder = folder.absolute()
    config = {
        "temp_directory": str(folder / "spill"),
        # Never download extensions; those used here are in the wheel.
        "autoinstall_known_extensions": "false",
        **options,
    }
    connection = duckdb.connect(str(folder / "scratch.duckdb"), config=config)
    # Timestamps without a time zone are UTC, whatever the time zone of the machine.
    connection.execute("SET TimeZone = 'UTC'")
    return connection


def literal_path(path: Path) -> str:
    """A path that DuckDB reads as it is. DuckDB takes each path for a glob pattern, or for an address such as `s3:`.

    Args:
        path: Path of a file.

    Raises:
        UserError: The path has a backslash beside `*`, `?` or `[`, which no pattern of DuckDB can match.
    """
    text = str(path.absolute())
    if not set(text) & set("*?["):
        return text
    if "\\" in text:
        raise UserError(f"{path}: DuckDB cannot read a path with a backslash and one of * ? [; rename the file")
    return "".join(f"[{character}]" if character in "*?[" else character for character in text)


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


@contextmanager
def user_errors(action: str) -> Iterator[None]:
    """Converts errors of DuckDB and of the file system to one-line user errors.

    Errors that point to a bug in the SQL of this package pass unchanged.

    Args:
        action: Start of the message: what was being done.

    Raises:
        UserError: DuckDB ran out of memory, or a file could not be read or written.
    """
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        if known := storage_error(error):
            raise known from None
        raise UserError(
            f"{action}: DuckDB ran out of memory ({_first_line(error)}); raise --memory_gb or lower --threads"
        ) from None
    except _NOT_OF_THE_USER:
        raise
    except (duckdb.Error, OSError) as error:
        raise storage_error(error) or UserError(
            f"{action}: {_first_line(error)}; the file may be damaged (write or download it again)"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")
