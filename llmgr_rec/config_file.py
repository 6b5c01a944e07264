"""Config files: recipes, reading and writing of YAML, and dotted overrides on the command line."""

import atexit
import os
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from llmgr_rec.cli import make_parser, parse_args
from llmgr_rec.config import Config, settings
from llmgr_rec.errors import UserError, did_you_mean
from llmgr_rec.former_settings import present_options, translated
from llmgr_rec.paths import is_remote, path_problem
from llmgr_rec.remote_path import as_path
from llmgr_rec.yaml_file import read_yaml

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

RECIPES = Path(__file__).parent / "recipes"
# The recipe whose settings are the defaults.
DEFAULT_RECIPE = "default"


def add_config_arguments(parser: "ArgumentParser") -> None:
    """Adds --config and a dotted option for every setting, such as `--llm.num_layers 6`.

    Args:
        parser: From `make_parser`; modified in place.
    """
    parser.add_argument(
        "--config",
        action="config",
        help=f"YAML file with settings, or a recipe: {', '.join(recipe_names())}.",
    )
    parser.add_class_arguments(Config, None)
    for item in settings(Config()):
        unit = f" Unit: {item.info.unit}." if item.info.unit else ""
        parser._option_string_actions[f"--{item.name}"].help = f"{item.info.help}{unit}"


def parse_with_config(parser: "ArgumentParser", argv: Sequence[str]) -> tuple["Namespace", Config]:
    """Parses arguments of a parser with `add_config_arguments`, and validates the settings.

    Args:
        parser: The parser.
        argv: Arguments; --config may be the name of a recipe.

    Returns:
        The other arguments and the settings.

    Raises:
        UserError: An argument or setting is unknown, of the wrong type or out of its range.
    """
    namespace = parse_args(parser, _resolve_recipes(argv))
    config = _build(Config, namespace)
    config.validate()
    return namespace, config


def load_config(path: str | os.PathLike[str]) -> Config:
    """Reads settings.

    Args:
        path: A YAML file, or the name of a recipe.

    Raises:
        UserError: The file is absent, or a setting is unknown, of the wrong type or out of its range.
    """
    parser = make_parser("llmgr_rec.config_file", "Reads settings.")
    add_config_arguments(parser)
    try:
        file = _config_file(str(path))
        content = read_yaml(Path(file))
        try:
            config = _build(Config, parser.parse_object(content or {}))
        except Exception:
            # For a path the parser changes the folder of the whole process for a moment, which other threads notice, so
            # only its messages come from there.
            return parse_with_config(parser, ["--config", file])[1]
        config.validate()
        return config
    except UserError as error:
        raise UserError(f"{error}" if str(path) in str(error) else f"{path}: {error}") from None


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Writes all settings, defaults included, to a YAML file.

    Args:
        config: The settings.
        path: File to write.
    """
    import yaml

    Path(path).write_text(yaml.safe_dump(asdict(config), sort_keys=False, width=120))


def recipe_names() -> list[str]:
    """Names of the recipes of this package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_of(files: Sequence[str | os.PathLike[str]]) -> str:
    """What the settings of a command are called.

    Args:
        files: Files of its --config, in order; none for the defaults.

    Returns:
        Names of recipes, and of other files with their suffix.
    """
    paths = [Path(file) for file in files]
    names = [path.stem if path.parent == RECIPES else path.name for path in paths]
    return " + ".join(names) or DEFAULT_RECIPE


def _resolve_recipes(argv: Sequence[str]) -> list[str]:
    """Replaces recipe names by their files, and moves --config to the front so that all other options override it."""
    recipes: list[str] = []
    others: list[str] = []
    words = iter(present_options(argv))
    for word in words:
        if word == "--config" and (name := next(words, None)) is not None:
            recipes.append(f"--config={_config_file(name)}")
        elif word.startswith("--config="):
            recipes.append(f"--config={_config_file(word.split('=', 1)[1])}")
        else:
            others.append(word)
    return [*recipes, *others]


def _config_file(name: str) -> str:
    if is_remote(name):
        name = _copy_of_settings(name)
    if problem := path_problem(name):
        raise UserError(f"--config {name}: {problem}")
    if Path(name).is_file():
        return _in_present_names(Path(name))
    shipped = RECIPES / f"{name}.yaml"
    if shipped.is_file():
        return str(shipped)
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        raise UserError(f"settings file {name} does not exist; give a YAML file or one of {', '.join(recipe_names())}")
    raise UserError(f"no recipe named {name}{did_you_mean(name, recipe_names())}")


def _copy_of_settings(url: str) -> str:
    """A copy on this machine of a remote settings file, which the parser opens by name."""
    try:
        return os.fspath(as_path(url))
    except OSError:
        raise UserError(f"settings file {url} does not exist; give a YAML file") from None


def _in_present_names(file: Path) -> str:
    """A settings file, or, of one that has settings of a former version, a copy with those of this version."""
    content = read_yaml(file)
    _check_sections(file, content)
    if (present := translated(content)) == content:
        return os.fspath(file)
    import yaml

    # The parser opens files by name.
    folder = TemporaryDirectory(prefix="llmgr-settings-")
    atexit.register(folder.cleanup)
    copy = Path(folder.name) / file.name
    copy.write_text(yaml.safe_dump(present, sort_keys=False))
    return os.fspath(copy)


def _check_sections(file: Path, content: Any) -> None:
    """Checks what the parser would take without a word, or fail on: keys given twice, emptied sections."""
    if not isinstance(content, dict) or not content:
        raise UserError(f"{file} has no settings; give a YAML file of settings, or one of {', '.join(recipe_names())}")
    for group in (item.name for item in fields(Config) if is_dataclass(item.type)):
        if group in content and not isinstance(content[group], dict):
            found = "is empty" if content[group] is None else f"is {content[group]!r:.60}"
            raise UserError(f"{file}: section {group} {found}; give settings under it, or remove it")


def _build(cls: type, values: Any) -> Any:
    return cls(
        **{
            item.name: _build(item.type, values[item.name])  # type: ignore[arg-type]
            if is_dataclass(item.type)
            else values[item.name]
            for item in fields(cls)
        }
    )
