"""Session encoders that process the newest clicks in order, such that no state depends on later clicks.

Shapes: B sessions, N nodes, P passes, L packed clicks, D = d1 columns.
"""

from abc import abstractmethod

from torch import Tensor

from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.kernels.packed_sequences import PackedSequences, pack_sequences
from llmgr_rec.modules.session_encoder import EncodedSessions, SessionEncoder


class CausalEncoder(SessionEncoder):
    """Base class of causal sequence encoders, which can encode all prefixes of a session in one pass.

    Args:
        max_clicks: Newest clicks of a session that are encoded.
    """

    supports_one_pass = True

    def __init__(self, max_clicks: int) -> None:
        super().__init__()
        self.max_clicks = max_clicks

    @abstractmethod
    def states(self, nodes_ND: Tensor, packed: PackedSequences) -> Tensor:
        """A state for each packed click, [L, D]."""

    def forward(self, nodes_ND: Tensor, graph: SessionGraph) -> EncodedSessions:
        """Encodes a batch; see `SessionEncoder.forward`."""
        return self._encode(nodes_ND, pack_sequences(graph, self.max_clicks))

    def encode_one_pass(self, nodes_ND: Tensor, graph: SessionGraph, pass_offsets_P1: Tensor) -> EncodedSessions:
        """Encodes the longest prefix of each pass alone; see `SessionEncoder.encode_one_pass`.

        It gives what `forward` does as long as no session has more than `max_clicks` clicks. Of a longer one, all
        prefixes of a pass are encoded from the first click on that the longest one has.

        Raises:
            ValueError: A pass has more than `max_clicks` prefixes, so that the longest does not hold all their clicks.
        """
        if int(pass_offsets_P1.diff().max()) > self.max_clicks:
            raise ValueError(f"a pass has more than {self.max_clicks} prefixes, as many as clicks are read")
        return self._encode(nodes_ND, pack_sequences(graph, self.max_clicks, pass_offsets_P1))

    def _encode(self, nodes_ND: Tensor, packed: PackedSequences) -> EncodedSessions:
        return EncodedSessions(*packed.node_and_session_states(self.states(nodes_ND, packed), nodes_ND))
