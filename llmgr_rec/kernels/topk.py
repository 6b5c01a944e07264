"""Exact top-K of queries @ items.T by blocks: the scores of all items are never in memory at once.

A score is the dot product of a query and an item, plus a term where one is given. Equal scores rank by lower item
index.

    for each block of queries:
        lowest[b] = the lowest finite number     a score below it is not among the K best of query b
        for each block of items, in order:
            scores = queries @ block.T, plus terms; -inf at excluded items
            in the first block, raise lowest[b] to the K-th highest maximum of the strips of the row
            candidates = scores that are not below lowest[b]
            candidates of several blocks are collected, then merged: sort, keep K of each query, raise lowest[b]

Three things keep this near the cost of the product. A strip is a few neighboring scores: K strips have a maximum as
high as the K-th highest one, so at least K scores are as high, and few more. Hardly any score of a later block is a
candidate. And a candidate is one integer, which holds score and item, see `sort_keys`. For many places of few items a
strip is a single score, and the bound is exact. One place needs none of this: it is the maximum of each block; nor do
a few places of few items: each is the maximum of what the places before it have left.

Shapes: B queries of a block, R items, N items of a block, M strips of it, Q columns, K results of a query, C candidates
over all queries, W candidates of a query, E entries of sparse terms.
"""

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn import functional

from llmgr_rec.data.jagged import Jagged
from llmgr_rec.errors import UserError

NOT_NUMBERS = (
    "the model gives scores that are not numbers, so nothing can be ranked; it has diverged: "
    "train it again with a lower learning rate"
)
_QUERY_BLOCK = 256
# Items of a block of a full block of queries; fewer queries have as many scores of more items. The first block raises
# `lowest` and may be large; a later one is searched while it is still in the cache. A GPU needs more work at once.
_CPU_FIRST_BLOCK = 16384
_CPU_ITEM_BLOCK = 2048
_GPU_ITEM_BLOCK = 65536
# Lengths of a strip; the first one that gives enough strips for each place is taken. On a CPU, maxima of 16 neighbors
# take longer than those of 8 or 32.
_STRIPS = (64, 32, 8, 4)
_MIN_STRIPS_PER_PLACE = 2
# With more candidates for each place, `lowest` is raised by the strips of a later block as well.
_MAX_PER_PLACE = 2
# Places, and scores of a query to look at for all of them, up to which one maximum after the other is found.
_FEW_PLACES, _FEW_SCORES = 10, 1 << 17
# Items for each place up to which all are sorted.
_MOST_SORTED = 1.5
# Candidates for each place, and in addition, that are collected before they are merged: `lowest` lags a little, and
# sorts are rare.
_MERGE_EVERY = 0.5
_MERGE_EVERY_PLUS = 8
_LOW_31_BITS = 0x7FFFFFFF
# Follows the sort key of every item.
_NO_ITEM = torch.iinfo(torch.int64).max
# Terms of the scores of B queries and R items: few entries, or one for nearly every item.
Terms: TypeAlias = sparse.csr_array | Tensor


@torch.no_grad()
def top_k(
    queries_BQ: Tensor,
    items_RQ: Tensor,
    k: int,
    exclude: Jagged | None = None,
    added_BR: Terms | None = None,
) -> tuple[Tensor, Tensor]:
    """Finds the K best items of each query.

    Args:
        queries_BQ: Queries.
        items_RQ: Items; row r is item r.
        k: Places K, at least 1; may exceed the number of items.
        exclude: Items that a query must not get, one row a query; indices outside 0 .. R - 1 are ignored.
        added_BR: Terms that are added to the scores, float32, [B, R]; in a sparse matrix each item at most once a row.

    Returns:
        Item indices int64 [B, K] and scores float32 [B, K], best first. Where fewer than K items are left: -1 and -inf.
        An item with score -inf counts as excluded.

    Raises:
        UserError: A score is not a number.
    """
    search = TopKSearch(queries_BQ, k, len(items_RQ))
    search.add(items_RQ, exclude, added_BR)
    return search.result()


class TopKSearch:
    """The K best items of each query, where the items are given block by block.

    Args:
        queries_BQ: Queries.
        k: Places K, at least 1; may exceed the number of items.
        num_items: Number of the items, where all are given at once; None where it is not known.
    """

    def __init__(self, queries_BQ: Tensor, k: int, num_items: int | None = None) -> None:
        blocks = queries_BQ.split(_QUERY_BLOCK) if len(queries_BQ) else ()
        self._parts = [_TopKOfQueries(block_XQ, k, num_items) for block_XQ in blocks]
        self._empty = queries_BQ.new_empty(0, k, dtype=torch.float32)
        # Of the scores of a block, for one part after the other.
        self._buffer = queries_BQ.new_empty(0)

    @torch.no_grad()
    def add(self, items_RQ: Tensor, exclude: Jagged | None = None, added_BR: Terms | None = None) -> None:
        """Compares the queries with the next items, whose indices follow those before.

        Args:
            items_RQ: The next R items.
            exclude: As in `top_k`, with the first of these items as 0.
            added_BR: As in `top_k`, of these items.

        Raises:
            UserError: A score is not a number.
        """
        if not self._parts:
            return
        size = max(part.buffer_size(items_RQ) for part in self._parts)
        if len(self._buffer) < size:
            self._buffer = self._buffer.new_empty(size)
        if len(self._parts) == 1:
            self._parts[0].add(items_RQ, exclude, added_BR, self._buffer)
            return
        start = 0
        for part in self._parts:
            stop = start + part.num_queries
            part.add(
                items_RQ,
                None if exclude is None else exclude.narrow(start, stop),
                None if added_BR is None else added_BR[start:stop],
                self._buffer,
            )
            start = stop

    def result(self) -> tuple[Tensor, Tensor]:
        """The lists of all items so far, as `top_k` returns them."""
        if not self._parts:
            return self._empty.long(), self._empty
        ids, scores = zip(*(part.best.result() for part in self._parts), strict=True)
        return (ids[0], scores[0]) if len(ids) == 1 else (torch.cat(ids), torch.cat(scores))


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
    """The best items so far of every query.

    Attributes:
        lowest_B: Lowest score of each query that can be among its K best.
    """

    def __init__(self, num_queries: int, k: int, device: torch.device) -> None:
        self._k = k
        # The K best at the last merge, and the candidates of each block since then, as sort keys.
        self._keys_BW = [torch.empty(num_queries, 0, dtype=torch.int64, device=device)]
        self.lowest_B = torch.full((num_queries,), torch.finfo(torch.float32).min, device=device)

    def add_block(self, scores_BN: Tensor, start: int) -> None:
        """Collects the candidates of a block of items.

        Args:
            scores_BN: Scores of the block; -inf at excluded items.
            start: First item of the block.

        Raises:
            UserError: A candidate is not a number. NaN is not below any score, so it is a candidate.
        """
        if start == 0 and scores_BN.shape[1] <= _MOST_SORTED * self._k:
            self._keys_BW.append(_keys_of_all(scores_BN))
        else:
            self._keys_BW.append(self._keys_of_candidates(scores_BN, start))
        if sum(keys.shape[1] for keys in self._keys_BW[1:]) > _MERGE_EVERY * self._k + _MERGE_EVERY_PLUS:
            self._merge()

    def _keys_of_candidates(self, scores_BN: Tensor, start: int) -> Tensor:
        """Keys of the candidates of a block, [B, W]."""
        num_queries, num_items = scores_BN.shape
        strip = _strip_length(num_items, self._k)
        if start == 0:
            self._raise_lowest(scores_BN, max(strip, 1))
        flat_C = self._candidates(scores_BN)
        if start > 0 and strip and flat_C.numel() > _MAX_PER_PLACE * self._k * num_queries:
            self._raise_lowest(scores_BN, strip)
            flat_C = self._candidates(scores_BN)
        scores_C = scores_BN.view(-1)[flat_C]
        if scores_C.isnan().any():
            raise UserError(NOT_NUMBERS)
        queries_C = flat_C // num_items
        return padded_rows(sort_keys(scores_C, flat_C - queries_C * num_items + start), queries_C, num_queries)

    def _raise_lowest(self, scores_BN: Tensor, strip: int) -> None:
        self.lowest_B = torch.maximum(self.lowest_B, _kth_maximum_of_strips(scores_BN, strip, self._k))

    def _candidates(self, scores_BN: Tensor) -> Tensor:
        """Positions of the candidates in the flattened scores, ascending."""
        lowest_B1 = self.lowest_B.unsqueeze(1)
        if scores_BN.device.type == "cpu":
            with np.errstate(invalid="ignore"):
                return torch.from_numpy(np.flatnonzero(~(scores_BN.numpy() < lowest_B1.numpy())))
        return (~(scores_BN < lowest_B1)).view(-1).nonzero().squeeze(1)

    def _merge(self) -> None:
        keys_BW = torch.cat(self._keys_BW, dim=1)
        if keys_BW.device.type == "cpu":
            # Several times faster than torch.sort on a CPU.
            keys_BW.numpy().sort(axis=1)
        else:
            keys_BW = keys_BW.sort(dim=1).values
        self._keys_BW = [keys_BW[:, : self._k]]
        if keys_BW.shape[1] >= self._k:
            kth_B = scores_of(keys_BW[:, self._k - 1])
            # Later items have higher indices, so only a higher score comes before the K-th.
            self.lowest_B = torch.maximum(self.lowest_B, torch.nextafter(kth_B, torch.full_like(kth_B, torch.inf)))

    def result(self) -> tuple[Tensor, Tensor]:
        """Ids and scores, [B, K], padded with -1 and -inf."""
        if len(self._keys_BW) > 1:
            self._merge()
        return lists_of_keys(self._keys_BW[0], self._k)


class _RunningTop1:
    """The best item so far of every query: `_RunningTopK` for one place."""

    def __init__(self, num_queries: int, device: torch.device) -> None:
        self._ids_B = torch.full((num_queries,), -1, device=device)
        self._scores_B = torch.full((num_queries,), -torch.inf, device=device)

    def add_block(self, scores_BN: Tensor, start: int) -> None:
        """See `_RunningTopK.add_block`. The maximum of a row with NaN is NaN, and of equal scores the first."""
        if scores_BN.device.type == "cpu":
            # Several times faster than torch.max on a CPU.
            columns_B = torch.from_numpy(scores_BN.numpy().argmax(axis=1))
            highest_B = scores_BN.gather(1, columns_B.unsqueeze(1)).squeeze(1)
        else:
            highest_B, columns_B = scores_BN.max(dim=1)
        if highest_B.isnan().any():
            raise UserError(NOT_NUMBERS)
        is_higher_B = highest_B > self._scores_B
        self._ids_B = torch.where(is_higher_B, columns_B + start, self._ids_B)
        self._scores_B = torch.where(is_higher_B, highest_B, self._scores_B)

    def result(self) -> tuple[Tensor, Tensor]:
        """Ids and scores, [B, 1]; -1 and -inf where no item is left."""
        return self._ids_B.unsqueeze(1), self._scores_B.unsqueeze(1)


class _SuccessiveMaxima:
    """The best items of every query for a few places, of a single block on the CPU: each the maximum of the rest."""

    def __init__(self, num_queries: int, k: int) -> None:
        self._ids_KB = np.full((k, num_queries), -1)
        self._scores_KB = np.full((k, num_queries), -np.inf, np.float32)

    def add_block(self, scores_BN: Tensor, start: int) -> None:
        """See `_RunningTopK.add_block`. The maximum of a row with NaN is NaN, and of equal scores the first."""
        scores = scores_BN.numpy()
        flat, first_B = scores.reshape(-1), np.arange(len(scores)) * scores.shape[1]
        for ids_B, scores_B in zip(self._ids_KB, self._scores_KB, strict=True):
            scores.argmax(axis=1, out=ids_B)
            places_B = ids_B + first_B
            flat.take(places_B, out=scores_B, mode="clip")
            flat[places_B] = -np.inf
        if np.isnan(self._scores_KB[0]).any():
            raise UserError(NOT_NUMBERS)
        self._ids_KB[np.isneginf(self._scores_KB)] = -1

    def result(self) -> tuple[Tensor, Tensor]:
        """Ids and scores, [B, K]; -1 and -inf where no item is left."""
        ids_BK, scores_BK = (
            torch.from_numpy(np.ascontiguousarray(found.T)) for found in (self._ids_KB, self._scores_KB)
        )
        return ids_BK, scores_BK


def _keys_of_all(scores_BN: Tensor) -> Tensor:
    """Keys of all items of the first block, [B, N]."""
    if scores_BN.isnan().any():
        raise UserError(NOT_NUMBERS)
    keys_BN = sort_keys(scores_BN, torch.arange(scores_BN.shape[1], device=scores_BN.device))
    return keys_BN.masked_fill_(scores_BN.isneginf(), _NO_ITEM)


def _strip_length(num_items: int, k: int) -> int:
    """Length of a strip; 0 where K places are too many for any."""
    most = num_items // (_MIN_STRIPS_PER_PLACE * k)
    return next((strip for strip in _STRIPS if strip <= most), 0)


def _kth_maximum_of_strips(scores_BN: Tensor, strip: int, k: int) -> Tensor:
    """K-th highest maximum of the strips of each row: a lower bound of the K-th highest score."""
    num_strips = scores_BN.shape[1] // strip
    maxima_BM = scores_BN
    if strip > 1:
        maxima_BM = scores_BN[:, : num_strips * strip].unflatten(1, (num_strips, strip)).amax(dim=2)
    if maxima_BM.device.type == "cpu":
        # Several times faster than torch.topk on a CPU.
        return torch.from_numpy(np.partition(maxima_BM.numpy(), num_strips - k, axis=1)[:, num_strips - k])
    return maxima_BM.topk(k, dim=1).values[:, -1]


def lists_of_keys(keys_BX: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids and scores of sorted keys, [B, K], padded with -1 and -inf.

    Args:
        keys_BX: Sort keys, ascending, at most K of each query.
        k: Places K.
    """
    ids_BX, scores_BX = (keys_BX & _LOW_31_BITS).masked_fill_(keys_BX == _NO_ITEM, -1), scores_of(keys_BX)
    missing = (0, k - keys_BX.shape[1])
    if not missing[1]:
        return ids_BX, scores_BX
    return functional.pad(ids_BX, missing, value=-1), functional.pad(scores_BX, missing, value=float("-inf"))


def padded_rows(keys_C: Tensor, queries_C: Tensor, num_queries: int) -> Tensor:
    """Keys in order of queries as one row a query, [B, W], padded to the longest one by a key that follows all others.

    Args:
        keys_C: The keys.
        queries_C: Query of each key, ascending.
        num_queries: Queries B.
    """
    width, rest = divmod(keys_C.numel(), num_queries)
    if width and not rest:
        # They ascend, so a row whose first and last entry are of its query has no other.
        ends_B2 = queries_C.view(num_queries, width)[:, [0, -1]]
        if (ends_B2 == torch.arange(num_queries, device=ends_B2.device).unsqueeze(1)).all():
            return keys_C.view(num_queries, width)
    counts_B = torch.bincount(queries_C, minlength=num_queries)
    first_B = counts_B.cumsum(0) - counts_B
    width = int(counts_B.max())
    keys_BW = keys_C.new_full((num_queries, width), _NO_ITEM)
    start_B = torch.arange(num_queries, device=keys_C.device) * width
    places_C = torch.arange(keys_C.numel(), device=keys_C.device) + (start_B - first_B)[queries_C]
    keys_BW.view(-1)[places_C] = keys_C
    return keys_BW


def sort_keys(scores: Tensor, items: Tensor) -> Tensor:
    """Integers that rise as scores fall, and with the item where scores are equal.

    The bits of a float32, read as a signed integer, rise with a float of 0 or above; of a negative one they fall, since
    they are sign and magnitude. Inverting the 31 magnitude bits of the negative ones makes all of them rise:

        score       -inf      -2.0      -1.0         0       1.0       inf
        bits    ff800000  c0000000  bf800000  00000000  3f800000  7f800000
        rising  807fffff  bfffffff  c07fffff  00000000  3f800000  7f800000

    Inverting all bits of those makes them fall. They are the high bits of a key, and the item is its low 31 bits.

    Args:
        scores: Scores, float32, no NaN.
        items: Items, 0 .. 2^31 - 1, of the same shape as the scores or one that broadcasts to it.

    Returns:
        Keys, int64.
    """
    # Adding zero turns -0 into 0: they are equal as scores, but their bits differ.
    rising = _invert_magnitude_of_negative((scores + 0.0).view(torch.int32))
    return rising.bitwise_not_().long().bitwise_left_shift_(31).add_(items)


def scores_of(keys: Tensor) -> Tensor:
    """Scores of sort keys; -inf of the key that stands for no item."""
    rising = (keys >> 31).int().bitwise_not_()
    scores = _invert_magnitude_of_negative(rising).view(torch.float32)
    return scores.masked_fill_(keys == _NO_ITEM, float("-inf"))


def _invert_magnitude_of_negative(bits: Tensor) -> Tensor:
    # The shift gives all ones for a negative number and zero otherwise.
    return (bits >> 31).bitwise_and_(_LOW_31_BITS).bitwise_xor_(bits)


class _SparseTerms:
    """Sparse terms of some queries, added to the scores of one block of items after the other."""

    def __init__(self, added_BR: sparse.csr_array, device: torch.device) -> None:
        num_queries, num_items = added_BR.shape
        self._first_R1 = None
        if num_items <= _block_widths(device, max(num_queries, 1))[0]:
            queries_E = np.repeat(np.arange(num_queries), np.diff(added_BR.indptr))
            items_E, terms_E = added_BR.indices, added_BR.data
        else:
            # In order of items, so that the terms of a block are a slice.
            by_item = sparse.csc_array(added_BR)
            items_E = np.repeat(np.arange(num_items), np.diff(by_item.indptr))
            queries_E, terms_E, self._first_R1 = by_item.indices, by_item.data, by_item.indptr
        self._queries_E = torch.from_numpy(queries_E.astype(np.int64, copy=False)).to(device)
        self._items_E = torch.from_numpy(items_E.astype(np.int64, copy=False)).to(device)
        self._terms_E = torch.from_numpy(terms_E).to(device)

    def add_to(self, scores_BN: Tensor, start: int) -> None:
        """Adds the terms of the items from `start` on to their scores, in place."""
        width = scores_BN.shape[1]
        entries = slice(None)
        if self._first_R1 is not None:
            entries = slice(int(self._first_R1[start]), int(self._first_R1[start + width]))
        flat_E = self._queries_E[entries] * width + self._items_E[entries] - start
        scores_BN.view(-1).index_add_(0, flat_E, self._terms_E[entries])


class _TopKOfQueries:
    """`TopKSearch` of one block of queries.

    Attributes:
        num_queries: Number of the queries.
        best: Their best items so far.
    """

    def __init__(self, queries_BQ: Tensor, k: int, num_items: int | None) -> None:
        self._queries_BQ = queries_BQ
        self.num_queries = len(queries_BQ)
        self.best = _running_best(self.num_queries, k, num_items, queries_BQ.device)
        self._num_items = 0

    def buffer_size(self, items_RQ: Tensor) -> int:
        """Scores that are in memory while items are compared."""
        return self.num_queries * min(max(self._widths(items_RQ)), items_RQ.shape[0])

    def _widths(self, items_RQ: Tensor) -> tuple[int, int]:
        """Items of the next block and of a later one."""
        first, width = _block_widths(items_RQ.device, self.num_queries)
        return (width if self._num_items else first), width

    def add(self, items_RQ: Tensor, exclude: Jagged | None, added_BR: Terms | None, buffer: Tensor) -> None:
        """See `TopKSearch.add`; the buffer has room for `buffer_size` scores."""
        num_queries, num_items, device = self.num_queries, items_RQ.shape[0], items_RQ.device
        first, width = self._widths(items_RQ)
        sparse_terms = _SparseTerms(added_BR, device) if isinstance(added_BR, sparse.csr_array) else None
        excluded = None if exclude is None else (exclude.row_of_value, exclude.values)
        for start, stop in _item_blocks(num_items, first, width):
            scores_BN = buffer[: num_queries * (stop - start)].view(num_queries, stop - start)
            if isinstance(added_BR, Tensor):
                torch.addmm(added_BR[:, start:stop], self._queries_BQ, items_RQ[start:stop].T, out=scores_BN)
            else:
                torch.mm(self._queries_BQ, items_RQ[start:stop].T, out=scores_BN)
            if sparse_terms is not None:
                sparse_terms.add_to(scores_BN, start)
            if excluded is not None:
                rows, items = excluded
                inside = (items >= start) & (items < stop)
                scores_BN[rows[inside], items[inside] - start] = float("-inf")
            self.best.add_block(scores_BN, self._num_items + start)
        self._num_items += num_items


def _running_best(
    num_queries: int, k: int, num_items: int | None, device: torch.device
) -> _RunningTop1 | _SuccessiveMaxima | _RunningTopK:
    if k == 1:
        return _RunningTop1(num_queries, device)
    is_single_block = num_items is not None and 0 < num_items <= _block_widths(device, num_queries)[0]
    if num_items and is_single_block and device.type == "cpu" and k <= min(_FEW_PLACES, _FEW_SCORES // num_items):
        return _SuccessiveMaxima(num_queries, k)
    return _RunningTopK(num_queries, k, device)


def _block_widths(device: torch.device, num_queries: int) -> tuple[int, int]:
    """Items of the first block and of a later one."""
    more = _QUERY_BLOCK // num_queries
    first, later = (_CPU_FIRST_BLOCK, _CPU_ITEM_BLOCK) if device.type == "cpu" else (_GPU_ITEM_BLOCK, _GPU_ITEM_BLOCK)
    return more * first, more * later


def _item_blocks(num_items: int, first: int, width: int) -> Iterator[tuple[int, int]]:
    """First item of each block and the one after its last."""
    start, stop = 0, min(first, num_items)
    while start < num_items:
        yield start, stop
        start, stop = stop, min(stop + width, num_items)
