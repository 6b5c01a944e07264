"""Cuts the log of each user into sessions where the user was inactive for a time."""

from typing import Any

from llmgr_rec.data.preparation.database import Database
from llmgr_rec.data.preparation.duration import nanoseconds_of
from llmgr_rec.data.preparation.load import time_factor
from llmgr_rec.data.preparation.settings import PrepareSettings
from llmgr_rec.data.preparation.source import Source
from llmgr_rec.data.time_units import UNITS, unit_sql
from llmgr_rec.errors import UserError


def cut_sessions(database: Database, clicks: Source, settings: PrepareSettings) -> dict[str, Any]:
    """Replaces the users of tables users and events by their sessions.

    A session ends before a click whose time is more than the gap after that of the click before. The sessions of user
    `u` are named `u/1`, `u/2` and so on, in the order of time.

    Args:
        database: Scratch database with tables users and events.
        clicks: Source of the interactions.
        settings: Settings of this run, with a session gap.

    Returns:
        The gap, the unit of the timestamps, and the numbers of users, sessions and clicks.

    Raises:
        UserError: The unit of the timestamps is unknown.
    """
    assert settings.session_gap is not None
    unit, per_second = _time_unit(database, clicks, settings)
    gap = nanoseconds_of(settings.session_gap, "--session_gap") * per_second // UNITS["nanoseconds"]
    users = int(database.value("SELECT count(*) FROM users"))
    # HUGEINT, because the difference of two times may exceed 64 bits.
    database.create(
        "numbered",
        "SELECT *, 1 + sum(CAST(starts AS BIGINT)) OVER clicks AS number FROM (SELECT *, "
        f"coalesce(CAST(time AS HUGEINT) - lag(time) OVER clicks > {gap}, false) AS starts FROM events "
        "WINDOW clicks AS (PARTITION BY user ORDER BY time, row)) "
        "WINDOW clicks AS (PARTITION BY user ORDER BY time, row ROWS UNBOUNDED PRECEDING)",
    )
    # Like the key of a user: the first row of the input, so that sessions keep the order of the input.
    database.create("cut", "SELECT user, number, min(row) AS key FROM numbered GROUP BY user, number")
    database.create(
        "users",
        "SELECT c.key, CAST(u.name AS VARCHAR) || '/' || CAST(c.number AS VARCHAR) AS name "
        "FROM cut c JOIN users u ON u.key = c.user",
    )
    database.create(
        "events",
        "SELECT c.key AS user, n.item, n.time, n.row, n.phase "
        "FROM numbered n JOIN cut c ON c.user = n.user AND c.number = n.number",
    )
    database.drop("numbered")
    database.drop("cut")
    sessions, count = database.run("SELECT count(DISTINCT user), count(*) FROM events")[0]
    return {"gap": settings.session_gap, "unit": unit, "users": users, "sessions": sessions, "clicks": count}


def _time_unit(database: Database, clicks: Source, settings: PrepareSettings) -> tuple[str, int]:
    """Unit of column timestamp, a key of UNITS, and how many units of column time of events are a second."""
    if clicks.types["timestamp"] not in ("int64", "float"):
        if settings.time_unit != "auto":
            raise UserError(
                f"--time_unit {settings.time_unit}: column timestamp is not a number, its unit is known; leave it out"
            )
        return "nanoseconds", UNITS["nanoseconds"]
    factor = time_factor(database, clicks)
    if settings.time_unit != "auto":
        return settings.time_unit, UNITS[settings.time_unit] * factor
    first, last, *units = database.run(
        f"SELECT first, last, {unit_sql('first')}, {unit_sql('last')} "
        f"FROM (SELECT min(time) / {factor} AS first, max(time) / {factor} AS last FROM events)"
    )[0]
    if units[0] is None or units[0] != units[1]:
        raise UserError(
            f"--session_gap {settings.session_gap}: the unit of column timestamp is unclear, its numbers are from "
            f"{first:.15g} to {last:.15g}; correct them, or name their unit since 1970 by --time_unit "
            f"({', '.join(UNITS)})"
        )
    return units[0], UNITS[units[0]] * factor
