"""Nearest-neighbor similarities of a data set's items, kept in a run folder and in the cache of results."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch.distributed as dist

from llmgr_rec.baselines.blend import Blend
from llmgr_rec.baselines.builders import BLENDED, build_neighbors
from llmgr_rec.baselines.embedding_knn import EmbeddingKNN
from llmgr_rec.baselines.knn import Baseline, ItemNeighbors
from llmgr_rec.config import EMBEDDING_KNN
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.words import WORD_RULE
from llmgr_rec.distributed.process_group import (
    World,
    barrier,
    long_timeout_group,
    run_on_all_ranks,
    run_on_rank0,
)
from llmgr_rec.distributed.ranking import items_of_rank
from llmgr_rec.errors import UserError
from llmgr_rec.files import atomic_write
from llmgr_rec.result_cache import CachedResult
from llmgr_rec.storage.text_encoder import TextEncoder
from llmgr_rec.training.freed_memory import return_freed_memory

logger = logging.getLogger(__name__)


def neighbor_scores(
    names: Sequence[str],
    k_neighbors: int,
    dataset: Dataset,
    catalog: Catalog,
    world: World,
    folder: Path | None = None,
    text_encoder: TextEncoder | None = None,
) -> list[Blend]:
    """The scores of each nearest-neighbor baseline, with weight 1.

    Args:
        names: Baselines, computed from the training split or the items' texts.
        k_neighbors: Number of most similar items kept per item.
        dataset: Prepared sessions.
        catalog: Their items.
        world: Ranks; all call together. Rank 0 computes, and the others wait with a timeout of days.
        folder: Folder where rank 0 keeps them for later stages; None keeps them neither there nor in the cache. With
            several ranks, all can read it.
        text_encoder: Encodes the items for `EMBEDDING_KNN`; None if that is not among the names.

    Returns:
        A blend per name, in the order of `names`: on rank 0 of all items, on the others of the items that they rank
        (`items_of_rank`), read from the files of rank 0.

    Raises:
        UserError: A baseline is unknown or is not based on item similarities.
    """
    if not names:
        return []
    with long_timeout_group(world) as group, _shared(folder, world, group) as shared:

        def on_rank0() -> list[Blend]:
            is_kept = folder is not None
            return [_cached(name, k_neighbors, dataset, catalog, shared, is_kept, text_encoder) for name in names]

        scores = run_on_all_ranks(world, on_rank0 if world.rank == 0 else list, group)

        def of_rank() -> list[Blend]:
            if not world.rank or shared is None:
                return scores
            items = items_of_rank(catalog.num_items, world)
            return [Blend.load(_file(shared, name, k_neighbors, dataset, text_encoder), items) for name in names]

        scores = run_on_all_ranks(world, of_rank, group)
    return_freed_memory()
    return scores


@contextmanager
def _shared(folder: Path | None, world: World, group: dist.ProcessGroup | None) -> Iterator[Path | None]:
    """The folder; with several ranks and without one, a temporary folder of rank 0."""
    if folder is not None or world.size == 1:
        yield folder
        return
    with TemporaryDirectory() if world.rank == 0 else nullcontext("") as made:
        yield Path(run_on_rank0(world, lambda: made, group))
        barrier(world, group)


def _file(folder: Path, name: str, k_neighbors: int, dataset: Dataset, text_encoder: TextEncoder | None) -> Path:
    return folder / f"{name}-{_key(name, k_neighbors, dataset, text_encoder)}.npz"


def _cached(
    name: str,
    k_neighbors: int,
    dataset: Dataset,
    catalog: Catalog,
    folder: Path | None,
    is_kept: bool,
    text_encoder: TextEncoder | None,
) -> Blend:
    if folder is None:
        return _compute(name, k_neighbors, dataset, catalog, text_encoder)
    file = _file(folder, name, k_neighbors, dataset, text_encoder)
    if file.is_file():
        try:
            return Blend.load(file)
        except UserError:
            logger.info("%s is damaged; computing it again", file)
    # The key lacks the code of an own baseline.
    cached = None
    if is_kept and name in (*BLENDED, EMBEDDING_KNN):
        cached = CachedResult("neighbors", {"file": file.name}, packages=("numpy", "scipy"))
    if cached and cached.take(folder):
        return Blend.load(file)
    scores = _compute(name, k_neighbors, dataset, catalog, text_encoder)
    with atomic_write(file) as partial:
        scores.save(partial)
    if cached:
        cached.keep({file.name: file})
    return scores


def _key(name: str, k_neighbors: int, dataset: Dataset, text_encoder: TextEncoder | None) -> str:
    """Hash of a baseline's settings, of all files of the data set except validation and test, and of the word rule."""
    files = {
        path: entry.sha256
        for path, entry in dataset.manifest.files.items()
        if path.split("/")[0] not in ("valid", "test")
    }
    inputs = [name, k_neighbors, files, WORD_RULE]
    if name == EMBEDDING_KNN and text_encoder is not None:
        inputs.append(text_encoder.key())
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def _compute(
    name: str, k_neighbors: int, dataset: Dataset, catalog: Catalog, text_encoder: TextEncoder | None
) -> Blend:
    if name == EMBEDDING_KNN and text_encoder is not None:
        baseline: Baseline = EmbeddingKNN(text_encoder.embeddings(catalog), k_neighbors=k_neighbors)
    else:
        baseline = build_neighbors(name, dataset, catalog, k_neighbors)
    # Before the next baseline is built.
    return_freed_memory()
    if not isinstance(baseline, ItemNeighbors):
        raise UserError(
            f"setting blend.neighbors contains {name}, whose builder returned a {type(baseline).__name__} instead of a "
            "subclass of llmgr_rec.baselines.knn.ItemNeighbors; derive it from that class"
        )
    return Blend({name: 1.0}, baseline.similarity_VV.astype(np.float32), baseline.decay)
