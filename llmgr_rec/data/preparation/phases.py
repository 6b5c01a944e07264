"""Assigns clicks to phases: 0 training, 1 validation, 2 test, by time or by the input.

All split protocols derive rows from phases in the same way (see windows.py): the clicks of phase 0 are training clicks,
the last click of phase 1 is the validation target, and the last click of phase 2 is the test target, each with all
clicks before it as history. leave_one_out needs no phases here, because it goes by position.
"""

from collections.abc import Sequence

from llmgr_rec.data.preparation.database import Database
from llmgr_rec.data.preparation.settings import PrepareSettings
from llmgr_rec.errors import UserError

# Levels of quantiles are rounded to such parts.
_LEVELS = 10**9


def assign_phases(database: Database, settings: PrepareSettings) -> dict[str, int]:
    """Sets the column phase of table events according to the split protocol.

    Args:
        database: Scratch database with tables users and events.
        settings: Settings of this run.

    Returns:
        Last timestamp of the training and the validation window for the temporal split; empty for other splits.

    Raises:
        UserError: A split is empty.
    """
    if settings.split == "temporal":
        return _cut_by_time(database, settings)
    if settings.split == "predefined" and settings.valid_share > 0:
        _move_newest_to_validation(database, settings.valid_share)
    return {}


def _cut_by_time(database: Database, settings: PrepareSettings) -> dict[str, int]:
    """Splits at quantiles of the users' last clicks, so that the shares are shares of users."""
    shares = (settings.test_share + settings.valid_share, settings.test_share)
    train_end, valid_end = _last_clicks(database, [1 - share for share in shares])
    newest = database.value("SELECT max(time) FROM events")
    if valid_end == newest or (train_end == valid_end and settings.valid_share > 0):
        raise UserError(
            "--split temporal leaves a split empty: there are too few sessions, or too many end at timestamp "
            f"{valid_end}; change --valid_share and --test_share, or use another --split"
        )
    phase = f"CASE WHEN time <= {train_end} THEN 0 WHEN time <= {valid_end} THEN 1 ELSE 2 END"
    database.create("events", f"SELECT user, item, time, row, CAST({phase} AS TINYINT) AS phase FROM events")
    return {"train": int(train_end), "valid": int(valid_end)}


def _last_clicks(database: Database, levels: Sequence[float]) -> list[int]:
    """Quantiles of the times of the users' last clicks: each is the time of a user.

    Counted by time, because engines compute quantiles of large integers in floats, or with all values in memory.
    """
    last = "SELECT max(time) AS last FROM events GROUP BY user"
    users = database.value(f"SELECT count(*) FROM ({last})")
    # Billionths, because 1 - 0.2 - 0.1 is slightly above 0.7 and would include one more user.
    places = [max(-(-users * round(level * _LEVELS) // _LEVELS), 1) for level in levels]
    counts = f"SELECT last, count(*) AS users FROM ({last}) GROUP BY last"
    sums = f"SELECT last, sum(users) OVER (ORDER BY last) AS reached FROM ({counts})"
    firsts = ", ".join(f"min(last) FILTER (reached >= {place})" for place in places)
    return [int(time) for time in database.run(f"SELECT {firsts} FROM ({sums})")[0]]


def _move_newest_to_validation(database: Database, share: float) -> None:
    """Moves the newest training sessions to validation, unless the input has validation sessions."""
    if database.value("SELECT count(*) FROM events WHERE phase = 1"):
        return
    sessions = "SELECT user, max(time) AS last FROM events GROUP BY user HAVING max(phase) = 0 AND count(*) > 1"
    count = int(database.value(f"SELECT count(*) FROM ({sessions})") * share)
    newest = f"SELECT user AS moved FROM ({sessions}) ORDER BY last DESC, user DESC LIMIT {count}"
    database.create(
        "events",
        "SELECT user, item, time, row, CAST(CASE WHEN moved IS NULL THEN phase ELSE 1 END AS TINYINT) AS phase "
        f"FROM events LEFT JOIN ({newest}) ON moved = user",
    )
