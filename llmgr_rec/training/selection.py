"""Selects on the validation sessions what a trained stage is exported with, where the settings leave a choice.

After stage sbr that is the smoothing of cold items' id rows, after stage text the weight of a language model that reads
sessions, and after every stage the weights of the neighbors blended with the model. They are selected jointly: the best
value of one depends on the others.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from llmgr_rec.baselines.blend import Blend, combine
from llmgr_rec.config import Config, neighbour_clicks, reader_weights
from llmgr_rec.data.catalogue import Catalogue
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed.assembly import make_collator
from llmgr_rec.distributed.process_group import World
from llmgr_rec.evaluation.prior import build_priors, validation_ndcg, weight_sets
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.recommender import SessionRecommender, text_reader_of
from llmgr_rec.training.knn_smoothing import KnnSmoothing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """One combination of what is selected.

    Args:
        smoothing: Smoothing strength of cold items' id rows, in clicks (`tables.neighbour_clicks`).
        text_weight: Weight of the score of a language model that reads sessions as text; 1 where there is none.
        blend_weights: Weight of each neighbor baseline, in the order of `prior.neighbours`.
    """

    smoothing: float
    text_weight: float
    blend_weights: tuple[float, ...]


@dataclass(frozen=True)
class SearchSpace:
    """The values that the settings leave to choose from, at least one of each.

    Args:
        smoothing: Smoothing strengths, in clicks.
        text_weights: Weights of a language model's score.
        blend_weights: Sets of weights, each with one for every neighbor baseline.
    """

    smoothing: list[float]
    text_weights: list[float]
    blend_weights: list[tuple[float, ...]]

    @classmethod
    def of(cls, model: SessionRecommender | LLMGR, config: Config) -> "SearchSpace":
        """The search space of a model under its settings."""
        text_weights = [1.0] if text_reader_of(model) is None else reader_weights(config)
        return cls(neighbour_clicks(config), text_weights, weight_sets(config.prior))

    def candidates(self) -> list[Candidate]:
        """All combinations."""
        return [Candidate(*values) for values in product(self.smoothing, self.text_weights, self.blend_weights)]


@dataclass(frozen=True)
class Selection:
    """What a trained stage is exported with.

    Args:
        smoothing: Smoothing strength of cold items' id rows, in clicks, which the model has been given.
        prior: What neighbors add to the model's scores; None adds nothing.
        metrics: Weight of each neighbor; `text_reader`, the weight of a language model that reads sessions, where there
            is one; `ndcg@20` on the validation sessions, where there were several candidates; and `neighbour_clicks`,
            where there were several smoothing strengths.
    """

    smoothing: float
    prior: Blend | None
    metrics: dict[str, float]


def select_on_validation(
    stage: str,
    model: SessionRecommender | LLMGR,
    config: Config,
    dataset: Dataset,
    catalogue: Catalogue,
    world: World,
    folder: Path | None = None,
) -> Selection:
    """Selects the candidate with the best validation NDCG@20, and leaves the model with it applied.

    A single candidate is applied without an evaluation.

    Args:
        stage: Stage that the model is the result of.
        model: The model with its final weights, as they were trained.
        config: All settings. After stage sbr `tables.neighbour_clicks` is the one number that was selected there.
        dataset: Prepared sessions.
        catalogue: Their items.
        world: Ranks; all call together, and all get the result.
        folder: Where neighbors are cached for later stages; None caches none.
    """
    priors = build_priors(config.prior, dataset, catalogue, world, folder) if config.prior.neighbours else []
    knn_smoothing = None
    if isinstance(model, SessionRecommender) and stage == "sbr" and any(neighbour_clicks(config)):
        knn_smoothing = _knn_smoothing(model, config, dataset, catalogue, world, folder)
    space = SearchSpace.of(model, config)
    candidates, ndcg = space.candidates(), {}
    if len(candidates) > 1:
        ndcg = _search(space, model, priors, config, dataset, catalogue, world, knn_smoothing)
    # Of equals the first.
    best = max(candidates, key=lambda candidate: ndcg.get(candidate, 0.0))
    _apply(best, model, knn_smoothing)
    prior = combine(priors, best.blend_weights) if priors else None
    selection = Selection(best.smoothing, prior, _metrics(best, ndcg, prior, text_reader_of(model) is not None))
    if world.rank == 0:
        _log(stage, selection, ndcg if knn_smoothing else {})
    return selection


def _knn_smoothing(
    model: SessionRecommender, config: Config, dataset: Dataset, catalogue: Catalogue, world: World, folder: Path | None
) -> KnnSmoothing:
    by_words = replace(config.prior, neighbours=["text_knn"])
    (near,) = build_priors(by_words, dataset, catalogue, world, folder)
    collate = make_collator(config, catalogue, "rank", language=False)
    return KnnSmoothing(model, near.similarity_VR, catalogue.train_count_V, collate, world)


def _search(
    space: SearchSpace,
    model: SessionRecommender | LLMGR,
    priors: Sequence[Blend],
    config: Config,
    dataset: Dataset,
    catalogue: Catalogue,
    world: World,
    knn_smoothing: KnnSmoothing | None,
) -> dict[Candidate, float]:
    """Validation NDCG@20 of every candidate; one pass over the validation sessions for each smoothing strength.

    The model is left with the last smoothing strength and text weight 1, so the caller has to apply a candidate.
    """
    ndcg: dict[Candidate, float] = {}
    for smoothing in space.smoothing:
        # Text weights are tried by scaling queries in which the text reader counts 1.
        _apply(Candidate(smoothing, 1.0, ()), model, knn_smoothing)
        found = validation_ndcg(
            model, priors, space.blend_weights, dataset, config, catalogue, world, space.text_weights
        )
        pairs = product(space.text_weights, space.blend_weights)
        ndcg |= {Candidate(smoothing, *pair): value for pair, value in zip(pairs, found, strict=True)}
    return ndcg


def _apply(candidate: Candidate, model: SessionRecommender | LLMGR, knn_smoothing: KnnSmoothing | None) -> None:
    """Gives the model a candidate's smoothing and text weight; both replace what was applied before."""
    if knn_smoothing:
        knn_smoothing.apply(candidate.smoothing)
    if (text_reader := text_reader_of(model)) is not None:
        text_reader.weight.fill_(candidate.text_weight)


def _metrics(
    best: Candidate, ndcg: Mapping[Candidate, float], prior: Blend | None, has_text_reader: bool
) -> dict[str, float]:
    metrics = dict(prior.weights) if prior else {}
    if has_text_reader:
        metrics["text_reader"] = best.text_weight
    if ndcg:
        metrics["ndcg@20"] = ndcg[best]
    if len({candidate.smoothing for candidate in ndcg}) > 1:
        metrics["neighbour_clicks"] = best.smoothing
    return metrics


def _log(stage: str, selection: Selection, ndcg: Mapping[Candidate, float]) -> None:
    """Logs what was selected, and how; of smoothing strengths also the best NDCG@20 of each that was tried."""
    metrics = selection.metrics
    how = f"validation ndcg@20 {metrics['ndcg@20']:.4f}" if "ndcg@20" in metrics else "as set"
    if ndcg:
        best_of: dict[float, float] = {}
        for candidate, value in ndcg.items():
            best_of[candidate.smoothing] = max(value, best_of.get(candidate.smoothing, 0.0))
        others = "".join(
            f", {value:.4f} with {strength:g}" for strength, value in best_of.items() if strength != selection.smoothing
        )
        logger.info("%s: smoothing strength in clicks: %g (%s%s)", stage, selection.smoothing, how, others)
    if selection.prior:
        named = ", ".join(f"{name} {weight:g}" for name, weight in selection.prior.weights.items())
        logger.info("%s: weights of neighbors: %s (%s)", stage, named, how)
    if "text_reader" in metrics:
        logger.info("%s: weight of the language model's score: %g (%s)", stage, metrics["text_reader"], how)
