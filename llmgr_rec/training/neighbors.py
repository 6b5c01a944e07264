"""Nearest-neighbor similarities of a data set's items, kept in a run folder and in the cache of results."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmgr_rec.baselines.blend import Blend
from llmgr_rec.baselines.builders import BLENDED, build_neighbors
from llmgr_rec.baselines.knn import ItemNeighbors
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.words import WORD_RULE
from llmgr_rec.distributed.process_group import World, long_timeout_group, run_on_rank0
from llmgr_rec.errors import UserError
from llmgr_rec.files import atomic_write
from llmgr_rec.result_cache import CachedResult
from llmgr_rec.training.freed_memory import return_freed_memory

logger = logging.getLogger(__name__)


def neighbor_scores(
    names: Sequence[str],
    k_neighbors: int,
    dataset: Dataset,
    catalog: Catalog,
    world: World,
    folder: Path | None = None,
) -> list[Blend]:
    """The scores of each nearest-neighbor baseline, with weight 1.

    Args:
        names: Baselines, computed from the training split or the items' texts.
        k_neighbors: Number of most similar items kept per item.
        dataset: Prepared sessions.
        catalog: Their items.
        world: Ranks; all call together. Rank 0 computes and broadcasts, with a timeout of days.
        folder: Folder where rank 0 keeps them for later stages; None keeps them neither there nor in the cache.

    Returns:
        A blend per name, in the order of `names`.

    Raises:
        UserError: A baseline is unknown or is not based on item similarities.
    """
    if not names:
        return []
    with long_timeout_group(world) as group:
        scores = run_on_rank0(
            world, lambda: [_cached(name, k_neighbors, dataset, catalog, folder) for name in names], group
        )
    return_freed_memory()
    return scores


def _cached(name: str, k_neighbors: int, dataset: Dataset, catalog: Catalog, folder: Path | None) -> Blend:
    if folder is None:
        return _compute(name, k_neighbors, dataset, catalog)
    file = folder / f"{name}-{_key(name, k_neighbors, dataset)}.npz"
    if file.is_file():
        try:
            return Blend.load(file)
        except UserError:
            logger.info("%s is damaged; computing it again", file)
    # The key lacks the code of an own baseline.
    cached = CachedResult("neighbors", {"file": file.name}, packages=("numpy", "scipy")) if name in BLENDED else None
    if cached and cached.take(folder):
        return Blend.load(file)
    scores = _compute(name, k_neighbors, dataset, catalog)
    with atomic_write(file) as partial:
        scores.save(partial)
    if cached:
        cached.keep({file.name: file})
    return scores


def _key(name: str, k_neighbors: int, dataset: Dataset) -> str:
    """Hash of a baseline's settings, of all files of the data set except validation and test, and of the word rule."""
    files = {
        path: entry.sha256
        for path, entry in dataset.manifest.files.items()
        if path.split("/")[0] not in ("valid", "test")
    }
    return hashlib.sha256(json.dumps([name, k_neighbors, files, WORD_RULE], sort_keys=True).encode()).hexdigest()[:16]


def _compute(name: str, k_neighbors: int, dataset: Dataset, catalog: Catalog) -> Blend:
    baseline = build_neighbors(name, dataset, catalog, k_neighbors)
    # Before the next baseline is built.
    return_freed_memory()
    if not isinstance(baseline, ItemNeighbors):
        raise UserError(
            f"setting blend.neighbors contains {name}, whose builder returned a {type(baseline).__name__} instead of a "
            "subclass of llmgr_rec.baselines.knn.ItemNeighbors; derive it from that class"
        )
    return Blend({name: 1.0}, baseline.similarity_VV.astype(np.float32), baseline.decay)
