"""Streaming ranking metrics: hit rate, NDCG and MRR at several cut-offs, and hit rate by how well known the target is.

The state is a histogram, so the figures cannot depend on batch size, order or world size: one cell for each pair of
(bucket of the target's training interactions, place of the target in the list), with a last column for targets that the
list misses. Every metric is a function of that table, and one sum over ranks joins the ranks.

Shapes: B sessions, K places in a ranked list, F frequency buckets, V items.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmgr_rec.evaluation.results import CUTOFFS, METRICS

# Upper bounds (inclusive) of all but the last bucket of training interactions of the target.
BUCKET_BOUNDS = (0, 4, 8, 20)
BUCKET_NAMES = ("0", "1-4", "5-8", "9-20", "21+")
BY_FREQUENCY = "hr@20_by_train_count"


def target_ranks(ids_BK: Tensor, targets_B: Tensor, depth: int) -> Tensor:
    """Rank of each target in its list, from 0, int64 [B]; `depth` where it is not among the first `depth` items.

    Args:
        ids_BK: Item indices, best first; -1 where a list is shorter.
        targets_B: Item that was clicked next.
        depth: Items of a list that are looked at.
    """
    hits_BK = ids_BK[:, :depth] == targets_B[:, None]
    # argmax of a boolean row is the first hit.
    return torch.where(hits_BK.any(1), hits_BK.to(torch.int8).argmax(1), depth)


class RankingMetrics:
    """Counts at which place of its ranked list each target stands.

    With one relevant item a session, at place p (from 1): HR@K = [p <= K], NDCG@K = [p <= K] / log2(p + 1),
    MRR@K = [p <= K] / p.
    """

    # Length K of the ranked lists that `update` needs.
    depth = max(CUTOFFS)

    def __init__(self, train_count_V: Tensor) -> None:
        """Starts an empty count.

        Args:
            train_count_V: Training interactions of each item, for the frequency buckets; sets the device.
        """
        self._bucket_V = torch.bucketize(
            train_count_V, torch.tensor(BUCKET_BOUNDS, dtype=train_count_V.dtype, device=train_count_V.device)
        )
        places = self.depth + 1
        # float64 holds whole numbers exactly up to 2^53 and is reduced by gloo and NCCL alike.
        self.counts_FP = torch.zeros(len(BUCKET_NAMES), places, dtype=torch.float64, device=train_count_V.device)

    def update(self, ids_BK: Tensor, targets_B: Tensor, weights_B: Tensor) -> None:
        """Counts one batch.

        Args:
            ids_BK: Item indices, best first; -1 where a catalog has fewer than K items.
            targets_B: Item that was clicked next.
            weights_B: Weight of each session; 0 for rows that only fill up a rank.
        """
        self.count(target_ranks(ids_BK, targets_B, self.depth), targets_B, weights_B)

    def count(self, place_B: Tensor, targets_B: Tensor, weights_B: Tensor) -> None:
        """As `update`, with the places at hand.

        Args:
            place_B: How many items stand before each target; any number from `depth` on is the same miss.
            targets_B: Item that was clicked next.
            weights_B: Weight of each session; 0 for rows that only fill up a rank.
        """
        # Filler rows carry no target: their weight is 0, so any valid bucket will do.
        bucket_B = self._bucket_V[targets_B.clamp(min=0)]
        self.counts_FP.index_put_(
            (bucket_B, place_B.clamp(max=self.depth)), weights_B.to(torch.float64), accumulate=True
        )

    def compute(self, sum_over_ranks: Callable[[Tensor], object] | None = None) -> dict[str, Any]:
        """Joins the ranks and returns the metrics of all sessions counted so far.

        Args:
            sum_over_ranks: Sums a tensor over the ranks in place; None on one rank.

        Returns:
            `hr@K`, `ndcg@K`, `mrr@K` for each cut-off, `count` (sessions), and under `hr@20_by_train_count` for each
            bucket its `hr` (None where empty) and `count`. All metrics are 0 when nothing was counted.
        """
        counts_FP = self.counts_FP.clone()
        if sum_over_ranks is not None:
            sum_over_ranks(counts_FP)
        counts_FP = counts_FP.cpu()
        total = float(counts_FP.sum())
        hits_P = counts_FP.sum(0)[:-1]
        place_P = torch.arange(1, self.depth + 1, dtype=torch.float64)
        gains = {"hr": torch.ones_like(place_P), "ndcg": 1 / torch.log2(place_P + 1), "mrr": 1 / place_P}
        result: dict[str, Any] = {}
        for name in METRICS:
            for k in CUTOFFS:
                result[f"{name}@{k}"] = float((hits_P * gains[name])[:k].sum()) / total if total else 0.0
        result["count"] = int(total)
        result[BY_FREQUENCY] = {}
        for name, places_P in zip(BUCKET_NAMES, counts_FP, strict=True):
            count = float(places_P.sum())
            hits = float(places_P[:-1][:20].sum())
            result[BY_FREQUENCY][name] = {"hr": hits / count if count else None, "count": int(count)}
        return result
