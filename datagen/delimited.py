"""Reads delimited text with a header line: any usual delimiter, encoding, compression and line ending.

Lines without quotes are parsed by pyarrow, in blocks. Blocks with quotes, blank lines or broken lines are parsed by the
csv module, which is slower and strict: a stray quote is a bad line, and never swallows the lines after it.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.csv

from datagen.text_file import BLOCK_BYTES, BadLine, Rows, TextFile
from llmgr_rec.errors import UserError, did_you_mean

# Longest field, in characters. What follows an unclosed quote is read as one field, so there must be a limit.
_LONGEST_FIELD = 1 << 20
_DELIMITERS = (",", ";", "\t", "|")
_EXCEL_DELIMITER = re.compile(r'"?sep=(.)"?')


class DelimitedFile(TextFile):
    """A delimited file. The constructor reads its header.

    Args:
        path: Path of the file.
        wanted: Name of each column that will be read, by the option that named it, for messages.
        delimiter: One character; None chooses the one of comma, semicolon, tab and `|` that separates the columns.
        encoding: Encoding of the file; None for UTF-8, or what its byte order mark says.

    Raises:
        UserError: The file is empty, damaged or not text, or a column is missing or occurs twice.
    """

    def __init__(
        self, path: Path, wanted: dict[str, str], delimiter: str | None = None, encoding: str | None = None
    ) -> None:
        super().__init__(path, encoding)
        self._delimiter = delimiter
        self._names, self._header_lines = self._read_header(wanted)
        self._positions = {column: self._position(option, column) for option, column in wanted.items()}

    def read(self, columns: Sequence[str]) -> Iterator[Rows | BadLine]:
        """Yields the rows and the broken lines of the file, in order.

        Args:
            columns: Names of columns, all named to the constructor.

        Raises:
            UserError: The file is damaged or has another encoding.
        """
        positions = [self._positions[name] for name in columns]
        with self.open() as stream:
            for _ in range(self._header_lines):
                stream.readline()
            line = self._header_lines + 1
            while block := stream.read(BLOCK_BYTES):
                block += stream.readline()
                rows = self._parse_plain(block, line, positions)
                if rows is not None:
                    yield rows
                    line += len(rows.lines)
                else:
                    lines = self.decode(block, line)
                    yield from self._parse_quoted(lines, line, positions, stream)
                    line += len(lines)

    def _parse_plain(self, block: bytes, line: int, positions: list[int]) -> Rows | None:
        """Parses a block without quotes, blank lines and broken lines; None if it has any."""
        has_blank = block[:1] in (b"\n", b"\r") or b"\n\n" in block or b"\n\r\n" in block
        if b'"' in block or has_blank or block.count(b"\r") != block.count(b"\r\n"):
            return None
        names = [str(place) for place in range(len(self._names))]
        selected = [str(place) for place in dict.fromkeys(positions)]
        broken = []

        def skip(row: Any) -> str:
            broken.append(row)
            return "skip"

        try:
            table = pa.csv.read_csv(
                pa.BufferReader(block),
                pa.csv.ReadOptions(column_names=names, use_threads=False, block_size=2 * len(block)),
                pa.csv.ParseOptions(delimiter=self._delimiter, quote_char=False, invalid_row_handler=skip),
                pa.csv.ConvertOptions(include_columns=selected, column_types=dict.fromkeys(selected, pa.string())),
            )
        except pa.ArrowInvalid:
            return None
        rows = block.count(b"\n") + (not block.endswith(b"\n"))
        if broken or table.num_rows != rows:
            return None
        columns = [table[str(place)].combine_chunks() for place in positions]
        return Rows(range(line, line + rows), columns)

    def _parse_quoted(
        self, lines: list[str], first: int, positions: list[int], stream: "IO[bytes]"
    ) -> Iterator[Rows | BadLine]:
        """Parses any lines. Adds further lines of the stream to `lines`, if the last record continues there."""
        numbers: list[int] = []
        records: list[list[str]] = []
        for number, parsed in self._records(lines, first, stream):
            problem = parsed if isinstance(parsed, str) else self._wrong_width(parsed)
            if problem:
                yield BadLine(number, problem)
            elif parsed:
                numbers.append(number)
                records.append(cast("list[str]", parsed))
        columns = [pa.array([r[place] if place < len(r) else "" for r in records], pa.string()) for place in positions]
        yield Rows(numbers, columns)

    def _records(self, lines: list[str], first: int, stream: "IO[bytes]") -> Iterator[tuple[int, list[str] | str]]:
        """Line number and fields of each record; instead of the fields, what is wrong with its first line."""
        csv.field_size_limit(_LONGEST_FIELD)
        start = 0
        while start < len(lines):
            reader = csv.reader(lines[start:], delimiter=self._delimiter or ",", strict=True, skipinitialspace=True)
            end = 0
            try:
                for fields in reader:
                    yield first + start + end, fields
                    end = reader.line_num
                return
            except csv.Error as error:
                start += end
                if "unexpected end of data" in str(error) and (more := stream.read(BLOCK_BYTES)):
                    lines += self.decode(more + stream.readline(), first + len(lines))
                    continue
                yield first + start, _quote_problem(str(error))
                start += 1

    def _wrong_width(self, fields: list[str]) -> str | None:
        """What is wrong with the number of fields of a record. Delimiters at the end of a line are allowed."""
        extra, lacking = fields[len(self._names) :], self._names[len(fields) :]
        if not any(extra) and (not any(lacking) or not any(fields)):
            return None
        return f"has {len(fields)} fields, but the header has {len(self._names)}"

    def _read_header(self, wanted: dict[str, str]) -> tuple[list[str], int]:
        """Column names, and the number of lines before the first row. Sets the delimiter if none was given."""
        with self.open() as stream:
            lines: list[str] = []
            # A name in the header may contain line feeds.
            while len(lines) < 100 and (line := stream.readline(_LONGEST_FIELD)):
                lines += self.decode(line, len(lines) + 1)
        start = next((place for place, line in enumerate(lines) if line.strip()), None)
        if start is None:
            raise UserError(f"{self.path} is empty; give a file with a header line")
        if excel := _EXCEL_DELIMITER.fullmatch(lines[start].strip()):
            self._delimiter = self._delimiter or excel[1]
            start += 1
        candidates = (self._delimiter,) if self._delimiter else _DELIMITERS
        headers = [_parse_header(lines[start:], delimiter) for delimiter in candidates]
        found = [len(set(wanted.values()) & set(names)) for names, _ in headers]
        best = found.index(max(found)) if max(found) else max(range(len(headers)), key=lambda n: len(headers[n][0]))
        self._delimiter = candidates[best]
        names, length = headers[best]
        return names, start + length

    def _position(self, option: str, column: str) -> int:
        count = self._names.count(column)
        if not count:
            known = [name for name in self._names if name]
            raise UserError(
                f"{self.path} has no column {column!r} ({option}), or --delimiter is wrong{did_you_mean(column, known)}"
            )
        if count > 1:
            raise UserError(f"{self.path}: column {column!r} occurs twice in the header; rename one")
        return self._names.index(column)


def _parse_header(lines: list[str], delimiter: str) -> tuple[list[str], int]:
    """Column names, and the number of lines that they take."""
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    try:
        return [name.strip() for name in next(reader)], reader.line_num
    except csv.Error:
        return [], 1


def _quote_problem(error: str) -> str:
    if "unexpected end" in error or "field limit" in error:
        return f"opens a quote that is never closed, or has a field of more than {_LONGEST_FIELD:,} characters"
    if "expected after" in error:
        return "has a quote inside a quoted field; double it"
    return f"cannot be parsed ({error})"
