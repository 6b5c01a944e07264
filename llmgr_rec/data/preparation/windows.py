"""Rows (history, target) of each split, from the users' clicks in time order and their phases. Vectorized over users.

Shape suffixes: U users of a block, L clicks of the block (all users concatenated), R rows.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """Rows of one split: history clicks [start, stop) and target click stop, as positions in a block.

    Args:
        user_R: Position of the user in the block.
        start_R: First click of the history.
        stop_R: Click after the history, which is the target.
        continues_R: Whether the first click is also the target of another row of the same session and split.
    """

    user_R: Ints
    start_R: Ints
    stop_R: Ints
    continues_R: npt.NDArray[np.bool_]

    def first_target_R(self, augmented: bool) -> Ints:
        """First of the targets of each row, which are consecutive; the last is `stop_R`.

        Args:
            augmented: Whether every click of a row except the first is a target, not only the last one.
        """
        return self.start_R + 1 if augmented else self.stop_R


def phase_ends(offsets_U1: Ints, phases_L: Ints | None) -> Ints:
    """End of each user's training, validation and test clicks.

    Args:
        offsets_U1: Offsets of the users' clicks. Each user has at least one.
        phases_L: Phase of each click, non-decreasing within a user. None for leave-one-out: the last click is test, the
            one before it validation.

    Returns:
        Ends, int64 [3, U]: [p, u] is the position after the last click of user u of phase p or lower.
    """
    starts, ends = offsets_U1[:-1], offsets_U1[1:]
    if phases_L is None:
        return np.stack([np.maximum(ends - 2, starts + 1), np.maximum(ends - 1, starts + 1), ends])
    counts = [np.add.reduceat((phases_L <= phase).astype(np.int64), starts) for phase in range(3)]
    return np.stack([starts + count for count in counts])


def make_windows(offsets_U1: Ints, ends_3U: Ints, phase: int, max_length: int, split_long: bool) -> Windows:
    """Rows of one split.

    A user has a row in a split if it has a click of the phase of the split, and a click before that. The target is the
    last click of the phase, and the history is all clicks before the target.

    Args:
        offsets_U1: Offsets of the users' clicks.
        ends_3U: Result of `phase_ends`.
        phase: 0 train, 1 valid, 2 test.
        max_length: Maximum number of clicks in a history; the newest are kept.
        split_long: Make further rows of the clicks before a truncated history, so that each click of the session except
            the first is the target of exactly one prefix of one row.
    """
    starts = offsets_U1[:-1]
    before = starts if phase == 0 else ends_3U[phase - 1]
    stop_U = ends_3U[phase] - 1
    (user_R,) = np.nonzero((ends_3U[phase] > before) & (stop_U > starts))
    first_R, stop_R = starts[user_R], stop_U[user_R]
    if split_long:
        rows_U = -((first_R - stop_R) // max_length)
        step_R = np.arange(rows_U.sum()) - np.repeat(np.cumsum(rows_U) - rows_U, rows_U)
        user_R, first_R = np.repeat(user_R, rows_U), np.repeat(first_R, rows_U)
        stop_R = np.repeat(stop_R, rows_U) - step_R * max_length
    start_R = np.maximum(first_R, stop_R - max_length)
    return Windows(user_R, start_R, stop_R, (start_R > first_R) & split_long)


def previous_clicks(offsets_U1: Ints, items_L: Ints) -> Ints:
    """Position of each click's previous click by the same user on the same item, int64 [L]; -1 if there is none.

    Args:
        offsets_U1: Offsets of the users' clicks.
        items_L: Item indices.
    """
    user_L = np.repeat(np.arange(len(offsets_U1) - 1), np.diff(offsets_U1))
    pair_L = user_L * (items_L.max(initial=0) + 1) + items_L
    order_L = np.argsort(pair_L, kind="stable")
    is_repeat = pair_L[order_L][1:] == pair_L[order_L][:-1]
    previous_L = np.full(len(items_L), -1)
    previous_L[order_L[1:][is_repeat]] = order_L[:-1][is_repeat]
    return previous_L


def gather_ranges(values_L: Ints, start_R: Ints, stop_R: Ints) -> tuple[Ints, Ints]:
    """Concatenates the ranges values[start:stop].

    Args:
        values_L: Values.
        start_R: First position of each range.
        stop_R: Position after the last one of each range.

    Returns:
        The values of all ranges, and their offsets [R + 1].
    """
    lengths_R = stop_R - start_R
    offsets_R1 = np.concatenate([[0], np.cumsum(lengths_R)]).astype(np.int64)
    positions = np.arange(offsets_R1[-1]) + np.repeat(start_R - offsets_R1[:-1], lengths_R)
    return values_L[positions], offsets_R1
