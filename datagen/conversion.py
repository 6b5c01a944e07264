"""Shared by all converters: writes interactions.parquet and items.parquet, or sessions.parquet, out of core.

DuckDB checks and sorts the rows, and reads those of known dumps. Its memory is limited to `_MEMORY`; the rest spills
next to the output.
"""

import logging
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from datagen.bad_rows import BadRows, Policy
from datagen.delimited import DelimitedFile
from datagen.json_lines import JsonLinesFile
from datagen.output import ITEM_COLUMNS, ROW_GROUP_ROWS, interactions_schema, items_schema, output_folder
from datagen.sessions import session_batches, sessions_schema
from datagen.sources import clean_text
from datagen.text_file import BadLine, Rows
from datagen.times import TimeReading, read_times
from llmgr_rec.cli import progress
from llmgr_rec.data.item_ids import (
    MATCH_EXAMPLES,
    describe_few_matches,
    few_match,
    is_float_id_sql,
    lost_digits_sql,
    plain_id_sql,
    plain_ids,
)
from llmgr_rec.data.missing_values import SUSPECT_IDS
from llmgr_rec.data.preparation.database import identifier, literal
from llmgr_rec.data.preparation.duckdb_database import connect
from llmgr_rec.errors import UserError
from llmgr_rec.files import storage_error
from llmgr_rec.paths import text_problem

_MEMORY = "2GiB"
_ITEM_BATCH = 1 << 14
# Stripped from both ends of ids and times; the last two are no-break space and byte order mark.
_BLANKS = " \t\n\r\f\v\u00a0\ufeff"
_IDS = ("user_id", "item_id")

_log = logging.getLogger(__name__)

Item = dict[str, str | None]


class Conversion:
    """A conversion in progress. Create it with `conversion(output)`.

    Args:
        folder: Unfinished output folder.
        policy: What happens to bad rows of delimited files; None for files of a known dump, which have none.
        missing_values: Words that stand for a missing value.
    """

    def __init__(
        self, folder: Path, policy: Policy | None = None, missing_values: frozenset[str] = frozenset()
    ) -> None:
        self._folder = folder
        self._policy: Policy | None = policy
        self._missing_values = missing_values
        self._has_item_file = False
        scratch = folder / "scratch"
        scratch.mkdir()
        self._database = connect(scratch, memory_limit=_MEMORY)
        columns = ", ".join(f"{name} VARCHAR" for name in ITEM_COLUMNS)
        self._run(f"CREATE TABLE items (place BIGINT, {columns})")

    def close(self) -> None:
        """Closes the scratch database."""
        self._database.close()

    def read_interactions(
        self,
        source: Path,
        rows: str | Iterable[Rows | BadLine],
        names: dict[str, str],
        min_rating: float | None = None,
        time_format: str = "auto",
    ) -> None:
        """Loads the interactions of a dump.

        Args:
            source: Input file, for messages.
            rows: Rows and broken lines of the columns in `names`, or a DuckDB table expression with string columns.
            names: Name in the file of `user_id`, `item_id`, `time` and `rating`. Without `time`, rows keep their order;
                `rating` is required with `min_rating`.
            min_rating: Drop rows with a lower rating.
            time_format: How times are read, see `read_times`.

        Raises:
            UserError: A value is missing or not a number, or no row remains.
        """
        _log.info("reading %s", source)
        bad = BadRows(source, self._policy)
        broken = self._load(source, rows, names, bad)
        times = TimeReading("0::BIGINT", "")
        if "time" in names:
            times = read_times(self._row, time_format, f"{source}: {names['time']}")
        for note in times.notes:
            _log.warning("%s: %s: %s", source, names["time"], note)
        rated = min_rating is not None
        problem = self._find_problems(bad, names, times, rated)
        total = self._value("SELECT count(*) FROM raw")
        unreadable = "time" in names and bad.has(_not_a_time(names, times))
        bad.finish(total + broken, times.remedy if unreadable and self._policy else "")
        condition = f"({problem}) IS NULL" if bad.count else "true"
        if rated:
            condition += f" AND CAST(rating AS DOUBLE) >= {min_rating!r}"
        self._run(
            f"CREATE TABLE interactions AS SELECT line AS place, {plain_id_sql('user_id')} AS user_id, "
            f"{plain_id_sql('item_id')} AS item_id, {times.sql} AS timestamp FROM raw WHERE {condition}",
            source,
        )
        kept = self._value("SELECT count(*) FROM interactions")
        if low := total + broken - bad.count - kept:
            _log.info("%s: %s rows are below --min_rating %s", source, f"{low:,}", min_rating)
        if not kept:
            reason = f"all {total:,} rows are below --min_rating {min_rating}" if total else "the file has no rows"
            raise UserError(f"{source}: nothing to convert: {reason}; check the file and the options")
        floats = self._row(
            f"SELECT {', '.join(f'count(*) FILTER ({is_float_id_sql(name)})' for name in _IDS)} FROM raw"
        )
        for name, count in zip(_IDS, floats, strict=True):
            if count:
                _log.info("%s: %s: %s ids such as 12.0 are read as 12", source, names[name], f"{count:,}")
        self._run("DROP TABLE raw")
        # Dumps have codes for ids, and their converters no option for missing values.
        if self._policy is not None:
            self._warn_of_suspect_ids(source, names)

    def _warn_of_suspect_ids(self, source: Path, names: dict[str, str]) -> None:
        """Warns of ids that may stand for a missing value."""
        words = ", ".join(map(literal, SUSPECT_IDS))
        for name in _IDS:
            found = self._rows(
                f"SELECT {name}, count(*) FROM interactions WHERE lower({name}) IN ({words}) GROUP BY ALL ORDER BY ALL"
            )
            if found:
                _log.warning(
                    "%s: %s is a word that may stand for a missing value in %s rows (%s); it is read as an id, unless "
                    "--missing_values names it",
                    source,
                    names[name],
                    f"{sum(count for _, count in found):,}",
                    ", ".join(repr(word) for word, _ in found),
                )

    def _load(self, source: Path, rows: str | Iterable[Rows | BadLine], names: dict[str, str], bad: BadRows) -> int:
        """Creates table raw with trimmed texts, null where missing; returns the number of broken lines."""
        columns = ", ".join(f"{self._trimmed(name)} AS {name}" for name in names)
        if isinstance(rows, str):
            selected = ", ".join(f"{identifier(column)} AS {name}" for name, column in names.items())
            query = f"SELECT row_number() OVER () AS line, {selected} FROM {rows}"
            self._run(f"CREATE TABLE raw AS SELECT line, {columns} FROM ({query})", source)
            return 0
        types = ", ".join(f"{name} VARCHAR" for name in names)
        self._run(f"CREATE TABLE raw (line BIGINT, {types})")
        broken = 0
        with progress(None, "rows", "row") as bar:
            for part in rows:
                if isinstance(part, BadLine):
                    broken += 1
                    bad.add(part.problem, 1, [(part.line, "")])
                    continue
                arrays = [pa.array(part.lines, pa.int64()), *part.columns]
                self._database.register("batch", pa.table(arrays, names=["line", *names]))
                self._run(f"INSERT INTO raw SELECT line, {columns} FROM batch", source)
                bar.update(len(part.lines))
        return broken

    def _find_problems(self, bad: BadRows, names: dict[str, str], times: TimeReading, rated: bool) -> str:
        """Reports the bad rows of table raw; returns SQL of a row's problem, null for a good row."""
        problems = [
            (f"{names[name]} is missing", f"{name} IS NULL", "''") for name in names if name != "rating" or rated
        ]
        problems += [
            (f"of {names[name]} was written as a float and has lost digits", lost_digits_sql(name), name)
            for name in _IDS
        ]
        if "time" in names:
            problems.append((_not_a_time(names, times), f"{times.sql} IS NULL", "time"))
        if rated:
            number = "NOT coalesce(isfinite(TRY_CAST(rating AS DOUBLE)), false)"
            problems.append((f"of {names['rating']} is not a number", number, "rating"))
        cases = " ".join(f"WHEN {test} THEN {place}" for place, (_, test, _) in enumerate(problems))
        problem = f"CASE {cases} END"
        values = " ".join(f"WHEN {place} THEN {value}" for place, (_, _, value) in enumerate(problems))
        found = self._rows(
            f"SELECT problem, count(*), min(line, 3), arg_min(value, line, 3) FROM (SELECT *, "
            f"CASE problem {values} END AS value FROM (SELECT *, {problem} AS problem FROM raw)) "
            "WHERE problem IS NOT NULL GROUP BY problem ORDER BY problem"
        )
        for place, count, lines, shown in found:
            bad.add(problems[place][0], count, zip(lines, shown, strict=True))
        return problem

    def _trimmed(self, column: str) -> str:
        """SQL of a text column, stripped of white space at both ends; null where it is empty or a missing value."""
        words = ", ".join(map(literal, ("", *sorted(self._missing_values))))
        trimmed = f"trim({column}, {literal(_BLANKS)})"
        return f"CASE WHEN {trimmed} NOT IN ({words}) THEN {trimmed} END"

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
                columns: dict[str, Any] = {"place": list(range(place, place + len(batch)))}
                ids = [str(item.get("item_id") or "").strip(_BLANKS) for item in batch]
                if "" in ids:
                    row = place + ids.index("") + 1
                    raise UserError(f"{source}: row {row}: the item id is missing; delete or complete the row")
                for row, item_id in enumerate(ids, start=place + 1):
                    if problem := text_problem(item_id):
                        raise UserError(f"{source}: row {row}: the item id is {item_id!r}; {problem}")
                columns["item_id"] = plain_ids(pa.array(ids, pa.string()))
                for name in ITEM_COLUMNS[1:]:
                    columns[name] = [clean_text(item.get(name)) for item in batch]
                self._database.register("batch", pa.table(columns, schema=schema))
                self._run("INSERT INTO items SELECT * FROM batch")
                place += len(batch)
                bar.update(len(batch))
        self._has_item_file = True
        lost = self._rows(f"SELECT item_id FROM items WHERE {lost_digits_sql('item_id')} ORDER BY place LIMIT 1")
        if lost:
            raise UserError(
                f"{source}: item id {lost[0][0]!r} was written as a float and has lost digits; write ids as text"
            )

    def read_item_file(self, file: DelimitedFile | JsonLinesFile, columns: dict[str, str]) -> None:
        """Loads the catalog from a file of named columns. Of duplicate items, the first row is kept.

        Args:
            file: The file.
            columns: Name in the file of `item_id` and of the text columns.

        Raises:
            UserError: An item has no id, and bad rows are an error.
        """
        bad = BadRows(file.path, self._policy)
        words: Counter[str] = Counter()
        total = 0

        def items() -> Iterator[Item]:
            nonlocal total
            for part in file.read(list(columns.values())):
                if isinstance(part, BadLine):
                    total += 1
                    bad.add(part.problem, 1, [(part.line, "")])
                    continue
                total += len(part.lines)
                for line, *values in zip(part.lines, *(column.to_pylist() for column in part.columns), strict=True):
                    stripped = [value.strip(_BLANKS) for value in values]
                    known = [None if word in self._missing_values else word for word in stripped]
                    if known[0]:
                        words.update(name for name, word in zip(columns, known, strict=True) if word is None)
                        yield dict(zip(columns, known, strict=True))
                    else:
                        bad.add(f"{columns['item_id']} is missing", 1, [(line, "")])

        self.read_items(file.path, items())
        bad.finish(total)
        if words:
            counts = ", ".join(f"{count:,} {columns[name]}" for name, count in words.items())
            _log.info("%s: read as missing, because they are words such as NULL or nan: %s", file.path, counts)

    def write_sessions(self, drop_duplicates: bool) -> None:
        """Writes sessions.parquet, one session per user in the order of their first rows; clicks are oldest first.

        Args:
            drop_duplicates: Whether clicks that are equal to an earlier one in user, item and time are dropped.
        """
        dropped = self._drop_duplicates() if drop_duplicates else 0
        query = (
            "SELECT first, user_id, item_id FROM interactions JOIN (SELECT user_id, min(place) AS first "
            "FROM interactions GROUP BY user_id) USING (user_id) ORDER BY first, timestamp, place"
        )
        path = self._folder / "sessions.parquet"
        sessions = 0
        with (
            _user_errors(path),
            self._database.cursor() as cursor,
            pq.ParquetWriter(path, sessions_schema()) as writer,
        ):
            for batch in session_batches(cursor.sql(query).to_arrow_reader(ROW_GROUP_ROWS)):
                writer.write_batch(batch)
                sessions += batch.num_rows
        clicks = self._value("SELECT count(*) FROM interactions")
        note = f", {dropped:,} duplicate clicks dropped" if dropped else ""
        _log.info("%s clicks, %s sessions%s", f"{clicks:,}", f"{sessions:,}", note)

    def _drop_duplicates(self) -> int:
        """Deletes clicks that are equal to an earlier one in user, item and time; returns their number."""
        return int(
            self._value(
                "DELETE FROM interactions WHERE place NOT IN "
                "(SELECT min(place) FROM interactions GROUP BY user_id, item_id, timestamp)"
            )
        )

    def write(self) -> None:
        """Writes interactions.parquet and items.parquet.

        Interactions are grouped by user, oldest first; ties are in the order of the input.

        Raises:
            UserError: There is an item file, and no item of it occurs in the interactions.
        """
        missing = self._value("SELECT count(DISTINCT item_id) FROM interactions ANTI JOIN items USING (item_id)")
        if self._has_item_file:
            self._compare_ids(missing)
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
        if repeated := self._value("SELECT count(*) - count(DISTINCT item_id) FROM items"):
            _log.info("rows of the item file that repeat an earlier item id: %s dropped", f"{repeated:,}")
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

    def _compare_ids(self, missing: int) -> None:
        """Warns if few ids of the interactions are in the item file."""
        total = self._value("SELECT count(DISTINCT item_id) FROM interactions")
        if not few_match(total - missing, total):
            return
        first = "SELECT item_id FROM {} ANTI JOIN {} USING (item_id) GROUP BY item_id ORDER BY min(place) LIMIT {}"
        in_log, in_items = (
            [item_id for (item_id,) in self._rows(first.format(one, other, MATCH_EXAMPLES))]
            for one, other in (("interactions", "items"), ("items", "interactions"))
        )
        problem = describe_few_matches(total - missing, total, in_log, in_items)
        if missing == total:
            raise UserError(f"{problem}; check that the files belong together, and write their ids in the same form")
        _log.warning("%s; the others become items without text", problem)

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

    def _rows(self, query: str) -> list[tuple[Any, ...]]:
        with _user_errors(self._folder):
            return self._database.execute(query).fetchall()

    def _row(self, query: str) -> tuple[Any, ...]:
        return self._rows(query)[0]

    def _value(self, query: str) -> Any:
        return self._row(query)[0]


def _not_a_time(names: dict[str, str], times: TimeReading) -> str:
    return f"of {names['time']} {times.problem}"


@contextmanager
def conversion(
    output: str | Path,
    policy: Policy | None = None,
    missing_values: frozenset[str] = frozenset(),
    write: Callable[[Conversion], None] = Conversion.write,
) -> Iterator[Conversion]:
    """Yields a `Conversion`; the output folder appears when the block succeeds.

    Args:
        output: Output folder.
        policy: What happens to bad rows of delimited files; None for files of a known dump, which have none.
        missing_values: Words that stand for a missing value.
        write: Writes the output when the block has ended.

    Raises:
        UserError: `output` exists and is not empty.
    """
    with output_folder(output) as folder:
        work = Conversion(folder, policy, missing_values)
        try:
            yield work
            write(work)
        finally:
            work.close()
            shutil.rmtree(folder / "scratch", ignore_errors=True)


@contextmanager
def _user_errors(source: Path) -> Iterator[None]:
    """Converts the multi-line errors of DuckDB to one-line user errors that name the file."""
    try:
        yield
    except duckdb.InterruptException:
        raise
    except duckdb.Error as error:
        if known := storage_error(error):
            raise known from None
        text = " ".join(str(error).split())
        line = re.search(r"CSV Error on Line: (\d+)", text)
        reason = re.search(
            r"Expected Number of Columns: \d+ Found: \d+|Value with unterminated quote found|not utf-8 encoded", text
        )
        what = f"line {line.group(1)}: {reason.group(0)}" if line and reason else text[:300].rstrip(". ")
        raise UserError(f"{source}: {what}; correct the file, or check its format") from None
