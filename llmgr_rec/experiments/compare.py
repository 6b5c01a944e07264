"""Metrics of single sessions and what their differences say: paired bootstrap over sessions.

Shapes: S sessions, M metrics.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmgr_rec.evaluation.metrics import BUCKET_BOUNDS, BUCKET_NAMES

Floats = NDArray[np.float64]
K = 20
_RESAMPLES = 2000
# Ends of the 95 % interval.
_TAILS = (2.5, 97.5)
# Sessions that are resampled at a time, in draws.
_DRAWS_AT_ONCE = 4_000_000


def hit_rate(ranks_S: NDArray[np.int32]) -> Floats:
    """1 where the target is among the first 20."""
    return (ranks_S < K).astype(np.float64)


def ndcg(ranks_S: NDArray[np.int32]) -> Floats:
    """NDCG@20 of each session, which has one relevant item."""
    return np.where(ranks_S < K, 1 / np.log2(ranks_S + 2.0), 0.0)


def reciprocal_rank(ranks_S: NDArray[np.int32]) -> Floats:
    """MRR@20's share of each session."""
    return np.where(ranks_S < K, 1 / (ranks_S + 1.0), 0.0)


METRICS = {"hr@20": hit_rate, "ndcg@20": ndcg, "mrr@20": reciprocal_rank}


@dataclass(frozen=True)
class Gain:
    """By how much one variant is better than another, relative to that one.

    Args:
        mean: Difference of the means over the reference's mean.
        low: Lower end of its 95 % interval.
        high: Upper end.
    """

    mean: float
    low: float
    high: float


def relative_gain(values: Sequence[Floats], reference: Sequence[Floats], seed: int = 0) -> Gain | None:
    """Paired bootstrap over sessions; what differs between seeds is averaged out of each session first.

    Args:
        values: A metric of the same sessions, one array [S] a seed.
        reference: The same of the reference; its number of seeds may be another.
        seed: Of the resampling.

    Returns:
        The gain; None over a reference that finds nothing. Draws of sessions in which it finds nothing do not count.
    """
    mine_S, theirs_S = np.mean(values, axis=0), np.mean(reference, axis=0)
    if not theirs_S.any():
        return None
    rng, size = np.random.default_rng(seed), len(mine_S)
    ratios: list[Floats] = []
    at_once = max(1, _DRAWS_AT_ONCE // size)
    for start in range(0, _RESAMPLES, at_once):
        draws = rng.integers(size, size=(min(at_once, _RESAMPLES - start), size))
        mine, theirs = mine_S[draws].mean(axis=1), theirs_S[draws].mean(axis=1)
        ratios.append(mine[theirs > 0] / theirs[theirs > 0] - 1)
    low, high = np.percentile(np.concatenate(ratios), _TAILS)
    return Gain(float(mine_S.mean() / theirs_S.mean() - 1), float(low), float(high))


def hit_rate_by_frequency(
    target_ranks: Sequence[NDArray[np.int32]], train_count_S: NDArray[np.int64]
) -> dict[str, dict[str, float]]:
    """HR@20 over seeds by training interactions of the target.

    Args:
        target_ranks: Ranks of the targets, from 0, one array [S] a seed.
        train_count_S: Training interactions of each target.

    Returns:
        By bucket: `hr`, and `count` of sessions; empty buckets are left out.
    """
    bucket_S = np.searchsorted(BUCKET_BOUNDS, train_count_S, side="left")
    hits_S = np.mean([hit_rate(ranks_S) for ranks_S in target_ranks], axis=0)
    return {
        name: {"hr": float(hits_S[bucket_S == number].mean()), "count": float((bucket_S == number).sum())}
        for number, name in enumerate(BUCKET_NAMES)
        if (bucket_S == number).any()
    }
