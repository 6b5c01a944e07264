"""A causal transformer block over clicks that stand end to end: padding exists in its attention alone.

Shapes: L clicks, R sessions of like length with T places each, A heads, D = d1 columns, E = D / A columns of a head.
"""

from torch import Tensor, nn
from torch.nn import functional

from llmgr_rec.kernels.packed_sequences import PackedSequences

_WIDENING = 4


class CausalBlock(nn.Module):
    """Self-attention, then a feed-forward net with GELU, each normalized before and with a residual connection.

    What `nn.TransformerEncoderLayer` computes with `norm_first`, from the same initial values and with dropout at the
    same places (attention weights, its projection, the hidden layer, the result); that one takes padded sessions and
    computes the padding too.

    Args:
        dim: Width of states, in columns.
        heads: Attention heads; must divide `dim`.
        dropout: Probability of dropping an activation.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, _WIDENING * dim)
        self.contract = nn.Linear(_WIDENING * dim, dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.query_key_value.weight)
        nn.init.zeros_(self.query_key_value.bias)
        nn.init.zeros_(self.project.bias)

    def forward(self, states_LD: Tensor, packed: PackedSequences) -> Tensor:
        """States after the block, [L, D].

        Args:
            states_LD: A state for each click.
            packed: How the clicks make up sessions.
        """
        states_LD = states_LD + self.dropout(self.project(self._attend(self.attention_norm(states_LD), packed)))
        hidden = self.dropout(functional.gelu(self.expand(self.feed_forward_norm(states_LD))))
        return states_LD + self.dropout(self.contract(hidden))

    def _attend(self, states_LD: Tensor, packed: PackedSequences) -> Tensor:
        """Every click's mean of its session's values up to itself, the heads side by side, [L, D]."""

        def mix(padded: Tensor) -> Tensor:
            query_RATE, key_RATE, value_RATE = padded.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            # Padding comes after the clicks, so a causal mask hides it.
            mixed_RATE = functional.scaled_dot_product_attention(
                query_RATE, key_RATE, value_RATE, dropout_p=self.dropout.p if self.training else 0.0, is_causal=True
            )
            return mixed_RATE.transpose(1, 2).flatten(2)

        return packed.map_padded(mix, self.query_key_value(states_LD))
