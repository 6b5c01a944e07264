"""Losses against readable references that hold every score."""

import math

import pytest
import torch
from torch import Tensor

from llmgr_rec.modules.losses import ranking_loss, structure_loss


def reference_ranking_loss(
    queries: Tensor, items: Tensor, columns: Tensor, weights: Tensor, size: int, scale: int, log_q: Tensor | None
) -> Tensor:
    """Softmax cross-entropy row by row, with every score held."""
    total = 0 * (queries.sum() + items.sum())
    for query, column, weight in zip(queries, columns.tolist(), weights.tolist(), strict=True):
        if weight > 0:
            scores = items @ query
            if log_q is not None and len(log_q):
                scores = scores - log_q
            total = total + weight * (torch.logsumexp(scores, 0) - scores[column])
    return total * scale / size


def value_and_gradients(loss, queries: Tensor, items: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    queries, items = queries.clone().requires_grad_(), items.clone().requires_grad_()
    value = loss(queries, items, *arguments)
    # A factor that is not 1, as a weighted sum of losses would send back.
    (value * 0.7).backward()
    return value.detach(), queries.grad, items.grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("sampled", [False, True], ids=["full", "sampled"])
def test_ranking_loss_agrees_with_the_reference(dtype: torch.dtype, tolerance: float, sampled: bool) -> None:
    torch.manual_seed(0)
    queries, items = torch.randn(7, 6, dtype=dtype) * 2, torch.randn(11, 6, dtype=dtype) * 2
    columns = torch.tensor([3, 0, 10, -1, 3, 5, -1])
    weights = torch.tensor([1.0, 1.0, 0.5, 0.0, 1.0, 2.0, 0.0])
    log_q = torch.randn(11) if sampled else torch.zeros(0)
    arguments = (columns, weights, 20, 4, log_q)
    actual = value_and_gradients(ranking_loss, queries, items, *arguments)
    expected = value_and_gradients(reference_ranking_loss, queries, items, *arguments)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_the_mean_over_ranks_is_the_mean_over_the_global_batch() -> None:
    torch.manual_seed(0)
    queries, items, columns = torch.randn(5, 4), torch.randn(9, 4), torch.randint(0, 9, (5,))
    whole = ranking_loss(queries, items, columns, torch.ones(5), 5, 1)
    # Three real rows on one rank; two and a filler on the other.
    first = ranking_loss(queries[:3], items, columns[:3], torch.ones(3), 5, 2)
    filled = torch.cat([queries[3:], torch.randn(1, 4)])
    second = ranking_loss(filled, items, torch.tensor([*columns[3:], -1]), torch.tensor([1.0, 1.0, 0.0]), 5, 2)
    torch.testing.assert_close((first + second) / 2, whole)


def test_log_q_correction_makes_sampled_and_full_softmax_agree_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    num_items, num_trials = 40, 3000
    scores = torch.randn(num_items, generator=generator)
    include = torch.rand(num_items, generator=generator) * 0.6 + 0.3
    items, query, target = scores.unsqueeze(1), torch.ones(1, 1), 7
    include[target] = 1.0
    full = ranking_loss(query, items, torch.tensor([target]), torch.ones(1), 1, 1)

    def mean_sampled(log_q: Tensor) -> float:
        total = 0.0
        for _ in range(num_trials):
            chosen = torch.nonzero(torch.rand(num_items, generator=generator) < include).squeeze(1)
            column = torch.searchsorted(chosen, target).view(1)
            total += ranking_loss(query, items[chosen], column, torch.ones(1), 1, 1, log_q[chosen]).item()
        return total / num_trials

    corrected = mean_sampled(include.log())
    uncorrected = mean_sampled(torch.zeros(num_items))
    assert abs(corrected - full.item()) < 0.03
    assert abs(uncorrected - full.item()) > 0.2


def reference_structure_loss(
    graphs: Tensor, nodes: Tensor, weights: Tensor, temperature: float, hard: Tensor | None, groups: Tensor
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
        if hard is not None:
            to_nodes += [cosine(graphs[row], vector) for vector in hard[row]]
        to_graphs = [own, *(cosine(graphs[i], nodes[row]) for i in others)]
        for scores in (to_nodes, to_graphs):
            total = total + weight * (torch.logsumexp(torch.stack(scores), 0) - own) / 2
    return total


@pytest.mark.parametrize("hard_negatives", [0, 2])
@pytest.mark.parametrize("grouped", [False, True])
def test_structure_loss_agrees_with_the_reference(hard_negatives: int, grouped: bool) -> None:
    torch.manual_seed(0)
    graphs = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    nodes = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    hard = torch.randn(6, hard_negatives, 5, dtype=torch.float64, requires_grad=True) if hard_negatives else None
    weights = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0, 0.0])
    groups = torch.tensor([0, 0, 0, 0, 1, 1]) if grouped else None
    inputs = [tensor for tensor in (graphs, nodes, hard) if tensor is not None]

    actual = structure_loss(graphs, nodes, weights, 8, 2, 0.2, hard, groups)
    plain_groups = torch.zeros(6) if groups is None else groups
    expected = reference_structure_loss(graphs, nodes, weights, 0.2, hard, plain_groups) * 2 / 8
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), rtol=0, atol=1e-12
    )


def test_structure_loss_of_filler_alone_is_zero_with_finite_gradient() -> None:
    graphs = torch.randn(2, 3, requires_grad=True)
    value = structure_loss(graphs, torch.randn(2, 3), torch.zeros(2), 4, 2, 0.1)
    value.backward()
    assert value.item() == 0
    assert (graphs.grad == 0).all()


def test_structure_loss_falls_when_readings_match() -> None:
    nodes = torch.eye(4)
    matched = structure_loss(nodes, nodes, torch.ones(4), 4, 1, 0.1)
    crossed = structure_loss(nodes.roll(1, 0), nodes, torch.ones(4), 4, 1, 0.1)
    assert matched < 0.01 < math.log(4) < crossed
