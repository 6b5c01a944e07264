"""Exact top-K for batches of queries on a CPU: integer products bound all scores, and few are computed exactly.

Where a processor has instructions for products of int8, one of codes takes a quarter of the time of one in float32:

    item = scale * (codes + rest), query = step * (query_codes + query_rest)      codes are integers
    score = scale * step * (codes . query_codes + error)                          by Cauchy-Schwarz,
    |error| <= margin = (largest |rest|) * |query / step| + (largest |codes|) * |query_rest|

Terms are added to the products in the same unit, rounded to integers. K strips of items have a maximum as high as the
K-th highest one, so the K-th best score is at least that maximum less the margin, and only an item whose product is
at most two margins below it can be among the K best. Those few are scored exactly, as by `item_scan`: in float64,
rounded to float32, plus the sum of their terms in float32. So lists and scores are those of `ItemScan`.

All items have the same scale, so that products can be compared as they are. Short items beside long ones have wide
margins and many candidates; then there is no result, and the caller ranks by the product in float32.

Shapes: B queries, R items, N items of a block, M strips of it, Q columns, K places, C candidates over all queries,
L rows of terms, E entries of these rows.
"""

import math
import threading
import time
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from llmgr_rec.data.jagged import Jagged
from llmgr_rec.errors import UserError
from llmgr_rec.kernels.topk import NOT_NUMBERS, lists_of_keys, padded_rows, sort_keys

Ints = NDArray[np.int64]
Ints32 = NDArray[np.int32]
Floats = NDArray[np.float32]

# Fewer items are ranked as fast by the product in float32.
_LEAST_ITEMS = 4096
_MAX_CODE = 127
_QUERY_BLOCK = 256
# Maximum number of items of a block.
_ITEM_BLOCK = 1 << 14
_STRIP = 32
# Strips for each place.
_STRIPS_PER_PLACE = 2
# Candidates for each place, and in addition, above which bounds are of no use.
_MOST_PER_PLACE, _MOST_PLUS = 8, 256
# Sizes of vectors and queries for which no product over- or underflows, and of products and terms.
_SMALLEST, _LARGEST = 1e-12, 1e12
_LARGEST_PRODUCT = 1 << 29
_EXCLUDED = np.iinfo(np.int32).min
# Rounding of the float32 operations of codes and scores, relative to the largest of their terms.
_ROUNDING = 2.0**-20
_ENCODED_ROWS = 1 << 11
# Queries whose candidates are scored at a time; their vectors in float64 stay in the cache.
_SCORED_QUERIES = 16
# Rows, queries and rounds of the timed product, and how much faster integers have to be.
_TIMED_ROWS, _TIMED_QUERIES, _ROUNDS, _LEAST_GAIN = 2048, 128, 3, 1.5


@dataclass(frozen=True)
class TermRows:
    """Terms of the scores of B queries: those of a query are the sum of some rows of a sparse matrix, in their order.

    Args:
        rows_LR: The rows, float32; each item at most once a row.
        offsets_B1: First row of each query; the last entry is L.
    """

    rows_LR: sparse.csr_array
    offsets_B1: Ints

    def narrow(self, start: int, stop: int) -> "TermRows":
        """The terms of queries start .. stop - 1."""
        if (start, stop) == (0, len(self.offsets_B1) - 1):
            return self
        first, last = self.offsets_B1[start], self.offsets_B1[stop]
        return TermRows(self.rows_LR[first:last], self.offsets_B1[start : stop + 1] - first)


@dataclass(frozen=True)
class _Candidates:
    """Items that can be among the K best.

    Args:
        queries_C: Query of each.
        items_C: The items.
        products_C: Their products, with terms.
        terms_C: Sums of their terms, float32.
    """

    queries_C: Ints
    items_C: Ints
    products_C: Ints32
    terms_C: Floats

    def where(self, chosen: NDArray[np.bool_] | Ints) -> "_Candidates":
        """Some of them."""
        return _Candidates(self.queries_C[chosen], self.items_C[chosen], self.products_C[chosen], self.terms_C[chosen])


class BatchScan:
    """Item vectors that batches of queries are compared with; several threads may rank at once.

    Memory in addition to the vectors: Q bytes an item, and 20 MiB for each thread that ranks.

    Args:
        items_RQ: Item vectors of at least two columns, float32, on the CPU, finite and below 1e12.
    """

    def __init__(self, items_RQ: Tensor) -> None:
        self._items_RQ = items_RQ
        largest = max(float(rows.abs().amax()) for rows in items_RQ.split(_ENCODED_ROWS))
        # A float32, as which items are divided by it.
        self._scale = float(np.float32(max(largest / _MAX_CODE, _SMALLEST)))
        # Blocks of equal size; the last one ends with items of zeros.
        self._num_blocks = -(-len(items_RQ) // _ITEM_BLOCK)
        self._width = -(-len(items_RQ) // self._num_blocks)
        self._codes_RQ = torch.zeros(self._num_blocks * self._width, items_RQ.shape[1], dtype=torch.int8)
        self._rest = self._length = 0.0
        for start in range(0, len(items_RQ), _ENCODED_ROWS):
            scaled_XQ = items_RQ[start : start + _ENCODED_ROWS] / self._scale
            codes_XQ = scaled_XQ.round()
            self._codes_RQ[start : start + len(codes_XQ)] = codes_XQ.to(torch.int8)
            self._rest = max(self._rest, _longest(scaled_XQ.sub_(codes_XQ)))
            self._length = max(self._length, _longest(codes_XQ))
        # Quotients are rounded to float32, which adds to the rest.
        self._rest += _MAX_CODE * _ROUNDING * items_RQ.shape[1] ** 0.5
        self._buffers = threading.local()

    @classmethod
    def where_faster(cls, items_RQ: Tensor) -> "BatchScan | None":
        """A scan of many items, where products of integers are exact and faster than those of float32; else None.

        Args:
            items_RQ: Item vectors, float32.
        """
        if items_RQ.device.type != "cpu" or len(items_RQ) < _LEAST_ITEMS or not has_fast_products(items_RQ.shape[1]):
            return None
        # NaN is not below any number.
        if not all(bool(rows.abs().amax() < _LARGEST) for rows in items_RQ.split(_ENCODED_ROWS)):
            return None
        return cls(items_RQ)

    def can_rank(self, k: int) -> bool:
        """Whether there are enough strips of items for so many places.

        Args:
            k: Places K.
        """
        return 1 <= _STRIPS_PER_PLACE * k * _STRIP <= self._width

    def top_k(
        self, queries_BQ: Tensor, k: int, exclude: Jagged | None = None, added: TermRows | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """Finds the K best items of each query, as `topk.top_k` does.

        Args:
            queries_BQ: Queries, float32.
            k: Places K; see `can_rank`.
            exclude: Items that a query must not get, one row a query; indices outside 0 .. R - 1 are ignored.
            added: Terms that are added to the scores.

        Returns:
            As `topk.top_k`; None where the bounds are of no use: for queries that are nearly 0, huge or no numbers,
            for huge terms, and where too many items are candidates.

        Raises:
            UserError: A score is not a number.
        """
        parts = []
        for start in range(0, len(queries_BQ), _QUERY_BLOCK):
            stop = min(start + _QUERY_BLOCK, len(queries_BQ))
            part = self._top_k_of_queries(
                queries_BQ[start:stop],
                k,
                None if exclude is None else exclude.narrow(start, stop),
                None if added is None else added.narrow(start, stop),
            )
            if part is None:
                return None
            parts.append(part)
        if not parts:
            return None
        return torch.cat([ids for ids, _ in parts]), torch.cat([scores for _, scores in parts])

    def _top_k_of_queries(
        self, queries_BQ: Tensor, k: int, exclude: Jagged | None, added: TermRows | None
    ) -> tuple[Tensor, Tensor] | None:
        largest_B1 = queries_BQ.abs().amax(dim=1, keepdim=True)
        if not bool(((largest_B1 > _SMALLEST) & (largest_B1 < _LARGEST)).all()):
            return None
        step_B1 = largest_B1.double() / _MAX_CODE
        scaled_BQ = queries_BQ.double() / step_B1
        codes_BQ = scaled_BQ.round()
        terms = _Terms.of(added, self._scale * step_B1.squeeze(1).numpy(), self._num_blocks, self._width)
        if terms is None or _MAX_CODE**2 * queries_BQ.shape[1] > _LARGEST_PRODUCT:
            return None
        norm_B = torch.linalg.vector_norm(scaled_BQ, dim=1)
        rest_B = torch.linalg.vector_norm(scaled_BQ - codes_BQ, dim=1)
        bound_B = (self._rest + _ROUNDING * self._length) * norm_B + self._length * rest_B
        margin_B = np.ceil(bound_B.numpy() * (1 + _ROUNDING) + terms.rounding_B).astype(np.int64) + 1
        candidates = self._candidates(codes_BQ.to(torch.int8), k, 2 * margin_B, exclude, terms)
        if candidates is None:
            return None
        return self._ranked(queries_BQ, k, candidates)

    def _candidates(
        self, codes_BQ: Tensor, k: int, distance_B: Ints, exclude: Jagged | None, terms: "_Terms"
    ) -> _Candidates | None:
        """Items whose product is at most so far below a K-th highest one; None if there are too many."""
        num_queries, width = len(codes_BQ), self._width
        products_BN, is_candidate_BN = self._block_buffers(num_queries)
        products = products_BN.numpy()
        excluded = None if exclude is None else (exclude.row_of_value.numpy(), exclude.values.numpy())
        maxima_BM, found, count = np.empty((num_queries, 0), np.int32), [], 0
        for number in range(self._num_blocks):
            start = number * width
            torch._int_mm(codes_BQ, self._codes_RQ[start : start + width].T, out=products_BN)
            terms.add_to(products, number)
            products[:, len(self._items_RQ) - start :] = _EXCLUDED
            if excluded is not None:
                rows, items = excluded
                inside = (items >= start) & (items < start + width)
                products[rows[inside], items[inside] - start] = _EXCLUDED
            # Each block has more strips than there are places.
            maxima_BM = np.concatenate([maxima_BM, _maxima_of_strips(products_BN)], axis=1)
            place = maxima_BM.shape[1] - k
            maxima_BM = np.partition(maxima_BM, place, axis=1)[:, place:]
            lowest_B = np.maximum(maxima_BM[:, 0] - distance_B, _EXCLUDED + 1).astype(np.int32)
            np.greater_equal(products, lowest_B[:, None], out=is_candidate_BN)
            places_C = np.flatnonzero(is_candidate_BN)
            count += len(places_C)
            if count > (_MOST_PER_PLACE * k + _MOST_PLUS) * num_queries:
                return None
            products_C = products.reshape(-1)[places_C]
            terms_C = terms.of_candidates(number, places_C, is_candidate_BN, products)
            queries_C, items_C = np.divmod(places_C, width)
            found.append(_Candidates(queries_C, items_C + start, products_C, terms_C))
        return _of_all_blocks(found, lowest_B)

    def _block_buffers(self, num_queries: int) -> tuple[Tensor, NDArray[np.bool_]]:
        """Products and candidates of a block, in memory of this thread."""
        size = num_queries * self._width
        if getattr(self._buffers, "size", 0) < size:
            self._buffers.size = size
            self._buffers.products = torch.empty(size, dtype=torch.int32)
            self._buffers.is_candidate = np.empty(size, np.bool_)
        products_BN: Tensor = self._buffers.products[:size].view(num_queries, self._width)
        is_candidate_BN: NDArray[np.bool_] = self._buffers.is_candidate[:size].reshape(num_queries, self._width)
        return products_BN, is_candidate_BN

    def _ranked(self, queries_BQ: Tensor, k: int, candidates: _Candidates) -> tuple[Tensor, Tensor]:
        """The K best of the candidates, which are in order of queries."""
        num_queries, items = len(queries_BQ), self._items_RQ.numpy()
        offsets_B1 = np.concatenate([[0], np.bincount(candidates.queries_C, minlength=num_queries).cumsum()]).tolist()
        queries = queries_BQ.double().numpy()
        scores = np.empty(len(candidates.items_C))
        for first in range(0, num_queries, _SCORED_QUERIES):
            last = min(first + _SCORED_QUERIES, num_queries)
            start = offsets_B1[first]
            vectors = items.take(candidates.items_C[start : offsets_B1[last]], axis=0).astype(np.float64)
            for query in range(first, last):
                of_query = slice(offsets_B1[query], offsets_B1[query + 1])
                np.dot(vectors[of_query.start - start : of_query.stop - start], queries[query], out=scores[of_query])
        scores_C = torch.from_numpy(scores.astype(np.float32) + candidates.terms_C)
        if scores_C.isnan().any():
            raise UserError(NOT_NUMBERS)
        keys_C = sort_keys(scores_C, torch.from_numpy(candidates.items_C))
        keys_BW = padded_rows(keys_C, torch.from_numpy(candidates.queries_C), num_queries)
        keys_BW.numpy().sort(axis=1)
        return lists_of_keys(keys_BW[:, :k], k)


@dataclass(frozen=True)
class _Terms:
    """The entries of term rows in order of blocks of items, and within one in order of the rows.

    Args:
        rounding_B: Largest sum of the roundings of a query's terms, in units of its products.
        places_E: Place of each entry in the flat products of its block.
        values_E: Its value.
        units_E: Its value in units of the products.
        offsets: First entry of each block; the last is E.
    """

    rounding_B: NDArray[np.float64]
    places_E: Ints
    values_E: Floats
    units_E: Ints32
    offsets: Ints

    @classmethod
    def of(cls, added: TermRows | None, unit_B: NDArray[np.float64], num_blocks: int, width: int) -> "_Terms | None":
        """Converts term rows; None if a value is too large in units of the products."""
        offsets = np.zeros(num_blocks + 1, np.int64)
        if added is None:
            nothing = np.zeros(0, np.int64)
            return cls(np.zeros(len(unit_B)), nothing, nothing.astype(np.float32), nothing.astype(np.int32), offsets)
        rows_LR, rows_B = added.rows_LR, np.diff(added.offsets_B1)
        entries_B = np.diff(rows_LR.indptr[added.offsets_B1])
        units = np.repeat((1 / unit_B).astype(np.float32), entries_B)
        with np.errstate(over="ignore", invalid="ignore"):
            units *= rows_LR.data
        largest = float(max(units.max(initial=0), -units.min(initial=0)))
        # NaN is not below any number.
        if not largest * max(rows_B.max(initial=0), 1) < _LARGEST_PRODUCT:
            return None
        places_E = np.repeat(np.arange(len(rows_B)) * width, entries_B)
        places_E += rows_LR.indices
        values_E, units_E = rows_LR.data, np.rint(units, out=units).astype(np.int32)
        offsets[1:] = len(values_E)
        if num_blocks > 1:
            block_E = (rows_LR.indices // width).astype(np.int16)
            places_E -= block_E.astype(np.int64) * width
            order = np.argsort(block_E, kind="stable")
            places_E, values_E, units_E = places_E[order], values_E[order], units_E[order]
            offsets[1:] = np.bincount(block_E, minlength=num_blocks).cumsum()
        # Half a unit each, that of the units, and that of the scores' sums of terms.
        rounding_B = rows_B * (0.5 + _ROUNDING * rows_B * largest)
        return cls(rounding_B, places_E, values_E, units_E, offsets)

    def _of_block(self, number: int) -> slice:
        return slice(self.offsets[number], self.offsets[number + 1])

    def add_to(self, products: Ints32, number: int) -> None:
        """Adds the terms of a block to its products."""
        entries = self._of_block(number)
        np.add.at(products.reshape(-1), self.places_E[entries], self.units_E[entries])

    def of_candidates(
        self, number: int, places_C: Ints, is_candidate_BN: NDArray[np.bool_], products: Ints32
    ) -> Floats:
        """Sums of the terms of a block's candidates, [C], in order of the entries; overwrites the products."""
        places_E, values_E = self.places_E[self._of_block(number)], self.values_E[self._of_block(number)]
        terms_C = np.zeros(len(places_C), np.float32)
        chosen = np.flatnonzero(is_candidate_BN.reshape(-1).take(places_E))
        numbers = products.reshape(-1)
        numbers[places_C] = np.arange(len(places_C), dtype=np.int32)
        np.add.at(terms_C, numbers.take(places_E[chosen]), values_E[chosen])
        return terms_C


def _of_all_blocks(found: list[_Candidates], lowest_B: Ints32) -> _Candidates:
    """The candidates of all blocks, in order of queries, without those below what is the lowest after the last one."""
    if len(found) == 1:
        return found[0]
    parts = [(part.queries_C, part.items_C, part.products_C, part.terms_C) for part in found]
    candidates = _Candidates(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    candidates = candidates.where(candidates.products_C >= lowest_B[candidates.queries_C])
    return candidates.where(np.argsort(candidates.queries_C.astype(np.int16), kind="stable"))


def _maxima_of_strips(products_BN: Tensor) -> Ints32:
    num_strips = products_BN.shape[1] // _STRIP
    strips = products_BN[:, : num_strips * _STRIP].unflatten(1, (num_strips, _STRIP))
    maxima_BM: Ints32 = strips.amax(dim=2).numpy()
    return maxima_BM


def _longest(vectors_XQ: Tensor) -> float:
    return float(torch.linalg.vector_norm(vectors_XQ, dim=1).amax()) * (1 + _ROUNDING)


@cache
def has_fast_products(num_columns: int) -> bool:
    """Whether products of integers are exact on this processor and at least 1.5 times as fast as those of float32.

    Args:
        num_columns: Columns of the vectors.
    """
    # torch 2.13 takes a single column for contiguous after it is transposed, and multiplies other numbers.
    if num_columns < 2:
        return False
    codes = torch.full((_TIMED_ROWS, num_columns), _MAX_CODE, dtype=torch.int8)
    codes[1::2] *= -1
    queries = torch.full((_TIMED_QUERIES, num_columns), _MAX_CODE, dtype=torch.int8)
    floats, float_queries = codes.float(), queries.float()
    fastest = [math.inf, math.inf]
    try:
        # Sums of some of them may saturate.
        if not torch.equal(torch._int_mm(queries, codes.T).float(), float_queries @ floats.T):
            return False
        for _ in range(_ROUNDS):
            times = [time.perf_counter()]
            torch._int_mm(queries, codes.T)
            times.append(time.perf_counter())
            torch.mm(float_queries, floats.T)
            times.append(time.perf_counter())
            fastest = [min(old, new) for old, new in zip(fastest, np.diff(times).tolist(), strict=True)]
    except RuntimeError:
        return False
    return fastest[1] >= _LEAST_GAIN * fastest[0]
