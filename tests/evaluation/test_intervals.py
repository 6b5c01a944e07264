"""Intervals from counts of target ranks against the bootstrap over single sessions."""

import numpy as np
import pytest

from llmgr_rec.evaluation.intervals import (
    VALUES_P,
    count_pairs,
    count_ranks,
    mean_intervals,
    paired_gains,
    rate_interval,
    unpaired_gain,
)
from llmgr_rec.experiments.compare import relative_gain, values_of


def ranks(seed: int, sessions: int = 900) -> tuple[np.ndarray, np.ndarray]:
    """Target ranks of two models that agree on most sessions, with ranks beyond the list."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 60, sessions).astype(np.uint8)
    return first, np.where(rng.random(sessions) < 0.7, first, rng.integers(0, 60, sessions)).astype(np.uint8)


def test_gains_are_those_of_the_bootstrap_over_sessions():
    mine, other = ranks(0)
    gains = paired_gains(count_pairs(mine, other))
    for metric in VALUES_P:
        expected = relative_gain([values_of(metric, mine)], [values_of(metric, other)])
        found = gains[metric]
        assert found.mean == pytest.approx(expected.mean, abs=1e-12)
        # Both are random: two times 2,000 resamples of the same distribution.
        width = expected.high - expected.low
        assert found.low == pytest.approx(expected.low, abs=0.08 * width)
        assert found.high == pytest.approx(expected.high, abs=0.08 * width)


def test_a_paired_interval_is_narrower_and_covers_nothing_where_models_are_equal():
    mine, other = ranks(1)
    paired = paired_gains(count_pairs(mine, other))["hr@20"]
    rates = [float((ranks_S < 20).mean()) for ranks_S in (mine, other)]
    unpaired = unpaired_gain(*rates, len(mine))
    assert unpaired.mean == pytest.approx(paired.mean)
    assert unpaired.low < paired.low < paired.high < unpaired.high
    same = paired_gains(count_pairs(mine, mine))["mrr@20"]
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0)


def test_too_few_hits_give_no_gain():
    none = np.full(5000, 20, np.uint8)
    few = none.copy()
    few[:9] = 3
    assert set(paired_gains(count_pairs(few, ranks(0, 5000)[0])).values()) == {None}
    assert set(paired_gains(count_pairs(np.empty(0, np.uint8), np.empty(0, np.uint8))).values()) == {None}
    assert unpaired_gain(0.5, 0.0, 100) is None


def test_intervals_of_means_are_those_of_their_formulas():
    mine, _ = ranks(2)
    intervals = mean_intervals(count_ranks(mine))
    for metric in ("ndcg@20", "mrr@20"):
        value_S = values_of(metric, mine)
        half = 1.959964 * value_S.std() / np.sqrt(len(value_S))
        assert intervals[metric] == pytest.approx((value_S.mean() - half, value_S.mean() + half))
        np.testing.assert_allclose(VALUES_P[metric][np.minimum(mine, 20)], value_S)
    # Newcombe (1998), Statistics in Medicine 17, table I.
    assert rate_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert rate_interval(0 / 20, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert rate_interval(0.0, 0) == (0.0, 1.0)


def test_a_million_sessions_take_the_time_of_a_count():
    mine, other = ranks(3, 1_000_000)
    gain = paired_gains(count_pairs(mine, other))["hr@20"]
    assert gain.high - gain.low < 0.01
