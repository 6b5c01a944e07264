"""What speaks to a user instead of a developer."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend.

    Entry points print its text as one line and exit with code 2, without a stack trace. The text names what is wrong,
    where (file, row group, column or setting) and how to mend it.
    """


def near_miss(name: str, known: Iterable[str]) -> str:
    """What a message about an unknown name ends with: the known one that was likely meant, or else all of them.

    Args:
        name: As the user wrote it.
        known: Names that would have been right.
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f", did you mean {near[0]}?" if near else f"; known: {', '.join(names)}"
