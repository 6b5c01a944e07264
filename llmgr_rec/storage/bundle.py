"""Loads bundles: as a new model, plain or sharded, or into the weights of an existing model. No pickle is read.

Shapes: R rows and C columns of a block of a table.
"""

import os
from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from llmgr_rec.baselines.blend import Blend
from llmgr_rec.baselines.blend_parts import load_parts, parts_of, parts_with
from llmgr_rec.baselines.reranker import Reranker
from llmgr_rec.config import Config, DType, StageName, TableDType
from llmgr_rec.config_file import load_config
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.collate import Collator
from llmgr_rec.data.schema import ITEMS_NAME
from llmgr_rec.distributed.item_vectors import items_of_rank
from llmgr_rec.distributed.process_group import World, choose_device
from llmgr_rec.distributed.ranking import RankingModel
from llmgr_rec.distributed.sharding import GIB, shard
from llmgr_rec.errors import UserError
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.model_spec import ModelSpec
from llmgr_rec.modules.param_groups import param_group
from llmgr_rec.modules.quantized_tables import decode_rows, encode_rows, has_codes, quantize_tables, row_bytes
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.modules.text_table import ITEM_TEXT
from llmgr_rec.registry import require_allowed
from llmgr_rec.remote_path import as_path
from llmgr_rec.storage.adapter_files import ADAPTER_WEIGHTS, load_adapter
from llmgr_rec.storage.bundle_export import dense_tensors, language_tensors, model_of
from llmgr_rec.storage.bundle_index import (
    BLEND,
    BLEND_TERM,
    CONFIG,
    INDEX,
    LANGUAGE,
    LORA,
    PROMPTS,
    RECOMMENDER,
    TENSOR,
    BundleIndex,
    TableFile,
    read_index,
    resolve_bundle,
    verified_file,
    verified_table_file,
)
from llmgr_rec.storage.catalog_mapping import CatalogMapping
from llmgr_rec.storage.model_factory import ModelFactory
from llmgr_rec.storage.table_io import fill_table, local_shards, table_parameters


@dataclass(frozen=True)
class BundleFiles:
    """An opened bundle: its index, settings and catalog, without the weights.

    Args:
        path: Folder of the bundle.
        index: Content of bundle.json.
        config: All settings of the run; `prompt.templates` is the path of the templates in the bundle.
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
        path: Folder of the bundle.
        spec: Spec of the model. Its config has all settings of the run, with the values that were selected on
            validation.
        model: The model in eval mode, without trainable parameters.
        catalog: The items.
        collate: Collator for ranking.
        blend: Nearest-neighbor scores that are added to the model's scores; None for no blend.
        is_replicated: Whether each rank has the whole model; otherwise the ranks share its tables.
    """

    path: Path
    spec: ModelSpec
    model: SessionRecommender | LLMGR
    catalog: Catalog
    collate: Collator
    blend: Blend | None = None
    is_replicated: bool = True

    @property
    def stage(self) -> StageName:
        """Stage that trained the model."""
        return self.spec.stage

    @property
    def config(self) -> Config:
        """All settings of the run."""
        return self.spec.config

    @property
    def evaluation_batch_size(self) -> int:
        """Sessions of a batch of one rank when a split is ranked: twice the setting without a language model.

        The item vectors are read once a batch, and memory does not matter as in a long scoring job.
        """
        return self.config.runtime.eval_batch_size * (1 if self.spec.has_language_model else 2)

    def ranking(self, batch_size: int | None = None, keeps_tables: bool = True) -> RankingModel:
        """The model with its collator and blend, for ranking.

        Args:
            batch_size: Sessions per batch of one rank; None uses the setting of the run.
            keeps_tables: Whether the model is used for anything else; otherwise its tables may be freed.
        """
        size = batch_size or self.config.runtime.eval_batch_size
        return RankingModel(
            self.model,
            self.collate,
            size,
            self.blend,
            is_replicated=self.is_replicated,
            domains=self.catalog.domains,
            keeps_tables=keeps_tables,
            reranker=Reranker.of(self.blend, self.catalog.train_count_V),
        )


def load_bundle(
    path: Path | str,
    world: World | None = None,
    dtype: DType | None = None,
    allow_code: Collection[str] = (),
    factory: ModelFactory | None = None,
    table_dtype: TableDType | None = None,
) -> Bundle:
    """Builds the model of a bundle and loads its weights.

    Args:
        path: A bundle, or a run, whose default bundle is loaded; see `resolve_bundle`.
        world: Ranks that rank together; all must call this. Each gets the whole model where its tables fit, see
            `fits_each_rank`, and otherwise a share of the tables: sharded pooling and plain torch differ in the last
            bit, and results must not depend on the number of ranks. None builds a plain torch module on the CPU.
        dtype: Number format of the base language model; None uses the setting of the run.
        allow_code: Modules and packages from which the bundle may import its encoder and head, if these are import
            paths. Modules that the process has already imported are always allowed.
        factory: Factory of the model; None uses the default factory.
        table_dtype: Number format of the embedding tables in memory; None takes that of the bundle.

    Raises:
        UserError: There is no complete bundle, it is damaged, it would import code that is not allowed, or the base
            language model is not the one of the training.
    """
    return load_model(open_bundle(path, allow_code), world, dtype, factory, table_dtype)


def open_bundle(path: Path | str, allow_code: Collection[str] = ()) -> BundleFiles:
    """Reads a bundle's index, settings and catalog, and no weights.

    Args:
        path: A bundle or a run, see `resolve_bundle`.
        allow_code: See `load_bundle`.

    Raises:
        UserError: There is no complete bundle, it is damaged, or it would import code that is not allowed.
    """
    folder = resolve_bundle(as_path(path))
    index = read_index(folder)
    config = load_config(verified_file(folder, index, CONFIG))
    check_bundle_code(config, folder, allow_code)
    config = replace(config, prompt=replace(config.prompt, templates=os.fspath(verified_file(folder, index, PROMPTS))))
    catalog = Catalog.load(verified_file(folder, index, ITEMS_NAME).parent)
    if catalog.hash != index.catalog_hash:
        raise UserError(
            f"bundle {folder} is damaged: items.parquet belongs to another catalog; copy or export it again"
        )
    return BundleFiles(folder, index, config, catalog)


def load_model(
    files: BundleFiles,
    world: World | None = None,
    dtype: DType | None = None,
    factory: ModelFactory | None = None,
    table_dtype: TableDType | None = None,
) -> Bundle:
    """Builds the model of an opened bundle and loads its weights; the arguments are those of `load_bundle`.

    Args:
        files: From `open_bundle`.
        world: Ranks that rank together.
        dtype: Number format of the base language model.
        factory: Factory of the model.
        table_dtype: Number format of the embedding tables in memory.

    Raises:
        UserError: Weights are damaged, the base language model is not the one of the training, or ranks that share the
            tables cannot hold them in the number format.
    """
    factory, table_dtype = factory or ModelFactory(), table_dtype or files.index.table_dtype
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
        check_language_model(index, factory.decoder_hash(config), folder)
    device = world.device if world else choose_device("cpu")
    language = factory.language_parts(spec, catalog, device)
    is_replicated = world is None or fits_each_rank(files, table_dtype)
    is_quantized = is_replicated and table_dtype != "float32"
    if not is_replicated and has_codes(table_dtype):
        raise UserError(
            f"tables of {table_dtype} cannot be shared by ranks, and those of {folder} do not fit into the "
            f"{config.tables.memory_per_rank_gb:g} GiB of one (tables.memory_per_rank_gb of the run); give "
            "--table_dtype float16"
        )
    # Tables on the meta device get no initial values, which would be overwritten.
    model = factory.build(spec, language, "meta").requires_grad_(False)
    if world is not None and not is_replicated:
        dtype_of_ranks: Literal["float32", "float16"] = "float16" if table_dtype == "float16" else "float32"
        shard(model, replace(config.tables, dtype=dtype_of_ranks), world, lambda name: False)
    else:
        if is_quantized:
            _load_quantized_tables(model, files, table_dtype, device)
        else:
            for collection in [part for part in model.modules() if isinstance(part, EmbeddingBagCollection)]:
                collection.to_empty(device=device)
        model.to(device)
    if missing := copy_weights(model, folder, index):
        raise UserError(f"bundle {folder} is damaged: it lacks {missing[0]}; export it again")
    # Where ranks share the model, each has its own items in memory only.
    blend = load_blend(files, None if world is None or is_replicated else items_of_rank(catalog.num_items, world))
    if blend is not None and blend.trees and (world is None or is_replicated):
        blend = replace(blend, terms=load_blend_terms(files))
    collate = factory.collator(spec, catalog, "rank")
    return Bundle(folder, spec, model.eval(), catalog, collate, blend, is_replicated)


def fits_each_rank(files: BundleFiles, table_dtype: TableDType = "float32") -> bool:
    """Whether the tables of a bundle fit into the memory that each rank may use for tables, whole.

    It does not depend on the number of ranks.

    Args:
        files: From `open_bundle`.
        table_dtype: Number format of the tables in memory.
    """
    size = sum(rows * row_bytes(columns, table_dtype) for rows, columns in files.index.tables.values())
    return size <= files.config.tables.memory_per_rank_gb * GIB


def load_blend(files: BundleFiles, items: range | None = None, name: str = BLEND) -> Blend | None:
    """The blend of a bundle; None if it has none.

    Args:
        files: From `open_bundle`.
        items: Ranked items, in memory for these; None reads all.
        name: BLEND, or a term of it.

    Raises:
        UserError: A file is damaged.
    """
    num_items = files.catalog.num_items
    parts = parts_of(name, files.index.files, num_items)
    if not parts:
        return None
    items = range(num_items) if items is None else items
    held = parts_with(items, parts)
    blend = load_parts({of: verified_file(files.path, files.index, held[of]) for of in held}, items)
    if blend.similarity_VR.shape[0] != num_items:
        file = next(iter(held.values()))
        raise UserError(f"bundle {files.path} is damaged: {file} belongs to another catalog; copy or export it again")
    return blend


def load_blend_terms(files: BundleFiles) -> tuple[Blend, ...]:
    """The parts of a bundle's blend of each baseline, see `Blend.terms`.

    Args:
        files: From `open_bundle`.

    Returns:
        Empty if the blend has a single baseline, or if an earlier version wrote the bundle.

    Raises:
        UserError: A file is damaged.
    """
    terms: list[Blend] = []
    while (term := load_blend(files, name=BLEND_TERM.format(len(terms)))) is not None:
        terms.append(term)
    return tuple(terms)


def code_names(config: Config) -> dict[str, str]:
    """Values of the settings of a bundle that may be import paths, by setting."""
    return {"encoder.name": config.encoder.name, "head.name": config.head.name}


def check_bundle_code(config: Config, folder: Path, allow_code: Collection[str]) -> None:
    """Checks that a bundle imports only allowed code; see `require_allowed`.

    Args:
        config: Settings of the bundle.
        folder: Folder of the bundle.
        allow_code: See `load_bundle`.

    Raises:
        UserError: The encoder or the head is an import path that is not allowed.
    """
    require_allowed(code_names(config), allow_code, f"bundle {folder}")


def load_weights(module: nn.Module, path: Path | str, mapping: CatalogMapping | None = None) -> list[str]:
    """Copies the weights of a bundle into a model; each rank reads only its shards of the tables.

    Args:
        module: The model, sharded or not, or any module around it.
        path: A bundle.
        mapping: From the catalog of the bundle to that of the model; None if they are the same.

    Returns:
        Names of parameters that are not in the bundle, because the model of an earlier stage does not have them.

    Raises:
        UserError: The bundle is damaged, a shape differs, the bundle has a table that the model lacks, a table is on
            the meta device, or a parameter of the session recommender is missing. Only the text sequence encoder may be
            missing.
    """
    folder, model = as_path(path), model_of(module)
    index = read_index(folder)
    require_memory(model)
    held = {name.split(".")[-2] for name in table_parameters(model)}
    # A new catalog may have no brands or categories.
    if mapping is None and (unused := sorted(set(index.tables) - held - {ITEM_TEXT})):
        raise UserError(
            f"bundle {folder} has the table {unused[0]}, which the model lacks; build the model by the settings of the "
            "bundle and for its catalog"
        )
    missing = copy_weights(model, folder, index, mapping=mapping)
    recommender = dense_tensors(model.recommender if isinstance(model, LLMGR) else model)
    required = [
        name for name in missing if name in recommender and not (index.stage == "sbr" and _is_of_text_encoder(name))
    ]
    if required:
        raise UserError(
            f"bundle {folder} is damaged or was written by another version of llmgr_rec: it lacks {required[0]} of the "
            "session recommender; copy or train it again"
        )
    return missing


def _is_of_text_encoder(name: str) -> bool:
    return param_group(name) == "text_encoder"


def require_memory(model: nn.Module) -> None:
    """Checks that embedding tables are not on the meta device, where copied values are lost.

    Raises:
        UserError: A table is on the meta device.
    """
    for shard_ in local_shards(model):
        if shard_.tensor.device.type == "meta":
            raise UserError(
                f"table {shard_.table} is on the meta device, which holds no values; shard the model first "
                "(DistributedModelParallel), then load its weights"
            )


def copy_weights(
    model: SessionRecommender | LLMGR,
    folder: Path,
    index: BundleIndex,
    table_names: Mapping[str, str] | None = None,
    mapping: CatalogMapping | None = None,
    only: Collection[str] | None = None,
) -> list[str]:
    """Copies what a bundle has of a model into it.

    Args:
        model: The model, sharded or not.
        folder: A bundle.
        index: Its index.
        table_names: Name in the bundle of each table of the model that has another name there.
        mapping: From the catalog of the bundle to that of the model; None if they are the same.
        only: Names of the parameters and buffers to copy; None copies all.

    Returns:
        Names of the parameters and buffers that are not in the bundle.

    Raises:
        UserError: The bundle is damaged, or a shape differs.
    """

    def wanted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if only is None or name in only}

    try:
        missing = _load_tables(model, folder, index, table_names or {}, mapping, only)
        recommender = model.recommender if isinstance(model, LLMGR) else model
        missing += _load_dense(wanted(dense_tensors(recommender)), folder, index, RECOMMENDER)
        if isinstance(model, LLMGR):
            of_items = {f"head.{name}" for name in model.head.item_parameters} if mapping else set()
            language = wanted(language_tensors(model))
            missing += _load_dense(language, folder, index, LANGUAGE, mapping, of_items)
            if only is None or any("lora_" in name for name in only):
                missing += _load_lora(model, folder, index)
    except (SafetensorError, OSError) as error:
        raise UserError(f"bundle {folder} is damaged ({error}); copy or export it again") from None
    return missing


def _load_tables(
    model: nn.Module,
    folder: Path,
    index: BundleIndex,
    table_names: Mapping[str, str],
    mapping: CatalogMapping | None,
    only: Collection[str] | None,
) -> list[str]:
    """Loads this rank's shards of the tables; returns the parameters of tables that are not in the bundle."""
    not_found = []
    for parameter, shape in table_parameters(model).items():
        if only is not None and parameter not in only:
            continue
        name = parameter.split(".")[-2]
        table = table_names.get(name, name)
        if table not in index.tables:
            not_found.append(parameter)
            continue
        if index.tables[table] != shape and (mapping is None or index.tables[table][1] != shape[1]):
            raise UserError(
                f"bundle {folder} has {index.tables[table]} rows and columns in table {table}, the model {shape}; "
                "use the settings and the data set of the run that made it"
            )
        reader = TableReader(folder, index.table_files[table], index.table_dtype)
        if mapping is None:
            fill_table(model, parameter, reader.read)
        else:
            mapping.fill_table(model, parameter, table, reader.take)
    return not_found


def _load_quantized_tables(
    model: SessionRecommender | LLMGR, files: BundleFiles, dtype: TableDType, device: torch.device
) -> None:
    """Replaces the tables of a model on the meta device by tables of fewer bits with the values of a bundle."""
    index = files.index
    readers = {name: TableReader(files.path, parts, index.table_dtype) for name, parts in index.table_files.items()}

    def read(table: str, num_columns: int, rows: range) -> Tensor:
        if index.tables.get(table, (0, 0))[1] != num_columns:
            raise UserError(f"bundle {files.path} is damaged: it lacks table {table}; export it again")
        return readers[table].encoded(rows, num_columns, dtype)

    try:
        quantize_tables(model, dtype, device, read)
    except (SafetensorError, OSError) as error:
        raise UserError(f"bundle {files.path} is damaged ({error}); copy or export it again") from None


def _load_lora(model: LLMGR, folder: Path, index: BundleIndex) -> list[str]:
    adapter = folder / LORA / ADAPTER_WEIGHTS
    if adapter.is_file():
        verified_file(folder, index, f"{LORA}/{ADAPTER_WEIGHTS}")
    return load_adapter(model.language_model.decoder, adapter.parent)


class TableReader:
    """Reads blocks of a table from those of its files that overlap them.

    Args:
        folder: The bundle.
        table_files: Files of the table.
        dtype: Number format of their values.
    """

    def __init__(self, folder: Path, table_files: list[TableFile], dtype: TableDType) -> None:
        self._table_files = table_files
        self._dtype = dtype
        # Verified when a file is read for the first time.
        self._path = cache(partial(verified_table_file, folder))

    def read(self, rows: range, cols: range) -> Tensor:
        """Reads a block of the table, float32 [R, C]."""
        values_RC = torch.full((len(rows), len(cols)), float("nan"))
        for part in self._table_files:
            row0, row1 = max(rows.start, part.row), min(rows.stop, part.row + part.rows)
            col0, col1 = max(cols.start, part.col), min(cols.stop, part.col + part.cols)
            if row0 >= row1 or col0 >= col1:
                continue
            block = self._stored(part, slice(row0 - part.row, row1 - part.row), range(col0 - part.col, col1 - part.col))
            values_RC[row0 - rows.start : row1 - rows.start, col0 - cols.start : col1 - cols.start] = block
        return values_RC

    def take(self, rows_R: Tensor, cols: range) -> Tensor:
        """Reads some rows of the table in any order, float32 [R, C]; of the files, only the pages with these rows."""
        values_RC = torch.full((len(rows_R), len(cols)), float("nan"))
        for part in self._table_files:
            col0, col1 = max(cols.start, part.col), min(cols.stop, part.col + part.cols)
            is_here_R = (rows_R >= part.row) & (rows_R < part.row + part.rows)
            if col0 >= col1 or not is_here_R.any():
                continue
            with safe_open(self._path(part), framework="pt") as file:
                # Mapped, not read.
                rows = file.get_tensor(TENSOR)[rows_R[is_here_R] - part.row]
            block = decode_rows(rows, self._dtype)[:, col0 - part.col : col1 - part.col]
            values_RC[is_here_R, col0 - cols.start : col1 - cols.start] = block
        return values_RC

    def encoded(self, rows: range, num_columns: int, dtype: TableDType) -> Tensor:
        """Reads whole rows in a number format; see `encode_rows`. Codes of that format are taken as they are.

        Args:
            rows: The rows.
            num_columns: Columns of the table.
            dtype: Number format of the result.

        Raises:
            UserError: A value is beyond the range of the number format.
        """
        if has_codes(dtype) and dtype == self._dtype:
            parts = []
            for part in self._table_files:
                row0, row1 = max(rows.start, part.row), min(rows.stop, part.row + part.rows)
                if row0 < row1:
                    with safe_open(self._path(part), framework="pt") as file:
                        parts.append(file.get_slice(TENSOR)[row0 - part.row : row1 - part.row])
            return torch.cat(parts)
        try:
            return encode_rows(self.read(rows, range(num_columns)), dtype)
        except OverflowError as error:
            file = self._table_files[0].file
            raise UserError(f"{file} has {error}; --table_dtype {dtype} is not possible, give float32") from None

    def _stored(self, part: TableFile, rows: slice, cols: range) -> Tensor:
        """A block of a file, float32."""
        with safe_open(self._path(part), framework="pt") as file:
            stored = file.get_slice(TENSOR)
            if has_codes(self._dtype):
                return decode_rows(stored[rows], self._dtype)[:, cols.start : cols.stop]
            block: Tensor = stored[rows, cols.start : cols.stop]
        return block


@torch.no_grad()
def _load_dense(
    targets: dict[str, Tensor],
    folder: Path,
    index: BundleIndex,
    name: str,
    mapping: CatalogMapping | None = None,
    of_items: AbstractSet[str] = frozenset(),
) -> list[str]:
    """Copies the tensors of a safetensors file into the targets; returns the names that are not in the file.

    Those in `of_items` have a row for each item, which follows the item.
    """
    if not (folder / name).is_file():
        return list(targets)
    stored = load_file(verified_file(folder, index, name))
    if mapping is not None:
        for key in of_items & stored.keys():
            stored[key] = mapping.item_rows(stored[key]).view(-1, *stored[key].shape[1:])
    for key, target in targets.items():
        if key in stored and stored[key].shape != target.shape:
            raise UserError(
                f"bundle {folder} has {key} of shape {list(stored[key].shape)}, the model {list(target.shape)}; "
                "use the settings and the data set of the run that made it"
            )
        if key in stored:
            target.copy_(stored[key])
    return [key for key in targets if key not in stored]


def check_language_model(index: BundleIndex, weights_hash: str, folder: Path) -> None:
    """Checks that a base language model is the one of the training.

    Args:
        index: Index of the bundle.
        weights_hash: Hash of the base language model.
        folder: The bundle.

    Raises:
        UserError: It is another one.
    """
    if weights_hash != index.language_model["weights_hash"]:
        raise UserError(
            f"bundle {folder} was trained with other weights of the language model {index.language_model['name']} than "
            f"those found now; restore them (for package versions, see {INDEX})"
        )
