"""Loads the input files into three scratch tables, and rejects invalid rows.

    users   key, name              a user or a session; key = number of its first row
    items   key, item_id, texts    the catalog; key = row number in the item file
    events  user, item, time, row, phase   one click; row orders the clicks of a user that share a time

Keys are row numbers, so sorting by key restores the order of the input.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from llmgr_rec.comma_separated import split_renames
from llmgr_rec.data.missing_values import MISSING_VALUES, SUSPECT_IDS
from llmgr_rec.data.preparation.database import Database, identifier, literal
from llmgr_rec.data.preparation.missing_items import resolve_missing_items
from llmgr_rec.data.preparation.settings import PrepareSettings
from llmgr_rec.data.preparation.source import Kind, Source, inexact, open_source
from llmgr_rec.data.schema import DOMAIN_SEPARATOR, TEXT_COLUMNS
from llmgr_rec.data.time_units import describe_units, unit_sql
from llmgr_rec.errors import UserError

# Above, a number has no fraction that matters, and a millionth of it exceeds int64.
_LARGEST_WITH_FRACTION = 9e12
_WORDS = ", ".join(map(literal, MISSING_VALUES))
_ID_WORDS = ", ".join(map(literal, dict.fromkeys([*MISSING_VALUES, *SUSPECT_IDS])))
_log = logging.getLogger(__name__)
_SPLIT_WORDS = {"train": 0, "valid": 1, "validation": 1, "val": 1, "dev": 1, "test": 2}


def open_inputs(settings: PrepareSettings) -> tuple[Source, Source | None]:
    """Opens clicks and items; reads only their footers.

    Args:
        settings: Settings of this run.

    Returns:
        Source of the interactions or sessions, and of the items, if there is an item file.

    Raises:
        UserError: A file or column is missing or has the wrong type.
    """
    split = split_column(settings)
    if settings.interactions is not None:
        required: dict[str, Kind] = {"user_id": "id", "item_id": "id", "timestamp": "time"}
        optional: dict[str, Kind] = {}
        name, path, item_column = "interactions", settings.interactions, "item_id"
    else:
        assert settings.sessions is not None
        required, optional = {"session_id": "id", "items": "id_list"}, {"timestamp": "time"}
        name, path, item_column = "sessions", settings.sessions, "items"
        if settings.split == "temporal":
            required["timestamp"] = optional.pop("timestamp")
    if split is not None:
        (required if settings.split_column else optional)[split] = "text"
    names = split_renames(settings.rename, "--rename", [*required, *optional])
    clicks = open_source(path, name, required, optional, names)
    items = _open_items(settings.items, settings.rename_items)
    if items and clicks.types[item_column] != items.types["item_id"]:
        # One file has text, so the ids of the other are compared as text.
        _log.info(
            "item ids are numbers in %s, but text in %s; all are read as text",
            *((path, settings.items) if clicks.types[item_column] == "int64" else (settings.items, path)),
        )
        clicks = replace(clicks, types=clicks.types | {item_column: "string"})
        items = replace(items, types=items.types | {"item_id": "string"})
    for source in (clicks, items):
        if source and source.float_ids:
            _log.info("%s: floats in column %s are read as integers", source.files[0], " and ".join(source.float_ids))
    return clicks, items


def _open_items(path: str | None, rename: str | None) -> Source | None:
    if path is None:
        return None
    texts: dict[str, Kind] = dict.fromkeys(TEXT_COLUMNS, "text")
    names = split_renames(rename, "--rename_items", ["item_id", *texts])
    items = open_source(path, "items", {"item_id": "id"}, texts, names)
    if "title" not in items.types:
        _log.warning("%s: there is no column title, so the items have none", path)
    return items


def item_id_type(clicks: Source) -> str:
    """Type that item ids are read as, string or int64; it is that of the item file, too."""
    return clicks.types.get("item_id") or clicks.types["items"]


def split_column(settings: PrepareSettings) -> str | None:
    """Name of the column with the predefined split; None if the split does not come from a column."""
    if settings.split != "predefined" or settings.split_prefix:
        return None
    return settings.split_column or "split"


def load_items(database: Database, items: Source | None, clicks: Source) -> None:
    """Creates table items; without an item file it is empty until the clicks are read.

    Args:
        database: Scratch database.
        items: Source of the catalog.
        clicks: Source of the clicks.

    Raises:
        UserError: An item id is null, negative or a duplicate.
    """
    if items is None:
        id_type = "VARCHAR" if item_id_type(clicks) == "string" else "BIGINT"
        columns = ", ".join(f"CAST(NULL AS VARCHAR) AS {column}" for column in TEXT_COLUMNS)
        database.create(
            "items", f"SELECT CAST(NULL AS BIGINT) AS key, CAST(NULL AS {id_type}) AS item_id, {columns} WHERE false"
        )
        return
    texts = ", ".join(
        f"CAST({column} AS VARCHAR) AS {column}" if column in items.types else f"CAST(NULL AS VARCHAR) AS {column}"
        for column in TEXT_COLUMNS
    )
    _check_values(database, items, ["item_id"], [column for column in TEXT_COLUMNS if column in items.types])
    database.create("items", f"SELECT source_row AS key, item_id, {texts} FROM {items.sql(database)}")
    duplicates = database.run(
        "SELECT count(*) OVER (), item_id, keys[1], keys[2] FROM (SELECT item_id, list_sort(list(key)) AS keys "
        "FROM items WHERE item_id IN (SELECT item_id FROM items GROUP BY item_id HAVING count(*) > 1) "
        "GROUP BY item_id) ORDER BY keys[2] LIMIT 1"
    )
    if duplicates:
        count, item_id, first, second = duplicates[0]
        raise UserError(
            f"{items.locate(second)}: item_id {item_id!r} is a duplicate of {items.locate(first)} "
            f"({count:,} ids occur more than once); keep one row per item"
        )


def load_interactions(database: Database, clicks: Source, settings: PrepareSettings) -> int:
    """Creates tables users and events from rows (user_id, item_id, timestamp).

    Args:
        database: Scratch database with table items.
        clicks: Source of the interactions.
        settings: Settings of this run.

    Returns:
        Clicks read.

    Raises:
        UserError: A value is null or negative, or an item is unknown.
    """
    _check_values(database, clicks, ["user_id", "item_id", "timestamp"])
    _check_units(database, clicks, settings)
    label, time = _label_sql(clicks, settings), _time_sql(database, clicks)
    database.create(
        "users", f"SELECT min(source_row) AS key, user_id AS name FROM {clicks.sql(database)} GROUP BY user_id"
    )
    return _load_events(
        database,
        clicks,
        settings,
        f"SELECT user_id AS name, item_id, {time} AS time, source_row AS row, "
        f"source_row AS place, {label} AS label FROM {clicks.sql(database)}",
    )


def load_sessions(database: Database, clicks: Source, settings: PrepareSettings) -> int:
    """Creates tables users and events from rows (session_id, items).

    Args:
        database: Scratch database with table items.
        clicks: Source of the sessions.
        settings: Settings of this run.

    Returns:
        Clicks read.

    Raises:
        UserError: A value is null, a session id is a duplicate, or an item is unknown.
    """
    columns = ["session_id", "items"] + (["timestamp"] if "timestamp" in clicks.types else [])
    _check_values(database, clicks, columns)
    _check_units(database, clicks, settings)
    time = _time_sql(database, clicks)
    database.create("users", f"SELECT source_row AS key, session_id AS name FROM {clicks.sql(database)}")
    duplicates = database.run("SELECT name, max(key) FROM users GROUP BY name HAVING count(*) > 1 ORDER BY 2 LIMIT 1")
    if duplicates:
        name, key = duplicates[0]
        raise UserError(
            f"{clicks.locate(key)}: session_id {name!r} occurs more than once; give each session one row and one id"
        )
    return _load_events(
        database,
        clicks,
        settings,
        f"SELECT session_id AS name, unnest(items) AS item_id, {time} AS time, "
        "generate_subscripts(items, 1) AS row, source_row AS place, "
        f"{_label_sql(clicks, settings)} AS label FROM {clicks.sql(database)}",
    )


def _load_events(database: Database, clicks: Source, settings: PrepareSettings, raw: str) -> int:
    """Joins clicks with users and items into table events.

    Args:
        database: Scratch database with tables items and users.
        clicks: Source of the clicks.
        settings: Settings of this run.
        raw: Query with columns name, item_id, time, row, place (row of the input) and label.

    Returns:
        Number of clicks read.

    Raises:
        UserError: An item or a split label is unknown.
    """
    dropped = resolve_missing_items(database, settings, raw)
    user = "u.key" if settings.interactions else "r.place"
    join = "JOIN users u ON u.name = r.name" if settings.interactions else ""
    database.create(
        "events",
        f"SELECT {user} AS user, i.key AS item, r.time, r.row, "
        f"{_phase_sql(clicks, settings)} AS phase FROM ({raw}) r JOIN items i ON i.item_id = r.item_id {join}",
    )
    _check_split_labels(database, clicks, settings)
    return int(database.value("SELECT count(*) FROM events")) + dropped


def _check_values(database: Database, source: Source, columns: list[str], texts: Sequence[str] = ()) -> None:
    """Raises a `UserError` if a value is invalid; warns of ids and texts that are words for a missing value."""
    tests = [(column, *test) for column in columns for test in _value_tests(database, source, column)]
    ids = [column for column in columns if source.types[column] == "string" and column != "items"]
    tests += [(column, f"({column} IN ({_ID_WORDS}) OR lower({column}) IN ({_ID_WORDS}))", "") for column in ids]
    tests += [(column, f"{column} IN ({_WORDS})", "") for column in texts]
    selected = ", ".join(f"count(*) FILTER ({test}), min(source_row) FILTER ({test})" for _, test, _ in tests)
    results = database.run(f"SELECT {selected} FROM {source.sql(database)}")[0]
    for position, (column, _, problem) in enumerate(tests):
        count, row = results[2 * position : 2 * position + 2]
        if count and problem:
            raise UserError(f"{source.locate(row)}: column {column} {problem.format(f'{count:,}')}")
        if count:
            _log.warning(
                "%s: column %s is a word for a missing value in %s rows (one of %s); it is read as any other text",
                source.locate(row),
                column,
                f"{count:,}",
                _ID_WORDS if column in ids else _WORDS,
            )


def _value_tests(database: Database, source: Source, column: str) -> Iterator[tuple[str, str]]:
    """SQL conditions of an invalid value, each with the end of a message, in which {} is the number of rows."""
    kind = source.types[column]
    if column in source.float_ids:
        yield (
            inexact(column),
            "is a float, but no exact integer ({} rows in all), so digits are lost; write ids as integers or strings",
        )
    null = "null or NaN" if kind == "float" or column in source.float_ids else "null"
    yield f"{column} IS NULL", f"is {null} ({{}} in all); fill or delete such rows"
    if column == "items":
        yield "list_count(items) < array_length(items)", "holds a null item ({} rows in all); delete it from the list"
    if kind in ("timestamp", "date"):
        yield database.beyond_epoch_ns(column), "is not between the years 1678 and 2261 ({} rows in all); correct it"
    elif column == "timestamp":
        # NaT of pandas is the smallest integer.
        yield f"abs(CAST({column} AS DOUBLE)) >= 9.2e18", "is not a time ({} rows in all); fill or delete such rows"
    elif kind == "string" and column != "items":
        yield f"{column} = ''", "is empty ({} in all); fill or delete such rows"
    elif kind == "int64":
        number = "list_min(items)" if column == "items" else column
        yield f"{number} < 0", "is negative ({} rows in all); give numbers of at least 0"


def _check_split_labels(database: Database, clicks: Source, settings: PrepareSettings) -> None:
    place_column = "row" if settings.interactions else "user"
    count, place = database.run(f'SELECT count(*), min("{place_column}") FROM events WHERE phase IS NULL')[0]
    if not count:
        return
    column = split_column(settings)
    if column in clicks.types:
        words = ", ".join(_SPLIT_WORDS)
        raise UserError(f"{clicks.locate(place)}: column {column} is not one of {words} ({count:,} clicks); correct it")
    name = "user_id" if settings.interactions else "session_id"
    raise UserError(
        f"{clicks.locate(place)}: column {name} does not start with train_, valid_ or test_ ({count:,} clicks), and "
        f"there is no column {column or 'split'}; name the column with --split_column, or use another --split"
    )


def _label_sql(clicks: Source, settings: PrepareSettings) -> str:
    column = split_column(settings)
    return f"lower(CAST({identifier(column)} AS VARCHAR))" if column is not None and column in clicks.types else "NULL"


def _phase_sql(clicks: Source, settings: PrepareSettings) -> str:
    """SQL of the phase of a click of relation r: 0 train, 1 valid, 2 test, NULL if unknown."""
    if settings.split != "predefined":
        return "CAST(0 AS TINYINT)"
    if split_column(settings) in clicks.types:
        word = "r.label"
    else:
        name = "CAST(r.name AS VARCHAR)"
        if clicks.domains:
            name = f"regexp_replace({name}, '^[^{DOMAIN_SEPARATOR}]*{DOMAIN_SEPARATOR}', '')"
        word = f"regexp_extract(lower({name}), '^({'|'.join(_SPLIT_WORDS)})[_.:-]', 1)"
    cases = " ".join(f"WHEN '{name}' THEN {phase}" for name, phase in _SPLIT_WORDS.items())
    return f"CAST(CASE {word} {cases} END AS TINYINT)"


def _check_units(database: Database, clicks: Source, settings: PrepareSettings) -> None:
    """Raises a `UserError` if the numbers of column timestamp are of several units, which would mix up their order."""
    if clicks.types.get("timestamp") not in ("int64", "float") or settings.time_unit != "auto":
        return
    units = f"SELECT {unit_sql('timestamp')} AS unit FROM {clicks.sql(database)}"
    counts = dict(database.run(f"SELECT unit, count(*) FROM ({units}) WHERE unit IS NOT NULL GROUP BY unit"))
    if len(counts) > 1:
        raise UserError(
            f"{settings.interactions or settings.sessions}: column timestamp is {describe_units(counts)} since 1970; "
            "write one unit, or name that of all by --time_unit, such as milliseconds"
        )


def _time_sql(database: Database, clicks: Source) -> str:
    kind = clicks.types.get("timestamp")
    if kind is None:
        return "CAST(0 AS BIGINT)"
    if kind == "float":
        return f"CAST(round(timestamp * {time_factor(database, clicks)}) AS BIGINT)"
    if kind in ("timestamp", "date"):
        return database.epoch_ns("timestamp", kind == "date")
    return "CAST(timestamp AS BIGINT)"


def time_factor(database: Database, clicks: Source) -> int:
    """What column timestamp is multiplied by in table events: seconds with a fraction become microseconds.

    Args:
        database: Scratch database.
        clicks: Source of the interactions or sessions.
    """
    if clicks.types.get("timestamp") != "float":
        return 1
    whole, largest = database.run(
        f"SELECT bool_and(timestamp = floor(timestamp)), max(abs(timestamp)) FROM {clicks.sql(database)}"
    )[0]
    return 1 if whole or largest > _LARGEST_WITH_FRACTION else 10**6
