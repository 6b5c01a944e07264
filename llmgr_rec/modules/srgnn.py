"""SR-GNN (Wu et al., arXiv 1811.00855): gated graph network, soft attention by the last click, linear readout.

Shapes: B sessions, N nodes, D = d1 columns.
"""

import torch
from torch import Tensor, nn

from llmgr_rec.config import EncoderConfig
from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.kernels.byte_dropout import ByteDropout
from llmgr_rec.kernels.prefix_nodes import prefix_nodes
from llmgr_rec.modules.gated_graph import GatedGraph, ItemGates, check_rounds
from llmgr_rec.modules.session_encoder import (
    EncodedSessions,
    SessionEncoder,
    click_counts,
    initialize_uniform,
    last_states,
    segment_sum,
)


class SRGNN(SessionEncoder):
    """SR-GNN: the session vector combines the last click's state and an attention over all clicks (eq. 6 and 7).

    Clicks on the same item have the same state, so the sum over clicks is a sum over nodes weighted by click counts.

    Args:
        config: Encoder settings; dropout applies to the input vectors.
        dim: Width of item, node and session vectors, in columns.

    Raises:
        UserError: It has to train in one pass with several rounds of message passing.
    """

    supports_one_pass = True

    def __init__(self, config: EncoderConfig, dim: int) -> None:
        super().__init__()
        self.check(config, dim)
        self.dropout = ByteDropout(config.dropout)
        self.graph_network = GatedGraph(dim, config.steps)
        self.attend_last = nn.Linear(dim, dim)
        self.attend_node = nn.Linear(dim, dim, bias=False)
        self.attend_score = nn.Linear(dim, 1, bias=False)
        self.read_out = nn.Linear(2 * dim, dim, bias=False)
        initialize_uniform(self, dim)

    @classmethod
    def check(cls, config: EncoderConfig, dim: int) -> None:
        """Checks the rounds of message passing; see `SessionEncoder.check`."""
        check_rounds(config)

    def forward(self, nodes_ND: Tensor, graph: SessionGraph) -> EncodedSessions:
        """Encodes a batch; see `SessionEncoder.forward`."""
        return self._read_out(self.graph_network(self.dropout(nodes_ND), graph), graph)

    def encode_one_pass(self, nodes_MD: Tensor, graph: SessionGraph, pass_offsets_P1: Tensor) -> Tensor:
        """Computes each node state of the prefixes once; see `SessionEncoder.encode_one_pass`."""
        prefixes = prefix_nodes(graph, pass_offsets_P1)
        states_ND = self.graph_network.forward_prefixes(self.dropout(nodes_MD), graph, prefixes)
        return self._read_out(states_ND, graph).sessions_BD

    def can_prepare(self, num_items: int) -> bool:
        """See `SessionEncoder.can_prepare`."""
        return self.graph_network.can_prepare(num_items)

    def prepare_items(self, items_VD: Tensor) -> ItemGates:
        """See `SessionEncoder.prepare_items`: the gates of the graph network."""
        return self.graph_network.prepare_items(items_VD)

    def encode_prepared(self, prepared: ItemGates, graph: SessionGraph) -> Tensor:
        """See `SessionEncoder.encode_prepared`."""
        return self._read_out(self.graph_network.forward_prepared(prepared, graph), graph).sessions_BD

    def _read_out(self, states_ND: Tensor, graph: SessionGraph) -> EncodedSessions:
        last_BD = last_states(states_ND, graph)
        session_N = graph.node_session_N
        hidden_ND = self.attend_last(last_BD).index_select(0, session_N) + self.attend_node(states_ND)
        attention_N1 = self.attend_score(hidden_ND.sigmoid()) * click_counts(graph).unsqueeze(1)
        global_BD = segment_sum(attention_N1 * states_ND, session_N, graph.num_sessions)
        return EncodedSessions(states_ND, self.read_out(torch.cat([last_BD, global_BD], dim=1)))
