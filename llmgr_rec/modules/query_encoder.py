"""Queries of many sessions by a recommender whose weights stay: what depends on an item alone is computed once.

Shapes: B sessions, V items of the catalog, D = d1 columns.
"""

import torch
from torch import Tensor

from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.modules.recommender import SessionRecommender


class QueryEncoder:
    """Encodes sessions without looking up a table, and without the products of item vectors and weights.

    Args:
        model: A recommender without a text encoder; its weights must not change afterwards.
        items_VD: Item vectors of the whole catalog, from `SessionRecommender.rows`.
    """

    def __init__(self, model: SessionRecommender, items_VD: Tensor) -> None:
        self._model = model
        with torch.no_grad():
            self._prepared = model.encoder.prepare_items(items_VD)

    @torch.no_grad()
    def queries(self, graph: SessionGraph) -> Tensor:
        """The queries that `SessionRecommender.queries` computes in eval mode, [B, D].

        Args:
            graph: The sessions' graphs.
        """
        return self._model.as_query(self._model.encoder.encode_prepared(self._prepared, graph))
