"""Ids that went through a column of floats: `12.0` is the id `12`.

pandas turns integers into floats where a column has missing values, so one file has `12` and another `12.0`. Every
place that reads ids as text applies the same rule, so that the ids of logs, items and new sessions still match.
"""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from llmgr_rec.errors import UserError

# Integers up to this one are exact as float64.
LARGEST_EXACT_FLOAT = 2**53
LARGEST_EXACT_FLOAT32 = 2**24
# Ids that a message shows of the clicks, and of the item file.
MATCH_EXAMPLES = 3
_FLOAT_ID = r"^(-?(?:0|[1-9][0-9]*))\.0$"
_INTEGER = r"^(0|-?[1-9][0-9]{0,18})$"
_LARGEST_INT64 = pa.scalar(2**63 - 1, pa.uint64())
# As spreadsheets (1.23457E+12) and pandas (1e+16) write large numbers. Hexadecimal ids have no plus sign.
_SCIENTIFIC = r"^[0-9](?:\.[0-9]+)?[eE]\+[0-9]{2,}$"


def plain_ids(ids: pa.Array) -> pa.Array:
    """Ids without the `.0` of a float.

    Args:
        ids: Strings; nulls stay nulls.
    """
    return pc.replace_substring_regex(ids, _FLOAT_ID, r"\1")


def int64_ids(ids: pa.Array) -> pa.Array:
    """Ids as int64; null where no integer equals them.

    Args:
        ids: Integers, whole floats, text or nulls.

    Raises:
        UserError: A float is not an exact integer.
    """
    ids = _without_floats(ids)
    if pa.types.is_uint64(ids.type):
        # The cast would fail on larger values.
        ids = pc.if_else(pc.less_equal(ids, _LARGEST_INT64), ids, None)
    if is_text(ids.type):
        ids = plain_ids(ids.cast(pa.large_string()))
        numbers = pc.if_else(pc.match_substring_regex(ids, _INTEGER), ids, None).cast(pa.decimal128(20, 0))
        ids = pc.if_else(pc.less_equal(pc.abs(numbers), _LARGEST_INT64.cast(numbers.type)), numbers, None)
    return ids.cast(pa.int64())


def is_text(found: pa.DataType) -> bool:
    """Whether a type is text."""
    return pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_string_view(found)


def are_ids(found: pa.DataType) -> bool:
    """Whether a type is one of item ids: text, integers, or floats, which whole numbers are beside missing values.

    Args:
        found: Type of the ids; null is the type of an empty list.
    """
    return is_text(found) or pa.types.is_null(found) or pa.types.is_integer(found) or pa.types.is_floating(found)


def _without_floats(ids: pa.Array) -> pa.Array:
    """Integers of whole floats, null for NaN; other types as they are."""
    if not pa.types.is_floating(ids.type):
        return ids
    largest = LARGEST_EXACT_FLOAT if pa.types.is_float64(ids.type) else LARGEST_EXACT_FLOAT32
    values = pc.if_else(pc.is_nan(ids), None, ids).cast(pa.float64())
    lossy = values.filter(pc.or_(pc.not_equal(values, pc.floor(values)), pc.greater_equal(pc.abs(values), largest)))
    if len(lossy):
        raise UserError(
            f"{len(lossy):,} ids are floats, but no exact integers, such as {lossy[0].as_py()!r}, so digits are lost; "
            "write ids as integers or strings"
        )
    return values.cast(pa.int64())


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
    return f"CASE WHEN {is_float_id_sql(text)} THEN left({text}, length({text}) - 2) ELSE {text} END"


def lost_digits_sql(text: str) -> str:
    """SQL condition: the id is a number in a form that does not keep all of its digits, so other ids may equal it.

    Args:
        text: SQL of a string.
    """
    large = f"{is_float_id_sql(text)} AND abs(TRY_CAST({text} AS DOUBLE)) >= {LARGEST_EXACT_FLOAT}"
    scientific = f"contains({text}, '+') AND regexp_matches({text}, '{_SCIENTIFIC}')"
    return f"(({large}) OR ({scientific}))"


def few_match(matched: int, total: int) -> bool:
    """Whether so few item ids of the clicks are in the item file that one of the two may write ids in another form.

    Args:
        matched: Number of item ids of the clicks that are in the item file.
        total: Number of item ids of the clicks.
    """
    return 2 * matched < total


def describe_few_matches(matched: int, total: int, in_log: Sequence[object], in_items: Sequence[object]) -> str:
    """What is wrong where `few_match` is true.

    Args:
        matched: Number of item ids of the clicks that are in the item file.
        total: Number of item ids of the clicks.
        in_log: The first `MATCH_EXAMPLES` ids that occur in the clicks only.
        in_items: The first `MATCH_EXAMPLES` ids that occur in the item file only.
    """
    return (
        f"only {matched:,} of {total:,} item ids of the clicks are in the item file ({matched / total:.0%}): "
        f"the clicks have {', '.join(map(repr, in_log))}, the item file has "
        f"{', '.join(map(repr, in_items)) or 'no other ids'}"
    )
