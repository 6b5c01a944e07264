"""Ranks of target items under many blends of scores, for little more than the cost of one blend.

A blend w of the model's scores s and N sparse terms a scores item j of a session as

    blended[w, j] = s[j] + sum over n of weight[w, n] * a[n, j]

and the rank of the target t, 0 for the best, is the number of items ahead of it: those with a higher blended score, and
those with an equal one and a lower item index. Most items of a session have no term, so their blended score is s[j]
under every blend, and the best of them are found once. Where these alone are too many for the ranks that are wanted,
nothing else is computed. Otherwise the few items with a term are added up and compared:

    rank[w] = (items without a term ahead of blended[w, t]) + (items with a term ahead of blended[w, t])

The catalog may be cut into ranges of items, such as one on each rank of a distributed run. The target's scores add up
over ranges (those without the target give 0), and so do the counts:

    own_WB  = sum over ranges of range.target_scores()
    rank_WB = sum over ranges of range.count_ahead(own_WB)

Shapes: B sessions, R items of one range, N terms, W blends, E items of a session with a term, S strips of items.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

# Items of a strip, of which only those with the highest maxima are searched.
_STRIP = 32


class BlendedScores:
    """Scores of one range of items under several blends.

    Args:
        scores_BR: The model's scores, float32; -inf for excluded items.
        terms_NBR: The N terms, float32; each item at most once a row.
        targets_B: Target items, counted over the whole catalog; a target may lie outside of the range.
        weights_WN: Weights of the terms in each blend.
        first_item: Index of the range's first item.
        depth: Number of ranks that are wanted; a target behind them may have any rank behind them. None wants all.
    """

    def __init__(
        self,
        scores_BR: Floats,
        terms_NBR: Sequence[sparse.csr_array],
        targets_B: Ints,
        weights_WN: Sequence[Sequence[float]],
        first_item: int = 0,
        depth: int | None = None,
    ) -> None:
        self._scores_BR = scores_BR
        self._terms_NBR = terms_NBR
        self._target_column_B = targets_B - first_item
        self._weights_NW = np.array(weights_WN, np.float32).reshape(len(weights_WN), len(terms_NBR)).T
        self._depth = scores_BR.shape[1] + 1 if depth is None else depth

    def target_scores(self) -> Floats:
        """Blended scores of the targets, [W, B]; 0 for a target outside of the range.

        NaN for a session with a NaN among the range's scores.
        """
        num_sessions, width = self._scores_BR.shape
        own_WB = np.zeros((self._weights_NW.shape[1], num_sessions), np.float32)
        rows = np.flatnonzero((self._target_column_B >= 0) & (self._target_column_B < width))
        terms_NB = [_entries_at(term_BR, self._target_column_B)[None, rows] for term_BR in self._terms_NBR]
        own_WB[:, rows] = self._blend(self._scores_BR[rows, self._target_column_B[rows]], terms_NB)
        own_WB[:, np.isnan(self._scores_BR).any(axis=1)] = np.nan
        return own_WB

    def count_ahead(self, own_WB: Floats) -> Ints:
        """Number of the range's items ahead of each target, [W, B]; of `depth` or more, any number as high as that.

        Args:
            own_WB: Blended scores of the targets, from the range that holds them.
        """
        unblended_BR = self._without_terms()
        highest = _highest(unblended_BR, self._depth)
        ahead_WB = np.stack([np.count_nonzero(highest > own_B[:, None], axis=1) for own_B in own_WB]).astype(np.int64)
        has_ties_B = np.any([(highest == own_B[:, None]).any(axis=1) for own_B in own_WB], axis=0)
        for session in np.flatnonzero(has_ties_B).tolist():
            before = unblended_BR[session, : self._items_before(session)]
            ahead_WB[:, session] += np.count_nonzero(before == own_WB[:, session, None], axis=1)
        is_open_WB = ahead_WB < self._depth
        for session in np.flatnonzero(is_open_WB.any(axis=0)).tolist():
            blends = np.flatnonzero(is_open_WB[:, session])
            ahead_WB[blends, session] += self._count_blended(session, own_WB[blends, session], blends)
        return ahead_WB

    def _without_terms(self) -> Floats:
        """The scores, with -inf for the target and for items with a term, and behind them up to a whole strip."""
        num_sessions, width = self._scores_BR.shape
        unblended_BR = np.full((num_sessions, -(-width // _STRIP) * _STRIP), -np.inf, np.float32)
        unblended_BR[:, :width] = self._scores_BR
        for term_BR in self._terms_NBR:
            unblended_BR[np.repeat(np.arange(num_sessions), np.diff(term_BR.indptr)), term_BR.indices] = -np.inf
        rows = np.flatnonzero((self._target_column_B >= 0) & (self._target_column_B < width))
        unblended_BR[rows, self._target_column_B[rows]] = -np.inf
        return unblended_BR

    def _items_before(self, session: int) -> int:
        """Number of the range's items with a lower index than the target. Outside of the range all have, or none."""
        return min(max(int(self._target_column_B[session]), 0), self._scores_BR.shape[1])

    def _count_blended(self, session: int, own_W: Floats, blends: Ints) -> Ints:
        """How many of the items with a term are ahead under some blends, [W]."""
        scores_R = self._scores_BR[session]
        terms_NR = np.zeros((len(self._terms_NBR), len(scores_R)), np.float32)
        has_term_R = np.zeros(len(scores_R), np.bool_)
        for term_R, term_BR in zip(terms_NR, self._terms_NBR, strict=True):
            entries = slice(term_BR.indptr[session], term_BR.indptr[session + 1])
            items = term_BR.indices[entries]
            term_R[items], has_term_R[items] = term_BR.data[entries], True
        items_E = np.flatnonzero(has_term_R)
        if not len(items_E):
            return np.zeros(len(own_W), np.int64)
        blended_WE = self._blend(scores_R[items_E], [term_R[None, items_E] for term_R in terms_NR], blends)
        split = int(np.searchsorted(items_E, self._items_before(session)))
        is_ahead_WE = np.empty(blended_WE.shape, np.bool_)
        np.greater_equal(blended_WE[:, :split], own_W[:, None], out=is_ahead_WE[:, :split])
        np.greater(blended_WE[:, split:], own_W[:, None], out=is_ahead_WE[:, split:])
        # Sums of float32 are exact here, and several times as fast as counting row by row.
        counts_W = is_ahead_WE.astype(np.float32) @ np.ones(len(items_E), np.float32)
        return counts_W.astype(np.int64)

    def _blend(self, scores: Floats, terms_N: Sequence[Floats], blends: Ints | slice = slice(None)) -> Floats:
        """Blended scores, blends first.

        Summed in the same order everywhere: float32 sums depend on it, and equal scores of two items must stay equal.
        """
        total = scores
        for term, weight_W in zip(terms_N, self._weights_NW, strict=True):
            total = total + weight_W[blends, None] * term
        return total


def _entries_at(matrix_BR: sparse.csr_array, columns_B: Ints) -> Floats:
    """The entry of each row at a column, 0 where there is none, [B]; each column at most once a row."""
    rows = np.repeat(np.arange(matrix_BR.shape[0]), np.diff(matrix_BR.indptr))
    found = np.flatnonzero(matrix_BR.indices == columns_B[rows])
    entries_B = np.zeros(matrix_BR.shape[0], np.float32)
    entries_B[rows[found]] = matrix_BR.data[found]
    return entries_B


def _highest(scores_BR: Floats, count: int) -> Floats:
    """The highest scores of each row, in any order; at least `count` of them, or all.

    They are in the strips with the highest maxima.

    Args:
        scores_BR: The scores, whose number is a multiple of `_STRIP`.
        count: Number of scores.
    """
    num_rows, num_strips = len(scores_BR), scores_BR.shape[1] // _STRIP
    if count >= num_strips:
        return scores_BR
    strips_BSX = torch.from_numpy(scores_BR).unflatten(1, (num_strips, _STRIP))
    best_BS: Tensor = strips_BSX.amax(2).topk(count, sorted=False).indices
    places_BS = best_BS + torch.arange(num_rows).unsqueeze(1) * num_strips
    found = strips_BSX.flatten(0, 1).index_select(0, places_BS.flatten()).view(num_rows, count * _STRIP)
    highest: Floats = found.topk(count, sorted=False).values.numpy()
    return highest
