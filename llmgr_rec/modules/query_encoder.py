"""Queries of sessions from the vectors of all items, which ranking keeps in memory: no lookup in the item tables.

A score by the cosine needs item vectors of length 1, and the encoder needs them as they are. The former are kept with
their lengths, so vectors of nodes differ from those of a lookup by rounding.

Shapes: B sessions, N nodes or other items, C items of a lookup, V items of the catalog, D = d1 columns.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.modules.normalize import divisors
from llmgr_rec.modules.recommender import SessionRecommender


@dataclass(frozen=True)
class QueryItems:
    """Vectors of all items of the catalog.

    Args:
        items_VD: Vectors as the scores need them.
        lengths_V1: What each is multiplied by for the encoder; None leaves them as they are.
    """

    items_VD: Tensor
    lengths_V1: Tensor | None

    def select(self, items_N: Tensor) -> Tensor:
        """Vectors of some items as the encoder needs them, [N, D].

        Args:
            items_N: Item indices.
        """
        vectors_ND = self.items_VD.index_select(0, items_N)
        return vectors_ND if self.lengths_V1 is None else vectors_ND * self.lengths_V1.index_select(0, items_N)


class QueryEncoder:
    """Encodes sessions without looking up a table and, where the encoder can, without products of items and weights.

    Args:
        model: A recommender without a text encoder; its weights must not change afterwards.
        items: Vectors of all items with these weights.
    """

    def __init__(self, model: SessionRecommender, items: QueryItems) -> None:
        self._model = model
        self._items = items
        self._prepared: Any = None
        if model.encoder.can_prepare(items.items_VD.shape[0]):
            vectors_VD = items.items_VD if items.lengths_V1 is None else items.items_VD * items.lengths_V1
            with torch.no_grad():
                self._prepared = model.encoder.prepare_items(vectors_VD)

    @torch.no_grad()
    def queries(self, graph: SessionGraph) -> Tensor:
        """The queries that `SessionRecommender.queries` computes in eval mode, [B, D].

        Args:
            graph: The sessions' graphs.
        """
        nodes_ND = self._items.select(graph.node_items_N)
        if self._prepared is None:
            return self._model.encoder_queries(nodes_ND, graph)
        return self._model.as_query(self._model.encoder.encode_prepared(self._prepared, nodes_ND, graph))


class MeasuredItems:
    """Item vectors of a recommender, whose lengths before normalization are collected.

    Args:
        model: The recommender.
        num_items: Number of items V, whose vectors are then asked for in order.
    """

    def __init__(self, model: SessionRecommender, num_items: int) -> None:
        self._model = model
        self._num_items = num_items
        self._lengths_V1: Tensor | None = None
        self._measured = 0

    def item_vectors(self, features: KeyedJaggedTensor) -> Tensor:
        """Item vectors, [C, D], as of the model.

        Args:
            features: A bag for each item.
        """
        rows = self._model.rows(features)
        if self._model.score == "cosine":
            self._collect(divisors(rows.vectors_XD))
        return self._model.as_items(rows)

    def lengths(self) -> Tensor | None:
        """Lengths of the item vectors that were computed, [V, 1]; None if these are not normalized."""
        return self._lengths_V1

    def _collect(self, lengths_C1: Tensor) -> None:
        if self._lengths_V1 is None:
            # Small tensors that stay between large ones that are freed would leave holes in the memory.
            self._lengths_V1 = lengths_C1.new_empty(self._num_items, 1)
        self._lengths_V1[self._measured : self._measured + len(lengths_C1)] = lengths_C1
        self._measured += len(lengths_C1)
