"""Scores of items in sparse and dense rows: the highest entries of each row, and their order.

Scores are compared after rounding: sums of the same numbers in different orders differ in the last bits, and such
scores must be ties. Of tied ones, the lower column comes first.

Shapes: B rows, V columns (items), D >= V columns of a dense row, U rows of a block, K length of a ranked list, S strips
of columns, M maximum number of entries of a row.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from llmgr_rec.kernels.sparse_product import ALIGNED, SparseProduct

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# Decimals to which scores are rounded.
_DIGITS = 12
# Width of a strip of columns at least, and the number of strips for each of the highest entries that are wanted.
_SMALLEST_STRIP, _STRIPS_PER_ENTRY = 8, 2
# Maximum number of entries that are copied at a time to find the k-th highest of rows of different lengths.
_COPIED = 1 << 20


def nearest(scores_BV: sparse.csr_array, k: int) -> sparse.csr_array:
    """The k highest entries of each row, with sorted indices.

    Args:
        scores_BV: Sparse scores without duplicate entries.
        k: Number of entries per row.
    """
    kept, rows = _highest(scores_BV, k)
    offsets = np.searchsorted(rows, np.arange(scores_BV.shape[0] + 1))
    return sparse.csr_array((scores_BV.data[kept], scores_BV.indices[kept], offsets), shape=scores_BV.shape)


def best_entries(scores_BV: sparse.csr_array, k: int) -> tuple[Ints, Ints, Ints]:
    """The k highest entries of each row in their order.

    Args:
        scores_BV: Sparse scores without duplicate entries.
        k: Number of entries per row.

    Returns:
        Positions of the entries in the data of the matrix, sorted by row and rank; the row of each; and its rank.
    """
    kept, rows = _highest(scores_BV, k)
    first_B1 = np.searchsorted(rows, np.arange(scores_BV.shape[0] + 1))
    length_B = np.diff(first_B1)
    lowered_BM = np.full((len(length_B), int(length_B.max(initial=0))), np.inf)
    is_entry_BM = np.arange(lowered_BM.shape[1]) < length_B[:, None]
    lowered_BM[is_entry_BM] = -_rounded(scores_BV.data[kept])
    order_BM = np.argsort(lowered_BM, axis=1, kind="stable")
    return kept[(first_B1[:-1, None] + order_BM)[is_entry_BM]], rows, np.nonzero(is_entry_BM)[1]


def top_k(scores_BV: sparse.csr_array, k: int) -> tuple[Ints, Floats]:
    """The k best items of each row, in order of item index if tied.

    Args:
        scores_BV: Non-negative sparse scores without duplicate entries; items without an entry have score 0.
        k: Length K of the lists.

    Returns:
        Item indices, int64 [B, K], and scores, float64 [B, K], padded with -1 and -inf if there are fewer than K items.
    """
    num_rows, num_items = scores_BV.shape
    entries, rows, ranks = best_entries(scores_BV, k)
    ids_BK = np.full((num_rows, k), -1, np.int64)
    scores_BK = np.full((num_rows, k), -np.inf)
    ids_BK[rows, ranks] = scores_BV.indices[entries]
    scores_BK[rows, ranks] = _rounded(scores_BV.data[entries])
    for row in np.flatnonzero(ids_BK[:, -1] < 0):
        length = int((ids_BK[row] >= 0).sum())
        # Of the 2k lowest item indices, at least k are not in the list yet, if the catalog has as many.
        fill = np.setdiff1d(np.arange(min(2 * k, num_items)), ids_BK[row, :length])[: k - length]
        ids_BK[row, length : length + len(fill)] = fill
        scores_BK[row, length : length + len(fill)] = 0.0
    return ids_BK, scores_BK


def high_products(
    product: SparseProduct, left_BF: sparse.csr_array, k: int, first_item: int | None = None
) -> sparse.csr_array:
    """Entries of a product of non-negative matrices, the k highest of each row among them.

    Args:
        product: The right matrix, whose V columns are items.
        left_BF: Rows of the left matrix.
        k: Number of entries per row.
        first_item: If given, row b is item `first_item` + b, and its product with itself is left out.

    Returns:
        Sparse matrix [B, V] without duplicates.
    """
    items_B = None if first_item is None else np.arange(first_item, first_item + left_BF.shape[0])
    if product.is_dense(product.additions(left_BF)):
        return _high_dense_products(product, left_BF, k, items_B)
    products_BV = product.sparse_rows(left_BF)
    if items_B is not None:
        products_BV.data[products_BV.indices == np.repeat(items_B, np.diff(products_BV.indptr))] = 0
        products_BV.eliminate_zeros()
    return products_BV


def _high_dense_products(
    product: SparseProduct, left_BF: sparse.csr_array, k: int, items_B: Ints | None
) -> sparse.csr_array:
    """`high_products` by dense rows, without the products of rows with their items; with sorted indices."""
    # One matrix of all blocks: making one takes longer than finding the entries of a row.
    values, columns, counts = [np.empty(0)], [np.empty(0, np.int64)], [np.zeros(1, np.int64)]
    for start, scores_UD in product.dense_blocks(left_BF):
        if items_B is not None:
            rows_U = np.arange(len(scores_UD))
            scores_UD[rows_U, items_B[start + rows_U]] = 0
        rows_first_U1 = np.arange(len(scores_UD) + 1) * scores_UD.shape[1]
        places = _high_places(scores_UD, k, product.width)
        count_U = np.diff(np.searchsorted(places, rows_first_U1))
        values.append(scores_UD.ravel()[places])
        columns.append(places - np.repeat(rows_first_U1[:-1], count_U))
        counts.append(count_U)
    arrays = (np.concatenate(values), np.concatenate(columns), np.cumsum(np.concatenate(counts)))
    return sparse.csr_array(arrays, shape=(left_BF.shape[0], product.width))


def _high_places(scores_BD: Floats, k: int, width: int) -> Ints:
    """Places of the entries above 0 of each row that may be among its k highest, and of few others.

    The k-th highest maximum of strips of columns is a lower bound of the k-th highest entry of a row.

    Args:
        scores_BD: Scores, float64; D is a multiple of `ALIGNED`, columns from `width` on are 0.
        k: Number of entries.
        width: Number V of columns that are not only padding.

    Returns:
        Places in the matrix that is read row by row, ascending.
    """
    strip = min(max(_power_of_two(width // (_STRIPS_PER_ENTRY * k)), _SMALLEST_STRIP), ALIGNED)
    # Strips of columns with the same distance, whose maxima are those of whole vectors; eight at a time, because
    # fewer are in the cache again.
    maxima_BS = torch.from_numpy(scores_BD)
    while strip > 1:
        folded = min(strip, _SMALLEST_STRIP)
        maxima_BS, strip = maxima_BS.unflatten(1, (folded, -1)).amax(1), strip // folded
    lowest_B = np.full(len(scores_BD), np.finfo(np.float64).tiny)
    if k < (num_strips := maxima_BS.shape[1]):
        # A third of the time of torch.topk.
        kth_B = np.partition(maxima_BS.numpy(), num_strips - k, axis=1)[:, num_strips - k]
        lowest_B = np.maximum(lowest_B, kth_B - 10.0**-_DIGITS)
    return _true_places(scores_BD >= lowest_B[:, None])


def _true_places(is_true_BD: NDArray[np.bool_]) -> Ints:
    """Places of the few true values in a matrix that is read row by row, ascending; D is a multiple of 8."""
    # Eight values at a time.
    groups = np.flatnonzero(is_true_BD.view(np.uint64) != 0)
    found = np.flatnonzero(is_true_BD.reshape(-1, 8)[groups])
    return groups[found >> 3] * 8 + (found & 7)


def blocks(sizes: Ints, limit: int) -> list[tuple[int, int]]:
    """Splits rows into ranges (start, stop) of one or more rows whose total size does not exceed the limit.

    A row that is larger than the limit is a range of its own.
    """
    ends = np.cumsum(sizes, dtype=np.int64)
    ranges, start, before = [], 0, 0
    while start < len(sizes):
        stop = max(int(np.searchsorted(ends, before + limit, side="right")), start + 1)
        ranges.append((start, stop))
        start, before = stop, int(ends[stop - 1])
    return ranges or [(0, 0)]


def order_in_rows(rows: Ints, columns: Ints, values: Floats) -> tuple[Ints, Ints]:
    """Sorts entries by row, then descending value, then column.

    Returns:
        The sort order and, in that order, the rank of each entry in its row, from 0.
    """
    order = np.lexsort((columns, -values, rows))
    sorted_rows = rows[order]
    first = np.searchsorted(sorted_rows, sorted_rows, side="left")
    return order, np.arange(len(order)) - first


def _highest(scores_BV: sparse.csr_array, k: int) -> tuple[Ints, Ints]:
    """Positions of the k highest entries of each row in the data, in order of row and column, and their rows."""
    # Rounding keeps the order, so the k-th highest may be found before it.
    kth_B = _rounded(_kth_values(scores_BV.data, scores_BV.indptr, k))
    rows = np.repeat(np.arange(len(kth_B)), np.diff(scores_BV.indptr))
    entries = np.flatnonzero(scores_BV.data >= (kth_B - 10.0**-_DIGITS)[rows])
    rows = rows[entries]
    if not scores_BV.has_sorted_indices:
        order = np.lexsort((scores_BV.indices[entries], rows))
        entries = entries[order]
    values, kth = _rounded(scores_BV.data[entries]), kth_B[rows]
    is_above, is_tied = values > kth, values == kth
    above_B = np.bincount(rows[is_above], minlength=len(kth_B))
    tied_before = np.concatenate([[0], np.cumsum(is_tied)])
    first_B = np.searchsorted(rows, np.arange(len(kth_B)))
    rank_of_tied = tied_before[:-1] - tied_before[first_B][rows]
    is_kept = is_above | (is_tied & (rank_of_tied < k - above_B[rows]))
    return entries[is_kept], rows[is_kept]


def _rounded(scores: NDArray[np.floating]) -> Floats:
    # In float64: rounding in float32 has an error of its own.
    return scores.astype(np.float64, copy=False).round(_DIGITS)


def _kth_values(values: Floats, offsets: Ints, k: int) -> Floats:
    """The k-th largest value of each row; -inf for a row with k values or fewer."""
    counts_B = np.diff(offsets)
    kth_B = np.full(len(counts_B), -np.inf)
    power_B = np.ceil(np.log2(np.maximum(counts_B, 1))).astype(np.int64)
    for power in np.unique(power_B[counts_B > k]):
        similar = np.flatnonzero((power_B == power) & (counts_B > k))
        for start in range(0, len(similar), max(_COPIED >> power, 1)):
            rows = similar[start : start + max(_COPIED >> power, 1)]
            places_BM = offsets[rows][:, None] + np.arange(counts_B[rows].max())
            values_BM = values[np.minimum(places_BM, len(values) - 1)]
            values_BM[places_BM >= offsets[rows + 1][:, None]] = -np.inf
            kth_B[rows] = torch.topk(torch.from_numpy(values_BM), k, sorted=False).values.amin(1).numpy()
    return kth_B


def _power_of_two(number: int) -> int:
    """The largest power of two that does not exceed a number; 0 of 0."""
    return 1 << number.bit_length() - 1 if number else 0
