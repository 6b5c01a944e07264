"""The definition of session graphs that `build_graphs` is tested against."""

import torch
from torch import Tensor

from llmgr_rec.data.graph import SessionGraph


def build_graphs_reference(items_L: Tensor, offsets_B1: Tensor) -> SessionGraph:
    """Session graphs by a plain loop over clicks."""
    node_items: list[int] = []
    node_offsets, alias = [0], []
    edges: dict[tuple[int, int], int] = {}
    for start, end in zip(offsets_B1[:-1].tolist(), offsets_B1[1:].tolist(), strict=True):
        node_of_item: dict[int, int] = {}
        for click in range(start, end):
            item = int(items_L[click])
            if item not in node_of_item:
                node_of_item[item] = len(node_items)
                node_items.append(item)
            alias.append(node_of_item[item])
            if click > start:
                edge = (alias[-2], alias[-1])
                edges[edge] = edges.get(edge, 0) + 1
        node_offsets.append(len(node_items))
    ordered = sorted(edges)
    columns = [
        node_items,
        node_offsets,
        offsets_B1.tolist(),
        alias,
        [src for src, _ in ordered],
        [dst for _, dst in ordered],
        [edges[edge] for edge in ordered],
    ]
    return SessionGraph(*(torch.tensor(column, dtype=torch.int64) for column in columns))
