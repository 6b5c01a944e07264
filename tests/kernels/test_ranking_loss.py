"""The ranking loss against a readable reference that computes every score."""

import pytest
import torch
from torch import Tensor

from llmgr_rec.kernels.softmax_loss import ranking_loss


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
