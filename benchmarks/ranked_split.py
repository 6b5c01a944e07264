"""Metrics of ranked lists that another program has written, by the code that measures our own.

Shapes: B examples of a split, K items of a ranked list.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.evaluation.metrics import RankingMetrics
from llmgr_rec.evaluation.protocol import split_reader
from llmgr_rec.evaluation.rank_collector import TargetRanks

_READ_ROWS = 8192


class RankedSplit:
    """Measures ranked lists of the examples of a split.

    Args:
        dataset: The data set.
        split: valid or test.
    """

    def __init__(self, dataset: Dataset, split: str) -> None:
        reader = split_reader(dataset, split, _READ_ROWS, lambda raw: raw.targets_B)
        self._targets_B = torch.cat(list(reader.batches(0)))
        self._train_count_V = Catalog.of(dataset).train_count_V

    def measure(self, file: Path) -> tuple[dict[str, Any], TargetRanks]:
        """The result of `RankingMetrics.compute`, and the target ranks, uint8 [B].

        Args:
            file: Array of item indices, [B, K], best first, in the order of the split.

        Raises:
            ValueError: There are more or fewer lists than examples.
        """
        ids_BK = torch.from_numpy(np.load(file, allow_pickle=False))
        if len(ids_BK) != len(self._targets_B):
            raise ValueError(f"{file} has {len(ids_BK)} lists, but there are {len(self._targets_B)} examples")
        metrics = RankingMetrics(self._train_count_V)
        ranks_B = metrics.update(ids_BK, self._targets_B, torch.ones(len(ids_BK)))
        return metrics.compute(), ranks_B.numpy().astype(np.uint8)
