"""The gated graph network of SR-GNN (arXiv 1811.00855, eq. 1 to 5) on edge lists: no padding, no dense adjacency.

Shapes: N nodes, E edges (distinct ordered pairs within a session), D = d1 columns.
"""

import torch
from torch import Tensor, nn

from llmgr_rec.data.graph import SessionGraph


class GatedGraph(nn.Module):
    """Exchanges messages along session edges and updates each node like a GRU.

    A node takes the mean message of its predecessors and the mean message of its successors (eq. 1 with the adjacency
    normalised over distinct edges, as in the authors' code). The update is theirs too: the reset gate multiplies the
    projected state, which is the standard GRU cell and needs two matrix products, where eq. 4 as printed needs three.

    Args:
        dim: Width of node states, in columns.
        steps: Rounds of message passing; the parameters are shared between rounds.
    """

    def __init__(self, dim: int, steps: int) -> None:
        super().__init__()
        self.dim = dim
        self.steps = steps
        # Rows [:dim] make the messages to successors, rows [dim:] those to predecessors.
        self.message = nn.Linear(dim, 2 * dim, bias=False)
        self.message_bias = nn.Parameter(torch.empty(2 * dim))
        self.update = nn.GRUCell(2 * dim, dim)

    def forward(self, nodes_ND: Tensor, graph: SessionGraph) -> Tensor:
        """Runs the rounds.

        Args:
            nodes_ND: Node vectors before the first round.
            graph: The sessions' graphs.

        Returns:
            Node states after the last round, [N, D].
        """
        num_nodes = nodes_ND.shape[0]
        # Row 2n of the message matrix seen as [2N, D] is node n's message to successors, row 2n + 1 to predecessors;
        # the received matrix is laid out alike, so both directions are one gather and one addition by index.
        sources = torch.cat([2 * graph.edge_src_E, 2 * graph.edge_dst_E + 1])
        receivers = torch.cat([2 * graph.edge_dst_E, 2 * graph.edge_src_E + 1])
        degrees = torch.bincount(receivers, minlength=2 * num_nodes).clamp(min=1).to(nodes_ND.dtype).unsqueeze(1)
        states_ND = nodes_ND
        for _ in range(self.steps):
            messages = self.message(states_ND).view(2 * num_nodes, self.dim).index_select(0, sources)
            received = messages.new_zeros(2 * num_nodes, self.dim).index_add(0, receivers, messages) / degrees
            states_ND = self.update(received.view(num_nodes, 2 * self.dim) + self.message_bias, states_ND)
        return states_ND
