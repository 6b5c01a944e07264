"""Clicks on items that the item file does not have."""

import logging

from llmgr_rec.data.item_ids import MATCH_EXAMPLES, describe_few_matches, few_match
from llmgr_rec.data.preparation.database import Database
from llmgr_rec.data.preparation.settings import PrepareSettings
from llmgr_rec.data.schema import TEXT_COLUMNS
from llmgr_rec.errors import UserError

_log = logging.getLogger(__name__)


def resolve_missing_items(database: Database, settings: PrepareSettings, raw: str) -> int:
    """Adds the missing items to table items, if they are to be kept.

    Args:
        database: Scratch database with table items.
        settings: Settings of this run.
        raw: Query of the clicks with columns item_id and place (row of the input).

    Returns:
        Number of clicks that are dropped because their item is missing.

    Raises:
        UserError: Items are missing from the item file and may not be, or no item of the clicks is in it.
    """
    database.create(
        "missing",
        f"SELECT item_id, count(*) AS clicks, min(place) AS first FROM ({raw}) "
        "ANTI JOIN items USING (item_id) GROUP BY item_id",
    )
    count, first = database.run("SELECT sum(clicks), arg_min(item_id, first) FROM missing")[0]
    if not count:
        return 0
    if settings.items is None:
        _add_missing(database)
        return 0
    problem = _match_problem(database, raw)
    if settings.missing_items == "error":
        raise UserError(
            f"{settings.items}: column item_id lacks the items of {count:,} clicks, the first is {first!r}; "
            + (f"{problem}; write both in the same form, " if problem else "complete the file, ")
            + "or use --missing_items drop (drop those clicks) or keep (items without text)"
        )
    if problem is not None:
        if not database.value(f"SELECT count(*) FROM ({raw}) SEMI JOIN items USING (item_id)"):
            raise UserError(
                f"no click in the input names an item of {settings.items}: {problem}; write both in one form"
            )
        _log.warning("%s: %s", settings.items, problem)
    if settings.missing_items == "drop":
        return int(count)
    _add_missing(database)
    return 0


def _add_missing(database: Database) -> None:
    """Adds the items of table missing to table items, without text, in order of their first click."""
    texts = ", ".join(f"CAST(NULL AS VARCHAR) AS {column}" for column in TEXT_COLUMNS)
    last = int(database.value("SELECT coalesce(max(key), -1) FROM items"))
    database.create(
        "items",
        f"SELECT key, item_id, {', '.join(TEXT_COLUMNS)} FROM items UNION ALL "
        f"SELECT {last} + CAST(row_number() OVER (ORDER BY first, item_id) AS BIGINT), item_id, {texts} FROM missing",
    )


def _match_problem(database: Database, raw: str) -> str | None:
    missing = database.value("SELECT count(*) FROM missing")
    total = database.value(f"SELECT count(DISTINCT item_id) FROM ({raw})")
    if not few_match(total - missing, total):
        return None
    in_log = database.run(f"SELECT item_id FROM missing ORDER BY first LIMIT {MATCH_EXAMPLES}")
    in_items = database.run(
        f"SELECT item_id FROM items ANTI JOIN ({raw}) USING (item_id) ORDER BY key LIMIT {MATCH_EXAMPLES}"
    )
    return describe_few_matches(total - missing, total, [i for (i,) in in_log], [i for (i,) in in_items])
