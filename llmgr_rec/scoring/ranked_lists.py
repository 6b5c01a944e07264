"""Ranked lists of items as columns of the output.

Shapes: R rows, K items of a list.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

# Largest offset of an array whose offsets have 32 bits.
_MAX_OFFSET = 2**31 - 1


class RankedLists:
    """Makes the columns `item_ids` and `scores` of the parts of a job.

    Args:
        item_ids: Raw id of each item index, string or int64.
        rows: Rows of the longest part of the job. All parts have the same types: offsets of 64 bits if the lists of
            that part may need them, otherwise of 32 bits.
        k: Length of a list.
    """

    def __init__(self, item_ids: pa.Array, rows: int, k: int) -> None:
        is_text = pa.types.is_string(item_ids.type)
        longest = pc.max(pc.binary_length(item_ids)).as_py() if is_text else 1
        self._is_large = rows * k * max(longest, 1) > _MAX_OFFSET
        self._item_ids = item_ids.cast(pa.large_string()) if is_text and self._is_large else item_ids

    def columns(self, ids_RK: NDArray[np.int64], scores_RK: NDArray[np.float32]) -> dict[str, pa.Array]:
        """The columns of a part.

        Args:
            ids_RK: Item indices, best first; a list ends before the first negative one.
            scores_RK: Their scores.
        """
        is_item_RK = ids_RK >= 0
        offsets = np.concatenate([[0], np.cumsum(is_item_RK.sum(1))])
        item_ids = self._item_ids.take(pa.array(ids_RK[is_item_RK]))
        scores = pa.array(scores_RK[is_item_RK], type=pa.float32())
        return {"item_ids": self._lists(offsets, item_ids), "scores": self._lists(offsets, scores)}

    def _lists(self, offsets: NDArray[np.int64], values: pa.Array) -> pa.Array:
        if self._is_large:
            return pa.LargeListArray.from_arrays(pa.array(offsets), values)
        return pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), values)
