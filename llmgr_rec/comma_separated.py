"""Options whose value is a comma-separated list. Imports only what `--help` needs."""

from collections.abc import Sequence

from llmgr_rec.errors import UserError, did_you_mean
from llmgr_rec.registry import is_import_path


def split_list(text: str) -> list[str]:
    """The parts of a comma-separated option, without those that are empty; it may be written in brackets.

    Args:
        text: Value of the option.
    """
    inner = text.strip()
    if inner.startswith("[") and inner.endswith("]"):
        inner = inner[1:-1]
    return [part.strip() for part in inner.split(",") if part.strip()]


def split_numbers(text: str, option: str, example: str) -> list[int]:
    """Splits a comma-separated option into integers.

    Args:
        text: Value of the option.
        option: The option, for messages.
        example: A valid value, for messages.

    Raises:
        UserError: A part is no integer from 0 on, or there is none.
    """
    parts = split_list(text)
    if not parts or not all(part.isdecimal() for part in parts):
        raise UserError(f"{option} is {text!r}; give integers separated by commas, such as {example}")
    return [int(part) for part in parts]


def split_names(text: str, option: str, known: Sequence[str], import_paths: bool = False) -> list[str]:
    """Splits a comma-separated option into names.

    Args:
        text: Value of the option.
        option: The option, for messages.
        known: Valid names.
        import_paths: Whether import paths are valid, too.

    Raises:
        UserError: A name is unknown, or there is none.
    """
    names = split_list(text)
    for name in names:
        if name not in known and not (import_paths and is_import_path(name)):
            raise UserError(f"{option} contains {name}, which is not known{did_you_mean(name, known)}")
    if not names:
        raise UserError(f"{option} is empty; give some of {', '.join(known)}")
    return names
