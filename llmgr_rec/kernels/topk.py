"""Exact top-K of queries @ items.T by blocks: the scores of all items are never in memory at once.

A score is the dot product of a query and an item, plus a sparse term where there is one. Equal scores rank by lower
item index.

    for each block of queries:
        threshold[b] = -inf                      the K-th best score of query b so far
        for each block of items, in order:
            scores = queries @ block.T, plus sparse terms; -inf at excluded items
            candidates = scores above threshold[b]
            candidates of several blocks are collected, then merged: sort, keep K of each query, raise the threshold

Three things keep this near the cost of the product. Few scores exceed the threshold after the first blocks. They are
found from the maxima of strips of 64 scores, so most of a block is passed over once, while it is still in the cache.
And one sort of integers ranks the candidates of all queries, see `_sort_keys`.

Shapes: B queries of a block, R items, N items of a block, M strips of it, S strips with a candidate, Q columns, K
results of a query, C candidates over all queries, E entries of sparse terms.
"""

from collections.abc import Iterator

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from llmgr_rec.data.jagged import Jagged
from llmgr_rec.errors import UserError

NOT_NUMBERS = (
    "the model gives scores that are not numbers, so nothing can be ranked; it has diverged: "
    "train it again with a lower learning rate"
)
_QUERY_BLOCK = 512
# On a CPU a block of scores stays in the cache until its maxima are taken; a GPU needs more work at once.
_CPU_ITEM_BLOCK = 2048
_GPU_ITEM_BLOCK = 65536
_STRIP = 64
# A block with more strips for each query, or more candidates for each result, than so many is first reduced to its own
# top K. That is so for the first block, whose scores are all above the threshold.
_MAX_PER_RESULT = 64
# Candidates for each result that are collected before they are merged: the threshold lags a little, and sorts are rare.
_MERGE_EVERY = 0.5
_LOW_31_BITS = 0x7FFFFFFF


@torch.no_grad()
def top_k(
    queries_BQ: Tensor,
    items_RQ: Tensor,
    k: int,
    exclude: Jagged | None = None,
    added_BR: sparse.csr_array | None = None,
) -> tuple[Tensor, Tensor]:
    """Finds the K best items of each query.

    Args:
        queries_BQ: Queries.
        items_RQ: Items; row r is item r.
        k: Places K, at least 1; may exceed the number of items.
        exclude: Items that a query must not get, one row a query; indices outside 0 .. R - 1 are ignored.
        added_BR: Sparse terms of the scores, float32, each item at most once a row.

    Returns:
        Item indices int64 [B, K] and scores float32 [B, K], best first. Where fewer than K items are left: -1 and -inf.
        An item with score -inf counts as excluded.

    Raises:
        UserError: A score is not a number.
    """
    parts = [
        _top_k_of_queries(
            queries_BQ[start : start + _QUERY_BLOCK],
            items_RQ,
            k,
            None if exclude is None else exclude.narrow(start, min(start + _QUERY_BLOCK, exclude.num_rows)),
            None if added_BR is None else _SparseTerms(added_BR[start : start + _QUERY_BLOCK], queries_BQ.device),
        )
        for start in range(0, queries_BQ.shape[0], _QUERY_BLOCK)
    ]
    if not parts:
        empty = queries_BQ.new_empty(0, k, dtype=torch.float32)
        return empty.long(), empty
    return torch.cat([ids for ids, _ in parts]), torch.cat([scores for _, scores in parts])


def merge_top_k(ids_WBK: Tensor, scores_WBK: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Merges lists over disjoint, ascending ranges of items into one list.

    Args:
        ids_WBK: Item indices, best first, of each range; -1 where a list ends early.
        scores_WBK: Their scores; -inf where a list ends early.
        k: Places of the result.

    Returns:
        As `top_k`.
    """
    ids_BX = ids_WBK.transpose(0, 1).flatten(1)
    # Stable: equal scores stay in the order of ranges and, within one, of the list, which is that of item indices.
    scores_BX, order = torch.sort(scores_WBK.transpose(0, 1).flatten(1), dim=1, descending=True, stable=True)
    return ids_BX.gather(1, order[:, :k]), scores_BX[:, :k].contiguous()


class _RunningTopK:
    """The best items so far of every query, flat: query after query, best first.

    Attributes:
        threshold_B: K-th best score of each query at the last merge, -inf where it has fewer than K items.
    """

    def __init__(self, num_queries: int, k: int, device: torch.device) -> None:
        self._num_queries, self._k = num_queries, k
        self._queries = [torch.empty(0, dtype=torch.int64, device=device)]
        self._ids = [torch.empty(0, dtype=torch.int64, device=device)]
        self._scores = [torch.empty(0, device=device)]
        self._num_collected = 0
        self.threshold_B = torch.full((num_queries,), float("-inf"), device=device)

    def add(self, queries_C: Tensor, ids_C: Tensor, scores_C: Tensor) -> None:
        """Collects candidates: for each query ascending by id, with ids above all those that were added before."""
        self._queries.append(queries_C)
        self._ids.append(ids_C)
        self._scores.append(scores_C)
        self._num_collected += queries_C.numel()
        if self._num_collected > _MERGE_EVERY * self._k * self._num_queries:
            self._merge()

    def _merge(self) -> None:
        queries, ids, scores = torch.cat(self._queries), torch.cat(self._ids), torch.cat(self._scores)
        # Stable: equal scores stay in order of arrival, which is that of ids.
        order = torch.argsort(_sort_keys(queries, scores), stable=True)
        queries = queries[order]
        rank = _rank_in_query(queries, self._num_queries)
        is_best = rank < self._k
        best, queries = order[is_best], queries[is_best]
        self._queries, self._ids, self._scores = [queries], [ids[best]], [scores[best]]
        self._num_collected = 0
        is_last = rank[is_best] == self._k - 1
        self.threshold_B[queries[is_last]] = self._scores[0][is_last]

    def result(self) -> tuple[Tensor, Tensor]:
        """Ids and scores, [B, K], padded with -1 and -inf."""
        self._merge()
        queries, ids, scores = self._queries[0], self._ids[0], self._scores[0]
        rank = _rank_in_query(queries, self._num_queries)
        ids_BK = torch.full((self._num_queries, self._k), -1, dtype=torch.int64, device=ids.device)
        scores_BK = torch.full((self._num_queries, self._k), float("-inf"), device=ids.device)
        ids_BK[queries, rank] = ids
        # Adding zero turns -0 into 0, so that equal scores are equal bit by bit.
        scores_BK[queries, rank] = scores + 0.0
        return ids_BK, scores_BK


def _sort_keys(queries_C: Tensor, scores_C: Tensor) -> Tensor:
    """Integers that order entries by query, then by falling score: one sort in place of one for each query.

    The bits of a float32, read as a signed integer, rise with a float of 0 or above; of a negative one they fall, since
    they are sign and magnitude. Inverting the 31 magnitude bits of the negative ones makes all of them rise:

        score       -inf      -2.0      -1.0         0       1.0       inf
        bits    ff800000  c0000000  bf800000  00000000  3f800000  7f800000
        rising  807fffff  bfffffff  c07fffff  00000000  3f800000  7f800000

    The key is query * 2^32 plus (2^31 - 1 - rising), which lies in 0 .. 2^32 - 1 and falls with the score.

    Args:
        queries_C: Query of each entry, 0 .. 2^31 - 1.
        scores_C: Its score, float32, no NaN.

    Returns:
        Keys, int64 [C]; equal for equal scores of a query, -0 and 0 included.
    """
    # Adding zero turns -0 into 0: they are equal as scores, but their bits differ.
    bits_C = (scores_C + 0.0).view(torch.int32).long()
    rising_C = torch.where(bits_C < 0, bits_C ^ _LOW_31_BITS, bits_C)
    return (queries_C << 32) + (_LOW_31_BITS - rising_C)


def _rank_in_query(queries_C: Tensor, num_queries: int) -> Tensor:
    """Rank of each entry within its query, 0 first, of entries in order of queries."""
    counts_B = torch.bincount(queries_C, minlength=num_queries)
    first_B = counts_B.cumsum(0) - counts_B
    return torch.arange(queries_C.numel(), device=queries_C.device) - first_B[queries_C]


class _SparseTerms:
    """Sparse terms of some queries in order of items, so that those of a block of items are a slice."""

    def __init__(self, added_BR: sparse.csr_array, device: torch.device) -> None:
        by_item = sparse.csc_array(added_BR)
        items_E = np.repeat(np.arange(by_item.shape[1]), np.diff(by_item.indptr))
        self._first_R1 = by_item.indptr
        self._queries_E = torch.from_numpy(by_item.indices.astype(np.int64)).to(device)
        self._items_E = torch.from_numpy(items_E).to(device)
        self._terms_E = torch.from_numpy(by_item.data).to(device)

    def add_to(self, scores_BN: Tensor, start: int) -> None:
        """Adds the terms of the items from `start` on to their scores, in place."""
        width = scores_BN.shape[1]
        entries = slice(int(self._first_R1[start]), int(self._first_R1[start + width]))
        flat_E = self._queries_E[entries] * width + self._items_E[entries] - start
        scores_BN.view(-1).index_add_(0, flat_E, self._terms_E[entries])


def _top_k_of_queries(
    queries_BQ: Tensor, items_RQ: Tensor, k: int, exclude: Jagged | None, added: _SparseTerms | None
) -> tuple[Tensor, Tensor]:
    """Top K of one block of queries, as `top_k`."""
    best = _RunningTopK(queries_BQ.shape[0], k, queries_BQ.device)
    width = min(_CPU_ITEM_BLOCK if queries_BQ.device.type == "cpu" else _GPU_ITEM_BLOCK, items_RQ.shape[0])
    buffer = queries_BQ.new_empty(queries_BQ.shape[0] * width)
    for start, stop in _item_blocks(items_RQ.shape[0], width):
        scores_BN = buffer[: queries_BQ.shape[0] * (stop - start)].view(-1, stop - start)
        torch.mm(queries_BQ, items_RQ[start:stop].T, out=scores_BN)
        if added is not None:
            added.add_to(scores_BN, start)
        if exclude is not None:
            inside = (exclude.values >= start) & (exclude.values < stop)
            scores_BN[exclude.row_of_value[inside], exclude.values[inside] - start] = float("-inf")
        queries_C, columns_C, scores_C = _candidates(scores_BN, best.threshold_B, k)
        best.add(queries_C, columns_C + start, scores_C)
    return best.result()


def _item_blocks(num_items: int, block: int) -> Iterator[tuple[int, int]]:
    """First item of each block and the one after its last; a block is a whole number of strips or less than one."""
    start = 0
    while start < num_items:
        width = min(block, num_items - start)
        width -= width % _STRIP if width > _STRIP else 0
        yield start, start + width
        start += width


def _candidates(scores_BN: Tensor, threshold_B: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, column and score of what exceeds the threshold, or of the block's own top K where that is too much."""
    strip = min(_STRIP, scores_BN.shape[1])
    strips_BM = scores_BN.unflatten(1, (-1, strip)).amax(dim=2)
    if strips_BM.isnan().any():
        raise UserError(NOT_NUMBERS)
    # Strips that hold a candidate, as numbers of rows of the scores viewed as [B * M, strip].
    flat_S = (strips_BM > threshold_B.unsqueeze(1)).flatten().nonzero().squeeze(1)
    if flat_S.numel() > _MAX_PER_RESULT * threshold_B.numel():
        return _top_k_of_block(scores_BN, threshold_B, k)
    values_SX = scores_BN.view(-1, strip).index_select(0, flat_S)
    queries_S = flat_S // strips_BM.shape[1]
    above_C = (values_SX > threshold_B[queries_S].unsqueeze(1)).flatten().nonzero().squeeze(1)
    if above_C.numel() > _MAX_PER_RESULT * k * threshold_B.numel():
        return _top_k_of_block(scores_BN, threshold_B, k)
    queries_C = queries_S[above_C // strip]
    flat_C = flat_S[above_C // strip] * strip + above_C % strip
    return queries_C, flat_C - queries_C * scores_BN.shape[1], values_SX.flatten()[above_C]


def _top_k_of_block(scores_BN: Tensor, threshold_B: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, column and score of each query's K best of a block; of scores equal to the K-th, the leftmost."""
    if scores_BN.shape[1] <= k:
        return _entries_of(scores_BN, scores_BN > threshold_B.unsqueeze(1))
    kth_B1 = torch.topk(scores_BN, k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    chosen_BN = scores_BN >= kth_B1
    has_ties = (chosen_BN.sum(dim=1) > k).nonzero().squeeze(1)
    if has_ties.numel():
        rows = scores_BN[has_ties]
        above, equal = rows > kth_B1[has_ties], rows == kth_B1[has_ties]
        room = k - above.sum(dim=1, keepdim=True)
        chosen_BN[has_ties] = above | (equal & (equal.cumsum(dim=1) <= room))
    return _entries_of(scores_BN, chosen_BN & (scores_BN > threshold_B.unsqueeze(1)))


def _entries_of(scores_BN: Tensor, chosen_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, column and score of the chosen scores."""
    queries_C, columns_C = chosen_BN.nonzero().unbind(dim=1)
    return queries_C, columns_C, scores_BN[queries_C, columns_C]
