"""Exact top-K for one query at a time on a CPU: bounds of all scores first, exact scores of the few items that matter.

The product of one query with all items takes as long as reading the items, and a copy of them in int8 has a quarter of
their bytes. Its products give an upper bound of each score. Only items whose bound reaches the K-th best score found so
far are scored exactly:

    item = scale * (codes + rest), query = step * (query_codes + query_rest)      codes are integers
    |item . query - scale * step * codes . query_codes| <= scale * margin         by Cauchy-Schwarz, with
    margin = (largest |rest|) * |query| + (largest |codes|) * |step * query_rest|

    upper = scale * (step * codes . query_codes + margin)
    K items with the highest bounds, or a few more, are scored exactly
    every item of the K best has a bound that is not below the lowest of their K best scores

An exact score is the dot product in float64, rounded to float32. It does not depend on the order of summation, nor on
the format of the first product, which may also be float32 with a margin for its rounding. So the faster format is
chosen by timing both, and gives the same items and scores.

Shapes: R items, X of them, Q columns, K places, M strips of items, C candidates, E items with a sparse term.
"""

import threading
import time

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmgr_rec.errors import UserError
from llmgr_rec.kernels.topk import NOT_NUMBERS

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

_MAX_CODE = 127
# Largest codes of a query that are tried. Without VNNI instructions, sums of two products of larger ones saturate.
_MAX_QUERY_CODES = (127, 63)
# Sizes of vectors and queries for which no bound over- or underflows.
_SMALLEST, _LARGEST = 1e-12, 1e12
# Rounding of the few float32 operations of a bound and of the score, relative to the largest of their terms.
_ROUNDING = 2.0**-20
# Rows that are encoded, and rows that are scored exactly, at a time.
_ENCODED_ROWS, _SCORED_ROWS = 1 << 11, 1 << 14
# Lengths of a strip; the first that gives two strips a place is taken.
_STRIPS = (64, 32, 8, 1)
_LOWEST = float(np.finfo(np.float32).min)
# Searches of each format that are timed, and how much longer integers may take: they read less memory, which counts on
# a busy machine.
_TRIALS, _AS_FAST = 5, 1.25


class ItemScan:
    """Item vectors that one query at a time is compared with; several threads may search at once.

    Memory in addition to the vectors: Q + 4 bytes an item for the copy in int8, if there is one, and 8 bytes an item
    for each thread that searches.

    Args:
        items_RQ: Item vectors, float32, on the CPU, finite and below 1e12.
        max_query_code: Largest code of a query, for products in int8; 0 for products in float32.
    """

    def __init__(self, items_RQ: Tensor, max_query_code: int) -> None:
        self._items_RQ = items_RQ
        self._max_query_code = max_query_code
        self._buffers = threading.local()
        self._rest, self._length = 0.0, 0.0
        num_items, num_columns = items_RQ.shape
        self._codes_RQ = torch.empty(num_items if max_query_code else 0, num_columns, dtype=torch.int8)
        self._scale_R = torch.empty(self._codes_RQ.shape[0])
        for start in range(0, num_items, _ENCODED_ROWS):
            rows = slice(start, start + _ENCODED_ROWS)
            if max_query_code:
                self._encode(rows)
            else:
                self._length = max(self._length, _longest(items_RQ[rows]))

    @classmethod
    def fastest(cls, items_RQ: Tensor) -> "ItemScan | None":
        """A scan with the format of products that is faster here.

        None on another device than the CPU, and for items that are huge or no numbers.

        Args:
            items_RQ: Item vectors, float32.
        """
        # NaN is not below any number.
        if items_RQ.device.type != "cpu" or not items_RQ.numel() or not bool(items_RQ.abs().amax() < _LARGEST):
            return None
        codes = (code for code in _MAX_QUERY_CODES if has_exact_products(items_RQ.shape[1], code))
        scans = [cls(items_RQ, code) for code in dict.fromkeys((next(codes, 0), 0))]
        return scans[0] if len(scans) == 1 or _is_as_fast(*scans) else scans[1]

    def _encode(self, rows: slice) -> None:
        items_XQ = self._items_RQ[rows]
        scale_X1 = (items_XQ.abs().amax(dim=1, keepdim=True) / _MAX_CODE).clamp_(min=_SMALLEST)
        scaled_XQ = items_XQ / scale_X1
        codes_XQ = scaled_XQ.round()
        self._codes_RQ[rows], self._scale_R[rows] = codes_XQ.to(torch.int8), scale_X1.squeeze(1)
        # The quotient is rounded to float32, which adds to the rest.
        rounding = _MAX_CODE * _ROUNDING * items_XQ.shape[1] ** 0.5
        self._rest = max(self._rest, _longest(scaled_XQ.sub_(codes_XQ)) + rounding)
        self._length = max(self._length, _longest(codes_XQ))

    def top_k(
        self,
        query_Q: Tensor,
        k: int,
        exclude: Ints | None = None,
        added: tuple[Ints, Floats] | None = None,
        is_allowed_R: NDArray[np.bool_] | None = None,
    ) -> tuple[Ints, Floats]:
        """Finds the K best items of a query, as `topk.top_k` does for many.

        Args:
            query_Q: The query, float32; see `can_search`.
            k: Places K, at least 1; may exceed the number of items.
            exclude: Items that it must not get; indices outside 0 .. R - 1 are ignored.
            added: Items [E], each once, and the terms that are added to their scores, finite.
            is_allowed_R: Items that it may get; None allows all.

        Returns:
            Item indices int64 [K] and scores float32 [K], best first, equal ones by lower index. Where fewer than K
            items are left: -1 and -inf.

        Raises:
            UserError: A score is not a number.
        """
        upper = self._upper_bounds(query_Q, added)
        num_items = len(self._items_RQ)
        if is_allowed_R is not None:
            np.copyto(upper[:num_items], -np.inf, where=~is_allowed_R)
        if exclude is not None:
            upper[exclude[(exclude >= 0) & (exclude < num_items)]] = -np.inf
        strip = next(length for length in _STRIPS if length == 1 or len(upper) >= 2 * k * length)
        maxima_M = torch.from_numpy(upper).view(-1, strip).amax(dim=1).numpy() if strip > 1 else upper
        place = max(len(maxima_M) - k, 0)
        # K strips have a maximum as high as this, so at least K items have, if there are as many.
        start = max(np.partition(maxima_M, place)[place], _LOWEST)
        query = query_Q.double()
        items_C, scores_C = self._scored(_at_least(upper, maxima_M, strip, start), query, added)
        lowest = np.partition(scores_C, len(scores_C) - k)[len(scores_C) - k] if len(scores_C) >= k else _LOWEST
        if lowest < start:
            items_C, scores_C = self._scored(_at_least(upper, maxima_M, strip, lowest), query, added)
        return best(items_C, scores_C, k)

    def _upper_bounds(self, query_Q: Tensor, added: tuple[Ints, Floats] | None) -> Floats:
        """Upper bound of each score, padded with -inf to a multiple of the longest strip; a buffer of this thread."""
        upper = self._buffer("upper", -(-len(self._items_RQ) // _STRIPS[0]) * _STRIPS[0], torch.float32)
        upper_R = upper[: len(self._items_RQ)]
        query = query_Q.double()
        norm = float(torch.linalg.vector_norm(query))
        if self._max_query_code:
            step = float(query.abs().amax()) / self._max_query_code
            codes_Q = (query / step).round_()
            length = step * self._length * float(torch.linalg.vector_norm(codes_Q))
            margin = self._rest * norm + self._length * float(torch.linalg.vector_norm(query - step * codes_Q))
            products_R1 = self._buffer("products", len(self._items_RQ), torch.int32).unsqueeze(1)
            torch._int_mm(self._codes_RQ, codes_Q.to(torch.int8).unsqueeze(1), out=products_R1)
            torch.mul(products_R1.squeeze(1), step, out=upper_R)
            upper_R.add_(margin + _ROUNDING * (margin + length)).mul_(self._scale_R)
        else:
            torch.mv(self._items_RQ, query_Q, out=upper_R)
            upper_R.add_(_ROUNDING * len(query) * self._length * norm)
        bounds = upper.numpy()
        if added is not None:
            items_E, terms_E = added
            # The next float: the sum in float64 may round down.
            sums_E = (bounds[items_E].astype(np.float64) + terms_E).astype(np.float32)
            bounds[items_E] = np.nextafter(sums_E, np.float32(np.inf))
        return bounds

    def _buffer(self, name: str, size: int, dtype: torch.dtype) -> Tensor:
        """A buffer of this thread, filled with the lowest value when it is made."""
        if not hasattr(self._buffers, name):
            lowest = -torch.inf if dtype.is_floating_point else 0
            setattr(self._buffers, name, torch.full((size,), lowest, dtype=dtype))
        buffer: Tensor = getattr(self._buffers, name)
        return buffer

    def _scored(self, items_C: Ints, query: Tensor, added: tuple[Ints, Floats] | None) -> tuple[Ints, Floats]:
        """Items, which are ascending, and their exact scores."""
        return items_C, exact_scores(self._items_RQ, items_C, query, added)


def can_search(query_Q: Tensor) -> bool:
    """Whether `ItemScan.top_k` has bounds for a query: numbers that are neither huge nor all nearly zero.

    Args:
        query_Q: The query, float32.
    """
    # The maximum is NaN if a column is, and NaN is not below any number.
    return _SMALLEST < float(query_Q.abs().amax()) < _LARGEST


def exact_scores(items_RQ: Tensor, items_C: Ints, query_Q: Tensor, added: tuple[Ints, Floats] | None = None) -> Floats:
    """Scores of some items, [C]: dot products with a query in float64, rounded to float32, plus the sparse terms.

    Args:
        items_RQ: Item vectors.
        items_C: Item indices, ascending.
        query_Q: The query, float64.
        added: Items [E], each once, and the terms that are added to their scores.

    Raises:
        UserError: A score is not a number.
    """
    rows = torch.from_numpy(items_C).split(_SCORED_ROWS)
    parts = [items_RQ.index_select(0, part).double().mv(query_Q).float() for part in rows]
    scores_C: Floats = (parts[0] if len(parts) == 1 else torch.cat(parts)).numpy()
    if added is not None and len(items_C):
        items_E, terms_E = added
        places_E = np.minimum(np.searchsorted(items_C, items_E), len(items_C) - 1)
        is_scored_E = items_C[places_E] == items_E
        scores_C[places_E[is_scored_E]] += terms_E[is_scored_E]
    if np.isnan(scores_C).any():
        raise UserError(NOT_NUMBERS)
    return scores_C


def best(items_C: Ints, scores_C: Floats, k: int) -> tuple[Ints, Floats]:
    """The K best of some items, best first, equal ones by lower index; padded with -1 and -inf.

    Args:
        items_C: Item indices, ascending.
        scores_C: Their scores.
        k: Places K.
    """
    order = np.argsort(-scores_C, kind="stable")[:k]
    ids_K, scores_K = np.full(k, -1, np.int64), np.full(k, -np.inf, np.float32)
    ids_K[: len(order)], scores_K[: len(order)] = items_C[order], scores_C[order]
    return ids_K, scores_K


def _at_least(upper: Floats, maxima_M: Floats, strip: int, lowest: float) -> Ints:
    """Items whose bound is not below a score, ascending; also those whose bound is not a number."""
    strips = np.flatnonzero(~(maxima_M < lowest))
    if strip == 1:
        return strips
    of_strip, place = np.nonzero(~(upper.reshape(-1, strip)[strips] < lowest))
    items_C: Ints = strips[of_strip] * strip + place
    return items_C


def _longest(vectors_XQ: Tensor) -> float:
    return float(torch.linalg.vector_norm(vectors_XQ, dim=1).amax()) * (1 + _ROUNDING)


def has_exact_products(num_columns: int, max_query_code: int) -> bool:
    """Whether products of integers are exact on this processor, where sums of some may saturate.

    Args:
        num_columns: Columns of the vectors.
        max_query_code: Largest code of a query.
    """
    codes = torch.full((64, num_columns), _MAX_CODE, dtype=torch.int8)
    codes[1::2] *= -1
    query = torch.full((num_columns, 1), max_query_code, dtype=torch.int8)
    try:
        products = torch._int_mm(codes, query)
    except RuntimeError:
        return False
    return torch.equal(products.long(), codes.long() @ query.long())


def _is_as_fast(first: ItemScan, second: ItemScan) -> bool:
    """Whether the fastest search of one scan takes about as long as that of another, or less; they take turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for query_Q in filter(can_search, first._items_RQ[:_TRIALS]):
        for scan, times in zip((first, second), seconds, strict=True):
            started = time.perf_counter()
            scan.top_k(query_Q, 1)
            times.append(time.perf_counter() - started)
    return min(seconds[0], default=0) <= _AS_FAST * min(seconds[1], default=0)
