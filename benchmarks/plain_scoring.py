"""Straightforward offline scoring: Python rows in file order, one score matrix per batch.

Shapes: B sessions, V items, K items of a list.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.straightforward import StraightforwardLLMGR
from llmgr_rec.baselines.blend import clicks_of
from llmgr_rec.data.batch import RawSessions
from llmgr_rec.data.jagged import lengths_to_offsets
from llmgr_rec.errors import UserError
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.storage.bundle import Bundle, load_bundle
from llmgr_rec.storage.model_factory import ModelFactory


@torch.no_grad()
def score_plainly(bundle_path: Path, source: Path, output: Path, k: int, batch_size: int, max_length: int) -> int:
    """Scores a Parquet file of sessions whose items are indices.

    Args:
        bundle_path: Exported model.
        source: Input file with columns session_id and items.
        output: File to write.
        k: Items per session.
        batch_size: Sessions of a batch.
        max_length: Newest clicks that the model gets.

    Returns:
        Number of sessions scored.

    Raises:
        UserError: The bundle has no language model, or a blend, which is not implemented here.
    """
    bundle = load_bundle(bundle_path)
    if not isinstance(bundle.model, LLMGR):
        raise UserError(f"{bundle_path} has no language model; give a run with stage behave")
    if bundle.blend is not None:
        raise UserError(f"{bundle_path} has a blend; give a run that was trained with --blend.neighbors []")
    items_VQ = bundle.model.item_vectors(bundle.collate.item_features(torch.arange(bundle.catalog.num_items)))
    decoder = ModelFactory().decoder(bundle.config, torch.device("cpu"))
    model = StraightforwardLLMGR.like(bundle.model, decoder).eval()
    item_ids = bundle.catalog.item_ids.to_pylist()
    rows = pq.read_table(source, columns=["session_id", "items"]).to_pylist()
    lists = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        sessions = [row["items"][-max_length:] for row in batch]
        queries_BQ = model(bundle.collate(_raw(sessions)))
        scores_BK, ids_BK = (queries_BQ @ items_VQ.T).topk(k, dim=1)
        for row, ids, scores in zip(batch, ids_BK.tolist(), scores_BK.tolist(), strict=True):
            lists.append(
                {"session_id": row["session_id"], "item_ids": [item_ids[item] for item in ids], "scores": scores}
            )
    pq.write_table(pa.Table.from_pylist(lists), output)
    return len(rows)


@torch.no_grad()
def score_recommender_plainly(bundle: Bundle, source: Path, output: Path, k: int, batch_size: int) -> int:
    """Scores a Parquet file of sessions of raw item ids by a session recommender with its blend, repeats allowed.

    Args:
        bundle: The loaded bundle.
        source: Input file with columns session_id and items.
        output: File to write.
        k: Items per session.
        batch_size: Sessions of a batch.

    Returns:
        Number of sessions scored.
    """
    ranking, item_ids = bundle.ranking(batch_size), bundle.catalog.item_ids.to_pylist()
    index = {item: number for number, item in enumerate(item_ids)}
    items_VQ = bundle.model.item_vectors(bundle.collate.item_features(torch.arange(len(index))))
    rows = pq.read_table(source, columns=["session_id", "items"]).to_pylist()
    lists = []
    for start in range(0, len(rows), batch_size):
        sessions = [[index[item] for item in row["items"]] for row in rows[start : start + batch_size]]
        batch = bundle.collate(_raw(sessions))
        scores_BV = ranking.queries(batch) @ items_VQ.T
        if bundle.blend is not None:
            scores_BV += torch.from_numpy(bundle.blend.scores(clicks_of(batch)).toarray())
        scores_BK, ids_BK = scores_BV.topk(k, dim=1)
        for row, ids, scores in zip(rows[start:], ids_BK.tolist(), scores_BK.tolist(), strict=False):
            lists.append(
                {"session_id": row["session_id"], "item_ids": [item_ids[item] for item in ids], "scores": scores}
            )
    pq.write_table(pa.Table.from_pylist(lists), output)
    return len(rows)


def _raw(sessions: list[list[int]]) -> RawSessions:
    none_B = torch.full((len(sessions),), -1)
    return RawSessions(
        items_L=torch.tensor([item for session in sessions for item in session]),
        offsets_B1=lengths_to_offsets(torch.tensor([len(session) for session in sessions])),
        targets_B=none_B,
        weights_B=torch.ones(len(sessions)),
        rows_B=none_B,
        global_size=len(sessions),
    )
