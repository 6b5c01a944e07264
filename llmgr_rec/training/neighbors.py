"""Nearest-neighbor similarities of a data set's items, kept in a run folder and in the cache of results.

Each rank computes, keeps and writes those of the items that it ranks.

Shapes: V items, R items of this rank, F features.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch.distributed as dist
from scipy import sparse

from llmgr_rec.baselines.blend import Blend
from llmgr_rec.baselines.blend_parts import load_parts, part_name, parts_of
from llmgr_rec.baselines.builders import build_baseline
from llmgr_rec.baselines.embedding_knn import EmbeddingKNN
from llmgr_rec.baselines.knn import DECAY, Baseline, ItemNeighbors
from llmgr_rec.config import EMBEDDING_KNN
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.words import WORD_RULE
from llmgr_rec.distributed.collectives import gather_from_ranks
from llmgr_rec.distributed.item_features import FEATURES
from llmgr_rec.distributed.item_vectors import items_of_rank
from llmgr_rec.distributed.process_group import (
    World,
    barrier,
    long_timeout_group,
    run_on_all_ranks,
    run_on_rank0,
)
from llmgr_rec.distributed.sharded_similarity import similarity_of_ranks
from llmgr_rec.distributed.sparse_exchange import receive, send
from llmgr_rec.errors import UserError
from llmgr_rec.files import atomic_write
from llmgr_rec.result_cache import CachedResult
from llmgr_rec.storage.embedding_model import EmbeddingModel
from llmgr_rec.training.freed_memory import return_freed_memory

logger = logging.getLogger(__name__)


def neighbor_scores(
    names: Sequence[str],
    k_neighbors: int,
    dataset: Dataset,
    catalog: Catalog,
    world: World,
    folder: Path | None = None,
    embedding_model: EmbeddingModel | None = None,
) -> list[Blend]:
    """The scores of each nearest-neighbor baseline, with weight 1.

    Args:
        names: Baselines, computed from the training split or the items' texts.
        k_neighbors: Number of most similar items kept per item.
        dataset: Prepared sessions.
        catalog: Their items.
        world: Ranks; all call together.
        folder: Folder where they are kept for later stages; None keeps them neither there nor in the cache. With
            several ranks, all can read it.
        embedding_model: Encodes the items for `EMBEDDING_KNN`; None if that is not among the names.

    Returns:
        A blend per name, in the order of `names`, of the items that this rank ranks (`items_of_rank`).

    Raises:
        UserError: A baseline is unknown or is not based on item similarities.
    """
    if not names:
        return []
    with long_timeout_group(world) as group:
        ranks = _Ranks(world, group)
        scores = [_kept(name, k_neighbors, dataset, catalog, ranks, folder, embedding_model) for name in names]
    return_freed_memory()
    return scores


@dataclass(frozen=True)
class _Ranks:
    world: World
    group: dist.ProcessGroup | None


def _kept(
    name: str,
    k_neighbors: int,
    dataset: Dataset,
    catalog: Catalog,
    ranks: _Ranks,
    folder: Path | None,
    embedding_model: EmbeddingModel | None,
) -> Blend:
    """Reads the scores from the folder or from the cache; computes and keeps them if they are in neither."""
    if folder is None:
        return _compute(name, k_neighbors, dataset, catalog, ranks, embedding_model)
    stem = f"{name}-{_key(name, k_neighbors, dataset, embedding_model)}"
    # The key lacks the code of an own baseline.
    cached = None
    if ranks.world.rank == 0 and name in (*FEATURES, EMBEDDING_KNN):
        cached = CachedResult("neighbors", {"file": stem}, packages=("numpy", "scipy"))
    if (found := _load(stem, catalog.num_items, ranks, folder, cached)) is not None:
        return found
    scores = _compute(name, k_neighbors, dataset, catalog, ranks, embedding_model)
    file = folder / part_name(stem, items_of_rank(catalog.num_items, ranks.world), catalog.num_items)

    def write() -> None:
        with atomic_write(file) as partial:
            scores.save(partial)

    run_on_all_ranks(ranks.world, write, ranks.group)
    if cached:
        cached.keep({part: folder / part for part in parts_of(stem, _names(folder), catalog.num_items).values()})
    return scores


def _load(stem: str, num_items: int, ranks: _Ranks, folder: Path, cached: CachedResult | None) -> Blend | None:
    """This rank's part of scores that are complete; None on all ranks if they are not, or if a file is damaged."""

    def parts() -> dict[range, str]:
        found = parts_of(stem, _names(folder), num_items)
        if not found and cached and cached.take(folder):
            found = parts_of(stem, _names(folder), num_items)
        return found

    files = {items: folder / name for items, name in run_on_rank0(ranks.world, parts, ranks.group).items()}
    if not files:
        return None

    def read() -> Blend | None:
        try:
            return load_parts(files, items_of_rank(num_items, ranks.world))
        except UserError as error:
            logger.info("%s; computing the neighbors again", error)
            return None

    found = run_on_all_ranks(ranks.world, read, ranks.group)
    if all(gather_from_ranks(found is not None, ranks.world)):
        return found
    if ranks.world.rank == 0:
        for file in files.values():
            file.unlink(missing_ok=True)
    barrier(ranks.world, ranks.group)
    return None


def _names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()] if folder.is_dir() else []


def _key(name: str, k_neighbors: int, dataset: Dataset, embedding_model: EmbeddingModel | None) -> str:
    """Hash of a baseline's settings, of all files of the data set except validation and test, and of the word rule."""
    files = {
        path: entry.sha256
        for path, entry in dataset.manifest.files.items()
        if path.split("/")[0] not in ("valid", "test")
    }
    inputs = [name, k_neighbors, files, WORD_RULE]
    if name == EMBEDDING_KNN and embedding_model is not None:
        inputs.append(embedding_model.key())
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def _compute(
    name: str,
    k_neighbors: int,
    dataset: Dataset,
    catalog: Catalog,
    ranks: _Ranks,
    embedding_model: EmbeddingModel | None,
) -> Blend:
    if name not in FEATURES:
        return _built_on_rank0(
            lambda: _build(name, k_neighbors, dataset, catalog, embedding_model), name, catalog, ranks
        )
    world, group, num_items = ranks.world, ranks.group, catalog.num_items
    features_RF = FEATURES[name](dataset, catalog, items_of_rank(num_items, world), world, group)
    similarity_VR = similarity_of_ranks(features_RF, num_items, k_neighbors, world, group)
    # Before the next baseline is built.
    return_freed_memory()
    return Blend({name: 1.0}, similarity_VR.astype(np.float32, copy=False), DECAY)


def _built_on_rank0(
    build: Callable[[], tuple[sparse.csr_array, float]], name: str, catalog: Catalog, ranks: _Ranks
) -> Blend:
    """A baseline that is no cosine of sparse features, which rank 0 builds and holds."""
    world, num_items = ranks.world, catalog.num_items
    built = run_on_all_ranks(world, lambda: build() if world.rank == 0 else None, ranks.group)
    if built is None:
        similarity, decay = receive(0, np.float32, ranks.group), 0.0
    else:
        similarity, decay = built
        for rank in range(1, world.size):
            items = items_of_rank(num_items, replace(world, rank=rank))
            send(sparse.csr_array(similarity[:, items.start : items.stop]), rank, ranks.group)()
        items = items_of_rank(num_items, world)
        similarity = sparse.csr_array(similarity[:, items.start : items.stop])
    return Blend({name: 1.0}, similarity, run_on_rank0(world, lambda: decay, ranks.group))


def _build(
    name: str, k_neighbors: int, dataset: Dataset, catalog: Catalog, embedding_model: EmbeddingModel | None
) -> tuple[sparse.csr_array, float]:
    if name == EMBEDDING_KNN and embedding_model is not None:
        baseline: Baseline = EmbeddingKNN(embedding_model.embeddings(catalog), k_neighbors=k_neighbors)
    else:
        baseline = build_baseline(name, dataset, catalog, k_neighbors)
    # Before the next baseline is built.
    return_freed_memory()
    if not isinstance(baseline, ItemNeighbors):
        raise UserError(
            f"setting blend.neighbors contains {name}, whose builder returned a {type(baseline).__name__} instead of a "
            "subclass of llmgr_rec.baselines.knn.ItemNeighbors; derive it from that class"
        )
    return baseline.similarity_VV.astype(np.float32), baseline.decay
