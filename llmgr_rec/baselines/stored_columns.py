"""Some columns of a sparse matrix in an npz file, read with memory for these columns and a block.

Shapes: V rows, R columns of a range.
"""

from typing import IO
from zipfile import ZipFile

import numpy as np
from numpy.lib import format as npy
from scipy import sparse

# Entries that are read at a time.
_BLOCK_ENTRIES = 1 << 20


def read_columns(opened: IO[bytes], columns: range) -> sparse.csr_array:
    """Reads a range of columns of the matrix with the arrays `indptr`, `indices` and `values`.

    Args:
        opened: A file that `np.savez` wrote.
        columns: The columns.

    Returns:
        Sparse matrix [V, R] with 32-bit indices, whose entries are in the order of the file.

    Raises:
        ValueError: The file is damaged; as for `np.load`, also KeyError, OSError, EOFError and BadZipFile.
    """
    with ZipFile(opened) as archive:
        with archive.open("indptr.npy") as file:
            offsets = npy.read_array(file, allow_pickle=False)
        kept_V = np.zeros(len(offsets) - 1, np.int64)
        indices, values = [np.empty(0, np.int32)], [np.empty(0, np.float32)]
        with archive.open("indices.npy") as index_file, archive.open("values.npy") as value_file:
            index_type, value_type = _data_type(index_file), _data_type(value_file)
            for start in range(0, int(offsets[-1]), _BLOCK_ENTRIES):
                count = min(_BLOCK_ENTRIES, int(offsets[-1]) - start)
                # Reads of the whole file check its sums.
                block = np.frombuffer(index_file.read(count * index_type.itemsize), index_type)
                numbers = np.frombuffer(value_file.read(count * value_type.itemsize), value_type)
                if len(block) != count or len(numbers) != count:
                    raise ValueError("an array is shorter than the others")
                (kept,) = np.nonzero((block >= columns.start) & (block < columns.stop))
                rows = np.searchsorted(offsets, start + kept, side="right") - 1
                if len(rows):
                    kept_V[rows[0] : rows[-1] + 1] += np.bincount(rows - rows[0])
                indices.append((block[kept] - columns.start).astype(np.int32))
                values.append(numbers[kept])
    arrays = (np.concatenate(values), np.concatenate(indices), np.concatenate([[0], np.cumsum(kept_V)]))
    return sparse.csr_array(arrays, shape=(len(kept_V), len(columns)))


def _data_type(file: IO[bytes]) -> np.dtype[np.generic]:
    """Reads the header of an array in NumPy's format, and returns the type of its values."""
    if npy.read_magic(file) != (1, 0):
        raise ValueError("an array has another version of NumPy's format")
    _, _, found = npy.read_array_header_1_0(file)
    if found.hasobject:
        raise ValueError("an array has objects")
    return found
