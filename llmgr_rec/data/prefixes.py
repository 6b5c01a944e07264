"""Prefix augmentation: a row (v1 .. vn, target) gives n examples, each a prefix and the click that followed it.

Shapes: R rows, L clicks of all rows, B examples, P passes.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from llmgr_rec.data.batch import RawSessions
from llmgr_rec.data.jagged import Jagged


def prefix_examples(rows: Jagged, targets_R: Tensor, clicks_B: Tensor) -> tuple[Jagged, Tensor]:
    """The prefixes that end with the given clicks.

    Args:
        rows: Item index of each click, oldest first, one row per session.
        targets_R: Item that followed each row, int64.
        clicks_B: Positions 0 .. L - 1 in the clicks of all rows, int64; an example is its row up to and including that
            click.

    Returns:
        Clicks of each example, B rows, and the item that followed it, int64 [B].
    """
    lengths_B = prefix_lengths(rows, clicks_B)
    return rows.gather(clicks_B + 1 - lengths_B, lengths_B), following_items(rows, targets_R)[clicks_B]


def prefix_lengths(rows: Jagged, clicks_B: Tensor) -> Tensor:
    """Number of clicks of the prefixes that end with the given clicks, int64 [B]; see `prefix_examples`."""
    # Not torch.searchsorted, which starts threads for any size; they would compete with the training threads.
    row_B = np.searchsorted(rows.offsets.numpy(), clicks_B.numpy(), side="right") - 1
    return clicks_B + 1 - rows.offsets[torch.from_numpy(row_B)]


def following_items(rows: Jagged, targets_R: Tensor) -> Tensor:
    """The item that followed each click, int64 [L].

    Args:
        rows: Item index of each click, oldest first, one row per session.
        targets_R: Item that followed each row, int64.
    """
    following_L = torch.cat([rows.values[1:], rows.values.new_zeros(min(rows.values.numel(), 1))])
    ends_R, is_filled_R = rows.offsets[1:], rows.lengths > 0
    following_L[ends_R[is_filled_R] - 1] = targets_R[is_filled_R]
    return following_L


def pass_offsets(clicks_B: Tensor, lengths_B: Tensor, max_prefixes_per_pass: int) -> Tensor:
    """First prefix of each pass and, last, the number of prefixes, int64 [P + 1]; see `RawSessions.pass_offsets_P1`.

    Args:
        clicks_B: Number of the last click of each prefix in the clicks of all rows, int64.
        lengths_B: Clicks of each prefix, int64.
        max_prefixes_per_pass: Maximum number of prefixes of a pass; longer rows are split into several passes.
    """
    # The first prefix of a row has one click.
    starts_B = (lengths_B - 1) % max_prefixes_per_pass == 0
    starts_B[:1] = True
    starts_B[1:] |= clicks_B.diff() != 1
    # Not nonzero, which starts threads for any size; they would compete with the training threads.
    return torch.from_numpy(np.append(np.flatnonzero(starts_B.numpy()), clicks_B.numel()))


def grow_prefixes(raw: RawSessions, max_prefixes_per_pass: int, global_size: int) -> RawSessions:
    """Expands sessions to all of their prefixes, grouped into passes.

    Args:
        raw: Sessions, each with at least one click.
        max_prefixes_per_pass: Maximum number of prefixes of a pass; longer sessions are split into several passes.
        global_size: Number of prefixes of the global batch over all ranks.

    Returns:
        One example per click, with the row number and the weight of its session; see `RawSessions.pass_offsets_P1`.
    """
    rows = Jagged(raw.items_L, raw.offsets_B1)
    clicks_B = torch.arange(raw.items_L.numel())
    examples, targets_B = prefix_examples(rows, raw.targets_B, clicks_B)
    row_B = rows.row_of_value
    starts_pass_B = (clicks_B - rows.offsets[row_B]) % max_prefixes_per_pass == 0
    return replace(
        raw,
        items_L=examples.values,
        offsets_B1=examples.offsets,
        targets_B=targets_B,
        weights_B=raw.weights_B[row_B],
        rows_B=raw.rows_B[row_B],
        global_size=global_size,
        pass_offsets_P1=torch.cat([clicks_B[starts_pass_B], torch.tensor([clicks_B.numel()])]),
    )
