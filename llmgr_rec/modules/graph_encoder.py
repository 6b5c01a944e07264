"""Base class of encoders that read a session out of the node states of a gated graph network: GC-SAN and SR-GNN.

Shapes: B sessions, N nodes, M of them in longest prefixes, V items of the catalog, D = d1 columns.
"""

from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from llmgr_rec.config import EncoderConfig
from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.kernels.byte_dropout import ByteDropout
from llmgr_rec.kernels.prefix_nodes import prefix_nodes
from llmgr_rec.kernels.shared_states import SharedStates
from llmgr_rec.modules.gated_graph import GatedGraph, ItemGates
from llmgr_rec.modules.session_encoder import EncodedSessions, SessionEncoder


class GraphEncoder(SessionEncoder):
    """Node states of a gated graph network, by every way to them; subclasses read the sessions out.

    Args:
        config: Encoder settings; dropout applies to the input vectors.
        dim: Width of item, node and session vectors, in columns.

    Raises:
        UserError: The settings are wrong, see `SessionEncoder.check`.
    """

    supports_one_pass = True

    def __init__(self, config: EncoderConfig, dim: int) -> None:
        super().__init__()
        self.check(config, dim)
        self.dropout = ByteDropout(config.dropout)
        self.graph_network = GatedGraph(dim, config.steps)

    @classmethod
    def one_pass_problem(cls, config: EncoderConfig) -> str:
        """Only one round of messages leaves node states independent of later clicks; see `SessionEncoder`."""
        if config.steps == 1:
            return ""
        return f"with encoder.steps {config.steps} the node states of {config.name} depend on later clicks"

    @abstractmethod
    def read_sessions(self, states: SharedStates, graph: SessionGraph) -> Tensor:
        """Computes the session vectors [B, D] from the node states.

        Args:
            states: Node states of the graph network.
            graph: The sessions' graphs.
        """

    def forward(self, nodes_ND: Tensor, graph: SessionGraph) -> EncodedSessions:
        """Encodes a batch; see `SessionEncoder.forward`."""
        states_ND = self.graph_network(self.dropout(nodes_ND), graph)
        return EncodedSessions(states_ND, self._read(states_ND, graph))

    def encode_one_pass(self, nodes_MD: Tensor, graph: SessionGraph, pass_offsets_P1: Tensor) -> Tensor:
        """Computes each node state of the prefixes once; see `SessionEncoder.encode_one_pass`."""
        prefixes = prefix_nodes(graph, pass_offsets_P1)
        states_CD = self.graph_network.forward_prefixes(self.dropout(nodes_MD), graph, prefixes)
        return self._read(states_CD, graph, prefixes.state_N)

    def encode_prefixes(self, nodes_ND: Tensor, graph: SessionGraph, pass_offsets_P1: Tensor) -> Tensor:
        """See `SessionEncoder.encode_prefixes`: of one round of messages, most states are shared."""
        if self.graph_network.steps > 1:
            return super().encode_prefixes(nodes_ND, graph, pass_offsets_P1)
        prefixes = prefix_nodes(graph, pass_offsets_P1)
        # Each node has a vector of its own here.
        prefixes = replace(prefixes, vector_N=torch.arange(nodes_ND.shape[0], device=nodes_ND.device))
        states_CD = self.graph_network.forward_prefixes(self.dropout(nodes_ND), graph, prefixes)
        return self._read(states_CD, graph, prefixes.state_N)

    def train_in(self, dtype: torch.dtype) -> None:
        """See `SessionEncoder.train_in`: the products of the graph network."""
        self.graph_network.training_dtype = dtype

    def can_prepare(self, num_items: int) -> bool:
        """See `SessionEncoder.can_prepare`."""
        return self.graph_network.can_prepare(num_items)

    def prepare_items(self, items_VD: Tensor) -> ItemGates:
        """See `SessionEncoder.prepare_items`: the gates of the graph network."""
        return self.graph_network.prepare_items(items_VD)

    def encode_prepared(self, prepared: ItemGates, nodes_ND: Tensor, graph: SessionGraph) -> Tensor:
        """See `SessionEncoder.encode_prepared`."""
        return self._read(self.graph_network.forward_prepared(prepared, nodes_ND, graph), graph)

    def _read(self, states_CD: Tensor, graph: SessionGraph, state_N: Tensor | None = None) -> Tensor:
        return self.read_sessions(SharedStates(states_CD, graph.node_session_N, graph.node_offsets_B1, state_N), graph)
