"""GRU4Rec (Hidasi et al., arXiv 1511.06939): a gated recurrent network over the clicks.

Shapes: L clicks that are read, N nodes, R rows of T places, D = d1 columns.
"""

from torch import Tensor, nn

from llmgr_rec.config import EncoderConfig
from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.modules.clicks import click_rows
from llmgr_rec.modules.session_encoder import EncodedSessions, SessionEncoder, initialise_uniform, register_encoder


@register_encoder("gru4rec")
class GRU4Rec(SessionEncoder):
    """Session vector: the network's state after the last click, projected.

    Args:
        config: Encoder settings; dropout applies to the vectors that enter.
        dim: Width of item, node and session vectors, in columns.
    """

    def __init__(self, config: EncoderConfig, dim: int) -> None:
        super().__init__()
        self.max_clicks = config.max_clicks
        self.dropout = nn.Dropout(config.dropout)
        self.network = nn.GRU(dim, dim, batch_first=True)
        self.read_out = nn.Linear(dim, dim)
        initialise_uniform(self, dim)

    def forward(self, nodes_ND: Tensor, graph: SessionGraph) -> EncodedSessions:
        """Encodes a batch; see `SessionEncoder.forward`."""
        rows = click_rows(graph, self.max_clicks)
        clicks_LD = self.dropout(nodes_ND.index_select(0, rows.node_L))
        states_LD = rows.in_rows(lambda clicks_RTD: self.network(clicks_RTD)[0], clicks_LD)
        return rows.encoded(self.read_out(states_LD), nodes_ND)
