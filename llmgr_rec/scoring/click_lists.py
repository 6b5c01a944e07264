"""Clicks of the sessions of a list column, flat and with offsets.

Shapes: B sessions, L clicks.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def flat_clicks(lists: pa.ChunkedArray) -> tuple[pa.Array, Ints, int]:
    """The clicks of all sessions.

    Args:
        lists: Item ids of each session, oldest click first; lists of any kind, none of them null.

    Returns:
        Item ids [L], the first click of each session, int64 [B + 1], and the number of null ids, NaN included.
    """
    array = lists.combine_chunks()
    # Not casts and offsets: pyarrow 26 loses the last list of a view when it casts it to a list.
    ids_L, lengths_B = array.flatten(), pc.list_value_length(array).to_numpy(zero_copy_only=False)
    offsets_B1 = np.concatenate([[0], np.cumsum(lengths_B, dtype=np.int64)])
    # NaN is the null of pandas in a list of numbers.
    nulls = pc.sum(pc.is_null(ids_L, nan_is_null=True)).as_py() or 0
    return ids_L, offsets_B1, nulls


def known_clicks(items_L: Ints, offsets_B1: Ints) -> tuple[Ints, Ints]:
    """The clicks on known items.

    Args:
        items_L: Item index of each click; -1 for an unknown item.
        offsets_B1: First click of each session.

    Returns:
        Item indices without the unknown ones, and the first click of each session among them, int64 [B + 1].
    """
    is_known_L = items_L >= 0
    known_before = np.concatenate([[0], np.cumsum(is_known_L)])
    return items_L[is_known_L], known_before[offsets_B1]
