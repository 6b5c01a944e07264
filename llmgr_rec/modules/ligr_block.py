"""The causal transformer block of LiGR (Borisyuk et al., arXiv 2502.03417): gated residual connections and SwiGLU.

Shapes: L packed clicks, D = d1 columns, H columns of the hidden layer.
"""

from torch import Tensor, nn
from torch.nn import functional

from llmgr_rec.kernels.packed_sequences import PackedSequences
from llmgr_rec.modules.causal_block import CausalAttention

_WIDENING = 4


class LiGRBlock(CausalAttention):
    """Pre-norm self-attention and SwiGLU feed-forward network, each added times a gate of the states before it.

    The gate of a click is the sigmoid of a linear layer of its state, so it can leave out what a sub-layer adds, column
    by column. Projections of attention are initialized as in `CausalBlock`; the linear layers of the feed-forward
    network have no bias, as in eSASRec.

    Args:
        dim: Width of states, in columns.
        heads: Attention heads; must divide `dim`.
        dropout: Probability of dropping an activation.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__(dim, heads, dropout)
        self.attention_gate = nn.Linear(dim, dim)
        self.feed_forward_norm = nn.LayerNorm(dim)
        # The activated half and the half that it multiplies, in one product.
        self.expand = nn.Linear(dim, 2 * _WIDENING * dim, bias=False)
        self.contract = nn.Linear(_WIDENING * dim, dim, bias=False)
        self.feed_forward_gate = nn.Linear(dim, dim)
        self.initialize_attention()

    def forward(self, states_LD: Tensor, packed: PackedSequences) -> Tensor:
        """States after the block, [L, D].

        Args:
            states_LD: State of each click.
            packed: Sessions of the clicks.
        """
        gate_LD = self.attention_gate(states_LD).sigmoid()
        states_LD = states_LD + gate_LD * self.attend(states_LD, packed)
        activated_LH, linear_LH = self.expand(self.feed_forward_norm(states_LD)).chunk(2, dim=1)
        hidden_LH = self.dropout(functional.silu(activated_LH) * linear_LH)
        gate_LD = self.feed_forward_gate(states_LD).sigmoid()
        return states_LD + gate_LD * self.dropout(self.contract(hidden_LH))
