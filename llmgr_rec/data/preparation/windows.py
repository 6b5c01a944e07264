"""Rows (history, target) of each split, from users' clicks in time order and their phases. Vectorised over users.

Shape suffixes: U users of a block, L their clicks end to end, R rows.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """Rows of one split: history clicks [start, stop) and target click stop, as positions in a block of clicks.

    Args:
        user_R: Position of the row's user in the block.
        start_R: First click of the history.
        stop_R: Click after the history: the target.
        continues_R: Whether the first click is also the target of another row of the same session and split.
    """

    user_R: Ints
    start_R: Ints
    stop_R: Ints
    continues_R: npt.NDArray[np.bool_]


def phase_ends(offsets_U1: Ints, phases_L: Ints | None) -> Ints:
    """Where each user's training, validation and test clicks end.

    Args:
        offsets_U1: Bounds of the users' clicks; no user is empty.
        phases_L: Phase of each click, never falling within a user; None for leave-one-out: the last click is test, the
            one before it validation.

    Returns:
        [3, U] ends: [p, u] is one past the user's last click of phase p or lower.
    """
    starts, ends = offsets_U1[:-1], offsets_U1[1:]
    if phases_L is None:
        return np.stack([np.maximum(ends - 2, starts + 1), np.maximum(ends - 1, starts + 1), ends])
    counts = [np.add.reduceat((phases_L <= phase).astype(np.int64), starts) for phase in range(3)]
    return np.stack([starts + count for count in counts])


def make_windows(offsets_U1: Ints, ends_3U: Ints, phase: int, max_length: int, split_long: bool) -> Windows:
    """Rows of one split.

    A user has a row in a split if one of its clicks has the split's phase and another click stands before it. The
    target is the user's last click of the phase, the history all before it.

    Args:
        offsets_U1: Bounds of the users' clicks.
        ends_3U: Result of `phase_ends`.
        phase: 0 train, 1 valid, 2 test.
        max_length: Most clicks of a history; the newest stay.
        split_long: Give the clicks before a cut history rows of their own, such that each click of the session but the
            first is the target of exactly one prefix of one row.
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


def has_repeats(offsets_U1: Ints, items_L: Ints, end_U: Ints) -> bool:
    """Whether any user clicks an item twice before a given click.

    Args:
        offsets_U1: Bounds of the users' clicks.
        items_L: Item indices.
        end_U: One past the last click of each user that counts.
    """
    user_L = np.repeat(np.arange(len(end_U)), np.diff(offsets_U1))
    counts_L = np.arange(len(items_L)) < end_U[user_L]
    pairs = np.sort(user_L[counts_L] * (items_L.max(initial=0) + 1) + items_L[counts_L])
    return bool((pairs[1:] == pairs[:-1]).any())


def gather_ranges(values_L: Ints, start_R: Ints, stop_R: Ints) -> tuple[Ints, Ints]:
    """Joins the ranges values[start:stop] end to end.

    Args:
        values_L: Values.
        start_R: First position of each range.
        stop_R: One past its last position.

    Returns:
        The values of all ranges, and their bounds [R + 1].
    """
    lengths_R = stop_R - start_R
    offsets_R1 = np.concatenate([[0], np.cumsum(lengths_R)]).astype(np.int64)
    positions = np.arange(offsets_R1[-1]) + np.repeat(start_R - offsets_R1[:-1], lengths_R)
    return values_L[positions], offsets_R1
