"""Every command and its options, found by introspection, so that an option of tomorrow is tested too."""

import importlib
import re
import typing
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from jsonargparse import ArgumentParser

from llmgr_rec.paths import LocalPath, StoragePath

ROOT = Path(__file__).parents[1]
# Lists the others; the parser of doctor is argparse's and has no options with values; the other two are workers.
_OTHERS = {"llmgr_rec.__main__", "llmgr_rec.doctor", "benchmarks.session_trainer", "benchmarks.phase_peaks"}
_COMMAND = re.compile(r"^    run_cli\(main\)$", re.MULTILINE)


class _Parser(BaseException):
    """Carries the parser of a command out of it, where it would parse."""


def command_names() -> list[str]:
    """Modules that are run as commands."""
    packages = ("llmgr_rec", "datagen", "torchx_components", "benchmarks")
    files = sorted(file for package in packages for file in (ROOT / package).rglob("*.py"))
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files if _is_command(file)]
    return [name for name in modules if name not in _OTHERS]


def _is_command(file: Path) -> bool:
    return bool(_COMMAND.search(file.read_text()))


def main_of(name: str) -> Callable[[Sequence[str]], None]:
    main: Callable[[Sequence[str]], None] = importlib.import_module(name).main
    return main


@cache
def options_of(name: str) -> dict[str, Any]:
    """The options of a command by their longest name, such as --run_folder."""

    def stop(parser: ArgumentParser, *_: Any, **__: Any) -> None:
        raise _Parser(parser)

    with patch.object(ArgumentParser, "parse_args", stop):
        try:
            main_of(name)(["--seed", "0"])
        except _Parser as found:
            (parser,) = found.args
    left_out = {"help", "print_config"}
    return {action.option_strings[-1]: action for action in parser._actions if action.dest not in left_out}


def type_of(option: Any) -> Any:
    return getattr(option, "_typehint", None) or option.type


def takes_path(option: Any) -> bool:
    return takes_url(option) or _is_of(option, LocalPath)


def takes_url(option: Any) -> bool:
    return _is_of(option, StoragePath)


def _is_of(option: Any, wanted: type) -> bool:
    kind = type_of(option)
    return wanted in (kind, *typing.get_args(kind))
