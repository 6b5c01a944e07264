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
from llmgr_rec.config import Config, DType, StageName
from llmgr_rec.config_file import load_config
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.collate import Collator
from llmgr_rec.distributed.fsdp import shard_like
from llmgr_rec.distributed.process_group import World, choose_device
from llmgr_rec.distributed.ranking import RankingModel
from llmgr_rec.distributed.sharding import shard
from llmgr_rec.errors import UserError
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.model_spec import ModelSpec
from llmgr_rec.modules.param_groups import param_group
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.registry import require_allowed
from llmgr_rec.storage.bundle_export import dense_tensors, language_tensors, model_of
from llmgr_rec.storage.bundle_index import (
    BLEND,
    CONFIG,
    INDEX,
    LANGUAGE,
    LORA,
    PROMPTS,
    RECOMMENDER,
    TENSOR,
    BundleIndex,
    Piece,
    read_index,
    resolve_bundle,
)
from llmgr_rec.storage.model_factory import ModelFactory
from llmgr_rec.storage.table_io import fill_table, table_parameters

_LORA_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class BundleFiles:
    """An opened bundle: all of it that is needed before its model is built.

    Args:
        path: Its folder.
        index: What it holds.
        config: All settings of the run; prompts are those of the bundle.
        catalog: The items.
    """

    path: Path
    index: BundleIndex
    config: Config
    catalog: Catalog


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle.

    Args:
        path: Its folder.
        spec: Its model's spec, with all settings of the run; of those that were selected, the selected values.
        model: The model in eval mode, nothing of it trainable.
        catalog: The items.
        collate: Makes batches to rank for.
        blend: Nearest-neighbor scores that are added to the model's; None adds none.
    """

    path: Path
    spec: ModelSpec
    model: SessionRecommender | LLMGR
    catalog: Catalog
    collate: Collator
    blend: Blend | None = None

    @property
    def stage(self) -> StageName:
        """Stage that it is the result of."""
        return self.spec.stage

    @property
    def config(self) -> Config:
        """All settings of the run."""
        return self.spec.config

    def ranking(self, batch_size: int | None = None) -> RankingModel:
        """The model with everything that it needs to rank.

        Args:
            batch_size: Sessions per batch; None takes the run's setting.
        """
        size = batch_size or self.config.runtime.eval_batch_size
        return RankingModel(self.model, self.collate, size, self.blend)


def load_bundle(
    path: Path | str,
    world: World | None = None,
    dtype: DType | None = None,
    allow_code: Collection[str] = (),
    factory: ModelFactory | None = None,
) -> Bundle:
    """Builds the model of a bundle.

    Args:
        path: A bundle, or the folder of a run, of which the default bundle is taken; see `resolve_bundle`.
        world: Ranks to shard the tables across, also a single one: sharded pooling differs from plain torch's in the
            last bit, and results must not depend on the number of ranks. None makes a plain torch module, for which
            torch.distributed need not be initialized. All ranks call together.
        dtype: Number format of the base language model; None takes the run's.
        allow_code: Modules and packages that the bundle may import its encoder and head from, where these are import
            paths. Modules that the process has imported already are allowed.
        factory: Builds the model; None takes the default.

    Raises:
        UserError: No complete bundle is there, it is damaged, it would import what is not allowed, or its base language
            model is not the one it was trained with.
    """
    return load_model(open_bundle(path, allow_code), world, dtype, factory)


def open_bundle(path: Path | str, allow_code: Collection[str] = ()) -> BundleFiles:
    """Reads a bundle's index, settings and catalog, and no weights.

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
    catalog = Catalog.load(folder)
    if catalog.hash != index.catalog_hash:
        raise UserError(f"bundle {folder} is damaged: items.parquet is of another catalog; copy or export it again")
    return BundleFiles(folder, index, config, catalog)


def load_model(
    files: BundleFiles,
    world: World | None = None,
    dtype: DType | None = None,
    factory: ModelFactory | None = None,
) -> Bundle:
    """Builds the model of an opened bundle; see `load_bundle` for the arguments.

    Args:
        files: From `open_bundle`.
        world: Ranks.
        dtype: Number format of the base language model.
        factory: Builds the model.

    Raises:
        UserError: Weights are damaged, or the base language model is not the one it was trained with.
    """
    factory = factory or ModelFactory()
    folder, index, config, catalog = files.path, files.index, files.config, files.catalog
    if index.factory != factory.name:
        raise UserError(
            f"bundle {folder} was made by an experiment with controls {index.factory}; train a run without controls"
            if index.factory
            else f"bundle {folder} was made without controls, not with {factory.name}; train it again"
        )
    if dtype is not None:
        config = replace(config, llm=replace(config.llm, dtype=dtype))
    spec = factory.spec(index.stage, config, catalog)
    if index.language_model:
        _check_language_model(index, factory.decoder_hash(config), folder)
    device = world.device if world else choose_device("cpu")
    language = factory.language_parts(spec, catalog, device)
    model = factory.build(spec, language, "meta" if world else device).requires_grad_(False)
    if world:
        shard(model, config.tables, world, lambda name: False)
    else:
        model.to(device)
    if missing := _load_weights(model, folder, index):
        raise UserError(f"bundle {folder} is damaged: it lacks {missing[0]}; export it again")
    blend = Blend.load(folder / BLEND) if BLEND in index.files else None
    if blend is not None and blend.similarity_VR.shape[0] != catalog.num_items:
        raise UserError(f"bundle {folder} is damaged: {BLEND} is of another catalog; copy or export it again")
    return Bundle(folder, spec, model.eval(), catalog, factory.collator(spec, catalog, "rank"), blend)


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
        later = [name for name in missing if index.stage == "sbr" and param_group(name) == "text_encoder"]
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
    parts = {name: shard_like(value, targets.get(name, value)) for name, value in stored.items()}
    outcome = set_peft_model_state_dict(decoder, parts)
    if outcome.unexpected_keys:
        raise UserError(
            f"bundle {folder} has LoRA weights for {outcome.unexpected_keys[0]}, which the model lacks; "
            "use the settings of the run that made it"
        )
    return [name for name in outcome.missing_keys if "lora_" in name]


def _check_language_model(index: BundleIndex, weights_hash: str, folder: Path) -> None:
    if weights_hash != index.language_model["weights_hash"]:
        raise UserError(
            f"bundle {folder} was trained with other weights of the language model {index.language_model['name']} than "
            f"those found now; restore them ({INDEX} names the package versions)"
        )
