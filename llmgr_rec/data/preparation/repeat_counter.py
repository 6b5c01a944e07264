"""Counts repeats: clicks on an item that the session has clicked before.

Shape suffixes: U users of a block, L clicks of the block, R rows.
"""

import numpy as np

from llmgr_rec.data.preparation.windows import Ints, Windows, gather_ranges, previous_clicks
from llmgr_rec.data.repeats import RepeatCounts
from llmgr_rec.data.schema import SPLITS


class RepeatCounter:
    """Counts the repeats of each split over all blocks."""

    def __init__(self) -> None:
        self._sums = {split: np.zeros(4, np.int64) for split in SPLITS}

    def add(
        self, split: str, offsets_U1: Ints, items_L: Ints, ends_3U: Ints, windows: Windows, augmented: bool
    ) -> None:
        """Counts a block.

        Args:
            split: train, valid or test.
            offsets_U1: Offsets of the users' clicks.
            items_L: Item indices.
            ends_3U: Result of `phase_ends`.
            windows: Rows of the split.
            augmented: Whether each prefix of a row is an example.
        """
        phase = SPLITS.index(split)
        previous_L = previous_clicks(offsets_U1, items_L)
        start_U = offsets_U1[:-1] if phase == 0 else ends_3U[phase - 1]
        of_clicks, _ = gather_ranges(previous_L, start_U, ends_3U[phase])
        # A target is a repeat if the history that its example shows contains it.
        of_targets, offsets_R1 = gather_ranges(previous_L, windows.first_target_R(augmented), windows.stop_R + 1)
        is_repeat = of_targets >= np.repeat(windows.start_R, np.diff(offsets_R1))
        self._sums[split] += [len(of_clicks), (of_clicks >= 0).sum(), len(of_targets), is_repeat.sum()]

    @property
    def counts(self) -> dict[str, RepeatCounts]:
        """Repeats by split."""
        return {split: RepeatCounts(*sums.tolist()) for split, sums in self._sums.items()}
