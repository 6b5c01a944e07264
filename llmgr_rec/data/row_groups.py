"""Parquet row groups of a split: sizes from the file footers, and decoded content with a small cache.

Shapes: R rows of a row group, S clicks of a row group.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from llmgr_rec.data.jagged import Jagged
from llmgr_rec.errors import UserError

K = TypeVar("K")
T = TypeVar("T")

_COLUMNS = ("items", "target")
_REMEDY = "prepare the data set again with python -m llmgr_rec.prepare"


@dataclass(frozen=True)
class RowGroupLocation:
    """Part file and number of a row group.

    Args:
        file: Part file.
        number: Number of the row group in the file.
    """

    file: Path
    number: int

    def __str__(self) -> str:
        return f"{self.file}, row group {self.number}"


@dataclass(frozen=True)
class RowGroup:
    """A decoded row group.

    Args:
        items: Item indices of each row, oldest first, int64 [S] in R rows.
        targets_R: Item that followed each row, int64.
    """

    items: Jagged
    targets_R: Tensor


class LRUCache(Generic[K, T]):
    """Least-recently-used cache of results. `functools.lru_cache` cannot be pickled for worker processes.

    The function that makes a result is given with each call: a cache that keeps a method of its owner is a reference
    cycle, and the owner, with all that it refers to, then stays until the garbage collector looks for cycles.

    Args:
        max_size: Maximum number of results in the cache.
    """

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._results: OrderedDict[K, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._results)

    def get(self, key: K, make: Callable[[K], T]) -> T:
        """Returns the result for `key`, from the cache or computed now.

        Args:
            key: The key.
            make: Computes the result for a key.
        """
        if key not in self._results:
            result = make(key)
            while len(self._results) >= self._max_size:
                self._results.popitem(last=False)
            self._results[key] = result
        self._results.move_to_end(key)
        return self._results[key]


class RowGroups:
    """Sequence of all row groups of a split. The constructor reads and checks the footers; indexing reads the content.

    The range of the item indices is checked by the column statistics of the footers. Only row groups without statistics
    or with nulls are read for this check.

    Args:
        parts: Part files of the split; read in sorted order.
        num_items: Size V of the catalog; item indices must be below it.
        by_click: Whether each click of a row is an example (prefix augmentation); otherwise each row is one.
        max_cached: Maximum number of decoded row groups in memory.

    Raises:
        UserError: A file is unreadable or lacks a column, or an index is null or out of range.
    """

    def __init__(self, parts: list[Path], *, num_items: int, by_click: bool, max_cached: int = 2) -> None:
        self.num_items = num_items
        self.by_click = by_click
        self.decoded: LRUCache[int, RowGroup] = LRUCache(max_cached)
        self.locations: list[RowGroupLocation] = []
        self.files: list[tuple[str, int, int]] = []
        sizes: list[int] = []
        unchecked: list[int] = []
        for part in sorted(parts):
            metadata = _read_footer(part)
            items, target = _find_columns(metadata, part)
            self.files.append((part.name, part.stat().st_size, metadata.num_rows))
            for number in range(metadata.num_row_groups):
                group = metadata.row_group(number)
                if not group.num_rows:
                    continue
                if not (self._is_in_range(group.column(items)) and self._is_in_range(group.column(target))):
                    unchecked.append(len(self.locations))
                self.locations.append(RowGroupLocation(part, number))
                sizes.append(group.column(items).num_values if by_click else group.num_rows)
        self.sizes = np.array(sizes, dtype=np.int64)
        self.first_example = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        for index in unchecked:
            self._decode(index)

    def __len__(self) -> int:
        return len(self.locations)

    @property
    def num_examples(self) -> int:
        """Number of examples of all row groups."""
        return int(self.first_example[-1])

    def fingerprint(self) -> str:
        """Hash over the names, sizes and row counts of the part files."""
        return hashlib.sha256(repr(self.files).encode()).hexdigest()

    def __getitem__(self, index: int) -> RowGroup:
        """Decoded content of row group `index`."""
        return self.decoded.get(index, self._decode)

    def _is_in_range(self, column: pq.ColumnChunkMetaData) -> bool:
        """Whether the statistics of a column exclude nulls and indices out of range."""
        statistics = column.statistics if column.is_stats_set else None
        if statistics is None or not statistics.has_min_max or not statistics.has_null_count or statistics.null_count:
            return False
        return statistics.min >= 0 and statistics.max < self.num_items

    def _decode(self, index: int) -> RowGroup:
        location = self.locations[index]
        items, target = _read_group(location)
        _refuse_nulls(items, location, "items")
        _refuse_nulls(target, location, "target")
        # The values of a sliced list array include those outside of the slice.
        offsets = np.asarray(items.offsets, dtype=np.int64)
        clicks = items.values.slice(offsets[0], offsets[-1] - offsets[0])
        _refuse_nulls(clicks, location, "items")
        # Copies, because tensors do not respect that Arrow's memory is read-only, and to free the decoder's buffers.
        group = RowGroup(
            items=Jagged(torch.from_numpy(np.array(clicks)), torch.from_numpy(offsets - offsets[0])),
            targets_R=torch.from_numpy(np.array(target)),
        )
        self._refuse_out_of_range(group.items.values, location, "items")
        self._refuse_out_of_range(group.targets_R, location, "target")
        if self.by_click and group.items.values.numel() != self.sizes[index]:
            raise UserError(f"{location}: column items has an empty list; {_REMEDY}")
        return group

    def _refuse_out_of_range(self, values: Tensor, location: RowGroupLocation, column: str) -> None:
        if not values.numel():
            return
        # Not torch.min and max, which start threads; they would compete with the training threads.
        low, high = int(values.numpy().min()), int(values.numpy().max())
        if low < 0 or high >= self.num_items:
            raise UserError(
                f"{location}: column {column} has item index {low if low < 0 else high}, "
                f"but the catalog has items 0 to {self.num_items - 1}; {_REMEDY}"
            )


def _read_footer(part: Path) -> pq.FileMetaData:
    if not part.is_file():
        raise UserError(f"{part} does not exist; {_REMEDY}")
    try:
        return pq.read_metadata(part)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{part} is truncated or not a Parquet file ({reason}); {_REMEDY}") from None


def _find_columns(metadata: pq.FileMetaData, part: Path) -> tuple[int, int]:
    """Indices of the leaf columns of `items` and `target` in the footer."""
    schema = metadata.schema.to_arrow_schema()
    for name in _COLUMNS:
        if name not in schema.names:
            raise UserError(f"{part} has no column {name}; {_REMEDY}")
    items, target = schema.field("items").type, schema.field("target").type
    is_list = pa.types.is_list(items) or pa.types.is_large_list(items)
    if not (is_list and pa.types.is_int64(items.value_type)):
        raise UserError(f"{part}: column items is {items}, not list<int64>; {_REMEDY}")
    if not pa.types.is_int64(target):
        raise UserError(f"{part}: column target is {target}, not int64; {_REMEDY}")
    leaves = {metadata.schema.column(leaf).path.split(".")[0]: leaf for leaf in range(metadata.num_columns)}
    return leaves["items"], leaves["target"]


def _read_group(location: RowGroupLocation) -> tuple[pa.Array, pa.Array]:
    try:
        with pq.ParquetFile(location.file) as file:
            rows = file.metadata.row_group(location.number).num_rows
            batches = file.iter_batches(
                batch_size=rows, row_groups=[location.number], columns=list(_COLUMNS), use_threads=False
            )
            table = pa.Table.from_batches(list(batches))
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{location}: unreadable ({str(error).splitlines()[0]}); {_REMEDY}") from None
    items, target = (table[name].combine_chunks() for name in _COLUMNS)
    return items, target


def _refuse_nulls(array: pa.Array, location: RowGroupLocation, column: str) -> None:
    if array.null_count:
        raise UserError(f"{location}: column {column} has {array.null_count} nulls; {_REMEDY}")
