"""Exclusion of seen items: whether a ranking contains items that its session has clicked, decided by the training data.

If no training session repeats a click, a seen item is never the target, and similarity-based rankings put just these
first. If sessions repeat clicks, seen items are candidates like all others.

Shapes: B sessions, L clicks, D positions of a list before exclusion, K positions after.
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
    """`excludes_seen` in the words that accompany every table."""
    if excludes_seen(dataset):
        return "clicked items excluded: no training session repeats one"
    return "no item excluded"


def seen_items(batch: SessionBatch) -> Jagged:
    """The distinct items that each session of a batch has clicked."""
    return Jagged(batch.graph.node_items_N, batch.graph.node_offsets_B1)


def ranked_by(baseline: Baseline, sessions: RawSessions, k: int, exclude_seen: bool) -> Ints:
    """The K best items of each session by a baseline, best first; -1 fills up, [B, K].

    Args:
        baseline: Ranks the whole catalog, clicked items too.
        sessions: What was clicked.
        k: Places K.
        exclude_seen: Whether clicked items make room for those behind them.
    """
    items_L, offsets_B1 = sessions.items_L.numpy(), sessions.offsets_B1.numpy()
    if not exclude_seen:
        return baseline.rank(items_L, offsets_B1, k)[0]
    longest = int(np.diff(offsets_B1).max(initial=0))
    return without_seen(baseline.rank(items_L, offsets_B1, k + longest)[0], items_L, offsets_B1, k)


def without_seen(ids_BD: Ints, items_L: Ints, offsets_B1: Ints, k: int) -> Ints:
    """The first K items of each list that its session has not clicked, in their order; -1 fills up, [B, K].

    Args:
        ids_BD: Item indices, best first; -1 where a list is shorter.
        items_L: Clicks of the sessions.
        offsets_B1: Bounds of each session's clicks.
        k: Places K, D at most.
    """
    span = max(int(ids_BD.max(initial=0)), int(items_L.max(initial=0))) + 2
    row_B = np.arange(len(ids_BD)) * span
    # One up, so that the -1 of one row is no item of the row before.
    clicked_L = np.repeat(row_B, np.diff(offsets_B1)) + items_L + 1
    is_out_BD = np.isin(row_B[:, None] + ids_BD + 1, clicked_L)
    kept_BK = np.argsort(is_out_BD, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(np.where(is_out_BD, -1, ids_BD), kept_BK, axis=1)
