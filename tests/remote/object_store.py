"""A file system of fsspec for tests, objects://BUCKET/KEY: an object store in a folder, which all processes share.

As on S3, a write replaces an object as a whole, there is no rename, and a folder exists while it has objects.
"""

import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
from fsspec import AbstractFileSystem

ROOT = "LLMGR_TEST_OBJECTS"
SCHEME = "objects"


class Killed(BaseException):
    """Raised instead of the n-th change of the store, and of all that follow, as after the death of the process."""


class ObjectStore(AbstractFileSystem):
    """Objects in the folder of the environment variable `ROOT`, of which the first level are buckets."""

    protocol = SCHEME
    root_marker = ""
    changes, deadly = 0, 0
    # Raised by every request, if it is set.
    failure: Exception | None = None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix(f"{SCHEME}://").strip("/")

    def _file(self, path: str) -> Path:
        if ObjectStore.failure is not None:
            raise ObjectStore.failure
        return Path(os.environ[ROOT]) / self._strip_protocol(path)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        file, name = self._file(path), self._strip_protocol(path)
        if file.is_dir():
            return {"name": name, "size": 0, "type": "directory"}
        status = file.stat()
        return {"name": name, "size": status.st_size, "type": "file", "changed": (status.st_ino, status.st_mtime_ns)}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        name = self._strip_protocol(path)
        if self._file(path).is_file():
            found = [self.info(path)]
        else:
            found = [self.info(f"{name}/{entry}") for entry in sorted(os.listdir(self._file(path)))]
        return found if detail else [entry["name"] for entry in found]

    def modified(self, path: str) -> datetime:
        return datetime.fromtimestamp(self._file(path).stat().st_mtime, UTC)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        assert mode == "rb"
        return io.BytesIO(self._file(path).read_bytes())

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        if mode == "create" and self._file(path).exists():
            raise FileExistsError(path)
        with self._change(path) as file, tempfile.NamedTemporaryFile(dir=os.environ[ROOT], delete=False) as draft:
            draft.write(value)
            draft.flush()
            os.replace(draft.name, file)

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        shutil.copyfile(self._file(rpath), lpath)

    def rm_file(self, path: str) -> None:
        with self._change(path) as file:
            file.unlink(missing_ok=True)
            bucket = Path(os.environ[ROOT]) / self._strip_protocol(path).split("/")[0]
            for folder in file.parents:
                if folder == bucket or any(folder.iterdir()):
                    break
                folder.rmdir()

    def mv(self, path1: str, path2: str, **_: Any) -> None:
        raise NotImplementedError("an object store has no rename")

    @contextmanager
    def _change(self, path: str) -> Iterator[Path]:
        file, bucket = self._file(path), self._strip_protocol(path).split("/")[0]
        if not (Path(os.environ[ROOT]) / bucket).is_dir():
            raise FileNotFoundError(bucket)
        if ".lock" not in file.name:
            ObjectStore.changes += 1
            if ObjectStore.deadly and ObjectStore.changes >= ObjectStore.deadly:
                raise Killed
        file.parent.mkdir(parents=True, exist_ok=True)
        yield file


def register(root: Path | str) -> None:
    """Makes the store of a folder that of this process and of those that it starts."""
    os.environ[ROOT] = str(root)
    fsspec.register_implementation(SCHEME, ObjectStore, clobber=True)


@contextmanager
def dies_at(change: int) -> Iterator[None]:
    """Lets no change happen from the n-th on."""
    ObjectStore.changes, ObjectStore.deadly = 0, change
    try:
        yield
    finally:
        ObjectStore.deadly = 0


@contextmanager
def fails(error: Exception) -> Iterator[None]:
    """Lets every request fail."""
    ObjectStore.failure = error
    try:
        yield
    finally:
        ObjectStore.failure = None
