"""Session graphs by torch operators that `torch.export` traces, equal to those of `graph.build_graphs`.

`build_graphs` uses numpy, which no exported program can call.

Shapes: B sessions, L clicks of all sessions, N nodes of all sessions, E edges of all sessions.
"""

import torch
from torch import Tensor

from llmgr_rec.data.graph import SessionGraph


def rows_of(offsets_B1: Tensor, size: int) -> Tensor:
    """Row of each value, int64 [size].

    Args:
        offsets_B1: First value of each row and, last, the number of values.
        size: Number of values.
    """
    # Not torch.repeat_interleave: AOTInductor does not check its sizes.
    ends_L = torch.zeros(size + 1, dtype=torch.int64, device=offsets_B1.device)
    ones_B = torch.ones_like(offsets_B1[1:])
    return ends_L.scatter_add(0, offsets_B1[1:], ones_B).cumsum(0)[:size]


def offsets_of(row_L: Tensor, num_rows: int) -> Tensor:
    """First value of each row and, last, the number of values, int64 [B + 1].

    Args:
        row_L: Row of each value, ascending.
        num_rows: Number of rows B.
    """
    counts = torch.zeros(num_rows + 1, dtype=torch.int64, device=row_L.device)
    return counts.scatter_add(0, row_L + 1, torch.ones_like(row_L)).cumsum(0)


def newest_known(
    items_L: Tensor, offsets_B1: Tensor, num_items: int, max_length: int, merges_repeats: bool
) -> tuple[Tensor, Tensor]:
    """The clicks that a ranking shows of each session; see `scoring.click_lists.known_clicks` and `Jagged.last`.

    Args:
        items_L: Item index of each click, oldest first, int64; an index outside of the catalog is unknown.
        offsets_B1: First click of each session and, last, L, int64.
        num_items: Size V of the catalog.
        max_length: Newest known clicks that are kept of each session.
        merges_repeats: Whether clicks on the item clicked just before are dropped.

    Returns:
        Item indices and the session of each click.
    """
    session_L = rows_of(offsets_B1, items_L.shape[0])
    known = ((items_L >= 0) & (items_L < num_items)).nonzero().squeeze(1)
    items_L, session_L = items_L.index_select(0, known), session_L.index_select(0, known)
    if merges_repeats:
        keys = session_L * num_items + items_L
        kept = _run_starts(keys).nonzero().squeeze(1)
        items_L, session_L = items_L.index_select(0, kept), session_L.index_select(0, kept)
    ends_B = offsets_of(session_L, offsets_B1.shape[0] - 1)[1:]
    after_L = ends_B.index_select(0, session_L) - 1 - torch.arange(items_L.shape[0], device=items_L.device)
    newest = (after_L < max_length).nonzero().squeeze(1)
    return items_L.index_select(0, newest), session_L.index_select(0, newest)


def build_graphs_by_operators(items_L: Tensor, session_L: Tensor, num_sessions: int, num_items: int) -> SessionGraph:
    """Builds the graphs of all sessions of a batch.

    Args:
        items_L: Item index of each click, oldest first, 0 .. num_items - 1, int64.
        session_L: Session of each click, ascending, int64.
        num_sessions: Number B of sessions.
        num_items: Size V of the catalog. B * V must be below 2^63.
    """
    # Stable, so that the first of equal keys is the first click on the item in its session: a node.
    keys_L, order_L = torch.sort(session_L * num_items + items_L, stable=True)
    starts_L = _run_starts(keys_L)
    first_clicks = order_L.index_select(0, starts_L.nonzero().squeeze(1))
    first_L = first_clicks.index_select(0, starts_L.cumsum(0) - 1)
    is_first_L = torch.zeros_like(items_L).scatter(0, order_L, starts_L.long())
    nodes_before = torch.cat([is_first_L.new_zeros(1), is_first_L.cumsum(0)])
    alias_L = torch.zeros_like(items_L).scatter(0, order_L, nodes_before.index_select(0, first_L))
    click_offsets_B1 = offsets_of(session_L, num_sessions)
    return SessionGraph(
        items_L.index_select(0, is_first_L.nonzero().squeeze(1)),
        nodes_before.index_select(0, click_offsets_B1),
        click_offsets_B1,
        alias_L,
        *_edges(alias_L, session_L),
    )


def _edges(alias_L: Tensor, session_L: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Source, destination and count of each distinct pair of consecutive clicks, sorted by (src, dst)."""
    targets = (~_run_starts(session_L)).nonzero().squeeze(1)
    size = alias_L.shape[0] + 1
    keys = torch.sort(alias_L.index_select(0, targets - 1) * size + alias_L.index_select(0, targets)).values
    starts = _run_starts(keys).nonzero().squeeze(1)
    edges_E = keys.index_select(0, starts)
    ends = torch.cat([starts, starts.new_full((1,), keys.shape[0])])[1:]
    return edges_E // size, edges_E % size, ends - starts


def _run_starts(values: Tensor) -> Tensor:
    """Whether each value differs from the one before it; true for the first."""
    before = torch.cat([values.new_full((1,), -1), values])[: values.shape[0]]
    return values != before
