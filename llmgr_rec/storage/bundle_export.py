"""Writes bundles. Each rank writes its shards of the tables, rank 0 everything else.

All files are written to a temporary folder, which gets its final name when it is complete.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from llmgr_rec.baselines.blend import Blend
from llmgr_rec.baselines.blend_parts import part_name
from llmgr_rec.checksums import file_checksum
from llmgr_rec.config import STAGES, Config, StageName
from llmgr_rec.config_file import save_config
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Manifest
from llmgr_rec.data.prompt_templates import save_templates
from llmgr_rec.data.schema import ITEMS_NAME
from llmgr_rec.distributed.collectives import gather_from_ranks
from llmgr_rec.distributed.fsdp import gather_full
from llmgr_rec.distributed.item_vectors import items_of_rank
from llmgr_rec.distributed.process_group import World, run_on_all_ranks, run_on_rank0
from llmgr_rec.errors import UserError
from llmgr_rec.files import storage_errors
from llmgr_rec.folder_draft import FolderDraft
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.remote_path import RemotePath
from llmgr_rec.storage.adapter_files import save_adapter
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
    is_complete,
    read_index,
)
from llmgr_rec.storage.finite_weights import require_finite
from llmgr_rec.storage.model_factory import ModelFactory
from llmgr_rec.storage.pretrained import saved_model
from llmgr_rec.storage.table_io import Shard, has_half_precision, local_shards
from llmgr_rec.versions import installed_versions

# Maximum bytes of a table file; larger shards are split by rows. A file is written from a copy.
_MAX_FILE_BYTES = 64 * 1024**2
# Size and checksum of files by name.
_PlainFiles = dict[str, tuple[int, str]]
# Table name, table shape, and a file of one of its blocks.
_WrittenFile = tuple[str, tuple[int, int], TableFile]


def export_bundle(
    module: nn.Module,
    stage: StageName,
    config: Config,
    catalog: Catalog,
    folder: Path,
    world: World,
    trained_on: Manifest | BundleIndex | None = None,
    blend: Blend | None = None,
    factory: ModelFactory | None = None,
    step: int | None = None,
    table_names: Mapping[str, str] | None = None,
) -> None:
    """Exports the model of a stage as a bundle, which is self-contained except for the base language model.

    Tables that the stage did not change become hard links to the files of an earlier stage's bundle.

    Args:
        module: The model, sharded or not, or any module around it.
        stage: Stage that trained the model.
        config: All settings.
        catalog: The items.
        folder: RUN/export/STAGE, on storage that all ranks share.
        world: This process and the world size. All ranks must call this.
        trained_on: Manifest of the training data set, or index of a bundle that was trained on it; evaluation and
            scoring follow its max_length and repeats. If None, they are unknown.
        blend: Nearest-neighbor scores that are added to the model's scores, of all items or of those that this rank
            ranks; each rank writes the latter. On all ranks or on none.
        factory: Factory that built the model; None for the default factory.
        step: Training steps after which the model has its weights, for error messages; None if unknown.
        table_names: Name in the bundle of each table of the model that gets another name there.

    Raises:
        UserError: The folder is a complete bundle already, a weight is NaN or infinite, or the storage is full or
            fails. Nothing is left of the export.
    """
    model, factory = model_of(module), factory or ModelFactory()
    draft = FolderDraft(folder, INDEX)
    partial = draft.path
    require_finite(model, stage, step, world)
    run_on_rank0(world, lambda: _prepare(folder, draft))

    def write_sharded() -> tuple[list[_WrittenFile], _PlainFiles]:
        names = table_names or {}
        shards = (replace(shard, table=names.get(shard.table, shard.table)) for shard in local_shards(model))
        with storage_errors(partial):
            draft.join()
            written = _write_tables(shards, partial, folder.parent, earlier, world.rank)
            blend_files = _write_blend(blend, catalog.num_items, partial, world)
            draft.upload()
        return written, blend_files

    def finish() -> None:
        with storage_errors(partial):
            weights_hash = factory.decoder_hash(config) if isinstance(model, LLMGR) else ""
            _write_weights(model, weights, config, partial)
            _write_inputs(config, catalog, partial)
            index = _index(model, stage, config, catalog, partial, written, blend_files, weights_hash, trained_on)
            index = replace(index, factory=factory.name)
            (partial / INDEX).write_text(index.to_json())
            set_default_modes(partial)
            draft.publish()

    try:
        earlier = run_on_all_ranks(world, lambda: _earlier_table_files(folder, catalog))
        tables, own_files = run_on_all_ranks(world, write_sharded)
        written = _gather_table_files(tables, world)
        blend_files = {name: facts for files in gather_from_ranks(own_files, world) for name, facts in files.items()}
        weights = _gather_weights(model, world)
        run_on_rank0(world, finish)
    except UserError:
        if world.rank == 0 or draft.is_remote:
            draft.discard()
        raise
    if draft.is_remote:
        draft.discard()


def model_of(module: nn.Module) -> LLMGR | SessionRecommender:
    """The model inside of a task, DistributedModelParallel or other wrappers.

    Raises:
        TypeError: The module contains no model.
        UserError: The module contains several models.
    """
    models = {name: part for name, part in module.named_modules() if isinstance(part, LLMGR)}
    inner = {id(model.recommender) for model in models.values()}
    models |= {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, SessionRecommender) and id(part) not in inner
    }
    if not models:
        raise TypeError(f"{type(module).__name__} contains neither LLMGR nor SessionRecommender")
    if len(models) > 1:
        raise UserError(
            f"{type(module).__name__} contains {len(models)} recommenders ({', '.join(models)}); give one of them"
        )
    return next(iter(models.values()))


def dense_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a module, by name, without embedding tables."""
    return {
        name: value.detach()
        for name, value in model.state_dict().items()
        # TorchRec's quantized collections have their tables in `tbes`.
        if not {"embedding_bags", "embeddings", "tbes"} & set(name.split("."))
    }


def language_tensors(model: LLMGR) -> dict[str, Tensor]:
    """Parameters and persistent buffers of the adapter and the head, by name in the model."""
    parts: dict[str, nn.Module] = {"adapter": model.adapter, "head": model.head}
    return {f"{part}.{name}": value for part, module in parts.items() for name, value in dense_tensors(module).items()}


def _prepare(folder: Path, draft: FolderDraft) -> None:
    if is_complete(folder):
        raise UserError(f"{folder} already contains an exported model; give another --output")
    with storage_errors(draft.path):
        draft.begin()


def _earlier_table_files(folder: Path, catalog: Catalog) -> dict[str, TableFile]:
    """Table files of the bundles of earlier stages, by `_content_key`; they become hard links if nothing changed.

    Their paths are relative to the folder of the bundles.
    """
    earlier: dict[str, TableFile] = {}
    if isinstance(folder, RemotePath):
        return earlier
    for stage in STAGES:
        if is_complete(folder.parent / stage):
            index = read_index(folder.parent / stage)
            if index.catalog_hash == catalog.hash:
                for part in (part for parts in index.table_files.values() for part in parts):
                    earlier[_content_key(part)] = replace(part, file=f"{stage}/{part.file}")
    return earlier


def _content_key(part: TableFile) -> str:
    return f"{Path(part.file).name}/{part.rows}x{part.cols}/{part.sha256}"


def _write_tables(
    shards: Iterable[Shard], partial: Path, export: Path, earlier: dict[str, TableFile], rank: int
) -> list[_WrittenFile]:
    """Writes or links this rank's shards."""
    written = []
    (partial / "tables").mkdir(exist_ok=True)
    for shard in shards:
        rows_at_a_time = max(1, _MAX_FILE_BYTES // (shard.tensor.shape[1] * shard.tensor.element_size()))
        for start in range(0, shard.tensor.shape[0], rows_at_a_time):
            values = shard.tensor[start : start + rows_at_a_time].cpu().contiguous()
            part = _table_file(shard, start, values)
            target = partial / part.file
            unchanged = earlier.get(_content_key(part))
            recorded = ""
            if unchanged is not None and _link(export / unchanged.file, target):
                # That of the file as it is now would hide damage since it was written.
                recorded = unchanged.checksum
            elif not target.exists():
                # All ranks write replicated tables, so each uses a temporary name with its rank.
                temporary = target.with_name(f"{target.name}.rank{rank}")
                save_file({TENSOR: values}, temporary)
                os.replace(temporary, target)
            part = replace(part, checksum=recorded or file_checksum(target))
            written.append((shard.table, (shard.num_rows, shard.dim), part))
    return written


def _write_blend(blend: Blend | None, num_items: int, partial: Path, world: World) -> _PlainFiles:
    """Writes the similarities of the items that this rank ranks."""
    if blend is None:
        return {}
    items, files = items_of_rank(num_items, world), {}
    terms = {BLEND_TERM.format(number): term for number, term in enumerate(blend.terms)}
    for name, part in {BLEND: blend, **terms}.items():
        if part.similarity_VR.shape[1] == num_items:
            part = part.of_items(items)
        file = partial / part_name(name, items, num_items)
        part.save(file)
        files[file.name] = _size_and_checksum(file)
    return files


def _size_and_checksum(file: Path) -> tuple[int, str]:
    return file.stat().st_size, file_checksum(file)


def _table_file(shard: Shard, start: int, values: Tensor) -> TableFile:
    row = shard.row_offset + start
    return TableFile(
        file=f"tables/{shard.table}-r{row}-c{shard.col_offset}.safetensors",
        row=row,
        col=shard.col_offset,
        rows=values.shape[0],
        cols=values.shape[1],
        sha256=hashlib.sha256(values.numpy().data).hexdigest(),
    )


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:
        # Another rank has already linked it, or the file system does not support hard links.
        return target.exists() and target.samefile(source)
    return True


def _gather_table_files(written: list[_WrittenFile], world: World) -> list[_WrittenFile]:
    """Table files of all ranks, each once, sorted by name."""
    if world.size == 1:
        return written
    gathered: list[list[_WrittenFile]] = [[] for _ in range(world.size)]
    dist.all_gather_object(gathered, written)
    by_file = {part.file: (table, shape, part) for rank in gathered for table, shape, part in rank}
    return sorted(by_file.values(), key=lambda entry: entry[2].file)


def _gather_weights(model: LLMGR | SessionRecommender, world: World) -> dict[str, dict[str, Tensor]]:
    """Weights outside of tables, by the file or folder that they are written to; complete only on rank 0."""
    if not isinstance(model, LLMGR):
        return {RECOMMENDER: gather_full(dense_tensors(model), world)}
    decoder = model.language_model.decoder.state_dict()
    lora = {name: value for name, value in decoder.items() if "lora_" in name}
    return {
        RECOMMENDER: gather_full(dense_tensors(model.recommender), world),
        LANGUAGE: language_tensors(model),
        LORA: gather_full(lora, world),
    }


def _write_weights(
    model: LLMGR | SessionRecommender, weights: dict[str, dict[str, Tensor]], config: Config, partial: Path
) -> None:
    _save(weights[RECOMMENDER], partial / RECOMMENDER)
    if isinstance(model, LLMGR):
        _save(weights[LANGUAGE], partial / LANGUAGE)
        base = saved_model(config.llm.name_or_path, config.llm.num_layers)
        save_adapter(model.language_model.decoder, weights[LORA], partial / LORA, base)


def _write_inputs(config: Config, catalog: Catalog, partial: Path) -> None:
    """Writes settings, prompt templates and catalog."""
    save_config(config, partial / CONFIG)
    save_templates(config.prompt.templates, partial / PROMPTS)
    shutil.copyfile(catalog.file, partial / ITEMS_NAME)


def _index(
    model: LLMGR | SessionRecommender,
    stage: StageName,
    config: Config,
    catalog: Catalog,
    partial: Path,
    written: list[_WrittenFile],
    blend_files: _PlainFiles,
    weights_hash: str,
    trained_on: Manifest | BundleIndex | None,
) -> BundleIndex:
    dims, language_model = {"d1": config.tables.dim}, {}
    if isinstance(model, LLMGR):
        dims["d2"] = model.language_model.hidden_size
        language_model = {"name": config.llm.name_or_path, "weights_hash": weights_hash}
    files = sorted(path for path in partial.rglob("*") if path.is_file() and path.parent.name != "tables")
    names = {str(path.relative_to(partial)): path for path in files}
    own = {name: _size_and_checksum(path) for name, path in names.items() if name not in blend_files}
    plain = dict(sorted((own | blend_files).items()))
    return BundleIndex(
        stage=stage,
        catalog_hash=catalog.hash,
        num_items=catalog.num_items,
        dims=dims,
        language_model=language_model,
        tables={table: shape for table, shape, _ in written},
        table_files={name: [part for table, _, part in written if table == name] for name, *_ in written},
        files={name: size for name, (size, _) in plain.items()},
        checksums={name: checksum for name, (_, checksum) in plain.items()},
        versions=installed_versions(),
        repeats=trained_on.repeats if trained_on else "allow",
        max_length=trained_on.max_length if trained_on else 0,
        consecutive_repeats=trained_on.consecutive_repeats if trained_on else "keep",
        features_hash=catalog.features_hash,
        sessions_hash=trained_on.sessions_hash if trained_on else "",
        table_dtype="float16" if has_half_precision(model) else "float32",
    )


def set_default_modes(partial: Path) -> None:
    """Gives files the default mode of new files, because safetensors creates files that only their owner can read.

    Args:
        partial: Folder of a bundle.
    """
    mode = (partial / INDEX).stat().st_mode
    for path in [*partial.rglob("*"), partial]:
        if path.is_file() and path.stat().st_mode != mode:
            path.chmod(mode)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    # Clones, because safetensors does not accept tensors that share memory.
    save_file({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}, path)
