"""Finds the commands in the documentation, checks each one against the real parsers, and runs whole pages.

A fence that opens with ```sh holds commands only, one a line (a backslash at the end continues it); what a command
prints stands in another kind of fence.
"""

import argparse
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llmgr_rec.commands import COMMANDS
from tests.torchx.launcher import ROOT, torchx_in_process

FENCE = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
ANY_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
RECIPE_COMMAND = re.compile(r"^#\s+((?:python -m|torchx run|torchrun) .*)$", re.MULTILINE)
ASSIGNMENT = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*=")
OWN_PACKAGES = ("llmgr_rec", "datagen", "torchx_components", "benchmarks", "examples", "tests")
# Programs whose arguments are not ours to check.
OTHER_PROGRAMS = {
    ".",
    "apt",
    "apt-get",
    "bash",
    "cat",
    "cd",
    "curl",
    "docker",
    "export",
    "git",
    "kubectl",
    "ln",
    "ls",
    "pip",
    "source",
}
OTHER_MODULES = {"build", "http.server", "mypy", "pip", "pytest", "ruff", "tensorboard.main", "venv"}
# Sub-commands of torchx that need a running job.
TORCHX_ON_JOBS = {"cancel", "list", "log", "status"}


@dataclass(frozen=True)
class Command:
    """One documented command line.

    Args:
        place: File and number of the command in it.
        line: The command, continuation lines joined.
    """

    place: str
    line: str


class Parsed(BaseException):
    """Raised in place of going on, once the real parser has accepted the arguments."""


def documented_pages() -> list[Path]:
    """README.md, BUILD.md and what stands in docs/."""
    return [ROOT / "README.md", ROOT / "BUILD.md", *sorted((ROOT / "docs").rglob("*.md"))]


def documented_commands() -> Iterator[Command]:
    """Commands of the documented pages, but the wrong ones of the FAQ, and those of recipes and experiments."""
    for page in documented_pages():
        if page.name == "faq.md":
            continue
        lines = [line for block in FENCE.findall(page.read_text()) for line in lines_of(block)]
        for number, line in enumerate(lines, start=1):
            yield Command(f"{page.relative_to(ROOT)}-{number}", line)
    for recipe in sorted((ROOT / "llmgr_rec").rglob("*.yaml")):
        for number, line in enumerate(RECIPE_COMMAND.findall(recipe.read_text()), start=1):
            yield Command(f"{recipe.relative_to(ROOT)}-{number}", line)


def lines_of(block: str) -> Iterator[str]:
    """The commands of a fence, continuation lines joined, and those joined by && apart."""
    for line in block.replace("\\\n", " ").splitlines():
        stripped = line.strip().removeprefix("$ ")
        if stripped and not stripped.startswith("#"):
            yield from (part.strip() for part in stripped.split("&&"))


def fences(page: Path) -> list[tuple[str, str]]:
    """Language and content of each fence of a page, in order."""
    return ANY_FENCE.findall(page.read_text())


def run_programs(page: Path) -> dict[str, Any]:
    """Runs the programs of a page in one namespace, in the current folder.

    Args:
        page: The page.

    Returns:
        The names that they have defined.
    """
    return _run(page, None)


def run_page(page: Path, run_other: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Runs a page in the current folder, from top to bottom: programs in one namespace, commands in this process.

    Args:
        page: The page.
        run_other: Runs commands that are not `python -m MODULE`, and services; None if the page has none.

    Returns:
        The names that the programs have defined.
    """

    def run(line: str) -> None:
        words = shlex.split(line)
        if words[:2] == ["python", "-m"] and words[2] != "llmgr_rec.serve":
            entry_point(words[2]).main(words[3:])
        else:
            assert run_other is not None, f"nothing runs {line}"
            run_other(line)

    return _run(page, run)


def _run(page: Path, run_line: Callable[[str], None] | None) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "__main__"}
    for language, content in fences(page):
        if language == "python":
            exec(compile(content, str(page), "exec"), names)
        elif language == "sh" and run_line is not None:
            for line in lines_of(content):
                run_line(line)
    return names


def check_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when a program, module, option, make target or make variable in the line does not exist."""
    words = shlex.split(line, comments=True)
    while ASSIGNMENT.match(words[0]):
        words = words[1:]
    program, arguments = words[0], words[1:]
    if program.endswith("python") or program == "python3":
        assert arguments[:1] == ["-m"], f"only modules are documented: {line}"
        check_module(arguments[1], arguments[2:], monkeypatch)
    elif program == "llmgr":
        assert arguments[0] in COMMANDS, f"there is no command {arguments[0]}"
        check_module(f"llmgr_rec.{arguments[0]}", arguments[1:], monkeypatch)
    elif program == "make":
        _check_make(arguments)
    elif program == "torchx":
        _check_torchx(arguments, monkeypatch)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        launch = get_args_parser().parse_args(arguments)
        assert launch.module, f"only modules are documented: {line}"
        check_module(launch.training_script, launch.training_script_args, monkeypatch)
    else:
        assert program in OTHER_PROGRAMS, f"unknown program {program}: {line}"


def check_module(name: str, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a module's own parser read the arguments."""
    if name in OTHER_MODULES:
        return
    assert name.split(".")[0] in OWN_PACKAGES, f"unknown module {name}"
    module = entry_point(name)
    if not inspect.signature(module.main).parameters:
        assert not arguments, f"{name} takes no arguments"
        return
    with monkeypatch.context() as patch:
        _stop_after_parsing(patch)
        patch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(Parsed):
            module.main(list(arguments))


def entry_point(name: str) -> ModuleType:
    """The module that `python -m NAME` runs."""
    found = importlib.import_module(name)
    return importlib.import_module(f"{name}.__main__") if hasattr(found, "__path__") else found


def _stop_after_parsing(patch: pytest.MonkeyPatch) -> None:
    import jsonargparse

    for parser in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
        patch.setattr(parser, "parse_args", _parse_and_stop(parser.parse_args))


def _parse_and_stop(parse: Callable[..., Any]) -> Callable[..., Any]:
    depth = 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        depth += 1
        try:
            result = parse(*args, **kwargs)
        except SystemExit as done:
            # --print_config ends the parser once it has accepted the rest.
            if done.code == 0:
                raise Parsed from None
            raise
        finally:
            depth -= 1
        if depth:
            return result
        raise Parsed

    return wrapper


def _check_make(arguments: Sequence[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in arguments:
        if ASSIGNMENT.match(word):
            name = word.split("=")[0]
            assert re.search(rf"^{name} \?=", makefile, re.MULTILINE), f"the Makefile knows no variable {name}"
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def _check_torchx(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if arguments[0] in TORCHX_ON_JOBS:
        return
    assert arguments[0] == "run", f"torchx {arguments[0]} is not documented elsewhere"
    # Components of the installed project are called by their file here, so that the checkout is what is tested.
    words = [re.sub(r"^llmgr\.(\w+)$", r"torchx_components/rec.py:\1", word) for word in arguments[1:]]
    if "--dryrun" not in words:
        words.insert(0, "--dryrun")
    if "--overlay" in words:
        # The file is that of the reader; tests/torchx/test_pod_overlay.py takes the one that the page shows.
        del words[words.index("--overlay") : words.index("--overlay") + 2]
    torchx_in_process(["run", *words], monkeypatch)
    if "--" in words:
        check_module(_module_of(words), words[words.index("--") + 1 :], monkeypatch)


def _module_of(words: Sequence[str]) -> str:
    before = words[: words.index("--")]
    if "-m" in before:
        return before[before.index("-m") + 1]
    component = next((word.split(":")[1] for word in before if ".py:" in word), "train")
    return "torchx_components.pipeline" if component == "pipeline" else f"llmgr_rec.{component}"
