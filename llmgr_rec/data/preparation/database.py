"""A DuckDB database in a scratch file, with bounded memory: everything beyond it spills to disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from llmgr_rec.errors import UserError

# Rows that leave DuckDB at a time.
_BATCH_ROWS = 65536


class Database:
    """A scratch database.

    No step relies on the order in which DuckDB happens to keep rows: each query that needs an order asks for it. That
    lets DuckDB run without order preservation, which saves memory.

    Args:
        folder: Existing folder for the database file and what spills.
        memory_gb: Memory limit in GiB.
        threads: Threads; 0 for one a core.
    """

    def __init__(self, folder: Path, memory_gb: float, threads: int) -> None:
        config: dict[str, Any] = {
            "memory_limit": f"{max(int(memory_gb * 1024), 1)}MiB",
            "temp_directory": str(folder / "spill"),
            "preserve_insertion_order": "false",
            "autoinstall_known_extensions": "false",
        }
        if threads:
            config["threads"] = threads
        self._connection = duckdb.connect(str(folder / "scratch.duckdb"), config=config)
        # Times without a zone are not to be read by the machine's.
        self._connection.execute("SET TimeZone = 'UTC'")

    def run(self, statement: str) -> list[tuple[Any, ...]]:
        """Runs one statement to its end.

        Args:
            statement: SQL.

        Returns:
            All result rows; keep them few.
        """
        return self._connection.execute(statement).fetchall()

    def value(self, query: str) -> Any:
        """The single value of a query.

        Args:
            query: SQL.
        """
        return self.run(query)[0][0]

    def stream(self, query: str) -> Iterator[pa.RecordBatch]:
        """Result of a query in batches, without holding it as a whole.

        Args:
            query: SQL.
        """
        # A cursor of its own, because DuckDB allows one open result a connection.
        with self._connection.cursor() as cursor:
            yield from cursor.sql(query).to_arrow_reader(_BATCH_ROWS)

    def close(self) -> None:
        """Closes the database; its files may then be deleted."""
        self._connection.close()


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turns what DuckDB and the file system report into a line for the user; errors in our SQL stay as they are.

    Args:
        doing: What was under way, as the start of the line.
    """
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"{doing}: DuckDB ran out of memory ({_first_line(error)}); raise --memory_gb or lower --threads"
        ) from None
    except (duckdb.BinderException, duckdb.CatalogException, duckdb.ParserException, duckdb.InternalException):
        raise
    except (duckdb.Error, OSError) as error:
        raise UserError(
            f"{doing}: {_first_line(error)}; the file may be damaged (write or download it again) or the disk full"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")
