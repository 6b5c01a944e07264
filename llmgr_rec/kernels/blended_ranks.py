"""Where targets stand under many sets of weights of what is added to scores, at little more than the cost of one.

An item that nothing is added to has the model's score whatever the weights: those of a session are sorted once, and a
search tells how many reach a target of any score. Only the others are summed and compared for each set. Of equal scores
the lower item index stands first, so items before the target's index need its score, those behind it a higher one.

Shapes: B sessions, R items of one range, N added terms of an item, W sets of their weights, E items of a session that
something is added to.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class BlendedScores:
    """Scores of a range of items: the model's, and terms that are added to them with weights.

    Args:
        scores_BR: The model's, float32; -inf for those left out.
        added_NBR: Terms, float32, a matrix for each of the N weights; each item once a row.
        targets_B: The item that was clicked next; it may lie outside of the range.
        weights_WN: Sets of weights.
        first: Index of the range's first item.
    """

    def __init__(
        self,
        scores_BR: Floats,
        added_NBR: Sequence[sparse.csr_array],
        targets_B: Ints,
        weights_WN: Sequence[Sequence[float]],
        first: int = 0,
    ) -> None:
        self._scores_BR = scores_BR
        self._added_NBR = added_NBR
        self._column_B = targets_B - first
        self._weights_NW = np.array(weights_WN, np.float32).reshape(len(weights_WN), len(added_NBR)).T

    def of_targets(self) -> Floats:
        """Scores of the targets, [W, B]; 0 for one outside of the range.

        NaN stands for a session of which some item's score is not a number.
        """
        rows, width = self._scores_BR.shape
        own_WB = np.zeros((self._weights_NW.shape[1], rows), np.float32)
        for row, column in enumerate(self._column_B.tolist()):
            if 0 <= column < width:
                terms = [data[items == column].sum() for items, data in self._added_to(row)]
                own_WB[:, row] = self._blend(self._scores_BR[row, column], terms)
        own_WB[:, np.isnan(self._scores_BR).any(axis=1)] = np.nan
        return own_WB

    def count_before(self, own_WB: Floats) -> Ints:
        """How many items of the range stand before each target, [W, B].

        Args:
            own_WB: Scores of the targets, from whichever range holds them.
        """
        before_WB = np.zeros(own_WB.shape, np.int64)
        for row, scores_R in enumerate(self._scores_BR):
            before_WB[:, row] = self._before(scores_R, row, np.ascontiguousarray(own_WB[:, row]))
        return before_WB

    def _before(self, scores_R: Floats, row: int, own_W: Floats) -> Ints:
        added = self._added_to(row)
        is_touched_R = np.zeros(len(scores_R), np.bool_)
        for items, _ in added:
            is_touched_R[items] = True
        column = min(max(int(self._column_B[row]), 0), len(scores_R))
        lower, higher = slice(None, column), slice(column, None)
        before_W = _reaching(scores_R[lower][~is_touched_R[lower]], own_W, "left")
        before_W += _reaching(scores_R[higher][~is_touched_R[higher]], own_W, "right")
        touched_E = np.flatnonzero(is_touched_R)
        if len(touched_E):
            terms_NE = np.zeros((len(added), len(touched_E)), np.float32)
            for terms_E, (items, data) in zip(terms_NE, added, strict=True):
                terms_E[np.searchsorted(touched_E, items)] = data
            blended_WE = self._blend(scores_R[touched_E], [terms_E[None] for terms_E in terms_NE])
            split = int(np.searchsorted(touched_E, column))
            own_W1 = own_W[:, None]
            before_W += _true_in_rows(blended_WE[:, :split] >= own_W1)
            before_W += _true_in_rows(blended_WE[:, split:] > own_W1)
        return before_W

    def _added_to(self, row: int) -> list[tuple[Ints, Floats]]:
        """Items and terms of one session, by each matrix."""
        parts = []
        for added_BR in self._added_NBR:
            own = slice(added_BR.indptr[row], added_BR.indptr[row + 1])
            parts.append((added_BR.indices[own], added_BR.data[own]))
        return parts

    def _blend(self, alone: Floats, terms_N: Sequence[Floats]) -> Floats:
        """Weighted sums, sets of weights first; in one order for all, so that equal items stay equal."""
        total = alone
        for term, weight_W in zip(terms_N, self._weights_NW, strict=True):
            total = total + weight_W.reshape(-1, *[1] * (np.ndim(term) - 1)) * term
        return total


def _reaching(scores: Floats, own_W: Floats, side: Literal["left", "right"]) -> Ints:
    """How many scores are at least (left) or above (right) each target's."""
    low, high = own_W.min(), own_W.max()
    if low == high:
        return np.full(len(own_W), np.count_nonzero(scores >= low if side == "left" else scores > low))
    rivals = np.sort(scores[scores >= low])
    return len(rivals) - np.searchsorted(rivals, own_W, side)


def _true_in_rows(is_true_WE: NDArray[np.bool_]) -> Ints:
    # Row by row it is counted with vector instructions; along an axis, as a sum of whole numbers.
    return np.array([np.count_nonzero(row) for row in is_true_WE], np.int64)
