"""Which sessions are routed to the language model."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmgr_rec.scoring.routing import ROUTE_ALL, Routing, uncertainty


def test_uncertainty_is_the_entropy_of_the_list():
    scores_RK = torch.tensor([[2.0, 2.0, 2.0, 2.0], [50.0, 0.0, 0.0, 0.0], [1.0, 1.0, -math.inf, -math.inf]])
    torch.testing.assert_close(uncertainty(scores_RK), torch.tensor([math.log(4), 0.0, math.log(2)]))
    torch.testing.assert_close(uncertainty(scores_RK + 7), uncertainty(scores_RK))


def test_a_list_without_items_is_never_routed():
    scores_RK = torch.tensor([[-math.inf, -math.inf], [2.0, 1.0], [1.0, -math.inf]])
    assert uncertainty(scores_RK)[0] == -math.inf
    assert Routing(0.5).choose(uncertainty(scores_RK)).tolist() == [1, 2]


@given(st.lists(st.floats(0, 5, width=32), max_size=20), st.floats(0, 1), st.integers(0, 5))
def test_a_budget_takes_the_least_sure(values, budget, empty):
    uncertainty_R = torch.tensor([*values, *[-math.inf] * empty])
    rows = Routing(budget).choose(uncertainty_R).tolist()
    left = sorted(set(range(len(values))) - set(rows))
    assert rows == sorted(set(rows))
    assert set(rows) <= set(range(len(values)))
    assert len(rows) == min(math.ceil(budget * len(uncertainty_R)), len(values))
    assert not rows or not left or min(values[row] for row in rows) >= max(values[row] for row in left)


def test_of_equals_the_earlier_are_routed():
    assert Routing(0.5).choose(torch.ones(5)).tolist() == [0, 1, 2]


def test_a_threshold_does_not_count():
    uncertainty_R = torch.tensor([0.5, 2.0, -math.inf, 1.0, 1.5])
    assert Routing(threshold=1.0).choose(uncertainty_R).tolist() == [1, 4]
    assert Routing(threshold=-1.0).choose(uncertainty_R).tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize(
    ("routing", "routes_all"), [(ROUTE_ALL, True), (Routing(0.99), False), (Routing(threshold=0.0), False)]
)
def test_all_are_routed_without_budget_and_threshold(routing, routes_all):
    assert routing.routes_all is routes_all
