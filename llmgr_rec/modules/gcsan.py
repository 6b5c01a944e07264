"""GC-SAN (Xu et al., IJCAI 2019): a gated graph network followed by self-attention over the clicks.

Shapes: B sessions, N nodes, M = largest number of nodes of a session, A attention heads, D = d1 columns.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmgr_rec.config import EncoderConfig
from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.kernels.byte_dropout import ByteDropout
from llmgr_rec.kernels.packed_sequences import LengthBucket
from llmgr_rec.kernels.shared_states import SharedStates
from llmgr_rec.modules.graph_encoder import GraphEncoder
from llmgr_rec.modules.session_encoder import check_heads, click_counts, initialize_uniform, segment_softmax

# Weight of the self-attention output against the state of the last item, as in the paper.
ATTENTION_WEIGHT = 0.6


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
        self.dropout = ByteDropout(dropout)

    def forward(self, states_ND: Tensor, log_counts_N: Tensor, graph: SessionGraph) -> Tensor:
        """Attention of every node over the nodes of its session, [N, D].

        Args:
            states_ND: Node states.
            log_counts_N: Logarithm of each node's number of clicks.
            graph: The sessions' graphs.
        """
        rows = _node_rows(graph)
        query_ND = self.query(states_ND)
        # Finite: with -inf, a session without nodes would give NaN gradients.
        lowest = torch.finfo(query_ND.dtype).min
        bias_BM = query_ND.new_full((rows.num_rows * rows.width,), lowest).index_copy(
            0, rows.slot_L, log_counts_N.to(query_ND.dtype)
        )

        def split_heads(projected_ND: Tensor) -> Tensor:
            return rows.pad(projected_ND).unflatten(2, (self.heads, -1)).transpose(1, 2)

        attended_BAMD = functional.scaled_dot_product_attention(
            split_heads(query_ND),
            split_heads(self.key(states_ND)),
            split_heads(self.value(states_ND)),
            attn_mask=bias_BM.view(rows.num_rows, 1, 1, rows.width),
        )
        return self._feed_forward(self.dropout(rows.unpad(attended_BAMD.transpose(1, 2).flatten(2))))

    def forward_last(self, states: SharedStates, last_BD: Tensor, log_counts_N: Tensor) -> Tensor:
        """Attention of the last click of each session over its nodes, [B, D].

        No node is projected: the key projection is applied to the query, q . (K h) = (K' q) . h, and the value
        projection to the weighted mean, sum p (V h) = V (sum p h).

        Args:
            states: Node states.
            last_BD: State of each session's last click.
            log_counts_N: Logarithm of each node's number of clicks.
        """
        num_sessions, dim = states.num_sessions, states.states_CD.shape[1]
        width = dim // self.heads
        query_BAK = self.query(last_BD).view(num_sessions, self.heads, width) * width**-0.5
        # Not einsum, whose traced form excludes batches of one session.
        probe_ABD = torch.bmm(query_BAK.transpose(0, 1), _weight(self.key).view(self.heads, width, dim))
        scores_NA = states.scores(probe_ABD) + log_counts_N.unsqueeze(1)
        weights_NA = segment_softmax(scores_NA, states.session_N, num_sessions)
        value_ADK = _weight(self.value).view(self.heads, width, dim).transpose(1, 2)
        attended_ABK = torch.bmm(states.sums(weights_NA), value_ADK)
        return self._feed_forward(self.dropout(torch.cat(attended_ABK.unbind(), dim=1)))

    def _feed_forward(self, attended_XD: Tensor) -> Tensor:
        return attended_XD + self.dropout(self.contract(self.expand(attended_XD).relu()))


def _weight(linear: nn.Linear) -> Tensor:
    """The weight of a linear layer, also of one that `quantize_dynamic` has replaced, whose weight is a method."""
    weight: Tensor | Callable[[], Tensor] = linear.weight
    return weight if isinstance(weight, Tensor) else weight().dequantize()


def _node_rows(graph: SessionGraph) -> LengthBucket:
    """The nodes of each session as a row of the length of the longest."""
    # Two columns or more, because a compiler would specialize on one.
    width = cast(int, functional.pad(graph.node_offsets_B1.diff(), (0, 1), value=2).max().item())
    torch._check(width >= 2)
    session_N = graph.node_session_N
    column_N = torch.arange(session_N.shape[0], device=session_N.device) - graph.node_offsets_B1[session_N]
    return LengthBucket(session_N * width + column_N, graph.num_sessions, width)


class GCSAN(GraphEncoder):
    """GC-SAN: the session vector is a weighted sum of the last click's attention output and its graph-network state.

    Args:
        config: Encoder settings; dropout applies to the input vectors and inside the attention blocks.
        dim: Width of item, node and session vectors, in columns.

    Raises:
        UserError: The number of attention heads does not divide the width, or there is no attention block.
    """

    def __init__(self, config: EncoderConfig, dim: int) -> None:
        super().__init__(config, dim)
        self.blocks = nn.ModuleList(
            AttentionBlock(dim, config.attention_heads, config.dropout) for _ in range(config.attention_layers)
        )
        initialize_uniform(self, dim)

    @classmethod
    def check(cls, config: EncoderConfig, dim: int) -> None:
        """Checks the attention settings; see `SessionEncoder.check`."""
        check_heads(config, dim)

    def read_sessions(self, states: SharedStates, graph: SessionGraph) -> Tensor:
        """Computes the session vectors [B, D]; see `GraphEncoder.read_sessions`."""
        log_counts_N = click_counts(graph).to(states.states_CD.dtype).log()
        last_BD = states.at(graph.last_node_B)
        attended, last_attended_BD = states, last_BD
        for block in self.blocks[:-1]:
            attended_ND = block(attended.of_nodes(), log_counts_N, graph)
            attended = replace(states, states_CD=attended_ND, state_N=None)
            last_attended_BD = attended.at(graph.last_node_B)
        final = cast(AttentionBlock, self.blocks[-1])
        attended_BD = final.forward_last(attended, last_attended_BD, log_counts_N)
        # Under autocast, the attention has a lower precision than the graph network.
        mixed_BD = torch.lerp(last_BD, attended_BD.to(last_BD.dtype), ATTENTION_WEIGHT)
        return mixed_BD * (graph.click_offsets_B1.diff() > 0).unsqueeze(1)
