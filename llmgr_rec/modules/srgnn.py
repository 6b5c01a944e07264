"""SR-GNN (Wu et al., arXiv 1811.00855): gated graph network, soft attention by the last click, linear readout.

Shapes: B sessions, N nodes, D = d1 columns.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from llmgr_rec.config import EncoderConfig
from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.kernels.shared_states import SharedStates
from llmgr_rec.modules.graph_encoder import GraphEncoder
from llmgr_rec.modules.session_encoder import click_counts, initialize_uniform


class SRGNN(GraphEncoder):
    """SR-GNN: the session vector combines the last click's state and an attention over all clicks (eq. 6 and 7).

    Clicks on the same item have the same state, so the sum over clicks is a sum over nodes weighted by click counts.

    Args:
        config: Encoder settings; dropout applies to the input vectors.
        dim: Width of item, node and session vectors, in columns.
    """

    def __init__(self, config: EncoderConfig, dim: int) -> None:
        super().__init__(config, dim)
        self.attend_last = nn.Linear(dim, dim)
        self.attend_node = nn.Linear(dim, dim, bias=False)
        self.attend_score = nn.Linear(dim, 1, bias=False)
        self.read_out = nn.Linear(2 * dim, dim, bias=False)
        initialize_uniform(self, dim)

    def read_sessions(self, states: SharedStates, graph: SessionGraph) -> Tensor:
        """Computes the session vectors [B, D]; see `GraphEncoder.read_sessions`."""
        last_BD = states.at(graph.last_node_B)
        projected = replace(states, states_CD=self.attend_node(states.states_CD))
        hidden_ND = self.attend_last(last_BD).index_select(0, states.session_N) + projected.of_nodes()
        attention_N1 = self.attend_score(hidden_ND.sigmoid()) * click_counts(graph).unsqueeze(1)
        read_out: Tensor = self.read_out(torch.cat([last_BD, states.sums(attention_N1)[0]], dim=1))
        return read_out
