"""kNN smoothing of cold items: averages the id embeddings of rarely clicked items with those of their text neighbors.

The id embedding of an item with few training clicks is close to its initial value, so the item ranks behind items with
more clicks, whatever its text. Smoothing with strength c gives an item with n training clicks the embedding

    (n * embedding + c * weighted mean of the neighbors' embeddings) / (n + c)

so that the neighbors count like c more clicks. An item without neighbors keeps its embedding if it has clicks. Without
clicks, it gets a zero embedding, because training has only pushed its score down as a negative.

Shapes: U items of a range, N neighbors, C columns of the id table.
"""

import torch
from torch import Tensor

# Neighbors per item, selected on validation sessions: docs/results/item-text.md.
K_NEIGHBORS = 10


def neighbor_weights(cosines_UN: Tensor) -> Tensor:
    """Weights of the neighbors in their mean: squared cosines, normalized to sum 1 per item.

    Args:
        cosines_UN: Cosine similarity of each item and its neighbors, 0 or more; 0 pads items with fewer neighbors.

    Returns:
        Weights [U, N]; all 0 for an item without neighbors.
    """
    squared_UN = cosines_UN.square()
    return squared_UN / squared_UN.sum(dim=1, keepdim=True).clamp(min=torch.finfo(squared_UN.dtype).tiny)


def neighbor_share(has_neighbors_U: Tensor, train_count_U: Tensor, strength: float) -> Tensor:
    """Share of the neighbors in the smoothed embedding of each item, 0 to 1, [U].

    Args:
        has_neighbors_U: Whether the item has neighbors.
        train_count_U: Number n of training clicks of each item.
        strength: Smoothing strength c in clicks, above 0.
    """
    return strength / (train_count_U + strength) * (has_neighbors_U | (train_count_U == 0))


def smooth_rows(
    rows_UC: Tensor, neighbor_rows_UNC: Tensor, weights_UN: Tensor, train_count_U: Tensor, strength: float
) -> Tensor:
    """Averages the embeddings of items with those of their neighbors.

    Args:
        rows_UC: Embeddings of the items.
        neighbor_rows_UNC: Embeddings of their neighbors.
        weights_UN: Weights of the neighbors, from `neighbor_weights`.
        train_count_U: Number n of training clicks of each item.
        strength: Smoothing strength c in clicks, above 0.

    Returns:
        Smoothed embeddings, [U, C].
    """
    mean_UC = (neighbor_rows_UNC * weights_UN.unsqueeze(2)).sum(dim=1)
    share_U = neighbor_share(weights_UN.any(dim=1), train_count_U, strength)
    return torch.lerp(rows_UC, mean_UC, share_U.unsqueeze(1).to(rows_UC.dtype))
