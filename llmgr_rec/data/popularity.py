"""The items of a catalog by popularity, in little memory: each process has such arrays of up to 10^8 items.

Shapes: V items.
"""

import numpy as np
from numpy.typing import NDArray

_LARGEST_INT32 = np.iinfo(np.int32).max


def by_popularity(counts_V: NDArray[np.int64]) -> NDArray[np.int32] | NDArray[np.int64]:
    """Items by falling number of clicks, equal ones by index: int32 [V], or int64 where that is too small.

    A number is sorted in place whose high bits are the clicks and whose low bits are the item, which takes a third of
    the memory of argsort.

    Args:
        counts_V: Number of clicks of each item.
    """
    highest = int(counts_V.max(initial=0))
    if len(counts_V) > _LARGEST_INT32 or highest > _LARGEST_INT32:
        return np.argsort(-counts_V, kind="stable")
    keys_V = np.subtract(highest, counts_V, dtype=np.int64)
    keys_V <<= 32
    keys_V |= np.arange(len(keys_V), dtype=np.int32)
    keys_V.sort()
    keys_V &= _LARGEST_INT32
    return keys_V.astype(np.int32)
