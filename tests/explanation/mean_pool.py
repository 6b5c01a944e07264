"""A linear session encoder."""

from torch import Tensor

from llmgr_rec.config import EncoderConfig
from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.modules.session_encoder import EncodedSessions, SessionEncoder, click_counts, segment_sum


class MeanPool(SessionEncoder):
    """The session vector is the mean of the vectors of the clicks."""

    def __init__(self, config: EncoderConfig, dim: int) -> None:
        super().__init__()

    def forward(self, nodes_ND: Tensor, graph: SessionGraph) -> EncodedSessions:
        weighted_ND = nodes_ND * click_counts(graph).unsqueeze(1)
        sums_BD = segment_sum(weighted_ND, graph.node_session_N, graph.num_sessions)
        lengths_B1 = graph.click_offsets_B1.diff().clamp(min=1).unsqueeze(1)
        return EncodedSessions(nodes_ND, sums_BD / lengths_B1)
