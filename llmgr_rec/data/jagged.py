"""Rows of different lengths stored as one flat tensor.

Shapes: R rows, S flat values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass
class Jagged:
    """Rows of different lengths, end to end.

    Args:
        values: Values of all rows in order, [S].
        offsets: Start of each row in `values` and, last, the end of the last one, int64 [R + 1]; the first is 0.
    """

    values: Tensor
    offsets: Tensor

    @classmethod
    def empty(cls, num_rows: int, dtype: torch.dtype = torch.int64) -> "Jagged":
        """`num_rows` rows that hold nothing."""
        return cls(torch.empty(0, dtype=dtype), torch.zeros(num_rows + 1, dtype=torch.int64))

    @classmethod
    def from_lengths(cls, values: Tensor, lengths: Tensor) -> "Jagged":
        """Cuts flat values [S] into rows of the given lengths [R]."""
        return cls(values, lengths_to_offsets(lengths))

    @classmethod
    def beside(cls, parts: Sequence["Jagged"]) -> "Jagged":
        """Rows made of the same rows of several parts, in the order of the parts.

        Args:
            parts: At least one; all with R rows.
        """
        offsets = lengths_to_offsets(torch.stack([part.lengths for part in parts]).sum(0))
        values = parts[0].values.new_empty(sum(part.values.numel() for part in parts))
        start_R = offsets[:-1]
        for part in parts:
            values.index_copy_(0, ranges(start_R, part.offsets, part.values.numel()), part.values)
            start_R = start_R + part.lengths
        return cls(values, offsets)

    @property
    def num_rows(self) -> int:
        """Number of rows R."""
        return self.offsets.numel() - 1

    @property
    def lengths(self) -> Tensor:
        """Length of each row, int64 [R]."""
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def row_of_value(self) -> Tensor:
        """Row that each value belongs to, int64 [S]."""
        rows = torch.arange(self.num_rows, device=self.offsets.device)
        return torch.repeat_interleave(rows, self.lengths, output_size=self.values.shape[0])

    def select(self, rows: Tensor) -> "Jagged":
        """The given rows, in the given order and as often as given.

        Args:
            rows: Row numbers 0 .. R - 1, int64 of any length.
        """
        if self._has_one_value_a_row:
            return Jagged(self.values.index_select(0, rows), torch.arange(rows.numel() + 1))
        # index_select gathers some three times as fast as indexing with brackets.
        starts = self.offsets.index_select(0, rows)
        return self.gather(starts, self.offsets.index_select(0, rows + 1) - starts)

    @cached_property
    def _has_one_value_a_row(self) -> bool:
        # As an item has one brand: selecting is then a single gather. A GPU would have to be waited for.
        on_cpu = self.offsets.device.type == "cpu"
        return on_cpu and self.values.numel() == self.num_rows and bool((self.lengths == 1).all())

    def gather(self, starts: Tensor, lengths: Tensor, total: int | None = None) -> "Jagged":
        """Runs of values that need not be whole rows.

        Args:
            starts: Position of the first value of each run in `values`, int64.
            lengths: Number of values of each run, int64.
            total: Sum of the lengths; None asks the tensor, for which a GPU has to be waited for.
        """
        offsets = lengths_to_offsets(lengths)
        return Jagged(self.values.index_select(0, ranges(starts, offsets, total)), offsets)

    def narrow(self, start: int, stop: int) -> "Jagged":
        """Rows start .. stop - 1; the values are a view."""
        offsets = self.offsets[start : stop + 1]
        return Jagged(self.values[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0])

    def to(self, device: torch.device, non_blocking: bool = False) -> "Jagged":
        """The same rows on another device."""
        return Jagged(
            self.values.to(device, non_blocking=non_blocking), self.offsets.to(device, non_blocking=non_blocking)
        )

    def pin_memory(self) -> "Jagged":
        """The same rows in page-locked memory."""
        return Jagged(self.values.pin_memory(), self.offsets.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the memory from reuse until `stream` has done its work."""
        self.values.record_stream(stream)
        self.offsets.record_stream(stream)


def lengths_to_offsets(lengths: Tensor) -> Tensor:
    """Row starts and the end of the last row, int64 [R + 1], of row lengths [R]."""
    offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int64, device=lengths.device)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return offsets


def ranges(starts: Tensor, offsets: Tensor, total: int | None = None) -> Tensor:
    """Integer ranges end to end: run r counts up from `starts[r]` and fills positions offsets[r] .. offsets[r + 1] - 1.

    Args:
        starts: First integer of each run, int64 [R].
        offsets: Place of each run in the result, int64 [R + 1], beginning with 0.
        total: Length of the result, the last offset; None asks the tensor, for which a GPU has to be waited for.
    """
    if total is None:
        total = int(offsets[-1])
    shifts, lengths = starts - offsets[:-1], offsets[1:] - offsets[:-1]
    if starts.device.type == "cpu":
        # Torch's own starts threads for any size, which disturb those of the training beside it.
        places = np.repeat(shifts.numpy(), lengths.numpy())
        places += np.arange(total)
        return torch.from_numpy(places)
    return torch.repeat_interleave(shifts, lengths, output_size=total).add_(torch.arange(total, device=starts.device))
