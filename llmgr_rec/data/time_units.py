"""Units of epoch times, recognized by their size: those from 1990 to 2100 are of different size in each unit."""

from collections.abc import Mapping

_FIRST, _LAST = 631_152_000, 4_102_444_800
UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
"""Number of units in a second, coarsest unit first."""


def unit_sql(number: str) -> str:
    """SQL of the unit of a number; null for a number that is no epoch time from 1990 to 2100 in any unit.

    Args:
        number: SQL of a number.
    """
    cases = " ".join(
        f"WHEN {number} BETWEEN {_FIRST * scale} AND {_LAST * scale} THEN '{name}'" for name, scale in UNITS.items()
    )
    return f"CASE {cases} END"


def describe_units(counts: Mapping[str, int]) -> str:
    """Text such as "3 in seconds and 2 in milliseconds".

    Args:
        counts: Number of times in each unit.
    """
    return " and ".join(f"{counts[name]:,} in {name}" for name in UNITS if counts.get(name))
