"""Duplicate rows and consecutive repeats."""

from collections.abc import Iterator
from contextlib import contextmanager

from llmgr_rec.data.preparation.database import Database
from llmgr_rec.errors import UserError

# From this share of duplicate rows on, times may be coarser than clicks.
MANY_DUPLICATES = 0.05
# Rows of an event that are equal in user, item, time and, with a predefined split, split.
_SAME = "user, item, time, phase"


def count_duplicates(database: Database) -> int:
    """Number of clicks that are equal to an earlier one in user, item and time.

    Args:
        database: Scratch database with table events.
    """
    groups = f"SELECT count(*) - 1 AS more FROM events GROUP BY {_SAME} HAVING count(*) > 1"
    return int(database.value(f"SELECT coalesce(sum(more), 0) FROM ({groups})"))


def drop_duplicates(database: Database) -> int:
    """Deletes clicks that are equal to an earlier one in user, item and time.

    Args:
        database: Scratch database with table events.

    Returns:
        Number of deleted clicks.
    """
    return _keep(database, f"row_number() OVER (PARTITION BY {_SAME} ORDER BY row) = 1")


def merge_consecutive_repeats(database: Database) -> int:
    """Deletes clicks on the item that the session clicked just before.

    Args:
        database: Scratch database with table events.

    Returns:
        Number of deleted clicks.
    """
    return _keep(database, "item IS DISTINCT FROM lag(item) OVER (PARTITION BY user ORDER BY time, row)")


def _keep(database: Database, condition: str) -> int:
    """Keeps the clicks of a condition on a window, and returns the number of the others."""
    # To sort and write the clicks spills to disk; to delete what a join finds takes memory that grows with the log.
    before = database.value("SELECT count(*) FROM events")
    # The columns by name: for Spark, QUALIFY becomes a column of its own, which * would keep.
    database.create("events", f"SELECT user, item, time, row, phase FROM events QUALIFY {condition}")
    return int(before - database.value("SELECT count(*) FROM events"))


@contextmanager
def naming_duplicates(dropped: int, read: int) -> Iterator[None]:
    """Adds to user errors that many rows were dropped as duplicates, which may be the reason that too few are left.

    Args:
        dropped: Number of dropped clicks.
        read: Number of clicks read.
    """
    try:
        yield
    except UserError as error:
        if dropped <= MANY_DUPLICATES * read:
            raise
        raise UserError(
            f"{error}; {dropped:,} of {read:,} rows were dropped before, because they equal another one in user, item "
            "and time: if times are coarser than clicks, use --duplicates keep"
        ) from None
