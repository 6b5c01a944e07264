"""Reads delimited text with a header line: any usual delimiter, encoding, compression and line ending.

Lines without quotes are parsed by pyarrow, in blocks. Blocks with quotes, blank lines or broken lines are parsed by the
csv module, which is slower and strict: a stray quote is a bad line, and never swallows the lines after it.
"""

import bz2
import codecs
import csv
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.csv

from llmgr_rec.errors import UserError, did_you_mean

_BLOCK_BYTES = 1 << 20
# Longest field, in characters. What follows an unclosed quote is read as one field, so there must be a limit.
_LONGEST_FIELD = 1 << 20
_DELIMITERS = (",", ";", "\t", "|")
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# First bytes of formats that are not text, and what to do about them.
_OTHER_FORMATS = {
    b"PAR1": "is a Parquet file; give it to python -m llmgr_rec.prepare or score as it is",
    b"PK\x03\x04": "is a zip archive or an Excel workbook; unpack it, or save the sheet as CSV",
    b"\xd0\xcf\x11\xe0": "is an Excel workbook; save the sheet as CSV",
}
_EXCEL_DELIMITER = re.compile(r'"?sep=(.)"?')
_DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)


@dataclass(frozen=True)
class Rows:
    """Some rows of a file.

    Args:
        lines: Line number of each row, from 1.
        columns: The selected columns, each one string per row.
    """

    lines: Sequence[int]
    columns: list[pa.Array]


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be parsed.

    Args:
        line: Line number, from 1.
        problem: What is wrong, as the end of a sentence that starts with the line.
    """

    line: int
    problem: str


class DelimitedFile:
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
        self.path = path
        self._encoding = encoding
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
        with self._open() as stream:
            for _ in range(self._header_lines):
                stream.readline()
            line = self._header_lines + 1
            while block := stream.read(_BLOCK_BYTES):
                block += stream.readline()
                rows = self._parse_plain(block, line, positions)
                if rows is not None:
                    yield rows
                    line += len(rows.lines)
                else:
                    lines = self._decode(block, line)
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
                if "unexpected end of data" in str(error) and (more := stream.read(_BLOCK_BYTES)):
                    lines += self._decode(more + stream.readline(), first + len(lines))
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
        with self._open() as stream:
            lines: list[str] = []
            # A name in the header may contain line feeds.
            while len(lines) < 100 and (line := stream.readline(_LONGEST_FIELD)):
                lines += self._decode(line, len(lines) + 1)
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

    @contextmanager
    def _open(self) -> Iterator["IO[bytes]"]:
        """Opens the file as UTF-8 without a byte order mark, with line feeds at the ends of lines."""
        try:
            with _decompressed(self.path) as raw:
                buffered = cast("io.BufferedReader", raw)
                head = buffered.peek(1 << 16)[: 1 << 16]
                for magic, remedy in _OTHER_FORMATS.items():
                    if head.startswith(magic):
                        raise UserError(f"{self.path} {remedy}")
                marked = next((name for mark, name in _BYTE_ORDER_MARKS if head.startswith(mark)), None)
                encoding = marked or self._encoding or "utf-8"
                if marked is None and self._encoding is None and 4 * head.count(0) > len(head):
                    raise UserError(
                        f"{self.path} seems to be UTF-16 without a byte order mark; pass --encoding utf-16-le"
                    )
                if encoding == "utf-8-sig":
                    buffered.read(len(codecs.BOM_UTF8))
                if encoding in ("utf-8", "utf-8-sig") and (b"\r" not in head or b"\n" in head):
                    yield buffered
                else:
                    # Files of old Mac programs end lines with a carriage return only.
                    newline = None if b"\n" not in head else "\n"
                    yield cast("IO[bytes]", _Recoded(io.TextIOWrapper(buffered, encoding, newline=newline)))
        except _DAMAGED as error:
            raise UserError(f"{self.path}: damaged compressed data ({error}); download the file again") from None
        except UnicodeError:
            name = self._encoding or "utf-8"
            raise UserError(f"{self.path} is not {name} text; name its encoding with --encoding") from None

    def _decode(self, block: bytes, line: int) -> list[str]:
        """The lines of a block with their ends."""
        try:
            return io.StringIO(block.decode(), newline="\n").readlines()
        except UnicodeDecodeError as error:
            line += block.count(b"\n", 0, error.start)
            raise UserError(
                f"{self.path}: line {line} is not UTF-8 text; name the encoding of the file with --encoding, such as "
                "cp1252"
            ) from None


class _Recoded:
    """A text stream read as UTF-8."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text

    def read(self, size: int) -> bytes:
        return self._text.read(size).encode()

    def readline(self, size: int = -1) -> bytes:
        return self._text.readline(size).encode()


def encoding_name(name: str | None) -> str | None:
    """Checks the value of --encoding.

    Args:
        name: Name of an encoding, or None.

    Raises:
        UserError: Python does not know the encoding, or it does not encode text.
    """
    try:
        if name is not None:
            "".encode(name)
    except (LookupError, ValueError):
        raise UserError(f"--encoding {name!r} is unknown; give a name such as utf-8, cp1252, shift_jis") from None
    return name


def _decompressed(path: Path) -> "IO[bytes]":
    """Opens a file for reading, decompressed as its first bytes say."""
    with path.open("rb") as file:
        magic = file.read(6)
    if magic.startswith(b"\x1f\x8b"):
        return cast("IO[bytes]", gzip.open(path))
    if magic.startswith(b"BZh"):
        return bz2.open(path)
    if magic == b"\xfd7zXZ\0":
        return lzma.open(path)
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        return io.BufferedReader(pa.CompressedInputStream(path.open("rb"), "zstd"))
    return path.open("rb")


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
