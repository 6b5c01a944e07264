"""Paths of remote storage, such as s3://bucket/folder, through fsspec.

A `RemotePath` stands wherever a `Path` does. Small files are read at once. What a library opens by name is a copy on
this machine, made once for each version of a file. What is read in pieces from first to last, such as sessions to
score, is a stream. A file is written as a whole, which object storage does atomically.
"""

import fnmatch
import hashlib
import io
import os
import posixpath
import shutil
import stat
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path, PosixPath
from typing import Any

from llmgr_rec.cache import cache_folder
from llmgr_rec.errors import UserError
from llmgr_rec.paths import is_remote, storage_path
from llmgr_rec.remote_errors import remote_errors

# Bytes that a stream reads at a time.
STREAM_BYTES = 8 << 20
# Object that shows whether a folder is writable; it is no content of it.
_PROBE = ".llmgr_rec-writable"
# Copies of former versions of a file are deleted when nothing has opened them for this time.
_UNUSED_S = 24 * 3600
# Folders in which this process works under a lock. The function raises a `UserError` if the lock has been lost.
_REQUIRED_LOCKS: dict["RemotePath", Callable[[], None]] = {}


class RemotePath(PosixPath):
    """A file or folder of remote storage.

    A folder exists while it has files. Names of folders need not be made, and `mkdir` does nothing.

    Methods raise `FileNotFoundError` for what does not exist, and a `UserError` where the storage cannot be used: a
    package is missing, there is no network, or the credentials do not suffice.
    """

    def __str__(self) -> str:
        scheme, *names = self.parts
        return f"{scheme}//{'/'.join(names)}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __fspath__(self) -> str:
        return str(self.local())

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there is a file of this name or below it."""
        return self._kind() is not None

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it is a file."""
        return self._kind() == "file"

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it is a folder."""
        return self._kind() == "directory"

    def is_symlink(self) -> bool:
        """False, since remote storage has no links."""
        return False

    def is_absolute(self) -> bool:
        """True."""
        return True

    def absolute(self) -> "RemotePath":
        """The path itself."""
        return self

    def relative_to(self, *other: Any, **options: Any) -> PosixPath:  # type: ignore[override]
        """The path from another one that it is in, which is no `RemotePath`."""
        return PosixPath(*super().relative_to(*other, **options).parts)

    def resolve(self, strict: bool = False) -> "RemotePath":
        """The path without `..`."""
        scheme, *names = self.parts
        return type(self)(f"{scheme}//{posixpath.normpath('/'.join(names))}")

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Size and kind. In place of the time of the last change is a number that another content changes."""
        info = self._info()
        mode = stat.S_IFDIR | 0o755 if info["type"] == "directory" else stat.S_IFREG | 0o644
        number = int(_version(info), 16)
        return os.stat_result((mode, 0, 0, 1, 0, 0, info["size"] or 0, 0, 0, 0), {"st_mtime_ns": number})

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing."""

    def iterdir(self) -> Generator["RemotePath", None, None]:
        """Files and folders in the folder."""
        with remote_errors(self):
            system, path = self._system()
            entries = system.ls(path, detail=False)
        own = path.strip("/")
        names = [entry.strip("/").rpartition("/")[2] for entry in entries if entry.strip("/") != own]
        yield from [self / name for name in names if name != _PROBE]

    def glob(self, pattern: str, **_: Any) -> Iterator["RemotePath"]:  # type: ignore[override]
        """Files and folders in the folder whose names match a pattern."""
        found = list(self.iterdir()) if self.is_dir() else []
        return iter([path for path in found if fnmatch.fnmatchcase(path.name, pattern)])

    def rglob(self, pattern: str, **_: Any) -> Iterator["RemotePath"]:  # type: ignore[override]
        """Files in the folder, at any depth, whose names match a pattern."""
        with remote_errors(self):
            system, path = self._system()
            found = system.find(path)
        names = [posixpath.relpath(file, path) for file in found]
        paths = [self / name for name in names if not name.endswith("/")]
        return iter([path for path in paths if path.name != _PROBE and fnmatch.fnmatchcase(path.name, pattern)])

    def read_bytes(self) -> bytes:
        """The content of the file."""
        with remote_errors(self):
            system, path = self._system()
            content: bytes = system.cat_file(path)
        return content

    def read_text(self, encoding: str | None = None, errors: str | None = None, newline: str | None = None) -> str:
        """The content of the file."""
        return io.TextIOWrapper(io.BytesIO(self.read_bytes()), encoding, errors, newline).read()

    def open(self, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """Opens a copy of the file on this machine to read it."""
        if set(mode) & set("wax+"):
            raise ValueError(f"{self} is opened to write; use files.atomic_write")
        return open(self.local(), mode, *args, **kwargs)

    def stream(self) -> Any:
        """Opens the file to read ranges of bytes, each of which is a request to the storage."""
        with remote_errors(self):
            system, path = self._system()
            return _Stream(self, system.open(path, "rb", cache_type="none", block_size=STREAM_BYTES))

    def local(self) -> Path:
        """A copy of the file on this machine, in the folder of caches; it is made once for each version of the file."""
        from filelock import FileLock

        info = self._info()
        if info["type"] == "directory":
            raise IsADirectoryError(f"{self} is a folder")
        versions = cache_folder() / "remote" / hashlib.blake2b(str(self).encode(), digest_size=12).hexdigest()
        copy = versions / _version(info) / self.name
        if not copy.is_file():
            versions.mkdir(parents=True, exist_ok=True)
            with FileLock(versions / ".lock"):
                if not copy.is_file():
                    _delete_unused(versions)
                    self._download(copy)
        os.utime(copy.parent)
        return copy

    def require_lock(self, check: Callable[[], None] | None) -> None:
        """Lets this process write and delete in the folder only while it has the lock of the folder.

        Args:
            check: Called before each change; raises a `UserError` if the lock has been lost. None ends the requirement.
        """
        if check is None:
            _REQUIRED_LOCKS.pop(self, None)
        else:
            _REQUIRED_LOCKS[self] = check

    def _check_locks(self) -> None:
        for folder in self.parents if _REQUIRED_LOCKS else ():
            if check := _REQUIRED_LOCKS.get(folder):
                check()

    def upload(self, source: Path) -> None:
        """Writes the file as a whole: others see its former content, or the new one.

        Args:
            source: File of this machine.
        """
        self._check_locks()
        with remote_errors(self, writes=True):
            system, path = self._system()
            system.put_file(str(source), path)

    def write_bytes(self, data: Any) -> int:
        """Writes the file as a whole."""
        self._check_locks()
        with remote_errors(self, writes=True):
            system, path = self._system()
            system.pipe_file(path, bytes(data))
        return len(data)

    def create(self, data: bytes) -> bool:
        """Writes the file unless it exists, in one step where the storage can.

        Returns:
            Whether it has been written.
        """
        with remote_errors(self, writes=True):
            system, path = self._system()
            try:
                system.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
        return True

    def write_text(self, data: str, encoding: str | None = None, *_: Any, **__: Any) -> int:
        """Writes the file as a whole."""
        return self.write_bytes(data.encode(encoding or "utf-8"))

    def unlink(self, missing_ok: bool = False) -> None:
        """Deletes the file."""
        self._check_locks()
        try:
            with remote_errors(self):
                system, path = self._system()
                system.rm_file(path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def check_writable(self) -> None:
        """Writes and deletes a file in the folder, so that a missing permission is known before work begins."""
        # The same for all processes, so that none is left for long if a process is killed here.
        probe = self / _PROBE
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)

    def file_system(self) -> Any:
        """The file system of fsspec."""
        with remote_errors(self):
            return self._system()[0]

    def _system(self) -> tuple[Any, str]:
        """File system and path in it. fsspec keeps one for each process, and a new one after a fork."""
        from fsspec.core import url_to_fs

        # Without lists of files from memory, because other processes write.
        system, path = url_to_fs(str(self), use_listings_cache=False)
        return system, path

    def _info(self) -> dict[str, Any]:
        with remote_errors(self):
            system, path = self._system()
            info: dict[str, Any] = system.info(path)
        return info

    def _kind(self) -> str | None:
        try:
            return str(self._info()["type"])
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _download(self, copy: Path) -> None:
        shutil.rmtree(copy.parent, ignore_errors=True)
        copy.parent.mkdir()
        draft = copy.with_name(f".tmp-{copy.name}")
        with remote_errors(self):
            system, path = self._system()
            system.get_file(path, str(draft))
        os.replace(draft, copy)


class _Stream(io.RawIOBase):
    """A remote file that is read in ranges; errors of the storage are user errors, also within pyarrow."""

    def __init__(self, path: RemotePath, file: Any) -> None:
        self._path = path
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        with remote_errors(self._path):
            content: bytes = self._file.read(-1 if size is None else size)
        return content

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _version(info: dict[str, Any]) -> str:
    """Hexadecimal hash of what the storage knows of a file: size, time and, of objects, their hash."""
    return hashlib.blake2b(repr(sorted(info.items(), key=lambda entry: entry[0])).encode(), digest_size=7).hexdigest()


def _delete_unused(versions: Path) -> None:
    for folder in versions.iterdir():
        if folder.is_dir() and time.time() - folder.stat().st_mtime > _UNUSED_S:
            shutil.rmtree(folder, ignore_errors=True)


def as_path(path: str | os.PathLike[str]) -> Path:
    """A path, or a `RemotePath` for the URL of remote storage.

    Args:
        path: Path or URL. One of either kind is returned as it is.

    Raises:
        UserError: It is a URL that `storage_path` refuses.
    """
    if isinstance(path, Path):
        return path
    if not isinstance(path, str) or not is_remote(path):
        return Path(path)
    try:
        checked = storage_path(path)
    except ValueError as error:
        raise UserError(str(error)) from None
    return RemotePath(checked)


def parquet_source(path: Path) -> Any:
    """What pyarrow reads a Parquet file from: its path, or a stream if it is remote.

    Args:
        path: Path of the file.
    """
    return path.stream() if isinstance(path, RemotePath) else path


def open_sequential(path: Path) -> Any:
    """Opens a file to read it once from first to last, without a copy on this machine.

    Args:
        path: Path of the file.
    """
    return io.BufferedReader(path.stream(), STREAM_BYTES) if isinstance(path, RemotePath) else path.open("rb")
