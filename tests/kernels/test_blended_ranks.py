"""Blended ranks are those of dense sums, with ties, excluded items and ranges of items."""

from collections.abc import Sequence
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor

from llmgr_rec.kernels import blended_ranks
from llmgr_rec.kernels.blended_ranks import BlendedScores

WEIGHTS = [*product((0.0, 0.5, 2.0), repeat=2), (-1.0, 0.25)]
SESSIONS, ITEMS = 40, 30


def dense_ranks(scores_BV: Tensor, terms: Sequence[sparse.csr_array], weights_N: Sequence[float], targets_B: Tensor):
    """The readable reference: ranks of the targets under one blend from all of its scores; None if excluded."""
    total_BV = scores_BV.clone()
    for matrix, weight in zip(terms, weights_N, strict=True):
        total_BV += weight * torch.from_numpy(matrix.toarray())
    ranks = []
    for scores_V, target in zip(total_BV, targets_B.tolist(), strict=True):
        own, items = scores_V[target], torch.arange(len(scores_V))
        ahead = (scores_V > own) | ((scores_V == own) & (items < target))
        ranks.append(None if own.isneginf() else int(ahead.sum()))
    return ranks


def ranks_of(parts: Sequence[BlendedScores]) -> list[list[int | None]]:
    """Ranks from all ranges of items, one list a blend."""
    own_WB = np.sum([part.target_scores() for part in parts], axis=0)
    rank_WB = np.sum([part.count_ahead(own_WB) for part in parts], axis=0)
    return np.where(np.isneginf(own_WB), None, rank_WB).tolist()


def first_of(ranks: list[list[int | None]], depth: int) -> list[list[int | None]]:
    """Ranks, and `depth` for those behind it."""
    return [[None if rank is None else min(rank, depth) for rank in row] for row in ranks]


def some(density: float, whole: bool) -> tuple[Tensor, list[sparse.csr_array], Tensor]:
    """Scores, terms and targets; whole numbers make sums exact and ties frequent."""
    draw = np.random.default_rng(0)
    scores = torch.from_numpy(draw.normal(scale=3, size=(SESSIONS, ITEMS)).astype(np.float32))
    terms = draw.random((2, SESSIONS, ITEMS)).astype(np.float32) * 4
    if whole:
        scores, terms = scores.round(), terms.round()
    scores[0, :] = 0.0
    scores[0, ::2] = -0.0
    scores[torch.from_numpy(draw.random((SESSIONS, ITEMS)) < 0.1)] = -torch.inf
    terms[draw.random(terms.shape) >= density] = 0
    return scores, [sparse.csr_array(term) for term in terms], torch.from_numpy(draw.integers(ITEMS, size=SESSIONS))


@pytest.mark.parametrize("whole", [True, False], ids=["ties", "no ties"])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("cuts", [(0, ITEMS), (0, 7, 7, 8, ITEMS)], ids=["one range", "ranges"])
def test_ranks_are_those_of_dense_sums(whole: bool, density: float, cuts: tuple[int, ...]) -> None:
    scores, added, targets = some(density, whole)

    def parts(depth: int | None) -> list[BlendedScores]:
        ranges = [
            (start, scores[:, start:stop], [term[:, start:stop] for term in added]) for start, stop in pairwise(cuts)
        ]
        return [
            BlendedScores(part.numpy(), terms, targets.numpy(), WEIGHTS, start, depth) for start, part, terms in ranges
        ]

    expected = [dense_ranks(scores, added, weights_N, targets) for weights_N in WEIGHTS]
    assert ranks_of(parts(None)) == expected
    # Of strips shorter than the rows, those that are not searched cannot matter.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blended_ranks, "_STRIP", 4)
        for depth in (1, 5):
            assert first_of(ranks_of(parts(depth)), depth) == first_of(expected, depth)
    assert None in expected[0]
    assert density == 0 or len(set(map(tuple, expected))) > 2, "the weights change nothing"


def test_a_model_without_terms_has_one_blend() -> None:
    scores, _, targets = some(0.0, whole=True)
    blended = BlendedScores(scores.numpy(), [], targets.numpy(), [()])
    assert ranks_of([blended]) == [dense_ranks(scores, [], (), targets)]


def test_a_score_that_is_no_number_is_named_by_its_session_wherever_it_stands() -> None:
    scores, added, targets = some(0.5, whole=True)
    scores[3, (targets[3] + 1) % ITEMS] = torch.nan
    own_WB = BlendedScores(scores.numpy(), added, targets.numpy(), WEIGHTS).target_scores()
    assert np.flatnonzero(np.isnan(own_WB).all(axis=0)).tolist() == [3]
    assert np.isnan(own_WB).sum() == len(WEIGHTS)
