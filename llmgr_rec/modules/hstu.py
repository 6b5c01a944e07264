"""HSTU (Zhai et al., arXiv 2402.17152): causal attention without a softmax, gated by the click itself.

Shapes: L packed clicks, R sessions of similar length padded to T positions, A heads, D = d1 columns, E = D / A columns
of a head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmgr_rec.config import EncoderConfig
from llmgr_rec.kernels.byte_dropout import ByteDropout
from llmgr_rec.kernels.packed_sequences import PackedSequences
from llmgr_rec.modules.sasrec import SASRec

_INIT_STD = 0.02
# As in the authors' code: sums of few small weights must not vanish in the norm.
_NORM_EPS = 1e-6
# The SiLU of it is 0 in any number format, and so is its gradient.
_MASKED = -1e4


class HSTUBlock(nn.Module):
    """One layer for both attention and transformation, with a residual connection.

    The weight of an earlier click is the SiLU of its product with the query plus a learned bias for their distance,
    divided by `max_clicks`. Weights do not compete for a sum of 1, so strength and number of similar clicks count. The
    normalized sum is multiplied by a gate of the click's own state.

    Args:
        dim: Width of states, in columns.
        heads: Attention heads; must divide `dim`.
        dropout: Probability of dropping an activation.
        max_clicks: Largest number of clicks of a session.
    """

    def __init__(self, dim: int, heads: int, dropout: float, max_clicks: int) -> None:
        super().__init__()
        self.heads = heads
        self.max_clicks = max_clicks
        self.input_norm = nn.LayerNorm(dim, eps=_NORM_EPS)
        # Gate, query, key and value, in one product.
        self.expand = nn.Linear(dim, 4 * dim, bias=False)
        # By number of clicks between the two.
        self.distance_AT = nn.Parameter(torch.empty(heads, max_clicks))
        self.attended_norm = nn.LayerNorm(dim, eps=_NORM_EPS)
        self.project = nn.Linear(dim, dim)
        self.dropout = ByteDropout(dropout)
        nn.init.normal_(self.distance_AT, std=_INIT_STD)
        nn.init.xavier_uniform_(self.expand.weight)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, states_LD: Tensor, packed: PackedSequences) -> Tensor:
        """States after the block, [L, D].

        Args:
            states_LD: State of each click.
            packed: Sessions of the clicks.
        """
        dim = states_LD.shape[1]
        gate_LD, query_key_value_LF = functional.silu(self.expand(self.input_norm(states_LD))).split([dim, 3 * dim], 1)
        attended_LD = packed.map_padded(self._attend, query_key_value_LF)
        return states_LD + self.project(self.dropout(gate_LD * self.attended_norm(attended_LD)))

    def _attend(self, padded_RTF: Tensor) -> Tensor:
        """Weighted sums of the values of each click and those before it, heads concatenated, [R, T, D]."""
        query_RTD, key_RTD, value_RTD = padded_RTF.chunk(3, dim=2)
        heads = (part_RTD.chunk(self.heads, dim=2) for part_RTD in (query_RTD, key_RTD, value_RTD))
        attended = []
        # Head by head, because the traced form of four dimensions excludes sessions of one click.
        for query_RTE, key_RTE, value_RTE, bias_TT in zip(*heads, self._bias(padded_RTF.shape[1]), strict=True):
            scores_RTT = torch.bmm(query_RTE, key_RTE.transpose(1, 2)) + bias_TT.expand(padded_RTF.shape[0], -1, -1)
            weights_RTT = functional.silu(scores_RTT) / self.max_clicks
            attended.append(torch.bmm(weights_RTT.to(value_RTE.dtype), value_RTE))
        return torch.cat(attended, dim=2)

    def _bias(self, width: int) -> Tensor:
        """Bias of each pair of positions, [A, T, T]. Padding follows the clicks, so the causal mask excludes it."""
        position_T = torch.arange(width, device=self.distance_AT.device)
        distance_TT = position_T.unsqueeze(1) - position_T.unsqueeze(0)
        masked_A1 = self.distance_AT.new_full((self.heads, 1), _MASKED)
        bias_AT = torch.cat([self.distance_AT, masked_A1], dim=1)
        index_TT = torch.where(distance_TT >= 0, distance_TT, self.max_clicks)
        return bias_AT.index_select(1, index_TT.flatten()).unflatten(1, (width, width))


class HSTU(SASRec):
    """SASRec with HSTU blocks. Distances count clicks; sessions have no times.

    Args:
        config: Encoder settings; dropout applies to the input vectors and to the gated sums.
        dim: Width of item, node and session vectors, in columns.

    Raises:
        UserError: The number of attention heads does not divide the width, or there is no attention block.
    """

    @staticmethod
    def make_block(config: EncoderConfig, dim: int) -> nn.Module:
        """An HSTU block; see `SASRec.make_block`."""
        return HSTUBlock(dim, config.attention_heads, config.dropout, config.max_clicks)
