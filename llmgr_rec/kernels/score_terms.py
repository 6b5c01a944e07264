"""Terms of scores, rounded to integers and added to blocks of products: as dense rows, or each entry to its product.

Scattering entries into rows of zeros and adding whole rows takes several times less time for each entry than adding it
to its product. A row takes time for each item, too, so where few items have a term, entries are added one by one. Both
add the terms of an item in the same order, so their sums in float32 are equal; their integers may differ by rounding,
by less than one for each row.

Shapes: B queries, R items, N items of a block, L rows of terms, E entries of these rows, C candidates over all queries.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

# Adding an entry to its product takes as long as adding dense rows to so many.
_ITEMS_PER_ENTRY = 12


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
        rows_LR, first, last = self.rows_LR, self.offsets_B1[start], self.offsets_B1[stop]
        indptr = rows_LR.indptr[first : last + 1]
        entries = slice(indptr[0], indptr[-1])
        arrays = (rows_LR.data[entries], rows_LR.indices[entries], indptr - indptr[0])
        narrowed = sparse.csr_array(arrays, shape=(last - first, rows_LR.shape[1]))
        return TermRows(narrowed, self.offsets_B1[start : stop + 1] - first)

    def bounds(self) -> NDArray[np.float64]:
        """Numbers that no sum of terms of a query exceeds in size, float64 [B]: sums of the largest terms of its rows.

        NaN or infinity where a term is so.
        """
        starts_L, lengths_L = self.rows_LR.indptr[:-1], np.diff(self.rows_LR.indptr)
        largest_L = np.zeros(len(starts_L))
        has_terms_L = lengths_L > 0
        if has_terms_L.any():
            largest_L[has_terms_L] = np.maximum.reduceat(np.abs(self.rows_LR.data), starts_L[has_terms_L])
        sums = np.concatenate([[0], np.cumsum(largest_L)])
        return sums[self.offsets_B1[1:]] - sums[self.offsets_B1[:-1]]

    def rows_by_query(self, num_items: int) -> sparse.csr_array:
        """One row a query, [B, `num_items`], with all its entries; an item may have several."""
        rows = self.rows_LR
        shape = (len(self.offsets_B1) - 1, num_items)
        return sparse.csr_array((rows.data, rows.indices, rows.indptr[self.offsets_B1]), shape=shape)


class BlockTerms(Protocol):
    """Terms that are added to one block of items after the other."""

    def add_to(self, products_BN: Tensor, number: int) -> None:
        """Adds the terms of a block to its products.

        Args:
            products_BN: Products, int32, contiguous.
            number: Number of the block.
        """
        ...

    def of_candidates(self, places_C: Ints) -> Floats:
        """Sums of the terms of candidates of the block that was the last to be added, float32 [C].

        Args:
            places_C: Places of the candidates in the flat products, ascending.
        """
        ...


def block_terms(added: TermRows, per_unit_B: Floats, num_blocks: int, sums_BN: Tensor, units_BN: Tensor) -> BlockTerms:
    """Terms in the form that takes less time.

    Args:
        added: The terms.
        per_unit_B: What the terms of each query are multiplied with when they are added to products.
        num_blocks: Number of blocks of items.
        sums_BN: Memory of the size of a block, int32, contiguous.
        units_BN: The same, of its own.
    """
    num_queries, width = sums_BN.shape
    if added.rows_LR.nnz * _ITEMS_PER_ENTRY < num_queries * num_blocks * width:
        return _SparseTerms(added, per_unit_B, num_blocks, width)
    return _DenseTerms(added, per_unit_B, num_blocks, sums_BN, units_BN)


class _DenseTerms:
    """Sums of terms as rows of a block."""

    def __init__(self, added: TermRows, per_unit_B: Floats, num_blocks: int, sums_BN: Tensor, units_BN: Tensor) -> None:
        self._sums_BN, self._units_BN = sums_BN.view(torch.float32), units_BN
        self._per_unit_B1 = torch.from_numpy(per_unit_B).unsqueeze(1)
        self._width = sums_BN.shape[1]
        self._rows_BR = added.rows_by_query(num_blocks * self._width)

    def add_to(self, products_BN: Tensor, number: int) -> None:
        """See `BlockTerms.add_to`."""
        rows_BN = self._rows_BR
        if self._width < rows_BN.shape[1]:
            rows_BN = rows_BN[:, number * self._width : (number + 1) * self._width]
        rows_BN.toarray(out=self._sums_BN.numpy())
        # In the memory of the integers that they become.
        scaled_BN = self._units_BN.view(torch.float32)
        torch.mul(self._sums_BN, self._per_unit_B1, out=scaled_BN)
        self._units_BN.copy_(scaled_BN)
        products_BN.add_(self._units_BN)

    def of_candidates(self, places_C: Ints) -> Floats:
        """See `BlockTerms.of_candidates`."""
        sums_C: Floats = self._sums_BN.numpy().reshape(-1).take(places_C)
        return sums_C


class _SparseTerms:
    """Entries of term rows in order of blocks of items, and within one in order of the rows."""

    def __init__(self, added: TermRows, per_unit_B: Floats, num_blocks: int, width: int) -> None:
        rows = added.rows_by_query(num_blocks * width)
        entries_B = np.diff(rows.indptr)
        block_E, places_E = np.divmod(rows.indices.astype(np.int64), width)
        places_E += np.repeat(np.arange(len(entries_B)) * width, entries_B)
        order = np.argsort(block_E.astype(np.int16), kind="stable")
        self._places_E, self._values_E = places_E[order], rows.data[order]
        self._units_E = (rows.data * np.repeat(per_unit_B, entries_B))[order].astype(np.int32)
        self._offsets = np.concatenate([[0], np.bincount(block_E, minlength=num_blocks).cumsum()])
        self._entries, self._size = slice(0), len(entries_B) * width

    def add_to(self, products_BN: Tensor, number: int) -> None:
        """See `BlockTerms.add_to`."""
        self._entries = slice(self._offsets[number], self._offsets[number + 1])
        np.add.at(products_BN.numpy().reshape(-1), self._places_E[self._entries], self._units_E[self._entries])

    def of_candidates(self, places_C: Ints) -> Floats:
        """See `BlockTerms.of_candidates`."""
        places_E, values_E = self._places_E[self._entries], self._values_E[self._entries]
        is_candidate = np.zeros(self._size, np.bool_)
        is_candidate[places_C] = True
        chosen = np.flatnonzero(is_candidate.take(places_E))
        sums_C = np.zeros(len(places_C), np.float32)
        np.add.at(sums_C, np.searchsorted(places_C, places_E[chosen]), values_E[chosen])
        return sums_C
