"""Metrics per session, and confidence intervals of their differences by paired bootstrap over sessions.

Shapes: S sessions.
"""

from collections.abc import Sequence
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


def hit_rate(ranks_S: NDArray[np.int32]) -> Floats:
    """HR@20 of each session, [S]: 1 if the target is among the first 20, else 0."""
    return (ranks_S < K).astype(np.float64)


def ndcg(ranks_S: NDArray[np.int32]) -> Floats:
    """NDCG@20 of each session, [S], with one relevant item per session."""
    return np.where(ranks_S < K, 1 / np.log2(ranks_S + 2.0), 0.0)


def reciprocal_rank(ranks_S: NDArray[np.int32]) -> Floats:
    """Reciprocal rank of each session, [S], 0 beyond rank 20; its mean is MRR@20."""
    return np.where(ranks_S < K, 1 / (ranks_S + 1.0), 0.0)


METRICS = {"hr@20": hit_rate, "ndcg@20": ndcg, "mrr@20": reciprocal_rank}


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


def relative_gain(values: Sequence[Floats], reference: Sequence[Floats], seed: int = 0) -> Gain | None:
    """Relative gain, averaged over training seeds, with the interval of a paired bootstrap over sessions.

    Args:
        values: A metric of the sessions, one array [S] per seed.
        reference: The same of the reference; its number of seeds may differ.
        seed: Seed of the resampling.

    Returns:
        The gain; None if the metric of the reference is 0. Resamples in which it is 0 are ignored.
    """
    values_S, reference_S = np.mean(values, axis=0), np.mean(reference, axis=0)
    if not reference_S.any():
        return None
    rng, size = np.random.default_rng(seed), len(values_S)
    ratios: list[Floats] = []
    chunk = max(1, _CHUNK_DRAWS // size)
    for start in range(0, _RESAMPLES, chunk):
        draws = rng.integers(size, size=(min(chunk, _RESAMPLES - start), size))
        means, reference_means = values_S[draws].mean(axis=1), reference_S[draws].mean(axis=1)
        ratios.append(means[reference_means > 0] / reference_means[reference_means > 0] - 1)
    low, high = np.percentile(np.concatenate(ratios), _TAILS)
    return Gain(float(values_S.mean() / reference_S.mean() - 1), float(low), float(high))


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
