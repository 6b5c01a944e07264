"""Sessions made up from a catalog, for what has to be measured where no log is at hand.

Shapes: V items of the catalog.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from llmgr_rec.baselines.blend import Blend
from llmgr_rec.data.jagged import Jagged

_LONGEST = 8


def sample_sessions(train_count_V: NDArray[np.int64], blend: Blend | None, count: int) -> Jagged:
    """Sessions of 1 to 8 clicks: from an item to one of its neighbors where there are any, otherwise to any item.

    Args:
        train_count_V: Training clicks of each item, by which items are drawn.
        blend: Has the neighbors, which are drawn by their similarity.
        count: Number of sessions.

    Returns:
        Item indices, oldest click first, one row a session; always the same.
    """
    generator = np.random.default_rng(0)
    shares_V = (train_count_V + 1) / (train_count_V + 1).sum()
    items = generator.choice(len(shares_V), (count, _LONGEST), p=shares_V)
    lengths = generator.integers(1, _LONGEST + 1, count)
    if blend is not None:
        similarity = blend.similarity_VR
        for session in items:
            for click in range(1, _LONGEST):
                row = slice(*similarity.indptr[session[click - 1] : session[click - 1] + 2])
                weights = similarity.data[row]
                if weights.sum() > 0:
                    session[click] = generator.choice(similarity.indices[row], p=weights / weights.sum())
    values = np.concatenate([session[:length] for session, length in zip(items, lengths, strict=True)])
    return Jagged.from_lengths(torch.from_numpy(values), torch.from_numpy(lengths))
