"""Sparse similarities and scores of items: cosine similarity with bounded memory, and top-K of each row.

Shapes: B sessions, V items, K length of a ranked list, F features, U items of a block.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# Maximum number of item pairs in memory while similarities are computed, about 50 bytes each.
_BLOCK_PAIRS = 1_000_000
# Columns of a strip, and the number of columns for each product that is not 0, below which strips are compared.
_STRIP, _MIN_SHARE = 8, 3
# Decimals to which scores are rounded. Sums of the same numbers in different orders differ in the last bits, and such
# scores must be ties.
_DIGITS = 12


def cosine_similarity(features_FV: sparse.csr_array, k_neighbors: int = 0) -> sparse.csr_array:
    """Item-item cosine similarity without the diagonal, computed in blocks of items.

    Memory is bounded by the block size and the result. Time is proportional to the sum over features of the squared
    number of items with the feature.

    Args:
        features_FV: Non-negative features of the items, one column per item, such as training sessions or words.
        k_neighbors: Number of most similar items per item (ties: lower index); 0 keeps all.

    Returns:
        Sparse matrix [V, V] of cosines in (0, 1].
    """
    features_VF = features_FV.T.tocsr()
    num_items = features_VF.shape[0]
    squares_V = np.asarray(features_VF.multiply(features_VF).sum(axis=1)).ravel()
    scale_V = 1 / np.sqrt(np.where(squares_V > 0, squares_V, 1.0))
    has_VF = sparse.csr_array((np.ones(features_VF.nnz), features_VF.indices, features_VF.indptr), features_VF.shape)
    pairs_V = np.minimum(has_VF @ np.diff(features_FV.indptr), num_items)
    similarities = [sparse.csr_array((0, num_items))]
    for start, stop in blocks(pairs_V, _BLOCK_PAIRS):
        cosine_UV = sparse.csr_array(features_VF[start:stop] @ features_FV)
        if 0 < k_neighbors * _STRIP <= num_items < _MIN_SHARE * cosine_UV.nnz / (stop - start):
            cosine_UV = _promising(cosine_UV, scale_V, start, k_neighbors)
        rows = np.repeat(np.arange(start, stop), np.diff(cosine_UV.indptr))
        cosine_UV.data *= scale_V[rows]
        cosine_UV.data *= scale_V[cosine_UV.indices]
        cosine_UV.data[cosine_UV.indices == rows] = 0
        cosine_UV.eliminate_zeros()
        similarities.append(_nearest(cosine_UV, k_neighbors) if k_neighbors else cosine_UV)
    return sparse.vstack(similarities, format="csr")


def _promising(products_UV: sparse.csr_array, scale_V: Floats, start: int, k_neighbors: int) -> sparse.csr_array:
    """The few products of each row that may be its nearest, where most are not 0.

    The k-th highest maximum of strips of columns is a lower bound of the k-th highest cosine of a row.

    Args:
        products_UV: Products of the features of items `start` and after with those of all items.
        scale_V: Factor of each item that makes them cosines.
        start: First item.
        k_neighbors: Number of nearest items.
    """
    num_rows, num_items = products_UV.shape
    scaled_UV = products_UV.toarray()
    scaled_UV *= scale_V
    scaled_UV[np.arange(num_rows), np.arange(start, start + num_rows)] = 0
    strips = num_items // _STRIP
    maxima = scaled_UV[:, : strips * _STRIP].reshape(num_rows, _STRIP, strips).max(axis=1)
    bound_U = np.partition(maxima, strips - k_neighbors, axis=1)[:, strips - k_neighbors]
    # Cosines that are equal after rounding may be lower by some 10^-12.
    bound_U = bound_U * (1 - 1e-6) - 10.0**-_DIGITS / scale_V[start : start + num_rows]
    is_promising_UV = scaled_UV >= np.maximum(bound_U, np.finfo(np.float64).tiny)[:, None]
    (places,) = np.nonzero(is_promising_UV.ravel())
    first_U1 = np.arange(num_rows + 1) * num_items
    offsets = np.searchsorted(places, first_U1)
    columns = places - np.repeat(first_U1[:-1], np.diff(offsets))
    products = scaled_UV.ravel()[places] / scale_V[columns]
    return sparse.csr_array((products, columns, offsets), shape=products_UV.shape)


def _nearest(cosine_UV: sparse.csr_array, k_neighbors: int) -> sparse.csr_array:
    """The entries of each row that `best_entries` ranks below `k_neighbors`, found without ranking them."""
    counts_U = np.diff(cosine_UV.indptr)
    values = np.round(cosine_UV.data, _DIGITS)
    kth = np.repeat(_kth_values(values, cosine_UV.indptr, k_neighbors), counts_U)
    is_kept = values > kth
    # Of those that are equal to the k-th, the first columns.
    (tied,) = np.nonzero(values == kth)
    rows = np.searchsorted(cosine_UV.indptr, tied, side="right") - 1
    kept_before = np.concatenate([[0], np.cumsum(is_kept)])[cosine_UV.indptr]
    order, ranks = order_in_rows(rows, cosine_UV.indices[tied], np.zeros(len(tied)))
    is_kept[tied[order[ranks < (k_neighbors - np.diff(kept_before))[rows[order]]]]] = True
    offsets = np.concatenate([[0], np.cumsum(is_kept)])[cosine_UV.indptr]
    return sparse.csr_array((cosine_UV.data[is_kept], cosine_UV.indices[is_kept], offsets), shape=cosine_UV.shape)


def blocks(sizes: Ints, limit: int) -> list[tuple[int, int]]:
    """Splits rows into ranges (start, stop) of one or more rows whose total size does not exceed the limit.

    A row that is larger than the limit is a range of its own.
    """
    ranges, start, total = [], 0, 0
    for row, size in enumerate(sizes.tolist()):
        if total + size > limit and row > start:
            ranges.append((start, row))
            start, total = row, 0
        total += size
    return [*ranges, (start, len(sizes))]


def order_in_rows(rows: Ints, columns: Ints, values: Floats) -> tuple[Ints, Ints]:
    """Sorts entries by row, then descending value, then column.

    Returns:
        The sort order and, in that order, the rank of each entry in its row, from 0.
    """
    order = np.lexsort((columns, -values, rows))
    sorted_rows = rows[order]
    first = np.searchsorted(sorted_rows, sorted_rows, side="left")
    return order, np.arange(len(order)) - first


def best_entries(scores_BV: sparse.csr_array, k: int) -> tuple[Ints, Ints]:
    """The k best entries of each row and all that are tied with the last of them. Ties are in order of column.

    Args:
        scores_BV: Sparse scores without duplicate entries.
        k: Number of entries per row.

    Returns:
        Positions of the entries in the data of the matrix, sorted by row and rank, and the rank of each in its row.
    """
    counts_B = np.diff(scores_BV.indptr)
    values = np.round(scores_BV.data, _DIGITS)
    (candidates,) = np.nonzero(values >= np.repeat(_kth_values(values, scores_BV.indptr, k), counts_B))
    rows = np.repeat(np.arange(len(counts_B)), counts_B)[candidates]
    order, ranks = order_in_rows(rows, scores_BV.indices[candidates], values[candidates])
    return candidates[order], ranks


def top_k(scores_BV: sparse.csr_array, k: int) -> tuple[Ints, Floats]:
    """The k best items of each row, in order of item index if tied.

    Args:
        scores_BV: Non-negative sparse scores without duplicate entries; items without an entry have score 0.
        k: Length K of the lists.

    Returns:
        Item indices, int64 [B, K], and scores, float64 [B, K], padded with -1 and -inf if there are fewer than K items.
    """
    num_rows, num_items = scores_BV.shape
    entries, ranks = best_entries(scores_BV, k)
    entries, ranks = entries[ranks < k], ranks[ranks < k]
    rows = np.repeat(np.arange(num_rows), np.diff(scores_BV.indptr))[entries]
    ids_BK = np.full((num_rows, k), -1, np.int64)
    scores_BK = np.full((num_rows, k), -np.inf)
    ids_BK[rows, ranks] = scores_BV.indices[entries]
    scores_BK[rows, ranks] = np.round(scores_BV.data[entries], _DIGITS)
    for row in np.flatnonzero(ids_BK[:, -1] < 0):
        length = int((ids_BK[row] >= 0).sum())
        # Of the 2k lowest item indices, at least k are not in the list yet, if the catalog has as many.
        fill = np.setdiff1d(np.arange(min(2 * k, num_items)), ids_BK[row, :length])[: k - length]
        ids_BK[row, length : length + len(fill)] = fill
        scores_BK[row, length : length + len(fill)] = 0.0
    return ids_BK, scores_BK


def _kth_values(values: Floats, offsets: Ints, k: int) -> Floats:
    """The k-th largest value of each row; -inf for a row with k values or fewer."""
    kth_B = np.full(len(offsets) - 1, -np.inf)
    for row in np.flatnonzero(np.diff(offsets) > k):
        kth_B[row] = np.partition(values[offsets[row] : offsets[row + 1]], -k)[-k]
    return kth_B
