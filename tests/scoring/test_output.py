"""Output folders: killed at any operation on a file and continued, and open in one process at a time."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from llmgr_rec.errors import UserError
from llmgr_rec.folder_lock import LOCK_NAME
from llmgr_rec.scoring.input import InputFile, Part
from llmgr_rec.scoring.output import ScoreFolder
from llmgr_rec.scoring.score_run import score_run
from tests.scoring.sessions import all_bytes, raw_sessions, write_sessions
from tests.scoring.test_score_run import request

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


class Killed(BaseException):
    """Raised instead of the n-th operation on a file, and of all that follow, as after the death of the process."""


class Killer:
    """Counts operations in a folder and lets none happen from the n-th on."""

    def __init__(self) -> None:
        self.folder, self.count, self.deadly = "", 0, 0
        sys.addaudithook(self._audit)

    @contextmanager
    def kills_at(self, folder: Path, operation: int) -> Iterator[None]:
        self.folder, self.count, self.deadly = str(folder), 0, operation
        try:
            yield
        finally:
            self.folder = ""

    def operate(self) -> None:
        if not self.folder:
            return
        self.count += 1
        if self.count >= self.deadly:
            raise Killed

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.folder or not (event in CHANGES or (event == "open" and args[2] & WRITES)):
            return
        if str(args[0]).startswith(self.folder):
            self.operate()


@pytest.fixture(scope="module")
def killer() -> Killer:
    return Killer()


@pytest.fixture(autouse=True)
def fsync_is_an_operation(killer: Killer, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def counted(descriptor: int) -> None:
        killer.operate()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", counted)


def job(path: Path) -> ScoreFolder:
    file = InputFile(Path("in.parquet"), "in.parquet", (), False, {})
    return ScoreFolder(path, {"settings": {"k": 1}}, [Part(f"part-{n:05d}.parquet", file, 2 * n, 2) for n in range(2)])


def run(path: Path) -> None:
    """Writes what is missing, as a scoring job does."""
    folder = job(path)
    try:
        folder.open()
        for part in folder.parts:
            if not folder.is_done(part):
                folder.write(part, pa.table({"row": [part.first_row, part.first_row + 1]}), 0, 0, 0)
        folder.finish()
    finally:
        folder.close()


def cut_what_was_not_flushed(folder: Path) -> None:
    """Half of each temporary file; its content may be on its way to the disk when the process dies."""
    for path in folder.glob(".*"):
        if path.is_file() and path.name != LOCK_NAME:
            os.truncate(path, path.stat().st_size // 2)


def end_with_the_same_bytes(tmp_path: Path, killer: Killer, run: Callable[[Path], object]) -> None:
    """Kills `run` at each of its operations, and again soon after it has continued, before it may end."""
    with killer.kills_at(tmp_path / "whole", sys.maxsize):
        run(tmp_path / "whole")
    expected, operations = all_bytes(tmp_path / "whole"), killer.count
    assert set(expected) >= {"_SUCCESS", "_manifest.json", "part-00000.parquet", "part-00001.parquet"}
    assert operations > 15
    for operation in range(1, operations + 1):
        folder = tmp_path / f"killed-{operation}"
        for deadly in (operation, 3):
            with pytest.raises(Killed), killer.kills_at(folder, deadly):
                run(folder)
            if (folder / "_SUCCESS").is_file():
                assert set(all_bytes(folder)) >= set(expected)
            cut_what_was_not_flushed(folder)
        run(folder)
        assert all_bytes(folder) == expected, operation


def test_a_job_killed_at_any_operation_ends_with_the_same_bytes(tmp_path: Path, killer: Killer) -> None:
    end_with_the_same_bytes(tmp_path, killer, run)


@pytest.mark.slow
def test_scoring_killed_at_any_operation_ends_with_the_same_bytes(tmp_path: Path, killer: Killer) -> None:
    source = write_sessions(tmp_path / "in.parquet", raw_sessions(30))
    end_with_the_same_bytes(tmp_path, killer, lambda folder: score_run(request(source, folder, part_rows=10)))


def test_a_folder_in_which_a_part_was_deleted_is_not_marked_complete(tmp_path: Path, killer: Killer) -> None:
    run(tmp_path / "out")
    expected = all_bytes(tmp_path / "out")
    (tmp_path / "out" / "part-00001.parquet").unlink()
    folder = job(tmp_path / "out")
    folder.open()
    assert not folder.is_complete()
    folder.close()
    run(tmp_path / "out")
    assert all_bytes(tmp_path / "out") == expected


@pytest.mark.parametrize("content", ["[]", "{", "5"])
def test_a_damaged_manifest_is_one_line(tmp_path: Path, content: str) -> None:
    run(tmp_path / "out")
    (tmp_path / "out" / "_manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"_manifest\.json does not belong to a scoring job; give another --output"):
        run(tmp_path / "out")


def test_a_second_job_in_the_folder_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    first = job(tmp_path / "out")
    first.open()
    with pytest.raises(UserError, match=r"another process is scoring in \S+out; wait until it ends") as caught:
        run(tmp_path / "out")
    assert "\n" not in str(caught.value)
    first.close()
    run(tmp_path / "out")
    assert (tmp_path / "out" / "_SUCCESS").is_file()


def test_the_lock_of_a_killed_process_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    program = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(); input()"
    command = [sys.executable, "-c", program, str(tmp_path / "out" / LOCK_NAME)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            with pytest.raises(UserError, match="another process is scoring"):
                run(tmp_path / "out")
        finally:
            process.kill()
    run(tmp_path / "out")
    assert not (tmp_path / "out" / LOCK_NAME).exists()


@pytest.mark.parametrize("left", [[], [LOCK_NAME], ["._manifest.json.tmp"], [".tmp-1-_manifest.json", LOCK_NAME]])
def test_what_a_job_without_manifest_leaves_is_not_foreign(tmp_path: Path, left: list[str]) -> None:
    (tmp_path / "out").mkdir()
    for name in left:
        (tmp_path / "out" / name).write_text("{")
    run(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "_SUCCESS").read_text())["rows_out"] == 4
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
