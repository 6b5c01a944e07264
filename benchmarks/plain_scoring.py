"""Offline scoring the straightforward way: Python rows, padded prompts in file order, one score matrix a batch.

Shapes: B sessions, V items, K places.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from llmgr_rec.distributed.assembly import assemble_decoder, make_collator

from benchmarks.straightforward import StraightforwardLLMGR
from llmgr_rec.data.batch import RawSessions
from llmgr_rec.data.jagged import lengths_to_offsets
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.storage.bundle import load_bundle


@torch.no_grad()
def score_plainly(bundle_path: Path, source: Path, output: Path, k: int, batch_size: int, max_length: int) -> int:
    """Scores a Parquet file of sessions whose items are indices.

    Args:
        bundle_path: Exported model.
        source: Input file with columns session_id and items.
        output: File to write.
        k: Items a session.
        batch_size: Sessions of a batch.
        max_length: Newest clicks that the model sees.

    Returns:
        Sessions scored.
    """
    bundle = load_bundle(bundle_path)
    if not isinstance(bundle.model, LLMGR):
        raise TypeError(f"{bundle_path} holds no language model")
    collate = make_collator(bundle.config, bundle.catalog, "rank", language=True)
    items_VQ = bundle.model.item_vectors(collate.item_features(torch.arange(bundle.catalog.num_items)))
    model = StraightforwardLLMGR.like(bundle.model, assemble_decoder(bundle.config, torch.device("cpu"))).eval()
    item_ids = bundle.catalog.item_ids.to_pylist()
    rows = pq.read_table(source, columns=["session_id", "items"]).to_pylist()
    answers = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        sessions = [row["items"][-max_length:] for row in batch]
        queries_BQ = model(collate(_raw(sessions)))
        scores_BK, ids_BK = (queries_BQ @ items_VQ.T).topk(k, dim=1)
        for row, ids, scores in zip(batch, ids_BK.tolist(), scores_BK.tolist(), strict=True):
            answers.append(
                {"session_id": row["session_id"], "item_ids": [item_ids[item] for item in ids], "scores": scores}
            )
    pq.write_table(pa.Table.from_pylist(answers), output)
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
