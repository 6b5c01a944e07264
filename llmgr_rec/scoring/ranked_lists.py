"""Ranked lists of items as list columns.

Shapes: R rows, V items of the catalog, K items of a list, B sessions, N items of all lists.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

# Largest offset of an array whose offsets have 32 bits.
_MAX_OFFSET = 2**31 - 1


class RankedLists:
    """Makes the list columns of the parts of a job: `item_ids`, `titles` if there are any, and `scores`.

    Args:
        values: Value of each item index by name of the column: `item_ids` (string or int64), `titles` (string).
        rows: Rows of the longest part of the job. All parts have the same types: offsets of 64 bits if the lists of
            that part may need them, otherwise of 32 bits.
        k: Length of a list.
    """

    def __init__(self, values: Mapping[str, pa.Array], rows: int, k: int) -> None:
        self._is_large = rows * k * max(map(_longest, values.values())) > _MAX_OFFSET
        self._values = {name: _large(column) if self._is_large else column for name, column in values.items()}

    def columns(self, ids_RK: NDArray[np.int64], scores_RK: NDArray[np.float32]) -> dict[str, pa.Array]:
        """The columns of a part.

        Args:
            ids_RK: Item indices, best first; a list ends before the first negative one.
            scores_RK: Their scores.
        """
        return list_columns(self._values, ids_RK, scores_RK, self._is_large)


def rows_of_short_offsets(values: Mapping[str, pa.Array], k: int) -> int:
    """Most rows, at least 1, whose lists surely need offsets of 32 bits only.

    Args:
        values: Value of each item index by name of the column.
        k: Length of a list.
    """
    return max(_MAX_OFFSET // (k * max(map(_longest, values.values()))), 1)


def _longest(values: pa.Array) -> int:
    """Bytes of the longest text, at least 1; 1 for numbers."""
    if not pa.types.is_string(values.type):
        return 1
    return max(pc.max(pc.binary_length(values)).as_py() or 0, 1)


def _large(values: pa.Array) -> pa.Array:
    return values.cast(pa.large_string()) if pa.types.is_string(values.type) else values


def list_columns(
    values: Mapping[str, pa.Array], ids_RK: NDArray[np.int64], scores_RK: NDArray[np.float32], is_large: bool
) -> dict[str, pa.Array]:
    """A column of lists for each kind of value, such as ids and titles, and last the column `scores`, float32.

    Args:
        values: Value of each item index, [V], by name of the column.
        ids_RK: Item indices, best first; a list ends before the first negative one.
        scores_RK: Their scores.
        is_large: Whether the lists have offsets of 64 bits, otherwise of 32 bits.
    """
    is_item_RK = ids_RK >= 0
    kind, offset_type = (pa.LargeListArray, pa.int64()) if is_large else (pa.ListArray, pa.int32())
    offsets = pa.array(np.concatenate([[0], np.cumsum(is_item_RK.sum(1))]), offset_type)
    taken = pa.array(ids_RK[is_item_RK])
    columns = {name: of_items.take(taken) for name, of_items in values.items()}
    columns["scores"] = pa.array(scores_RK[is_item_RK], pa.float32())
    return {name: kind.from_arrays(offsets, column) for name, column in columns.items()}


def long_rows(lists: pa.Table) -> pa.Table:
    """Ranked lists with one row an item: `session_id`, `rank` (from 1), `item_id`, `title`, `score`, `fallback`.

    Args:
        lists: One row a session: `session_id`, the lists `item_ids`, `titles` and `scores`, and `fallback`.
    """
    item_ids = lists["item_ids"].combine_chunks()
    session_N = pc.list_parent_indices(item_ids)
    first_B = item_ids.offsets.to_numpy()[:-1]
    rank_N = 1 + np.arange(len(session_N)) - first_B[session_N.to_numpy()]
    values = {name: lists[name].combine_chunks().flatten() for name in ("item_ids", "titles", "scores")}
    return pa.table(
        {
            "session_id": lists["session_id"].take(session_N),
            "rank": rank_N,
            "item_id": values["item_ids"],
            "title": values["titles"],
            "score": values["scores"],
            "fallback": lists["fallback"].take(session_N),
        }
    )
