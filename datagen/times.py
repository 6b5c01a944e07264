"""How a column of times is read: as numbers of one unit, as ISO dates, or as dates of a given form.

A reading is chosen for the whole column, so that its times are comparable.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import duckdb

from llmgr_rec.data.preparation.database import literal
from llmgr_rec.data.time_units import UNITS, describe_units, unit_sql
from llmgr_rec.errors import UserError

Query = Callable[[str], tuple[Any, ...]]

_NUMBER = "coalesce(isfinite(TRY_CAST(time AS DOUBLE)), false)"
# A comma before the fraction and a blank before the offset are common, and unknown to DuckDB.
_ISO = (
    "CASE WHEN substr(time, 5, 1) IN ('-', '/') THEN coalesce(TRY_CAST(time AS TIMESTAMPTZ), "
    r"TRY_CAST(regexp_replace(replace(time, ',', '.'), ' +([+-][0-9])', '\1') AS TIMESTAMPTZ)) END"
)
# Abbreviations that stand for several zones (BST, IST, CST) or are also used in the other half of the year (CET, PST).
# ICU reads BST as Bangladesh and AST as Alaska.
_AMBIGUOUS_ZONES = (
    "ACT|AET|AGT|ART|AST|BET|BST|CAT|CET|CNT|CST|CTT|EAT|ECT|EET|IET|IST|MET|MIT|NET|NST|PLT|PNT|PRT|PST|SST|VST|WET"
)
_CLOCKS = ("", "%H:%M", "%H:%M:%S", "%H:%M:%S.%f", "%I:%M %p", "%I:%M:%S %p")
_DAYS = {"mdy": "%m{0}%d{0}", "dmy": "%d{0}%m{0}"}
_FORMATS = "auto, number, mdy (01/31/2024), dmy (31.01.2024), or a pattern such as '%d %b %Y %H:%M'"
_OTHER_FORMATS = "name the form of the dates with --time_format, such as dmy for 31.01.2024 or mdy for 01/31/2024"
_MICROSECOND_DIGITS, _NANOSECOND_DIGITS = 6, 9
_SCALES = {3: "thousandths", 6: "millionths", 9: "billionths"}


@dataclass(frozen=True)
class TimeReading:
    """How the column `time` of table `raw` is read.

    Args:
        sql: SQL of the time, a BIGINT; null where the text is not a time.
        problem: What is wrong with such a text, as the end of a sentence.
        remedy: What may help, if texts are not times, besides their correction.
        notes: What the user should know, one line each.
    """

    sql: str
    problem: str
    remedy: str = ""
    notes: tuple[str, ...] = ()


def check_time_format(time_format: str) -> None:
    """Checks the value of --time_format.

    Args:
        time_format: `auto`, `number`, `mdy`, `dmy` or a pattern.

    Raises:
        UserError: The value is none of these, or the pattern is wrong.
    """
    if time_format in ("auto", "number", *_DAYS):
        return
    if "%" not in time_format:
        raise UserError(f"--time_format {time_format!r} is unknown; give {_FORMATS}")
    try:
        duckdb.execute(f"SELECT try_strptime('', {_literals([time_format])})")
    except duckdb.Error as error:
        reason = re.sub(r"^.*: ", "", str(error).splitlines()[0])
        raise UserError(f"--time_format {time_format!r}: {reason}; give {_FORMATS}") from None


def read_times(query: Query, time_format: str, where: str) -> TimeReading:
    """Chooses how the column `time` of table `raw` is read.

    Args:
        query: Runs SQL and returns the first row.
        time_format: `auto` reads numbers or ISO dates, whichever are more; `number` reads numbers of one unit, whatever
            their size; `mdy` and `dmy` read dates with month or day first; anything else is a pattern of strptime.
        where: File and column, for messages.

    Raises:
        UserError: The numbers are in several units that cannot be told apart.
    """
    if time_format in _DAYS:
        patterns = [
            f"{_DAYS[time_format].format(mark)}{year} {clock}".strip()
            for mark in "/.-"
            for year in ("%y", "%Y")
            for clock in _CLOCKS
        ]
        return _dates(
            query, f"CAST(try_strptime(time, {_literals(patterns)}) AS TIMESTAMPTZ)", f"a date ({time_format})"
        )
    if time_format not in ("auto", "number"):
        sql = f"CAST(try_strptime(time, {_literals([time_format])}) AS TIMESTAMPTZ)"
        return _dates(query, sql, f"a date of the form {time_format}")
    if time_format == "number":
        return _numbers(query, where, one_unit=True)
    numbers, dates = query(f"SELECT count(*) FILTER ({_NUMBER}), count(*) FILTER ({_ISO} IS NOT NULL) FROM raw")
    if dates > numbers:
        return _dates(query, _ISO, "a date like 2024-01-31T12:00:00Z")
    return _numbers(query, where, one_unit=False)


def _dates(query: Query, moment: str, expected: str) -> TimeReading:
    """Dates become microseconds since 1970, or nanoseconds if any has more than six digits after its seconds."""
    problem, remedy = f"is not {expected}", _OTHER_FORMATS
    ambiguous = rf"regexp_matches(time, '\b({_AMBIGUOUS_ZONES})\b', 'i')"
    if query(f"SELECT count(*) FROM raw WHERE {ambiguous}")[0]:
        moment = f"CASE WHEN NOT {ambiguous} THEN {moment} END"
        problem += ", or its time zone is ambiguous, as BST and CET are (write an offset such as +01:00)"
    if not query(f"SELECT count(*) FROM raw WHERE length({_decimals()}) > {_MICROSECOND_DIGITS}")[0]:
        return TimeReading(f"CASE WHEN isfinite({moment}) THEN epoch_us({moment}) END", problem, remedy)
    below = f"CAST(rpad(substr({_decimals()}, 7, 3), 3, '0') AS BIGINT)"
    sql = f"CASE WHEN isfinite({moment}) THEN TRY(epoch_us({moment}) * 1000 + {below}) END"
    return TimeReading(sql, problem, remedy, ("times have more digits than microseconds, so they become nanoseconds",))


def _numbers(query: Query, where: str, one_unit: bool) -> TimeReading:
    problem, remedy = "is not a number", ""
    if not one_unit:
        problem, remedy = "is not a number or a date like 2024-01-31", _OTHER_FORMATS
    value = "TRY_CAST(time AS DOUBLE)"
    scientific = "contains(upper(time), 'E')"
    digits, largest, count_scientific, outside, *per_unit = query(
        f"SELECT max(length({_decimals()})) FILTER (NOT {scientific} OR {value} <> round({value})), max(abs({value})), "
        f"count(*) FILTER ({scientific}), "
        f"count(*) FILTER ({unit_sql(f'abs({value})')} IS NULL), "
        + ", ".join(f"count(*) FILTER ({unit_sql(f'abs({value})')} = '{name}')" for name in UNITS)
        + f" FROM raw WHERE {_NUMBER}"
    )
    digits = _scale_digits(digits or 0, largest or 0.0)
    notes = []
    if count_scientific:
        notes.append(
            f"{count_scientific:,} times are in scientific notation, as spreadsheets write them, and may have lost "
            "digits; clicks of equal time keep the order of the file"
        )
    counts = {name: count for name, count in zip(UNITS, per_unit, strict=True) if count}
    if len(counts) > 1 and not one_unit:
        if outside:
            raise UserError(
                f"{where}: times are {describe_units(counts)} since 1970, and {outside:,} fit neither; correct them, "
                "or pass --time_format number if all are of one unit"
            )
        finest = max([UNITS[name] for name in counts] + [10**_MICROSECOND_DIGITS] * bool(digits))
        name = next(name for name, scale in UNITS.items() if scale == finest)
        notes.append(f"times are {describe_units(counts)} since 1970; all are converted to {name}")
        cases = " ".join(f"WHEN '{unit}' THEN {finest // UNITS[unit]}" for unit in counts)
        factor = f"CASE {unit_sql(f'abs({value})')} {cases} END"
        return TimeReading(
            f"TRY(CAST(TRY_CAST(time AS DECIMAL(38, 9)) * {factor} AS BIGINT))", problem, remedy, tuple(notes)
        )
    if not digits:
        # Integers are cast directly, because a double cannot represent all of them.
        whole = f"coalesce(TRY_CAST(time AS BIGINT), TRY(CAST(round({value}) AS BIGINT)))"
        return TimeReading(f"CASE WHEN {_NUMBER} THEN {whole} END", problem, remedy, tuple(notes))
    notes.append(f"times have fractions, so they are converted to {_SCALES[digits]}")
    sql = f"TRY(CAST(TRY_CAST(time AS DECIMAL(38, {digits})) * {10**digits} AS BIGINT))"
    return TimeReading(sql, problem, remedy, tuple(notes))


def _scale_digits(digits: int, largest: float) -> int:
    """Decimal digits that all times keep: 0, 6 or 9, or fewer if a time would exceed int64."""
    scale = 0 if not digits else _MICROSECOND_DIGITS if digits <= _MICROSECOND_DIGITS else _NANOSECOND_DIGITS
    while scale and largest * 10**scale >= 2**63:
        scale -= 3
    return scale


def _decimals() -> str:
    """SQL of the digits after the point or comma, without zeros at the end; empty if there are none."""
    return (
        "CASE WHEN contains(time, '.') OR contains(time, ',') "
        "THEN rtrim(regexp_extract(time, '[.,]([0-9]+)', 1), '0') ELSE '' END"
    )


def _literals(texts: list[str]) -> str:
    """SQL of a list of texts."""
    return f"[{', '.join(map(literal, texts))}]"
