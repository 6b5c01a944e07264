"""Selection on validation sessions of hyperparameters that are applied after training.

After stage sbr this is the strength of cold-item smoothing, after stage llm_text the weight of the text sequence
encoder's score, and after every stage the weights of the blend. They are selected jointly by NDCG@20, because the best
value of one depends on the others.

Shapes: B sessions of this rank, Q columns of queries, T text weights, W sets of blend weights, X = T * W.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from scipy import sparse
from torch import Tensor

from llmgr_rec.baselines.blend import Blend, combine
from llmgr_rec.config import BlendConfig, Config, StageName
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed.collectives import sum_over_ranks
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.ranking import CatalogRanker, RankingModel
from llmgr_rec.evaluation.metrics import RankingMetrics
from llmgr_rec.evaluation.protocol import GroupOfBatches, evaluation_batches, evaluation_mode, groups_of_batches
from llmgr_rec.evaluation.results import K
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.recommender import SessionRecommender, text_encoder_of
from llmgr_rec.remote_path import RemotePath
from llmgr_rec.storage.embedding_model import EmbeddingModel
from llmgr_rec.training.freed_memory import return_freed_memory
from llmgr_rec.training.id_row_smoothing import KnnSmoothing
from llmgr_rec.training.neighbors import neighbor_scores
from llmgr_rec.training.reranker_fit import with_trees

logger = logging.getLogger(__name__)

# Grid of weights of a nearest-neighbor score, relative to the model's logits. For several scores, all combinations.
BLEND_WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


@dataclass(frozen=True)
class Candidate:
    """One combination of values to evaluate.

    Args:
        smoothing: Strength of cold-item smoothing, in clicks.
        text_weight: Weight of the text sequence encoder's score; 1 without a text sequence encoder.
        blend_weights: Weight of each nearest-neighbor score, in the order of `blend.scores`.
    """

    smoothing: float
    text_weight: float
    blend_weights: tuple[float, ...]


@dataclass(frozen=True)
class SearchSpace:
    """The values to select from, at least one of each.

    Args:
        smoothing: Smoothing strengths, in clicks.
        text_weights: Weights of the text sequence encoder's score.
        blend_weights: Sets of weights, one weight per nearest-neighbor score.
    """

    smoothing: list[float]
    text_weights: list[float]
    blend_weights: list[tuple[float, ...]]

    @classmethod
    def of(cls, model: SessionRecommender | LLMGR, config: Config) -> "SearchSpace":
        """The search space of a model under its settings."""
        text_weights = config.text_encoder.score_weight if text_encoder_of(model) else [1.0]
        return cls(config.tables.knn_smoothing, text_weights, _weight_sets(config.blend))

    def candidates(self) -> list[Candidate]:
        """All combinations."""
        return [Candidate(*values) for values in product(self.smoothing, self.text_weights, self.blend_weights)]


@dataclass(frozen=True)
class Selection:
    """The selected values.

    Args:
        smoothing: Strength of cold-item smoothing, in clicks; already applied to the model.
        blend: Nearest-neighbor scores to add to the model's; None adds none.
        metrics: Weight of each nearest-neighbor score; `text_encoder`, the weight of the text sequence encoder's score,
            if there is one; `ndcg@20` on the validation sessions, if there were several candidates; and
            `knn_smoothing`, if there were several smoothing strengths.
    """

    smoothing: float
    blend: Blend | None
    metrics: dict[str, float]


def select_on_validation(
    stage: str,
    ranking: RankingModel,
    config: Config,
    dataset: Dataset,
    catalog: Catalog,
    world: World,
    folder: Path | None = None,
) -> Selection:
    """Selects the candidate with the best validation NDCG@20, the first in case of ties, and applies it to the model.

    A single candidate is applied without an evaluation. The search modifies the id rows and the text weight of the
    model in place; when the function returns, they are those of the selected candidate.

    Args:
        stage: Stage that trained the model.
        ranking: The trained model, without a blend.
        config: All settings. In stages after sbr, `tables.knn_smoothing` is the one strength that was selected there.
        dataset: Prepared sessions.
        catalog: Their items.
        world: Ranks; all call together, and all return the same result.
        folder: Folder that caches nearest neighbors for later stages; None disables the cache.

    Returns:
        The selected values.

    Raises:
        UserError: A baseline of `blend.neighbors` is unknown or is not based on item similarities, or a re-ranker is
            wanted and LightGBM is not installed.
    """
    model, blend = ranking.model, config.blend
    encoder = EmbeddingModel.of(config)
    scores = neighbor_scores(blend.scores, blend.k_neighbors, dataset, catalog, world, folder, encoder)
    smoothing = None
    if stage == "sbr" and any(config.tables.knn_smoothing):
        smoothing = _smoothing(ranking, blend.k_neighbors, dataset, catalog, world, folder)
    space = SearchSpace.of(model, config)
    candidates, ndcg = space.candidates(), {}
    if len(candidates) > 1:
        ndcg = _search(space, ranking, scores, dataset, catalog, world, smoothing)
        return_freed_memory()
    best = max(candidates, key=lambda candidate: ndcg.get(candidate, 0.0))
    _apply(best, model, smoothing)
    blended = combine(scores, best.blend_weights) if scores else None
    selection = Selection(best.smoothing, blended, _metrics(best, ndcg, blended, text_encoder_of(model) is not None))
    if world.rank == 0:
        _log(stage, selection, ndcg if smoothing else {})
    if blended is not None and blend.reranker != "none":
        return_freed_memory()
        selection = replace(selection, blend=with_trees(blended, ranking, dataset, catalog, world))
    return selection


def selection_passes(stage: StageName, config: Config) -> int:
    """Passes over the validation sessions that `select_on_validation` makes after a stage.

    Args:
        stage: The stage.
        config: All settings.
    """
    # Later stages have the strength that was selected after stage sbr.
    strengths = len(config.tables.knn_smoothing) if stage == "sbr" else 1
    text_weights = len(config.text_encoder.score_weight) if stage == "llm_text" else 1
    return strengths if strengths * text_weights * len(_weight_sets(config.blend)) > 1 else 0


def _weight_sets(blend: BlendConfig) -> list[tuple[float, ...]]:
    """The set of weights in the settings or, without one, the whole grid; one empty set without neighbors."""
    if blend.weights:
        return [tuple(blend.weights)]
    return list(product(BLEND_WEIGHTS, repeat=len(blend.scores)))


def _smoothing(
    ranking: RankingModel,
    k_neighbors: int,
    dataset: Dataset,
    catalog: Catalog,
    world: World,
    folder: Path | None,
) -> KnnSmoothing:
    if not isinstance(ranking.model, SessionRecommender):
        raise TypeError("cold-item smoothing requires a session recommender")
    (by_words,) = neighbor_scores(["text_knn"], k_neighbors, dataset, catalog, world, folder)
    scratch = None if folder is None or isinstance(folder, RemotePath) else folder
    return KnnSmoothing(ranking.model, by_words.similarity_VR, catalog.train_count_V, world, scratch)


def _search(
    space: SearchSpace,
    ranking: RankingModel,
    scores: Sequence[Blend],
    dataset: Dataset,
    catalog: Catalog,
    world: World,
    smoothing: KnnSmoothing | None,
) -> dict[Candidate, float]:
    """Validation NDCG@20 of every candidate, in one pass over the validation sessions per smoothing strength.

    Afterwards the model has the last smoothing strength and text weight 1; the caller applies the selected candidate.
    """
    ndcg: dict[Candidate, float] = {}
    for strength in space.smoothing:
        # The vectors of all items with the strength before.
        return_freed_memory()
        # Text weights are tried by scaling queries that were computed with text weight 1.
        _apply(Candidate(strength, 1.0, ()), ranking.model, smoothing)
        # The rows of neighbors.
        return_freed_memory()
        found = _validation_ndcg(
            ranking, scores, space.blend_weights, space.text_weights, dataset, catalog.train_count_V, world
        )
        pairs = product(space.text_weights, space.blend_weights)
        ndcg |= {Candidate(strength, *pair): value for pair, value in zip(pairs, found, strict=True)}
    return ndcg


@torch.no_grad()
def _validation_ndcg(
    ranking: RankingModel,
    scores: Sequence[Blend],
    blend_weights: Sequence[tuple[float, ...]],
    text_weights: Sequence[float],
    dataset: Dataset,
    train_count_V: Tensor,
    world: World,
) -> list[float]:
    """NDCG@20 by text weight, then by set of blend weights, from one forward pass of the model."""
    metrics_X = [RankingMetrics(train_count_V.to(world.device)) for _ in product(text_weights, blend_weights)]
    with evaluation_mode(ranking.model):
        ranker = ranking.ranker(world)
        # What the lookups of all items have left, between which the gates of all items do not fit.
        return_freed_memory()
        ranking = ranking.with_query_encoder(ranker)
        local_scores = [score.of_items(ranker.items) for score in scores]
        batches = evaluation_batches(ranking, dataset, "valid", world, "select on validation")
        for group in groups_of_batches(batches, ranker.sessions_at_once, ranking.batch_size):
            added = [ranker.added_by(score, group.clicks) for score in local_scores]
            ranks_XB = _target_ranks(ranker, ranking.model, group, added, blend_weights, text_weights)
            for ranks_B, metrics in zip(ranks_XB.to(world.device), metrics_X, strict=True):
                metrics.count(ranks_B, group.targets_B, group.weights_B)
    return [metrics.compute(lambda counts: sum_over_ranks(counts, world))["ndcg@20"] for metrics in metrics_X]


def _target_ranks(
    ranker: CatalogRanker,
    model: SessionRecommender | LLMGR,
    group: GroupOfBatches,
    added: Sequence[sparse.csr_array],
    blend_weights: Sequence[Sequence[float]],
    text_weights: Sequence[float],
) -> Tensor:
    """Target ranks, int64 [X, B], on the CPU, by text weight, then by set of blend weights; exact below K."""
    queries_BQ, encoder = group.queries_BQ, text_encoder_of(model)
    scaled_BQ, found = queries_BQ.clone(), []
    for weight in text_weights:
        if encoder is not None:
            scaled_BQ[:, -encoder.dim :] = queries_BQ[:, -encoder.dim :] * weight
        found.append(ranker.target_ranks(scaled_BQ, group.targets_B, added, blend_weights, group.exclude, depth=K))
    return torch.cat(found)


def _apply(candidate: Candidate, model: SessionRecommender | LLMGR, smoothing: KnnSmoothing | None) -> None:
    """Applies the smoothing strength and the text weight of a candidate to the model."""
    if smoothing:
        smoothing.apply(candidate.smoothing)
    if (encoder := text_encoder_of(model)) is not None:
        encoder.weight.fill_(candidate.text_weight)


def _metrics(
    best: Candidate, ndcg: Mapping[Candidate, float], blend: Blend | None, has_text_encoder: bool
) -> dict[str, float]:
    metrics = dict(blend.weights) if blend else {}
    if has_text_encoder:
        metrics["text_encoder"] = best.text_weight
    if ndcg:
        metrics["ndcg@20"] = ndcg[best]
    if len({candidate.smoothing for candidate in ndcg}) > 1:
        metrics["knn_smoothing"] = best.smoothing
    return metrics


def _log(stage: str, selection: Selection, ndcg: Mapping[Candidate, float]) -> None:
    """Logs the selected values and, if there are several smoothing strengths, the best NDCG@20 of each."""
    metrics = selection.metrics
    reason = f"validation NDCG@20 {metrics['ndcg@20']:.4f}" if "ndcg@20" in metrics else "as set"
    if ndcg:
        best_of: dict[float, float] = {}
        for candidate, value in ndcg.items():
            best_of[candidate.smoothing] = max(value, best_of.get(candidate.smoothing, 0.0))
        others = "".join(
            f", {value:.4f} with {strength:g}" for strength, value in best_of.items() if strength != selection.smoothing
        )
        logger.info("%s: smoothing strength of cold items %g (%s%s)", stage, selection.smoothing, reason, others)
    if selection.blend:
        weights = ", ".join(f"{name} {weight:g}" for name, weight in selection.blend.weights.items())
        logger.info("%s: blend weights %s (%s)", stage, weights, reason)
    if "text_encoder" in metrics:
        logger.info("%s: weight of the text sequence encoder %g (%s)", stage, metrics["text_encoder"], reason)
