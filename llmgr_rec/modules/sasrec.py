"""SASRec (Kang and McAuley, arXiv 1808.09781): causal self-attention over the clicks.

Shapes: L packed clicks, N nodes, T positions, D = d1 columns.
"""

import torch
from torch import Tensor, nn

from llmgr_rec.config import EncoderConfig
from llmgr_rec.kernels.byte_dropout import ByteDropout
from llmgr_rec.kernels.packed_sequences import PackedSequences
from llmgr_rec.modules.causal_block import CausalBlock
from llmgr_rec.modules.causal_encoder import CausalEncoder
from llmgr_rec.modules.session_encoder import check_heads

_INIT_STD = 0.02


class SASRec(CausalEncoder):
    """SASRec: the session vector is the state at the last click.

    Learned positions count from the first click that is encoded, so that no state depends on later clicks and all
    prefixes of a session can be encoded in one pass. Blocks are pre-norm, which trains several of them without warm-up.

    Args:
        config: Encoder settings; dropout applies to the input vectors and inside the blocks.
        dim: Width of item, node and session vectors, in columns.

    Raises:
        UserError: The number of attention heads does not divide the width, or there is no attention block.
    """

    def __init__(self, config: EncoderConfig, dim: int) -> None:
        self.check(config, dim)
        super().__init__(config.max_clicks)
        self.position_TD = nn.Parameter(torch.empty(config.max_clicks, dim).normal_(std=_INIT_STD))
        self.dropout = ByteDropout(config.dropout)
        self.blocks = nn.ModuleList(self.make_block(config, dim) for _ in range(config.attention_layers))
        self.norm = nn.LayerNorm(dim)

    @staticmethod
    def make_block(config: EncoderConfig, dim: int) -> nn.Module:
        """A block, called with the states of the clicks and their sessions as in `CausalBlock.forward`."""
        return CausalBlock(dim, config.attention_heads, config.dropout)

    @classmethod
    def check(cls, config: EncoderConfig, dim: int) -> None:
        """Checks the attention settings; see `SessionEncoder.check`."""
        check_heads(config, dim)

    def states(self, nodes_ND: Tensor, packed: PackedSequences) -> Tensor:
        """State of each packed click, [L, D]; see `CausalEncoder.states`."""
        states_LD = nodes_ND.index_select(0, packed.node_L) + self.position_TD.index_select(0, packed.position_L)
        states_LD = self.dropout(states_LD)
        for block in self.blocks:
            states_LD = block(states_LD, packed)
        return self.norm(states_LD)
