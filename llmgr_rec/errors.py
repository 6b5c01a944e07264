"""Errors addressed to the user, not to the developer."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can fix.

    Entry points print the message as one line and exit with code 2, without a stack trace. The message says what is
    wrong, where (file, row group, column or setting), and how to fix it.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """End of an error message about an unknown name: the closest known name, or the list of all known names.

    Args:
        name: Unknown name, as the user wrote it.
        known: Valid names.
    """
    names = list(known)
    closest = difflib.get_close_matches(name, names, n=1)
    return f", did you mean {closest[0]}?" if closest else f"; known: {', '.join(names)}"
