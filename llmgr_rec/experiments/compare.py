"""Metrics per session, and confidence intervals of their means and differences by paired bootstrap over sessions.

Shapes: S sessions, R resamples, M arrays of values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmgr_rec.evaluation.metrics import BUCKET_BOUNDS, BUCKET_NAMES

Floats = NDArray[np.float64]
K = 20
_RESAMPLES = 2000
# Percentiles of the 95 % interval.
_TAILS = (2.5, 97.5)
# Sessions drawn at a time, over all resamples: bounds the memory.
_CHUNK_DRAWS = 4_000_000


def hit_rate(ranks_S: NDArray[np.int32], k: int = K) -> Floats:
    """HR@k of each session, [S]: 1 if the target is among the first k, else 0."""
    return (ranks_S < k).astype(np.float64)


def ndcg(ranks_S: NDArray[np.int32], k: int = K) -> Floats:
    """NDCG@k of each session, [S], with one relevant item per session."""
    return np.where(ranks_S < k, 1 / np.log2(ranks_S + 2.0), 0.0)


def reciprocal_rank(ranks_S: NDArray[np.int32], k: int = K) -> Floats:
    """Reciprocal rank of each session, [S], 0 beyond rank k; its mean is MRR@k."""
    return np.where(ranks_S < k, 1 / (ranks_S + 1.0), 0.0)


MEASURES: dict[str, Callable[[NDArray[np.int32], int], Floats]] = {
    "hr": hit_rate,
    "ndcg": ndcg,
    "mrr": reciprocal_rank,
}


def values_of(metric: str, ranks_S: NDArray[np.int32]) -> Floats:
    """A metric of each session, [S].

    Args:
        metric: A measure and a cutoff, such as `ndcg@10`.
        ranks_S: Target ranks from 0, up to the cutoff at least.
    """
    measure, _, cutoff = metric.partition("@")
    return MEASURES[measure](ranks_S, int(cutoff))


@dataclass(frozen=True)
class Gain:
    """Relative difference of a metric to that of a reference.

    Args:
        mean: Difference of the means divided by the mean of the reference.
        low: Lower end of its 95 % interval.
        high: Upper end of its 95 % interval.
    """

    mean: float
    low: float
    high: float


def resampled_means(values_MS: Sequence[Floats], seed: int = 0) -> Floats:
    """Means over sessions drawn with replacement, the same sessions for all arrays, [R, M].

    Args:
        values_MS: Values of the sessions.
        seed: Seed of the resampling.
    """
    values_SM = np.stack(values_MS, axis=1)
    rng, size = np.random.default_rng(seed), len(values_SM)
    chunk = max(1, _CHUNK_DRAWS // size)
    means: list[Floats] = []
    for start in range(0, _RESAMPLES, chunk):
        draws_CS = rng.integers(size, size=(min(chunk, _RESAMPLES - start), size))
        # How often each session was drawn: a product with it reads the values once for all arrays.
        offsets_C1 = np.arange(len(draws_CS))[:, None] * size
        counts_CS = np.bincount((draws_CS + offsets_C1).ravel(), minlength=draws_CS.size).reshape(draws_CS.shape)
        means.append(counts_CS.astype(np.float64) @ values_SM / size)
    return np.concatenate(means)


def interval(resampled_R: Floats) -> tuple[float, float]:
    """Ends of the 95 % interval of resampled values."""
    low, high = np.percentile(resampled_R, _TAILS)
    return float(low), float(high)


def gain_over(mean: float, reference: float, means_R: Floats, reference_R: Floats) -> Gain | None:
    """Relative gain with its interval.

    Args:
        mean: Mean of a metric over the sessions.
        reference: The same of the reference.
        means_R: From `resampled_means`.
        reference_R: The same of the reference, from the same call.

    Returns:
        The gain; None if the metric of the reference is 0. Resamples in which it is 0 are ignored.
    """
    if not reference:
        return None
    found = reference_R > 0
    return Gain(mean / reference - 1, *interval(means_R[found] / reference_R[found] - 1))


def relative_gain(values: Sequence[Floats], reference: Sequence[Floats], seed: int = 0) -> Gain | None:
    """Relative gain, averaged over training seeds, with the interval of a paired bootstrap over sessions.

    Args:
        values: A metric of the sessions, one array [S] per seed.
        reference: The same of the reference; its number of seeds may differ.
        seed: Seed of the resampling.

    Returns:
        The gain, see `gain_over`.
    """
    both = [np.mean(values, axis=0), np.mean(reference, axis=0)]
    means_R2 = resampled_means(both, seed)
    return gain_over(float(both[0].mean()), float(both[1].mean()), means_R2[:, 0], means_R2[:, 1])


def hit_rate_by_frequency(
    target_ranks: Sequence[NDArray[np.int32]], train_count_S: NDArray[np.int64]
) -> dict[str, dict[str, float]]:
    """HR@20, averaged over seeds, by training interactions of the target.

    Args:
        target_ranks: Ranks of the targets, from 0, one array [S] per seed.
        train_count_S: Training interactions of each target.

    Returns:
        `hr` and number `count` of sessions, by bucket; empty buckets are omitted.
    """
    bucket_S = np.searchsorted(BUCKET_BOUNDS, train_count_S, side="left")
    hits_S = np.mean([hit_rate(ranks_S) for ranks_S in target_ranks], axis=0)
    return {
        name: {"hr": float(hits_S[bucket_S == number].mean()), "count": float((bucket_S == number).sum())}
        for number, name in enumerate(BUCKET_NAMES)
        if (bucket_S == number).any()
    }
