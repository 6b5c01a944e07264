"""What differs between a tower and a bundle whose weights are to be loaded into it."""

from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from llmgr_rec.config import Config, StageName, settings
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.errors import UserError
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.storage.adapter_files import ADAPTER_WEIGHTS
from llmgr_rec.storage.bundle import BundleFiles
from llmgr_rec.storage.bundle_export import dense_tensors, language_tensors
from llmgr_rec.storage.bundle_index import LANGUAGE, LORA, RECOMMENDER, BundleIndex, verified_file
from llmgr_rec.storage.table_io import table_parameters

# Settings of prompts that change what a trained LLMGR computes without changing a shape.
_OF_PROMPTS = ("llm.name_or_path", "prompt.node_order", "prompt.max_nodes", "prompt.text_items", "prompt.text_fields")


class Differences(NamedTuple):
    """What differs between a tower and a bundle; all empty if nothing does.

    Args:
        settings: Settings with other values, as text.
        vocabularies: Vocabularies of the catalog with other entries, as text.
        missing: Names of tensors of the tower that the bundle lacks; they keep their values.
        unexpected: Names of tensors of the bundle that the tower lacks.
    """

    settings: list[str]
    vocabularies: list[str]
    missing: list[str]
    unexpected: list[str]

    def __str__(self) -> str:
        named = (
            ("settings", self.settings),
            ("vocabularies", self.vocabularies),
            ("not in the bundle", self.missing),
            ("not in the tower", self.unexpected),
        )
        return "; ".join(f"{name}: {_some(entries)}" for name, entries in named if entries)


def compare(
    model: SessionRecommender | LLMGR, made_from: BundleFiles, files: BundleFiles, table_names: Mapping[str, str]
) -> Differences:
    """Compares a model with a bundle.

    Args:
        model: The model, sharded or not.
        made_from: The bundle whose settings and catalog the model was built from.
        files: The bundle to be loaded.
        table_names: Name in a bundle of each table of the model that has another name there.

    Raises:
        UserError: The bundle is damaged.
    """
    held = _names_of_model(model, table_names)
    stored = _names_in_bundle(files.path, files.index)
    return Differences(
        settings=list(_settings(made_from, files, isinstance(model, LLMGR))),
        vocabularies=list(_vocabularies(made_from, files)),
        missing=sorted(held - stored),
        unexpected=sorted(stored - held),
    )


def _some(entries: list[str]) -> str:
    shown = ", ".join(entries[:3])
    return f"{shown} and {len(entries) - 3} more" if len(entries) > 3 else shown


def _names_of_model(model: SessionRecommender | LLMGR, table_names: Mapping[str, str]) -> set[str]:
    tables = {name.split(".")[-2] for name in table_parameters(model)}
    names = {f"table {table_names.get(table, table)}" for table in tables}
    names |= set(dense_tensors(model.recommender if isinstance(model, LLMGR) else model))
    if isinstance(model, LLMGR):
        names |= set(language_tensors(model)) | {_lora_name(name) for name in _lora(model.language_model)}
    return names


def _names_in_bundle(folder: Path, index: BundleIndex) -> set[str]:
    names = {f"table {table}" for table in index.tables}
    for file in (RECOMMENDER, LANGUAGE):
        names |= _tensor_names(folder, index, file)
    # An adapter has each weight under two names, with and without that of the decoder in the class with a head.
    stored = {_lora_name(name) for name in _tensor_names(folder, index, f"{LORA}/{ADAPTER_WEIGHTS}")}
    return names | stored


def _tensor_names(folder: Path, index: BundleIndex, file: str) -> set[str]:
    if file not in index.files:
        return set()
    try:
        with safe_open(verified_file(folder, index, file), framework="pt") as opened:
            return set(opened.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"bundle {folder} is damaged ({error}); copy or export it again") from None


def _lora(module: nn.Module) -> Iterator[str]:
    return (name for name, _ in module.named_parameters() if "lora_" in name)


def _lora_name(name: str) -> str:
    """Name of a LoRA weight from its layer on: `lora layers.0.self_attn.q_proj.lora_A`."""
    parts = [part for part in name.split(".") if part not in ("default", "weight")]
    start = parts.index("layers") if "layers" in parts else 0
    return f"lora {'.'.join(parts[start:])}"


def _settings(made_from: BundleFiles, files: BundleFiles, with_language: bool) -> Iterator[str]:
    stages: set[StageName] = {"sbr", files.index.stage}
    mine, theirs = _values(made_from.config, stages, with_language), _values(files.config, stages, with_language)
    for rule in ("max_length", "consecutive_repeats"):
        mine[rule], theirs[rule] = getattr(made_from.index, rule), getattr(files.index, rule)
    for name, value in mine.items():
        if theirs[name] != value:
            yield f"{name} is {value} in the tower and {theirs[name]} in the bundle"


def _values(config: Config, stages: Set[StageName], with_language: bool) -> dict[str, object]:
    return {
        setting.name: setting.value
        for setting in settings(config)
        if (setting.info.invalidates == "stages" and stages & set(setting.info.stages))
        or (with_language and setting.name in _OF_PROMPTS)
    }


def _vocabularies(made_from: BundleFiles, files: BundleFiles) -> Iterator[str]:
    mine, theirs = made_from.catalog, files.catalog
    if mine.hash != theirs.hash:
        yield f"item ids ({mine.num_items} items in the tower, {theirs.num_items} in the bundle)"
        return
    used = set(made_from.config.tables.side_features) | set(files.config.tables.side_features)
    for name in sorted(used & (set(mine.features) | set(theirs.features))):
        if not _same_rows(mine, theirs, name):
            yield name


def _same_rows(mine: Catalog, theirs: Catalog, name: str) -> bool:
    if name not in mine.features or name not in theirs.features:
        return False
    one, other = mine.features[name], theirs.features[name]
    return torch.equal(one.offsets, other.offsets) and torch.equal(one.values, other.values)
