"""Durations as text, such as 30min. Imports only the standard library, so that settings are checked fast."""

import re
from decimal import Decimal

from llmgr_rec.errors import UserError

_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(rf"([0-9]+(?:\.[0-9]+)?) ?({'|'.join(_SECONDS)})")
_MAX_DAYS = 36500


def nanoseconds_of(text: str, option: str) -> int:
    """The nanoseconds of a duration such as `30min`, `1.5h` or `1d`.

    Args:
        text: A number with a unit: s, min, h or d.
        option: Option that was given the text, with dashes, for messages.

    Raises:
        UserError: The text is no duration, or not above 0 and at most 36,500 days.
    """
    match = _DURATION.fullmatch(text.strip())
    nanoseconds = int(Decimal(match[1]) * _SECONDS[match[2]] * 10**9) if match else 0
    if not 0 < nanoseconds <= _MAX_DAYS * 86400 * 10**9:
        raise UserError(
            f"{option} is {text!r}; give a time above 0 and at most {_MAX_DAYS}d, with its unit (s, min, h or d), "
            "such as 30min"
        )
    return nanoseconds
