"""The gated graph network of SR-GNN (arXiv 1811.00855, eq. 1 to 5) on edge lists, without padding or dense adjacency.

Shapes: N nodes, E edges (distinct ordered pairs within a session), V items of the catalog, D = d1 columns, G = 3 * D
columns of the gates; M and C nodes as in `kernels.prefix_nodes`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.kernels.gated_recurrence import Weights, gru_cell
from llmgr_rec.kernels.prefix_nodes import PrefixNodes
from llmgr_rec.modules.session_encoder import initialize_uniform, occurrences

# Memory of the gates of all items; larger catalogs multiply the vectors of the nodes instead.
_MAX_PREPARED_BYTES = 1 << 27


@dataclass(frozen=True)
class ItemGates:
    """What one round of message passing computes of an item alone, for all items.

    Args:
        state_gates_VG: What the state of the item adds to its gates; with all biases but the next one.
        new_bias_D: Bias of the input of the new state, which the reset gate does not multiply.
        edge_gates_XG: What the item adds to the gates of its successors, then to those of its predecessors, X = 2 * V.
    """

    state_gates_VG: Tensor
    new_bias_D: Tensor
    edge_gates_XG: Tensor


class GatedGraph(nn.Module):
    """Exchanges messages along session edges and updates each node like a GRU.

    A node receives the mean message of its predecessors and the mean message of its successors: eq. 1 with the
    adjacency normalized over distinct edges, as in the authors' code. As in that code, the update is the standard GRU
    cell, whose reset gate multiplies the projected state. Eq. 4 as printed multiplies the state before the projection.

    Args:
        dim: Width of node states, in columns.
        steps: Rounds of message passing; the parameters are shared between rounds.

    Attributes:
        training_dtype: Number format of the products of a training step.
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
        self._folded: Weights | None = None
        self.training_dtype = torch.float32

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
        degrees = _degrees(receivers, num_nodes, nodes_ND.dtype)
        weights = self._weights()
        states_ND = nodes_ND
        for _ in range(self.steps):
            received = _mean_of_sources(states_ND, sources, receivers, degrees)
            states_ND = gru_cell(received, states_ND, weights, self._product_dtype)
        return states_ND

    def forward_prefixes(self, nodes_MD: Tensor, graph: SessionGraph, prefixes: PrefixNodes) -> Tensor:
        """`forward` for all prefixes of each pass, computing each state once; for one round of message passing.

        Args:
            nodes_MD: Node vectors of the longest prefix of each pass.
            graph: Graphs of the prefixes.
            prefixes: Their nodes.

        Returns:
            The states, [C, D], of which node n has number `prefixes.state_N[n]`.

        Raises:
            ValueError: There are several rounds, in which a node depends on more than its neighbors.
        """
        if self.steps > 1:
            raise ValueError(f"{self.steps} rounds of message passing do not share states between prefixes")
        num_computed = prefixes.computed_C.shape[0]
        # The receivers of `forward`, without the nodes whose state is known; those have number -1.
        number_N = torch.full_like(prefixes.state_N, -1)
        number_N[prefixes.computed_C] = torch.arange(num_computed, device=number_N.device)
        sources = prefixes.vector_N[torch.cat([graph.edge_src_E, graph.edge_dst_E])]
        receivers = torch.cat([2 * number_N[graph.edge_dst_E], 2 * number_N[graph.edge_src_E] + 1])
        is_computed = (receivers >= 0).nonzero().squeeze(1)
        sources, receivers = sources[is_computed], receivers[is_computed]
        degrees = _degrees(receivers, num_computed, nodes_MD.dtype)
        received = _mean_of_sources(nodes_MD, sources, receivers, degrees)
        states_CD = nodes_MD[prefixes.vector_N[prefixes.computed_C]]
        return gru_cell(received, states_CD, self._weights(), self._product_dtype)

    def fold(self) -> None:
        """Computes for good what depends on the weights alone. They must not change any more."""
        with torch.no_grad():
            self._folded = self._weights()

    def can_prepare(self, num_items: int) -> bool:
        """Whether the gates of all items are affordable, and enough: of several rounds, only the first knows its nodes.

        Args:
            num_items: Number of items.
        """
        return self.steps == 1 and 3 * num_items * self.update.bias_hh.numel() * 4 <= _MAX_PREPARED_BYTES

    @torch.no_grad()
    def prepare_items(self, items_VD: Tensor) -> ItemGates:
        """Multiplies the vectors of all items by the weights, so that `forward_prepared` multiplies nothing.

        Args:
            items_VD: Item vectors.
        """
        input_weight, state_weight, input_bias, state_bias = self._weights()
        new_bias_D = input_bias[2 * self.dim :]
        state_bias = state_bias + functional.pad(input_bias[: 2 * self.dim], (0, self.dim))
        num_items = items_VD.shape[0]
        # One matrix, and not two that are joined, which would hold all gates twice.
        edge_gates_XG = items_VD.new_empty(2 * num_items, state_weight.shape[0])
        for gates_VG, half in zip(edge_gates_XG.split(num_items), input_weight.split(self.dim, dim=1), strict=True):
            torch.mm(items_VD, half.T, out=gates_VG)
        return ItemGates(
            state_gates_VG=functional.linear(items_VD, state_weight, state_bias),
            new_bias_D=new_bias_D,
            edge_gates_XG=edge_gates_XG,
        )

    def forward_prepared(self, items: ItemGates, nodes_ND: Tensor, graph: SessionGraph) -> Tensor:
        """`forward` from the gates of all items: those of the neighbors of a node are averaged in place of states.

        Args:
            items: From `prepare_items`.
            nodes_ND: Vectors of the nodes.
            graph: The sessions' graphs.
        """
        num_items, num_nodes, dim = items.state_gates_VG.shape[0], nodes_ND.shape[0], self.dim
        # As in `forward`: even receivers are successors, odd ones predecessors.
        receivers = torch.cat([2 * graph.edge_dst_E, 2 * graph.edge_src_E + 1])
        receivers, order = torch.sort(receivers)
        item_E, other_E = (graph.node_items_N.index_select(0, ends) for ends in (graph.edge_src_E, graph.edge_dst_E))
        added = torch.cat([item_E, other_E + num_items]).index_select(0, order)
        counts = occurrences(receivers, 2 * num_nodes).index_select(0, receivers)
        shares = 1 / counts.to(nodes_ND.dtype)
        starts_N = torch.searchsorted(receivers, 2 * torch.arange(num_nodes, device=receivers.device))
        input_NG = functional.embedding_bag(added, items.edge_gates_XG, starts_N, mode="sum", per_sample_weights=shares)
        state_NG = items.state_gates_VG.index_select(0, graph.node_items_N)
        gates = torch.sigmoid_(input_NG[:, : 2 * dim] + state_NG[:, : 2 * dim])
        new_ND = (input_NG[:, 2 * dim :] + items.new_bias_D).addcmul_(gates[:, :dim], state_NG[:, 2 * dim :])
        # The hyperbolic tangent, of which torch's own takes several times as long on a CPU.
        new_ND = new_ND.mul_(2).sigmoid_().mul_(2).sub_(1)
        return torch.lerp(new_ND, nodes_ND, gates[:, dim:])

    @property
    def _product_dtype(self) -> torch.dtype:
        return self.training_dtype if self.training else torch.float32

    def _weights(self) -> Weights:
        """Weights of the GRU cell for mean node states as inputs.

        Folds the message matrices of both directions into the input matrix of the GRU.

        Both maps are linear and the mean m commutes with them: W_a (H m + b) = (W_a H) m + W_a b. So the states
        themselves are averaged over edges, and no message is computed.
        """
        if self._folded is not None:
            return self._folded
        weight = self.update.weight_ih
        folded = [weight[:, : self.dim] @ self.message[0], weight[:, self.dim :] @ self.message[1]]
        bias = weight @ self.message_bias + self.update.bias_ih
        return torch.cat(folded, dim=1), self.update.weight_hh, bias, self.update.bias_hh


def _degrees(receivers: Tensor, num_nodes: int, dtype: torch.dtype) -> Tensor:
    """Number of messages that each of the 2 * N receivers gets, 1 where it gets none, [2N, 1]."""
    return occurrences(receivers, 2 * num_nodes).clamp(min=1).to(dtype).unsqueeze(1)


def _mean_of_sources(states_ND: Tensor, sources: Tensor, receivers: Tensor, degrees: Tensor) -> Tensor:
    """Mean states of the predecessors and of the successors of each receiving node, side by side, [N, 2D]."""
    received = states_ND.new_zeros(degrees.shape[0], states_ND.shape[1])
    received = received.index_add(0, receivers, states_ND.index_select(0, sources)) / degrees
    # Not a view of both sizes at once, which AOTInductor of torch 2.13 computes wrongly for a size of the data.
    return received.unflatten(0, (degrees.shape[0] // 2, 2)).flatten(1)
