"""Routing: chooses the sessions that the language model encodes by the uncertainty of the session recommender.

Shapes: R sessions, K length of a ranked list.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Rule that routes sessions to the language model. The session recommender scores the others.

    Args:
        budget: Share of the sessions of each part that is routed, 0 to 1: those with the highest uncertainty.
        threshold: Uncertainty, in nats, above which a session is routed; None uses the budget.
    """

    budget: float = 1.0
    threshold: float | None = None

    @property
    def routes_all(self) -> bool:
        """Whether all sessions are routed."""
        return self.threshold is None and self.budget >= 1

    @property
    def compares_sessions(self) -> bool:
        """Whether the choice depends on the uncertainty of the sessions."""
        return self.threshold is not None or 0 < self.budget < 1

    def choose(self, uncertainty_R: Tensor) -> Tensor:
        """Chooses the sessions that are routed.

        Args:
            uncertainty_R: From `uncertainty`; -inf for a session that must not be routed.

        Returns:
            Row numbers in ascending order, int64. Ties at the limit of the budget are in order of row number.
        """
        is_routable_R = uncertainty_R > -math.inf
        if self.threshold is not None:
            return torch.nonzero(is_routable_R & (uncertainty_R > self.threshold)).squeeze(1)
        count = min(math.ceil(self.budget * uncertainty_R.numel()), int(is_routable_R.sum()))
        order_R = torch.argsort(uncertainty_R, descending=True, stable=True)
        return order_R[:count].sort().values


ROUTE_ALL = Routing()


def uncertainty(scores_RK: Tensor) -> Tensor:
    """Entropy of the softmax over the scores of each ranked list, in nats.

    Args:
        scores_RK: Scores of the ranked lists; -inf pads shorter lists.

    Returns:
        Entropies, float32 [R]; -inf for an empty list.
    """
    log_p_RK = torch.log_softmax(scores_RK.double(), dim=1)
    p_RK = log_p_RK.exp()
    entropy_R = -(p_RK * log_p_RK.masked_fill(p_RK == 0, 0.0)).sum(dim=1).float()
    return entropy_R.masked_fill(scores_RK.isneginf().all(dim=1), -math.inf)
