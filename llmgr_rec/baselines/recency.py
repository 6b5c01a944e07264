"""How much each click of a session counts.

Shapes: B sessions, L clicks, V items.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import sparse


def recency_weights(
    items_L: NDArray[np.int64], offsets_B1: NDArray[np.int64], decay: float, num_items: int
) -> sparse.csr_array:
    """decay^(clicks after it) for each click, [B, V]."""
    after_L = np.repeat(offsets_B1[1:], np.diff(offsets_B1)) - 1 - np.arange(len(items_L))
    return sparse.csr_array((decay**after_L, items_L, offsets_B1), shape=(len(offsets_B1) - 1, num_items))
