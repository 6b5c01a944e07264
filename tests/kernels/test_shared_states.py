"""Scores and sums of nodes by bags of states, against plain operators that hold a row for each node."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmgr_rec.kernels.shared_states import SharedStates

DIM = 3


def results(states: SharedStates, vectors_ABD: Tensor, weights_NA: Tensor) -> list[Tensor]:
    """Scores, sums and the gradients of a function of both with respect to vectors, weights and states."""
    inputs = [tensor.clone().requires_grad_() for tensor in (vectors_ABD, weights_NA, states.states_CD)]
    states = SharedStates(inputs[2], states.session_N, states.offsets_B1, states.state_N)
    scores_NA, sums_ABD = states.scores(inputs[0]), states.sums(inputs[1])
    directions = [torch.linspace(-1, 1, found.numel()).view_as(found) for found in (scores_NA, sums_ABD)]
    value = (scores_NA * directions[0]).sum() + (sums_ABD * directions[1]).sum()
    return [scores_NA.detach(), sums_ABD.detach(), *torch.autograd.grad(value, inputs)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(0, 5), st.integers(1, 3), st.integers(0, 99))
def test_bags_agree_with_a_row_for_each_node(lengths: list[int], num_states: int, heads: int, seed: int) -> None:
    """`num_states` 0 gives each node a state of its own."""
    torch.manual_seed(seed)
    length_B = torch.tensor(lengths)
    num_nodes = int(length_B.sum())
    state_N = torch.randint(num_states, (num_nodes,)) if num_states else None
    states = SharedStates(
        torch.randn(num_states or num_nodes, DIM, dtype=torch.float64),
        torch.repeat_interleave(length_B),
        torch.cat([torch.zeros(1, dtype=torch.int64), length_B.cumsum(0)]),
        state_N,
    )
    vectors_ABD = torch.randn(heads, len(lengths), DIM, dtype=torch.float64)
    weights_NA = torch.randn(num_nodes, heads, dtype=torch.float64)
    found = results(states, vectors_ABD, weights_NA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedStates, "_has_bags", lambda self, factors: False)
        expected = results(states, vectors_ABD, weights_NA)
        node_B = torch.tensor([-1, *range(num_nodes)])
        rows = torch.cat([torch.zeros(1, DIM, dtype=torch.float64), states.of_nodes()])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert torch.equal(states.at(node_B), rows)


def test_a_number_format_without_bags_has_plain_operators() -> None:
    states = SharedStates(torch.randn(2, DIM), torch.tensor([0, 0]), torch.tensor([0, 2]))
    assert states.scores(torch.randn(1, 1, DIM).bfloat16()).shape == (2, 1)
