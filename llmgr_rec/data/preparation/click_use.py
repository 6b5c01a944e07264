"""Counts which clicks the rows of a data set use: as targets, as inputs, or not at all, and why not.

Shape suffixes: U users of a block, L clicks of the block.
"""

import numpy as np

from llmgr_rec.data.preparation.hold_out import Bools, HeldOutFilter
from llmgr_rec.data.preparation.settings import PrepareSettings
from llmgr_rec.data.preparation.windows import Ints, make_windows
from llmgr_rec.data.schema import SPLITS


class ClickUse:
    """Counts the use of the clicks of all blocks, all splits together.

    Args:
        settings: Settings of this run.
        held_out_filter: Filter of the training clicks, which counts nothing here.

    Attributes:
        counts: Number of clicks by use. `train_targets`, `valid_targets` and `test_targets` are targets of a split,
            `targets` of any. `inputs` are in the history of a target, `only_inputs` no target themselves. The other
            clicks are `unused`; of these, `too_old` are before the newest max_length ones of a session, `alone` are the
            only click of a session, and `held_out` are on items that training does not see.
    """

    def __init__(self, settings: PrepareSettings, held_out_filter: HeldOutFilter) -> None:
        self._settings = settings
        self._held_out_filter = held_out_filter
        uses = ("targets", "inputs", "only_inputs", "unused", "too_old", "alone", "held_out")
        self.counts = dict.fromkeys((*(f"{split}_targets" for split in SPLITS), *uses), 0)

    def add(self, offsets_U1: Ints, items_L: Ints, ends_3U: Ints) -> None:
        """Counts a block.

        Args:
            offsets_U1: Offsets of the users' clicks.
            items_L: Item indices.
            ends_3U: Result of `phase_ends`.
        """
        input_L, target_L = np.zeros(len(items_L), np.bool_), np.zeros(len(items_L), np.bool_)
        for phase, split in enumerate(SPLITS):
            split_inputs_L, split_targets_L = self._use(offsets_U1, items_L, ends_3U, phase)
            input_L |= split_inputs_L
            target_L |= split_targets_L
            self._count(f"{split}_targets", split_targets_L)
        unused_L = ~(input_L | target_L)
        held_out_L = unused_L & self._held_out_filter.held_out_V[items_L]
        alone_L = np.repeat(np.diff(offsets_U1) == 1, np.diff(offsets_U1)) & unused_L & ~held_out_L
        self._count("targets", target_L)
        self._count("inputs", input_L)
        self._count("only_inputs", input_L & ~target_L)
        self._count("unused", unused_L)
        self._count("held_out", held_out_L)
        self._count("alone", alone_L)
        # The last click of a session of two or more is a target, and those before it are its history.
        self._count("too_old", unused_L & ~held_out_L & ~alone_L)

    def _count(self, use: str, clicks_L: Bools) -> None:
        self.counts[use] += int(clicks_L.sum())

    def _use(self, offsets_U1: Ints, items_L: Ints, ends_3U: Ints, phase: int) -> tuple[Bools, Bools]:
        """Whether each click is in a history, and whether it is a target, of a split."""
        positions = np.arange(len(items_L))
        if phase == 0 and self._settings.hold_out_items:
            kept_L = self._held_out_filter.trains(offsets_U1, items_L, ends_3U[0])
            positions = np.flatnonzero(kept_L)
            offsets_U1 = np.concatenate([[0], np.cumsum(kept_L)])[offsets_U1]
            ends_3U = np.stack([offsets_U1[1:]] * len(SPLITS))
        split = SPLITS[phase]
        windows = make_windows(
            offsets_U1, ends_3U, phase, self._settings.max_length, split in self._settings.splits_of_several_rows
        )
        first_target_R = windows.first_target_R(split in self._settings.augmented_splits)
        return (
            _covered(positions, windows.start_R, windows.stop_R, len(items_L)),
            _covered(positions, first_target_R, windows.stop_R + 1, len(items_L)),
        )


def _covered(positions: Ints, start_R: Ints, stop_R: Ints, num_clicks: int) -> Bools:
    """Whether a click is in one of the ranges [start, stop) of positions."""
    steps = np.zeros(len(positions) + 1, np.int64)
    np.add.at(steps, start_R, 1)
    np.add.at(steps, stop_R, -1)
    covered_L = np.zeros(num_clicks, np.bool_)
    covered_L[positions[np.cumsum(steps[:-1]) > 0]] = True
    return covered_L
