"""Shared by all converters: writes interactions.parquet and items.parquet from raw rows, out of core.

DuckDB reads, checks and sorts the rows. Its memory is limited to `_MEMORY`; the rest spills next to the output.
"""

import logging
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from datagen.output import ITEM_COLUMNS, ROW_GROUP_ROWS, interactions_schema, items_schema, output_folder
from datagen.sources import clean_text, identifier, quote
from llmgr_rec.cli import progress
from llmgr_rec.errors import UserError

_MEMORY = "2GiB"
_ITEM_BATCH = 1 << 14
# Stripped from both ends of ids.
_BLANKS = " \t\n\r\f\v"
_IS_FRACTION = "TRY_CAST(time AS DOUBLE) <> round(TRY_CAST(time AS DOUBLE))"
_NOT_A_NUMBER = "NOT coalesce(isfinite(TRY_CAST({} AS DOUBLE)), false)"

_log = logging.getLogger(__name__)

Item = dict[str, str | None]


class Conversion:
    """A conversion in progress. Create it with `conversion(output)`.

    Args:
        folder: Unfinished output folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        scratch = folder / "scratch"
        scratch.mkdir()
        config: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": _MEMORY,
            "temp_directory": str(scratch / "spill"),
            # Never download extensions; those used here are in the wheel.
            "autoinstall_known_extensions": False,
        }
        self._database = duckdb.connect(str(scratch / "scratch.duckdb"), config=config)
        # Dates without a time zone are UTC, whatever the time zone of the machine.
        self._run("SET TimeZone = 'UTC'")
        columns = ", ".join(f"{name} VARCHAR" for name in ITEM_COLUMNS)
        self._run(f"CREATE TABLE items (place BIGINT, {columns})")

    def close(self) -> None:
        """Closes the scratch database."""
        self._database.close()

    def sql_rows(self, source: Path, query: str) -> Iterator[dict[str, Any]]:
        """Yields the rows of a query as dictionaries.

        Args:
            source: File that the query reads, for messages.
            query: SQL.

        Raises:
            UserError: The file cannot be read.
        """
        with _user_errors(source), self._database.cursor() as cursor:
            for batch in cursor.sql(query).to_arrow_reader(_ITEM_BATCH):
                yield from batch.to_pylist()

    def read_interactions(
        self,
        source: Path,
        table: str,
        user: str,
        item: str,
        time: str,
        rating: str | None = None,
        min_rating: float | None = None,
        dates: bool = False,
    ) -> None:
        """Loads the interactions of a dump.

        Args:
            source: Input file, for messages.
            table: DuckDB table expression with string columns.
            user: Name of the user column.
            item: Name of the item column.
            time: Name of the time column: numbers in any unit. If any has a fraction, all are converted to millionths.
            rating: Name of the rating column; required with `min_rating`.
            min_rating: Drop rows with a lower rating.
            dates: Whether times may be ISO dates and times, which become milliseconds since 1970 (UTC).

        Raises:
            UserError: A value is missing or not a number, or no row remains.
        """
        _log.info("reading %s", source)
        names = {"user_id": user, "item_id": item, "time": time}
        if min_rating is not None and rating is not None:
            names["rating"] = rating
        selected = ", ".join(f"{identifier(column)} AS {name}" for name, column in names.items())
        self._run(f"CREATE TABLE raw AS SELECT row_number() OVER () AS place, {selected} FROM {table}", source)
        for name in ("user_id", "item_id"):
            self._check(f"{_trimmed(name)} = '' OR {name} IS NULL", source, names[name], "is missing or empty")
        number = "CAST(round(TRY_CAST(time AS DOUBLE)) AS BIGINT)"
        # Integers are cast directly, because a double cannot represent all of them.
        time_sql = f"coalesce(TRY_CAST(time AS BIGINT), {number})"
        if dates and self._value("SELECT count(TRY_CAST(time AS DOUBLE)) = 0 FROM raw"):
            time_sql = "epoch_ms(TRY_CAST(time AS TIMESTAMPTZ))"
            self._check(
                "TRY_CAST(time AS TIMESTAMPTZ) IS NULL", source, time, "is not a date like 2024-01-31T12:00:00Z"
            )
        else:
            self._check(_NOT_A_NUMBER.format("time"), source, time, "is not a number")
            if self._value(f"SELECT count(*) FROM raw WHERE {_IS_FRACTION}"):
                _log.info("%s: %s has fractions, so times are converted to millionths", source, time)
                time_sql = "CAST(round(TRY_CAST(time AS DOUBLE) * 1e6) AS BIGINT)"
        condition = "true"
        if "rating" in names:
            self._check(_NOT_A_NUMBER.format("rating"), source, names["rating"], "is not a number")
            condition = f"CAST(rating AS DOUBLE) >= {min_rating!r}"
        self._run(
            f"CREATE TABLE interactions AS SELECT place, {_trimmed('user_id')} AS user_id, "
            f"{_trimmed('item_id')} AS item_id, {time_sql} AS timestamp FROM raw WHERE {condition}",
            source,
        )
        if not self._value("SELECT count(*) FROM interactions"):
            raw = self._value("SELECT count(*) FROM raw")
            reason = f"all {raw:,} rows are below --min_rating {min_rating}" if raw else "the file has no rows"
            raise UserError(f"{source}: nothing to convert: {reason}; check the file and the options")
        self._run("DROP TABLE raw")

    def read_items(self, source: Path, items: Iterable[Item]) -> None:
        """Loads the catalog. Of duplicate items, the first row is kept.

        Args:
            source: Input file, for messages.
            items: Items with `item_id` and any of the text columns. Texts are cleaned here.

        Raises:
            UserError: An item has no id.
        """
        _log.info("reading %s", source)
        schema = pa.schema([("place", pa.int64()), *items_schema()])
        place = 0
        rows = iter(items)
        with progress(None, "items", "item") as bar:
            while batch := list(islice(rows, _ITEM_BATCH)):
                columns: dict[str, list[Any]] = {"place": list(range(place, place + len(batch)))}
                columns["item_id"] = [str(item.get("item_id") or "").strip(_BLANKS) for item in batch]
                if "" in columns["item_id"]:
                    row = place + columns["item_id"].index("") + 1
                    raise UserError(f"{source}: row {row}: the item id is missing; delete or complete the row")
                for name in ITEM_COLUMNS[1:]:
                    columns[name] = [clean_text(item.get(name)) for item in batch]
                self._database.register("batch", pa.table(columns, schema=schema))
                self._run("INSERT INTO items SELECT * FROM batch")
                place += len(batch)
                bar.update(len(batch))

    def write(self) -> None:
        """Writes both files. Interactions are grouped by user, oldest first; ties are in the order of the input."""
        missing = self._value("SELECT count(DISTINCT item_id) FROM interactions ANTI JOIN items USING (item_id)")
        columns = ", ".join(ITEM_COLUMNS)
        nulls = ", ".join(f"NULL AS {name}" for name in ITEM_COLUMNS[1:])
        self._write(
            "items.parquet",
            items_schema(),
            f"SELECT {columns} FROM (SELECT 0 AS later, place, {columns} FROM items "
            "QUALIFY row_number() OVER (PARTITION BY item_id ORDER BY place) = 1 UNION ALL "
            f"SELECT 1, min(place), item_id, {nulls} FROM interactions ANTI JOIN items USING (item_id) "
            "GROUP BY item_id) ORDER BY later, place",
        )
        rows = self._value("SELECT count(*) FROM interactions")
        # Shorter ids first, so that numbers are in numerical order.
        self._write(
            "interactions.parquet",
            interactions_schema(),
            "SELECT user_id, item_id, timestamp FROM interactions ORDER BY length(user_id), user_id, timestamp, place",
            rows,
        )
        users = self._value("SELECT count(DISTINCT user_id) FROM interactions")
        items = pq.read_metadata(self._folder / "items.parquet").num_rows
        note = f" ({missing:,} of them only in the interactions, without text)" if missing else ""
        _log.info("%s interactions, %s users, %s items%s", f"{rows:,}", f"{users:,}", f"{items:,}", note)

    def _write(self, name: str, schema: pa.Schema, query: str, rows: int | None = None) -> None:
        with (
            _user_errors(self._folder / name),
            self._database.cursor() as cursor,
            pq.ParquetWriter(self._folder / name, schema) as writer,
            progress(rows, name, "row") as bar,
        ):
            for batch in cursor.sql(query).to_arrow_reader(ROW_GROUP_ROWS):
                writer.write_table(pa.Table.from_batches([batch]).cast(schema))
                bar.update(batch.num_rows)

    def _run(self, statement: str, source: Path | None = None) -> None:
        with _user_errors(source or self._folder):
            self._database.execute(statement)

    def _value(self, query: str) -> Any:
        with _user_errors(self._folder):
            return self._database.execute(query).fetchall()[0][0]

    def _check(self, condition: str, source: Path, column: str, problem: str) -> None:
        count = self._value(f"SELECT count(*) FROM raw WHERE {condition}")
        if count:
            place = self._value(f"SELECT min(place) FROM raw WHERE {condition}")
            raise UserError(
                f"{source}: row {place:,}: {column} {problem} ({count:,} rows in all); correct or delete such rows, or "
                "check the format of the file"
            )


def _trimmed(column: str) -> str:
    """SQL of a text column, stripped of leading and trailing white space."""
    return f"trim({column}, {quote(_BLANKS)})"


@contextmanager
def conversion(output: str | Path) -> Iterator[Conversion]:
    """Yields a `Conversion`; the output folder appears when the block succeeds.

    Args:
        output: Output folder.

    Raises:
        UserError: `output` exists and is not empty.
    """
    with output_folder(output) as folder:
        work = Conversion(folder)
        try:
            yield work
            work.write()
        finally:
            work.close()
            shutil.rmtree(folder / "scratch", ignore_errors=True)


@contextmanager
def _user_errors(source: Path) -> Iterator[None]:
    """Converts the multi-line errors of DuckDB to one-line user errors that name the file."""
    try:
        yield
    except duckdb.Error as error:
        text = " ".join(str(error).split())
        line = re.search(r"CSV Error on Line: (\d+)", text)
        reason = re.search(
            r"Expected Number of Columns: \d+ Found: \d+|Value with unterminated quote found|not utf-8 encoded", text
        )
        what = f"line {line.group(1)}: {reason.group(0)}" if line and reason else text[:300].rstrip(". ")
        raise UserError(f"{source}: {what}; correct the file, or check its format and the free disk space") from None
