"""What is settled once a stage is trained, on the validation sessions where the settings leave a choice.

After stage sbr, how far the id rows of rare items are drawn to those of like words; after every stage, how much the
neighbours count that stand beside the model. Both are chosen together, because neighbours find rare items too.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from llmgr_rec.config import Config, neighbour_clicks
from llmgr_rec.data.catalogue import Catalogue
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed.neighbour_prior import NeighbourPrior, combine
from llmgr_rec.distributed.process_group import World
from llmgr_rec.evaluation.prior import build_priors, choose_weights, weight_sets
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.training.rare_rows import RareRows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settled:
    """What a trained stage is exported with.

    Args:
        clicks: Clicks that the neighbours of rare items count for in their id rows, which are drawn so.
        prior: What neighbours add to the model's scores; None adds nothing.
        told: What is told of both: the weight of each neighbour and, where something was chosen, the NDCG@20 with it on
            the validation sessions, and the clicks where there were several to choose from.
    """

    clicks: float
    prior: NeighbourPrior | None
    told: dict[str, float]


def settle(
    stage: str,
    model: SessionRecommender | LLMGR,
    config: Config,
    dataset: Dataset,
    catalogue: Catalogue,
    world: World,
    folder: Path | None = None,
    rare_rows: RareRows | None = None,
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
    weights, numbers = weight_sets(config.prior), neighbour_clicks(config)
    is_chosen = len(numbers) * len(weights) > 1
    tried = []
    for clicks in numbers:
        if rare_rows:
            rare_rows.draw(clicks)
        best, quality = weights[0], 0.0
        if is_chosen:
            best, quality = choose_weights(model, priors, weights, dataset, config, catalogue, world)
        tried.append((quality, clicks, best))
    quality, clicks, best = max(tried, key=lambda one: one[0])
    if rare_rows and clicks != numbers[-1]:
        rare_rows.draw(clicks)
    prior = combine(priors, best) if priors else None
    told: dict[str, float] = dict(prior.weights) if prior else {}
    if is_chosen:
        told["ndcg@20"] = quality
    if len(numbers) > 1:
        told["neighbour_clicks"] = clicks
    if world.rank == 0:
        how = f"validation ndcg@20 {quality:.4f}" if is_chosen else "as they were set"
        if rare_rows:
            others = "".join(f", {other:.4f} with {number:g}" for other, number, _ in tried if number != clicks)
            logger.info("%s: clicks that neighbours of rare items count for: %g (%s%s)", stage, clicks, how, others)
        if prior:
            named = ", ".join(f"{name} {weight:g}" for name, weight in prior.weights.items())
            logger.info("%s: weights of neighbours: %s (%s)", stage, named, how)
    return Settled(clicks, prior, told)
