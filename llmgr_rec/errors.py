"""Errors addressed to the user, not to the developer."""

import difflib
import signal
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can fix.

    Entry points print the message as one line and exit with code 2, without a stack trace. The message says what is
    wrong, where (file, row group, column or setting), and how to fix it.
    """


class RankLostError(RuntimeError):
    """Another rank hangs or has ended; a run can be resumed.

    Entry points print the message as one line and exit with code 1.
    """


class StopRequested(BaseException):
    """A signal asked this process to end. Not an `Exception`, because nothing has failed.

    Args:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}"

    @property
    def exit_code(self) -> int:
        """128 and the number of the signal, as shells and container runtimes count: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + self.number


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """End of an error message about an unknown name: the closest known name, or the list of all known names.

    Args:
        name: Unknown name, as the user wrote it.
        known: Valid names.
    """
    names = list(known)
    closest = difflib.get_close_matches(name, names, n=1)
    return f", did you mean {closest[0]}?" if closest else f"; known: {', '.join(names)}"
