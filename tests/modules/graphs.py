"""Small batches of session graphs for the tests of modules."""

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.data.graph import SessionGraph, build_graphs
from llmgr_rec.data.jagged import Jagged

NUM_ITEMS = 12
NUM_CATEGORIES = 5

# Few items and short sessions, so that repeated clicks, loops and empty sessions are frequent.
sessions_strategy = st.lists(st.lists(st.integers(0, 5), max_size=6), min_size=1, max_size=5)


def graphs_of(sessions: Sequence[Sequence[int]]) -> SessionGraph:
    """Graphs of sessions given as lists of item indices."""
    lengths = torch.tensor([len(session) for session in sessions], dtype=torch.int64)
    items = torch.tensor([item for session in sessions for item in session], dtype=torch.int64)
    return build_graphs(items, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]), NUM_ITEMS)


def categories_of(item: int) -> list[int]:
    """Category ids of an item: none for item 0, one or two for others."""
    return sorted({item % NUM_CATEGORIES, item // 3 % NUM_CATEGORIES}) if item else []


def features_of(items: torch.Tensor) -> KeyedJaggedTensor:
    """A bag for each of the items."""
    categories = [categories_of(item) for item in items.tolist()]
    return KeyedJaggedTensor(
        keys=["item_id", "category"],
        values=torch.cat([items, torch.tensor([c for bag in categories for c in bag], dtype=torch.int64)]),
        lengths=torch.cat([torch.ones_like(items), torch.tensor([len(bag) for bag in categories], dtype=torch.int64)]),
        stride=items.numel(),
    )


def batch_of(sessions: Sequence[Sequence[int]], targets: Sequence[int]) -> SessionBatch:
    """A batch that scores the whole catalog; target -1 makes a filler row."""
    graph, targets_B = graphs_of(sessions), torch.tensor(targets)
    candidates_C = torch.arange(NUM_ITEMS)
    return SessionBatch(
        features=features_of(torch.cat([graph.node_items_N, candidates_C])),
        graph=graph,
        targets_B=targets_B,
        target_columns_B=targets_B,
        weights_B=(targets_B >= 0).float(),
        rows_B=torch.arange(len(targets)),
        candidates_C=candidates_C,
        log_q_C=torch.zeros(NUM_ITEMS),
        text_tokens=Jagged.empty(len(targets)),
        text_items_B=torch.full_like(targets_B, -1),
        global_size=int((targets_B >= 0).sum()),
        step=0,
        epoch=0,
        num_items=NUM_ITEMS,
    )
