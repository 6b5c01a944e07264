"""A session encoder of your own: docs/extending/encoder.md explains it.

    python -m llmgr_rec.train --dataset DATASET --output RUN --encoder.name examples.own_encoder:MeanPool

Shapes: B sessions, N nodes, D columns.
"""

from torch import Tensor, nn

from llmgr_rec import EncodedSessions, EncoderConfig, SessionEncoder, SessionGraph
from llmgr_rec.modules.session_encoder import click_counts, segment_sum


class MeanPool(SessionEncoder):
    """Session vector: the mean of the clicked items' vectors, projected."""

    def __init__(self, config: EncoderConfig, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, dim)

    def forward(self, nodes_ND: Tensor, graph: SessionGraph) -> EncodedSessions:
        """Encodes a batch; a session without clicks gets zeros."""
        counts_N1 = click_counts(graph).unsqueeze(1)
        sums_BD = segment_sum(nodes_ND * counts_N1, graph.node_session_N, graph.num_sessions)
        lengths_B1 = graph.click_offsets_B1.diff().unsqueeze(1)
        means_BD = self.project(sums_BD / lengths_B1.clamp(min=1))
        return EncodedSessions(nodes_ND, means_BD * (lengths_B1 > 0))
