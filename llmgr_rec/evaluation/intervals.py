"""95 % intervals of ranking metrics, and of paired differences of two models on the same sessions.

A metric of a session depends on its target rank alone. So the number of sessions at each pair of target ranks says
all that a comparison of two models needs, and a paired bootstrap over sessions is a multinomial draw of these numbers:
time and memory do not depend on the number of sessions.

Shapes: S sessions, P target ranks (the last one is "not in the list"), R resamples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from llmgr_rec.evaluation.results import K

Floats = NDArray[np.float64]
Ranks = NDArray[np.integer]

NUM_RANKS = K + 1
_RESAMPLES = 2000
_TAILS = (2.5, 97.5)
# Standard deviations of half a normal 95 % interval.
_Z = 1.959964
# Sessions counted at a time, which bounds the memory.
_CHUNK = 1 << 22
# Below this number of hits of either model, a relative difference says nothing.
_MIN_HITS = 10

_POSITION_P = np.arange(1, K + 1)


def _of_hits(values: Floats) -> Floats:
    return np.append(values, 0.0)


# Value of a session by its target rank, [P], of each metric.
VALUES_P: Mapping[str, Floats] = {
    f"hr@{K}": _of_hits(np.ones(K)),
    f"ndcg@{K}": _of_hits(1 / np.log2(_POSITION_P + 1)),
    f"mrr@{K}": _of_hits(1 / _POSITION_P),
}


@dataclass(frozen=True)
class Gain:
    """Relative difference of a metric to that of another model.

    Args:
        mean: Difference of the means divided by the mean of the other model.
        low: Lower end of its 95 % interval.
        high: Upper end of its 95 % interval.
    """

    mean: float
    low: float
    high: float


def count_ranks(ranks_S: Ranks) -> NDArray[np.int64]:
    """Number of sessions at each target rank, int64 [P].

    Args:
        ranks_S: Target ranks; all from K on count as K.
    """
    return np.bincount(np.minimum(ranks_S, K), minlength=NUM_RANKS)


def count_pairs(ranks_S: Ranks, other_S: Ranks) -> NDArray[np.int64]:
    """Number of sessions at each pair of target ranks of two models, int64 [P, P].

    Args:
        ranks_S: Target ranks of a model.
        other_S: Target ranks of the other model for the same sessions.
    """
    counts = np.zeros(NUM_RANKS * NUM_RANKS, np.int64)
    for start in range(0, len(ranks_S), _CHUNK):
        part = slice(start, start + _CHUNK)
        pairs_S = np.minimum(ranks_S[part], K).astype(np.int64) * NUM_RANKS + np.minimum(other_S[part], K)
        counts += np.bincount(pairs_S, minlength=len(counts))
    return counts.reshape(NUM_RANKS, NUM_RANKS)


def paired_gains(counts_PP: NDArray[np.int64], seed: int = 0) -> dict[str, Gain | None]:
    """Relative difference of each metric, with the interval of a paired bootstrap over sessions.

    Args:
        counts_PP: From `count_pairs`.
        seed: Seed of the resampling.

    Returns:
        The gain of the first model over the second by metric; None if either has fewer than 10 hits.
    """
    rows, columns = np.nonzero(counts_PP)
    counts = counts_PP[rows, columns]
    total = int(counts.sum())
    if min(int((counts * (place < K)).sum()) for place in (rows, columns)) < _MIN_HITS:
        return dict.fromkeys(VALUES_P)
    drawn = np.random.default_rng(seed).multinomial(total, counts / total, size=_RESAMPLES)
    gains: dict[str, Gain | None] = {}
    for metric, values_P in VALUES_P.items():
        mine_R, theirs_R = drawn @ values_P[rows], drawn @ values_P[columns]
        ratios = mine_R[theirs_R > 0] / theirs_R[theirs_R > 0] - 1
        low, high = np.percentile(ratios, _TAILS)
        mean = counts @ values_P[rows] / (counts @ values_P[columns]) - 1
        gains[metric] = Gain(float(mean), float(low), float(high))
    return gains


def unpaired_gain(rate: float, other: float, count: int) -> Gain | None:
    """Relative difference of two hit rates, with an interval that ignores that the sessions are the same.

    The interval is wider than a paired one. It is all that the hit rates alone give.

    Args:
        rate: Hit rate of a model.
        other: Hit rate of the other model.
        count: Number of sessions of each.

    Returns:
        The gain; None if either has fewer than 10 hits.
    """
    if min(rate, other) * count < _MIN_HITS:
        return None
    deviation = sqrt((1 - rate) / (rate * count) + (1 - other) / (other * count))
    low, high = (rate / other * np.exp(side * _Z * deviation) - 1 for side in (-1, 1))
    return Gain(rate / other - 1, float(low), float(high))


def mean_metrics(counts_P: NDArray[np.int64]) -> dict[str, float]:
    """Mean of each metric over sessions; 0 without any.

    Args:
        counts_P: From `count_ranks`.
    """
    total = max(int(counts_P.sum()), 1)
    return {metric: float(counts_P @ values_P) / total for metric, values_P in VALUES_P.items()}


def mean_intervals(counts_P: NDArray[np.int64]) -> dict[str, tuple[float, float]]:
    """Interval of the mean of each metric over sessions.

    Args:
        counts_P: From `count_ranks`.

    Returns:
        Ends of the interval by metric: Wilson's for the hit rate, a normal one for the others.
    """
    total = int(counts_P.sum())
    intervals = {}
    for metric, values_P in VALUES_P.items():
        mean = float(counts_P @ values_P) / total if total else 0.0
        if metric == f"hr@{K}":
            intervals[metric] = rate_interval(mean, total)
            continue
        variance = float(counts_P @ (values_P - mean) ** 2) / total if total else 0.0
        half = _Z * sqrt(variance / total) if total else 1.0
        intervals[metric] = (max(mean - half, 0.0), min(mean + half, 1.0))
    return intervals


def rate_interval(rate: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of sessions, which holds for few sessions and for shares near 0 and 1, too.

    Args:
        rate: Share of hits.
        count: Number of sessions.
    """
    if not count:
        return 0.0, 1.0
    square = _Z**2 / count
    center = (rate + square / 2) / (1 + square)
    half = _Z * sqrt(rate * (1 - rate) / count + square / (4 * count)) / (1 + square)
    return max(center - half, 0.0), min(center + half, 1.0)
