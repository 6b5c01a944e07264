"""Sparse scores of items: similarities in blocks that fit into memory, the best of each row.

Shapes: B sessions, L clicks, V items, K places, F features that describe items, U items of one block.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# Most pairs of items that are held at once while similarities are computed (some 50 bytes each).
_BLOCK_PAIRS = 5_000_000
# Sums of the same numbers in another order differ in the last bits: rounded to so many digits, ties stay ties.
_DIGITS = 12


def cosine_similarity(features_FV: sparse.csr_array, k_neighbors: int = 0) -> sparse.csr_array:
    """Item-item cosine with an empty diagonal, computed in blocks of items.

    Memory is bounded by the blocks and by what is kept. Time grows with the sum over features of the squared number of
    items that have it.

    Args:
        features_FV: What describes the items, a column each: sessions that hold them, words of their text. Not
            negative; a column of zeros is like nothing.
        k_neighbors: Most similar items kept for each item (ties: lower index); 0 keeps all.

    Returns:
        Matrix [V, V] of cosines in (0, 1].
    """
    features_VF = features_FV.T.tocsr()
    num_items = features_VF.shape[0]
    squares_V = np.asarray(features_VF.multiply(features_VF).sum(axis=1)).ravel()
    scale_V = 1 / np.sqrt(np.where(squares_V > 0, squares_V, 1.0))
    has_VF = sparse.csr_array((np.ones(features_VF.nnz), features_VF.indices, features_VF.indptr), features_VF.shape)
    pairs_V = np.minimum(has_VF @ np.diff(features_FV.indptr), num_items)
    found = [sparse.csr_array((0, num_items))]
    for start, stop in blocks(pairs_V, _BLOCK_PAIRS):
        near_UV = sparse.csr_array(features_VF[start:stop] @ features_FV)
        rows_U = np.repeat(np.arange(start, stop), np.diff(near_UV.indptr))
        near_UV.data *= scale_V[rows_U]
        near_UV.data *= scale_V[near_UV.indices]
        near_UV.data[near_UV.indices == rows_U] = 0
        near_UV.eliminate_zeros()
        found.append(_nearest(near_UV, k_neighbors) if k_neighbors else near_UV)
    return sparse.vstack(found, format="csr")


def _nearest(near_UV: sparse.csr_array, k_neighbors: int) -> sparse.csr_array:
    entries, place = best_entries(near_UV, k_neighbors)
    kept = entries[place < k_neighbors]
    rows_U = np.repeat(np.arange(near_UV.shape[0]), np.diff(near_UV.indptr))
    return sparse.csr_array((near_UV.data[kept], (rows_U[kept], near_UV.indices[kept])), shape=near_UV.shape)


def blocks(sizes: Ints, limit: int) -> list[tuple[int, int]]:
    """Cuts rows into ranges whose sizes add up to the limit at most (one row at least)."""
    ranges, start, held = [], 0, 0
    for row, size in enumerate(sizes.tolist()):
        if held + size > limit and row > start:
            ranges.append((start, row))
            start, held = row, 0
        held += size
    return [*ranges, (start, len(sizes))]


def order_in_rows(rows: Ints, columns: Ints, values: Floats) -> tuple[Ints, Ints]:
    """Orders entries by row, then falling value, then column; returns the order and each entry's place in its row."""
    order = np.lexsort((columns, -values, rows))
    sorted_rows = rows[order]
    first = np.searchsorted(sorted_rows, sorted_rows, side="left")
    return order, np.arange(len(order)) - first


def best_entries(scores_BV: sparse.csr_array, k: int) -> tuple[Ints, Ints]:
    """The entries that can be among the k best of their row, best first, ties by lower column.

    Args:
        scores_BV: Each entry once.
        k: Entries wanted of each row; all that tie with the last are given.

    Returns:
        Their positions in the matrix's data, ordered by row and then by rank, and each one's rank in its row.
    """
    counts_B = np.diff(scores_BV.indptr)
    values = np.round(scores_BV.data, _DIGITS)
    (high,) = np.nonzero(values >= np.repeat(_kth_values(values, scores_BV.indptr, k), counts_B))
    rows = np.repeat(np.arange(len(counts_B)), counts_B)[high]
    order, place = order_in_rows(rows, scores_BV.indices[high], values[high])
    return high[order], place


def top_k(scores_BV: sparse.csr_array, k: int) -> tuple[Ints, Floats]:
    """Best k columns of each row; absent entries score 0 and follow by index, -1 fills up short catalogs."""
    scores_BV.sum_duplicates()
    rows_count, num_items = scores_BV.shape
    entries, place = best_entries(scores_BV, k)
    entries, place = entries[place < k], place[place < k]
    rows = np.repeat(np.arange(rows_count), np.diff(scores_BV.indptr))[entries]
    ids_BK = np.full((rows_count, k), -1, np.int64)
    scores_BK = np.full((rows_count, k), -np.inf)
    ids_BK[rows, place] = scores_BV.indices[entries]
    scores_BK[rows, place] = np.round(scores_BV.data[entries], _DIGITS)
    for row in np.flatnonzero(ids_BK[:, -1] < 0):
        found = int((ids_BK[row] >= 0).sum())
        # Among the 2k lowest indices at least k are not in the list yet, if the catalog has that many.
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
