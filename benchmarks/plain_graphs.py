"""Reading and graph building as in published session recommenders: one session after the other, in plain Python.

The batch format follows the SR-GNN code (Wu et al., AAAI 2019), on which most others build: sorted distinct items and a
square adjacency matrix per session, all padded to the largest session of the batch.

Shapes: B sessions, M most nodes of a session, T most clicks of a session.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from llmgr_rec.data.graph import SessionGraph


@dataclass
class PlainGraphs:
    """Padded graphs of a batch.

    Args:
        nodes_BM: Distinct items of each session in ascending order, then -1.
        alias_BT: Position in `nodes_BM` of each click, then -1.
        counts_BMM: Number of steps from one node to another.
    """

    nodes_BM: Tensor
    alias_BT: Tensor
    counts_BMM: Tensor


def read_rows(parts: Sequence[Path], first_groups: int) -> tuple[list[list[int]], list[int]]:
    """Sessions and targets of the first row groups as lists."""
    sessions: list[list[int]] = []
    targets: list[int] = []
    for part in parts:
        file = pq.ParquetFile(part)
        for number in range(min(first_groups, file.num_row_groups)):
            table = file.read_row_group(number, columns=["items", "target"], use_threads=False)
            sessions += table["items"].to_pylist()
            targets += table["target"].to_pylist()
        first_groups -= file.num_row_groups
        if first_groups <= 0:
            break
    return sessions, targets


def build(sessions: Sequence[Sequence[int]]) -> PlainGraphs:
    """Builds the graphs of a batch."""
    most_nodes = max(len(np.unique(session)) for session in sessions)
    longest = max(len(session) for session in sessions)
    nodes, aliases, counts = [], [], []
    for session in sessions:
        node = np.unique(session)
        alias = [int(np.where(node == item)[0][0]) for item in session]
        count_MM = np.zeros((most_nodes, most_nodes), dtype=np.float32)
        for source, target in pairwise(alias):
            count_MM[source][target] += 1
        nodes.append(node.tolist() + (most_nodes - len(node)) * [-1])
        aliases.append(alias + (longest - len(alias)) * [-1])
        counts.append(count_MM)
    return PlainGraphs(torch.tensor(nodes), torch.tensor(aliases), torch.from_numpy(np.array(counts)))


Graph = tuple[list[int], list[int], Counter[tuple[int, int]]]


def plain_contents(graphs: PlainGraphs) -> Iterator[Graph]:
    """For each session: its distinct items, its clicks, and the number of steps from one item to another."""
    for nodes, alias, count_MM in zip(graphs.nodes_BM, graphs.alias_BT, graphs.counts_BMM, strict=True):
        items = nodes.tolist()
        edges = {(items[src], items[dst]): int(count_MM[src, dst]) for src, dst in count_MM.nonzero().tolist()}
        clicks = [items[node] for node in alias.tolist() if node >= 0]
        yield [item for item in items if item >= 0], clicks, Counter(edges)


def fast_contents(graphs: SessionGraph) -> Iterator[Graph]:
    """The same for the graphs of llmgr_rec."""
    items = graphs.node_items_N.tolist()
    edges: list[Counter[tuple[int, int]]] = [Counter() for _ in range(graphs.num_sessions)]
    session_N = graphs.node_session_N.tolist()
    columns = (graphs.edge_src_E.tolist(), graphs.edge_dst_E.tolist(), graphs.edge_count_E.tolist())
    for src, dst, count in zip(*columns, strict=True):
        edges[session_N[src]][items[src], items[dst]] = count
    nodes, clicks = graphs.node_offsets_B1.tolist(), graphs.click_offsets_B1.tolist()
    alias = graphs.alias_L.tolist()
    for number, found in enumerate(edges):
        own = items[nodes[number] : nodes[number + 1]]
        yield sorted(own), [items[node] for node in alias[clicks[number] : clicks[number + 1]]], found
