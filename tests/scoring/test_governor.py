"""Who the language model reads."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmgr_rec.scoring.governor import READ_ALL, Governor, uncertainty


def test_uncertainty_is_the_entropy_of_the_list():
    scores_RK = torch.tensor([[2.0, 2.0, 2.0, 2.0], [50.0, 0.0, 0.0, 0.0], [1.0, 1.0, -math.inf, -math.inf]])
    torch.testing.assert_close(uncertainty(scores_RK), torch.tensor([math.log(4), 0.0, math.log(2)]))
    torch.testing.assert_close(uncertainty(scores_RK + 7), uncertainty(scores_RK))


def test_a_list_without_items_is_never_read():
    scores_RK = torch.tensor([[-math.inf, -math.inf], [2.0, 1.0], [1.0, -math.inf]])
    assert uncertainty(scores_RK)[0] == -math.inf
    assert Governor(0.5).choose(uncertainty(scores_RK)).tolist() == [1, 2]


@given(st.lists(st.floats(0, 5, width=32), max_size=20), st.floats(0, 1), st.integers(0, 5))
def test_a_budget_takes_the_least_sure(values, budget, empty):
    uncertainty_R = torch.tensor([*values, *[-math.inf] * empty])
    rows = Governor(budget).choose(uncertainty_R).tolist()
    left = sorted(set(range(len(values))) - set(rows))
    assert rows == sorted(set(rows))
    assert set(rows) <= set(range(len(values)))
    assert len(rows) == min(math.ceil(budget * len(uncertainty_R)), len(values))
    assert not rows or not left or min(values[row] for row in rows) >= max(values[row] for row in left)


def test_of_equals_the_earlier_are_read():
    assert Governor(0.5).choose(torch.ones(5)).tolist() == [0, 1, 2]


def test_a_threshold_does_not_count():
    uncertainty_R = torch.tensor([0.5, 2.0, -math.inf, 1.0, 1.5])
    assert Governor(threshold=1.0).choose(uncertainty_R).tolist() == [1, 4]
    assert Governor(threshold=-1.0).choose(uncertainty_R).tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize(
    ("governor", "reads_all"), [(READ_ALL, True), (Governor(0.99), False), (Governor(threshold=0.0), False)]
)
def test_there_may_be_nothing_to_choose(governor, reads_all):
    assert governor.reads_all is reads_all
