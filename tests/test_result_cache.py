"""Results that later commands take over: found by all that they depend on, never out of date, damaged or in the way."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmgr_rec import result_cache
from llmgr_rec.errors import UserError
from llmgr_rec.result_cache import CachedResult, files_below, recorded_messages, results_folder

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("LLMGR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LLMGR_CACHE_GB", "1")
    return tmp_path / "cache" / "results"


def make(folder: Path, content: str = "made") -> dict[str, Path]:
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "a").write_text(content)
    (folder / "b").write_bytes(bytes(1000))
    return files_below(folder)


def source(folder: Path, text: str = "log") -> Path:
    file = folder / f"source-{text}"
    file.write_text(text)
    return file


def result(folder: Path, **changed: Any) -> CachedResult:
    inputs = {"kind": "copy", "inputs": {"length": 5}, "sources": [source(folder)], "packages": ("numpy",)}
    return CachedResult(**inputs | changed)


def entries(cache: Path) -> list[str]:
    return sorted(os.listdir(cache)) if cache.is_dir() else []


def test_a_result_and_its_messages_are_taken_by_later_commands(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = result(tmp_path, paths=["here"])
    assert not first.take(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with recorded_messages("datagen") as messages:
        logging.getLogger("datagen.sources").warning("%s/log: %d rows dropped", "here", 3)
        logging.getLogger("other").warning("of another package")
    made = make(tmp_path / "made")
    first.keep(made, messages)
    caplog.clear()
    assert result(tmp_path, paths=["there"]).take(tmp_path / "taken")
    assert {name: file.read_bytes() for name, file in files_below(tmp_path / "taken").items()} == {
        name: file.read_bytes() for name, file in made.items()
    }
    assert [record.getMessage() for record in caplog.records if record.name == "datagen.sources"] == [
        "there/log: 3 rows dropped"
    ]
    assert f"taking the copy from {cache}" in caplog.text
    assert cache.stat().st_mode & 0o077 == 0


def test_every_change_of_what_a_result_depends_on_is_another_result(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result(tmp_path).keep(make(tmp_path / "made"))
    assert result(tmp_path).files()
    code = tmp_path / "code"
    code.mkdir()
    changes: list[dict[str, Any]] = [
        {"kind": "other"},
        {"inputs": {"length": 6}},
        {"sources": [source(tmp_path, "log of today")]},
        {"sources": []},
        {"packages": ("pyarrow",)},
        {"code": [code]},
    ]
    assert not any(result(tmp_path, **change).files() for change in changes)
    monkeypatch.setattr(result_cache.importlib.metadata, "version", lambda name: "99")
    assert not result(tmp_path).files()


def test_a_change_of_the_code_is_another_result(tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "steps.py").write_text("a = 1")
    before = result_cache._code_checksum(code)
    result_cache._code_checksum.cache_clear()
    (code / "steps.py").write_text("a = 2")
    assert result_cache._code_checksum(code) != before


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "b").write_bytes(bytes(999) + b"\1"),
        lambda folder: (folder / "b").write_bytes(bytes(10)),
        lambda folder: (folder / "b").unlink(),
        lambda folder: (folder / "entry.json").unlink(),
        lambda folder: (folder / "entry.json").write_text("{"),
        lambda folder: (folder / "entry.json").write_text('{"files": {"../b": "xxh3-128:0"}, "messages": []}'),
    ],
)
def test_what_is_damaged_is_made_again(tmp_path: Path, cache: Path, damage: Any) -> None:
    made = make(tmp_path / "made")
    result(tmp_path).keep(made)
    damage(cache / entries(cache)[0])
    again = result(tmp_path)
    assert not again.take(tmp_path / "taken")
    assert not (tmp_path / "taken").exists()
    again.keep(made)
    assert result(tmp_path).take(tmp_path / "taken")


def test_a_source_that_changes_meanwhile_is_not_kept(tmp_path: Path, cache: Path) -> None:
    before = result(tmp_path)
    (tmp_path / "source-log").write_text("log, and more")
    before.keep(make(tmp_path / "made"))
    assert entries(cache) == []


def test_a_cache_that_cannot_be_written_is_in_nobodys_way(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    made = make(tmp_path / "made")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(result_cache.shutil, "copyfile", full)
        result(tmp_path).keep(made)
    assert entries(cache) == []
    assert "cannot be kept for later commands" in caplog.text
    assert "No space left" in caplog.text
    cache.rmdir()
    cache.write_text("a file, as a folder without permission is for others than root")
    result(tmp_path).keep(made)
    assert not result(tmp_path).take(tmp_path / "taken")
    assert caplog.text.count("cannot be kept for later commands") == 2
    monkeypatch.delenv("LLMGR_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    result(tmp_path).keep(made)
    assert not result(tmp_path).take(tmp_path / "taken")
    assert "there is no home folder" in caplog.text


def test_an_output_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result(tmp_path).keep(make(tmp_path / "made"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(result_cache.shutil, "copyfile", full)
    with pytest.raises(UserError, match="No space left on device; free some space"):
        result(tmp_path).take(tmp_path / "taken")


def test_a_result_that_is_deleted_while_it_is_taken_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result(tmp_path).keep(make(tmp_path / "made"))
    copy = shutil.copyfile

    def late(file: Path, target: Path) -> None:
        if file.name == "b":
            raise FileNotFoundError(file)
        copy(file, target)

    monkeypatch.setattr(result_cache.shutil, "copyfile", late)
    assert not result(tmp_path).take(tmp_path / "taken")
    assert not files_below(tmp_path / "taken")


def test_the_results_used_longest_ago_make_room(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(tmp_path / "made")
    monkeypatch.setenv("LLMGR_CACHE_GB", str(3000 / 2**30))
    for number in range(3):
        result(tmp_path, inputs={"length": number}).keep(made)
        if number == 0:
            os.utime(next(cache.glob("*/entry.json")), (1, 1))
    assert [bool(result(tmp_path, inputs={"length": number}).files()) for number in range(3)] == [False, True, True]
    large = tmp_path / "large"
    large.write_bytes(bytes(3000))
    result(tmp_path, inputs={"length": 9}).keep({"large": large})
    result(tmp_path, sources=[large, large]).keep(made)
    assert len(entries(cache)) == 2
    for value in ("-1", "many", "nan"):
        monkeypatch.setenv("LLMGR_CACHE_GB", value)
        with pytest.raises(UserError, match=f"LLMGR_CACHE_GB is {value}; give a number of GiB"):
            result(tmp_path)
    monkeypatch.setenv("LLMGR_CACHE_GB", "0")
    result(tmp_path, inputs={"length": 9}).keep(made)
    assert len(entries(cache)) == 2


_SEVERAL = """
import os, signal, sys
from pathlib import Path
from llmgr_rec import result_cache
from llmgr_rec.result_cache import CachedResult, files_below
folder, one = Path(sys.argv[1]), CachedResult("copy", {})
files = files_below(folder / "made")
killed = os.fork()
if not killed:
    write = result_cache._write_entry
    def stop(*arguments):
        write(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)
    result_cache._write_entry = stop
    one.keep(files)
os.waitpid(killed, 0)
left = os.listdir(one._folder.parent)
assert len(left) == 1 and ".tmp-" in left[0], left
assert not one.files()
children = [os.fork() for _ in range(4)]
if not all(children):
    for turn in range(12):
        one.keep(files)
        target = folder / f"taken-{os.getpid()}-{turn}"
        if one.take(target):
            assert len(files_below(target)) == 2
    os._exit(0)
assert not any(os.waitpid(child, 0)[1] for child in children)
assert os.listdir(one._folder.parent) == [one._folder.name]
assert one.files()
"""


def test_several_processes_and_a_killed_one_leave_one_result(tmp_path: Path) -> None:
    make(tmp_path / "made")
    command = [sys.executable, "-c", _SEVERAL, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads((next(results_folder().glob("*/entry.json"))).read_text())["messages"] == []
