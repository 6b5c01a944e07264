"""Positions of texts in a column: a sorted index, made once, in place of a hash table for each look-up.

Shapes: V texts of the column, N texts to find, T bytes of texts.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

# Odd, so that its powers are distinct; from the literature on multiplicative hashing (Steele and Vigna, 2021).
_MULTIPLIER = 0xD1342543DE82EF95
# Texts that are hashed at a time, which takes some 24 bytes a byte.
_HASHED_TEXTS = 1 << 16


class TextIndex:
    """Finds texts by a binary search of their 64-bit hashes. What it finds is compared with the text itself.

    Args:
        texts_V: The column, large_string, without nulls and duplicates.
    """

    def __init__(self, texts_V: pa.Array) -> None:
        self._texts_V = texts_V
        hashes_V = np.empty(len(texts_V), np.uint64)
        for first in range(0, len(texts_V), _HASHED_TEXTS):
            hashes_V[first : first + _HASHED_TEXTS] = text_hashes(texts_V.slice(first, _HASHED_TEXTS))
        self._order_V = np.argsort(hashes_V)
        self._hashes_V = hashes_V[self._order_V]
        # A binary search finds one text of each hash.
        self._is_unique = not (self._hashes_V[1:] == self._hashes_V[:-1]).any()

    def positions(self, texts_N: pa.Array) -> NDArray[np.int64]:
        """Position of each text in the column, int64 [N]; -1 for unknown texts and nulls.

        Args:
            texts_N: Texts, large_string.
        """
        if not self._is_unique:
            found = pc.index_in(texts_N, value_set=self._texts_V, skip_nulls=True)
            return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        hashes_N = text_hashes(texts_N)
        places_N = np.minimum(np.searchsorted(self._hashes_V, hashes_N), len(self._order_V) - 1)
        positions_N = self._order_V[places_N]
        is_equal_N = pc.equal(self._texts_V.take(pa.array(positions_N)), texts_N)
        if texts_N.null_count:
            is_equal_N = is_equal_N.fill_null(False)
        return np.where(is_equal_N.to_numpy(zero_copy_only=False), positions_N, -1)


def text_hashes(texts_N: pa.Array) -> NDArray[np.uint64]:
    """Polynomial hash modulo 2^64 of the bytes of each text, uint64 [N].

    Args:
        texts_N: Texts, large_string.
    """
    offsets = np.frombuffer(texts_N.buffers()[1], np.int64)[texts_N.offset : texts_N.offset + len(texts_N) + 1]
    data = texts_N.buffers()[2]
    content_T = np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]] if data is not None else np.empty(0, np.uint8)
    starts_N, lengths_N = offsets[:-1] - offsets[0], np.diff(offsets)
    place_T = np.arange(len(content_T)) - np.repeat(starts_N, lengths_N)
    powers = np.full(int(lengths_N.max(initial=0)) + 1, _MULTIPLIER, np.uint64).cumprod()
    # Not 0 for any byte, so that texts of different lengths differ. Sums and products wrap around.
    sums_T = np.zeros(len(content_T) + 1, np.uint64)
    np.cumsum((content_T + np.uint64(1)) * powers[place_T], out=sums_T[1:])
    hashes: NDArray[np.uint64] = sums_T[starts_N + lengths_N] - sums_T[starts_N]
    return hashes
