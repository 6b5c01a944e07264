"""Product of two sparse matrices, row block by row block, sparse or dense.

SciPy's product of sparse matrices keeps a list of the columns that it meets. Where a row meets many columns, adding
into a dense row is faster, which MKL does. Both add in the order of the entries of the left row, so their results are
equal.

Shapes: B rows of the left matrix, U rows of a block, F features, V columns of the right matrix, D = V rounded up to a
multiple of `ALIGNED`.
"""

import functools
import warnings
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

Floats = NDArray[np.float64]
# Values, indices and offsets of a sparse matrix.
_Arrays: TypeAlias = tuple[Floats, NDArray[np.integer], NDArray[np.integer]]

# The width of dense products is a multiple of it.
ALIGNED = 64
# A product is dense if it takes more than one addition for so many columns.
_COLUMNS_PER_ADDITION = 24
# Values of a block of dense rows. They and MKL's own copy of them should stay in the second cache.
_BLOCK_VALUES = 1 << 18
# MKL takes 32-bit indices.
_MAX_ENTRIES = 2**31 - 1


class SparseProduct:
    """A sparse matrix that is multiplied from the left by blocks of sparse rows."""

    def __init__(self, right_FV: sparse.csr_array) -> None:
        """Prepares the right side once for all blocks.

        Args:
            right_FV: The right matrix, float64.
        """
        num_features, self.width = right_FV.shape
        self._right_FV = right_FV
        shape = (num_features, -(-self.width // ALIGNED) * ALIGNED)
        arrays = (right_FV.data, right_FV.indices, right_FV.indptr)
        self._right_FD = sparse.csr_array(arrays, shape)
        self._tensor_FD = _tensor(arrays, shape) if has_mkl() and right_FV.nnz <= _MAX_ENTRIES else None

    def additions(self, left_BF: sparse.csr_array) -> NDArray[np.int64]:
        """Number of additions of each row of a product, int64 [B]; at least that of its entries."""
        entries_F = np.diff(self._right_FV.indptr).astype(np.int64)
        sums = np.concatenate([[0], np.cumsum(entries_F[left_BF.indices])])
        return np.diff(sums[left_BF.indptr])

    def is_dense(self, additions_B: NDArray[np.int64]) -> bool:
        """Whether a dense product of rows with so many additions takes less time than a sparse one."""
        return int(additions_B.sum()) * _COLUMNS_PER_ADDITION > len(additions_B) * self.width

    def sparse_rows(self, left_BF: sparse.csr_array) -> sparse.csr_array:
        """The product as a sparse matrix [B, V], with unsorted indices and without duplicates."""
        return sparse.csr_array(left_BF @ self._right_FV)

    def dense_blocks(self, left_BF: sparse.csr_array) -> Iterator[tuple[int, Floats]]:
        """The product as a matrix, in blocks of rows.

        Args:
            left_BF: Rows, float64; may have several entries of one feature.

        Yields:
            The first row of a block, and the block, float64 [U, D], with zeros from column V on. The next block
            replaces its values.
        """
        num_rows, depth = left_BF.shape[0], self._right_FD.shape[1]
        rows = min(max(_BLOCK_VALUES // depth, 1), max(num_rows, 1))
        block_UD = torch.empty(rows, depth, dtype=torch.float64)
        for start in range(0, num_rows, rows):
            offsets = left_BF.indptr[start : start + rows + 1]
            entries = slice(offsets[0], offsets[-1])
            shape = (len(offsets) - 1, left_BF.shape[1])
            arrays = (left_BF.data[entries], left_BF.indices[entries], offsets - offsets[0])
            yield start, self._multiplied(arrays, shape, block_UD[: shape[0]])

    def _multiplied(self, left: _Arrays, shape: tuple[int, int], block_UD: Tensor) -> Floats:
        if self._tensor_FD is None or not len(left[0]):
            return (sparse.csr_array(left, shape) @ self._right_FD).toarray()
        torch.addmm(block_UD, _tensor(left, shape), self._tensor_FD, beta=0, out=block_UD)
        return block_UD.numpy()


@functools.cache
def has_mkl() -> bool:
    """Whether PyTorch multiplies sparse matrices on this processor; without MKL, as in its wheels for ARM, not."""
    one = (np.ones(1), np.zeros(1, np.int32), np.array([0, 1], np.int32))
    with warnings.catch_warnings():
        # PyTorch says once that its support of sparse matrices is in beta.
        warnings.simplefilter("ignore", UserWarning)
        try:
            tensor = _tensor(one, (1, 1))
            return bool(torch.addmm(torch.zeros(1, 1, dtype=torch.float64), tensor, tensor) == 1)
        except RuntimeError:
            return False


def _tensor(matrix: _Arrays, shape: tuple[int, int]) -> Tensor:
    values, indices, offsets = matrix
    offsets_B1, columns = (torch.from_numpy(part.astype(np.int32, copy=False)) for part in (offsets, indices))
    return torch.sparse_csr_tensor(offsets_B1, columns, torch.from_numpy(values), shape)
