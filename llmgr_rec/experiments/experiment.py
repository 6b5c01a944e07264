"""Experiments as YAML files: named variants of a model, read and checked before anything is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llmgr_rec.baselines.builders import BASELINES, baseline_builder
from llmgr_rec.cli import make_parser
from llmgr_rec.config import STAGES, Config, trained_stages
from llmgr_rec.config_file import add_config_arguments, parse_with_config
from llmgr_rec.errors import UserError, did_you_mean
from llmgr_rec.experiments.controls import CONTROLS
from llmgr_rec.modules.model_spec import ModelSpec
from llmgr_rec.registry import is_import_path
from llmgr_rec.storage.bundle_index import STAGES_OF_MODEL

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

FOLDER = Path(__file__).parent / "configs"
MODELS = tuple(STAGES_OF_MODEL)
_EXPERIMENT_KEYS = ("title", "reference", "config", "settings", "variants")
_VARIANT_KEYS = ("model", "settings", "controls", "grid", "against")


@dataclass(frozen=True)
class Variant:
    """One line of the table.

    Args:
        name: As it is shown.
        model: Model that is evaluated: that of a stage, or a baseline without training.
        settings: Dotted settings over those of the experiment.
        controls: Parts of the model that are disabled or broken, some of `CONTROLS`.
        grid: Values to select from on validation, by dotted setting; all combinations are tried.
        against: Name of the variant that its gain is computed against; empty takes the experiment's reference.
    """

    name: str
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    controls: tuple[str, ...] = ()
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    against: str = ""

    @property
    def trains(self) -> bool:
        """Whether it has anything to train."""
        return self.model in MODELS

    def points(self) -> "list[Variant]":
        """The variants to select from, each without a grid: one for each combination of the grid's values."""
        return [
            replace(self, settings={**self.settings, **dict(zip(self.grid, values, strict=True))}, grid={})
            for values in product(*self.grid.values())
        ]


@dataclass(frozen=True)
class Experiment:
    """What is compared.

    Args:
        title: Heading of the table.
        reference: Name of the variant that the others are compared with where they name none of their own.
        config: Training recipe or settings file that all variants start from.
        settings: Dotted settings of all variants.
        variants: The lines of the table, in order.
    """

    title: str
    reference: str
    config: str
    settings: Mapping[str, Any]
    variants: tuple[Variant, ...]

    def against(self, name: str) -> str:
        """Name of the variant that a variant's gain is computed against: the reference's own is against itself."""
        own = next(variant.against for variant in self.variants if variant.name == name)
        return own or self.reference

    def config_of(self, variant: Variant, seed: int) -> Config:
        """All settings of a variant; stages after the one whose model is evaluated are left out.

        Raises:
            UserError: A setting is unknown, of the wrong type or out of its range, or leaves the model untrained.
        """
        chosen = {**self.settings, **variant.settings, "seed": seed}
        words = [word for name, value in chosen.items() for word in (f"--{name}", _word(value))]
        try:
            config = parse_with_config(_settings_parser(), ["--config", self.config, *words])[1]
            for stage in trained_stages(config):
                ModelSpec(stage, config, num_items=1, num_embeddings={}).check()
        except UserError as error:
            raise UserError(f"variant {variant.name}: {error}") from None
        if not variant.trains:
            return config
        own = STAGES_OF_MODEL[variant.model]
        for stage in (stage for stage in STAGES if stage != "sbr" and stage not in own):
            config.stage(stage).epochs = 0
        if variant.model != "sbr" and not any(config.stage(stage).epochs for stage in own):
            names = " and ".join(f"{stage}.epochs" for stage in sorted(own))
            raise UserError(
                f"variant {variant.name}: model {variant.model} needs epochs, but {names} is 0; give it some"
            )
        return config


@cache
def _settings_parser() -> "ArgumentParser":
    """Made once: it takes longer than parsing, and an experiment parses the settings of every point and seed."""
    parser = make_parser("llmgr_rec.experiments", "Settings of a variant.")
    add_config_arguments(parser)
    return parser


class _EachKeyOnce(yaml.SafeLoader):
    """Reads YAML, and refuses a duplicate key, of which YAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Makes a dictionary."""
        own = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := [key for key in own if own.count(key) > 1]:
            raise yaml.YAMLError(f"{twice[0]} is given twice{node.start_mark}; rename or remove one")
        return super().construct_mapping(node, deep)


def experiment_names() -> list[str]:
    """Names of the experiments shipped with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_experiment(name: str) -> Experiment:
    """Reads an experiment.

    Args:
        name: Shipped experiment or path to a YAML file.

    Raises:
        UserError: There is none of that name, or something in it is not known or missing; names the nearest known key.
    """
    file = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not file.is_file():
        raise UserError(f"no experiment or YAML file named {name}{did_you_mean(name, experiment_names())}")
    try:
        content = _EachKeyOnce(file.read_text()).get_single_data()
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not isinstance(content.get("variants"), dict) or not content["variants"]:
        raise UserError(f"{file} names no variants; give each one a line under variants:")
    _check_keys(content, _EXPERIMENT_KEYS, str(file))
    variants = tuple(
        _variant(str(title), _mapping(content["variants"], title, f"{file}: variant"), file)
        for title in content["variants"]
    )
    reference = content.get("reference", variants[0].name)
    names = [variant.name for variant in variants]
    if reference not in names:
        raise UserError(f"{file}: reference {reference} is none of its variants")
    for variant in variants:
        _check_against(variant, names, file)
    experiment = Experiment(
        title=str(content.get("title", file.stem)),
        reference=reference,
        config=str(content.get("config", "quickstart")),
        settings=_mapping(content, "settings", f"{file}:"),
        variants=variants,
    )
    for variant in variants:
        for point in variant.points():
            experiment.config_of(point, seed=0)
    return experiment


def _variant(name: str, values: Mapping[str, Any], file: Path) -> Variant:
    where = f"{file}: variant {name}"
    _check_keys(values, _VARIANT_KEYS, where)
    variant = Variant(
        name,
        str(values.get("model", "llmgr")),
        _mapping(values, "settings", where),
        _controls(values.get("controls") or [], where),
        _mapping(values, "grid", where),
        str(values.get("against", "")),
    )
    known = (*MODELS, *BASELINES)
    if is_import_path(variant.model):
        baseline_builder(variant.model, where)
    elif variant.model not in known:
        raise UserError(f"{where}: {variant.model} is not known{did_you_mean(variant.model, known)}")
    for setting, choices in variant.grid.items():
        if not isinstance(choices, list) or not choices:
            raise UserError(f"{where}: grid needs a list of values for {setting}, such as [64, 128]")
    if variant.settings and not variant.trains:
        raise UserError(f"{where}: settings are for models that are trained; leave them out")
    if variant.controls and not variant.trains:
        raise UserError(f"{where}: controls are for models that are trained; leave them out")
    if variant.grid and not variant.trains:
        raise UserError(f"{where}: grid is for models that are trained; leave it out")
    return variant


def _controls(names: Any, where: str) -> tuple[str, ...]:
    if not isinstance(names, list):
        raise UserError(f"{where}: controls is {names!r}, not a list such as [random_llm]")
    for name in names:
        if name not in CONTROLS:
            raise UserError(f"{where}: control {name} is not known{did_you_mean(str(name), CONTROLS)}")
    return tuple(names)


def _check_against(variant: Variant, names: Sequence[str], file: Path) -> None:
    """A variant is compared with another one of the experiment."""
    if variant.against and variant.against not in names:
        hint = did_you_mean(variant.against, names)
        raise UserError(f"{file}: variant {variant.name}: against {variant.against} is none of its variants{hint}")
    if variant.against == variant.name:
        raise UserError(f"{file}: variant {variant.name}: it has no gain against itself; name another variant")


def _check_keys(values: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in values:
        if key not in known:
            raise UserError(f"{where}: unknown key {key}{did_you_mean(str(key), known)}")


def _mapping(values: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """The mapping under a key, empty where there is none."""
    found = values.get(key) or {}
    if not isinstance(found, dict):
        raise UserError(f"{where} {key} is {found!r}, not names with values, such as {{sbr.epochs: 3}}")
    return found


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
