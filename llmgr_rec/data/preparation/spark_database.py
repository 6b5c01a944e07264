"""A scratch database of Spark. Its tables are Parquet files in the scratch folder, which driver and executors share."""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

import pyarrow as pa
import pyarrow.parquet as pq

from llmgr_rec.data.preparation.database import BATCH_ROWS, Database, identifier
from llmgr_rec.errors import UserError
from llmgr_rec.files import storage_error
from llmgr_rec.remote_path import RemotePath

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

# Settings of queries that their results depend on.
_CONFIGURATION = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.caseSensitive": "false",
    "spark.sql.ansi.enabled": "true",
    # Spark has no type for nanoseconds, and reads them as integers.
    "spark.sql.legacy.parquet.nanosAsLong": "true",
    "spark.sql.parquet.int96RebaseModeInRead": "CORRECTED",
    "spark.sql.parquet.datetimeRebaseModeInRead": "CORRECTED",
}
_SCHEME = "^file:/+"
_MAX_INT64 = 2**63 - 1
_NS_OF_MICROSECOND, _NS_OF_DAY = 10**3, 86400 * 10**9
# The years 1678 and 2262 begin.
_FIRST_NS, _LAST_NS = -9_214_560_000_000_000_000, 9_214_646_400_000_000_000
# Smallest heap that Spark starts with.
_MIN_MEMORY_MB = 640


class SparkDatabase(Database):
    """A scratch database of Spark.

    Args:
        folder: Existing folder for the tables, which driver and executors see under the same path.
        memory_gb: Memory of the driver in GiB, if Spark is started here.
        threads: Tasks at once, if Spark is started here without a master; 0 for one per core.
        master: URL of the master, if Spark is started here; None takes that of spark-submit, or this machine.
        session: Running session, which is left running and unchanged; None takes the active one, or starts one.
    """

    def __init__(
        self,
        folder: Path,
        memory_gb: float,
        threads: int,
        master: str | None = None,
        session: "SparkSession | None" = None,
    ) -> None:
        from pyspark.sql import SparkSession

        self._folder = folder
        running = session or SparkSession.getActiveSession()
        self._is_own = running is None
        if running is None:
            running = _start(folder, memory_gb, threads, master)
        # Settings and names of tables of its own.
        self._session = running.newSession()
        for name, value in _CONFIGURATION.items():
            self._session.conf.set(name, value)
        self._tables: dict[str, Path] = {}
        self._inputs: dict[tuple[Path, ...], str] = {}
        self._written = 0

    def create(self, table: str, query: str) -> None:
        """See the base class."""
        folder = self._write(query)
        self._session.read.parquet(_pattern(folder)).createOrReplaceTempView(table)
        before = self._tables.get(table)
        self._tables[table] = folder
        if before is not None:
            shutil.rmtree(before)

    def delete(self, table: str, keys: Sequence[str], query: str) -> int:
        """See the base class."""
        before = _num_rows(self._tables[table])
        names = ", ".join(map(identifier, keys))
        self.create(table, f"SELECT {table}.* FROM {table} ANTI JOIN ({query}) deleted USING ({names})")
        return before - _num_rows(self._tables[table])

    def drop(self, table: str) -> None:
        """See the base class."""
        self._session.catalog.dropTempView(table)
        shutil.rmtree(self._tables.pop(table))

    def run(self, query: str) -> list[tuple[Any, ...]]:
        """See the base class."""
        return [tuple(row) for row in self._query(query).collect()]

    def stream(self, query: str) -> Iterator[pa.RecordBatch]:
        """See the base class."""
        # Through files, because a result that is collected is in memory as a whole.
        folder = self._write(query)
        try:
            yield from _batches(folder)
        finally:
            shutil.rmtree(folder)

    def parquet(self, paths: Sequence[Path], columns: Sequence[str]) -> str:
        """See the base class."""
        if (name := self._inputs.get(tuple(paths))) is None:
            name = self._inputs[tuple(paths)] = f"input_{len(self._inputs)}"
            self._read(paths, columns).createOrReplaceTempView(name)
        return name

    def date(self, text: str) -> str:
        """See the base class."""
        return f"CAST(unix_date(CAST({text} AS DATE)) AS BIGINT) * {_NS_OF_DAY}"

    def epoch_ns(self, time: str, is_date: bool) -> str:
        """See the base class."""
        del is_date
        return time

    def beyond_epoch_ns(self, time: str) -> str:
        """See the base class."""
        return f"{time} NOT BETWEEN {_FIRST_NS} AND {_LAST_NS}"

    @contextmanager
    def user_errors(self, action: str) -> Iterator[None]:
        """See the base class."""
        from pyspark.errors import AnalysisException, ParseException, PySparkException

        try:
            yield
        except (AnalysisException, ParseException):
            raise
        except (PySparkException, OSError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise storage_error(error) or UserError(f"{action}: Spark failed ({lines[0].rstrip('.')})") from None

    def close(self) -> None:
        """See the base class."""
        if self._is_own:
            self._session.stop()
            return
        for name in (*self._tables, *self._inputs.values()):
            self._session.catalog.dropTempView(name)

    def _query(self, query: str) -> "DataFrame":
        from llmgr_rec.data.preparation.spark_sql import spark_sql

        return self._session.sql(spark_sql(query))

    def _write(self, query: str) -> Path:
        """Writes the result of a query to a new folder. Its files, sorted by name, have the rows in their order."""
        self._written += 1
        folder = self._folder / f"table-{self._written}"
        self._query(query).write.parquet(_uri(folder))
        return folder

    def _read(self, paths: Sequence[Path], columns: Sequence[str]) -> "DataFrame":
        """The rows of files. Those with the same types are read together, because Spark takes the types of one file."""
        groups: dict[tuple[pa.DataType, ...], list[int]] = {}
        for place, path in enumerate(paths):
            schema = pq.read_schema(path)
            groups.setdefault(tuple(schema.field(name).type for name in columns), []).append(place)
        frames = [self._read_alike(paths, places, columns, types) for types, places in groups.items()]
        first, *others = frames
        for frame in others:
            first = first.unionByName(frame)
        return first

    def _read_alike(
        self, paths: Sequence[Path], places: Sequence[int], columns: Sequence[str], types: Sequence[pa.DataType]
    ) -> "DataFrame":
        from pyspark.sql import functions as F

        frame = self._session.read.parquet(*(_pattern(paths[place]) for place in places))
        index_of = {str(_on_this_machine(paths[place])): place for place in places}
        # Spark writes an address with one slash here and with three there.
        found = [(re.sub(_SCHEME, "/", uri), index_of[unquote(urlparse(uri).path)]) for uri in frame.inputFiles()]
        indices = self._session.createDataFrame(found, "file string, file_index bigint")
        kinds = dict(frame.dtypes)
        selected = [_column(name, kind, kinds[name]) for name, kind in zip(columns, types, strict=True)]
        file, row = F.col("_metadata.file_path"), F.col("_metadata.row_index")
        numbered = frame.select(
            *selected, F.regexp_replace(file, _SCHEME, "/").alias("file"), row.alias("file_row_number")
        )
        joined = numbered.join(F.broadcast(indices), "file", "left")
        unknown = F.raise_error(F.concat(F.lit("no number of file "), F.col("file"))).cast("bigint")
        return joined.withColumn("file_index", F.coalesce(F.col("file_index"), unknown)).drop("file")


def _start(folder: Path, memory_gb: float, threads: int, master: str | None) -> "SparkSession":
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.appName("llmgr_rec.prepare")
    if master is not None or threads:
        builder = builder.master(master or f"local[{threads}]")
    # spark-submit has a configuration of its own.
    if "PYSPARK_GATEWAY_PORT" not in os.environ:
        memory = max(int(memory_gb * 1024), _MIN_MEMORY_MB)
        builder = builder.config("spark.driver.memory", f"{memory}m").config("spark.local.dir", str(folder / "spill"))
        builder = builder.config("spark.ui.enabled", "false").config("spark.ui.showConsoleProgress", "false")
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    return session


def _column(name: str, kind: pa.DataType, spark_kind: str) -> "Column":
    """A column of a Parquet file, times and dates as nanoseconds since 1970."""
    from pyspark.sql import functions as F

    column = F.col(name)
    if pa.types.is_null(kind):
        column = F.lit(None).cast("string")
    elif pa.types.is_date(kind):
        column = _nanoseconds(F.unix_date(column), _NS_OF_DAY)
    elif pa.types.is_timestamp(kind) and spark_kind != "bigint":
        column = _nanoseconds(F.unix_micros(column.cast("timestamp")), _NS_OF_MICROSECOND)
    return column.alias(name)


def _nanoseconds(number: "Column", unit: int) -> "Column":
    """The time in nanoseconds; the largest or smallest integer if they exceed 64 bits, which is refused later."""
    from pyspark.sql import functions as F

    last = _MAX_INT64 // unit
    inside = number.cast("bigint") * F.lit(unit).cast("bigint")
    return F.when(number > last, _MAX_INT64).when(number < -last, -_MAX_INT64).otherwise(inside)


def _on_this_machine(path: Path) -> Path:
    """The path without links; a copy of a remote file, because Spark has credentials and file systems of its own."""
    return path.local() if isinstance(path, RemotePath) else path.resolve()


def _uri(path: Path) -> str:
    return f"file://{_on_this_machine(path)}"


def _pattern(path: Path) -> str:
    """A path to read from, which Spark takes for a pattern."""
    return re.sub(r"([*?{}\[\]\\])", r"\\\1", _uri(path))


def _num_rows(folder: Path) -> int:
    return sum(pq.read_metadata(file).num_rows for file in folder.glob("part-*.parquet"))


def _batches(folder: Path) -> Iterator[pa.RecordBatch]:
    """The rows of all files in the order of their names, in batches of `BATCH_ROWS`, as DuckDB gives them."""
    pending: list[pa.RecordBatch] = []
    for file in sorted(folder.glob("part-*.parquet")):
        for batch in pq.ParquetFile(file).iter_batches(BATCH_ROWS):
            pending.append(batch)
            if sum(map(len, pending)) >= BATCH_ROWS:
                joined = pa.concat_batches(pending)
                yield joined[:BATCH_ROWS]
                pending = [joined[BATCH_ROWS:]]
    if sum(map(len, pending)):
        yield pa.concat_batches(pending)
