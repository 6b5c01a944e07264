"""Remote paths: copies on this machine, errors in one line without credentials, and locks."""

import importlib.util
import json
import os
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmgr_rec import remote_lock
from llmgr_rec.data.preparation.duckdb_database import DuckDBDatabase
from llmgr_rec.errors import UserError
from llmgr_rec.files import atomic_folder, atomic_write, require_writable, this_writer
from llmgr_rec.folder_lock import LOCK_NAME, FolderLock
from llmgr_rec.remote_errors import remote_error
from llmgr_rec.remote_path import RemotePath, as_path, open_sequential
from tests.remote.object_store import fails, register

SECRET = "wJalrXUtnFEMI/K7MDENG"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemotePath:
    monkeypatch.setenv("LLMGR_TEST_OBJECTS", "")
    monkeypatch.setenv("LLMGR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "objects" / "bucket").mkdir(parents=True)
    register(tmp_path / "objects")
    path = as_path("objects://bucket/folder")
    assert isinstance(path, RemotePath)
    return path


def test_a_copy_is_made_once_for_each_version(folder: RemotePath, tmp_path: Path) -> None:
    file = folder / "a.txt"
    with pytest.raises(FileNotFoundError, match=r"objects://bucket/folder/a\.txt"):
        file.read_text()
    with atomic_write(file) as partial:
        partial.write_text("one")
    copy = file.local()
    assert (file.read_text(), copy.read_text(), copy.name) == ("one", "one", "a.txt")
    assert file.local() == copy
    inode = copy.stat().st_ino
    file.write_text("two")
    assert file.local() != copy
    with file.open() as text, open_sequential(file) as stream:
        assert (text.read(), stream.read()) == ("two", b"two")
    assert copy.stat().st_ino == inode
    with pytest.raises(ValueError, match="use files"):
        file.open("w")
    with pytest.raises(UserError, match="is a file; give the path of a folder"):
        require_writable(file)
    assert [path.name for path in folder.iterdir()] == ["a.txt"]
    # Nothing was half-written to the storage.
    with pytest.raises(ZeroDivisionError), atomic_write(file) as partial:
        partial.write_text(str(1 // 0))
    assert file.read_text() == "two"
    with pytest.raises(UserError, match="is not empty"), atomic_folder(folder, "a.txt"):
        pass
    assert not list((tmp_path / "cache" / "remote" / "drafts").iterdir())


class ClientError(Exception):
    """As botocore's: with the code of the storage, and what the user must not see."""

    def __init__(self, code: str) -> None:
        super().__init__(f"{code}: {SECRET}")
        self.response = {"Error": {"Code": code, "Message": SECRET}}


class EndpointConnectionError(Exception):
    """As botocore's."""


ClientError.__module__ = EndpointConnectionError.__module__ = "botocore.exceptions"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ClientError("ExpiredToken"), "the credentials have expired; renew them"),
        (ClientError("InvalidAccessKeyId"), "does not know the credentials; give others"),
        (ClientError("AccessDenied"), "permission denied; use credentials"),
        (ClientError("400"), "permission denied; use credentials that have not expired"),
        (PermissionError(SECRET), "permission denied; use credentials"),
        (ClientError("NoSuchBucket"), "the bucket does not exist; create it"),
        (EndpointConnectionError(SECRET), "cannot be reached; check the network"),
        (TimeoutError(SECRET), "cannot be reached; check the network"),
        (ClientError("SlowDown"), r"the storage failed \(ClientError, SlowDown\); run the same command again"),
    ],
)
def test_errors_of_the_storage_are_one_line_without_credentials(
    folder: RemotePath, error: Exception, said: str
) -> None:
    reads = [
        folder.exists,
        folder.read_bytes,
        folder.stat,
        lambda: list(folder.iterdir()),
        lambda: require_writable(folder),
    ]
    for read in reads:
        with fails(error), pytest.raises(UserError, match=f"^objects://bucket/folder.*: .*{said}") as raised:
            read()
        assert SECRET not in str(raised.value)
        assert raised.value.__suppress_context__
        assert "\n" not in str(raised.value)


def test_errors_of_the_storage_within_duckdb_are_one_line(folder: RemotePath, tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    (folder / "a.parquet").upload(tmp_path / "a.parquet")
    database = DuckDBDatabase(tmp_path, 1.0, 1)
    try:
        query = f"SELECT a FROM {database.parquet([folder / 'a.parquet'], ['a'])}"
        assert database.run(query) == [(1,)]
        for error, said in ((ClientError("ExpiredToken"), "have expired"), (ClientError("x"), "the storage failed")):
            raises = pytest.raises(UserError, match=f"^reading: .*{said}.*$")
            with fails(error), raises as raised, database.user_errors("reading"):
                database.run(query)
            assert SECRET not in str(raised.value)
    finally:
        database.close()


def test_other_errors_are_not_those_of_the_storage(folder: RemotePath) -> None:
    assert remote_error(KeyError("x"), folder) is None
    with fails(KeyError("x")), pytest.raises(KeyError):
        folder.exists()
    with pytest.raises(UserError, match=r"objects://absent/x.*the bucket does not exist"):
        require_writable(as_path("objects://absent/x"))
    assert not as_path("objects://absent/x").exists()


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_a_missing_package_is_named_with_its_command() -> None:
    with pytest.raises(UserError, match=r"^gs://b/c: the package gcsfs is not installed: pip install 'gcsfs=="):
        as_path("gs://b/c").exists()


def test_a_lock_is_of_one_process(folder: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_lock, "RENEW_S", 0.05)
    monkeypatch.setattr(remote_lock, "EXPIRE_S", 0.3)
    monkeypatch.setattr(remote_lock, "_TAKE_OVER_S", 0.0)
    first, second = FolderLock(folder, "scoring"), FolderLock(folder, "scoring")
    first.acquire()
    with pytest.raises(UserError, match="another process is scoring in objects://bucket/folder; wait until it ends"):
        second.acquire()
    first.release()
    assert not folder.exists()
    # A dead process of this machine, another machine that is silent, and one that renews its lock.
    pid, machine, start = this_writer().split("-")
    file = folder / LOCK_NAME
    for writer in (f"{pid}-{machine}-{int(start) + 1}", f"1-00000000-{start}"):
        file.write_text(json.dumps({"writer": writer, "renewals": 0}))
        second.acquire()
        second.release()
    stop = threading.Event()

    def renew() -> None:
        number = 0
        while not stop.wait(0.02):
            number += 1
            file.write_text(json.dumps({"writer": f"1-00000000-{start}", "renewals": number}))

    other = threading.Thread(target=renew)
    other.start()
    try:
        time.sleep(0.1)
        with pytest.raises(UserError, match="another process is scoring"):
            second.acquire()
    finally:
        stop.set()
        other.join()
    _taken_locks_end_their_processes(folder, first, second)


def _taken_locks_end_their_processes(folder: RemotePath, first: FolderLock, second: FolderLock) -> None:
    """`first` is the lock of a process, and `second` that of another rank."""
    lock = Path(os.environ["LLMGR_TEST_OBJECTS"]) / "bucket" / "folder" / LOCK_NAME
    lock.unlink()
    first.acquire()
    (folder / "a").write_text("before")
    for number, own in enumerate((first, second)):
        taken = json.dumps({"writer": f"1-00000000-{number}", "renewals": 0})
        lock.write_text(taken)
        for change in ((folder / "a").unlink, lambda: (folder / "a").write_text("after"), lambda: write_b(folder)):
            with pytest.raises(UserError, match=r"^objects://bucket/folder/\.lock was removed, or taken by another"):
                change()
        # Renewals have stopped, too, and the end does not delete the lock of another process.
        time.sleep(0.15)
        own.release()
        assert lock.read_text() == taken
        second.join()
    second.release()
    assert (folder / "a").read_text() == "before"
    assert not (folder / "b").exists()
    write_b(folder)


def write_b(folder: RemotePath) -> None:
    with atomic_write(folder / "b") as partial:
        partial.write_text("b")
