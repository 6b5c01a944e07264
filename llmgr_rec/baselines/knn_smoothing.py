"""kNN smoothing of cold items: id rows of rarely clicked items are averaged with those of items with similar words.

The id row of an item is learned from its clicks. With few of them it stays close to its initial value, and a score by
ids ranks the item behind those with more clicks, whatever its text says. Smoothing of strength c therefore gives an
item of n training clicks the row

    (n * own + c * mean of its neighbors' rows) / (n + c)

so the neighbors count like c further clicks. An item without neighbors keeps its row; one without clicks as well gets
a row of zeros, because all that it learned is not to be recommended.

Shapes: U items of a range, N neighbors, C columns of id rows.
"""

import torch
from torch import Tensor

# Neighbors of an item, chosen on validation sessions: docs/results/item-text.md.
K_NEIGHBORS = 10


def neighbor_weights(cosines_UN: Tensor) -> Tensor:
    """Shares of the neighbors in their mean, [U, N]: their squared cosines, normalized to sum to 1.

    Args:
        cosines_UN: Cosines of each item with its neighbors, 0 or more; 0 where it has fewer.

    Returns:
        Shares; all 0 for an item without neighbors.
    """
    squared_UN = cosines_UN.square()
    return squared_UN / squared_UN.sum(dim=1, keepdim=True).clamp(min=torch.finfo(squared_UN.dtype).tiny)


def smooth_rows(
    rows_UC: Tensor, near_UNC: Tensor, weights_UN: Tensor, train_count_U: Tensor, strength: float
) -> Tensor:
    """Averages the rows of items with those of their neighbors, [U, C].

    Args:
        rows_UC: The items' own rows.
        near_UNC: Their neighbors' rows.
        weights_UN: Weights of the neighbors; all 0 where an item has none.
        train_count_U: Training clicks n of each item.
        strength: Clicks c that the neighbors count for, above 0.
    """
    mean_UC = (near_UNC * weights_UN.unsqueeze(2)).sum(dim=1)
    share_U = strength / (train_count_U + strength) * (weights_UN.any(dim=1) | (train_count_U == 0))
    return torch.lerp(rows_UC, mean_UC, share_U.unsqueeze(1).to(rows_UC.dtype))
