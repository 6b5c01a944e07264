"""Exclusion of seen items, those that a session has clicked, from its ranking; the training data decide on it.

If no training session repeats an item, seen items are excluded, because they are not targets, and nearest-neighbor
methods would rank them first. If sessions repeat items, no item is excluded.

Shapes: B sessions, L clicks, D items of a list before exclusion, K after.
"""

import numpy as np

from llmgr_rec.baselines.knn import Baseline
from llmgr_rec.baselines.sparse_scores import Ints
from llmgr_rec.data.batch import RawSessions, SessionBatch
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.jagged import Jagged


def excludes_seen(dataset: Dataset) -> bool:
    """Whether evaluation excludes the items that a session has clicked from its ranking."""
    return not dataset.manifest.clicks_repeat


def ranking_rule(dataset: Dataset) -> str:
    """The exclusion rule as text, for tables and reports."""
    if excludes_seen(dataset):
        return "clicked items excluded: no training session repeats one"
    return "no item excluded"


def seen_items(batch: SessionBatch) -> Jagged:
    """The distinct items that each session of a batch has clicked, int64, one row per session."""
    return Jagged(batch.graph.node_items_N, batch.graph.node_offsets_B1)


def ranked_by(baseline: Baseline, sessions: RawSessions, k: int, exclude_seen: bool) -> Ints:
    """The K best items of each session by a baseline, int64 [B, K], best first; -1 pads shorter lists.

    Args:
        baseline: The baseline; it ranks the whole catalog, seen items included.
        sessions: The sessions.
        k: Number K of items.
        exclude_seen: Whether to exclude the items that the session has clicked.
    """
    items_L, offsets_B1 = sessions.items_L.numpy(), sessions.offsets_B1.numpy()
    if not exclude_seen:
        return baseline.rank(items_L, offsets_B1, k)[0]
    longest = int(np.diff(offsets_B1).max(initial=0))
    return without_seen(baseline.rank(items_L, offsets_B1, k + longest)[0], items_L, offsets_B1, k)


def without_seen(ids_BD: Ints, items_L: Ints, offsets_B1: Ints, k: int) -> Ints:
    """The first K items of each list that its session has not clicked, int64 [B, K]; -1 pads shorter lists.

    Args:
        ids_BD: Item indices, best first; -1 pads shorter lists.
        items_L: Clicked items of the sessions.
        offsets_B1: Start of each session in `items_L` and, last, their number.
        k: Number K of items, at most D.
    """
    span = max(int(ids_BD.max(initial=0)), int(items_L.max(initial=0))) + 2
    row_B = np.arange(len(ids_BD)) * span
    # Shifted by 1, so that the padding -1 of a row does not equal an item of the previous row.
    seen_L = np.repeat(row_B, np.diff(offsets_B1)) + items_L + 1
    is_seen_BD = np.isin(row_B[:, None] + ids_BD + 1, seen_L)
    columns_BK = np.argsort(is_seen_BD, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(np.where(is_seen_BD, -1, ids_BD), columns_BK, axis=1)
