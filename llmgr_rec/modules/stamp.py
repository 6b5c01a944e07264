"""STAMP (Liu et al., KDD 2018): attention by the last click and the mean of all clicks, without recurrence.

Shapes: B sessions, N nodes, D = d1 columns.
"""

import torch
from torch import Tensor, nn

from llmgr_rec.config import EncoderConfig
from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.kernels.byte_dropout import ByteDropout
from llmgr_rec.modules.session_encoder import (
    EncodedSessions,
    SessionEncoder,
    click_counts,
    initialize_uniform,
    last_states,
    segment_sum,
)


class STAMP(SessionEncoder):
    """STAMP: the session vector is the product of the projected attention and the projected last click (eq. 3 to 9).

    Clicks on the same item have the same vector, so sums over clicks are sums over nodes weighted by click counts.

    Args:
        config: Encoder settings; dropout applies to the input vectors.
        dim: Width of item, node and session vectors, in columns.
    """

    def __init__(self, config: EncoderConfig, dim: int) -> None:
        super().__init__()
        self.dropout = ByteDropout(config.dropout)
        self.attend_node = nn.Linear(dim, dim, bias=False)
        self.attend_last = nn.Linear(dim, dim, bias=False)
        self.attend_mean = nn.Linear(dim, dim)
        self.attend_score = nn.Linear(dim, 1, bias=False)
        self.memory = nn.Linear(dim, dim)
        self.last = nn.Linear(dim, dim)
        initialize_uniform(self, dim)

    def forward(self, nodes_ND: Tensor, graph: SessionGraph) -> EncodedSessions:
        """Encodes a batch; see `SessionEncoder.forward`."""
        vectors_ND, session_N = self.dropout(nodes_ND), graph.node_session_N
        counts_N1 = click_counts(graph).unsqueeze(1)
        lengths_B1 = graph.click_offsets_B1.diff().unsqueeze(1)
        last_BD = last_states(vectors_ND, graph)
        mean_BD = segment_sum(vectors_ND * counts_N1, session_N, graph.num_sessions) / lengths_B1.clamp(min=1)
        context_BD = self.attend_last(last_BD) + self.attend_mean(mean_BD)
        hidden_ND = (self.attend_node(vectors_ND) + context_BD.index_select(0, session_N)).sigmoid()
        attended_ND = self.attend_score(hidden_ND) * counts_N1 * vectors_ND
        attended_BD = segment_sum(attended_ND, session_N, graph.num_sessions)
        sessions_BD = torch.tanh(self.memory(attended_BD)) * torch.tanh(self.last(last_BD))
        return EncodedSessions(nodes_ND, sessions_BD * (lengths_B1 > 0))
