"""A DuckDB database in a scratch file. Its memory is limited; what exceeds the limit spills to disk."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from llmgr_rec.data.preparation.database import BATCH_ROWS, Database, literal
from llmgr_rec.errors import UserError
from llmgr_rec.files import storage_error
from llmgr_rec.remote_errors import reported_error
from llmgr_rec.remote_path import RemotePath

# Bugs in the SQL of this package, and Ctrl-C in a query.
_NOT_OF_THE_USER = (
    duckdb.BinderException,
    duckdb.CatalogException,
    duckdb.ParserException,
    duckdb.InternalException,
    duckdb.InterruptException,
)


class DuckDBDatabase(Database):
    """A scratch database of DuckDB. Insertion order is not preserved, which saves memory.

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

    def create(self, table: str, query: str) -> None:
        """See the base class."""
        self.run(f"CREATE OR REPLACE TABLE {table} AS {query}")

    def delete(self, table: str, keys: Sequence[str], query: str) -> int:
        """See the base class."""
        same = " AND ".join(f'{table}."{key}" = deleted."{key}"' for key in keys)
        return int(self.value(f"DELETE FROM {table} USING ({query}) deleted WHERE {same}"))

    def drop(self, table: str) -> None:
        """See the base class."""
        self.run(f"DROP TABLE {table}")

    def run(self, query: str) -> list[tuple[Any, ...]]:
        """See the base class."""
        return self._connection.execute(query).fetchall()

    def stream(self, query: str) -> Iterator[pa.RecordBatch]:
        """See the base class."""
        # A separate cursor, because DuckDB allows one open result per connection.
        with self._connection.cursor() as cursor:
            yield from cursor.sql(query).to_arrow_reader(BATCH_ROWS)

    def parquet(self, paths: Sequence[Path], columns: Sequence[str]) -> str:
        """See the base class."""
        del columns  # DuckDB reads those that a query names.
        for path in paths:
            if isinstance(path, RemotePath):
                self._register(path)
        files = ", ".join(literal(literal_path(path)) for path in paths)
        # Not DuckDB's partitions: those override columns of the file, and begin above the input folder. Files may have
        # different integer widths and time units.
        return f"read_parquet([{files}], file_row_number=true, hive_partitioning=false, union_by_name=true)"

    def _register(self, path: RemotePath) -> None:
        """Lets DuckDB read paths like this one."""
        system = path.file_system()
        names = {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)
        if not any(self._connection.filesystem_is_registered(name) for name in names):
            self._connection.register_filesystem(system)

    def date(self, text: str) -> str:
        """See the base class."""
        return f"CAST({text} AS DATE)"

    def epoch_ns(self, time: str, is_date: bool) -> str:
        """See the base class."""
        # A cast of a time would cut its nanoseconds.
        return f"epoch_ns(CAST({time} AS TIMESTAMP))" if is_date else f"epoch_ns({time})"

    def beyond_epoch_ns(self, time: str) -> str:
        """See the base class."""
        return f"{time} NOT BETWEEN TIMESTAMP '1678-01-01' AND TIMESTAMP '2262-01-01'"

    @contextmanager
    def user_errors(self, action: str) -> Iterator[None]:
        """See the base class."""
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
            raise (
                storage_error(error)
                or reported_error(str(error), action)
                or UserError(f"{action}: {_first_line(error)}; the file may be damaged (write or download it again)")
            ) from None

    def close(self) -> None:
        """See the base class."""
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
    if isinstance(path, RemotePath):
        return text
    if not set(text) & set("*?["):
        return text
    if "\\" in text:
        raise UserError(f"{path}: DuckDB cannot read a path with a backslash and one of * ? [; rename the file")
    return "".join(f"[{character}]" if character in "*?[" else character for character in text)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")
