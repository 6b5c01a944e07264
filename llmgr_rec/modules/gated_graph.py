"""The gated graph network of SR-GNN (arXiv 1811.00855, eq. 1 to 5) on edge lists: no padding, no dense adjacency.

Shapes: N nodes, E edges (distinct ordered pairs within a session), D = d1 columns.
"""

import torch
from torch import Tensor, nn

from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.modules.session_encoder import initialize_uniform


class GatedGraph(nn.Module):
    """Exchanges messages along session edges and updates each node like a GRU.

    A node takes the mean message of its predecessors and the mean message of its successors (eq. 1 with the adjacency
    normalized over distinct edges, as in the authors' code). The update is theirs too: the reset gate multiplies the
    projected state, which is the standard GRU cell and needs two matrix products, where eq. 4 as printed needs three.

    Args:
        dim: Width of node states, in columns.
        steps: Rounds of message passing; the parameters are shared between rounds.
    """

    def __init__(self, dim: int, steps: int) -> None:
        super().__init__()
        self.dim = dim
        self.steps = steps
        # The two halves of H in eq. 1: messages from predecessors, messages from successors.
        self.message = nn.Parameter(torch.empty(2, dim, dim))
        self.message_bias = nn.Parameter(torch.empty(2 * dim))
        self.update = nn.GRUCell(2 * dim, dim)
        initialize_uniform(self, dim)

    def reset_parameters(self) -> None:
        """Draws the message matrices anew, as TorchRec and FSDP ask of modules that were built on the meta device."""
        for parameter in (self.message, self.message_bias):
            nn.init.uniform_(parameter, -(self.dim**-0.5), self.dim**-0.5)

    def forward(self, nodes_ND: Tensor, graph: SessionGraph) -> Tensor:
        """Runs the rounds.

        Args:
            nodes_ND: Node vectors before the first round.
            graph: The sessions' graphs.

        Returns:
            Node states after the last round, [N, D].
        """
        num_nodes = nodes_ND.shape[0]
        # Row 2n of the received matrix seen as [2N, D] is what node n has from predecessors, row 2n + 1 what it has
        # from successors, so both directions are one gather and one addition by index.
        sources = torch.cat([graph.edge_src_E, graph.edge_dst_E])
        receivers = torch.cat([2 * graph.edge_dst_E, 2 * graph.edge_src_E + 1])
        degrees = torch.bincount(receivers, minlength=2 * num_nodes).clamp(min=1).to(nodes_ND.dtype).unsqueeze(1)
        input_weight, input_bias = self._input_weight()
        states_ND = nodes_ND
        for _ in range(self.steps):
            received = nodes_ND.new_zeros(2 * num_nodes, self.dim)
            received = received.index_add(0, receivers, states_ND.index_select(0, sources)) / degrees
            states_ND = torch.gru_cell(
                received.view(num_nodes, 2 * self.dim),
                states_ND,
                input_weight,
                self.update.weight_hh,
                input_bias,
                self.update.bias_hh,
            )
        return states_ND

    def _input_weight(self) -> tuple[Tensor, Tensor]:
        """Folds the message matrices of both directions into the update's input matrix.

        Both maps are linear with a mean between them, so W_a (H m + b) = (W_a H) m + W_a b: states travel along the
        edges as they are, and no message is ever computed.
        """
        weight = self.update.weight_ih
        folded = [weight[:, : self.dim] @ self.message[0], weight[:, self.dim :] @ self.message[1]]
        return torch.cat(folded, dim=1), weight @ self.message_bias + self.update.bias_ih
