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


def split_renames(text: str | None, option: str, known: Sequence[str]) -> dict[str, str]:
    """Splits an option that renames columns, `item=item_id,ts=timestamp`, into the former name of each column.

    Args:
        text: Value of the option; None renames nothing.
        option: The option, for messages.
        known: Names that columns may get.

    Raises:
        UserError: A part has not this form, a name is unknown, or two columns get the same.
    """
    renamed: dict[str, str] = {}
    for part in split_list(text or ""):
        column, equals, name = (word.strip() for word in part.rpartition("="))
        if not equals or not column:
            raise UserError(f"{option} contains {part}; give YOURS=NAME, such as {part}={known[0]}")
        if name not in known:
            raise UserError(f"{option} names the column {name}, which is not known{did_you_mean(name, known)}")
        if name in renamed:
            raise UserError(f"{option} names {name} twice; give it one column")
        renamed[name] = column
    return renamed
