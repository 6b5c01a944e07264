"""The lock of an output folder: storage without locks is a warning, a lock that cannot be had is one line."""

import errno
import os
from pathlib import Path

import pytest

from llmgr_rec.errors import UserError
from llmgr_rec.folder_lock import LOCK_NAME, FolderLock


def failing(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every attempt to lock a file fail."""

    def fail(_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("filelock._unix.lock_fd_nonblocking", fail)


def test_one_process_at_a_time_has_a_folder(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path, "scoring"), FolderLock(tmp_path, "scoring")
    first.acquire()
    with pytest.raises(UserError, match=rf"^another process is scoring in {tmp_path}; wait until it ends, or"):
        second.acquire()
    second.release()
    assert (tmp_path / LOCK_NAME).is_file()
    first.release()
    assert not list(tmp_path.iterdir())
    second.acquire()
    second.release()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_storage_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    failing(number, monkeypatch)
    lock = FolderLock(tmp_path, "scoring")
    lock.acquire()
    lock.release()
    assert f"{tmp_path} cannot be locked" in caplog.text


@pytest.mark.parametrize(
    ("number", "fix"),
    [(errno.ENOSPC, "free some space"), (errno.EACCES, "choose a folder"), (errno.EINVAL, "give another --output")],
)
def test_a_lock_that_cannot_be_had_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fix: str
) -> None:
    failing(number, monkeypatch)
    with pytest.raises(UserError, match=rf"^{tmp_path}/\.lock.*{os.strerror(number)}.*; .*{fix}") as caught:
        FolderLock(tmp_path, "scoring").acquire()
    assert "\n" not in str(caught.value)


def test_a_lock_file_that_is_a_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).mkdir()
    with pytest.raises(UserError, match=r"\.lock cannot be locked \(Is a directory\); remove it if no process"):
        FolderLock(tmp_path, "training").acquire()
