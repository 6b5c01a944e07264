"""Base class of causal session encoders, in which no state depends on later clicks.

Shapes: B sessions, N nodes, M of them in the longest prefixes, P passes, L packed clicks, D = d1 columns.
"""

from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from llmgr_rec.data.graph import SessionGraph, nodes_of_longest
from llmgr_rec.kernels.packed_sequences import PackedSequences, pack_sequences, pad_node
from llmgr_rec.modules.session_encoder import EncodedSessions, SessionEncoder


class CausalEncoder(SessionEncoder):
    """A causal encoder of the newest clicks of a session, which can encode all its prefixes in one pass.

    Args:
        max_clicks: Newest clicks of a session that are encoded.
    """

    supports_one_pass = True

    def __init__(self, max_clicks: int) -> None:
        super().__init__()
        self.max_clicks = max_clicks

    @abstractmethod
    def states(self, nodes_ND: Tensor, packed: PackedSequences) -> Tensor:
        """State of each packed click, [L, D].

        Args:
            nodes_ND: Item vectors of the nodes.
            packed: The clicks to encode.
        """

    def forward(self, nodes_ND: Tensor, graph: SessionGraph) -> EncodedSessions:
        """Encodes a batch; see `SessionEncoder.forward`."""
        packed = pack_sequences(graph, self.max_clicks)
        states_LD = self.states(pad_node(nodes_ND), packed)
        return EncodedSessions(packed.node_states(states_LD, nodes_ND), packed.session_states(states_LD))

    def encode_one_pass(self, nodes_MD: Tensor, graph: SessionGraph, pass_offsets_P1: Tensor) -> Tensor:
        """Encodes only the longest prefix of each pass; see `SessionEncoder.encode_one_pass`.

        The result equals that of `forward` if no session has more than `max_clicks` clicks. In a longer session, all
        prefixes of a pass start at the first click that is kept of the longest one.

        Raises:
            ValueError: A pass has more than `max_clicks` prefixes, so the longest does not contain all their clicks.
        """
        if not torch.compiler.is_compiling() and int(pass_offsets_P1.diff().max()) > self.max_clicks:
            raise ValueError(f"a pass has more than {self.max_clicks} prefixes, the number of clicks that are encoded")
        packed = pack_sequences(graph, self.max_clicks, pass_offsets_P1)
        longest_M = nodes_of_longest(graph, pass_offsets_P1).values
        # The last number is that of the padding while compiling.
        number_N = torch.full((graph.node_items_N.shape[0] + 1,), nodes_MD.shape[0], device=longest_M.device)
        number_N[longest_M] = torch.arange(nodes_MD.shape[0], device=longest_M.device)
        packed = replace(packed, node_L=number_N[packed.node_L])
        return packed.session_states(self.states(pad_node(nodes_MD), packed))
