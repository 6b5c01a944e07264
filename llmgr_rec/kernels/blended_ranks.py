"""Ranks of target items under many blends of scores, for little more than the cost of one blend.

A blend w of the model's scores s and N sparse terms a scores item j of a session as

    blended[w, j] = s[j] + sum over n of weight[w, n] * a[n, j]

and the rank of the target t, 0 for the best, is the number of items ahead of it: those with a higher blended score, and
those with an equal one and a lower item index. Most items of a session have no term, so their blended score is s[j]
under every blend. Of these, the scores that can matter at all are sorted once, and a binary search counts those ahead
of any target score. Only the few items with a term are added up and compared for every blend:

    rank[w] = (items without a term ahead of blended[w, t]) + (items with a term ahead of blended[w, t])

"Ahead" means >= for items with an index below the target's and > for those above it, so both counts are made for the
two sides apart.

The catalog may be cut into ranges of items, such as one on each rank of a distributed run. The target's scores add up
over ranges (those without the target give 0), and so do the counts:

    own_WB  = sum over ranges of range.target_scores()
    rank_WB = sum over ranges of range.count_ahead(own_WB)

Shapes: B sessions, R items of one range, N terms, W blends, E items of a session with a term.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class BlendedScores:
    """Scores of one range of items under several blends.

    Args:
        scores_BR: The model's scores, float32; -inf for excluded items.
        terms_NBR: The N terms, float32; each item at most once a row.
        targets_B: Target items, counted over the whole catalog; a target may lie outside of the range.
        weights_WN: Weights of the terms in each blend.
        first_item: Index of the range's first item.
    """

    def __init__(
        self,
        scores_BR: Floats,
        terms_NBR: Sequence[sparse.csr_array],
        targets_B: Ints,
        weights_WN: Sequence[Sequence[float]],
        first_item: int = 0,
    ) -> None:
        self._scores_BR = scores_BR
        self._terms_NBR = terms_NBR
        self._target_column_B = targets_B - first_item
        self._weights_NW = np.array(weights_WN, np.float32).reshape(len(weights_WN), len(terms_NBR)).T

    def target_scores(self) -> Floats:
        """Blended scores of the targets, [W, B]; 0 for a target outside of the range.

        NaN for a session with a NaN among the range's scores.
        """
        num_sessions, width = self._scores_BR.shape
        own_WB = np.zeros((self._weights_NW.shape[1], num_sessions), np.float32)
        for session, column in enumerate(self._target_column_B.tolist()):
            if 0 <= column < width:
                terms_N = [data[items == column].sum() for items, data in self._terms_of(session)]
                own_WB[:, session] = self._blend(self._scores_BR[session, column], terms_N)
        own_WB[:, np.isnan(self._scores_BR).any(axis=1)] = np.nan
        return own_WB

    def count_ahead(self, own_WB: Floats) -> Ints:
        """Number of the range's items ahead of each target, [W, B].

        Args:
            own_WB: Blended scores of the targets, from the range that holds them.
        """
        ahead_WB = np.zeros(own_WB.shape, np.int64)
        for session in range(len(self._scores_BR)):
            ahead_WB[:, session] = self._count_ahead_of(session, np.ascontiguousarray(own_WB[:, session]))
        return ahead_WB

    def _count_ahead_of(self, session: int, own_W: Floats) -> Ints:
        scores_R, terms = self._scores_BR[session], self._terms_of(session)
        has_term_R = np.zeros(len(scores_R), np.bool_)
        for items, _ in terms:
            has_term_R[items] = True
        # Items before this column have a lower index than the target. Outside of the range all have, or none.
        column = min(max(int(self._target_column_B[session]), 0), len(scores_R))
        ahead_W = _count_unblended(scores_R[:column][~has_term_R[:column]], own_W, ties_are_ahead=True)
        ahead_W += _count_unblended(scores_R[column:][~has_term_R[column:]], own_W, ties_are_ahead=False)
        items_E = np.flatnonzero(has_term_R)
        if len(items_E):
            blended_WE = self._blend(scores_R[items_E], [_dense(items, data, items_E)[None] for items, data in terms])
            split = int(np.searchsorted(items_E, column))
            ahead_W += _count_true(blended_WE[:, :split] >= own_W[:, None])
            ahead_W += _count_true(blended_WE[:, split:] > own_W[:, None])
        return ahead_W

    def _terms_of(self, session: int) -> list[tuple[Ints, Floats]]:
        """Columns and values of each term of one session."""
        parts = []
        for term_BR in self._terms_NBR:
            entries = slice(term_BR.indptr[session], term_BR.indptr[session + 1])
            parts.append((term_BR.indices[entries], term_BR.data[entries]))
        return parts

    def _blend(self, scores: Floats, terms_N: Sequence[Floats]) -> Floats:
        """Blended scores, blends first.

        Summed in the same order everywhere: float32 sums depend on it, and equal scores of two items must stay equal.
        """
        total = scores
        for term, weight_W in zip(terms_N, self._weights_NW, strict=True):
            total = total + weight_W.reshape(-1, *[1] * (np.ndim(term) - 1)) * term
        return total


def _dense(items: Ints, data: Floats, items_E: Ints) -> Floats:
    """One term at the items that have any, 0 where it has no entry, [E]."""
    term_E = np.zeros(len(items_E), np.float32)
    term_E[np.searchsorted(items_E, items)] = data
    return term_E


def _count_unblended(scores: Floats, own_W: Floats, ties_are_ahead: bool) -> Ints:
    """How many scores are above each target score, or at least as high, [W]."""
    lowest, highest = own_W.min(), own_W.max()
    if lowest == highest:
        return np.full(len(own_W), np.count_nonzero(scores >= lowest if ties_are_ahead else scores > lowest))
    # Those below all target scores are ahead of none, and need no sorting.
    sorted_scores = np.sort(scores[scores >= lowest])
    side: Literal["left", "right"] = "left" if ties_are_ahead else "right"
    return len(sorted_scores) - np.searchsorted(sorted_scores, own_W, side)


def _count_true(is_true_WE: NDArray[np.bool_]) -> Ints:
    # count_nonzero of a row uses vector instructions; with an axis it sums integers.
    return np.array([np.count_nonzero(row) for row in is_true_WE], np.int64)
