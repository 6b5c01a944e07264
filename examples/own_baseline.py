"""A baseline of your own: docs/extending/baseline.md explains it.

    python -m llmgr_rec.train --dataset DATASET --output RUN --blend.neighbors [examples.own_baseline:CoOccurrence]

Shapes: S training sessions, V items.
"""

from llmgr_rec import Catalog, Dataset
from llmgr_rec.baselines.builders import training_matrix
from llmgr_rec.baselines.knn import DECAY, ItemNeighbors


class CoOccurrence(ItemNeighbors):
    """The similarity of two items is the number of training sessions that have both."""

    def __init__(self, dataset: Dataset, catalog: Catalog, k_neighbors: int | None) -> None:
        sessions_SV = training_matrix(dataset, catalog.num_items)
        counts_VV = (sessions_SV.T @ sessions_SV).tocsr()
        counts_VV.setdiag(0)
        counts_VV.eliminate_zeros()
        super().__init__(counts_VV, decay=DECAY)
