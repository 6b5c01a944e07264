"""What metrics.json says about single sessions: intervals, paired gains, and the hit rate by length of the session.

Shapes: S sessions of a split.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from llmgr_rec.evaluation.intervals import K, count_pairs, count_ranks, mean_intervals, mean_metrics, paired_gains
from llmgr_rec.evaluation.metrics import LENGTH_BOUNDS, LENGTH_NAMES
from llmgr_rec.evaluation.rank_collector import TargetRanks
from llmgr_rec.evaluation.session_ranks import Sessions


def compare_models(ranks: Mapping[str, TargetRanks], trained: Iterable[str]) -> dict[str, Any]:
    """Intervals of all models, and gains of the trained ones over every other one.

    Args:
        ranks: Target ranks [S] by model.
        trained: Models of the run.

    Returns:
        `intervals`, ends by model and metric; and `gains`, see `Gain`, by trained model, other model and metric.
    """
    return {
        "intervals": {name: mean_intervals(count_ranks(ranks_S)) for name, ranks_S in ranks.items()},
        "gains": {
            name: {other: gains_between(ranks[name], ranks[other]) for other in ranks if other != name}
            for name in trained
        },
    }


def gains_between(ranks_S: TargetRanks, other_S: TargetRanks) -> dict[str, dict[str, float] | None]:
    """Gains of a model over another one as JSON values, by metric; None where there are too few hits.

    Args:
        ranks_S: Target ranks of the model.
        other_S: Target ranks of the other model for the same sessions.
    """
    gains = paired_gains(count_pairs(ranks_S, other_S))
    return {metric: asdict(gain) if gain else None for metric, gain in gains.items()}


def by_domain(ranks_S: TargetRanks, sessions: Sessions) -> dict[str, dict[str, Any]]:
    """Metrics at 20 by the domain of the session.

    Args:
        ranks_S: Target ranks.
        sessions: The sessions.

    Returns:
        The metrics of each domain, its number of sessions as `count`, and `intervals` by metric.
    """
    results: dict[str, dict[str, Any]] = {}
    for place, name in enumerate(sessions.domains):
        counts = count_ranks(ranks_S[sessions.domain_S == place])
        results[name] = {**mean_metrics(counts), "count": int(counts.sum()), "intervals": mean_intervals(counts)}
    return results


def by_length(ranks_S: TargetRanks, sessions: Sessions) -> dict[str, dict[str, Any]]:
    """HR@20 by the number of clicks of the session.

    Args:
        ranks_S: Target ranks.
        sessions: The sessions.

    Returns:
        `hr` (None if empty) and `count` of each bucket.
    """
    bucket_S = np.searchsorted(LENGTH_BOUNDS, sessions.clicks_S, side="left")
    counts = np.bincount(bucket_S, minlength=len(LENGTH_NAMES))
    hits = np.bincount(bucket_S, weights=ranks_S < K, minlength=len(LENGTH_NAMES))
    return {
        name: {"hr": float(found / count) if count else None, "count": int(count)}
        for name, found, count in zip(LENGTH_NAMES, hits, counts, strict=True)
    }
