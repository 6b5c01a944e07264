"""The iterative k-core filter, and the catalog of the remaining items."""

from llmgr_rec.data.preparation.database import Database
from llmgr_rec.errors import UserError


def apply_core(database: Database, min_per_item: int, min_per_user: int) -> int:
    """Deletes clicks of items and users with too few clicks, repeatedly, until all remaining ones have enough.

    Args:
        database: Scratch database with table events.
        min_per_item: Minimum number of clicks per item; 0 or 1 disables the filter.
        min_per_user: Minimum number of clicks per user; 0 or 1 disables the filter.

    Returns:
        Number of remaining clicks.

    Raises:
        UserError: No click remains.
    """
    before = database.value("SELECT count(*) FROM events")
    if before == 0:
        raise UserError("no click in the input names an item of the item file; check the item ids in both files")
    minimums = {column: minimum for column, minimum in (("item", min_per_item), ("user", min_per_user)) if minimum > 1}
    deleted = sum(_delete_rare(database, column, minimum) for column, minimum in minimums.items())
    # With a single minimum, one pass is enough.
    while deleted and len(minimums) > 1:
        deleted = sum(_delete_rare(database, column, minimum) for column, minimum in minimums.items())
    after = int(database.value("SELECT count(*) FROM events"))
    if after == 0:
        raise UserError(
            f"the k-core filter removes all {before:,} clicks: no set of users and items has {min_per_user} clicks per "
            f"user and {min_per_item} per item; lower --min_interactions (0 disables the filter)"
        )
    return after


def _delete_rare(database: Database, column: str, minimum: int) -> int:
    rare = f'SELECT "{column}" FROM events GROUP BY "{column}" HAVING count(*) < {minimum}'
    return database.delete("events", [column], rare)


def count_clicked(database: Database) -> dict[str, int]:
    """Numbers of `clicks`, and of the `sessions` and `items` that have any.

    Args:
        database: Scratch database with table events.
    """
    # Groups spill to disk, and distinct counts do not.
    tables = ["events", "(SELECT user FROM events GROUP BY user)", "(SELECT item FROM events GROUP BY item)"]
    counts = ", ".join(f"(SELECT count(*) FROM {table})" for table in tables)
    return dict(zip(("clicks", "sessions", "items"), map(int, database.run(f"SELECT {counts}")[0]), strict=True))


def number_items(database: Database, keep_unseen: bool) -> int:
    """Creates table catalog (key, index): the remaining items, numbered from 0 in the order of the item file.

    Args:
        database: Scratch database with tables items and events.
        keep_unseen: Keep items without clicks.

    Returns:
        Number of items.
    """
    seen = "" if keep_unseen else "WHERE key IN (SELECT item FROM events)"
    number = "CAST(row_number() OVER (ORDER BY key) AS BIGINT) - 1"
    database.create("catalog", f'SELECT key, {number} AS "index" FROM items {seen}')
    return int(database.value("SELECT count(*) FROM catalog"))


def drop_users_without_clicks(database: Database) -> None:
    """Deletes users that have no clicks left.

    Args:
        database: Scratch database with tables users and events.
    """
    database.delete("users", ["key"], "SELECT key FROM users ANTI JOIN events ON events.user = users.key")
