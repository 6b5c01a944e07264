"""The contrastive loss of stage align against a readable reference."""

import math

import pytest
import torch
from torch import Tensor

from llmgr_rec.modules.contrastive_loss import contrastive_loss


def reference_contrastive_loss(
    graphs: Tensor, nodes: Tensor, weights: Tensor, temperature: float, groups: Tensor
) -> Tensor:
    """InfoNCE anchor by anchor."""

    def cosine(a: Tensor, b: Tensor) -> Tensor:
        return torch.dot(a, b) / a.norm() / b.norm() / temperature

    total = graphs.new_zeros(())
    for row, weight in enumerate(weights.tolist()):
        if weight == 0:
            continue
        others = [i for i, w in enumerate(weights.tolist()) if w > 0 and i != row and groups[i] == groups[row]]
        own = cosine(graphs[row], nodes[row])
        to_nodes = [own, *(cosine(graphs[row], nodes[i]) for i in others)]
        to_graphs = [own, *(cosine(graphs[i], nodes[row]) for i in others)]
        for scores in (to_nodes, to_graphs):
            total = total + weight * (torch.logsumexp(torch.stack(scores), 0) - own) / 2
    return total


@pytest.mark.parametrize("grouped", [False, True])
def test_contrastive_loss_agrees_with_the_reference(grouped: bool) -> None:
    torch.manual_seed(0)
    graphs = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    nodes = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0, 0.0])
    groups = torch.tensor([0, 0, 0, 0, 1, 1]) if grouped else None
    inputs = [graphs, nodes]

    actual = contrastive_loss(graphs, nodes, weights, 8, 2, 0.2, groups)
    plain_groups = torch.zeros(6) if groups is None else groups
    expected = reference_contrastive_loss(graphs, nodes, weights, 0.2, plain_groups) * 2 / 8
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), rtol=0, atol=1e-12
    )


def test_contrastive_loss_of_filler_alone_is_zero_with_finite_gradient() -> None:
    graphs = torch.randn(2, 3, requires_grad=True)
    value = contrastive_loss(graphs, torch.randn(2, 3), torch.zeros(2), 4, 2, 0.1)
    value.backward()
    assert value.item() == 0
    assert (graphs.grad == 0).all()


def test_contrastive_loss_falls_when_embeddings_match() -> None:
    nodes = torch.eye(4)
    matched = contrastive_loss(nodes, nodes, torch.ones(4), 4, 1, 0.1)
    crossed = contrastive_loss(nodes.roll(1, 0), nodes, torch.ones(4), 4, 1, 0.1)
    assert matched < 0.01 < math.log(4) < crossed
