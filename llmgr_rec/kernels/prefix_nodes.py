"""The nodes of all prefixes of a session, of which most have the state that they have in a shorter prefix.

One round of message passing gives a node a state that depends on its item and its neighbors alone. When a session goes
on by a click, only two nodes can get a new neighbor: that of the new click, and that of the click before it. All others
keep their states. So of the nodes of all prefixes, those two of each prefix and all of the first prefix have to be
computed, and the result is exact.

The session 5 8 5 7 with all its prefixes in one pass, and the node of a shorter prefix that has the same state:

    prefix    5       5  8        5  8        5  8  7
    node      0       1  2        3  4        5  6  7
    state of  0       1  2        3  4        5  4  7

The last prefix adds the edge from 5 to 7, so nodes 5 and 7 are new. Node 6 is between two clicks on 5 as node 4 is:

>>> from llmgr_rec.data.graph import build_graphs
>>> clicks, offsets_B1 = torch.tensor([5, 5, 8, 5, 8, 5, 5, 8, 5, 7]), torch.tensor([0, 1, 3, 6, 10])
>>> nodes = prefix_nodes(build_graphs(clicks, offsets_B1, num_items=9), torch.tensor([0, 4]))
>>> nodes.computed_C[nodes.state_N].tolist()
[0, 1, 2, 3, 4, 5, 4, 7]

Every item has one vector in all prefixes, that of its node in the longest one, which has the nodes 5, 6 and 7:

>>> nodes.vector_N.tolist()
[0, 0, 1, 0, 1, 0, 1, 2]

Shapes: B prefixes of the batch, L their clicks, N their nodes, P passes, M nodes of the longest prefix of each pass, C
computed nodes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmgr_rec.data.graph import SessionGraph, nodes_of_longest


@dataclass
class PrefixNodes:
    """Which nodes of all prefixes share vectors and states. All tensors are int64.

    Args:
        vector_N: Of the M nodes of the longest prefixes, see `nodes_of_longest`, that of the same item.
        computed_C: Nodes whose state is that of no shorter prefix.
        state_N: Index in `computed_C` of the node with the same state after one round of message passing.
    """

    vector_N: Tensor
    computed_C: Tensor
    state_N: Tensor


def prefix_nodes(graph: SessionGraph, pass_offsets_P1: Tensor) -> PrefixNodes:
    """Finds the nodes that share vectors and states.

    Args:
        graph: Graphs of the prefixes.
        pass_offsets_P1: First prefix of each pass and, last, the number of prefixes, int64; each prefix of a pass is
            one click longer than the one before.
    """
    session_N = graph.node_session_N
    node_N = torch.arange(session_N.shape[0], device=session_N.device)
    # A session numbers its nodes by first click, so an item has the same number in all prefixes that have it.
    number_N = node_N - graph.node_offsets_B1[session_N]
    pass_B = torch.repeat_interleave(pass_offsets_P1.diff(), output_size=graph.num_sessions)
    offsets_B1, longest = graph.node_offsets_B1, nodes_of_longest(graph, pass_offsets_P1)
    prefix_N = _first_prefix_of_state(graph, session_N, pass_offsets_P1[:-1][pass_B])
    same_N = offsets_B1[prefix_N] + number_N
    is_computed_N = same_N == node_N
    return PrefixNodes(
        vector_N=longest.offsets[pass_B[session_N]] + number_N,
        computed_C=is_computed_N.nonzero().squeeze(1),
        state_N=(is_computed_N.cumsum(0) - 1)[same_N],
    )


def _first_prefix_of_state(graph: SessionGraph, session_N: Tensor, first_prefix_B: Tensor) -> Tensor:
    """The first prefix of its pass in which each node has the neighbors that it has in its own, int64 [N].

    A node has all of its neighbors one click after its last. A prefix that ends there is as many prefixes before the
    node's own as it has clicks less.
    """
    clicks_L = torch.arange(graph.alias_L.shape[0], device=session_N.device)
    last_click_N = torch.zeros_like(session_N).scatter_reduce(0, graph.alias_L, clicks_L, "amax")
    clicks_after_N = graph.click_offsets_B1[1:][session_N] - 1 - last_click_N
    return torch.maximum(session_N - (clicks_after_N - 1).clamp(min=0), first_prefix_B[session_N])
