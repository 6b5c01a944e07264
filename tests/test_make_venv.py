"""Builder of the environment: choice of the interpreter, error messages, and rebuilding after an interrupted build."""

import importlib.util
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
# The four commands of a build in order, each identified by one of its words.
ALL = ["venv", "-r", "--editable", "llmgr_rec.doctor"]


@pytest.fixture
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_venv", ROOT / "requirements" / "make_venv.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_python(folder: Path, name: str, version: str, has_venv: bool = True) -> str:
    """A program that prints a version, and fails on `import venv` if it has none."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    answer = "exit 0" if has_venv else "exit 1"
    program.write_text(f'#!/bin/sh\ncase "$2" in *ensurepip*) {answer};; *) echo {version};; esac\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


def test_an_old_python_is_skipped(builder: ModuleType, tmp_path: Path) -> None:
    old, new = fake_python(tmp_path, "old", "3.9"), fake_python(tmp_path, "new", "3.12")
    assert builder.find_python([str(tmp_path / "absent"), old, new], "") == new


def test_only_old_pythons_are_an_error_that_names_the_package(builder: ModuleType, tmp_path: Path) -> None:
    old = fake_python(tmp_path, "old", "3.9")
    with pytest.raises(builder.SetupError, match=r"3\.11 or newer is needed, found only .*old is 3\.9; .*apt install"):
        builder.find_python([old], "")


def test_a_requested_python_is_used_or_refused(builder: ModuleType, tmp_path: Path) -> None:
    good = fake_python(tmp_path, "good", "3.11")
    assert builder.find_python(["never-asked"], good) == good
    with pytest.raises(builder.SetupError, match="none called nowhere/python"):
        builder.find_python([good], "nowhere/python")


def test_a_python_without_venv_is_skipped_or_names_the_package(builder: ModuleType, tmp_path: Path) -> None:
    bare = fake_python(tmp_path, "bare", "3.11", has_venv=False)
    new = fake_python(tmp_path, "new", "3.12")
    assert builder.find_python([bare, new], "") == new
    with pytest.raises(builder.SetupError, match="lacks the venv module; fix: apt install python3-venv"):
        builder.find_python([bare], "")


class Installer:
    """Stands for venv, pip and the doctor."""

    def __init__(self, builder: ModuleType, venv: Path) -> None:
        self.builder, self.venv = builder, venv
        self.ran: list[str] = []
        self.failing = ""

    def __call__(self, command: Sequence[str], failure: str) -> None:
        what = next(word for word in ALL if word in command)
        self.ran.append(what)
        if what == self.failing:
            raise self.builder.SetupError(failure)
        if what == "venv":
            (self.venv / "bin").mkdir(parents=True)
            (self.venv / "bin" / "python").symlink_to(sys.executable)


@pytest.fixture
def installer(builder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installer:
    installer = Installer(builder, tmp_path / "venv")
    monkeypatch.setattr(builder, "_run", installer)
    monkeypatch.setattr(builder, "find_python", lambda *_: sys.executable)
    (tmp_path / "lock.txt").write_text("a==1\n")
    return installer


def build(builder: ModuleType, tmp_path: Path, torch_index: str = "", tools: str = "") -> None:
    builder.build(str(tmp_path / "venv"), str(tmp_path / "lock.txt"), torch_index, "", tools)


def test_it_is_built_once(builder: ModuleType, tmp_path: Path, installer: Installer) -> None:
    build(builder, tmp_path)
    assert installer.ran == ALL
    build(builder, tmp_path)
    assert installer.ran == ALL


@pytest.mark.parametrize("failing", ALL)
def test_an_interrupted_build_is_never_complete(
    builder: ModuleType, tmp_path: Path, installer: Installer, failing: str
) -> None:
    installer.failing = failing
    with pytest.raises(builder.SetupError):
        build(builder, tmp_path)
    installer.failing, installer.ran = "", []
    build(builder, tmp_path)
    assert installer.ran == ALL


def test_another_lock_starts_from_an_empty_folder(builder: ModuleType, tmp_path: Path, installer: Installer) -> None:
    build(builder, tmp_path)
    (tmp_path / "venv" / "left-over").write_text("")
    (tmp_path / "lock.txt").write_text("a==2\n")
    build(builder, tmp_path)
    assert installer.ran == ALL * 2
    assert not (tmp_path / "venv" / "left-over").exists()


def test_tools_are_added_once_and_stay(builder: ModuleType, tmp_path: Path, installer: Installer) -> None:
    build(builder, tmp_path)
    tools = tmp_path / "tools.txt"
    tools.write_text("b==1\n")
    build(builder, tmp_path, tools=str(tools))
    assert installer.ran == [*ALL, "-r"]
    build(builder, tmp_path)
    build(builder, tmp_path, tools=str(tools))
    assert installer.ran == [*ALL, "-r"]
    tools.write_text("b==2\n")
    installer.failing = "-r"
    with pytest.raises(builder.SetupError, match=r"could not install .*tools\.txt"):
        build(builder, tmp_path, tools=str(tools))
    installer.failing = ""
    build(builder, tmp_path, tools=str(tools))
    assert installer.ran == [*ALL, "-r", "-r", "-r"]


def test_an_environment_of_another_lock_or_python_is_left_alone(
    builder: ModuleType, tmp_path: Path, installer: Installer, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(builder, tmp_path)
    (tmp_path / "next.txt").write_text("a==2\n")
    with pytest.raises(builder.SetupError, match=r"venv was built from lock\.txt, not next\.txt; fix: .*VENV="):
        builder.build(str(tmp_path / "venv"), str(tmp_path / "next.txt"), "", "")
    monkeypatch.setattr(builder, "find_python", lambda _, requested: requested)
    builder.build(str(tmp_path / "venv"), str(tmp_path / "lock.txt"), "", sys.executable)
    other = fake_python(tmp_path, "other", "3.99")
    with pytest.raises(builder.SetupError, match=r"has Python 3\.1\d, not 3\.99; fix: .*VENV="):
        builder.build(str(tmp_path / "venv"), str(tmp_path / "lock.txt"), "", other)
    assert installer.ran == ALL


def test_each_lock_has_its_folder() -> None:
    def folder(*arguments: str) -> tuple[str, str]:
        command = ["make", "--dry-run", "--directory", str(ROOT), "venv", *arguments]
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        return re.findall(r'--venv "(\S+)" --lock "(\S+)"', printed)[0]

    assert folder() == (".venv", "requirements/cpu.txt")
    assert folder("LOCK=next") == (".venv-next", "requirements/next.txt")
    assert folder("LOCK=next", "VENV=other") == ("other", "requirements/next.txt")


def test_a_moved_environment_is_rebuilt(builder: ModuleType, tmp_path: Path, installer: Installer) -> None:
    build(builder, tmp_path)
    stamp = json.loads((tmp_path / "venv" / "complete.json").read_text())
    (tmp_path / "venv" / "complete.json").write_text(json.dumps({**stamp, "path": "/elsewhere"}))
    build(builder, tmp_path)
    assert installer.ran == ALL * 2


def test_the_extra_index_is_passed_to_pip(
    builder: ModuleType, tmp_path: Path, installer: Installer, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(
        builder, "_run", lambda command, failure: (commands.append(command), installer(command, failure))
    )
    build(builder, tmp_path, torch_index="file:///wheels")
    (install,) = [command for command in commands if "-r" in command]
    assert install[-2:] == ["--extra-index-url", "file:///wheels"]
    assert "--no-deps" in install


def test_the_script_is_readable_by_an_old_python(builder: ModuleType) -> None:
    import ast

    source = (ROOT / "requirements" / "make_venv.py").read_text()
    ast.parse(source, feature_version=(3, 6))
    assert os.path.samefile(builder.ROOT, ROOT)
