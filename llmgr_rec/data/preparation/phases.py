"""Assigns clicks to phases: 0 training, 1 validation, 2 test, by time or by the input.

All split protocols derive rows from phases in the same way (see windows.py): the clicks of phase 0 are training clicks,
the last click of phase 1 is the validation target, and the last click of phase 2 is the test target, each with all
clicks before it as history. leave_one_out needs no phases here, because it goes by position.
"""

from llmgr_rec.data.preparation.database import Database
from llmgr_rec.data.preparation.settings import PrepareSettings
from llmgr_rec.errors import UserError


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
    # Rounded, because 1 - 0.2 - 0.1 is slightly above 0.7 and would include one more session.
    levels = [round(1 - share, 9) for share in (settings.test_share + settings.valid_share, settings.test_share)]
    last = "SELECT max(time) AS last FROM events GROUP BY user"
    train_end, valid_end = database.value(f"SELECT quantile_disc(last, {levels}) FROM ({last})")
    newest = database.value("SELECT max(time) FROM events")
    if valid_end == newest or (train_end == valid_end and settings.valid_share > 0):
        raise UserError(
            "--split temporal leaves a split empty: there are too few sessions, or too many end at timestamp "
            f"{valid_end}; change --valid_share and --test_share, or use another --split"
        )
    database.run(
        f"UPDATE events SET phase = CASE WHEN time <= {train_end} THEN 0 WHEN time <= {valid_end} THEN 1 ELSE 2 END "
        f"WHERE time > {train_end}"
    )
    return {"train": int(train_end), "valid": int(valid_end)}


def _move_newest_to_validation(database: Database, share: float) -> None:
    """Moves the newest training sessions to validation, unless the input has validation sessions."""
    if database.value("SELECT count(*) FROM events WHERE phase = 1"):
        return
    sessions = "SELECT user, max(time) AS last FROM events GROUP BY user HAVING max(phase) = 0 AND count(*) > 1"
    count = int(database.value(f"SELECT count(*) FROM ({sessions})") * share)
    newest = f"SELECT user FROM ({sessions}) ORDER BY last DESC, user DESC LIMIT {count}"
    database.run(f"UPDATE events SET phase = 1 WHERE user IN ({newest})")
