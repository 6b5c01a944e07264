"""Places under many sets of weights are those of dense sums, ties, left out items and ranges of items included."""

from collections.abc import Sequence
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor

from llmgr_rec.distributed.ranking import BEHIND_ALL
from llmgr_rec.kernels.blended_ranks import BlendedScores
from llmgr_rec.study.judge import places

WEIGHTS = [*product((0.0, 0.5, 2.0), repeat=2), (-1.0, 0.25)]
SESSIONS, ITEMS = 40, 30


def dense(scores_BV: Tensor, added: Sequence[sparse.csr_array], weights_WN: Sequence[Sequence[float]]) -> list[Tensor]:
    """The readable reference: all scores of each set."""
    sums = []
    for weights_N in weights_WN:
        total = scores_BV.clone()
        for matrix, weight in zip(added, weights_N, strict=True):
            total += weight * torch.from_numpy(matrix.toarray())
        sums.append(total)
    return sums


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
def test_places_are_those_of_dense_sums(whole: bool, density: float, cuts: tuple[int, ...]) -> None:
    scores, added, targets = some(density, whole)
    parts = [
        BlendedScores(
            scores[:, start:stop].numpy(), [term[:, start:stop] for term in added], targets.numpy(), WEIGHTS, start
        )
        for start, stop in pairwise(cuts)
    ]
    own_WB = np.sum([part.of_targets() for part in parts], axis=0)
    before_WB = np.sum([part.count_before(own_WB) for part in parts], axis=0)
    found = torch.from_numpy(np.where(np.isneginf(own_WB), BEHIND_ALL, before_WB))
    expected = torch.stack([places(total, targets) for total in dense(scores, added, WEIGHTS)])
    assert torch.equal(found, expected)
    assert (expected == BEHIND_ALL).any()
    assert density == 0 or len(expected.unique(dim=0)) > 2, "the weights change nothing"


def test_a_model_alone_has_one_set_of_no_weights() -> None:
    scores, _, targets = some(0.0, whole=True)
    blended = BlendedScores(scores.numpy(), [], targets.numpy(), [()])
    own_WB = blended.of_targets()
    found = np.where(np.isneginf(own_WB), BEHIND_ALL, blended.count_before(own_WB))
    np.testing.assert_array_equal(found[0], places(scores, targets).numpy())


def test_a_score_that_is_no_number_is_told_by_its_session_wherever_it_stands() -> None:
    scores, added, targets = some(0.5, whole=True)
    scores[3, (targets[3] + 1) % ITEMS] = torch.nan
    own_WB = BlendedScores(scores.numpy(), added, targets.numpy(), WEIGHTS).of_targets()
    assert np.flatnonzero(np.isnan(own_WB).all(axis=0)).tolist() == [3]
    assert np.isnan(own_WB).sum() == len(WEIGHTS)
