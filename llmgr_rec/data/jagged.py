"""Jagged tensors: rows of different lengths, stored as one flat tensor of values and the offsets of the rows.

TorchRec's `JaggedTensor` stores the same data; this class adds row selection and concatenation on the CPU.

Shapes: R rows, S values of all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int64]


@dataclass
class Jagged:
    """Rows of different lengths.

    Args:
        values: Values of all rows, concatenated, [S].
        offsets: Start of each row in `values`, int64 [R + 1]; the first entry is 0, the last is S.
    """

    values: Tensor
    offsets: Tensor

    @classmethod
    def empty(cls, num_rows: int, dtype: torch.dtype = torch.int64) -> "Jagged":
        """A jagged tensor of `num_rows` empty rows."""
        return cls(torch.empty(0, dtype=dtype), torch.zeros(num_rows + 1, dtype=torch.int64))

    @classmethod
    def from_lengths(cls, values: Tensor, lengths: Tensor) -> "Jagged":
        """Splits values [S] into rows of the given lengths, int64 [R]."""
        return cls(values, lengths_to_offsets(lengths))

    @classmethod
    def concatenate(cls, parts: Sequence["Jagged"]) -> "Jagged":
        """Concatenates row r of all parts to row r of the result, as `torch.cat` does with dim=1.

        Args:
            parts: One or more, all with R rows.
        """
        offsets = lengths_to_offsets(torch.stack([part.lengths for part in parts]).sum(0))
        values = parts[0].values.new_empty(sum(part.values.numel() for part in parts))
        start_R = offsets[:-1]
        for part in parts:
            values.index_copy_(0, ranges(start_R, part.offsets, part.values.numel()), part.values)
            start_R = start_R + part.lengths
        return cls(values, offsets)

    @classmethod
    def stack(cls, parts: Sequence["Jagged"]) -> "Jagged":
        """The rows of all parts, one part after the other.

        Args:
            parts: One or more.
        """
        if len(parts) == 1:
            return parts[0]
        return cls.from_lengths(torch.cat([part.values for part in parts]), torch.cat([part.lengths for part in parts]))

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

    def row(self, number: int) -> Tensor:
        """The values of a row, a view."""
        return self.values[int(self.offsets[number]) : int(self.offsets[number + 1])]

    def select(self, rows: Tensor) -> "Jagged":
        """Selects rows, as `torch.index_select` does.

        Args:
            rows: Row numbers 0 .. R - 1, int64, in any order, with or without repetitions.
        """
        if self._has_one_value_a_row:
            return Jagged(self.values.index_select(0, rows), torch.arange(rows.numel() + 1))
        if rows.device.type == "cpu":
            offsets, chosen = self.offsets.numpy(), rows.numpy()
            starts_R = offsets[chosen]
            return self._gather_on_cpu(starts_R, offsets[1:][chosen] - starts_R)
        # index_select is about three times as fast as indexing with brackets.
        starts = self.offsets.index_select(0, rows)
        return self.gather(starts, self.offsets.index_select(0, rows + 1) - starts)

    @cached_property
    def _has_one_value_a_row(self) -> bool:
        # Such as the brands of items; a selection is then a single gather. The check would synchronize with a GPU.
        on_cpu = self.offsets.device.type == "cpu"
        return on_cpu and self.values.numel() == self.num_rows and bool((self.lengths == 1).all())

    def gather(self, starts: Tensor, lengths: Tensor, total: int | None = None) -> "Jagged":
        """Gathers slices of `values`, which may start and end inside of rows; each becomes a row of the result.

        Args:
            starts: Position of the first value of each slice in `values`, int64.
            lengths: Number of values of each slice, int64.
            total: Sum of the lengths; None computes it, which synchronizes with a GPU.
        """
        if starts.device.type == "cpu":
            return self._gather_on_cpu(starts.numpy(), lengths.numpy())
        offsets = lengths_to_offsets(lengths)
        return Jagged(self.values.index_select(0, ranges(starts, offsets, total)), offsets)

    def _gather_on_cpu(self, starts_R: IntArray, lengths_R: IntArray) -> "Jagged":
        # A batch of one session takes as long as its operators take to start, and numpy's start sooner.
        offsets = np.zeros(len(lengths_R) + 1, np.int64)
        np.cumsum(lengths_R, out=offsets[1:])
        positions = np.repeat(starts_R - offsets[:-1], lengths_R)
        positions += np.arange(offsets[-1])
        return Jagged(self.values.index_select(0, torch.from_numpy(positions)), torch.from_numpy(offsets))

    def last(self, count: int) -> "Jagged":
        """The last `count` values of each row, or all of a shorter row."""
        if self.offsets.device.type == "cpu":
            ends_R, lengths_R = self.offsets.numpy()[1:], np.minimum(np.diff(self.offsets.numpy()), count)
            return self._gather_on_cpu(ends_R - lengths_R, lengths_R)
        lengths = self.lengths.clamp(max=count)
        return self.gather(self.offsets[1:] - lengths, lengths)

    def where(self, is_kept: Tensor) -> "Jagged":
        """The rows with some of their values.

        Args:
            is_kept: Whether a value stays, bool [S].
        """
        return Jagged(self.values[is_kept], lengths_to_offsets(is_kept).index_select(0, self.offsets))

    def without_consecutive_repeats(self) -> "Jagged":
        """The rows without values that are equal to the value before them in their row."""
        is_kept = torch.ones_like(self.values, dtype=torch.bool)
        torch.ne(self.values[1:], self.values[:-1], out=is_kept[1:])
        is_kept[self.offsets[:-1][self.lengths > 0]] = True
        return self.where(is_kept)

    def narrow(self, start: int, stop: int) -> "Jagged":
        """Rows start .. stop - 1, with a view of the values."""
        offsets = self.offsets[start : stop + 1]
        return Jagged(self.values[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0])

    def to(self, device: torch.device, non_blocking: bool = False) -> "Jagged":
        """Copies the rows to a device."""
        return Jagged(
            self.values.to(device, non_blocking=non_blocking), self.offsets.to(device, non_blocking=non_blocking)
        )

    def pin_memory(self) -> "Jagged":
        """Copies the rows to page-locked memory."""
        return Jagged(self.values.pin_memory(), self.offsets.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Marks the tensors as used by `stream`; see `torch.Tensor.record_stream`."""
        self.values.record_stream(stream)
        self.offsets.record_stream(stream)


def lengths_to_offsets(lengths: Tensor) -> Tensor:
    """Offsets, int64 [R + 1], of rows with the given lengths [R]."""
    offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int64, device=lengths.device)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return offsets


def ranges(starts: Tensor, offsets: Tensor, total: int | None = None) -> Tensor:
    """Concatenated integer ranges: positions offsets[r] .. offsets[r + 1] - 1 of the result count up from `starts[r]`.

    Example: starts [5, 0], offsets [0, 2, 5] give [5, 6, 0, 1, 2].

    Args:
        starts: First integer of each range, int64 [R].
        offsets: Start of each range in the result, int64 [R + 1]; the first entry is 0.
        total: Length of the result, which is the last offset; None reads it, which synchronizes with a GPU.
    """
    if total is None:
        total = int(offsets[-1])
    shifts, lengths = starts - offsets[:-1], offsets[1:] - offsets[:-1]
    if starts.device.type == "cpu":
        # Not torch.repeat_interleave, which starts threads for any size; they would compete with the training threads.
        values = np.repeat(shifts.numpy(), lengths.numpy())
        values += np.arange(total)
        return torch.from_numpy(values)
    return torch.repeat_interleave(shifts, lengths, output_size=total).add_(torch.arange(total, device=starts.device))
