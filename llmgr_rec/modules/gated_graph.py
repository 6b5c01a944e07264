"""The gated graph network of SR-GNN (arXiv 1811.00855, eq. 1 to 5) on edge lists, without padding or dense adjacency.

Shapes: N nodes, E edges (distinct ordered pairs within a session), D = d1 columns.
"""

import torch
from torch import Tensor, nn

from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.kernels.gated_recurrence import gru_cell
from llmgr_rec.modules.session_encoder import initialize_uniform, occurrences


class GatedGraph(nn.Module):
    """Exchanges messages along session edges and updates each node like a GRU.

    A node receives the mean message of its predecessors and the mean message of its successors: eq. 1 with the
    adjacency normalized over distinct edges, as in the authors' code. As in that code, the update is the standard GRU
    cell, whose reset gate multiplies the projected state. Eq. 4 as printed multiplies the state before the projection.

    Args:
        dim: Width of node states, in columns.
        steps: Rounds of message passing; the parameters are shared between rounds.
    """

    def __init__(self, dim: int, steps: int) -> None:
        super().__init__()
        self.dim = dim
        self.steps = steps
        # The two halves of H in eq. 1: predecessors, successors.
        self.message = nn.Parameter(torch.empty(2, dim, dim))
        self.message_bias = nn.Parameter(torch.empty(2 * dim))
        self.update = nn.GRUCell(2 * dim, dim)
        initialize_uniform(self, dim)

    def reset_parameters(self) -> None:
        """Reinitializes the message matrices; TorchRec and FSDP require it of modules built on the meta device."""
        for parameter in (self.message, self.message_bias):
            nn.init.uniform_(parameter, -(self.dim**-0.5), self.dim**-0.5)

    def forward(self, nodes_ND: Tensor, graph: SessionGraph) -> Tensor:
        """Runs all rounds of message passing.

        Args:
            nodes_ND: Node vectors before the first round.
            graph: The sessions' graphs.

        Returns:
            Node states after the last round, [N, D].
        """
        num_nodes = nodes_ND.shape[0]
        # Row 2n of the received messages [2N, D] belongs to the predecessors of node n, row 2n + 1 to its successors:
        # one gather and one index_add for both directions.
        sources = torch.cat([graph.edge_src_E, graph.edge_dst_E])
        receivers = torch.cat([2 * graph.edge_dst_E, 2 * graph.edge_src_E + 1])
        degrees = occurrences(receivers, 2 * num_nodes).clamp(min=1).to(nodes_ND.dtype).unsqueeze(1)
        input_weight, input_bias = self._input_weight()
        weights = (input_weight, self.update.weight_hh, input_bias, self.update.bias_hh)
        states_ND = nodes_ND
        for _ in range(self.steps):
            received = states_ND.new_zeros(2 * num_nodes, self.dim)
            received = received.index_add(0, receivers, states_ND.index_select(0, sources)) / degrees
            # Not a view of both sizes at once, which AOTInductor of torch 2.13 computes wrongly for a size of the data.
            received = received.unflatten(0, (num_nodes, 2)).flatten(1)
            states_ND = gru_cell(received, states_ND, weights)
        return states_ND

    def _input_weight(self) -> tuple[Tensor, Tensor]:
        """Folds the message matrices of both directions into the input matrix of the GRU.

        Both maps are linear and the mean m commutes with them: W_a (H m + b) = (W_a H) m + W_a b. So the states
        themselves are averaged over edges, and no message is computed.
        """
        weight = self.update.weight_ih
        folded = [weight[:, : self.dim] @ self.message[0], weight[:, self.dim :] @ self.message[1]]
        return torch.cat(folded, dim=1), weight @ self.message_bias + self.update.bias_ih
