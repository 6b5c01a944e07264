"""The blockwise softmax loss against a readable reference that holds every score."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmgr_rec.kernels import softmax_loss as kernel
from llmgr_rec.kernels.softmax_loss import softmax_loss


def reference(queries: Tensor, items: Tensor, targets: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax cross-entropy row by row, with every score held."""
    total = 0 * (queries.sum() + items.sum())
    for query, target, weight in zip(queries, targets.tolist(), weights.tolist(), strict=True):
        if weight > 0:
            scores = items @ query if bias is None else items @ query + bias
            total = total + weight * (torch.logsumexp(scores, 0) - scores[target])
    return total


def loss_and_gradients(loss, queries: Tensor, items: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    queries, items = queries.clone().requires_grad_(), items.clone().requires_grad_()
    value = loss(queries, items, *arguments)
    # A factor that is not 1, as a weighted sum of losses sends back.
    (value * 0.7).backward()
    return value.detach(), queries.grad, items.grad


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes even small batches span several blocks of rows."""
    monkeypatch.setattr(kernel, "_CPU_BLOCK_BYTES", 1)
    monkeypatch.setattr(kernel, "_MIN_BLOCK_ROWS", 2)
    monkeypatch.setattr(kernel, "_MIN_BLOCK_ROWS_LOW_PRECISION", 2)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_agrees_with_the_reference(dtype: torch.dtype, tolerance: float, with_bias: bool) -> None:
    torch.manual_seed(0)
    queries, items = torch.randn(7, 6, dtype=dtype) * 2, torch.randn(11, 6, dtype=dtype) * 2
    # Of rows of weight 0 the target is not looked at.
    targets, weights = torch.tensor([3, 0, 10, -1, 3, 5, 99]), torch.tensor([1.0, 1.0, 0.5, 0.0, 1.0, 2.0, 0.0])
    arguments = (targets, weights, torch.randn(11, dtype=dtype) if with_bias else None)
    actual = loss_and_gradients(softmax_loss, queries, items, *arguments)
    expected = loss_and_gradients(reference, queries, items, *arguments)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_agrees_with_the_reference_for_any_shape(batch: int, columns: int, block_rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(batch, 3, dtype=torch.float64, generator=generator)
    items = torch.randn(columns, 3, dtype=torch.float64, generator=generator)
    arguments = (
        torch.randint(0, columns, (batch,), generator=generator),
        torch.randint(0, 2, (batch,), generator=generator).double(),
        torch.randn(columns, dtype=torch.float64, generator=generator),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_CPU_BLOCK_BYTES", 1)
        patch.setattr(kernel, "_MIN_BLOCK_ROWS", block_rows)
        actual = loss_and_gradients(softmax_loss, queries, items, *arguments)
    expected = loss_and_gradients(reference, queries, items, *arguments)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("small_blocks")
def test_gradients_are_its_derivatives() -> None:
    torch.manual_seed(0)
    queries = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    items = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.tensor([4, 0, 0]), torch.tensor([1.0, 0.5, 2.0])
    assert torch.autograd.gradcheck(lambda q, i: softmax_loss(q, i, targets, weights), (queries, items))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("with_bias", [False, True])
def test_bfloat16_is_close(with_bias: bool) -> None:
    torch.manual_seed(0)
    queries, items = torch.randn(40, 16), torch.randn(300, 16)
    weights = torch.full((40,), 1 / 40)
    weights[3] = 0
    arguments = (torch.randint(0, 300, (40,)), weights, torch.randn(300) if with_bias else None)
    exact = loss_and_gradients(softmax_loss, queries, items, *arguments)
    rounded = loss_and_gradients(softmax_loss, queries, items, *arguments, torch.bfloat16)
    assert abs(rounded[0] - exact[0]) < 0.01
    for ours, theirs in zip(rounded[1:], exact[1:], strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_batches_and_samples_of_different_sizes_have_products_of_one_shape_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A CPU compiles products in bfloat16 by their shapes."""
    shapes = set()
    scores = kernel._Columns.scores

    def noted(columns: kernel._Columns, queries_bQ: Tensor, out_bC: Tensor) -> Tensor:
        if out_bC.dtype == torch.bfloat16:
            shapes.add(out_bC.shape)
        return scores(columns, queries_bQ, out_bC)

    monkeypatch.setattr(kernel._Columns, "scores", noted)
    torch.manual_seed(0)
    for rows, columns in ((8, 257), (3, 300), (15, 511), (16, 512)):
        queries, items, bias = torch.randn(rows, 16), torch.randn(columns, 16), torch.randn(columns)
        arguments = (torch.randint(0, columns, (rows,)), torch.ones(rows), bias)
        rounded = loss_and_gradients(softmax_loss, queries, items, *arguments, torch.bfloat16)
        exact = loss_and_gradients(softmax_loss, queries, items, *arguments)
        for ours, theirs in zip(rounded[1:], exact[1:], strict=True):
            assert ours.shape == theirs.shape
            assert (ours - theirs).norm() < 0.02 * theirs.norm()
    assert shapes == {(16, 512)}


@pytest.mark.parametrize(("rows", "blocks"), [(281, [281]), (400, [200, 200]), (600, [300, 300]), (0, [])])
def test_the_last_block_is_hardly_smaller(rows: int, blocks: list[int]) -> None:
    size = kernel._block_rows(rows, torch.empty(1 << 20, 1), low_precision=True)
    assert [len(range(rows)[block]) for block in kernel._blocks(rows, size)] == blocks


@pytest.mark.parametrize("is_small", [False, True])
def test_probabilities_of_bfloat16_scores_add_to_one(is_small: bool) -> None:
    """Each is rounded by itself; their sum is not, so that the gradient of a row pushes and pulls alike."""
    torch.manual_seed(0)
    scores_bC = torch.randn(40, 4000).to(torch.bfloat16)
    _, sums_b1 = kernel._cross_entropy_in_place(scores_bC, torch.zeros(40, 1), is_small)
    total_b = (scores_bC.float() / sums_b1).sum(dim=1)
    assert (total_b - 1).abs().mean() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_that_only_leaves_out_columns_is_that_of_fewer_columns(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    queries, items = torch.randn(5, 4), torch.randn(9, 4)
    biases = torch.zeros(9).index_fill(0, torch.tensor([2, 7]), -1e4)
    assert kernel._Columns.of(items, biases, dtype).bias_C is None
    kept = (biases == 0).nonzero().squeeze(1)
    targets = torch.tensor([0, 2, 4, 6, 1])
    loss, of_queries, of_items = loss_and_gradients(
        softmax_loss, queries, items, kept[targets], torch.ones(5), biases, dtype
    )
    expected = loss_and_gradients(softmax_loss, queries, items[kept], targets, torch.ones(5), None, dtype)
    torch.testing.assert_close((loss, of_queries, of_items[kept]), expected)
    assert not of_items[[2, 7]].any()


def test_without_gradient_none_is_kept() -> None:
    queries, items = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    arguments = (torch.tensor([0, 1, 2, 3]), torch.ones(4))
    with torch.no_grad():
        value = softmax_loss(queries, items, *arguments)
    assert not value.requires_grad
    torch.testing.assert_close(value, softmax_loss(queries, items, *arguments).detach())


def test_a_frozen_side_gets_no_gradient() -> None:
    queries, items = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3)
    softmax_loss(queries, items, torch.tensor([0, 1, 2, 3]), torch.ones(4)).backward()
    assert queries.grad is not None
    assert items.grad is None


def test_no_rows_have_no_loss_and_no_gradient() -> None:
    arguments = (torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    loss, _, of_items = loss_and_gradients(softmax_loss, torch.empty(0, 3), torch.full((4, 3), 7.0), *arguments)
    assert loss == 0
    assert not of_items.any()


def test_extreme_scores_stay_finite() -> None:
    queries = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    value = softmax_loss(queries, torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 1]), torch.full((2,), 0.5))
    value.backward()
    torch.testing.assert_close(value.detach(), torch.tensor(1e4))
    assert queries.grad.isfinite().all()


@pytest.mark.parametrize(("scale", "bias", "is_small"), [(6.0, -1e4, True), (7.0, 0.0, False), (6.0, 5.0, False)])
def test_a_shift_is_left_out_only_where_norms_bound_all_scores(scale: float, bias: float, is_small: bool) -> None:
    """At both sides of the limit the loss and its gradients are those of the reference."""
    queries = torch.full((2, 4), scale / 2) * torch.tensor([[1.0], [-1.0]])
    items, biases = torch.full((3, 4), 3.0), torch.tensor([0.0, bias, 0.0])
    items[2] = -items[2]
    assert kernel._scores_are_small(queries, items, biases) == is_small
    arguments = (torch.tensor([0, 0]), torch.ones(2), biases)
    actual, expected = (loss_and_gradients(loss, queries, items, *arguments) for loss in (softmax_loss, reference))
    torch.testing.assert_close(actual, expected)
