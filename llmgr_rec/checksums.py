"""Checksums of files, which find damage of the storage; they do not protect from an attacker.

XXH3 is about ten times as fast as SHA-256 on a processor with instructions for it, so that verification costs little
beside reading. docs/reliability.md says what is verified when.
"""

import functools
import hashlib
from pathlib import Path
from typing import IO, Any

import xxhash

from llmgr_rec.errors import UserError

# Begins the text of a checksum: the name of its algorithm.
CHECKSUM_PREFIX = "xxh3-128:"
_SHA256_DIGITS = 64
_BLOCK_BYTES = 1 << 20


class Checksum:
    """Checksum of bytes that arrive in pieces."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def update(self, data: Any) -> None:
        """Adds bytes, or any object with a contiguous buffer."""
        self._hash.update(data)

    def text(self) -> str:
        """The checksum of the bytes so far, with the name of its algorithm."""
        return f"{CHECKSUM_PREFIX}{self._hash.hexdigest()}"


def file_checksum(path: Path) -> str:
    """Checksum of a file's content, read in small blocks.

    Args:
        path: The file.
    """
    with path.open("rb", buffering=0) as stream:
        return stream_checksum(stream)


def stream_checksum(stream: IO[bytes]) -> str:
    """Checksum of the remaining bytes of a stream, which must support `readinto`."""
    checksum, block = Checksum(), bytearray(_BLOCK_BYTES)
    view = memoryview(block)
    while count := stream.readinto(block):  # type: ignore[attr-defined]
        checksum.update(view[:count])
    return checksum.text()


def verify_file(path: Path, recorded: str, remedy: str) -> None:
    """Compares a file with its recorded checksum. A file that has been verified and not changed is not read again.

    Args:
        path: The file.
        recorded: A checksum of `file_checksum`, or hexadecimal SHA-256 as earlier versions recorded it.
        remedy: End of the error message: what to do.

    Raises:
        UserError: The file has another content.
    """
    status = path.stat()
    found = _checksum_of(path, status.st_size, status.st_mtime_ns, len(recorded) == _SHA256_DIGITS)
    if found != recorded:
        raise UserError(f"{damage(path, found, recorded)}; {remedy}")


def damage(path: Path, found: str, recorded: str) -> str:
    """The message about a file that differs from its recorded checksum, without a remedy."""
    return f"{path} is damaged: its checksum is {found}, recorded was {recorded}"


@functools.lru_cache(maxsize=4096)
def _checksum_of(path: Path, size: int, modified_ns: int, sha256: bool) -> str:
    """Checksum of a file; size and modification time are part of the cache key only."""
    if not sha256:
        return file_checksum(path)
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
