"""GRU4Rec (Hidasi et al., arXiv 1511.06939): a gated recurrent network over the clicks.

Shapes: L packed clicks, N nodes, R sessions padded to T positions, D = d1 columns.
"""

import torch
from torch import Tensor, nn

from llmgr_rec.config import EncoderConfig
from llmgr_rec.kernels.byte_dropout import ByteDropout
from llmgr_rec.kernels.gated_recurrence import gru
from llmgr_rec.kernels.packed_sequences import PackedSequences
from llmgr_rec.modules.causal_encoder import CausalEncoder
from llmgr_rec.modules.session_encoder import initialize_uniform


class RecurrentLayer(nn.Module):
    """`nn.GRU(dim, dim, batch_first=True)` without its final state, which can be compiled.

    Args:
        dim: Width of inputs and states, in columns.
        max_steps: Largest number of time steps.
    """

    def __init__(self, dim: int, max_steps: int) -> None:
        super().__init__()
        self.max_steps = max_steps
        # Names and order are those of nn.GRU.
        self.weight_ih_l0 = nn.Parameter(torch.empty(3 * dim, dim))
        self.weight_hh_l0 = nn.Parameter(torch.empty(3 * dim, dim))
        self.bias_ih_l0 = nn.Parameter(torch.empty(3 * dim))
        self.bias_hh_l0 = nn.Parameter(torch.empty(3 * dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initializes as `nn.GRU` does."""
        initialize_uniform(self, self.weight_hh_l0.shape[1])

    def forward(self, clicks_RTD: Tensor) -> Tensor:
        """State after each time step, [R, T, D]."""
        weights = (self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0)
        return gru(clicks_RTD, weights, self.max_steps)


class GRU4Rec(CausalEncoder):
    """GRU4Rec: the session vector is the projected hidden state after the last click.

    Args:
        config: Encoder settings; dropout applies to the input vectors.
        dim: Width of item, node and session vectors, in columns.
    """

    def __init__(self, config: EncoderConfig, dim: int) -> None:
        super().__init__(config.max_clicks)
        self.dropout = ByteDropout(config.dropout)
        self.network = RecurrentLayer(dim, config.max_clicks)
        self.read_out = nn.Linear(dim, dim)
        initialize_uniform(self, dim)

    def states(self, nodes_ND: Tensor, packed: PackedSequences) -> Tensor:
        """State of each packed click, [L, D]; see `CausalEncoder.states`."""
        clicks_LD = self.dropout(nodes_ND.index_select(0, packed.node_L))
        return self.read_out(packed.map_padded(lambda clicks_RTD: self.network(clicks_RTD), clicks_LD))
