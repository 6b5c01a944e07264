"""Words of a text, wherever items are told by theirs."""

import re

_WORD = re.compile(r"\w+")


def words_of(text: str | None) -> list[str]:
    """The words of a text in order: runs of letters, digits and underscores, in lower case."""
    return _WORD.findall((text or "").lower())
