"""Causal transformer blocks over packed clicks: only their attention pads sessions.

Shapes: L packed clicks, R sessions of similar length padded to T positions, A heads, D = d1 columns, E = D / A columns
of a head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmgr_rec.kernels.byte_dropout import ByteDropout, byte_dropout
from llmgr_rec.kernels.packed_sequences import PackedSequences

_WIDENING = 4


class CausalAttention(nn.Module):
    """Base class of causal blocks: the pre-norm self-attention, without what a block adds to it.

    A subclass makes its own layers, then calls `initialize_attention`.

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
        self.dropout = ByteDropout(dropout)

    def initialize_attention(self) -> None:
        """Initializes the projections of the attention as `nn.TransformerEncoderLayer` does: after all other layers."""
        nn.init.xavier_uniform_(self.query_key_value.weight)
        nn.init.zeros_(self.query_key_value.bias)
        nn.init.zeros_(self.project.bias)

    def attend(self, states_LD: Tensor, packed: PackedSequences) -> Tensor:
        """Output of the attention for each click, after dropout, [L, D].

        Args:
            states_LD: State of each click.
            packed: Sessions of the clicks.
        """
        query_key_value_LF = self.query_key_value(self.attention_norm(states_LD))
        attended_LD = causal_attention(query_key_value_LF, self.heads, packed, self.dropout.p if self.training else 0.0)
        projected_LD: Tensor = self.dropout(self.project(attended_LD))
        return projected_LD


class CausalBlock(CausalAttention):
    """Pre-norm self-attention and feed-forward network (GELU), each with a residual connection.

    Equivalent to `nn.TransformerEncoderLayer(norm_first=True)`, with the same initialization and the same four
    dropouts (attention weights, attention output, hidden layer, output). That module requires padded sessions and
    computes every layer for the padding, too.

    Args:
        dim: Width of states, in columns.
        heads: Attention heads; must divide `dim`.
        dropout: Probability of dropping an activation.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__(dim, heads, dropout)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, _WIDENING * dim)
        self.contract = nn.Linear(_WIDENING * dim, dim)
        self.initialize_attention()

    def forward(self, states_LD: Tensor, packed: PackedSequences) -> Tensor:
        """States after the block, [L, D].

        Args:
            states_LD: State of each click.
            packed: Sessions of the clicks.
        """
        states_LD = states_LD + self.attend(states_LD, packed)
        hidden = self.dropout(functional.gelu(self.expand(self.feed_forward_norm(states_LD))))
        return states_LD + self.dropout(self.contract(hidden))


def causal_attention(query_key_value_LF: Tensor, heads: int, packed: PackedSequences, dropout: float) -> Tensor:
    """Attention of each click over the clicks of its session up to itself, heads concatenated, [L, D].

    Args:
        query_key_value_LF: Projections of each click, F = 3 * D columns.
        heads: Attention heads A.
        packed: Sessions of the clicks.
        dropout: Probability of dropping an attention weight.
    """

    def mix(padded: Tensor) -> Tensor:
        query_RATE, key_RATE, value_RATE = padded.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        # Padding follows the clicks, so the causal mask excludes it.
        attend = _attend_with_dropout if dropout and padded.device.type == "cpu" else _attend
        return attend(query_RATE, key_RATE, value_RATE, dropout).transpose(1, 2).flatten(2)

    return packed.map_padded(mix, query_key_value_LF)


def _attend(query_RATE: Tensor, key_RATE: Tensor, value_RATE: Tensor, dropout: float) -> Tensor:
    return functional.scaled_dot_product_attention(query_RATE, key_RATE, value_RATE, dropout_p=dropout, is_causal=True)


def _attend_with_dropout(query_RATE: Tensor, key_RATE: Tensor, value_RATE: Tensor, dropout: float) -> Tensor:
    """The same with `byte_dropout`: torch's kernels for a CPU have no dropout, and its plain form draws slowly."""
    width, num_positions = query_RATE.shape[3], query_RATE.shape[2]
    later_TT = torch.full((num_positions, num_positions), float("-inf"), device=query_RATE.device).triu_(1)
    scores_RATT = (query_RATE * width**-0.5) @ key_RATE.transpose(2, 3) + later_TT.to(query_RATE.dtype)
    return byte_dropout(scores_RATT.softmax(dim=3), dropout) @ value_RATE
