"""Streaming metrics against a plain numpy reference."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmgr_rec.evaluation.metrics import BUCKET_NAMES, BY_FREQUENCY, RankingMetrics


def reference(ids, targets, weights, k):
    """One session at a time, straight from the definitions."""
    hr = ndcg = mrr = 0.0
    for ranked, target, weight in zip(ids.tolist(), targets.tolist(), weights.tolist(), strict=True):
        if target in ranked[:k]:
            place = ranked.index(target) + 1
            hr += weight
            ndcg += weight / math.log2(place + 1)
            mrr += weight / place
    return np.array([hr, ndcg, mrr]) / max(sum(weights.tolist()), 1e-30)


@st.composite
def ranked_batches(draw):
    num_items = draw(st.integers(20, 60))
    sessions = draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = np.stack([rng.permutation(num_items)[:20] for _ in range(sessions)])
    return (
        num_items,
        ids,
        rng.integers(0, num_items, sessions),
        rng.integers(0, 2, sessions),
        rng.integers(0, 30, num_items),
    )


@given(ranked_batches(), st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_equals_the_reference_in_any_batches(batch, size):
    _, ids, targets, weights, train_count = batch
    metrics = RankingMetrics(torch.from_numpy(train_count))
    for start in range(0, len(ids), size):
        part = slice(start, start + size)
        metrics.update(
            torch.from_numpy(ids[part]), torch.from_numpy(targets[part]), torch.from_numpy(weights[part]).float()
        )
    result = metrics.compute()
    assert result["count"] == weights.sum()
    for k in (5, 10, 20):
        got = np.array([result[f"{name}@{k}"] for name in ("hr", "ndcg", "mrr")])
        np.testing.assert_allclose(got, reference(ids, targets, weights, k), atol=1e-12)
    bounds = [(0, 0), (1, 4), (5, 8), (9, 20), (21, 10**9)]
    for name, (low, high) in zip(BUCKET_NAMES, bounds, strict=True):
        inside = (train_count[targets] >= low) & (train_count[targets] <= high)
        bucket = result[BY_FREQUENCY][name]
        assert bucket["count"] == weights[inside].sum()
        if bucket["count"]:
            expected = reference(ids[inside], targets[inside], weights[inside], 20)[0]
            assert bucket["hr"] == pytest.approx(expected, abs=1e-12)
        else:
            assert bucket["hr"] is None


def test_ranks_sum_to_exactly_the_single_rank_figures():
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(np.stack([rng.permutation(50)[:20] for _ in range(101)]))
    targets, weights = torch.from_numpy(rng.integers(0, 50, 101)), torch.ones(101)
    train_count = torch.arange(50)
    whole = RankingMetrics(train_count)
    whole.update(ids, targets, weights)
    parts = [RankingMetrics(train_count) for _ in range(3)]
    for rank, part in enumerate(parts):
        part.update(ids[rank::3], targets[rank::3], weights[rank::3])
    others = parts[1].counts_FP + parts[2].counts_FP
    assert parts[0].compute(lambda tensor: tensor.add_(others)) == whole.compute()


def test_filler_rows_without_a_target_and_short_lists_count_nothing():
    metrics = RankingMetrics(torch.tensor([3, 1]))
    metrics.update(torch.tensor([[1, -1], [0, 1]]), torch.tensor([-1, 1]), torch.tensor([0.0, 1.0]))
    result = metrics.compute()
    assert result["count"] == 1
    assert result["hr@5"] == 1.0
    assert result["mrr@20"] == 0.5


def test_nothing_counted_gives_zeros():
    assert RankingMetrics(torch.tensor([1])).compute()["ndcg@20"] == 0.0
