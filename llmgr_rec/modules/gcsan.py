"""GC-SAN (Xu et al., IJCAI 2019): a gated graph network followed by self-attention over the clicks.

Shapes: B sessions, N nodes, M = largest number of nodes of a session, A attention heads, D = d1 columns.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmgr_rec.config import EncoderConfig
from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.modules.gated_graph import GatedGraph
from llmgr_rec.modules.session_encoder import (
    EncodedSessions,
    SessionEncoder,
    check_heads,
    click_counts,
    initialize_uniform,
    last_states,
    segment_softmax,
    segment_sum,
)


class AttentionBlock(nn.Module):
    """Self-attention and a feed-forward network with a residual connection.

    The paper attends over clicks, without position embeddings, so clicks on the same item have the same state in every
    layer. Attention over distinct nodes with log(clicks) added to their scores is equal and has fewer rows. `forward`
    computes every node. `forward_last` computes the last click only, which is the only output of the final block that
    is used, in O(N) instead of O(B * M * M); both use the same weights.

    Args:
        dim: Width of states, in columns.
        heads: Attention heads; must divide `dim`.
        dropout: Dropout probability on the outputs of the attention and of the feed-forward network.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.expand = nn.Linear(dim, dim)
        self.contract = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states_ND: Tensor, log_counts_N: Tensor, graph: SessionGraph) -> Tensor:
        """Attention of every node over the nodes of its session, [N, D].

        Args:
            states_ND: Node states.
            log_counts_N: Logarithm of each node's number of clicks.
            graph: The sessions' graphs.
        """
        num_nodes, dim = states_ND.shape
        starts_B, lengths_B = graph.node_offsets_B1[:-1], graph.node_offsets_B1.diff()
        longest = int(lengths_B.max()) if num_nodes else 0
        slots_M = torch.arange(longest, device=states_ND.device)
        nodes_BM = (starts_B.unsqueeze(1) + slots_M).clamp(max=num_nodes - 1)
        empty_BM = slots_M >= lengths_B.unsqueeze(1)
        # Finite: with -inf, a session without nodes would give NaN gradients.
        bias_BM = log_counts_N[nodes_BM].masked_fill(empty_BM, torch.finfo(states_ND.dtype).min)

        def split_heads(projected_ND: Tensor) -> Tensor:
            padded_BMD = projected_ND.index_select(0, nodes_BM.flatten())
            return padded_BMD.view(*nodes_BM.shape, self.heads, dim // self.heads).transpose(1, 2)

        attended_BAMD = functional.scaled_dot_product_attention(
            split_heads(self.query(states_ND)),
            split_heads(self.key(states_ND)),
            split_heads(self.value(states_ND)),
            attn_mask=bias_BM[:, None, None, :],
        )
        attended_ND = attended_BAMD.transpose(1, 2).reshape(-1, dim)[(~empty_BM).flatten().nonzero().squeeze(1)]
        return self._feed_forward(self.dropout(attended_ND))

    def forward_last(self, states_ND: Tensor, last_BD: Tensor, log_counts_N: Tensor, graph: SessionGraph) -> Tensor:
        """Attention of the last click of each session over its nodes, [B, D].

        No node is projected: the key projection is applied to the query, q . (K h) = (K' q) . h, and the value
        projection to the weighted mean, sum p (V h) = V (sum p h).

        Args:
            states_ND: Node states.
            last_BD: State of each session's last click.
            log_counts_N: Logarithm of each node's number of clicks.
            graph: The sessions' graphs.
        """
        dim, num_sessions, session_N = states_ND.shape[1], graph.num_sessions, graph.node_session_N
        width = dim // self.heads
        query_BAK = self.query(last_BD).view(num_sessions, self.heads, width) * width**-0.5
        probe_BAD = torch.einsum("bak,akd->bad", query_BAK, self.key.weight.view(self.heads, width, dim))
        scores_NA = (probe_BAD.index_select(0, session_N) * states_ND.unsqueeze(1)).sum(dim=2)
        scores_NA = scores_NA + log_counts_N.unsqueeze(1)
        weights_NA = segment_softmax(scores_NA, session_N, num_sessions)
        weighted_NAD = weights_NA.unsqueeze(2) * states_ND.unsqueeze(1)
        means_BAD = segment_sum(weighted_NAD.flatten(1), session_N, num_sessions).view_as(probe_BAD)
        attended_BAK = torch.einsum("bad,akd->bak", means_BAD, self.value.weight.view(self.heads, width, dim))
        return self._feed_forward(self.dropout(attended_BAK.flatten(1)))

    def _feed_forward(self, attended_XD: Tensor) -> Tensor:
        return attended_XD + self.dropout(self.contract(self.expand(attended_XD).relu()))


class GCSAN(SessionEncoder):
    """GC-SAN: the session vector is a weighted sum of the last click's attention output and its graph-network state.

    Args:
        config: Encoder settings; dropout applies to the input vectors and inside the attention blocks.
        dim: Width of item, node and session vectors, in columns.

    Raises:
        UserError: The number of attention heads does not divide the width, or there is no attention block.
    """

    def __init__(self, config: EncoderConfig, dim: int) -> None:
        super().__init__()
        self.check(config, dim)
        self.last_item_weight = config.last_item_weight
        self.dropout = nn.Dropout(config.dropout)
        self.graph_network = GatedGraph(dim, config.steps)
        self.blocks = nn.ModuleList(
            AttentionBlock(dim, config.attention_heads, config.dropout) for _ in range(config.attention_layers)
        )
        initialize_uniform(self, dim)

    @classmethod
    def check(cls, config: EncoderConfig, dim: int) -> None:
        """Checks the attention settings; see `SessionEncoder.check`."""
        check_heads(config, dim)

    def forward(self, nodes_ND: Tensor, graph: SessionGraph) -> EncodedSessions:
        """Encodes a batch; see `SessionEncoder.forward`."""
        states_ND = self.graph_network(self.dropout(nodes_ND), graph)
        log_counts_N = click_counts(graph).to(states_ND.dtype).log()
        attended_ND = states_ND
        for block in self.blocks[:-1]:
            attended_ND = block(attended_ND, log_counts_N, graph)
        final = cast(AttentionBlock, self.blocks[-1])
        attended_BD = final.forward_last(attended_ND, last_states(attended_ND, graph), log_counts_N, graph)
        mixed_BD = torch.lerp(last_states(states_ND, graph), attended_BD, self.last_item_weight)
        filled_B1 = (graph.click_offsets_B1.diff() > 0).unsqueeze(1)
        return EncodedSessions(states_ND, mixed_BD * filled_B1)
