"""The summands of the scores of some items for a session.

Shapes: L clicks that the model is shown, K items, Q columns of item vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from llmgr_rec.baselines.blend import Blend
from llmgr_rec.baselines.sparse_scores import Floats, Ints
from llmgr_rec.distributed.ranking import RankingModel


@dataclass(frozen=True)
class PartValues:
    """One part of the scores of K items.

    Args:
        name: See `records.Part.name`.
        values_K: What it adds to the score of each item.
        weight: Weight of the baseline in the blend; None if the part is no baseline, or several.
        recency_L: Weight of each click by its recency; None if the part is no sum over clicks.
        clicks_LK: What each click adds; None if the part is no sum over clicks.
    """

    name: str
    values_K: Floats
    weight: float | None = None
    recency_L: Floats | None = None
    clicks_LK: Floats | None = None


def score_parts(
    ranking: RankingModel, terms: Sequence[Blend], query_1Q: Tensor, clicks_L: Ints, items_KQ: Tensor, items_K: Ints
) -> list[PartValues]:
    """The parts of the scores, which add up to those of the ranking.

    Args:
        ranking: The model.
        terms: The parts of its blend; none without a blend.
        query_1Q: Query of the session.
        clicks_L: Item indices of its clicks, oldest first.
        items_KQ: Vectors of the items.
        items_K: Indices of the items.
    """
    of_model = ranking.score_parts(query_1Q, items_KQ)
    parts = [PartValues(name, values_1K[0].numpy()) for name, values_1K in of_model.items()]
    for term in terms:
        recency_L, clicks_LK = term.click_scores(clicks_L, items_K)
        # A blend of several baselines was written by an earlier version, which did not keep them apart.
        weight = next(iter(term.weights.values())) if len(term.weights) == 1 else None
        parts.append(PartValues("+".join(term.weights), clicks_LK.sum(axis=0), weight, recency_L, clicks_LK))
    return parts
