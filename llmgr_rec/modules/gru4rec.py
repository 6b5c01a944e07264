"""GRU4Rec (Hidasi et al., arXiv 1511.06939): a gated recurrent network over the clicks.

Shapes: L packed clicks, N nodes, R sessions padded to T positions, D = d1 columns.
"""

from torch import Tensor, nn

from llmgr_rec.config import EncoderConfig
from llmgr_rec.kernels.packed_sequences import PackedSequences
from llmgr_rec.modules.causal_encoder import CausalEncoder
from llmgr_rec.modules.session_encoder import initialize_uniform


class GRU4Rec(CausalEncoder):
    """GRU4Rec: the session vector is the projected hidden state after the last click.

    Args:
        config: Encoder settings; dropout applies to the input vectors.
        dim: Width of item, node and session vectors, in columns.
    """

    def __init__(self, config: EncoderConfig, dim: int) -> None:
        super().__init__(config.max_clicks)
        self.dropout = nn.Dropout(config.dropout)
        self.network = nn.GRU(dim, dim, batch_first=True)
        self.read_out = nn.Linear(dim, dim)
        initialize_uniform(self, dim)

    def states(self, nodes_ND: Tensor, packed: PackedSequences) -> Tensor:
        """State of each packed click, [L, D]; see `CausalEncoder.states`."""
        clicks_LD = self.dropout(nodes_ND.index_select(0, packed.node_L))
        return self.read_out(packed.map_padded(lambda clicks_RTD: self.network(clicks_RTD)[0], clicks_LD))
