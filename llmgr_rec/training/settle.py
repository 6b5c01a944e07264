"""What is settled once a stage is trained, on the validation sessions where the settings leave a choice.

After stage sbr, how far the id rows of rare items are drawn to those of like words; after stage text, how much a
language model counts that reads sessions; after every stage, how much the neighbours count that stand beside the model.
They are chosen together, because what one of them finds the others need not.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmgr_rec.baselines.blend import Blend, combine
from llmgr_rec.config import Config, neighbour_clicks, reader_weights
from llmgr_rec.data.catalogue import Catalogue
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed.process_group import World
from llmgr_rec.evaluation.prior import Chosen, build_priors, choose_weights, weight_sets
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.recommender import SessionRecommender, text_reader_of
from llmgr_rec.training.knn_smoothing import KnnSmoothing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settled:
    """What a trained stage is exported with.

    Args:
        clicks: Clicks that the neighbours of rare items count for in their id rows, which are drawn so.
        prior: What neighbours add to the model's scores; None adds nothing.
        told: What is told of them: the weight of each neighbour, that of a language model that reads sessions and,
            where something was chosen, the NDCG@20 with it on the validation sessions, and the clicks where there were
            several to choose from.
    """

    clicks: float
    prior: Blend | None
    told: dict[str, float]


def settle(
    stage: str,
    model: SessionRecommender | LLMGR,
    config: Config,
    dataset: Dataset,
    catalogue: Catalogue,
    world: World,
    folder: Path | None = None,
    rare_rows: KnnSmoothing | None = None,
) -> Settled:
    """Chooses what a trained model ranks best with, and leaves it so.

    Args:
        stage: Stage that the model is the result of.
        model: The model with its final weights.
        config: All settings.
        dataset: Prepared sessions.
        catalogue: Their items.
        world: Ranks; all call together, and all get the result.
        folder: Where neighbours are kept for the next stage; None keeps none.
        rare_rows: The model's id rows where they are to be drawn; without them `tables.neighbour_clicks` is one number,
            which they were drawn by before, or 0.
    """
    priors = build_priors(config.prior, dataset, catalogue, world, folder) if config.prior.neighbours else []
    weights, numbers, text_reader = weight_sets(config.prior), neighbour_clicks(config), text_reader_of(model)
    reader_numbers = [1.0]
    if text_reader is not None:
        reader_numbers = reader_weights(config)
        text_reader.weight.fill_(1.0)
    is_chosen = len(numbers) * len(weights) * len(reader_numbers) > 1
    tried: dict[float, Chosen] = {}
    for clicks in numbers:
        if rare_rows:
            rare_rows.apply(clicks)
        tried[clicks] = Chosen(weights[0], reader_numbers[0], 0.0)
        if is_chosen:
            tried[clicks] = choose_weights(model, priors, weights, dataset, config, catalogue, world, reader_numbers)
    clicks, best = max(tried.items(), key=lambda one: one[1].ndcg)
    if rare_rows and clicks != numbers[-1]:
        rare_rows.apply(clicks)
    if text_reader is not None:
        text_reader.weight.fill_(best.reader)
    prior = combine(priors, best.neighbours) if priors else None
    told = dict(prior.weights) if prior else {}
    if text_reader is not None:
        told["text_reader"] = best.reader
    if is_chosen:
        told["ndcg@20"] = best.ndcg
    if len(numbers) > 1:
        told["neighbour_clicks"] = clicks
    settled = Settled(clicks, prior, told)
    if world.rank == 0:
        _log(stage, settled, tried if rare_rows else {})
    return settled


def _log(stage: str, settled: Settled, tried: Mapping[float, Chosen]) -> None:
    """Says what was settled, and how; of rare rows, where some numbers of clicks were tried on them."""
    told, clicks = settled.told, settled.clicks
    how = f"validation ndcg@20 {told['ndcg@20']:.4f}" if "ndcg@20" in told else "as they were set"
    if tried:
        others = "".join(f", {other.ndcg:.4f} with {number:g}" for number, other in tried.items() if number != clicks)
        logger.info("%s: clicks that neighbours of rare items count for: %g (%s%s)", stage, clicks, how, others)
    if settled.prior:
        named = ", ".join(f"{name} {weight:g}" for name, weight in settled.prior.weights.items())
        logger.info("%s: weights of neighbours: %s (%s)", stage, named, how)
    if "text_reader" in told:
        logger.info("%s: weight of the language model's score: %g (%s)", stage, told["text_reader"], how)
