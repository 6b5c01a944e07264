"""Who is read by the language model: the sessions of which the session recommender is least sure.

Shapes: R sessions, K places of a ranked list.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Governor:
    """What the language model reads.

    Args:
        budget: Share of each part's sessions that it reads, 0 to 1.
        threshold: Uncertainty above which it reads a session, in nats; None goes by the budget.
    """

    budget: float = 1.0
    threshold: float | None = None

    @property
    def reads_all(self) -> bool:
        """Whether there is nothing to choose."""
        return self.threshold is None and self.budget >= 1

    def choose(self, uncertainty_R: Tensor) -> Tensor:
        """The sessions to read, in rising order.

        Args:
            uncertainty_R: From `uncertainty`; -inf where a session is not to be read in any case.

        Returns:
            Row numbers. Of equally uncertain sessions at the edge of the budget, the earlier ones.
        """
        possible = uncertainty_R > -math.inf
        if self.threshold is not None:
            return torch.nonzero(possible & (uncertainty_R > self.threshold)).squeeze(1)
        count = min(math.ceil(self.budget * uncertainty_R.numel()), int(possible.sum()))
        order_R = torch.argsort(uncertainty_R, descending=True, stable=True)
        return order_R[:count].sort().values


READ_ALL = Governor()


def uncertainty(scores_RK: Tensor) -> Tensor:
    """How unsure a ranking is: the entropy of the softmax over the scores of its list, in nats, [R].

    Args:
        scores_RK: Scores of the ranked lists, best first; -inf where a list is shorter.

    Returns:
        Entropies; -inf of a list without items, of which there is nothing to be unsure.
    """
    log_shares_RK = torch.log_softmax(scores_RK.double(), dim=1)
    shares_RK = log_shares_RK.exp()
    entropy_R = -(shares_RK * log_shares_RK.masked_fill(shares_RK == 0, 0.0)).sum(dim=1).float()
    return entropy_R.masked_fill(scores_RK.isneginf().all(dim=1), -math.inf)
