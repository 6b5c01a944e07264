"""Target ranks per session, computed by the evaluation protocol of `llmgr_rec.evaluate`.

Shapes: S sessions of a split.
"""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmgr_rec.baselines.knn import Baseline
from llmgr_rec.data.batch import RawSessions, SessionBatch
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed.process_group import World
from llmgr_rec.evaluation.metrics import target_ranks
from llmgr_rec.evaluation.protocol import baseline_lists, identity, ranked_lists, split_reader
from llmgr_rec.evaluation.results import K
from llmgr_rec.storage.bundle import Bundle

TargetRanks = NDArray[np.int32]
_BATCH_SIZE = 8192


def model_ranks(bundle: Bundle, dataset: Dataset, split: str, depth: int = K) -> TargetRanks:
    """Rank of each session's target in the whole catalog, from 0, int32 [S].

    Args:
        bundle: Bundle of the model, on its device, with its blend.
        dataset: Prepared sessions.
        split: train, valid or test.
        depth: Length of the ranked lists.

    Returns:
        Ranks in the order of the split; `depth` for a target that is not in the list.
    """
    world = World.alone(next(bundle.model.parameters()).device)
    return _ranks(ranked_lists(bundle.ranking(), dataset, split, world, depth=depth), depth)


def baseline_ranks(baseline: Baseline, dataset: Dataset, split: str, depth: int = K) -> TargetRanks:
    """`model_ranks` for a baseline."""
    return _ranks(baseline_lists(baseline, dataset, split, World.alone(), depth=depth), depth)


def targets_of(dataset: Dataset, split: str) -> NDArray[np.int64]:
    """Target of each session of a split, in the order of `model_ranks`, int64 [S]."""
    batches = split_reader(dataset, split, _BATCH_SIZE, identity).batches(0)
    return np.concatenate([raw.targets_B.numpy()[raw.weights_B.numpy() > 0] for raw in batches])


def _ranks(lists: Iterable[tuple[Tensor, Tensor, SessionBatch | RawSessions]], depth: int) -> TargetRanks:
    found = [target_ranks(ids_BK, batch.targets_B, depth)[batch.weights_B > 0] for ids_BK, _, batch in lists]
    return torch.cat(found).cpu().numpy().astype(np.int32)
