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

Shapes: B queries, R items, N items of a block, M strips of it, Q columns, K places, C candidates over all queries.
"""

import math
import threading
import time
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmgr_rec.data.jagged import Jagged
from llmgr_rec.errors import UserError
from llmgr_rec.kernels.score_terms import BlockTerms, TermRows, block_terms
from llmgr_rec.kernels.topk import NOT_NUMBERS, lists_of_keys, padded_rows, sort_keys

Ints = NDArray[np.int64]
Ints32 = NDArray[np.int32]
Floats = NDArray[np.float32]

# Fewer items are ranked as fast by the product in float32.
_LEAST_ITEMS = 4096
_MAX_CODE = 127
# A product reads all codes, for fewer queries as often.
_QUERY_BLOCK = 512
# Queries whose products are searched at a time; these stay in the cache.
_SEARCHED_QUERIES = 64
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

    Memory in addition to the vectors: Q bytes an item, and 40 MiB for each thread that ranks 512 queries at once.

    Args:
        items_RQ: Item vectors of at least two columns, float32, on the CPU, finite and below 1e12.
    """

    def __init__(self, items_RQ: Tensor) -> None:
        self._items_RQ = items_RQ
        largest = max(float(rows.abs().amax()) for rows in items_RQ.split(_ENCODED_ROWS))
        # A float32, as which items are divided by it.
        self._scale = float(np.float32(max(largest / _MAX_CODE, _SMALLEST)))
        # Blocks of equal size, in whole strips; the last one ends with items of zeros.
        num_blocks = -(-len(items_RQ) // _ITEM_BLOCK)
        self._width = -(-len(items_RQ) // (num_blocks * _STRIP)) * _STRIP
        self._num_blocks = -(-len(items_RQ) // self._width)
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
        unit_B = self._scale * step_B1.squeeze(1).numpy()
        rows_B, most_B = np.zeros(1), np.zeros(1)
        if added is not None:
            rows_B, most_B = np.diff(added.offsets_B1), added.bounds() / unit_B
        # NaN is not below any number.
        if not max(most_B.max(), _MAX_CODE**2 * queries_BQ.shape[1]) < _LARGEST_PRODUCT:
            return None
        norm_B = torch.linalg.vector_norm(scaled_BQ, dim=1)
        rest_B = torch.linalg.vector_norm(scaled_BQ - codes_BQ, dim=1)
        bound_B = (self._rest + _ROUNDING * self._length) * norm_B + self._length * rest_B
        # A unit for each row, and the roundings of float32.
        rounding_B = rows_B + _ROUNDING * (1 + rows_B) * most_B
        margin_B = np.ceil(bound_B.numpy() * (1 + _ROUNDING) + rounding_B).astype(np.int64) + 1
        parts = []
        for start in range(0, len(queries_BQ), _SEARCHED_QUERIES):
            stop = min(start + _SEARCHED_QUERIES, len(queries_BQ))
            excluded = None if exclude is None else exclude.narrow(start, stop)
            terms: BlockTerms | None = None
            if added is not None:
                per_unit_B = (1 / unit_B[start:stop]).astype(np.float32)
                sums_BN, units_BN = (self._buffer(name, stop - start) for name in ("sums", "units"))
                terms = block_terms(added.narrow(start, stop), per_unit_B, self._num_blocks, sums_BN, units_BN)
            parts.append(_Search(start, k, 2 * margin_B[start:stop], excluded, terms))
        candidates = self._candidates(codes_BQ.to(torch.int8), k, parts)
        if candidates is None:
            return None
        return self._ranked(queries_BQ, k, candidates)

    def _candidates(self, codes_BQ: Tensor, k: int, parts: list["_Search"]) -> _Candidates | None:
        """What the searches of parts of the queries find; None if that is too much."""
        found, count = [], 0
        products_BN = self._buffer("products", len(codes_BQ))
        for number in range(self._num_blocks):
            start = number * self._width
            torch._int_mm(codes_BQ, self._codes_RQ[start : start + self._width].T, out=products_BN)
            for part in parts:
                found.append(part.candidates(products_BN[part.queries], number, len(self._items_RQ)))
                count += len(found[-1].items_C)
            if count > (_MOST_PER_PLACE * k + _MOST_PLUS) * len(codes_BQ):
                return None
        candidates = _concatenated(found)
        if self._num_blocks == 1:
            return candidates
        lowest_B = np.concatenate([part.lowest_B for part in parts])
        candidates = candidates.where(candidates.products_C >= lowest_B[candidates.queries_C])
        return candidates.where(np.argsort(candidates.queries_C.astype(np.int16), kind="stable"))

    def _buffer(self, name: str, num_queries: int) -> Tensor:
        """Memory of this thread for a block of items, int32 [B, N]."""
        buffer: Tensor | None = getattr(self._buffers, name, None)
        if buffer is None or len(buffer) < num_queries:
            buffer = torch.empty(num_queries, self._width, dtype=torch.int32)
            setattr(self._buffers, name, buffer)
        return buffer[:num_queries]

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


class _Search:
    """Search for the candidates of a few queries in one block of items after the other.

    Args:
        first: The first of the queries.
        k: Places K.
        distance_B: How far a candidate's product is at most below a K-th highest one.
        exclude: Items to exclude, one row a query.
        terms: Terms that are added to the products.
    """

    def __init__(self, first: int, k: int, distance_B: Ints, exclude: Jagged | None, terms: BlockTerms | None) -> None:
        self.queries = slice(first, first + len(distance_B))
        self.lowest_B: Ints32 = np.full(len(distance_B), _EXCLUDED, np.int32)
        self._k, self._distance_B, self._terms = k, distance_B, terms
        self._exclude = None if exclude is None else (exclude.row_of_value.numpy(), exclude.values.numpy())
        self._maxima_BM: Ints32 = np.empty((len(distance_B), 0), np.int32)

    def candidates(self, products_BN: Tensor, number: int, num_items: int) -> _Candidates:
        """The candidates in a block, in order; raises `lowest_B`, below which none of them is.

        Args:
            products_BN: Products of the queries and the block, int32; changed in place.
            number: Number of the block.
            num_items: Number of items of all blocks without padding.
        """
        width, first_item = products_BN.shape[1], number * products_BN.shape[1]
        products = products_BN.numpy()
        if self._terms is not None:
            self._terms.add_to(products_BN, number)
        products[:, num_items - first_item :] = _EXCLUDED
        if self._exclude is not None:
            rows, items = self._exclude
            inside = (items >= first_item) & (items < first_item + width)
            products[rows[inside], items[inside] - first_item] = _EXCLUDED
        strips_XS = products_BN.view(-1, _STRIP)
        maxima_BM: Ints32 = strips_XS.amax(dim=1).view(len(products), -1).numpy()
        self._raise_lowest(maxima_BM)
        # Few strips have candidates.
        strips_X = np.flatnonzero(maxima_BM >= self.lowest_B[:, None])
        values_XS = strips_XS.index_select(0, torch.from_numpy(strips_X)).numpy()
        found_C = np.flatnonzero(values_XS >= self.lowest_B[strips_X // maxima_BM.shape[1], None])
        strips_C, columns_C = np.divmod(found_C, _STRIP)
        places_C = strips_X[strips_C] * _STRIP + columns_C
        queries_C, items_C = np.divmod(places_C, width)
        terms_C = np.zeros(len(places_C), np.float32) if self._terms is None else self._terms.of_candidates(places_C)
        return _Candidates(
            queries_C + self.queries.start, items_C + first_item, values_XS.reshape(-1).take(found_C), terms_C
        )

    def _raise_lowest(self, maxima_BM: Ints32) -> None:
        # The first block has more strips than there are places.
        maxima_BM = np.concatenate([self._maxima_BM, maxima_BM], axis=1)
        place = maxima_BM.shape[1] - self._k
        self._maxima_BM = np.partition(maxima_BM, place, axis=1)[:, place:]
        self.lowest_B = np.maximum(self._maxima_BM[:, 0] - self._distance_B, _EXCLUDED + 1).astype(np.int32)


def _concatenated(found: list[_Candidates]) -> _Candidates:
    parts = [(part.queries_C, part.items_C, part.products_C, part.terms_C) for part in found]
    return _Candidates(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


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
