"""Reads dumps: plain or gzipped text, delimited or one JSON object per line, with HTML in the texts."""

import csv
import gzip
import html
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmgr_rec.data.preparation.database import identifier, literal
from llmgr_rec.data.preparation.duckdb_database import literal_path
from llmgr_rec.errors import UserError, did_you_mean

_SURROGATE = re.compile("[\ud800-\udfff]")
_TAG = re.compile(r"<!--.*?-->|</?[A-Za-z][^<>]*>", re.DOTALL)


def require_file(path: str | Path, option: str) -> Path:
    """Checks that a file exists.

    Args:
        path: Path of the file.
        option: Command-line option that named it, for the message.

    Raises:
        UserError: The file does not exist.
    """
    file = Path(path)
    if file.is_dir():
        raise UserError(f"{option} {file} is a folder; give one file, in which the header stands once")
    if not file.is_file():
        raise UserError(f"{option} {file} is not a file; check the path")
    return file


def read_lines(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """Yields the non-blank lines of a text file with their numbers from 1. Decompresses files named *.gz.

    Args:
        path: Path of the file.
        encoding: Encoding of the file.

    Raises:
        UserError: The gzip data is damaged, or the file has another encoding.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.decode(encoding).rstrip("\r\n")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged gzip data after line {number} ({error}); download the file again") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: line {number} is not {encoding} text; convert the file first (iconv)") from None


def clean_text(text: object) -> str | None:
    """One line of plain text: HTML entities decoded, tags removed, white space collapsed; None if nothing is left.

    Half of a surrogate pair, such as a cut emoji, becomes U+FFFD.

    Args:
        text: A string. Any other object gives None.
    """
    if not isinstance(text, str):
        return None
    plain = _TAG.sub(" ", html.unescape(text)) if "&" in text or "<" in text else text
    return " ".join(_SURROGATE.sub("\ufffd", plain).split()) or None


def delimited_sql(path: Path, columns: Sequence[str], delimiter: str, *, header: bool) -> str:
    """A DuckDB table expression of a delimited file without quotes. All columns are strings; empty fields are null.

    Args:
        path: Path of the file.
        columns: Names of all columns, in order.
        delimiter: Field separator, up to four bytes.
        header: Whether the first line is a header.
    """
    types = ", ".join(f"{literal(name)}: 'VARCHAR'" for name in columns)
    # Blank lines before the header.
    skipped = next(read_lines(path), (1, ""))[0] - 1 if header else 0
    source = literal(literal_path(path))
    return (
        f"read_csv({source}, delim={literal(delimiter)}, header={str(header).lower()}, skip={skipped}, "
        f"quote='', escape='', auto_detect=false, hive_partitioning=false, columns={{{types}}})"
    )


def json_sql(path: Path, fields: Sequence[str]) -> str:
    """A DuckDB table expression of some fields of a file with one JSON object per line, all as strings.

    Args:
        path: Path of the file.
        fields: Names of the fields.
    """
    types = ", ".join(f"{identifier(name)}: 'VARCHAR'" for name in fields)
    source = literal(literal_path(path))
    return f"read_json({source}, format='newline_delimited', hive_partitioning=false, columns={{{types}}})"


def read_header(path: Path, delimiter: str) -> list[str]:
    """Column names of a delimited file.

    Args:
        path: Path of the file.
        delimiter: Field separator, one character.

    Raises:
        UserError: The file is empty, its header cannot be parsed, or a name occurs twice, ignoring case.
    """
    first = next(read_lines(path, "utf-8-sig"), None)
    if first is None:
        raise UserError(f"{path} is empty; give a file with a header line")
    try:
        names = [name.strip() for name in next(csv.reader([first[1]], delimiter=delimiter))]
    except csv.Error as error:
        raise UserError(f"{path}: line {first[0]}: {error}; end each line with a line feed") from None
    # DuckDB ignores the case of column names.
    folded = [name.casefold() for name in names]
    for name in names:
        if folded.count(name.casefold()) > 1:
            raise UserError(f"{path}: column {name!r} occurs twice in the header; rename one")
    return names


def require_columns(path: Path, present: Sequence[str], wanted: dict[str, str]) -> None:
    """Checks that a file of a dump has the columns that are read.

    Args:
        path: Path of the file, for the message.
        present: Columns of the file.
        wanted: Column name by what needs it, such as a command-line option.

    Raises:
        UserError: A column is missing. The message suggests the closest name.
    """
    for option, name in wanted.items():
        if name not in present:
            raise UserError(
                f"{path} has no column {name!r} ({option}); give the file of the dump unchanged"
                f"{did_you_mean(name, present)}"
            )
