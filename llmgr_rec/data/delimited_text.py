"""Recognizes delimited text and JSON where Parquet is needed, and names the command that converts them."""

import csv
import gzip
import shlex
import zlib
from pathlib import Path

from llmgr_rec.errors import UserError

_SUFFIXES = (".csv", ".tsv", ".txt", ".psv", ".jsonl", ".ndjson")
_DELIMITERS = ",;\t|"
# Bytes of a header line, and the columns of it that a message shows.
_HEADER_BYTES = 1 << 12
_LISTED = 8
# Options of datagen.csv by the option that was given the file.
_CONVERSIONS = {
    "interactions": "--interactions {}",
    "items": "--interactions LOG --items {} --title_column TITLE",
    "sessions": "--sessions {}",
    "input": "--sessions {}",
}


def not_parquet(path: Path, option: str, error: Exception) -> UserError:
    """The error for a file that is not Parquet. For delimited text and JSON it has the command that converts it.

    Args:
        path: The file.
        option: Command-line option that named it, without dashes.
        error: What reading the file raised.
    """
    return UserError(f"{path} (--{option}) {parquet_problem(path, option, error)}")


def parquet_problem(path: Path, option: str, error: Exception) -> str:
    """Why a file is not Parquet and what to do, as the end of a sentence that starts with the file.

    Args:
        path: The file.
        option: Command-line option or argument that named it, without dashes.
        error: What reading the file raised.
    """
    start = _start_of_text(path)
    if start == "":
        return "is empty; write or download it again"
    if start.startswith(("{", "[{")):
        return f"is JSON, not Parquet; {conversion_advice(path, option)}"
    columns = _columns(path, start)
    if columns is None:
        reason = str(error).splitlines()[0].rstrip(".")
        return f"is not a complete Parquet file ({reason}); write or download it again"
    known = f" (columns: {', '.join(columns[:_LISTED])}{', ...' if len(columns) > _LISTED else ''})" if columns else ""
    return f"is delimited text{known}, not Parquet; {conversion_advice(path, option)}"


def is_delimited_text(name: str) -> bool:
    """Whether the name of a file is that of delimited text or JSON lines, compressed or not.

    Args:
        name: File name.
    """
    plain = name.lower()
    for suffix in (".gz", ".bz2", ".xz", ".zst"):
        plain = plain.removesuffix(suffix)
    return plain.endswith(_SUFFIXES)


def conversion_advice(path: Path, option: str) -> str:
    """How to convert delimited text, as the end of a message.

    Args:
        path: The file.
        option: Command-line option that named it, without dashes.
    """
    files = _CONVERSIONS.get(option, "--interactions {}").format(shlex.quote(str(path)))
    return (
        f"convert it with: python -m datagen.csv {files} --user_column USER --item_column ITEM --time_column TIME "
        "--output FOLDER"
    )


def _start_of_text(path: Path) -> str:
    """The first lines of a file, decompressed; a line feed for a file that is no UTF-8 text."""
    try:
        with path.open("rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if compressed else path.open("rb") as file:
            head = file.read(_HEADER_BYTES)
        return head.decode("utf-8-sig", errors="strict" if len(head) < _HEADER_BYTES else "ignore")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return "\n"


def _columns(path: Path, start: str) -> list[str] | None:
    """Columns of the header of delimited text, empty if they are unknown; None for other files."""
    line = start.split("\n")[0].strip()
    delimiter = max(_DELIMITERS, key=line.count)
    if line.isprintable() or "\t" in line:
        names = next(csv.reader([line], delimiter=delimiter), [])
        if len(names) > 1 and not line.startswith(("{", "[", "PAR1", "<")):
            return [name.strip() for name in names]
    return [] if is_delimited_text(path.name) else None
