"""Which clicks stay: the iterative k-core, and the catalogue that remains."""

from llmgr_rec.data.preparation.database import Database
from llmgr_rec.errors import UserError


def apply_core(database: Database, min_per_item: int, min_per_user: int) -> int:
    """Deletes clicks of rare items and short users again and again until all that remain have enough.

    Args:
        database: Scratch database with table events.
        min_per_item: Fewest clicks of an item; 0 or 1 filters nothing.
        min_per_user: Fewest clicks of a user; 0 or 1 filters nothing.

    Returns:
        Clicks that remain.

    Raises:
        UserError: Nothing remains.
    """
    before = database.value("SELECT count(*) FROM events")
    if before == 0:
        raise UserError("the input holds no click of a known item; check the item ids in both files")
    limits = {column: least for column, least in (("item", min_per_item), ("user", min_per_user)) if least > 1}
    deleted = sum(_delete_rare(database, column, least) for column, least in limits.items())
    # With one limit alone a single pass is stable.
    while deleted and len(limits) > 1:
        deleted = sum(_delete_rare(database, column, least) for column, least in limits.items())
    after = int(database.value("SELECT count(*) FROM events"))
    if after == 0:
        raise UserError(
            f"the k-core leaves none of {before:,} clicks: no group of users and items has {min_per_user} clicks a "
            f"user and {min_per_item} an item; lower --min_interactions (0 switches it off)"
        )
    return after


def _delete_rare(database: Database, column: str, least: int) -> int:
    rare = f'SELECT "{column}" FROM events GROUP BY "{column}" HAVING count(*) < {least}'
    return int(database.value(f'DELETE FROM events WHERE "{column}" IN ({rare})'))


def number_items(database: Database, keep_unseen: bool) -> int:
    """Makes table catalogue (key, index): the items that stay, numbered from 0 in the order of the item file.

    Args:
        database: Scratch database with tables items and events.
        keep_unseen: Keep items that no click names.

    Returns:
        Number of items.
    """
    seen = "" if keep_unseen else "WHERE key IN (SELECT item FROM events)"
    database.run(
        f'CREATE TABLE catalogue AS SELECT key, row_number() OVER (ORDER BY key) - 1 AS "index" FROM items {seen}'
    )
    return int(database.value("SELECT count(*) FROM catalogue"))


def drop_silent_users(database: Database) -> None:
    """Deletes the users that no click names any more.

    Args:
        database: Scratch database with tables users and events.
    """
    database.run("DELETE FROM users WHERE key NOT IN (SELECT user FROM events)")
