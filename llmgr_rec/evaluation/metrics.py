"""Streaming ranking metrics: HR, NDCG and MRR at several cutoffs, and HR by the target's training interactions.

The state is a histogram of target ranks by bucket of the target's training interactions; its last column counts targets
that are not in the list. All metrics are functions of this histogram, so they do not depend on batch size, order or
number of ranks, and one sum combines the ranks of a process group.

Shapes: B sessions, K items of a ranked list, F frequency buckets, P = K + 1 target ranks, V items.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmgr_rec.evaluation.results import CUTOFFS, METRICS, K

# Upper bounds (inclusive) of all but the last bucket of training interactions of the target.
BUCKET_BOUNDS = (0, 4, 8, 20)
BUCKET_NAMES = ("0", "1-4", "5-8", "9-20", "21+")
BY_FREQUENCY = "hr@20_by_train_count"
# The same for the clicks that a session shows.
LENGTH_BOUNDS = (1, 2, 4, 9, 19, 49)
LENGTH_NAMES = ("1", "2", "3-4", "5-9", "10-19", "20-49", "50+")
BY_LENGTH = "hr@20_by_clicks"


def target_ranks(ids_BK: Tensor, targets_B: Tensor, depth: int) -> Tensor:
    """Rank of each target in its list, from 0, int64 [B]; `depth` if it is not among the first `depth` items.

    Args:
        ids_BK: Item indices, best first; -1 pads shorter lists.
        targets_B: Target item of each session.
        depth: Number of first items of a list that are considered.
    """
    hits_BK = ids_BK[:, :depth] == targets_B[:, None]
    # argmax of a boolean row is the first hit.
    return torch.where(hits_BK.any(1), hits_BK.to(torch.int8).argmax(1), depth)


class RankingMetrics:
    """Histogram of target ranks and the metrics computed from it.

    With one relevant item per session, at position p (from 1): HR@K = [p <= K], NDCG@K = [p <= K] / log2(p + 1),
    MRR@K = [p <= K] / p.
    """

    def __init__(self, train_count_V: Tensor, cutoffs: Sequence[int] = CUTOFFS) -> None:
        """Creates an empty histogram.

        Args:
            train_count_V: Training interactions of each item, for the frequency buckets; determines the device.
            cutoffs: Cutoffs K of the metrics, 20 among them.
        """
        self._cutoffs = cutoffs
        # Length of the ranked lists that `update` requires.
        self.depth = max(cutoffs)
        # Of each target only: a selection has a histogram for each of a hundred candidates.
        self._train_count_V = train_count_V
        self._bounds = torch.tensor(BUCKET_BOUNDS, dtype=train_count_V.dtype, device=train_count_V.device)
        # float64 represents integers up to 2^53 exactly, and both gloo and NCCL reduce it.
        self.counts_FP = torch.zeros(
            len(BUCKET_NAMES), self.depth + 1, dtype=torch.float64, device=train_count_V.device
        )

    def update(self, ids_BK: Tensor, targets_B: Tensor, weights_B: Tensor) -> Tensor:
        """Adds one batch of ranked lists.

        Args:
            ids_BK: Item indices, best first; -1 pads the lists of a catalog with fewer than K items.
            targets_B: Target item of each session.
            weights_B: Weight of each session; 0 for padding.

        Returns:
            The target ranks, see `target_ranks`.
        """
        ranks_B = target_ranks(ids_BK, targets_B, self.depth)
        self.count(ranks_B, targets_B, weights_B)
        return ranks_B

    def count(self, ranks_B: Tensor, targets_B: Tensor, weights_B: Tensor) -> None:
        """Adds one batch of target ranks.

        Args:
            ranks_B: Rank of each target, from 0; any number from `depth` on is a miss.
            targets_B: Target item of each session.
            weights_B: Weight of each session; 0 for padding.
        """
        # Padding has no target; its weight is 0, so any valid bucket works.
        bucket_B = torch.bucketize(self._train_count_V[targets_B.clamp(min=0)], self._bounds)
        self.counts_FP.index_put_(
            (bucket_B, ranks_B.clamp(max=self.depth)), weights_B.to(torch.float64), accumulate=True
        )

    def compute(self, sum_over_ranks: Callable[[Tensor], object] | None = None) -> dict[str, Any]:
        """Metrics of all sessions added so far.

        Args:
            sum_over_ranks: Sums a tensor over the ranks of a process group, in place; None without one.

        Returns:
            `hr@K`, `ndcg@K`, `mrr@K` for each cutoff, `count` (number of sessions) and, under `hr@20_by_train_count`,
            the `hr` (None if empty) and `count` of each bucket. Metrics are 0 if there are no sessions.
        """
        counts_FP = self.counts_FP.clone()
        if sum_over_ranks is not None:
            sum_over_ranks(counts_FP)
        counts_FP = counts_FP.cpu()
        total = float(counts_FP.sum())
        hits_P = counts_FP.sum(0)[:-1]
        position_P = torch.arange(1, self.depth + 1, dtype=torch.float64)
        gains = {"hr": torch.ones_like(position_P), "ndcg": 1 / torch.log2(position_P + 1), "mrr": 1 / position_P}
        result: dict[str, Any] = {}
        for name in METRICS:
            for k in self._cutoffs:
                result[f"{name}@{k}"] = float((hits_P * gains[name])[:k].sum()) / total if total else 0.0
        result["count"] = int(total)
        result[BY_FREQUENCY] = {}
        for name, bucket_P in zip(BUCKET_NAMES, counts_FP, strict=True):
            count = float(bucket_P.sum())
            hits = float(bucket_P[:-1][:K].sum())
            result[BY_FREQUENCY][name] = {"hr": hits / count if count else None, "count": int(count)}
        return result
