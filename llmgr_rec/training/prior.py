"""The prior that a stage's export ranks with."""

import logging
from pathlib import Path

from llmgr_rec.config import Config
from llmgr_rec.data.catalogue import Catalogue
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed.neighbour_prior import NeighbourPrior, combine
from llmgr_rec.distributed.process_group import World
from llmgr_rec.evaluation.prior import build_priors, choose_weights
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.recommender import SessionRecommender

logger = logging.getLogger(__name__)


def make_prior(
    stage: str,
    model: SessionRecommender | LLMGR,
    config: Config,
    dataset: Dataset,
    catalogue: Catalogue,
    world: World,
    folder: Path | None = None,
) -> tuple[NeighbourPrior, dict[str, float]]:
    """Weighs the neighbours of the settings beside a trained model.

    Args:
        stage: Stage that the model is the result of.
        model: The model with its final weights.
        config: All settings, neighbours among them.
        dataset: Prepared sessions.
        catalogue: Their items.
        world: Ranks; all call together, and all get the result.
        folder: Where neighbours are kept for the next stage; None keeps none.

    Returns:
        The prior, and what is told of it: the weight of each neighbour and, where they were chosen, the NDCG@20 with
        them on the validation sessions.
    """
    priors = build_priors(config.prior, dataset, catalogue, world, folder)
    told: dict[str, float] = {}
    weights = tuple(config.prior.weights)
    if not weights:
        weights, told["ndcg@20"] = choose_weights(model, priors, dataset, config, catalogue, world)
    prior = combine(priors, weights)
    if world.rank == 0:
        named = ", ".join(f"{name} {weight:g}" for name, weight in prior.weights.items())
        how = f"validation ndcg@20 {told['ndcg@20']:.4f}" if told else "as they were set"
        logger.info("%s: weights of neighbours: %s (%s)", stage, named, how)
    return prior, {**prior.weights, **told}
