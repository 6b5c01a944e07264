"""Recommenders without training: popularity, item-kNN and session-kNN.

Nearest neighbors often rank better on sparse shop data than plain neural models, so every table of results has them.

Shapes: B sessions, L clicks (sum of session lengths), V items, K places, S training sessions.
"""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from llmgr_rec.baselines.recency import recency_weights
from llmgr_rec.baselines.sparse_scores import (
    Floats,
    Ints,
    blocks,
    cosine_similarity,
    order_in_rows,
    top_k,
)

DECAY = 0.7
# Most scores that are held at once while sessions are ranked.
_BLOCK_SCORES = 4_000_000


@runtime_checkable
class Baseline(Protocol):
    """Anything that ranks the catalog for a batch of sessions."""

    def rank(self, items_L: Ints, offsets_B1: Ints, k: int) -> tuple[Ints, Floats]:
        """Returns the k best items of each session with their scores; ties go to the lower index, -1 fills up."""
        ...


class Popularity:
    """The same list for everyone: items by number of training interactions."""

    def __init__(self, train_count_V: Ints) -> None:
        """Orders the catalog.

        Args:
            train_count_V: Training interactions of each item.
        """
        self._order_V = np.argsort(-train_count_V, kind="stable")
        self._share_V = train_count_V[self._order_V] / max(int(train_count_V.sum()), 1)

    def rank(self, items_L: Ints, offsets_B1: Ints, k: int) -> tuple[Ints, Floats]:
        """Ranks by training interactions; a score is the item's share of all of them."""
        sessions = len(offsets_B1) - 1
        ids_K = _padded(self._order_V[:k], k, -1)
        scores_K = _padded(self._share_V[:k], k, -np.inf)
        return np.tile(ids_K, (sessions, 1)), np.tile(scores_K, (sessions, 1))


@runtime_checkable
class Neighbors(Baseline, Protocol):
    """A baseline that scores items."""

    def scores(self, items_L: Ints, offsets_B1: Ints) -> sparse.csr_array:
        """Scores of each session's items, [B, V]; absent ones are 0."""
        ...


class ItemNeighbors:
    """Ranks by how like the clicked items an item is, recent clicks counting more.

    score(j) = sum over the clicks i of a session of decay^(clicks after i) * similarity(i, j).
    """

    def __init__(self, similarity_VV: sparse.csr_array, decay: float) -> None:
        """Takes the similarities.

        Args:
            similarity_VV: Row i holds how like item i the other items are; absent ones are 0.
            decay: Weight of a click relative to the click after it.
        """
        self.decay = decay
        self.similarity_VV = similarity_VV

    def scores(self, items_L: Ints, offsets_B1: Ints) -> sparse.csr_array:
        """Recency-weighted similarity of every item to the session's clicks, [B, V]; unrelated items are absent."""
        weights_BV = recency_weights(items_L, offsets_B1, self.decay, self.similarity_VV.shape[0])
        return (weights_BV @ self.similarity_VV).tocsr()

    def rank(self, items_L: Ints, offsets_B1: Ints, k: int) -> tuple[Ints, Floats]:
        """Ranks by `scores`; unrelated items score 0."""
        return _rank_in_blocks(self, items_L, offsets_B1, np.diff(self.similarity_VV.indptr), k)


class ItemKNN(ItemNeighbors):
    """Cosine of co-occurrence in training sessions.

    The similarity of i and j is the number of training sessions with both over the geometric mean of the numbers with
    each; that of an item with itself is left out.
    """

    def __init__(self, sessions_SV: sparse.csr_array, decay: float = DECAY, k_neighbors: int = 0) -> None:
        """Computes the similarities.

        Args:
            sessions_SV: 1 where a training session holds an item, from `session_matrix`.
            decay: Weight of a click relative to the click after it.
            k_neighbors: Most similar items kept for each item, which bounds the memory; 0 keeps all.
        """
        super().__init__(cosine_similarity(sessions_SV, k_neighbors), decay)


class SessionKNN:
    """Items of the training sessions most like this one (V-SkNN, Ludewig and Jannach, arXiv 1803.09587).

    The likeness of a training session is the sum of decay^(clicks after i) over the clicks i that it shares, over the
    square root of its length. An item scores the sum of the likenesses of the sessions with it, times its inverse
    document frequency log(training sessions / sessions with it).
    """

    def __init__(self, sessions_SV: sparse.csr_array, k_neighbors: int = 500, decay: float = DECAY) -> None:
        """Indexes the training sessions.

        Args:
            sessions_SV: 1 where a training session holds an item, from `session_matrix`.
            k_neighbors: Most similar training sessions that count (ties: the later session).
            decay: Weight of a click relative to the click after it.
        """
        self.k_neighbors = k_neighbors
        self.decay = decay
        self._sessions_SV = sessions_SV
        lengths_S = np.maximum(np.diff(sessions_SV.indptr), 1)
        count_V = np.maximum(np.bincount(sessions_SV.indices, minlength=sessions_SV.shape[1]), 1)
        self._like_VS = (sparse.diags_array(lengths_S**-0.5) @ sessions_SV).T.tocsr()
        self._weighted_SV = (sessions_SV @ sparse.diags_array(np.log(sessions_SV.shape[0] / count_V))).tocsr()

    def scores(self, items_L: Ints, offsets_B1: Ints) -> sparse.csr_array:
        """Score of every item, [B, V]; items of no neighbor are absent."""
        weights_BV = recency_weights(items_L, offsets_B1, self.decay, self._sessions_SV.shape[1])
        like_BS = sparse.coo_array(weights_BV @ self._like_VS)
        rows, columns = like_BS.coords
        order, place = order_in_rows(rows, -columns, np.round(like_BS.data, 12))
        kept = order[place < self.k_neighbors]
        nearest_BS = sparse.csr_array((like_BS.data[kept], (rows[kept], columns[kept])), shape=like_BS.shape)
        return (nearest_BS @ self._weighted_SV).tocsr()

    def rank(self, items_L: Ints, offsets_B1: Ints, k: int) -> tuple[Ints, Floats]:
        """Ranks by `scores`; other items score 0."""
        return _rank_in_blocks(self, items_L, offsets_B1, np.diff(self._like_VS.indptr), k)


def session_matrix(sessions: Iterable[tuple[Ints, Ints]], num_items: int) -> sparse.csr_array:
    """Gathers training sessions into one sparse matrix of zeros and ones.

    Args:
        sessions: Batches of (items_L, offsets_B1), each session with its target as the last click.
        num_items: Items in the catalog.

    Returns:
        Matrix [S, V]; an item clicked twice in a session still counts 1.
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


def _rank_in_blocks(
    baseline: Neighbors, items_L: Ints, offsets_B1: Ints, entries_V: Ints, k: int
) -> tuple[Ints, Floats]:
    """Ranks as many sessions at a time as memory allows, where a click on an item costs `entries_V` entries."""
    is_empty_B = np.diff(offsets_B1) == 0
    entries_B = np.where(is_empty_B, 0, np.add.reduceat(np.append(entries_V[items_L], 0), offsets_B1[:-1]))
    found = []
    for start, stop in blocks(entries_B, _BLOCK_SCORES):
        clicks = slice(offsets_B1[start], offsets_B1[stop])
        scores_BV = baseline.scores(items_L[clicks], offsets_B1[start : stop + 1] - offsets_B1[start])
        found.append(top_k(scores_BV, k))
    return np.concatenate([ids for ids, _ in found]), np.concatenate([scores for _, scores in found])


def _padded(values: NDArray, length: int, fill: float) -> NDArray:
    return np.pad(values, (0, length - len(values)), constant_values=fill)
