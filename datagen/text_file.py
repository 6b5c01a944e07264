"""A text file as a stream of UTF-8 lines, whatever its compression, encoding and line ends; and the rows in it."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import pyarrow as pa

from llmgr_rec.errors import UserError

BLOCK_BYTES = 1 << 20
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


class TextFile:
    """A text file.

    Args:
        path: Path of the file.
        encoding: Encoding of the file; None for UTF-8, or what its byte order mark says.
    """

    def __init__(self, path: Path, encoding: str | None = None) -> None:
        self.path = path
        self._encoding = encoding

    @contextmanager
    def open(self) -> Iterator["IO[bytes]"]:
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

    def decode(self, block: bytes, line: int) -> list[str]:
        """The lines of a block with their ends.

        Args:
            block: Whole lines of the file.
            line: Number of the first of them.

        Raises:
            UserError: The block is not UTF-8.
        """
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
