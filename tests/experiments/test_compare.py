"""Metrics of single sessions and paired intervals."""

import numpy as np
import pytest

from llmgr_rec.experiments.compare import (
    Gain,
    hit_rate,
    hit_rate_by_frequency,
    ndcg,
    reciprocal_rank,
    relative_gain,
    resampled_means,
    values_of,
)


def test_metrics_of_single_ranks():
    ranks = np.array([0, 1, 19, 20, 99])
    np.testing.assert_array_equal(hit_rate(ranks), [1, 1, 1, 0, 0])
    np.testing.assert_allclose(ndcg(ranks), [1, 1 / np.log2(3), 1 / np.log2(21), 0, 0])
    np.testing.assert_allclose(reciprocal_rank(ranks), [1, 1 / 2, 1 / 20, 0, 0])


def test_cutoffs_of_metrics():
    ranks = np.array([0, 4, 5, 49, 50])
    np.testing.assert_array_equal(values_of("hr@5", ranks), [1, 1, 0, 0, 0])
    np.testing.assert_allclose(values_of("mrr@50", ranks), [1, 1 / 5, 1 / 6, 1 / 50, 0])
    np.testing.assert_allclose(values_of("ndcg@6", ranks), [1, 1 / np.log2(6), 1 / np.log2(7), 0, 0])


def test_resampled_means_are_those_of_the_drawn_sessions():
    values_MS = np.random.default_rng(1).random((3, 37))
    draws_RS = np.random.default_rng(5).integers(37, size=(2000, 37))
    expected_RM = np.stack([values_S[draws_RS].mean(axis=1) for values_S in values_MS], axis=1)
    np.testing.assert_allclose(resampled_means(list(values_MS), seed=5), expected_RM, rtol=1e-12)


def test_a_gain_that_all_sessions_share_has_no_spread():
    values = np.random.default_rng(0).random(500)
    gain = relative_gain([1.1 * values], [values])
    assert (gain.mean, gain.low, gain.high) == pytest.approx((0.1, 0.1, 0.1))
    assert relative_gain([values], [values]) == Gain(0, 0, 0)


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(200):
        reference = rng.random(400)
        gain = relative_gain([reference + rng.normal(0.05, 0.5, 400)], [reference], seed)
        inside += gain.low <= 0.1 <= gain.high
    assert 180 <= inside <= 199


def test_there_is_no_gain_over_what_finds_nothing():
    assert relative_gain([np.array([1.0, 0.0])], [np.zeros(2)]) is None
    rare = np.array([1.0, *[0.0] * 9])
    gain = relative_gain([2 * rare], [rare])
    assert (gain.mean, gain.low, gain.high) == pytest.approx((1, 1, 1))


def test_seeds_are_averaged_within_a_session():
    rng = np.random.default_rng(0)
    one, other = rng.random(300), rng.random(300)
    assert relative_gain([one, other], [one]) == relative_gain([(one + other) / 2], [one])


def test_hit_rate_by_frequency_uses_the_buckets_of_the_metrics():
    found = hit_rate_by_frequency([np.array([0, 50, 3, 50]), np.array([50, 50, 3, 50])], np.array([0, 4, 5, 21]))
    assert found == {
        "0": {"hr": 0.5, "count": 1.0},
        "1-4": {"hr": 0.0, "count": 1.0},
        "5-8": {"hr": 1.0, "count": 1.0},
        "21+": {"hr": 0.0, "count": 1.0},
    }
