"""Id rows of rare items: what clicks have not taught them, the rows of items of like text tell.

The id row of an item is learned from its clicks. With few of them it is mostly where it started, with none it is zero,
and a score by ids then ranks the item behind all that were clicked more, whatever its text says. So an item of n
training clicks takes the row (n * own + c * mean of its neighbours' rows) / (n + c): its own row counts as often as it
was clicked, its neighbours' as if that were c further clicks.

Shapes: V items, U items of a range, N neighbours, K columns of the text tower, C columns of id rows.
"""

import torch
from torch import Tensor

# Neighbours of an item: chosen on validation sessions with the rest, see docs/experiments.md.
NEIGHBOURS = 10


def text_neighbours(items_VK: Tensor, trained_V: Tensor, scale: float, own: range) -> tuple[Tensor, Tensor]:
    """The trained items whose texts are most like those of a range of items, by the text tower.

    Args:
        items_VK: Items' side of the tower, of length 1; zeros where an item has no text.
        trained_V: Items that have a training click, bool; others are nobody's neighbours.
        scale: Factor of the tower's cosine; neighbours are weighted by the softmax of what it gives.
        own: The items U that neighbours are wanted of; none is its own.

    Returns:
        Items, int64 [U, N], and their weights, [U, N], which add up to 1, or to 0 for an item without any.
    """
    own_U = torch.arange(own.start, own.stop, device=items_VK.device)
    has_text_V = items_VK.any(dim=1)
    cosines_UV = items_VK[own_U] @ items_VK.T
    cosines_UV.masked_fill_(~(trained_V & has_text_V), float("-inf"))
    cosines_UV[own_U - own.start, own_U] = float("-inf")
    best_UN, ids_UN = cosines_UV.topk(min(NEIGHBOURS, items_VK.shape[0]), dim=1)
    # Without a single neighbour the softmax is not a number.
    weights_UN = (best_UN * scale).softmax(dim=1).nan_to_num(0.0)
    return ids_UN, weights_UN * has_text_V[own_U].unsqueeze(1)


def draw_to_neighbours(
    rows_UC: Tensor, near_UNC: Tensor, weights_UN: Tensor, train_count_U: Tensor, clicks: float
) -> Tensor:
    """Rows of items drawn towards those of their neighbours, [U, C].

    Args:
        rows_UC: The items' own rows.
        near_UNC: Their neighbours' rows.
        weights_UN: Weights of the neighbours; an item whose weights are all 0 keeps its row.
        train_count_U: Training clicks n of each item.
        clicks: Clicks c that the neighbours count for, above 0.
    """
    mean_UC = (near_UNC * weights_UN.unsqueeze(2)).sum(dim=1)
    share_U = clicks / (train_count_U + clicks) * weights_UN.any(dim=1)
    return torch.lerp(rows_UC, mean_UC, share_U.unsqueeze(1).to(rows_UC.dtype))
