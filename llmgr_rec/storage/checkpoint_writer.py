"""Writes the tensors of a sharded checkpoint, and the checksum of each while it is written."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem

from llmgr_rec.checksums import Checksum
from llmgr_rec.errors import UserError
from llmgr_rec.files import storage_error

T = TypeVar("T")

# Checksum of each tensor by its offset in bytes, by name of its file. JSON has no numbers as names.
TensorChecksums = dict[str, dict[str, str]]


class CheckpointWriter(FileSystemWriter):
    """Storage writer that hashes what it writes, and whose errors of the storage are user errors.

    Args:
        path: Folder of the unfinished checkpoint.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._streams = _HashingFileSystem()
        self.fs = self._streams

    @property
    def checksums(self) -> TensorChecksums:
        """Checksums of the tensors that this rank has written."""
        return {name: sums for name, sums in self._streams.checksums.items() if sums}

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        """Writes the tensors of this rank.

        Raises:
            UserError: The storage is full or fails.
        """
        return self._run(lambda: super(CheckpointWriter, self).write_data(*args, **kwargs))

    def finish(self, *args: Any, **kwargs: Any) -> None:
        """Writes the index of the checkpoint.

        Raises:
            UserError: The storage is full or fails.
        """
        self._run(lambda: super(CheckpointWriter, self).finish(*args, **kwargs))

    def _run(self, write: Callable[[], T]) -> T:
        try:
            return write()
        except Exception as error:
            # torch raises an error of its own, which does not say why a write failed.
            if known := self._streams.error or storage_error(error, Path(self.path)):
                raise known from error
            raise


class _HashingFileSystem(FileSystem):
    """Files of a checkpoint. torch asks for the position in a file before and after each tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.checksums: TensorChecksums = {}
        self.error: UserError | None = None

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        path = Path(path)
        try:
            with path.open(mode) as file:
                yield _HashingStream(file, self.checksums.setdefault(path.name, {})) if "w" in mode else file
        except Exception as error:
            self.error = storage_error(error, path)
            raise


class _HashingStream:
    """A file to write to; the bytes between two positions asked for are hashed together."""

    def __init__(self, file: IO[bytes], checksums: dict[str, str]) -> None:
        self._file = file
        self._checksums = checksums
        self._start = 0
        self._pending: Checksum | None = None

    def write(self, data: Any) -> int:
        if self._pending is None:
            self._pending = Checksum()
        self._pending.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        if self._pending is not None:
            self._checksums[str(self._start)] = self._pending.text()
            self._pending = None
        self._start = self._file.tell()
        return self._start

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def merge(checksums: list[TensorChecksums]) -> TensorChecksums:
    """The checksums of all ranks, each of which writes files of its own."""
    return {name: sums for rank in checksums for name, sums in rank.items()}
