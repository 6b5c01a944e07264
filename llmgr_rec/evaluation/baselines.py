"""Recommenders without training: popularity, item-kNN and session-kNN.

Neighbours are often stronger on sparse shop data than plain neural models, so they stand beside every table.

Shapes: B sessions, L clicks (sum of session lengths), V items, K places, S training sessions, U items of one block.
"""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

DECAY = 0.7
# Most co-occurring pairs that are held at once while the similarities are computed, in pairs (12 bytes each).
_BLOCK_PAIRS = 20_000_000
# Most scores that are held at once while sessions are ranked.
_BLOCK_SCORES = 4_000_000


class Baseline(Protocol):
    """Anything that ranks the catalogue for a batch of sessions."""

    def rank(self, items_L: Ints, offsets_B1: Ints, k: int) -> tuple[Ints, Floats]:
        """Returns the k best items of each session with their scores; ties go to the lower index, -1 fills up."""
        ...


class Popularity:
    """The same list for everyone: items by number of training interactions."""

    def __init__(self, train_count_V: Ints) -> None:
        """Orders the catalogue.

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


class Neighbours(Baseline, Protocol):
    """A baseline that scores items."""

    def scores(self, items_L: Ints, offsets_B1: Ints) -> sparse.csr_array:
        """Scores of each session's items, [B, V]; absent ones are 0."""
        ...


class ItemKNN:
    """Cosine of co-occurrence in training sessions, recent clicks counting more.

    score(j) = sum over the clicks i of a session of decay^(clicks after i) * cos(i, j), where cos(i, j) is the number
    of training sessions with both items over the geometric mean of the numbers with each, and cos(i, i) is left out.
    """

    def __init__(self, sessions_SV: sparse.csr_array, decay: float = DECAY, neighbours: int = 0) -> None:
        """Computes the similarities.

        Args:
            sessions_SV: 1 where a training session holds an item, from `session_matrix`.
            decay: Weight of a click relative to the click after it.
            neighbours: Most similar items kept for each item, which bounds the memory; 0 keeps all.
        """
        self.decay = decay
        self.similarity_VV = cosine_similarity(sessions_SV, neighbours)

    def scores(self, items_L: Ints, offsets_B1: Ints) -> sparse.csr_array:
        """Recency-weighted similarity of every item to the session's clicks, [B, V]; unrelated items are absent."""
        weights_BV = _recency_weights(items_L, offsets_B1, self.decay, self.similarity_VV.shape[0])
        return (weights_BV @ self.similarity_VV).tocsr()

    def rank(self, items_L: Ints, offsets_B1: Ints, k: int) -> tuple[Ints, Floats]:
        """Ranks by `scores`; unrelated items score 0."""
        lengths_B = np.diff(offsets_B1)
        neighbours_B = np.add.reduceat(np.append(np.diff(self.similarity_VV.indptr)[items_L], 0), offsets_B1[:-1]) * (
            lengths_B > 0
        )
        return _rank_in_blocks(self, items_L, offsets_B1, _blocks(neighbours_B, _BLOCK_SCORES), k)


class SessionKNN:
    """Items of the training sessions most like this one (V-SkNN, Ludewig and Jannach, arXiv 1803.09587).

    The likeness of a training session is the sum of decay^(clicks after i) over the clicks i that it shares, over the
    square root of its length. An item scores the sum of the likenesses of the sessions with it, times its inverse
    document frequency log(training sessions / sessions with it).
    """

    def __init__(self, sessions_SV: sparse.csr_array, neighbours: int = 500, decay: float = DECAY) -> None:
        """Indexes the training sessions.

        Args:
            sessions_SV: 1 where a training session holds an item, from `session_matrix`.
            neighbours: Most similar training sessions that count (ties: the later session).
            decay: Weight of a click relative to the click after it.
        """
        self.neighbours = neighbours
        self.decay = decay
        self._sessions_SV = sessions_SV
        lengths_S = np.maximum(np.diff(sessions_SV.indptr), 1)
        count_V = np.maximum(np.bincount(sessions_SV.indices, minlength=sessions_SV.shape[1]), 1)
        self._like_VS = (sparse.diags_array(lengths_S**-0.5) @ sessions_SV).T.tocsr()
        self._weighted_SV = (sessions_SV @ sparse.diags_array(np.log(sessions_SV.shape[0] / count_V))).tocsr()

    def scores(self, items_L: Ints, offsets_B1: Ints) -> sparse.csr_array:
        """Score of every item, [B, V]; items of no neighbour are absent."""
        weights_BV = _recency_weights(items_L, offsets_B1, self.decay, self._sessions_SV.shape[1])
        like_BS = sparse.coo_array(weights_BV @ self._like_VS)
        rows, columns = like_BS.coords
        order, place = _order_in_rows(rows, -columns, np.round(like_BS.data, 12))
        kept = order[place < self.neighbours]
        nearest_BS = sparse.csr_array((like_BS.data[kept], (rows[kept], columns[kept])), shape=like_BS.shape)
        return (nearest_BS @ self._weighted_SV).tocsr()

    def rank(self, items_L: Ints, offsets_B1: Ints, k: int) -> tuple[Ints, Floats]:
        """Ranks by `scores`; other items score 0."""
        sharing_L = np.diff(self._like_VS.indptr)[items_L]
        sharing_B = np.add.reduceat(np.append(sharing_L, 0), offsets_B1[:-1]) * (np.diff(offsets_B1) > 0)
        return _rank_in_blocks(self, items_L, offsets_B1, _blocks(sharing_B, _BLOCK_SCORES), k)


def session_matrix(sessions: Iterable[tuple[Ints, Ints]], num_items: int) -> sparse.csr_array:
    """Gathers training sessions into one sparse matrix of zeros and ones.

    Args:
        sessions: Batches of (items_L, offsets_B1), each session with its target as the last click.
        num_items: Items in the catalogue.

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


def cosine_similarity(sessions_SV: sparse.csr_array, neighbours: int = 0) -> sparse.csr_array:
    """Item-item cosine with an empty diagonal, computed in blocks of items.

    Args:
        sessions_SV: Matrix of zeros and ones from `session_matrix`.
        neighbours: Most similar items kept for each item (ties: lower index); 0 keeps all.

    Returns:
        Matrix [V, V] of cosines in (0, 1].
    """
    sessions_VS = sessions_SV.T.tocsr()
    count_V = np.diff(sessions_VS.indptr)
    scale_V = 1 / np.sqrt(np.maximum(count_V, 1))
    blocks = [sparse.csr_array((0, len(count_V)))]
    pairs_V = sessions_VS @ np.diff(sessions_SV.indptr)
    for start, stop in _blocks(pairs_V, _BLOCK_PAIRS):
        together_UV = sparse.coo_array(sessions_VS[start:stop] @ sessions_SV)
        rows_U, columns_U = together_UV.coords
        other = columns_U != rows_U + start
        rows_U, columns_U = rows_U[other], columns_U[other]
        cosine_U = together_UV.data[other] * scale_V[rows_U + start] * scale_V[columns_U]
        if neighbours:
            order, place = _order_in_rows(rows_U, columns_U, cosine_U)
            kept = order[place < neighbours]
            rows_U, columns_U, cosine_U = rows_U[kept], columns_U[kept], cosine_U[kept]
        blocks.append(sparse.csr_array((cosine_U, (rows_U, columns_U)), shape=(stop - start, len(count_V))))
    return sparse.vstack(blocks, format="csr")


def _recency_weights(items_L: Ints, offsets_B1: Ints, decay: float, num_items: int) -> sparse.csr_array:
    """decay^(clicks after it) for each click, [B, V]."""
    after_L = np.repeat(offsets_B1[1:], np.diff(offsets_B1)) - 1 - np.arange(len(items_L))
    return sparse.csr_array((decay**after_L, items_L, offsets_B1), shape=(len(offsets_B1) - 1, num_items))


def _rank_in_blocks(
    baseline: Neighbours, items_L: Ints, offsets_B1: Ints, blocks: list[tuple[int, int]], k: int
) -> tuple[Ints, Floats]:
    found = []
    for start, stop in blocks:
        clicks = slice(offsets_B1[start], offsets_B1[stop])
        scores_BV = baseline.scores(items_L[clicks], offsets_B1[start : stop + 1] - offsets_B1[start])
        found.append(_top_k_sparse(scores_BV, k))
    return np.concatenate([ids for ids, _ in found]), np.concatenate([scores for _, scores in found])


def _blocks(sizes: Ints, limit: int) -> list[tuple[int, int]]:
    """Cuts rows into ranges whose sizes add up to the limit at most (one row at least)."""
    blocks, start, held = [], 0, 0
    for row, size in enumerate(sizes.tolist()):
        if held + size > limit and row > start:
            blocks.append((start, row))
            start, held = row, 0
        held += size
    return [*blocks, (start, len(sizes))]


def _order_in_rows(rows: Ints, columns: Ints, values: Floats) -> tuple[Ints, Ints]:
    """Orders entries by row, then falling value, then column; returns the order and each entry's place in its row."""
    order = np.lexsort((columns, -values, rows))
    sorted_rows = rows[order]
    first = np.searchsorted(sorted_rows, sorted_rows, side="left")
    return order, np.arange(len(order)) - first


def _top_k_sparse(scores_BV: sparse.csr_array, k: int) -> tuple[Ints, Floats]:
    """Best k columns of each row; absent entries score 0 and follow by index, -1 fills up short catalogues."""
    scores_BV.sum_duplicates()
    rows_count, num_items = scores_BV.shape
    rows = np.repeat(np.arange(rows_count), np.diff(scores_BV.indptr))
    # Sums of the same cosines in another order differ in the last bits: rounding keeps such ties ties.
    values, columns = np.round(scores_BV.data, 12), scores_BV.indices
    high = values >= np.repeat(_kth_values(values, scores_BV.indptr, k), np.diff(scores_BV.indptr))
    rows, columns, values = rows[high], columns[high], values[high]
    order, place = _order_in_rows(rows, columns, values)
    kept, place = order[place < k], place[place < k]
    ids_BK = np.full((rows_count, k), -1, np.int64)
    scores_BK = np.full((rows_count, k), -np.inf)
    ids_BK[rows[kept], place] = columns[kept]
    scores_BK[rows[kept], place] = values[kept]
    for row in np.flatnonzero(ids_BK[:, -1] < 0):
        found = int((ids_BK[row] >= 0).sum())
        # Among the 2k lowest indices at least k are not in the list yet, if the catalogue has that many.
        unrelated = np.setdiff1d(np.arange(min(2 * k, num_items)), ids_BK[row, :found])[: k - found]
        ids_BK[row, found : found + len(unrelated)] = unrelated
        scores_BK[row, found : found + len(unrelated)] = 0.0
    return ids_BK, scores_BK


def _kth_values(values: Floats, offsets: Ints, k: int) -> Floats:
    """The k-th largest value of each row, so that only what can enter its list is sorted; -inf for short rows."""
    kth_B = np.full(len(offsets) - 1, -np.inf)
    for row in np.flatnonzero(np.diff(offsets) > k):
        kth_B[row] = np.partition(values[offsets[row] : offsets[row + 1]], -k)[-k]
    return kth_B


def _padded(values: NDArray, length: int, fill: float) -> NDArray:
    return np.pad(values, (0, length - len(values)), constant_values=fill)
