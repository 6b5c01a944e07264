"""Pages of the reference: commands from their --help, settings from config.py, the public Python names."""

import contextlib
import importlib
import inspect
import io
import os
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from unittest import mock

import llmgr_rec
from llmgr_rec.config import Config, SettingInfo, settings

ROOT = Path(__file__).parents[2]
# Part of the reference for the subpackages that define the public names; names of other modules come first.
_PARTS = {
    "towers": "Inside another model",
    "modules": "Models",
    "data": "Data",
    "storage": "Bundles and tables",
    "distributed": "Ranks",
    "kernels": "Losses",
}
_FIRST_PART = "Start"
# What a changed setting asks for.
_AFTER_A_CHANGE = {
    "nothing": "nothing",
    "bundle": "export the stage again",
    "checkpoint": "train the stage again",
    "stages": "train the stage and those after it again",
}


def reference_pages() -> dict[str, str]:
    """Text of each page by its path in the site's sources."""
    return {
        "reference/commands.md": "\n".join(_commands()),
        "reference/settings.md": "\n".join(_settings()),
        "reference/python.md": "\n".join(_python()),
    }


def commands() -> list[str]:
    """What `python -m` runs: llmgr_rec itself, its modules with a function main, experiments, and the converters."""
    modules = [path for folder in ("llmgr_rec", "datagen") for path in sorted((ROOT / folder).glob("*.py"))]
    names = [
        f"{path.parent.name}.{path.stem}".removesuffix(".__main__")
        for path in modules
        if "\ndef main(" in path.read_text()
    ]
    return sorted([*names, "llmgr_rec.experiments"], key=lambda name: (not name.startswith("llmgr_rec"), name))


def _commands() -> Iterator[str]:
    yield "# Commands\n\nWhat `--help` of each command prints.\n"
    for name in commands():
        yield f"## {name}\n\n```text\n{_help(name)}```\n"


def _help(name: str) -> str:
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    said = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "100"}),
        contextlib.redirect_stdout(said),
        contextlib.suppress(SystemExit),
    ):
        module.main(["--help"])
    return said.getvalue().rstrip("\n") + "\n"


def _settings() -> Iterator[str]:
    yield (
        "# Settings\n\nAll settings of `train`, `plan` and `experiments`, on the command line as `--GROUP.NAME VALUE` "
        "and in YAML files. The defaults are the recipe `default`. The last column says what has to be made again in "
        "an existing run when the setting changes.\n"
    )
    values = {one.name: one for one in settings(Config())}
    for item in fields(Config):
        group = getattr(Config(), item.name)
        if is_dataclass(group):
            yield f"\n## {item.name}\n\n{item.metadata['group'][0]}\n"
            types = get_type_hints(type(group))
            names = {f"{item.name}.{name}": types[name] for name in (inner.name for inner in fields(group))}
        else:
            yield f"\n## {item.name}\n"
            names = {item.name: get_type_hints(Config)[item.name]}
        yield "| setting | default | values | meaning | after a change |\n|---|---|---|---|---|"
        for name, kind in names.items():
            one = values[name]
            cells = [f"`{name}`", f"`{_shown(one.default)}`", _values(kind, one.info), one.info.help]
            yield "| " + " | ".join(cells) + f" | {_AFTER_A_CHANGE[one.info.invalidates]} |"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _values(kind: Any, info: SettingInfo) -> str:
    """The values that a setting may have."""
    if get_origin(kind) is list:
        return f"list of {_values(get_args(kind)[0], info)}"
    if get_origin(kind) in (Union, types.UnionType):
        return ", ".join(_values(part, info) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if kind is bool:
        return "`true`, `false`"
    if kind is str:
        return "name or path" if info.is_path else "name"
    lowest = f"{info.at_least:g} or more" if info.at_least is not None else f"above {info.above:g}"
    highest = f", below {info.below:g}" if info.below is not None else ""
    multiple = f", a multiple of {info.multiple_of}" if info.multiple_of else ""
    return f"{lowest}{highest}{multiple}{f' ({info.unit})' if info.unit else ''}"


def _python() -> Iterator[str]:
    yield (
        "# Python\n\nThe public names, all of them importable from `llmgr_rec`. Everything else may change without "
        "notice ([versions](../project/contributing.md#versions-and-deprecation)).\n"
    )
    parts: dict[str, list[str]] = {title: [] for title in (_FIRST_PART, *_PARTS.values())}
    for name in llmgr_rec.__all__:
        if name in _names_of("config"):
            continue
        package = llmgr_rec._MODULES[name].partition(".")[0]
        parts[_PARTS.get(package, _FIRST_PART)].append(name)
    for title, names in parts.items():
        yield f"\n## {title}\n"
        # What most programs start from comes first.
        for name in sorted(names, key=lambda name: (name != "Recommender", name)):
            yield f"::: llmgr_rec.{name}\n    options:\n      heading_level: 3\n"
    yield "\n## Settings\n"
    for name in _names_of("config"):
        yield f"### {name}\n\n{inspect.getdoc(getattr(llmgr_rec, name))} Fields: [settings](settings.md)."


def _names_of(module: str) -> list[str]:
    return [name for name in llmgr_rec.__all__ if llmgr_rec._MODULES[name] == module]
