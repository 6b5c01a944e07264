"""SASRec (Kang and McAuley, arXiv 1808.09781): causal self-attention over the clicks.

Shapes: B sessions, N nodes, T clicks of the longest session, D = d1 columns.
"""

import torch
from torch import Tensor, nn

from llmgr_rec.config import EncoderConfig
from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.modules.clicks import click_rows
from llmgr_rec.modules.session_encoder import EncodedSessions, SessionEncoder, check_heads, register_encoder

_INIT_STD = 0.02


@register_encoder("sasrec")
class SASRec(SessionEncoder):
    """Session vector: the state at the last click, with learned positions counted back from it.

    The blocks are torch's, normalised before each part: deeper ones train without warm-up.

    Args:
        config: Encoder settings; dropout applies to the vectors that enter and inside the blocks.
        dim: Width of item, node and session vectors, in columns.

    Raises:
        UserError: The number of attention heads does not divide the width.
    """

    def __init__(self, config: EncoderConfig, dim: int) -> None:
        super().__init__()
        check_heads(config, dim)
        self.max_clicks = config.max_clicks
        self.position_TD = nn.Parameter(torch.empty(config.max_clicks, dim).normal_(std=_INIT_STD))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, config.attention_heads, 4 * dim, config.dropout, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(config.attention_layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, nodes_ND: Tensor, graph: SessionGraph) -> EncodedSessions:
        """Encodes a batch; see `SessionEncoder.forward`."""
        rows = click_rows(graph, self.max_clicks)
        states_BTD = rows.set_out(nodes_ND) + self.position_TD[rows.place_BT.clamp(min=0)]
        states_BTD = self.dropout(states_BTD)
        size = states_BTD.shape[1]
        later_TT = torch.ones(size, size, dtype=torch.bool, device=nodes_ND.device).triu(1)
        for block in self.blocks:
            states_BTD = block(states_BTD, src_mask=later_TT)
        states_BTD = self.norm(states_BTD)
        filled_B1 = (graph.click_offsets_B1.diff() > 0).unsqueeze(1)
        return EncodedSessions(rows.by_node(states_BTD, nodes_ND), rows.newest(states_BTD) * filled_B1)
