"""What each click means for the score of an item: by leaving it out, and by gradients of the encoder's score.

Shapes: L clicks, K items, S steps between no session and the session, N nodes of S * K copies of a session, D columns
of the encoder.
"""

import numpy as np
import torch
from torch import Tensor

from llmgr_rec.baselines.blend import clicks_of
from llmgr_rec.baselines.sparse_scores import Floats, Ints
from llmgr_rec.data.batch import RawSessions
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.distributed.ranking import RankingModel
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.session_encoder import click_counts

# Points at which the gradient is computed; more change the values by less than a hundredth.
_STEPS = 4


@torch.no_grad()
def scores_without(ranking: RankingModel, sessions: Jagged, items_KQ: Tensor, items_K: Ints) -> Floats:
    """Scores of items for sessions in which a click is missing, float64 [L, K]; 0 for a session without clicks.

    Args:
        ranking: The model with its blend.
        sessions: Item indices, one row for each missing click.
        items_KQ: Vectors of the items.
        items_K: Indices of the items.
    """
    scores_LK = np.zeros((sessions.num_rows, len(items_K)))
    filled = torch.nonzero(sessions.lengths).flatten()
    # Without rows, split makes one empty part.
    for rows in filled.split(ranking.batch_size) if len(filled) else ():
        batch = ranking.collate(RawSessions.to_rank(sessions.select(rows)))
        scores = (ranking.queries(batch).double() @ items_KQ.double().T).numpy()
        if ranking.blend is not None:
            scores = scores + ranking.blend.scores(clicks_of(batch))[:, items_K].toarray()
        scores_LK[rows.numpy()] = scores
    return scores_LK


def gradient_times_input(ranking: RankingModel, clicks_L: Tensor, items_KQ: Tensor) -> Floats | None:
    """Gradient of the encoder's score by the vectors of the clicked items, times these vectors.

    The gradient is the mean of those at several points between zero vectors and the vectors (integrated gradients,
    Sundararajan et al., ICML 2017). At the vectors themselves it says little: where a cosine is near its maximum, it is
    near zero, however much the score rests on a click.

    The encoder sees an item that is clicked several times as one node; its value is divided among its clicks.

    Args:
        ranking: The model.
        clicks_L: Item indices of the session.
        items_KQ: Vectors of the items.

    Returns:
        Float64 [L, K]; None if the score of the encoder is no part of the score.
    """
    columns = ranking.model.score_columns
    if "encoder" not in columns:
        return None
    recommender = ranking.model.recommender if isinstance(ranking.model, LLMGR) else ranking.model
    items_KD = items_KQ.split(list(columns.values()), dim=1)[list(columns).index("encoder")]
    # A copy for each item and step, because one backward pass gives the gradient of one score of each session.
    copies, num_clicks = _STEPS * items_KQ.shape[0], clicks_L.numel()
    sessions = Jagged.from_lengths(clicks_L.repeat(copies), torch.full((copies,), num_clicks))
    batch = ranking.collate(RawSessions.to_rank(sessions))
    graph = batch.graph
    steps_SK = ((torch.arange(_STEPS) + 0.5) / _STEPS).repeat_interleave(items_KQ.shape[0])
    with torch.no_grad():
        nodes_ND = recommender.rows(batch.features).vectors_XD[: graph.node_items_N.numel()]
    with torch.enable_grad():
        scaled_ND = (nodes_ND * steps_SK[graph.node_session_N].unsqueeze(1)).requires_grad_()
        scores = recommender.encoder_queries(scaled_ND, graph) * items_KD.repeat(_STEPS, 1)
        (gradient_ND,) = torch.autograd.grad(scores.sum(), scaled_ND)
    values_N = (gradient_ND * nodes_ND).double().sum(dim=1) / click_counts(graph)
    by_click: Floats = values_N[graph.alias_L].view(_STEPS, -1, num_clicks).mean(dim=0).T.numpy()
    return by_click
