"""Queries of sessions from the vectors of all items, which ranking keeps in memory: no lookup in the item tables.

Shapes: B sessions, N nodes, C items, V items of the catalog, D columns of item vectors.
"""

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from llmgr_rec.data.graph import build_graphs
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.ranking import CatalogRanker, RankingModel
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.normalize import divisors
from llmgr_rec.modules.recommender import SessionRecommender


class SessionQueries:
    """A session recommender without a language model, with a ranker of the catalog that has the item vectors.

    A score by the cosine needs item vectors of length 1, and the encoder needs them as they are. Both are kept as the
    former and their lengths, so vectors of nodes differ from those of a lookup by rounding.

    Args:
        ranking: The model with its collator and blend; see `supports`.

    Attributes:
        ranker: Ranks the catalog for queries.
    """

    def __init__(self, ranking: RankingModel) -> None:
        assert isinstance(ranking.model, SessionRecommender)
        self._model = ranking.model
        self._num_items = ranking.collate.num_items
        measured = _Measured(ranking.model)
        self.ranker = CatalogRanker(measured, ranking.collate, World.alone(), ranking.blend)
        self._lengths_V1 = torch.cat(measured.lengths) if ranking.model.score == "cosine" else None

    @staticmethod
    def supports(model: SessionRecommender | LLMGR) -> bool:
        """Whether the queries of a model depend on item vectors alone."""
        return isinstance(model, SessionRecommender) and model.text_encoder is None

    def __call__(self, clicks: Jagged) -> Tensor:
        """Query of each session, [B, D].

        Args:
            clicks: Item indices of each session, oldest first.
        """
        device = self.ranker.item_vectors.device
        graph = build_graphs(clicks.values, clicks.offsets, self._num_items).to(device)
        nodes_ND = self.ranker.item_vectors.index_select(0, graph.node_items_N)
        if self._lengths_V1 is not None:
            nodes_ND = nodes_ND * self._lengths_V1.index_select(0, graph.node_items_N)
        return self._model.encoder_queries(nodes_ND, graph)


class _Measured:
    """Item vectors of a model, whose lengths before normalization are collected."""

    def __init__(self, model: SessionRecommender) -> None:
        self._model = model
        self.lengths: list[Tensor] = []

    def item_vectors(self, features: KeyedJaggedTensor) -> Tensor:
        """Item vectors, [C, D], as of the model."""
        rows = self._model.rows(features)
        self.lengths.append(divisors(rows.vectors_XD))
        return self._model.as_items(rows)
