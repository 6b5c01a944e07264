"""Ids that went through a column of floats: `12.0` is the id `12`.

pandas turns integers into floats where a column has missing values, so one file has `12` and another `12.0`. Every
place that reads ids as text applies the same rule, so that the ids of logs, items and new sessions still match.
"""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

# Integers up to this one are exact as float64.
LARGEST_EXACT_FLOAT = 2**53
_FLOAT_ID = r"^(-?(?:0|[1-9][0-9]*))\.0$"
# As spreadsheets (1.23457E+12) and pandas (1e+16) write large numbers. Hexadecimal ids have no plus sign.
_SCIENTIFIC = r"^[0-9](?:\.[0-9]+)?[eE]\+[0-9]{2,}$"


def plain_ids(ids: pa.Array) -> pa.Array:
    """Ids without the `.0` of a float.

    Args:
        ids: Strings; nulls stay nulls.
    """
    return pc.replace_substring_regex(ids, _FLOAT_ID, r"\1")


def is_float_id_sql(text: str) -> str:
    """SQL condition: the id is a whole number written as a float.

    Args:
        text: SQL of a string.
    """
    return f"(suffix({text}, '.0') AND regexp_matches({text}, '{_FLOAT_ID}'))"


def plain_id_sql(text: str) -> str:
    """SQL of an id without the `.0` of a float.

    Args:
        text: SQL of a string.
    """
    return f"CASE WHEN {is_float_id_sql(text)} THEN left({text}, -2) ELSE {text} END"


def lost_digits_sql(text: str) -> str:
    """SQL condition: the id is a number in a form that does not keep all of its digits, so other ids may equal it.

    Args:
        text: SQL of a string.
    """
    large = f"{is_float_id_sql(text)} AND abs(TRY_CAST({text} AS DOUBLE)) >= {LARGEST_EXACT_FLOAT}"
    scientific = f"contains({text}, '+') AND regexp_matches({text}, '{_SCIENTIFIC}')"
    return f"(({large}) OR ({scientific}))"


def match_problem(matched: int, total: int, in_log: Sequence[object], in_items: Sequence[object]) -> str | None:
    """What is wrong if most item ids of the clicks are not in the item file; None if at least half of them are.

    Args:
        matched: Number of item ids of the clicks that are in the item file.
        total: Number of item ids of the clicks.
        in_log: A few ids that occur in the clicks only.
        in_items: A few ids that occur in the item file only.
    """
    if 2 * matched >= total:
        return None
    return (
        f"only {matched:,} of {total:,} item ids of the clicks are in the item file ({matched / total:.0%}): "
        f"the clicks have {', '.join(map(repr, in_log))}, the item file has "
        f"{', '.join(map(repr, in_items)) or 'no other ids'}"
    )
