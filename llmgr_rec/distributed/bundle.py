"""Reads bundles: into a fresh model in plain torch, or into any model, sharded or not. Nothing is unpickled.

Shapes: R rows and C columns of a rectangle of a table.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from llmgr_rec.baselines.blend import Blend
from llmgr_rec.config import Config, DType
from llmgr_rec.data.catalogue import Catalogue
from llmgr_rec.distributed.assembly import assemble_decoder, assemble_llmgr, assemble_recommender, decoder_hash
from llmgr_rec.distributed.bundle_export import dense_tensors, language_tensors, model_of
from llmgr_rec.distributed.bundle_index import (
    CONFIG,
    INDEX,
    LANGUAGE,
    LORA,
    PRIOR,
    PROMPTS,
    RECOMMENDER,
    TENSOR,
    BundleIndex,
    Piece,
    read_index,
    resolve_bundle,
)
from llmgr_rec.distributed.decoder_shards import cut_like
from llmgr_rec.distributed.process_group import World, choose_device
from llmgr_rec.distributed.sharding import shard
from llmgr_rec.distributed.shards import fill_table, table_parameters
from llmgr_rec.errors import UserError
from llmgr_rec.modules.groups import group_of
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.recipes import load_config
from llmgr_rec.registry import require_allowed

_LORA_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class BundleFiles:
    """An opened bundle: all of it that is needed before its model is built.

    Args:
        path: Its folder.
        index: What it holds.
        config: All settings of the run; prompts are those of the bundle.
        catalogue: The items.
    """

    path: Path
    index: BundleIndex
    config: Config
    catalogue: Catalogue


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle.

    Args:
        path: Its folder.
        stage: Stage that it is the result of.
        model: The model in eval mode, nothing of it trainable.
        config: All settings of the run; of those to choose from, what was chosen.
        catalogue: The items.
        prior: What neighbours add to the model's scores; None for a model that ranks alone.
    """

    path: Path
    stage: str
    model: SessionRecommender | LLMGR
    config: Config
    catalogue: Catalogue
    prior: Blend | None = None


def load_bundle(
    path: Path | str, world: World | None = None, dtype: DType | None = None, allow_code: Collection[str] = ()
) -> Bundle:
    """Builds the model of a bundle.

    Args:
        path: A bundle, or a run (folder), of which the bundle that answers is taken; see `resolve_bundle`.
        world: Ranks to shard the tables over, a single one too: sharded pooling differs from plain torch's in the last
            bit, and results must not depend on the number of ranks. None makes a plain torch module, for which
            torch.distributed need not be initialised. All ranks call together.
        dtype: Number format of the base language model; None takes the run's.
        allow_code: Modules and packages that the bundle may import its encoder and head from, where these are import
            paths. What the process has imported already is allowed.

    Raises:
        UserError: No complete bundle is there, it is damaged, it would import what is not allowed, or its base language
            model is not the one it was trained with.
    """
    return load_model(open_bundle(path, allow_code), world, dtype)


def open_bundle(path: Path | str, allow_code: Collection[str] = ()) -> BundleFiles:
    """Reads a bundle's index, settings and catalogue, and no weights.

    Args:
        path: A bundle or a run, see `resolve_bundle`.
        allow_code: See `load_bundle`.

    Raises:
        UserError: No complete bundle is there, it is damaged, or it would import what is not allowed.
    """
    folder = resolve_bundle(Path(path))
    index = read_index(folder)
    config = load_config(folder / CONFIG)
    check_bundle_code(config, folder, allow_code)
    config = replace(config, prompt=replace(config.prompt, templates=str(folder / PROMPTS)))
    catalogue = Catalogue.load(folder)
    if catalogue.hash != index.catalogue_hash:
        raise UserError(f"bundle {folder} is damaged: items.parquet is another catalogue's; copy or export it again")
    return BundleFiles(folder, index, config, catalogue)


def load_model(files: BundleFiles, world: World | None = None, dtype: DType | None = None) -> Bundle:
    """Builds the model of an opened bundle.

    Args:
        files: From `open_bundle`.
        world: See `load_bundle`.
        dtype: See `load_bundle`.

    Raises:
        UserError: Weights are damaged, or the base language model is not the one it was trained with.
    """
    folder, index, config, catalogue = files.path, files.index, files.config, files.catalogue
    if dtype is not None:
        config = replace(config, llm=replace(config.llm, dtype=dtype))
    device = world.device if world else choose_device("cpu")
    tables_device: torch.device | str = "meta" if world else device
    model: SessionRecommender | LLMGR
    if index.language_model:
        _check_language_model(index, config, folder)
        model = assemble_llmgr(config, catalogue, assemble_decoder(config, device), (), tables_device)
    else:
        model = assemble_recommender(config, catalogue, tables_device, index.stage == "text", device)
    model.requires_grad_(False)
    if world:
        shard(model, config.tables, world, lambda name: False)
    else:
        model.to(device)
    left = _load_weights(model, folder, index)
    if left:
        raise UserError(f"bundle {folder} is damaged: nothing in it for {left[0]}; export it again")
    prior = Blend.load(folder / PRIOR) if PRIOR in index.files else None
    if prior is not None and prior.similarity_VR.shape[0] != catalogue.num_items:
        raise UserError(f"bundle {folder} is damaged: {PRIOR} is of another catalogue; copy or export it again")
    return Bundle(folder, index.stage, model.eval(), config, catalogue, prior)


def check_bundle_code(config: Config, folder: Path, allow_code: Collection[str]) -> None:
    """Refuses a bundle that would import code which is not allowed; see `require_allowed`.

    Args:
        config: The bundle's settings.
        folder: The bundle.
        allow_code: As in `load_bundle`.

    Raises:
        UserError: It would.
    """
    names = {"encoder.name": config.encoder.name, "head.name": config.head.name}
    require_allowed(names, allow_code, f"bundle {folder}")


def load_weights(module: nn.Module, path: Path | str) -> list[str]:
    """Fills a model with what a bundle holds for it; each rank reads its own parts of the tables only.

    Args:
        module: The model, sharded or not, or anything around it.
        path: A bundle.

    Returns:
        Names of parameters that the bundle has nothing for: those that an earlier stage does not have yet.

    Raises:
        UserError: The bundle is damaged or of another shape, or lacks a part of the session recommender, which every
            stage has but for the text encoder.
    """
    return _load_weights(model_of(module), Path(path), read_index(Path(path)))


def _load_weights(model: SessionRecommender | LLMGR, folder: Path, index: BundleIndex) -> list[str]:
    try:
        left = _load_tables(model, folder, index)
        recommender = model.recommender if isinstance(model, LLMGR) else model
        missing = _load_dense(dense_tensors(recommender), folder, RECOMMENDER)
        later = [name for name in missing if index.stage == "sbr" and group_of(name) == "text_encoder"]
        left += later
        if first := next((name for name in missing if name not in later), None):
            raise UserError(
                f"bundle {folder} is damaged or of another version of this program: it has nothing for {first} of "
                "the session recommender; copy or train it again"
            )
        if isinstance(model, LLMGR):
            left += _load_dense(language_tensors(model), folder, LANGUAGE)
            left += _load_lora(model, folder)
    except (SafetensorError, OSError) as error:
        raise UserError(f"bundle {folder} is damaged ({error}); copy or export it again") from None
    return left


def _load_tables(model: nn.Module, folder: Path, index: BundleIndex) -> list[str]:
    left = []
    for parameter, shape in table_parameters(model).items():
        table = parameter.split(".")[-2]
        if table not in index.tables:
            left.append(parameter)
            continue
        if index.tables[table] != shape:
            raise UserError(
                f"bundle {folder} has {index.tables[table]} rows and columns in table {table}, the model {shape}; "
                "use the settings and the data set of the run that made it"
            )
        fill_table(model, parameter, _TableReader(folder, index.pieces[table]).read)
    return left


class _TableReader:
    """Reads rectangles of a table from its pieces, each file opened once and only where it is needed."""

    def __init__(self, folder: Path, pieces: list[Piece]) -> None:
        self._folder = folder
        self._pieces = pieces

    def read(self, rows: range, cols: range) -> Tensor:
        values_RC = torch.full((len(rows), len(cols)), float("nan"))
        for piece in self._pieces:
            row0, row1 = max(rows.start, piece.row), min(rows.stop, piece.row + piece.rows)
            col0, col1 = max(cols.start, piece.col), min(cols.stop, piece.col + piece.cols)
            if row0 >= row1 or col0 >= col1:
                continue
            with safe_open(self._folder / piece.file, framework="pt") as file:
                values_RC[row0 - rows.start : row1 - rows.start, col0 - cols.start : col1 - cols.start] = (
                    file.get_slice(TENSOR)[row0 - piece.row : row1 - piece.row, col0 - piece.col : col1 - piece.col]
                )
        return values_RC


@torch.no_grad()
def _load_dense(targets: dict[str, Tensor], folder: Path, name: str) -> list[str]:
    if not (folder / name).is_file():
        return list(targets)
    stored = load_file(folder / name)
    for key, target in targets.items():
        if key in stored and stored[key].shape != target.shape:
            raise UserError(
                f"bundle {folder} has {key} of shape {list(stored[key].shape)}, the model {list(target.shape)}; "
                "use the settings and the data set of the run that made it"
            )
        if key in stored:
            target.copy_(stored[key])
    return [key for key in targets if key not in stored]


def _load_lora(model: LLMGR, folder: Path) -> list[str]:
    names = [name for name, _ in model.language_model.named_parameters() if "lora_" in name]
    if not (folder / LORA / _LORA_FILE).is_file():
        return names
    decoder, stored = model.language_model.decoder, load_file(folder / LORA / _LORA_FILE)
    targets = get_peft_model_state_dict(decoder, save_embedding_layers=False)
    parts = {name: cut_like(value, targets.get(name, value)) for name, value in stored.items()}
    outcome = set_peft_model_state_dict(decoder, parts)
    if outcome.unexpected_keys:
        raise UserError(
            f"bundle {folder} has LoRA weights for {outcome.unexpected_keys[0]}, which the model lacks; "
            "use the settings of the run that made it"
        )
    return [name for name in outcome.missing_keys if "lora_" in name]


def _check_language_model(index: BundleIndex, config: Config, folder: Path) -> None:
    name = index.language_model["name"]
    if decoder_hash(config) != index.language_model["weights_hash"]:
        if config.controls.random_llm:
            raise UserError(
                f"bundle {folder} was trained with weights drawn for {name} that cannot be drawn again here; "
                f"use the versions of torch and transformers that {INDEX} in it names, and the former {name}"
            )
        raise UserError(
            f"bundle {folder} was trained with other weights of the language model {name} than the ones found now; "
            "put the former ones back"
        )
