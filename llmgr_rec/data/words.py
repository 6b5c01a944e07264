"""Splits texts into words, for the word feature, text-kNN and cold-item smoothing."""

import re

_WORD = re.compile(r"\w+")


def words_of(text: str | None) -> list[str]:
    """Words of a text in order: maximal runs of letters, digits and underscores, in lower case."""
    return _WORD.findall((text or "").lower())
