"""Exact top-K of scores by blocks: scores of all items are never in memory at once.

A score is the dot product of a query and an item, plus a sparse term where there is one. Equal scores rank by lower
item index. Per block of items, only what beats a query's present K-th score is sorted; where it stands is found from
the maxima of short strips of the block.

Shapes: B queries, R items, N items of a block, Q columns, K places, C candidates of a block over all queries, E entries
of sparse terms.
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
# A processor's core has the scores of a block in its cache until their maxima are taken; a GPU wants more work at once.
_ITEM_BLOCK = 2048
_GPU_ITEM_BLOCK = 65536
_STRIP = 64
# Above this many candidates a place, a block is cut down to its own top K before it is sorted.
_CROWDED = 64
# Candidates a place that are put by before they are sorted in: the bar is late by so much, and sorting is rare.
_PUT_BY = 0.5


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
        added_BR: What is added to the dot products, float32, each item once a row; absent ones are 0.

    Returns:
        Item indices int64 [B, K] and scores float32 [B, K], best first. Where fewer than K items are left: -1 and -inf.
        An item with score -inf counts as excluded.

    Raises:
        UserError: A score is not a number.
    """
    parts = [
        _top_k_of_block(
            queries_BQ[start : start + _QUERY_BLOCK],
            items_RQ,
            k,
            None if exclude is None else exclude.narrow(start, min(start + _QUERY_BLOCK, exclude.num_rows)),
            None if added_BR is None else _Added(added_BR[start : start + _QUERY_BLOCK], queries_BQ.device),
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


class _Best:
    """The best items so far, flat: query after query, best first."""

    def __init__(self, num_queries: int, k: int, device: torch.device) -> None:
        self._num_queries, self._k = num_queries, k
        self._queries = [torch.empty(0, dtype=torch.int64, device=device)]
        self._ids = [torch.empty(0, dtype=torch.int64, device=device)]
        self._scores = [torch.empty(0, device=device)]
        self._put_by = 0
        self.bar_B = torch.full((num_queries,), float("-inf"), device=device)

    def add(self, queries_C: Tensor, ids_C: Tensor, scores_C: Tensor) -> None:
        """Takes candidates in, for each query ascending by id, with ids above all those that were added before."""
        self._queries.append(queries_C)
        self._ids.append(ids_C)
        self._scores.append(scores_C)
        self._put_by += queries_C.numel()
        if self._put_by > _PUT_BY * self._k * self._num_queries:
            self._sort_in()

    def _sort_in(self) -> None:
        queries, ids = torch.cat(self._queries), torch.cat(self._ids)
        # Adding zero makes -0 into 0, which differ in their bits but not as scores.
        scores = torch.cat(self._scores) + 0.0
        bits = scores.view(torch.int32).long()
        rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        # One stable sort: by query, then falling score; equal scores stay in order of arrival, which is that of ids.
        order = torch.argsort((queries << 32) + (0x7FFFFFFF - rising), stable=True)
        queries = queries[order]
        place = _places_within(queries, self._num_queries)
        kept = place < self._k
        best_queries, best_scores = queries[kept], scores[order[kept]]
        self._queries, self._ids, self._scores = [best_queries], [ids[order[kept]]], [best_scores]
        self._put_by = 0
        last = place[kept] == self._k - 1
        self.bar_B[best_queries[last]] = best_scores[last]

    def result(self) -> tuple[Tensor, Tensor]:
        """Lists padded to K with -1 and -inf."""
        self._sort_in()
        queries, ids, scores = self._queries[0], self._ids[0], self._scores[0]
        place = _places_within(queries, self._num_queries)
        ids_BK = torch.full((self._num_queries, self._k), -1, dtype=torch.int64, device=ids.device)
        scores_BK = torch.full((self._num_queries, self._k), float("-inf"), device=ids.device)
        ids_BK[queries, place] = ids
        scores_BK[queries, place] = scores
        return ids_BK, scores_BK


class _Added:
    """Sparse terms of some queries, in the order of items, so that a block's are together."""

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
        own = slice(int(self._first_R1[start]), int(self._first_R1[start + width]))
        places = self._queries_E[own] * width + self._items_E[own] - start
        scores_BN.view(-1).index_add_(0, places, self._terms_E[own])


def _places_within(queries: Tensor, num_queries: int) -> Tensor:
    """Place of each entry among those of its query, entries in order of queries."""
    counts_B = torch.bincount(queries, minlength=num_queries)
    return torch.arange(queries.numel(), device=queries.device) - (counts_B.cumsum(0) - counts_B)[queries]


def _top_k_of_block(
    queries_BQ: Tensor, items_RQ: Tensor, k: int, exclude: Jagged | None, added: _Added | None
) -> tuple[Tensor, Tensor]:
    best = _Best(queries_BQ.shape[0], k, queries_BQ.device)
    width = min(_ITEM_BLOCK if queries_BQ.device.type == "cpu" else _GPU_ITEM_BLOCK, items_RQ.shape[0])
    buffer = queries_BQ.new_empty(queries_BQ.shape[0] * width)
    for start, stop in _blocks(items_RQ.shape[0], width):
        scores_BN = buffer[: queries_BQ.shape[0] * (stop - start)].view(-1, stop - start)
        torch.mm(queries_BQ, items_RQ[start:stop].T, out=scores_BN)
        if added is not None:
            added.add_to(scores_BN, start)
        if exclude is not None:
            inside = (exclude.values >= start) & (exclude.values < stop)
            scores_BN[exclude.row_of_value[inside], exclude.values[inside] - start] = float("-inf")
        queries_C, columns_C, scores_C = _candidates(scores_BN, best.bar_B, k)
        best.add(queries_C, columns_C + start, scores_C)
    return best.result()


def _blocks(num_items: int, most: int) -> Iterator[tuple[int, int]]:
    """First item of each block and the one after its last; blocks are of whole strips, but for a short last one."""
    start = 0
    while start < num_items:
        width = min(most, num_items - start)
        width -= width % _STRIP if width > _STRIP else 0
        yield start, start + width
        start += width


def _candidates(scores_BN: Tensor, bar_B: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, column and score of all above the bar, or of the block's own top K where those are too many."""
    strip = min(_STRIP, scores_BN.shape[1])
    strips_BM = scores_BN.unflatten(1, (-1, strip)).amax(dim=2)
    if strips_BM.isnan().any():
        raise UserError(NOT_NUMBERS)
    found_S = (strips_BM > bar_B.unsqueeze(1)).flatten().nonzero().squeeze(1)
    if found_S.numel() > _CROWDED * bar_B.numel():
        return _block_top_k(scores_BN, bar_B, k)
    values_SX = scores_BN.view(-1, strip).index_select(0, found_S)
    queries_S = found_S // strips_BM.shape[1]
    above_C = (values_SX > bar_B[queries_S].unsqueeze(1)).flatten().nonzero().squeeze(1)
    if above_C.numel() > _CROWDED * k * bar_B.numel():
        return _block_top_k(scores_BN, bar_B, k)
    queries_C = queries_S[above_C // strip]
    flat_C = found_S[above_C // strip] * strip + above_C % strip
    return queries_C, flat_C - queries_C * scores_BN.shape[1], values_SX.flatten()[above_C]


def _block_top_k(scores_BN: Tensor, bar_B: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, column and score of each query's K best of a block; of equal scores at the K-th place, the leftmost."""
    if scores_BN.shape[1] <= k:
        return _chosen(scores_BN, scores_BN > bar_B.unsqueeze(1))
    last_B1 = torch.topk(scores_BN, k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    chosen_BN = scores_BN >= last_B1
    crowded = (chosen_BN.sum(dim=1) > k).nonzero().squeeze(1)
    if crowded.numel():
        rows = scores_BN[crowded]
        above, equal = rows > last_B1[crowded], rows == last_B1[crowded]
        room = k - above.sum(dim=1, keepdim=True)
        chosen_BN[crowded] = above | (equal & (equal.cumsum(dim=1) <= room))
    return _chosen(scores_BN, chosen_BN & (scores_BN > bar_B.unsqueeze(1)))


def _chosen(scores_BN: Tensor, chosen_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    queries_C, columns_C = chosen_BN.nonzero().unbind(dim=1)
    return queries_C, columns_C, scores_BN[queries_C, columns_C]
