"""Which sessions are routed to the language model: those of which the session recommender is least sure.

Shapes: R sessions, K places of a ranked list.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Which sessions the language model encodes; the session recommender answers the others.

    Args:
        budget: Share of each part's sessions, 0 to 1.
        threshold: Uncertainty in nats above which a session is routed; None goes by the budget.
    """

    budget: float = 1.0
    threshold: float | None = None

    @property
    def routes_all(self) -> bool:
        """Whether every session is routed to the language model."""
        return self.threshold is None and self.budget >= 1

    @property
    def compares_sessions(self) -> bool:
        """Whether the choice depends on the sessions' uncertainty."""
        return self.threshold is not None or 0 < self.budget < 1

    def choose(self, uncertainty_R: Tensor) -> Tensor:
        """Chooses the sessions that are routed, in rising order.

        Args:
            uncertainty_R: From `uncertainty`; -inf where a session must not be routed.

        Returns:
            Row numbers. Of equally uncertain sessions at the edge of the budget, the earlier ones.
        """
        possible = uncertainty_R > -math.inf
        if self.threshold is not None:
            return torch.nonzero(possible & (uncertainty_R > self.threshold)).squeeze(1)
        count = min(math.ceil(self.budget * uncertainty_R.numel()), int(possible.sum()))
        order_R = torch.argsort(uncertainty_R, descending=True, stable=True)
        return order_R[:count].sort().values


ROUTE_ALL = Routing()


def uncertainty(scores_RK: Tensor) -> Tensor:
    """Entropy of the softmax over the scores of each list, in nats, [R].

    Args:
        scores_RK: Scores of the ranked lists, best first; -inf where a list is shorter.

    Returns:
        Entropies; -inf for a list without items.
    """
    log_shares_RK = torch.log_softmax(scores_RK.double(), dim=1)
    shares_RK = log_shares_RK.exp()
    entropy_R = -(shares_RK * log_shares_RK.masked_fill(shares_RK == 0, 0.0)).sum(dim=1).float()
    return entropy_R.masked_fill(scores_RK.isneginf().all(dim=1), -math.inf)
