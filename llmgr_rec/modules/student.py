"""A small reader that learned from the language model what it would have read: for scoring without it.

Shapes: B sessions, N nodes, D = d1 columns, H = d2 hidden width of the language model.
"""

import torch
from torch import Tensor, nn

from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.modules.recommender import Recommended
from llmgr_rec.modules.session_encoder import last_states, segment_sum


class StudentReader(nn.Module):
    """Two dense layers on what the session recommender knows of a session, in place of the language model.

    It takes the session vector, and for the last clicked node and for the mean of all nodes both the item's row and the
    encoder's state.

    Args:
        d1: Width of item and session vectors.
        d2: Width of the language model's hidden states.
        width: Units of the hidden layer.
    """

    def __init__(self, d1: int, d2: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(5 * d1), nn.Linear(5 * d1, width), nn.GELU(), nn.Linear(width, d2))

    def forward(self, seen: Recommended, graph: SessionGraph) -> Tensor:
        """Readings in place of `LLMGR.read`'s, [B, H].

        Args:
            seen: What the session recommender makes of the sessions.
            graph: Their graphs.
        """
        nodes_NK = torch.cat([seen.rows_ND, seen.states_ND], dim=1)
        sizes_B1 = graph.node_offsets_B1.diff().clamp(min=1).unsqueeze(1)
        mean_BK = segment_sum(nodes_NK, graph.node_session_N, graph.num_sessions) / sizes_B1
        return self.layers(torch.cat([seen.sessions_BD, last_states(nodes_NK, graph), mean_BK], dim=1))
