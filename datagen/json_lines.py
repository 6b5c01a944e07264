"""Reads JSON lines: one object a line, with the fields as columns of text."""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from datagen.text_file import BLOCK_BYTES, BadLine, Rows, TextFile
from llmgr_rec.errors import UserError, did_you_mean

_SURROGATE = re.compile("[\ud800-\udfff]")
# Lines in which a field must occur, because any object may lack one that is optional.
_FIRST_LINES = 1000
# Options of columns whose lists are joined to one text, and what is between the elements.
_JOINED = {"--category_column": " | ", "--title_column": " ", "--brand_column": ", ", "--description_column": " "}
_LEVELS = " > "


class JsonLinesFile(TextFile):
    """A file of JSON lines. The constructor reads the first lines.

    A field of an object in an object has the name `outer.inner`. A list of texts becomes one text: in a category, its
    elements are alternatives, and lists in it are the levels of one.

    Args:
        path: Path of the file.
        wanted: Name of each field that will be read, by the option that named it.
        encoding: Encoding of the file; None for UTF-8, or what its byte order mark says.

    Raises:
        UserError: The file is damaged or not text, or no object has a field.
    """

    def __init__(self, path: Path, wanted: dict[str, str], encoding: str | None = None) -> None:
        super().__init__(path, encoding)
        self._joined = {column: _JOINED[option] for option, column in wanted.items() if option in _JOINED}
        first = [record for _, record in islice(self._records(), _FIRST_LINES) if isinstance(record, dict)]
        known = list(dict.fromkeys(name for record in first for name in record))
        for option, column in wanted.items():
            if not any(_has(record, column) for record in first):
                raise UserError(f"{path} has no field {column!r} ({option}){did_you_mean(column, known)}")

    def read(self, columns: Sequence[str]) -> Iterator[Rows | BadLine]:
        """Yields the rows and the broken lines of the file, in order.

        Args:
            columns: Names of fields, all named to the constructor. A field that an object lacks, or that is null, is an
                empty text.

        Raises:
            UserError: The file is damaged or has another encoding.
        """
        numbers: list[int] = []
        rows: list[list[str]] = []
        size = 0
        for number, record in self._records():
            try:
                texts = [self._text(record, column) for column in columns]
            except ValueError as error:
                yield BadLine(number, str(error))
                continue
            numbers.append(number)
            rows.append(texts)
            size += sum(map(len, texts))
            if size > BLOCK_BYTES:
                yield _rows(numbers, rows, len(columns))
                numbers, rows, size = [], [], 0
        yield _rows(numbers, rows, len(columns))

    def _records(self) -> Iterator[tuple[int, Any]]:
        """Number and value of each line that is not blank; None for a line that is no JSON."""
        with self.open() as stream:
            first = 1
            while block := stream.read(BLOCK_BYTES):
                lines = self.decode(block + stream.readline(), first)
                for number, line in enumerate(lines, first):
                    if line.strip():
                        yield number, _parse(line)
                first += len(lines)

    def _text(self, record: Any, column: str) -> str:
        """A field as text. Raises a `ValueError` with what is wrong with the line."""
        if not isinstance(record, dict):
            raise ValueError("is not a JSON object")
        value = _get(record, column)
        if isinstance(value, list) and column in self._joined:
            value = self._joined[column].join(filter(None, (_element(one, column) for one in value)))
        return _plain(value, column)


def is_json_lines(path: Path, encoding: str | None = None) -> bool:
    """Whether a file begins as a JSON object does.

    Args:
        path: Path of the file.
        encoding: Its encoding, as for `TextFile`.

    Raises:
        UserError: The file is damaged or not text, or one JSON array.
    """
    with TextFile(path, encoding).open() as stream:
        start = stream.read(1 << 12).lstrip()[:2]
    if start[:1] == b"[" and start[1:2] in (b"{", b"\n", b"\r", b" "):
        raise UserError(f"{path} is one JSON array; write each object on a line of its own, as jq -c '.[]' does")
    return start[:1] == b"{"


def _parse(line: str) -> Any:
    try:
        # Numbers as they are written: a float would lose digits of an id or a time.
        return json.loads(line, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError):
        return None


def _has(record: dict[str, Any], column: str) -> bool:
    outer, _, inner = column.partition(".")
    return column in record or (isinstance(record.get(outer), dict) and _has(record[outer], inner))


def _get(record: dict[str, Any], column: str) -> Any:
    if column in record:
        return record[column]
    outer, _, inner = column.partition(".")
    return _get(record[outer], inner) if isinstance(record.get(outer), dict) else None


def _element(value: Any, column: str) -> str:
    """An element of a list; of a list in it, the levels from the top."""
    if isinstance(value, list):
        return _LEVELS.join(filter(None, (_plain(one, column) for one in value)))
    return _plain(value, column)


def _plain(value: Any, column: str) -> str:
    if isinstance(value, dict | list):
        raise ValueError(f"has {'an object' if isinstance(value, dict) else 'a list'} as {column}")
    if isinstance(value, bool):
        return str(value).lower()
    # Half of a surrogate pair, such as a cut emoji, is no text.
    return "" if value is None else _SURROGATE.sub("\ufffd", str(value))


def _rows(numbers: list[int], rows: list[list[str]], width: int) -> Rows:
    return Rows(numbers, [pa.array([row[place] for row in rows], pa.string()) for place in range(width)])
