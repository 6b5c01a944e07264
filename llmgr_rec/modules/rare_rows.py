"""Id rows of rare items: what clicks have not taught them, the rows of items of like words tell.

The id row of an item is learned from its clicks. With few of them it is mostly where it started, with none it knows
nothing, and a score by ids then ranks the item behind all that were clicked more, whatever its text says. So an item
of n training clicks takes the row (n * own + c * mean of its neighbours' rows) / (n + c): its own row counts as often
as it was clicked, its neighbours' as if that were c further clicks. An item without neighbours keeps its row; without
clicks as well it has a row of zeros, for what it learned is only not to be recommended.

Shapes: U items of a range, N neighbours, C columns of id rows.
"""

import torch
from torch import Tensor

# Neighbours of an item: chosen on validation sessions with the rest, see docs/results/item-text.md.
NEIGHBOURS = 10


def neighbour_weights(cosines_UN: Tensor) -> Tensor:
    """Shares of the neighbours in their mean, [U, N]: their squared cosines, made to add up to 1.

    Args:
        cosines_UN: Cosines of each item with its neighbours, 0 or more; 0 where it has fewer.

    Returns:
        Shares; all 0 for an item without neighbours.
    """
    squared_UN = cosines_UN.square()
    return squared_UN / squared_UN.sum(dim=1, keepdim=True).clamp(min=torch.finfo(squared_UN.dtype).tiny)


def draw_to_neighbours(
    rows_UC: Tensor, near_UNC: Tensor, weights_UN: Tensor, train_count_U: Tensor, clicks: float
) -> Tensor:
    """Rows of items drawn towards those of their neighbours, [U, C].

    Args:
        rows_UC: The items' own rows.
        near_UNC: Their neighbours' rows.
        weights_UN: Weights of the neighbours; all 0 where an item has none.
        train_count_U: Training clicks n of each item.
        clicks: Clicks c that the neighbours count for, above 0.
    """
    mean_UC = (near_UNC * weights_UN.unsqueeze(2)).sum(dim=1)
    share_U = clicks / (train_count_U + clicks) * (weights_UN.any(dim=1) | (train_count_U == 0))
    return torch.lerp(rows_UC, mean_UC, share_U.unsqueeze(1).to(rows_UC.dtype))
