"""Bounds of a value that the user gives: one place decides what it has to be instead."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmgr_rec.errors import UserError
from llmgr_rec.paths import path_problem, text_problem

# Numbers beyond them overflow in torch, Arrow or DuckDB.
_LARGEST_INTEGER = 2**63 - 1
_LONGEST_SHOWN = 100


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a value may be. For a list, what each of its values may be.

    Args:
        at_least: Smallest value.
        above: Value that it must exceed.
        at_most: Largest value.
        below: Value that it must stay below.
        multiple_of: Number that it must be a multiple of.
        needs_values: Whether a list must not be empty.
        is_path: Whether it may be the path of a file or folder.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    multiple_of: int | None = None
    needs_values: bool = False
    is_path: bool = False

    def problem(self, value: Any) -> str:
        """What a value has to be instead; empty where it may stay."""
        values = value if isinstance(value, list) else [value]
        if None in values:
            return "give a value, or leave the setting out"
        if self.needs_values and not values:
            return "give at least one value"
        texts = [one for one in values if isinstance(one, str)]
        if len(set(texts)) < len(texts):
            return "name each once"
        for text in texts:
            if problem := path_problem(text) if self.is_path else text_problem(text):
                return problem
        numbers = (one for one in values if isinstance(one, int | float) and not isinstance(one, bool))
        return next((problem for number in numbers if (problem := self._problem_of(number))), "")

    def _problem_of(self, number: float) -> str:
        if isinstance(number, int) and abs(number) > _LARGEST_INTEGER:
            return f"give a number of at most {_LARGEST_INTEGER}"
        if not math.isfinite(number):
            return "give a finite number"
        lowest = f"{self.at_least} or more" if self.at_least is not None else f"a number above {self.above}"
        highest = f"{self.at_most} at most" if self.at_most is not None else f"a number below {self.below}"
        too_low = (self.at_least is not None and number < self.at_least) or (
            self.above is not None and number <= self.above
        )
        too_high = (self.at_most is not None and number > self.at_most) or (
            self.below is not None and number >= self.below
        )
        if too_low:
            return f"give {lowest}"
        if too_high:
            return f"give {highest}"
        if self.multiple_of and number % self.multiple_of:
            return f"give a multiple of {self.multiple_of}"
        return ""


def check_options(values: Mapping[str, Any], bounds: Mapping[str, Bounds]) -> None:
    """Checks the options of a command; those that are None are not given.

    Args:
        values: Values by name.
        bounds: Bounds by name; without any, a number has to be finite and a text in UTF-8.

    Raises:
        UserError: A value is out of its bounds; names option, value and fix.
    """
    for name, value in values.items():
        if value is not None and (problem := bounds.get(name, Bounds()).problem(value)):
            raise UserError(f"--{name} is {shown(value)}; {problem}")


def shown(value: Any) -> str:
    """A value in a message: cut where it is long, escaped where it cannot be printed."""
    text = str(value)
    text = text if text and text.isprintable() else repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
