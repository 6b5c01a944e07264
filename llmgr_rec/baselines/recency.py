"""Recency weights of the clicks of a session.

Shapes: B sessions, L clicks, V items.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import sparse


def recency_weights(
    items_L: NDArray[np.int64], offsets_B1: NDArray[np.int64], decay: float, num_items: int
) -> sparse.csr_array:
    """Weight decay^(number of later clicks) of each click, as a sparse matrix of sessions and clicked items.

    Args:
        items_L: Item index of each click, oldest first.
        offsets_B1: First click of each session, [B + 1]; the last entry is L.
        decay: Weight of a click relative to the click after it.
        num_items: Number of items V.

    Returns:
        Sparse matrix [B, V]; a repeated item has one entry per click.
    """
    after_L = np.repeat(offsets_B1[1:], np.diff(offsets_B1)) - 1 - np.arange(len(items_L))
    return sparse.csr_array((decay**after_L, items_L, offsets_B1), shape=(len(offsets_B1) - 1, num_items))
