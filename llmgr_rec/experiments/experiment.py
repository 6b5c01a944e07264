"""Experiments: YAML files with named variants of a model, validated before anything is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmgr_rec.baselines.builders import BASELINES, baseline_builder, check_blended
from llmgr_rec.cli import make_parser
from llmgr_rec.config import STAGES, Config, trained_stages
from llmgr_rec.config_file import add_config_arguments, parse_with_config
from llmgr_rec.errors import UserError, did_you_mean
from llmgr_rec.experiments.controls import CONTROLS
from llmgr_rec.modules.model_spec import ModelSpec
from llmgr_rec.registry import is_import_path
from llmgr_rec.storage.bundle_index import STAGES_OF_MODEL
from llmgr_rec.yaml_file import read_yaml

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

FOLDER = Path(__file__).parent / "configs"
MODELS = tuple(STAGES_OF_MODEL)
_EXPERIMENT_KEYS = ("title", "reference", "config", "settings", "variants")
_VARIANT_KEYS = ("model", "settings", "controls", "grid", "against")


@dataclass(frozen=True)
class Variant:
    """A variant: one row of the table.

    Args:
        name: Name in the table.
        model: Model to evaluate: a trained model or a baseline.
        settings: Dotted settings, which override those of the experiment.
        controls: Some of `CONTROLS`.
        grid: Values to select from on validation, by dotted setting; all combinations are evaluated.
        against: Name of the variant that its gain is relative to; empty takes the reference of the experiment.
    """

    name: str
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    controls: tuple[str, ...] = ()
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    against: str = ""

    @property
    def trains(self) -> bool:
        """Whether the model is trained; a baseline is not."""
        return self.model in MODELS

    def points(self) -> "list[Variant]":
        """Variants without a grid, one for each combination of its values."""
        return [
            replace(self, settings={**self.settings, **dict(zip(self.grid, values, strict=True))}, grid={})
            for values in product(*self.grid.values())
        ]


@dataclass(frozen=True)
class Experiment:
    """Variants to compare.

    Args:
        title: Heading of the table.
        reference: Name of the variant that gains are relative to, unless a variant sets `against`.
        config: Recipe or settings file of all variants.
        settings: Dotted settings of all variants, which override `config`.
        variants: Rows of the table, in order.
    """

    title: str
    reference: str
    config: str
    settings: Mapping[str, Any]
    variants: tuple[Variant, ...]

    def against(self, name: str) -> str:
        """Name of the variant that a variant's gain is relative to; the reference's is itself.

        Args:
            name: Name of a variant.
        """
        against = next(variant.against for variant in self.variants if variant.name == name)
        return against or self.reference

    def config_of(self, variant: Variant, seed: int) -> Config:
        """All settings of a variant; stages that its model does not need have 0 epochs.

        Args:
            variant: The variant, without a grid.
            seed: Seed of the training.

        Raises:
            UserError: A setting is unknown, of the wrong type or out of its range, or the model has no epochs.
        """
        chosen = {**self.settings, **variant.settings, "seed": seed}
        words = [word for name, value in chosen.items() for word in (f"--{name}", _word(value))]
        try:
            config = parse_with_config(_settings_parser(), ["--config", self.config, *words])[1]
            for stage in trained_stages(config):
                ModelSpec(stage, config, num_items=1, num_embeddings={}).check()
            # Trials train without a blend, so that their runs' preflight does not see it.
            check_blended(config.blend.neighbors)
        except UserError as error:
            raise UserError(f"variant {variant.name}: {error}") from None
        if not variant.trains:
            return config
        needed = STAGES_OF_MODEL[variant.model]
        for stage in (stage for stage in STAGES if stage != "sbr" and stage not in needed):
            config.stage(stage).epochs = 0
        if variant.model != "sbr" and not any(config.stage(stage).epochs for stage in needed):
            names = " or ".join(f"{stage}.epochs" for stage in sorted(needed))
            raise UserError(
                f"variant {variant.name}: model {variant.model} has no stage to train; set {names} to 1 or more"
            )
        return config


@cache
def _settings_parser() -> "ArgumentParser":
    """Cached: building the parser takes longer than parsing the settings of a variant."""
    parser = make_parser("llmgr_rec.experiments", "Settings of a variant.")
    add_config_arguments(parser)
    return parser


def experiment_names() -> list[str]:
    """Names of the experiments of this package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_experiment(name: str) -> Experiment:
    """Reads and validates an experiment.

    Args:
        name: Name of a shipped experiment, or a YAML file.

    Raises:
        UserError: There is no such experiment, or a key or value in it is unknown, missing or out of range.
    """
    file = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not file.is_file():
        raise UserError(f"no experiment or YAML file named {name}{did_you_mean(name, experiment_names())}")
    content = read_yaml(file)
    if not isinstance(content, dict) or not isinstance(content.get("variants"), dict) or not content["variants"]:
        raise UserError(f"{file} has no variants; add some under the key variants")
    _check_keys(content, _EXPERIMENT_KEYS, str(file))
    variants = tuple(
        _variant(str(title), _mapping(content["variants"], title, f"{file}: variant"), file)
        for title in content["variants"]
    )
    reference = content.get("reference", variants[0].name)
    names = [variant.name for variant in variants]
    if reference not in names:
        raise UserError(
            f"{file}: reference {reference} is not one of its variants{did_you_mean(str(reference), names)}"
        )
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
    """Checks that the gain of a variant is relative to another variant of the experiment."""
    if variant.against and variant.against not in names:
        hint = did_you_mean(variant.against, names)
        raise UserError(f"{file}: variant {variant.name}: against {variant.against} is not one of its variants{hint}")
    if variant.against == variant.name:
        raise UserError(f"{file}: variant {variant.name}: against is the variant itself; name another variant")


def _check_keys(values: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in values:
        if key not in known:
            raise UserError(f"{where}: unknown key {key}{did_you_mean(str(key), known)}")


def _mapping(values: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """The mapping under a key; empty if the key is absent."""
    mapping = values.get(key) or {}
    if not isinstance(mapping, dict):
        raise UserError(f"{where} {key} is {mapping!r}, not a mapping, such as {{sbr.epochs: 3}}")
    return mapping


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
