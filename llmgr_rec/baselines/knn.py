"""Baselines: popularity, item-kNN and session-kNN.

On sparse e-commerce data, nearest neighbors are often better than neural models (Ludewig and Jannach, arXiv
1803.09587).

Shapes: B sessions, L clicks of all sessions, V items, K length of a ranked list, S training sessions.
"""

import copy
from collections.abc import Iterable
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from llmgr_rec.baselines.item_similarity import cosine_similarity
from llmgr_rec.baselines.recency import recency_weights
from llmgr_rec.baselines.sparse_scores import Floats, Ints, blocks, high_products, order_in_rows, top_k
from llmgr_rec.data.popularity import by_popularity
from llmgr_rec.kernels.sparse_product import SparseProduct

DECAY = 0.7
# Maximum number of sparse scores in memory while sessions are ranked.
_BLOCK_SCORES = 4_000_000


@runtime_checkable
class Baseline(Protocol):
    """Interface of all baselines: ranks the catalog for a batch of sessions."""

    def rank(self, items_L: Ints, offsets_B1: Ints, k: int) -> tuple[Ints, Floats]:
        """Ranks the k best items of each session.

        Args:
            items_L: Item index of each click, oldest first, int64.
            offsets_B1: First click of each session, int64 [B + 1]; the last entry is L.
            k: Length K of the lists.

        Returns:
            Item indices, int64 [B, K], and scores, float64 [B, K], best first; ties are in order of item index. Lists
            are padded with -1 and -inf if the catalog has fewer than K items.
        """
        ...


class Popularity:
    """Ranks items by their number of training clicks, the same for all sessions."""

    def __init__(self, train_count_V: Ints, num_clicks: int | None = None) -> None:
        """Sorts the catalog.

        Args:
            train_count_V: Number of training clicks of each item.
            num_clicks: Number of clicks that scores are shares of; None takes their sum.
        """
        self._num_clicks = max(int(train_count_V.sum()), 1) if num_clicks is None else num_clicks
        self._train_count_V = train_count_V
        self._order_V = by_popularity(train_count_V)

    def rank(self, items_L: Ints, offsets_B1: Ints, k: int) -> tuple[Ints, Floats]:
        """See `Baseline.rank`; the score is the item's share of all training clicks."""
        sessions = len(offsets_B1) - 1
        ids = self._order_V[:k].astype(np.int64)
        ids_K = _padded(ids, k, -1)
        scores_K = _padded(self._train_count_V[ids] / self._num_clicks, k, -np.inf)
        return np.tile(ids_K, (sessions, 1)), np.tile(scores_K, (sessions, 1))

    def among(self, items_R: Ints) -> "Popularity":
        """See `RanksSome.among`; scores stay shares of the clicks on all items."""
        return Popularity(self._train_count_V[items_R], self._num_clicks)


@runtime_checkable
class Neighbors(Baseline, Protocol):
    """A baseline with sparse scores."""

    def scores(self, items_L: Ints, offsets_B1: Ints) -> sparse.csr_array:
        """Scores of the items for each session, sparse [B, V], with at most one entry an item."""
        ...


class ItemNeighbors:
    """Ranks items by their similarity to the clicked items, with an exponential decay from the last click.

    score(j) = sum over the clicks i of a session of decay^(number of clicks after i) * similarity(i, j).
    """

    def __init__(self, similarity_VV: sparse.csr_array, decay: float) -> None:
        """Stores the similarities.

        Args:
            similarity_VV: Similarity of clicked items (rows) and ranked items (columns), sparse.
            decay: Weight of a click relative to the click after it.
        """
        self.decay = decay
        self.similarity_VV = similarity_VV

    def scores(self, items_L: Ints, offsets_B1: Ints) -> sparse.csr_array:
        """Recency-weighted similarity of the items to the clicks of each session, sparse [B, V]."""
        weights_BV = recency_weights(items_L, offsets_B1, self.decay, self.similarity_VV.shape[0])
        return (weights_BV @ self.similarity_VV).tocsr()

    def rank(self, items_L: Ints, offsets_B1: Ints, k: int) -> tuple[Ints, Floats]:
        """See `Baseline.rank`; items without a sparse score have score 0."""
        weights_BV = recency_weights(items_L, offsets_B1, self.decay, self.similarity_VV.shape[0])
        return _rank_in_blocks(weights_BV, self._product, k)

    def among(self, items_R: Ints) -> "ItemNeighbors":
        """See `RanksSome.among`."""
        return ItemNeighbors(sparse.csr_array(self.similarity_VV[:, items_R]), self.decay)

    @cached_property
    def _product(self) -> SparseProduct:
        return SparseProduct(self.similarity_VV)


class ItemKNN(ItemNeighbors):
    """Item-kNN: cosine similarity of the items' vectors of training sessions (Sarwar et al., WWW 2001).

    The similarity of i and j is the number of training sessions with both, divided by the geometric mean of the numbers
    of sessions with i and with j. The similarity of an item to itself is 0.
    """

    def __init__(self, sessions_SV: sparse.csr_array, decay: float = DECAY, k_neighbors: int = 0) -> None:
        """Computes the similarities.

        Args:
            sessions_SV: 1 for each item of each training session, from `session_matrix`.
            decay: Weight of a click relative to the click after it.
            k_neighbors: Number of neighbors per item, which bounds the memory; 0 keeps all.
        """
        super().__init__(cosine_similarity(sessions_SV, k_neighbors), decay)


class SessionKNN:
    """Session-kNN: items of the most similar training sessions (V-SkNN, Ludewig and Jannach, arXiv 1803.09587).

    The similarity of a training session is the sum of decay^(number of clicks after i) over the clicks i whose items it
    contains, divided by the square root of its length. The score of an item is the sum of the similarities of the
    neighbors with it, times its inverse document frequency log(training sessions / training sessions with the item).
    """

    def __init__(self, sessions_SV: sparse.csr_array, k_neighbors: int = 500, decay: float = DECAY) -> None:
        """Indexes the training sessions.

        Args:
            sessions_SV: 1 for each item of each training session, from `session_matrix`.
            k_neighbors: Number of neighbor sessions; of equally similar ones, the later.
            decay: Weight of a click relative to the click after it.
        """
        self.k_neighbors = k_neighbors
        self.decay = decay
        self._sessions_SV = sessions_SV
        lengths_S = np.maximum(np.diff(sessions_SV.indptr), 1)
        count_V = np.maximum(np.bincount(sessions_SV.indices, minlength=sessions_SV.shape[1]), 1)
        self._normalized_VS = (sparse.diags_array(lengths_S**-0.5) @ sessions_SV).T.tocsr()
        self._weighted_SV = (sessions_SV @ sparse.diags_array(np.log(sessions_SV.shape[0] / count_V))).tocsr()

    def scores(self, items_L: Ints, offsets_B1: Ints) -> sparse.csr_array:
        """Scores of the items of the neighbor sessions, sparse [B, V]."""
        weights_BV = recency_weights(items_L, offsets_B1, self.decay, self._sessions_SV.shape[1])
        similarity_BS = sparse.coo_array(weights_BV @ self._normalized_VS)
        rows, columns = similarity_BS.coords
        order, ranks = order_in_rows(rows, -columns, np.round(similarity_BS.data, 12))
        top = order[ranks < self.k_neighbors]
        neighbors_BS = sparse.csr_array((similarity_BS.data[top], (rows[top], columns[top])), shape=similarity_BS.shape)
        return (neighbors_BS @ self._weighted_SV).tocsr()

    def rank(self, items_L: Ints, offsets_B1: Ints, k: int) -> tuple[Ints, Floats]:
        """See `Baseline.rank`; items without a sparse score have score 0."""
        additions_V = np.diff(self._normalized_VS.indptr)
        additions_B = np.diff(np.concatenate([[0], np.cumsum(additions_V[items_L])])[offsets_B1])
        lists = []
        for start, stop in blocks(additions_B, _BLOCK_SCORES):
            clicks = slice(offsets_B1[start], offsets_B1[stop])
            scores_BV = self.scores(items_L[clicks], offsets_B1[start : stop + 1] - offsets_B1[start])
            lists.append(top_k(scores_BV, k))
        return _concatenated(lists)

    def among(self, items_R: Ints) -> "SessionKNN":
        """See `RanksSome.among`."""
        chosen = copy.copy(self)
        chosen._weighted_SV = sparse.csr_array(self._weighted_SV[:, items_R])
        return chosen


def session_matrix(sessions: Iterable[tuple[Ints, Ints]], num_items: int) -> sparse.csr_array:
    """Builds the binary session-item matrix.

    Args:
        sessions: Batches of (items_L, offsets_B1), each session with its target as the last click.
        num_items: Number of items V of the catalog.

    Returns:
        Sparse matrix [S, V] with 1 for each item of each session, also for repeated items.
    """
    items, lengths = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for items_L, offsets_B1 in sessions:
        items.append(items_L)
        lengths.append(np.diff(offsets_B1))
    columns = np.concatenate(items)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    matrix = sparse.csr_array((np.ones(len(columns)), columns, offsets), shape=(len(offsets) - 1, num_items))
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return matrix


def _rank_in_blocks(weights_BV: sparse.csr_array, similarity: SparseProduct, k: int) -> tuple[Ints, Floats]:
    """Ranks blocks of sessions with a bounded number of scores.

    Args:
        weights_BV: Weights of the clicked items.
        similarity: Similarity of clicked and ranked items.
        k: Length K of the lists.
    """
    lists = []
    for start, stop in blocks(np.minimum(similarity.additions(weights_BV), similarity.width), _BLOCK_SCORES):
        lists.append(top_k(high_products(similarity, weights_BV[start:stop], k), k))
    return _concatenated(lists)


def _concatenated(lists: list[tuple[Ints, Floats]]) -> tuple[Ints, Floats]:
    ids, scores = zip(*lists, strict=True)
    return np.concatenate(ids), np.concatenate(scores)


def _padded(values: NDArray, length: int, fill: float) -> NDArray:
    return np.pad(values, (0, length - len(values)), constant_values=fill)
