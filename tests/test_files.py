"""Atomic writes: a file or folder appears as a whole or not at all, and what a killed process left is removed."""

import errno
import os
import subprocess
import sys
import time

import pytest

from llmgr_rec import files
from llmgr_rec.errors import UserError
from llmgr_rec.files import atomic_folder, atomic_write, scratch_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from llmgr_rec.files import atomic_folder, atomic_write, scratch_folder
with atomic_write(Path(sys.argv[1])) as file, atomic_folder(Path(sys.argv[2])) as folder:
    with scratch_folder(Path(sys.argv[2])) as scratch:
        for path in (file, folder / "part", scratch / "spill"):
            path.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    file = tmp_path / "new" / "table.csv"
    for text in ("first", "second"):
        with atomic_write(file) as partial:
            partial.write_text(text)
            assert not file.exists() or file.read_text() == "first"
        assert file.read_text() == text
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("error", [RuntimeError("no such column"), KeyboardInterrupt()])
def test_a_file_or_folder_stays_where_writing_fails(tmp_path, error):
    file, folder = tmp_path / "table.csv", tmp_path / "dataset"
    file.write_text("before")

    def fail() -> None:
        with atomic_write(file) as partial, atomic_folder(folder) as draft, scratch_folder(folder) as scratch:
            for path in (partial, draft / "part", scratch / "spill"):
                path.write_text("ha")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_appears_when_it_is_whole(tmp_path):
    folder = tmp_path / "new" / "dataset"
    with atomic_folder(folder) as draft:
        (draft / "train").mkdir()
        (draft / "train" / "part").write_text("whole")
        assert not folder.exists()
    assert (folder / "train" / "part").read_text() == "whole"
    assert list(folder.parent.iterdir()) == [folder]
    with pytest.raises(UserError, match="not empty"), atomic_folder(folder) as draft:
        (draft / "part").write_text("other")
    assert list(folder.parent.iterdir()) == [folder]


def test_what_a_killed_process_left_is_removed(tmp_path):
    file, folder = tmp_path / "metrics.json", tmp_path / "dataset"
    killed = subprocess.run([sys.executable, "-c", KILLED, file, folder], timeout=60)
    assert killed.returncode == -9
    assert len(list(tmp_path.iterdir())) == 3
    with atomic_write(file) as partial, atomic_folder(folder):
        partial.write_text("{}")
    assert sorted(tmp_path.iterdir()) == [folder, file]


def test_temporaries_of_running_processes_and_of_other_files_stay(tmp_path, monkeypatch):
    """A process id counts only with the start time of its process, and only on its machine."""
    folder = tmp_path / "dataset"
    mine, me, ticks = files.this_writer(), os.getpid(), files._start_time(os.getpid())
    here, foreign = files._this_machine(), "0" * 8
    kept = [f"dataset.tmp-{mine}", f"dataset.scratch-{me}", f"dataset.tmp-999999999-{foreign}-5"]
    kept += ["dataset.tmp-old", "other.tmp-999999999", f".tmp-999999999-{here}-1-dataset.json"]
    stale = [f"dataset.tmp-{me}-{here}-{ticks + 1}", f"dataset.scratch-999999999-{here}-5", "dataset.tmp-999999999"]
    long_ago = time.time() - 2 * 24 * 3600
    foreign_and_old = tmp_path / f".tmp-{me}-{foreign}-{ticks}-dataset"
    for name in kept + stale:
        (tmp_path / name).mkdir()
    foreign_and_old.write_text("half")
    os.utime(foreign_and_old, (long_ago, long_ago))
    files.remove_stale(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some of your quota"),
        (errno.EIO, "the device fails; use"),
        (errno.EROFS, "choose a writable folder"),
    ],
)
def test_a_failing_storage_is_one_line_that_names_the_file(tmp_path, monkeypatch, number, fix):
    def fail(path):
        raise OSError(number, os.strerror(number))

    def write_file() -> None:
        with atomic_write(tmp_path / "metrics") as partial:
            partial.write_text("{}")

    def write_folder() -> None:
        with atomic_folder(tmp_path / "metrics"):
            pass

    monkeypatch.setattr(files, "fsync", fail)
    for write in (write_file, write_folder):
        with pytest.raises(UserError, match=rf"^{tmp_path}/metrics: {os.strerror(number)}; {fix}"):
            write()
        assert not list(tmp_path.iterdir())
