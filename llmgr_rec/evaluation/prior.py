"""Makes the prior that a trained model ranks with: neighbour baselines, weighted by what the validation sessions say.

Shapes: B sessions of this rank, Q columns of queries, V items, N neighbours, W sets of their weights, T weights of a
language model that reads sessions, X = T * W.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from llmgr_rec.baselines.blend import Blend, clicks_of
from llmgr_rec.baselines.knn import ItemNeighbors
from llmgr_rec.baselines.registry import build_neighbors
from llmgr_rec.config import Config, PriorConfig
from llmgr_rec.data.catalogue import Catalogue
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed.assembly import make_collator
from llmgr_rec.distributed.process_group import World, long_timeout_group, run_on_rank0
from llmgr_rec.distributed.ranking import CatalogueRanker
from llmgr_rec.distributed.reduce import sum_over_ranks
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.metrics import RankingMetrics
from llmgr_rec.evaluation.protocol import Asked, asked_of_rank, evaluation_mode
from llmgr_rec.files import atomic_write
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.recommender import SessionRecommender, text_reader_of

logger = logging.getLogger(__name__)

# Factors that a baseline's score may get beside the model's logits. Of several baselines, all combinations are tried.
BLEND_WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


def build_priors(
    settings: PriorConfig, dataset: Dataset, catalogue: Catalogue, world: World, folder: Path | None = None
) -> list[Blend]:
    """One prior of weight 1 for each neighbour baseline, from the training split or the items' text.

    Args:
        settings: Which baselines, and how much of each is kept.
        dataset: Prepared sessions.
        catalogue: Their items.
        world: Ranks; all call together. Rank 0 builds and hands over, however long it takes.
        folder: Where rank 0 keeps them under names that tell what they were made of; None builds them anew.
    """
    with long_timeout_group(world) as group:
        return run_on_rank0(
            world,
            lambda: [_kept(name, settings.kept, dataset, catalogue, folder) for name in settings.neighbours],
            group,
        )


def _kept(name: str, kept: int, dataset: Dataset, catalogue: Catalogue, folder: Path | None) -> Blend:
    if folder is None:
        return _prior(name, kept, dataset, catalogue)
    file = folder / f"{name}-{_key(name, kept, dataset)}.npz"
    if file.is_file():
        try:
            return Blend.load(file)
        except UserError:
            logger.info("%s is damaged and is made again", file)
    prior = _prior(name, kept, dataset, catalogue)
    with atomic_write(file) as partial:
        prior.save(partial)
    return prior


def _key(name: str, kept: int, dataset: Dataset) -> str:
    """Tells a baseline's settings and the files that it may read."""
    read = {path: entry.sha256 for path, entry in dataset.manifest.files.items() if _is_read(path)}
    return hashlib.sha256(json.dumps([name, kept, read], sort_keys=True).encode()).hexdigest()[:16]


def _is_read(path: str) -> bool:
    return path.split("/")[0] not in ("valid", "test")


def _prior(name: str, kept: int, dataset: Dataset, catalogue: Catalogue) -> Blend:
    baseline = build_neighbors(name, dataset, catalogue, kept)
    if not isinstance(baseline, ItemNeighbors):
        raise UserError(
            f"setting prior.neighbours names {name}, which made a {type(baseline).__name__} without a matrix of item "
            "similarities; derive it from llmgr_rec.baselines.knn.ItemNeighbors"
        )
    return Blend({name: 1.0}, baseline.similarity_VV.astype(np.float32), baseline.decay)


def weight_sets(settings: PriorConfig) -> list[tuple[float, ...]]:
    """The sets of weights to choose from: the one that is set, or all of the grid; an empty one without neighbours."""
    if settings.weights:
        return [tuple(settings.weights)]
    return list(product(BLEND_WEIGHTS, repeat=len(settings.neighbours)))


@torch.no_grad()
def validation_ndcg(
    model: SessionRecommender | LLMGR,
    priors: Sequence[Blend],
    weights: Sequence[tuple[float, ...]],
    dataset: Dataset,
    config: Config,
    catalogue: Catalogue,
    world: World,
    text_weights: Sequence[float] = (1.0,),
) -> list[float]:
    """NDCG@20 on the validation sessions under each set of weights; the model reads the sessions once for all of them.

    Args:
        model: Sharded or not; it is in its former mode again afterwards. A text reader in it counts 1.
        priors: One baseline each, at weight 1; none leaves the model alone.
        weights: W sets, each a weight for every prior.
        dataset: Prepared sessions, some of them for validation.
        config: All settings.
        catalogue: The data set's items.
        world: Ranks; all call together, and all get the result.
        text_weights: T weights of that text reader.

    Returns:
        T * W values: all sets at the first text weight, then at the next.
    """
    collate = make_collator(config, catalogue, "rank", language=isinstance(model, LLMGR))
    train_count_V = catalogue.train_count_V.to(world.device)
    metrics_X = [RankingMetrics(train_count_V) for _ in range(len(text_weights) * len(weights))]
    with evaluation_mode(model):
        ranker = CatalogueRanker(model, collate, world)
        parts = [prior.of_items(ranker.items) for prior in priors]
        for asked in asked_of_rank(model, collate, dataset, "valid", config, world, "select weights"):
            added = [ranker.added_by(part, clicks_of(asked.batch)) for part in parts]
            places_XB = _places_by_weights(ranker, model, asked, added, weights, text_weights)
            for places_B, metrics in zip(places_XB.to(world.device), metrics_X, strict=True):
                metrics.count(places_B, asked.batch.targets_B, asked.batch.weights_B)
    return [metrics.compute(lambda counts: sum_over_ranks(counts, world))["ndcg@20"] for metrics in metrics_X]


def _places_by_weights(
    ranker: CatalogueRanker,
    model: SessionRecommender | LLMGR,
    asked: Asked,
    added: Sequence[sparse.csr_array],
    weights: Sequence[Sequence[float]],
    text_weights: Sequence[float],
) -> Tensor:
    """Places of the targets under each set of weights, and each of them at each weight of a reader of sessions.

    Args:
        ranker: Ranks the model's items; see `CatalogueRanker.places`, also for the other arguments.
        model: Who made the queries; where it has no such reader, its weights change nothing.
        asked: Sessions with queries in which that reader counts 1.
        added: What each neighbour adds.
        weights: W sets of factors of what they add.
        text_weights: T factors of what the text reader adds.

    Returns:
        Places, int64 [T * W, B], on the CPU; all sets at the first of the reader's weights, then at the next.
    """
    scaled, targets_B = asked.queries_BQ.clone(), asked.batch.targets_B
    found = []
    for weight in text_weights:
        if (text_reader := text_reader_of(model)) is not None:
            scaled[:, -text_reader.dim :] = asked.queries_BQ[:, -text_reader.dim :] * weight
        found.append(ranker.places(scaled, targets_B, added, weights, asked.exclude))
    return torch.cat(found)
