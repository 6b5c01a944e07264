"""Clicks of sessions set out in rows, for encoders that read a session as a sequence.

Shapes: B sessions, L clicks of all sessions, N nodes, T clicks of the longest row, D columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmgr_rec.data.graph import SessionGraph


@dataclass
class ClickRows:
    """The newest clicks of each session, oldest first, padding behind them: causal readers never look at it.

    Args:
        node_BT: Node of each click; N at padding.
        place_BT: Places from the newest click back, 0 for that one; negative at padding.
        last_B: Place T of the newest click, 0 for a session without clicks.
        source_N: Row and place, as b * T + t, of each node's newest click that is set out; -1 where none is.
    """

    node_BT: Tensor
    place_BT: Tensor
    last_B: Tensor
    source_N: Tensor

    def set_out(self, vectors_ND: Tensor) -> Tensor:
        """Vectors of the clicked nodes, zeros at padding, [B, T, D]."""
        padded = torch.cat([vectors_ND, vectors_ND.new_zeros(1, vectors_ND.shape[1])])
        return padded.index_select(0, self.node_BT.flatten()).unflatten(0, self.node_BT.shape)

    def newest(self, states_BTD: Tensor) -> Tensor:
        """States at the newest clicks, [B, D]."""
        return states_BTD[torch.arange(self.last_B.numel(), device=self.last_B.device), self.last_B]

    def by_node(self, states_BTD: Tensor, vectors_ND: Tensor) -> Tensor:
        """The state at each node's newest click; its own vector where that was too long ago, [N, D]."""
        states_ND = states_BTD.flatten(0, 1).index_select(0, self.source_N.clamp(min=0))
        return torch.where(self.source_N.unsqueeze(1) >= 0, states_ND, vectors_ND)


def click_rows(graph: SessionGraph, most: int) -> ClickRows:
    """Sets out clicks, in one place at least.

    Args:
        graph: The sessions' graphs.
        most: Newest clicks kept of each session.
    """
    num_nodes = graph.node_items_N.numel()
    lengths_B = graph.click_offsets_B1.diff().clamp(max=most)
    place_T = torch.arange(max(1, int(lengths_B.max())), device=lengths_B.device)
    place_BT = lengths_B.unsqueeze(1) - 1 - place_T
    click_BT = graph.click_offsets_B1[1:].unsqueeze(1) - 1 - place_BT
    padded_alias = torch.cat([graph.alias_L, graph.alias_L.new_full((1,), num_nodes)])
    node_BT = padded_alias[torch.where(place_BT >= 0, click_BT, graph.alias_L.numel())]
    # Places grow with time within a session, so a node's largest one is its newest click.
    source_N = torch.full((num_nodes + 1,), -1, device=node_BT.device)
    source_N.scatter_reduce_(0, node_BT.flatten(), torch.arange(node_BT.numel(), device=node_BT.device), "amax")
    return ClickRows(node_BT, place_BT, (lengths_B - 1).clamp(min=0), source_N[:num_nodes])
