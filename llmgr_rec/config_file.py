"""Config files: recipes by name, YAML in and out, dotted overrides from the command line."""

import os
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmgr_rec.cli import make_parser, parse_args
from llmgr_rec.config import Config, settings
from llmgr_rec.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

RECIPES = Path(__file__).parent / "recipes"


def add_config_arguments(parser: "ArgumentParser") -> None:
    """Adds --config and one dotted option for every setting (`--llm.num_layers 6`)."""
    parser.add_argument(
        "--config",
        action="config",
        help=f"YAML file with settings, or a recipe: {', '.join(recipe_names())}.",
    )
    parser.add_class_arguments(Config, None)
    for one in settings(Config()):
        unit = f" Unit: {one.info.unit}." if one.info.unit else ""
        parser._option_string_actions[f"--{one.name}"].help = f"{one.info.help}{unit}"


def parse_with_config(parser: "ArgumentParser", argv: Sequence[str]) -> tuple["Namespace", Config]:
    """Parses arguments of a parser that has `add_config_arguments`; recipe names are resolved to their files.

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
        path: A YAML file, or the name of a shipped recipe.

    Raises:
        UserError: The file is absent, or a key or value in it is not known; the nearest known key is named.
    """
    parser = make_parser("llmgr_rec.config_file", "Reads settings.")
    add_config_arguments(parser)
    return parse_with_config(parser, ["--config", str(path)])[1]


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Writes every setting, defaults included, as YAML."""
    import yaml

    Path(path).write_text(yaml.safe_dump(asdict(config), sort_keys=False, width=120))


def recipe_names() -> list[str]:
    """Names of the recipes shipped with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _resolve_recipes(argv: Sequence[str]) -> list[str]:
    """The same words with recipes' files for their names, and in front: what else is on the line goes over them."""
    recipes: list[str] = []
    others: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--config" and (name := next(words, None)) is not None:
            recipes.append(f"--config={_config_file(name)}")
        elif word.startswith("--config="):
            recipes.append(f"--config={_config_file(word.split('=', 1)[1])}")
        else:
            others.append(word)
    return [*recipes, *others]


def _config_file(name: str) -> str:
    if Path(name).is_file():
        return name
    shipped = RECIPES / f"{name}.yaml"
    if shipped.is_file():
        return str(shipped)
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        raise UserError(f"settings file {name} does not exist; give a YAML file or one of {', '.join(recipe_names())}")
    raise UserError(f"no recipe named {name}{did_you_mean(name, recipe_names())}")


def _build(cls: type, values: Any) -> Any:
    return cls(
        **{
            item.name: _build(item.type, values[item.name])  # type: ignore[arg-type]
            if is_dataclass(item.type)
            else values[item.name]
            for item in fields(cls)
        }
    )
