"""Session graphs of a whole batch, built by array operations.

A session's graph has one node for each distinct item, in order of first click, and one directed edge for each distinct
pair of consecutive clicks; an item clicked twice in a row gives a self loop (Guo et al., arXiv 2402.16539, section 3).

Shapes: B sessions, L clicks of all sessions, N nodes of all sessions, E edges of all sessions.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int64]


@dataclass
class SessionGraph:
    """The graphs of B sessions; nodes are numbered through the batch, session after session.

    Args:
        node_items_N: Item index of each node.
        node_offsets_B1: First node of each session; last entry N.
        click_offsets_B1: First click of each session; last entry L.
        alias_L: Node of each click.
        edge_src_E: Node an edge leaves. Edges stand in order of (src, dst), so a session's edges are together.
        edge_dst_E: Node an edge enters.
        edge_count_E: How often the session went this way.
    """

    node_items_N: Tensor
    node_offsets_B1: Tensor
    click_offsets_B1: Tensor
    alias_L: Tensor
    edge_src_E: Tensor
    edge_dst_E: Tensor
    edge_count_E: Tensor

    @property
    def num_sessions(self) -> int:
        """Number of sessions B."""
        return self.node_offsets_B1.numel() - 1

    @property
    def node_session_N(self) -> Tensor:
        """Session of each node."""
        return _rows_of(self.node_offsets_B1, self.node_items_N.shape[0])

    @property
    def click_session_L(self) -> Tensor:
        """Session of each click."""
        return _rows_of(self.click_offsets_B1, self.alias_L.shape[0])

    @property
    def last_node_B(self) -> Tensor:
        """Node of the last click of each session; -1 for an empty session."""
        starts_B, ends_B = self.click_offsets_B1[:-1], self.click_offsets_B1[1:]
        padded = torch.cat([self.alias_L, self.alias_L.new_full((1,), -1)])
        return padded[torch.where(ends_B > starts_B, ends_B - 1, self.alias_L.shape[0])]

    def tensors(self) -> Iterator[Tensor]:
        """The tensors, in order of declaration."""
        return (getattr(self, field.name) for field in fields(self))

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """The same graphs on another device."""
        return type(self)(*(tensor.to(device, non_blocking=non_blocking) for tensor in self.tensors()))

    def pin_memory(self) -> Self:
        """The same graphs in page-locked memory."""
        return type(self)(*(tensor.pin_memory() for tensor in self.tensors()))

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the memory from reuse until `stream` has done its work."""
        for tensor in self.tensors():
            tensor.record_stream(stream)


def _rows_of(offsets: Tensor, total: int) -> Tensor:
    rows = torch.arange(offsets.numel() - 1, device=offsets.device)
    return torch.repeat_interleave(rows, offsets[1:] - offsets[:-1], output_size=total)


def build_graphs(items_L: Tensor, offsets_B1: Tensor, num_items: int) -> SessionGraph:
    """Builds the graphs of all sessions of a batch.

    Nodes come from one sort of scalar keys that hold (session, item, click) in that order of significance: the first
    key of each (session, item) run is the first click, and the running count of first clicks in click order is the node
    number. Numpy sorts plain int64 values with vector instructions: 37,000 keys take 0.12 ms, where `torch.unique` with
    an inverse takes 0.47 ms and a sort that also returns positions 0.33 ms.

    Args:
        items_L: Item index of each click, oldest first, 0 .. num_items - 1, int64 on the CPU.
        offsets_B1: First click of each session, int64 [B + 1], beginning with 0 and ending with L; a session may be
            empty.
        num_items: Size V of the catalog.

    Raises:
        ValueError: The product of sessions, distinct items and clicks is beyond 2^63, so that keys do not fit into 64
            bits; a batch that large fits into no memory.
    """
    items, click_offsets = items_L.numpy(), offsets_B1.numpy()
    num_clicks, num_sessions = len(items), len(click_offsets) - 1
    click_bits = num_clicks.bit_length()
    known, num_known = items, num_items
    if (max(num_sessions, 1) * num_items) << click_bits > 1 << 63:
        # Large batches of large catalogs: items are numbered by what the batch holds of them.
        distinct, known = np.unique(items, return_inverse=True)
        num_known = len(distinct)
    if (max(num_sessions, 1) * num_known) << click_bits > 1 << 63:
        raise ValueError(f"a batch of {num_sessions} sessions and {num_clicks} clicks is too large; halve it")
    session_key = np.repeat(np.arange(num_sessions) * num_known, np.diff(click_offsets))
    keys = np.sort(((session_key + known) << click_bits) | np.arange(num_clicks))
    clicks, pairs = keys & ((1 << click_bits) - 1), keys >> click_bits
    starts = _run_starts(pairs)
    first_clicks = clicks[starts]
    is_first = np.zeros(num_clicks, dtype=bool)
    is_first[first_clicks] = True
    nodes_before = np.concatenate([[0], np.cumsum(is_first)])
    alias = np.empty(num_clicks, dtype=np.int64)
    alias[clicks] = np.repeat(nodes_before[first_clicks], np.diff(starts, append=num_clicks))
    src, dst, count = _edges(alias, click_offsets, int(nodes_before[-1]))
    arrays = (items[is_first], nodes_before[click_offsets], click_offsets, alias, src, dst, count)
    return SessionGraph(*(torch.from_numpy(array) for array in arrays))


def _edges(alias: IntArray, click_offsets: IntArray, num_nodes: int) -> tuple[IntArray, IntArray, IntArray]:
    """Distinct pairs of consecutive clicks, sorted by (src, dst), with their multiplicity."""
    follows = np.ones(len(alias) + 1, dtype=bool)
    follows[click_offsets] = False  # the first click of a session, and the end of the batch
    targets = np.flatnonzero(follows[:-1])
    # Shifts, because dividing by the number of nodes would take as long as the sort.
    node_bits = num_nodes.bit_length()
    keys = np.sort((alias[targets - 1] << node_bits) | alias[targets])
    starts = _run_starts(keys)
    edges = keys[starts]
    return edges >> node_bits, edges & ((1 << node_bits) - 1), np.diff(starts, append=len(keys))


def _run_starts(sorted_values: IntArray) -> IntArray:
    """Position of the first of each run of equal values."""
    differs = np.ones(len(sorted_values), dtype=bool)
    np.not_equal(sorted_values[1:], sorted_values[:-1], out=differs[1:])
    return np.flatnonzero(differs)
